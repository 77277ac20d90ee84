package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
)

// diskTime is how long the disk may take to appear: USB and old RAID
// controllers need tens of seconds.
const diskTime = 60 * time.Second

// originTime is how long the disk that the firmware names may take, once another one
// was found that would do. It is shorter: the name may be one that we cannot read.
const originTime = 10 * time.Second

// rootPartition is where the running release lies.
type rootPartition struct {
	device string // /dev/vda2
	disk   string // /dev/vda
}

// rootFinder looks for the partition whose hash tree has the root hash of the
// measured boot description. Labels, order and NVRAM say nothing (F61). Where several
// disks have it – an install medium that was left in, a copy – it is the one that
// this boot was started from (F77).
type rootFinder struct {
	log       *slog.Logger
	verity    image.Verity
	volume    string // the first data volume; "" is none
	encrypted bool   // the release's slots are
	from      origin
	sys, dev  string        // /sys and /dev
	wait      time.Duration // [diskTime]
	complaint string        // what was said last
}

// find waits for the partition. others are disks with the same root, which are not used.
func (f *rootFinder) find(ctx context.Context) (root rootPartition, others []string, err error) {
	began := time.Now()
	for {
		found, looked, err := f.search()
		if err == nil {
			root, err = f.choose(found, time.Since(began))
		}
		if err == nil {
			for _, r := range found {
				if r.disk != root.disk {
					others = append(others, r.disk)
				}
			}
			return root, others, nil
		}
		if time.Since(began) > f.wait {
			return root, nil, fmt.Errorf("no root with hash %s can be used after %v (looked at: %s): %w",
				f.verity.RootHash, f.wait, strings.Join(looked, " "), err)
		}
		f.complain(err)
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return root, nil, ctx.Err()
		}
	}
}

// complain says once why a boot waits that could go on; somebody may help it.
func (f *rootFinder) complain(err error) {
	if text := err.Error(); err != errNoRoot && text != f.complaint {
		f.complaint = text
		f.log.Warn("waiting for the disk", "why", text)
	}
}

var errNoRoot = errors.New("not found; the disk's driver may be missing from kernel.modules, or the root is damaged")

// search lists the partitions that hold the root, the first of each disk, and all that
// were looked at.
func (f *rootFinder) search() (found []rootPartition, looked []string, err error) {
	parts, err := filepath.Glob(filepath.Join(f.sys, "class/block/*/partition"))
	if err != nil {
		return nil, nil, err
	}
	for _, p := range parts {
		dir, err := filepath.EvalSymlinks(filepath.Dir(p))
		if err != nil {
			continue // went away
		}
		r := rootPartition{filepath.Join(f.dev, filepath.Base(dir)), filepath.Join(f.dev, filepath.Base(filepath.Dir(dir)))}
		looked = append(looked, r.device)
		known := slices.ContainsFunc(found, func(o rootPartition) bool { return o.disk == r.disk })
		if !known && (holdsRoot(r.device, f.verity) || f.encrypted && isNamed(r, p, f.verity)) {
			found = append(found, r)
		}
	}
	return found, looked, nil
}

// choose picks the disk that this boot was started from. Where that is not known and
// several would do, a box's own disk is told from install media by its volumes; of
// copies that cannot be told apart, none is taken.
func (f *rootFinder) choose(found []rootPartition, waited time.Duration) (rootPartition, error) {
	if len(found) == 0 {
		return rootPartition{}, errNoRoot
	}
	started, there := f.from.disks(f.sys, f.dev)
	here := slices.DeleteFunc(slices.Clone(found), func(r rootPartition) bool { return !slices.Contains(started, filepath.Base(r.disk)) })
	switch {
	case len(here) == 1 && len(started) == 1:
		return here[0], nil
	case len(here) == 0 && len(started) == 1:
		return rootPartition{}, fmt.Errorf("this boot was started from %s, whose root is missing or damaged; another disk has it and is not used: %s",
			filepath.Join(f.dev, started[0]), disksOf(found))
	case f.from.known() && !there && waited < originTime:
		return rootPartition{}, fmt.Errorf("the disk that this boot was started from has not appeared; another one has the root: %s", disksOf(found))
	case len(here) > 0:
		found = here
	}
	if len(found) > 1 {
		if own := slices.DeleteFunc(slices.Clone(found), f.unprovisioned); len(own) > 0 {
			found = own
		}
	}
	if len(found) > 1 {
		return rootPartition{}, fmt.Errorf("several disks hold this release, and the firmware does not say which of them this boot was started from: %s; "+
			"none is used: leave one of them plugged in", disksOf(found))
	}
	return found[0], nil
}

// unprovisioned says whether the disk's volumes are as they came from the builder; of a
// disk without volumes nobody knows.
func (f *rootFinder) unprovisioned(r rootPartition) bool {
	if f.volume == "" {
		return false
	}
	dev, err := partition.OpenReadOnly(r.disk)
	if err != nil {
		return false
	}
	defer dev.Close()
	d, err := partition.Open(dev)
	if err != nil {
		return false
	}
	volume, _, err := d.Partition(f.volume)
	if err != nil {
		return false
	}
	fresh, err := partition.Unprovisioned(volume)
	return err == nil && fresh
}

func disksOf(found []rootPartition) string {
	var names []string
	for _, r := range found {
		names = append(names, r.disk)
	}
	return strings.Join(names, ", ")
}

// holdsRoot hashes the top of the tree the partition would have; a partition
// that is too small or cannot be read does not hold it.
func holdsRoot(device string, v image.Verity) bool {
	f, err := os.Open(device)
	if err != nil {
		return false
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil || size < v.TotalBytes {
		return false
	}
	hash, _, err := verity.RootHashOfTree(f, v.DataBlocks*verity.BlockSize)
	return err == nil && hex.EncodeToString(hash[:]) == v.RootHash
}

// isNamed says whether a boot entry of the partition's disk names this root for the
// slot that the partition is. Of an encrypted slot, no more can be known before the
// volumes are open; dm-verity then tells. number is the partition's file in /sys.
func isNamed(r rootPartition, number string, v image.Verity) bool {
	n, err := readNumber(number)
	if err != nil {
		return false
	}
	dev, err := partition.OpenReadOnly(r.disk)
	if err != nil {
		return false
	}
	defer dev.Close()
	d, err := partition.Open(dev)
	if err != nil || n < 1 || n > int64(len(d.Layout().Partitions)) {
		return false
	}
	entries, err := d.Entries()
	name := d.Layout().Partitions[n-1].Name
	return err == nil && slices.ContainsFunc(entries, func(e partition.Entry) bool {
		return e.RootHash == v.RootHash && e.Slot.Partition() == name
	})
}

// partitionDevice is the kernel's name for partition number n of disk.
func partitionDevice(disk string, n int) (string, error) {
	dirs, err := filepath.Glob(filepath.Join("/sys/class/block", filepath.Base(disk), "*", "partition"))
	if err != nil {
		return "", err
	}
	for _, p := range dirs {
		text, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(string(text)) == strconv.Itoa(n) {
			return "/dev/" + filepath.Base(filepath.Dir(p)), nil
		}
	}
	return "", fmt.Errorf("the kernel shows no partition %d on %s", n, disk)
}

// resizePartition tells the kernel the new end of a partition while others of
// the disk are in use (BLKPG_RESIZE_PARTITION, linux/blkpg.h).
func resizePartition(disk string, n int, startBytes, sizeBytes int64) error {
	f, err := os.OpenFile(disk, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := blkpgResize(int(f.Fd()), n, startBytes, sizeBytes); err != nil {
		return fmt.Errorf("tell the kernel that partition %d of %s has %d bytes: %w", n, disk, sizeBytes, err)
	}
	return nil
}
