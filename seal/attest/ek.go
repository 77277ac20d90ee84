package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// ekTemplate is one of the TCG's for endorsement keys: EK Credential Profile 2.5 §B.3
// (low range) and §B.4 (high range).
type ekTemplate struct {
	name string // as the profile has it
	// certificate is the NV index of the key's certificate, persistent where the key is
	// kept where it is kept: PC Client Platform TPM Profile 1.05 §4.5.1, EK Credential
	// Profile 2.5 §2.2.1.4, TCG TPM v2.0 Provisioning Guidance 1.0 §7.8.
	certificate, persistent tpm2.TPMHandle
	area                    tpm2.TPMTPublic
}

// ekTemplates are in the order in which a TPM is asked for them: the low range first,
// which all the world uses, and ECC first, because the TPM makes such a key faster. Left
// out are P-521, SM2 and RSA 4096, which no TPM is known for.
func ekTemplates() []ekTemplate {
	return []ekTemplate{
		{"L-2", 0x01c0000a, 0x81010002, tpm2.ECCEKTemplate},
		{"L-1", 0x01c00002, 0x81010001, tpm2.RSAEKTemplate},
		{"H-2", 0x01c00014, 0x81010014, highRangeECC(tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256, 128)},
		{"H-3", 0x01c00016, 0x81010016, highRangeECC(tpm2.TPMECCNistP384, tpm2.TPMAlgSHA384, 256)},
		{"H-1", 0x01c00012, 0x81010012, highRangeRSA(2048, tpm2.TPMAlgSHA256, 128)},
		{"H-6", 0x01c0001c, 0x8101001c, highRangeRSA(3072, tpm2.TPMAlgSHA384, 256)},
	}
}

// highRange is what the templates of the high range have in common. Such a key can be
// used with its password, which is empty, too.
func highRange(t, hash tpm2.TPMAlgID) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: t, NameAlg: hash, AuthPolicy: tpm2.TPM2BDigest{Buffer: policyB(hash)},
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, AdminWithPolicy: true, Restricted: true, Decrypt: true,
		},
	}
}

func highRangeECC(curve tpm2.TPMECCCurve, hash tpm2.TPMAlgID, aesBits tpm2.TPMKeyBits) tpm2.TPMTPublic {
	area := highRange(tpm2.TPMAlgECC, hash)
	area.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Symmetric: aesCFB(aesBits), CurveID: curve})
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}) // empty, unlike the low range's
	return area
}

func highRangeRSA(bits tpm2.TPMKeyBits, hash tpm2.TPMAlgID, aesBits tpm2.TPMKeyBits) tpm2.TPMTPublic {
	area := highRange(tpm2.TPMAlgRSA, hash)
	area.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{Symmetric: aesCFB(aesBits), KeyBits: bits})
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	return area
}

func aesCFB(bits tpm2.TPMKeyBits) tpm2.TPMTSymDefObject {
	return tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgAES,
		KeyBits: tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, bits), Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB)}
}

// policyB is the policy of the high range: the endorsement hierarchy's authorization, or
// a policy in an NV index. EK Credential Profile 2.5 §B.6.
func policyB(hash tpm2.TPMAlgID) []byte {
	text := "ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0"
	if hash == tpm2.TPMAlgSHA384 {
		text = "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
	}
	b, err := hex.DecodeString(text)
	if err != nil {
		panic(err) // a constant
	}
	return b
}

// of is the public area that the template gives for a key; false for another kind of key.
func (t ekTemplate) of(key crypto.PublicKey) ([]byte, bool) {
	area := t.area
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		parameters, err := area.Parameters.ECCDetail()
		if err != nil || curveOf(parameters.CurveID) != key.Curve {
			return nil, false
		}
		point, err := key.Bytes()
		if err != nil {
			return nil, false
		}
		size := len(point) / 2
		area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1 : 1+size]}, Y: tpm2.TPM2BECCParameter{Buffer: point[1+size:]}})
	case *rsa.PublicKey:
		parameters, err := area.Parameters.RSADetail()
		if err != nil || int(parameters.KeyBits) != key.N.BitLen() || key.E != 65537 {
			return nil, false
		}
		area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()})
	default:
		return nil, false
	}
	return tpm2.Marshal(area), true
}

// curveOf is nil for a curve that no endorsement key is on.
func curveOf(c tpm2.TPMECCCurve) elliptic.Curve {
	switch c {
	case tpm2.TPMECCNistP256:
		return elliptic.P256()
	case tpm2.TPMECCNistP384:
		return elliptic.P384()
	}
	return nil
}

// eksOf are the public areas that an endorsement key with this key may have, of any
// template: a certificate does not tell which.
func eksOf(key crypto.PublicKey) (list [][]byte, err error) {
	for _, t := range ekTemplates() {
		if area, ok := t.of(key); ok {
			list = append(list, area)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("an endorsement key of a kind (%s) that no template here makes", kindOfKey(key))
	}
	return list, nil
}

func kindOfKey(key crypto.PublicKey) string {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return "ECC " + key.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d with exponent %d", key.N.BitLen(), key.E)
	}
	return fmt.Sprintf("%T", key)
}

// parseEK wants a public area that one of the templates gives, and gives its key.
func parseEK(b []byte) (crypto.PublicKey, error) {
	p, err := parsePublic(b)
	if err != nil {
		return nil, err
	}
	key, err := p.key()
	if err != nil {
		return nil, err
	}
	list, err := eksOf(key)
	if err != nil {
		return nil, err
	}
	for _, want := range list {
		if bytes.Equal(want, b) {
			return key, nil
		}
	}
	return nil, errors.New("it is not of a template of the TCG for endorsement keys")
}
