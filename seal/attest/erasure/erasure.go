// Package erasure is the proof that a box destroyed the keys of its data: at a factory
// reset or at the end of its life, signed by its TPM.
//
// The box fills in a [Proof] and calls [Proof.Sign]; its owner or vendor calls [Parse]
// and [Proof.Verify], with the same [attest.Policy] that he judges the box's answers by.
// The signature is an answer of package attest (see there for parties and keys) with the
// proof as its only attachment. It therefore shows more than that this TPM signed: that
// an approved release ran, by whose word the rest is; that the recorded data volumes were
// open in this boot (PCR 15); and, where the vendor's challenge was given, that it was
// done after that was made. Without a challenge the time is the box's word.
//
// The file is JSON in exactly one form, so that what people read is what was signed.
//
// What it does not protect: that the drive has no other copy of what was overwritten (flash
// keeps old cells until it collects them; see package luks2), or that nobody copied the
// headers before. A release that was broken into at run time signs what it is told to.
// Without a TPM a proof is not signed ([ErrUnsigned]): it is then as good as who carries it.
package erasure

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
)

// What was done.
const (
	FactoryReset = "factory reset"
	Decommission = "decommission"
)

// HeadBytes is the length of a volume's area with both headers and all key areas
// (package luks2, "The subset").
const HeadBytes = 16 << 20

const (
	proofType = "holdfast-erasure"
	// attachmentName is that of the proof in the answer that signs it. No other answer has one.
	attachmentName = "erasure.json"
	// MaxBytes is the longest file that [Parse] reads: an answer in base64, and text.
	MaxBytes       = 2 * attest.MaxAnswerBytes
	maxMarkerBytes = 64
)

// ErrUnsigned marks a proof that no TPM signed.
var ErrUnsigned = errors.New("the proof is not signed by the box's TPM: it is as good as who carries it")

// ErrMalformed marks a file that is no proof, or was damaged or edited.
var ErrMalformed = errors.New("malformed")

// Proof says what was destroyed. Fill it in, and sign it last.
type Proof struct {
	Type    string    `json:"type"` // "holdfast-erasure"
	Format  int       `json:"format"`
	What    string    `json:"what"` // FactoryReset, Decommission
	Name    string    `json:"name"` // of the product
	Version string    `json:"version"`
	Time    time.Time `json:"time"` // the box's, UTC, whole seconds
	// Completed says that this run completed one that was interrupted.
	Completed bool `json:"completed_an_interrupted_run,omitempty"`
	// Marker is what each volume's area begins with now. Zeros follow.
	Marker  string   `json:"marker"`
	Volumes []Volume `json:"volumes"`
	TPM     *TPM     `json:"tpm,omitempty"`
	// Slots is what became of encrypted slots.
	Slots string `json:"slots,omitempty"`
	// Problems are what could not be done; the volumes are erased all the same.
	Problems []string `json:"problems,omitempty"`

	// Unsigned is why there is no Answer.
	Unsigned string `json:"unsigned,omitempty"`
	// Challenge is the box's own, as [attest.Challenge.Marshal] has it, where it was given none.
	Challenge []byte `json:"challenge,omitempty"`
	// Answer is as [attest.Answer.Marshal] has it. It signs all of the above but for Unsigned.
	Answer []byte `json:"answer,omitempty"`
}

// Volume is one data volume.
type Volume struct {
	Name string `json:"name"`
	// UUID and Keyslots are empty where there was no header any more.
	UUID     string `json:"uuid,omitempty"`
	Keyslots int    `json:"keyslots,omitempty"`
	// AreaBytes from the volume's start were overwritten, and read back. Of these bytes,
	// Before and After are the SHA-256, in hex.
	AreaBytes int64  `json:"area_bytes"`
	Before    string `json:"before_sha256"`
	After     string `json:"after_sha256"`
}

// TPM is what was done in the TPM: "removed", or "there was none".
type TPM struct {
	Manufacturer string `json:"manufacturer,omitempty"`
	Counter      string `json:"counter,omitempty"`
	StorageKey   string `json:"storage_key,omitempty"`
}

// New is a proof to fill in.
func New(what, name, version, marker string, now time.Time) *Proof {
	return &Proof{Type: proofType, Format: 1, What: what, Name: name, Version: version, Marker: marker, Time: now.UTC().Truncate(time.Second)}
}

// Sign has the TPM sign the proof. in is as for [attest.Attest], but for its
// attachments; without a challenge the box makes one of its own.
func (p *Proof) Sign(t seal.TPM, in attest.Input) error {
	p.Unsigned, p.Challenge, p.Answer = "", nil, nil
	if in.Challenge == nil {
		own, err := attest.NewChallenge(in.Time)
		if err != nil {
			return err
		}
		in.Challenge, p.Challenge = own, own.Marshal()
	}
	in.Attachments = []attest.Attachment{{Name: attachmentName, Data: p.signed()}}
	a, err := attest.Attest(t, in)
	if err != nil {
		p.Challenge = nil
		return fmt.Errorf("sign the proof: %w", err)
	}
	p.Answer = a.Marshal()
	return nil
}

// signed is the proof without its signature.
func (p *Proof) signed() []byte {
	bare := *p
	bare.Unsigned, bare.Challenge, bare.Answer = "", nil, nil
	return bare.Marshal()
}

// Marshal is the file. The same proof gives the same bytes.
func (p *Proof) Marshal() []byte {
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		panic(err) // our own type, of text, numbers and bytes
	}
	return append(b, '\n')
}

// WriteTo writes the file.
func (p *Proof) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(p.Marshal())
	return int64(n), err
}

// Parse reads what [Proof.Marshal] wrote, and nothing else. It verifies nothing. The
// error is [ErrMalformed].
func Parse(b []byte) (*Proof, error) {
	p, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("proof: %w: %w", ErrMalformed, err)
	}
	return p, nil
}

func parse(b []byte) (*Proof, error) {
	if len(b) > MaxBytes {
		return nil, fmt.Errorf("it has %d bytes, more than %d", len(b), MaxBytes)
	}
	p := &Proof{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(p); err != nil {
		return nil, fmt.Errorf("not the JSON of one: %w", err)
	}
	switch {
	case p.Type != proofType:
		return nil, fmt.Errorf("its type is %.40q, not %s", p.Type, proofType)
	case p.Format != 1:
		return nil, fmt.Errorf("it has format %d; this program knows format 1", p.Format)
	case p.What != FactoryReset && p.What != Decommission:
		return nil, fmt.Errorf("%.40q is neither a %s nor a %s", p.What, FactoryReset, Decommission)
	case len(p.Marker) == 0 || len(p.Marker) > maxMarkerBytes:
		return nil, fmt.Errorf("its marker has %d bytes, not 1 to %d", len(p.Marker), maxMarkerBytes)
	case len(p.Volumes) == 0:
		return nil, errors.New("it names no volume")
	case !bytes.Equal(b, p.Marshal()):
		return nil, errors.New("it is not written in the one form there is: something edited or reformatted it")
	}
	return p, nil
}

// Overwritten is the digest, in hex, of an area that holds the marker and then zeros.
func Overwritten(marker string, areaBytes int64) string {
	sum := sha256.New()
	sum.Write([]byte(marker))
	zeros := make([]byte, 64<<10)
	for left := areaBytes - int64(len(marker)); left > 0; left -= int64(len(zeros)) {
		sum.Write(zeros[:min(left, int64(len(zeros)))])
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// CheckErasure is the check that [Proof.Verify] adds to those of package attest: the
// proof is what was signed, and says that every data volume was erased.
const CheckErasure = "erasure"

// Device names the box in one line, as the answer does; without one, its volume.
func (p *Proof) Device() string {
	if a, err := attest.ParseAnswer(p.Answer); err == nil {
		return a.Device()
	}
	return strings.TrimSpace(p.Name + " " + p.Volumes[0].UUID)
}

// Signature is the answer that signs the proof, to look up what is recorded of the box.
// The error is [ErrUnsigned], or that it cannot be read.
func (p *Proof) Signature() (*attest.Answer, error) {
	if len(p.Answer) == 0 {
		return nil, ErrUnsigned
	}
	return attest.ParseAnswer(p.Answer)
}

// Verify judges the proof. sent is the challenge that the box was given; nil takes one
// that the box made itself. The policy is that for answers: its services are not
// compared, since they may have ended, and without sent the freshness is accepted as
// unknown. The error is [ErrUnsigned], or that sent is missing.
func (p *Proof) Verify(sent *attest.Challenge, policy *attest.Policy) (attest.Verdict, error) {
	a, err := p.Signature()
	if err != nil {
		return attest.Verdict{}, err
	}
	own := *policy
	own.References = slices.Clone(policy.References)
	for i := range own.References {
		own.References[i].Services = nil
	}
	if sent == nil {
		if len(p.Challenge) == 0 {
			return attest.Verdict{}, errors.New("the box signed the proof over a challenge that it was given: verify it with that")
		}
		if sent, err = attest.ParseChallenge(p.Challenge); err != nil {
			return attest.Verdict{}, err
		}
		own.Unasked = true
		own.Accept = append(slices.Clone(policy.Accept), attest.CheckFreshness)
	}
	v := attest.Verify(a, sent, &own)
	check := attest.Check{Name: CheckErasure, Result: attest.Pass, Text: fmt.Sprintf("both headers and all key areas of %d volumes were overwritten and read back", len(p.Volumes))}
	if err := p.agrees(a); err != nil {
		check.Result, check.Text = attest.Fail, err.Error()
		check.Meaning = "Innocent: a mistake in the agent. Hostile: the proof was edited, or does not name all volumes."
		v.Result = attest.Fail
	} else if v.Result == attest.Fail {
		check.Result, check.Text = attest.Unknown, "not judged, because of the checks that failed (it would be: "+check.Text+")"
	}
	v.Checks = append(v.Checks, check)
	return v, nil
}

// agrees compares the proof with what was signed, and with itself.
func (p *Proof) agrees(a *attest.Answer) error {
	if len(a.Attachments) != 1 || a.Attachments[0].Name != attachmentName || !bytes.Equal(a.Attachments[0].Data, p.signed()) {
		return errors.New("what is written here is not what the box signed")
	}
	s := a.Statement // it names the attachment
	if s.Product != p.Name || s.Release != p.Version {
		return fmt.Errorf("it is of %s %s, and the box says it runs %s %s", p.Name, p.Version, s.Product, s.Release)
	}
	for _, open := range s.Volumes {
		i := slices.IndexFunc(p.Volumes, func(v Volume) bool { return v.Name == open.Name })
		if i < 0 || p.Volumes[i].UUID != "" && p.Volumes[i].UUID != open.UUID {
			return fmt.Errorf("the box says it had the data volume %s %s open, and the proof does not name it", open.Name, open.UUID)
		}
	}
	if len(p.Volumes) != len(s.Volumes) {
		return fmt.Errorf("it names %d volumes, and the box says it had %d open", len(p.Volumes), len(s.Volumes))
	}
	want := Overwritten(p.Marker, HeadBytes)
	for _, v := range p.Volumes {
		switch {
		case v.AreaBytes != HeadBytes:
			return fmt.Errorf("volume %s: %d bytes were overwritten, and keys lie in %d", v.Name, v.AreaBytes, HeadBytes)
		case v.After != want:
			return fmt.Errorf("volume %s: what was read back is not what is written over keys", v.Name)
		case v.Before == v.After && !p.Completed:
			return fmt.Errorf("volume %s: there were no keys before", v.Name)
		}
	}
	return nil
}
