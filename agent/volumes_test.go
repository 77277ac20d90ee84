package agent

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// TestFirstAndSecondBoot provisions, and then opens everything with one unseal (F39).
func TestFirstAndSecondBoot(t *testing.T) {
	for _, n := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d volumes", n), func(t *testing.T) {
			b := newBox(t, n)
			first := b.mustBoot("", "provisioned")
			first.write("records")
			t.Logf("first boot: %d TPM commands, %d ms", first.status.Boot.TPMCommands, first.status.Boot.TPMMilliseconds)
			if len(first.status.Rules) == 0 || first.status.Policy != seal.PolicyStandard || len(first.status.Degraded)+len(first.status.Problems) != 0 {
				t.Errorf("status %+v", first.status)
			}
			b.powerOn()
			second := b.mustBoot("", "tpm")
			second.wantData("records")
			t.Logf("second boot: %d TPM commands, %d ms", second.status.Boot.TPMCommands, second.status.Boot.TPMMilliseconds)
			if got := second.tpmLog.sent[commandUnseal]; got != 1 {
				t.Errorf("%d unseals, want 1 for all %d volumes", got, n)
			}
			if second.opened != 1 {
				t.Errorf("the TPM was opened %d times", second.opened)
			}
			if second.console.out.Len() != 0 {
				t.Errorf("an ordinary boot prints %q", second.console.out.String())
			}
			if sent := second.status.Boot.TPMCommands; sent == 0 || sent > 12 {
				t.Errorf("%d TPM commands in an ordinary boot", sent)
			}
			if left := b.tpm.Handles(); left != 0 {
				t.Errorf("%d handles left in the TPM", left)
			}
		})
	}
}

// TestKeyslots: what each of the three keys opens, on every volume, and that
// there is no fourth.
func TestKeyslots(t *testing.T) {
	b := newBox(t, 2)
	s := b.mustBoot("", "provisioned")
	for _, p := range b.parts() {
		h, report, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil || !report.Sound() {
			t.Fatalf("%v, %+v", err, report)
		}
		if h.Label() != p.Name || h.Subsystem() != "holdfast" || len(h.Keyslots()) != 3 || len(h.Tokens()) != 4 {
			t.Errorf("label %q, subsystem %q, %d keyslots, %d tokens", h.Label(), h.Subsystem(), len(h.Keyslots()), len(h.Tokens()))
		}
		volumeKey := s.storage.mapped["/dev/mapper/"+p.Name].volumeKey
		management, err := os.ReadFile(filepath.Join(s.m.Root, p.Mount, stateFolder, managementKeyFile))
		if err != nil {
			t.Fatal(err)
		}
		slots := map[int]bool{}
		for _, passphrase := range [][]byte{management, []byte(s.recoveryKey())} {
			key, slot, err := h.Unlock(p.Device, passphrase)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(key, volumeKey) {
				t.Error("another volume key")
			}
			slots[slot] = true
		}
		token, err := tokenOf(h)
		if err != nil {
			t.Fatal(err)
		}
		if len(slots) != 2 || slots[int(token.Keyslots[0][0]-'0')] {
			t.Errorf("slots %v and the TPM's %v are not three", slots, token.Keyslots)
		}
		if r := recordOf(h); r == nil || r.Release != "testbox 1" || len(r.PCRs) != len(recordedPCRs) {
			t.Errorf("record %+v", r)
		}
		info, err := os.Stat(filepath.Join(s.m.Root, p.Mount, stateFolder, managementKeyFile))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("management key: %v, %v", info.Mode(), err)
		}
	}
	if keyOf(s, "data") == keyOf(s, "media") {
		t.Error("two volumes share a volume key")
	}
}

func keyOf(s *session, name string) string {
	return string(s.storage.mapped["/dev/mapper/"+name].volumeKey)
}

// TestDiskOfTheBuilder: the marker that the builder's code writes is the one
// the agent looks for.
func TestDiskOfTheBuilder(t *testing.T) {
	b := newBox(t, 1)
	marker := []byte(partition.UnprovisionedMarker)
	got := make([]byte, len(marker))
	if _, err := b.disk.ReadAt(got, 0); err != nil || !bytes.Equal(got, marker) || !b.fresh(0) {
		t.Fatalf("%q, %v", got, err)
	}
	// One bit more is a damaged volume and not a new one.
	if _, err := b.disk.WriteAt([]byte{1}, 4095); err != nil {
		t.Fatal(err)
	}
	before := b.disk.(*partition.Memory).Clone()
	s, err := b.boot("")
	if err == nil || !strings.Contains(err.Error(), "not made anew") {
		t.Errorf("error %v", err)
	}
	wantSame(t, before, b.disk)
	if s.console.out.Len() != 0 {
		t.Errorf("console %q", s.console.out.String())
	}
}

func wantSame(t *testing.T, before, after partition.Device) {
	t.Helper()
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < before.Size(); off += 1 << 20 {
		if _, err := before.ReadAt(x, off); err != nil {
			t.Fatal(err)
		}
		if _, err := after.ReadAt(y, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(x, y) {
			t.Fatalf("the disk was written to in the MiB at %d", off)
		}
	}
}

// TestWithoutSecureBoot binds the loader and the command line instead, and says so (F82).
func TestWithoutSecureBoot(t *testing.T) {
	b := newBox(t, 1)
	b.secureBoot = false
	s := b.mustBoot("", "provisioned")
	if len(s.status.Degraded) != 1 || !strings.Contains(s.status.Degraded[0], "Secure Boot is off") {
		t.Errorf("degraded: %q", s.status.Degraded)
	}
	b.powerOn()
	b.mustBoot("", "tpm")
	for _, changed := range []int{4, 7, 12} {
		b.powerOn()
		b.tpm.Extend(changed, "another loader, key or add-on")
		s := b.refused()
		if want := fmt.Sprintf("  PCR %d: ", changed); !strings.Contains(s.console.out.String(), want) {
			t.Errorf("console %q, want %q in it", s.console.out.String(), want)
		}
	}
}

// TestNothingToOpen: an appliance without volumes needs no TPM.
func TestNothingToOpen(t *testing.T) {
	b := newBox(t, 1)
	b.volumes = nil
	s := b.session("")
	if err := s.open(); err != nil || s.opened != 0 || len(s.status.Volumes) != 0 {
		t.Errorf("%v, TPM opened %d times, %+v", err, s.opened, s.status.Volumes)
	}
}

// tap keeps what was drawn from crypto/rand: it is all secret or salt.
type tap struct {
	io.Reader
	drawn [][]byte
}

func (r *tap) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.drawn = append(r.drawn, bytes.Clone(p[:n]))
	return n, err
}

// TestSecretsStayOutOfTheLog looks for every secret of a provisioning, a TPM boot
// and a recovery in what was logged, in each form a secret could take.
func TestSecretsStayOutOfTheLog(t *testing.T) {
	b := newBox(t, 2)
	random := &tap{Reader: rand.Reader}
	b.rand = random
	first := b.mustBoot("", "provisioned")
	key := first.recoveryKey()
	b.powerOn()
	second := b.mustBoot("", "tpm")
	b.powerOn()
	b.tpm.Extend(7, "other keys")
	var third *session
	synctest.Test(t, func(t *testing.T) { // a wrong key costs simulated time
		third = b.mustBoot("cbdefghi-not-a-key\n"+strings.ToUpper(key)+"\n", "recovery")
	})

	management, err := os.ReadFile(filepath.Join(first.m.Root, "data", stateFolder, managementKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	words := append(strings.Split(key, "-"), strings.ReplaceAll(key, "-", ""), string(management))
	secrets := random.drawn
	for _, m := range first.storage.mapped {
		secrets = append(secrets, m.volumeKey)
	}
	for _, s := range secrets {
		if len(s) < 16 {
			continue
		}
		words = append(words, string(s), hex.EncodeToString(s), base64.StdEncoding.EncodeToString(s),
			base64.URLEncoding.EncodeToString(s), fmt.Sprint(s), fmt.Sprintf("%q", s))
	}
	if len(words) < 60 {
		t.Fatalf("only %d forms of secrets: the tap is dry", len(words))
	}
	for n, s := range []*session{first, second, third} {
		for _, log := range []string{s.log.text.String(), s.log.json.String()} {
			if !strings.Contains(log, "volume open") {
				t.Errorf("boot %d: log %q", n+1, log)
			}
			for _, w := range words {
				if strings.Contains(strings.ToLower(log), strings.ToLower(w)) {
					t.Errorf("boot %d: the log holds the secret %q", n+1, w)
				}
			}
		}
		if n > 0 && recoveryKeyPattern.MatchString(s.console.out.String()) {
			t.Errorf("boot %d shows the recovery key again", n+1)
		}
	}
}

// TestUnfitBoxes are first boots that must not provision: the marker stays, no key is shown, and
// nothing at all is written.
func TestUnfitBoxes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(b *box)
		want  string
	}{
		{"no TPM", func(b *box) { b.noTPM = seal.ErrNoTPM }, seal.ErrNoTPM.Error()},
		{"TPM 1.2", func(b *box) { b.noTPM = seal.ErrTPM12 }, seal.ErrTPM12.Error()},
		{"no registers extended", func(b *box) { b.tpm.Reset(); b.measureUKI() }, "Nothing was measured into PCR 7"},
		{"image not measured", func(b *box) {
			b.tpm.Reset()
			b.tpm.Extend(7, "keys")
		}, "trial unseal is refused"},
		{"no signature in the image", func(b *box) { b.signatures = nil }, "PCR signatures"},
		{"signature by another key", func(b *box) { b.signatures = b.release.sign(b.t, strangerKey()) }, "trial unseal is refused"},
		{"signature of another image", func(b *box) {
			other := release{initrd: "initrd 2"}
			b.signatures = other.sign(b.t, vendorKey())
		}, "trial unseal is refused"},
		{"signatures are garbage", func(b *box) { b.signatures = []byte("<html>") }, ""},
		{"Secure Boot off, PCR 4 not extended", func(b *box) {
			b.secureBoot = false
			b.tpm.Reset()
			b.tpm.Extend(7, "keys")
			b.measureUKI()
		}, "Nothing was measured into PCR 4"},
		{"no policy key in the release", func(b *box) {}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBox(t, 2)
			tt.spoil(b)
			before := b.disk.(*partition.Memory).Clone()
			s := b.session("")
			if b.noTPM == nil {
				if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
					t.Fatal(err)
				}
			}
			boot := b.description()
			if tt.name == "no policy key in the release" {
				boot.Appliance.Seal.PolicyKeyPEM = ""
			}
			err := s.m.OpenVolumes(boot, b.parts(), &s.status)
			wantUnprovisioned(t, s, err, tt.want)
			wantSame(t, before, b.disk)
		})
	}
	t.Run("no SHA-256 bank", func(t *testing.T) {
		b := newBox(t, 1)
		b.tpm = sha1TPM(t)
		b.powerOn()
		s := b.session("")
		wantUnprovisioned(t, s, s.open(), "SHA-256 bank is not enabled")
	})
}

func wantUnprovisioned(t *testing.T, s *session, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want one with %q", err, want)
	}
	for i := range s.volumes {
		if !s.fresh(i) {
			t.Errorf("volume %d has lost its marker", i)
		}
	}
	if recoveryKeyPattern.MatchString(s.console.out.String()) || strings.Contains(s.log.text.String(), "msg=provisioned") {
		t.Error("a recovery key was shown, or success was logged")
	}
	if len(s.status.Volumes) != 0 || len(s.storage.mounts) != 0 {
		t.Errorf("volumes %+v, mounts %v", s.status.Volumes, s.storage.mounts)
	}
}

// TestProvisioningFails breaks each step of a first boot. Nothing is
// published; the next boot starts over and works.
func TestProvisioningFails(t *testing.T) {
	b := newBox(t, 2)
	for _, step := range []string{"map data", "mkfs data", "mount data", "map media", "mkfs media", "mount media"} {
		t.Run(step, func(t *testing.T) {
			b.powerOn()
			s := b.session("")
			if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
				t.Fatal(err)
			}
			s.storage.fail = step
			if err := s.open(); !errors.Is(err, errStorage) {
				t.Errorf("error %v", err)
			}
			if !b.fresh(0) || !b.fresh(1) {
				t.Error("a marker is gone")
			}
			if recoveryKeyPattern.MatchString(s.console.out.String()) {
				t.Error("a recovery key was shown for volumes that do not exist")
			}
		})
	}
	t.Run("no randomness", func(t *testing.T) {
		for _, n := range []int64{0, 40, 90, 150, 300} {
			s := b.session("")
			s.m.Rand = io.LimitReader(rand.Reader, n)
			if err := s.open(); err == nil || !strings.Contains(err.Error(), "EOF") {
				t.Errorf("with %d random bytes: %v", n, err)
			}
			if !b.fresh(0) {
				t.Fatal("the marker is gone")
			}
		}
	})
	b.powerOn()
	b.mustBoot("", "provisioned")
}

// TestOnlyMarkedVolumesAreMade: a disk whose first volume is new and whose
// second is not was never made by us, and its data is not ours to overwrite.
func TestOnlyMarkedVolumesAreMade(t *testing.T) {
	for name, second := range map[string]string{"LUKS": "LUKS\xba\xbe\x00\x02", "something": "precious"} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t, 2)
			if _, err := b.disk.WriteAt([]byte(second), volumeBytes); err != nil {
				t.Fatal(err)
			}
			before := b.disk.(*partition.Memory).Clone()
			s, err := b.boot("")
			if err == nil || !strings.Contains(err.Error(), "media") {
				t.Errorf("error %v", err)
			}
			wantSame(t, before, b.disk)
			if s.console.out.Len() != 0 {
				t.Errorf("console %q", s.console.out.String())
			}
		})
	}
}
