package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Policy is what an answer is judged by. What is not given cannot be judged: the check
// is then unknown, and the verdict with it.
type Policy struct {
	// Now is the verifier's time.
	Now time.Time
	// MaxAge is how long ago the challenge may have been made; 0 means 30 days, which is
	// enough for a stick to come back.
	MaxAge time.Duration
	// Unasked says that the challenge is not the verifier's own: the box made it. How
	// fresh the answer is, is then unknown.
	Unasked bool
	// Roots are the TPM manufacturers'.
	Roots *Roots
	// SoftwareTPM takes TPMs that are programs (swtpm, a cloud's), where their
	// certificate leads to one of Roots, or there is a Record of them.
	SoftwareTPM bool
	// References are the releases that may run.
	References []Reference
	// Keys are the Secure Boot keys that the box may have.
	Keys *Keys
	// NoSecureBoot takes boxes whose Secure Boot is off; their keys count all the
	// same, so that one in setup mode fails where Keys are given.
	NoSecureBoot bool
	// Programs are Authenticode digests of what firmware may start before the boot loader.
	Programs []pcr.Digest
	// Known is what is recorded of the box; nil at first contact.
	Known *Record
	// Accept are names of checks whose being unknown does not spoil the verdict. A
	// failed check always does.
	Accept []string
}

// FirstContact are the checks that compare with a [Record], for [Policy.Accept] as
// long as there is none.
func FirstContact() []string { return []string{CheckFirmware, CheckVolumes, CheckClock} }

const defaultMaxAge = 30 * 24 * time.Hour

// Reference are the reference values of one release, as its manifest has them.
type Reference struct {
	Product, Version string
	// Boot is what the firmware, the stub and the boot loader measure.
	Boot pcr.Release
	// Sections are those of the UKI that the stub measures; they only make an
	// explanation better, and may be nil.
	Sections []pcr.Measured
	// RootHash is that of dm-verity, in hex; empty is not compared.
	RootHash string
	// Services are image digests ("sha256:…") by the service's name; nil is not compared.
	Services map[string]string
	// DBX are the revocations that the release brings, see [CheckDBX]. A later release
	// that goes on demanding them brings them again; a box adds what it lacks.
	DBX []pcr.Signature
}

// Keys are the contents of the Secure Boot variables, parsed once.
type Keys struct {
	pk, kek, db, dbx []pcr.Signature
}

// NewKeys takes signature lists as in the variables. The box's PK must be one of pk,
// all of its KEK and db must be in kek and db, and its dbx must have all of dbx and what
// its release brings ([Reference.DBX]). Empty pk or kek is not compared; an empty db is
// an error.
func NewKeys(pk, kek, db, dbx []byte) (*Keys, error) {
	k := &Keys{}
	for _, v := range []struct {
		name string
		from []byte
		into *[]pcr.Signature
	}{{"PK", pk, &k.pk}, {"KEK", kek, &k.kek}, {"db", db, &k.db}, {"dbx", dbx, &k.dbx}} {
		var err error
		if *v.into, err = pcr.Signatures(v.from); err != nil {
			return nil, fmt.Errorf("secure boot keys: %s: %w", v.name, err)
		}
	}
	if len(k.db) == 0 {
		return nil, errors.New("secure boot keys: db is empty: nothing would be allowed to start")
	}
	return k, nil
}

// Record is what a vendor keeps of a box from one contact to the next. It is a file of
// his own, which nobody else may write.
type Record struct {
	Type   string    `json:"type"` // "holdfast-record"
	Format int       `json:"format"`
	Box    string    `json:"box,omitempty"`
	First  time.Time `json:"first"` // first contact
	Last   time.Time `json:"last"`

	Product string `json:"product"`
	Release string `json:"release"`
	// Revocations is the release whose revocations dbx had in full: they have to stay.
	Revocations string `json:"revocations,omitempty"`
	// EK is the SHA-256 of the EK's TPMT_PUBLIC, AK the TPM's name of the AK that is
	// bound to it, both in hex.
	EK string `json:"ek_sha256"`
	AK string `json:"ak_name"`

	// Registers are the values of PCR 0, 2 and 15.
	Registers map[int]string `json:"registers"`
	// Firmware are the events behind PCR 0 and 2, to say later which one differs.
	Firmware   []RecordedEvent `json:"firmware"`
	ResetCount uint32          `json:"reset_count"`
	ClockMs    uint64          `json:"clock_ms"`
}

// RecordedEvent is one record of a firmware's log.
type RecordedEvent struct {
	PCR    int    `json:"pcr"`
	SHA256 string `json:"sha256"`
	Text   string `json:"text"`
}

const (
	recordType         = "holdfast-record"
	maxRecordBytes     = 1 << 20
	maxRecordedEvents  = 1024
	maxRecordedTextLen = 4 * maxTextBytes
)

// recordedRegisters are those that a box has in common with none, and that stay.
func recordedRegisters() []int { return []int{0, 2, 15} }

// NewRecord is what to keep after a good verdict on the answer; before is the record
// until now, or nil. Recording what was not judged good is refused: call it after the
// second answer of a first contact, and after each good one since. When a change of the
// box was found to be in order, make first contact again, without the old record.
func NewRecord(a *Answer, v Verdict, before *Record, now time.Time) (*Record, error) {
	if !v.Good() || a.Statement == nil {
		return nil, errors.New("make record: the answer was not judged good")
	}
	q, err := parseQuote(a.Quote)
	if err != nil {
		return nil, fmt.Errorf("make record: quote: %w", err)
	}
	ek, values := sha256.Sum256(a.EKPublic), a.values()
	now = now.UTC().Truncate(time.Second)
	r := &Record{
		Type: recordType, Format: 1, Box: a.Statement.Box, First: now, Last: now, Product: a.Statement.Product, Release: a.Statement.Release,
		EK: hex.EncodeToString(ek[:]), AK: hex.EncodeToString(nameOf(a.AKPublic)),
		Registers: map[int]string{}, ResetCount: q.ResetCount, ClockMs: q.ClockMs,
	}
	if before != nil {
		r.First, r.Revocations = before.First, before.Revocations
	}
	if v.Of(CheckDBX).Result == Pass {
		r.Revocations = r.Release
	}
	for _, p := range recordedRegisters() {
		value := values[p]
		r.Registers[p] = hex.EncodeToString(value[:])
	}
	log, err := pcr.ParseLog(a.EventLog)
	if err != nil {
		return nil, fmt.Errorf("make record: %w", err)
	}
	for _, p := range []int{0, 2} {
		for _, e := range log.Of(p) {
			if d, ok := e.SHA256(); ok && len(r.Firmware) < maxRecordedEvents {
				r.Firmware = append(r.Firmware, RecordedEvent{p, hex.EncodeToString(d[:]), e.Describe()})
			}
		}
	}
	return r, r.check()
}

// Marshal is the file.
func (r *Record) Marshal() []byte { return indented(r) }

// ParseRecord reads what [Record.Marshal] wrote. The error is [ErrMalformed].
func ParseRecord(b []byte) (*Record, error) {
	var r Record
	if err := readJSON(b, maxRecordBytes, &r, r.check, r.Marshal); err != nil {
		return nil, fmt.Errorf("record: %w: %w", ErrMalformed, err)
	}
	return &r, nil
}

func (r *Record) check() error {
	if r.Type != recordType || r.Format != 1 {
		return fmt.Errorf("it is %.40q of format %d, not %s of format 1", r.Type, r.Format, recordType)
	}
	for _, t := range []string{r.Box, r.Product, r.Release, r.Revocations} {
		if err := checkText(t); err != nil {
			return err
		}
	}
	if _, err := parseDigest(r.EK); err != nil {
		return err
	}
	if ak, err := hex.DecodeString(r.AK); err != nil || len(ak) != nameBytes {
		return fmt.Errorf("%.80q is not the name of a key", r.AK)
	}
	for p, text := range r.Registers {
		if _, err := parseDigest(text); err != nil || !slices.Contains(recordedRegisters(), p) {
			return fmt.Errorf("it has no such value as that of PCR %d", p)
		}
	}
	if len(r.Registers) != len(recordedRegisters()) || len(r.Firmware) > maxRecordedEvents {
		return fmt.Errorf("it has %d registers and %d events", len(r.Registers), len(r.Firmware))
	}
	for _, e := range r.Firmware {
		if _, err := parseDigest(e.SHA256); err != nil || len(e.Text) > maxRecordedTextLen {
			return fmt.Errorf("it has a malformed event of PCR %d", e.PCR)
		}
	}
	return errors.Join(checkTime(r.First), checkTime(r.Last))
}
