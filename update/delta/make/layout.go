package deltamake

import (
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/update/delta"
)

// extent is a run of blocks that belongs to one file, or to none: inodes, folders,
// small files, gaps.
type extent struct {
	path   string // "" for none
	first  int64
	blocks int64
}

func (e extent) end() int64 { return e.first + e.blocks }

// layout gives the extents of an image in order; together they are all of it.
func layout(root io.ReaderAt, dataBlocks int64) ([]extent, error) {
	l := lister{where: &where{ReaderAt: root}}
	var err error
	if l.fs, err = erofs.Open(l.where, dataBlocks*delta.BlockSize); err != nil {
		return nil, err
	}
	in, err := l.fs.Root()
	if err != nil {
		return nil, err
	}
	l.seen = map[uint64]bool{in.NID: true}
	if err := l.folder(in, "/"); err != nil {
		return nil, err
	}
	slices.SortFunc(l.files, func(a, b extent) int { return int(a.first - b.first) })
	var all []extent
	at := int64(0)
	for _, f := range l.files {
		if f.first < at || f.end() > dataBlocks {
			return nil, fmt.Errorf("%s has blocks %d to %d, which are not its own", f.path, f.first, f.end())
		}
		if f.first > at {
			all = append(all, extent{"", at, f.first - at})
		}
		all, at = append(all, f), f.end()
	}
	if at < dataBlocks {
		all = append(all, extent{"", at, dataBlocks - at})
	}
	return all, nil
}

// where notes the place of the last read: an inode does not tell where its data lies,
// but reading its first byte does.
type where struct {
	io.ReaderAt
	offset int64
}

func (w *where) ReadAt(b []byte, offset int64) (int, error) {
	w.offset = offset
	return w.ReaderAt.ReadAt(b, offset)
}

type lister struct {
	fs    *erofs.FS
	where *where
	seen  map[uint64]bool
	files []extent
}

func (l *lister) folder(in erofs.Inode, at string) error {
	entries, err := l.fs.ReadDir(in)
	if err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	for _, d := range entries {
		if l.seen[d.NID] {
			continue
		}
		l.seen[d.NID] = true
		p := path.Join(at, d.Name)
		child, err := l.fs.Inode(d.NID)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		switch {
		case child.Type() == tree.TypeDir:
			if err := l.folder(child, p); err != nil {
				return err
			}
		case child.Type() == tree.TypeRegular && child.SizeBytes > 0:
			if _, err := l.fs.Data(child).ReadAt(make([]byte, 1), 0); err != nil && err != io.EOF {
				return fmt.Errorf("%s: %w", p, err)
			}
			// What does not begin a block is packed between inodes.
			if l.where.offset%delta.BlockSize == 0 {
				l.files = append(l.files, extent{p, l.where.offset / delta.BlockSize, (child.SizeBytes + delta.BlockSize - 1) / delta.BlockSize})
			}
		}
	}
	return nil
}

// names finds the old file that is most likely the ancestor of a new one.
type names struct {
	byPath, byFolder, byName map[string]extent
	inodes                   extent // the first extent: superblock, inodes, small files
}

func newNames(files []extent) names {
	n := names{map[string]extent{}, map[string]extent{}, map[string]extent{}, files[0]}
	for _, f := range files {
		if f.path == "" {
			continue
		}
		n.byPath[f.path] = f
		folder, name := path.Split(f.path)
		n.byFolder[folder+withoutVersion(name)] = f
		n.byName[withoutVersion(name)] = f
	}
	return n
}

func (n names) ancestor(p string) (extent, bool) {
	if f, ok := n.byPath[p]; ok {
		return f, true
	}
	folder, name := path.Split(p)
	if f, ok := n.byFolder[folder+withoutVersion(name)]; ok {
		return f, true
	}
	f, ok := n.byName[withoutVersion(name)]
	return f, ok
}

// withoutVersion drops the digits: libssl.so.3.0.15 and libssl.so.3.0.9 are both libssl.so...
func withoutVersion(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, name)
}
