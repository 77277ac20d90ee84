package oci

import (
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-os/holdfast/image/tree"
)

// Whiteouts, image-spec layer.md. Other names with the meta prefix are aufs's
// own and name no file.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// maxLinks is how many symbolic links Linux follows in one path.
const maxLinks = 40

// place is a name in a folder.
type place struct {
	dir  *tree.Node
	name string
}

// flattener lays layers over one tree, the lowest first.
type flattener struct {
	root     *tree.Node
	epochSec int64
	// touched are the places the current layer has written or gone through; its
	// own whiteouts leave them alone, wherever in the tar they stand.
	touched map[place]bool
}

func flatten(layers []*layer, o TreeOptions) (*tree.Node, error) {
	f := &flattener{root: tree.NewDir(0o755), epochSec: o.EpochSec}
	f.root.MTimeSec = o.EpochSec
	for i, l := range layers {
		f.touched = map[place]bool{}
		for j := range l.entries {
			if err := f.apply(&l.entries[j], l.whiteouts); err != nil {
				return nil, fmt.Errorf("layer %d of %d: %q: %w", i+1, len(layers), l.entries[j].path, err)
			}
		}
	}
	return f.root, nil
}

func (f *flattener) apply(e *entry, whiteouts bool) error {
	if e.path == "" {
		f.setAttributes(f.root, &e.node)
		return nil
	}
	parts := strings.Split(e.path, "/")
	parents, name := parts[:len(parts)-1], parts[len(parts)-1]
	if whiteouts {
		for _, p := range parents {
			if strings.HasPrefix(p, whiteoutPrefix) {
				return errors.New("an entry below a whiteout")
			}
		}
		if strings.HasPrefix(name, whiteoutPrefix) {
			return f.whiteout(parents, name)
		}
	}
	dir, err := f.folder(parents, true)
	if err != nil {
		return err
	}
	if dir.pathBytes+1+len(name) > maxPathBytes {
		return fmt.Errorf("path is longer than %d bytes behind symbolic links", maxPathBytes)
	}
	f.touched[place{dir.node, name}] = true
	if e.link != "" {
		return f.hardLink(dir.node, name, e.link)
	}
	if old := dir.node.Child(name); old != nil && old.IsDir() && e.node.IsDir() {
		f.setAttributes(old, &e.node)
		return nil
	}
	n := e.node
	n.MTimeSec = min(n.MTimeSec, f.epochSec)
	dir.node.Set(name, &n)
	return nil
}

// setAttributes gives a folder that keeps what it holds the attributes of from.
func (f *flattener) setAttributes(dir, from *tree.Node) {
	dir.Mode, dir.UID, dir.GID, dir.Xattrs = from.Mode, from.UID, from.GID, from.Xattrs
	dir.MTimeSec = min(from.MTimeSec, f.epochSec)
}

// hardLink gives the inode at target another name. It is the inode that is there
// now: a later layer that replaces one name leaves the other as it is.
func (f *flattener) hardLink(dir *tree.Node, name, target string) error {
	parts := strings.Split(target, "/")
	at, err := f.folder(parts[:len(parts)-1], false)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", target, err)
	}
	var n *tree.Node
	if at != nil {
		n = at.node.Child(parts[len(parts)-1])
	}
	if n == nil {
		return fmt.Errorf("hard link to %q, which is not there", target)
	}
	if n.IsDir() {
		return fmt.Errorf("hard link to %q, which is a folder", target)
	}
	dir.Set(name, n)
	return nil
}

// whiteout hides what lower layers put at a name, or all they put in a folder.
func (f *flattener) whiteout(parents []string, name string) error {
	hidden := strings.TrimPrefix(name, whiteoutPrefix)
	if name != whiteoutOpaque && strings.HasPrefix(name, whiteoutMeta) {
		return nil
	}
	if hidden == "" || hidden == "." || hidden == ".." {
		return errors.New("a whiteout of no name")
	}
	dir, err := f.folder(parents, false)
	if err != nil || dir == nil {
		return err
	}
	if name == whiteoutOpaque {
		f.hideLower(dir.node)
		return nil
	}
	child := dir.node.Child(hidden)
	switch {
	case !f.touched[place{dir.node, hidden}]:
		dir.node.Remove(hidden)
	case child.IsDir():
		f.hideLower(child)
	}
	return nil
}

// hideLower removes what this layer did not write.
func (f *flattener) hideLower(dir *tree.Node) {
	for _, name := range dir.Names() {
		if !f.touched[place{dir, name}] {
			dir.Remove(name)
		} else if child := dir.Child(name); child.IsDir() {
			f.hideLower(child)
		}
	}
}

// located is a folder and the length of its path, without a slash in front; -1 for
// the root, so that adding "/NAME" comes out right.
type located struct {
	node      *tree.Node
	pathBytes int
}

// folder walks down from the root, following symbolic links as a process with
// this root would, so never out of it. With create, missing folders are made and
// the way is touched; without, the result is nil when there is none.
func (f *flattener) folder(parts []string, create bool) (*located, error) {
	stack := []located{{f.root, -1}}
	for links := 0; len(parts) > 0; {
		name := parts[0]
		parts = parts[1:]
		at := stack[len(stack)-1]
		if name == "" || name == "." {
			continue
		}
		if name == ".." {
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		child := at.node.Child(name)
		if child == nil {
			if !create {
				return nil, nil
			}
			var err error
			if child, err = f.newFolder(at, name); err != nil {
				return nil, err
			}
		}
		if create {
			f.touched[place{at.node, name}] = true
		}
		switch child.Type() {
		case tree.TypeDir:
			stack = append(stack, located{child, at.pathBytes + 1 + len(name)})
		case tree.TypeSymlink:
			if links++; links > maxLinks {
				return nil, fmt.Errorf("more than %d symbolic links on the way", maxLinks)
			}
			if strings.HasPrefix(child.Target, "/") {
				stack = stack[:1]
			}
			parts = append(strings.Split(child.Target, "/"), parts...)
		default:
			if !create {
				return nil, nil
			}
			return nil, fmt.Errorf("%q on the way is not a folder", name)
		}
	}
	return &stack[len(stack)-1], nil
}

// newFolder makes a parent that no layer mentions.
func (f *flattener) newFolder(at located, name string) (*tree.Node, error) {
	if len(name) > maxNameBytes || at.pathBytes+1+len(name) > maxPathBytes {
		return nil, errors.New("a symbolic link on the way leads to a path that is too long")
	}
	n := tree.NewDir(0o755)
	n.MTimeSec = f.epochSec
	at.node.Set(name, n)
	return n, nil
}

// cloneClamped copies a tree, links and all, with the mtimes clamped.
func cloneClamped(n *tree.Node, epochSec int64, seen map[*tree.Node]*tree.Node) *tree.Node {
	if c := seen[n]; c != nil {
		return c
	}
	c := &tree.Node{Mode: n.Mode, UID: n.UID, GID: n.GID, MTimeSec: min(n.MTimeSec, epochSec),
		Major: n.Major, Minor: n.Minor, Target: n.Target, Xattrs: n.Xattrs, Content: n.Content}
	if !n.IsDir() {
		seen[n] = c
	}
	for _, name := range n.Names() {
		c.Set(name, cloneClamped(n.Child(name), epochSec, seen))
	}
	return c
}
