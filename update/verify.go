package update

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
)

// holdBytes is how much a verifying reader keeps back; a blob that is smaller is
// verified before its first byte is given out.
const holdBytes = 64 << 10

// verifier gives out the bytes of a blob and keeps back the last ones until length
// and SHA-256 of the whole were found right. Who reads to io.EOF without another
// error has read exactly the blob.
type verifier struct {
	src  io.ReadCloser
	name string
	hash hash.Hash
	want []byte
	left int64 // not read from src yet

	ready []byte // may be given out
	held  []byte // read and hashed, kept back
	spare []byte
	err   error
}

// newVerifier reads the rest of b from src. h has hashed what precedes it, which is
// all but left bytes.
func newVerifier(src io.ReadCloser, b Blob, h hash.Hash, left int64) (*verifier, error) {
	want, err := hex.DecodeString(b.SHA256)
	if err != nil {
		return nil, err
	}
	return &verifier{
		src: src, name: b.Role, hash: h, want: want, left: left,
		held: make([]byte, 0, holdBytes), spare: make([]byte, 0, holdBytes),
	}, nil
}

func (v *verifier) Read(p []byte) (int, error) {
	for len(v.ready) == 0 && v.err == nil {
		v.advance()
	}
	if len(v.ready) == 0 {
		return 0, v.err
	}
	n := copy(p, v.ready)
	v.ready = v.ready[n:]
	return n, nil
}

// advance reads one more block. The block before it becomes ready, and with the
// last one that itself, when the hash is right.
func (v *verifier) advance() {
	if v.left == 0 {
		v.finish()
		return
	}
	block := v.spare[:min(v.left, holdBytes)]
	if _, err := io.ReadFull(v.src, block); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		v.err = fmt.Errorf("read blob %q with %d bytes to come: %w", v.name, v.left, err)
		return
	}
	v.hash.Write(block)
	v.left -= int64(len(block))
	v.ready, v.held, v.spare = v.held, block, v.held
}

func (v *verifier) finish() {
	if sum := v.hash.Sum(nil); !bytes.Equal(sum, v.want) {
		v.err = fmt.Errorf("blob %q: %w: its SHA-256 is %x and not %x; it was damaged on the way, or somebody changed it",
			v.name, ErrUntrusted, sum, v.want)
		return
	}
	v.ready, v.held, v.err = v.held, nil, io.EOF
}

func (v *verifier) Close() error {
	if v.err == nil {
		v.err = errors.New("read of a closed blob")
	}
	v.ready = nil
	return v.src.Close()
}

// hashPrefix hashes what a caller already has of a blob.
func hashPrefix(have io.Reader, length int64) (hash.Hash, error) {
	h := sha256.New()
	if length == 0 {
		return h, nil
	}
	if n, err := io.Copy(h, io.LimitReader(have, length)); err != nil || n != length {
		return nil, fmt.Errorf("read back %d of the %d bytes that are there already: %w", n, length, errors.Join(err, io.ErrUnexpectedEOF))
	}
	return h, nil
}
