package delta_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/update/delta"
	deltamake "github.com/holdfast-os/holdfast/update/delta/make"
)

// text is something that compresses about as well as programs do.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	words := make([][]byte, 600)
	for i := range words {
		words[i] = make([]byte, 2+r.IntN(14))
		for k := range words[i] {
			words[i][k] = byte(r.Uint32())
		}
	}
	b := make([]byte, 0, n+16)
	for len(b) < n {
		b = append(b, words[r.IntN(len(words))]...)
	}
	return b[:n]
}

// rebuilt is a program after a small change: a few bytes more near its beginning, and
// addresses that have changed all over it.
func rebuilt(b []byte) []byte {
	b = slices.Concat(b[:1000], []byte("a longer text"), b[1000:])
	for i := 3000; i < len(b); i += 1500 {
		b[i] += 13
	}
	return b
}

func files(t testing.TB, m map[string][]byte) *tree.Node {
	t.Helper()
	root := tree.NewDir(0o755)
	for p, b := range m {
		if err := root.Put(p, &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(b)}); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// release is a root image with its description and blobs.
type release struct {
	v                  image.Verity
	root               []byte
	tree, pack, pieces []byte
}

func build(t testing.TB, root *tree.Node, salt string) (rel release) {
	t.Helper()
	w, err := verity.NewWriter(verity.Options{Salt: []byte(salt)})
	if err != nil {
		t.Fatal(err)
	}
	var out, packed, top, pieces bytes.Buffer
	if _, err := erofs.Write(io.MultiWriter(&out, w), root, erofs.Options{}); err != nil {
		t.Fatal(err)
	}
	if rel.v, err = w.Finish(&out); err != nil {
		t.Fatal(err)
	}
	rel.root = out.Bytes()
	if err := deltamake.Tree(bytes.NewReader(rel.root), rel.v, &top); err != nil {
		t.Fatal(err)
	}
	if err := deltamake.Pack(context.Background(), bytes.NewReader(rel.root), rel.v, &packed, 0); err != nil {
		t.Fatal(err)
	}
	if err := deltamake.Pieces(context.Background(), bytes.NewReader(rel.root), rel.v, &pieces); err != nil {
		t.Fatal(err)
	}
	rel.tree, rel.pack, rel.pieces = top.Bytes(), packed.Bytes(), pieces.Bytes()
	return rel
}

// trees are two releases: a program rebuilt, files moved, gone, new, grown and as they were.
func trees(t testing.TB) (*tree.Node, *tree.Node) {
	t.Helper()
	was := map[string][]byte{"/bin/service": text(1, 1_500_000), "/lib/gone": text(2, 90_000), "/var/zero": make([]byte, 400_000), "/empty": nil}
	for i := range 40 {
		was[fmt.Sprintf("/lib/lib%d.so", i)] = text(uint64(10+i), 3000+i*i*120)
		was[fmt.Sprintf("/etc/%d.conf", i)] = text(uint64(100+i), 20+40*i)
	}
	is := map[string][]byte{}
	for p, b := range was {
		is[p] = b
	}
	is["/bin/service"] = rebuilt(was["/bin/service"])
	delete(is, "/lib/gone")
	delete(is, "/lib/lib30.so")
	is["/opt/moved"] = was["/lib/lib30.so"]
	is["/lib/new"] = text(3, 150_000)
	is["/etc/7.conf"] = append(bytes.Clone(was["/etc/7.conf"]), "x=1\n"...)
	is["/lib/lib35.so"] = append(bytes.Clone(was["/lib/lib35.so"]), text(4, 5000)...)
	a, b := files(t, was), files(t, is)
	b.Set("link", b.Lookup("/lib/new"))
	return a, b
}

func pair(t testing.TB) (was, is release, patch []byte) {
	t.Helper()
	a, b := trees(t)
	was, is = build(t, a, "salt"), build(t, b, "salt")
	return was, is, makePatch(t, was, is)
}

func makePatch(t testing.TB, was, is release) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := deltamake.Patch(t.Context(), bytes.NewReader(was.root), was.v, bytes.NewReader(is.root), is.v, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// server hands out ranges and remembers them.
type server struct {
	mu     sync.Mutex
	ranges map[string][][2]int64
}

func (s *server) blob(name string, b []byte) delta.Blob {
	return delta.Blob{SizeBytes: int64(len(b)), Fetch: func(_ context.Context, off, n int64) (io.ReadCloser, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.ranges == nil {
			s.ranges = map[string][][2]int64{}
		}
		s.ranges[name] = append(s.ranges[name], [2]int64{off, n})
		// A server may send more, and in pieces of any size.
		return io.NopCloser(iotest.HalfReader(bytes.NewReader(b[off:]))), nil
	}}
}

func (s *server) bytes(name string) (n int64) {
	for _, r := range s.ranges[name] {
		n += r[1]
	}
	return n
}

func (s *server) options(is release, patch []byte) delta.Options {
	o := delta.Options{Verity: is.v, Tree: s.blob("tree", is.tree), Pack: s.blob("pack", is.pack)}
	if patch != nil {
		o.Patch = s.blob("patch", patch)
	}
	return o
}

// all are the options with pieces.
func (s *server) all(is release, patch []byte) delta.Options {
	o := s.options(is, patch)
	o.Pieces = s.blob("pieces", is.pieces)
	return o
}

func rebuild(ctx context.Context, o delta.Options) ([]byte, delta.Stats, error) {
	r, err := delta.New(ctx, o)
	if err != nil {
		return nil, delta.Stats{}, err
	}
	s, err := r.Open(ctx)
	if err != nil {
		return nil, r.Stats(), err
	}
	b, err := io.ReadAll(s)
	return b, r.Stats(), errors.Join(err, s.Close())
}

// mustRebuild fails the test unless the image comes out right.
func mustRebuild(t *testing.T, o delta.Options, is release) delta.Stats {
	t.Helper()
	b, stats, err := rebuild(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, is.root) {
		t.Fatal("the image differs")
	}
	return stats
}

func TestSources(t *testing.T) {
	was, is, patch := pair(t)
	old := bytes.NewReader(was.root)
	for _, c := range []struct {
		source delta.Source
		change func(*delta.Options)
		limit  float64 // of the pack
	}{
		{delta.SourcePatch, func(o *delta.Options) { o.Old, o.OldVerity = old, was.v }, 0.12},
		{delta.SourcePatch, func(o *delta.Options) { o.Old, o.OldVerity, o.Pack, o.Tree = old, was.v, delta.Blob{}, delta.Blob{} }, 0.12},
		{delta.SourceIndex, func(o *delta.Options) { o.Old, o.OldVerity, o.Patch = old, was.v, delta.Blob{} }, 0.57},
		{delta.SourceIndex, func(o *delta.Options) { o.Old, o.OldVerity, o.Patch, o.Pack = old, was.v, delta.Blob{}, delta.Blob{} }, 0.85},
		{delta.SourceIndex, func(o *delta.Options) { o.Old, o.OldVerity, o.Patch, o.Pieces = old, was.v, delta.Blob{}, delta.Blob{} }, 0.85},
		{delta.SourcePack, func(o *delta.Options) { o.Pack = delta.Blob{} }, 2.1},
		{delta.SourcePack, func(o *delta.Options) {}, 1.05},
	} {
		for _, target := range [][]byte{nil, text(77, len(is.root)), was.root, {}} {
			var s server
			o := s.all(is, patch)
			if c.change(&o); target != nil {
				o.Target = bytes.NewReader(target)
			}
			stats := mustRebuild(t, o, is)
			got := s.bytes("tree") + s.bytes("pieces") + s.bytes("pack") + s.bytes("patch")
			if stats.Source != c.source || float64(got) > c.limit*float64(len(is.pack)) {
				t.Errorf("source %s, not %s, or too much fetched: %d of %d bytes", stats.Source, c.source, got, len(is.pack))
			}
			if content := got - s.bytes("tree"); stats.BytesToFetch > content {
				t.Errorf("%s: %d bytes were to be fetched, %d were", c.source, stats.BytesToFetch, content)
			}
			t.Logf("%s: fetched %d (%d content) of a pack of %d", c.source, got, stats.BytesToFetch, len(is.pack))
		}
	}
}

// TestTwice: two streams of one plan, at the same time, and what was counted.
func TestTwice(t *testing.T) {
	was, is, patch := pair(t)
	var s server
	o := s.all(is, patch)
	o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
	r, err := delta.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	planned := r.Fetched()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			in, err := r.Open(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			b, err := io.ReadAll(iotest.OneByteReader(in))
			if err := errors.Join(err, in.Close()); err != nil || !bytes.Equal(b, is.root) {
				t.Errorf("the image differs, or: %v", err)
			}
			if _, err := in.Read(make([]byte, 1)); err == nil {
				t.Error("a closed stream can be read")
			}
		})
	}
	wg.Wait()
	if got, want := r.Fetched()-planned, 2*r.Stats().BytesToFetch; got != want {
		t.Errorf("two streams fetched %d bytes, the plan says %d", got, want)
	}
}

// broken is a slot that cannot be read in places.
type broken struct {
	io.ReaderAt
	every int64
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if bad := (off/b.every + 1) * b.every; bad < off+int64(len(p)) {
		n, err := b.ReaderAt.ReadAt(p[:bad-off], off)
		return n, errors.Join(err, errors.New("input/output error"))
	}
	return b.ReaderAt.ReadAt(p, off)
}

func TestOldSlotDamaged(t *testing.T) {
	was, is, patch := pair(t)
	flipped := bytes.Clone(was.root)
	for at := int64(9000); at < was.v.DataBlocks*4096; at += 50 * 4096 {
		flipped[at] ^= 4
	}
	whole := bytes.NewReader(was.root)
	for name, old := range map[string]io.ReaderAt{"flipped": bytes.NewReader(flipped), "unreadable": broken{whole, 300_000}} {
		for _, p := range [][]byte{patch, nil} {
			var s server
			o := s.all(is, p)
			o.Old, o.OldVerity = old, was.v
			if name == "unreadable" { // but for the tree
				o.Old = split{old, whole, was.v.DataBlocks * 4096}
			}
			stats := mustRebuild(t, o, is)
			if stats.Source == delta.SourcePack || stats.OldUnused != nil {
				t.Errorf("%s: source %s: %v", name, stats.Source, stats.OldUnused)
			}
			if s.bytes("pack") > int64(len(is.pack)) {
				t.Errorf("%s: %d bytes of the pack fetched, it has %d", name, s.bytes("pack"), len(is.pack))
			}
			if p == nil {
				continue
			}
			o.Pack, o.Pieces = delta.Blob{}, delta.Blob{}
			if _, _, err := rebuild(t.Context(), o); err == nil || !strings.Contains(err.Error(), "rebuild block") {
				t.Errorf("%s, without a pack: %v", name, err)
			}
		}
	}
}

// split reads from a before at and from b behind it.
type split struct {
	a, b io.ReaderAt
	at   int64
}

func (s split) ReadAt(p []byte, off int64) (int, error) {
	if off < s.at {
		return s.a.ReadAt(p, off)
	}
	return s.b.ReadAt(p, off)
}

// TestOldUnused: an old slot that cannot be used is told of and done without.
func TestOldUnused(t *testing.T) {
	was, is, patch := pair(t)
	a, b := trees(t)
	other := build(t, a, "other salt")
	damaged := bytes.Clone(was.root)
	damaged[len(damaged)-5000] ^= 1
	for name, c := range map[string]struct {
		root []byte
		v    image.Verity
	}{
		"tree damaged":  {damaged, was.v},
		"other release": {build(t, b, "salt").root, was.v},
		"other salt":    {other.root, other.v},
		"empty":         {nil, was.v},
		"nonsense":      {was.root, image.Verity{DataBlocks: -1}},
	} {
		var s server
		o := s.options(is, patch)
		o.Old, o.OldVerity = bytes.NewReader(c.root), c.v
		if stats := mustRebuild(t, o, is); stats.Source != delta.SourcePack || stats.OldUnused == nil || stats.PatchUnused == nil {
			t.Errorf("%s: source %s, %v, %v", name, stats.Source, stats.OldUnused, stats.PatchUnused)
		}
	}
}

// TestPatchUnused: a patch that does not fit is told of and done without.
func TestPatchUnused(t *testing.T) {
	was, is, patch := pair(t)
	same := build(t, files(t, map[string][]byte{"/a": text(1, 400_000)}), "salt")
	for name, p := range map[string][]byte{"from another": makePatch(t, same, is), "to another": makePatch(t, was, same), "no patch": is.pack, "short": patch[:50]} {
		var s server
		o := s.all(is, p)
		o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
		if stats := mustRebuild(t, o, is); stats.Source != delta.SourceIndex || stats.PatchUnused == nil {
			t.Errorf("%s: source %s, %v", name, stats.Source, stats.PatchUnused)
		}
	}
	// The same root again: a patch of nothing but the tree.
	var s server
	o := s.options(was, makePatch(t, was, was))
	o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
	if stats := mustRebuild(t, o, was); stats.BytesToFetch != 0 || s.bytes("pack")+s.bytes("tree") != 0 {
		t.Errorf("the same root: %+v, %d bytes of tree fetched", stats, s.bytes("tree"))
	}
}

// TestResume cuts the power at many places: the next attempt fetches nothing that is
// in the target already.
func TestResume(t *testing.T) {
	was, is, patch := pair(t)
	table, err := delta.DecodeSeekTable(is.pack[len(is.pack)-seekTableSize(is.pack):], is.v.DataBlocks)
	if err != nil {
		t.Fatal(err)
	}
	_, pieces := index(t, is)
	for _, p := range [][]byte{patch, nil} {
		before := int64(1 << 60)
		for written := int64(0); written <= is.v.TotalBytes; written += is.v.TotalBytes/23/512*512 + 512 {
			target := text(5, len(is.root)) // and what was written of it
			copy(target, is.root[:written])
			var s server
			o := s.all(is, p)
			o.Old, o.OldVerity, o.Target = bytes.NewReader(was.root), was.v, bytes.NewReader(target)
			stats := mustRebuild(t, o, is)
			if stats.BytesInPlace != min(written, is.v.DataBlocks*4096)/4096*4096 || stats.BytesToFetch > before {
				t.Errorf("after %d bytes: %d in place, %d to fetch, before %d", written, stats.BytesInPlace, stats.BytesToFetch, before)
			}
			before = stats.BytesToFetch
			offset, end := int64(0), int64(0)
			for _, f := range table {
				if end += int64(f.Blocks) * 4096; end <= written {
					offset += int64(f.SizeBytes)
				}
			}
			for _, r := range s.ranges["pack"] {
				if r[0] < offset {
					t.Errorf("after %d bytes: pack fetched from byte %d, what is missing begins at %d", written, r[0], offset)
				}
			}
			offset = 0
			for _, n := range pieces.Sizes[:min(written/4096, is.v.DataBlocks)/delta.PieceBlocks] {
				offset += int64(n)
			}
			for _, r := range s.ranges["pieces"] {
				if r[0] < offset {
					t.Errorf("after %d bytes: pieces fetched from byte %d, what is missing begins at %d", written, r[0], offset)
				}
			}
		}
		var s server
		o := s.all(is, p)
		o.Target = bytes.NewReader(is.root)
		if mustRebuild(t, o, is); len(s.ranges) != 0 {
			t.Errorf("with everything in place, fetched %v", s.ranges)
		}
	}
}

func seekTableSize(pack []byte) int {
	f := pack[len(pack)-9:]
	return 17 + 8*(int(f[0])|int(f[1])<<8)
}

// TestFlippedBits changes one byte in each of many places of each blob: what comes out
// is right or an error. What is wrong with patch or pieces is always made good by tree and pack.
func TestFlippedBits(t *testing.T) {
	was, is, patch := pair(t)
	blobs := map[string][]byte{"tree": is.tree, "pack": is.pack, "patch": patch, "pieces": is.pieces}
	failed := map[string]int{}
	for name, b := range blobs {
		places := []int{0, 1, 8, 20, 50, 75, 80, 84, 88, 92, 100, len(b) - 1, len(b) - 5, len(b) - 6, len(b) - 9, len(b) - 12, len(b) - 20}
		for at := 130; at < len(b); at += len(b)/50 + 1 {
			places = append(places, at)
		}
		for i, at := range places {
			bad := bytes.Clone(b)
			bad[at] ^= 1 << (i % 8)
			var s server
			o := s.options(is, nil)
			if name != "pack" || i%2 == 0 {
				o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
			}
			switch name {
			case "tree":
				o.Tree = s.blob(name, bad)
			case "pack":
				o.Pack = s.blob(name, bad)
			case "pieces":
				o.Pieces = s.blob(name, bad)
			case "patch":
				o.Patch = s.blob(name, bad)
			}
			got, _, err := rebuild(t.Context(), o)
			if err == nil && !bytes.Equal(got, is.root) {
				t.Fatalf("%s, byte %d: wrong bytes came out", name, at)
			}
			if !bytes.HasPrefix(is.root, got) {
				t.Fatalf("%s, byte %d: wrong bytes came out before the error", name, at)
			}
			if err != nil {
				failed[name]++
			}
		}
	}
	if failed["patch"]+failed["pieces"] != 0 || failed["tree"] == 0 || failed["pack"] == 0 {
		t.Errorf("failures: %v; patch and pieces must be made good, tree and pack cannot", failed)
	}
}

// TestServers that do something else than they should.
func TestServers(t *testing.T) {
	was, is, patch := pair(t)
	lost := errors.New("connection lost")
	for name, fetch := range map[string]delta.Fetcher{
		"refuses": func(context.Context, int64, int64) (io.ReadCloser, error) { return nil, lost },
		"stops": func(_ context.Context, off, n int64) (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader("abc")), nil
		},
		"other bytes": func(_ context.Context, off, n int64) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(text(8, int(n)))), nil
		},
		"from elsewhere": func(_ context.Context, off, n int64) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(slices.Concat(is.pack, is.pack)[off/2+100:])), nil
		},
	} {
		var s server
		for i := range 4 {
			o := s.options(is, patch)
			o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
			switch i {
			case 0:
				o.Pack.Fetch, o.Patch = fetch, delta.Blob{}
			case 1: // only after the index
				good := o.Pack.Fetch
				o.Pack.Fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
					if off > int64(len(is.pack)*9/10) {
						return good(ctx, off, n)
					}
					return fetch(ctx, off, n)
				}
				o.Patch, o.Old = delta.Blob{}, nil
			case 2:
				o.Tree.Fetch, o.Patch = fetch, delta.Blob{}
			case 3:
				o.Pack, o.Patch.Fetch = delta.Blob{}, fetch
			}
			got, _, err := rebuild(t.Context(), o)
			if err == nil {
				t.Errorf("%s, case %d: no error", name, i)
			}
			if name == "refuses" && !errors.Is(err, lost) {
				t.Errorf("%s, case %d: the cause is lost: %v", name, i, err)
			}
			if !bytes.HasPrefix(is.root, got) {
				t.Errorf("%s, case %d: wrong bytes", name, i)
			}
		}
	}
}

// brokenOff is a server whose connections end early: fetch has good send about half of
// what is asked, but for requests below small, and none at all from dead on.
func brokenOff(good delta.Fetcher, dead int64) delta.Fetcher {
	return func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		if off >= dead {
			return nil, errors.New("gone")
		}
		b, err := good(ctx, off, n)
		if err != nil || n < 100_000 && off+n <= dead {
			return b, err
		}
		return struct {
			io.Reader
			io.Closer
		}{io.LimitReader(b, min(n/2+400_000, dead-off)), b}, nil
	}
}

// TestBrokenOff: a range that breaks off is gone on with, of the same blob.
func TestBrokenOff(t *testing.T) {
	was, is, patch := pair(t)
	for _, p := range [][]byte{patch, nil} {
		var s server
		o := s.options(is, p)
		o.Pack.Fetch = brokenOff(o.Pack.Fetch, o.Pack.SizeBytes)
		if p != nil {
			o.Old, o.OldVerity, o.Pack = bytes.NewReader(was.root), was.v, delta.Blob{}
			o.Patch.Fetch = brokenOff(o.Patch.Fetch, o.Patch.SizeBytes)
		}
		mustRebuild(t, o, is)
		if n := len(s.ranges["pack"]) + len(s.ranges["patch"]); n < 3 {
			t.Errorf("only %d requests: nothing broke off", n)
		}
	}
}

// TestChangedOnTheWay: all bytes of the second half of a range are wrong the first time.
// The pack's frames are fetched again; what the patch spoiled comes from the pack.
func TestChangedOnTheWay(t *testing.T) {
	was, is, patch := pair(t)
	for _, p := range [][]byte{patch, nil} {
		var s server
		var mu sync.Mutex
		changed := 0
		o := s.all(is, p)
		o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
		once := func(good delta.Fetcher, indexAt int64) delta.Fetcher {
			end := int64(0) // of what was changed
			return func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
				b, err := good(ctx, off, n)
				mu.Lock()
				defer mu.Unlock()
				if err != nil || off < end || off+n > indexAt {
					return b, err
				}
				end = off + n
				changed++
				return struct {
					io.Reader
					io.Closer
				}{io.MultiReader(io.LimitReader(b, n/2), bytes.NewReader(text(9, int(n)))), b}, nil
			}
		}
		o.Pack.Fetch = once(o.Pack.Fetch, int64(len(is.pack)-seekTableSize(is.pack)))
		if p != nil {
			o.Patch.Fetch = once(o.Patch.Fetch, int64(len(p)))
		}
		mustRebuild(t, o, is)
		if changed == 0 {
			t.Error("nothing was changed")
		}
	}
}

// TestPatchLost: a patch of which only a beginning can be had is as good as none, at
// whatever byte it ends, and what it gave until then is not fetched again.
func TestPatchLost(t *testing.T) {
	was, is, patch := pair(t)
	first := int64(-1)
	for dead := int64(0); dead < int64(len(patch)); dead += int64(len(patch))/40 + 1 {
		var s server
		o := s.options(is, patch)
		o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
		o.Patch.Fetch = brokenOff(o.Patch.Fetch, dead)
		mustRebuild(t, o, is)
		got := s.bytes("pack")
		if first < 0 {
			first = got
		}
		if got == 0 || got > first {
			t.Errorf("patch ends at byte %d: %d bytes of the pack fetched, without a patch %d", dead, got, first)
		}
		o.Pack = delta.Blob{}
		if _, _, err := rebuild(t.Context(), o); err == nil {
			t.Errorf("patch ends at byte %d: no error without a pack", dead)
		}
	}
}

// TestFewMissing: after a power cut near the end a frame of the patch costs more than
// those of the pack with what is missing.
func TestFewMissing(t *testing.T) {
	root := func(seed uint64) release {
		return build(t, files(t, map[string][]byte{"/a": text(seed, 3_000_000)}), "salt")
	}
	was, is := root(1), root(2)
	patch := makePatch(t, was, is)
	target := bytes.Clone(is.root)
	clear(target[is.v.DataBlocks*4096-20_000:])
	var s server
	o := s.all(is, patch)
	o.Old, o.OldVerity, o.Target = bytes.NewReader(was.root), was.v, bytes.NewReader(target)
	if stats := mustRebuild(t, o, is); stats.Source == delta.SourcePatch || stats.PatchUnused == nil {
		t.Errorf("source %s to fetch %d bytes", stats.Source, stats.BytesToFetch)
	}
	if got := s.bytes("pack") + s.bytes("pieces"); got > 100_000 {
		t.Errorf("%d bytes of pack and pieces fetched for 5 blocks", got)
	}
}

// TestCancel: a stream ends with its context, and Close returns though the server hangs.
func TestCancel(t *testing.T) {
	_, is, _ := pair(t)
	var s server
	o := s.options(is, nil)
	good := o.Pack.Fetch
	o.Pack.Fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		if off > int64(len(is.pack)*9/10) {
			return good(ctx, off, n)
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	r, err := delta.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	in, err := r.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(in); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	if in, err = r.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	if _, err := delta.New(ctx, delta.Options{Verity: is.v, Tree: o.Tree, Pack: o.Pack, Target: bytes.NewReader(nil)}); !errors.Is(err, context.Canceled) {
		t.Errorf("planning after the end: %v", err)
	}
}

// stripes is a large file that costs no memory: pieces of 64 KiB, every fourth a text
// of its own and those in changed another one, the rest zeros, which are fast to pack.
type stripes struct {
	pieces  int
	changed func(int) bool
}

func (s stripes) Size() int64 { return int64(s.pieces) << 16 }

func (s stripes) Open() (io.ReadCloser, error) {
	i := 0
	base := text(9, 1<<16)
	return io.NopCloser(readers(func() io.Reader {
		if i == s.pieces {
			return nil
		}
		if i++; i%4 != 0 {
			return bytes.NewReader(make([]byte, 1<<16))
		}
		b := bytes.Clone(base)
		seed := 2 * i
		if s.changed(i) {
			seed++
		}
		for k := 0; k < len(b); k += 40 {
			b[k] ^= byte(seed * (k + 1) >> 4)
		}
		return bytes.NewReader(b)
	})), nil
}

// readers is one reader after the other.
func readers(next func() io.Reader) io.Reader { return &series{next: next} }

type series struct {
	next func() io.Reader
	cur  io.Reader
}

func (s *series) Read(p []byte) (int, error) {
	for {
		if s.cur == nil {
			if s.cur = s.next(); s.cur == nil {
				return 0, io.EOF
			}
		}
		if n, err := s.cur.Read(p); n > 0 || err != io.EOF {
			return n, nil
		}
		s.cur = nil
	}
}

// onDisk builds an image without holding it.
func onDisk(t *testing.T, content tree.Content) (*os.File, image.Verity) {
	t.Helper()
	root := tree.NewDir(0o755)
	root.Set("data", &tree.Node{Mode: tree.TypeRegular | 0o644, Content: content})
	f, err := os.Create(filepath.Join(t.TempDir(), "root.img"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	w, err := verity.NewWriter(verity.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := erofs.Write(io.MultiWriter(f, w), root, erofs.Options{}); err != nil {
		t.Fatal(err)
	}
	v, err := w.Finish(f)
	if err != nil {
		t.Fatal(err)
	}
	return f, v
}

func blobFile(t *testing.T, write func(io.Writer) error) delta.Blob {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "blob"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := write(f); err != nil {
		t.Fatal(err)
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		t.Fatal(err)
	}
	return delta.Blob{SizeBytes: size, Fetch: func(_ context.Context, off, n int64) (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(f, off, n)), nil
	}}
}

// TestMemory rebuilds 200 MB with each source and watches the heap.
func TestMemory(t *testing.T) {
	old, ov := onDisk(t, stripes{3200, func(int) bool { return false }})
	img, v := onDisk(t, stripes{3200, func(i int) bool { return i%16 == 0 }})
	o := delta.Options{Verity: v,
		Tree:   blobFile(t, func(w io.Writer) error { return deltamake.Tree(img, v, w) }),
		Pieces: blobFile(t, func(w io.Writer) error { return deltamake.Pieces(t.Context(), img, v, w) }),
		Pack:   blobFile(t, func(w io.Writer) error { return deltamake.Pack(t.Context(), img, v, w, 0) }),
	}
	patch := blobFile(t, func(w io.Writer) error { return deltamake.Patch(t.Context(), old, ov, img, v, w) })
	for _, want := range []delta.Source{delta.SourcePatch, delta.SourceIndex, delta.SourcePack} {
		switch want {
		case delta.SourcePatch:
			o.Old, o.OldVerity, o.Patch = old, ov, patch
		case delta.SourceIndex:
			o.Patch = delta.Blob{}
		case delta.SourcePack:
			o.Old = nil
		}
		runtime.GC()
		r, err := delta.New(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		in, err := r.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		peak, sum := m.HeapInuse, int64(0)
		a, b := make([]byte, 1<<20), make([]byte, 1<<20)
		for {
			n, err := io.ReadFull(in, a)
			if _, err := img.ReadAt(b[:n], sum); err != nil || !bytes.Equal(a[:n], b[:n]) {
				t.Fatalf("%s: differs after byte %d: %v", want, sum, err)
			}
			sum += int64(n)
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapInuse)
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		if st := r.Stats(); sum != v.TotalBytes || st.Source != want || peak > 64<<20 {
			t.Errorf("%s: %d bytes of %d, source %s, %d bytes of heap", want, sum, v.TotalBytes, st.Source, peak)
		}
		t.Logf("%s: fetched %d, heap %d bytes at most", want, r.Fetched(), peak)
	}
}
