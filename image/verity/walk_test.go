package verity

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/holdfast-os/holdfast/image"
)

// TestWalk visits every block but the superblock once, and each is what its hash says.
func TestWalk(t *testing.T) {
	for _, blocks := range []int{1, 2, 128, 129, 128*128 + 1} {
		t.Run(fmt.Sprint(blocks), func(t *testing.T) {
			all, v := protect(t, pattern(t, blocks*BlockSize), options())
			seen := map[int64]bool{}
			err := Walk(v, func(g Group) ([]byte, error) {
				if g.Blocks < 1 || g.Blocks > hashesPerBlock {
					t.Fatalf("a group of %d blocks", g.Blocks)
				}
				got := bytes.Clone(all[g.OffsetBytes:][:g.Blocks*BlockSize])
				for i := range g.Blocks {
					block := got[i*BlockSize:][:BlockSize]
					at := g.OffsetBytes + int64(i)*BlockSize
					if seen[at] {
						t.Errorf("the block at %d once more", at)
					}
					seen[at] = true
					if !g.Is(i, block) {
						t.Errorf("the block at %d is not what it is", at)
					}
					if block[7] ^= 1; g.Is(i, block) {
						t.Errorf("the block at %d is what it is not", at)
					}
					block[7] ^= 1
				}
				return got, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			super := v.DataBlocks * BlockSize
			if len(seen) != len(all)/BlockSize-1 || seen[super] {
				t.Errorf("%d of %d blocks seen, the superblock: %v", len(seen), len(all)/BlockSize-1, seen[super])
			}
			if got, err := SuperblockOf(v); err != nil || !bytes.Equal(got, all[super:super+BlockSize]) {
				t.Errorf("SuperblockOf: %v", err)
			}
		})
	}
}

func TestWalkErrors(t *testing.T) {
	_, v := protect(t, pattern(t, 200*BlockSize), options())
	mine := errors.New("mine")
	if err := Walk(v, func(Group) ([]byte, error) { return nil, mine }); !errors.Is(err, mine) {
		t.Errorf("%v, want the reader's error", err)
	}
	if err := Walk(v, func(Group) ([]byte, error) { return nil, nil }); err == nil {
		t.Error("a hash block without bytes was taken")
	}
	bad := image.Verity{RootHash: "x"}
	if err := Walk(bad, nil); err == nil {
		t.Error("a bad description was taken")
	}
	if _, err := SuperblockOf(bad); err == nil {
		t.Error("a bad description was taken")
	}
}
