package agent

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// sha1TPM is one whose firmware left out the SHA-256 bank (F28).
func sha1TPM(t testing.TB) *sealtest.TPM {
	return sealtest.StartWith(t, sealtest.Options{Banks: "sha1"})
}

// TestTPMRefuses changes the box between two boots in each way that must close
// the volumes. Each time the prompt says why, the TPM gives nothing out, the
// end of input ends the boot, and the recovery key still opens everything (F36);
// the status says that it was used (F56).
func TestTPMRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(b *box)
		want   string // on the console
	}{
		{"other TPM", func(b *box) { b.tpm.Swap(); b.powerOn() }, "mainboard was replaced"},
		{"TPM cleared", func(b *box) { b.tpm.Clear(); b.powerOn() }, "mainboard was replaced"},
		{"TPM absent", func(b *box) { b.noTPM = seal.ErrNoTPM }, "no TPM that answers"},
		{"TPM 1.2", func(b *box) { b.noTPM = seal.ErrTPM12 }, "version 1.2"},
		{"SHA-256 bank missing", func(b *box) { b.tpm = sha1TPM(t); b.powerOn() }, "reason:"},
		{"PCR 7 changed", func(b *box) { b.release.pcr7 = "other keys"; b.powerOn() }, "  PCR 7: "},
		{"PCR 7 extended once more", func(b *box) { b.tpm.Extend(7, "one more") }, "  PCR 7: "},
		{"other initrd, own signature kept", func(b *box) { b.release.initrd = "evil"; b.powerOn() }, "  PCR 11: "},
		{"other command line", func(b *box) { b.release.cmdline = "init=/bin/sh"; b.powerOn() }, "  PCR 11: "},
		{"other initrd, signed by another key", func(b *box) {
			b.release.initrd = "evil"
			b.signatures = b.release.sign(t, strangerKey())
			b.powerOn()
		}, "  PCR 11: "},
		{"signature missing", func(b *box) { b.signatures = nil }, "PCR signatures"},
		{"signature by another key", func(b *box) { b.signatures = b.release.sign(t, strangerKey()) }, "reason:"},
		{"signatures are garbage", func(b *box) { b.signatures = []byte(`{"sha256":[{}]}`) }, "reason:"},
		{"initrd was left before", func(b *box) {
			if err := b.session("").m.EnterPhase(phaseLeaveInitrd); err != nil {
				t.Fatal(err)
			}
		}, "reason:"},
		{"token removed", func(b *box) { editHeader(t, b, removeToken) }, "no TPM keyslot"},
		{"sealed secret changed", func(b *box) { editHeader(t, b, flipSecret) }, "reason:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBox(t, 2)
			first := b.mustBoot("", "provisioned")
			first.write("records")
			b.powerOn()
			tt.change(b)

			s := b.refused()
			if !strings.Contains(s.console.out.String(), tt.want) {
				t.Errorf("console %q, want %q in it", s.console.out.String(), tt.want)
			}
			s = b.session(first.recoveryKey() + "\n")
			if err := s.open(); err != nil {
				t.Fatal(err)
			}
			s.wantOpen("recovery")
			s.wantData("records")
			if len(s.status.Problems) == 0 || len(s.status.Rules) == 0 && tt.name != "token removed" {
				t.Errorf("status %+v", s.status)
			}
		})
	}
}

// refused is a boot in which no key may be had and nobody types one.
func (b *box) refused() *session {
	b.t.Helper()
	s := b.session("")
	if err := s.m.EnterPhase(phaseEnterInitrd); err != nil && !errors.Is(err, b.noTPM) {
		b.t.Fatal(err)
	}
	if err := s.open(); !errors.Is(err, io.EOF) {
		b.t.Errorf("error %v, want the end of input at the prompt; console: %s", err, s.console.out.String())
	}
	if s.tpmLog.done[commandUnseal] != 0 {
		b.t.Error("the TPM gave the secret out")
	}
	if len(s.status.Volumes)+len(s.storage.mapped)+len(s.storage.mounts) != 0 {
		b.t.Errorf("volumes %+v, mapped %v, mounted %v", s.status.Volumes, s.storage.mapped, s.storage.mounts)
	}
	out := s.console.out.String()
	if !strings.Contains(out, "recovery key (or: reboot, poweroff): ") || !strings.Contains(out, "The data volumes stay closed") {
		b.t.Errorf("console %q", out)
	}
	if recoveryKeyPattern.MatchString(out) {
		b.t.Error("the console shows a recovery key")
	}
	return s
}

// editHeader changes the token of the first volume.
func editHeader(t *testing.T, b *box, edit func(t *testing.T, h *luks2.Header, id int, token json.RawMessage)) {
	t.Helper()
	dev := b.parts()[0].Device
	h, _, err := luks2.Read(dev, dev.Size())
	if err != nil {
		t.Fatal(err)
	}
	for id, raw := range h.Tokens() {
		if tokenType(raw) == seal.TokenType {
			edit(t, h, id, raw)
		}
	}
	if err := h.Write(dev); err != nil {
		t.Fatal(err)
	}
}

func removeToken(t *testing.T, h *luks2.Header, id int, _ json.RawMessage) {
	if err := h.RemoveToken(id); err != nil {
		t.Fatal(err)
	}
}

func flipSecret(t *testing.T, h *luks2.Header, id int, raw json.RawMessage) {
	token, err := seal.ParseToken(raw)
	if err != nil {
		t.Fatal(err)
	}
	token.Private[len(token.Private)-1] ^= 1
	if raw, err = token.Marshal(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.SetToken(id, raw); err != nil {
		t.Fatal(err)
	}
}

// TestDoorIsClosed: once the initrd has left, no key can be had in this boot (F47),
// and what PCR 15 got is a MAC that only who knows the volume keys can make.
func TestDoorIsClosed(t *testing.T) {
	b := newBox(t, 1)
	b.mustBoot("", "provisioned")
	b.refused()
	b.powerOn()
	s := b.mustBoot("", "tpm")
	b.refused()
	b.tpm.Extend(11, phaseEnterInitrd)
	b.refused()
	identity, err := seal.ReadPCRs(s.tpmLog, []int{identityPCR})
	if err != nil {
		t.Fatal(err)
	}
	dev := b.parts()[0].Device
	h, _, err := luks2.Read(dev, dev.Size())
	if err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, []byte(keyOf(s, "data")))
	mac.Write([]byte("holdfast:data:" + h.UUID()))
	if want := pcr.Extend(pcr.Digest{}, mac.Sum(nil)); identity[identityPCR] != want {
		t.Errorf("PCR 15 is %x, want %x", identity[identityPCR], want)
	}
}

// TestLateTPM: a TPM that was not there when the initrd entered, but is when it
// leaves, is closed too; whoever takes the root over cannot make up for the
// phase that was not measured.
func TestLateTPM(t *testing.T) {
	b := newBox(t, 1)
	key := b.mustBoot("", "provisioned").recoveryKey()
	b.powerOn()
	b.noTPM = seal.ErrNoTPM
	s := b.session(key + "\n")
	if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
		t.Fatal(err)
	}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	s.wantOpen("recovery")
	s.m.OpenTPM = func() (seal.TPM, error) { return s.tpmLog, nil }
	if err := s.m.Leave(&s.status); err != nil {
		t.Fatal(err)
	}
	b.noTPM = nil
	b.refused() // measures enter-initrd first, as an attacker would
}

// TestBrokenTPM: a TPM that dies in the middle of a boot ends that boot where it
// gave the key, and does not where the recovery key did.
func TestBrokenTPM(t *testing.T) {
	b := newBox(t, 1)
	first := b.mustBoot("", "provisioned")
	b.powerOn()
	s := b.session("")
	if err := errors.Join(s.m.EnterPhase(phaseEnterInitrd), s.open()); err != nil {
		t.Fatal(err)
	}
	s.tpmLog.broken = true
	if err := s.m.Leave(&s.status); err == nil || !strings.Contains(err.Error(), "close the TPM") {
		t.Errorf("the door stands open, and Leave says %v", err)
	}
	b.powerOn()
	s = b.session(first.recoveryKey() + "\n")
	s.tpmLog.broken = true
	if err := s.m.EnterPhase(phaseEnterInitrd); err == nil {
		t.Error("a dead TPM took a measurement")
	}
	if err := errors.Join(s.open(), s.m.Leave(&s.status)); err != nil {
		t.Errorf("with a dead TPM the recovery key does not get in: %v", err)
	}
	s.wantOpen("recovery")
	if problems := strings.Join(s.status.Problems, "\n"); !strings.Contains(problems, "close the TPM") {
		t.Errorf("problems %q", problems)
	}
}

// TestHeaderDamage is what happens to disks, and what people do to them.
func TestHeaderDamage(t *testing.T) {
	const copyBytes = 16 << 10
	noise := func(at int64, n int) func(*testing.T, *partition.Memory) {
		return func(t *testing.T, d *partition.Memory) { put(t, d, []byte(strings.Repeat("\xaa", n)), at) }
	}
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, d *partition.Memory)
		want   string // in the error; "" means that it opens
	}{
		{"torn primary", noise(5000, 700), ""},
		{"primary gone", noise(0, copyBytes), ""},
		{"first sector zero", func(t *testing.T, d *partition.Memory) { put(t, d, make([]byte, 512), 0) }, ""},
		{"secondary gone", noise(copyBytes, copyBytes), ""},
		{"marker over the primary's start", func(t *testing.T, d *partition.Memory) {
			put(t, d, append([]byte(partition.UnprovisionedMarker), 1), 0)
		}, ""},
		{"both copies gone", noise(0, 2*copyBytes), "not made anew"},
		{"both copies zero", func(t *testing.T, d *partition.Memory) { put(t, d, make([]byte, 2*copyBytes), 0) }, "not made anew"},
		{"partition truncated", func(t *testing.T, d *partition.Memory) { d.Resize(8 << 20) }, "too small, or was truncated"},
		{"cipher_null", func(t *testing.T, d *partition.Memory) {
			editJSON(t, d, `aes-xts-plain64","sector_size`, `cipher_null-ecb","sector_size`)
		}, "encryption"},
		{"keyslot cipher_null", func(t *testing.T, d *partition.Memory) {
			editJSON(t, d, `"encryption":"aes-xts-plain64","key_size":64`, `"encryption":"cipher_null-ecb","key_size":64`)
		}, "encryption"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBox(t, 1)
			b.mustBoot("", "provisioned").write("records")
			disk := b.disk.(*partition.Memory)
			tt.damage(t, disk)
			before := disk.Clone()
			b.powerOn()
			if tt.want == "" {
				b.mustBoot("", "tpm").wantData("records")
				if _, report, err := luks2.Read(disk, disk.Size()); err != nil || !report.Sound() {
					t.Errorf("not mended: %v, %+v", err, report)
				}
				return
			}
			s := b.session("reboot\n")
			parts := b.parts()
			parts[0].Device = disk
			if err := errors.Join(s.m.EnterPhase(phaseEnterInitrd), s.m.OpenVolumes(b.description(), parts, &s.status)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if s.console.out.Len() != 0 || len(s.storage.mapped) != 0 || s.tpmLog.sent[commandUnseal] != 0 {
				t.Errorf("console %q, mapped %v, %d unseals", s.console.out.String(), s.storage.mapped, s.tpmLog.sent[commandUnseal])
			}
			wantSame(t, before, disk)
		})
	}
}

func put(t *testing.T, d partition.Device, b []byte, at int64) {
	t.Helper()
	if _, err := d.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// editJSON changes both header copies as an attacker does, who can compute
// their checksums: SHA-256 over the copy with a zero checksum field at 448
// (LUKS2 specification §2.1).
func editJSON(t *testing.T, d partition.Device, old, new string) {
	t.Helper()
	if len(old) != len(new) {
		t.Fatal("lengths differ")
	}
	for _, at := range []int64{0, 16 << 10} {
		raw := make([]byte, 16<<10)
		if _, err := d.ReadAt(raw, at); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(raw), old) {
			t.Fatalf("no %s in %s", old, raw[4096:])
		}
		raw = []byte(strings.Replace(string(raw), old, new, 1))
		clear(raw[448 : 448+64])
		sum := sha256.Sum256(raw)
		copy(raw[448:], sum[:])
		put(t, d, raw, at)
	}
}

// TestSubstitutedVolume: the attacker puts a volume of his own in the place of
// ours, with our tokens copied into its header (F80). The TPM gives the
// secret, as to any approved boot; it does not open his volume, and nothing
// but our keys does.
func TestSubstitutedVolume(t *testing.T) {
	for victim, name := range []string{"first volume", "second volume"} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t, 2)
			key := b.mustBoot("", "provisioned").recoveryKey()
			dev := b.parts()[victim].Device
			ours, _, err := luks2.Read(dev, dev.Size())
			if err != nil {
				t.Fatal(err)
			}
			h := substitute(t, ours, dev, "his passphrase", ours.Tokens())
			if h.UUID() != ours.UUID() || h.Label() != ours.Label() {
				t.Fatal("not a good imitation")
			}
			b.powerOn()
			s := b.session(key + "\nreboot\n")
			if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) { // a wrong key costs simulated time
				if err := s.open(); !errors.Is(err, ErrReboot) {
					t.Errorf("error %v", err)
				}
			})
			if len(s.storage.mapped) != 0 || len(s.status.Volumes) != 0 {
				t.Errorf("mapped %v, %+v", s.storage.mapped, s.status.Volumes)
			}
			if out := s.console.out.String(); !strings.Contains(out, "not its recovery key") || strings.Contains(out, key) {
				t.Errorf("console %q", out)
			}
		})
	}
}

// TestSubstitutedVolumeSealedHere shows a limit that the package doc states:
// who had the box for long enough to start a system of his own on it can seal
// a secret of his under the same public policy, and put a volume of his in the
// place of the only one. It opens; the data that was there does not, and PCR 15
// tells a verifier. Beside a volume of ours it does not open.
func TestSubstitutedVolumeSealedHere(t *testing.T) {
	for n, method := range map[int]string{1: "tpm", 2: "recovery"} {
		b := newBox(t, n)
		first := b.mustBoot("", "provisioned")
		first.write("records")
		wantPCR := readIdentity(t, b)
		dev := b.parts()[0].Device
		ours, _, err := luks2.Read(dev, dev.Size())
		if err != nil {
			t.Fatal(err)
		}
		token, err := tokenOf(ours)
		if err != nil {
			t.Fatal(err)
		}
		srk, err := seal.EnsureSRK(b.tpm)
		if err != nil {
			t.Fatal(err)
		}
		secret := []byte("a secret that the attacker knows")
		b.powerOn()
		pcr7, err := seal.ReadPCRs(b.tpm, []int{7})
		if err != nil {
			t.Fatal(err)
		}
		his, err := seal.Seal(b.tpm, srk, secret, seal.Standard(token.PolicyKeyPEM, pcr7), nil)
		if err != nil {
			t.Fatal(err)
		}
		his.Keyslots = []string{"0"}
		raw, err := his.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		tokens := map[int]json.RawMessage{0: raw}
		for id, raw := range ours.Tokens() {
			if tokenType(raw) == boxTokenType {
				tokens[id] = raw
			}
		}
		substitute(t, ours, dev, string(seal.Passphrase(secret)), tokens)
		formatOver(t, b)
		s := b.session("")
		if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
			t.Fatal(err)
		}
		err = s.open()
		if method == "recovery" { // ours does not open with his secret
			if !errors.Is(err, io.EOF) || len(s.storage.mapped) != 0 {
				t.Errorf("%d volumes: %v, mapped %v", n, err, s.storage.mapped)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if readIdentity(t, b) == wantPCR {
			t.Error("PCR 15 does not tell the volumes apart")
		}
	}
}

// formatOver makes a file system on the attacker's volume.
func formatOver(t *testing.T, b *box) {
	t.Helper()
	p := b.parts()[0]
	h, _, err := luks2.Read(p.Device, p.Device.Size())
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := h.Unlock(p.Device, seal.Passphrase([]byte("a secret that the attacker knows")))
	if err != nil {
		t.Fatal(err)
	}
	k := &fakeStorage{files: b.files, mapped: map[string]*mapping{}}
	device, err := k.Map(p, h, key)
	if err := errors.Join(err, k.MakeFS(device, p.Name)); err != nil {
		t.Fatal(err)
	}
}

func readIdentity(t *testing.T, b *box) [32]byte {
	t.Helper()
	values, err := seal.ReadPCRs(b.tpm, []int{identityPCR})
	if err != nil {
		t.Fatal(err)
	}
	return values[identityPCR]
}

// substitute writes a volume whose keyslots the attacker knows, with a good note of the
// box's volumes where the tokens have one.
func substitute(t *testing.T, ours *luks2.Header, dev partition.Device, passphrase string, tokens map[int]json.RawMessage) *luks2.Header {
	t.Helper()
	volumeKey := make([]byte, luks2.VolumeKeyBytes)
	rand.Read(volumeKey)
	h, err := luks2.Format(luks2.FormatOptions{UUID: ours.UUID(), Label: ours.Label(), Subsystem: ours.Subsystem(), SizeBytes: dev.Size()}, volumeKey)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := h.AddKeyslot(volumeKey, []byte(passphrase), luks2.HighEntropyKDF(), nil); err != nil {
			t.Fatal(err)
		}
	}
	for id, raw := range tokens {
		if tokenType(raw) == boxTokenType {
			raw = forgeNote(t, raw, ours, volumeKey)
		}
		if _, err := h.SetToken(id, raw); err != nil {
			t.Fatal(err)
		}
	}
	put(t, dev, make([]byte, 32<<10), 0)
	if err := errors.Join(h.WriteNew(dev), h.Publish(dev)); err != nil {
		t.Fatal(err)
	}
	return h
}

// TestMarkerPutBack: who can write to the disk can have the box make new
// volumes, and so destroy data, which he could anyway. With two volumes
// he destroys nothing by it; and what was not destroyed does not open for him.
func TestMarkerPutBack(t *testing.T) {
	marker := make([]byte, 4096)
	copy(marker, partition.UnprovisionedMarker)
	b := newBox(t, 2)
	b.mustBoot("", "provisioned").write("records")
	disk := b.disk.(*partition.Memory)
	saved := disk.Clone()

	put(t, disk, marker, 0)
	before := disk.Clone()
	b.powerOn()
	if _, err := b.boot(""); err == nil || !strings.Contains(err.Error(), "none is made") {
		t.Errorf("marker on the first volume: %v", err)
	}
	wantSame(t, before, disk)

	b.disk = saved
	put(t, saved, marker, volumeBytes)
	b.powerOn()
	b.mustBoot("", "tpm").wantData("records")
}

// TestRecoveryPrompt types at the prompt of a box without a TPM. Time is
// simulated, because a wrong key costs some.
func TestRecoveryPrompt(t *testing.T) {
	b := newBox(t, 1)
	first := b.mustBoot("", "provisioned")
	first.write("records")
	key := first.recoveryKey()
	b.noTPM = seal.ErrNoTPM
	other := "cbdefghi-cbdefghi-cbdefghi-cbdefghi-cbdefghi-cbdefghi-cbdefghi-cbdefghi"
	opens := error(nil)
	for _, tt := range []struct {
		name, typed string
		want        error
		wantOut     string
	}{
		{"the key", key + "\n", opens, ""},
		{"with carriage return", key + "\r\n", opens, ""},
		{"without a last newline", key, opens, ""},
		{"capitals and blanks", "  " + strings.ToUpper(strings.ReplaceAll(key, "-", "  ")) + "\t\n", opens, ""},
		{"without dashes", strings.ReplaceAll(key, "-", "") + "\n", opens, ""},
		{"after mistakes", "\n\n" + key[:70] + "\nhello\n" + other + "\n" + key + "\n", opens, "not its recovery key"},
		{"letter of no key", "a" + key[1:] + "\n", io.EOF, "group 1, letter 1"},
		{"wrong key", other + "\n", io.EOF, "not its recovery key"},
		{"reboot", "reboot\n", ErrReboot, ""},
		{"reboot in capitals", " REBOOT \n", ErrReboot, ""},
		{"poweroff", "\r\npoweroff\r\n", ErrPowerOff, ""},
		{"end of input", "", io.EOF, ""},
		{"end of input after blanks", "\n  \n", io.EOF, ""},
		{"no shell", "sh\n/bin/sh\nshell\nexit\nsu\nemergency\n!sh\n\x1b[A\n\x03\x04\x1a\nreboot -f\npoweroff now\n", io.EOF, "not opened"},
		{"endless line", strings.Repeat(key, 1000) + "\n", io.EOF, ""},
		{"endless line, then the key", strings.Repeat("x", 1<<20) + "\n" + key + "\n", opens, ""},
		{"key in the tail of a long line", strings.Repeat(" ", 1<<13) + key + "\n", io.EOF, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := b.session(tt.typed)
				if err := s.open(); !errors.Is(err, tt.want) {
					t.Fatalf("error %v, want %v", err, tt.want)
				}
				if tt.want == nil {
					s.wantOpen("recovery")
					s.wantData("records")
				} else if len(s.storage.mapped) != 0 {
					t.Error("a volume was mapped")
				}
				if out := s.console.out.String(); !strings.Contains(out, tt.wantOut) || !strings.Contains(out, "no TPM that answers") {
					t.Errorf("console %q", out)
				}
			})
		})
	}
}

// TestRecoveryOfOneOfTwo: a key that opens one volume and not the other opens none.
func TestRecoveryOfOneOfTwo(t *testing.T) {
	b := newBox(t, 2)
	key := b.mustBoot("", "provisioned").recoveryKey()
	dev := b.parts()[1].Device
	ours, _, err := luks2.Read(dev, dev.Size())
	if err != nil {
		t.Fatal(err)
	}
	substitute(t, ours, dev, "another box's key", ours.Tokens())
	b.noTPM = seal.ErrNoTPM
	synctest.Test(t, func(t *testing.T) {
		s := b.session(key + "\npoweroff\n")
		if err := s.open(); !errors.Is(err, ErrPowerOff) {
			t.Errorf("error %v", err)
		}
		if len(s.storage.mapped) != 0 || !strings.Contains(s.console.out.String(), "data volume media: this is not its recovery key") {
			t.Errorf("mapped %v, console %q", s.storage.mapped, s.console.out.String())
		}
	})
}

// TestExplanations: each reason has its own words, for the person who stands
// in front of the box; a lockout is not tampering (F34).
func TestExplanations(t *testing.T) {
	seen := map[string]bool{}
	for _, cause := range []error{seal.ErrNoTPM, seal.ErrWrongTPM, &seal.LockoutError{Counter: 32, Max: 32, WaitSec: 7200}, &seal.PolicyError{Reason: "x"}} {
		m := &Machine{changes: []string{"PCR 7 is not what it was"}}
		text := m.explanation(cause)
		if !strings.Contains(text, cause.Error()) || !strings.Contains(text, "  PCR 7 is") || seen[text[strings.Index(text, "changed"):]] {
			t.Errorf("%v: %s", cause, text)
		}
		seen[text[strings.Index(text, "changed"):]] = true
	}
}
