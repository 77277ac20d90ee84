package corim

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/veraison/go-cose"
)

// Header of a signed CoRIM: draft-ietf-rats-corim-10 §4.2, and its corim-meta-map.
const (
	contentType    = "application/rim+cbor"
	headerMeta     = int64(8)
	metaSigner     = 0
	metaSignerName = 0
)

// Sign wraps what [Marshal] gave in a COSE_Sign1 (RFC 9052 §4.2, tag 18): signed with an
// Ed25519 key (EdDSA) or one of ECDSA P-256 (ES256), by a signer of that name. The key's
// identifier in it is the SHA-256 of its SubjectPublicKeyInfo. An Ed25519 key makes the
// same bytes each time.
func Sign(corim []byte, key crypto.Signer, name string) ([]byte, error) {
	if name == "" || len(corim) == 0 {
		return nil, errors.New("sign CoRIM: no name of the signer, or no CoRIM")
	}
	algorithm := cose.AlgorithmEdDSA
	switch public := key.Public().(type) {
	case ed25519.PublicKey:
	case *ecdsa.PublicKey:
		if algorithm = cose.AlgorithmES256; public.Curve != elliptic.P256() {
			return nil, fmt.Errorf("sign CoRIM: an ECDSA key on %s; P-256 is known", public.Curve.Params().Name)
		}
	default:
		return nil, fmt.Errorf("sign CoRIM: a %T; Ed25519 and ECDSA P-256 are known", public)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("sign CoRIM: %w", err)
	}
	signer, err := cose.NewSigner(algorithm, key)
	if err != nil {
		return nil, fmt.Errorf("sign CoRIM: %w", err)
	}
	id := sha256.Sum256(spki)
	headers := cose.Headers{Protected: cose.ProtectedHeader{
		cose.HeaderLabelAlgorithm: algorithm, cose.HeaderLabelContentType: contentType, cose.HeaderLabelKeyID: id[:],
		headerMeta: encode(nil, fields{metaSigner: fields{metaSignerName: name}}),
	}}
	signed, err := cose.Sign1(rand.Reader, signer, headers, corim, nil)
	if err != nil {
		return nil, fmt.Errorf("sign CoRIM: %w", err)
	}
	return signed, nil
}
