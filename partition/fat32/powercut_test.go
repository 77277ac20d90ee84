package fat32

import (
	"bytes"
	"errors"
	"fmt"
	iofs "io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// eachCut calls check with every state of the medium that a power cut during
// the log can leave, as far as they can be enumerated: after every write
// (torn in the middle, too, and after every sector where there are few), and
// seeded random subsets of the sectors written since the last Sync.
func eachCut(start *disk, log []write, check func(state *disk, what string)) {
	rng := rand.New(rand.NewPCG(1, 2))
	durable := start.fork()
	var pending []write // sectors since the last Sync
	subsets := func(at int) {
		for k := range 10 {
			state := durable.fork()
			keep := 1 + rng.IntN(3)
			for _, w := range pending {
				if rng.IntN(4) < keep {
					state.apply(w)
				}
			}
			check(state, fmt.Sprintf("before operation %d, subset %d", at, k))
		}
	}
	check(durable.fork(), "before anything")
	for at, w := range log {
		if w.p == nil {
			subsets(at)
			for _, p := range pending {
				durable.apply(p)
			}
			pending = nil
			continue
		}
		sectors := w.sectors()
		for i, s := range sectors {
			pending = append(pending, s)
			if len(sectors) > 8 && i+1 != len(sectors)/2 && i+1 != len(sectors) {
				continue
			}
			state := durable.fork()
			for _, p := range pending {
				state.apply(p)
			}
			check(state, fmt.Sprintf("in operation %d after sector %d", at, i))
		}
	}
	if len(pending) > 0 {
		panic("the log ends without a Sync")
	}
}

// cutCase is a change of the volume and what may be seen of it.
type cutCase struct {
	name  string
	setup func(t *testing.T, fs *FS)
	do    func(fs *FS) error
	// both allows the moment of a rename across sectors in which two names exist; Reclaim ends it.
	both bool
	// old and new are file contents by path; a path in one only must be absent in the other.
	old, new map[string][]byte
}

func (c cutCase) verify(fs *FS, reclaimed bool) error {
	if c.matches(fs, c.old) || c.matches(fs, c.new) {
		return nil
	}
	all := maps.Clone(c.new)
	maps.Copy(all, c.old)
	if c.both && !reclaimed && c.matches(fs, all) {
		return nil
	}
	return errors.New("neither the old state nor the new one")
}

// matches says whether every path of the case is as state has it.
func (c cutCase) matches(fs *FS, state map[string][]byte) bool {
	for _, paths := range []map[string][]byte{c.old, c.new} {
		for path := range paths {
			if !sameFile(fs, path, state) {
				return false
			}
		}
	}
	return true
}

// sameFile says whether the file at path is as state has it, or missing as there.
func sameFile(fs *FS, path string, state map[string][]byte) bool {
	content, exists := state[path]
	got, err := readFile(fs, path)
	if !exists {
		return errors.Is(err, iofs.ErrNotExist)
	}
	return err == nil && bytes.Equal(got, content)
}

func cutCases() []cutCase {
	big, other := randomBytes(150_000, 30), randomBytes(90_001, 31)
	file := func(path string, content []byte) map[string][]byte { return map[string][]byte{path: content} }
	write := func(path string, content []byte) func(fs *FS) error {
		return func(fs *FS) error {
			return fs.WriteFile(path, int64(len(content)), bytes.NewReader(content), testTime)
		}
	}
	setup := func(files map[string][]byte) func(t *testing.T, fs *FS) {
		return func(t *testing.T, fs *FS) {
			for path, content := range files {
				put(t, fs, path, content)
			}
		}
	}
	// fill puts short names into dir so that its next free slot is the n-th (the first two are dots).
	fill := func(dir string, n int) func(t *testing.T, fs *FS) {
		return func(t *testing.T, fs *FS) {
			if err := fs.MkdirAll(dir, testTime); err != nil {
				t.Fatal(err)
			}
			for i := 2; i < n; i++ {
				put(t, fs, fmt.Sprintf("%s/F%d", dir, i), []byte("filler"))
			}
		}
	}
	then := func(steps ...func(t *testing.T, fs *FS)) func(t *testing.T, fs *FS) {
		return func(t *testing.T, fs *FS) {
			for _, step := range steps {
				step(t, fs)
			}
		}
	}
	long := "dir/" + strings.Repeat("a long name ", 15) + "x"
	return []cutCase{
		{name: "new", do: write("EFI/Linux/new_1.0+3.efi", big), new: file("EFI/Linux/new_1.0+3.efi", big)},
		{name: "new in new folders", do: write("one folder/two folder/f", big), new: file("one folder/two folder/f", big)},
		{name: "new empty", do: write("loader/entries/e", nil), new: file("loader/entries/e", nil)},
		{name: "new across the end mark", setup: fill("dir", 12), do: write(long, other), new: file(long, other)},
		{name: "new up to the sector's end", setup: fill("dir", 13), do: write("dir/lower case 15+", other),
			new: file("dir/lower case 15+", other)},
		{name: "new in a longer folder", setup: fill("dir", 30), do: write(long, other), new: file(long, other)},
		{name: "new in a full folder", setup: fill("dir", 32), do: write(long, other), new: file(long, other)},
		{name: "replace", setup: setup(file("EFI/Linux/uki.efi", big)), do: write("EFI/Linux/uki.efi", other),
			old: file("EFI/Linux/uki.efi", big), new: file("EFI/Linux/uki.efi", other)},
		{name: "replace by empty", setup: setup(file("uki.efi", big)), do: write("uki.efi", nil),
			old: file("uki.efi", big), new: file("uki.efi", nil)},
		{name: "remove", setup: setup(file("EFI/Linux/uki.efi", big)),
			do:  func(fs *FS) error { return fs.Remove("EFI/Linux/uki.efi") },
			old: file("EFI/Linux/uki.efi", big)},
		{name: "bless", setup: setup(file("loader/entries/s+3.conf", other)),
			do:  func(fs *FS) error { return fs.Rename("loader/entries/s+3.conf", "loader/entries/s.conf") },
			old: file("loader/entries/s+3.conf", other), new: file("loader/entries/s.conf", other)},
		{name: "rename that outgrows its sector", both: true,
			setup: then(setup(file("dir/S", other)), fill("dir", 15)),
			do:    func(fs *FS) error { return fs.Rename("dir/S", long) },
			old:   file("dir/S", other), new: file(long, other)},
		{name: "rename that outgrows its folder", both: true,
			setup: then(fill("dir", 30), setup(file("dir/S", other)), fill("dir", 31)),
			do:    func(fs *FS) error { return fs.Rename("dir/S", long) },
			old:   file("dir/S", other), new: file(long, other)},
		{name: "write to a cut volume", setup: func(t *testing.T, fs *FS) {
			if err := fs.begin(); err != nil {
				t.Fatal(err)
			}
			if err := fs.link([]uint32{900, 901, 902}); err != nil { // clusters without a file
				t.Fatal(err)
			}
			fs.setNext(20000, 20001) // and in the first FAT only
			if err := fs.writeFAT(0); err != nil {
				t.Fatal(err)
			}
			if err := fs.sync(); err != nil {
				t.Fatal(err)
			}
		}, do: write("uki.efi", big), new: file("uki.efi", big)},
	}
}

// TestPowerCut cuts every kind of change at every point.
func TestPowerCut(t *testing.T) {
	base, fs := format2(t, 40)
	bystanders := map[string][]byte{}
	for i := range 12 {
		path := fmt.Sprintf("%s/by stander %d.txt", []string{"EFI/Linux", "loader/entries", "."}[i%3], i)
		bystanders[path] = randomBytes(int64(i*997), byte(50+i))
		put(t, fs, path, bystanders[path])
	}
	for i := range 24 { // leave holes, so that chains cross FAT sectors and clusters
		put(t, fs, fmt.Sprintf("holes/%d", i), randomBytes(1500, 49))
	}
	for i := 0; i < 24; i += 2 {
		if err := fs.Remove(fmt.Sprintf("holes/%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	im := newImage(t, base)
	for _, c := range cutCases() {
		t.Run(c.name, func(t *testing.T) {
			start := base.fork()
			fs := reopen(t, start)
			if c.setup != nil {
				c.setup(t, fs)
			}
			before := start.fork()
			start.log = nil
			if err := c.do(reopen(t, start)); err != nil {
				t.Fatal(err)
			}
			states := 0
			eachCut(before, start.log, func(state *disk, what string) {
				states++
				checkCut(t, c, state, bystanders, what)
				im.update(t, state)
				fsck(t, im.path)
			})
			if !c.matches(reopen(t, start), c.new) {
				t.Error("the change is not there at its end")
			}
			t.Logf("%d states", states)
		})
	}
}

// checkCut opens the state as it is, then reclaims it and looks again.
func checkCut(t *testing.T, c cutCase, state *disk, bystanders map[string][]byte, what string) {
	t.Helper()
	fs := reopen(t, state)
	free := fs.FreeBytes()
	for _, reclaimed := range []bool{false, true} {
		if err := c.verify(fs, reclaimed); err != nil {
			t.Fatalf("%s, reclaimed %v: %v", what, reclaimed, err)
		}
		for path, content := range bystanders {
			if !sameFile(fs, path, bystanders) {
				t.Fatalf("%s, reclaimed %v: %s (%d bytes) has changed", what, reclaimed, path, len(content))
			}
		}
		if reclaimed {
			break
		}
		if _, err := fs.Reclaim(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		fs = reopen(t, state)
		if again, err := fs.Reclaim(); err != nil || again != (Repairs{}) {
			t.Fatalf("%s: a second Reclaim found %+v, %v", what, again, err)
		}
		if fs.FreeBytes() != free {
			t.Fatalf("%s: %d bytes free, and %d announced before Reclaim", what, fs.FreeBytes(), free)
		}
	}
}

// TestPowerCutInReclaim cuts the repair of a cut.
func TestPowerCutInReclaim(t *testing.T) {
	base, fs := format2(t, 41)
	content := randomBytes(30_000, 42)
	put(t, fs, "dir/S", content)
	for i := range 14 {
		put(t, fs, fmt.Sprintf("dir/F%d", i), content)
	}
	c := cutCase{
		both: true,
		old:  map[string][]byte{"dir/S": content},
		new:  map[string][]byte{"dir/a name that does not fit": content},
	}
	lost, err := fs.pick(300)
	if err != nil {
		t.Fatal(err)
	}
	if err := fs.link(lost); err != nil {
		t.Fatal(err)
	}
	start := base.fork()
	base.log = nil
	if err := fs.Rename("dir/S", "dir/a name that does not fit"); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(base.log, func(w write) bool { return w.p == nil })
	for _, w := range base.log[:i] {
		start.apply(w)
	}
	wantNames(t, reopen(t, start), "dir", append(names(t, fs, "dir")[:14:14], "S", "a name that does not fit")...)

	before := start.fork()
	start.log = nil
	rep, err := reopen(t, start).Reclaim()
	if err != nil || rep.Renames != 1 || rep.LostClusters != 300 || rep.FreedBytes != 300*1024 {
		t.Fatalf("Reclaim: %+v, %v", rep, err)
	}
	im := newImage(t, start)
	eachCut(before, start.log, func(state *disk, what string) {
		checkCut(t, c, state, nil, what)
		im.update(t, state)
		fsck(t, im.path)
	})
}

// TestPowerCutInFormat: either nothing opens, or an empty volume does.
func TestPowerCutInFormat(t *testing.T) {
	d, fs := format2(t, 43)
	put(t, fs, "old", []byte("old"))
	before := d.fork()
	d.log = nil
	if err := Format(d, d.size, Options{}); err != nil {
		t.Fatal(err)
	}
	opened, refused := 0, 0
	eachCut(before, d.log, func(state *disk, what string) {
		fs, err := Open(state, state.size)
		if err != nil {
			refused++
			return
		}
		opened++
		if sameFile(fs, "old", map[string][]byte{"old": []byte("old")}) {
			return // the cut came before the first Sync
		}
		if list, err := fs.ReadDir("/"); err != nil || len(list) != 0 {
			t.Fatalf("%s: root holds %v, %v", what, list, err)
		}
	})
	if opened == 0 || refused == 0 {
		t.Errorf("%d states opened and %d were refused; want some of each", opened, refused)
	}
}

// TestCutsDoNotFill: an ESP that loses power in every update stays as free as it was.
func TestCutsDoNotFill(t *testing.T) {
	d, fs := format2(t, 44)
	free := fs.FreeBytes()
	content := randomBytes(20<<20, 45)
	for i := range 8 {
		before := d.fork()
		d.log = nil
		put(t, fs, fmt.Sprintf("EFI/uki-%d.efi", i), content)
		// All but the last folder write arrive.
		state := before
		for _, w := range d.log[:len(d.log)-2] {
			if w.p != nil {
				state.apply(w)
			}
		}
		d, fs = state, reopen(t, state)
		if err := fs.MkdirAll("EFI", testTime); err != nil {
			t.Fatal(err)
		}
	}
	if got := fs.FreeBytes(); got != free-fs.geo.clusterBytes() {
		t.Errorf("%d bytes free after 8 cuts, %d in the beginning", got, free)
	}
}
