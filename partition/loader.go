package partition

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/holdfast-os/holdfast/partition/fat32"
)

// maxLoaderBytes is many times what systemd-boot has.
const maxLoaderBytes = 4 << 20

// Loader is one of the two copies of the boot loader. Firmware starts the one below
// EFI/BOOT by itself, without any EFI variable; the other is where bootctl and its
// users expect systemd-boot, and starts by a boot entry of the firmware's.
type Loader struct {
	Path    string // on the ESP
	Content []byte
	// Damage says why there is no content; of a copy that is missing it is [fs.ErrNotExist].
	Damage error
}

// Loaders reads both copies, the one that firmware starts by itself first. What is in
// them is not judged here.
func (d *Disk) Loaders() ([]Loader, error) {
	esp, _, err := d.openESP()
	if err != nil {
		return nil, err
	}
	var list []Loader
	for _, at := range []string{d.arch.fallbackPath(), d.arch.managedPath()} {
		l := Loader{Path: at}
		l.Content, l.Damage = readLoader(esp, at)
		list = append(list, l)
	}
	return list, nil
}

func readLoader(esp *fat32.FS, at string) ([]byte, error) {
	f, err := esp.Open(at)
	if err != nil {
		return nil, err
	}
	if f.Size() > maxLoaderBytes {
		return nil, fmt.Errorf("%s has %s, and no boot loader is larger than %s", at, mib(f.Size()), mib(maxLoaderBytes))
	}
	content := make([]byte, f.Size())
	if n, err := f.ReadAt(content, 0); n < len(content) {
		return nil, fmt.Errorf("read %s: %w", at, errors.Join(err, io.ErrUnexpectedEOF))
	}
	return content, nil
}

// RestoreLoader gives the copy at path, one of those of [Disk.Loaders], this content and
// reads it back. What was there stays until the new content is on the medium, and the
// other copy is not touched: a cut at any moment leaves both as they were, or one better.
func (d *Disk) RestoreLoader(path string, content Blob, mtime time.Time) error {
	if path != d.arch.fallbackPath() && path != d.arch.managedPath() {
		return fmt.Errorf("restore the boot loader: %q is no place of it", path)
	}
	esp, _, err := d.openESP()
	if err == nil {
		err = putFile(esp, path, content, mtime, &meter{ctx: context.Background()})
	}
	if err != nil {
		return fmt.Errorf("restore the boot loader: %w", err)
	}
	return nil
}

// putFile writes a file of the ESP and reads it back. The old content stays when
// the blob is not what it should be.
func putFile(esp *fat32.FS, at string, b Blob, mtime time.Time, m *meter) (err error) {
	r, err := openVerified(b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if err := esp.WriteFile(at, b.Size(), io.TeeReader(r, m), mtime); err != nil {
		return err
	}
	f, err := esp.Open(at)
	if err != nil {
		return err
	}
	if err := readBack(f, b, m); err != nil {
		return fmt.Errorf("read back %s: %w", at, err)
	}
	return nil
}
