package luks2

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
)

const (
	magicPrimary   = "LUKS\xba\xbe"
	magicSecondary = "SKUL\xba\xbe"
	headerVersion  = 2
	checksumAlg    = "sha256"

	// maxSeqID leaves room to count: a header at the end of the number range
	// could be followed by none.
	maxSeqID = 1 << 62
)

// binaryHeader is the start of a header copy; big-endian, and followed by zeros
// up to 4096 bytes (specification §2.1).
type binaryHeader struct {
	Magic       [6]byte
	Version     uint16
	HdrSize     uint64 // with the JSON area
	SeqID       uint64
	Label       [48]byte
	ChecksumAlg [32]byte
	Salt        [64]byte
	UUID        [40]byte
	Subsystem   [48]byte
	HdrOffset   uint64 // of this copy
	_           [184]byte
	Checksum    [64]byte // over the whole copy with this field zero
}

const (
	binaryHeaderUsed = 512
	checksumOffset   = binaryHeaderUsed - 64
)

// which is a copy of the header: its place is which*headerBytes.
type which int

const (
	primary   which = 0
	secondary which = 1
)

func (w which) String() string {
	if w == primary {
		return "primary"
	}
	return "secondary"
}

func (w which) offset() int64 { return int64(w) * headerBytes }

func (w which) magic() string {
	if w == primary {
		return magicPrimary
	}
	return magicSecondary
}

// headerCopy is one copy as it lies on the device, decoded and found good.
type headerCopy struct {
	bin  binaryHeader
	json []byte // the whole JSON area
	meta metadata
}

// identity tells headers apart across their two copies, which differ in magic,
// offset, salt and checksum.
func (c *headerCopy) identity() [32]byte {
	h := sha256.New()
	var seq [8]byte
	binary.BigEndian.PutUint64(seq[:], c.bin.SeqID)
	h.Write(seq[:])
	h.Write(c.bin.Label[:])
	h.Write(c.bin.UUID[:])
	h.Write(c.bin.Subsystem[:])
	h.Write(c.json)
	return [32]byte(h.Sum(nil))
}

// encode makes the bytes of one copy of the header with the given sequence number.
func (h *Header) encode(w which, seqID uint64) ([]byte, error) {
	if len(h.meta.keyslots) == 0 {
		return nil, errors.New("the header has no keyslot: nobody could open the volume again")
	}
	text, err := h.meta.encode()
	if err != nil {
		return nil, err
	}
	b := binaryHeader{SeqID: seqID, Salt: h.salts[w]}
	copy(b.Label[:], h.label)
	copy(b.UUID[:], h.uuid)
	copy(b.Subsystem[:], h.subsystem)
	return b.encode(w, text)
}

// encode fills in the fields that depend on the place of the copy, and the checksum.
func (b binaryHeader) encode(w which, jsonText []byte) ([]byte, error) {
	copy(b.Magic[:], w.magic())
	b.Version = headerVersion
	b.HdrSize = headerBytes
	b.ChecksumAlg = [32]byte{}
	copy(b.ChecksumAlg[:], checksumAlg)
	b.HdrOffset = uint64(w.offset())
	b.Checksum = [64]byte{}
	out := make([]byte, 0, headerBytes)
	out, err := binary.Append(out, binary.BigEndian, &b)
	if err != nil {
		return nil, fmt.Errorf("encode LUKS2 binary header: %w", err)
	}
	out = out[:headerBytes] // the rest is zero: fresh memory
	copy(out[binaryHeaderBytes:], jsonText)
	sum := sha256.Sum256(out)
	copy(out[checksumOffset:], sum[:])
	return out, nil
}

// decodeCopy checks one copy of the header: place, checksum, then every field.
func decodeCopy(w which, raw []byte) (*headerCopy, error) {
	var c headerCopy
	b := &c.bin
	if _, err := binary.Decode(raw[:binaryHeaderUsed], binary.BigEndian, b); err != nil {
		return nil, fmt.Errorf("decode binary header: %w", err)
	}
	if string(b.Magic[:]) != w.magic() {
		return nil, fmt.Errorf("magic is %q, not %q: %w", b.Magic, w.magic(), ErrNoHeader)
	}
	switch {
	case b.Version != headerVersion:
		return nil, fmt.Errorf("version is %d, not %d", b.Version, headerVersion)
	case b.HdrSize != headerBytes:
		return nil, fmt.Errorf("hdr_size is %d; only %d is supported", b.HdrSize, headerBytes)
	case b.HdrOffset != uint64(w.offset()):
		return nil, fmt.Errorf("hdr_offset is %d, but the copy lies at %d", b.HdrOffset, w.offset())
	}
	if alg, ok := cString(b.ChecksumAlg[:]); !ok || alg != checksumAlg {
		return nil, fmt.Errorf("csum_alg is %q; only %q is supported", alg, checksumAlg)
	}
	sum := sha256.New()
	sum.Write(raw[:checksumOffset])
	sum.Write(make([]byte, len(b.Checksum)))
	sum.Write(raw[binaryHeaderUsed:])
	if !bytes.Equal(sum.Sum(nil), b.Checksum[:sha256.Size]) {
		return nil, errChecksum
	}
	c.json = raw[binaryHeaderBytes:]
	return &c, c.decodeFields()
}

// errChecksum is the ordinary trace of a power cut.
var errChecksum = errors.New("csum does not match: the copy was torn by a power cut, or damaged")

// decodeFields checks what the checksum has vouched to be what somebody wrote.
func (c *headerCopy) decodeFields() error {
	if c.bin.SeqID == 0 || c.bin.SeqID > maxSeqID {
		return fmt.Errorf("seqid is %d, outside 1 to %d", c.bin.SeqID, uint64(maxSeqID))
	}
	uuid, ok := cString(c.bin.UUID[:])
	if !ok || !validUUID(uuid) {
		return fmt.Errorf("uuid is %q, not a lower-case UUID", uuid)
	}
	if s, ok := cString(c.bin.Label[:]); !ok || !validLabel(s) {
		return fmt.Errorf("label is %q, not printable text of at most 47 bytes", s)
	}
	if s, ok := cString(c.bin.Subsystem[:]); !ok || !validLabel(s) {
		return fmt.Errorf("subsystem is %q, not printable text of at most 47 bytes", s)
	}
	text, rest, ok := bytes.Cut(c.json, []byte{0})
	if !ok {
		return errors.New("the JSON area does not end with a zero byte")
	}
	if len(bytes.Trim(rest, "\x00")) != 0 {
		return errors.New("the JSON area has bytes behind the JSON text")
	}
	meta, err := decodeMetadata(text)
	if err != nil {
		return err
	}
	c.meta = *meta
	return nil
}

// cString cuts a zero-padded field; ok is false if it is not padded with zeros only.
func cString(field []byte) (s string, ok bool) {
	text, rest, found := bytes.Cut(field, []byte{0})
	return string(text), found && len(bytes.Trim(rest, "\x00")) == 0
}

func validLabel(s string) bool {
	if len(s) > 47 {
		return false
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '\ufffd' {
			return false
		}
	}
	return true
}

func validUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, r := range s {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (r == '-') || (!dash && !strings.ContainsRune("0123456789abcdef", r)) {
			return false
		}
	}
	return true
}

// otherSalt derives the salt of a copy that could not be read from the one that
// could. The salt only keeps equal headers from having equal checksums.
func otherSalt(salt [64]byte) [64]byte {
	return sha512.Sum512(append([]byte("luks2 header copy"), salt[:]...))
}

// The JSON area (specification §3). Numbers that may exceed 53 bits are strings.
type (
	jsonMetadata struct {
		Keyslots map[string]jsonKeyslot     `json:"keyslots"`
		Tokens   map[string]json.RawMessage `json:"tokens"`
		Segments map[string]jsonSegment     `json:"segments"`
		Digests  map[string]jsonDigest      `json:"digests"`
		Config   jsonConfig                 `json:"config"`
	}
	jsonKeyslot struct {
		Type     string   `json:"type"`
		KeySize  int      `json:"key_size"`
		Priority *int     `json:"priority,omitempty"`
		AF       jsonAF   `json:"af"`
		Area     jsonArea `json:"area"`
		KDF      jsonKDF  `json:"kdf"`
	}
	jsonAF struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	}
	jsonArea struct {
		Type       string `json:"type"`
		Offset     string `json:"offset"`
		Size       string `json:"size"`
		Encryption string `json:"encryption"`
		KeySize    int    `json:"key_size"`
	}
	jsonKDF struct {
		Type       string `json:"type"`
		Time       uint32 `json:"time,omitempty"`
		Memory     uint32 `json:"memory,omitempty"` // KiB
		CPUs       uint8  `json:"cpus,omitempty"`
		Hash       string `json:"hash,omitempty"`
		Iterations int    `json:"iterations,omitempty"`
		Salt       string `json:"salt"`
	}
	jsonSegment struct {
		Type       string         `json:"type"`
		Offset     string         `json:"offset"`
		Size       string         `json:"size"`
		IVTweak    string         `json:"iv_tweak"`
		Encryption string         `json:"encryption"`
		SectorSize int            `json:"sector_size"`
		Integrity  *jsonIntegrity `json:"integrity,omitempty"`
	}
	jsonIntegrity struct {
		Type              string `json:"type"`
		JournalEncryption string `json:"journal_encryption"`
		JournalIntegrity  string `json:"journal_integrity"`
	}
	jsonDigest struct {
		Type       string   `json:"type"`
		Keyslots   []string `json:"keyslots"`
		Segments   []string `json:"segments"`
		Hash       string   `json:"hash"`
		Iterations int      `json:"iterations"`
		Salt       string   `json:"salt"`
		Digest     string   `json:"digest"`
	}
	jsonConfig struct {
		JSONSize     string   `json:"json_size"`
		KeyslotsSize string   `json:"keyslots_size"`
		Flags        []string `json:"flags,omitempty"`
	}
)

// encode gives the JSON text, which together with one zero byte fits the JSON area.
func (m *metadata) encode() ([]byte, error) {
	segment := jsonSegment{
		Type: "crypt", Offset: decimal(dataOffset), Size: "dynamic", IVTweak: "0",
		Encryption: Cipher, SectorSize: m.sectorSize,
	}
	if m.integrity != "" {
		segment.Integrity = &jsonIntegrity{Type: integrityType, JournalEncryption: "none", JournalIntegrity: "none"}
	}
	doc := jsonMetadata{
		Keyslots: map[string]jsonKeyslot{},
		Tokens:   map[string]json.RawMessage{},
		Segments: map[string]jsonSegment{"0": segment},
		Config:   jsonConfig{JSONSize: decimal(jsonAreaBytes), KeyslotsSize: decimal(keyslotsBytes), Flags: m.flags},
	}
	d := jsonDigest{
		Type: "pbkdf2", Keyslots: []string{}, Segments: []string{"0"}, Hash: m.digest.hash,
		Iterations: m.digest.iterations, Salt: encode64(m.digest.salt), Digest: encode64(m.digest.value),
	}
	for _, id := range slices.Sorted(maps.Keys(m.keyslots)) {
		doc.Keyslots[strconv.Itoa(id)] = m.keyslots[id].encode(m.keyBytes())
		d.Keyslots = append(d.Keyslots, strconv.Itoa(id))
	}
	for id, raw := range m.tokens {
		doc.Tokens[strconv.Itoa(id)] = raw
	}
	doc.Digests = map[string]jsonDigest{strconv.Itoa(m.digestID): d}

	text, err := marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("encode LUKS2 metadata: %w", err)
	}
	if len(text) >= jsonAreaBytes {
		return nil, fmt.Errorf("LUKS2 metadata needs %d bytes and the JSON area holds %d: remove a keyslot or a token", len(text), jsonAreaBytes-1)
	}
	return text, nil
}

// marshal is json.Marshal that leaves "<", ">" and "&" in tokens as they were given.
func marshal(v any) ([]byte, error) {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

func (s keyslot) encode(keyBytes int) jsonKeyslot {
	out := jsonKeyslot{
		Type: "luks2", KeySize: keyBytes,
		AF: jsonAF{Type: "luks1", Stripes: stripes, Hash: s.afHash},
		Area: jsonArea{Type: "raw", Offset: decimal(s.area.offset), Size: decimal(s.area.size),
			Encryption: Cipher, KeySize: areaKeyBytes},
		KDF: jsonKDF{Type: s.kdf.Type, Time: s.kdf.Time, Memory: s.kdf.MemoryKiB, CPUs: s.kdf.Parallel,
			Hash: s.kdf.Hash, Iterations: s.kdf.Iterations, Salt: encode64(s.salt)},
	}
	if s.priority != 1 {
		out.Priority = &s.priority
	}
	return out
}

func decimal(n int64) string { return strconv.FormatInt(n, 10) }

func encode64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// randomBytes reads n bytes of a secret or a salt.
func randomBytes(rand io.Reader, n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := io.ReadFull(rand, b); err != nil {
		return nil, fmt.Errorf("read %d random bytes: %w", n, err)
	}
	return b, nil
}
