package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// noVariables is a firmware whose store cannot be read (F67).
type noVariables struct{}

func (noVariables) Read(EFIVar) (uint32, []byte, error) { return 0, nil, unix.EIO }
func (noVariables) Write(EFIVar, uint32, []byte) error  { return unix.EIO }
func (noVariables) Append(EFIVar, uint32, []byte) error { return unix.EIO }
func (noVariables) List() ([]EFIVar, error)             { return nil, unix.EIO }
func (noVariables) FreeBytes() (int64, error)           { return -1, unix.EIO }

// TestGather asks a software TPM and a made-up machine, before anything is installed.
// Nothing is left in the TPM.
func TestGather(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"sys/firmware/efi/fw_platform_size": "64\n", "sys/class/rtc/rtc0/name": "rtc_cmos\n",
		"sys/class/dmi/id/sys_vendor": "QEMU\n", "sys/class/dmi/id/product_name": "Standard PC\n",
		"sys/class/watchdog/watchdog0/identity": "i6300ESB timer\n", "sys/kernel/iommu_groups/0/type": "DMA\n",
		"proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu hypervisor sse\n",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	tpm := sealtest.Start(t)
	for i := range 8 {
		tpm.Extend(i, "firmware")
	}
	x := examiner{root: root, vars: noVariables{}, now: func() time.Time { return today }, openTPM: func() (seal.TPM, error) { return keepOpen{tpm}, nil }}
	f := x.gather("")
	if !f.EFI || !f.RTC || f.IOMMUGroups != 1 || f.VM != "QEMU Standard PC" || len(f.Watchdogs) != 1 || f.Disk != "" {
		t.Errorf("facts %+v", f)
	}
	if f.TPMError != nil || f.SelfTestError != nil || f.OwnerError != nil || f.SpaceError != nil || f.Fitness.Family != "2.0" {
		t.Errorf("TPM: %v, %v, %v, %v", f.TPMError, f.SelfTestError, f.OwnerError, f.SpaceError)
	}
	if !errors.Is(f.LogError, fs.ErrNotExist) || !errors.Is(f.SecureBootError, ErrVariables) || f.VariableError == nil {
		t.Errorf("log %v, Secure Boot %v, variables %v", f.LogError, f.SecureBootError, f.VariableError)
	}
	if d := Examine(f); d.Policy != seal.PolicyStandard {
		t.Errorf("policy %q", d.Policy)
	}
	if s, err := seal.ReadSpace(tpm); err != nil || s.StorageKey || s.Counter || tpm.Handles() != 0 {
		t.Errorf("left behind: %+v, %v, %d handles", s, err, tpm.Handles())
	}

	x = examiner{root: t.TempDir(), vars: noVariables{}, now: time.Now, openTPM: func() (seal.TPM, error) { return nil, seal.ErrNoTPM }}
	f = x.gather(seal.PolicyStrict)
	if d := Examine(f); d.Fit || f.VM != "" || f.EFI {
		t.Errorf("an empty machine: %+v", d)
	}
}

// keepOpen hides that a TPM can be closed.
type keepOpen struct{ seal.TPM }
