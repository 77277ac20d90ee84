package oci

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/tree"
)

// dir opens a folder of the build machine: owners, modes, times, devices,
// extended attributes and hard links as lstat tells them. Sockets are left out;
// they mean nothing without the process that listens.
func (op *opener) dir(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a folder; a tar is written tar:%s", path, path)
	}
	w := dirWalker{op: op, inodes: map[[2]uint64]*tree.Node{}}
	// The folder itself may be a link, what is in it may not lead out.
	if op.im.folder, err = w.node(path+"/.", 0); err != nil {
		return err
	}
	sum := newAsideHash(nil)
	defer sum.Close()
	if err := TarFromTree(sum, cloneClamped(op.im.folder, 0, map[*tree.Node]*tree.Node{})); err != nil {
		return err
	}
	op.im.Digest = sum.digest().String()
	return nil
}

// noTime is the time of everything in a folder of the build machine: none of its
// own, as a checkout has the time at which it was made. Clamping turns it into the
// epoch.
const noTime = math.MaxInt64

type dirWalker struct {
	op     *opener
	inodes map[[2]uint64]*tree.Node // by device and inode, those with several names
	count  int
}

func (w *dirWalker) node(path string, depth int) (*tree.Node, error) {
	if err := w.op.ctx.Err(); err != nil {
		return nil, err
	}
	if w.count++; w.count > maxEntries {
		return nil, fmt.Errorf("more than %d files", maxEntries)
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	st := info.Sys().(*syscall.Stat_t)
	id := [2]uint64{uint64(st.Dev), st.Ino}
	if n := w.inodes[id]; n != nil {
		return n, nil
	}
	n := &tree.Node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, MTimeSec: noTime}
	if n.Type() == tree.TypeSocket {
		return nil, nil
	}
	if n.Xattrs, err = pathXattrs(path); err != nil {
		return nil, fmt.Errorf("read extended attributes of %s: %w", path, err)
	}
	if st.Nlink > 1 && !n.IsDir() {
		w.inodes[id] = n
	}
	switch n.Type() {
	case tree.TypeDir:
		return n, w.children(n, path, depth)
	case tree.TypeSymlink:
		n.Target, err = os.Readlink(path)
		return n, err
	case tree.TypeChar, tree.TypeBlock:
		n.Major, n.Minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))
	case tree.TypeRegular:
		n.Content = hostFile{path, info}
	}
	return n, nil
}

func (w *dirWalker) children(n *tree.Node, path string, depth int) error {
	if depth > maxPathBytes/2 {
		return fmt.Errorf("%s: folders too deep", path)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		child, err := w.node(filepath.Join(path, e.Name()), depth+1)
		if err != nil {
			return err
		}
		if child != nil {
			n.Set(e.Name(), child)
		}
	}
	return nil
}

// pathXattrs lists extended attributes without following a symbolic link. POSIX
// ACLs and capabilities are among them.
func pathXattrs(path string) ([]tree.Xattr, error) {
	names := make([]byte, maxXattrBytes) // XATTR_LIST_MAX is the same
	size, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.ENOTSUP) || size <= 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var n tree.Node
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:size]), "\x00"), "\x00") {
		value := make([]byte, maxXattrBytes)
		size, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		n.Xattrs = append(n.Xattrs, tree.Xattr{Name: name, Value: append([]byte{}, value[:size]...)})
	}
	n.SortXattrs()
	return n.Xattrs, nil
}

// hostFile is a file of the folder, which must still be the one that was hashed
// when it is read.
type hostFile struct {
	path string
	info fs.FileInfo
}

// Size is what lstat said.
func (f hostFile) Size() int64 { return f.info.Size() }

// Open checks that it is the same file with the same size and time.
func (f hostFile) Open() (io.ReadCloser, error) {
	r, err := os.OpenFile(f.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	now, err := r.Stat()
	if err == nil && (!os.SameFile(f.info, now) || now.Size() != f.info.Size() || !now.ModTime().Equal(f.info.ModTime())) {
		err = fmt.Errorf("%s changed during the build; build again when nothing writes to it", f.path)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}
