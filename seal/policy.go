package seal

import (
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Names of policies that [Policy.Degraded] and status displays know.
const (
	PolicyStandard      = "standard"
	PolicyStrict        = "strict"
	PolicyRollbackProof = "rollback-proof"
	PolicyDiskTheftOnly = "disk-theft-only"
)

// Policy says which boots get the secret. What is not listed here is not
// bound: there are no implicit registers (F5).
type Policy struct {
	// Name is for people and the record; it does not go into the digest.
	Name string
	// SignedPCRs may have any value for which PolicyKeyPEM's owner signed a
	// policy ([SignPCRPolicy]). Normally just 11, or none.
	SignedPCRs []int
	// PolicyKeyPEM is the RSA-2048 public key (SubjectPublicKeyInfo). Needed
	// with SignedPCRs, refused without.
	PolicyKeyPEM []byte
	// Ref is what the vendor's signature must be for besides the values: the
	// policyRef of TPM2_PolicyAuthorize. Empty for plain signatures; otherwise
	// [EpochRef].
	Ref string
	// Counter, when set, bounds one of the TPM's counters.
	Counter *Counter
	// PCRs must have exactly these values.
	PCRs map[int]pcr.Digest
	// PIN asks for a PIN too. Only then do failures count for lockout.
	PIN bool
}

// Standard is the default policy: PCR 11 as the vendor signed it and these
// literal values, which are those of [Literal].
func Standard(policyKeyPEM []byte, literal map[int]pcr.Digest) Policy {
	return Policy{Name: PolicyStandard, SignedPCRs: []int{11}, PolicyKeyPEM: policyKeyPEM, PCRs: literal}
}

// Strict binds one image on one machine in one state: these literal values,
// which are those of [Literal], and nobody's signature. Every update of image
// or firmware needs a seal of its own, made before the restart.
func Strict(literal map[int]pcr.Digest) Policy {
	return Policy{Name: PolicyStrict, PCRs: literal}
}

// RollbackProof is [Standard] against old images and old headers too: the
// vendor's signature must be for this security epoch ([EpochRef]), and the
// TPM's counter must not have passed counter.Max.
func RollbackProof(policyKeyPEM []byte, epoch uint64, counter Counter, literal map[int]pcr.Digest) Policy {
	p := Standard(policyKeyPEM, literal)
	p.Name, p.Ref, p.Counter = PolicyRollbackProof, EpochRef(epoch), &counter
	return p
}

// DiskTheftOnly binds PCR 11 as the vendor signed it and nothing else: a disk
// without its machine is closed, and everything else is left to the firmware's
// settings. It is degraded ([Policy.Degraded]).
func DiskTheftOnly(policyKeyPEM []byte) Policy {
	return Policy{Name: PolicyDiskTheftOnly, SignedPCRs: []int{11}, PolicyKeyPEM: policyKeyPEM}
}

// Literal lists the registers whose present values a policy of that name
// binds. Without Secure Boot nothing but the boot loader's own measurement
// (PCR 4) and that of the command line and its additions (PCR 12) stands
// between a signed image's public hashes and an imitation.
func Literal(name string, secureBoot bool) ([]int, error) {
	var bound []int
	switch name {
	case PolicyStandard, PolicyRollbackProof:
		if bound = []int{7}; !secureBoot {
			bound = []int{4, 7, 12}
		}
	case PolicyStrict:
		if bound = []int{0, 2, 4, 7, 11}; !secureBoot {
			bound = append(bound, 12)
		}
	case PolicyDiskTheftOnly:
	default:
		return nil, fmt.Errorf("policy %q is not known; there are %s, %s, %s and %s", name, PolicyStandard, PolicyStrict, PolicyRollbackProof, PolicyDiskTheftOnly)
	}
	return bound, nil
}

// EpochRef is the reference under which the vendor signs for a security epoch.
// A release of epoch N is signed for each of 1 to N, so it serves devices that
// have not come that far, and an older release cannot serve one that has.
func EpochRef(epoch uint64) string { return fmt.Sprintf("holdfast-epoch-%d", epoch) }

// maxRefBytes is well below what a TPM takes as policyRef (a nonce's 32 bytes
// on the smallest, Part 2 §10.4.4).
const maxRefBytes = 32

func checkRef(ref string) error {
	if len(ref) > maxRefBytes {
		return fmt.Errorf("reference %q: %d bytes, a TPM takes %d", ref, len(ref), maxRefBytes)
	}
	for _, c := range []byte(ref) {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("reference %q: printable ASCII without spaces expected", ref)
		}
	}
	return nil
}

// Bound lists every register the policy depends on, ascending.
func (p Policy) Bound() []int {
	bound := slices.AppendSeq(slices.Clone(p.SignedPCRs), maps.Keys(p.PCRs))
	slices.Sort(bound)
	return slices.Compact(bound)
}

// Validate refuses a policy that binds nothing or that could not be written as
// a token.
func (p Policy) Validate() error {
	if len(p.SignedPCRs) == 0 && len(p.PCRs) == 0 {
		return fmt.Errorf("policy %q binds no PCR", p.Name)
	}
	if _, err := pcr.Sorted(p.SignedPCRs); err != nil {
		return fmt.Errorf("policy %q: signed %w", p.Name, err)
	}
	if _, err := pcr.Sorted(slices.Collect(maps.Keys(p.PCRs))); err != nil {
		return fmt.Errorf("policy %q: literal %w", p.Name, err)
	}
	if len(p.SignedPCRs) == 0 && len(p.PolicyKeyPEM) > 0 {
		return fmt.Errorf("policy %q has a policy key and no signed PCR", p.Name)
	}
	if len(p.SignedPCRs) > 0 {
		if _, err := parsePolicyKey(p.PolicyKeyPEM); err != nil {
			return fmt.Errorf("policy %q: %w", p.Name, err)
		}
	}
	if len(p.SignedPCRs) == 0 && p.Ref != "" {
		return fmt.Errorf("policy %q has a reference %q and no signed PCR", p.Name, p.Ref)
	}
	if err := checkRef(p.Ref); err != nil {
		return fmt.Errorf("policy %q: %w", p.Name, err)
	}
	if p.Counter != nil {
		if err := p.Counter.validate(); err != nil {
			return fmt.Errorf("policy %q: %w", p.Name, err)
		}
	}
	if p.Name == PolicyRollbackProof && (p.Ref == "" || p.Counter == nil) {
		return fmt.Errorf("policy %q needs the reference of a security epoch and a counter", p.Name)
	}
	return nil
}

// Degraded says why the policy stops less than one would think, or "".
func (p Policy) Degraded() string {
	for _, i := range []int{0, 2, 4, 7} {
		if _, ok := p.PCRs[i]; ok {
			return ""
		}
	}
	return "no register of the firmware or of Secure Boot is bound, so another system started on this machine can imitate the approved boot; only a stolen disk is protected"
}

// Describe lists, for people, everything that is bound (F5, F55).
func (p Policy) Describe() []string {
	lines := []string{fmt.Sprintf("policy %q", p.Name)}
	if len(p.SignedPCRs) > 0 {
		key := "no key"
		if k, err := parsePolicyKey(p.PolicyKeyPEM); err == nil {
			key = fmt.Sprintf("key %x", k.fingerprint[:8])
		}
		for _, i := range slices.Sorted(slices.Values(p.SignedPCRs)) {
			line := fmt.Sprintf("PCR %s: any value signed by the vendor (%s)", pcr.Label(i), key)
			if p.Ref != "" {
				line += fmt.Sprintf(" for %q", p.Ref)
			}
			lines = append(lines, line)
		}
	}
	if p.Counter != nil {
		lines = append(lines, fmt.Sprintf("the TPM's counter 0x%08x: at most %d", p.Counter.Index, p.Counter.Max))
	}
	for _, i := range slices.Sorted(maps.Keys(p.PCRs)) {
		v := p.PCRs[i]
		lines = append(lines, fmt.Sprintf("PCR %s: exactly %x", pcr.Label(i), v))
	}
	if p.PIN {
		lines = append(lines, "a PIN")
	}
	if d := p.Degraded(); d != "" {
		lines = append(lines, "degraded: "+d)
	}
	return lines
}

// Digest is what TPM2_PolicyGetDigest gives for a session that satisfies the
// policy: [PolicyAuthorize] -> [PolicyNV] -> [PolicyPCR] -> [PolicyAuthValue],
// each only if asked for. systemd uses the same order, without PolicyNV.
func (p Policy) Digest() (pcr.Digest, error) {
	if err := p.Validate(); err != nil {
		return pcr.Digest{}, err
	}
	var digest pcr.Digest
	if len(p.SignedPCRs) > 0 {
		key, err := parsePolicyKey(p.PolicyKeyPEM)
		if err != nil {
			return pcr.Digest{}, err
		}
		digest = authorizeDigest(key.name, p.Ref)
	}
	if p.Counter != nil {
		var err error
		if digest, err = p.Counter.appendPolicy(digest); err != nil {
			return pcr.Digest{}, fmt.Errorf("policy %q: %w", p.Name, err)
		}
	}
	if len(p.PCRs) > 0 {
		var err error
		digest, err = pcr.AppendPolicy(digest, slices.Collect(maps.Keys(p.PCRs)), p.PCRs)
		if err != nil {
			return pcr.Digest{}, fmt.Errorf("policy %q: %w", p.Name, err)
		}
	}
	if p.PIN {
		digest = sha256.Sum256(binary.BigEndian.AppendUint32(digest[:], uint32(tpm2.TPMCCPolicyAuthValue)))
	}
	return digest, nil
}

// authorizeDigest is the policy digest after TPM2_PolicyAuthorize by the key of
// that name with that policyRef; what was there before is gone. Part 3 §23.16.
func authorizeDigest(name []byte, ref string) pcr.Digest {
	b := binary.BigEndian.AppendUint32(make([]byte, len(pcr.Digest{})), uint32(tpm2.TPMCCPolicyAuthorize))
	first := sha256.Sum256(append(b, name...))
	return sha256.Sum256(append(first[:], ref...))
}

// policyKey is the vendor's key as the TPM sees it.
type policyKey struct {
	rsa         *rsa.PublicKey
	public      tpm2.TPMTPublic
	name        []byte
	fingerprint [32]byte // SHA-256 of the PKCS#1 DER: "pkfp"
}

const (
	policyKeyBits   = 2048 // what every TPM 2.0 verifies
	maxPolicyKeyPEM = 4096
)

func parsePolicyKey(pemBytes []byte) (policyKey, error) {
	if len(pemBytes) > maxPolicyKeyPEM {
		return policyKey{}, fmt.Errorf("policy key: %d bytes of PEM, at most %d expected", len(pemBytes), maxPolicyKeyPEM)
	}
	block, _ := pem.Decode(pemBytes)
	if block == nil || block.Type != "PUBLIC KEY" {
		return policyKey{}, errors.New("policy key: no PEM block PUBLIC KEY")
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return policyKey{}, fmt.Errorf("policy key: %w", err)
	}
	pub, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return policyKey{}, fmt.Errorf("policy key: is a %T; TPMs and systemd want RSA-%d", parsed, policyKeyBits)
	}
	return newPolicyKey(pub)
}

// newPolicyKey gives the key the attributes systemd does, which its name and
// so the policy digest depend on: decrypt, sign, userWithAuth, no scheme, the
// exponent spelled out.
func newPolicyKey(pub *rsa.PublicKey) (policyKey, error) {
	if pub.N.BitLen() != policyKeyBits {
		return policyKey{}, fmt.Errorf("policy key: RSA of %d bits; every TPM verifies %d and some nothing else", pub.N.BitLen(), policyKeyBits)
	}
	public := tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgRSA,
		NameAlg:          tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{Decrypt: true, SignEncrypt: true, UserWithAuth: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			KeyBits: policyKeyBits, Exponent: uint32(pub.E),
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: pub.N.FillBytes(make([]byte, policyKeyBits/8))}),
	}
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return policyKey{}, fmt.Errorf("policy key: %w", err)
	}
	return policyKey{pub, public, name.Buffer, sha256.Sum256(x509.MarshalPKCS1PublicKey(pub))}, nil
}
