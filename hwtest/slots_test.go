package hwtest_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// TestEncryptedSlots: the first boot encrypts the slot that the builder wrote, the kernel
// opens what we encrypted, an update is written encrypted from an encrypted slot, and
// nothing of a root can be read from the disk. With another TPM, only the recovery key
// opens slots and data. In the campaign the data volume is authenticated, so that
// dm-integrity lies under the key of the slots, and a bad release over an encrypted slot
// gives way to the other encrypted one.
func TestEncryptedSlots(t *testing.T) {
	t.Parallel()
	const within = 2 * bootTime // a slot is encrypted on the way
	campaign := os.Getenv("HOLDFAST_CAMPAIGN") == "1"
	encrypted := func(s *spec.Spec) {
		s.Disk.EncryptSlots = true
		if campaign {
			s.Disk.Data[0].Integrity = luks2.HMACSHA256
		}
	}
	first := buildRelease(t, t.TempDir(), theProduct(t).keys, "7.0.0", encrypted)
	second := nextRelease(t, "7.1.0", encrypted)
	m := hwtest.New(t, first.disk(), hwtest.Options{Forward: []int{80}, SecureBoot: first.firmwareKeys(t)})
	m.PowerOn()
	recovery := m.Expect(recoveryPattern, within)[1]
	// In the middle of it, the plug is pulled: the box has its volumes, and a slot of both kinds.
	m.Expect(`encrypting the slot; after a power cut it goes on`, within)
	m.PowerCut()
	m.PowerOn()
	m.Expect(tpmPattern, within)
	took := m.Expect(`slot encrypted slot=a ms=(\d+)`, within)[1]
	t.Logf("a root of %d bytes was encrypted in place in %s ms, under emulation", first.manifest.Root.SizeBytes, took)
	m.Expect(readyPattern, within)
	wantEncrypted(t, m, "a")
	store(t, m, "first", "kept")
	wantNoPlaintext(t, m, first, second)

	if err := apply(m, "7.1.0"); err != nil {
		t.Fatal(err)
	}
	fetched, err := strconv.ParseInt(m.Expect(`installing version=7.1.0 slot=b by=\w+ fetch_bytes=(\d+)`, within)[1], 10, 64)
	if err != nil || fetched > second.manifest.Root.SizeBytes/10 {
		t.Errorf("%d bytes were fetched (%v) for a root of %d that is nearly the one in the encrypted slot", fetched, err, second.manifest.Root.SizeBytes)
	}
	reboot(t, m)
	m.Expect(tpmPattern, within)
	m.Expect(`blessed slot=b version=7.1.0`, within)
	if strings.Count(m.Console(), "slot encrypted") != 1 {
		t.Error("a slot that was written encrypted was encrypted once more")
	}
	wantEncrypted(t, m, "a", "b")
	wantRecord(t, m, "first", "kept")
	if campaign {
		leaveEncrypted(t, m, encrypted, first, second)
	}
	m.PowerButton(within)
	wantNoPlaintext(t, m, first, second)
	if out := string(web.holdfast(t, "inspect", m.Disk)); strings.Count(out, "encrypted (no superblock in the clear)") != 2 {
		t.Errorf("inspect does not say that both slots are encrypted:\n%s", out)
	}

	if err := m.ReplaceTPM(hwtest.TPM20); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	expectClosed(t, m)
	m.Send(recovery + "\n")
	m.Expect(`opened with the recovery key`, within)
	m.Expect(`ready name=probe version=7.1.0 slot=b`, within)
	wantRecord(t, m, "first", "kept")
}

// leaveEncrypted puts a bad release over the encrypted slot a, which gives way to b. It
// leaves the box on.
func leaveEncrypted(t *testing.T, m *hwtest.Machine, encrypted func(*spec.Spec), known ...*product) {
	const within = 2 * bootTime
	if v := statusOf(t, m).Volumes; len(v) != 1 || v[0].Integrity != luks2.HMACSHA256 {
		t.Errorf("volumes %+v", v)
	}
	bad := nextRelease(t, "7.2.0", func(s *spec.Spec) {
		encrypted(s)
		s.OnBoot[0].Command = []string{"/usr/lib/holdfast/holdfast-agent", "no-such-verb"}
	})
	if err := apply(m, "7.2.0"); err != nil {
		t.Fatal(err)
	}
	m.PowerButton(within)
	wantNoPlaintext(t, m, append(known, bad)...)
	d, _ := openDisk(t, m.Disk)
	if err := d.Arm(partition.SlotA, 1); err != nil { // two tries less to wait for
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(`trial of 7.2.0 in slot a failed: an onboot container failed`, within)
	m.Expect(tpmPattern, within)
	m.Expect(`fell back version=7.2.0`, within)
	m.Expect(`ready name=probe version=7.1.0 slot=b`, within)
	wantEncrypted(t, m, "a", "b")
	wantRecord(t, m, "first", "kept")
}

// wantEncrypted wants status to say so of exactly these slots.
func wantEncrypted(t *testing.T, m *hwtest.Machine, want ...string) {
	t.Helper()
	text, err := call(m, http.MethodGet, "/v1/status", "")
	if err != nil {
		t.Fatal(err)
	}
	var s agent.Status
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, slot := range s.Slots {
		if slot.Encrypted {
			got = append(got, slot.Slot)
		}
	}
	slices.Sort(got)
	if !s.EncryptSlots || !slices.Equal(got, want) {
		t.Errorf("encrypted are %q, want %q; asked for: %v", got, want, s.EncryptSlots)
	}
}

// wantNoPlaintext looks in both slots for every sector of the releases' roots.
func wantNoPlaintext(t *testing.T, m *hwtest.Machine, releases ...*product) {
	t.Helper()
	known := map[[32]byte]string{}
	for _, p := range releases {
		root, err := os.ReadFile(filepath.Join(p.release(), image.RootName))
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(root); at += 512 {
			if sector := root[at : at+512]; len(bytes.Trim(sector, "\x00")) > 0 {
				known[sha256.Sum256(sector)] = fmt.Sprintf("%s at byte %d", p.manifest.Version, at)
			}
		}
	}
	if len(known) < 1000 {
		t.Fatalf("only %d sectors to look for", len(known))
	}
	for _, name := range []string{partition.RootAName, partition.RootBName} {
		slot, err := os.ReadFile(extract(t, m.Disk, name))
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(slot); at += 512 {
			if what := known[sha256.Sum256(slot[at:at+512])]; what != "" {
				t.Errorf("%s has at byte %d, in the clear, %s", name, at, what)
				break
			}
		}
	}
}
