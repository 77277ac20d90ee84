package delta_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/holdfast-os/holdfast/update/delta"
)

// index cuts the pieces blob of a release into its frames and its index.
func index(t *testing.T, is release) ([]byte, delta.PieceIndex) {
	t.Helper()
	n := is.v.DataBlocks
	at := int64(len(is.pieces)) - (8 + delta.ShortBytes*n + 2*((n+1)/2) + 44)
	x, err := delta.DecodePieceIndex(bytes.Clone(is.pieces[at:]), n)
	if err != nil {
		t.Fatal(err)
	}
	return is.pieces[:at], x
}

// inner are blocks, all different, that both releases have and that are far from any that
// the old one does not have, so that their hashes are not fetched.
func inner(t *testing.T, was, is release) (list []int) {
	t.Helper()
	from, err := delta.ReadTree(bytes.NewReader(was.tree), was.v)
	if err != nil {
		t.Fatal(err)
	}
	to, err := delta.ReadTree(bytes.NewReader(is.tree), is.v)
	if err != nil {
		t.Fatal(err)
	}
	match := delta.Match(from, to)
	seen := map[string]bool{}
	for i := 65; i+65 < len(match); i++ {
		leaf := string(to.Leaf(int64(i)))
		if !slices.Contains(match[i-65:i+65], 1<<32-1) && !seen[leaf] {
			seen[leaf] = true
			list = append(list, i)
		}
	}
	if len(list) < 2 {
		t.Fatalf("only %d blocks to lie about", len(list))
	}
	return list
}

// TestIndexAttacks: an index that lies, and ones that are none, cost bytes and nothing else.
func TestIndexAttacks(t *testing.T) {
	was, is, _ := pair(t)
	frames, good := index(t, is)
	another, _ := index(t, was)
	all := func(i delta.PieceIndex) []byte { return append(bytes.Clone(frames), i.Encode()...) }
	change := func(f func(*delta.PieceIndex)) []byte {
		i := good
		i.Short, i.Sizes = bytes.Clone(good.Short), slices.Clone(good.Sizes)
		f(&i)
		return all(i)
	}
	short := func(i delta.PieceIndex, b int) []byte { return i.Short[b*delta.ShortBytes:][:delta.ShortBytes] }
	kept := inner(t, was, is)
	for name, c := range map[string]struct {
		pieces []byte
		used   bool // or not found out, because all hashes were fetched
	}{
		"as it is": {is.pieces, true},
		"zeros":    {change(func(i *delta.PieceIndex) { clear(i.Short) }), true},
		"one lie":  {change(func(i *delta.PieceIndex) { copy(short(*i, kept[0]), short(*i, kept[len(kept)-1])) }), false},
		"exchanged": {change(func(i *delta.PieceIndex) {
			copy(short(*i, kept[0]), short(good, kept[1]))
			copy(short(*i, kept[1]), short(good, kept[0]))
		}), false},
		"reversed":       {change(func(i *delta.PieceIndex) { slices.Reverse(i.Short) }), true},
		"another root":   {change(func(i *delta.PieceIndex) { i.Root[3] ^= 1 }), false},
		"another count":  {change(func(i *delta.PieceIndex) { i.DataBlocks++ }), false},
		"a size too big": {change(func(i *delta.PieceIndex) { i.Sizes[9]++ }), false},
		"a size of 0":    {change(func(i *delta.PieceIndex) { i.Sizes[9] = 0 }), false},
		"a huge size":    {change(func(i *delta.PieceIndex) { i.Sizes[9] = 65535 }), false},
		"sizes moved":    {change(func(i *delta.PieceIndex) { i.Sizes[9]++; i.Sizes[10]-- }), true},
		"other frames":   {append(bytes.Clone(another), all(good)[len(frames):]...), false},
		"truncated":      {is.pieces[:len(is.pieces)-100], false},
		"short":          {is.pieces[:50], false},
		"empty":          {nil, false},
		"longer":         {append(bytes.Clone(is.pieces), 0), false},
		"a pack":         {is.pack, false},
		"noise":          {text(3, len(is.pieces)), false},
	} {
		var s server
		o := s.options(is, nil)
		o.Pieces = s.blob("pieces", c.pieces)
		o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
		stats := mustRebuild(t, o, is)
		if stats.Source != delta.SourceIndex || (stats.PiecesUnused == nil) != c.used {
			t.Errorf("%s: source %s, pieces unused: %v", name, stats.Source, stats.PiecesUnused)
		}
		if n := s.bytes("tree"); n > 2*int64(len(is.tree)) {
			t.Errorf("%s: %d bytes of a tree of %d fetched", name, n, len(is.tree))
		}
		// Nobody but the root hash decides: with the whole tree lost too there is nothing.
		if o.Tree = (delta.Blob{}); c.used {
			continue
		}
		if _, _, err := rebuild(t.Context(), o); err == nil {
			t.Errorf("%s, without a tree: no error", name)
		}
	}
}

// collider is a block of which two have the same five bytes of hash with the salt "salt".
func collider(n uint64) []byte { return binary.LittleEndian.AppendUint64(make([]byte, 4088), n) }

// TestCollision: two blocks have the same short hash.
func TestCollision(t *testing.T) {
	a, b := collider(1688551), collider(60372)
	ha, hb := sha256.Sum256(append([]byte("salt"), a...)), sha256.Sum256(append([]byte("salt"), b...))
	if !bytes.Equal(ha[:delta.ShortBytes], hb[:delta.ShortBytes]) || ha == hb {
		t.Fatalf("%x and %x do not collide", ha, hb)
	}
	with := func(seed uint64, blocks ...[]byte) release {
		return build(t, files(t, map[string][]byte{
			"/a": slices.Concat(append([][]byte{text(1, 4096)}, blocks...)...), "/b": text(seed, 900_000), "/c": text(3, 900_000),
		}), "salt")
	}
	for name, c := range map[string]struct {
		was, is release
		tree    bool // has to be fetched whole
	}{
		"the old one has one, the new one the other": {with(5, text(9, 4096), a), with(6, b, text(8, 4096)), true},
		"the old one has both":                       {with(5, a, b), with(6, b, text(8, 4096), a), false},
		"the new one has both":                       {with(5, a, text(9, 4096), text(7, 4096)), with(6, b, text(8, 4096), a), true},
	} {
		var s server
		o := s.all(c.is, nil)
		o.Old, o.OldVerity = bytes.NewReader(c.was.root), c.was.v
		stats := mustRebuild(t, o, c.is)
		if whole := s.bytes("tree") >= int64(len(c.is.tree)); whole != c.tree || (stats.PiecesUnused != nil) != c.tree {
			t.Errorf("%s: %d bytes of a tree of %d fetched: %v", name, s.bytes("tree"), len(c.is.tree), stats.PiecesUnused)
		}
	}
}

// TestSmallChange: a device with an old slot fetches little of the tree and of the pack, in
// few requests.
func TestSmallChange(t *testing.T) {
	m := map[string][]byte{"/a": text(1, 6_000_000), "/b": text(2, 4_000_000)}
	was := build(t, files(t, m), "salt")
	m["/a"] = bytes.Clone(m["/a"])
	for _, at := range []int{700, 2_000_000, 2_300_000, 5_900_000} {
		m["/a"][at] ^= 1
	}
	is := build(t, files(t, m), "salt")
	var s server
	o := s.all(is, nil)
	o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
	mustRebuild(t, o, is)
	if n := s.bytes("tree"); n > 1000 {
		t.Errorf("%d bytes of the tree fetched for 4 blocks", n)
	}
	indexes := int64(6*is.v.DataBlocks + 400)
	if n := s.bytes("pieces") + s.bytes("pack"); n > indexes+50_000 {
		t.Errorf("%d bytes fetched for 4 blocks", n)
	}
	if n := len(s.ranges["pieces"]) + len(s.ranges["pack"]) + len(s.ranges["tree"]); n > 12 {
		t.Errorf("%d requests: %v", n, s.ranges)
	}
}

// TestPiecesLost: a server that has no pieces any more, or never had, at whatever
// moment, makes the pack take their place, and the other way round.
func TestPiecesLost(t *testing.T) {
	was, is, _ := pair(t)
	gone := errors.New("404")
	for after := range 8 {
		for _, lost := range []string{"pieces", "pack"} {
			var s server
			o := s.all(is, nil)
			o.Old, o.OldVerity = bytes.NewReader(was.root), was.v
			b, n := &o.Pieces, 0
			if lost == "pack" {
				b = &o.Pack
			}
			fetch := b.Fetch
			b.Fetch = func(ctx context.Context, off, length int64) (io.ReadCloser, error) {
				if n++; n > after {
					return nil, gone
				}
				return fetch(ctx, off, length)
			}
			mustRebuild(t, o, is)
		}
	}
}
