package escrow

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	escrowType    = "holdfast-escrow"
	signedAsFirst = "holdfast escrow, format 1\x00" // no other signature begins like this
)

const (
	uuidForm    = `^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`
	idForm      = `^[0-9a-f]{32}$`
	nameForm    = `^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`
	releaseForm = `^[0-9A-Za-z][0-9A-Za-z.+-]{0,63}$`
)

func matches(form, text string) bool { return regexp.MustCompile(form).MatchString(text) }

// Validate says whether keys can be escrowed under the policy.
func (p Policy) Validate() error {
	if len(p.Holders) == 0 || len(p.Holders) > MaxHolders {
		return fmt.Errorf("an escrow has 1 to %d holders, not %d", MaxHolders, len(p.Holders))
	}
	if p.Threshold < 1 || p.Threshold > len(p.Holders) {
		return fmt.Errorf("%d holders are needed of %d", p.Threshold, len(p.Holders))
	}
	seen := map[string]bool{}
	for _, h := range p.Holders {
		if !matches(nameForm, h.Name) {
			return fmt.Errorf("the holder's name %.40q is not 1 to 32 of the letters a-z, digits and hyphens", h.Name)
		}
		if len(h.Recipient) > maxRecipientBytes {
			return fmt.Errorf("holder %s: the public key has %d bytes, more than %d", h.Name, len(h.Recipient), maxRecipientBytes)
		}
		if _, err := parseRecipient(h.Recipient); err != nil {
			return fmt.Errorf("holder %s: %w", h.Name, err)
		}
		if seen[h.Name] || seen[h.Recipient] {
			return fmt.Errorf("holder %s is there twice, by name or by key: one person would count as two", h.Name)
		}
		seen[h.Name], seen[h.Recipient] = true, true
	}
	return nil
}

// Marshal is the file. The same escrow gives the same bytes.
func (e *Escrow) Marshal() []byte { return canonical(e) }

// Digest is the SHA-256 of the file.
func (e *Escrow) Digest() [32]byte { return sha256.Sum256(e.Marshal()) }

// canonical is the one form that these files have.
func canonical(v any) []byte {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic(err) // our own types, of text, numbers and bytes
	}
	return append(b, '\n')
}

// Parse reads a file and verifies that it is as the box signed it.
func Parse(b []byte) (*Escrow, error) {
	e, err := decode(b)
	if err == nil {
		err = e.verify()
	}
	if err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	return e, nil
}

// decode is Parse without the signature.
func decode(b []byte) (*Escrow, error) {
	var e Escrow
	if err := strict(b, &e); err != nil {
		return nil, err
	}
	if err := e.check(); err != nil {
		return nil, err
	}
	return &e, wantSame(b, e.Marshal())
}

// strict decodes JSON without fields that are not known.
func strict(b []byte, into any) error {
	if len(b) > MaxBytes {
		return fmt.Errorf("%d bytes are more than the %d of one", len(b), MaxBytes)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("not the JSON of one: %w", err)
	}
	return nil
}

func wantSame(got, want []byte) error {
	if !bytes.Equal(got, want) {
		return errors.New("it is not written in the one form there is: something edited or reformatted it; fetch it again as it was")
	}
	return nil
}

func (e *Escrow) check() error {
	switch {
	case e.Type != escrowType:
		return fmt.Errorf("its type is %.40q, not %s", e.Type, escrowType)
	case e.Format != 1:
		return fmt.Errorf("it has format %d; this program knows format 1", e.Format)
	case !matches(idForm, e.ID):
		return errors.New("its id is not 32 hex digits")
	case len(e.Volumes) == 0 || len(e.Volumes) > maxVolumes || e.Volumes[0] != e.Box ||
		slices.ContainsFunc(e.Volumes, func(v string) bool { return !matches(uuidForm, v) }):
		return fmt.Errorf("its volumes are not 1 to %d UUIDs, the box's first", maxVolumes)
	case !matches(nameForm, e.Product) || !matches(releaseForm, e.Release):
		return fmt.Errorf("product %.40q or release %.40q is not the name of one", e.Product, e.Release)
	case e.Serial < 1 || e.Serial > 1<<31-1:
		return fmt.Errorf("its serial number is %d", e.Serial)
	}
	if err := checkTime(e.Time); err != nil {
		return err
	}
	return e.checkShares()
}

func checkTime(t time.Time) error {
	if t.Location() != time.UTC || t.Nanosecond() != 0 || t.Year() < 1970 || t.Year() > 9999 {
		return errors.New("its time is not whole seconds in UTC")
	}
	return nil
}

func (e *Escrow) checkShares() error {
	p := Policy{Threshold: e.Threshold}
	for _, s := range e.Shares {
		p.Holders = append(p.Holders, s.Holder)
		if len(s.Age) > maxSealedBytes || !strings.HasPrefix(string(s.Age), "age-encryption.org/v1\n") {
			return fmt.Errorf("the share of %.40q is no age file of at most %d bytes", s.Name, maxSealedBytes)
		}
	}
	if err := p.Validate(); err != nil {
		return err
	}
	s := e.Signature
	if s.Scheme != SchemeEd25519 {
		return fmt.Errorf("it is signed by the scheme %.40q; this program knows %s", s.Scheme, SchemeEd25519)
	}
	if len(s.PublicKey) != ed25519.PublicKeySize || len(s.Value) != ed25519.SignatureSize {
		return fmt.Errorf("its signature has %d bytes and its key %d", len(s.Value), len(s.PublicKey))
	}
	return nil
}

// signed is what the box signs, with either key.
func (e *Escrow) signed() []byte {
	bare := *e
	bare.Signature.Value, bare.TPM = nil, nil
	return append([]byte(signedAsFirst), canonical(&bare)...)
}

func (e *Escrow) verify() error {
	if !ed25519.Verify(e.Signature.PublicKey, e.signed(), e.Signature.Value) {
		return fmt.Errorf("%w: the file was damaged, or somebody changed what the box had signed", ErrSignature)
	}
	if e.TPM == nil {
		return nil
	}
	if err := e.TPM.Verify(e.signed()); err != nil {
		return fmt.Errorf("%w: that of the TPM: %w: the file was damaged, or put together of two", ErrSignature, err)
	}
	return nil
}
