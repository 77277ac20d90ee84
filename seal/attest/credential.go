package attest

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// NewCredential makes the credential for the box that gave the answer: for its EK and
// its AK, as it claims them. It verifies no certificate: whether the EK is a TPM's is
// [Verify]'s question, and a credential for one that is not tells nobody anything.
func NewCredential(a *Answer) (Credential, error) {
	ak, err := parsePublic(a.AKPublic)
	if err != nil {
		return Credential{}, fmt.Errorf("make credential: attestation key: %w", err)
	}
	if err := checkAK(ak); err != nil {
		return Credential{}, fmt.Errorf("make credential: attestation key: %w", err)
	}
	if _, err := parseEK(a.EKPublic); err != nil {
		return Credential{}, fmt.Errorf("make credential: endorsement key: %w", err)
	}
	ek, err := tpm2.Unmarshal[tpm2.TPMTPublic](a.EKPublic)
	if err != nil {
		return Credential{}, fmt.Errorf("make credential: endorsement key: %w", err)
	}
	encapsulate, err := tpm2.ImportEncapsulationKey(ek)
	if err != nil {
		return Credential{}, fmt.Errorf("make credential: endorsement key: %w", err)
	}
	secret := make([]byte, nonceBytes)
	rand.Read(secret) // never fails: crypto/rand
	sum, proof := sha256.Sum256(a.EKPublic), sha256.Sum256(secret)
	c := Credential{EK: sum[:], AK: nameOf(a.AKPublic), Proof: proof[:]}
	if c.Blob, c.Seed, err = tpm2.CreateCredential(rand.Reader, encapsulate, c.AK, secret); err != nil {
		return Credential{}, fmt.Errorf("make credential: %w", err)
	}
	return c, nil
}

// opened says whether the answer shows the credential's secret.
func (c *Credential) opened(a *Answer) bool {
	if a.Statement == nil || len(a.Statement.Activation) == 0 {
		return false
	}
	sum, ek := sha256.Sum256(a.Statement.Activation), sha256.Sum256(a.EKPublic)
	return bytes.Equal(sum[:], c.Proof) && bytes.Equal(ek[:], c.EK) && bytes.Equal(nameOf(a.AKPublic), c.AK)
}
