// Command judge is the first process of the system that authenticatedVolume has
// cryptsetup judge in. /dev/vda is a disk of ours, with a volume on its last
// partition; /dev/vdb is for a volume of cryptsetup's, /dev/vdc for one without
// integrity. The kernel's command line has key=, the passphrase of all.
//
//	OURS SHA256         of the record on our volume, mapped by cryptsetup
//	THEIRS ok           we map what cryptsetup made and read what was written to it
//	TAMPERED ERROR      reading what was changed below that
//	SPEED NAME W R      MB/s through a mapping, written and read
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/dm"
	"github.com/holdfast-os/holdfast/hwtest/guest"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

func main() {
	err := guest.Start()
	if err == nil {
		err = judge()
	}
	guest.End(err)
}

func judge() error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	_, key, _ := strings.Cut(string(cmdline), "key=")
	key = strings.Fields(key)[0]
	if err := os.WriteFile("/run/key", []byte(key), 0o600); err != nil {
		return err
	}
	for _, step := range []func() error{ours, func() error { return theirs(key) }, plain} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// ours maps the volume that the agent made.
func ours() error {
	disks, err := filepath.Glob("/dev/vda?")
	if err != nil || len(disks) == 0 {
		return fmt.Errorf("partitions of /dev/vda: %q, %v", disks, err)
	}
	volume := disks[len(disks)-1]
	if _, err := guest.Run("cryptsetup", "open", "--readonly", "--type", "luks2", "--key-file", "/run/key", volume, "ours"); err != nil {
		return err
	}
	status, err := guest.Run("cryptsetup", "status", "ours")
	if err != nil {
		return err
	}
	for line := range strings.Lines(status) {
		fmt.Println("STATUS", strings.Join(strings.Fields(line), " "))
	}
	if err := os.MkdirAll("/mnt", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/dev/mapper/ours", "/mnt", "ext4", unix.MS_RDONLY, "noload"); err != nil {
		return fmt.Errorf("mount what cryptsetup mapped: %w", err)
	}
	record, err := os.ReadFile("/mnt/records/first")
	if err != nil {
		return err
	}
	fmt.Printf("OURS %x\n", sha256.Sum256(record))
	if err := unix.Unmount("/mnt", 0); err != nil {
		return err
	}
	_, err = guest.Run("cryptsetup", "close", "ours")
	return err
}

const testBytes = 24 << 20

// theirs has cryptsetup make a volume, writes to it, and maps it by our code.
func theirs(passphrase string) error {
	const disk = "/dev/vdb"
	for _, argv := range [][]string{
		{"luksFormat", "-q", "--type", "luks2", "--integrity", luks2.HMACSHA256, "--sector-size", "4096", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", disk, "/run/key"},
		{"open", "--key-file", "/run/key", disk, "theirs"},
	} {
		if _, err := guest.Run("cryptsetup", argv...); err != nil {
			return err
		}
	}
	pattern := bytes.Repeat([]byte("holdfast"), testBytes/8)
	if err := speed("integrity", "/dev/mapper/theirs", pattern); err != nil {
		return err
	}
	if _, err := guest.Run("cryptsetup", "close", "theirs"); err != nil {
		return err
	}
	node, err := mapped(disk, passphrase)
	if err != nil {
		return err
	}
	got, err := read(node, len(pattern))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, pattern) {
		return errors.New("we read something else from cryptsetup's volume")
	}
	fmt.Println("THEIRS ok")
	if err := dm.Remove("judge"); err != nil {
		return err
	}
	return tampered(disk, passphrase)
}

func mapped(disk, passphrase string) (string, error) {
	f, err := os.Open(disk)
	if err != nil {
		return "", err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return "", err
	}
	h, _, err := luks2.Read(f, size)
	if err != nil {
		return "", err
	}
	key, _, err := h.Unlock(f, []byte(passphrase))
	if err != nil {
		return "", err
	}
	offset, bytes, sector, _ := h.Segment()
	return dm.AuthenticatedCrypt("judge", disk, key, offset, bytes, sector)
}

// tampered flips a bit in the middle of what was written.
func tampered(disk, passphrase string) error {
	f, err := os.OpenFile(disk, os.O_RDWR|unix.O_SYNC, 0)
	if err != nil {
		return err
	}
	b, at := make([]byte, 1), int64(32<<20)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	node, err := mapped(disk, passphrase)
	if err != nil {
		return err
	}
	_, err = read(node, testBytes)
	fmt.Println("TAMPERED", errors.Is(err, unix.EILSEQ), err)
	return dm.Remove("judge")
}

// plain is the speed without integrity.
func plain() error {
	const disk = "/dev/vdc"
	for _, argv := range [][]string{
		{"luksFormat", "-q", "--type", "luks2", "--sector-size", "4096", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", disk, "/run/key"},
		{"open", "--key-file", "/run/key", disk, "plain"},
	} {
		if _, err := guest.Run("cryptsetup", argv...); err != nil {
			return err
		}
	}
	return speed("plain", "/dev/mapper/plain", bytes.Repeat([]byte("holdfast"), testBytes/8))
}

// speed writes the pattern to the device's start and reads it, past the page cache.
func speed(name, device string, pattern []byte) error {
	began := time.Now()
	if err := write(device, pattern); err != nil {
		return err
	}
	wrote := time.Since(began)
	began = time.Now()
	got, err := read(device, len(pattern))
	if err != nil {
		return err
	}
	took := time.Since(began)
	if !bytes.Equal(got, pattern) {
		return fmt.Errorf("%s: read something else than was written", device)
	}
	rate := func(d time.Duration) float64 { return float64(len(pattern)) / 1e6 / d.Seconds() }
	fmt.Printf("SPEED %s %.1f %.1f\n", name, rate(wrote), rate(took))
	return nil
}

const chunk = 1 << 20

func write(device string, b []byte) error {
	return direct(device, func(fd int, page []byte) error {
		for off := 0; off < len(b); off += chunk {
			copy(page, b[off:])
			if n, err := unix.Pwrite(fd, page, int64(off)); err != nil || n != chunk {
				return fmt.Errorf("write %s at %d: %d bytes, %w", device, off, n, err)
			}
		}
		return unix.Fsync(fd)
	})
}

func read(device string, n int) (out []byte, err error) {
	err = direct(device, func(fd int, page []byte) error {
		for off := 0; off < n; off += chunk {
			if n, err := unix.Pread(fd, page, int64(off)); err != nil || n != chunk {
				return fmt.Errorf("read %s at %d: %d bytes, %w", device, off, n, err)
			}
			out = append(out, page...)
		}
		return nil
	})
	return out, err
}

func direct(device string, use func(fd int, page []byte) error) error {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", device, err)
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(-1, 0, chunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	return use(fd, page)
}
