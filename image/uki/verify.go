package uki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
)

// Signature is one entry of the certificate table.
type Signature struct {
	// Digest is the Authenticode digest that was signed.
	Digest [32]byte
	// Certificates are those the signature carries. They are claims.
	Certificates []*x509.Certificate
	// PKCS7 is the signature's DER.
	PKCS7 []byte

	signed    []byte // what the RSA signature covers
	signature []byte
	issuer    []byte
	serial    *big.Int
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
	if !bytes.Equal(s.issuer, cert.RawIssuer) || s.serial.Cmp(cert.SerialNumber) != 0 {
		return errors.New("it was made with another certificate's key: a file for other keys, or a forgery")
	}
	if s.Digest != digest {
		return fmt.Errorf("it covers a file with digest %x, this one has %x: damaged on the way, or altered", s.Digest, digest)
	}
	if err := cert.CheckSignature(x509.SHA256WithRSA, s.signed, s.signature); err != nil {
		return fmt.Errorf("%w: the signature is damaged, or forged", err)
	}
	return nil
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

// RFC 2315 §9: the parts of SignedData that Authenticode uses.
type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue `asn1:"explicit,optional,tag:0"`
}

type signedData struct {
	Version          int
	DigestAlgorithms []pkix.AlgorithmIdentifier `asn1:"set"`
	Content          contentInfo
	Certificates     asn1.RawValue `asn1:"optional,tag:0"`
	CRLs             asn1.RawValue `asn1:"optional,tag:1"`
	SignerInfos      []signerInfo  `asn1:"set"`
}

type signerInfo struct {
	Version                   int
	Issuer                    issuerAndSerial
	DigestAlgorithm           pkix.AlgorithmIdentifier
	AuthenticatedAttributes   asn1.RawValue `asn1:"optional,tag:0"`
	DigestEncryptionAlgorithm pkix.AlgorithmIdentifier
	EncryptedDigest           []byte
	UnauthenticatedAttributes asn1.RawValue `asn1:"optional,tag:1"`
}

type issuerAndSerial struct {
	Name   asn1.RawValue
	Serial *big.Int
}

type attribute struct {
	Type   asn1.ObjectIdentifier
	Values asn1.RawValue `asn1:"set"`
}

type indirectDataContent struct {
	Data   asn1.RawValue
	Digest struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
}

func parseSignature(der []byte) (s Signature, err error) {
	var outer contentInfo
	rest, err := asn1.Unmarshal(der, &outer)
	if err != nil {
		return s, fmt.Errorf("PKCS #7: %w", err)
	}
	// Some signers count the padding in the length.
	if len(rest) >= certAlign || len(bytes.Trim(rest, "\x00")) > 0 {
		return s, fmt.Errorf("PKCS #7: %d bytes follow it", len(rest))
	}
	oidSignedData := asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	if !outer.Type.Equal(oidSignedData) {
		return s, fmt.Errorf("PKCS #7: type %v is not SignedData", outer.Type)
	}
	var sd signedData
	if err := unmarshalAll(outer.Content.Bytes, &sd); err != nil {
		return s, fmt.Errorf("PKCS #7 SignedData: %w", err)
	}
	if !sd.Content.Type.Equal(oidIndirectData()) || len(sd.SignerInfos) != 1 {
		return s, fmt.Errorf("PKCS #7: content of type %v with %d signers, expected Authenticode with one", sd.Content.Type, len(sd.SignerInfos))
	}
	s.PKCS7 = der[:len(der)-len(rest)]
	if s.Digest, err = parseIndirectData(sd.Content.Content.Bytes); err != nil {
		return s, err
	}
	// Certificates of other kinds (RFC 5652 §10.2.2) make this fail; a UKI has none.
	if s.Certificates, err = x509.ParseCertificates(sd.Certificates.Bytes); err != nil {
		return s, fmt.Errorf("PKCS #7 certificates: %w", err)
	}
	si := sd.SignerInfos[0]
	s.issuer, s.serial, s.signature = si.Issuer.Name.FullBytes, si.Issuer.Serial, si.EncryptedDigest
	if !isSHA256(si.DigestAlgorithm) {
		return s, fmt.Errorf("PKCS #7: digest algorithm %v is not SHA-256", si.DigestAlgorithm.Algorithm)
	}
	var content asn1.RawValue
	if err := unmarshalAll(sd.Content.Content.Bytes, &content); err != nil {
		return s, err
	}
	s.signed, err = si.covered(content.Bytes)
	return s, err
}

// covered returns the bytes the signature is over. Without authenticated
// attributes that is the content's value; with them it is the attributes, which
// must then hold the content's digest (RFC 2315 §9.3).
func (si *signerInfo) covered(content []byte) ([]byte, error) {
	raw := si.AuthenticatedAttributes
	if len(raw.FullBytes) == 0 {
		return content, nil
	}
	sum := sha256.Sum256(content)
	oidMessageDigest := asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	matches := 0
	for rest := raw.Bytes; len(rest) > 0; {
		var a attribute
		var err error
		if rest, err = asn1.Unmarshal(rest, &a); err != nil {
			return nil, fmt.Errorf("PKCS #7 attributes: %w", err)
		}
		if !a.Type.Equal(oidMessageDigest) {
			continue
		}
		var digest []byte
		if err := unmarshalAll(a.Values.Bytes, &digest); err != nil {
			return nil, fmt.Errorf("PKCS #7 message digest: %w", err)
		}
		if !bytes.Equal(digest, sum[:]) {
			return nil, errors.New("PKCS #7: the message digest does not belong to the content; the signature is damaged, or forged")
		}
		matches++
	}
	if matches != 1 {
		return nil, fmt.Errorf("PKCS #7: %d message digests, expected one", matches)
	}
	// Signed as a SET, stored with an implicit tag.
	signed := bytes.Clone(raw.FullBytes)
	signed[0] = 0x31
	return signed, nil
}

func parseIndirectData(der []byte) (digest [32]byte, err error) {
	var c indirectDataContent
	if err := unmarshalAll(der, &c); err != nil {
		return digest, fmt.Errorf("authenticode content: %w", err)
	}
	if !isSHA256(c.Digest.Algorithm) || len(c.Digest.Digest) != len(digest) {
		return digest, fmt.Errorf("authenticode content: a digest of %d bytes by %v is not SHA-256", len(c.Digest.Digest), c.Digest.Algorithm.Algorithm)
	}
	return [32]byte(c.Digest.Digest), nil
}

func isSHA256(a pkix.AlgorithmIdentifier) bool {
	return a.Algorithm.Equal(asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1})
}

func unmarshalAll(der []byte, v any) error {
	rest, err := asn1.Unmarshal(der, v)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes follow it", len(rest))
	}
	return err
}
