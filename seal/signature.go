package seal

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Limits on a signature file.
const (
	maxSignatureBytes = 1 << 20
	maxSignatures     = 1024
)

// Signature is the vendor's word that registers may have certain values.
type Signature struct {
	PCRs           []int
	KeyFingerprint [32]byte   // SHA-256 of the key in PKCS#1 DER
	Policy         pcr.Digest // of a policy that holds only PolicyPCR
	Sig            []byte     // RSASSA-PKCS1-v1_5 with SHA-256, over Policy
}

// Signatures is the content of a .pcrsig section, which the stub leaves in the
// initrd as /.extra/tpm2-pcr-signature.json. Only the SHA-256 bank's entries
// are kept.
type Signatures []Signature

// SignPCRPolicy signs the policy "PCR 11 is pcr11". Sign the value at the phase
// in which the disk is opened (enter-initrd) and no later one, else a running
// system could fetch the key again (F47). Deterministic: same key and value,
// same signature. The signer is an RSA-2048 key, in a file, token or KMS.
func SignPCRPolicy(signer crypto.Signer, pcr11 pcr.Digest) (Signature, error) {
	pub, ok := signer.Public().(*rsa.PublicKey)
	if !ok {
		return Signature{}, fmt.Errorf("sign PCR policy: the key is a %T; TPMs and systemd want RSA-%d", signer.Public(), policyKeyBits)
	}
	key, err := newPolicyKey(pub)
	if err != nil {
		return Signature{}, fmt.Errorf("sign PCR policy: %w", err)
	}
	policy, err := pcr.Policy([]int{11}, map[int]pcr.Digest{11: pcr11})
	if err != nil {
		return Signature{}, err
	}
	digest := sha256.Sum256(policy[:])
	sig, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return Signature{}, fmt.Errorf("sign PCR policy %x: %w", policy, err)
	}
	s := Signature{PCRs: []int{11}, KeyFingerprint: key.fingerprint, Policy: policy, Sig: sig}
	if err := s.verify(key); err != nil {
		return Signature{}, fmt.Errorf("sign PCR policy %x: the signer's answer: %w", policy, err)
	}
	return s, nil
}

func (s Signature) verify(key policyKey) error {
	digest := sha256.Sum256(s.Policy[:])
	return rsa.VerifyPKCS1v15(key.rsa, crypto.SHA256, digest[:], s.Sig)
}

// sigJSON is an entry as systemd-measure writes it.
type sigJSON struct {
	PCRs []int  `json:"pcrs"`
	PKFP string `json:"pkfp"`
	Pol  string `json:"pol"`
	Sig  string `json:"sig"`
}

// Marshal is the content of a .pcrsig section, byte for byte what systemd-measure
// prints with --json=short, without its final newline.
func (s Signatures) Marshal() ([]byte, error) {
	entries := []sigJSON{}
	for _, e := range s {
		entries = append(entries, sigJSON{
			PCRs: e.PCRs,
			PKFP: hex.EncodeToString(e.KeyFingerprint[:]),
			Pol:  hex.EncodeToString(e.Policy[:]),
			Sig:  base64.StdEncoding.EncodeToString(e.Sig),
		})
	}
	return json.Marshal(map[string][]sigJSON{"sha256": entries})
}

// ParseSignatures reads tpm2-pcr-signature.json. Other banks and unknown
// fields are passed over.
func ParseSignatures(b []byte) (Signatures, error) {
	if len(b) > maxSignatureBytes {
		return nil, fmt.Errorf("PCR signatures: %d bytes, at most %d expected", len(b), maxSignatureBytes)
	}
	var file struct {
		SHA256 []sigJSON `json:"sha256"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, fmt.Errorf("PCR signatures: %w", err)
	}
	if len(file.SHA256) > maxSignatures {
		return nil, fmt.Errorf("PCR signatures: %d entries, at most %d expected", len(file.SHA256), maxSignatures)
	}
	var signatures Signatures
	for i, e := range file.SHA256 {
		s := Signature{PCRs: e.PCRs}
		if _, err := pcr.Sorted(e.PCRs); err != nil || len(e.PCRs) == 0 {
			return nil, fmt.Errorf("PCR signature %d: bad pcrs %v", i, e.PCRs)
		}
		if err := decodeHex(s.KeyFingerprint[:], e.PKFP); err != nil {
			return nil, fmt.Errorf("PCR signature %d: pkfp: %w", i, err)
		}
		if err := decodeHex(s.Policy[:], e.Pol); err != nil {
			return nil, fmt.Errorf("PCR signature %d: pol: %w", i, err)
		}
		var err error
		if s.Sig, err = base64.StdEncoding.DecodeString(e.Sig); err != nil {
			return nil, fmt.Errorf("PCR signature %d: sig: %w", i, err)
		}
		signatures = append(signatures, s)
	}
	return signatures, nil
}

// decodeHex fills dst exactly.
func decodeHex(dst []byte, s string) error {
	if len(s) != 2*len(dst) {
		return fmt.Errorf("%d hex digits, want %d", len(s), 2*len(dst))
	}
	_, err := hex.Decode(dst, []byte(s))
	return err
}

// find returns the signature by key for the policy "these registers are as
// they are now". reason says, when there is none, which of the conditions
// every candidate failed.
func (s Signatures) find(key policyKey, pcrs []int, now map[int]pcr.Digest) (found Signature, reason string, err error) {
	sorted, err := pcr.Sorted(pcrs)
	if err != nil {
		return Signature{}, "", err
	}
	policy, err := pcr.Policy(sorted, now)
	if err != nil {
		return Signature{}, "", err
	}
	reason = "the image carries no PCR signatures"
	for _, e := range s {
		have, _ := pcr.Sorted(e.PCRs)
		switch {
		case !slices.Equal(have, sorted):
			reason = fmt.Sprintf("the image's signatures are not for PCR %v", sorted)
			continue
		case e.KeyFingerprint != key.fingerprint:
			reason = fmt.Sprintf("the image's signatures are by another key than %x: it is another vendor's or the key was changed", key.fingerprint[:8])
			continue
		case e.Policy != policy:
			reason = fmt.Sprintf("no signature is for the present value of PCR %v: the image was changed, or this is a later boot phase", sorted)
			continue
		}
		if e.verify(key) == nil {
			return e, "", nil
		}
		reason = "the signature for the present boot is not valid: the image is damaged or was forged"
	}
	return Signature{}, reason, nil
}
