package main

import (
	"context"
	"io"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/verity"
	deltamake "github.com/holdfast-os/holdfast/update/delta/make"
	"github.com/holdfast-os/holdfast/update/repo"
)

// packer makes the transport forms of roots for a repository, by package delta/make.
type packer struct{ progress func(build.Step) }

// Pack implements [repo.Packer].
func (p packer) Pack(ctx context.Context, root repo.RootImage, w io.Writer) error {
	return deltamake.Pack(ctx, p.watch("compress root", root), root.Verity, w, zstd.SpeedDefault)
}

// Pieces implements [repo.Packer].
func (p packer) Pieces(ctx context.Context, root repo.RootImage, w io.Writer) error {
	return deltamake.Pieces(ctx, p.watch("compress pieces of root", root), root.Verity, w)
}

// Tree implements [repo.Packer].
func (p packer) Tree(_ context.Context, root repo.RootImage, w io.Writer) error {
	return deltamake.Tree(root.Content, root.Verity, w)
}

// Patch implements [repo.Packer].
func (p packer) Patch(ctx context.Context, from, to repo.RootImage, w io.Writer) error {
	return deltamake.Patch(ctx, from.Content, from.Verity, p.watch("make patch", to), to.Verity, w)
}

// Unpack implements [repo.Packer].
func (packer) Unpack(_ context.Context, pack, tree io.Reader, v image.Verity, w io.Writer) error {
	z, err := zstd.NewReader(pack, zstd.WithDecoderConcurrency(0))
	if err != nil {
		return err
	}
	defer z.Close()
	data := v.DataBlocks * verity.BlockSize
	if _, err := io.CopyN(w, z, data); err != nil {
		return err
	}
	_, err = io.CopyN(w, tree, v.TotalBytes-data)
	return err
}

func (p packer) watch(what string, root repo.RootImage) io.ReaderAt {
	return &watched{r: root.Content, step: build.Step{What: what, TotalBytes: root.Verity.TotalBytes}, progress: p.progress}
}

// watched reports how much was read of r, by any number of goroutines.
type watched struct {
	r        io.ReaderAt
	step     build.Step
	done     atomic.Int64
	progress func(build.Step)
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	n, err := w.r.ReadAt(p, off)
	s := w.step
	s.DoneBytes = min(w.done.Add(int64(n)), s.TotalBytes) // some is read twice
	w.progress(s)
	return n, err
}
