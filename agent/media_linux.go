package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/update"
)

const (
	mediaPath = "/run/holdfast/media"
	mediaPoll = 2 * time.Second
	busyPoll  = time.Second
	// maxMediaNames is how many names of a medium's top folder are looked at; a stick
	// may have a million files. They are read mediaNamesAtOnce, and of what is found,
	// maxMediaBundles are tried: the same as for one that is damaged, and hours otherwise.
	maxMediaNames    = 100_000
	mediaNamesAtOnce = 256
	maxMediaBundles  = 64
	// BundleSuffix ends the names of the bundles that are looked for on a medium.
	BundleSuffix = ".bundle"
	// RepositoryFolder is where a repository is looked for on a medium, beside its top folder.
	RepositoryFolder = "holdfast"
)

// watchMedia has a look at media that are plugged in, first come, first served. A
// medium is looked at once for each time that it is plugged in, so one that is left
// in does no harm. still says whether the device is the same medium yet.
//
// It is mounted read-only, and nothing on it is executed, followed or trusted. Its
// file system is the kernel's to parse: who fears for that writes stick: false.
func watchMedia(ctx context.Context, systemDisk string, look func(device string, still func() bool)) {
	seen := map[string]string{}
	for {
		here := mediaDevices(systemDisk)
		for _, name := range slices.Sorted(maps.Keys(here)) {
			id := here[name]
			if seen[name] == id {
				continue
			}
			seen[name] = id
			look("/dev/"+name, func() bool { return mediaDevices(systemDisk)[name] == id })
		}
		if !sleep(ctx, mediaPoll) {
			return
		}
	}
}

// mediaDevices are the partitions and unpartitioned disks that are not the system's,
// by name, with what is different each time that one is plugged in.
func mediaDevices(systemDisk string) map[string]string {
	list := map[string]string{}
	disks, err := os.ReadDir("/sys/block")
	if err != nil {
		return list
	}
	own := filepath.Base(systemDisk)
	for _, d := range disks {
		name := d.Name()
		dir := filepath.Join("/sys/block", name)
		if name == own || !exists(filepath.Join(dir, "device")) {
			continue // the system's, or nothing that one could plug in
		}
		seq, err := os.ReadFile(filepath.Join(dir, "diskseq"))
		if err != nil {
			continue
		}
		parts, _ := filepath.Glob(filepath.Join(dir, name+"*", "partition"))
		for _, p := range parts {
			list[filepath.Base(filepath.Dir(p))] = string(seq)
		}
		if len(parts) == 0 {
			list[name] = string(seq)
		}
	}
	return list
}

// fileSystemOf recognises the file systems that media have.
func fileSystemOf(r io.ReaderAt) (string, error) {
	b := make([]byte, 2048)
	if _, err := r.ReadAt(b, 0); err == io.EOF {
		return "", nil // a small partition
	} else if err != nil {
		return "", err
	}
	switch {
	case string(b[3:11]) == "EXFAT   ":
		return "exfat", nil
	case binary.LittleEndian.Uint16(b[1080:]) == 0xef53:
		return "ext4", nil
	case b[510] == 0x55 && b[511] == 0xaa && (bytes.HasPrefix(b[54:], []byte("FAT")) || bytes.HasPrefix(b[82:], []byte("FAT"))):
		return "vfat", nil
	}
	return "", nil
}

// medium is a device that was plugged in, with the file system that it was recognised by.
type medium struct {
	device string
	fs     string // "" when it is none that is known
	// still says whether the device is the same medium yet.
	still func() bool
}

// openMedium recognises a medium; nil is a reader of cards without one.
func openMedium(device string, still func() bool) (*medium, error) {
	f, err := os.Open(device)
	if errors.Is(err, unix.ENOMEDIUM) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	fs, err := fileSystemOf(f)
	return &medium{device, fs, still}, errors.Join(err, f.Close())
}

// errNotExt4 is why a medium is not written: the kernel would have to replay a journal
// that somebody else wrote.
var errNotExt4 = errors.New("ext4 is not written to: bring a stick with FAT or exFAT")

// read mounts the medium for reading only and calls do with its folder.
func (m *medium) read(do func(dir string) error) error {
	if err := m.mount(unix.MS_RDONLY); err != nil {
		return err
	}
	defer m.unmount()
	return do(mediaPath)
}

// writable says whether a medium whose reading ended so may be written to: what cannot
// be read, or was pulled out, is not, since there may be another in its place.
func (m *medium) writable(read error) bool { return !errors.Is(read, unix.EIO) && m.still() }

// write mounts the medium for writing and calls do with its folder.
func (m *medium) write(do func(dir string) error) (err error) {
	if m.fs == "ext4" {
		return errNotExt4
	}
	if err := m.mount(0); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, setReadOnly(m.device, true)) }()
	defer m.unmount()
	return do(mediaPath)
}

func (m *medium) mount(flags uintptr) error {
	if err := os.MkdirAll(mediaPath, 0o700); err != nil {
		return err
	}
	if err := setReadOnly(m.device, flags&unix.MS_RDONLY != 0); err != nil {
		return err
	}
	options := ""
	if m.fs == "ext4" {
		// A journal that is replayed is a medium that is written. And what to do about
		// errors is written on the medium: it may say that the kernel is to panic.
		options = "noload,errors=continue"
	}
	if err := unix.Mount(m.device, mediaPath, m.fs, flags|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOSYMFOLLOW, options); err != nil {
		return fmt.Errorf("mount %s as %s: %w", m.device, m.fs, err)
	}
	return nil
}

// unmount lets go of a medium, even one that was pulled out.
func (m *medium) unmount() { unix.Unmount(mediaPath, unix.MNT_DETACH) }

// setReadOnly says whether the kernel may write to a device. Mounted read-only, ext4
// writes all the same: what is wrong with it goes into its superblock.
func setReadOnly(device string, on bool) (err error) {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	value := map[bool]int{true: 1}[on]
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, value); err != nil {
		return fmt.Errorf("make %s read-only (%d): %w", device, value, err)
	}
	return nil
}

// fromMedium installs the first release that a medium has for this box, and says how
// that went, on the medium too when the spec allows it. still says whether the device is
// the same medium yet.
func (u *Updater) fromMedium(ctx context.Context, device string, still func() bool) (version string, err error) {
	m, err := openMedium(device, still)
	if m == nil || err != nil {
		return "", err
	}
	if m.fs == "" {
		u.Log.Info("medium", "device", device, "filesystem", "none that is known")
		return "", nil
	}
	found := false
	err = m.read(func(dir string) (err error) {
		u.Log.Info("medium", "device", device, "filesystem", m.fs)
		if u.mounted != nil {
			u.mounted(dir)
		}
		version, found, err = u.applyFromFolder(ctx, dir)
		return err
	})
	if !found && err == nil {
		u.Log.Info("no bundle and no repository on the medium", "device", device)
	}
	if found && u.Config.WriteBack && m.fs != "ext4" && m.writable(err) {
		err = errors.Join(err, u.writeBack(m))
	}
	return version, err
}

// applyFromFolder installs the first that fits of the bundles and repositories in a
// folder. found says that there was any.
func (u *Updater) applyFromFolder(ctx context.Context, dir string) (version string, found bool, err error) {
	paths, err := findReleases(dir)
	if err != nil {
		return "", false, err
	}
	var all []error
	for _, p := range paths {
		name := "medium:" + strings.TrimPrefix(strings.TrimPrefix(p, dir), "/")
		version, err := u.applyNamed(ctx, p, name)
		for errors.Is(err, ErrUpdating) && sleep(ctx, busyPoll) {
			// A medium is looked at once: it must not miss its turn because of a check.
			version, err = u.applyNamed(ctx, p, name)
		}
		if err == nil {
			return version, true, nil
		}
		u.Log.Info("not installed", "from", name, "why", err)
		if !errors.Is(err, ErrNoUpdate) {
			all = append(all, err)
		}
	}
	return "", len(paths) > 0, errors.Join(all...)
}

func (u *Updater) applyNamed(ctx context.Context, path, name string) (string, error) {
	src, closer, err := u.openSource(path)
	if err != nil {
		return "", err
	}
	defer closer.Close()
	return u.Apply(ctx, src, name, "")
}

// findReleases lists bundles by name, then repositories. Only plain files and folders count.
func findReleases(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var list []string
	for seen := 0; seen < maxMediaNames && len(list) < maxMediaBundles; {
		entries, err := d.ReadDir(mediaNamesAtOnce)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		seen += len(entries)
		for _, e := range entries {
			if e.Type().IsRegular() && strings.HasSuffix(strings.ToLower(e.Name()), BundleSuffix) && !strings.HasPrefix(e.Name(), ".") {
				list = append(list, filepath.Join(dir, e.Name()))
			}
		}
	}
	slices.Sort(list)
	list = list[:min(len(list), maxMediaBundles)]
	for _, folder := range []string{filepath.Join(dir, RepositoryFolder), dir} {
		if info, err := os.Lstat(folder); err != nil || !info.IsDir() && folder != dir {
			continue
		}
		if info, err := os.Lstat(filepath.Join(folder, update.TimestampPath)); err == nil && info.Mode().IsRegular() {
			list = append(list, folder)
		}
	}
	return list, nil
}

// writeBack leaves the outcome on the medium, for the way home. It holds nothing
// that is secret.
func (u *Updater) writeBack(m *medium) error {
	text, err := json.MarshalIndent(struct {
		Product  string       `json:"product"`
		DeviceID string       `json:"device_id"`
		Time     time.Time    `json:"time"`
		Update   UpdateStatus `json:"update"`
	}{u.Device.Product, u.Device.ID, u.Now().UTC(), u.Status()}, "", "  ")
	if err == nil {
		name := "holdfast-result-" + u.Device.Product + "-" + u.Device.ID[:min(8, len(u.Device.ID))] + ".json"
		err = m.write(func(dir string) error {
			return update.WriteFile(filepath.Join(dir, name), append(text, '\n'), 0o644)
		})
	}
	if err != nil {
		return fmt.Errorf("write the outcome to the medium: %w", err)
	}
	return nil
}
