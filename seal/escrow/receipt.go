package escrow

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

const (
	receiptType        = "holdfast-escrow-receipt"
	receiptSignedFirst = "holdfast escrow receipt, format 1\x00"
	// MaxReceiptBytes is the most that a receipt may have.
	MaxReceiptBytes = 4 << 10
)

// Receipt says, signed by who keeps the escrows, that he has one. Change nothing in it.
type Receipt struct {
	Type   string `json:"type"` // "holdfast-escrow-receipt"
	Format int    `json:"format"`
	Box    string `json:"box"`
	Serial int    `json:"serial"`
	// SHA256 is of the escrow's file, in hex. It is what counts; the rest is for people.
	SHA256    string    `json:"escrow_sha256"`
	Time      time.Time `json:"time"`      // UTC, whole seconds
	Signature []byte    `json:"signature"` // Ed25519
}

// NewReceipt acknowledges an escrow. key holds an Ed25519 key.
func NewReceipt(e *Escrow, key crypto.Signer, now time.Time) (*Receipt, error) {
	public, ok := key.Public().(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("make receipt: the key is a %T and not an Ed25519 key", key.Public())
	}
	sum := e.Digest()
	r := &Receipt{Type: receiptType, Format: 1, Box: e.Box, Serial: e.Serial,
		SHA256: hex.EncodeToString(sum[:]), Time: now.UTC().Truncate(time.Second)}
	var err error
	if r.Signature, err = key.Sign(nil, r.signed(), crypto.Hash(0)); err != nil {
		return nil, fmt.Errorf("sign receipt: %w", err)
	}
	_, err = ParseReceipt(r.Marshal(), public)
	return r, err
}

// Marshal is the file. The same receipt gives the same bytes.
func (r *Receipt) Marshal() []byte { return canonical(r) }

// ParseReceipt reads a receipt and verifies that key signed it.
func ParseReceipt(b []byte, key ed25519.PublicKey) (*Receipt, error) {
	r, err := decodeReceipt(b)
	if err == nil && (len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, r.signed(), r.Signature)) {
		err = fmt.Errorf("%w: it is not signed by the key that receipts are taken from: it is another vendor's, or somebody made it up", ErrSignature)
	}
	if err != nil {
		return nil, fmt.Errorf("escrow receipt: %w", err)
	}
	return r, nil
}

func decodeReceipt(b []byte) (*Receipt, error) {
	if len(b) > MaxReceiptBytes {
		return nil, fmt.Errorf("%d bytes are more than the %d of one", len(b), MaxReceiptBytes)
	}
	var r Receipt
	if err := strict(b, &r); err != nil {
		return nil, err
	}
	switch {
	case r.Type != receiptType:
		return nil, fmt.Errorf("its type is %.40q, not %s", r.Type, receiptType)
	case r.Format != 1:
		return nil, fmt.Errorf("it has format %d; this program knows format 1", r.Format)
	case !matches(uuidForm, r.Box) || r.Serial < 1 || r.Serial > 1<<31-1 || !matches(`^[0-9a-f]{64}$`, r.SHA256) || len(r.Signature) != ed25519.SignatureSize:
		return nil, errors.New("it names no box, serial number or digest, or is not signed")
	}
	if err := checkTime(r.Time); err != nil {
		return nil, err
	}
	return &r, wantSame(b, r.Marshal())
}

func (r *Receipt) signed() []byte {
	bare := *r
	bare.Signature = nil
	return append([]byte(receiptSignedFirst), canonical(&bare)...)
}

// ReceiptPrefix begins the names of receipts that a box looks for on a medium.
const ReceiptPrefix = "holdfast-receipt-"

// FileName is what the box looks for on a medium.
func (r *Receipt) FileName() string {
	return fmt.Sprintf("%s%s-%d.json", ReceiptPrefix, r.Box[:8], r.Serial)
}

// Covers is an error unless the receipt is for exactly this escrow.
func (r *Receipt) Covers(e *Escrow) error {
	if sum := e.Digest(); r.SHA256 != hex.EncodeToString(sum[:]) {
		return fmt.Errorf("the receipt is for escrow %d of box %s, %.16s…, and not for %d of %s, %.16x…", r.Serial, r.Box, r.SHA256, e.Serial, e.Box, sum)
	}
	return nil
}

// GenerateKey makes an Ed25519 key, of a box or of who signs receipts: PKCS #8 and PKIX
// in PEM, as openssl has them.
func GenerateKey() (private, public []byte, err error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	private = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if der, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		return nil, nil, err
	}
	return private, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// ParsePrivateKey reads an Ed25519 key, PKCS #8 in PEM. No error quotes it.
func ParsePrivateKey(text []byte) (ed25519.PrivateKey, error) {
	if block, rest := pem.Decode(text); block != nil && block.Type == "PRIVATE KEY" && len(rest) == 0 {
		if any, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
			if key, ok := any.(ed25519.PrivateKey); ok {
				return key, nil
			}
		}
	}
	return nil, errors.New("not an Ed25519 private key: one PKCS #8 block in PEM, as holdfast escrow newkey or openssl genpkey -algorithm ed25519 write it")
}

// ParsePublicKey reads an Ed25519 public key, PKIX in PEM.
func ParsePublicKey(text []byte) (ed25519.PublicKey, error) {
	if block, rest := pem.Decode(text); block != nil && block.Type == "PUBLIC KEY" && len(rest) == 0 {
		if any, err := x509.ParsePKIXPublicKey(block.Bytes); err == nil {
			if key, ok := any.(ed25519.PublicKey); ok {
				return key, nil
			}
		}
	}
	return nil, errors.New("not an Ed25519 public key: one PKIX block in PEM, as holdfast escrow newkey or openssl pkey -pubout write it")
}
