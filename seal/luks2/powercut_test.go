package luks2

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"testing"
)

const sector = 512

// recorder is a device that remembers its writes, cut into sectors and grouped
// by the Sync that ended each group.
type recorder struct {
	memory
	groups [][]sectorWrite // the last group is open
}

type sectorWrite struct {
	off  int64
	data []byte
}

func newRecorder(m memory) *recorder {
	return &recorder{memory: bytes.Clone(m), groups: make([][]sectorWrite, 1)}
}

func (r *recorder) WriteAt(b []byte, off int64) (int, error) {
	if off%sector != 0 || len(b)%sector != 0 {
		return 0, fmt.Errorf("write of %d bytes at %d is not in whole sectors", len(b), off)
	}
	last := &r.groups[len(r.groups)-1]
	for i := 0; i < len(b); i += sector {
		*last = append(*last, sectorWrite{off + int64(i), bytes.Clone(b[i : i+sector])})
	}
	return r.memory.WriteAt(b, off)
}

func (r *recorder) Sync() error {
	r.groups = append(r.groups, nil)
	return nil
}

// overlay is a device after a cut: a base and some sectors over it.
type overlay struct {
	base    memory
	sectors map[int64][]byte
}

func (o overlay) ReadAt(b []byte, off int64) (int, error) {
	n, err := o.base.ReadAt(b, off)
	for s := off - off%sector; s < off+int64(n); s += sector {
		if data, ok := o.sectors[s]; ok {
			from := max(s, off)
			copy(b[from-off:n], data[from-s:])
		}
	}
	return n, err
}

// WriteAt takes whole sectors.
func (o overlay) WriteAt(b []byte, off int64) (int, error) {
	for i := 0; i < len(b); i += sector {
		o.sectors[off+int64(i)] = bytes.Clone(b[i : i+sector])
	}
	return len(b), nil
}

func (o overlay) Sync() error { return nil }

// cuts calls check for the states a power cut can leave: all groups before the
// cut are on the medium, and of the open one each beginning, each end, each
// sector alone and all but each. Groups of more than a few hundred sectors
// (key areas) are thinned out: only their first, last and every 61st sector
// are places to cut.
func (r *recorder) cuts(t *testing.T, before memory, check func(name string, dev overlay)) {
	t.Helper()
	base := bytes.Clone(before)
	for g, group := range r.groups {
		n := len(group)
		for i := 0; i <= n; i++ {
			if n > 256 && i > 1 && i < n-1 && i%61 != 0 {
				continue
			}
			for shape, chosen := range map[string]func(j int) bool{
				"beginning": func(j int) bool { return j < i },
				"end":       func(j int) bool { return j >= i },
				"alone":     func(j int) bool { return j == i },
				"all but":   func(j int) bool { return j != i },
			} {
				o := overlay{base, map[int64][]byte{}}
				for j, w := range group {
					if chosen(j) {
						o.sectors[w.off] = w.data
					}
				}
				check(fmt.Sprintf("group %d of %d, %s, sector %d of %d", g, len(r.groups), shape, i, n), o)
			}
		}
		for _, w := range group {
			copy(base[w.off:], w.data)
		}
	}
	if !bytes.Equal(base, r.memory) {
		t.Fatal("the recorder lost a write")
	}
}

func opens(dev io.ReaderAt, passphrase string) error {
	h, _, err := Read(dev, testSize)
	if err != nil {
		return err
	}
	_, _, err = h.Unlock(dev, []byte(passphrase))
	return err
}

// TestPowerCutWhileWriting cuts an edit that adds a slot, removes one and
// changes a token. At every moment the volume opens with the slot that stays,
// and with the one that the header in force names; Repair ends it.
func TestPowerCutWhileWriting(t *testing.T) {
	for name, prepare := range map[string]func(dev memory){
		"both copies good": func(memory) {},
		"primary torn":     func(dev memory) { dev[5000] ^= 1 },
		"secondary torn":   func(dev memory) { dev[headerBytes+5000] ^= 1 },
	} {
		t.Run(name, func(t *testing.T) {
			before := dirty(t)
			h := newHeader(t)
			addSlot(t, h, "old", HighEntropyKDF())
			provision(t, h, before)
			prepare(before)

			dev := newRecorder(before)
			h, _, err := Read(dev, testSize)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.RemoveKeyslot(1); err != nil {
				t.Fatal(err)
			}
			addSlot(t, h, "new", HighEntropyKDF())
			if _, err := h.SetToken(NextToken, RecoveryToken(1)); err != nil {
				t.Fatal(err)
			}
			if err := h.Write(dev); err != nil {
				t.Fatal(err)
			}
			if len(dev.groups) != 5 {
				t.Fatalf("%d groups; want key area, copy, copy, zeros, and nothing after the last Sync", len(dev.groups))
			}
			states := 0
			c := cutChecker{t, map[[32]byte]bool{}}
			dev.cuts(t, before, func(name string, cut overlay) {
				states++
				c.check(name, cut)
			})
			if states < 300 {
				t.Errorf("only %d states", states)
			}
			wantUnusedZero(t, read(t, dev), dev.memory)
		})
	}
}

// cutChecker remembers which key areas it has opened with which passphrase, so
// that hundreds of states with equal ones cost one derivation.
type cutChecker struct {
	t      *testing.T
	opened map[[32]byte]bool
}

func (c cutChecker) unlock(h *Header, dev io.ReaderAt, slot int, passphrase string) error {
	s := h.meta.keyslots[slot]
	sum := sha256.New()
	fmt.Fprintln(sum, passphrase, slot, h.seqID)
	if _, err := io.Copy(sum, io.NewSectionReader(dev, s.area.offset, s.area.size)); err != nil {
		return err
	}
	id := [32]byte(sum.Sum(nil))
	if c.opened[id] {
		return nil
	}
	key, err := h.UnlockSlot(dev, slot, []byte(passphrase))
	c.opened[id] = err == nil && bytes.Equal(key, testVolumeKey(c.t))
	return err
}

func (c cutChecker) check(name string, cut overlay) {
	t := c.t
	t.Helper()
	h, report, err := Read(cut, testSize)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	want := map[uint64]string{1: "old", 2: "new"}[h.SeqID()]
	if len(h.Tokens()) != int(h.SeqID()-1) {
		t.Errorf("%s: header %d has %d tokens", name, h.SeqID(), len(h.Tokens()))
	}
	for slot, passphrase := range []string{"one", want} {
		if err := c.unlock(h, cut, slot, passphrase); err != nil {
			t.Errorf("%s: header %d, slot %d: %v", name, h.SeqID(), slot, err)
		}
	}
	if report.Sound() {
		return
	}
	if err := h.Repair(cut); err != nil {
		t.Fatalf("%s: repair: %v", name, err)
	}
	h = read(t, cut)
	if err := c.unlock(h, cut, 1, want); err != nil {
		t.Errorf("%s: after repair: %v", name, err)
	}
	wantUnusedZero(t, h, cut)
}

// TestPowerCutWhileRepairing cuts the repair of each copy.
func TestPowerCutWhileRepairing(t *testing.T) {
	for _, w := range []which{primary, secondary} {
		before := dirty(t)
		provision(t, newHeader(t), before)
		before[w.offset()+6000] ^= 1
		dev := newRecorder(before)
		h, _, err := Read(dev, testSize)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Repair(dev); err != nil {
			t.Fatal(err)
		}
		dev.cuts(t, before, func(name string, cut overlay) {
			if err := opens(cut, "one"); err != nil {
				t.Errorf("%v, %s: %v", w, name, err)
			}
		})
	}
}

// TestPowerCutWhileProvisioning cuts WriteNew and Publish on a partition that
// held another volume before. Sector 0 is the caller's marker, whole, or the
// volume is good.
func TestPowerCutWhileProvisioning(t *testing.T) {
	before := dirty(t)
	earlier := newHeader(t)
	addSlot(t, earlier, "earlier", HighEntropyKDF())
	provision(t, earlier, before)
	marker := bytes.Repeat([]byte("unprovisioned..."), sector/16)
	copy(before, marker)
	copy(before[sector:binaryHeaderBytes], random(t, 98, binaryHeaderBytes)) // the image builder's

	dev := newRecorder(before)
	h := newHeader(t)
	if err := h.WriteNew(dev); err != nil {
		t.Fatal(err)
	}
	for _, group := range dev.groups {
		for _, w := range group {
			if w.off < binaryHeaderBytes {
				t.Fatalf("WriteNew wrote at byte %d", w.off)
			}
		}
	}
	if err := h.Publish(dev); err != nil {
		t.Fatal(err)
	}
	good, unprovisioned := 0, 0
	dev.cuts(t, before, func(name string, cut overlay) {
		first := make([]byte, sector)
		if _, err := cut.ReadAt(first, 0); err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(first, marker) {
			unprovisioned++
			return
		}
		good++
		h, report, err := Read(cut, testSize)
		if err != nil || !report.Sound() {
			t.Fatalf("%s: the marker is gone and the volume is not there: %v, %+v", name, err, report)
		}
		if _, _, err := h.Unlock(cut, []byte("one")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, _, err := h.Unlock(cut, []byte("earlier")); !errors.Is(err, ErrPassphrase) {
			t.Errorf("%s: the earlier volume's passphrase: %v", name, err)
		}
	})
	if good == 0 || unprovisioned < 300 {
		t.Errorf("%d good and %d unprovisioned states: not what a cut enumeration gives", good, unprovisioned)
	}
	wantUnusedZero(t, read(t, dev), dev.memory)

	// A cut in the middle, and then provisioning from the start again.
	again := memory(bytes.Clone(before))
	if err := newHeader(t).WriteNew(again); err != nil {
		t.Fatal(err)
	}
	provision(t, newHeader(t), again)
	wantOpens(t, read(t, again), again, "one", 0)
}

// failing is a device whose nth write or sync fails.
type failing struct {
	memory
	left int
}

func (f *failing) step() error {
	if f.left--; f.left < 0 {
		return errors.New("device is gone")
	}
	return nil
}

func (f *failing) WriteAt(b []byte, off int64) (int, error) {
	if err := f.step(); err != nil {
		return 0, err
	}
	return f.memory.WriteAt(b, off)
}

func (f *failing) Sync() error { return f.step() }

// TestWriteErrors fails each device call of an edit in turn: Write says so, and
// the volume opens.
func TestWriteErrors(t *testing.T) {
	pristine := dirty(t)
	h := newHeader(t)
	addSlot(t, h, "old", HighEntropyKDF())
	provision(t, h, pristine)
	for calls := 0; ; calls++ {
		dev := &failing{bytes.Clone(pristine), calls}
		h := read(t, dev)
		if err := h.RemoveKeyslot(1); err != nil {
			t.Fatal(err)
		}
		addSlot(t, h, "new", HighEntropyKDF())
		err := h.Write(dev)
		if err := opens(dev.memory, "one"); err != nil {
			t.Fatalf("after a failure at call %d: %v", calls, err)
		}
		if err == nil {
			if calls != 8 {
				t.Errorf("Write took %d device calls, want 8", calls)
			}
			return
		}
	}
}
