package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

const endorsedFirst = "holdfast endorsement, format 1\x00" // see quotedFirst

// Endorsement is a TPM's signature over a document that need not be an answer to
// anybody. It says which TPM, and not what ran: who can start another system on the box
// can have its TPM sign too. [Verify] judges that, of an [Answer].
type Endorsement struct {
	AKPublic  []byte `json:"ak_public"` // TPMT_PUBLIC
	Quote     []byte `json:"quote"`     // TPMS_ATTEST, over the document's digest
	Signature []byte `json:"signature"` // TPMT_SIGNATURE
}

// Endorse has the TPM sign a document with the key that it attests with. It sends about
// five commands and leaves nothing in the TPM.
func Endorse(t seal.TPM, document []byte) (*Endorsement, error) {
	t = seal.Patient(t)
	ak, err := makeAK(t, false)
	if err != nil {
		return nil, fmt.Errorf("endorse: %w", err)
	}
	defer ak.flush(t)
	var a Answer
	if err := a.quote(t, ak, endorsedData(document)); err != nil {
		return nil, fmt.Errorf("endorse: %w", err)
	}
	e := &Endorsement{ak.public, a.Quote, a.Signature}
	return e, e.Verify(document)
}

func endorsedData(document []byte) pcr.Digest {
	sum := sha256.Sum256(document)
	return sha256.Sum256(slices.Concat([]byte(endorsedFirst), sum[:]))
}

// Verify returns nil when the key in the endorsement is one that a TPM made, and signed
// this document. Whose TPM it is, [Endorsement.By] tells.
func (e *Endorsement) Verify(document []byte) error {
	ak, err := parsePublic(e.AKPublic)
	if err == nil {
		err = checkAK(ak)
	}
	if err != nil {
		return fmt.Errorf("the attestation key: %w", err)
	}
	key, err := ak.key()
	if err != nil {
		return fmt.Errorf("the attestation key: %w", err)
	}
	if len(e.Quote) > maxStructureBytes {
		return fmt.Errorf("a quote of %d bytes", len(e.Quote))
	}
	if err := verifySignature(key, e.Signature, e.Quote); err != nil {
		return err
	}
	q, err := parseQuote(e.Quote)
	if err != nil {
		return fmt.Errorf("the quote: %w", err)
	}
	if want := endorsedData(document); !bytes.Equal(q.ExtraData, want[:]) {
		return errors.New("the TPM signed another document")
	}
	return nil
}

// Key is the TPM's name of the attestation key, in hex, as [Record] has it.
func (e *Endorsement) Key() string { return hex.EncodeToString(nameOf(e.AKPublic)) }

// By returns nil when the key is the recorded box's.
func (e *Endorsement) By(r *Record) error {
	if e.Key() != r.AK {
		return fmt.Errorf("the attestation key is not the one recorded of box %s: its TPM was replaced since, or another TPM signed", r.Box)
	}
	return nil
}
