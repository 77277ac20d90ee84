package uki

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
)

// memory is a Blob of bytes.
type memory []byte

func (m memory) Size() int64                  { return int64(len(m)) }
func (m memory) Open() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(m)), nil }

// tail is what follows the first offBytes of a Blob.
type tail struct {
	Blob
	offBytes int64
}

func (t tail) Size() int64 { return t.Blob.Size() - t.offBytes }

func (t tail) Open() (io.ReadCloser, error) {
	r, err := t.Blob.Open()
	if err != nil {
		return nil, err
	}
	if _, err := io.CopyN(io.Discard, r, t.offBytes); err != nil {
		return nil, errors.Join(fmt.Errorf("skip the first %d bytes: %w", t.offBytes, err), r.Close())
	}
	return r, nil
}

// part is a piece of a file: a blob and the zero bytes after it.
type part struct {
	name     string
	blob     Blob
	padBytes int64
	sha256   [32]byte // of blob, enforced while reading when checked is set
	checked  bool
}

// chain is a Blob made of parts. Its reader holds one part open at a time and
// fails when a part is not what was measured or signed, so that a file that
// changes under the build never becomes an image that does not boot.
type chain []part

func (c chain) Size() int64 {
	var n int64
	for _, p := range c {
		n += p.blob.Size() + p.padBytes
	}
	return n
}

func (c chain) Open() (io.ReadCloser, error) { return &chainReader{rest: c}, nil }

type chainReader struct {
	rest    chain // rest[0] is being read when cur is set
	cur     io.ReadCloser
	hash    hash.Hash
	left    int64 // bytes that cur still owes
	padLeft int64
}

func (r *chainReader) Read(buf []byte) (int, error) {
	for len(buf) > 0 {
		switch {
		case r.cur != nil && r.left > 0:
			n, err := r.cur.Read(buf[:min(int64(len(buf)), r.left)])
			r.hash.Write(buf[:n])
			r.left -= int64(n)
			if err == io.EOF && r.left > 0 {
				return n, fmt.Errorf("read %s: it ends %d bytes early: %w", r.rest[0].name, r.left, io.ErrUnexpectedEOF)
			}
			if err != nil && err != io.EOF {
				return n, fmt.Errorf("read %s: %w", r.rest[0].name, err)
			}
			if n > 0 {
				return n, nil
			}
		case r.cur != nil:
			if err := r.finish(); err != nil {
				return 0, err
			}
		case r.padLeft > 0:
			n := int(min(int64(len(buf)), r.padLeft))
			clear(buf[:n])
			r.padLeft -= int64(n)
			return n, nil
		case len(r.rest) == 0:
			return 0, io.EOF
		default:
			p := r.rest[0]
			cur, err := p.blob.Open()
			if err != nil {
				return 0, fmt.Errorf("open %s: %w", p.name, err)
			}
			r.cur, r.hash, r.left, r.padLeft = cur, sha256.New(), p.blob.Size(), 0
		}
	}
	return 0, nil
}

// finish closes the current part after checking it.
func (r *chainReader) finish() error {
	p := r.rest[0]
	var more [1]byte
	if n, _ := io.ReadFull(r.cur, more[:]); n != 0 {
		return fmt.Errorf("read %s: there is more than the %d bytes it had", p.name, p.blob.Size())
	}
	if p.checked && [32]byte(r.hash.Sum(nil)) != p.sha256 {
		return fmt.Errorf("read %s: its content changed after it was measured; start the build again", p.name)
	}
	err := r.cur.Close()
	r.cur, r.rest, r.padLeft = nil, r.rest[1:], p.padBytes
	return err
}

func (r *chainReader) Close() error {
	r.rest, r.padLeft = nil, 0
	if r.cur == nil {
		return nil
	}
	cur := r.cur
	r.cur = nil
	return cur.Close()
}

// digestBlob hashes b and holds it to its size.
func digestBlob(b Blob) (digest [32]byte, err error) {
	r, err := b.Open()
	if err != nil {
		return digest, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(r, b.Size()+1))
	if err != nil {
		return digest, err
	}
	if n != b.Size() {
		return digest, fmt.Errorf("it should have %d bytes and has %d or more", b.Size(), n)
	}
	return [32]byte(h.Sum(nil)), nil
}
