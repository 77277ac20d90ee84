package luks2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

const (
	testSize = 17 << 20
	testUUID = "0f1e2d3c-4b5a-4978-8796-a5b4c3d2e1f0"
)

// cheapArgon costs a millisecond; the numbers have nothing to do with strength.
var cheapArgon = KDF{Type: Argon2id, Time: 1, MemoryKiB: 64, Parallel: 2}

// testRand is reproducible randomness.
func testRand(seed byte) io.Reader { return rand.NewChaCha8([32]byte{seed}) }

func random(t testing.TB, seed byte, n int) []byte {
	t.Helper()
	b, err := randomBytes(testRand(seed), n)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// memory is a partition that starts full of somebody else's bytes.
type memory []byte

func dirty(t testing.TB) memory { return memory(random(t, 99, testSize)) }

func (m memory) ReadAt(b []byte, off int64) (int, error) {
	return bytes.NewReader(m).ReadAt(b, off)
}

func (m memory) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > int64(len(m)) {
		return 0, io.ErrShortWrite
	}
	return copy(m[off:], b), nil
}

func (m memory) Sync() error { return nil }

func testVolumeKey(t testing.TB) []byte { return random(t, 1, VolumeKeyBytes) }

// newHeader formats a volume with one cheap slot, passphrase "one".
func newHeader(t testing.TB) *Header {
	t.Helper()
	h, err := Format(FormatOptions{UUID: testUUID, Label: "data", SizeBytes: testSize, Rand: testRand(2)}, testVolumeKey(t))
	if err != nil {
		t.Fatal(err)
	}
	addSlot(t, h, "one", HighEntropyKDF())
	return h
}

func addSlot(t testing.TB, h *Header, passphrase string, k KDF) int {
	t.Helper()
	slot, err := h.AddKeyslot(testVolumeKey(t), []byte(passphrase), k, testRand(passphrase[0]))
	if err != nil {
		t.Fatal(err)
	}
	return slot
}

func provision(t testing.TB, h *Header, dev Device) {
	t.Helper()
	if err := h.WriteNew(dev); err != nil {
		t.Fatal(err)
	}
	if err := h.Publish(dev); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, dev io.ReaderAt) *Header {
	t.Helper()
	h, report, err := Read(dev, testSize)
	if err != nil {
		t.Fatal(err)
	}
	if !report.Sound() {
		t.Fatalf("report %+v, want two good copies", report)
	}
	return h
}

func wantOpens(t testing.TB, h *Header, dev io.ReaderAt, passphrase string, wantSlot int) {
	t.Helper()
	key, slot, err := h.Unlock(dev, []byte(passphrase))
	if err != nil {
		t.Fatalf("unlock with %q: %v", passphrase, err)
	}
	if slot != wantSlot || !bytes.Equal(key, testVolumeKey(t)) {
		t.Fatalf("unlock with %q opened slot %d, want %d; key right: %v", passphrase, slot, wantSlot, bytes.Equal(key, testVolumeKey(t)))
	}
}

func TestStructSizes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		value any
		want  int
	}{
		{"binaryHeader", binaryHeader{}, 512},
	} {
		if got := binary.Size(tt.value); got != tt.want {
			t.Errorf("%s is %d bytes, want %d", tt.name, got, tt.want)
		}
	}
}

func TestLifeOfAVolume(t *testing.T) {
	dev := dirty(t)
	h := newHeader(t)
	if slot := addSlot(t, h, "two", cheapArgon); slot != 1 {
		t.Fatalf("second slot is %d, want 1", slot)
	}
	wantOpens(t, h, dev, "two", 1) // from memory, before anything is written
	if _, err := h.SetToken(NextToken, RecoveryToken(1)); err != nil {
		t.Fatal(err)
	}
	provision(t, h, dev)

	got := read(t, dev)
	if got.UUID() != testUUID || got.Label() != "data" || got.Subsystem() != "" || got.SeqID() != 1 {
		t.Errorf("read back uuid %q label %q subsystem %q seqid %d", got.UUID(), got.Label(), got.Subsystem(), got.SeqID())
	}
	want := []Keyslot{{0, 1, HighEntropyKDF()}, {1, 1, cheapArgon}}
	if !slices.Equal(got.Keyslots(), want) {
		t.Errorf("keyslots %+v, want %+v", got.Keyslots(), want)
	}
	off, size, sector, cipher := got.Segment()
	if off != 16<<20 || size != 1<<20 || sector != 4096 || cipher != "aes-xts-plain64" {
		t.Errorf("segment %d %d %d %s", off, size, sector, cipher)
	}
	wantOpens(t, got, dev, "one", 0)
	wantOpens(t, got, dev, "two", 1)
	if _, _, err := got.Unlock(dev, []byte("one\n")); !errors.Is(err, ErrPassphrase) {
		t.Errorf("passphrase with a newline: %v, want ErrPassphrase (F54)", err)
	}

	// An edit that removes a slot and adds one must not put the new key where
	// the old one is.
	oldArea := got.meta.keyslots[1].area
	if err := got.RemoveKeyslot(1); err != nil {
		t.Fatal(err)
	}
	if len(got.Tokens()) != 0 {
		t.Errorf("the token of the removed slot is still there: %s", got.Tokens()[0])
	}
	addSlot(t, got, "three", HighEntropyKDF())
	if got.meta.keyslots[1].area.overlaps(oldArea) {
		t.Error("the new slot's area overlaps that of the removed slot, which the header on the device uses")
	}
	if err := got.Write(dev); err != nil {
		t.Fatal(err)
	}
	again := read(t, dev)
	if again.SeqID() != 2 {
		t.Errorf("seqid %d after an edit, want 2", again.SeqID())
	}
	wantOpens(t, again, dev, "three", 1)
	if _, _, err := again.Unlock(dev, []byte("two")); !errors.Is(err, ErrPassphrase) {
		t.Errorf("removed passphrase: %v, want ErrPassphrase", err)
	}
	wantUnusedZero(t, again, dev)
}

// wantUnusedZero checks that nothing of a removed key, or of what was on the
// medium before, is left in the keyslots area.
func wantUnusedZero(t testing.TB, h *Header, dev io.ReaderAt) {
	t.Helper()
	area := make([]byte, keyslotsBytes)
	if _, err := dev.ReadAt(area, keyslotsOffset); err != nil {
		t.Fatal(err)
	}
	for _, s := range h.meta.keyslots {
		clear(area[s.area.offset-keyslotsOffset:][:h.meta.materialBytes()])
	}
	if n := len(area) - bytes.Count(area, []byte{0}); n > 0 {
		t.Errorf("%d bytes of the keyslots area are used by no slot and not zero", n)
	}
}

func TestSameRandomnessSameBytes(t *testing.T) {
	a, b := dirty(t), memory(make([]byte, testSize))
	provision(t, newHeader(t), a)
	provision(t, newHeader(t), b)
	if !bytes.Equal(a[:dataOffset], b[:dataOffset]) {
		t.Error("two volumes of the same inputs differ before the data")
	}
}

func TestDefaultRandomness(t *testing.T) {
	key := testVolumeKey(t)
	var salts [2][64]byte
	for i := range salts {
		h, err := Format(FormatOptions{UUID: testUUID, SizeBytes: testSize}, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.AddKeyslot(key, []byte("x"), HighEntropyKDF(), nil); err != nil {
			t.Fatal(err)
		}
		salts[i] = h.salts[0]
	}
	if salts[0] == salts[1] {
		t.Error("two volumes have the same salt")
	}
}

func TestRefusedCalls(t *testing.T) {
	key := testVolumeKey(t)
	format := func(o FormatOptions, key []byte) error { _, err := Format(o, key); return err }
	add := func(key []byte, pass string, k KDF) error {
		_, err := newHeader(t).AddKeyslot(key, []byte(pass), k, testRand(3))
		return err
	}
	token := func(id int, s string) error { _, err := newHeader(t).SetToken(id, json.RawMessage(s)); return err }
	edited := newHeader(t)
	if err := edited.WriteNew(dirty(t)); err != nil {
		t.Fatal(err)
	}
	addSlot(t, edited, "late", HighEntropyKDF())
	empty := newHeader(t)
	if err := empty.RemoveKeyslot(0); err != nil {
		t.Fatal(err)
	}
	live := dirty(t)
	provision(t, newHeader(t), live)
	other := newHeader(t)
	if err := other.WriteNew(dirty(t)); err != nil {
		t.Fatal(err)
	}

	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"no uuid", format(FormatOptions{SizeBytes: testSize}, key), "UUID"},
		{"upper-case uuid", format(FormatOptions{UUID: strings.ToUpper(testUUID), SizeBytes: testSize}, key), "UUID"},
		{"long label", format(FormatOptions{UUID: testUUID, SizeBytes: testSize, Label: strings.Repeat("x", 48)}, key), "label"},
		{"small partition", format(FormatOptions{UUID: testUUID, SizeBytes: 16 << 20}, key), "too small"},
		{"sector size", format(FormatOptions{UUID: testUUID, SizeBytes: testSize, SectorSize: 1024}, key), "sector size is 1024"},
		{"short key", format(FormatOptions{UUID: testUUID, SizeBytes: testSize}, key[:32]), "32 bytes, not 64"},
		{"zero key", format(FormatOptions{UUID: testUUID, SizeBytes: testSize}, make([]byte, 64)), "random source is broken"},
		{"no randomness", format(FormatOptions{UUID: testUUID, SizeBytes: testSize, Rand: strings.NewReader("")}, key), "random bytes"},
		{"wrong volume key", add(random(t, 50, 64), "x", HighEntropyKDF()), "not this volume's"},
		{"empty passphrase", add(key, "", HighEntropyKDF()), "empty"},
		{"few iterations", add(key, "x", KDF{Type: PBKDF2, Hash: "sha256", Iterations: 999}), "999"},
		{"weak hash", add(key, "x", KDF{Type: PBKDF2, Hash: "sha1", Iterations: 1000}), `"sha1"`},
		{"argon2i", add(key, "x", KDF{Type: "argon2i", Time: 4, MemoryKiB: 1024, Parallel: 1}), `"argon2i"`},
		{"argon2 work", add(key, "x", KDF{Type: Argon2id, Time: 1000, MemoryKiB: 1 << 20, Parallel: 1}), "more work"},
		{"token without type", token(0, `{"keyslots":["0"]}`), "type is missing"},
		{"token of no slot", token(0, `{"type":"x","keyslots":["7"]}`), "keyslot 7 does not exist"},
		{"token twice", token(0, `{"type":"x","type":"y","keyslots":[]}`), "duplicate key"},
		{"token is a list", token(0, `[]`), "not a JSON object"},
		{"token id", token(32, `{"type":"x","keyslots":[]}`), "0 to 31"},
		{"token too long", token(0, `{"type":"x","keyslots":[],"y":"`+strings.Repeat("y", jsonAreaBytes)+`"}`), "JSON area holds"},
		{"remove nothing", newHeader(t).RemoveKeyslot(1), "there is none"},
		{"remove no token", newHeader(t).RemoveToken(1), "there is none"},
		{"write before publish", newHeader(t).Write(dirty(t)), "not published"},
		{"publish before write", newHeader(t).Publish(dirty(t)), "WriteNew has not"},
		{"publish after edit", edited.Publish(dirty(t)), "edited since"},
		{"publish elsewhere", other.Publish(dirty(t)), "does not hold"},
		{"no keyslot", empty.WriteNew(dirty(t)), "no keyslot"},
		{"write new over a volume", newHeader(t).WriteNew(live), "carries a LUKS header"},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: error %v, want one with %q", tt.name, tt.err, tt.want)
		}
	}
	read(t, live)
}

func TestAllKeyslots(t *testing.T) {
	dev := dirty(t)
	h := newHeader(t)
	for i := 1; i < MaxKeyslots; i++ {
		slot, err := h.AddKeyslot(testVolumeKey(t), []byte{byte(i)}, HighEntropyKDF(), testRand(byte(i)))
		if err != nil {
			// The JSON area, not the number of slots, is what fills up first.
			if i < 16 || !strings.Contains(err.Error(), "JSON area") {
				t.Fatalf("slot %d: %v", i, err)
			}
			break
		}
		if slot != i {
			t.Fatalf("slot %d, want %d", slot, i)
		}
	}
	provision(t, h, dev)
	got := read(t, dev)
	last := len(got.Keyslots()) - 1
	key, err := got.UnlockSlot(dev, last, []byte{byte(last)})
	if err != nil || !bytes.Equal(key, testVolumeKey(t)) {
		t.Fatalf("unlock slot %d: %v", last, err)
	}
}

func TestPriority(t *testing.T) {
	dev := dirty(t)
	h := newHeader(t)
	addSlot(t, h, "one", cheapArgon)
	s := h.meta.keyslots[1]
	s.priority = 2
	h.meta.keyslots[1] = s
	s = h.meta.keyslots[0]
	s.priority = 0
	h.meta.keyslots[0] = s
	provision(t, h, dev)
	got := read(t, dev)
	wantOpens(t, got, dev, "one", 1)
	if err := got.RemoveKeyslot(1); err != nil {
		t.Fatal(err)
	}
	if _, _, err := got.Unlock(dev, []byte("one")); !errors.Is(err, ErrPassphrase) {
		t.Errorf("slot of priority 0 was tried: %v", err)
	}
	if _, err := got.UnlockSlot(dev, 0, []byte("one")); err != nil {
		t.Errorf("slot of priority 0 by number: %v", err)
	}
}

// broken fails reads of one interval.
type broken struct {
	memory
	bad extent
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if b.bad.overlaps(extent{off, int64(len(p))}) {
		return 0, errors.New("medium error")
	}
	return b.memory.ReadAt(p, off)
}

func TestMediumErrors(t *testing.T) {
	dev := dirty(t)
	h := newHeader(t)
	addSlot(t, h, "two", HighEntropyKDF())
	provision(t, h, dev)

	slot0 := broken{dev, h.meta.keyslots[0].area}
	wantOpens(t, read(t, slot0), slot0, "two", 1)
	_, _, err := read(t, slot0).Unlock(slot0, []byte("one"))
	if err == nil || errors.Is(err, ErrPassphrase) || !strings.Contains(err.Error(), "keyslot 0") {
		t.Errorf("unreadable slot: %v; nobody can say that the passphrase is wrong", err)
	}

	head := broken{dev, extent{0, 512}}
	got, report, err := Read(head, testSize)
	if err != nil || report.Primary.Err == nil {
		t.Fatalf("unreadable primary header: %v, report %+v", err, report)
	}
	wantOpens(t, got, head, "one", 0)

	if _, _, err := Read(broken{dev, extent{0, keyslotsOffset}}, testSize); err == nil || errors.Is(err, ErrNoHeader) {
		t.Errorf("two unreadable copies: %v", err)
	}
}

func TestChangedUnderneath(t *testing.T) {
	dev := dirty(t)
	provision(t, newHeader(t), dev)
	a, b := read(t, dev), read(t, dev)
	addSlot(t, a, "two", HighEntropyKDF())
	addSlot(t, b, "three", HighEntropyKDF())
	if err := a.Write(dev); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(dev)
	if err := b.Write(dev); !errors.Is(err, ErrChanged) {
		t.Fatalf("second writer: %v, want ErrChanged", err)
	}
	if err := b.Repair(dev); !errors.Is(err, ErrChanged) {
		t.Fatalf("repair by the second writer: %v, want ErrChanged", err)
	}
	if !bytes.Equal(before, dev) {
		t.Error("the refused writer wrote")
	}
}

func TestRepair(t *testing.T) {
	for _, w := range []which{primary, secondary} {
		dev := dirty(t)
		provision(t, newHeader(t), dev)
		h := read(t, dev)
		addSlot(t, h, "two", HighEntropyKDF())
		if err := h.Write(dev); err != nil {
			t.Fatal(err)
		}
		copy(dev[w.offset()+5000:], "torn")
		copy(dev[dataOffset-areaAlign:], "an old key")
		got, report, err := Read(dev, testSize)
		if err != nil || report.Sound() {
			t.Fatalf("%v torn: error %v, report %+v", w, err, report)
		}
		if err := got.Repair(dev); err != nil {
			t.Fatal(err)
		}
		repaired := read(t, dev)
		wantOpens(t, repaired, dev, "two", 1)
		wantUnusedZero(t, repaired, dev)
		before := bytes.Clone(dev)
		if err := repaired.Repair(dev); err != nil || !bytes.Equal(before, dev) {
			t.Errorf("second repair: %v, changed %v", err, !bytes.Equal(before, dev))
		}
	}
}

func TestSecretsAreNotInErrors(t *testing.T) {
	dev := dirty(t)
	provision(t, newHeader(t), dev)
	_, _, err := read(t, dev).Unlock(dev, []byte("hunter2-hunter2"))
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("error %v", err)
	}
}

func TestWipe(t *testing.T) {
	b := []byte{1, 2, 3}
	Wipe(b)
	if !bytes.Equal(b, make([]byte, 3)) {
		t.Errorf("wiped secret is %v", b)
	}
	h := newHeader(t)
	material := h.pending[0]
	provision(t, h, dirty(t))
	if len(h.pending) != 0 || !bytes.Equal(material, make([]byte, len(material))) {
		t.Error("key material is still in memory after it was written")
	}
}
