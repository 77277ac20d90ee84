package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Limits on a statement's lists.
const (
	maxTextBytes    = 200
	maxSlots        = 8
	maxVolumes      = 32
	maxServices     = 256
	maxMeasurements = 256
)

// Statement is what a box says about itself. [Attest] fills in Type, Format, TPM,
// Activation and Attachments; the rest comes from the agent, and every text may be
// empty where the box has no such thing. Nothing in it is measured, all of it is
// signed by the AK.
type Statement struct {
	Type   string    `json:"type"` // "holdfast-statement"
	Format int       `json:"format"`
	Time   time.Time `json:"time"` // the box's clock: UTC, whole seconds

	Product      string `json:"product"`
	Release      string `json:"release"` // the version that runs
	Architecture string `json:"architecture,omitempty"`
	// Box is the box's name for life: the UUID of its first data volume.
	Box    string `json:"box,omitempty"`
	BootID string `json:"boot_id,omitempty"`
	// SealPolicy is the policy that the data is sealed under.
	SealPolicy string `json:"seal_policy,omitempty"`

	Slots    []Slot    `json:"slots,omitempty"`
	Volumes  []Volume  `json:"volumes,omitempty"`
	Services []Service `json:"services,omitempty"`
	// Measurements are what the system itself extended into PCR 11 and 15 since the
	// firmware handed over, in order; the firmware's log does not have them.
	Measurements []Measurement `json:"measurements,omitempty"`

	TPM TPM `json:"tpm"`
	// Activation is the secret of the challenge's credential for this box.
	Activation []byte `json:"activation,omitempty"`
	// Attachments are the answer's files.
	Attachments []AttachmentDigest `json:"attachments,omitempty"`
}

// Slot is one place for a release.
type Slot struct {
	Name     string `json:"name"` // "a"
	Release  string `json:"release,omitempty"`
	RootHash string `json:"root_hash,omitempty"` // of dm-verity, hex
	Running  bool   `json:"running,omitempty"`
	State    string `json:"state,omitempty"` // "good", "trial", "bad"
}

// Volume is an encrypted volume that is open.
type Volume struct {
	Name   string `json:"name"`
	UUID   string `json:"uuid"`
	Method string `json:"method,omitempty"` // what opened it: "tpm", "recovery"
}

// Service is a container that the box is to run.
type Service struct {
	Name   string `json:"name"`
	Digest string `json:"digest,omitempty"` // "sha256:…", of its image
	State  string `json:"state,omitempty"`
}

// Measurement is one extension of the SHA-256 bank.
type Measurement struct {
	PCR    int    `json:"pcr"`
	SHA256 string `json:"sha256"` // what was extended, hex
	// Text is what was measured, where it is text: a boot phase. The digest is then
	// that of the text. Empty for what is secret or binary.
	Text string `json:"text,omitempty"`
	// Note says what it is, for people.
	Note string `json:"note,omitempty"`
}

// TPM is what the TPM says about itself (see seal.Fitness). Its answers are not
// authenticated; the firmware version is, in the quote.
type TPM struct {
	Manufacturer string `json:"manufacturer,omitempty"`
	Model        string `json:"model,omitempty"`
	Firmware     string `json:"firmware,omitempty"`
}

// AttachmentDigest ties an attachment to the quote.
type AttachmentDigest struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"` // hex
}

// MeasuredText is the measurement of a text, such as a boot phase into PCR 11.
func MeasuredText(index int, text string) Measurement {
	sum := sha256.Sum256([]byte(text))
	return Measurement{PCR: index, SHA256: hex.EncodeToString(sum[:]), Text: text}
}

// MeasuredBytes is the measurement of what shall not be told, such as the identity of
// the volumes into PCR 15.
func MeasuredBytes(index int, data []byte, note string) Measurement {
	sum := sha256.Sum256(data)
	return Measurement{PCR: index, SHA256: hex.EncodeToString(sum[:]), Note: note}
}

// marshal is the one form that a statement has.
func (s *Statement) marshal() []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // our own type, of text, numbers and bytes
	}
	return b
}

func parseStatement(b []byte) (*Statement, error) {
	var s Statement
	if err := readJSON(b, maxStatementBytes, &s, s.check, s.marshal); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	return &s, nil
}

func (s *Statement) check() error {
	if s.Type != statementType {
		return fmt.Errorf("its type is %.40q, not %s", s.Type, statementType)
	}
	if s.Format != 1 {
		return fmt.Errorf("it has format %d; this program knows format 1", s.Format)
	}
	for what, n := range map[string][2]int{
		"slots": {len(s.Slots), maxSlots}, "volumes": {len(s.Volumes), maxVolumes}, "services": {len(s.Services), maxServices},
		"measurements": {len(s.Measurements), maxMeasurements}, "attachments": {len(s.Attachments), maxAttachments},
	} {
		if n[0] > n[1] {
			return fmt.Errorf("it has %d %s, more than %d", n[0], what, n[1])
		}
	}
	if len(s.Activation) != 0 && len(s.Activation) != nonceBytes {
		return fmt.Errorf("its activation has %d bytes, not %d", len(s.Activation), nonceBytes)
	}
	for _, t := range s.texts() {
		if err := checkText(t); err != nil {
			return err
		}
	}
	for i, m := range s.Measurements {
		if err := m.check(); err != nil {
			return fmt.Errorf("measurement %d: %w", i, err)
		}
	}
	return checkTime(s.Time)
}

// texts are all that people may get to see.
func (s *Statement) texts() []string {
	list := []string{s.Product, s.Release, s.Architecture, s.Box, s.BootID, s.SealPolicy, s.TPM.Manufacturer, s.TPM.Model, s.TPM.Firmware}
	for _, v := range s.Slots {
		list = append(list, v.Name, v.Release, v.RootHash, v.State)
	}
	for _, v := range s.Volumes {
		list = append(list, v.Name, v.UUID, v.Method)
	}
	for _, v := range s.Services {
		list = append(list, v.Name, v.Digest, v.State)
	}
	for _, v := range s.Measurements {
		list = append(list, v.SHA256, v.Text, v.Note)
	}
	for _, v := range s.Attachments {
		list = append(list, v.Name, v.SHA256)
	}
	return list
}

func checkText(t string) error {
	if len(t) > maxTextBytes || !utf8.ValidString(t) || strings.ContainsFunc(t, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("the text %.40q is longer than %d bytes or not printable", t, maxTextBytes)
	}
	return nil
}

// ownRegisters are those that the agent extends: the phases of a boot, and the volumes.
func ownRegisters() []int { return []int{11, 15} }

func (m Measurement) check() error {
	if !slices.Contains(ownRegisters(), m.PCR) {
		return fmt.Errorf("PCR %d: a running system measures into PCR %v", m.PCR, ownRegisters())
	}
	if _, err := parseDigest(m.SHA256); err != nil {
		return err
	}
	if m.Text != "" && MeasuredText(m.PCR, m.Text).SHA256 != m.SHA256 {
		return fmt.Errorf("the digest is not that of the text %.40q", m.Text)
	}
	return nil
}

// Digest is SHA256, decoded.
func (m Measurement) Digest() (pcr.Digest, error) { return parseDigest(m.SHA256) }

func (m Measurement) digest() pcr.Digest {
	d, _ := parseDigest(m.SHA256) // checked when the statement was read
	return d
}

func parseDigest(text string) (d pcr.Digest, err error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(d) || text != strings.ToLower(text) {
		return d, fmt.Errorf("%.70q is not a SHA-256 digest in hex", text)
	}
	return pcr.Digest(b), nil
}

// readJSON reads a document: of known fields only, with what check wants, and written in
// its one form.
func readJSON(b []byte, limit int, into any, check func() error, form func() []byte) error {
	if len(b) > limit {
		return fmt.Errorf("it has %d bytes, more than %d", len(b), limit)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("not the JSON of one: %w", err)
	}
	if err := check(); err != nil {
		return err
	}
	if !bytes.Equal(b, form()) {
		return errors.New("it is not written in the one form there is: something edited or reformatted it")
	}
	return nil
}

// indented is the form of a document that people may read.
func indented(document any) []byte {
	b, err := json.MarshalIndent(document, "", "  ")
	if err != nil {
		panic(err) // our own types, of text, numbers and bytes
	}
	return append(b, '\n')
}
