package oci

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/ulikunitz/xz"

	"github.com/holdfast-os/holdfast/image/tree"
)

// DigestError says that bytes are not what their digest promised.
type DigestError struct {
	What      string // "layer", "manifest", …
	Want, Got string // "sha256:…"
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("verify %s: digest is %s, must be %s: damaged on the way or on disk (fetch it again), or changed by somebody", e.What, e.Got, e.Want)
}

// blob is stored bytes that have not been verified.
type blob struct {
	at   io.ReaderAt // nil when the bytes can only be streamed
	size int64
	open func() (io.ReadCloser, error)
}

func sectionBlob(s tree.Section) *blob {
	return &blob{at: io.NewSectionReader(s.R, s.Off, s.SizeBytes), size: s.SizeBytes, open: s.Open}
}

// compression is told by the first bytes; media types are missing or wrong too
// often, and the diffID decides anyway.
type compression int

const (
	plain compression = iota
	gzipped
	zstdCompressed
	xzCompressed
)

const magicBytes = 6

func sniff(magic []byte) compression {
	switch s := string(magic); {
	case len(s) >= 3 && s[:3] == "\x1f\x8b\x08": // RFC 1952 §2.3.1
		return gzipped
	case len(s) >= 4 && s[:4] == "\x28\xb5\x2f\xfd", // RFC 8878 §3.1.1
		len(s) >= 4 && s[0]&0xf0 == 0x50 && s[1:4] == "\x2a\x4d\x18": // §3.1.2, skippable frame
		return zstdCompressed
	case len(s) >= 6 && s[:6] == "\xfd7zXZ\x00": // xz file format 1.1, §2.1.1.1
		return xzCompressed
	}
	return plain
}

// sniff is plain for a blob that has to be streamed to look at it.
func (b *blob) sniff() compression {
	if b.at == nil {
		return plain
	}
	magic := make([]byte, magicBytes)
	n, _ := b.at.ReadAt(magic, 0)
	return sniff(magic[:n])
}

// maxWindowBytes bounds zstd's memory; `zstd --long` needs no more. The xz library
// has no such bound: a hostile xz stream can ask for a dictionary of 4 GiB.
const maxWindowBytes = 128 << 20

func decompress(c compression, r io.Reader) (io.ReadCloser, error) {
	switch c {
	case gzipped:
		return gzip.NewReader(r)
	case zstdCompressed:
		d, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindowBytes), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case xzCompressed:
		d, err := xz.NewReader(bufio.NewReaderSize(r, chunkBytes)) // it reads byte by byte
		if err != nil {
			return nil, err
		}
		return io.NopCloser(d), nil
	}
	return io.NopCloser(r), nil
}

// asideHash hashes what is written to it, and passes it on, in a goroutine of its
// own, so that reading or decompressing goes on meanwhile. Close must be called.
type asideHash struct {
	hash       hash.Hash
	next       io.Writer // nil for none
	free, full chan []byte
	done       chan struct{}
	err        error // of next; read after done
	bytes      int64
	closed     bool
}

const (
	chunkBytes  = 256 << 10
	asideChunks = 4
)

func newAsideHash(next io.Writer) *asideHash {
	h := &asideHash{hash: sha256.New(), next: next, free: make(chan []byte, asideChunks), full: make(chan []byte, asideChunks), done: make(chan struct{})}
	for range asideChunks {
		h.free <- make([]byte, chunkBytes)
	}
	go h.run()
	return h
}

func (h *asideHash) run() {
	defer close(h.done)
	for b := range h.full {
		h.hash.Write(b)
		if h.next != nil && h.err == nil {
			_, h.err = h.next.Write(b)
		}
		h.free <- b[:cap(b)]
	}
}

// Write never fails: Close tells what became of it.
func (h *asideHash) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		b := <-h.free
		n := copy(b, rest)
		h.full <- b[:n]
		rest = rest[n:]
	}
	h.bytes += int64(len(p))
	return len(p), nil
}

// Close waits until everything has been hashed and passed on.
func (h *asideHash) Close() error {
	if !h.closed {
		h.closed = true
		close(h.full)
	}
	<-h.done
	return h.err
}

// digest is that of everything written.
func (h *asideHash) digest() digest.Digest {
	h.Close()
	return digest.Digest("sha256:" + hex.EncodeToString(h.hash.Sum(nil)))
}

// hashAll reads r to its end.
func hashAll(ctx context.Context, r io.Reader) (digest.Digest, error) {
	h := sha256.New()
	if _, err := io.CopyBuffer(h, ctxReader{ctx, r}, make([]byte, chunkBytes)); err != nil {
		return "", err
	}
	return digest.Digest("sha256:" + hex.EncodeToString(h.Sum(nil))), nil
}

// ctxReader ends a long copy when the context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
