// Package keys makes and loads a vendor's signing keys, which lie in one
// folder. Call [Create] once in a product's life and [Load] at every build.
//
//	PK.key  PK.pem  PK.auth    Secure Boot platform key: owns the machine
//	KEK.key KEK.pem KEK.auth   key exchange key: changes db
//	db.key  db.pem  db.auth    signature database: signs boot loaders and UKIs
//	db-next.key .pem .auth     the db key after this one; see Rotation
//	policy.key policy.pem      signs PCR 11 policies: which releases open the disk
//	escrow.key escrow.pub      age identity and recipient of recovery keys
//
// The .pem files are X.509 certificates (policy.pem a public key), the .auth
// files are signed UEFI variables to enrol. A build needs db.key and
// policy.key; PK.key, KEK.key and escrow.key should leave the build machine,
// and Load does without every private key that is not in the folder.
//
// db-keep.esl and KEK-keep.esl, if there, are signature lists of others that are
// enrolled with ours ([Config].KeepDB). signers.json, if there, says how keys sign that
// lie elsewhere: by programs, for an HSM or a signing service (see [Program]), or on
// another machine.
//
// # Signing on another machine
//
// With {"db": {"carried": "../to-sign"}} in signers.json, what needs that key writes a
// request into the folder to-sign beside the keys' and ends with an error that [Wanted]
// takes apart. Carry the folder to the machine with the private keys, where [Answer] signs,
// carry it back, and do the same again: it comes to the same digests and finds the
// signatures. It asks each time for all that it can. How often files are carried:
//
//	a build                  once; twice where both db and policy are elsewhere, since the
//	                         kernel image's signature covers the policy's
//	Create                   once for certificates that exist, twice for public keys
//	Rotate                   once; twice for a new db-next that exists as a public key
//	Revoke, a downgrade      once
//
// What else would differ from run to run, the time and keys that are made, waits in
// OUT.waiting beside what is to be made ([Waiting]); it may hold private keys.
//
// A request is KEY-DIGEST.request, JSON for people too ([Request]); the answer is
// KEY-DIGEST.sig, 256 raw bytes. Anything may make it; with OpenSSL and coreutils:
//
//	echo DIGEST | tr a-f A-F | basenc --base16 -d |
//	  openssl pkeyutl -sign -inkey db.key -pkeyopt digest:sha256 -out db-DIGEST.sig
//
// Answers are used only when they hold: a folder that was in others' hands can keep a
// release from being made, and no more. The other way is not as safe. A request is a
// bare digest, and what it says it is for is only a claim: whoever can write into the
// folder before it is signed gets what he likes signed. Who signs can check a build by
// building the same, with the same public files, on a machine that he trusts: the same
// requests have to come out. For the rest he can check that he expects as many requests
// for these keys as there are.
//
// The folder may be emptied at any time, at the price of asking again. Requests that are
// out of date should be, before they are signed.
//
// # Rotation
//
// Boxes come to trust a new db key before it is used, and stop trusting the old one
// after nothing needs it, by signed variables that releases carry (the spec's section
// secureboot):
//
//  1. A release, signed with db.key, carries db-next.auth, which adds the next
//     certificate to db. Wait until the fleet has it.
//  2. [Rotate] makes db-next the key db, and a new db-next. Later releases are signed
//     with it. db.auth, which enrols new boxes, has the new certificate alone.
//  3. Once both slots of a box hold such releases, one that carries db.auth replaces
//     db, without the old certificate. A box whose other slot still needs that waits.
//
// The old certificate stays in the folder as db-retired-….pem, and as long as it does, a
// verifier takes boxes that have it in db ([Keys.Trusted]). Remove it when none should.
//
// A key that is known to others is revoked besides, as single programs are:
// [Keys.Revoke] makes an addition to dbx. New boxes are enrolled without it, and take
// it from their first release that carries it.
//
// # The subset
//
// RSA with 2048 bits, since firmware and TPMs take little else, and self-signed
// certificates, since firmware compares keys and builds no chains.
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
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// Names of the Secure Boot keys, which are the names of the UEFI variables.
const (
	PK  = "PK"
	KEK = "KEK"
	DB  = "db"
	DBX = "dbx"
	// DBNext is the file name of the key that follows DB.
	DBNext = "db-next"
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
	// DBNext is the zero value in folders from before there was one.
	DBNext Pair
	// Retired are the certificates in db-retired-….pem, which were DB's before a rotation.
	Retired []*x509.Certificate
	// KeepDB and KeepKEK are enrolled beside DB's and KEK's certificate.
	KeepDB, KeepKEK sigdb.Database

	// PolicyKey signs PCR 11 policies; nil when it is not in the folder.
	PolicyKey *rsa.PrivateKey
	// PolicyPublicPEM goes into the UKI as .pcrpkey and into the TPM policy.
	PolicyPublicPEM []byte

	// Escrow opens escrowed recovery keys; nil when it is not in the folder.
	Escrow *age.X25519Identity
	// EscrowRecipient is who recovery keys are encrypted to.
	EscrowRecipient *age.X25519Recipient

	policy crypto.Signer // instead of PolicyKey; nil when signers.json names none
}

// PolicySigner is PolicyKey or what signs in its place, or an error that names the
// missing file.
func (k *Keys) PolicySigner() (crypto.Signer, error) {
	if k.policy != nil {
		return k.policy, nil
	}
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

// pair returns the key of one of the names [PK], [KEK], [DB] and [DBNext].
func (k *Keys) pair(name string) (*Pair, error) {
	switch name {
	case PK:
		return &k.PK, nil
	case KEK:
		return &k.KEK, nil
	case DB:
		return &k.DB, nil
	case DBNext:
		return &k.DBNext, nil
	}
	return nil, fmt.Errorf("no Secure Boot key %q; there are %s, %s, %s and %s", name, PK, KEK, DB, DBNext)
}

// content is what the variable of that name is enrolled with.
func (k *Keys) content(name string) (sigdb.Database, error) {
	p, err := k.pair(name)
	if err != nil || p.Cert == nil {
		return nil, errors.Join(err, fmt.Errorf("no certificate %s.pem", name))
	}
	own := sigdb.Database{sigdb.Certificate(p.Cert, sigdb.FromUUID(k.Owner()))}
	switch name {
	case DB:
		return append(own, k.KeepDB...), nil
	case KEK:
		return append(own, k.KeepKEK...), nil
	}
	return own, nil
}

// SignatureList is the content of the UEFI variable of that name (PK, KEK, db) on a
// box that was enrolled with these keys: an EFI_SIGNATURE_LIST with the certificate,
// and those that are kept (UEFI 2.10 §32.4.1).
func (k *Keys) SignatureList(name string) ([]byte, error) {
	d, err := k.content(name)
	return d.Marshal(), err
}

// Trusted are the signature lists of all that the UEFI variable of that name (PK, KEK, db)
// may hold on a box of this vendor, whichever steps of a rotation the box has taken: for
// db that is the next certificate and the retired ones too.
func (k *Keys) Trusted(name string) ([]byte, error) {
	d, err := k.content(name)
	if err != nil || name != DB {
		return d.Marshal(), err
	}
	if k.DBNext.Cert != nil {
		next, err := k.content(DBNext)
		if err != nil {
			return nil, err
		}
		d = append(d, next...)
	}
	for _, cert := range k.Retired {
		d = append(d, sigdb.Certificate(cert, sigdb.FromUUID(k.Owner())))
	}
	return d.Marshal(), nil
}

// authOf says how the .auth file of a key changes which variable, and who signs it.
func (k *Keys) authOf(name string) (variable string, appends bool, signer *Pair) {
	switch name {
	case PK, KEK:
		return name, false, &k.PK
	case DBNext:
		return DB, true, &k.KEK
	}
	return DB, false, &k.KEK
}

// Revocation is what no box shall start any more.
type Revocation struct {
	// Digests are Authenticode digests of programs (SHA-256).
	Digests [][32]byte
	// Certificates are of keys whose signatures shall count no more.
	Certificates []*x509.Certificate
	// Earlier is what earlier additions to dbx held. A box may have missed them, so
	// a new one should have them too.
	Earlier sigdb.Database
}

// Revoke makes an addition to dbx, signed by the key exchange key.
func (k *Keys) Revoke(r Revocation, at time.Time) ([]byte, error) {
	owner := sigdb.FromUUID(k.Owner())
	all := slices.Clone(r.Earlier)
	for _, c := range r.Certificates {
		for _, p := range []*Pair{&k.DB, &k.DBNext, &k.KEK, &k.PK} {
			if p.Cert != nil && p.Cert.Equal(c) {
				return nil, fmt.Errorf("revoke %q: it is %s.pem, which is in use; boxes would start nothing that it signed: rotate the keys first", c.Subject.CommonName, p.name)
			}
		}
		if !all.HasData(sigdb.TypeX509(), c.Raw) {
			all = append(all, sigdb.Certificate(c, owner))
		}
	}
	fresh := slices.DeleteFunc(slices.Clone(r.Digests), func(d [32]byte) bool { return all.HasData(sigdb.TypeSHA256(), d[:]) })
	if len(fresh) > 0 {
		all = append(all, sigdb.Hashes(fresh, owner))
	}
	if len(all) == 0 {
		return nil, errors.New("revoke: nothing is named")
	}
	key, err := k.KEK.Signer()
	if err != nil {
		return nil, err
	}
	key = For(key, "add to dbx: "+strings.Join(all.Describe(), "; "))
	return sigdb.Sign(DBX, all, true, key, k.KEK.Cert, at)
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
	// KeepDB and KeepKEK are certificates of others to be enrolled beside the
	// vendor's: Microsoft's, where option ROMs are signed with them. Who has a key in
	// KEK can change db and dbx, which changes PCR 7 (F7).
	KeepDB, KeepKEK sigdb.Database
	// Public are keys that exist already, by their names ([PK], [KEK], [DB],
	// [DBNext], "policy"): a certificate, or a public key, for which one is made.
	Public map[string]Public
	// Signers sign with them.
	Signers Signers
}

// Public is the public part of a key that lies elsewhere.
type Public struct {
	Key  *rsa.PublicKey
	Cert *x509.Certificate // nil: to be made
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
