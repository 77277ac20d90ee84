// Package luks2 formats, edits and unlocks the LUKS2 volume that holds an
// appliance's data, following the LUKS2 On-Disk Format Specification 1.1.1.
// cryptsetup 2.6 and systemd-cryptsetup open what it writes.
//
// # What to call
//
// A new volume: [Format], [Header.AddKeyslot] (at least once),
// [Header.SetToken], then [Header.WriteNew], then whatever makes the volume
// useful (the caller's file system), and [Header.Publish] as the very last
// step. An existing one: [Read], [Header.Repair] if the [Report] asks for it,
// [Header.Unlock] or [Header.UnlockSlot]; to change it, edit the Header and
// call [Header.Write].
//
// # Provisioning
//
// The partition of a device that was never provisioned carries a marker in its
// first sector, put there by the image builder; the caller knows it and looks
// for it before calling Read. WriteNew writes everything but the first 4096
// bytes, so a power cut at any moment leaves the marker, and the next boot
// starts again from nothing. Publish replaces the marker by the primary binary
// header, the first sector in a write of its own behind a Sync: before that
// sector the device is unprovisioned, after it the volume and everything the
// caller had put into it are there. A caller that provisions a second time
// (factory reset) writes the marker first. Between WriteNew and Publish the
// secondary header is already good, so Read (and cryptsetup) would find the
// volume: the marker has to be asked first.
//
// # The subset
//
// One layout, which is also the default of cryptsetup luksFormat since 2.1:
// header copies of 16384 bytes at 0 and 16384, key areas from 32768, data from
// 16 MiB to the end of the partition. One crypt segment and one digest; volume
// key of 512 bits, aes-xts-plain64 for data and key areas; encryption sectors
// of 512 or 4096 bytes; argon2id or PBKDF2; at most 32 keyslots. Tokens are
// kept as they are.
//
// A segment may have integrity "hmac(sha256)", which cryptsetup luksFormat calls
// --integrity hmac-sha256: each sector has a tag over its number and its
// ciphertext, kept by dm-integrity between the data, and the volume key has 256
// bits more for it.
//
// The header is authenticated by nothing (F81): who can write to the disk can
// write a header that says the data is not encrypted at all, or that costs a
// terabyte of memory to open. Therefore Read takes both copies into memory
// once, works on that memory only, and refuses everything that the subset does
// not name: unknown fields, duplicate JSON keys, requirements, reencryption,
// null ciphers. The caller sets up dm-crypt from [Header.Segment] and not from
// a second look at the disk.
//
// # What it does not protect
//
// A whole older header with its key areas, put back, is accepted: a removed
// passphrase is gone only if nobody kept a copy of the disk. Nor is a volume
// recognised as ours: somebody else's volume that opens with the same
// passphrase opens; binding its identity is the caller's work (F80). XTS
// encrypts, it does not detect changed data. With [HMACSHA256] a changed sector
// is a read error; an older state of the same sector, put back with its tag, is
// not noticed even then. Overwriting a key area destroys it on a magnetic disk;
// flash may keep the old cells until it collects them.
//
// Key material is wiped where this package owns the memory. The Go runtime, the
// key schedules of AES and HMAC and argon2's blocks are out of its reach.
// Deriving an argon2id key leaves as much garbage as the memory cost; a caller
// that is short of memory calls debug.FreeOSMemory afterwards.
//
// A Header is not safe for concurrent use, and two processes must not edit one
// volume at the same time; Write notices a header that changed under it, but
// not between its look and its write.
package luks2

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"runtime"
	"slices"
)

// Device is the partition. A write may reach the medium in any order with its
// neighbours until Sync returns.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// VolumeKeyBytes is the length of a volume key: two AES-256 keys for XTS. That of
// a volume with integrity is longer, see [KeyBytes].
const VolumeKeyBytes = 64

// HMACSHA256 is the one kind of integrity a segment can have, by the name that
// cryptsetup luksFormat --integrity takes.
const HMACSHA256 = "hmac-sha256"

// TagBytes is the length of a sector's tag under HMACSHA256.
const TagBytes = 32

// integrityType is HMACSHA256 as the header and the kernel write it, integrityKeyBytes
// its part of the volume key, behind that of the cipher.
const (
	integrityType     = "hmac(sha256)"
	integrityKeyBytes = 32
)

// KeyBytes is the length of the key of a volume with this integrity, "" or HMACSHA256.
func KeyBytes(integrity string) int {
	if integrity == "" {
		return VolumeKeyBytes
	}
	return VolumeKeyBytes + integrityKeyBytes
}

// Cipher is the one cipher this package accepts, for data and for key areas, in
// dm-crypt's notation.
const Cipher = "aes-xts-plain64"

// MaxKeyslots is the number of keyslots a volume can have; ids are 0 to 31. The
// same holds for tokens.
const MaxKeyslots = 32

// The layout. All offsets and sizes are bytes.
const (
	binaryHeaderBytes = 4096
	jsonAreaBytes     = 12288
	headerBytes       = binaryHeaderBytes + jsonAreaBytes
	keyslotsOffset    = 2 * headerBytes
	keyslotsBytes     = dataOffset - keyslotsOffset
	dataOffset        = 16 << 20

	stripes       = 4000
	areaAlign     = 4096
	areaKeyBytes  = 64  // of the key that encrypts a key area
	keyAreaSector = 512 // encryption sector of key areas, whatever the segment has
)

var (
	// ErrPassphrase says that no keyslot that was tried opens with the
	// passphrase. Nothing else was wrong: every slot could be read.
	ErrPassphrase = errors.New("no keyslot opens with this passphrase")

	// ErrNoHeader says that neither header copy starts with a LUKS magic: the
	// partition holds no LUKS volume, rather than a damaged one.
	ErrNoHeader = errors.New("no LUKS header")

	// ErrChanged says that the header on the device is not the one that this
	// Header was read from: read it again and repeat the edit.
	ErrChanged = errors.New("the header on the device changed since it was read")
)

// Header is a volume's header in memory, with the key material of slots that
// were added and are not written yet. [Format] or [Read] make one.
type Header struct {
	uuid, label, subsystem string
	seqID                  uint64
	salts                  [2][64]byte // of the primary and the secondary copy
	sizeBytes              int64
	meta                   metadata

	origin   origin
	identity [32]byte       // of the copy on the device; see headerCopy.identity
	busy     []extent       // key areas that the copy on the device refers to
	pending  map[int][]byte // keyslot id to encrypted key material not yet on the device
}

// origin is what the device knows of a Header.
type origin int

const (
	fresh  origin = iota // from Format; nothing on the device
	staged               // WriteNew is done, Publish is not
	onDisk               // published, or read
)

// metadata is the JSON area's content.
type metadata struct {
	keyslots   map[int]keyslot
	tokens     map[int]json.RawMessage
	sectorSize int
	integrity  string // "" or HMACSHA256
	digestID   int
	digest     digest
	flags      []string // config.flags, persistent activation flags
}

type keyslot struct {
	priority int    // 0 only when asked for by number, 1 normal, 2 first
	afHash   string // of the anti-forensic splitter
	area     extent
	kdf      KDF
	salt     []byte
}

type digest struct {
	hash       string
	iterations int
	salt       []byte
	value      []byte
}

// extent is the half-open byte interval [offset, offset+size).
type extent struct{ offset, size int64 }

func (e extent) end() int64 { return e.offset + e.size }

func (e extent) overlaps(f extent) bool { return e.offset < f.end() && f.offset < e.end() }

// Keyslot describes a keyslot without its secrets.
type Keyslot struct {
	ID int
	// Priority is 1; 2 for a slot that is tried first, 0 for one that Unlock leaves out.
	Priority int
	KDF      KDF
}

// UUID returns the volume's UUID in its text form.
func (h *Header) UUID() string { return h.uuid }

// Label returns the volume's label, empty if it has none.
func (h *Header) Label() string { return h.label }

// Subsystem returns the volume's subsystem label, empty if it has none.
func (h *Header) Subsystem() string { return h.subsystem }

// SeqID returns the header's sequence number; every Write adds one.
func (h *Header) SeqID() uint64 { return h.seqID }

// Flags returns the activation flags that are kept in the header, such as
// "allow-discards". They are the caller's to follow or not.
func (h *Header) Flags() []string { return slices.Clone(h.meta.flags) }

// Segment says where the encrypted data lies in the partition and how it is
// encrypted: what a dm-crypt table needs. The first sector has IV 0, and IVs
// count units of 512 bytes whatever sectorSize is. sizeBytes reaches to the end
// of the partition, rounded down to whole sectors. With integrity this is where
// the dm-integrity device lies, which keeps tags and a journal there too, and
// dm-crypt lies on that.
func (h *Header) Segment() (offsetBytes, sizeBytes int64, sectorSize int, cipher string) {
	size := h.sizeBytes - dataOffset
	return dataOffset, size - size%int64(h.meta.sectorSize), h.meta.sectorSize, Cipher
}

// Integrity says what a sector is checked with when it is read: [HMACSHA256], or
// "" for nothing.
func (h *Header) Integrity() string { return h.meta.integrity }

// Keyslots returns the keyslots in the order of their ids, so that a caller can
// judge their cost before it opens one.
func (h *Header) Keyslots() []Keyslot {
	var out []Keyslot
	for _, id := range slices.Sorted(maps.Keys(h.meta.keyslots)) {
		s := h.meta.keyslots[id]
		out = append(out, Keyslot{ID: id, Priority: s.priority, KDF: s.kdf})
	}
	return out
}

func (m *metadata) keyBytes() int { return KeyBytes(m.integrity) }

// materialBytes is what a key of m takes in a key area, areaBytes the area.
func (m *metadata) materialBytes() int { return stripes * m.keyBytes() }

func (m *metadata) areaBytes() int64 {
	return int64(m.materialBytes()+areaAlign-1) / areaAlign * areaAlign
}

// areas returns the key areas of all keyslots, sorted by offset.
func (m *metadata) areas() []extent {
	var out []extent
	for _, s := range m.keyslots {
		out = append(out, s.area)
	}
	slices.SortFunc(out, func(a, b extent) int { return int(a.offset - b.offset) })
	return out
}

// edited notes a change of the metadata: what WriteNew staged is not this
// header any more.
func (h *Header) edited() {
	if h.origin == staged {
		h.origin = fresh
	}
}

// Wipe overwrites a secret. It cannot reach copies that were made of it.
func Wipe(secret []byte) {
	clear(secret)
	runtime.KeepAlive(secret)
}
