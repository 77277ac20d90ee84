package erofs

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/tree"
)

// diskFile is a file on the machine that runs the test.
type diskFile struct {
	path string
	size int64
}

func (d diskFile) Size() int64                  { return d.size }
func (d diskFile) Open() (io.ReadCloser, error) { return os.Open(d.path) }

// fromDisk is the tree below a folder on the machine that runs the test.
func fromDisk(t testing.TB, dir string) *tree.Node {
	t.Helper()
	seen := map[uint64]*tree.Node{}
	n, err := diskNode(dir, seen)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func diskNode(p string, seen map[uint64]*tree.Node) (*tree.Node, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return nil, err
	}
	if n := seen[st.Ino]; n != nil {
		return n, nil
	}
	n := &tree.Node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, MTimeSec: st.Mtim.Sec}
	seen[st.Ino] = n
	var err error
	switch n.Type() {
	case tree.TypeSymlink:
		n.Target, err = os.Readlink(p)
	case tree.TypeRegular:
		n.Content = diskFile{p, st.Size}
	case tree.TypeChar, tree.TypeBlock:
		n.Major, n.Minor = uint32(st.Rdev>>8&0xfff), uint32(st.Rdev&0xff|st.Rdev>>12&^0xff)
	case tree.TypeDir:
		entries, err := os.ReadDir(p)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			child, err := diskNode(filepath.Join(p, e.Name()), seen)
			if err != nil {
				return nil, err
			}
			n.Set(e.Name(), child)
		}
	}
	if err != nil {
		return nil, err
	}
	n.Xattrs, err = diskXattrs(p)
	return n, err
}

func diskXattrs(p string) ([]tree.Xattr, error) {
	list := make([]byte, 1<<16)
	size, err := unix.Llistxattr(p, list)
	if err != nil {
		return nil, nil // the file system has none
	}
	var n tree.Node
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:size]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		got, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			return nil, err
		}
		n.Xattrs = append(n.Xattrs, tree.Xattr{Name: name, Value: bytes.Clone(value[:got])})
	}
	n.SortXattrs()
	return n.Xattrs, nil
}
