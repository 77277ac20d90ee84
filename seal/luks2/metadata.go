package luks2

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Bounds of numbers that come from the disk, so that a header made of garbage
// or malice costs neither hours nor the machine's memory. cryptsetup's own
// benchmarks stay far below them.
const (
	maxIterations = 50_000_000
	minIterations = 1000
	// maxDigestIterations is lower: the digest is computed for every slot that is tried.
	maxDigestIterations = 10_000_000
	maxArgonTime        = 1024
	minArgonMemory      = 32      // KiB
	maxArgonMemory      = 4 << 20 // KiB: 4 GiB
	maxArgonThreads     = 16
	// maxArgonWork bounds time and memory together: 32 GiB filled, KiB.
	maxArgonWork = 32 << 20

	minSaltBytes = 16
	maxSaltBytes = 128
	maxJSONDepth = 16
)

// persistentFlags are the activation flags of config.flags that are about
// speed and discards; the others, such as no-journal, belong to volumes with
// integrity and would take from it.
var persistentFlags = [...]string{
	"allow-discards", "same-cpu-crypt", "submit-from-crypt-cpus", "no-read-workqueue", "no-write-workqueue",
}

// decodeMetadata reads the JSON text of a header. Each object is taken apart
// field by field and what is left over is an error, because a field that this
// package does not know may change what the header means (F81). Names match
// exactly; encoding/json on structs would also take "Encryption" for
// "encryption", and cryptsetup would not.
func decodeMetadata(text []byte) (*metadata, error) {
	if err := checkJSON(text); err != nil {
		return nil, err
	}
	c := &checker{}
	top := c.object("", text)
	m := &metadata{keyslots: map[int]keyslot{}, tokens: map[int]json.RawMessage{}}
	c.config(top.object("config"), m)
	c.segments(top.object("segments"), m)
	for id, o := range top.object("keyslots").numbered() {
		m.keyslots[id] = c.keyslot(o, m)
	}
	c.digests(top.object("digests"), m)
	tokens := top.object("tokens")
	for id, o := range tokens.numbered() {
		m.tokens[id] = bytes.Clone(o.raw)
	}
	top.done()
	if c.err != nil {
		return nil, c.err
	}
	if err := m.checkAreas(); err != nil {
		return nil, err
	}
	for id, raw := range m.tokens {
		if err := m.checkToken(raw); err != nil {
			return nil, fmt.Errorf("tokens.%d: %w", id, err)
		}
	}
	return m, nil
}

// checkAreas wants every key area inside the keyslots area and to itself.
func (m *metadata) checkAreas() error {
	ids := slices.Sorted(maps.Keys(m.keyslots))
	for i, id := range ids {
		a := m.keyslots[id].area
		if a.offset < keyslotsOffset || a.end() > dataOffset {
			return fmt.Errorf("keyslots.%d.area: bytes %d to %d lie outside the keyslots area, %d to %d", id, a.offset, a.end(), keyslotsOffset, dataOffset)
		}
		for _, other := range ids[:i] {
			if a.overlaps(m.keyslots[other].area) {
				return fmt.Errorf("keyslots.%d.area overlaps keyslots.%d.area", id, other)
			}
		}
	}
	return nil
}

func (c *checker) config(o object, m *metadata) {
	o.text("json_size", decimal(jsonAreaBytes))
	o.text("keyslots_size", decimal(keyslotsBytes))
	if raw, ok := o.optional("flags"); ok {
		m.flags = c.strings(o.at("flags"), raw)
		for _, f := range m.flags {
			if !slices.Contains(persistentFlags[:], f) {
				c.fail("%s: flag %q is not supported", o.at("flags"), f)
			}
		}
	}
	// cryptsetup may leave the empty object behind when a requirement was met.
	if raw, ok := o.optional("requirements"); ok {
		req := c.object(o.at("requirements"), raw)
		if raw, ok := req.optional("mandatory"); ok && len(c.strings(req.at("mandatory"), raw)) > 0 {
			c.fail("%s: the volume needs a feature that is not supported, or was being reencrypted", req.path)
		}
		req.done()
	}
	o.done()
}

func (c *checker) segments(o object, m *metadata) {
	all := o.numbered()
	if len(all) != 1 {
		c.fail("segments: there are %d; exactly one is supported", len(all))
		return
	}
	s, ok := all[0]
	if !ok {
		c.fail("segments: the segment is not number 0")
		return
	}
	s.text("type", "crypt")
	s.text("offset", decimal(dataOffset))
	s.text("size", "dynamic")
	s.text("iv_tweak", "0")
	s.text("encryption", Cipher)
	m.sectorSize = int(s.number("sector_size", 512, 4096))
	if c.err == nil && m.sectorSize != 512 && m.sectorSize != 4096 {
		c.fail("%s: sector_size is %d, not 512 or 4096", s.path, m.sectorSize)
	}
	if raw, ok := s.optional("integrity"); ok {
		i := c.object(s.at("integrity"), raw)
		i.text("type", integrityType)
		i.text("journal_encryption", "none")
		i.text("journal_integrity", "none")
		i.done()
		m.integrity = HMACSHA256
	}
	s.done()
}

// keyslot wants a key as long as the segment has it: that of a volume with
// integrity, taken for one without, would have its tags ignored.
func (c *checker) keyslot(o object, m *metadata) keyslot {
	s := keyslot{priority: 1}
	o.text("type", "luks2")
	o.number("key_size", int64(m.keyBytes()), int64(m.keyBytes()))
	if _, ok := o.fields["priority"]; ok {
		s.priority = int(o.number("priority", 0, 2))
	}
	af := o.object("af")
	af.text("type", "luks1")
	af.number("stripes", stripes, stripes)
	s.afHash = af.text("hash", "sha256", "sha512")
	af.done()

	area := o.object("area")
	area.text("type", "raw")
	area.text("encryption", Cipher)
	area.number("key_size", areaKeyBytes, areaKeyBytes)
	s.area.offset = area.size("offset", keyslotsOffset, dataOffset)
	s.area.size = area.size("size", int64(m.materialBytes()), keyslotsBytes)
	if c.err == nil && (s.area.offset%areaAlign != 0 || s.area.size%areaAlign != 0) {
		c.fail("%s: offset %d and size %d are not multiples of %d", area.path, s.area.offset, s.area.size, areaAlign)
	}
	area.done()

	s.kdf, s.salt = c.kdf(o.object("kdf"))
	o.done()
	return s
}

func (c *checker) kdf(o object) (KDF, []byte) {
	k := KDF{Type: o.text("type", Argon2id, PBKDF2)}
	switch k.Type {
	case PBKDF2:
		k.Hash = o.text("hash", "sha256", "sha512")
		k.Iterations = int(o.number("iterations", minIterations, maxIterations))
	case Argon2id:
		k.Time = uint32(o.number("time", 1, maxArgonTime))
		k.MemoryKiB = uint32(o.number("memory", minArgonMemory, maxArgonMemory))
		k.Parallel = uint8(o.number("cpus", 1, maxArgonThreads))
	}
	salt := o.bytes("salt", minSaltBytes, maxSaltBytes)
	if c.err == nil {
		if err := k.check(); err != nil {
			c.fail("%s: %w", o.path, err)
		}
	}
	o.done()
	return k, salt
}

// digests wants the one digest to vouch for every keyslot and the segment:
// a slot without it would open to a key that nothing has checked.
func (c *checker) digests(o object, m *metadata) {
	all := o.numbered()
	if len(all) != 1 {
		c.fail("digests: there are %d; exactly one is supported", len(all))
		return
	}
	for id, d := range all {
		m.digestID = id
		d.text("type", "pbkdf2")
		if ids := d.ids("segments"); c.err == nil && !slices.Equal(ids, []int{0}) {
			c.fail("%s.segments: the digest does not cover segment 0 alone", d.path)
		}
		if ids := d.ids("keyslots"); c.err == nil && !slices.Equal(ids, slices.Sorted(maps.Keys(m.keyslots))) {
			c.fail("%s.keyslots: the digest covers keyslots %v, and the header has %v", d.path, ids, slices.Sorted(maps.Keys(m.keyslots)))
		}
		m.digest.hash = d.text("hash", "sha256", "sha512")
		m.digest.iterations = int(d.number("iterations", minIterations, maxDigestIterations))
		m.digest.salt = d.bytes("salt", minSaltBytes, maxSaltBytes)
		if c.err == nil {
			n := newHash(m.digest.hash)().Size()
			m.digest.value = d.bytes("digest", n, n)
		}
		d.done()
	}
}

// checkJSON wants one object in valid UTF-8, without duplicate keys, on which
// two parsers could take different values, and not too deep.
func checkJSON(text []byte) error {
	if !utf8.Valid(text) || !json.Valid(text) {
		return errors.New("the metadata is not valid JSON")
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := checkValue(dec, "", 0); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("the metadata has text behind the JSON object")
	}
	return nil
}

// checkValue consumes one value from dec.
func checkValue(dec *json.Decoder, path string, depth int) error {
	if depth > maxJSONDepth {
		return fmt.Errorf("%s: JSON is nested deeper than %d", path, maxJSONDepth)
	}
	tok, err := dec.Token()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	delim, ok := tok.(json.Delim)
	if !ok {
		return nil
	}
	seen := map[string]bool{}
	for i := 0; dec.More(); i++ {
		name := strconv.Itoa(i)
		if delim == '{' {
			key, err := dec.Token()
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			name = key.(string)
			if seen[name] {
				return fmt.Errorf("%s: duplicate key %q", path, name)
			}
			seen[name] = true
		}
		if err := checkValue(dec, join(path, name), depth+1); err != nil {
			return err
		}
	}
	_, err = dec.Token() // the closing bracket
	return err
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// checker keeps the first error of a decode, so that the decoders above read as
// the list of fields they are. After an error, values are zero.
type checker struct{ err error }

func (c *checker) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf(format, args...)
	}
}

// object is a JSON object whose fields are taken out one by one.
type object struct {
	c      *checker
	path   string
	raw    json.RawMessage
	fields map[string]json.RawMessage
}

func (c *checker) object(path string, raw json.RawMessage) object {
	o := object{c: c, path: path, raw: raw}
	if c.err != nil {
		return o
	}
	if err := json.Unmarshal(raw, &o.fields); err != nil || o.fields == nil {
		c.fail("%s is not a JSON object", nameOf(path))
	}
	return o
}

func nameOf(path string) string {
	if path == "" {
		return "the metadata"
	}
	return path
}

func (c *checker) strings(path string, raw json.RawMessage) []string {
	var list []*string // a pointer, because null would decode to ""
	if err := json.Unmarshal(raw, &list); err != nil {
		c.fail("%s is not a list of strings", path)
		return nil
	}
	var out []string
	for _, s := range list {
		if s == nil {
			c.fail("%s is not a list of strings", path)
			return nil
		}
		out = append(out, *s)
	}
	return out
}

func (o object) at(name string) string { return join(o.path, name) }

// optional takes a field out. null is no value of any field of this format.
func (o object) optional(name string) (json.RawMessage, bool) {
	raw, ok := o.fields[name]
	if !ok || o.c.err != nil {
		return nil, false
	}
	delete(o.fields, name)
	if string(raw) == "null" {
		o.c.fail("%s is null", o.at(name))
		return nil, false
	}
	return raw, true
}

func (o object) take(name string) (json.RawMessage, bool) {
	raw, ok := o.optional(name)
	if !ok {
		o.c.fail("%s is missing", o.at(name))
	}
	return raw, ok
}

func (o object) object(name string) object {
	raw, ok := o.take(name)
	if !ok {
		return object{c: o.c, path: o.at(name)}
	}
	return o.c.object(o.at(name), raw)
}

// numbered takes all fields out: objects whose names are ids.
func (o object) numbered() map[int]object {
	out := map[int]object{}
	for name := range maps.Clone(o.fields) {
		id, ok := parseID(name)
		if !ok {
			o.c.fail("%s: %q is not a number from 0 to %d", o.path, name, MaxKeyslots-1)
			return nil
		}
		out[id] = o.object(name)
	}
	return out
}

func parseID(s string) (int, bool) {
	id, err := strconv.Atoi(s)
	return id, err == nil && id >= 0 && id < MaxKeyslots && strconv.Itoa(id) == s
}

// str takes a string field.
func (o object) str(name string) (string, bool) {
	raw, ok := o.take(name)
	if !ok {
		return "", false
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		o.c.fail("%s is not a string", o.at(name))
		return "", false
	}
	return s, true
}

// text takes a string that has to be one of a few.
func (o object) text(name string, allowed ...string) string {
	s, ok := o.str(name)
	if ok && !slices.Contains(allowed, s) {
		o.c.fail("%s is %q; supported: %s", o.at(name), s, strings.Join(allowed, ", "))
		return ""
	}
	return s
}

// number takes an integer from lo to hi, both included.
func (o object) number(name string, lo, hi int64) int64 {
	raw, ok := o.take(name)
	if !ok {
		return 0
	}
	var n int64
	if err := json.Unmarshal(raw, &n); err != nil {
		o.c.fail("%s is not an integer that fits 64 bits", o.at(name))
		return 0
	}
	return o.bounded(name, n, lo, hi)
}

// size takes a byte count or offset, which the format writes as a string.
func (o object) size(name string, lo, hi int64) int64 {
	s, ok := o.str(name)
	if !ok {
		return 0
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || decimal(n) != s {
		o.c.fail("%s is %q, not a decimal number", o.at(name), s)
		return 0
	}
	return o.bounded(name, n, lo, hi)
}

func (o object) bounded(name string, n, lo, hi int64) int64 {
	if n < lo || n > hi {
		o.c.fail("%s is %d, outside %d to %d", o.at(name), n, lo, hi)
		return 0
	}
	return n
}

// bytes takes a base64 string of lo to hi bytes.
func (o object) bytes(name string, lo, hi int) []byte {
	s, ok := o.str(name)
	if !ok {
		return nil
	}
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil {
		o.c.fail("%s is not base64", o.at(name))
		return nil
	}
	if len(b) < lo || len(b) > hi {
		o.c.fail("%s has %d bytes, not %d to %d", o.at(name), len(b), lo, hi)
		return nil
	}
	return b
}

// ids takes a list of ids, which comes back sorted.
func (o object) ids(name string) []int {
	raw, ok := o.take(name)
	if !ok {
		return nil
	}
	var out []int
	for _, s := range o.c.strings(o.at(name), raw) {
		id, ok := parseID(s)
		if !ok || slices.Contains(out, id) {
			o.c.fail("%s: %q is not an id, or is there twice", o.at(name), s)
			return nil
		}
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// done refuses the fields that nobody took.
func (o object) done() {
	if o.c.err == nil && len(o.fields) > 0 {
		name := slices.Sorted(maps.Keys(o.fields))[0]
		o.c.fail("%s: field %q is not supported", nameOf(o.path), name)
	}
}
