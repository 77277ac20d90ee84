// Package powercut enumerates the states in which a power cut can leave a disk,
// so that a test can check every one of them.
//
// Give [New] the disk as it is before the operation, run the operation on the
// [Device] it returns, and range over [Device.States]. The model is that of a
// drive with a volatile cache: everything written before a Sync that returned is
// on the medium; of what was written since, any 512-byte sector may be there in
// any of its versions or not at all. A sector itself is never torn.
//
// The number of such states is exponential, so only these are visited, for each
// stretch between two Syncs: every prefix of its writes, every prefix with the
// next write torn, and seeded random choices. A test that passes is evidence and
// not a proof. Drives that lie about Sync are outside the model.
package powercut

import (
	"fmt"
	"iter"
	"math/rand/v2"

	"github.com/holdfast-os/holdfast/partition"
)

const sectorBytes = 512

// Device records the writes and Syncs of the code under test.
type Device struct {
	start *partition.Memory
	now   *partition.Memory
	// stretches holds the writes between two Syncs; the last one is not synced.
	stretches [][]write
}

// write is what a WriteAt made of each sector that it touched. Whole sectors are
// kept, because a cache merges a partial write with what the sector held before:
// a later version never lacks an earlier part.
type write []sector

type sector struct {
	off  int64
	data [sectorBytes]byte
}

// New starts recording on a copy of base, whose size must be a multiple of 512.
func New(base *partition.Memory) *Device {
	return &Device{start: base.Clone(), now: base.Clone(), stretches: make([][]write, 1)}
}

// Size is the base's.
func (d *Device) Size() int64 { return d.now.Size() }

// ReadAt reads what has been written, synced or not.
func (d *Device) ReadAt(p []byte, off int64) (int, error) { return d.now.ReadAt(p, off) }

// WriteAt implements [io.WriterAt].
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.now.WriteAt(p, off)
	if err != nil || n == 0 {
		return n, err
	}
	var w write
	for at := off &^ (sectorBytes - 1); at < off+int64(n); at += sectorBytes {
		s := sector{off: at}
		if _, err := d.now.ReadAt(s.data[:], at); err != nil {
			return n, err
		}
		w = append(w, s)
	}
	last := len(d.stretches) - 1
	d.stretches[last] = append(d.stretches[last], w)
	return n, nil
}

// Sync begins a new stretch.
func (d *Device) Sync() error {
	if len(d.stretches[len(d.stretches)-1]) > 0 {
		d.stretches = append(d.stretches, nil)
	}
	return nil
}

// Writes and Syncs are how much was recorded; a test asserts that they are not 0.
func (d *Device) Writes() (n int) {
	for _, s := range d.stretches {
		n += len(s)
	}
	return n
}

// Syncs counts the Syncs that had something to do.
func (d *Device) Syncs() int { return len(d.stretches) - 1 }

// Unsynced says whether the code under test ended without a last Sync.
func (d *Device) Unsynced() bool { return len(d.stretches[len(d.stretches)-1]) > 0 }

// Now is the disk without a cut.
func (d *Device) Now() *partition.Memory { return d.now.Clone() }

// States visits the disk before the first write and then, stretch by stretch,
// the states that the package doc lists, with n random ones a stretch. The same
// seed gives the same states. Each state is a disk of its own that may be
// changed and kept. The description names it in a test's message.
func (d *Device) States(seed uint64, n int) iter.Seq2[string, *partition.Memory] {
	return func(yield func(string, *partition.Memory) bool) {
		rng := rand.New(rand.NewPCG(seed, 0))
		durable := d.start.Clone()
		if !yield("before the first write", durable.Clone()) {
			return
		}
		for i, writes := range d.stretches {
			if !randomStates(durable, i, writes, rng, n, yield) || !prefixes(durable, i, writes, rng, yield) {
				return
			}
		}
	}
}

// prefixes visits every prefix of the stretch and leaves all of it in durable.
func prefixes(durable *partition.Memory, stretch int, writes []write, rng *rand.Rand, yield func(string, *partition.Memory) bool) bool {
	for k, w := range writes {
		if len(w) > 1 {
			torn := durable.Clone()
			kept := w.applySome(torn, rng, 0.5)
			desc := fmt.Sprintf("after sync %d, %d of %d writes and %d of the next one's %d sectors", stretch, k, len(writes), kept, len(w))
			if !yield(desc, torn) {
				return false
			}
		}
		w.applySome(durable, rng, 1)
		if !yield(fmt.Sprintf("after sync %d, %d of %d writes", stretch, k+1, len(writes)), durable.Clone()) {
			return false
		}
	}
	return true
}

// randomStates visits n states in which any sector of the stretch may be missing
// or at an earlier version.
func randomStates(durable *partition.Memory, stretch int, writes []write, rng *rand.Rand, n int, yield func(string, *partition.Memory) bool) bool {
	if len(writes) < 2 {
		return true
	}
	for k := range n {
		m := durable.Clone()
		// Few, half and most of the sectors: each finds other mistakes.
		p := []float64{0.5, 0.1, 0.9}[k%3]
		kept, all := 0, 0
		for _, w := range writes {
			if k%2 == 1 { // whole writes, reordered
				if all++; rng.Float64() < p {
					kept++
					w.applySome(m, rng, 1)
				}
				continue
			}
			all += len(w)
			kept += w.applySome(m, rng, p)
		}
		if !yield(fmt.Sprintf("after sync %d, random choice %d: %d of %d", stretch, k, kept, all), m) {
			return false
		}
	}
	return true
}

// applySome writes each sector with probability p and says how many.
func (w write) applySome(m *partition.Memory, rng *rand.Rand, p float64) (kept int) {
	for i := range w {
		if p < 1 && rng.Float64() >= p {
			continue
		}
		kept++
		if _, err := m.WriteAt(w[i].data[:], w[i].off); err != nil {
			panic(err) // the same write succeeded when it was recorded
		}
	}
	return kept
}
