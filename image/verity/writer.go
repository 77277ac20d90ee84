package verity

import (
	"fmt"
	"io"
	"runtime"
	"slices"

	"github.com/holdfast-os/holdfast/image"
)

// Options are what the tree holds besides hashes. The zero value works; a salt
// makes hashes of common files useless to who has collected them.
type Options struct {
	Salt []byte // at most 256 bytes
	UUID [16]byte
}

const (
	batchBlocks = 256 // a unit of work for one processor; its hashes are two full hash blocks
	batchBytes  = batchBlocks * BlockSize
)

// Writer hashes data that is written to it and then writes the tree. It keeps
// every block's hash, 1/128 of the data: 16 MiB for 2 GiB. Hashing uses all
// processors, at most 8, and a buffer of 1 MiB for each and one more.
type Writer struct {
	o       Options
	batch   []byte      // not yet being hashed
	spare   chan []byte // buffers; taking one waits for a batch to be done
	digests [][]byte    // of each batch, in order
	blocks  int64       // in the batches
	bytes   int64
	err     error
}

// NewWriter returns a Writer. One that is abandoned before Finish needs no clean-up.
func NewWriter(o Options) (*Writer, error) {
	if len(o.Salt) > maxSaltBytes {
		return nil, fmt.Errorf("verity: salt of %d bytes, the limit is %d", len(o.Salt), maxSaltBytes)
	}
	o.Salt = slices.Clone(o.Salt)
	w := &Writer{o: o, spare: make(chan []byte, min(runtime.GOMAXPROCS(0), 8)+1)}
	for range cap(w.spare) {
		w.spare <- nil // made when first needed
	}
	return w, nil
}

// Write takes in the next bytes of the data. They may come in pieces of any size.
func (w *Writer) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	if w.bytes+int64(len(p)) > maxDataBlocks*BlockSize {
		w.err = fmt.Errorf("verity: more than %d bytes of data", int64(maxDataBlocks*BlockSize))
		return 0, w.err
	}
	n := len(p)
	w.bytes += int64(n)
	for len(p) > 0 {
		if w.batch == nil {
			if w.batch = <-w.spare; w.batch == nil {
				w.batch = make([]byte, 0, batchBytes)
			}
		}
		part := min(len(p), cap(w.batch)-len(w.batch))
		w.batch = append(w.batch, p[:part]...)
		p = p[part:]
		if len(w.batch) == cap(w.batch) {
			w.dispatch()
		}
	}
	return n, nil
}

// dispatch has the current batch hashed.
func (w *Writer) dispatch() {
	batch := w.batch
	digests := make([]byte, len(batch)/BlockSize*digestSize)
	w.digests = append(w.digests, digests)
	w.blocks += int64(len(batch) / BlockSize)
	w.batch = nil
	go func() {
		hashBlocks(digests, batch, w.o.Salt)
		w.spare <- batch[:0]
	}()
}

// Finish writes what comes behind the data on the device: zeros up to the end of
// its last block, the superblock and the tree. No data at all is an error. The
// Writer cannot be used afterwards.
func (w *Writer) Finish(to io.Writer) (image.Verity, error) {
	if w.err != nil {
		return image.Verity{}, w.err
	}
	if w.bytes == 0 {
		w.err = fmt.Errorf("verity: no data")
		return image.Verity{}, w.err
	}
	padding := int(-w.bytes & (BlockSize - 1))
	if padding > 0 {
		w.batch = append(w.batch, make([]byte, padding)...)
	}
	if len(w.batch) > 0 {
		w.dispatch()
	}
	for range cap(w.spare) {
		<-w.spare
	}
	w.err = fmt.Errorf("verity: the tree is finished")

	s := Superblock{UUID: w.o.UUID, DataBlocks: w.blocks, Salt: w.o.Salt}
	super, err := s.encode()
	if err != nil {
		return image.Verity{}, fmt.Errorf("verity superblock: %w", err)
	}
	tree, root := buildTree(slices.Concat(w.digests...), w.o.Salt)
	w.digests = nil
	out := append(make([]byte, padding), super...)
	out = append(out, make([]byte, BlockSize-superSize)...)
	for _, part := range append([][]byte{out}, tree...) {
		if _, err := to.Write(part); err != nil {
			return image.Verity{}, fmt.Errorf("write %d bytes of the verity tree: %w", len(part), err)
		}
	}
	return s.describe(root), nil
}

// buildTree gives the levels of the tree over the data's hashes in the order in
// which they are on the device, the top first, and the root hash.
func buildTree(digests, salt []byte) (tree [][]byte, root [digestSize]byte) {
	for len(digests) > digestSize {
		level := append(digests, make([]byte, -len(digests)&(BlockSize-1))...)
		tree = append(tree, level)
		digests = make([]byte, len(level)/BlockSize*digestSize)
		hashBlocks(digests, level, salt)
	}
	slices.Reverse(tree)
	return tree, [digestSize]byte(digests)
}
