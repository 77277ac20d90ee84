package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// efivarsPath is where the kernel shows the firmware's variables, mounted read-only.
const efivarsPath = "/sys/firmware/efi/efivars"

// maxVariableBytes is more than any variable has; one that is larger is not read whole.
const maxVariableBytes = sigdb.MaxBytes

// efivarfs is [EFIVars] by the kernel's file system (Documentation/filesystems/efivarfs).
// A file NAME-GUID has four bytes of attributes and the value.
type efivarfs struct{ dir string }

const efiAttributeBytes = 4

const fsImmutable = 0x10 // FS_IMMUTABLE_FL, linux/fs.h

func (e efivarfs) path(v EFIVar) string { return filepath.Join(e.dir, v.Name+"-"+v.Vendor.String()) }

func (e efivarfs) Read(v EFIVar) (attributes uint32, value []byte, err error) {
	f, err := os.Open(e.path(v))
	if err != nil {
		return 0, nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxVariableBytes+efiAttributeBytes+1))
	switch {
	case err != nil:
		return 0, nil, err
	case len(b) == 0: // made, and never written
		return 0, nil, &fs.PathError{Op: "read", Path: e.path(v), Err: fs.ErrNotExist}
	case len(b) < efiAttributeBytes || len(b) > maxVariableBytes+efiAttributeBytes:
		return 0, nil, fmt.Errorf("firmware variable %s has %d bytes", v.Name, len(b))
	}
	return binary.LittleEndian.Uint32(b), b[efiAttributeBytes:], nil
}

func (e efivarfs) Write(v EFIVar, attributes uint32, value []byte) error {
	return e.write(v, attributes, value)
}

func (e efivarfs) Append(v EFIVar, attributes uint32, value []byte) error {
	return e.write(v, attributes|sigdb.AppendWrite, value)
}

// write makes one write(2) of attributes and value, which is one SetVariable. The
// kernel marks files immutable against rm -rf, and the mount is read-only for the rest
// of the time.
func (e efivarfs) write(v EFIVar, attributes uint32, value []byte) (err error) {
	again, err := e.writable()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, again()) }()
	path := e.path(v)
	_, before := os.Lstat(path)
	restore, err := clearImmutable(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer restore()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(binary.LittleEndian.AppendUint32(nil, attributes), value...))
	err = errors.Join(err, f.Close())
	if err != nil && errors.Is(before, fs.ErrNotExist) {
		// An empty file that is no variable would be left.
		if info, gone := os.Lstat(path); gone == nil && info.Size() == 0 {
			err = errors.Join(err, os.Remove(path))
		}
	}
	return err
}

// writable remounts the file system if it has to; again undoes that.
func (e efivarfs) writable() (again func() error, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(e.dir, &st); err != nil {
		return nil, &fs.PathError{Op: "statfs", Path: e.dir, Err: err}
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return func() error { return nil }, nil
	}
	remount := func(flags uintptr) error {
		return mount("efivarfs", e.dir, "efivarfs", unix.MS_REMOUNT|safeFlags|flags, "")
	}
	if err := remount(0); err != nil {
		return nil, err
	}
	return func() error { return remount(unix.MS_RDONLY) }, nil
}

// clearImmutable takes the flag off a file; restore puts it back. A file system that
// has no such flags has nothing to take off.
func clearImmutable(path string) (restore func(), err error) {
	restore = func() {}
	f, err := os.Open(path)
	if err != nil {
		return restore, err
	}
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&fsImmutable == 0 {
		return restore, nil
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags&^fsImmutable)); err != nil {
		return restore, &fs.PathError{Op: "make mutable", Path: path, Err: err}
	}
	return func() {
		f, err := os.Open(path)
		if err != nil {
			return // the write removed it
		}
		defer f.Close()
		// The flag is against accidents only; without it nothing is lost.
		_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags))
	}, nil
}

func (e efivarfs) List() ([]EFIVar, error) {
	entries, err := os.ReadDir(e.dir)
	if err != nil {
		return nil, err
	}
	var list []EFIVar
	for _, entry := range entries {
		const guidText = len("8be4df61-93ca-11d2-aa0d-00e098032b8c")
		name := entry.Name()
		cut := len(name) - guidText
		if cut < 2 || name[cut-1] != '-' {
			continue
		}
		if id, err := uuid.Parse(name[cut:]); err == nil {
			list = append(list, EFIVar{name[:cut-1], sigdb.FromUUID(id)})
		}
	}
	return list, nil
}

// FreeBytes is what the kernel has of QueryVariableInfo, from Linux 6.7 on.
func (e efivarfs) FreeBytes() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(e.dir, &st); err != nil {
		return -1, &fs.PathError{Op: "statfs", Path: e.dir, Err: err}
	}
	if st.Blocks == 0 {
		return -1, nil
	}
	return int64(st.Bavail) * st.Bsize, nil
}
