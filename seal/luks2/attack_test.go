package luks2

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// edit replaces text in the JSON area of one copy and signs it anew with its
// checksum, as anybody can who can write to the disk.
func edit(t testing.TB, dev memory, w which, old, new string) {
	t.Helper()
	c := decodeForEdit(t, dev, w)
	text, _, _ := bytes.Cut(c.json, []byte{0})
	changed := strings.Replace(string(text), old, new, 1)
	if changed == string(text) {
		t.Fatalf("%q is not in %s", old, text)
	}
	put(t, dev, w, c.bin, changed)
}

func decodeForEdit(t testing.TB, dev memory, w which) *headerCopy {
	t.Helper()
	c, err := decodeCopy(w, bytes.Clone(dev[w.offset():][:headerBytes]))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func put(t testing.TB, dev memory, w which, b binaryHeader, text string) {
	t.Helper()
	raw, err := b.encode(w, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	copy(dev[w.offset():], raw)
}

// TestHostileHeaders changes both copies, checksums right, and wants the header
// refused by a message that names the place (F81): null ciphers for the data and for a
// key area, a decryption that was begun (CVE-2021-4122), costs that no box can pay.
func TestHostileHeaders(t *testing.T) {
	pristine := dirty(t)
	h := newHeader(t)
	addSlot(t, h, "two", cheapArgon)
	provision(t, h, pristine)
	const (
		segment = `"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":4096`
		area    = `"offset":"32768","size":"258048","encryption":"aes-xts-plain64"`
	)
	for _, tt := range []struct{ name, old, new, want string }{
		{"cipher_null segment", segment, strings.Replace(segment, "aes-xts-plain64", "cipher_null-ecb", 1), "segments.0.encryption"},
		{"cipher_null keyslot", area, strings.Replace(area, "aes-xts-plain64", "cipher_null-ecb", 1), "keyslots.0.area.encryption"},
		{"linear segment", `"type":"crypt"`, `"type":"linear"`, "segments.0.type"},
		{"two segments", `"segments":{`, `"segments":{"1":{` + segment + `},`, "segments: there are 2"},
		{"no segment", `"0":{` + segment + `}`, ``, "segments: there are 0"},
		{"segment with another number", `"segments":{"0"`, `"segments":{"1"`, "segments: the segment is not number 0"},
		{"segment moved", `"offset":"16777216"`, `"offset":"16781312"`, "segments.0.offset"},
		{"segment over the header", `"offset":"16777216"`, `"offset":"0"`, "segments.0.offset"},
		{"segment cut short", `"size":"dynamic"`, `"size":"4096"`, "segments.0.size"},
		{"integrity", `"sector_size":4096`, `"sector_size":4096,"integrity":{}`, "segments.0.integrity.type is missing"},
		{"integrity added to a volume without", `"sector_size":4096`, `"sector_size":4096,"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`, "key_size is 64, outside 96 to 96"},
		{"integrity without a key", `"sector_size":4096`, `"sector_size":4096,"integrity":{"type":"none","journal_encryption":"none","journal_integrity":"none"}`, "segments.0.integrity.type"},
		{"backup segment of a reencryption", `"sector_size":4096`, `"sector_size":4096,"flags":["backup-final"]`, `segments.0: field "flags"`},
		{"odd sector size", `"sector_size":4096`, `"sector_size":1024`, "sector_size is 1024"},
		{"tweak", `"iv_tweak":"0"`, `"iv_tweak":"1"`, "segments.0.iv_tweak"},
		{"requirements", `"json_size"`, `"requirements":{"mandatory":["online-reencrypt"]},"json_size"`, "config.requirements"},
		{"unknown requirements", `"json_size"`, `"requirements":{"optional":[]},"json_size"`, `config.requirements: field "optional"`},
		{"reencrypt keyslot", `"type":"luks2"`, `"type":"reencrypt"`, "keyslots.0.type"},
		{"area over the header", `"offset":"32768"`, `"offset":"16384"`, "keyslots.0.area.offset"},
		{"area at a negative offset", `"offset":"32768"`, `"offset":"-4096"`, "keyslots.0.area.offset"},
		{"area over the data", `"offset":"32768"`, `"offset":"16773120"`, "outside the keyslots area"},
		{"areas overlap", `"offset":"290816"`, `"offset":"36864"`, "overlaps"},
		{"area not aligned", `"offset":"32768"`, `"offset":"32769"`, "not multiples of 4096"},
		{"area too small", `"size":"258048"`, `"size":"4096"`, "keyslots.0.area.size"},
		{"area beyond 64 bits", `"offset":"32768"`, `"offset":"18446744073709551616"`, "keyslots.0.area.offset"},
		{"area size as a number", `"size":"258048"`, `"size":258048`, "keyslots.0.area.size is not a string"},
		{"huge json_size", `"json_size":"12288"`, `"json_size":"4190208"`, "config.json_size"},
		{"huge keyslots_size", `"keyslots_size":"16744448"`, `"keyslots_size":"134217728"`, "config.keyslots_size"},
		{"unknown flag", `"keyslots_size":"16744448"`, `"keyslots_size":"16744448","flags":["no-journal"]`, `"no-journal"`},
		{"argon2 memory 2^40", `"memory":64`, `"memory":1099511627776`, "keyslots.1.kdf.memory"},
		{"argon2 memory beyond 64 bits", `"memory":64`, `"memory":1e40`, "keyslots.1.kdf.memory"},
		{"argon2 time", `"time":1`, `"time":4294967295`, "keyslots.1.kdf.time"},
		{"argon2 time and memory", `"time":1,"memory":64`, `"time":1024,"memory":4194304`, "more work"},
		{"argon2 no threads", `"cpus":2`, `"cpus":0`, "keyslots.1.kdf.cpus"},
		{"argon2 memory below its threads", `"memory":64,"cpus":2`, `"memory":64,"cpus":16`, "memory is 64 KiB"},
		{"argon2i", `"type":"argon2id"`, `"type":"argon2i"`, "keyslots.1.kdf.type"},
		{"endless pbkdf2", `"iterations":1000`, `"iterations":4294967295`, "keyslots.0.kdf.iterations"},
		{"endless digest", `"hash":"sha256","iterations":1000`, `"hash":"sha256","iterations":4294967295`, "digests.0.iterations"},
		{"one stripe", `"stripes":4000`, `"stripes":1`, "keyslots.0.af.stripes"},
		{"short volume key", `"key_size":64,"af"`, `"key_size":32,"af"`, "keyslots.0.key_size"},
		{"empty salt", `"salt":"`, `"salt":"","x":"`, "salt has 0 bytes"},
		{"digest of nothing", `"digests":{"0":`, `"digests":{"1":{},"0":`, "digests: there are 2"},
		{"digest without a slot", `"keyslots":["0","1"]`, `"keyslots":["0"]`, "digests.0.keyslots"},
		{"digest without the segment", `"segments":["0"]`, `"segments":[]`, "digests.0.segments"},
		{"digest cut short", `"digest":"`, `"digest":"AAAA","x":"`, "digests.0.digest has 3 bytes"},
		{"duplicate key", `"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"aes-xts-plain64","encryption":"cipher_null-ecb","sector_size"`, `duplicate key "encryption"`},
		{"duplicate key, escaped", `"sector_size"`, `"\u0065ncryption":"cipher_null-ecb","sector_size"`, `duplicate key "encryption"`},
		{"key in other case", `"sector_size"`, `"Encryption":"cipher_null-ecb","sector_size"`, `field "Encryption"`},
		{"key in other case only", `"encryption":"aes-xts-plain64","sector_size"`, `"Encryption":"aes-xts-plain64","sector_size"`, "segments.0.encryption is missing"},
		{"null", `"encryption":"aes-xts-plain64","sector_size"`, `"encryption":null,"sector_size"`, "segments.0.encryption is null"},
		{"slot number 32", `"keyslots":{"0"`, `"keyslots":{"32"`, `"32" is not a number from 0 to 31`},
		{"slot number 00", `"keyslots":{"0"`, `"keyslots":{"00"`, `"00" is not a number from 0 to 31`},
		{"token of no slot", `"tokens":{`, `"tokens":{"0":{"type":"x","keyslots":["9"]}`, "tokens.0: keyslots: keyslot 9"},
		{"deep nesting", `"tokens":{`, `"tokens":{"0":{"type":"x","keyslots":[],"y":` + strings.Repeat("[", 20) + strings.Repeat("]", 20) + `}`, "nested deeper"},
		{"unknown field", `"tokens":{`, `"future":{},"tokens":{`, `field "future"`},
		{"not UTF-8", `"json_size"`, "\"\xff\":1,\"json_size\"", "not valid JSON"},
		{"second document", `"keyslots_size":"16744448"}}`, `"keyslots_size":"16744448"}}{}`, "not valid JSON"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := memory(bytes.Clone(pristine[:keyslotsOffset]))
			for _, w := range []which{primary, secondary} {
				edit(t, dev, w, tt.old, tt.new)
			}
			_, _, err := Read(dev, testSize)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if errors.Is(err, ErrNoHeader) {
				t.Error("a hostile header counts as an empty partition")
			}
		})
	}
}

// TestHostileBinaryHeaders does the same to the fields before the JSON area.
func TestHostileBinaryHeaders(t *testing.T) {
	pristine := dirty(t)
	provision(t, newHeader(t), pristine)
	for _, tt := range []struct {
		name   string
		change func(b []byte) // before the checksum is made
		want   string
	}{
		{"version 1", func(b []byte) { b[7] = 1 }, "version is 1"},
		{"hdr_size 0", func(b []byte) { clear(b[8:16]) }, "hdr_size is 0"},
		{"hdr_size 2^63", func(b []byte) { b[8] = 0x80 }, "hdr_size is 9223372036854792192"},
		{"seqid 0", func(b []byte) { clear(b[16:24]) }, "seqid is 0"},
		{"seqid 2^64-1", func(b []byte) { copy(b[16:24], "\xff\xff\xff\xff\xff\xff\xff\xff") }, "seqid is 18446744073709551615"},
		{"csum_alg sha1", func(b []byte) { copy(b[72:], "sha1\x00\x00") }, `csum_alg is "sha1"`},
		{"uuid", func(b []byte) { copy(b[168:], "../../etc") }, "uuid is"},
		{"label with a control character", func(b []byte) { copy(b[24:], "a\x1b[2J") }, "label is"},
		{"label without an end", func(b []byte) { copy(b[24:], strings.Repeat("x", 48)) }, "label is"},
		{"bytes behind the label", func(b []byte) { copy(b[24:], "a\x00b") }, "label is"},
		{"hdr_offset", func(b []byte) { b[256+6] ^= 0x40 }, "hdr_offset is"},
		{"bytes behind the JSON text", func(b []byte) { b[headerBytes-2] = 'x' }, "bytes behind the JSON text"},
		{"no zero byte", func(b []byte) { copy(b[4096:], bytes.Repeat([]byte{' '}, jsonAreaBytes)) }, "does not end with a zero byte"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := memory(bytes.Clone(pristine[:keyslotsOffset]))
			for _, w := range []which{primary, secondary} {
				b := dev[w.offset():][:headerBytes]
				tt.change(b)
				checksum(b)
			}
			if _, _, err := Read(dev, testSize); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

// TestSeqIDGames plays one copy against the other.
func TestSeqIDGames(t *testing.T) {
	pristine := dirty(t)
	provision(t, newHeader(t), pristine)
	seq := func(dev memory, w which, n uint64, old, new string) {
		c := decodeForEdit(t, dev, w)
		c.bin.SeqID = n
		text, _, _ := bytes.Cut(c.json, []byte{0})
		put(t, dev, w, c.bin, strings.Replace(string(text), old, new, 1))
	}
	for _, tt := range []struct {
		name      string
		play      func(dev memory)
		wantSeq   uint64
		wantSound bool
	}{
		{"higher secondary wins", func(d memory) { seq(d, secondary, 7, "", "") }, 7, false},
		{"higher primary wins", func(d memory) { seq(d, primary, 7, "", "") }, 7, false},
		{"hostile copy with the higher number loses", func(d memory) { seq(d, primary, 9, "aes-xts-plain64", "cipher_null-ecb") }, 1, false},
		{"hostile number loses", func(d memory) { seq(d, secondary, 1<<62+1, "", "") }, 1, false},
		{"equal numbers, other content: primary wins", func(d memory) { seq(d, secondary, 1, `"sector_size":4096`, `"sector_size":512`) }, 1, false},
		{"last number", func(d memory) { seq(d, primary, 1<<62, "", ""); seq(d, secondary, 1<<62, "", "") }, 1 << 62, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := memory(bytes.Clone(pristine))
			tt.play(dev)
			h, report, err := Read(dev, testSize)
			if err != nil {
				t.Fatalf("one copy is good, and Read says %v", err)
			}
			if _, _, sector, _ := h.Segment(); h.SeqID() != tt.wantSeq || report.Sound() != tt.wantSound || sector != 4096 {
				t.Errorf("seqid %d, sound %v, sector %d; want %d, %v, 4096", h.SeqID(), report.Sound(), sector, tt.wantSeq, tt.wantSound)
			}
			wantOpens(t, h, dev, "one", 0)
			if err := h.Repair(dev); err != nil {
				t.Fatal(err)
			}
			if got := read(t, dev); got.SeqID() != tt.wantSeq {
				t.Errorf("seqid %d after repair, want %d", got.SeqID(), tt.wantSeq)
			}
			if tt.wantSeq == 1<<62 {
				if err := h.Write(dev); err == nil || !strings.Contains(err.Error(), "is the last") {
					t.Errorf("write behind the last number: %v", err)
				}
			}
		})
	}
}

func TestDigestSwapped(t *testing.T) {
	dev := dirty(t)
	provision(t, newHeader(t), dev)
	other, err := Format(FormatOptions{UUID: testUUID, SizeBytes: testSize, Rand: testRand(8)}, random(t, 9, 64))
	if err != nil {
		t.Fatal(err)
	}
	h := read(t, dev)
	for _, w := range []which{primary, secondary} {
		edit(t, dev, w, encode64(h.meta.digest.value), encode64(other.meta.digest.value))
	}
	if key, _, err := read(t, dev).Unlock(dev, []byte("one")); !errors.Is(err, ErrPassphrase) || key != nil {
		t.Errorf("a key that the digest does not vouch for: %v", err)
	}
}

func TestTruncatedPartition(t *testing.T) {
	dev := dirty(t)
	provision(t, newHeader(t), dev)
	for _, size := range []int64{0, 1, 512, 4096, 16384, 20000, 32767, 32768, dataOffset} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			if _, _, err := Read(dev[:size], size); err == nil || !strings.Contains(err.Error(), "truncated") {
				t.Errorf("error %v", err)
			}
			// A size that is a lie: the table says more than the medium has.
			h, _, err := Read(dev[:size], testSize)
			if size < headerBytes && err == nil {
				t.Error("half a header is accepted")
			}
			if err == nil {
				_, _, err = h.Unlock(dev[:size], []byte("one"))
				if size < keyslotsOffset+stripes*VolumeKeyBytes && (err == nil || errors.Is(err, ErrPassphrase)) {
					t.Errorf("unlock without a key area: %v", err)
				}
			}
		})
	}
}

func TestNoHeader(t *testing.T) {
	for name, dev := range map[string]memory{"random": dirty(t), "zeros": make(memory, testSize)} {
		if _, _, err := Read(dev, testSize); !errors.Is(err, ErrNoHeader) {
			t.Errorf("%s: %v, want ErrNoHeader", name, err)
		}
	}
	dev := dirty(t)
	provision(t, newHeader(t), dev)
	clear(dev[600:headerBytes])
	clear(dev[headerBytes:keyslotsOffset])
	if _, _, err := Read(dev, testSize); err == nil || errors.Is(err, ErrNoHeader) {
		t.Errorf("a damaged volume: %v; it is not an empty partition", err)
	}
}

// TestTOCTOU has the device answer with a hostile header the second time.
func TestTOCTOU(t *testing.T) {
	dev := dirty(t)
	provision(t, newHeader(t), dev)
	h := read(t, dev)
	for _, w := range []which{primary, secondary} {
		edit(t, dev, w, "aes-xts-plain64\",\"sector_size", "cipher_null-ecb\",\"sector_size")
	}
	if _, _, _, cipher := h.Segment(); cipher != "aes-xts-plain64" {
		t.Errorf("cipher %s", cipher)
	}
	wantOpens(t, h, dev, "one", 0)
}

// TestKnownVariants are headers that other tools make and that must not be refused.
func TestKnownVariants(t *testing.T) {
	pristine := dirty(t)
	provision(t, newHeader(t), pristine)
	for _, tt := range []struct{ name, old, new string }{
		{"flags", `"keyslots_size":"16744448"`, `"keyslots_size":"16744448","flags":["allow-discards","no-read-workqueue"]`},
		{"requirements met", `"json_size"`, `"requirements":{},"json_size"`},
		{"empty requirements", `"json_size"`, `"requirements":{"mandatory":[]},"json_size"`},
		{"foreign token", `"tokens":{`, `"tokens":{"4":{"type":"clevis","keyslots":["0"],"jwe":{"a":[1,2.5,null]}}`},
		{"digest with another number", `"digests":{"0"`, `"digests":{"1"`},
		{"spaces", `"json_size"`, " \n\t\"json_size\""},
		{"priority", `"key_size":64,"af"`, `"key_size":64,"priority":2,"af"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := memory(bytes.Clone(pristine))
			for _, w := range []which{primary, secondary} {
				edit(t, dev, w, tt.old, tt.new)
			}
			h := read(t, dev)
			tokens, flags := h.Tokens(), h.Flags()
			addSlot(t, h, "two", HighEntropyKDF())
			if err := h.Write(dev); err != nil {
				t.Fatal(err)
			}
			got := read(t, dev)
			wantOpens(t, got, dev, "two", 1)
			if fmt.Sprint(got.Flags()) != fmt.Sprint(flags) || len(got.Tokens()) != len(tokens) {
				t.Errorf("flags %v, tokens %v; want %v, %v", got.Flags(), got.Tokens(), flags, tokens)
			}
			for id, raw := range tokens {
				if !sameJSON(t, raw, got.Tokens()[id]) {
					t.Errorf("token %d is %s, was %s", id, got.Tokens()[id], raw)
				}
			}
		})
	}
}

func sameJSON(t testing.TB, a, b json.RawMessage) bool {
	t.Helper()
	var x, y bytes.Buffer
	if err := errors.Join(json.Compact(&x, a), json.Compact(&y, b)); err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(x.Bytes(), y.Bytes())
}

func TestTokens(t *testing.T) {
	dev := dirty(t)
	h := newHeader(t)
	addSlot(t, h, "two", HighEntropyKDF())
	both := json.RawMessage(`{"type":"x","keyslots":["0","1"],"html":"<&>","n":1.50}`)
	for want := range 2 {
		if id, err := h.SetToken(NextToken, both); err != nil || id != want {
			t.Fatalf("token %d, %v; want %d", id, err, want)
		}
	}
	if _, err := h.SetToken(0, RecoveryToken(1)); err != nil {
		t.Fatal(err)
	}
	if err := h.RemoveKeyslot(1); err != nil {
		t.Fatal(err)
	}
	provision(t, h, dev)
	got := read(t, dev).Tokens()
	want := json.RawMessage(`{"html":"<&>","keyslots":["0"],"n":1.50,"type":"x"}`)
	if len(got) != 1 || !sameJSON(t, got[1], want) {
		t.Errorf("tokens %v, want token 1 to be %s", got, want)
	}
	got[1][0] = 'X'
	if err := h.RemoveToken(1); err != nil || len(h.Tokens()) != 0 {
		t.Errorf("remove token: %v, left %v", err, h.Tokens())
	}
}
