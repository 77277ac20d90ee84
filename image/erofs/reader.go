package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/holdfast-os/holdfast/image/tree"
)

// FS is an image opened for reading. Its methods may be used from several
// goroutines if the image's ReadAt may.
type FS struct {
	r    io.ReaderAt
	size int64
	sb   superblock
}

// Inode is one inode of an image, with numbers already checked against the
// image's size.
type Inode struct {
	NID          uint64
	Mode         uint32 // st_mode
	UID, GID     uint32
	NLink        uint32
	MTimeSec     int64
	SizeBytes    int64
	Major, Minor uint32 // of a device

	xattrAt, xattrBytes   int64
	blockAt               int64 // of the data that is not inline
	inlineAt, inlineBytes int64
}

// Dirent is one name in a folder.
type Dirent struct {
	Name string
	NID  uint64
}

// Type is the file type bits of the mode, as in package tree.
func (n Inode) Type() uint32 { return n.Mode & tree.TypeMask }

// Open reads the superblock of an image that takes up the first sizeBytes of r
// or fewer. It refuses images with features that this package does not read.
func Open(r io.ReaderAt, sizeBytes int64) (*FS, error) {
	block := make([]byte, BlockSize)
	if sizeBytes < BlockSize {
		return nil, fmt.Errorf("open EROFS: %d bytes hold no superblock", sizeBytes)
	}
	if _, err := r.ReadAt(block, 0); err != nil && err != io.EOF {
		return nil, fmt.Errorf("open EROFS: read superblock: %w", err)
	}
	sb, err := decodeSuper(block)
	if err != nil {
		return nil, fmt.Errorf("open EROFS: %w", err)
	}
	size := int64(sb.Blocks) * BlockSize
	if size < BlockSize || size > sizeBytes {
		return nil, fmt.Errorf("open EROFS: the superblock tells of %d bytes, there are %d: truncated?", size, sizeBytes)
	}
	return &FS{r: r, size: size, sb: sb}, nil
}

// Options are those that the image was written with.
func (f *FS) Options() Options { return f.sb.options() }

// Stats are those that writing the image gave.
func (f *FS) Stats() Stats { return Stats{Bytes: f.size, Inodes: int64(f.sb.Inos)} }

// Root is the inode of the root folder.
func (f *FS) Root() (Inode, error) { return f.Inode(uint64(f.sb.RootNID)) }

// span reads n bytes at off, which must lie inside the image.
func (f *FS) span(off, n int64) ([]byte, error) {
	if off < 0 || n < 0 || off > f.size || n > f.size-off {
		return nil, fmt.Errorf("bytes %d to %d of an image of %d", off, off+n, f.size)
	}
	b := make([]byte, n)
	if got, err := f.r.ReadAt(b, off); got < len(b) {
		return nil, fmt.Errorf("read %d bytes at offset %d: %w", n, off, err)
	}
	return b, nil
}

// Inode reads the inode with a number.
func (f *FS) Inode(nid uint64) (Inode, error) {
	n, err := f.inode(nid)
	if err != nil {
		return Inode{}, fmt.Errorf("EROFS inode %d: %w", nid, err)
	}
	return n, nil
}

func (f *FS) inode(nid uint64) (Inode, error) {
	if nid > uint64(f.size/slotSize) {
		return Inode{}, fmt.Errorf("lies behind the image's %d bytes", f.size)
	}
	at := int64(f.sb.MetaBlkAddr)*BlockSize + int64(nid)*slotSize
	b, err := f.span(at, inodeCompactSize)
	if err != nil {
		return Inode{}, err
	}
	format := binary.LittleEndian.Uint16(b)
	var die inodeExtended
	head := int64(inodeCompactSize)
	if format&1 == 1 {
		head = inodeExtendedSize
		if b, err = f.span(at, head); err != nil {
			return Inode{}, err
		}
		_, err = binary.Decode(b, binary.LittleEndian, &die)
	} else {
		var c inodeCompact
		_, err = binary.Decode(b, binary.LittleEndian, &c)
		die = inodeExtended{Format: c.Format, XattrICount: c.XattrICount, Mode: c.Mode, Size: uint64(c.Size),
			U: c.U, UID: uint32(c.UID), GID: uint32(c.GID), NLink: uint32(c.NLink), MTime: f.sb.BuildTime}
	}
	if err != nil {
		return Inode{}, err
	}
	n := Inode{NID: nid, Mode: uint32(die.Mode), UID: die.UID, GID: die.GID, NLink: die.NLink,
		MTimeSec: int64(die.MTime), SizeBytes: int64(die.Size), xattrAt: at + head}
	if die.XattrICount > 0 {
		n.xattrBytes = xattrHeaderSize + 4*int64(die.XattrICount-1)
	}
	return n, f.locate(&n, die)
}

// locate checks where the inode's data lies, by its type and layout.
func (f *FS) locate(n *Inode, die inodeExtended) error {
	switch n.Type() {
	case tree.TypeChar, tree.TypeBlock:
		n.Major, n.Minor = decodeDev(die.U)
		n.SizeBytes = 0
		return nil
	case tree.TypeFIFO, tree.TypeSocket:
		n.SizeBytes = 0
		return nil
	case tree.TypeRegular, tree.TypeDir, tree.TypeSymlink:
	default:
		return fmt.Errorf("mode %#o has no known file type", n.Mode)
	}
	if n.SizeBytes < 0 || n.SizeBytes > f.size {
		return fmt.Errorf("%d bytes of data in an image of %d", uint64(n.SizeBytes), f.size)
	}
	switch layout := die.Format >> 1; layout {
	case layoutPlain:
	case layoutInline:
		n.inlineBytes = n.SizeBytes % BlockSize
		n.inlineAt = n.xattrAt + n.xattrBytes
		if n.inlineBytes == 0 && n.SizeBytes > 0 || n.inlineAt%BlockSize+n.inlineBytes > BlockSize {
			return errors.New("inline data crosses a block boundary")
		}
		if n.inlineAt+n.inlineBytes > f.size {
			return errors.New("inline data lies behind the image's end")
		}
	default:
		return fmt.Errorf("data layout %d (compressed or chunked) is not supported", layout)
	}
	out := n.SizeBytes - n.inlineBytes
	if n.blockAt = int64(die.U) * BlockSize; out > 0 && n.blockAt+out > f.size {
		return fmt.Errorf("data at offset %d to %d of an image of %d bytes", n.blockAt, n.blockAt+out, f.size)
	}
	return nil
}

// Data gives the data of a regular file, folder or symbolic link.
func (f *FS) Data(n Inode) *io.SectionReader {
	return io.NewSectionReader(inodeData{f, n}, 0, n.SizeBytes)
}

// inodeData joins the two places where an inode's data lies.
type inodeData struct {
	f *FS
	n Inode
}

func (d inodeData) ReadAt(b []byte, off int64) (int, error) {
	done := 0
	for len(b) > 0 {
		out := d.n.SizeBytes - d.n.inlineBytes
		at, left := d.n.blockAt+off, out-off
		if off >= out {
			at, left = d.n.inlineAt+off-out, d.n.SizeBytes-off
		}
		if left <= 0 {
			return done, io.EOF
		}
		part := b[:min(int64(len(b)), left)]
		got, err := d.f.r.ReadAt(part, at)
		done += got
		if got < len(part) {
			return done, fmt.Errorf("read EROFS inode %d at offset %d of the image: %w", d.n.NID, at, err)
		}
		b, off = b[got:], off+int64(got)
	}
	return done, nil
}

// Size is the length of the data in bytes; with Open, inodeData is a [tree.Content].
func (d inodeData) Size() int64 { return d.n.SizeBytes }

func (d inodeData) Open() (io.ReadCloser, error) { return io.NopCloser(d.f.Data(d.n)), nil }

// ReadLink gives the target of a symbolic link.
func (f *FS) ReadLink(n Inode) (string, error) {
	if n.Type() != tree.TypeSymlink || n.SizeBytes > maxTargetBytes {
		return "", fmt.Errorf("read link: EROFS inode %d, mode %#o, %d bytes, is no symbolic link", n.NID, n.Mode, n.SizeBytes)
	}
	b, err := io.ReadAll(f.Data(n))
	if err != nil {
		return "", fmt.Errorf("read link: %w", err)
	}
	return string(b), checkTarget(string(b))
}

// ReadDir lists a folder without "." and "..", in order of names.
func (f *FS) ReadDir(n Inode) ([]Dirent, error) {
	all, err := f.readDir(n)
	if err != nil {
		return nil, fmt.Errorf("read folder, EROFS inode %d: %w", n.NID, err)
	}
	names := all[:0]
	for _, d := range all {
		if d.Name != "." && d.Name != ".." {
			names = append(names, d)
		}
	}
	return names, nil
}

// readDir lists a folder as it is stored. Names must rise strictly, which
// excludes doubles too, and "." must lead to the folder itself.
func (f *FS) readDir(n Inode) ([]Dirent, error) {
	if n.Type() != tree.TypeDir {
		return nil, fmt.Errorf("mode %#o is no folder", n.Mode)
	}
	var all []Dirent
	block, data, dots := make([]byte, BlockSize), f.Data(n), 0
	for off := int64(0); off < n.SizeBytes; off += BlockSize {
		b := block[:min(BlockSize, n.SizeBytes-off)]
		if _, err := data.ReadAt(b, off); err != nil && err != io.EOF {
			return nil, err
		}
		found, err := decodeDirBlock(b)
		if err != nil {
			return nil, fmt.Errorf("block at byte %d: %w", off, err)
		}
		for _, d := range found {
			if len(all) > 0 && all[len(all)-1].Name >= d.Name {
				return nil, fmt.Errorf("name %q comes after %q", d.Name, all[len(all)-1].Name)
			}
			all = append(all, d)
			switch {
			case d.Name == "." && d.NID != n.NID:
				return nil, fmt.Errorf("its \".\" is inode %d", d.NID)
			case d.Name == "." || d.Name == "..":
				dots++
				continue
			}
			if err := checkName(d.Name); err != nil {
				return nil, err
			}
		}
	}
	if dots != 2 {
		return nil, errors.New("\".\" or \"..\" is missing")
	}
	return all, nil
}

// decodeDirBlock decodes one block of a folder, the last cut at the folder's end.
func decodeDirBlock(b []byte) ([]Dirent, error) {
	if len(b) < direntSize {
		return nil, fmt.Errorf("%d bytes hold no entry", len(b))
	}
	// The first name begins where the entries end.
	end := int(binary.LittleEndian.Uint16(b[8:]))
	if end < direntSize || end%direntSize != 0 || end >= len(b) {
		return nil, fmt.Errorf("the first name is at offset %d of %d bytes", end, len(b))
	}
	found := make([]Dirent, 0, end/direntSize)
	for at := 0; at < end; at += direntSize {
		from, to := int(binary.LittleEndian.Uint16(b[at+8:])), len(b)
		if next := at + direntSize; next < end {
			to = int(binary.LittleEndian.Uint16(b[next+8:]))
		}
		if from < end || from > to || to > len(b) {
			return nil, fmt.Errorf("a name at offsets %d to %d of %d bytes", from, to, len(b))
		}
		name := b[from:to]
		if at+direntSize == end {
			name, _, _ = bytes.Cut(name, []byte{0}) // the rest of the block is zero
		}
		found = append(found, Dirent{Name: string(name), NID: binary.LittleEndian.Uint64(b[at:])})
	}
	return found, nil
}

// Xattrs lists the extended attributes of an inode in the order they are stored,
// shared ones first.
func (f *FS) Xattrs(n Inode) ([]tree.Xattr, error) {
	found, err := f.xattrs(n)
	if err != nil {
		return nil, fmt.Errorf("read attributes of EROFS inode %d: %w", n.NID, err)
	}
	return found, nil
}

func (f *FS) xattrs(n Inode) ([]tree.Xattr, error) {
	if n.xattrBytes == 0 {
		return nil, nil
	}
	b, err := f.span(n.xattrAt, n.xattrBytes)
	if err != nil {
		return nil, err
	}
	var found []tree.Xattr
	shared := int(b[4]) // h_shared_count; the numbers follow the header
	if len(b) < xattrHeaderSize+4*shared {
		return nil, fmt.Errorf("%d shared attributes in %d bytes", shared, len(b))
	}
	for i := range shared {
		id := binary.LittleEndian.Uint32(b[xattrHeaderSize+4*i:])
		at := int64(f.sb.XattrBlkAddr)*BlockSize + 4*int64(id)
		entry, err := f.span(at, min(xattrEntrySize+maxXattrName+maxXattrValue, max(f.size-at, 0)))
		if err != nil {
			return nil, err
		}
		x, _, err := decodeXattr(entry)
		if err != nil {
			return nil, fmt.Errorf("shared attribute %d: %w", id, err)
		}
		found = append(found, x)
	}
	for b = b[xattrHeaderSize+4*shared:]; len(b) > 0; {
		x, rest, err := decodeXattr(b)
		if err != nil {
			return nil, err
		}
		found, b = append(found, x), rest
	}
	return found, nil
}

// decodeXattr takes one attribute from the start of b.
func decodeXattr(b []byte) (x tree.Xattr, rest []byte, err error) {
	if len(b) < xattrEntrySize {
		return x, nil, fmt.Errorf("%d bytes hold no attribute", len(b))
	}
	nameBytes, index, valueBytes := int(b[0]), b[1], int(binary.LittleEndian.Uint16(b[2:]))
	size := xattrEntrySize + nameBytes + valueBytes
	if size > len(b) {
		return x, nil, fmt.Errorf("an attribute of %d bytes in %d", size, len(b))
	}
	name, value := b[xattrEntrySize:][:nameBytes], b[xattrEntrySize+nameBytes:size]
	if x.Name, err = joinXattrName(index, string(name)); err != nil {
		return x, nil, err
	}
	x.Value = bytes.Clone(value)
	return x, b[min(size+-size&3, len(b)):], nil
}

// Lookup finds the inode at a path from the root, not following symbolic links.
// A missing one is an error that errors.Is [fs.ErrNotExist].
func (f *FS) Lookup(p string) (Inode, error) {
	n, err := f.Root()
	if err != nil {
		return Inode{}, err
	}
	for _, name := range tree.Split(p) {
		if n.Type() != tree.TypeDir {
			return Inode{}, fmt.Errorf("look up %s in EROFS: %w", p, fs.ErrNotExist)
		}
		entries, err := f.ReadDir(n)
		if err != nil {
			return Inode{}, fmt.Errorf("look up %s in EROFS: %w", p, err)
		}
		i := 0
		for i < len(entries) && entries[i].Name != name {
			i++
		}
		if i == len(entries) {
			return Inode{}, fmt.Errorf("look up %s in EROFS: %w", p, fs.ErrNotExist)
		}
		if n, err = f.Inode(entries[i].NID); err != nil {
			return Inode{}, fmt.Errorf("look up %s in EROFS: %w", p, err)
		}
	}
	return n, nil
}
