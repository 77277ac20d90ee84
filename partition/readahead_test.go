package partition

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// TestReadAhead: the same bytes and the same error, whatever the pieces; Close ends the
// reading wherever it is, and closes what was read.
func TestReadAhead(t *testing.T) {
	broken := errors.New("broken")
	want := make([]byte, 5<<20+17)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range want {
		want[i] = byte(r.Uint32())
	}
	for name, source := range map[string]func(io.Reader) io.Reader{
		"whole": func(r io.Reader) io.Reader { return r }, "half": iotest.HalfReader, "error with data": iotest.DataErrReader,
		"fails": func(r io.Reader) io.Reader { return io.MultiReader(r, iotest.ErrReader(broken)) },
	} {
		c := &closing{Reader: source(bytes.NewReader(want))}
		a := newReadAhead(c)
		got, err := io.ReadAll(iotest.HalfReader(a))
		if !bytes.Equal(got, want) || (name == "fails") != errors.Is(err, broken) {
			t.Errorf("%s: %d bytes of %d, or others: %v", name, len(got), len(want), err)
		}
		if n, again := a.Read(make([]byte, 1)); n != 0 || name == "fails" && again != broken || name != "fails" && again != io.EOF {
			t.Errorf("%s: behind the end: %d bytes, %v", name, n, again)
		}
		if err := a.Close(); err != nil || !c.closed {
			t.Errorf("%s: close: %v, closed %t", name, err, c.closed)
		}
	}
	for _, n := range []int64{0, 1, 1 << 20, 4 << 20} {
		c := &closing{Reader: bytes.NewReader(want)}
		a := newReadAhead(c)
		if _, err := io.CopyN(io.Discard, a, n); err != nil {
			t.Fatal(err)
		}
		if err := a.Close(); err != nil || !c.closed {
			t.Errorf("closed after %d bytes: %v, closed %t", n, err, c.closed)
		}
	}
}

type closing struct {
	io.Reader
	closed bool
}

func (c *closing) Close() error { c.closed = true; return nil }
func (c *closing) Read(p []byte) (int, error) {
	if c.closed {
		panic("read after close")
	}
	return c.Reader.Read(p)
}
