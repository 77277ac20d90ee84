package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/erofs"
	imagetree "github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
	"github.com/holdfast-os/holdfast/update"
	deltamake "github.com/holdfast-os/holdfast/update/delta/make"
	"github.com/holdfast-os/holdfast/update/repo"
)

// today is when the repositories of these tests are published.
var today = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// made is a release, whole.
type made struct {
	image.Manifest
	root, uki, loader []byte
	folder            string
}

// noise is content that does not compress.
func noise(seed string, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte(seed))).Read(b)
	return b
}

// releaseOptions say how a release differs from the usual one.
type releaseOptions struct {
	product, arch string
	epoch         int64
	ownBytes      int // of the root; the rest is that of all releases
	ukiBytes      int
	expected      image.Expected
	encrypted     bool
}

// makeRelease makes a small root, that is one, and a UKI and a loader that are none.
func makeRelease(t *testing.T, version string, o releaseOptions) made {
	t.Helper()
	if o.product == "" {
		o.product = "gate"
	}
	if o.arch == "" {
		o.arch = runtime.GOARCH
	}
	if o.ownBytes == 0 {
		o.ownBytes = 200_000
	}
	if o.ukiBytes == 0 {
		o.ukiBytes = 300_000
	}
	top := imagetree.NewDir(0o755)
	for name, b := range map[string][]byte{
		"/etc/version": []byte(version + o.product + o.arch), "/usr/shared": noise("all releases", 1<<20), "/usr/own": noise(version+o.product, o.ownBytes),
	} {
		if err := top.Put(name, &imagetree.Node{Mode: imagetree.TypeRegular | 0o644, Content: imagetree.Bytes(b)}); err != nil {
			t.Fatal(err)
		}
	}
	var root bytes.Buffer
	w, err := verity.NewWriter(verity.Options{Salt: []byte("one salt for all")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := erofs.Write(&root, top, erofs.Options{Label: "gate", BuildTimeSec: today.Unix()}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(root.Bytes()); err != nil {
		t.Fatal(err)
	}
	r := made{folder: t.TempDir(), uki: noise("UKI "+version, o.ukiBytes), loader: noise("loader "+version[:1], 60_000)}
	r.Manifest = image.Manifest{Format: 1, Name: o.product, Version: version, Architecture: o.arch, BuildTimeSec: today.Unix(), Epoch: o.epoch, Expected: o.expected}
	r.Disk.EncryptSlots = o.encrypted
	if r.Verity, err = w.Finish(&root); err != nil {
		t.Fatal(err)
	}
	r.root = root.Bytes()
	for name, part := range map[string]struct {
		content []byte
		into    *image.File
	}{image.RootName: {r.root, &r.Root}, image.UKIName: {r.uki, &r.UKI}, image.LoaderName: {r.loader, &r.Loader}} {
		sum := sha256.Sum256(part.content)
		*part.into = image.File{Name: name, SizeBytes: int64(len(part.content)), SHA256: hex.EncodeToString(sum[:])}
		putFile(t, filepath.Join(r.folder, name), part.content)
	}
	text, err := json.Marshal(r.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	putFile(t, filepath.Join(r.folder, image.ManifestName), text)
	return r
}

func putFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// fastPacker packs as the command does, only faster.
type fastPacker struct{}

func (fastPacker) Pack(ctx context.Context, r repo.RootImage, w io.Writer) error {
	return deltamake.Pack(ctx, r.Content, r.Verity, w, zstd.SpeedFastest)
}
func (fastPacker) Pieces(ctx context.Context, r repo.RootImage, w io.Writer) error {
	return deltamake.Pieces(ctx, r.Content, r.Verity, w)
}
func (fastPacker) Tree(_ context.Context, r repo.RootImage, w io.Writer) error {
	return deltamake.Tree(r.Content, r.Verity, w)
}
func (fastPacker) Patch(ctx context.Context, from, to repo.RootImage, w io.Writer) error {
	return deltamake.Patch(ctx, from.Content, from.Verity, to.Content, to.Verity, w)
}
func (fastPacker) Unpack(context.Context, io.Reader, io.Reader, image.Verity, io.Writer) error {
	return errors.New("these tests keep whole releases")
}

// vendor publishes releases.
type vendor struct {
	t        *testing.T
	dir      string
	repo     *repo.Repo
	releases map[string]made
	slotKey  []byte // of the box, where its slots are encrypted
}

// newVendor has these versions in its repository.
func newVendor(t *testing.T, versions ...string) *vendor {
	t.Helper()
	v := &vendor{t: t, dir: filepath.Join(t.TempDir(), "repo"), releases: map[string]made{}}
	var err error
	if v.repo, err = repo.Create(v.dir, filepath.Join(t.TempDir(), "keys"), today, repo.Options{}); err != nil {
		t.Fatal(err)
	}
	for _, version := range versions {
		v.publish(version, releaseOptions{})
	}
	return v
}

func (v *vendor) publish(version string, o releaseOptions) made {
	v.t.Helper()
	r := makeRelease(v.t, version, o)
	if _, err := v.repo.Add(v.t.Context(), r.folder, repo.AddOptions{Channel: "stable", Epoch: o.epoch, Notes: "what is new in " + version}, fastPacker{}); err != nil {
		v.t.Fatal(err)
	}
	if r.Name == "gate" && r.Architecture == runtime.GOARCH {
		v.releases[version] = r
	}
	return r
}

func (v *vendor) source() update.Source {
	v.t.Helper()
	d, err := update.OpenDir(v.dir)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { d.Close() })
	return d
}

func (v *vendor) bundle(o repo.BundleOptions) []byte {
	v.t.Helper()
	var b bytes.Buffer
	if _, err := repo.Bundle(v.t.Context(), v.dir, &b, o); err != nil {
		v.t.Fatal(err)
	}
	return b.Bytes()
}

const (
	applianceBytes = 160 << 20
	slotBytes      = 4 << 20
)

// newDisk is a disk with the release in slot A, good. The slots were in use before.
func (v *vendor) newDisk(version string) *partition.Memory {
	v.t.Helper()
	dev := partition.NewMemory(applianceBytes)
	layout, err := partition.Plan(partition.Spec{
		Seed: "gate", Arch: runtime.GOARCH, SizeBytes: dev.Size(), ESPBytes: partition.MinESPBytes, SlotBytes: slotBytes,
		Volumes: []partition.VolumeSpec{{Name: "data"}},
	})
	if err != nil {
		v.t.Fatal(err)
	}
	d, err := partition.Format(dev, layout, partition.FormatOptions{Time: today})
	if err != nil {
		v.t.Fatal(err)
	}
	for _, name := range []string{partition.RootAName, partition.RootBName} {
		root, _, err := d.Partition(name)
		if err != nil {
			v.t.Fatal(err)
		}
		put(v.t, root, noise("the disk's last life", slotBytes), 0)
	}
	r := v.releases[version]
	err = d.WriteSlot(v.t.Context(), partition.SlotA, partition.Contents{
		Root: partition.Bytes(r.root), UKI: partition.Bytes(r.uki), Loader: partition.Bytes(r.loader),
		RootHash: r.Verity.RootHash, Version: version, Title: "gate " + version, ReleaseID: r.UKI.SHA256,
	}, partition.WriteOptions{Time: today}, nil)
	if err != nil {
		v.t.Fatal(err)
	}
	return dev
}

// appliance is a disk, a folder on the data volume, and what runs.
type appliance struct {
	*vendor
	dev partition.Device
	dir string
	now time.Time
	log bytes.Buffer
	on  partition.Entry // what was booted
	u   *Updater
}

// newAppliance was booted from slot A.
func newAppliance(v *vendor, version string) *appliance {
	v.t.Helper()
	a := &appliance{vendor: v, dev: v.newDisk(version), dir: filepath.Join(v.t.TempDir(), "update"), now: today}
	a.mustBoot(partition.SlotA, version)
	return a
}

func (a *appliance) disk() *partition.Disk {
	a.t.Helper()
	d, err := partition.Open(a.dev)
	if err != nil {
		a.t.Fatal(err)
	}
	return d
}

// load is what systemd-boot does: the first entry of its order, a try less.
func (a *appliance) load() error {
	d, err := partition.Open(a.dev)
	if err != nil {
		return err
	}
	entries, err := d.Entries()
	if err != nil {
		return err
	}
	for len(entries) > 0 && entries[0].Damage != nil {
		entries = entries[1:]
	}
	if len(entries) == 0 {
		return errors.New("nothing to boot")
	}
	a.on = entries[0]
	if a.on.TriesLeft == 0 {
		return nil
	}
	esp, err := a.esp()
	if err != nil {
		return err
	}
	a.on.TriesLeft, a.on.TriesDone = a.on.TriesLeft-1, a.on.TriesDone+1
	stem, _, _ := strings.Cut(a.on.FileName, "+")
	name := fmt.Sprintf("%s+%d-%d.conf", stem, a.on.TriesLeft, a.on.TriesDone)
	return esp.Rename("loader/entries/"+a.on.FileName, "loader/entries/"+name)
}

func (a *appliance) esp() (*fat32.FS, error) {
	d, err := partition.Open(a.dev)
	if err != nil {
		return nil, err
	}
	dev, p, err := d.Partition(partition.ESPName)
	if err != nil {
		return nil, err
	}
	return fat32.Open(dev, p.SizeBytes)
}

// boot starts what the loader chooses: a UKI of one of the vendor's releases, whole,
// whose root is as it should be. Then it settles.
func (a *appliance) boot() error {
	if err := a.load(); err != nil {
		return err
	}
	if err := a.encrypt(); err != nil {
		return err
	}
	r, err := a.whole(a.on)
	if err != nil {
		return err
	}
	return a.start(r)
}

// whole is the release of an entry.
func (a *appliance) whole(e partition.Entry) (made, error) {
	esp, err := a.esp()
	if err != nil {
		return made{}, err
	}
	f, err := esp.Open(e.UKI)
	if err != nil {
		return made{}, err
	}
	uki, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
	if err != nil {
		return made{}, err
	}
	for _, r := range a.releases {
		if !bytes.Equal(uki, r.uki) {
			continue
		}
		if e.RootHash != r.Verity.RootHash || e.Version != r.Version {
			return r, fmt.Errorf("entry %+v has the UKI of %s", e, r.Version)
		}
		root, _, err := a.disk().Partition(e.Slot.Partition())
		if err == nil {
			root, err = a.shown(root, r)
		}
		if err != nil {
			return r, err
		}
		return r, verity.Verify(root, r.Verity)
	}
	return made{}, fmt.Errorf("entry %+v: its UKI of %d bytes is of no release", e, len(uki))
}

// start is the agent of a release that was booted.
func (a *appliance) start(r made) error {
	a.u = &Updater{
		Log: slog.New(slog.NewTextHandler(&a.log, nil)), Config: image.Update{Channel: "stable"}, Trust: mustRoot(a.t, a.repo), BuildTime: today,
		Device: update.Device{
			Product: "gate", Channel: "stable", Arch: runtime.GOARCH, Version: r.Version, RootHash: r.Verity.RootHash, Epoch: r.Epoch, ID: "box 1",
		},
		Dir: a.dir, Slot: a.on.Slot, Root: r.Verity, Now: func() time.Time { return a.now },
		OpenDisk: func() (*partition.Disk, io.Closer, error) {
			d, err := partition.Open(a.dev)
			return d, io.NopCloser(nil), err
		},
	}
	a.u.SlotKey = func() ([]byte, error) { return bytes.Clone(a.slotKey), nil }
	return a.u.Settle()
}

func mustRoot(t *testing.T, r *repo.Repo) []byte {
	t.Helper()
	b, err := r.RootJSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (a *appliance) mustBoot(slot partition.Slot, version string) {
	a.t.Helper()
	if err := a.boot(); err != nil {
		a.t.Fatal(err)
	}
	if a.on.Slot != slot || a.on.Version != version {
		a.t.Fatalf("slot %s with %s boots, want %s with %s", a.on.Slot, a.on.Version, slot, version)
	}
}

// bless is what the judge does when the trial went well.
func (a *appliance) bless() {
	a.t.Helper()
	if err := a.disk().Bless(a.on.Slot); err != nil {
		a.t.Fatal(err)
	}
	a.u.Commit()
}

func (a *appliance) mustApply(src update.Source, want, version string) {
	a.t.Helper()
	if got, err := a.u.Apply(a.t.Context(), src, "test", want); err != nil || got != version {
		a.t.Fatalf("installed %q: %v", got, err)
	}
}

// update installs, boots and blesses.
func (a *appliance) update(version string) {
	a.t.Helper()
	slot := a.u.Slot.Other()
	a.mustApply(a.source(), version, version)
	a.mustBoot(slot, version)
	a.bless()
}

// memory is the state in short: what is pending, what failed, the journal.
func (a *appliance) memory() string {
	a.t.Helper()
	s, err := update.LoadState(a.dir, a.now)
	if err != nil {
		a.t.Fatal(err)
	}
	var b strings.Builder
	if p := s.Pending; p != nil {
		fmt.Fprintf(&b, "pending %s in %s;", p.Version, p.Slot)
	}
	for _, f := range s.Failed {
		fmt.Fprintf(&b, "failed %s: %s;", f.Version, f.Reason)
	}
	for _, e := range s.Journal {
		fmt.Fprintf(&b, "%s %s>%s;", e.Result, e.From, e.To)
	}
	return b.String()
}

func (a *appliance) wantMemory(want string) {
	a.t.Helper()
	if got := a.memory(); got != want {
		a.t.Errorf("remembered\n%s\nwant\n%s\nlog:\n%s", got, want, a.log.String())
	}
}

// wantEntries compares the boot entries, in the loader's order: "b 1.1.0 3" is on
// trial with 3 tries, "a 1.0.0" good. Every one that can boot has to be whole.
func (a *appliance) wantEntries(want ...string) {
	a.t.Helper()
	entries, err := a.disk().Entries()
	if err != nil {
		a.t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		s := fmt.Sprintf("%s %s", e.Slot, e.Version)
		if e.Counted {
			s += fmt.Sprintf(" %d", e.TriesLeft)
		}
		got = append(got, s)
		if _, err := a.whole(e); err != nil {
			a.t.Errorf("slot %s: %v", e.Slot, err)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		a.t.Errorf("boot entries %q, want %q", got, want)
	}
}

// unwritten wants that do does not write to the disk.
func (a *appliance) unwritten(do func()) {
	a.t.Helper()
	m := &meteredDevice{Device: a.dev}
	a.dev = m
	do()
	a.dev = m.Device
	if m.writes > 0 {
		a.t.Errorf("%d bytes were written to the disk", m.written)
	}
}

// meteredDevice counts writes and can stop taking them.
type meteredDevice struct {
	partition.Device
	written, writes int64
	failAfter       int64 // bytes; 0 is never
}

func (d *meteredDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.failAfter > 0 && d.written+int64(len(p)) > d.failAfter {
		return 0, errors.New("the medium takes no more")
	}
	n, err := d.Device.WriteAt(p, off)
	d.written += int64(n)
	d.writes++
	return n, err
}

// meteredReader counts what is read of a bundle, and breaks after so many bytes.
type meteredReader struct {
	r         io.ReaderAt
	read      atomic.Int64
	failAfter int64 // 0 is never
	err       error
}

func (m *meteredReader) ReadAt(p []byte, off int64) (int, error) {
	if m.failAfter > 0 && m.read.Load() > m.failAfter {
		return 0, m.err
	}
	n, err := m.r.ReadAt(p, off)
	m.read.Add(int64(n))
	return n, err
}

func openBundle(t *testing.T, b []byte) (*update.Bundle, *meteredReader) {
	t.Helper()
	m := &meteredReader{r: bytes.NewReader(b)}
	src, err := update.OpenBundle(m, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return src, m
}

// TestUpdateAndCommit is the usual way of things.
func TestUpdateAndCommit(t *testing.T) {
	a := newAppliance(newVendor(t, "1.0.0", "1.1.0"), "1.0.0")
	a.wantMemory("")
	c, err := a.u.Check(t.Context(), a.source(), "")
	if err != nil || c.Release.Manifest.Version != "1.1.0" {
		t.Fatal(c, err)
	}
	if s := a.u.Status(); s.Available != "1.1.0" || s.Notes != "what is new in 1.1.0" || s.LastCheck != a.now || s.Doing != "" {
		t.Errorf("%+v", s)
	}
	a.mustApply(a.source(), "", "1.1.0")
	a.wantEntries("b 1.1.0 3", "a 1.0.0")
	a.wantMemory("pending 1.1.0 in b;applied 1.0.0>1.1.0;")
	a.mustBoot(partition.SlotB, "1.1.0")
	a.wantMemory("pending 1.1.0 in b;applied 1.0.0>1.1.0;")
	a.bless()
	a.wantEntries("b 1.1.0", "a 1.0.0")
	a.wantMemory("applied 1.0.0>1.1.0;committed >1.1.0;")
	if _, err := a.u.Apply(t.Context(), a.source(), "test", ""); !errors.Is(err, ErrNoUpdate) || err.Error() != "nothing to install: version 1.1.0: it is running" {
		t.Errorf("once more: %v", err)
	}
	e := a.u.Status().Journal[0]
	pack, uki := int64(200_000), int64(300_000)
	if e.FetchedBytes < pack+uki || e.FetchedBytes > 1<<20 || e.Source != "test" {
		t.Errorf("%+v; the root has %d bytes, of which 1 MiB was there", e, len(a.releases["1.1.0"].root))
	}
}

// TestResumeAfterCut: what is in the slot is neither fetched nor written again.
func TestResumeAfterCut(t *testing.T) {
	v := newVendor(t, "1.0.0")
	v.publish("1.1.0", releaseOptions{ownBytes: 2 << 20})
	a := newAppliance(v, "1.0.0")
	src, _ := openBundle(t, v.bundle(repo.BundleOptions{}))
	whole := a.dev
	dev := &meteredDevice{Device: whole, failAfter: 2<<20 + 100<<10} // two of three pieces of the root
	a.dev = dev
	if _, err := a.u.Apply(t.Context(), src, "test", ""); err == nil || !strings.Contains(err.Error(), "takes no more") {
		t.Fatal(err)
	}
	a.wantEntries("a 1.0.0")
	a.wantMemory("")
	a.dev = whole
	a.mustBoot(partition.SlotA, "1.0.0")
	again, meter := openBundle(t, v.bundle(repo.BundleOptions{}))
	dev = &meteredDevice{Device: whole}
	a.dev = dev
	a.mustApply(again, "", "1.1.0")
	root, uki, loader := int64(len(v.releases["1.1.0"].root)), int64(300_000), int64(60_000)
	// The last piece of the root, UKI, two copies of a loader that is there already, entry and FAT.
	if limit := root - 2<<20 + uki + 200<<10; dev.written > limit || dev.written < root-2<<20+uki {
		t.Errorf("%d bytes written, at most %d were missing", dev.written, limit)
	}
	if limit := root - 2<<20 + uki + loader + 300<<10; meter.read.Load() > limit {
		t.Errorf("%d bytes fetched, at most %d were missing", meter.read.Load(), limit)
	}
	a.mustBoot(partition.SlotB, "1.1.0")
}

// TestThreeUpdatesWithoutRebootThenRollback: the last one counts, and a person can go back.
func TestThreeUpdatesWithoutRebootThenRollback(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.mustApply(v.source(), "", "1.1.0")
	for _, version := range []string{"1.2.0", "2.0.0"} {
		v.publish(version, releaseOptions{})
		a.mustApply(v.source(), "", version)
		a.wantEntries("b "+version+" 3", "a 1.0.0")
	}
	a.wantMemory("pending 2.0.0 in b;applied 1.0.0>1.1.0;applied 1.0.0>1.2.0;applied 1.0.0>2.0.0;")
	a.mustBoot(partition.SlotB, "2.0.0")
	a.bless()
	a.mustApply(v.source(), "1.1.0", "1.1.0")
	a.wantEntries("a 1.1.0 3", "b 2.0.0")
	a.mustBoot(partition.SlotA, "1.1.0")
	a.bless()
	a.wantEntries("a 1.1.0", "b 2.0.0")
	a.wantMemory("applied 1.0.0>1.1.0;applied 1.0.0>1.2.0;applied 1.0.0>2.0.0;committed >2.0.0;applied 2.0.0>1.1.0;committed >1.1.0;")
	v.publish("3.0.0", releaseOptions{epoch: 2})
	a.update("3.0.0")
	_, err := a.u.Apply(t.Context(), v.source(), "test", "2.0.0")
	if !errors.Is(err, ErrNoUpdate) || err.Error() != "nothing to install: version 2.0.0: its security epoch is lower" {
		t.Errorf("back over a security epoch: %v", err)
	}
	if _, err = a.u.Apply(t.Context(), v.source(), "test", "9.9.9"); !errors.Is(err, ErrNoUpdate) || err.Error() != "nothing to install: there is no version 9.9.9 in channel stable" {
		t.Errorf("what is not there: %v", err)
	}
	a.wantEntries("b 3.0.0", "a 1.1.0")
}

// TestAppliedAgainBeforeBoot: a medium that was left in, a second click. Nothing is
// written, and the box restarts into what waits.
func TestAppliedAgainBeforeBoot(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.mustApply(v.source(), "", "1.1.0")
	memory := a.memory()
	a.unwritten(func() { a.mustApply(v.source(), "", "1.1.0") })
	a.wantMemory(memory)
	// A UKI that went missing is a reason to write.
	esp, err := a.esp()
	if err != nil {
		t.Fatal(err)
	}
	entries, err := a.disk().Entries()
	if err != nil {
		t.Fatal(err)
	}
	if err := esp.Remove(entries[0].UKI); err != nil {
		t.Fatal(err)
	}
	a.mustApply(v.source(), "", "1.1.0")
	a.mustBoot(partition.SlotB, "1.1.0")
}

// TestPassedOver: a release that the box does not come to, because its firmware starts
// something else than the boot loader, is worth three restarts and no more (F59).
func TestPassedOver(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.u.Boot = "boot 0"
	a.mustApply(v.source(), "", "1.1.0")
	for i := range 2 * maxPassedOver {
		if err := a.start(v.releases["1.0.0"]); err != nil {
			t.Fatal(err)
		}
		a.u.Boot = fmt.Sprintf("boot %d", 1+i)
		for range 3 { // commands of this boot
			if err := a.u.Settle(); err != nil {
				t.Fatal(err)
			}
		}
		got, err := a.u.Apply(t.Context(), v.source(), "test", "")
		if restarts := i+1 < maxPassedOver; (err == nil) != restarts || got != "1.1.0" {
			t.Errorf("start %d: %q, %v", i, got, err)
		}
		if err != nil && !strings.Contains(err.Error(), "starts of the box did not come to it") {
			t.Error(err)
		}
	}
	a.mustBoot(partition.SlotB, "1.1.0") // somebody has put the firmware right
	a.bless()
	a.wantMemory("applied 1.0.0>1.1.0;committed >1.1.0;")
}

// TestUpdateDuringTrial: the other slot may be all that boots.
func TestUpdateDuringTrial(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.mustApply(v.source(), "", "1.1.0")
	a.mustBoot(partition.SlotB, "1.1.0")
	v.publish("1.2.0", releaseOptions{})
	a.unwritten(func() {
		if _, err := a.u.Apply(t.Context(), v.source(), "test", ""); !errors.Is(err, errUnfit) || !strings.Contains(err.Error(), "not known to be good") {
			t.Error(err)
		}
	})
	a.bless()
	a.wantMemory("applied 1.0.0>1.1.0;refused 1.1.0>1.2.0;committed >1.1.0;")
	a.mustApply(v.source(), "", "1.2.0")
	a.wantEntries("a 1.2.0 3", "b 1.1.0")
}

// TestOneAtATime: a check and a status while an installation goes on, and the judge's note.
func TestOneAtATime(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	inside, leave := make(chan struct{}), make(chan struct{})
	src := &blockingSource{Dir: v.source().(*update.Dir), inside: inside, leave: leave}
	done := make(chan error)
	go func() {
		_, err := a.u.Apply(t.Context(), src, "test", "")
		done <- err
	}()
	<-inside
	if _, err := a.u.Check(t.Context(), v.source(), ""); !errors.Is(err, ErrUpdating) {
		t.Error(err)
	}
	if _, err := a.u.Apply(t.Context(), v.source(), "test", ""); !errors.Is(err, ErrUpdating) {
		t.Error(err)
	}
	if s := a.u.Status(); s.Doing != "checking" {
		t.Errorf("%+v", s)
	}
	a.u.set(func(r *UpdateStatus) { r.TotalBytes = 0 })
	close(leave)
	for range 20 {
		a.u.Status()
		a.u.TrialFailed(errors.New("of another release, and not noted"))
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.wantMemory("pending 1.1.0 in b;applied 1.0.0>1.1.0;")
}

// blockingSource waits in its first Fetch.
type blockingSource struct {
	*update.Dir
	inside, leave chan struct{}
	begun         atomic.Bool
}

func (s *blockingSource) Fetch(ctx context.Context, path string, offset, length int64) (io.ReadCloser, int64, error) {
	if s.begun.CompareAndSwap(false, true) {
		close(s.inside)
		<-s.leave
	}
	return s.Dir.Fetch(ctx, path, offset, length)
}

// TestTwoProcesses: after a hand-off every command is a process. While one installs,
// another one's status does not take that for an installation that was cut off, and
// nothing else begins.
func TestTwoProcesses(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0", "1.2.0")
	a := newAppliance(v, "1.0.0")
	a.u.locks = a.dir
	process := func() *Updater {
		first := a.u
		defer func() { a.u = first }()
		if err := a.start(v.releases["1.0.0"]); err != nil {
			t.Fatal(err)
		}
		a.u.locks = a.dir
		return a.u
	}
	second := process() // before the first begins, so that what it does below is all it does
	inside, leave := make(chan struct{}), make(chan struct{})
	src := &blockingSource{Dir: v.source().(*update.Dir), inside: inside, leave: leave}
	done := make(chan error)
	go func() {
		_, err := a.u.Apply(t.Context(), src, "test", "1.1.0")
		done <- err
	}()
	<-inside
	pending := &update.Pending{Slot: "b", Version: "1.1.0", RootHash: v.releases["1.1.0"].Verity.RootHash, Sequence: 99, Since: today}
	a.u.state(func(s *update.State) { s.Pending = pending })
	if err := second.share(a.dir); err != nil {
		t.Error(err)
	}
	if s := second.Status(); s.Pending == nil || s.Doing == "" {
		t.Errorf("seen by another process: %+v", s)
	}
	if _, err := second.Apply(t.Context(), v.source(), "test", "1.2.0"); !errors.Is(err, ErrUpdating) {
		t.Error(err)
	}
	if _, err := second.Check(t.Context(), v.source(), ""); !errors.Is(err, ErrUpdating) {
		t.Error(err)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.wantMemory("pending 1.1.0 in b;applied 1.0.0>1.1.0;")
	const each = 10
	for _, u := range []*Updater{a.u, second} {
		go func() {
			for range each {
				u.state(func(s *update.State) { s.Log(update.JournalEntry{Time: today, Result: update.Committed}) })
			}
			done <- nil
		}()
	}
	<-done
	<-done
	if n := len(a.u.Status().Journal); n != 1+2*each {
		t.Errorf("%d entries, want %d", n, 1+2*each)
	}
	if err := second.share(a.dir); err != nil {
		t.Error(err)
	}
	if _, err := second.Apply(t.Context(), v.source(), "test", "1.2.0"); err != nil {
		t.Errorf("when the other one has ended: %v", err)
	}
}

// TestStateWritersMeet: the one who checks and the one who judges write the same
// file. Neither note is lost.
func TestStateWritersMeet(t *testing.T) {
	a := newAppliance(newVendor(t, "1.0.0"), "1.0.0")
	const each = 20
	done := make(chan struct{})
	for _, result := range []update.Result{update.Applied, update.Committed} {
		go func() {
			for range each {
				a.u.state(func(s *update.State) { s.Log(update.JournalEntry{Time: today, Result: result}) })
			}
			done <- struct{}{}
		}()
	}
	<-done
	<-done
	if n := len(a.u.Status().Journal); n != 2*each {
		t.Errorf("%d entries of %d", n, 2*each)
	}
}

// TestDamagedState is put aside, said once, and no reason not to update.
func TestDamagedState(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.mustApply(v.source(), "", "1.1.0")
	putFile(t, filepath.Join(a.dir, "state.json"), []byte(`{"format":1,"journal":[{`))
	a.mustBoot(partition.SlotB, "1.1.0")
	a.bless()
	a.wantEntries("b 1.1.0", "a 1.0.0")
	a.wantMemory("refused >;committed >1.1.0;") // what runs on trial was found by its boot entry
}
