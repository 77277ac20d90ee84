package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Answer is what a box answers. The fields are as the TPM and the firmware gave them.
//
// The file: the 16 bytes "holdfast-answer\x00", the format (1), and then the fields in
// this order, each behind its length; a list has its number of elements first. All
// numbers have 32 bits, big-endian. Nothing follows.
type Answer struct {
	// Statement is nil in an attestation by another program (package tpmtools); the
	// quote is then over the challenge's nonce alone, and who the box is, is unknown.
	Statement *Statement
	AKPublic  []byte // TPMT_PUBLIC
	Quote     []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
	// Registers are the values of [Selection], or of [AllRegisters], 32 bytes each. The
	// quote has only their digest.
	Registers []byte
	EKPublic  []byte // TPMT_PUBLIC; empty where the box could not make it
	// Certificates are the EK's, DER, first its own and then those that the TPM keeps of
	// its issuers.
	Certificates [][]byte
	// EventLog is the firmware's, as the kernel gives it out.
	EventLog    []byte
	Attachments []Attachment
}

// Attachment is a file that goes along, such as the update journal.
type Attachment struct {
	Name string // of the letters a-z, digits, dot and hyphen
	Data []byte
}

const answerMagic = "holdfast-answer\x00"

// Marshal is the file. The same answer gives the same bytes.
func (a *Answer) Marshal() []byte {
	b := append([]byte(answerMagic), 0, 0, 0, 1)
	var statement []byte
	if a.Statement != nil {
		statement = a.Statement.marshal()
	}
	for _, f := range [][]byte{statement, a.AKPublic, a.Quote, a.Signature, a.Registers, a.EKPublic} {
		b = appendField(b, f)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(a.Certificates)))
	for _, c := range a.Certificates {
		b = appendField(b, c)
	}
	b = appendField(b, a.EventLog)
	b = binary.BigEndian.AppendUint32(b, uint32(len(a.Attachments)))
	for _, f := range a.Attachments {
		b = appendField(appendField(b, []byte(f.Name)), f.Data)
	}
	return b
}

func appendField(b, field []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(field))), field...)
}

// ParseAnswer reads what [Answer.Marshal] wrote, and nothing else. It verifies nothing.
// The error is [ErrMalformed]. The answer keeps parts of b.
func ParseAnswer(b []byte) (*Answer, error) {
	a, err := parseAnswer(b)
	if err != nil {
		return nil, fmt.Errorf("answer: %w: %w", ErrMalformed, err)
	}
	return a, nil
}

func parseAnswer(b []byte) (*Answer, error) {
	if len(b) > MaxAnswerBytes {
		return nil, fmt.Errorf("it has %d bytes, more than %d", len(b), MaxAnswerBytes)
	}
	rest, ok := bytes.CutPrefix(b, []byte(answerMagic))
	if !ok {
		return nil, errors.New("it does not begin like one")
	}
	r := fields{rest: rest}
	if format := r.number("format", 1<<31); r.err == nil && format != 1 {
		return nil, fmt.Errorf("it has format %d; this program knows format 1", format)
	}
	a := &Answer{}
	statement := r.field("statement", maxStatementBytes)
	a.AKPublic = r.field("attestation key", maxStructureBytes)
	a.Quote = r.field("quote", maxStructureBytes)
	a.Signature = r.field("signature", maxStructureBytes)
	a.Registers = r.field("registers", pcr.Count*sha256.Size)
	a.EKPublic = r.field("endorsement key", maxStructureBytes)
	for range r.number("certificates", maxCertificates) {
		a.Certificates = append(a.Certificates, r.field("certificate", maxCertificateBytes))
	}
	a.EventLog = r.field("event log", MaxLogBytes)
	for range r.number("attachments", maxAttachments) {
		a.Attachments = append(a.Attachments, Attachment{string(r.field("name", maxTextBytes)), r.field("attachment", MaxAttachmentBytes)})
	}
	if r.err != nil {
		return nil, r.err
	}
	if len(r.rest) != 0 {
		return nil, fmt.Errorf("%d bytes follow its end", len(r.rest))
	}
	var err error
	if len(statement) > 0 {
		a.Statement, err = parseStatement(statement)
	}
	if err == nil {
		err = a.checkAttachments()
	}
	return a, err
}

// fields cuts one field after the other; behind the first error it gives nothing.
type fields struct {
	rest []byte
	err  error
}

func (r *fields) number(what string, limit int) int {
	if r.err != nil {
		return 0
	}
	if len(r.rest) < 4 {
		r.err = fmt.Errorf("it ends before the %s", what)
		return 0
	}
	n := binary.BigEndian.Uint32(r.rest)
	if uint64(n) > uint64(limit) {
		r.err = fmt.Errorf("it claims %d for the %s, more than %d", n, what, limit)
		return 0
	}
	r.rest = r.rest[4:]
	return int(n)
}

func (r *fields) field(what string, limit int) []byte {
	n := r.number(what, limit)
	if r.err != nil {
		return nil
	}
	if n > len(r.rest) {
		r.err = fmt.Errorf("it ends within the %s", what)
		return nil
	}
	f := r.rest[:n:n]
	r.rest = r.rest[n:]
	return f
}

// checkAttachments wants the files that the statement names, and no others.
func (a *Answer) checkAttachments() error {
	var named []AttachmentDigest
	if a.Statement != nil {
		named = a.Statement.Attachments
	}
	if len(named) != len(a.Attachments) {
		return fmt.Errorf("it has %d attachments and names %d", len(a.Attachments), len(named))
	}
	total := 0
	for i, f := range a.Attachments {
		if !isFileName(f.Name) {
			return fmt.Errorf("attachment %d has the name %.40q", i, f.Name)
		}
		if named[i] != f.digest() {
			return fmt.Errorf("attachment %s is not the one that the statement names", f.Name)
		}
		total += len(f.Data)
	}
	if total > MaxAttachmentBytes {
		return fmt.Errorf("its attachments have %d bytes, more than %d", total, MaxAttachmentBytes)
	}
	return nil
}

// isFileName: what may be written into a folder as it is.
func isFileName(name string) bool {
	if len(name) == 0 || len(name) > 64 || name[0] == '.' || name[0] == '-' {
		return false
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

func (f Attachment) digest() AttachmentDigest {
	sum := sha256.Sum256(f.Data)
	return AttachmentDigest{f.Name, hex.EncodeToString(sum[:])}
}

// selection are the registers that a quote with these values must be over.
func (a *Answer) selection() []int {
	if len(a.Registers) == pcr.Count*sha256.Size {
		return AllRegisters()
	}
	return Selection()
}

// QualifyingData is what the quote was made over beside the registers. The error is that
// the quote cannot be read.
func (a *Answer) QualifyingData() ([]byte, error) {
	q, err := parseQuote(a.Quote)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	return q.ExtraData, nil
}

// values are the registers by number; nil where there are too few or too many.
func (a *Answer) values() map[int]pcr.Digest {
	selection := a.selection()
	if len(a.Registers) != len(selection)*sha256.Size {
		return nil
	}
	values := make(map[int]pcr.Digest, len(selection))
	for i, p := range selection {
		values[p] = pcr.Digest(a.Registers[i*sha256.Size:])
	}
	return values
}

// Device names the box in one line, as it says itself.
func (a *Answer) Device() string {
	s := a.Statement
	switch {
	case s == nil:
		return "a box that does not say which"
	case s.Box == "":
		return s.Product + " without a data volume"
	}
	return s.Product + " " + s.Box
}
