package deltamake

import (
	"cmp"
	"context"
	"slices"

	"github.com/holdfast-os/holdfast/update/delta"
)

// A sample is a place in the old image whose last 64 bytes have a hash of a rare form,
// so that equal contents are found at any offset by looking up few of them.
type sample struct {
	hash  uint64
	block uint32
}

const (
	sampleShift = 64 - 7 // one place in 128
	warmup      = 64     // bytes that a hash covers
	// maxEqual samples: what occurs more often says nothing about where it is from.
	maxEqual  = 4
	readAhead = 256 // blocks
)

// gearTable gives each byte a number, by splitmix64.
func gearTable() (t [256]uint64) {
	x := uint64(0)
	for i := range t {
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		t[i] = z ^ z>>31
	}
	return t
}

// roll calls fn for the samples in data.
func (p *patcher) roll(data []byte, fn func(hash uint64, at int)) {
	h := uint64(0)
	for i, c := range data {
		h = h<<1 + p.gear[c]
		if h>>sampleShift == 0 && i >= warmup {
			fn(h, i)
		}
	}
}

// sampleOld takes samples of what the new image does not have: where a file has
// changed, its old blocks are gone.
func (p *patcher) sampleOld(ctx context.Context) error {
	var runs []extent
	for b := int64(0); b < p.oldBlocks; b++ {
		if !p.gone[b] {
			continue
		}
		if n := len(runs); n > 0 && runs[n-1].end() == b && runs[n-1].blocks < readAhead {
			runs[n-1].blocks++
		} else {
			runs = append(runs, extent{first: b, blocks: 1})
		}
	}
	found := make([][]sample, len(runs))
	worker := func() (func(int) ([]byte, error), error) {
		var data []byte
		return func(i int) (_ []byte, err error) {
			if data, err = p.old.append(data[:0], runs[i].first, runs[i].blocks); err != nil {
				return nil, err
			}
			p.roll(data, func(hash uint64, at int) {
				found[i] = append(found[i], sample{hash, uint32(runs[i].first + int64(at/delta.BlockSize))})
			})
			return nil, nil
		}, nil
	}
	if err := inOrder(ctx, len(runs), worker, func(int, []byte) error { return nil }); err != nil {
		return err
	}
	p.samples = slices.Concat(found...)
	slices.SortFunc(p.samples, func(a, b sample) int {
		return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.block, b.block))
	})
	return nil
}

// lookup gives the places with a hash, unless there are too many.
func (p *patcher) lookup(hash uint64) []sample {
	from, _ := slices.BinarySearchFunc(p.samples, hash, func(s sample, h uint64) int { return cmp.Compare(s.hash, h) })
	to := from
	for to < len(p.samples) && p.samples[to].hash == hash {
		if to++; to-from > maxEqual {
			return nil
		}
	}
	return p.samples[from:to]
}
