package delta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sort"
)

const (
	batchBlocks = 64 // checked and handed out at a time
	// maxRequest bounds one range request, so that a broken connection loses little.
	maxRequest = 8 << 20
	// maxGap is fetched and thrown away rather than making another request for what is behind
	// it. For three updates of a Debian root of 364 MB, 4 KiB (and 512 bytes as rangeCost)
	// take 240, 170 and 740 requests and 3.2, 15.4 and 26.0 MB; this takes 120, 140 and 500
	// for 3.7, 15.5 and 27.0 MB; 32 KiB takes 30, 80 and 270 for 5.0, 16.0 and 30.3 MB.
	maxGap = 8 << 10
	// prefetched frames wait for the decoder.
	prefetched = 3
)

// frames are those of one blob, numbered by the blocks they hold: a pack's and the
// pieces by their place in the image, a patch's by counting.
type frames struct {
	blob   Blob
	source Source
	all    []frame
	pieces *pieceTable // instead of all
}

type frame struct {
	Frame
	first  uint32
	offset int64 // in the blob
}

// lay places frames one behind the other from offset on; they must end where the blob's
// last trailer bytes begin.
func lay(blob Blob, source Source, list []Frame, offset, trailer int64) (*frames, error) {
	f := &frames{blob: blob, source: source, all: make([]frame, len(list))}
	first := uint32(0)
	for i, x := range list {
		f.all[i] = frame{x, first, offset}
		first += x.Blocks
		offset += int64(x.SizeBytes)
	}
	if offset+trailer != blob.SizeBytes {
		return nil, fmt.Errorf("%s index: its frames end at byte %d, the blob has %d with a trailer of %d", source, offset, blob.SizeBytes, trailer)
	}
	return f, nil
}

func (t SeekTable) frames(blob Blob, tableBytes int64) (*frames, error) {
	return lay(blob, SourcePack, t, 0, tableBytes)
}

func (p PatchIndex) frames(blob Blob, offset, oldBlocks int64) (*frames, error) {
	for i, f := range p.Frames {
		for _, s := range f.Dict {
			if int64(s.First)+int64(s.Blocks) > oldBlocks {
				return nil, fmt.Errorf("patch index: frame %d needs %d blocks from %d, the old image has %d", i, s.Blocks, s.First, oldBlocks)
			}
		}
	}
	return lay(blob, SourcePatch, p.Frames, offset, 0)
}

// find is the index of the frame that holds a block.
func (f *frames) find(number uint32) int {
	if f.pieces != nil {
		return int(number / PieceBlocks)
	}
	return sort.Search(len(f.all), func(i int) bool { return f.all[i].first > number }) - 1
}

func (f *frames) at(i int) frame {
	if f.pieces != nil {
		return f.pieces.at(i)
	}
	return f.all[i]
}

// need gives the frames of the given blocks, which ascend.
func (f *frames) need(blocks iter.Seq[uint32]) (list []want) {
	end := uint32(0)
	for b := range blocks {
		if b < end {
			continue
		}
		i := f.find(b)
		list = append(list, want{f, uint32(i)})
		x := f.at(i)
		end = x.first + x.Blocks
	}
	return list
}

// want is a frame to be fetched.
type want struct {
	of *frames
	i  uint32
}

func (w want) frame() frame { return w.of.at(int(w.i)) }

// request says how many of the wanted frames one range holds and how long it is.
func request(wanted []want) (n int, length int64) {
	from := wanted[0].frame().offset
	for _, w := range wanted {
		x := w.frame()
		start, end := x.offset, x.offset+int64(x.SizeBytes)
		if n > 0 && (w.of != wanted[0].of || start-from-length > maxGap || end-from > maxRequest) {
			break
		}
		n, length = n+1, end-from
	}
	return n, length
}

// supply is all that is to be fetched, in the order of the image.
type supply struct {
	source Source // patch or pack, which says how blocks are numbered
	list   []want
	bytes  int64
}

func newSupply(source Source, list []want) *supply {
	s := &supply{source: source, list: list}
	for rest := list; len(rest) > 0; {
		n, length := request(rest)
		s.bytes += length
		rest = rest[n:]
	}
	return s
}

// lost are blobs that could not be had, so that the other one has to do.
type lost struct{ pack, pieces bool }

// supply covers the blocks that are missing from first on, by the pack and, if they are
// worth their index, the pieces. One of them is enough.
func (r *Rebuild) supply(ctx context.Context, first int64, without lost) (*supply, error) {
	var pack *frames
	var whole *supply
	err := errors.New("the pack could not be had")
	if !without.pack {
		if pack, err = r.loadPack(ctx); err == nil {
			whole = newSupply(SourcePack, pack.need(r.missingFrom(first)))
		}
	}
	if without.pieces || r.o.Pieces.Fetch == nil || err == nil && !r.worthPieces(whole.bytes, first) {
		return whole, err
	}
	pieces, err2 := r.loadPieces(ctx)
	switch {
	case err2 != nil && err != nil:
		return nil, errors.Join(err, err2)
	case err2 != nil:
		return whole, ctx.Err()
	case err != nil:
		return newSupply(SourcePack, pieces.need(r.missingFrom(first))), ctx.Err()
	}
	mixed := newSupply(SourcePack, cover(pack, pieces, r.missingFrom(first)))
	if mixed.bytes < whole.bytes {
		return mixed, nil
	}
	return whole, nil
}

// worthPieces says whether the sizes of the pieces are there or likely to save more than they take.
func (r *Rebuild) worthPieces(packBytes, first int64) bool {
	r.packOnce.Lock()
	loaded := r.pieces != nil
	r.packOnce.Unlock()
	missing := int64(0)
	for range r.missingFrom(first) {
		missing++
	}
	return loaded || packBytes > 4*pieceSizesBytes(r.tree.blocks) && missing < r.tree.blocks/4*3
}

// rangeCost is about what a request takes besides its content, in bytes.
const rangeCost = 4 << 10

// cover takes each frame of the pack with blocks that are needed, or the pieces with
// these blocks, whichever is less.
func cover(pack, pieces *frames, blocks iter.Seq[uint32]) (list []want) {
	var group []want // the pieces that are needed in the pack's frame i
	i, frameEnd, pieceEnd := -1, uint32(0), uint32(0)
	flush := func() {
		cost, end := int64(0), int64(-1)
		for _, w := range group {
			x := w.frame()
			if gap := x.offset - end; end >= 0 && gap <= maxGap {
				cost += gap
			} else {
				cost += rangeCost
			}
			cost, end = cost+int64(x.SizeBytes), x.offset+int64(x.SizeBytes)
		}
		switch n := len(list); {
		case len(group) == 0:
		case cost >= int64(pack.at(i).SizeBytes)+rangeCost:
			list = append(list, want{pack, uint32(i)})
		case n > 0 && list[n-1] == group[0]: // it lies in two frames
			list = append(list, group[1:]...)
		default:
			list = append(list, group...)
		}
		group, pieceEnd = group[:0], 0
	}
	for b := range blocks {
		if b >= frameEnd {
			flush()
			i = pack.find(b)
			x := pack.at(i)
			frameEnd = x.first + x.Blocks
		}
		if b >= pieceEnd {
			k := pieces.find(b)
			group = append(group, want{pieces, uint32(k)})
			pieceEnd = uint32(k+1) * PieceBlocks
		}
	}
	flush()
	return list
}

// packed is a frame as it was fetched. After an error nothing follows.
type packed struct {
	of    *frames
	frame *frame
	data  []byte
	err   error
}

// fetcher gets the frames that are wanted.
type fetcher struct {
	r    *Rebuild
	from *supply
	out  chan packed
	free chan []byte // buffers that the decoder is done with
}

// run sends the needed frames in order until the context ends. A range that breaks
// off is asked for once more, from the frame in which it did.
func (f fetcher) run(ctx context.Context) {
	defer close(f.out)
	failed := 0 // how often in a row without a frame
	for rest := f.from.list; len(rest) > 0; {
		n, length := request(rest)
		got, err := f.get(ctx, rest[:n], length)
		rest = rest[got:]
		if got > 0 {
			failed = 0
		}
		if err == nil {
			continue
		}
		if failed++; failed == 2 || ctx.Err() != nil {
			f.send(ctx, packed{of: rest[0].of, err: err})
			return
		}
	}
}

// send says whether the context went on for long enough.
func (f fetcher) send(ctx context.Context, p packed) bool {
	select {
	case f.out <- p:
		return true
	case <-ctx.Done():
		return false
	}
}

// get sends the wanted frames, which are in one range, and says how many it has sent.
func (f fetcher) get(ctx context.Context, wanted []want, length int64) (sent int, err error) {
	of, at := wanted[0].of, wanted[0].frame().offset
	defer func(from int64) {
		if err != nil {
			err = fmt.Errorf("fetch bytes %d to %d of the %s, broken off at %d: %w", from, from+length, of.source, at, err)
		}
	}(at)
	body, err := f.r.open(ctx, of.blob, at, length)
	if err != nil {
		return 0, err
	}
	// Reading went well or its error is told; that closing fails changes nothing.
	defer func() { _ = body.Close() }()
	for _, w := range wanted {
		x := w.frame()
		if _, err := io.CopyN(io.Discard, body, x.offset-at); err != nil {
			return sent, err
		}
		at = x.offset
		var buf []byte
		select {
		case buf = <-f.free:
		case <-ctx.Done():
			return sent, ctx.Err()
		}
		buf = slices.Grow(buf[:0], int(x.SizeBytes))[:x.SizeBytes]
		if _, err := io.ReadFull(body, buf); err != nil {
			f.free <- buf // it came from there, so there is room
			return sent, err
		}
		at += int64(x.SizeBytes)
		if !f.send(ctx, packed{of: of, frame: &x, data: buf}) {
			return sent, ctx.Err()
		}
		sent++
	}
	return sent, nil
}

// stream hands the image out.
type stream struct {
	r      *Rebuild
	ctx    context.Context
	cancel context.CancelFunc
	hash   *hasher

	have    []byte // checked, not handed out yet
	batch   []byte
	next    int64  // block
	ordinal uint32 // of the next block that the patch counts
	tail    bool   // the tree has been handed out
	err     error

	from  *supply // what is fetched: r.from, until a blob is given up
	fetch fetcher
	lost  lost

	plain, withDict decoder
	dict            []byte
	current         *frame
	currentOf       *frames
	content         []byte // of current; empty if it could not be unpacked
	broken          error  // why

	repaired want
	spare    []byte // content of repaired, if that is of a blob
	// repairFrame is the pack's frame of the last repair, repairs how many blocks of it were.
	repairFrame, repairs int
}

// Open starts a stream of the whole image, TotalBytes of it, in order. Reading it
// gives only bytes that are right; an error names the block and where it should have
// come from. A range that breaks off, or brings wrong bytes, is fetched once more; a
// patch that then still cannot be had is replaced by pack and pieces, and one of these
// by the other. The stream must be closed, and ends with the context.
func (r *Rebuild) Open(ctx context.Context) (io.ReadCloser, error) {
	plain, err := newDecoder(maxFrameBytes)
	if err != nil {
		return nil, fmt.Errorf("rebuild root: %w", err)
	}
	withDict, err := newDecoder(maxFrameBytes)
	if err != nil {
		return nil, fmt.Errorf("rebuild root: %w", err)
	}
	s := &stream{r: r, hash: r.tree.newHasher(), batch: make([]byte, batchBlocks*BlockSize), plain: plain, withDict: withDict}
	s.ctx, s.cancel = context.WithCancel(ctx)
	if r.from != nil {
		s.start(r.from)
	}
	return s, nil
}

// start begins to fetch what is needed of a blob.
func (s *stream) start(from *supply) {
	s.from, s.current = from, nil
	s.fetch = fetcher{s.r, from, make(chan packed, prefetched), make(chan []byte, prefetched+1)}
	for range cap(s.fetch.free) {
		s.fetch.free <- nil // made when first needed
	}
	go s.fetch.run(s.ctx)
}

// leave goes on without a blob from block i on, because it cannot be had.
func (s *stream) leave(i int64, of *frames, cause error) error {
	s.lost.pack = s.lost.pack || of.source == SourcePack
	s.lost.pieces = s.lost.pieces || of.source == sourcePieces
	if s.lost.pack && s.lost.pieces || s.ctx.Err() != nil {
		return cause
	}
	from, err := s.r.supply(s.ctx, i, s.lost)
	if err != nil {
		return errors.Join(cause, err)
	}
	s.start(from)
	return nil
}

// Close stops fetching and waits until it has stopped.
func (s *stream) Close() error {
	s.cancel()
	if s.from != nil {
		for range s.fetch.out { //nolint:revive // only until it is closed
		}
	}
	s.plain.Close()
	s.withDict.Close()
	s.err = errors.New("rebuild root: the stream is closed")
	return nil
}

func (s *stream) Read(p []byte) (int, error) {
	for len(s.have) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		if err := s.fill(); err != nil {
			s.err = err
		}
	}
	n := copy(p, s.have)
	s.have = s.have[n:]
	return n, nil
}

// fill brings the next batch, or the tree behind the last one.
func (s *stream) fill() error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	t := s.r.tree
	if s.next == t.blocks {
		if s.tail {
			return io.EOF
		}
		s.tail, s.have = true, t.bytes
		return nil
	}
	n := min(batchBlocks, t.blocks-s.next)
	batch := s.batch[:n*BlockSize]
	for i := int64(0); i < n; {
		got, err := s.load(s.next+i, batch[i*BlockSize:])
		if err != nil {
			return err
		}
		i += got
	}
	for i := range n {
		block := batch[i*BlockSize : (i+1)*BlockSize]
		if s.hash.valid(s.next+i, block) {
			continue
		}
		if err := s.repair(s.next+i, block); err != nil {
			return err
		}
	}
	s.next, s.have = s.next+n, batch
	return nil
}

// load puts the block i, and those behind it that come from the same place, where they
// belong and says how many. What a slot or a frame gives is checked by fill, so only
// fetching can fail.
func (s *stream) load(i int64, into []byte) (int64, error) {
	r, limit := s.r, int64(len(into)/BlockSize)
	from := r.copyOf[i]
	if !r.inPlace[i] && from == noBlock {
		return 1, s.loadFrame(i, into[:BlockSize])
	}
	n := int64(1)
	if r.inPlace[i] {
		for n < limit && r.inPlace[i+n] {
			n++
		}
	} else {
		for n < limit && !r.inPlace[i+n] && r.copyOf[i+n] == from+uint32(n) {
			n++
		}
	}
	slot, at := r.o.Old, int64(from)
	if r.inPlace[i] {
		slot, at = r.o.Target, i
		for k := range n {
			if r.copyOf[i+k] == noBlock {
				s.ordinal++
			}
		}
	}
	readBlocks(slot, at, into[:n*BlockSize])
	return n, nil
}

// readBlocks reads as much as can be read, block by block if need be, and leaves zeros
// in place of the rest.
func readBlocks(slot io.ReaderAt, first int64, into []byte) {
	if n, _ := slot.ReadAt(into, first*BlockSize); n == len(into) {
		return
	}
	for i := int64(0); i*BlockSize < int64(len(into)); i++ {
		block := into[i*BlockSize : (i+1)*BlockSize]
		if n, _ := slot.ReadAt(block, (first+i)*BlockSize); n < BlockSize {
			clear(block)
		}
	}
}

// loadFrame takes a block from the frame that holds it.
func (s *stream) loadFrame(i int64, into []byte) error {
	number := func() uint32 {
		if s.from.source == SourcePatch {
			return s.ordinal
		}
		return uint32(i)
	}
	for s.current == nil || number() >= s.current.first+s.current.Blocks {
		p, ok := <-s.fetch.out
		switch {
		case !ok:
			return errors.Join(fmt.Errorf("rebuild block %d: the %s has no frame for it", i, s.from.source), s.ctx.Err())
		case p.err != nil:
			if err := s.leave(i, p.of, p.err); err != nil {
				return fmt.Errorf("rebuild block %d: %w", i, err)
			}
		default:
			s.current, s.currentOf = p.frame, p.of
			s.content, s.broken = s.unpack(p.frame, p.data, s.content)
			s.fetch.free <- p.data
		}
	}
	at := number() - s.current.first
	s.ordinal++
	if s.broken != nil {
		clear(into)
		return nil
	}
	copy(into, s.content[at*BlockSize:])
	return nil
}

// unpack gives the content of a frame in into's memory.
func (s *stream) unpack(f *frame, data, into []byte) ([]byte, error) {
	d, want := s.plain, int(f.Blocks)*BlockSize
	if len(f.Dict) > 0 {
		size := 0
		for _, x := range f.Dict {
			size += int(x.Blocks) * BlockSize
		}
		s.dict = slices.Grow(s.dict[:0], size)[:size]
		at := 0
		for _, x := range f.Dict {
			n := int(x.Blocks) * BlockSize
			readBlocks(s.r.o.Old, int64(x.First), s.dict[at:at+n])
			at += n
		}
		if d = s.withDict; d.useDict(s.dict) != nil {
			return into[:0], errors.New("the decoder does not take the dictionary")
		}
	}
	out, err := d.decode(data, slices.Grow(into[:0], want), want)
	if err != nil {
		return into[:0], err
	}
	return out, nil
}

// repair takes a block that is not what it should be from elsewhere: the old slot,
// if it was not from there, and at last the pack. If it was from the pack it is fetched
// again, because not all connections notice when bytes change on the way.
func (s *stream) repair(i int64, block []byte) error {
	r := s.r
	where := fmt.Sprintf("old block %d", r.copyOf[i])
	switch {
	case r.inPlace[i]:
		where = "the target slot"
		if from := r.copyOf[i]; from != noBlock {
			readBlocks(r.o.Old, int64(from), block)
			if s.hash.valid(i, block) {
				return nil
			}
		}
	case r.copyOf[i] == noBlock:
		where = fmt.Sprintf("the frame at byte %d of the %s", s.current.offset, s.currentOf.source)
		if s.broken != nil {
			where += fmt.Sprintf(" (%v)", s.broken)
		}
	}
	if err := s.refetch(i, block); err != nil {
		return fmt.Errorf("rebuild block %d: it is not in %s as it should be, and cannot be had from the pack: %w", i, where, err)
	}
	return nil
}

// maxRepairs of blocks in one frame of the pack are made with pieces, before the frame
// is fetched: a damaged place may be large, and each piece is a request.
const maxRepairs = 8

// refetch takes block i from a piece, or from the pack if there are no pieces, if theirs
// is not right, or if too many would be needed.
func (s *stream) refetch(i int64, block []byte) error {
	pack, err := s.r.loadPack(s.ctx)
	if err == nil {
		if k := pack.find(uint32(i)); k != s.repairFrame {
			s.repairFrame, s.repairs = k, 0
		}
		s.repairs++
	}
	if err != nil || s.repairs <= maxRepairs {
		if pieces, err := s.r.loadPieces(s.ctx); err == nil && s.fromBlob(pieces, i, block) == nil {
			return nil
		}
	}
	if err != nil {
		return err
	}
	return s.fromBlob(pack, i, block)
}

// fromBlob fetches the one frame that holds block i, unless it was the last one so
// fetched.
func (s *stream) fromBlob(of *frames, i int64, block []byte) error {
	w := want{of, uint32(of.find(uint32(i)))}
	f := w.frame()
	if s.repaired != w {
		s.repaired = want{}
		data, err := s.r.read(s.ctx, of.blob, f.offset, int64(f.SizeBytes))
		if err != nil {
			return err
		}
		if s.spare, err = s.unpack(&f, data, s.spare); err != nil {
			return fmt.Errorf("frame at byte %d: %w: the blob is damaged, was swapped, or is of another release", f.offset, err)
		}
		s.repaired = w
	}
	copy(block, s.spare[(uint32(i)-f.first)*BlockSize:])
	if !s.hash.valid(i, block) {
		return fmt.Errorf("frame at byte %d has something else: the blob is damaged, was swapped, or is of another release", f.offset)
	}
	return nil
}
