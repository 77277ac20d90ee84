package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

// TestStickOfAllKinds: only plain files, folders and names that are meant count, in
// the order of their names.
func TestStickOfAllKinds(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	for _, name := range []string{"b.bundle", "a.BUNDLE", "c.Bundle", ".hidden.bundle", "bundle", "x.bundle.txt", "y.bundle~"} {
		putFile(t, filepath.Join(dir, name), nil)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(dir, "folder.bundle"), 0o700))
	must(unix.Mkfifo(filepath.Join(dir, "fifo.bundle"), 0o600))
	must(os.Symlink("b.bundle", filepath.Join(dir, "link.bundle")))
	must(os.Symlink("/dev/zero", filepath.Join(dir, "zero.bundle")))
	must(os.MkdirAll(filepath.Join(elsewhere, "metadata"), 0o700))
	putFile(t, filepath.Join(elsewhere, update.TimestampPath), nil)
	must(os.Symlink(elsewhere, filepath.Join(dir, RepositoryFolder)))
	names := func() (list []string) {
		t.Helper()
		paths, err := findReleases(dir)
		must(err)
		for _, p := range paths {
			rel, err := filepath.Rel(dir, p)
			must(err)
			list = append(list, rel)
		}
		return list
	}
	want := []string{"a.BUNDLE", "b.bundle", "c.Bundle"}
	if got := names(); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	must(os.Remove(filepath.Join(dir, RepositoryFolder)))
	must(os.MkdirAll(filepath.Join(dir, RepositoryFolder, "metadata"), 0o700))
	putFile(t, filepath.Join(dir, RepositoryFolder, update.TimestampPath), nil)
	must(os.Mkdir(filepath.Join(dir, "metadata"), 0o700))
	must(os.Symlink(filepath.Join(elsewhere, update.TimestampPath), filepath.Join(dir, update.TimestampPath)))
	want = append(want, RepositoryFolder)
	if got := names(); !slices.Equal(got, want) {
		t.Errorf("with a repository and a link to one: %q, want %q", got, want)
	}
	must(os.Remove(filepath.Join(dir, update.TimestampPath)))
	putFile(t, filepath.Join(dir, update.TimestampPath), nil)
	if got := names(); !slices.Equal(got, append(want, ".")) {
		t.Errorf("with a repository in the top folder: %q", got)
	}
	var u Updater
	done := make(chan error, 1)
	go func() {
		_, _, err := u.openSource(filepath.Join(dir, "fifo.bundle"))
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "give a bundle") {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("opening a FIFO hangs")
	}
}

// TestStickWithManyFiles: a bundle among tens of thousands of pictures is found, and
// of tens of thousands of bundles, as many as the cap.
func TestStickWithManyFiles(t *testing.T) {
	dir := onTmpfs(t, "size=64m,nr_inodes=150k")
	make := func(names string, n int) {
		t.Helper()
		for i := range n {
			if err := unix.Mknod(filepath.Join(dir, fmt.Sprintf(names, i)), unix.S_IFREG|0o600, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	began := time.Now()
	make("%06d.jpg", maxMediaNames/4)
	make("release-%d.bundle", 1)
	make("IMG%06d.jpg", maxMediaNames/4)
	if list, err := findReleases(dir); err != nil || len(list) != 1 || filepath.Base(list[0]) != "release-0.bundle" {
		t.Errorf("among pictures: %q, %v", list, err)
	}
	make("%06d.bundle", maxMediaNames/2)
	list, err := findReleases(dir)
	if err != nil || len(list) != maxMediaBundles || !slices.IsSorted(list) {
		t.Errorf("%d found, %v", len(list), err)
	}
	if d := time.Since(began); d > 20*time.Second {
		t.Errorf("it took %v", d)
	}
}

// TestStickWithOddNames: what is shown of a file's name does nothing to a terminal,
// and a name that is too long or no text is noted once.
func TestStickWithOddNames(t *testing.T) {
	a := newAppliance(newVendor(t, "1.0.0"), "1.0.0")
	dir := t.TempDir()
	for _, name := range []string{"\x1b[2J\x1b]0;owned\a", "line\nFAILED    release 9.9.9", "\xff\xfe", "-rf", " ", "\u202ecilbup", strings.Repeat("x", 240)} {
		putFile(t, filepath.Join(dir, name+BundleSuffix), make([]byte, 600))
	}
	var memory string
	for range 3 {
		if version, found, err := a.u.applyFromFolder(t.Context(), dir); version != "" || !found || !errors.Is(err, update.ErrUntrusted) {
			t.Fatalf("%q, found %v: %v", version, found, err)
		}
		if now := a.memory(); memory != "" && now != memory {
			t.Errorf("looked at again: %s, before: %s", now, memory)
		}
		memory = a.memory()
	}
	a.u.set(func(r *UpdateStatus) { r.LastError = "read medium:\x1b[31m\n.bundle" + strings.Repeat("x", 1<<20) })
	s := a.u.Status()
	var b strings.Builder
	if _, err := s.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "FAILED") || len(line) > 2*maxTextBytes {
			t.Errorf("%.200q", line)
		}
		if i := strings.IndexFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("byte %d of %q", i, line)
		}
	}
}

// onTmpfs mounts a small file system for the test.
func onTmpfs(t *testing.T, options string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatalf("mount a tmpfs: %v; the test needs root", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestStickWithDamagedBundle: the first is damaged, one is of a stranger, the last is
// good. Left in, it does nothing any more.
func TestStickWithDamagedBundle(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	good, dir := v.bundle(repo.BundleOptions{}), t.TempDir()
	damaged := slices.Clone(good)
	damaged[bytes.Index(damaged, v.releases["1.1.0"].uki[100_000:100_100])] ^= 1
	putFile(t, filepath.Join(dir, "0-empty.bundle"), nil)
	putFile(t, filepath.Join(dir, "1-damaged.bundle"), damaged)
	putFile(t, filepath.Join(dir, "2-stranger.bundle"), newVendor(t, "9.0.0").bundle(repo.BundleOptions{}))
	putFile(t, filepath.Join(dir, "3-good.bundle"), good)
	putFile(t, filepath.Join(dir, "4-good.bundle"), good)
	version, found, err := a.u.applyFromFolder(t.Context(), dir)
	if version != "1.1.0" || !found || err != nil {
		t.Fatalf("%q, found %v: %v\n%s", version, found, err, a.log.String())
	}
	a.wantEntries("b 1.1.0 3", "a 1.0.0")
	a.wantMemory("pending 1.1.0 in b;refused 1.0.0>1.1.0;refused 1.0.0>;applied 1.0.0>1.1.0;")
	if e := a.u.Status().Journal[2]; e.Source != "medium:3-good.bundle" {
		t.Errorf("%+v", e)
	}
	a.mustBoot(partition.SlotB, "1.1.0")
	a.bless()
	memory := a.memory()
	a.unwritten(func() {
		a.mustBoot(partition.SlotB, "1.1.0")
		if err := os.Remove(filepath.Join(dir, "2-stranger.bundle")); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		version, found, err := a.u.applyFromFolder(t.Context(), dir)
		if version != "" || !found || err == nil || !errors.Is(err, update.ErrUntrusted) {
			t.Errorf("left in: %q, found %v: %v", version, found, err)
		}
	})
	a.wantMemory(memory)
}

// TestStickDuringCheck: it waits for its turn, as it is looked at once only.
func TestStickDuringCheck(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "gate.bundle"), v.bundle(repo.BundleOptions{}))
	inside, leave := make(chan struct{}), make(chan struct{})
	done := make(chan error)
	go func() {
		_, err := a.u.Check(t.Context(), &blockingSource{Dir: v.source().(*update.Dir), inside: inside, leave: leave}, "")
		done <- err
	}()
	<-inside
	time.AfterFunc(300*time.Millisecond, func() { close(leave) })
	if version, _, err := a.u.applyFromFolder(t.Context(), dir); version != "1.1.0" || err != nil {
		t.Errorf("%q: %v", version, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	a.wantEntries("b 1.1.0 3", "a 1.0.0")
}

// TestDataVolumeFull: what the updater keeps in reserve is enough to install the
// release that fixes it, and to note that.
func TestDataVolumeFull(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := &appliance{vendor: v, dev: v.newDisk("1.0.0"), dir: onTmpfs(t, "size=700k"), now: today}
	a.mustBoot(partition.SlotA, "1.0.0")
	fill := func() {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(a.dir, "..filler"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for block := make([]byte, 4096); err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	fill()
	if err := update.WriteFile(filepath.Join(a.dir, "probe"), make([]byte, 100), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the volume is not full: %v", err)
	}
	a.mustApply(v.source(), "", "1.1.0")
	a.wantEntries("b 1.1.0 3", "a 1.0.0")
	a.wantMemory("pending 1.1.0 in b;applied 1.0.0>1.1.0;")
	fill()
	a.mustBoot(partition.SlotB, "1.1.0")
	fill()
	a.bless()
	a.wantEntries("b 1.1.0", "a 1.0.0")
	a.wantMemory("applied 1.0.0>1.1.0;committed >1.1.0;")

	// Without a reserve, as on a volume that was full before the first boot, and with no room at all.
	if err := os.Remove(a.u.reservePath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	fill()
	v.publish("1.2.0", releaseOptions{})
	a.unwritten(func() {
		if _, err := a.u.Apply(t.Context(), v.source(), "test", ""); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("without a byte of room: %v", err)
		}
	})
	if err := os.Remove(filepath.Join(a.dir, "..filler")); err != nil {
		t.Fatal(err)
	}
	a.update("1.2.0")
	a.wantEntries("a 1.2.0", "b 1.1.0")
}

// TestWindow: half-open, over midnight, and none.
func TestWindow(t *testing.T) {
	for _, tt := range []struct {
		minute, start, end int
		want               bool
	}{
		{0, 0, 0, true}, {1439, 300, 300, true},
		{119, 120, 240, false}, {120, 120, 240, true}, {239, 120, 240, true}, {240, 120, 240, false},
		{1320, 1320, 60, true}, {1439, 1320, 60, true}, {0, 1320, 60, true}, {59, 1320, 60, true}, {60, 1320, 60, false}, {1319, 1320, 60, false},
		{1439, 1439, 0, true}, {0, 1439, 0, false}, {0, 0, 1, true}, {1, 0, 1, false},
	} {
		if got := inWindow(tt.minute, tt.start, tt.end); got != tt.want {
			t.Errorf("minute %d in %d to %d: %v", tt.minute, tt.start, tt.end, got)
		}
	}
}

// TestFileSystemOf: a medium is mounted as what it says it is, or not at all.
func TestFileSystemOf(t *testing.T) {
	at := func(pairs ...any) []byte {
		b := make([]byte, 4096)
		for i := 0; i < len(pairs); i += 2 {
			copy(b[pairs[i].(int):], pairs[i+1].(string))
		}
		return b
	}
	for want, b := range map[string][]byte{
		"exfat": at(3, "EXFAT   ", 510, "\x55\xaa"), "ext4": at(1080, "\x53\xef"), "vfat": at(82, "FAT32   ", 510, "\x55\xaa"),
		"": at(3, "NTFS    ", 510, "\x55\xaa"),
	} {
		if got, err := fileSystemOf(memoryOf(t, b)); got != want || err != nil {
			t.Errorf("%q, want %q: %v", got, want, err)
		}
	}
	if got, err := fileSystemOf(memoryOf(t, at(54, "FAT16   ", 510, "\x55\xaa"))); got != "vfat" || err != nil {
		t.Errorf("FAT16: %q, %v", got, err)
	}
	if got, err := fileSystemOf(memoryOf(t, at(54, "FAT16   "))); got != "" || err != nil {
		t.Errorf("FAT without a signature: %q, %v", got, err)
	}
	if got, err := fileSystemOf(partition.NewMemory(512)); got != "" || err != nil {
		t.Errorf("a medium of 512 bytes: %q, %v", got, err)
	}
}

func memoryOf(t *testing.T, b []byte) *partition.Memory {
	t.Helper()
	m := partition.NewMemory(int64(len(b)))
	put(t, m, b, 0)
	return m
}
