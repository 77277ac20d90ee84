package seal

import (
	"cmp"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
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
	// Ref is what the signature is for ([Policy.Ref]); empty for a plain one.
	Ref string
	Sig []byte // RSASSA-PKCS1-v1_5 with SHA-256, over Policy || Ref
}

// Signatures is the content of a .pcrsig section, which the stub leaves in the
// initrd as /.extra/tpm2-pcr-signature.json. Only the SHA-256 bank's entries
// are kept.
type Signatures []Signature

// ErrSignatureWanted is what a signer's error matches when the key is on another machine:
// the signature was asked for, and will be there another time.
var ErrSignatureWanted = errors.New("a signature is wanted")

// SignPCRPolicy signs the policy "PCR 11 is pcr11". Sign the value at the phase
// in which the disk is opened (enter-initrd) and no later one, else a running
// system could fetch the key again (F47). Deterministic: same key and value,
// same signature. The signer is an RSA-2048 key, in a file, token or KMS.
func SignPCRPolicy(signer crypto.Signer, pcr11 pcr.Digest) (Signature, error) {
	return SignPCRPolicyRef(signer, pcr11, "")
}

// SignPCRPolicyRef is [SignPCRPolicy] for a policy with that reference
// ([EpochRef]) and no other. Signing an older image's value for the present
// epoch is how a vendor allows one downgrade: the signature is public, may
// travel as a file, and authorises that image only.
func SignPCRPolicyRef(signer crypto.Signer, pcr11 pcr.Digest, ref string) (Signature, error) {
	if err := checkRef(ref); err != nil {
		return Signature{}, fmt.Errorf("sign PCR policy: %w", err)
	}
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
	s := Signature{PCRs: []int{11}, KeyFingerprint: key.fingerprint, Policy: policy, Ref: ref}
	digest := s.digest()
	s.Sig, err = signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return Signature{}, fmt.Errorf("sign PCR policy %x: %w", policy, err)
	}
	if err := s.verify(key); err != nil {
		return Signature{}, fmt.Errorf("sign PCR policy %x: the signer's answer: %w", policy, err)
	}
	return s, nil
}

// SignEpochs is the content of an image's .pcrsig section: the plain signature,
// and one for each security epoch from 1 to epoch (0: none). See [EpochRef]. It asks for
// all of them also where some are wanted ([ErrSignatureWanted]).
func SignEpochs(signer crypto.Signer, pcr11 pcr.Digest, epoch uint64) (Signatures, error) {
	if epoch >= maxSignatures {
		return nil, fmt.Errorf("sign PCR policy for %d epochs: at most %d", epoch, maxSignatures-1)
	}
	refs := []string{""}
	for n := uint64(1); n <= epoch; n++ {
		refs = append(refs, EpochRef(n))
	}
	return signRefs(signer, pcr11, refs)
}

func signRefs(signer crypto.Signer, pcr11 pcr.Digest, refs []string) (s Signatures, err error) {
	for _, ref := range refs {
		e, failed := SignPCRPolicyRef(signer, pcr11, ref)
		if failed != nil && !errors.Is(failed, ErrSignatureWanted) {
			return nil, failed
		}
		s, err = append(s, e), errors.Join(err, failed)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// SignDowngrade allows devices that have come to an epoch of above+1 to epoch an older
// release, of epoch above, by the value its PCR 11 has in the initrd: [SignPCRPolicyRef]
// for each. The result, marshalled, is a file of its own; it is public, and nobody has to
// be trusted who carries it.
func SignDowngrade(signer crypto.Signer, pcr11 pcr.Digest, above, epoch uint64) (Signatures, error) {
	if epoch <= above || epoch >= maxSignatures {
		return nil, fmt.Errorf("allow a downgrade from epoch %d: the release has epoch %d, and %d is the highest", epoch, above, maxSignatures-1)
	}
	var refs []string
	for n := above + 1; n <= epoch; n++ {
		refs = append(refs, EpochRef(n))
	}
	return signRefs(signer, pcr11, refs)
}

// Allow says whether one of the signatures is valid, by this key, for PCR 11 with this
// value and for ref.
func (s Signatures) Allow(policyKeyPEM []byte, pcr11 pcr.Digest, ref string) (bool, error) {
	key, err := parsePolicyKey(policyKeyPEM)
	if err != nil {
		return false, err
	}
	_, reason, err := s.find(key, []int{11}, ref, map[int]pcr.Digest{11: pcr11})
	return err == nil && reason == "", err
}

// By are those that are valid and by this key.
func (s Signatures) By(policyKeyPEM []byte) (Signatures, error) {
	key, err := parsePolicyKey(policyKeyPEM)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(s), func(e Signature) bool {
		return e.KeyFingerprint != key.fingerprint || e.verify(key) != nil
	}), nil
}

// digest is what is signed: aHash of Part 3 §23.16.
func (s Signature) digest() [sha256.Size]byte {
	return sha256.Sum256(append(s.Policy[:], s.Ref...))
}

func (s Signature) verify(key policyKey) error {
	digest := s.digest()
	return rsa.VerifyPKCS1v15(key.rsa, crypto.SHA256, digest[:], s.Sig)
}

// sigJSON is an entry as systemd-measure writes it.
type sigJSON struct {
	PCRs []int  `json:"pcrs"`
	PKFP string `json:"pkfp"`
	Pol  string `json:"pol"`
	Sig  string `json:"sig"`
	Ref  string `json:"ref,omitempty"` // ours
}

// Marshal is the content of a .pcrsig section. As long as there is no Ref, it is
// byte for byte what systemd-measure prints with --json=short, without its final
// newline. Signatures with a Ref come last: systemd does not know the field and
// takes the first entry whose "pol" is that of the boot.
func (s Signatures) Marshal() ([]byte, error) {
	entries := []sigJSON{}
	sorted := slices.SortedStableFunc(slices.Values(s), func(a, b Signature) int {
		return cmp.Compare(min(len(a.Ref), 1), min(len(b.Ref), 1))
	})
	for _, e := range sorted {
		entries = append(entries, sigJSON{
			PCRs: e.PCRs,
			PKFP: hex.EncodeToString(e.KeyFingerprint[:]),
			Pol:  hex.EncodeToString(e.Policy[:]),
			Sig:  base64.StdEncoding.EncodeToString(e.Sig),
			Ref:  e.Ref,
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
		s := Signature{PCRs: e.PCRs, Ref: e.Ref}
		if _, err := pcr.Sorted(e.PCRs); err != nil || len(e.PCRs) == 0 {
			return nil, fmt.Errorf("PCR signature %d: bad pcrs %v", i, e.PCRs)
		}
		if err := decodeHex(s.KeyFingerprint[:], e.PKFP); err != nil {
			return nil, fmt.Errorf("PCR signature %d: pkfp: %w", i, err)
		}
		if err := decodeHex(s.Policy[:], e.Pol); err != nil {
			return nil, fmt.Errorf("PCR signature %d: pol: %w", i, err)
		}
		if err := checkRef(e.Ref); err != nil {
			return nil, fmt.Errorf("PCR signature %d: %w", i, err)
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

func refReason(ref string) string {
	if ref == "" {
		return "the image carries no plain PCR signatures, only some for security epochs"
	}
	return fmt.Sprintf("the image carries no signature for %q: its security epoch is lower than the device's", ref)
}

// find returns the signature by key for the policy "these registers are as
// they are now" and for ref. reason says, when there is none, what the entry
// that came closest lacks.
func (s Signatures) find(key policyKey, pcrs []int, ref string, now map[int]pcr.Digest) (found Signature, reason string, err error) {
	sorted, err := pcr.Sorted(pcrs)
	if err != nil {
		return Signature{}, "", err
	}
	policy, err := pcr.Policy(sorted, now)
	if err != nil {
		return Signature{}, "", err
	}
	best, reason := 0, "the image carries no PCR signatures"
	fail := func(rank int, text string) {
		if rank >= best {
			best, reason = rank, text
		}
	}
	for _, e := range s {
		have, _ := pcr.Sorted(e.PCRs)
		switch {
		case !slices.Equal(have, sorted):
			fail(1, fmt.Sprintf("the image's signatures are not for PCR %v", sorted))
		case e.KeyFingerprint != key.fingerprint:
			fail(2, fmt.Sprintf("the image's signatures are by another key than %x: it is another vendor's or the key was changed", key.fingerprint[:8]))
		case e.Ref != ref:
			fail(3, refReason(ref))
		case e.Policy != policy:
			fail(4, fmt.Sprintf("no signature is for the present value of PCR %v: the image was changed, or this is a later boot phase", sorted))
		case e.verify(key) != nil:
			fail(5, "the signature for the present boot is not valid: the image is damaged or was forged")
		default:
			return e, "", nil
		}
	}
	return Signature{}, reason, nil
}
