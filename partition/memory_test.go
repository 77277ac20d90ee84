package partition_test

import (
	"bytes"
	"sync"
	"testing"

	"github.com/holdfast-os/holdfast/partition"
)

// TestMemoryAtOnce writes one half while another goroutine reads the other half, which
// is how a slot is rebuilt from the running one, and clones in between. The race
// detector judges as well.
func TestMemoryAtOnce(t *testing.T) {
	const half = 1 << 20
	m := partition.NewMemory(2 * half)
	old := bytes.Repeat([]byte{7}, half)
	if _, err := m.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for off := int64(half); off < 2*half; off += 4096 {
			if _, err := m.WriteAt(bytes.Repeat([]byte{9}, 4096), off); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Go(func() {
		got := make([]byte, half)
		for range 20 {
			if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, old) {
				t.Errorf("the half that nobody writes reads as something else: %v", err)
			}
		}
	})
	for range 20 {
		c, got := m.Clone(), make([]byte, half)
		if _, err := c.WriteAt([]byte{1}, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadAt(got, 0); err != nil || got[0] != 1 || !bytes.Equal(got[1:], old[1:]) {
			t.Fatalf("clone: %v", err)
		}
	}
	wg.Wait()
	got := make([]byte, half)
	if _, err := m.ReadAt(got, half); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{9}, half)) {
		t.Errorf("what was written is not there: %v", err)
	}
}
