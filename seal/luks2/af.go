package luks2

import (
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"io"
)

// The anti-forensic splitter (LUKS1 On-Disk Format Specification 1.2.3 §2.4)
// blows the key up to 4000 stripes which are all needed to get it back, so that
// destroying any part of the key area destroys the key.

// afSplit returns stripes*len(key) bytes.
func afSplit(hashName string, key []byte, random io.Reader) ([]byte, error) {
	n := len(key)
	last := (stripes - 1) * n
	out := make([]byte, stripes*n)
	if _, err := io.ReadFull(random, out[:last]); err != nil {
		return nil, fmt.Errorf("read %d random bytes: %w", last, err)
	}
	d := afChain(hashName, out[:last], n)
	defer Wipe(d)
	subtle.XORBytes(out[last:], d, key)
	return out, nil
}

func afMerge(hashName string, material []byte) []byte {
	n := len(material) / stripes
	last := len(material) - n
	key := afChain(hashName, material[:last], n)
	subtle.XORBytes(key, key, material[last:])
	return key
}

// afChain folds all stripes but the last: d = H(d xor stripe).
func afChain(hashName string, material []byte, n int) []byte {
	d := make([]byte, n)
	for i := 0; i < len(material); i += n {
		subtle.XORBytes(d, d, material[i:i+n])
		afDiffuse(hashName, d)
	}
	return d
}

// afDiffuse replaces each digest-sized piece of d by the hash of its number and
// itself; a last shorter piece takes as much of the hash as it needs.
func afDiffuse(hashName string, d []byte) {
	h := newHash(hashName)()
	var buf []byte
	for i := 0; i*h.Size() < len(d); i++ {
		piece := d[i*h.Size() : min((i+1)*h.Size(), len(d))]
		h.Reset()
		var num [4]byte
		binary.BigEndian.PutUint32(num[:], uint32(i))
		h.Write(num[:])
		h.Write(piece)
		buf = h.Sum(buf[:0])
		copy(piece, buf)
	}
	Wipe(buf)
}
