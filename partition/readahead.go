package partition

import "io"

// aheadPieces of aheadBytes each may wait for a reader; delta's streams give as much
// at a time.
const (
	aheadPieces = 8
	aheadBytes  = 256 << 10
)

// readAhead reads from another reader while its own is busy with what came before. It
// gives the same bytes, and the same error behind them.
type readAhead struct {
	r     io.ReadCloser
	ready chan aheadPiece
	free  chan []byte
	stop  chan struct{}

	piece aheadPiece
	rest  []byte // of piece, not handed out yet
}

// aheadPiece is what one Read gave.
type aheadPiece struct {
	buf []byte // its whole buffer
	n   int
	err error
}

func newReadAhead(r io.ReadCloser) *readAhead {
	a := &readAhead{r: r, ready: make(chan aheadPiece, aheadPieces), free: make(chan []byte, aheadPieces), stop: make(chan struct{})}
	for range aheadPieces {
		a.free <- nil // made when first needed
	}
	go a.run()
	return a
}

func (a *readAhead) run() {
	defer close(a.ready)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		if buf == nil {
			buf = make([]byte, aheadBytes)
		}
		n, err := a.r.Read(buf)
		a.ready <- aheadPiece{buf, n, err} // there are no more pieces than places
		if err != nil {
			return
		}
	}
}

func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.piece.err != nil {
			return 0, a.piece.err
		}
		if a.piece.buf != nil {
			a.free <- a.piece.buf
		}
		a.piece = <-a.ready
		a.rest = a.piece.buf[:a.piece.n]
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close waits for a Read that is under way, which the end of its context ends, and
// closes the other reader.
func (a *readAhead) Close() error {
	close(a.stop)
	for range a.ready { //nolint:revive // only until it is closed
	}
	return a.r.Close()
}
