package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
)

// holdfast runs the command in this process, and wants that it succeeds.
func holdfast(t *testing.T, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	if code := mainWith(context.Background(), &cli{strings.NewReader(""), &out, &errs}, args); code != exitDone {
		t.Fatalf("holdfast %s exits %d: %s", strings.Join(args, " "), code, errs.String())
	}
	return out.String()
}

func tool(t *testing.T, pkg, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = filepath.Join("/usr/sbin", name)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if errors.Is(err, os.ErrNotExist) {
		t.Fatalf("%s not installed: apt-get install %s", name, pkg)
	}
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice is a block device over a file. It is detached when release is called, or
// in the end.
func loopDevice(t *testing.T, backing string) (dev string, release func()) {
	t.Helper()
	dev = tool(t, "mount", "losetup", "--find", "--show", backing)
	attached := true
	release = func() {
		if attached {
			attached = false
			tool(t, "mount", "losetup", "--detach", dev)
		}
	}
	t.Cleanup(release)
	return dev, release
}

// workbench has a bundle of release 1.2.4, and makes disks with 1.2.3.
type workbench struct {
	t                       *testing.T
	dir, one, bundle, trust string
	slotBytes               int64
}

func newWorkbench(t *testing.T, rootMiB int64) *workbench {
	w := &workbench{t: t, dir: t.TempDir(), slotBytes: (rootMiB + 4) * mebi}
	in := func(name string) string { return filepath.Join(w.dir, name) }
	w.one, w.bundle, w.trust = in("one"), in("two.bundle"), in("repo/metadata/1.root.json")
	holdfast(t, "keys", "new", in("keys"))
	for name, version := range map[string]string{"one": "1.2.3", "two": "1.2.4"} {
		if err := makeRelease(in("keys"), in(name), testRelease{product: "ledger", version: version, noiseMiB: rootMiB}); err != nil {
			t.Fatal(err)
		}
	}
	holdfast(t, "repo", "init", in("repo"))
	holdfast(t, "repo", "add", in("repo"), in("two"))
	holdfast(t, "bundle", "1.2.4", "--repo", in("repo"), "-o", w.bundle)
	return w
}

func (w *workbench) disk() string {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "disk.raw")
	if err := makeDiskOf(path, w.one, 0, w.slotBytes); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// apply is the command as a process of its own.
func (w *workbench) apply(disk string) *exec.Cmd {
	return exec.Command("holdfast", "apply", w.bundle, "--disk", disk, "--root", w.trust)
}

// wantRefused wants that an apply exits 1 with these lines and nothing else.
func (w *workbench) wantRefused(disk, wantError, wantHint string) {
	w.t.Helper()
	out, err := w.apply(disk).CombinedOutput()
	want := "error: " + wantError + "\nhint: " + wantHint + "\n"
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitFailed || string(out) != want {
		w.t.Errorf("%v: %s\nwant: %s", err, out, want)
	}
}

func (w *workbench) mustApply(disk string) {
	w.t.Helper()
	if out, err := w.apply(disk).CombinedOutput(); err != nil || !strings.Contains(string(out), "ledger 1.2.4 is in slot b as installation 2 and boots next") {
		w.t.Fatalf("%v: %s", err, out)
	}
	if got := holdfast(w.t, "inspect", disk); !strings.Contains(got, "boots first: slot b, installation 2, on trial, 3 tries left, 0 done\n") ||
		!strings.Contains(got, "tried next: slot a, installation 1, good\n") {
		w.t.Errorf("%s", got)
	}
}

// slotA is the hash of all that slot A boots from.
func (w *workbench) slotA(disk string) string {
	w.t.Helper()
	dev, err := partition.OpenReadOnly(disk)
	if err != nil {
		w.t.Fatal(err)
	}
	defer dev.Close()
	d, err := partition.Open(dev)
	if err != nil {
		w.t.Fatal(err)
	}
	entries, err := d.Entries()
	if err != nil {
		w.t.Fatal(err)
	}
	i := slices.IndexFunc(entries, func(e partition.Entry) bool { return e.Slot == partition.SlotA })
	if i < 0 || !entries[i].Good() {
		w.t.Fatalf("slot A does not boot: %+v", entries)
	}
	h := sha256.New()
	fmt.Fprintf(h, "%+v", entries[i])
	root, p, err := d.Partition(partition.RootAName)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := io.Copy(h, io.NewSectionReader(root, 0, p.SizeBytes)); err != nil {
		w.t.Fatal(err)
	}
	uki, err := espOf(w.t, d).Open(entries[i].UKI)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := io.Copy(h, io.NewSectionReader(uki, 0, uki.Size())); err != nil {
		w.t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func espOf(t *testing.T, d *partition.Disk) *fat32.FS {
	t.Helper()
	dev, p, err := d.Partition(partition.ESPName)
	if err != nil {
		t.Fatal(err)
	}
	esp, err := fat32.Open(dev, p.SizeBytes)
	if err != nil {
		t.Fatal(err)
	}
	return esp
}

// TestApplyStopped stops an apply in the middle, by Ctrl-C, by SIGTERM and by SIGKILL,
// on an image file and on a block device. The old release boots, and the same command
// ends what was begun.
func TestApplyStopped(t *testing.T) {
	w := newWorkbench(t, 64)
	for name, s := range map[string]struct {
		signal unix.Signal
		loop   bool
		says   string
	}{
		"Ctrl-C":                    {unix.SIGINT, false, "interrupt signal received"},
		"SIGTERM on a block device": {unix.SIGTERM, true, "terminated signal received"},
		"SIGKILL on a block device": {unix.SIGKILL, true, ""},
		"SIGKILL":                   {unix.SIGKILL, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			for range 5 { // the first one is in time, but on a machine that does much else
				image := w.disk()
				disk, release := image, func() {}
				if s.loop {
					disk, release = loopDevice(t, image)
				}
				before := w.slotA(disk)
				said, code := w.stop(disk, s.signal)
				if code == exitDone {
					release()
					continue
				}
				if s.signal != unix.SIGKILL {
					want := fmt.Sprintf("error: %s: stopped while slot b was written: %s\nhint: slot a is as it was and boots; slot b does not boot, and the same command goes on with it\n", disk, s.says)
					if code != exitFailed || !strings.HasSuffix(said, want) {
						t.Errorf("exits %d: %s\nwant %s", code, said, want)
					}
				}
				if got := holdfast(t, "inspect", disk); !strings.Contains(got, "boots first: slot a, installation 1, good\n") || strings.Contains(got, "installation 2") {
					t.Errorf("%s", got)
				}
				if w.slotA(disk) != before {
					t.Error("slot A has changed")
				}
				if out := tool(t, "gdisk", "sgdisk", "--verify", disk); !strings.Contains(out, "No problems found") {
					t.Error(out)
				}
				w.mustApply(disk)
				if w.slotA(disk) != before {
					t.Error("slot A has changed")
				}
				return
			}
			t.Error("five times the release was written before the signal came")
		})
	}
}

// stop sends the signal when the first bytes of the slot are written.
func (w *workbench) stop(disk string, signal unix.Signal) (said string, code int) {
	w.t.Helper()
	cmd := w.apply(disk)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	lines := bufio.NewReader(stderr)
	for {
		line, err := lines.ReadString('\n')
		said += line
		if err != nil {
			break
		}
		if strings.HasPrefix(line, "write slot b") {
			if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
				w.t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // the code is in its state
	return said, cmd.ProcessState.ExitCode()
}

// TestApplyStoppedEarly: before the first write there is nothing to go on with.
func TestApplyStoppedEarly(t *testing.T) {
	w := newWorkbench(t, 1)
	disk := w.disk()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("somebody came in"))
	var out, errs bytes.Buffer
	code := mainWith(ctx, &cli{strings.NewReader(""), &out, &errs}, []string{"apply", w.bundle, "--disk", disk, "--root", w.trust})
	if want := "error: stopped: somebody came in\nhint: nothing was written to " + disk + "\n"; code != exitFailed || !strings.HasSuffix(errs.String(), want) {
		t.Errorf("exits %d: %s", code, errs.String())
	}
	w.mustApply(disk)
}

// TestApplyResumes: what is in the slot already is not written again.
func TestApplyResumes(t *testing.T) {
	w := newWorkbench(t, 16)
	disk, _ := loopDevice(t, w.disk())
	written := func() int64 {
		t.Helper()
		b, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.ParseInt(strings.Fields(string(b))[6], 10, 64) // sectors written, Documentation/block/stat
		if err != nil {
			t.Fatal(err)
		}
		return n * 512
	}
	began := written()
	w.mustApply(disk)
	first := written() - began
	if first < 16*mebi {
		t.Fatalf("%d bytes were written of a root of 16 MiB", first)
	}
	dev, err := partition.OpenFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	d, err := partition.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := d.Entries()
	if err != nil || entries[0].Slot != partition.SlotB {
		t.Fatalf("%+v, %v", entries, err)
	}
	// As if it had been stopped before its last write.
	if err := errors.Join(espOf(t, d).Remove("loader/entries/"+entries[0].FileName), dev.Sync(), dev.Close()); err != nil {
		t.Fatal(err)
	}
	began = written()
	w.mustApply(disk)
	if again := written() - began; again > mebi {
		t.Errorf("%d bytes were written again, %d at first", again, first)
	}
}

// TestApplyToDiskInUse is refused before anything is written, and says what uses it.
func TestApplyToDiskInUse(t *testing.T) {
	w := newWorkbench(t, 1)
	image := w.disk()
	loop, release := loopDevice(t, image)
	w.wantRefused(image, image+" is attached to "+loop, "losetup --detach "+loop)

	// Another apply, or what else claims a device for itself.
	dev, err := partition.OpenFile(loop)
	if err != nil {
		t.Fatal(err)
	}
	w.wantRefused(loop, "open disk "+loop+": the device is in use", "unmount what is on it, or end the program that has it")
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	release()

	other := filepath.Join(t.TempDir(), "other")
	if err := errors.Join(os.WriteFile(other, nil, 0o600), os.Truncate(other, 64*mebi)); err != nil {
		t.Fatal(err)
	}
	otherLoop, _ := loopDevice(t, other)
	out, err := w.apply(otherLoop).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "error: "+otherLoop+": open disk: read partition table: not a disk made here") ||
		!strings.HasSuffix(string(out), "\nhint: --disk wants a whole disk that holdfast build made; holdfast inspect "+otherLoop+" says what this is\n") {
		t.Errorf("an empty disk: %v: %s", err, out)
	}
	tool(t, "e2fsprogs", "mke2fs", "-q", otherLoop)
	at := filepath.Join(t.TempDir(), "a folder")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	tool(t, "mount", "mount", otherLoop, at)
	defer tool(t, "mount", "umount", at)
	w.wantRefused(otherLoop, otherLoop+" is in use: "+otherLoop+" is mounted at "+at, "unmount it, if it is the right drive; lsblk lists them")

	// QEMU's own tool holds the locks of a machine that runs, and asks for them.
	qemu := exec.Command("qemu-io", "-f", "raw", image)
	stdin, err := qemu.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := qemu.Start(); err != nil {
		t.Fatalf("%v: apt-get install qemu-utils", err)
	}
	fmt.Fprintln(stdin, "length")
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatalf("qemu-io: %q, %v", line, err)
	}
	w.wantRefused(image, image+" is in use by a virtual machine, or another holdfast apply", "wait for it to end, or shut it down")
	if err := errors.Join(stdin.Close(), qemu.Wait()); err != nil {
		t.Fatal(err)
	}
	mine, err := openTarget(image)
	if err != nil {
		t.Fatal(err)
	}
	w.wantRefused(image, image+" is in use by a virtual machine, or another holdfast apply", "wait for it to end, or shut it down")
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "length", image).CombinedOutput(); err == nil || !strings.Contains(string(out), "lock") {
		t.Errorf("QEMU opens it meanwhile: %v: %s", err, out)
	}
	if err := mine.Close(); err != nil {
		t.Fatal(err)
	}
	w.mustApply(image)
}

// fakeMachine has a disk sda with the root on LUKS, a stick sdb that is mounted, a disk
// sdc with swap, and sdd that LVM has. As under /sys, names are links to where a device is.
func fakeMachine(t *testing.T) machine {
	t.Helper()
	m := machine{t.TempDir()}
	put := func(path, text string) {
		t.Helper()
		full := m.path(path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o700), os.WriteFile(full, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	device := func(at, number string, holders ...string) {
		t.Helper()
		name := filepath.Base(at)
		put(at+"/dev", number+"\n")
		put(at+"/uevent", "MAJOR=0\nDEVNAME="+name+"\n")
		for _, h := range holders {
			put(at+"/holders/"+h+"/dev", "")
		}
		for link, up := range map[string]string{"sys/dev/block/" + number: "../../../", "sys/class/block/" + name: "../../../"} {
			full := m.path(link)
			if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o700), os.Symlink(up+at, full)); err != nil {
				t.Fatal(err)
			}
		}
		if strings.Count(at, "/") > 2 {
			put(at+"/partition", "1\n")
		}
	}
	device("sys/devices/sda", "8:0")
	device("sys/devices/sda/sda1", "8:1")
	device("sys/devices/sda/sda2", "8:2", "dm-0")
	device("sys/devices/dm-0", "254:0")
	device("sys/devices/sdb", "8:16")
	device("sys/devices/sdb/sdb1", "8:17")
	device("sys/devices/sdc", "8:32")
	device("sys/devices/sdc/sdc1", "8:33")
	device("sys/devices/sdd", "8:48", "dm-1")
	device("sys/devices/dm-1", "254:1")
	device("sys/devices/sde", "8:64")
	put("proc/self/mountinfo", `20 1 254:0 / / rw,relatime - ext4 /dev/mapper/root rw
21 20 8:1 / /boot rw - vfat /dev/sda1 rw
22 20 0:40 /@ /media/a\040stick rw shared:1 - btrfs /dev/sdb1 rw
23 20 0:40 /@ /media/a\040stick rw shared:1 - btrfs /dev/sdb1 rw
24 20 0:5 / /dev rw - devtmpfs devtmpfs rw
short
25 20 8:64 / - none
`)
	put("proc/swaps", "Filename Type Size Used Priority\n/dev/sdc1 partition 1 0 -2\n")
	return m
}

func TestDiskUses(t *testing.T) {
	m := fakeMachine(t)
	for _, tt := range []struct {
		number string
		root   bool
		uses   []string
	}{
		{"8:0", true, []string{"/dev/dm-0 is mounted at /", "/dev/sda1 is mounted at /boot"}},
		{"8:16", false, []string{"/dev/sdb1 is mounted at /media/a stick"}},
		{"8:32", false, []string{"/dev/sdc1 is swap"}},
		{"8:48", false, []string{"/dev/sdd is part of /dev/dm-1"}},
		{"8:64", false, nil},
		{"8:80", false, nil},
	} {
		if uses, root := m.uses(tt.number); !slices.Equal(uses, tt.uses) || root != tt.root {
			t.Errorf("%s: %q, root %v", tt.number, uses, root)
		}
	}
	for number, want := range map[string]string{"8:0": "", "8:1": "/dev/sda", "8:17": "/dev/sdb", "254:0": ""} {
		if got := m.wholeDisk(number); got != want {
			t.Errorf("%s is a partition of %q, want %q", number, got, want)
		}
	}
}

// TestOwnDisk: what this machine runs from is refused, whatever it is.
func TestOwnDisk(t *testing.T) {
	var st unix.Stat_t
	if err := unix.Stat("/", &st); err != nil {
		t.Fatal(err)
	}
	if unix.Major(st.Dev) == 0 {
		return // an overlay, or a tmpfs; TestDiskUses has a machine with a disk
	}
	m := machine{"/"}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	disk := m.wholeDisk(number)
	if disk == "" {
		disk = "/dev/" + m.name(number)
	}
	err := refuseInUse(m, disk)
	if err == nil || !strings.HasPrefix(err.Error(), disk+" is the disk that this machine runs from: /dev/") {
		t.Error(err)
	}
}
