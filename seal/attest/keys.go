package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
)

// akTemplate is the attestation key: restricted, so that it signs nothing but what the
// TPM made itself, and made in the TPM. It is go-tpm-tools' template with noDA, so that
// a TPM in lockout still answers (F31). TPM 2.0 Part 2 §8.3.
func akTemplate(alg tpm2.TPMAlgID) tpm2.TPMTPublic {
	t := tpm2.TPMTPublic{
		Type:    alg,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
		},
	}
	if alg == tpm2.TPMAlgECC {
		t.Parameters = tpm2.NewTPMUPublicParms(alg, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
			CurveID: tpm2.TPMECCNistP256,
		})
		t.Unique = tpm2.NewTPMUPublicID(alg, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)}})
		return t
	}
	t.Parameters = tpm2.NewTPMUPublicParms(alg, &tpm2.TPMSRSAParms{
		Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})},
		KeyBits: 2048,
	})
	t.Unique = tpm2.NewTPMUPublicID(alg, &tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, 256)})
	return t
}

// public is the public area of an asymmetric key, TPMT_PUBLIC: Part 2 §12.2.4. It is
// read here, because go-tpm's reader by reflection takes ten times as long as verifying
// the key's signature.
type public struct {
	Type, NameAlg tpm2.TPMAlgID
	Attributes    uint32
	Policy        []byte
	// Symmetric, Scheme and KDF are an algorithm and, where that is not null, its
	// details: key bits and mode, or a hash.
	Symmetric, Scheme, KDF []uint16
	KeyBits                uint16 // RSA
	Exponent               uint32 // RSA
	Curve                  tpm2.TPMECCCurve
	Unique, UniqueY        []byte // modulus; or X and Y
}

// Attributes of an object: Part 2 §8.3.2.
const (
	attributeFixedTPM    = 1 << 1
	attributeFixedParent = 1 << 4
	attributeOrigin      = 1 << 5 // sensitiveDataOrigin
	attributePassword    = 1 << 6 // userWithAuth
	attributeRestricted  = 1 << 16
	attributeDecrypt     = 1 << 17
	attributeSign        = 1 << 18
)

// parsePublic reads a TPMT_PUBLIC of an RSA or ECC key, and nothing behind it.
func parsePublic(b []byte) (*public, error) {
	if len(b) > maxStructureBytes {
		return nil, fmt.Errorf("a public key of %d bytes", len(b))
	}
	r := &cutter{rest: b}
	algorithm := func(details int) []uint16 {
		list := []uint16{r.number16()}
		for range details {
			if tpm2.TPMAlgID(list[0]) != tpm2.TPMAlgNull {
				list = append(list, r.number16())
			}
		}
		return list
	}
	p := &public{Type: tpm2.TPMAlgID(r.number16()), NameAlg: tpm2.TPMAlgID(r.number16()), Attributes: r.number32(), Policy: r.sized()}
	p.Symmetric, p.Scheme = algorithm(2), algorithm(1)
	switch p.Type {
	case tpm2.TPMAlgRSA:
		p.KeyBits, p.Exponent, p.Unique = r.number16(), r.number32(), r.sized()
	case tpm2.TPMAlgECC:
		p.Curve, p.KDF = tpm2.TPMECCCurve(r.number16()), algorithm(1)
		p.Unique, p.UniqueY = r.sized(), r.sized()
	default:
		return nil, fmt.Errorf("a key of type 0x%04x, neither RSA nor ECC", uint16(p.Type))
	}
	if r.short || len(r.rest) != 0 {
		return nil, errors.New("not the public area of a TPM's key: it is longer or shorter")
	}
	return p, nil
}

// marshal is the inverse of parsePublic.
func (p *public) marshal() []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(p.Type))
	numbers := func(list ...uint16) {
		for _, n := range list {
			b = binary.BigEndian.AppendUint16(b, n)
		}
	}
	sized := func(x []byte) { numbers(uint16(len(x))); b = append(b, x...) }
	numbers(uint16(p.NameAlg))
	b = binary.BigEndian.AppendUint32(b, p.Attributes)
	sized(p.Policy)
	numbers(p.Symmetric...)
	numbers(p.Scheme...)
	if p.Type == tpm2.TPMAlgRSA {
		numbers(p.KeyBits)
		b = binary.BigEndian.AppendUint32(b, p.Exponent)
		sized(p.Unique)
		return b
	}
	numbers(uint16(p.Curve))
	numbers(p.KDF...)
	sized(p.Unique)
	sized(p.UniqueY)
	return b
}

// checkAK says why a key is not one that can attest. The name covers the attributes, so
// the TPM that opens a credential for the name has just this key.
func checkAK(p *public) error {
	const wants = attributeFixedTPM | attributeFixedParent | attributeOrigin
	switch {
	case p.NameAlg != tpm2.TPMAlgSHA256:
		return fmt.Errorf("its name is made with algorithm 0x%04x, not SHA-256", uint16(p.NameAlg))
	case p.Attributes&(attributeRestricted|attributeSign|attributeDecrypt) != attributeRestricted|attributeSign:
		return errors.New("it is not restricted to signing: it would sign a quote that somebody made up")
	case p.Type == tpm2.TPMAlgECC && p.Curve != tpm2.TPMECCNistP256 || p.Type == tpm2.TPMAlgRSA && p.KeyBits != 2048:
		return errors.New("it is neither on P-256 nor RSA 2048")
	case p.Attributes&wants != wants:
		return errors.New("it may leave the TPM or came from outside")
	}
	return nil
}

// key is the key of a public area, of a kind that this package knows.
func (p *public) key() (crypto.PublicKey, error) {
	if p.Type == tpm2.TPMAlgECC {
		curve := curveOf(p.Curve)
		if curve == nil {
			return nil, fmt.Errorf("a key on curve 0x%04x, not P-256 or P-384", uint16(p.Curve))
		}
		size := curve.Params().BitSize / 8
		if len(p.Unique) > size || len(p.UniqueY) > size {
			return nil, fmt.Errorf("a key on curve 0x%04x of %d and %d bytes", uint16(p.Curve), len(p.Unique), len(p.UniqueY))
		}
		uncompressed := append([]byte{4}, make([]byte, 2*size)...)
		copy(uncompressed[1+size-len(p.Unique):], p.Unique)
		copy(uncompressed[1+2*size-len(p.UniqueY):], p.UniqueY)
		return ecdsa.ParseUncompressedPublicKey(curve, uncompressed)
	}
	if n := p.Unique; p.KeyBits != 2048 && p.KeyBits != 3072 || len(n) != int(p.KeyBits)/8 || n[0]&0x80 == 0 || p.Exponent != 0 && p.Exponent != 65537 {
		return nil, fmt.Errorf("an RSA key of %d bits with exponent %d, not 2048 or 3072 and 65537", p.KeyBits, p.Exponent)
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(p.Unique), E: 65537}, nil
}

// trimDER cuts what some makers write behind a certificate to fill the index.
func trimDER(b []byte) []byte {
	var whole asn1.RawValue
	rest, err := asn1.Unmarshal(b, &whole)
	if err != nil {
		return b
	}
	return b[:len(b)-len(rest)]
}

// certificateKey is the key in a certificate, if it can be parsed.
func certificateKey(der []byte) (crypto.PublicKey, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return c.PublicKey, nil
}
