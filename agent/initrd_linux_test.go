package agent

import "testing"

func TestModuleParameters(t *testing.T) {
	const line = "console=ttyS0 softdog.soft_margin=60 efi-pstore.pstore_disable=1 dm_mod.create=a.b softdog.nowayout=1 panic=20"
	for file, want := range map[string]string{
		"softdog.ko":    "soft_margin=60 nowayout=1",
		"efi_pstore.ko": "pstore_disable=1", "efi-pstore.ko": "pstore_disable=1",
		"dm-mod.ko": "create=a.b",
		"ext4.ko":   "", "console.ko": "",
	} {
		if got := moduleParameters(file, line); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
}
