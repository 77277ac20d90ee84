package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/partition"
)

// target is a disk that this process alone writes to.
type target struct {
	*partition.File
	lock *os.File
}

// openTarget opens a file or device for writing, unless somebody else has it.
func openTarget(path string) (*target, error) {
	if err := refuseInUse(machine{"/"}, path); err != nil {
		return nil, err
	}
	if err := refuseQCOW2Disk(path); err != nil {
		return nil, err
	}
	dev, err := partition.OpenFile(path)
	if errors.Is(err, partition.ErrInUse) {
		return nil, hinted{err, "unmount what is on it, or end the program that has it"}
	}
	if err != nil {
		return nil, err
	}
	lock, err := lockImage(path)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return &target{dev, lock}, nil
}

// Close gives the locks back, also those that a child has between its fork and its exec.
func (t *target) Close() error {
	l := unix.Flock_t{Type: unix.F_UNLCK}
	return errors.Join(unix.FcntlFlock(t.lock.Fd(), unix.F_OFD_SETLK, &l), t.File.Close(), t.lock.Close())
}

// QEMU locks an image by bytes of the file: those from 100 on say what it does with it,
// those from 200 on what it lets others do (docs/system/qemu-block-drivers, "Disk image
// file locking"). With a write lock on all of them no QEMU has it, or can open it.
const (
	qemuLockStart = 100
	qemuLockBytes = 200
)

// lockImage keeps out another apply and virtual machines. A claim as [partition.OpenFile]
// makes it is of block devices alone, and QEMU makes none.
func lockImage(path string) (f *os.File, err error) {
	if f, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: qemuLockStart, Len: qemuLockBytes}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return nil, hinted{fmt.Errorf("%s is in use by a virtual machine, or another holdfast apply", path), "wait for it to end, or shut it down"}
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// refuseInUse says what uses a disk, which the kernel's "busy" does not.
func refuseInUse(m machine, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Mode().IsRegular() {
		if loop := m.loopOf(path); loop != "" {
			return hinted{fmt.Errorf("%s is attached to %s", path, loop), "losetup --detach " + loop}
		}
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil // partition.OpenFile says what it is
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if whole := m.wholeDisk(number); whole != "" {
		return hinted{fmt.Errorf("%s is a partition", path), "give the whole disk: --disk " + whole}
	}
	switch uses, root := m.uses(number); {
	case root:
		return hinted{fmt.Errorf("%s is the disk that this machine runs from: %s", path, strings.Join(uses, ", ")), "name the drive that the release is for; lsblk lists them"}
	case len(uses) > 0:
		return hinted{fmt.Errorf("%s is in use: %s", path, strings.Join(uses, ", ")), "unmount it, if it is the right drive; lsblk lists them"}
	}
	return nil
}

// machine is where the kernel tells of its devices; root is "/" but in tests.
type machine struct{ root string }

func (m machine) path(elem ...string) string {
	return filepath.Join(append([]string{m.root}, elem...)...)
}

// read is a small file of the kernel's, without the line's end; "" when there is none.
func (m machine) read(elem ...string) string {
	b, err := os.ReadFile(m.path(elem...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// name is what a device is called under /dev.
func (m machine) name(number string) string {
	for line := range strings.Lines(m.read("sys/dev/block", number, "uevent")) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return name
		}
	}
	return number
}

// wholeDisk is the disk of a partition, "" of what is none.
func (m machine) wholeDisk(number string) string {
	if _, err := os.Stat(m.path("sys/dev/block", number, "partition")); err != nil {
		return ""
	}
	at, err := filepath.EvalSymlinks(m.path("sys/dev/block", number))
	if err != nil {
		return ""
	}
	return "/dev/" + filepath.Base(filepath.Dir(at))
}

// loopOf is the loop device over an image file, "" when there is none.
func (m machine) loopOf(path string) string {
	full, err := filepath.Abs(path)
	if err == nil {
		full, err = filepath.EvalSymlinks(full)
	}
	if err != nil {
		return ""
	}
	loops, _ := filepath.Glob(m.path("sys/block/loop*"))
	for _, at := range loops {
		name := filepath.Base(at)
		if m.read("sys/block", name, "loop/backing_file") == full {
			return "/dev/" + name
		}
	}
	return ""
}

// devices are a disk, its partitions, and what is made of them, by number with their names.
func (m machine) devices(number string, into map[string]string) {
	if into[number] != "" {
		return
	}
	into[number] = m.name(number)
	entries, _ := os.ReadDir(m.path("sys/dev/block", number) + "/") // it is a link
	for _, e := range entries {
		if _, err := os.Stat(m.path("sys/dev/block", number, e.Name(), "partition")); err == nil {
			m.devices(m.read("sys/dev/block", number, e.Name(), "dev"), into)
		}
	}
	holders, _ := os.ReadDir(m.path("sys/dev/block", number, "holders"))
	for _, h := range holders {
		m.devices(m.read("sys/class/block", h.Name(), "dev"), into)
	}
}

// uses says what is done with a disk; root is that the machine's own root is on it.
func (m machine) uses(number string) (uses []string, root bool) {
	devices := map[string]string{}
	m.devices(number, devices)
	named := func(path string) bool {
		for _, name := range devices {
			if path == "/dev/"+name {
				return true
			}
		}
		return false
	}
	add := func(use string) {
		if !slices.Contains(uses, use) {
			uses = append(uses, use)
		}
	}
	for line := range strings.Lines(m.read("proc/self/mountinfo")) {
		// proc(5): ID, parent, device, root, mount point, options, ..., "-", type, source
		head, tail, _ := strings.Cut(line, " - ")
		fields, source := strings.Fields(head), strings.Fields(tail)
		if len(fields) < 5 || len(source) < 2 {
			continue
		}
		name := devices[fields[2]]
		if name == "" && named(source[1]) { // btrfs has numbers of its own
			name = strings.TrimPrefix(source[1], "/dev/")
		}
		if name != "" {
			add(fmt.Sprintf("/dev/%s is mounted at %s", name, unescapeMount(fields[4])))
			root = root || fields[4] == "/"
		}
	}
	for line := range strings.Lines(m.read("proc/swaps")) {
		if fields := strings.Fields(line); len(fields) > 0 && named(fields[0]) {
			add(fields[0] + " is swap")
		}
	}
	if len(uses) > 0 {
		return uses, root // which says more than what is between
	}
	for held, name := range devices {
		holders, _ := os.ReadDir(m.path("sys/dev/block", held, "holders"))
		for _, h := range holders {
			add(fmt.Sprintf("/dev/%s is part of /dev/%s", name, h.Name()))
		}
	}
	slices.Sort(uses)
	return uses, root
}

// unescapeMount undoes what mountinfo does to white space and backslashes.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
