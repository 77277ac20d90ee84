package erofs

import (
	"errors"
	"fmt"
	"path"

	"github.com/holdfast-os/holdfast/image/tree"
)

// Tree reads everything but the contents of files, which are read from the image
// when they are opened. Two names of one inode lead to one node, so [Write]
// makes an equal image of it.
func (f *FS) Tree() (*tree.Node, error) {
	// In an honest image only shared attributes are read more than once, so
	// reading every inode costs little more than the image is long. Garbage can
	// name the same blocks again and again.
	t := treeReader{f: f, seen: map[uint64]*tree.Node{}, budgetBytes: 4*f.size + 1<<20}
	root, err := f.Root()
	if err != nil {
		return nil, err
	}
	if root.Type() != tree.TypeDir {
		return nil, fmt.Errorf("the root of the EROFS image, inode %d, is no folder", root.NID)
	}
	return t.node(root, root, "/", 0)
}

type treeReader struct {
	f           *FS
	seen        map[uint64]*tree.Node
	budgetBytes int64
}

// spend refuses to read more than an honest image could hold.
func (t *treeReader) spend(bytes int64) error {
	if t.budgetBytes -= bytes; t.budgetBytes < 0 {
		return fmt.Errorf("its inodes overlap: reading them takes more than the image's %d bytes allow", t.f.size)
	}
	return nil
}

// node reads n, found at p in the folder parent.
func (t *treeReader) node(n, parent Inode, p string, depth int) (*tree.Node, error) {
	// Only what a node costs to hold is spent; hard links cost it once.
	cost := inodeCompactSize + n.xattrBytes
	if n.Type() != tree.TypeRegular {
		cost += n.SizeBytes
	}
	if err := t.spend(cost); err != nil {
		return nil, fmt.Errorf("read %s from EROFS: %w", p, err)
	}
	xattrs, err := t.f.Xattrs(n)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	node := &tree.Node{Mode: n.Mode, UID: n.UID, GID: n.GID, MTimeSec: n.MTimeSec, Major: n.Major, Minor: n.Minor, Xattrs: xattrs}
	node.SortXattrs()
	if _, err := encodeXattrs(node.Xattrs); err != nil {
		return nil, fmt.Errorf("read %s from EROFS: %w", p, err)
	}
	for _, x := range xattrs { // shared attributes lie elsewhere
		if err := t.spend(int64(len(x.Value))); err != nil {
			return nil, fmt.Errorf("read %s from EROFS: %w", p, err)
		}
	}
	t.seen[n.NID] = node
	switch n.Type() {
	case tree.TypeRegular:
		if n.SizeBytes > 0 {
			node.Content = inodeData{t.f, n}
		}
	case tree.TypeSymlink:
		if node.Target, err = t.f.ReadLink(n); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
	case tree.TypeDir:
		if depth > maxDepth-1 {
			return nil, fmt.Errorf("read %s from EROFS: more than %d folders inside each other", p, maxDepth)
		}
		return node, t.fill(node, n, parent, p, depth)
	}
	return node, nil
}

// fill reads the entries of a folder into its node.
func (t *treeReader) fill(node *tree.Node, n, parent Inode, p string, depth int) error {
	entries, err := t.f.readDir(n)
	if err != nil {
		return fmt.Errorf("read folder %s from EROFS: %w", p, err)
	}
	for _, d := range entries {
		if d.Name == "." {
			continue
		}
		if d.Name == ".." {
			if d.NID != parent.NID {
				return fmt.Errorf("read folder %s from EROFS: its \"..\" is inode %d, not %d", p, d.NID, parent.NID)
			}
			continue
		}
		child := t.seen[d.NID]
		if child == nil {
			in, err := t.f.Inode(d.NID)
			if err != nil {
				return fmt.Errorf("read %s: %w", path.Join(p, d.Name), err)
			}
			if child, err = t.node(in, n, path.Join(p, d.Name), depth+1); err != nil {
				return err
			}
		} else if child.IsDir() {
			return fmt.Errorf("read %s from EROFS: %w", path.Join(p, d.Name), errors.New("the folder is in the tree twice"))
		}
		node.Set(d.Name, child)
	}
	return nil
}
