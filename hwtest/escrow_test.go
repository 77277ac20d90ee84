package hwtest_test

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/seal/escrow"
)

// TestEscrow: a box hands its recovery key out on a stick, encrypted; the vendor reads
// it and acknowledges; updates wait for that; the key opens the disk without the box.
// Then the key is replaced, and the old one is void.
func TestEscrow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	private, public, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"receipt.key": private, "receipt.pub": public} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k := theProduct(t).keys
	p := buildRelease(t, dir, k, "1.0.0", func(s *spec.Spec) {
		s.Recovery = spec.Recovery{
			Console: image.ConsoleQR, Threshold: 1, Holders: []spec.Holder{{Name: "vendor", Key: k.EscrowRecipient.String()}},
			ReceiptKey: "receipt.pub", RequireReceipt: true,
		}
	})
	m := hwtest.New(t, p.disk(), hwtest.Options{SecureBoot: p.firmwareKeys(t), Forward: []int{80}})
	m.PowerOn()
	shown := m.Expect(recoveryPattern, bootTime)[1]
	m.Expect(readyPattern, bootTime)
	if !strings.Contains(m.Console(), "█▀") {
		t.Error("no QR code on the console")
	}
	wantCustody(t, m, agent.EscrowMade, true)

	stick := newStick(t)
	request := filepath.Join(dir, "request")
	if err := os.WriteFile(request, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "mcopy", "-i", stick, request, "::ESCROW-REQUEST.TXT")
	if err := m.VM().Plug(stick, false); err != nil {
		t.Fatal(err)
	}
	m.Expect(`escrow handed out serial=1 to="?medium `, bootTime)
	m.Expect(`the medium may be pulled out`, bootTime)
	if err := m.VM().Unplug(); err != nil {
		t.Fatal(err)
	}
	wantCustody(t, m, agent.EscrowHandedOut, true)
	file := fromStick(t, stick, "holdfast-escrow-probe-")
	escrowKey := filepath.Join(dir, "escrow.key")
	if err := os.WriteFile(escrowKey, []byte(k.Escrow.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(web.holdfast(t, "recover", file, "--key", escrowKey))); got != shown {
		t.Error("the escrow has another key than the console showed")
	}

	if out := string(web.holdfast(t, "escrow", "inspect", file)); !strings.Contains(out, "TPM key 000b") {
		t.Errorf("the TPM did not sign:\n%s", out)
	}

	receipt := filepath.Join(dir, "receipt.json")
	web.holdfast(t, "escrow", "receipt", file, "--key", filepath.Join(dir, "receipt.key"), "--opens", escrowKey, "-o", receipt)
	stick = newStick(t)
	tool(t, "mcopy", "-i", stick, receipt, "::"+escrow.ReceiptPrefix+"1.json")
	if err := m.VM().Plug(stick, false); err != nil {
		t.Fatal(err)
	}
	m.Expect(`escrow acknowledged serial=1`, bootTime)
	wantCustody(t, m, agent.EscrowReceipted, false)

	text, err := call(m, http.MethodPost, "/v1/recovery/replace", "")
	if err != nil {
		t.Fatal(err)
	}
	var next agent.Replacement
	if err := json.Unmarshal([]byte(text), &next); err != nil || next.Serial != 2 || next.Key == shown {
		t.Fatalf("replacement %d, %v", next.Serial, err)
	}
	if _, err := call(m, http.MethodPost, "/v1/recovery/commit?serial=2", ""); err != nil {
		t.Fatal(err)
	}
	wantCustody(t, m, agent.EscrowMade, true)
	m.PowerButton(bootTime)
	if strings.Count(m.Console(), shown[:26]) != 1 || strings.Contains(m.Console(), next.Key[:26]) {
		t.Error("a recovery key is on the console where it should not be")
	}
	volume := extract(t, m.Disk, "data")
	if err := opens(t, volume, next.Key); err != nil {
		t.Errorf("the new key: %v", err)
	}
	if err := opens(t, volume, shown); err == nil {
		t.Error("the old key opens the disk")
	}
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
}

// wantCustody asks the agent in the box.
func wantCustody(t *testing.T, m *hwtest.Machine, want string, held bool) {
	t.Helper()
	text, err := call(m, http.MethodGet, "/v1/recovery", "")
	if err != nil {
		t.Fatal(err)
	}
	var s agent.RecoveryStatus
	if err := json.Unmarshal([]byte(text), &s); err != nil || s.Escrow != want || s.UpdatesHeld != held {
		t.Errorf("recovery is %+v (%v), want the escrow %s", s, err, want)
	}
}

// newStick is an empty stick with FAT.
func newStick(t *testing.T) string {
	t.Helper()
	stick := filepath.Join(t.TempDir(), "stick.img")
	tool(t, "truncate", "-s", "64M", stick)
	tool(t, "mkfs.vfat", "-F", "32", stick)
	return stick
}

// fromStick copies the one file whose name begins like this.
func fromStick(t *testing.T, stick, prefix string) string {
	t.Helper()
	tool(t, "fsck.vfat", "-n", stick)
	for name := range strings.Lines(tool(t, "mdir", "-b", "-i", stick, "::")) {
		name = strings.TrimPrefix(strings.TrimSpace(name), "::/")
		if strings.HasPrefix(name, prefix) {
			out := filepath.Join(t.TempDir(), name)
			tool(t, "mcopy", "-i", stick, "::"+name, out)
			return out
		}
	}
	t.Fatalf("no %s on the stick", prefix)
	return ""
}

// opens asks cryptsetup whether the key opens the volume.
func opens(t *testing.T, volume, key string) error {
	t.Helper()
	cmd := exec.Command("cryptsetup", "luksOpen", "--test-passphrase", "--key-file", "-", volume)
	cmd.Stdin = strings.NewReader(key)
	out, err := cmd.CombinedOutput()
	t.Logf("cryptsetup luksOpen --test-passphrase: %v %s", err, out)
	return err
}
