package agent

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// forgeNote makes the note of the box's volumes with the attacker's own volume key.
func forgeNote(t *testing.T, raw json.RawMessage, ours *luks2.Header, volumeKey []byte) json.RawMessage {
	t.Helper()
	var note boxToken
	if err := json.Unmarshal(raw, &note); err != nil {
		t.Fatal(err)
	}
	raw, err := boxNote(volumeKey, boxVolume{ours.Label(), ours.UUID()}, note.Volumes)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// refusedVolume boots by the TPM, and by the recovery key without it, and wants
// neither to use the volumes. Nothing is mapped, and nothing is written.
func refusedVolume(t *testing.T, b *box, key, want string) {
	t.Helper()
	before := b.disk.(*partition.Memory).Clone()
	b.powerOn()
	s := b.session("")
	if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
		t.Fatal(err)
	}
	if err := s.open(); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("by the TPM: error %v, want one with %q; console %q", err, want, s.console.out.String())
	}
	if len(s.storage.mapped)+len(s.status.Volumes) != 0 {
		t.Errorf("by the TPM: mapped %v, %+v", s.storage.mapped, s.status.Volumes)
	}
	b.noTPM = seal.ErrNoTPM
	defer func() { b.noTPM = nil }()
	s = b.session(key + "\npoweroff\n")
	synctest.Test(t, func(t *testing.T) {
		if err := s.open(); !errors.Is(err, ErrPowerOff) {
			t.Errorf("by the recovery key: error %v", err)
		}
	})
	if out := s.console.out.String(); !strings.Contains(out, "not opened: data volume") || !strings.Contains(out, want) {
		t.Errorf("by the recovery key: console %q, want %q", out, want)
	}
	if len(s.storage.mapped) != 0 {
		t.Errorf("by the recovery key: mapped %v", s.storage.mapped)
	}
	for _, k := range s.storage.keys {
		if !bytes.Equal(k, make([]byte, len(k))) {
			t.Error("a volume key was not wiped")
		}
	}
	wantSame(t, before, b.disk)
}

// TestSwappedVolumes: two volumes of the box trade places (F80). They open with the
// same secret, and a file system with the customer's programs would be mounted where
// the records belong.
func TestSwappedVolumes(t *testing.T) {
	b := newBox(t, 2)
	first := b.mustBoot("", "provisioned")
	swap := func() {
		var content [2][]byte
		for i, p := range b.parts() {
			content[i] = make([]byte, volumeBytes)
			if _, err := p.Device.ReadAt(content[i], 0); err != nil {
				t.Fatal(err)
			}
		}
		for i, p := range b.parts() {
			put(t, p.Device, content[1-i], 0)
		}
	}
	swap()
	refusedVolume(t, b, first.recoveryKey(), `in its place is a volume that was made as "media"`)
	swap()
	b.powerOn()
	b.mustBoot("", "tpm")
}

// TestSwappedAndRelabelled also changes the labels, which no key protects.
func TestSwappedAndRelabelled(t *testing.T) {
	b := newBox(t, 2)
	first := b.mustBoot("", "provisioned")
	var content [2][]byte
	for i, p := range b.parts() {
		content[i] = make([]byte, volumeBytes)
		if _, err := p.Device.ReadAt(content[i], 0); err != nil {
			t.Fatal(err)
		}
	}
	for i, p := range b.parts() {
		put(t, p.Device, content[1-i], 0)
		relabel(t, p.Device, p.Name)
	}
	refusedVolume(t, b, first.recoveryKey(), "is of another volume")
}

// TestHeaderOfTheOtherVolume copies header, tokens and key areas of one volume over those
// of the other, and leaves the data (F80). With the label changed too, the key that comes
// out is the other volume's.
func TestHeaderOfTheOtherVolume(t *testing.T) {
	for _, relabelled := range []bool{false, true} {
		b := newBox(t, 2)
		first := b.mustBoot("", "provisioned")
		parts := b.parts()
		header := make([]byte, 16<<20)
		if _, err := parts[1].Device.ReadAt(header, 0); err != nil {
			t.Fatal(err)
		}
		put(t, parts[0].Device, header, 0)
		want := `in its place is a volume that was made as "media"`
		if relabelled {
			relabel(t, parts[0].Device, parts[0].Name)
			want = "is of another volume"
		}
		refusedVolume(t, b, first.recoveryKey(), want)
	}
}

// TestHeaderOfAnotherBox: the same from a box of the same product (F80): its secret is
// under another TPM's key.
func TestHeaderOfAnotherBox(t *testing.T) {
	b, other := newBox(t, 1), newBox(t, 1)
	first := b.mustBoot("", "provisioned")
	other.mustBoot("", "provisioned")
	header, own := make([]byte, 16<<20), make([]byte, 16<<20)
	for dev, into := range map[partition.Device][]byte{other.parts()[0].Device: header, b.parts()[0].Device: own} {
		if _, err := dev.ReadAt(into, 0); err != nil {
			t.Fatal(err)
		}
	}
	put(t, b.parts()[0].Device, header, 0)
	b.powerOn()
	b.refused()
	s := b.session(first.recoveryKey() + "\n")
	if err := s.open(); !errors.Is(err, io.EOF) || len(s.storage.mapped) != 0 {
		t.Errorf("our recovery key opens the other box's header: %v, mapped %v", err, s.storage.mapped)
	}
	put(t, b.parts()[0].Device, own, 0)
	b.powerOn()
	b.mustBoot("", "tpm")
}

// TestBoxNotes changes the note of the volumes in a header in each way.
func TestBoxNotes(t *testing.T) {
	b := newBox(t, 2)
	first := b.mustBoot("", "provisioned")
	key := first.recoveryKey()
	other := newBox(t, 2)
	other.mustBoot("", "provisioned")
	noteOf := func(b *box, i int) (note boxToken) {
		p := b.parts()[i]
		h, _, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			t.Fatal(err)
		}
		for _, raw := range h.Tokens() {
			if tokenType(raw) == boxTokenType {
				if err := json.Unmarshal(raw, &note); err != nil {
					t.Fatal(err)
				}
			}
		}
		return note
	}
	whole := b.disk.(*partition.Memory)
	for _, tt := range []struct {
		name   string
		change func(note *boxToken) []boxToken // what is there instead
		want   string
	}{
		{"removed", func(*boxToken) []boxToken { return nil }, "0 notes"},
		{"twice", func(n *boxToken) []boxToken { return []boxToken{*n, *n} }, "2 notes"},
		{"MAC changed", func(n *boxToken) []boxToken { n.MAC[7] ^= 1; return []boxToken{*n} }, "not made with this volume's key"},
		{"MAC empty", func(n *boxToken) []boxToken { n.MAC = nil; return []boxToken{*n} }, "not made with this volume's key"},
		{"one volume fewer", func(n *boxToken) []boxToken { n.Volumes = n.Volumes[:1]; return []boxToken{*n} }, "not made with this volume's key"},
		{"order", func(n *boxToken) []boxToken {
			n.Volumes[0], n.Volumes[1] = n.Volumes[1], n.Volumes[0]
			return []boxToken{*n}
		}, "not made with this volume's key"},
		{"the other volume's", func(*boxToken) []boxToken { return []boxToken{noteOf(b, 1)} }, "is of another volume"},
		{"another box's", func(*boxToken) []boxToken { return []boxToken{noteOf(other, 0)} }, "is of another volume"},
		{"a later format", func(n *boxToken) []boxToken { n.Format = 2; return []boxToken{*n} }, "has format 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b.disk = whole.Clone()
			dev := b.parts()[0].Device
			h, _, err := luks2.Read(dev, dev.Size())
			if err != nil {
				t.Fatal(err)
			}
			for id, raw := range h.Tokens() {
				if tokenType(raw) == boxTokenType {
					if err := h.RemoveToken(id); err != nil {
						t.Fatal(err)
					}
				}
			}
			note := noteOf(b, 0)
			for _, n := range tt.change(&note) {
				raw, err := json.Marshal(n)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := h.SetToken(luks2.NextToken, raw); err != nil {
					t.Fatal(err)
				}
			}
			if err := h.Write(dev); err != nil {
				t.Fatal(err)
			}
			refusedVolume(t, b, key, tt.want)
		})
	}
}

// TestFewerVolumes: a release may do without a volume that the disk has.
func TestFewerVolumes(t *testing.T) {
	b := newBox(t, 2)
	b.mustBoot("", "provisioned")
	b.volumes = b.volumes[:1]
	b.powerOn()
	b.mustBoot("", "tpm")
}

// relabel writes a header with another label, checksums right, as the attacker can.
func relabel(t *testing.T, dev partition.Device, label string) {
	t.Helper()
	for _, at := range []int64{0, 16 << 10} {
		raw := make([]byte, 16<<10)
		if _, err := dev.ReadAt(raw, at); err != nil {
			t.Fatal(err)
		}
		clear(raw[24:72]) // label, and the checksum below: specification §2.1
		copy(raw[24:], label)
		clear(raw[448 : 448+64])
		sum := sha256.Sum256(raw)
		copy(raw[448:], sum[:])
		put(t, dev, raw, at)
	}
}

// TestOwnVolumeOwnKey: the attacker writes a volume of his own under our tokens, with
// a good note, and types his recovery key at the console of our box. The TPM gives our
// secret, which is not that volume's. With the tokens gone it opens, as any disk does
// for who has a key of it; then the status and PCR 15 tell.
func TestOwnVolumeOwnKey(t *testing.T) {
	for _, tt := range []struct {
		name   string
		tokens func(*testing.T, map[int]json.RawMessage)
		want   string // on the console; "" means that it opens
	}{
		{"our tokens as they are", func(*testing.T, map[int]json.RawMessage) {}, "that is the key of another volume"},
		{"the MAC in them left out", func(t *testing.T, m map[int]json.RawMessage) { setVolumeMAC(t, m, nil) }, "that is the key of another volume"},
		{"the MAC in them made up", func(t *testing.T, m map[int]json.RawMessage) { setVolumeMAC(t, m, make([]byte, 32)) }, "that is the key of another volume"},
		{"our tokens left out", func(t *testing.T, m map[int]json.RawMessage) {
			for id, raw := range m {
				if seal.IsTokenType(tokenType(raw)) {
					delete(m, id)
				}
			}
		}, ""},
	} {
		for n := 1; n <= 2; n++ {
			t.Run(fmt.Sprintf("%s, %d volumes", tt.name, n), func(t *testing.T) {
				b := newBox(t, n)
				b.mustBoot("", "provisioned")
				identity := readIdentity(t, b)
				his, err := luks2.GenerateRecoveryKey(rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range b.parts() {
					ours, _, err := luks2.Read(p.Device, p.Device.Size())
					if err != nil {
						t.Fatal(err)
					}
					tokens := ours.Tokens()
					tt.tokens(t, tokens)
					substitute(t, ours, p.Device, string(his.Passphrase()), tokens)
					formatWith(t, b, p, his.Passphrase())
				}
				b.powerOn()
				s := b.session(his.String() + "\npoweroff\n")
				if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
					t.Fatal(err)
				}
				if tt.want == "" {
					if err := s.open(); err != nil {
						t.Fatal(err)
					}
					s.wantOpen("recovery")
					if readIdentity(t, b) == identity || !strings.Contains(strings.Join(s.status.Problems, "\n"), "opened with the recovery key") {
						t.Errorf("nothing tells: problems %q", s.status.Problems)
					}
					return
				}
				synctest.Test(t, func(t *testing.T) {
					if err := s.open(); !errors.Is(err, ErrPowerOff) {
						t.Errorf("error %v", err)
					}
				})
				if out := s.console.out.String(); !strings.Contains(out, tt.want) || len(s.storage.mapped) != 0 {
					t.Errorf("mapped %v, console %q", s.storage.mapped, out)
				}
				if s.tpmLog.done[commandUnseal] != 1 {
					t.Errorf("%d unseals: the test is about a TPM that gives the secret", s.tpmLog.done[commandUnseal])
				}
			})
		}
	}
}

func setVolumeMAC(t *testing.T, tokens map[int]json.RawMessage, mac []byte) {
	t.Helper()
	for id, raw := range tokens {
		if !seal.IsTokenType(tokenType(raw)) {
			continue
		}
		token, err := seal.ParseToken(raw)
		if err != nil {
			t.Fatal(err)
		}
		if len(token.VolumeMAC) != 32 {
			t.Errorf("a token of ours has a MAC of %d bytes", len(token.VolumeMAC))
		}
		token.VolumeMAC = mac
		if tokens[id], err = token.Marshal(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamagedTPMKeyslot: a key area with a bad sector looks like a foreign volume, and
// must not cost its owner the data.
func TestDamagedTPMKeyslot(t *testing.T) {
	b := newBox(t, 2)
	first := b.mustBoot("", "provisioned")
	first.write("records")
	b.powerOn()
	b.mustBoot("", "tpm")
	identity := readIdentity(t, b)
	for _, p := range b.parts() {
		h, _, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			t.Fatal(err)
		}
		token, err := tokenOf(h)
		if err != nil || token.Keyslots[0] != "1" {
			t.Fatalf("TPM keyslot %v, %v", token.Keyslots, err)
		}
		put(t, p.Device, bytes.Repeat([]byte{0xaa}, 512), 32<<10+258048+4096) // second key area
	}
	b.powerOn()
	s, err := b.boot("")
	if !errors.Is(err, io.EOF) || s.tpmLog.done[commandUnseal] != 1 || len(s.storage.mapped) != 0 {
		t.Fatalf("error %v, %d unseals, mapped %v", err, s.tpmLog.done[commandUnseal], s.storage.mapped)
	}
	b.powerOn()
	s = b.mustBoot(first.recoveryKey()+"\n", "recovery")
	s.wantData("records")
	for _, state := range s.status.States {
		if state.Opened {
			t.Errorf("state %q is said to have opened", state.For)
		}
	}
	if readIdentity(t, b) == identity {
		t.Error("PCR 15 does not tell that the recovery key was used")
	}
}

// formatWith makes a file system on a volume that the passphrase opens.
func formatWith(t *testing.T, b *box, p Partition, passphrase []byte) {
	t.Helper()
	h, _, err := luks2.Read(p.Device, p.Device.Size())
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := h.Unlock(p.Device, passphrase)
	if err != nil {
		t.Fatal(err)
	}
	k := &fakeStorage{files: b.files, mapped: map[string]*mapping{}}
	device, err := k.Map(p, h, key)
	if err := errors.Join(err, k.MakeFS(device, p.Name)); err != nil {
		t.Fatal(err)
	}
}
