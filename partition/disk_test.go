package partition_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
)

const mib = 1 << 20

var epoch = time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)

// smallSpec is the smallest disk worth testing: FAT32 needs most of it.
func smallSpec() partition.Spec {
	return partition.Spec{
		SizeBytes: 160 * mib, ESPBytes: 64 * mib, SlotBytes: 4 * mib, Seed: "test appliance",
		Volumes: []partition.VolumeSpec{{Name: "state", SizeBytes: 32 * mib}, {Name: "data"}},
	}
}

func plan(t testing.TB, s partition.Spec) partition.Layout {
	t.Helper()
	l, err := partition.Plan(s)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// noise fills a disk the way a recycled one is filled.
func noise(sizeBytes int64) *partition.Memory {
	m := partition.NewMemory(sizeBytes)
	var seed [32]byte
	r := rand.NewChaCha8(seed)
	buf := make([]byte, mib)
	for off := int64(0); off < sizeBytes; off += mib {
		r.Read(buf)
		if _, err := m.WriteAt(buf[:min(mib, sizeBytes-off)], off); err != nil {
			panic(err)
		}
	}
	return m
}

func randomBytes(seed uint64, n int) partition.Bytes {
	var s [32]byte
	s[0], s[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	rand.NewChaCha8(s).Read(b)
	return b
}

// release is contents that differ in every blob but the loader.
func release(version int) partition.Contents {
	root := randomBytes(uint64(1000+version), 2*mib+12345)
	return partition.Contents{
		Root: root, UKI: randomBytes(uint64(2000+version), 700_001), Loader: randomBytes(1, 90_000),
		RootHash: fmt.Sprintf("%064x", version), Title: fmt.Sprintf("Acme Gate %d", version),
		Version: strconv.Itoa(version), ReleaseID: fmt.Sprintf("acme-%d", version),
		Verify: func(r io.ReaderAt) error {
			got := make([]byte, len(root))
			if _, err := r.ReadAt(got, 0); err != nil {
				return err
			}
			if !bytes.Equal(got, root) {
				return errors.New("the slot does not hold the root image")
			}
			return nil
		},
	}
}

// newDisk is Format and slot A with release 1, good.
func newDisk(t testing.TB, dev partition.Device) *partition.Disk {
	t.Helper()
	s := smallSpec()
	s.SizeBytes = dev.Size()
	d, err := partition.Format(dev, plan(t, s), partition.FormatOptions{Time: epoch, SecureBootEnroll: "force"})
	if err != nil {
		t.Fatal(err)
	}
	write(t, d, partition.SlotA, 1, partition.WriteOptions{Time: epoch})
	return d
}

func write(t testing.TB, d *partition.Disk, slot partition.Slot, version int, o partition.WriteOptions) {
	t.Helper()
	if err := d.WriteSlot(context.Background(), slot, release(version), o, nil); err != nil {
		t.Fatal(err)
	}
}

func entries(t testing.TB, d *partition.Disk) []partition.Entry {
	t.Helper()
	e, err := d.Entries()
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func openESP(d *partition.Disk) (*fat32.FS, error) {
	dev, p, err := d.Partition(partition.ESPName)
	if err != nil {
		return nil, err
	}
	return fat32.Open(dev, p.SizeBytes)
}

func readFile(esp *fat32.FS, path string) ([]byte, error) {
	f, err := esp.Open(path)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
}

func hashOf(t testing.TB, r io.ReaderAt, n int64) [32]byte {
	t.Helper()
	h := sha256.New()
	if c, err := io.Copy(h, io.NewSectionReader(r, 0, n)); err != nil || c != n {
		t.Fatalf("read %d of %d bytes: %v", c, n, err)
	}
	return [32]byte(h.Sum(nil))
}

func run(t testing.TB, pkg, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s not installed: apt-get install %s", name, pkg)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// export copies part of a device to a file for the reference tools.
func export(t testing.TB, r io.ReaderAt, n int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, io.NewSectionReader(r, 0, n)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func checkTools(t *testing.T, dev partition.Device) {
	t.Helper()
	image := export(t, dev, dev.Size())
	if out := run(t, "gdisk", "sgdisk", "-v", image); !strings.Contains(out, "No problems found.") || strings.Contains(out, "Warning") {
		t.Errorf("sgdisk -v:\n%s", out)
	}
	d, err := partition.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	esp, p, err := d.Partition(partition.ESPName)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "dosfstools", "fsck.vfat", "-n", "-v", export(t, esp, p.SizeBytes))
}

func TestAgainstReferenceTools(t *testing.T) {
	for name, dev := range map[string]*partition.Memory{"zeros": partition.NewMemory(160 * mib), "noise": noise(160 * mib)} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t, dev)
			write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3, Running: partition.SlotA, Time: epoch})
			write(t, d, partition.SlotB, 3, partition.WriteOptions{Tries: 3, Running: partition.SlotA, Time: epoch})
			checkTools(t, dev)
			checkSgdisk(t, dev, d.Layout())
			esp := export(t, dev, 65*mib)
			if out := run(t, "mtools", "mtype", "-i", esp+"@@1M", "::loader/loader.conf"); !strings.Contains(out, "timeout 0\neditor no\n") || !strings.Contains(out, "secure-boot-enroll force\n") {
				t.Errorf("mtools reads loader.conf as %q", out)
			}
			files := run(t, "mtools", "mdir", "-b", "-/", "-i", esp+"@@1M", "::")
			for _, want := range []string{"::/EFI/BOOT/BOOTX64.EFI", "::/EFI/systemd/systemd-bootx64.efi",
				"::/loader/entries/holdfast-a-000000000001.conf", "::/loader/entries/holdfast-b-000000000003+3.conf"} {
				if !strings.Contains(files, want+"\n") {
					t.Errorf("mtools does not find %s in\n%s", want, files)
				}
			}
			if n := strings.Count(files, ".efi"); n != 3 || strings.Contains(files, "random-seed") {
				t.Errorf("%d .efi files instead of loader and two UKIs, or a random seed:\n%s", n, files)
			}
		})
	}
}

// checkSgdisk compares what sgdisk parses with the layout.
func checkSgdisk(t *testing.T, dev partition.Device, l partition.Layout) {
	t.Helper()
	image := export(t, dev, dev.Size())
	out := run(t, "gdisk", "sgdisk", "-p", image)
	rows := regexp.MustCompile(`(?m)^ +(\d+) +(\d+) +(\d+) +[\d.]+ [KMG]iB +([0-9A-F]{4}) +(\S+)$`).FindAllStringSubmatch(out, -1)
	if len(rows) != len(l.Partitions) {
		t.Fatalf("sgdisk -p shows %d partitions instead of %d:\n%s", len(rows), len(l.Partitions), out)
	}
	if !strings.Contains(strings.ToLower(out), "(guid): "+l.DiskGUID) {
		t.Errorf("sgdisk does not show disk GUID %s:\n%s", l.DiskGUID, out)
	}
	codes := map[string]string{partition.TypeESP: "EF00", partition.TypeRootAMD64: "8304", partition.TypeLinuxData: "8300"}
	for i, p := range l.Partitions {
		want := []string{strconv.Itoa(i + 1), fmt.Sprint(p.StartBytes / 512), fmt.Sprint((p.StartBytes+p.SizeBytes)/512 - 1), codes[p.Type], p.Name}
		if !slices.Equal(rows[i][1:], want) {
			t.Errorf("sgdisk -p: %v, want %v", rows[i][1:], want)
		}
		info := strings.ToLower(run(t, "gdisk", "sgdisk", "-i", strconv.Itoa(i+1), image))
		for _, want := range []string{"guid code: " + p.Type, "unique guid: " + p.GUID, fmt.Sprintf("attribute flags: %016x", p.Attributes), "name: '" + p.Name + "'"} {
			if !strings.Contains(info, want) {
				t.Errorf("sgdisk -i %d lacks %q:\n%s", i+1, want, info)
			}
		}
	}
}

func TestPlan(t *testing.T) {
	l := plan(t, smallSpec())
	if got := l.Partitions[4]; got.Name != "data" || got.StartBytes != 105*mib || got.SizeBytes != 54*mib {
		t.Errorf("the last volume is %+v", got)
	}
	smallest := smallSpec()
	smallest.SizeBytes = 0
	if l := plan(t, smallest); l.SizeBytes != (1+64+8+32+32+1)*mib || l.Partitions[4].SizeBytes != 32*mib {
		t.Errorf("the smallest disk has %d bytes, its last volume %d", l.SizeBytes, l.Partitions[4].SizeBytes)
	}
	arm := smallSpec()
	arm.Arch = "arm64"
	if l := plan(t, arm); l.Partitions[1].Type != partition.TypeRootARM64 {
		t.Errorf("root type on arm64 is %s", l.Partitions[1].Type)
	}
	volumes := func(v ...partition.VolumeSpec) func(*partition.Spec) {
		return func(s *partition.Spec) { s.Volumes = v }
	}
	for name, c := range map[string]struct {
		change func(*partition.Spec)
		want   string
	}{
		"disk too small":      {func(s *partition.Spec) { s.SizeBytes = 100 * mib }, "the disk has 100 MiB, and esp of 64 MiB, root-a of 4 MiB, root-b of 4 MiB, state of 32 MiB, data of 32 MiB and 2 MiB for the partition tables need 138 MiB: use a larger disk"},
		"no whole sectors":    {func(s *partition.Spec) { s.SizeBytes++ }, "not a multiple of 512"},
		"ESP too small":       {func(s *partition.Spec) { s.ESPBytes = 32 * mib }, "three UKIs"},
		"no slot size":        {func(s *partition.Spec) { s.SlotBytes = 0 }, "use twice the root image"},
		"slot of 2^63-1":      {func(s *partition.Spec) { s.SlotBytes = 1<<63 - 1 }, "slot size"},
		"sum overflows":       {func(s *partition.Spec) { s.SlotBytes, s.ESPBytes = 1<<60, 1<<60 }, "need more than"},
		"no seed":             {func(s *partition.Spec) { s.Seed = "" }, "seed"},
		"unknown machine":     {func(s *partition.Spec) { s.Arch = "vax" }, "amd64 and arm64"},
		"volume named esp":    {volumes(partition.VolumeSpec{Name: "esp"}), "taken"},
		"volume twice":        {volumes(partition.VolumeSpec{Name: "x", SizeBytes: 32 * mib}, partition.VolumeSpec{Name: "x"}), "taken"},
		"path as name":        {volumes(partition.VolumeSpec{Name: "../x"}), "use 1 to 36"},
		"unsized first":       {volumes(partition.VolumeSpec{Name: "x"}, partition.VolumeSpec{Name: "y"}), "only the last volume"},
		"volume without room": {volumes(partition.VolumeSpec{Name: "x", SizeBytes: 1}), "volume x of 1 bytes"},
		"too many":            {volumes(make([]partition.VolumeSpec, 126)...), "a GPT holds 128"},
	} {
		s := smallSpec()
		c.change(&s)
		if _, err := partition.Plan(s); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	dev := noise(160 * mib)
	d := newDisk(t, dev)
	write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3, Running: partition.SlotA})
	again, err := partition.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	if again.Recovered() || fmt.Sprint(again.Layout()) != fmt.Sprint(d.Layout()) {
		t.Errorf("opened as %+v, written as %+v", again.Layout(), d.Layout())
	}
	got := entries(t, again)
	if len(got) != 2 {
		t.Fatalf("entries %+v", got)
	}
	b, a := got[0], got[1]
	if b.Slot != "b" || b.Sequence != 2 || !b.Counted || b.TriesLeft != 3 || b.Version != "2" || b.ReleaseID != "acme-2" ||
		b.Title != "Acme Gate 2" || b.RootHash != fmt.Sprintf("%064x", 2) || b.Damage != nil || b.Good() {
		t.Errorf("slot B: %+v", b)
	}
	if a.Slot != "a" || a.Sequence != 1 || !a.Good() || a.Version != "1" {
		t.Errorf("slot A: %+v", a)
	}
	for _, name := range []string{"state", "data"} {
		v, p, err := again.Partition(name)
		if err != nil {
			t.Fatal(err)
		}
		if fresh, err := partition.Unprovisioned(v); err != nil || !fresh {
			t.Errorf("volume %s: unprovisioned %v, %v", name, fresh, err)
		}
		for off := int64(16 << 10); off <= 4*mib; off *= 2 {
			if hashOf(t, io.NewSectionReader(v, off, 4096), 4096) != sha256.Sum256(make([]byte, 4096)) {
				t.Errorf("volume %s: a secondary LUKS2 header could remain at %d", name, off)
			}
		}
		if _, err := v.WriteAt([]byte{1}, p.SizeBytes); err == nil {
			t.Error("a write behind the partition succeeded")
		}
		if _, err := v.WriteAt([]byte("LUKS\xba\xbe"), 0); err != nil {
			t.Fatal(err)
		}
		if fresh, err := partition.Unprovisioned(v); err != nil || fresh {
			t.Errorf("volume %s with another start: unprovisioned %v, %v", name, fresh, err)
		}
	}
}

// TestReproducible: the same inputs give the same bytes, on a file as in memory.
func TestReproducible(t *testing.T) {
	build := func(dev partition.Device) [32]byte {
		d := newDisk(t, dev)
		write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3, Time: epoch})
		return hashOf(t, dev, dev.Size())
	}
	f, err := partition.CreateFile(filepath.Join(t.TempDir(), "disk"), 160*mib)
	if err != nil {
		t.Fatal(err)
	}
	first, second := build(partition.NewMemory(160*mib)), build(f)
	if first != second {
		t.Errorf("memory has SHA-256 %x, the file %x", first, second)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	bench, err := partition.OpenFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	d, err := partition.Open(bench)
	if err != nil {
		t.Fatal(err)
	}
	write(t, d, partition.SlotA, 3, partition.WriteOptions{Tries: 3})
	if e := entries(t, d); e[0].Slot != "a" || e[0].Sequence != 3 {
		t.Errorf("written on the bench: %+v", e)
	}
	if err := bench.Close(); err != nil {
		t.Fatal(err)
	}
	ro, err := partition.OpenReadOnly(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if _, err := ro.WriteAt([]byte{1}, 0); err == nil {
		t.Error("a write to a device opened for reading succeeded")
	}
}

// TestUpdateCycle lives through three updates as the agent does, one a downgrade.
func TestUpdateCycle(t *testing.T) {
	dev := noise(160 * mib)
	d := newDisk(t, dev)
	running := partition.SlotA
	for i, version := range []int{5, 4, 6} {
		next := running.Other()
		write(t, d, next, version, partition.WriteOptions{Tries: 3, Running: running})
		if got := loaderChoice(t, d); got.slot != next {
			t.Fatalf("update %d: the loader chooses slot %s", i, got.slot)
		}
		if err := d.WriteSlot(context.Background(), running, release(9), partition.WriteOptions{Running: next}, nil); err == nil || !strings.Contains(err.Error(), "bless slot") {
			t.Errorf("overwriting the only good slot from one on trial: %v", err)
		}
		if err := d.Bless(next); err != nil {
			t.Fatal(err)
		}
		running = next
		e := entries(t, d)
		if len(e) != 2 || e[0].Slot != running || !e[0].Good() || e[0].Sequence != int64(i+2) {
			t.Fatalf("update %d: entries %+v", i, e)
		}
	}
	if err := d.Arm(running, 2); err != nil {
		t.Fatal(err)
	}
	for i, want := range []partition.Slot{running, running, running.Other()} {
		if got := bootOnce(t, d); got != want {
			t.Fatalf("boot %d after arming: slot %s, want %s", i, got, want)
		}
	}
	if err := d.Bless(running); err != nil {
		t.Fatal(err)
	}
	if got := bootOnce(t, d); got != running {
		t.Errorf("blessed again, slot %s boots", got)
	}
	if err := d.GiveUp(running, 5); err != nil {
		t.Fatal(err)
	}
	if e := entries(t, d); !e[1].Bad() || e[1].TriesDone != 5 || bootOnce(t, d) != running.Other() {
		t.Errorf("given up: %+v", e)
	}
	checkTools(t, dev)
}

func TestRefusals(t *testing.T) {
	d := newDisk(t, partition.NewMemory(160*mib))
	sized := func(n int64) partition.Blob { return claim{n} }
	for name, c := range map[string]struct {
		slot   partition.Slot
		change func(*partition.Contents, *partition.WriteOptions)
		want   string
	}{
		"running slot":       {"a", func(_ *partition.Contents, o *partition.WriteOptions) { o.Running = "a" }, "the system runs from slot a; write slot b"},
		"no such slot":       {"c", nil, `"c" is not a slot`},
		"slot too small":     {"b", func(c *partition.Contents, _ *partition.WriteOptions) { c.Root = sized(5 * mib) }, "the root image has 5 MiB and root-b has 4 MiB"},
		"UKI over a third":   {"b", func(c *partition.Contents, _ *partition.WriteOptions) { c.UKI = sized(22 * mib) }, "the UKI has 22 MiB and the ESP of 64 MiB has to hold three"},
		"root of nothing":    {"b", func(c *partition.Contents, _ *partition.WriteOptions) { c.Root = sized(0) }, "no root image"},
		"no UKI":             {"b", func(c *partition.Contents, _ *partition.WriteOptions) { c.UKI = nil }, "no UKI"},
		"ten tries":          {"b", func(_ *partition.Contents, o *partition.WriteOptions) { o.Tries = 10 }, "use 0 to 9"},
		"line in the title":  {"b", func(c *partition.Contents, _ *partition.WriteOptions) { c.Title = "x\nefi /evil.efi" }, "one line"},
		"line in the id":     {"b", func(c *partition.Contents, _ *partition.WriteOptions) { c.ReleaseID = "x\rlinux /evil" }, "one line"},
		"root hash of words": {"b", func(c *partition.Contents, _ *partition.WriteOptions) { c.RootHash = "none" }, "64 hex digits"},
	} {
		contents, o := release(2), partition.WriteOptions{Tries: 3}
		if c.change != nil {
			c.change(&contents, &o)
		}
		if _, err := d.PlanSlot(c.slot, contents, o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
	if err := d.Bless("b"); err == nil || !strings.Contains(err.Error(), "no boot entry") {
		t.Errorf("bless of an empty slot: %v", err)
	}
	for _, tries := range []int{-1, 0, 10} {
		if err := d.Arm("a", tries); err == nil {
			t.Errorf("arm with %d tries succeeded", tries)
		}
		if err := d.GiveUp("a", tries); err == nil {
			t.Errorf("give up after %d boots succeeded", tries)
		}
	}
}

// claim is a blob that only has a size.
type claim struct{ n int64 }

func (c claim) Size() int64                  { return c.n }
func (c claim) SHA256() (h [32]byte)         { return h }
func (c claim) Open() (io.ReadCloser, error) { return nil, errors.New("nothing to open") }

// swapped promises one content and gives another.
type swapped struct{ partition.Bytes }

func (s swapped) Open() (io.ReadCloser, error) {
	b := slices.Clone(s.Bytes)
	b[len(b)/2] ^= 1
	return io.NopCloser(bytes.NewReader(b)), nil
}

type truncated struct{ partition.Bytes }

func (s truncated) Open() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s.Bytes[:len(s.Bytes)-1])), nil
}

type extended struct{ partition.Bytes }

func (s extended) Open() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(append(slices.Clone(s.Bytes), 0))), nil
}

// TestHostileContents: nothing but the promised bytes gets an entry, and slot A stays.
func TestHostileContents(t *testing.T) {
	for name, change := range map[string]func(*partition.Contents){
		"root swapped":     func(c *partition.Contents) { c.Root = swapped{c.Root.(partition.Bytes)} },
		"root truncated":   func(c *partition.Contents) { c.Root = truncated{c.Root.(partition.Bytes)} },
		"root extended":    func(c *partition.Contents) { c.Root = extended{c.Root.(partition.Bytes)} },
		"UKI swapped":      func(c *partition.Contents) { c.UKI = swapped{c.UKI.(partition.Bytes)} },
		"UKI truncated":    func(c *partition.Contents) { c.UKI = truncated{c.UKI.(partition.Bytes)} },
		"UKI extended":     func(c *partition.Contents) { c.UKI = extended{c.UKI.(partition.Bytes)} },
		"loader swapped":   func(c *partition.Contents) { c.Loader = swapped{randomBytes(77, 80_000)} },
		"verity says no":   func(c *partition.Contents) { c.Verify = func(io.ReaderAt) error { return errors.New("hash tree") } },
		"root cannot open": func(c *partition.Contents) { c.Root = claim{100} },
	} {
		t.Run(name, func(t *testing.T) {
			dev := partition.NewMemory(160 * mib)
			d := newDisk(t, dev)
			write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3})
			c := release(3)
			change(&c)
			if err := d.WriteSlot(context.Background(), partition.SlotB, c, partition.WriteOptions{Tries: 3, Running: partition.SlotA}, nil); err == nil {
				t.Fatal("written")
			}
			if err := intact(dev, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {}}); err != nil {
				t.Error(err)
			}
			write(t, d, partition.SlotB, 3, partition.WriteOptions{Tries: 3, Running: partition.SlotA})
			if err := intact(dev, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {3}}); err != nil {
				t.Errorf("after the retry: %v", err)
			}
			checkTools(t, dev)
		})
	}
}

func TestStopAndProgress(t *testing.T) {
	dev := partition.NewMemory(160 * mib)
	d := newDisk(t, dev)
	ctx, cancel := context.WithCancel(context.Background())
	var last, total int64
	err := d.WriteSlot(ctx, partition.SlotB, release(2), partition.WriteOptions{Tries: 3}, func(done, all int64) {
		if done <= last || done > all || total != 0 && all != total {
			t.Errorf("progress %d of %d after %d of %d", done, all, last, total)
		}
		if last, total = done, all; done > all/2 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("stopped with %v", err)
	}
	if err := intact(dev, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {}}); err != nil {
		t.Error(err)
	}
	last, total = 0, 0
	if err := d.WriteSlot(context.Background(), partition.SlotB, release(2), partition.WriteOptions{Tries: 3}, func(done, all int64) { last, total = done, all }); err != nil {
		t.Fatal(err)
	}
	// The loader was there already, so root and UKI are all.
	if want := int64(2 * (2*mib + 12345 + 700_001)); last != want || total != want {
		t.Errorf("ended at %d of %d, want %d", last, total, want)
	}
}

// TestFullESP: what is not ours stays, and the plan says so before anything is written.
func TestFullESP(t *testing.T) {
	dev := partition.NewMemory(160 * mib)
	d := newDisk(t, dev)
	write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3})
	esp, err := openESP(d)
	if err != nil {
		t.Fatal(err)
	}
	free := esp.FreeBytes() - 8192 // for the folder
	if err := esp.WriteFile("vendor/firmware.cap", free, io.LimitReader(zeros{}, free), epoch); err != nil {
		t.Fatal(err)
	}
	before := hashOf(t, dev, dev.Size())
	c := release(3)
	c.UKI = randomBytes(9, mib)
	if _, err := d.PlanSlot(partition.SlotB, c, partition.WriteOptions{Tries: 3}); err == nil || !strings.Contains(err.Error(), "free and 0.67 MiB (700001 bytes) in old UKIs") {
		t.Errorf("plan on a full ESP: %v", err)
	}
	if hashOf(t, dev, dev.Size()) != before {
		t.Error("planning changed the disk")
	}
	// The old UKI of the slot makes room for one that is not larger than the slack allows.
	c.UKI = randomBytes(9, 400_000)
	if err := d.WriteSlot(context.Background(), partition.SlotB, c, partition.WriteOptions{Tries: 3}, nil); err != nil {
		t.Errorf("an update into the room of the old UKI: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestSameReleaseAgain installs what is there: its UKI is kept, the entry is new.
func TestSameReleaseAgain(t *testing.T) {
	dev := partition.NewMemory(160 * mib)
	d := newDisk(t, dev)
	for range 2 {
		write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3, Running: partition.SlotA})
	}
	if e := entries(t, d); len(e) != 2 || e[0].Sequence != 3 {
		t.Errorf("entries %+v", e)
	}
	if err := intact(dev, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {2}}); err != nil {
		t.Error(err)
	}
}

// TestStrayFiles: entries of others, damaged ones and doubled ones (F72).
func TestStrayFiles(t *testing.T) {
	dev := partition.NewMemory(160 * mib)
	d := newDisk(t, dev)
	write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3})
	esp, err := openESP(d)
	if err != nil {
		t.Fatal(err)
	}
	put := func(path, text string) {
		t.Helper()
		if err := esp.WriteFile(path, int64(len(text)), strings.NewReader(text), epoch); err != nil {
			t.Fatal(err)
		}
	}
	uki := entries(t, d)[0].UKI
	put("loader/entries/rescue.conf", "title Rescue\nefi /EFI/holdfast/b-rescue.efi\n")
	put("EFI/holdfast/b-rescue.efi", "rescue")
	put("EFI/holdfast/b-orphan.efi", "left behind")
	put("EFI/holdfast/a-orphan.efi", "of the other slot")
	put("loader/entries/holdfast-b-000000000002.conf", "version 000000000002\nefi "+uki+"\n")
	put("loader/entries/holdfast-b-000000000009+1.conf", "garbage")
	got := entries(t, d)
	if len(got) != 4 || got[0].Sequence != 9 || got[0].Damage == nil || got[0].Good() {
		t.Fatalf("entries %+v", got)
	}
	write(t, d, partition.SlotB, 3, partition.WriteOptions{Tries: 3, Running: partition.SlotA})
	if got := entries(t, d); len(got) != 2 || got[0].Sequence != 10 || got[0].Slot != "b" {
		t.Errorf("entries after the update %+v", got)
	}
	if esp, err = openESP(d); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		"EFI/holdfast/b-rescue.efi": true, "EFI/holdfast/a-orphan.efi": true, "loader/entries/rescue.conf": true,
		"EFI/holdfast/b-orphan.efi": false, uki: false,
	} {
		if _, err := esp.Open(path); (err == nil) != want {
			t.Errorf("%s: there is %v, want %v", path, err == nil, want)
		}
	}
	put("loader/entries/holdfast-b-000000000010.conf", "version 000000000010\nefi "+entries(t, d)[0].UKI+"\n")
	if err := d.Bless(partition.SlotB); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, d); len(got) != 2 || !got[0].Good() {
		t.Errorf("both names of one entry, blessed: %+v", got)
	}
}

func TestOpenRefusesOthers(t *testing.T) {
	if _, err := partition.Open(noise(8 * mib)); err == nil || !strings.Contains(err.Error(), "not a disk made here") {
		t.Errorf("noise: %v", err)
	}
	if _, err := partition.Open(partition.NewMemory(4096)); err == nil {
		t.Error("4096 bytes opened")
	}
	dev := partition.NewMemory(160 * mib)
	newDisk(t, dev)
	dev.Resize(150 * mib)
	if _, err := partition.Open(dev); err == nil || !strings.Contains(err.Error(), "cut short") {
		t.Errorf("an image cut short: %v", err)
	}
	s := smallSpec()
	if _, err := partition.Format(partition.NewMemory(159*mib), plan(t, s), partition.FormatOptions{}); err == nil || !strings.Contains(err.Error(), "needs 160 MiB and the device has 159 MiB") {
		t.Errorf("format of too small a device: %v", err)
	}
}

func TestFileErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := partition.OpenFile(dir); err == nil || !strings.Contains(err.Error(), "neither a file nor a block device") {
		t.Errorf("a folder: %v", err)
	}
	if _, err := partition.OpenFile("/dev/null"); err == nil {
		t.Error("/dev/null was opened as a disk")
	}
	path := filepath.Join(dir, "x")
	f, err := partition.CreateFile(path, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := partition.CreateFile(path, 4096); !errors.Is(err, os.ErrExist) {
		t.Errorf("creating over a file: %v", err)
	}
	if _, err := f.WriteAt(make([]byte, 2), 4095); err == nil {
		t.Error("a write past the end made the image grow")
	}
	if err := f.Sync(); err != nil || f.Size() != 4096 {
		t.Errorf("sync %v, size %d", err, f.Size())
	}
}

// TestARM64AndExtraFiles: other names of the loader, and the builder's own files.
func TestARM64AndExtraFiles(t *testing.T) {
	s := smallSpec()
	s.Arch = "arm64"
	d, err := partition.Format(partition.NewMemory(s.SizeBytes), plan(t, s), partition.FormatOptions{
		Files: []partition.ESPFile{{Path: "loader/keys/acme/db.auth", Data: []byte("key")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	write(t, d, partition.SlotA, 1, partition.WriteOptions{})
	esp, err := openESP(d)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"loader/keys/acme/db.auth": "key", "EFI/BOOT/BOOTAA64.EFI": string(loaderOld), "EFI/systemd/systemd-bootaa64.efi": string(loaderOld),
		"loader/loader.conf": "timeout 0\neditor no\nauto-entries no\nauto-firmware no\nconsole-mode keep\nrandom-seed-mode off\n",
	} {
		if got, err := readFile(esp, path); err != nil || string(got) != want {
			t.Errorf("%s has %d bytes, want %d: %v", path, len(got), len(want), err)
		}
	}
	if got, err := readFile(esp, "loader/entries/holdfast-a-000000000001.conf"); err != nil || !strings.Contains(string(got), "architecture aa64\n") {
		t.Errorf("entry %q: %v", got, err)
	}
	if _, err := partition.Format(partition.NewMemory(s.SizeBytes), plan(t, s), partition.FormatOptions{SecureBootEnroll: "yes"}); err == nil {
		t.Error("secure-boot-enroll yes was accepted")
	}
	c := release(2)
	c.Loader = nil
	if _, err := d.PlanSlot(partition.SlotB, c, partition.WriteOptions{}); err != nil {
		t.Errorf("a release without loader on a disk with one: %v", err)
	}
}
