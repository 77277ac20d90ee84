package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
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

// checkAK says why a key is not one that can attest. The name covers the attributes, so
// the TPM that opens a credential for the name has just this key.
func checkAK(p *tpm2.TPMTPublic) error {
	a := p.ObjectAttributes
	switch {
	case p.NameAlg != tpm2.TPMAlgSHA256:
		return fmt.Errorf("its name is made with algorithm 0x%04x, not SHA-256", uint16(p.NameAlg))
	case !a.Restricted || !a.SignEncrypt || a.Decrypt:
		return errors.New("it is not restricted to signing: it would sign a quote that somebody made up")
	case !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin:
		return errors.New("it may leave the TPM or came from outside")
	}
	return nil
}

// publicKey is the key of a public area, of a kind that this package verifies.
func publicKey(p *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	switch p.Type {
	case tpm2.TPMAlgECC:
		parms, err := p.Parameters.ECCDetail()
		if err != nil {
			return nil, err
		}
		point, err := p.Unique.ECC()
		if err != nil {
			return nil, err
		}
		if parms.CurveID != tpm2.TPMECCNistP256 {
			return nil, fmt.Errorf("a key on curve 0x%04x, not P-256", uint16(parms.CurveID))
		}
		if len(point.X.Buffer) > 32 || len(point.Y.Buffer) > 32 {
			return nil, errors.New("a point of more than 256 bits")
		}
		uncompressed := append([]byte{4}, make([]byte, 64)...)
		new(big.Int).SetBytes(point.X.Buffer).FillBytes(uncompressed[1:33])
		new(big.Int).SetBytes(point.Y.Buffer).FillBytes(uncompressed[33:])
		return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), uncompressed)
	case tpm2.TPMAlgRSA:
		parms, err := p.Parameters.RSADetail()
		if err != nil {
			return nil, err
		}
		n, err := p.Unique.RSA()
		if err != nil {
			return nil, err
		}
		if parms.KeyBits != 2048 || len(n.Buffer) != 256 || n.Buffer[0]&0x80 == 0 || parms.Exponent != 0 && parms.Exponent != 65537 {
			return nil, fmt.Errorf("an RSA key of %d bits with exponent %d, not 2048 and 65537", parms.KeyBits, parms.Exponent)
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(n.Buffer), E: 65537}, nil
	}
	return nil, fmt.Errorf("a key of type 0x%04x", uint16(p.Type))
}

// ekTemplates are the TCG's for endorsement keys, L-2 (ECC P-256) and L-1 (RSA 2048).
// TCG EK Credential Profile 2.5 §B.3.
func ekTemplates() []tpm2.TPMTPublic {
	return []tpm2.TPMTPublic{tpm2.ECCEKTemplate, tpm2.RSAEKTemplate}
}

// ekOf is the public area that a template gives for the key in a certificate.
func ekOf(key crypto.PublicKey) ([]byte, error) {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() {
			return nil, errors.New("an endorsement key on another curve than P-256")
		}
		point, err := key.Bytes()
		if err != nil {
			return nil, err
		}
		t := tpm2.ECCEKTemplate
		t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
		return tpm2.Marshal(t), nil
	case *rsa.PublicKey:
		if key.N.BitLen() != 2048 || key.E != 65537 {
			return nil, fmt.Errorf("an endorsement key of RSA %d with exponent %d", key.N.BitLen(), key.E)
		}
		t := tpm2.RSAEKTemplate
		t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()})
		return tpm2.Marshal(t), nil
	}
	return nil, fmt.Errorf("an endorsement key of type %T", key)
}

// parseEK wants a public area that one of the templates gives, and its key.
func parseEK(public []byte) (*tpm2.TPMTPublic, crypto.PublicKey, error) {
	p, err := parsePublic(public)
	if err != nil {
		return nil, nil, err
	}
	key, err := publicKey(p)
	if err != nil {
		return nil, nil, err
	}
	want, err := ekOf(key)
	if err == nil && !bytes.Equal(want, public) {
		err = errors.New("it is not of a template of the TCG for endorsement keys")
	}
	return p, key, err
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
