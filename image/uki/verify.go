package uki

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/holdfast-os/holdfast/image/pkcs7"
)

// Signature is one entry of the certificate table.
type Signature struct {
	// Digest is the Authenticode digest that was signed.
	Digest [32]byte
	// Certificates are those the signature carries. They are claims.
	Certificates []*x509.Certificate
	// PKCS7 is the signature's DER.
	PKCS7 []byte

	data *pkcs7.SignedData
}

// Signatures lists the signatures without verifying them; use [File.Verify].
// Only SHA-256 with RSA is understood.
func (f *File) Signatures() ([]Signature, error) {
	off, size, err := f.certTable()
	if err != nil {
		return nil, err
	}
	table := make([]byte, size) // certTable held it to maxCertBytes
	if n, err := f.r.ReadAt(table, off); n < len(table) {
		return nil, fmt.Errorf("read certificate table: %w", err)
	}
	var list []Signature
	for len(table) > 0 {
		der, rest, err := cutWinCertificate(table)
		if err != nil {
			return nil, fmt.Errorf("signature %d: %w", len(list)+1, err)
		}
		sig, err := parseSignature(der)
		if err != nil {
			return nil, fmt.Errorf("signature %d: %w", len(list)+1, err)
		}
		list, table = append(list, sig), rest
	}
	return list, nil
}

// Verify returns nil when one of the signatures covers this file's contents
// and was made with the key of cert. It checks neither the dates of cert, which
// the firmware ignores too, nor who issued it. The error is [ErrNotSigned] when
// there is no signature.
func (f *File) Verify(cert *x509.Certificate) error {
	digest, err := f.Authenticode()
	if err != nil {
		return err
	}
	sigs, err := f.Signatures()
	if err != nil {
		return err
	}
	if len(sigs) == 0 {
		return ErrNotSigned
	}
	var others []error
	for _, s := range sigs {
		err := s.verify(digest, cert)
		if err == nil {
			return nil
		}
		others = append(others, err)
	}
	return fmt.Errorf("no signature of %q is valid for this file: %w", cert.Subject.CommonName, errors.Join(others...))
}

func (s *Signature) verify(digest [32]byte, cert *x509.Certificate) error {
	if s.Digest != digest {
		return fmt.Errorf("it covers a file with digest %x, this one has %x: damaged on the way, or altered", s.Digest, digest)
	}
	return s.data.Verify(cert, s.data.Content.Bytes)
}

// cutWinCertificate takes the first WIN_CERTIFICATE off the table, PE Format §4.7.
func cutWinCertificate(table []byte) (der, rest []byte, err error) {
	if len(table) < winCertHeaderSize {
		return nil, nil, fmt.Errorf("%d bytes are too few for its header", len(table))
	}
	size := int64(le.Uint32(table))
	revision, kind := le.Uint16(table[4:]), le.Uint16(table[6:])
	next := align(size, certAlign)
	switch {
	case size <= winCertHeaderSize || next > int64(len(table)):
		return nil, nil, fmt.Errorf("length %d does not fit in the %d bytes left of the table", size, len(table))
	case revision != certRevision || kind != certTypePKCS7:
		return nil, nil, fmt.Errorf("revision %#x and type %#x, expected %#x and %#x (PKCS #7)", revision, kind, certRevision, certTypePKCS7)
	}
	return table[winCertHeaderSize:size], table[next:], nil
}

type indirectDataContent struct {
	Data   asn1.RawValue
	Digest struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
}

func parseSignature(der []byte) (s Signature, err error) {
	sd, err := pkcs7.Parse(der)
	if err != nil {
		return s, err
	}
	// Some signers count the padding in the length.
	rest := der[len(sd.Raw):]
	if len(rest) >= certAlign || len(bytes.Trim(rest, "\x00")) > 0 {
		return s, fmt.Errorf("PKCS #7: %d bytes follow it", len(rest))
	}
	if !sd.ContentType.Equal(oidIndirectData()) {
		return s, fmt.Errorf("PKCS #7: content of type %v, expected Authenticode", sd.ContentType)
	}
	s.PKCS7, s.Certificates, s.data = sd.Raw, sd.Certificates, sd
	s.Digest, err = parseIndirectData(sd.Content.FullBytes)
	return s, err
}

func parseIndirectData(der []byte) (digest [32]byte, err error) {
	var c indirectDataContent
	if err := unmarshalAll(der, &c); err != nil {
		return digest, fmt.Errorf("authenticode content: %w", err)
	}
	if !pkcs7.IsSHA256(c.Digest.Algorithm) || len(c.Digest.Digest) != len(digest) {
		return digest, fmt.Errorf("authenticode content: a digest of %d bytes by %v is not SHA-256", len(c.Digest.Digest), c.Digest.Algorithm.Algorithm)
	}
	return [32]byte(c.Digest.Digest), nil
}

func unmarshalAll(der []byte, v any) error {
	rest, err := asn1.Unmarshal(der, v)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes follow it", len(rest))
	}
	return err
}
