package uki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// ErrForbidden says that dbx names a program or the key that signed it.
var ErrForbidden = errors.New("forbidden by dbx")

// maxCarried bounds the certificates of one signature; each is checked against each.
const maxCarried = 16

// Allowed says whether firmware that has Secure Boot on and these databases
// starts the program: nil, or why not (UEFI 2.10 §32.5.3.3 and the order of
// EDK2's DxeImageVerificationLib: one revoked signature refuses the program,
// whoever else signed it).
//
// In doubt it refuses: a time of revocation counts as passed, and an entry of
// dbx that is the same certificate counts even when it cannot be read (F25).
// Digests other than SHA-256 are not compared, since we sign with no other.
func (f *File) Allowed(db, dbx sigdb.Database) error {
	digest, err := f.Authenticode()
	if err != nil {
		return err
	}
	if dbx.HasData(sigdb.TypeSHA256(), digest[:]) {
		return fmt.Errorf("%w: by its digest %x", ErrForbidden, digest)
	}
	sigs, err := f.Signatures()
	if err != nil {
		return err
	}
	// Entries that cannot be read are passed over: firmware cannot use them either.
	trusted, _ := db.Certificates()
	revoked, _ := dbx.Certificates()
	allowed := db.HasData(sigdb.TypeSHA256(), digest[:])
	for _, s := range sigs {
		if len(s.Certificates) > maxCarried {
			return fmt.Errorf("the signature of %s carries %d certificates, looked at are %d", s.signer(), len(s.Certificates), maxCarried)
		}
		if err := s.forbidden(dbx, revoked); err != nil {
			return err
		}
		allowed = allowed || s.signedBy(digest, trusted)
	}
	switch {
	case allowed:
		return nil
	case len(sigs) == 0:
		return ErrNotSigned
	}
	return fmt.Errorf("no certificate in db verifies the signature of %s", sigs[0].signer())
}

// Authority is the certificate in db by which the firmware starts the program, the
// first in the order of the database, whose entry it extends into PCR 7; nil when none
// verifies it. It does not ask dbx; see [File.Allowed].
func (f *File) Authority(db sigdb.Database) (*x509.Certificate, error) {
	digest, err := f.Authenticode()
	if err != nil {
		return nil, err
	}
	sigs, err := f.Signatures()
	if err != nil {
		return nil, err
	}
	trusted, _ := db.Certificates()
	for _, s := range sigs {
		for _, t := range trusted {
			if len(s.Certificates) <= maxCarried && s.signedBy(digest, []*x509.Certificate{t}) {
				return t, nil
			}
		}
	}
	return nil, nil
}

// signer is the name the signature claims.
func (s *Signature) signer() string {
	if len(s.Certificates) == 0 {
		return "an unnamed key"
	}
	return fmt.Sprintf("%q", s.Certificates[0].Subject.CommonName)
}

// forbidden looks for every certificate the signature carries, and for those
// that issued them.
func (s *Signature) forbidden(dbx sigdb.Database, revoked []*x509.Certificate) error {
	for _, c := range s.Certificates {
		tbs := sha256.Sum256(c.RawTBSCertificate)
		named := dbx.HasData(sigdb.TypeX509(), c.Raw)
		for _, l := range dbx {
			if l.Type != sigdb.TypeX509SHA256() {
				continue
			}
			for _, e := range l.Entries { // the digest, then the time of revocation
				named = named || bytes.HasPrefix(e.Data, tbs[:])
			}
		}
		for _, r := range revoked {
			named = named || issued(r, c)
		}
		if named {
			return fmt.Errorf("%w: certificate %q", ErrForbidden, c.Subject.CommonName)
		}
	}
	return nil
}

// signedBy says whether a certificate of db is the signer's, or issued one that
// the signature carries, and so on to the signer's.
func (s *Signature) signedBy(digest [32]byte, trusted []*x509.Certificate) bool {
	reached := slices.Clone(trusted)
	for i := 0; i < len(reached); i++ {
		if s.verify(digest, reached[i]) == nil {
			return true
		}
		for _, c := range s.Certificates {
			if !slices.ContainsFunc(reached, c.Equal) && issued(reached[i], c) {
				reached = append(reached, c)
			}
		}
	}
	return false
}

// issued says whether c was signed with ca's key. Dates do not count (F90).
func issued(ca, c *x509.Certificate) bool {
	return bytes.Equal(ca.RawSubject, c.RawIssuer) && ca.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}
