package build

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
)

// Permissions of files and folders that the spec gives none.
const (
	defaultFilePerm   = 0o600
	defaultFolderPerm = 0o700
)

// addFiles lays the spec's files over the root, in order.
func (b *builder) addFiles(root *tree.Node) error {
	for i, f := range b.spec.Files {
		key := fmt.Sprintf("files[%d]", i)
		n, err := b.fileNode(f)
		if errors.Is(err, fs.ErrNotExist) && f.Optional {
			continue
		}
		if err != nil {
			return b.at(key, err)
		}
		if n.UID, err = accountID(root, f.UID, "/etc/passwd"); err != nil {
			return b.at(key+".uid", err)
		}
		if n.GID, err = accountID(root, f.GID, "/etc/group"); err != nil {
			return b.at(key+".gid", err)
		}
		if old := root.Lookup(f.Path); old != nil && old.IsDir() && n.IsDir() {
			old.Merge(n) // a folder that is there keeps what it holds
			continue
		}
		if err := root.Put(f.Path, n); err != nil {
			return b.at(key+".path", err)
		}
	}
	return nil
}

// fileNode is one entry without its owner.
func (b *builder) fileNode(f spec.File) (*tree.Node, error) {
	perm := func(otherwise uint32) uint32 {
		if f.Mode != nil {
			return uint32(*f.Mode)
		}
		return otherwise
	}
	n := &tree.Node{Mode: tree.TypeRegular | perm(defaultFilePerm), MTimeSec: b.epochSec()}
	switch {
	case f.Directory:
		n = tree.NewDir(perm(defaultFolderPerm))
		n.MTimeSec = b.epochSec()
	case f.Symlink != "":
		n.Mode, n.Target = tree.TypeSymlink|0o777, f.Symlink
	case f.Contents != nil:
		n.Content = tree.Bytes(*f.Contents)
	case f.Source != "":
		content, err := b.sourceFile(f.Source)
		if err != nil {
			return nil, err
		}
		n.Content = content
	default:
		text, err := b.metadata(f.Metadata)
		if err != nil {
			return nil, err
		}
		n.Content = tree.Bytes(text)
	}
	return n, nil
}

// sourceFile is a file of the build machine; ~/ is the user's home.
func (b *builder) sourceFile(path string) (tree.Content, error) {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(home, rest)
	} else if !filepath.IsAbs(path) {
		path = filepath.Join(b.in.Dir, path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return tree.File{Path: path, SizeBytes: info.Size()}, nil
}

// small reads a file of the build machine that has at most limit bytes.
func (b *builder) small(path string, limit int64) ([]byte, error) {
	content, err := b.sourceFile(path)
	if err != nil {
		return nil, err
	}
	if content.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes; %d is the most", path, content.Size(), limit)
	}
	r, err := content.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, limit))
}

// metadata is the spec itself, for the appliance to read.
func (b *builder) metadata(format string) ([]byte, error) {
	if format == "json" {
		return b.spec.MarshalJSON()
	}
	return b.spec.Marshal()
}

// accountID is a number, or a name looked up in the root's own accounts.
func accountID(root *tree.Node, id *spec.ID, file string) (uint32, error) {
	if id == nil {
		return 0, nil
	}
	if id.Name == "" {
		return id.Number, nil
	}
	s := source{root: root}
	text, err := s.reader(file)()
	if err != nil {
		return 0, fmt.Errorf("look up %q: %s of the root: %w", id.Name, file, err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) > 2 && fields[0] == id.Name {
			n, err := strconv.ParseUint(fields[2], 10, 32)
			return uint32(n), err
		}
	}
	return 0, fmt.Errorf("%q is not in %s of the root", id.Name, file)
}
