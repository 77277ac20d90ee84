package hwtest_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/partition"
)

// install lays a release into slot B of a box that is off, as a technician at
// the bench does, with tries boots to prove itself.
func install(t *testing.T, disk string, p *product, tries int) {
	t.Helper()
	d, _ := openDisk(t, disk)
	contents, err := build.Contents(p.release(), p.manifest)
	if err != nil {
		t.Fatal(err)
	}
	o := partition.WriteOptions{Tries: tries, Running: partition.SlotA, Time: time.Unix(p.manifest.BuildTimeSec, 0)}
	if err := d.WriteSlot(context.Background(), partition.SlotB, contents, o, nil); err != nil {
		t.Fatal(err)
	}
}

// entry is the boot entry of a slot of a box that is off.
func entry(t *testing.T, disk string, slot partition.Slot) partition.Entry {
	t.Helper()
	d, _ := openDisk(t, disk)
	entries, err := d.Entries()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Slot == slot {
			return e
		}
	}
	t.Fatalf("no boot entry for slot %s in %+v", slot, entries)
	return partition.Entry{}
}

func TestHealthyReleaseIsBlessed(t *testing.T) {
	t.Parallel()
	next := buildRelease(t, t.TempDir(), theProduct(t).keys, "2.0.0", nil)
	m, _ := aBox(t, true)
	install(t, m.Disk, next, 3)
	m.PowerOn()
	m.Expect(`starting name=probe version=2.0.0`, bootTime)
	m.Expect(tpmPattern, bootTime) // another kernel, another initrd, the same vendor
	m.Expect(`on trial slot=b version=2.0.0 tries_left=2`, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
	m.Expect(`blessed slot=b version=2.0.0`, bootTime)
	m.PowerButton(bootTime)
	if e := entry(t, m.Disk, partition.SlotB); !e.Good() {
		t.Errorf("the blessed slot is not good: %+v", e)
	}
	m.PowerOn()
	m.Expect(`ready name=probe version=2.0.0 slot=b`, bootTime)
}

// TestFailingReleaseFallsBack: a release whose onboot container fails is left
// after its tries, and the old one runs again with the data.
func TestFailingReleaseFallsBack(t *testing.T) {
	t.Parallel()
	broken := buildRelease(t, t.TempDir(), theProduct(t).keys, "3.0.0", func(s *spec.Spec) {
		s.OnBoot[0].Command = []string{"/usr/lib/holdfast/holdfast-agent", "no-such-verb"}
	})
	m, _ := aBox(t, true)
	install(t, m.Disk, broken, 2)
	m.PowerOn()
	for _, left := range []string{"1", "0"} {
		m.Expect(`on trial slot=b version=3.0.0 tries_left=`+left, bootTime)
		m.Expect(`trial of 3.0.0 in slot b failed: an onboot container failed`, bootTime)
		m.Expect(`bye reboot=true`, bootTime)
	}
	m.Expect(`ready name=probe version=1.0.0 slot=a`, bootTime)
	wantRecord(t, m, "first", "kept")
	s := statusIn(t, m.Console()[strings.LastIndex(m.Console(), "starting name=probe"):])
	if len(s.Slots) != 2 || !s.Slots[0].Running && !s.Slots[1].Running {
		t.Errorf("status does not show both slots: %+v", s.Slots)
	}
	m.PowerCut()
	if e := entry(t, m.Disk, partition.SlotB); !e.Bad() {
		t.Errorf("the failed slot is not bad: %+v", e)
	}
}

// TestPanickingReleaseFallsBack: a release that does not even reach its services.
func TestPanickingReleaseFallsBack(t *testing.T) {
	t.Parallel()
	p := theProduct(t)
	next := buildRelease(t, t.TempDir(), p.keys, "2.0.1", nil)
	m, _ := aBox(t, true)
	install(t, m.Disk, next, 1)
	flipRoot(t, m.Disk, partition.RootBName, blockOf(t, next))
	m.PowerOn()
	m.Expect(`starting name=probe version=2.0.1`, bootTime)
	m.Expect(`Kernel panic`, bootTime)
	m.Expect(`ready name=probe version=1.0.0 slot=a`, bootTime)
	wantRecord(t, m, "first", "kept")
}

// TestTrialWithRefusingTPM: a release on trial that cannot open the data does not
// wait for somebody with the recovery key; the good one does.
func TestTrialWithRefusingTPM(t *testing.T) {
	t.Parallel()
	next := buildRelease(t, t.TempDir(), theProduct(t).keys, "2.0.2", nil)
	m, box := aBox(t, true)
	install(t, m.Disk, next, 1)
	if err := m.ReplaceTPM(hwtest.TPM20); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(`starting name=probe version=2.0.2`, bootTime)
	m.Expect(`a release on trial whose data volumes stay closed is left`, bootTime)
	m.Expect(`starting name=probe version=1.0.0`, bootTime)
	m.Expect(promptPattern, bootTime)
	m.Send(box.recovery + "\n")
	m.Expect(`ready name=probe version=1.0.0 slot=a`, bootTime)
	wantRecord(t, m, "first", "kept")
}

// TestGoodSlotThatBreaks (F74): a release that was good and panics ever since its
// slot was damaged gives way to the other one, and says so.
func TestGoodSlotThatBreaks(t *testing.T) {
	t.Parallel()
	next := buildRelease(t, t.TempDir(), theProduct(t).keys, "2.0.3", nil)
	m, _ := aBox(t, true)
	install(t, m.Disk, next, 0)
	m.PowerOn()
	m.Expect(`boot confirmed slot=b version=2.0.3`, bootTime)
	m.PowerButton(bootTime)
	if e := entry(t, m.Disk, partition.SlotB); !e.Good() {
		t.Fatalf("the confirmed slot is not good: %+v", e)
	}
	flipRoot(t, m.Disk, partition.RootBName, blockOf(t, next))
	m.PowerOn()
	m.Expect(`Kernel panic`, bootTime)
	m.Expect(`ready name=probe version=1.0.0 slot=a`, 3*bootTime)
	wantRecord(t, m, "first", "kept")
	s := updateStatus(t, m)
	if n := len(s.Journal); n != 1 || !strings.Contains(s.Journal[n-1].Reason, "does not boot any more") {
		t.Errorf("journal: %+v", s.Journal)
	}
}
