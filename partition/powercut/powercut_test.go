package powercut_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// record writes 1s over sectors 0 to 3, syncs, then 2s over 0 to 3 and 3s into part of sector 5.
func record(t *testing.T) *powercut.Device {
	t.Helper()
	base := partition.NewMemory(8 * 512)
	_, err := base.WriteAt(bytes.Repeat([]byte{9}, 8*512), 0)
	must(t, err)
	d := powercut.New(base)
	_, err = d.WriteAt(bytes.Repeat([]byte{1}, 4*512), 0)
	must(t, err)
	must(t, d.Sync())
	must(t, d.Sync()) // with nothing to do
	_, err = d.WriteAt(bytes.Repeat([]byte{2}, 4*512), 0)
	must(t, err)
	_, err = d.WriteAt(bytes.Repeat([]byte{3}, 100), 5*512+10)
	must(t, err)
	return d
}

// shape is the first byte of each sector and the one that the partial write changed.
func shape(t *testing.T, m partition.Device) string {
	t.Helper()
	b := make([]byte, m.Size())
	_, err := m.ReadAt(b, 0)
	must(t, err)
	s := ""
	for i := range 8 {
		sector := b[i*512 : (i+1)*512]
		if i != 5 && !bytes.Equal(sector, bytes.Repeat(sector[:1], 512)) {
			t.Errorf("sector %d is torn", i)
		}
		s += fmt.Sprint(sector[20])
	}
	return s
}

func TestStates(t *testing.T) {
	d := record(t)
	if d.Writes() != 3 || d.Syncs() != 1 || !d.Unsynced() {
		t.Errorf("%d writes, %d syncs, unsynced %v", d.Writes(), d.Syncs(), d.Unsynced())
	}
	var shapes []string
	torn, lost, reordered := false, false, false
	for desc, state := range d.States(7, 40) {
		s := shape(t, state)
		shapes = append(shapes, s)
		if desc == "" {
			t.Error("a state without a name")
		}
		if s[6:] != "99" || s[4] != '9' {
			t.Errorf("%s: %s changes what nobody wrote", desc, s)
		}
		second := bytes.ContainsAny([]byte(s), "23")
		if second && bytes.ContainsRune([]byte(s[:4]), '9') {
			t.Errorf("%s: %s lacks what was synced before", desc, s)
		}
		torn = torn || bytes.ContainsRune([]byte(s[:4]), '1') && bytes.ContainsRune([]byte(s[:4]), '2')
		lost = lost || s == "11119999"
		reordered = reordered || s == "11119399"
	}
	if !torn || !lost || !reordered {
		t.Errorf("torn %v, lost %v, reordered %v; states %v", torn, lost, reordered, shapes)
	}
	for _, want := range []string{"99999999", "11119999", "22229999", "22229399"} {
		if !slices.Contains(shapes, want) {
			t.Errorf("state %s was not visited: %v", want, shapes)
		}
	}
	if got := shape(t, d.Now()); got != "22229399" || shapes[len(shapes)-1] != got {
		t.Errorf("without a cut %s, the last state %s", got, shapes[len(shapes)-1])
	}
}

func TestSameSeedSameStates(t *testing.T) {
	list := func(seed uint64) (all []string) {
		for desc, state := range record(t).States(seed, 10) {
			all = append(all, desc+shape(t, state))
		}
		return all
	}
	if !slices.Equal(list(3), list(3)) {
		t.Error("one seed gave different states")
	}
	if slices.Equal(list(3), list(4)) {
		t.Error("two seeds gave the same states")
	}
}

// TestStatesAreIndependent changes a state; the others must not see it.
func TestStatesAreIndependent(t *testing.T) {
	d := record(t)
	for desc, state := range d.States(1, 5) {
		if s := shape(t, state); s[7] != '9' {
			t.Fatalf("%s: another state's change shows: %s", desc, s)
		}
		_, err := state.WriteAt(bytes.Repeat([]byte{7}, 512), 7*512)
		must(t, err)
	}
	n := 0
	for range d.States(1, 5) {
		if n++; n == 2 {
			break // stopping early must not panic
		}
	}
	if _, err := d.WriteAt([]byte{1}, 8*512); err == nil {
		t.Error("a write behind the end succeeded")
	}
}
