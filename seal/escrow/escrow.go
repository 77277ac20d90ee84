// Package escrow carries a box's recovery key to those who keep it: a small file
// in which the key is encrypted to the holders' age keys, whole or in shares of
// which m out of n restore it.
//
// # What to call
//
// The box calls [New] when it makes a recovery key, and hands the bytes of
// [Escrow.Marshal] out. A holder calls [Parse], [Escrow.Open] with an age identity,
// and [Escrow.Recover] with the shares of enough holders. Who keeps the files signs
// a [Receipt] for one ([NewReceipt]); the box believes [ParseReceipt] and
// [Receipt.Covers].
//
// # The file
//
// JSON, version 1, in exactly one form: what Marshal writes. Parse refuses the same
// content written in another way, so that a digest names an escrow, and one
// reader cannot understand what another does not. With one holder who suffices, a
// share is an age file that holds the recovery key as a person would type it:
//
//	jq -r .shares[0].age escrow.json | base64 -d | age -d -i escrow.key
//
// With more than one needed, it holds a [Share]: Shamir's scheme over GF(2^8), with
// the polynomial of AES, one polynomial for each byte of the key and of a checksum,
// share number x being the values at x. Fewer shares than are needed say nothing
// about the key, not even whether a guess is right.
//
// # Signatures
//
// The box signs an escrow twice. With an Ed25519 key that it made when it was
// provisioned and keeps on its data volume: that shows that a later escrow is from the
// box that an earlier one came from ([Escrow.SameBox]), and that nothing was changed
// since. And with its TPM's attestation key ([Escrow.TPM]), over the same content and so
// over the first key too: that shows which box it is, to who keeps a record of it
// ([Escrow.By]; see package attest). A box whose TPM does not answer leaves the second
// one out.
//
// # What it does not protect
//
// Whoever opens enough shares has the key, and with it the data of a disk that is in
// his hands; nothing tells the box. A holder's age key that gets known opens every
// escrow made for it, older ones too: make other keys, and replace the boxes' recovery
// keys. Who can write to the box's data volume can sign in its name, and who can start
// another system on the box can have its TPM sign.
// Who can change an escrow on its way can make it useless, and is found out by
// the signature only where the box's key is known.
//
// Shares are wiped where this package owns the memory; age's own copies are not.
package escrow

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// Limits of a file. All sizes are bytes.
const (
	MaxBytes   = 256 << 10
	MaxHolders = 16
	maxVolumes = 16
	// A recipient of age's post-quantum kind has some 2000 letters, and a file for it as many bytes.
	maxRecipientBytes = 4 << 10
	maxSealedBytes    = 8 << 10
	maxOpenBytes      = 1 << 10
	idBytes           = 16
)

// Schemes of [Signature].
const SchemeEd25519 = "ed25519"

// ErrSignature marks a file that was damaged, forged, or is another's.
var ErrSignature = errors.New("the signature is not right")

// ErrUnsigned marks an escrow without a TPM's signature.
var ErrUnsigned = errors.New("the escrow is not signed by the box's TPM: it may be anybody's who says he is the box")

// Holder is one who keeps a share.
type Holder struct {
	Name string `json:"name"` // a-z, 0-9 and hyphens, at most 32
	// Recipient is the holder's public key as age writes it: age1...
	Recipient string `json:"recipient"`
}

// Policy says who can read an escrow: any Threshold of the Holders together.
type Policy struct {
	Holders   []Holder
	Threshold int
}

// Subject is what an escrow is about.
type Subject struct {
	// Box is the UUID of the first data volume, which names the box; Volumes are those
	// of all that the key opens, Box first.
	Box     string
	Volumes []string
	Product string
	Release string // that made the key
	// Serial counts the recovery keys of the box, from 1.
	Serial int
	Time   time.Time
}

// Escrow is the file, and what Parse has checked of it. Change nothing in it.
type Escrow struct {
	Type   string `json:"type"` // "holdfast-escrow"
	Format int    `json:"format"`
	// ID is drawn at random, 32 hex digits; shares of different escrows do not mix.
	ID        string        `json:"id"`
	Box       string        `json:"box"`
	Volumes   []string      `json:"volumes"`
	Product   string        `json:"product"`
	Release   string        `json:"release"`
	Serial    int           `json:"serial"`
	Time      time.Time     `json:"time"` // UTC, whole seconds
	Threshold int           `json:"threshold"`
	Shares    []SealedShare `json:"shares"`
	Signature Signature     `json:"signature"`
	// TPM is the TPM's signature; nil where there was none to sign.
	TPM *attest.Endorsement `json:"tpm,omitempty"`
}

// SealedShare is one holder's.
type SealedShare struct {
	Holder
	Age []byte `json:"age"` // an age file
}

// Signature is the box's, over everything else but the TPM's.
type Signature struct {
	Scheme    string `json:"scheme"` // SchemeEd25519
	PublicKey []byte `json:"public_key"`
	Value     []byte `json:"value"`
}

// New encrypts key to the holders of the policy. signer holds the box's Ed25519 key;
// random makes the shares' polynomials. What age needs comes from crypto/rand. endorse,
// if not nil, has the TPM sign: [attest.Endorse]. It may return nil where it cannot.
func New(key *luks2.RecoveryKey, s Subject, p Policy, signer crypto.Signer, random io.Reader, endorse func([]byte) (*attest.Endorsement, error)) (*Escrow, error) {
	e, err := newEscrow(key, s, p, signer, random)
	if err == nil && endorse != nil {
		e.TPM, err = endorse(e.signed())
	}
	if err == nil {
		err = e.verify()
	}
	if err != nil {
		return nil, fmt.Errorf("make escrow: %w", err)
	}
	return e, nil
}

func newEscrow(key *luks2.RecoveryKey, s Subject, p Policy, signer crypto.Signer, random io.Reader) (*Escrow, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	public, ok := signer.Public().(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("the box's key is a %T and not an Ed25519 key", signer.Public())
	}
	var id [idBytes]byte
	if _, err := io.ReadFull(random, id[:]); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	e := &Escrow{
		Type: escrowType, Format: 1, ID: hex.EncodeToString(id[:]), Box: s.Box, Volumes: slices.Clone(s.Volumes),
		Product: s.Product, Release: s.Release, Serial: s.Serial, Time: s.Time.UTC().Truncate(time.Second),
		Threshold: p.Threshold, Signature: Signature{Scheme: SchemeEd25519, PublicKey: public},
	}
	if err := e.seal(key, p, random); err != nil {
		return nil, err
	}
	value, err := signer.Sign(nil, e.signed(), crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	e.Signature.Value = value
	return e, e.check()
}

// seal fills in the shares.
func (e *Escrow) seal(key *luks2.RecoveryKey, p Policy, random io.Reader) error {
	secret := e.checked(key)
	defer luks2.Wipe(secret)
	values, err := split(secret, p.Threshold, len(p.Holders), random)
	if err != nil {
		return err
	}
	for i, h := range p.Holders {
		plain := (&Share{ID: e.ID, Threshold: p.Threshold, X: i + 1, value: values[i]}).Text()
		if p.Threshold == 1 {
			plain = append(key.Passphrase(), '\n')
		}
		sealed, err := encrypt(h, plain)
		luks2.Wipe(plain)
		luks2.Wipe(values[i])
		if err != nil {
			return err
		}
		e.Shares = append(e.Shares, SealedShare{h, sealed})
	}
	return nil
}

func encrypt(h Holder, plain []byte) ([]byte, error) {
	to, err := parseRecipient(h.Recipient)
	if err != nil {
		return nil, fmt.Errorf("holder %s: %w", h.Name, err)
	}
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, to)
	if err == nil {
		_, err = w.Write(plain)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("encrypt to holder %s: %w", h.Name, err)
	}
	return sealed.Bytes(), nil
}

// parseRecipient takes one key of age's own kinds, in the one way that age writes it.
func parseRecipient(text string) (age.Recipient, error) {
	list, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil || len(list) != 1 || strings.TrimSpace(text) != text || strings.ContainsAny(text, "\n#") {
		return nil, fmt.Errorf("%.80q is not the public key of an age identity, which begins with age1", text)
	}
	return list[0], nil
}

const checksumBytes = 8

// checked is the key and a checksum, which tells whether shares fit together. It is
// part of what is shared, and so as hidden as the key from too few holders.
func (e *Escrow) checked(key *luks2.RecoveryKey) []byte {
	raw := key.Bytes()
	defer luks2.Wipe(raw)
	sum := sha256.Sum256(slices.Concat([]byte("holdfast escrow key\x00"+e.ID), raw))
	return slices.Concat(raw, sum[:checksumBytes])
}

// Open decrypts the shares that the identities open. It is an error when there is none.
func (e *Escrow) Open(identities ...age.Identity) (shares []*Share, err error) {
	if len(identities) == 0 {
		return nil, errors.New("open escrow: no key is given")
	}
	for i, sealed := range e.Shares {
		s, err := e.openShare(i, identities)
		var other *age.NoIdentityMatchError
		if errors.As(err, &other) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open the share of %s: %w", sealed.Name, err)
		}
		shares = append(shares, s)
	}
	if len(shares) == 0 {
		return nil, fmt.Errorf("open escrow: it is for %s, and the key given is none of theirs", e.holders())
	}
	return shares, nil
}

func (e *Escrow) openShare(i int, identities []age.Identity) (*Share, error) {
	r, err := age.Decrypt(bytes.NewReader(e.Shares[i].Age), identities...)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, maxOpenBytes)
	defer luks2.Wipe(plain)
	n, err := io.ReadFull(r, plain)
	if !errors.Is(err, io.ErrUnexpectedEOF) && err != io.EOF {
		return nil, errors.Join(err, fmt.Errorf("it has %d bytes or more", maxOpenBytes))
	}
	if e.Threshold == 1 {
		key, err := luks2.ParseRecoveryKey(plain[:n])
		if err != nil {
			return nil, err
		}
		defer key.Wipe()
		return &Share{ID: e.ID, Threshold: 1, X: i + 1, value: e.checked(key)}, nil
	}
	s, err := ParseShare(plain[:n])
	if err != nil {
		return nil, err
	}
	if s.X != i+1 {
		return nil, fmt.Errorf("it is number %d where %d should be", s.X, i+1)
	}
	return s, e.fits(s)
}

// NotEnoughError says that more holders are needed.
type NotEnoughError struct {
	Have, Need int
	// Missing are the names of the others.
	Missing []string
}

func (e *NotEnoughError) Error() string {
	return fmt.Sprintf("%d of the %d shares that are needed; others have %s", e.Have, e.Need, strings.Join(e.Missing, ", "))
}

// Recover puts the recovery key together. Shares that are there twice count once; the
// error is [*NotEnoughError] when there are too few. The caller wipes the key.
func (e *Escrow) Recover(shares ...*Share) (*luks2.RecoveryKey, error) {
	have := map[int]*Share{}
	for _, s := range shares {
		if err := e.fits(s); err != nil {
			return nil, err
		}
		have[s.X] = s
	}
	if len(have) < e.Threshold {
		short := &NotEnoughError{Have: len(have), Need: e.Threshold}
		for i, s := range e.Shares {
			if have[i+1] == nil {
				short.Missing = append(short.Missing, s.Name)
			}
		}
		return nil, short
	}
	var xs []byte
	var values [][]byte
	for x := 1; x <= len(e.Shares) && len(xs) < e.Threshold; x++ {
		if s := have[x]; s != nil {
			xs, values = append(xs, byte(x)), append(values, s.value)
		}
	}
	secret := combine(xs, values)
	defer luks2.Wipe(secret)
	key, err := luks2.GenerateRecoveryKey(bytes.NewReader(secret))
	if err != nil {
		return nil, err
	}
	again := e.checked(key)
	defer luks2.Wipe(again)
	if !bytes.Equal(again, secret) {
		key.Wipe()
		return nil, fmt.Errorf("the shares of %s do not fit together: one was mistyped or damaged, or a holder gave another than he was given",
			e.names(xs))
	}
	return key, nil
}

// fits says whether a share is of this escrow.
func (e *Escrow) fits(s *Share) error {
	switch {
	case s.ID != e.ID:
		return fmt.Errorf("the share is of escrow %s, this is %s", s.ID, e.ID)
	case s.Threshold != e.Threshold || s.X < 1 || s.X > len(e.Shares):
		return fmt.Errorf("the share is number %d of which %d are needed; this escrow has %d and needs %d", s.X, s.Threshold, len(e.Shares), e.Threshold)
	case len(s.value) != secretBytes:
		return fmt.Errorf("the share has %d bytes, not %d", len(s.value), secretBytes)
	}
	return nil
}

func (e *Escrow) names(xs []byte) string {
	var names []string
	for _, x := range xs {
		names = append(names, e.Shares[x-1].Name)
	}
	return strings.Join(names, ", ")
}

func (e *Escrow) holders() string {
	var names []string
	for _, s := range e.Shares {
		names = append(names, s.Name)
	}
	return strings.Join(names, ", ")
}

// FileName is what the box calls the file on a medium.
func (e *Escrow) FileName() string {
	return fmt.Sprintf("holdfast-escrow-%s-%s-%d.json", e.Product, e.Box[:8], e.Serial)
}

// SameBox is [ErrSignature] unless earlier is of the same box and signed by the same key.
func (e *Escrow) SameBox(earlier *Escrow) error {
	switch {
	case e.Box != earlier.Box:
		return fmt.Errorf("%w: this escrow is of box %s, the earlier one of %s", ErrSignature, e.Box, earlier.Box)
	case !bytes.Equal(e.Signature.PublicKey, earlier.Signature.PublicKey):
		return fmt.Errorf("%w: this escrow is not signed by the key of the earlier one: the box was provisioned anew, or somebody else made it", ErrSignature)
	case e.Serial < earlier.Serial:
		return fmt.Errorf("%w: this escrow is number %d of the box, older than %d", ErrSignature, e.Serial, earlier.Serial)
	}
	return nil
}

// By returns nil when the TPM of the recorded box signed the escrow. The error is
// [ErrUnsigned] or [ErrSignature].
func (e *Escrow) By(r *attest.Record) error {
	if e.TPM == nil {
		return ErrUnsigned
	}
	if e.Box != r.Box {
		return fmt.Errorf("%w: this escrow is of box %s, the record of %s", ErrSignature, e.Box, r.Box)
	}
	if err := e.TPM.By(r); err != nil {
		return fmt.Errorf("%w: %w", ErrSignature, err)
	}
	return nil
}
