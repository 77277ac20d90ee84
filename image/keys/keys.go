// Package keys makes and loads a vendor's signing keys, which lie in one
// folder. Call [Create] once in a product's life and [Load] at every build.
//
//	PK.key  PK.pem  PK.auth    Secure Boot platform key: owns the machine
//	KEK.key KEK.pem KEK.auth   key exchange key: changes db
//	db.key  db.pem  db.auth    signature database: signs boot loaders and UKIs
//	policy.key policy.pem      signs PCR 11 policies: which releases open the disk
//	escrow.key escrow.pub      age identity and recipient of recovery keys
//
// The .pem files are X.509 certificates (policy.pem a public key), the .auth
// files are signed UEFI variables to enrol. A build needs db.key and
// policy.key; PK.key, KEK.key and escrow.key should leave the build machine,
// and Load does without every private key that is not in the folder.
//
// The subset: RSA with 2048 bits, since firmware and TPMs take little else, and
// self-signed certificates, since firmware compares keys and builds no chains.
// Keys in an HSM are used as any crypto.Signer where they are needed and do not
// lie here.
//
// The private keys are not encrypted. Their protection is the permissions of
// the folder, which Load insists on, and the disk below it.
package keys

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/google/uuid"
)

// Names of the Secure Boot keys, which are the names of the UEFI variables.
const (
	PK  = "PK"
	KEK = "KEK"
	DB  = "db"
)

const (
	rsaBits         = 2048
	validYears      = 20 // ends before 2050, where the encoding of dates in X.509 changes
	maxOrganization = 40 // leaves room for the rest in a common name, 64 characters by X.520
	maxFileBytes    = 64 << 10
)

// Pair is a Secure Boot key and its certificate.
type Pair struct {
	// Key is nil when the private key is not in the folder; use [Pair.Signer]
	// to have that reported.
	Key  crypto.Signer
	Cert *x509.Certificate
	// Auth enrols Cert: the signed content of the UEFI variable of this name
	// (EFI_VARIABLE_AUTHENTICATION_2 and a signature list, UEFI 2.10 §8.2.2).
	Auth []byte

	name string
}

// Signer is Key, or an error that names the missing file.
func (p *Pair) Signer() (crypto.Signer, error) {
	if p.Key == nil {
		return nil, missingKey(p.name)
	}
	return p.Key, nil
}

// Keys are a vendor's keys.
type Keys struct {
	PK, KEK, DB Pair

	// PolicyKey signs PCR 11 policies; nil when it is not in the folder.
	PolicyKey *rsa.PrivateKey
	// PolicyPublicPEM goes into the UKI as .pcrpkey and into the TPM policy.
	PolicyPublicPEM []byte

	// Escrow opens escrowed recovery keys; nil when it is not in the folder.
	Escrow *age.X25519Identity
	// EscrowRecipient is who recovery keys are encrypted to.
	EscrowRecipient *age.X25519Recipient
}

// PolicySigner is PolicyKey, or an error that names the missing file.
func (k *Keys) PolicySigner() (crypto.Signer, error) {
	if k.PolicyKey == nil {
		return nil, missingKey("policy")
	}
	return k.PolicyKey, nil
}

func missingKey(name string) error {
	return fmt.Errorf("%s.key is not in the keys folder; bring the private key to sign with it", name)
}

// Owner identifies the vendor in signature lists. It is derived from the
// platform key's certificate: a UUID of version 8 (RFC 9562) from its SHA-256.
func (k *Keys) Owner() uuid.UUID {
	sum := sha256.Sum256(k.PK.Cert.Raw)
	id := uuid.UUID(sum[:16])
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id
}

// pair returns the key of one of the names [PK], [KEK] and [DB].
func (k *Keys) pair(name string) (*Pair, error) {
	switch name {
	case PK:
		return &k.PK, nil
	case KEK:
		return &k.KEK, nil
	case DB:
		return &k.DB, nil
	}
	return nil, fmt.Errorf("no Secure Boot variable %q; there are %s, %s and %s", name, PK, KEK, DB)
}

// SignatureList is the content of the UEFI variable of that name (PK, KEK, db):
// one EFI_SIGNATURE_LIST with the certificate (UEFI 2.10 §32.4.1).
func (k *Keys) SignatureList(name string) ([]byte, error) {
	p, err := k.pair(name)
	if err != nil {
		return nil, err
	}
	return signatureList(p.Cert, k.Owner()), nil
}

// publicPEM is the PKIX form that OpenSSL and systemd read.
func publicPEM(pub *rsa.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// Config describes the keys to make.
type Config struct {
	// Organization is the vendor's name, for the certificates' subjects; at
	// most 40 characters.
	Organization string
	// Now is the first instant of the certificates' validity and the time
	// stamp in the .auth files. Firmware accepts a later replacement only with
	// a later stamp.
	Now time.Time
}

func (c *Config) check() error {
	switch {
	case strings.TrimSpace(c.Organization) == "":
		return errors.New("no organization given")
	case len([]rune(c.Organization)) > maxOrganization:
		return fmt.Errorf("organization %q has more than %d characters", c.Organization, maxOrganization)
	case strings.ContainsFunc(c.Organization, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' }):
		return fmt.Errorf("organization %q holds a control character", c.Organization)
	case c.Now.UTC().Year() < 2000 || c.Now.UTC().Year() >= 2050-validYears:
		// A machine without a clock would make certificates that are long over.
		return fmt.Errorf("the time %s cannot be right", c.Now.UTC().Format(time.RFC3339))
	}
	return nil
}
