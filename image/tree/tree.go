// Package tree is a file system in memory without its file contents: the
// inodes, names and attributes that composing container layers produces and
// that a file system writer consumes.
//
// A [Node] is an inode. Two names that lead to one *Node are hard links, so
// identity, not equality, decides what shares storage. Contents stay where they
// are (a cached layer, a file on the build machine) and are opened when the
// writer reaches them, so memory grows with the number of files and not with
// their size.
//
// Nothing here reads a clock or walks a map in its natural order: the same
// operations give the same tree, and [Node.Names] is sorted.
package tree

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
)

// File type bits of [Node.Mode], as in POSIX st_mode and inode(7).
const (
	TypeMask    = 0o170000
	TypeSocket  = 0o140000
	TypeSymlink = 0o120000
	TypeRegular = 0o100000
	TypeBlock   = 0o060000
	TypeDir     = 0o040000
	TypeChar    = 0o020000
	TypeFIFO    = 0o010000
)

// Content is the data of a regular file.
type Content interface {
	// Size is the length in bytes. Open's reader gives exactly that many.
	Size() int64
	Open() (io.ReadCloser, error)
}

// Xattr is one extended attribute; Name carries its prefix ("security.capability").
type Xattr struct {
	Name  string
	Value []byte
}

// Node is an inode.
type Node struct {
	Mode     uint32 // st_mode: type, setuid, setgid, sticky and permission bits
	UID, GID uint32
	// MTimeSec is the modification time in seconds since 1970, already clamped
	// to the build's epoch by whoever made the node.
	MTimeSec int64
	// Major and Minor identify a character or block device.
	Major, Minor uint32
	Target       string  // of a symbolic link
	Xattrs       []Xattr // sorted by name
	Content      Content // of a regular file; nil means empty

	children map[string]*Node
}

// NewDir returns an empty folder owned by root.
func NewDir(perm uint32) *Node {
	return &Node{Mode: TypeDir | perm&0o7777, children: map[string]*Node{}}
}

// Type is the file type bits of the mode.
func (n *Node) Type() uint32 { return n.Mode & TypeMask }

// IsDir says whether n is a folder.
func (n *Node) IsDir() bool { return n.Type() == TypeDir }

// Names lists the folder's entries, sorted by byte value.
func (n *Node) Names() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Child is the entry of that name, or nil.
func (n *Node) Child(name string) *Node { return n.children[name] }

// Set makes name lead to child, replacing what was there.
func (n *Node) Set(name string, child *Node) {
	if n.children == nil {
		n.children = map[string]*Node{}
	}
	n.children[name] = child
}

// Remove deletes the entry and, for a folder, everything below it.
func (n *Node) Remove(name string) { delete(n.children, name) }

// Clear empties a folder; an opaque whiteout does that.
func (n *Node) Clear() { clear(n.children) }

// SortXattrs puts the attributes in the order writers rely on.
func (n *Node) SortXattrs() {
	slices.SortFunc(n.Xattrs, func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
}

// Split cleans a slash-separated path into its elements, relative to the root:
// "./etc//motd" and "/etc/motd" are both [etc motd], and ".." never leaves the root.
func Split(p string) []string {
	p = path.Clean("/" + p)
	if p == "/" {
		return nil
	}
	return strings.Split(p[1:], "/")
}

// Lookup returns the node at p without following symbolic links, or nil.
func (n *Node) Lookup(p string) *Node {
	for _, name := range Split(p) {
		if n == nil || !n.IsDir() {
			return nil
		}
		n = n.Child(name)
	}
	return n
}

// MkdirAll returns the folder at p, making what is missing with mode 0755,
// owner root and the given time.
func (n *Node) MkdirAll(p string, mtimeSec int64) (*Node, error) {
	at := ""
	for _, name := range Split(p) {
		at += "/" + name
		next := n.Child(name)
		if next == nil {
			next = NewDir(0o755)
			next.MTimeSec = mtimeSec
			n.Set(name, next)
		}
		if !next.IsDir() {
			return nil, fmt.Errorf("make folder %s: %s exists and is not a folder", p, at)
		}
		n = next
	}
	return n, nil
}

// Put places child at p, making parent folders as [Node.MkdirAll] does.
func (n *Node) Put(p string, child *Node) error {
	parts := Split(p)
	if len(parts) == 0 {
		return fmt.Errorf("put at %q: that is the root", p)
	}
	parent, err := n.MkdirAll(strings.Join(parts[:len(parts)-1], "/"), child.MTimeSec)
	if err != nil {
		return err
	}
	parent.Set(parts[len(parts)-1], child)
	return nil
}

// Walk calls fn for n and everything below it, parents before children and
// siblings in the order of [Node.Names]. Paths start with "/"; the root's is "/".
// A node with two names is visited twice.
func (n *Node) Walk(fn func(path string, n *Node) error) error {
	return n.walk("/", fn)
}

func (n *Node) walk(p string, fn func(string, *Node) error) error {
	if err := fn(p, n); err != nil {
		return err
	}
	for _, name := range n.Names() {
		if err := n.Child(name).walk(path.Join(p, name), fn); err != nil {
			return err
		}
	}
	return nil
}

// Bytes is content held in memory, for the small files a build generates.
type Bytes []byte

// Size is the number of bytes.
func (b Bytes) Size() int64 { return int64(len(b)) }

// Open reads the bytes.
func (b Bytes) Open() (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader(string(b))), nil
}

// Section is content that lies inside something larger, such as a file in a
// cached, uncompressed layer.
type Section struct {
	R              io.ReaderAt
	Off, SizeBytes int64
}

// Size is SizeBytes.
func (s Section) Size() int64 { return s.SizeBytes }

// Open reads the section.
func (s Section) Open() (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(s.R, s.Off, s.SizeBytes)), nil
}

// File is content that lies in a file of the build machine, opened when it is read.
type File struct {
	Path      string
	SizeBytes int64
}

// Size is SizeBytes.
func (f File) Size() int64 { return f.SizeBytes }

// Open opens the file.
func (f File) Open() (io.ReadCloser, error) { return os.Open(f.Path) }

// CloneDirs copies the folders below n and shares everything else, so that the
// copy's names can change while files are stored once.
func (n *Node) CloneDirs() *Node {
	c := *n
	c.children = make(map[string]*Node, len(n.children))
	for name, child := range n.children {
		if child.IsDir() {
			child = child.CloneDirs()
		}
		c.children[name] = child
	}
	return &c
}

// Merge lays the tree from over n, as a layer lies over the ones below it: a
// folder over a folder keeps what it holds and takes the attributes, anything
// else replaces. The trees share nodes afterwards, so from is used up.
func (n *Node) Merge(from *Node) {
	n.Mode, n.UID, n.GID, n.MTimeSec, n.Xattrs = from.Mode, from.UID, from.GID, from.MTimeSec, from.Xattrs
	for name, child := range from.children {
		if mine := n.Child(name); mine != nil && mine.IsDir() && child.IsDir() {
			mine.Merge(child)
			continue
		}
		n.Set(name, child)
	}
}
