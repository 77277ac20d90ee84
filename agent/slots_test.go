package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// shown is a root as dm-verity has it before it: decrypted, where it is encrypted.
func (a *appliance) shown(slot partition.Device, r made) (partition.Device, error) {
	clear, err := slotcrypt.InTheClear(slot, r.Verity)
	if clear || err != nil || a.slotKey == nil {
		return slot, err
	}
	c, err := slotcrypt.New(a.slotKey)
	if err != nil {
		return nil, err
	}
	return c.View(slot)
}

// encrypt is what the initrd does with the slot that was booted.
func (a *appliance) encrypt() error {
	r, ok := a.releases[a.on.Version]
	if !ok || !r.Disk.EncryptSlots {
		return nil
	}
	c, err := slotcrypt.New(a.slotKey)
	if err != nil {
		return err
	}
	slot, _, err := a.disk().Partition(a.on.Slot.Partition())
	if err != nil {
		return err
	}
	if state, err := c.Look(slot, r.Verity); err != nil || state == slotcrypt.Encrypted {
		return err
	}
	return c.Convert(slot, r.Verity, nil)
}

// wantNoPlaintext looks for the blocks of all releases in both slots.
func (a *appliance) wantNoPlaintext() {
	a.t.Helper()
	known := map[[32]byte]string{}
	for version, r := range a.releases {
		for at := 0; at < len(r.root); at += 512 {
			if sector := r.root[at : at+512]; len(bytes.Trim(sector, "\x00")) > 0 {
				known[sha256.Sum256(sector)] = fmt.Sprintf("%s at byte %d", version, at)
			}
		}
	}
	for _, name := range []string{partition.RootAName, partition.RootBName} {
		dev, part, err := a.disk().Partition(name)
		if err != nil {
			a.t.Fatal(err)
		}
		all := make([]byte, part.SizeBytes)
		if _, err := dev.ReadAt(all, 0); err != nil {
			a.t.Fatal(err)
		}
		for at := 0; at < len(all); at += 512 {
			if what := known[sha256.Sum256(all[at:at+512])]; what != "" {
				a.t.Fatalf("%s has at byte %d, in the clear, %s", name, at, what)
			}
		}
	}
}

// TestEncryptedSlotsAreUpdated with what is new over an encrypted slot, over a release that
// was written in the clear, and back to the old one.
func TestEncryptedSlotsAreUpdated(t *testing.T) {
	v := newVendor(t)
	o := releaseOptions{encrypted: true}
	v.publish("1.0.0", releaseOptions{encrypted: true, ownBytes: 900_000}) // larger than what follows
	v.slotKey = noise("the box's key", slotcrypt.KeyBytes)
	a := newAppliance(v, "1.0.0")
	v.publish("1.1.0", o)
	a.update("1.1.0")
	v.publish("1.2.0", o)
	a.update("1.2.0")
	a.wantEntries("a 1.2.0", "b 1.1.0")
	// What all releases share, 1 MiB, comes from the encrypted slot that runs.
	for _, m := range regexp.MustCompile(`fetch_bytes=(\d+)`).FindAllStringSubmatch(a.log.String(), -1) {
		if n, err := strconv.Atoi(m[1]); err != nil || n < 200_000 || n > 300_000 {
			t.Errorf("%s bytes of a release were fetched, where 200000 are new", m[1])
		}
	}
	a.wantNoPlaintext()

	v.publish("1.3.0", o)
	a.mustApply(v.source(), "1.3.0", "1.3.0")
	for range updateTries {
		a.mustBoot(partition.SlotB, "1.3.0")
	}
	a.mustBoot(partition.SlotA, "1.2.0") // its tries are used up
	a.wantNoPlaintext()

	// Cut off, an installation finds what it has written.
	v.publish("1.4.0", o)
	m := &meteredDevice{Device: a.dev}
	a.dev = m
	a.mustApply(v.source(), "1.4.0", "1.4.0")
	whole := m.written
	a.dev = m.Device
	slot, _, err := a.disk().Partition(partition.RootBName)
	if err != nil {
		t.Fatal(err)
	}
	put(t, slot, make([]byte, 4096), 270*4096) // one block never came to the disk
	entries, err := a.disk().Entries()
	if err != nil || entries[0].Slot != partition.SlotB {
		t.Fatalf("entries %+v, %v", entries, err)
	}
	if esp, err := a.esp(); err != nil {
		t.Fatal(err)
	} else if err := esp.Remove("loader/entries/" + entries[0].FileName); err != nil {
		t.Fatal(err)
	}
	a.mustBoot(partition.SlotA, "1.2.0")
	m = &meteredDevice{Device: a.dev}
	a.dev = m
	a.mustApply(v.source(), "1.4.0", "1.4.0")
	a.dev = m.Device
	if m.written > whole/2 {
		t.Errorf("%d bytes were written where all but one block was there; the whole release took %d", m.written, whole)
	}
	a.mustBoot(partition.SlotB, "1.4.0")

	// Another box's key opens nothing.
	a.slotKey = noise("another box's key", slotcrypt.KeyBytes)
	if err := a.boot(); !errors.Is(err, slotcrypt.ErrForeign) {
		t.Errorf("with another box's key: %v", err)
	}
}

// TestEncryptionComesAndGoes with the releases that ask for it.
func TestEncryptionComesAndGoes(t *testing.T) {
	v := newVendor(t, "1.0.0")
	a := newAppliance(v, "1.0.0")
	v.publish("1.1.0", releaseOptions{encrypted: true})
	a.mustApply(v.source(), "1.1.0", "1.1.0") // the box has no key yet
	inTheClear := func(slot partition.Slot) bool {
		dev, _, err := a.disk().Partition(slot.Partition())
		if err != nil {
			t.Fatal(err)
		}
		return slotcrypt.Readable(dev)
	}
	if !inTheClear(partition.SlotA) || !inTheClear(partition.SlotB) {
		t.Fatal("a slot was encrypted without a key")
	}
	v.slotKey = noise("the box's key", slotcrypt.KeyBytes)
	a.mustBoot(partition.SlotB, "1.1.0")
	a.bless()
	if !inTheClear(partition.SlotA) || inTheClear(partition.SlotB) {
		t.Fatal("the slot that boots was not encrypted, or the other one was, whose release cannot open it")
	}
	a.wantEntries("b 1.1.0", "a 1.0.0")
	v.publish("1.2.0", releaseOptions{encrypted: true})
	a.update("1.2.0")
	a.wantNoPlaintext()
	v.publish("1.3.0", releaseOptions{})
	a.update("1.3.0")
	if inTheClear(partition.SlotA) || !inTheClear(partition.SlotB) {
		t.Fatal("a release that knows nothing of encrypted slots has to be in the clear")
	}
	v.publish("1.4.0", releaseOptions{})
	a.update("1.4.0") // by a release that has a key and does not want it
	a.wantEntries("a 1.4.0", "b 1.3.0")
	if !inTheClear(partition.SlotA) {
		t.Fatal("a release that knows nothing of encrypted slots has to be in the clear")
	}
}

// slotBox is a box with volumes, whose slot a has a release that wants to be encrypted.
type slotBox struct {
	*box
	dev partition.Device // the disk with the slots
	r   made
}

func newSlotBox(t *testing.T, volumes int) *slotBox {
	t.Helper()
	v := newVendor(t)
	r := makeRelease(t, "1.0.0", releaseOptions{encrypted: true})
	v.releases["1.0.0"] = r
	return &slotBox{newBox(t, volumes), v.newDisk("1.0.0"), r}
}

func (b *slotBox) disk() *partition.Disk {
	b.t.Helper()
	d, err := partition.Open(b.dev)
	if err != nil {
		b.t.Fatal(err)
	}
	return d
}

// carry puts on the ESP what a factory reset would, or anything.
func (b *slotBox) carry(text []byte) error {
	b.t.Helper()
	esp, err := espOf(b.disk())
	if err != nil {
		return err
	}
	return esp.WriteFile(slotCarryESP, int64(len(text)), bytes.NewReader(text), today)
}

// start is the initrd's part of a boot: the key of the slots.
func (b *slotBox) start(typed string) (*session, []byte, error) {
	b.t.Helper()
	b.powerOn()
	s := b.session(typed)
	s.m.Slots = &Slots{Disk: b.disk(), Slot: partition.SlotA, Verity: b.r.Verity}
	if err := s.m.EnterPhase(phaseEnterInitrd); err != nil && b.noTPM == nil {
		b.t.Fatal(err)
	}
	if err := s.open(); err != nil {
		return s, nil, err
	}
	return s, s.m.Slots.TakeKey(), s.m.Leave(&s.status)
}

// mustStart opens the volumes by the method and then the slot.
func (b *slotBox) mustStart(typed, method string) (*session, []byte) {
	b.t.Helper()
	s, key, err := b.start(typed)
	if err != nil {
		b.t.Fatalf("%v\nconsole: %s", err, s.console.out.String())
	}
	s.wantOpen(method)
	c, err := slotcrypt.New(key)
	if err != nil {
		b.t.Fatal(err)
	}
	slot, _, err := b.disk().Partition(partition.RootAName)
	if err != nil {
		b.t.Fatal(err)
	}
	state, err := c.Look(slot, b.r.Verity)
	if err == nil && state == slotcrypt.Plain {
		err = c.Convert(slot, b.r.Verity, nil)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	for _, text := range []string{s.console.out.String(), s.log.text.String(), s.log.json.String()} {
		if strings.Contains(text, fmt.Sprintf("%x", key[:8])) || strings.Contains(text, string(key)) {
			b.t.Error("the key of the slots is in the console or the log")
		}
	}
	if _, err := readCarried(b.disk()); !errors.Is(err, fs.ErrNotExist) {
		b.t.Errorf("what was carried over is still on the ESP: %v", err)
	}
	return s, key
}

// folder is the agent's on a volume.
func (s *session) folder(i int) string {
	return filepath.Join(s.m.Root, s.volumes[i].Mount, stateFolder)
}

func (b *slotBox) slotEraser(s *session) *Eraser {
	e := b.eraser(s)
	e.CarrySlotKey = func() error { return carrySlotKey(s.folder(0), b.disk(), today) }
	e.DropSlotKey = func() error { return dropCarried(b.disk()) }
	return e
}

func TestSlotKey(t *testing.T) {
	b := newSlotBox(t, 2)
	s, key := b.mustStart("", "provisioned")
	recovery := s.recoveryKey()
	for i := range b.volumes {
		path := filepath.Join(s.folder(i), slotKeyFile)
		info, err := os.Stat(path)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
		if have, err := os.ReadFile(path); err != nil || !bytes.Equal(have, key) {
			t.Errorf("%s has another key, or none: %v", path, err)
		}
	}
	_, again := b.mustStart("", "tpm")
	if !bytes.Equal(key, again) {
		t.Error("the next boot has another key")
	}
	// A volume that lost it gets it again.
	if err := os.Remove(filepath.Join(s.folder(0), slotKeyFile)); err != nil {
		t.Fatal(err)
	}
	s, again = b.mustStart("", "tpm")
	if have, err := os.ReadFile(filepath.Join(s.folder(0), slotKeyFile)); err != nil || !bytes.Equal(have, key) || !bytes.Equal(key, again) {
		t.Errorf("the first volume did not get the key again: %v", err)
	}
	b.noTPM = errors.New("broken")
	synctest.Test(t, func(t *testing.T) {
		if _, again = b.mustStart(recovery+"\n", "recovery"); !bytes.Equal(key, again) {
			t.Error("after the recovery key, another key")
		}
	})
}

// TestSlotKeyIsLost: no volume has it, and the slot is encrypted. None is made.
func TestSlotKeyIsLost(t *testing.T) {
	b := newSlotBox(t, 1)
	s, _ := b.mustStart("", "provisioned")
	path := filepath.Join(s.folder(0), slotKeyFile)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.start(""); !errors.Is(err, errSlotKeyLost) {
		t.Errorf("without the key: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a key was made: %v", err)
	}
	// The slots of this box in another one: its volumes are not even made.
	other := &slotBox{newBox(t, 1), b.dev, b.r}
	if _, _, err := other.start(""); !errors.Is(err, errSlotKeyLost) || !other.fresh(0) {
		t.Errorf("in another box: %v, its volume as new: %v", err, other.fresh(0))
	}
}

// TestSlotKeyIsTorn: power was lost while the key was made; it was never used.
func TestSlotKeyIsTorn(t *testing.T) {
	b := newSlotBox(t, 1)
	b.powerOn()
	s := b.mustBoot("", "provisioned") // a release that knew nothing of encrypted slots
	for _, name := range []string{slotKeyFile, slotKeyFile + ".new"} {
		putFile(t, filepath.Join(s.folder(0), name), make([]byte, 17))
	}
	if _, key := b.mustStart("", "tpm"); len(key) != slotcrypt.KeyBytes {
		t.Errorf("a key of %d bytes", len(key))
	}
}

// TestFactoryResetKeepsTheSlots: they open after it, in this box and in no other.
func TestFactoryResetKeepsTheSlots(t *testing.T) {
	for _, policy := range []string{"standard", "strict", "rollback-proof"} {
		t.Run(policy, func(t *testing.T) {
			b := newSlotBox(t, 2)
			b.policy.Policy = policy
			if policy == "rollback-proof" {
				b.policy.Epoch = 1
				b.signatures = signaturesOfEpoch(t, b.box)
			}
			s, key := b.mustStart("", "provisioned")
			proof, err := b.slotEraser(s).Reset()
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(proof.Slots, "carried over") {
				t.Errorf("the proof says of the slots: %q", proof.Slots)
			}
			carried, err := readCarried(b.disk())
			if err != nil || bytes.Contains(carried, key) {
				t.Fatalf("on the ESP: %v; the key in the clear: %v", err, bytes.Contains(carried, key))
			}
			// Somebody else with the disk, before the box has started again.
			thief := &slotBox{&box{t: t, tpm: sealtest.Start(t), disk: b.box.disk.(*partition.Memory).Clone(), volumes: b.volumes,
				release: b.release, signatures: b.signatures, secureBoot: true, files: t.TempDir(), policy: b.policy}, b.dev.(*partition.Memory).Clone(), b.r}
			if _, _, err := thief.start(""); err == nil || !strings.Contains(err.Error(), "carried over a factory reset") || !thief.fresh(0) {
				t.Errorf("another TPM with the disk: %v", err)
			}
			s, again := b.mustStart("", "provisioned")
			if !bytes.Equal(key, again) {
				t.Fatal("after the reset, another key")
			}
			if _, again = b.mustStart("", "tpm"); !bytes.Equal(key, again) {
				t.Fatal("and at the boot after that, another key")
			}
			// Cut between the new volumes and the key on them.
			for i := range b.volumes {
				if err := os.Remove(filepath.Join(s.folder(i), slotKeyFile)); err != nil {
					t.Fatal(err)
				}
			}
			if err := b.carry(carried); err != nil {
				t.Fatal(err)
			}
			if _, again = b.mustStart("", "tpm"); !bytes.Equal(key, again) {
				t.Error("after a cut, another key")
			}
			// Cut between the copy and the first mark: nothing was reset.
			if err := b.carry(carried); err != nil {
				t.Fatal(err)
			}
			b.mustStart("", "tpm")
		})
	}
}

// TestFactoryResetWithAPIN asks for the old PIN, which opens the slots, and for a new one.
func TestFactoryResetWithAPIN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newSlotBox(t, 1)
		b.policy.PIN = true
		s, key := b.mustStart("old pin\nold pin\n", "provisioned")
		if _, err := b.slotEraser(s).Reset(); err != nil {
			t.Fatal(err)
		}
		b.tpm.Reboot()
		if _, again := b.mustStart("old pin\nnew pin\nnew pin\n", "provisioned"); !bytes.Equal(key, again) {
			t.Error("after the reset, another key")
		}
		b.tpm.Reboot()
		if _, again := b.mustStart("new pin\n", "tpm"); !bytes.Equal(key, again) {
			t.Error("and at the boot after that, another key")
		}
	})
}

// TestFactoryResetWithoutTheTPM: it did not open the volumes, and there is nothing that
// it could open after a reset. Then nothing is erased.
func TestFactoryResetWithoutTheTPM(t *testing.T) {
	b := newSlotBox(t, 1)
	s, _ := b.mustStart("", "provisioned")
	for name, text := range map[string]string{"damaged": "{}", "missing": ""} {
		path := filepath.Join(s.folder(0), slotCarryFile)
		putFile(t, path, []byte(text))
		if text == "" {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.slotEraser(s).Reset(); err == nil || !strings.Contains(err.Error(), "restart the box") || b.fresh(0) {
			t.Errorf("%s: %v, erased: %v", name, err, b.fresh(0))
		}
	}
	b.mustStart("", "tpm") // as the message says
	if _, err := b.slotEraser(s).Reset(); err != nil {
		t.Error(err)
	}
}

func TestDecommissionEndsTheSlots(t *testing.T) {
	b := newSlotBox(t, 1)
	s, _ := b.mustStart("", "provisioned")
	proof, err := b.slotEraser(s).Decommission()
	if err != nil || !strings.Contains(proof.Slots, "destroyed") {
		t.Fatalf("%+v, %v", proof, err)
	}
	if _, err := readCarried(b.disk()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key was carried over: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		if _, _, err := b.start(""); !errors.Is(err, ErrPowerOff) {
			t.Errorf("it starts: %v", err)
		}
	})
}

// TestDecommissionAfterReset: what a reset left on the ESP for this TPM, and what earlier
// ones did, is not there for good.
func TestDecommissionAfterReset(t *testing.T) {
	b := newSlotBox(t, 1)
	s, key := b.mustStart("", "provisioned")
	var carried [][]byte
	carry := func() {
		t.Helper()
		if _, err := b.slotEraser(s).Reset(); err != nil {
			t.Fatal(err)
		}
		text, err := readCarried(b.disk())
		if err != nil {
			t.Fatal(err)
		}
		c, _, err := readSlotCarry(text)
		if err != nil {
			t.Fatal(err)
		}
		carried = append(carried, []byte(base64.StdEncoding.EncodeToString(c.Key)))
	}
	carry()
	var again []byte
	if s, again = b.mustStart("", "provisioned"); !bytes.Equal(key, again) {
		t.Fatal("another key")
	}
	carry()
	proof, err := b.slotEraser(s).Decommission()
	if err != nil || !strings.Contains(proof.Slots, "destroyed with the volumes") || len(proof.Problems) != 0 {
		t.Fatalf("%+v, %v", proof, err)
	}
	if _, err := readCarried(b.disk()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key is carried over: %v", err)
	}
	dev, part, err := b.disk().Partition(partition.ESPName)
	if err != nil {
		t.Fatal(err)
	}
	esp := make([]byte, part.SizeBytes)
	if _, err := dev.ReadAt(esp, 0); err != nil {
		t.Fatal(err)
	}
	for i, text := range carried {
		if bytes.Contains(esp, text) {
			t.Errorf("the key that reset %d carried over is in the boot partition's clusters, for this TPM to open", i)
		}
	}
}

// TestSlotCarryIsRead: what is on the ESP may have been written by anybody.
func TestSlotCarryIsRead(t *testing.T) {
	b := newSlotBox(t, 1)
	s, _ := b.mustStart("", "provisioned")
	good, err := os.ReadFile(filepath.Join(s.folder(0), slotCarryFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.slotEraser(s).Reset(); err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(good, []byte(`"key":"`), []byte(`"key":"AAAA`), 1)
	for name, text := range map[string][]byte{
		"empty": {}, "no JSON": []byte("key"), "no token": []byte(`{"format":1}`), "another format": bytes.Replace(good, []byte(`"format":1`), []byte(`"format":2`), 1),
		"long": bytes.Repeat([]byte(" "), maxSlotCarryBytes+1), "changed": changed,
		"no nonce": bytes.Replace(good, []byte(`"nonce":"`), []byte(`"nonce":"","n":"`), 1),
	} {
		if err := b.carry(text); err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.start(""); err == nil || !b.fresh(0) {
			t.Errorf("%s: %v, volumes as new: %v", name, err, b.fresh(0))
		}
	}
	if err := b.carry(good); err != nil {
		t.Fatal(err)
	}
	b.mustStart("", "provisioned")
}

func TestStatusOfEncryptedSlots(t *testing.T) {
	s := Status{EncryptSlots: true, Slots: []SlotStatus{{Slot: "a", Encrypted: true}, {Slot: "b"}}, Verity: image.Verity{}}
	var b strings.Builder
	if _, err := s.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"slot a    encrypted", "slot b    IN THE CLEAR", "kernel, initrd and agent on the boot partition"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("status does not say %q:\n%s", want, b.String())
		}
	}
}
