package luks2

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

// checksum signs one copy anew.
func checksum(raw []byte) {
	clear(raw[checksumOffset:binaryHeaderUsed])
	sum := sha256.Sum256(raw)
	copy(raw[checksumOffset:], sum[:])
}

// FuzzRead puts any bytes into a header whose checksum is right. What is
// accepted must mean the same when it is written and read again, and opening it
// must be affordable. Run it with -fuzzminimizetime 10x: the inputs are long, and
// minimizing them takes longer than finding them.
func FuzzRead(f *testing.F) {
	dev := dirty(f)
	h := newHeader(f)
	addSlot(f, h, "two", cheapArgon)
	if _, err := h.SetToken(NextToken, RecoveryToken(1)); err != nil {
		f.Fatal(err)
	}
	provision(f, h, dev)
	good := bytes.Clone(dev[:headerBytes])
	text, _, _ := bytes.Cut(good[binaryHeaderBytes:], []byte{0})
	f.Add(good[:checksumOffset], text)
	f.Add(good[:checksumOffset], bytes.Replace(text, []byte(`"json_size"`), []byte(`"flags":[],"json_size"`), 1))
	f.Add(good[:checksumOffset], bytes.ReplaceAll(bytes.Replace(bytes.ReplaceAll(text, []byte(`"258048"`), []byte(`"385024"`)),
		[]byte(`"sector_size":4096`), []byte(`"sector_size":4096`+integrityObject), 1), []byte(`"key_size":64,"af"`), []byte(`"key_size":96,"af"`)))
	f.Add([]byte(magicPrimary), []byte(`{"keyslots":{},"tokens":{},"segments":{},"digests":{},"config":{}}`))
	f.Fuzz(func(t *testing.T, bin, text []byte) {
		raw := make(memory, keyslotsOffset)
		copy(raw[:checksumOffset], bin)
		copy(raw[binaryHeaderBytes:headerBytes], text)
		checksum(raw[:headerBytes])
		h, _, err := Read(raw, testSize)
		if err != nil {
			return
		}
		for _, s := range h.Keyslots() {
			if err := s.KDF.check(); err != nil {
				t.Fatalf("accepted keyslot %d: %v", s.ID, err)
			}
		}
		if len(h.meta.keyslots) == 0 {
			return // readable, but never written
		}
		first, err := h.encode(primary, h.seqID)
		if err != nil {
			// Defaults and Go's spelling may be longer than what was there, so a full JSON area may overflow.
			if len(text) > jsonAreaBytes/2 && strings.Contains(err.Error(), "JSON area") {
				return
			}
			t.Fatal(err)
		}
		again, _, err := Read(append(memory(first), make([]byte, headerBytes)...), testSize)
		if err != nil {
			t.Fatalf("own encoding refused: %v", err)
		}
		if a, b := meaning(t, h), meaning(t, again); !reflect.DeepEqual(a, b) {
			t.Fatalf("read %+v\nwritten and read %+v", a, b)
		}
		second, err := again.encode(primary, again.seqID)
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("encoding is not stable: %v", err)
		}
	})
}

// meaning is a header without what depends on spelling or place.
func meaning(t *testing.T, h *Header) Header {
	m := *h
	m.identity = [32]byte{}
	m.meta.tokens = map[int]json.RawMessage{}
	for id, raw := range h.meta.tokens {
		var b bytes.Buffer
		if err := json.Compact(&b, raw); err != nil {
			t.Fatal(err)
		}
		m.meta.tokens[id] = b.Bytes()
	}
	if len(m.meta.flags) == 0 {
		m.meta.flags = nil
	}
	return m
}
