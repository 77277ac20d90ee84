package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/partition"
)

// loaderBox is a box with its firmware's keys and two copies of a boot loader.
type loaderBox struct {
	*LoaderKeeper
	t    *testing.T
	log  bytes.Buffer
	vars *loaderVars
	good []byte
}

// loaderVars adds what systemd-boot says of itself and of its choice.
type loaderVars struct {
	*firmware
	started, selected string
}

func (v *loaderVars) Read(name EFIVar) (uint32, []byte, error) {
	text := v.started
	switch name.Name {
	default:
		return v.firmware.Read(name)
	case "LoaderEntrySelected":
		text = v.selected
	case "LoaderImageIdentifier":
	}
	if text == "" || name.Vendor != sigdb.FromUUID(uuid.MustParse("4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")) {
		return 0, nil, fs.ErrNotExist
	}
	return 6, utf16Z(text), nil
}

func newLoaderBox(t *testing.T) *loaderBox {
	ours, _ := vendors(t)
	b := &loaderBox{t: t, vars: &loaderVars{firmware: enrolled(t, ours), started: `\EFI\BOOT\BOOTX64.EFI`}}
	b.good, _ = signedProgram(t, "boot loader", ours.DB)
	disk, err := partition.Open(newVendor(t, "1.0.0").newDisk("1.0.0"))
	if err != nil {
		t.Fatal(err)
	}
	b.LoaderKeeper = &LoaderKeeper{Log: slog.New(slog.NewTextHandler(&b.log, nil)), Vars: b.vars, Disk: disk, Now: func() time.Time { return today }}
	b.put(firstLoader, b.good)
	b.put(secondLoader, b.good)
	return b
}

const firstLoader = "EFI/BOOT/BOOTX64.EFI"

// put gives a copy other content; nil removes it.
func (b *loaderBox) put(path string, content []byte) {
	b.t.Helper()
	esp, err := espOf(b.Disk)
	if err == nil && content == nil {
		err = esp.Remove(path)
	} else if err == nil {
		err = esp.WriteFile(path, int64(len(content)), bytes.NewReader(content), today)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *loaderBox) copies() (first, second []byte) {
	b.t.Helper()
	list, err := b.Disk.Loaders()
	if err != nil {
		b.t.Fatal(err)
	}
	return list[0].Content, list[1].Content
}

// wantWhole is a boot after which both copies are right.
func (b *loaderBox) wantWhole(repaired string) {
	b.t.Helper()
	s := b.Keep()
	if (s.Repaired == "") != (repaired == "") || !strings.Contains(s.Repaired, repaired) || s.Problem != "" || s.Copies[0].Wrong+s.Copies[1].Wrong != "" {
		b.t.Errorf("%+v; want repaired %q", s, repaired)
	}
	if first, second := b.copies(); !bytes.Equal(first, b.good) || !bytes.Equal(second, b.good) {
		b.t.Error("the copies are not both right")
	}
	if n := strings.Count(b.log.String(), "boot loader repaired"); (n == 1) != (repaired != "") || n > 1 {
		b.t.Errorf("%d repairs logged: %s", n, b.log.String())
	}
	b.log.Reset()
}

// TestLoaderRepaired: whatever has become of either copy, the box that started from the
// other one puts it back, says so once, and has nothing to do at the next boot (F20).
func TestLoaderRepaired(t *testing.T) {
	ours, theirs := vendors(t)
	other, _ := signedProgram(t, "next boot loader", ours.DB)
	foreign, _ := signedProgram(t, "boot loader", theirs.DB)
	unsigned, _ := signedProgram(t, "boot loader")
	for _, secureBoot := range []bool{true, false} {
		b := newLoaderBox(t)
		b.vars.values["SecureBoot"] = []byte{byte(map[bool]int{true: 1}[secureBoot])}
		altered := bytes.Clone(b.good)
		altered[len(altered)/2] ^= 1
		b.wantWhole("")
		for name, c := range map[string]struct {
			content []byte
			why     string
		}{
			"missing": {nil, "it was missing"}, "empty": {[]byte{}, ""}, "cut short": {b.good[:4096], ""},
			"altered": {altered, ""}, "signed by somebody else": {foreign, ""}, "unsigned": {unsigned, ""},
			"of another release": {other, "another one than the one that started"},
		} {
			for path, started := range map[string]string{firstLoader: `\EFI\systemd\systemd-bootx64.efi`, secondLoader: `\EFI\BOOT\BOOTX64.EFI`} {
				t.Logf("Secure Boot %v, %s: %s", secureBoot, name, path)
				b.vars.started = started
				b.put(path, c.content)
				b.wantWhole("the boot loader " + path + " was put back from ")
				b.put(path, c.content)
				if s := b.Keep(); !strings.Contains(s.Repaired, c.why) {
					t.Errorf("repaired %q, want %q", s.Repaired, c.why)
				}
				b.log.Reset()
				b.wantWhole("")
			}
		}
	}
}

// TestLoaderWithoutWord: a boot loader that does not say which copy it was is repaired as
// far as the firmware's keys, or the signature, tell the copies apart.
func TestLoaderWithoutWord(t *testing.T) {
	ours, _ := vendors(t)
	b := newLoaderBox(t)
	b.vars.started = ""
	b.put(firstLoader, b.good[:5000])
	b.wantWhole("put back from " + secondLoader)
	// Two that would both start, and differ.
	other, _ := signedProgram(t, "next boot loader", ours.DB)
	b.put(secondLoader, other)
	if s := b.Keep(); s.Repaired != "" || !strings.Contains(s.Problem, "differ") || s.Copies[1].Wrong == "" {
		t.Errorf("%+v", s)
	}
	if first, second := b.copies(); !bytes.Equal(first, b.good) || !bytes.Equal(second, other) {
		t.Error("a guess was made")
	}
}

// TestLoaderChangedAfterStart: what somebody has made of the copy that started is not
// copied over the other one.
func TestLoaderChangedAfterStart(t *testing.T) {
	_, theirs := vendors(t)
	b := newLoaderBox(t)
	foreign, _ := signedProgram(t, "boot loader", theirs.DB)
	b.put(firstLoader, foreign)
	b.wantWhole("the boot loader " + firstLoader)
	// Both of them: nothing is copied, and status says so.
	b.put(firstLoader, foreign)
	b.put(secondLoader, nil)
	s := b.Keep()
	if s.Repaired != "" || !strings.Contains(s.Problem, "neither copy") || s.Copies[0].Wrong == "" || s.Copies[1].Wrong == "" {
		t.Errorf("%+v", s)
	}
	if first, second := b.copies(); !bytes.Equal(first, foreign) || second != nil {
		t.Error("something was written")
	}
	status := &Status{}
	status.setLoader(s)
	if len(status.Problems) != 1 {
		t.Errorf("problems %q", status.Problems)
	}
}

// TestLoaderNoRoom: a boot partition without room, or one that cannot be read, is a
// problem in status.
func TestLoaderNoRoom(t *testing.T) {
	b := newLoaderBox(t)
	b.put(secondLoader, nil)
	esp, err := espOf(b.Disk)
	if err != nil {
		t.Fatal(err)
	}
	b.put("filler", make([]byte, esp.FreeBytes()-4096))
	if s := b.Keep(); s.Repaired != "" || !strings.Contains(s.Problem, "volume full") || s.Copies[1].Wrong != "it was missing" {
		t.Errorf("%+v", s)
	}
	b.put("filler", nil)
	b.wantWhole("it was missing") // once there is room, as on a box of an older release
	b.vars.broken["SecureBoot"] = errors.New("broken")
	b.put(firstLoader, b.good[:100])
	b.wantWhole("put back from " + secondLoader) // firmware that says nothing (F67)
}

func TestLoaderStatusLines(t *testing.T) {
	for want, s := range map[string]LoaderStatus{
		"loader    two copies, started from EFI/BOOT/BOOTX64.EFI, the firmware's entry for the second is Boot0003\n":                              {Started: firstLoader, Entry: "Boot0003"},
		"loader    two copies, for the releases without it Boot0004 and Boot0005, and the firmware does not have all entries: it has lost them\n": {ReleaseEntries: []string{"Boot0004", "Boot0005"}, NoEntry: "it has lost them"},
		"repaired  it was put back\nloader    two copies\n":                                                                                       {Repaired: "it was put back"},
	} {
		var b strings.Builder
		s.lines(&b)
		if b.String() != want {
			t.Errorf("got %q, want %q", b.String(), want)
		}
	}
}

// TestGiveUpRefused: a release that the boot loader chose, and that is not what runs, has
// no tries any more; what the boot loader did not choose in this start, or does not choose
// any more, is left as it is. The release that runs says why.
func TestGiveUpRefused(t *testing.T) {
	ours, _ := vendors(t)
	for name, c := range map[string]struct {
		tries    int // of the release in slot b, of which one was used; 0 for one that is good
		selected string
		running  partition.Slot
		gaveUp   bool
		memory   string
	}{
		"on trial":                  {3, "holdfast-b-000000000002.conf", partition.SlotA, true, "fell-back 1.1.0>1.0.0;"},
		"named with its counter":    {3, "HOLDFAST-B-000000000002+2-1.CONF", partition.SlotA, true, "fell-back 1.1.0>1.0.0;"},
		"good":                      {0, "holdfast-b-000000000002.conf", partition.SlotA, true, "fell-back 1.1.0>1.0.0;"},
		"it runs":                   {3, "holdfast-b-000000000002.conf", partition.SlotB, false, ""},
		"its tries were used up":    {1, "holdfast-b-000000000002.conf", partition.SlotA, false, "fell-back 1.1.0>1.0.0;"},
		"no boot loader started":    {3, "", partition.SlotA, false, ""},
		"somebody chose the other":  {3, "holdfast-a-000000000001.conf", partition.SlotA, false, ""},
		"an entry of another disk":  {3, "holdfast-b-000000000007.conf", partition.SlotA, false, ""},
		"something else altogether": {0, "auto-reboot-to-firmware-setup", partition.SlotA, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAppliance(newVendor(t, "1.0.0", "1.1.0"), "1.0.0")
			r := a.releases["1.1.0"]
			d := a.disk()
			if err := d.WriteSlot(t.Context(), partition.SlotB, partition.Contents{
				Root: partition.Bytes(r.root), RootHash: r.Verity.RootHash, UKI: partition.Bytes(r.uki), Title: "gate", Version: "1.1.0",
			}, partition.WriteOptions{Tries: c.tries, Running: partition.SlotA}, nil); err != nil {
				t.Fatal(err)
			}
			old := a.on
			if err := a.load(); err != nil || a.on.Slot != partition.SlotB {
				t.Fatal(a.on, err)
			}
			vars := &loaderVars{firmware: enrolled(t, ours), selected: c.selected}
			e, ok, err := giveUpRefused(d, vars, c.running)
			if ok != c.gaveUp || err != nil || ok && e.Version != "1.1.0" {
				t.Fatalf("%+v, %v, %v", e, ok, err)
			}
			if c.running == partition.SlotB {
				a.wantEntries("b 1.1.0 2", "a 1.0.0")
				return
			}
			a.on = old
			if err := a.start(a.releases["1.0.0"]); err != nil {
				t.Fatal(err)
			}
			if !c.gaveUp && c.memory == "" {
				a.wantMemory("")
				return
			}
			a.wantEntries("a 1.0.0", "b 1.1.0 0")
			if got := a.memory(); !strings.HasSuffix(got, c.memory) {
				t.Errorf("remembered %s", got)
			}
			a.u.Refused = func(*partition.Disk, partition.Entry) error {
				t.Error("judged again, which reads all of it")
				return nil
			}
			if err := a.u.Settle(); err != nil || !strings.HasSuffix(a.memory(), c.memory) || strings.Count(a.memory(), "fell-back") != 1 {
				t.Errorf("settled again: %s, %v", a.memory(), err)
			}
			if _, again, err := giveUpRefused(a.disk(), vars, partition.SlotA); again || err != nil {
				t.Errorf("given up twice: %v", err)
			}
		})
	}
}

// wornDevice takes writes and keeps none.
type wornDevice struct{ partition.Device }

func (wornDevice) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// TestGiveUpOnWornDisk: nothing is believed to be given up that the disk has as before.
func TestGiveUpOnWornDisk(t *testing.T) {
	ours, _ := vendors(t)
	a := newAppliance(newVendor(t, "1.0.0", "1.1.0"), "1.0.0")
	a.mustApply(a.source(), "", "1.1.0")
	disk, err := partition.Open(wornDevice{a.dev})
	if err != nil {
		t.Fatal(err)
	}
	vars := &loaderVars{firmware: enrolled(t, ours), selected: "holdfast-b-000000000002.conf"}
	if _, ok, err := giveUpRefused(disk, vars, partition.SlotA); !ok || err == nil || !strings.Contains(err.Error(), "does not keep what is written") {
		t.Errorf("%v, %v", ok, err)
	}
}

// TestRefused: what was left because the firmware does not start it is said to be that.
func TestRefused(t *testing.T) {
	ours, theirs := vendors(t)
	whole, _ := signedProgram(t, "kernel", ours.DB)
	foreign, _ := signedProgram(t, "kernel", theirs.DB)
	for want, content := range map[string][]byte{
		"none of its boots": whole, "the firmware refuses its kernel image: ": whole[:len(whole)/2], "the firmware refuses its kernel image: no": foreign,
	} {
		b := newLoaderBox(t)
		a := newAppliance(newVendor(t, "1.0.0", "1.1.0"), "1.0.0")
		r := a.releases["1.1.0"]
		a.u.Refused = func(d *partition.Disk, e partition.Entry) error {
			return (&LoaderKeeper{Log: b.Log, Vars: b.vars, Disk: d}).Refused(e)
		}
		err := a.disk().WriteSlot(t.Context(), partition.SlotB, partition.Contents{
			Root: partition.Bytes(r.root), RootHash: r.Verity.RootHash, UKI: partition.Bytes(content), Version: "1.1.0",
		}, partition.WriteOptions{Tries: 3, Running: partition.SlotA}, nil)
		if err == nil {
			err = a.disk().GiveUp(partition.SlotB, 3)
		}
		if err == nil {
			err = a.u.Settle()
		}
		if s := a.u.Status(); err != nil || len(s.Failed) != 1 || !strings.HasPrefix(s.Failed[0].Reason, want) {
			t.Errorf("%+v, %v; want %q", s.Failed, err, want)
		}
	}
}

// TestDriveNodeSize: UEFI 2.10 §10.3.5.1.
func TestDriveNodeSize(t *testing.T) {
	if n := binary.Size(driveNode{}) + pathHeaderBytes; n != 42 {
		t.Errorf("%d bytes", n)
	}
}
