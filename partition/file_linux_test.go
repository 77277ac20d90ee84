package partition_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/partition"
)

// loopDevice is a block device over a file.
func loopDevice(t *testing.T, backing string, options ...string) string {
	t.Helper()
	out, err := exec.Command("losetup", append([]string{"--find", "--show", backing}, options...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s: block devices are tested with a loop device, as root: apt-get install mount", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

// backingFile is random from end to end.
func backingFile(t *testing.T, sizeBytes int64) string {
	t.Helper()
	return export(t, noise(sizeBytes), sizeBytes)
}

// TestBlockDevice makes and updates a disk on a block device, and finds the same bytes
// in an image file.
func TestBlockDevice(t *testing.T) {
	const size = 160 * mib
	backing := backingFile(t, size)
	loop := loopDevice(t, backing)
	dev, err := partition.OpenFile(loop)
	if err != nil {
		t.Fatal(err)
	}
	if dev.Size() != size {
		t.Fatalf("%s has %d bytes, want %d", loop, dev.Size(), size)
	}
	if _, err := dev.WriteAt([]byte{1}, size); err == nil {
		t.Error("a write past the end succeeded")
	}
	file := noise(size)
	for _, on := range []partition.Device{dev, file} {
		d := newDisk(t, on)
		write(t, d, partition.SlotA, 1, partition.WriteOptions{})
		write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3, Running: partition.SlotA})
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := partition.OpenReadOnly(backing)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if a, b := hashOf(t, again, size), hashOf(t, file, size); a != b {
		t.Errorf("behind the block device is SHA-256 %x, in memory %x", a, b)
	}
}

// TestBlockDeviceReadBack: what is read after a Sync comes from the medium and not
// from what was sent there. The medium is a file that is changed behind the kernel's back.
func TestBlockDeviceReadBack(t *testing.T) {
	const size = 160 * mib
	backing := backingFile(t, size)
	dev, err := partition.OpenFile(loopDevice(t, backing))
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	medium, err := os.OpenFile(backing, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer medium.Close()

	sent, got := bytes.Repeat([]byte("sent"), mib), make([]byte, 4*mib)
	if _, err := dev.WriteAt(sent, 8*mib); err != nil {
		t.Fatal(err)
	}
	if err := dev.Sync(); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{8 * mib, 9*mib + 12345, 12*mib - 1} {
		if _, err := medium.WriteAt([]byte{'X'}, off); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := dev.ReadAt(got, 8*mib); err != nil {
		t.Fatal(err)
	}
	if got[0] != 'X' || got[mib+12345] != 'X' || got[4*mib-1] != 'X' || bytes.Count(got, []byte{'X'}) != 3 {
		t.Error("what was read back is what was sent, and not what the medium has")
	}

	// A release on a medium that loses a byte of it is not made bootable.
	losing := &lossy{File: dev}
	d := newDisk(t, losing)
	write(t, d, partition.SlotA, 1, partition.WriteOptions{})
	_, part, err := d.Partition(partition.RootBName)
	if err != nil {
		t.Fatal(err)
	}
	c := release(2)
	c.Verify = nil
	p, err := d.PlanSlot(partition.SlotB, c, partition.WriteOptions{Tries: 3, Running: partition.SlotA})
	if err != nil {
		t.Fatal(err)
	}
	err = p.Apply(t.Context(), func(done, _ int64) {
		if done == c.Root.Size() {
			losing.synced = func() {
				if _, err := medium.WriteAt([]byte("lost"), part.StartBytes+mib); err != nil {
					t.Error(err)
				}
			}
		}
	})
	if err == nil || !strings.Contains(err.Error(), "it does not keep what is written") {
		t.Errorf("a medium that lost bytes: %v", err)
	}
	if e := entries(t, d); len(e) != 1 || e[0].Slot != partition.SlotA {
		t.Errorf("boot entries: %+v", e)
	}
}

// lossy does something to what it has just taken, once.
type lossy struct {
	*partition.File
	synced func()
}

func (l *lossy) Sync() error {
	err := l.File.Sync()
	if l.synced != nil {
		l.synced()
		l.synced = nil
	}
	return err
}

// TestBlockDeviceInUse is refused, and what only reads is not.
func TestBlockDeviceInUse(t *testing.T) {
	loop := loopDevice(t, backingFile(t, 8*mib))
	claimed, err := partition.OpenFile(loop)
	if err != nil {
		t.Fatal(err)
	}
	wantInUse := func(by string) {
		t.Helper()
		if f, err := partition.OpenFile(loop); !errors.Is(err, partition.ErrInUse) {
			t.Errorf("in use by %s: %v, %v", by, f, err)
		}
		ro, err := partition.OpenReadOnly(loop)
		if err != nil {
			t.Fatal(err)
		}
		if err := ro.Close(); err != nil {
			t.Error(err)
		}
	}
	wantInUse("another process that writes a disk")
	if err := claimed.Close(); err != nil {
		t.Fatal(err)
	}
	run(t, "e2fsprogs", "mke2fs", "-q", "-F", loop)
	at := t.TempDir()
	run(t, "mount", "mount", loop, at)
	wantInUse("a mount")
	run(t, "mount", "umount", at)
	free, err := partition.OpenFile(loop)
	if err != nil {
		t.Fatal(err)
	}
	if err := free.Close(); err != nil {
		t.Error(err)
	}
}

// TestBlockDeviceUnfit: what would fail later, or be found by nobody, is refused at once.
func TestBlockDeviceUnfit(t *testing.T) {
	backing := backingFile(t, 8*mib)
	for option, want := range map[string]string{"--read-only": "write-protected", "--sector-size=4096": "logical sectors of 4096 bytes"} {
		loop := loopDevice(t, backing, option)
		if _, err := partition.OpenFile(loop); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", option, err)
		}
	}
}
