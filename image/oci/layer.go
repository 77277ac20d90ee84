package oci

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-os/holdfast/image/deb"
	"github.com/holdfast-os/holdfast/image/tree"
)

// layer is an unpacked, indexed tar.
type layer struct {
	entries []entry
	// whiteouts says whether .wh. names delete: they do in layers, and are
	// ordinary names in a root file system tar or package.
	whiteouts bool
}

// wantedLayer is a layer as manifest and config describe it. digest is "" for
// docker archives, which do not say.
type wantedLayer struct {
	blob           *blob
	digest, diffID digest.Digest
}

// layer gets one layer from the cheapest place that can be verified: the blob
// itself if it is a plain tar, else the cache, else by unpacking.
func (op *opener) layer(w wantedLayer) (*layer, io.Closer, error) {
	if w.blob.at != nil && w.blob.sniff() == plain {
		entries, sum, err := readLayer(op.ctx, w.blob.at, w.blob.size)
		if err := verified("layer as stored", w.digest, sum, err); err != nil {
			return nil, nil, err
		}
		err = verified("layer as unpacked (diffID)", w.diffID, sum, nil)
		return &layer{entries, true}, nil, err
	}
	f, err := op.cached(w.diffID)
	if err != nil {
		return nil, nil, err
	}
	if f == nil {
		if f, err = op.unpack(w); err != nil {
			return nil, nil, err
		}
	}
	return &layer{f.entries, true}, f.file, nil
}

// verified prefers the digest's verdict to the error that bad bytes led to.
func verified(what string, want, got digest.Digest, err error) error {
	if want != "" && got != "" && want != got {
		return &DigestError{What: what, Want: string(want), Got: string(got)}
	}
	return err
}

// unpacked is a file with an unpacked layer.
type unpacked struct {
	file    *os.File
	entries []entry
	diffID  digest.Digest
}

// cached reads a layer from the cache, or gives nil when it is not there or not
// what its name says; unpacking then replaces it.
func (op *opener) cached(diffID digest.Digest) (*unpacked, error) {
	f, err := op.cache.lookup(diffID)
	if err != nil || f == nil {
		return nil, err
	}
	u, err := indexFile(op.ctx, f)
	if err != nil || u.diffID != diffID {
		f.Close()
		if u != nil && u.diffID == diffID {
			return nil, err // intact, but not a tar we accept
		}
		return nil, op.ctx.Err()
	}
	return u, nil
}

func indexFile(ctx context.Context, f *os.File) (*unpacked, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	entries, sum, err := readLayer(ctx, f, info.Size())
	return &unpacked{f, entries, sum}, err
}

// readLayer hashes and indexes at the same time. The digest is given with the
// error of indexing, "" when reading went wrong.
func readLayer(ctx context.Context, r io.ReaderAt, sizeBytes int64) ([]entry, digest.Digest, error) {
	type result struct {
		sum digest.Digest
		err error
	}
	hashed := make(chan result, 1)
	go func() {
		sum, err := hashAll(ctx, io.NewSectionReader(r, 0, sizeBytes))
		hashed <- result{sum, err}
	}()
	entries, err := index(r, sizeBytes)
	h := <-hashed
	if h.err != nil {
		return nil, "", fmt.Errorf("read layer: %w", h.err)
	}
	return entries, h.sum, err
}

// unpack decompresses a layer into the cache, verifying it on both sides.
func (op *opener) unpack(w wantedLayer) (_ *unpacked, err error) {
	stored, err := w.blob.open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stored.Close()) }()
	sum := newAsideHash(nil)
	defer sum.Close()
	// One byte more than promised is enough to know that there is more.
	in := io.TeeReader(io.LimitReader(ctxReader{op.ctx, stored}, w.blob.size+1), sum)
	f, diffID, err := op.decompressTo(in)
	if f != nil {
		defer func() {
			if err != nil {
				op.cache.discard(f)
			}
		}()
	}
	if err != nil {
		// Damaged compressed data is usually a wrong digest too, and that says more.
		if _, drain := io.Copy(io.Discard, in); drain == nil && w.digest != "" && op.ctx.Err() == nil {
			err = verified("layer as stored", w.digest, sum.digest(), err)
		}
		return nil, err
	}
	if got := sum.digest(); sum.bytes != w.blob.size {
		return nil, fmt.Errorf("layer %s: %d bytes or more, the manifest says %d", w.digest, sum.bytes, w.blob.size)
	} else if err := verified("layer as stored", w.digest, got, nil); err != nil {
		return nil, err
	}
	if err := verified("layer as unpacked (diffID)", w.diffID, diffID, nil); err != nil {
		return nil, err
	}
	return op.finish(f, diffID)
}

// finish indexes an unpacked file whose digest is right and keeps it.
func (op *opener) finish(f *os.File, diffID digest.Digest) (*unpacked, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	entries, err := index(f, info.Size())
	if err != nil {
		return nil, err
	}
	return &unpacked{f, entries, diffID}, op.cache.keep(f, diffID)
}

// decompressTo writes what in unpacks to into a new file and drains in. The
// file is the caller's even with an error.
func (op *opener) decompressTo(in io.Reader) (*os.File, digest.Digest, error) {
	buffered := bufio.NewReaderSize(in, chunkBytes)
	magic, _ := buffered.Peek(magicBytes)
	data, err := decompress(sniff(magic), buffered)
	if err != nil {
		return nil, "", fmt.Errorf("decompress layer: %w", err)
	}
	f, diffID, err := op.writeTo(data)
	if err = errors.Join(err, data.Close()); err != nil {
		return f, "", fmt.Errorf("decompress layer: %w", err)
	}
	_, err = io.Copy(io.Discard, buffered)
	return f, diffID, err
}

// writeTo copies a tar into a new file and hashes it.
func (op *opener) writeTo(data io.Reader) (*os.File, digest.Digest, error) {
	f, err := op.cache.create()
	if err != nil {
		return nil, "", err
	}
	sum := newAsideHash(f)
	defer sum.Close()
	limited := io.LimitReader(ctxReader{op.ctx, data}, op.maxBytes+1)
	n, err := io.CopyBuffer(sum, limited, make([]byte, chunkBytes))
	err = errors.Join(err, sum.Close())
	if err == nil && n > op.maxBytes {
		err = fmt.Errorf("unpacks to more than %d bytes, the limit", op.maxBytes)
	}
	return f, sum.digest(), err
}

// layers gets all layers, several at a time.
func (op *opener) readLayers(wanted []wantedLayer) error {
	type result struct {
		layer  *layer
		closer io.Closer
		err    error
	}
	results := make([]chan result, len(wanted))
	slots := make(chan struct{}, op.parallel)
	for i, w := range wanted {
		results[i] = make(chan result, 1)
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			l, closer, err := op.layer(w)
			results[i] <- result{l, closer, err}
		}()
	}
	var errs []error
	for i, c := range results {
		r := <-c
		if r.closer != nil {
			op.im.closers = append(op.im.closers, r.closer)
		}
		if r.err != nil {
			errs = append(errs, fmt.Errorf("layer %d of %d: %w", i+1, len(wanted), r.err))
		}
		op.im.layers = append(op.im.layers, r.layer)
	}
	return errors.Join(errs...)
}

// tarFile opens tar: and deb: images.
func (op *opener) tarFile(path string, isDeb bool) error {
	b, err := op.openFile(path)
	if err != nil {
		return err
	}
	return op.tarBlob(b, isDeb)
}

// tarBlob makes the image of one tar.
func (op *opener) tarBlob(b *blob, isDeb bool) error {
	if b.at != nil && !isDeb && b.sniff() == plain {
		entries, sum, err := readLayer(op.ctx, b.at, b.size)
		op.im.Digest, op.im.layers = string(sum), []*layer{{entries: entries}}
		return err
	}
	u, err := op.tarCopy(b, isDeb)
	if err != nil {
		return err
	}
	op.im.closers = append(op.im.closers, u.file)
	op.im.Digest, op.im.layers = string(u.diffID), []*layer{{entries: u.entries}}
	return nil
}

// tarCopy unpacks a file that nothing vouches for; the cache remembers by the
// file's own digest what came out of it.
func (op *opener) tarCopy(b *blob, isDeb bool) (_ *unpacked, err error) {
	var stored digest.Digest
	if op.cache != nil {
		if stored, err = op.digestOf(b); err != nil {
			return nil, err
		}
	}
	if diffID := op.cache.remembered(stored); diffID != "" {
		if u, err := op.cached(diffID); u != nil || err != nil {
			return u, err
		}
	}
	in, err := op.tarStream(b, isDeb)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	var f *os.File
	var diffID digest.Digest
	if isDeb {
		f, diffID, err = op.writeTo(in)
	} else {
		f, diffID, err = op.decompressTo(in)
	}
	if f != nil {
		defer func() {
			if err != nil {
				op.cache.discard(f)
			}
		}()
	}
	if err != nil {
		return nil, err
	}
	u, err := op.finish(f, diffID)
	if err != nil {
		return nil, err
	}
	return u, op.cache.remember(stored, diffID)
}

func (op *opener) tarStream(b *blob, isDeb bool) (io.ReadCloser, error) {
	if isDeb {
		return deb.Data(b.at, b.size)
	}
	return b.open()
}

func (op *opener) digestOf(b *blob) (_ digest.Digest, err error) {
	r, err := b.open()
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return hashAll(op.ctx, r)
}

// archive opens a tar of an image and gives its files. They are not verified
// here: each blob in it is.
func (op *opener) archive(path string) (*tree.Node, error) {
	b, err := op.openFile(path)
	if err != nil {
		return nil, err
	}
	var entries []entry
	if b.sniff() == plain {
		entries, err = index(b.at, b.size)
	} else {
		var u *unpacked
		if u, err = op.tarCopy(b, false); err == nil {
			entries = u.entries
			op.im.closers = append(op.im.closers, u.file)
		}
	}
	if err != nil {
		return nil, err
	}
	return flatten([]*layer{{entries: entries}}, TreeOptions{})
}
