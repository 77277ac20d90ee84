package erofs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/holdfast-os/holdfast/image/tree"
)

// bufferBytes is the length of the writes to the image, but for the last.
const bufferBytes = 1 << 20

// Write writes the image to w from its first byte to its last. Contents are
// opened one at a time and streamed; one that is shorter or longer than its
// Size is an error that names the path, and the image is then incomplete.
func (p *Plan) Write(w io.Writer) (Stats, error) {
	e := &emitter{w: w, buf: make([]byte, 0, bufferBytes)}
	super, err := encodeSuper(p.superblock())
	if err != nil {
		return Stats{}, err
	}
	if err := e.write(super); err != nil {
		return Stats{}, err
	}
	for _, n := range p.inodes {
		if err := e.inode(n); err != nil {
			return Stats{}, fmt.Errorf("write inode of %s: %w", n.path, err)
		}
	}
	if err := e.padTo(p.metaBlocks * BlockSize); err != nil {
		return Stats{}, err
	}
	for _, n := range p.folders {
		if err := e.data(n, n.sizeBytes-n.inlineBytes); err != nil {
			return Stats{}, fmt.Errorf("write folder %s: %w", n.path, err)
		}
	}
	for _, n := range p.files {
		if err := e.data(n, n.sizeBytes); err != nil {
			return Stats{}, fmt.Errorf("write file %s: %w", n.path, err)
		}
	}
	if err := errors.Join(e.padTo(p.Size()), e.flush()); err != nil {
		return Stats{}, err
	}
	return Stats{Bytes: p.Size(), Inodes: int64(len(p.inodes))}, nil
}

func (p *Plan) superblock() superblock {
	sb := superblock{
		Magic: superMagic, FeatureCompat: compatSBChksum | compatMTime, BlkSzBits: blkSizeBits,
		RootNID: uint16(p.inodes[0].nid), Inos: uint64(len(p.inodes)),
		BuildTime: uint64(p.options.BuildTimeSec), Blocks: uint32(p.blocks), UUID: p.options.UUID,
	}
	copy(sb.VolumeName[:], p.options.Label)
	return sb
}

// encode gives the inode as it is in the image.
func (n *inode) encode() inodeExtended {
	layout := uint16(layoutPlain)
	if n.inlineBytes > 0 {
		layout = layoutInline
	}
	u := n.block
	if t := n.node.Type(); t == tree.TypeChar || t == tree.TypeBlock {
		u = encodeDev(n.node.Major, n.node.Minor)
	}
	// Ino stays 0: Linux takes the nid, and a running number would change every
	// inode behind a new file.
	return inodeExtended{
		Format: 1 | layout<<1, XattrICount: xattrICount(len(n.xattrs)), Mode: uint16(n.node.Mode),
		Size: uint64(n.sizeBytes), U: u, UID: n.node.UID, GID: n.node.GID,
		MTime: uint64(n.node.MTimeSec), NLink: n.nlink,
	}
}

// folder gives a folder's data: in each block first the entries, then the names.
func folder(entries []entry, sizeBytes int64) ([]byte, error) {
	b := make([]byte, 0, sizeBytes+BlockSize)
	for len(entries) > 0 {
		count, used := 0, 0
		for count < len(entries) && used+direntSize+len(entries[count].name) <= BlockSize {
			used += direntSize + len(entries[count].name)
			count++
		}
		b = b[:(len(b)+BlockSize-1)&^(BlockSize-1)]
		nameOff := count * direntSize
		var err error
		for _, e := range entries[:count] {
			d := dirent{NID: e.inode.nid, NameOff: uint16(nameOff), FileType: fileType(e.inode.node.Mode)}
			if b, err = binary.Append(b, binary.LittleEndian, d); err != nil {
				return nil, err
			}
			nameOff += len(e.name)
		}
		for _, e := range entries[:count] {
			b = append(b, e.name...)
		}
		entries = entries[count:]
	}
	return b, nil
}

// emitter is the image as far as it is written. Contents are read straight into
// its buffer.
type emitter struct {
	w   io.Writer
	buf []byte
	off int64 // of the end of buf in the image
}

func (e *emitter) flush() error {
	if len(e.buf) == 0 {
		return nil
	}
	if _, err := e.w.Write(e.buf); err != nil {
		return fmt.Errorf("write %d bytes of the image before offset %d: %w", len(e.buf), e.off, err)
	}
	e.buf = e.buf[:0]
	return nil
}

// room gives the free part of the buffer, at most max bytes and at least one.
func (e *emitter) room(max int64) ([]byte, error) {
	if len(e.buf) == cap(e.buf) {
		if err := e.flush(); err != nil {
			return nil, err
		}
	}
	free := e.buf[len(e.buf):cap(e.buf)]
	return free[:min(int64(len(free)), max)], nil
}

// grow takes n bytes of room as written.
func (e *emitter) grow(n int) {
	e.buf = e.buf[:len(e.buf)+n]
	e.off += int64(n)
}

func (e *emitter) write(b []byte) error {
	for len(b) > 0 {
		room, err := e.room(int64(len(b)))
		if err != nil {
			return err
		}
		n := copy(room, b)
		e.grow(n)
		b = b[n:]
	}
	return nil
}

// padTo writes zeros up to an offset.
func (e *emitter) padTo(off int64) error {
	if off < e.off {
		return fmt.Errorf("the image is at offset %d already and cannot continue at %d: its tree changed after it was planned", e.off, off)
	}
	for e.off < off {
		room, err := e.room(off - e.off)
		if err != nil {
			return err
		}
		clear(room)
		e.grow(len(room))
	}
	return nil
}

// inode writes an inode, its attributes and its inline data.
func (e *emitter) inode(n *inode) error {
	if err := e.padTo(int64(n.nid) * slotSize); err != nil {
		return err
	}
	b, err := binary.Append(make([]byte, 0, inodeExtendedSize), binary.LittleEndian, n.encode())
	if err != nil {
		return err
	}
	if err := errors.Join(e.write(b), e.write(n.xattrs)); err != nil {
		return err
	}
	switch {
	case n.inlineBytes == 0:
		return nil
	case n.node.IsDir():
		data, err := folder(n.entries, n.sizeBytes)
		if err != nil {
			return err
		}
		return e.write(data[n.sizeBytes-n.inlineBytes:])
	}
	return e.content(n)
}

// data writes the first sizeBytes of an inode's data to its blocks.
func (e *emitter) data(n *inode, sizeBytes int64) error {
	if err := e.padTo(int64(n.block) * BlockSize); err != nil {
		return err
	}
	if n.node.IsDir() {
		data, err := folder(n.entries, n.sizeBytes)
		if err != nil {
			return err
		}
		return e.write(data[:sizeBytes])
	}
	return e.content(n)
}

// content writes the whole of a file or symbolic link.
func (e *emitter) content(n *inode) (err error) {
	if n.node.Type() == tree.TypeSymlink {
		_, err := e.copy(strings.NewReader(n.node.Target), n.sizeBytes)
		return err
	}
	if got := n.node.Content.Size(); got != n.sizeBytes {
		return fmt.Errorf("content had %d bytes when planned and now has %d", n.sizeBytes, got)
	}
	r, err := n.node.Content.Open()
	if err != nil {
		return fmt.Errorf("open content: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	done, err := e.copy(r, n.sizeBytes)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("content ends after %d of its %d bytes", done, n.sizeBytes)
	}
	if err != nil {
		return fmt.Errorf("content at byte %d of %d: %w", done, n.sizeBytes, err)
	}
	var more [1]byte
	switch _, err := io.ReadFull(r, more[:]); err {
	case io.EOF:
		return nil
	case nil:
		return fmt.Errorf("content goes on after its %d bytes", n.sizeBytes)
	default:
		return fmt.Errorf("content at its end, byte %d: %w", n.sizeBytes, err)
	}
}

// maxEmptyReads bounds how often a reader may give neither data nor an error.
const maxEmptyReads = 100

// copy writes exactly sizeBytes from r. It returns io.EOF if r has less.
func (e *emitter) copy(r io.Reader, sizeBytes int64) (done int64, err error) {
	empty := 0
	for done < sizeBytes {
		room, err := e.room(sizeBytes - done)
		if err != nil {
			return done, err
		}
		n, err := r.Read(room)
		e.grow(n)
		done += int64(n)
		if err != nil && (done < sizeBytes || err != io.EOF) {
			return done, err
		}
		if n > 0 {
			empty = 0
		} else if empty++; empty > maxEmptyReads {
			return done, io.ErrNoProgress
		}
	}
	return done, nil
}
