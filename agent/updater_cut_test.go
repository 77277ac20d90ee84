package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
	"github.com/holdfast-os/holdfast/update"
)

// folder is the content of the updater's folder at some moment. The data volume has
// a journal of its own, and each file is replaced as a whole.
type folder map[string][]byte

func readFolder(t *testing.T, dir string) folder {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	f := folder{}
	for _, e := range list {
		if f[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f folder) restore(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, b := range f {
		putFile(t, filepath.Join(dir, name), b)
	}
	return dir
}

// witness calls before at the first write to the disk.
type witness struct {
	partition.Device
	before func()
}

func (w *witness) WriteAt(p []byte, off int64) (int, error) {
	if w.before != nil {
		w.before()
		w.before = nil
	}
	return w.Device.WriteAt(p, off)
}

// phase is a stretch of an update with all states that a cut in it can leave.
type phase struct {
	name string
	rec  *powercut.Device
	// folders are the updater's before the first write and in the end. The last goes
	// with the finished disk only, unless the order of the two does not matter.
	folders []folder
	ordered bool
	// boots are the versions that may boot after a cut.
	boots []string
}

// record runs do on a recorded disk. The folder can be as it was before the first
// write or as it is in the end.
func (a *appliance) record(name string, boots []string, do func()) phase {
	a.t.Helper()
	p := phase{name: name, rec: powercut.New(a.dev.(*partition.Memory)), boots: boots, ordered: true}
	a.dev = &witness{p.rec, func() { p.folders = append(p.folders, readFolder(a.t, a.dir)) }}
	do()
	p.folders = append(p.folders, readFolder(a.t, a.dir))
	if p.rec.Writes() == 0 || p.rec.Unsynced() {
		a.t.Fatalf("%s: %d writes, unsynced %v", name, p.rec.Writes(), p.rec.Unsynced())
	}
	a.dev = p.rec.Now()
	return p
}

// TestPowerCutsOverAnUpdate cuts the power in every phase of an update that works and
// of one that does not. What boots is whole, what is remembered fits what is on the
// disk, and the update can be completed.
func TestPowerCutsOverAnUpdate(t *testing.T) {
	powerCutsOverAnUpdate(t, newVendor(t), releaseOptions{})
}

// TestPowerCutsOverAnEncryptedUpdate is the same with encrypted slots.
func TestPowerCutsOverAnEncryptedUpdate(t *testing.T) {
	v := newVendor(t)
	v.slotKey = noise("the box's key", slotcrypt.KeyBytes)
	powerCutsOverAnUpdate(t, v, releaseOptions{encrypted: true})
}

func powerCutsOverAnUpdate(t *testing.T, v *vendor, o releaseOptions) {
	v.publish("1.0.0", o)
	v.publish("1.1.0", o)
	a := newAppliance(v, "1.0.0")
	a.update("1.1.0") // now each slot has a release, and a is to be written
	v.publish("2.0.0", o)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	both := []string{"1.1.0", "2.0.0"}
	phases := []phase{
		a.record("apply", both, func() { a.mustApply(v.source(), "", "2.0.0") }),
	}
	applied, dir := a.dev.(*partition.Memory), readFolder(t, a.dir)
	phases = append(phases,
		a.record("first boot", []string{"2.0.0"}, func() { must(a.load()) }),
		a.record("bless", []string{"2.0.0"}, func() {
			must(a.start(v.releases["2.0.0"]))
			a.bless()
		}))
	a.wantEntries("a 2.0.0", "b 1.1.0")

	a.dev, a.dir = applied.Clone(), dir.restore(t)
	phases = append(phases, a.record("fall back", both, func() {
		for range updateTries {
			must(a.boot())
			a.u.TrialFailed(errors.New("the service web is failed"))
		}
	}))
	phases[3].ordered = false
	a.mustBoot(partition.SlotB, "1.1.0")
	a.wantEntries("b 1.1.0", "a 2.0.0 0")
	for _, p := range phases {
		t.Run(p.name, func(t *testing.T) { v.eachCut(t, p) })
	}
}

// eachCut visits the states; a campaign has more random ones, and goes through each to its end.
func (v *vendor) eachCut(t *testing.T, p phase) {
	random, seeds := 2, uint64(1)
	if campaign() {
		random, seeds = 30, 8
	}
	visited, seen := 0, map[string]int{}
	visit := func(name string, disk *partition.Memory, f folder) {
		visited++
		a := &appliance{vendor: &vendor{t, v.dir, v.repo, v.releases, v.slotKey}, dev: disk, dir: f.restore(t), now: today}
		seen[a.checkCut(p, visited)]++
		if t.Failed() {
			t.Fatalf("%s\n%s\n%s", name, a.memory(), a.log.String())
		}
	}
	for seed := range seeds {
		k := 0
		for name, disk := range p.rec.States(seed, random) {
			f := p.folders[0]
			if !p.ordered {
				f = p.folders[visited%len(p.folders)]
			}
			k++
			visit(fmt.Sprintf("seed %d, state %d: %s", seed, k, name), disk, f)
		}
	}
	for i, f := range p.folders {
		visit(fmt.Sprintf("the disk as it is in the end, folder %d", i), p.rec.Now(), f)
	}
	t.Logf("%d writes, %d syncs, %d states visited; booted %v", p.rec.Writes(), p.rec.Syncs(), visited, seen)
	if visited < 3 {
		t.Errorf("only %d states", visited)
	}
	for _, version := range p.boots {
		if seen[version] == 0 {
			t.Errorf("%s never booted: %v", version, seen)
		}
	}
}

// checkCut boots after the cut and says which version that was. k is the state's number.
func (a *appliance) checkCut(p phase, k int) (booted string) {
	a.t.Helper()
	thorough := k%7 == 0 || campaign()
	if err := a.boot(); err != nil {
		a.t.Error(err)
		return ""
	}
	booted = a.on.Version
	if !slices.Contains(p.boots, a.on.Version) {
		a.t.Errorf("%s boots", a.on.Version)
	}
	a.wantSane()
	if k%9 == 0 {
		a.wantCleanESP("after the cut", true)
	}
	if !thorough || a.t.Failed() {
		return booted
	}
	if booted == "1.1.0" {
		if _, err := a.u.Apply(a.t.Context(), a.source(), "again", "2.0.0"); err != nil {
			a.t.Errorf("again: %v", err)
			return booted
		}
		a.wantSane()
		a.mustBoot(partition.SlotA, "2.0.0")
	}
	a.bless()
	a.wantEntries("a 2.0.0", "b 1.1.0")
	a.wantSane()
	a.wantCleanESP("in the end", false)
	s := a.u.Status()
	if last := s.Journal[len(s.Journal)-1]; last.Result != update.Committed || last.To != "2.0.0" || s.Pending != nil {
		a.t.Errorf("in the end: %s", a.memory())
	}
	return booted
}

// wantSane compares the memory with the disk, and wants the slots that can boot whole
// and the old release among them.
func (a *appliance) wantSane() {
	a.t.Helper()
	entries, err := a.disk().Entries()
	if err != nil {
		a.t.Error(err)
		return
	}
	old := false
	for _, e := range entries {
		_, err := a.whole(e)
		if err != nil && e.Damage == nil {
			a.t.Errorf("slot %s boots and is not whole: %v", e.Slot, err)
		}
		old = old || err == nil && e.Good() && e.Version == "1.1.0"
	}
	if !old {
		a.t.Errorf("the old release does not boot any more: %+v", entries)
	}
	p := a.u.Status().Pending
	i := entryOf(p, entries)
	other := slices.IndexFunc(entries, func(e partition.Entry) bool { return e.Version == "2.0.0" && e.Counted && e.TriesLeft > 0 })
	switch {
	case p != nil && (i < 0 || p.Version != "2.0.0" || !entries[i].Counted):
		a.t.Errorf("pending is %+v, entries %+v", p, entries)
	case p == nil && other >= 0:
		a.t.Errorf("%+v waits, or is on trial, and is not pending", entries[other])
	}
}

// wantCleanESP asks dosfstools. A cut leaves clusters without a file, which the next
// write takes back; reclaim does that before, on a copy.
func (a *appliance) wantCleanESP(when string, reclaim bool) {
	a.t.Helper()
	if reclaim {
		c := &appliance{vendor: a.vendor, dev: a.dev.(*partition.Memory).Clone()}
		esp, err := c.esp()
		if err != nil {
			a.t.Fatal(err)
		}
		if _, err := esp.Reclaim(); err != nil {
			a.t.Error(err)
		}
		c.wantCleanESP(when, false)
		return
	}
	if _, err := exec.LookPath("fsck.vfat"); err != nil {
		a.t.Fatal("fsck.vfat not installed: apt-get install dosfstools")
	}
	dev, part, err := a.disk().Partition(partition.ESPName)
	if err != nil {
		a.t.Fatal(err)
	}
	path := filepath.Join(a.t.TempDir(), "esp")
	f, err := os.Create(path)
	if err != nil {
		a.t.Fatal(err)
	}
	defer os.Remove(path)
	_, err = io.Copy(f, io.NewSectionReader(dev, 0, part.SizeBytes))
	if err = errors.Join(err, f.Close()); err != nil {
		a.t.Fatal(err)
	}
	if out, err := exec.Command("fsck.vfat", "-n", path).CombinedOutput(); err != nil {
		a.t.Errorf("fsck.vfat -n, %s: %v\n%s", when, err, out)
	}
}

// TestCutBeforeTheSlotIsTouched: the note of the installation before has given way to
// that of one that never began. The one before still boots, on trial or not at all,
// and how that ended is not lost.
func TestCutBeforeTheSlotIsTouched(t *testing.T) {
	for _, end := range []string{"commits", "fails with a reason", "fails in silence"} {
		t.Run(end, func(t *testing.T) {
			v := newVendor(t, "1.0.0", "1.1.0")
			a := newAppliance(v, "1.0.0")
			a.mustApply(v.source(), "", "1.1.0")
			v.publish("1.2.0", releaseOptions{})
			disk := a.dev
			p := powercut.New(disk.(*partition.Memory))
			var dir folder
			a.dev = &witness{p, func() { dir = readFolder(t, a.dir) }}
			a.mustApply(v.source(), "", "1.2.0")
			a.dev, a.dir = disk, dir.restore(t)
			reason := silent
			for range updateTries {
				if end == "fails in silence" {
					if err := a.load(); err != nil {
						t.Fatal(err)
					}
					continue
				}
				a.mustBoot(partition.SlotB, "1.1.0")
				if end == "commits" {
					a.bless()
					a.wantEntries("b 1.1.0", "a 1.0.0")
					a.wantMemory("applied 1.0.0>1.1.0;committed >1.1.0;")
					return
				}
				reason = "the disk is on fire"
				a.u.TrialFailed(errors.New(reason))
			}
			a.mustBoot(partition.SlotA, "1.0.0")
			a.wantEntries("a 1.0.0", "b 1.1.0 0")
			a.wantMemory(fmt.Sprintf("failed 1.1.0: %s;applied 1.0.0>1.1.0;fell-back 1.1.0>1.0.0;", reason))
		})
	}
}
