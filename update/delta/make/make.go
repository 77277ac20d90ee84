// Package deltamake writes the blobs from which package delta rebuilds a root image on the
// device: [Tree], [Pack], [Pieces] and, for each older root worth it, [Patch].
//
// The input is always a whole root image, as package image/build leaves it: EROFS,
// then the dm-verity superblock and tree. Every block is checked against the tree as
// it is read, so a damaged image makes no blob. All processors are used, and the same
// input gives the same bytes on any number of them, as long as the zstd encoder's
// version stays; so a blob is made once, its hash published, and not made again.
//
// Nothing here protects anything: the blobs are public, and what makes them safe to
// fetch is the tree, whose root hash is in the signed release.
package deltamake

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update/delta"
)

// Tree writes the tree blob of a root image, superblock and tree verbatim.
func Tree(root io.ReaderAt, v image.Verity, w io.Writer) error {
	t, err := readTree(root, v)
	if err != nil {
		return fmt.Errorf("make tree blob: %w", err)
	}
	if _, err := w.Write(t.Bytes()); err != nil {
		return fmt.Errorf("write tree blob: %w", err)
	}
	return nil
}

func readTree(root io.ReaderAt, v image.Verity) (*delta.Tree, error) {
	at := v.DataBlocks * delta.BlockSize
	return delta.ReadTree(io.NewSectionReader(root, at, max(v.TotalBytes-at, 0)), v)
}

// checked reads blocks of an image that must have their hashes.
type checked struct {
	image io.ReaderAt
	tree  *delta.Tree
}

// append reads n blocks from first on and appends them to b.
func (c checked) append(b []byte, first, n int64) ([]byte, error) {
	at := len(b)
	b = append(b, make([]byte, n*delta.BlockSize)...)
	if got, err := c.image.ReadAt(b[at:], first*delta.BlockSize); got < len(b)-at {
		return nil, fmt.Errorf("read blocks %d to %d of the root image: %w", first, first+n, err)
	}
	if bad := c.tree.Check(first, b[at:]); bad >= 0 {
		return nil, fmt.Errorf("block %d of the root image does not have the hash that is in its tree: the image is damaged", bad)
	}
	return b, nil
}

// inOrder runs n jobs on all processors and hands their results to emit in order. Each
// processor has a worker of its own. At most a few results wait, so memory is bounded.
func inOrder(ctx context.Context, n int, worker func() (func(i int) ([]byte, error), error), emit func(i int, b []byte) error) error {
	type result struct {
		b   []byte
		err error
	}
	type job struct {
		i    int
		done chan result
	}
	workers := min(runtime.GOMAXPROCS(0), max(n, 1))
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	queue, order := make(chan job), make(chan job, 4*workers)
	for range workers {
		work, err := worker()
		if err != nil {
			close(queue)
			return err
		}
		wg.Go(func() {
			for j := range queue {
				b, err := work(j.i)
				j.done <- result{b, err}
			}
		})
	}
	wg.Go(func() {
		defer close(order)
		defer close(queue)
		for i := range n {
			j := job{i, make(chan result, 1)}
			select {
			case order <- j:
			case <-ctx.Done():
				return
			}
			queue <- j // a worker becomes free without anyone's help
		}
	})
	for j := range order {
		r := <-j.done
		if r.err != nil {
			return r.err
		}
		if err := emit(j.i, r.b); err != nil {
			return err
		}
	}
	return ctx.Err()
}
