package pcr

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Limits on a log, which comes from firmware.
const (
	// MaxLogBytes is the longest log [ParseLog] reads; a PC's has 10 to 100 KB.
	MaxLogBytes = 16 << 20
	maxEvents   = 1 << 16
	maxDigests  = 16 // banks in one event
)

// ErrLogTooLong means that a log has more than MaxLogBytes bytes.
var ErrLogTooLong = errors.New("event log is longer than 16 MiB")

// Class is the kind of a log.
type Class int

// The kinds of log that firmware hands over.
const (
	Empty       Class = iota // no event at all
	SHA1Only                 // TCG_PCClientPCREvent records: one SHA-1 digest each (F22)
	CryptoAgile              // TCG_PCR_EVENT2 records: one digest a bank
)

func (c Class) String() string {
	switch c {
	case SHA1Only:
		return "SHA-1 only"
	case CryptoAgile:
		return "crypto-agile"
	}
	return "empty"
}

// Hash is a TPM_ALG_ID. TCG Algorithm Registry.
type Hash uint16

// Hash algorithms that banks have.
const (
	SHA1   Hash = 0x0004
	SHA256 Hash = 0x000b
	SHA384 Hash = 0x000c
	SHA512 Hash = 0x000d
	SM3    Hash = 0x0012
)

func (h Hash) String() string {
	switch h {
	case SHA1:
		return "sha1"
	case SHA256:
		return "sha256"
	case SHA384:
		return "sha384"
	case SHA512:
		return "sha512"
	case SM3:
		return "sm3"
	}
	return fmt.Sprintf("algorithm 0x%04x", uint16(h))
}

// TaggedDigest is what one bank was extended with.
type TaggedDigest struct {
	Alg    Hash
	Digest []byte
}

// Event is one record of a log.
type Event struct {
	PCR     uint32 // as in the log; firmware writes 0xffffffff for some records
	Type    EventType
	Digests []TaggedDigest
	Data    []byte
}

// SHA256 is the digest the SHA-256 bank was extended with.
func (e Event) SHA256() (Digest, bool) {
	for _, d := range e.Digests {
		if d.Alg == SHA256 && len(d.Digest) == len(Digest{}) {
			return Digest(d.Digest), true
		}
	}
	return Digest{}, false
}

// Log is a parsed event log. The zero value is an empty one.
type Log struct {
	Class Class
	// Header is the Spec ID event that opens a crypto-agile log, in the old
	// format; nil when the firmware left it out.
	Header *Event
	Events []Event
	// Notes say, in sentences, what is odd about the log. They are reasons to
	// doubt a replay, not reasons to stop (FIELD takeaway 6).
	Notes []string

	rest []byte // what follows the last record that could be read
}

// ParseLog reads a log as the kernel gives it out in binary_bios_measurements.
// Read that file once, to its end: its size is reported as 0 and it may change
// between reads (F23). Damage never is an error: records up to it are
// returned, with a note. The only error is [ErrLogTooLong].
func ParseLog(b []byte) (Log, error) {
	if len(b) > MaxLogBytes {
		return Log{}, fmt.Errorf("read %d bytes: %w", len(b), ErrLogTooLong)
	}
	b = slices.Clone(b)
	header, rest, ok := cutLegacy(b)
	if ok && isSpecID(header) {
		sizes, err := specIDSizes(header.Data)
		l := Log{Class: CryptoAgile, Header: &header}
		if err != nil {
			l.Notes = append(l.Notes, err.Error())
			sizes = knownSizes()
		}
		l.read(rest, func(b []byte) (Event, []byte, bool) { return cutAgile(b, sizes) })
		return l, nil
	}
	legacy := Log{Class: SHA1Only}
	legacy.read(b, cutLegacy)
	agile := Log{Class: CryptoAgile}
	agile.read(b, func(b []byte) (Event, []byte, bool) { return cutAgile(b, knownSizes()) })
	if len(agile.Events) > 0 && len(agile.rest) < len(legacy.rest) {
		agile.note("the log lacks the Spec ID event that should open it")
		return agile, nil
	}
	if len(legacy.Events) == 0 {
		legacy.Class = Empty
	}
	return legacy, nil
}

func (l *Log) note(format string, args ...any) {
	l.Notes = append(l.Notes, fmt.Sprintf(format, args...))
}

// read appends records until cut refuses one.
func (l *Log) read(b []byte, cut func([]byte) (Event, []byte, bool)) {
	for len(b) > 0 && len(l.Events) < maxEvents {
		// A tail of zeros is the unused end of the firmware's buffer, not a run
		// of empty records for PCR 0.
		if len(bytes.TrimLeft(b, "\x00")) == 0 {
			break
		}
		e, rest, ok := cut(b)
		if !ok {
			l.note("record %d at the %d last bytes of the log cannot be read; the rest is ignored", len(l.Events), len(b))
			break
		}
		if e.PCR >= Count && e.Type != EventNoAction {
			l.note("record %d names PCR %d, which does not exist", len(l.Events), e.PCR)
		}
		l.Events = append(l.Events, e)
		b = rest
	}
	l.rest = b
}

// Marshal gives back the bytes that [ParseLog] was given.
func (l Log) Marshal() []byte {
	var b []byte
	if l.Header != nil {
		b = appendLegacy(b, *l.Header)
	}
	for _, e := range l.Events {
		if l.Class == CryptoAgile {
			b = appendAgile(b, e)
		} else {
			b = appendLegacy(b, e)
		}
	}
	return append(b, l.rest...)
}

// cutLegacy takes a TCG_PCClientPCREvent off b. PFP §10.2.1.
func cutLegacy(b []byte) (e Event, rest []byte, ok bool) {
	const fixed = 4 + 4 + 20 + 4
	if len(b) < fixed {
		return Event{}, b, false
	}
	size := binary.LittleEndian.Uint32(b[28:])
	if uint64(size) > uint64(len(b)-fixed) {
		return Event{}, b, false
	}
	return Event{
		PCR:     binary.LittleEndian.Uint32(b),
		Type:    EventType(binary.LittleEndian.Uint32(b[4:])),
		Digests: []TaggedDigest{{SHA1, b[8:28]}},
		Data:    b[fixed : fixed+size],
	}, b[fixed+size:], true
}

func appendLegacy(b []byte, e Event) []byte {
	b = binary.LittleEndian.AppendUint32(b, e.PCR)
	b = binary.LittleEndian.AppendUint32(b, uint32(e.Type))
	b = append(b, e.Digests[0].Digest...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Data)))
	return append(b, e.Data...)
}

// cutAgile takes a TCG_PCR_EVENT2 off b. PFP §10.2.2.
func cutAgile(b []byte, sizes map[Hash]int) (e Event, rest []byte, ok bool) {
	if len(b) < 12 {
		return Event{}, b, false
	}
	e.PCR = binary.LittleEndian.Uint32(b)
	e.Type = EventType(binary.LittleEndian.Uint32(b[4:]))
	count := binary.LittleEndian.Uint32(b[8:])
	rest = b[12:]
	if count > maxDigests {
		return Event{}, b, false
	}
	for range count {
		if len(rest) < 2 {
			return Event{}, b, false
		}
		alg := Hash(binary.LittleEndian.Uint16(rest))
		size, known := sizes[alg]
		if !known || len(rest) < 2+size {
			return Event{}, b, false
		}
		e.Digests = append(e.Digests, TaggedDigest{alg, rest[2 : 2+size]})
		rest = rest[2+size:]
	}
	if len(rest) < 4 {
		return Event{}, b, false
	}
	size := binary.LittleEndian.Uint32(rest)
	rest = rest[4:]
	if uint64(size) > uint64(len(rest)) {
		return Event{}, b, false
	}
	e.Data = rest[:size]
	return e, rest[size:], true
}

func appendAgile(b []byte, e Event) []byte {
	b = binary.LittleEndian.AppendUint32(b, e.PCR)
	b = binary.LittleEndian.AppendUint32(b, uint32(e.Type))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Digests)))
	for _, d := range e.Digests {
		b = binary.LittleEndian.AppendUint16(b, uint16(d.Alg))
		b = append(b, d.Digest...)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Data)))
	return append(b, e.Data...)
}

const specIDSignature = "Spec ID Event03\x00"

func isSpecID(e Event) bool {
	return e.Type == EventNoAction && bytes.HasPrefix(e.Data, []byte(specIDSignature))
}

// knownSizes are the digest sizes to believe when the log's own table is missing or damaged.
func knownSizes() map[Hash]int {
	return map[Hash]int{SHA1: 20, SHA256: 32, SHA384: 48, SHA512: 64, SM3: 32}
}

// specIDSizes reads the algorithm table of a TCG_EfiSpecIDEvent. PFP §10.4.5.1.
func specIDSizes(data []byte) (map[Hash]int, error) {
	const fixed = 16 + 4 + 4 + 4 // signature, class, versions, count
	if len(data) < fixed {
		return nil, fmt.Errorf("the Spec ID event has %d bytes, too few for its table of algorithms", len(data))
	}
	count := binary.LittleEndian.Uint32(data[24:])
	if count == 0 || count > maxDigests || int(count)*4 > len(data)-fixed {
		return nil, fmt.Errorf("the Spec ID event claims %d algorithms in %d bytes", count, len(data)-fixed)
	}
	sizes := map[Hash]int{}
	for i := range int(count) {
		entry := data[fixed+4*i:]
		alg, size := Hash(binary.LittleEndian.Uint16(entry)), int(binary.LittleEndian.Uint16(entry[2:]))
		if want, ok := knownSizes()[alg]; ok && want != size {
			return nil, fmt.Errorf("the Spec ID event claims %d bytes for a %v digest", size, alg)
		}
		sizes[alg] = size
	}
	return sizes, nil
}

// Replay folds the log into the values its SHA-256 bank must have had when it
// was read. A register is left out when no record measures into it or when one
// that does has no SHA-256 digest: what cannot be replayed does not spoil the
// others. Compare the result with the TPM; see the package documentation.
func (l Log) Replay() map[int]Digest {
	values, broken := map[int]Digest{}, map[int]bool{}
	if l.Class != CryptoAgile {
		return values
	}
	for _, e := range l.Events {
		if e.PCR >= Count {
			continue
		}
		i := int(e.PCR)
		if e.Type == EventNoAction {
			if locality, ok := startupLocality(e); ok && i == 0 {
				if _, started := values[0]; !started {
					values[0] = Digest{31: locality}
				}
			}
			continue
		}
		d, ok := e.SHA256()
		if !ok {
			broken[i] = true
			continue
		}
		values[i] = ExtendDigest(values[i], d)
	}
	for i := range broken {
		delete(values, i)
	}
	return values
}

// startupLocality is the value PCR 0 starts with where the log says so: the
// locality of TPM2_Startup, or 4 after an H-CRTM sequence. PFP §10.4.5.3.
func startupLocality(e Event) (byte, bool) {
	const signature = "StartupLocality\x00"
	if len(e.Data) < len(signature)+1 || !bytes.HasPrefix(e.Data, []byte(signature)) {
		return 0, false
	}
	return e.Data[len(signature)], true
}

// Of lists the records that measure into a register, in order.
func (l Log) Of(index int) []Event {
	var events []Event
	for _, e := range l.Events {
		if e.PCR < Count && int(e.PCR) == index && e.Type != EventNoAction {
			events = append(events, e)
		}
	}
	return events
}
