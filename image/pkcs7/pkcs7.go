// Package pkcs7 makes and reads the signatures of UEFI Secure Boot: those in PE
// files (Authenticode) and those of firmware variables.
//
// [Sign] puts the content into the signature, [SignDetached] leaves it out;
// [Parse] reads both, and [SignedData.Verify] checks one with a certificate.
//
// The subset: SignedData of PKCS #7 1.5 (RFC 2315 §9) with one signer, SHA-256
// and RSA (PKCS #1 1.5). Written are no signed attributes, since a signing time
// would make two builds differ; read are signatures with and without them.
//
// What this does not protect: Verify says that a key made a signature, not that
// anybody should trust that key. Dates in certificates are not looked at, as
// firmware does not either (F90).
package pkcs7

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"golang.org/x/crypto/cryptobyte"
	tag "golang.org/x/crypto/cryptobyte/asn1"
)

// Object identifiers as functions: an asn1.ObjectIdentifier is a slice, which
// a package variable would let anybody change. RFC 2315 §14, RFC 8017 §A.1,
// RFC 5754 §2.2.

// OIDData is the content type of a detached signature.
func OIDData() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1} }

func oidSignedData() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2} }
func oidRSA() asn1.ObjectIdentifier        { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1} }
func oidMessageDigest() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
}
func oidSHA256() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
}

// IsSHA256 says whether an algorithm is SHA-256.
func IsSHA256(a pkix.AlgorithmIdentifier) bool { return a.Algorithm.Equal(oidSHA256()) }

// SignedData is a signature that was read.
type SignedData struct {
	ContentType asn1.ObjectIdentifier
	// Content is the value inside, with its tag; nil in a detached signature.
	Content asn1.RawValue
	// Certificates are those the signature carries. They are claims.
	Certificates []*x509.Certificate
	// Raw is what was parsed, without anything that followed it.
	Raw []byte

	attributes asn1.RawValue
	signature  []byte
	issuer     []byte
	serial     *big.Int
}

// RFC 2315 §7 and §9, to read.
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

// Parse reads a SignedData, in its ContentInfo (PE files) or bare (variables).
// Bytes behind it are left out of Raw; the caller judges them.
func Parse(der []byte) (*SignedData, error) {
	inner, size, err := unwrap(der)
	if err != nil {
		return nil, err
	}
	var sd signedData
	if err := unmarshalAll(inner, &sd); err != nil {
		return nil, fmt.Errorf("PKCS #7 SignedData: %w", err)
	}
	if len(sd.SignerInfos) != 1 {
		return nil, fmt.Errorf("PKCS #7: %d signers, expected one", len(sd.SignerInfos))
	}
	si := sd.SignerInfos[0]
	if !IsSHA256(si.DigestAlgorithm) {
		return nil, fmt.Errorf("PKCS #7: digest algorithm %v is not SHA-256", si.DigestAlgorithm.Algorithm)
	}
	s := &SignedData{
		ContentType: sd.Content.Type, Raw: der[:size],
		attributes: si.AuthenticatedAttributes, signature: si.EncryptedDigest,
		issuer: si.Issuer.Name.FullBytes, serial: si.Issuer.Serial,
	}
	if len(sd.Content.Content.Bytes) > 0 {
		if err := unmarshalAll(sd.Content.Content.Bytes, &s.Content); err != nil {
			return nil, fmt.Errorf("PKCS #7 content: %w", err)
		}
	}
	// Certificates of other kinds (RFC 5652 §10.2.2) make this fail; what signs
	// for UEFI has none.
	if s.Certificates, err = x509.ParseCertificates(sd.Certificates.Bytes); err != nil {
		return nil, fmt.Errorf("PKCS #7 certificates: %w", err)
	}
	return s, nil
}

// unwrap returns the SignedData and the length of everything up to its end.
func unwrap(der []byte) (inner []byte, size int, err error) {
	var first asn1.RawValue
	rest, err := asn1.Unmarshal(der, &first)
	if err != nil {
		return nil, 0, fmt.Errorf("PKCS #7: %w", err)
	}
	size = len(der) - len(rest)
	// A ContentInfo begins with its type, a SignedData with its version.
	if len(first.Bytes) == 0 || first.Bytes[0] != asn1.TagOID {
		return first.FullBytes, size, nil
	}
	var outer contentInfo
	if err := unmarshalAll(first.FullBytes, &outer); err != nil {
		return nil, 0, fmt.Errorf("PKCS #7: %w", err)
	}
	if !outer.Type.Equal(oidSignedData()) {
		return nil, 0, fmt.Errorf("PKCS #7: type %v is not SignedData", outer.Type)
	}
	return outer.Content.Bytes, size, nil
}

// Verify returns nil when the signature covers content, the value without its
// tag or the data that a detached signature is for, and was made with the key
// of cert.
func (s *SignedData) Verify(cert *x509.Certificate, content []byte) error {
	if !bytes.Equal(s.issuer, cert.RawIssuer) || s.serial.Cmp(cert.SerialNumber) != 0 {
		return errors.New("it was made with another certificate's key: it is for other keys, or a forgery")
	}
	covered, err := s.covered(content)
	if err != nil {
		return err
	}
	if err := cert.CheckSignature(x509.SHA256WithRSA, covered, s.signature); err != nil {
		return fmt.Errorf("%w: the signature is damaged, or forged", err)
	}
	return nil
}

// covered returns the bytes the RSA signature is over. Without authenticated
// attributes that is the content; with them it is the attributes, which must
// then hold the content's digest (RFC 2315 §9.3).
func (s *SignedData) covered(content []byte) ([]byte, error) {
	raw := s.attributes
	if len(raw.FullBytes) == 0 {
		return content, nil
	}
	sum := sha256.Sum256(content)
	matches := 0
	for rest := raw.Bytes; len(rest) > 0; {
		var a attribute
		var err error
		if rest, err = asn1.Unmarshal(rest, &a); err != nil {
			return nil, fmt.Errorf("PKCS #7 attributes: %w", err)
		}
		if !a.Type.Equal(oidMessageDigest()) {
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

func unmarshalAll(der []byte, v any) error {
	rest, err := asn1.Unmarshal(der, v)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes follow it", len(rest))
	}
	return err
}

// Sign makes a signature with the content inside: a SEQUENCE of that type whose
// value is content. The same key and content give the same bytes.
func Sign(key crypto.Signer, cert *x509.Certificate, contentType asn1.ObjectIdentifier, content []byte) ([]byte, error) {
	signature, err := rawSignature(key, content)
	if err != nil {
		return nil, err
	}
	var b cryptobyte.Builder
	b.AddASN1(tag.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidSignedData())
		b.AddASN1(tag.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			addSignedData(b, cert, signature, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(contentType)
				b.AddASN1(tag.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
					b.AddASN1(tag.SEQUENCE, func(b *cryptobyte.Builder) { b.AddBytes(content) })
				})
			})
		})
	})
	return b.Bytes()
}

// SignDetached makes a bare SignedData without the data it is for. Variables
// carry it like that: with the ContentInfo around it, older releases of EDK2
// refuse them.
func SignDetached(key crypto.Signer, cert *x509.Certificate, data []byte) ([]byte, error) {
	signature, err := rawSignature(key, data)
	if err != nil {
		return nil, err
	}
	var b cryptobyte.Builder
	addSignedData(&b, cert, signature, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(OIDData()) })
	return b.Bytes()
}

func rawSignature(key crypto.Signer, content []byte) ([]byte, error) {
	sum := sha256.Sum256(content)
	// PKCS #1 1.5 is deterministic; the randomness only blinds.
	return key.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// addSignedData writes RFC 2315 §9.1 with one signer and no attributes.
func addSignedData(b *cryptobyte.Builder, cert *x509.Certificate, signature []byte, content func(*cryptobyte.Builder)) {
	algorithm := func(b *cryptobyte.Builder, id asn1.ObjectIdentifier) {
		b.AddASN1(tag.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(id)
			b.AddASN1NULL()
		})
	}
	b.AddASN1(tag.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		b.AddASN1(tag.SET, func(b *cryptobyte.Builder) { algorithm(b, oidSHA256()) })
		b.AddASN1(tag.SEQUENCE, content)
		b.AddASN1(tag.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddBytes(cert.Raw) })
		b.AddASN1(tag.SET, func(b *cryptobyte.Builder) {
			b.AddASN1(tag.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1Int64(1)
				b.AddASN1(tag.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddBytes(cert.RawIssuer)
					b.AddASN1BigInt(cert.SerialNumber)
				})
				algorithm(b, oidSHA256())
				algorithm(b, oidRSA())
				b.AddASN1OctetString(signature)
			})
		})
	})
}
