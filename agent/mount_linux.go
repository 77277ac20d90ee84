package agent

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is mount(2) with an error that names both ends.
func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s (%s) at %s: %w", source, fstype, target, err)
	}
	return nil
}

type mountPoint struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
	optional               bool // absent from some kernels
}

const safeFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// kernelMounts are made in the initrd and carried over into the root.
var kernelMounts = []mountPoint{
	{"proc", "/proc", "proc", safeFlags, "", false},
	{"sysfs", "/sys", "sysfs", safeFlags, "", false},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755", false},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755", false},
	{"securityfs", "/sys/kernel/security", "securityfs", safeFlags, "", true},
}

// firmwareMounts need modules, so they come after those are loaded.
var firmwareMounts = []mountPoint{
	{"efivarfs", "/sys/firmware/efi/efivars", "efivarfs", safeFlags | unix.MS_RDONLY, "", true},
}

// systemMounts are made by PID 1 on the root.
var systemMounts = []mountPoint{
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", false},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666", false},
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", false},
	{"mqueue", "/dev/mqueue", "mqueue", safeFlags, "", true},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", safeFlags, "nsdelegate", false},
}

func mountAll(points []mountPoint) error {
	for _, m := range points {
		if err := os.MkdirAll(m.target, 0o755); err != nil && !m.optional {
			return err
		}
		if err := mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil && !m.optional {
			return err
		}
	}
	return nil
}

// switchRoot makes newRoot the root file system and forgets the initrd. The
// mounts of kernelMounts move along; the initrd's files are deleted because
// its memory would otherwise stay taken.
func switchRoot(newRoot string) error {
	for _, at := range []string{"/dev", "/proc", "/sys", "/run"} {
		if err := mount(at, filepath.Join(newRoot, at), "", unix.MS_MOVE, ""); err != nil {
			return err
		}
	}
	if err := removeInitrd("/", newRoot); err != nil {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot to the root file system: %w", err)
	}
	return os.Chdir("/")
}

// removeInitrd deletes what lies on the initrd's own file system below dir.
// It refuses to start on anything but an initrd.
func removeInitrd(dir, except string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if !slices.Contains([]int64{unix.RAMFS_MAGIC, unix.TMPFS_MAGIC}, int64(st.Type)) {
		return fmt.Errorf("%s is not an initrd: file system type %#x", dir, st.Type)
	}
	var root unix.Stat_t
	if err := unix.Stat(dir, &root); err != nil {
		return err
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone already
		}
		var here unix.Stat_t
		if unix.Lstat(path, &here) != nil {
			return nil
		}
		if d.IsDir() {
			if here.Dev != root.Dev || path == except {
				return fs.SkipDir
			}
			return nil
		}
		if here.Dev == root.Dev {
			unix.Unlink(path)
		}
		return nil
	})
}

// unmountBelow unmounts everything mounted at or under the given paths, deepest
// first, and returns what stayed busy.
func unmountBelow(paths []string) (busy []string) {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return []string{err.Error()}
	}
	var targets []string
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		for _, p := range paths {
			if fields[1] == p || strings.HasPrefix(fields[1], strings.TrimSuffix(p, "/")+"/") {
				targets = append(targets, fields[1])
				break
			}
		}
	}
	slices.Reverse(targets) // later mounts lie on earlier ones
	for _, t := range targets {
		if unix.Unmount(t, 0) != nil {
			busy = append(busy, t)
		}
	}
	return busy
}
