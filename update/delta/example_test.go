package delta_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"testing"

	"github.com/holdfast-os/holdfast/update/delta"
)

// A device settles how to come by a release, decides whether it can afford it, and
// then writes the stream into the inactive slot.
func Example() {
	var t testing.T // the releases of the tests
	was, is := build(&t, files(&t, map[string][]byte{"/bin/service": text(1, 300_000), "/etc/motd": text(2, 50_000)}), "salt"),
		build(&t, files(&t, map[string][]byte{"/bin/service": rebuilt(text(1, 300_000)), "/etc/motd": text(2, 50_000)}), "salt")
	web := func(b []byte) delta.Blob { // over HTTP: a range request
		return delta.Blob{SizeBytes: int64(len(b)), Fetch: func(_ context.Context, off, n int64) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(b[off : off+n])), nil
		}}
	}

	ctx := context.Background()
	r, err := delta.New(ctx, delta.Options{
		Verity: is.v, Tree: web(is.tree), Pack: web(is.pack),
		Old: bytes.NewReader(was.root), OldVerity: was.v,
	})
	if err != nil {
		log.Fatal(err)
	}
	s := r.Stats()
	fmt.Println("source:", s.Source, "- less than the pack:", s.BytesToFetch < int64(len(is.pack)))

	in, err := r.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	var slot bytes.Buffer
	if _, err := io.Copy(&slot, in); err != nil {
		log.Fatal(err)
	}
	if err := in.Close(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("right:", bytes.Equal(slot.Bytes(), is.root))
	// Output:
	// source: index - less than the pack: true
	// right: true
}
