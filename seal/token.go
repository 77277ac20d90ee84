package seal

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// TokenType is the LUKS2 token type of sealed keys: systemd's.
const TokenType = "systemd-tpm2"

const (
	maxTokenBytes = 64 << 10
	maxBlobBytes  = 4096 // TPM2B_PRIVATE and TPM2B_PUBLIC are a few hundred
)

// Token is a sealed secret and what is needed to ask for it.
type Token struct {
	// Keyslots are the LUKS2 keyslots that the secret opens, in decimal;
	// systemd wants exactly one.
	Keyslots []string
	// Private and Public are the object: TPM2B contents without their sizes.
	Private, Public []byte
	// PCRs must have their literal value, which only PolicyHash knows.
	PCRs []int
	// SignedPCRs and PolicyKeyPEM are those of [Policy].
	SignedPCRs   []int
	PolicyKeyPEM []byte
	PolicyHash   pcr.Digest
	PIN          bool
	Salt         []byte // of the PIN; nil in tokens of systemd 252
	// SRK is the storage key; nil in tokens of systemd 252, which make a
	// primary key anew each time.
	SRK *SRKRef
}

// SRKRef is "tpm2_srk": the storage key as tpm2-tss serialises a handle.
type SRKRef struct {
	// Handle is 0x81000001. A transient handle means that the key is made
	// anew from its template at each boot; systemd cannot open such a token.
	Handle uint32
	Name   []byte
	Public []byte // TPMT_PUBLIC
}

// persistent: TPM_HT_PERSISTENT, Part 2 §7.2.
func (r SRKRef) persistent() bool { return r.Handle>>24 == 0x81 }

// tokenJSON has the fields in the order systemd 257 writes them. The dash in
// the older names is systemd's own mistake and here to stay.
type tokenJSON struct {
	Type       string    `json:"type"`
	Keyslots   []string  `json:"keyslots"`
	Blob       oneString `json:"tpm2-blob"`
	PCRs       []int     `json:"tpm2-pcrs"`
	Bank       string    `json:"tpm2-pcr-bank,omitempty"`
	PrimaryAlg string    `json:"tpm2-primary-alg,omitempty"`
	PolicyHash oneString `json:"tpm2-policy-hash"`
	PIN        bool      `json:"tpm2-pin,omitempty"`
	PCRLock    bool      `json:"tpm2_pcrlock,omitempty"`
	SignedPCRs []int     `json:"tpm2_pubkey_pcrs,omitempty"`
	PolicyKey  []byte    `json:"tpm2_pubkey,omitempty"`
	Salt       []byte    `json:"tpm2_salt,omitempty"`
	SRK        []byte    `json:"tpm2_srk,omitempty"`

	// Newer fields whose meaning changes how the object is opened.
	PolicyKeyRef string          `json:"tpm2_pubkey_ref,omitempty"`
	Argon2id     json.RawMessage `json:"tpm2_argon2id_memcost,omitempty"`
}

// oneString is a string, which newer systemd may write as a list of one.
type oneString string

func (s *oneString) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '[' {
		var list []string
		if err := json.Unmarshal(b, &list); err != nil {
			return err
		}
		if len(list) != 1 {
			return fmt.Errorf("the object is split into %d shards, which is not supported", len(list))
		}
		*s = oneString(list[0])
		return nil
	}
	return json.Unmarshal(b, (*string)(s))
}

// Policy is what the token says of its policy. Values of literal registers are
// not in a token; they are zero here.
func (t Token) Policy(name string) Policy {
	p := Policy{Name: name, SignedPCRs: t.SignedPCRs, PolicyKeyPEM: t.PolicyKeyPEM, PIN: t.PIN, PCRs: map[int]pcr.Digest{}}
	for _, i := range t.PCRs {
		p.PCRs[i] = pcr.Digest{}
	}
	return p
}

// policyNow is the policy with the registers' present values filled in.
func (t Token) policyNow(now map[int]pcr.Digest) Policy {
	p := t.Policy("token")
	for i := range p.PCRs {
		p.PCRs[i] = now[i]
	}
	return p
}

// Marshal is the token as JSON for a LUKS2 header.
func (t Token) Marshal() ([]byte, error) {
	j := tokenJSON{
		Type: TokenType, Keyslots: append([]string{}, t.Keyslots...),
		Blob:       oneString(base64.StdEncoding.EncodeToString(append(sized(t.Private), sized(t.Public)...))),
		PCRs:       append([]int{}, t.PCRs...),
		Bank:       "sha256",
		PrimaryAlg: "ecc",
		PolicyHash: oneString(hex.EncodeToString(t.PolicyHash[:])),
		PIN:        t.PIN,
		SignedPCRs: t.SignedPCRs,
		PolicyKey:  t.PolicyKeyPEM,
		Salt:       t.Salt,
	}
	if t.SRK != nil {
		j.SRK = t.SRK.marshal()
	}
	return json.Marshal(j)
}

// ParseToken reads a "systemd-tpm2" token. Unknown fields are passed over;
// known ones that would need something this package does not do are errors, and
// so is an object that would open without its policy (F46).
func ParseToken(b []byte) (Token, error) {
	if len(b) > maxTokenBytes {
		return Token{}, fmt.Errorf("TPM token: %d bytes, at most %d expected", len(b), maxTokenBytes)
	}
	var j tokenJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return Token{}, fmt.Errorf("TPM token: %w", err)
	}
	if err := j.check(); err != nil {
		return Token{}, fmt.Errorf("TPM token: %w", err)
	}
	t := Token{
		Keyslots: j.Keyslots, PCRs: j.PCRs, PIN: j.PIN,
		SignedPCRs: j.SignedPCRs, PolicyKeyPEM: j.PolicyKey, Salt: j.Salt,
	}
	if err := decodeHex(t.PolicyHash[:], string(j.PolicyHash)); err != nil {
		return Token{}, fmt.Errorf("TPM token: tpm2-policy-hash: %w", err)
	}
	blob, err := base64.StdEncoding.DecodeString(string(j.Blob))
	if err != nil || len(blob) > maxBlobBytes {
		return Token{}, fmt.Errorf("TPM token: tpm2-blob of %d bytes: not base64 or too long", len(blob))
	}
	private, rest, ok1 := cutSized(blob)
	public, rest, ok2 := cutSized(rest)
	if !ok1 || !ok2 || len(rest) != 0 {
		return Token{}, errors.New("TPM token: tpm2-blob is not a TPM2B_PRIVATE and a TPM2B_PUBLIC")
	}
	t.Private, t.Public = private, public
	if err := t.checkObject(); err != nil {
		return Token{}, fmt.Errorf("TPM token: %w", err)
	}
	if len(j.SRK) > 0 {
		if t.SRK, err = parseSRKRef(j.SRK); err != nil {
			return Token{}, fmt.Errorf("TPM token: tpm2_srk: %w", err)
		}
	}
	return t, nil
}

func (j tokenJSON) check() error {
	switch {
	case j.Type != TokenType:
		return fmt.Errorf("type is %q, not %q", j.Type, TokenType)
	case j.Bank != "" && j.Bank != "sha256":
		return fmt.Errorf("PCR bank %q is not supported; only sha256 is", j.Bank)
	case j.PrimaryAlg != "" && j.PrimaryAlg != "ecc" && len(j.SRK) == 0:
		return fmt.Errorf("primary key algorithm %q is not supported", j.PrimaryAlg)
	case j.PCRLock:
		return errors.New("pcrlock policies (tpm2_pcrlock) are not supported")
	case j.PolicyKeyRef != "":
		return fmt.Errorf("policy reference %q (tpm2_pubkey_ref) is not supported", j.PolicyKeyRef)
	case j.PIN && len(j.Argon2id) > 0:
		return errors.New("PINs hashed with argon2id are not supported")
	case j.PCRs == nil:
		return errors.New("tpm2-pcrs is missing")
	case len(j.SignedPCRs) > 0 && len(j.PolicyKey) == 0:
		return errors.New("tpm2_pubkey_pcrs without tpm2_pubkey")
	case len(j.SignedPCRs) == 0 && len(j.PolicyKey) > 0:
		return errors.New("tpm2_pubkey without tpm2_pubkey_pcrs")
	}
	if _, err := pcr.Sorted(j.PCRs); err != nil {
		return fmt.Errorf("tpm2-pcrs: %w", err)
	}
	if _, err := pcr.Sorted(j.SignedPCRs); err != nil {
		return fmt.Errorf("tpm2_pubkey_pcrs: %w", err)
	}
	if len(j.SignedPCRs) > 0 {
		if _, err := parsePolicyKey(j.PolicyKey); err != nil {
			return err
		}
	}
	return nil
}

// checkObject looks at the public area before a TPM is asked to load it.
func (t Token) checkObject() error {
	public, err := unmarshalPublic(t.Public)
	if err != nil {
		return fmt.Errorf("public area of the sealed object: %w", err)
	}
	a := public.ObjectAttributes
	switch {
	case public.Type != tpm2.TPMAlgKeyedHash || public.NameAlg != tpm2.TPMAlgSHA256:
		return fmt.Errorf("the sealed object is of type 0x%x with name algorithm 0x%x", uint16(public.Type), uint16(public.NameAlg))
	case a.UserWithAuth:
		return errors.New("the sealed object has userWithAuth, so its policy is not enforced; seal it again")
	case !bytes.Equal(public.AuthPolicy.Buffer, t.PolicyHash[:]):
		return fmt.Errorf("the sealed object's policy is %x, the token says %x", public.AuthPolicy.Buffer, t.PolicyHash)
	}
	return nil
}

// unmarshalPublic reads a TPMT_PUBLIC that fills b to the last byte.
func unmarshalPublic(b []byte) (*tpm2.TPMTPublic, error) {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(public), b) {
		return nil, errors.New("bytes follow the structure or it is not in canonical form")
	}
	return public, nil
}

// esysKeyResource is IESYSC_KEY_RSRC of tpm2-tss.
const esysKeyResource = 1

// marshal: u32 handle, TPM2B_NAME, u32 resource type, TPM2B_PUBLIC; tpm2-tss IESYS_RESOURCE.
func (r SRKRef) marshal() []byte {
	b := binary.BigEndian.AppendUint32(nil, r.Handle)
	b = append(b, sized(r.Name)...)
	b = binary.BigEndian.AppendUint32(b, esysKeyResource)
	return append(b, sized(r.Public)...)
}

func parseSRKRef(b []byte) (*SRKRef, error) {
	if len(b) < 4 {
		return nil, fmt.Errorf("%d bytes", len(b))
	}
	r := SRKRef{Handle: binary.BigEndian.Uint32(b)}
	name, rest, ok := cutSized(b[4:])
	if !ok || len(rest) < 4 || binary.BigEndian.Uint32(rest) != esysKeyResource {
		return nil, errors.New("is not a serialised key handle")
	}
	public, rest, ok := cutSized(rest[4:])
	if !ok || len(rest) != 0 {
		return nil, errors.New("the public area's length is wrong")
	}
	parsed, err := unmarshalPublic(public)
	if err != nil {
		return nil, err
	}
	want, err := tpm2.ObjectName(parsed)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(want.Buffer, name) {
		return nil, fmt.Errorf("the name %x is not that of the public area, %x", name, want.Buffer)
	}
	r.Name, r.Public = name, public
	return &r, nil
}

// sized is a TPM2B: two bytes of length, then b.
func sized(b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
}

func cutSized(b []byte) (content, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if len(b) < 2+n {
		return nil, nil, false
	}
	return slices.Clone(b[2 : 2+n]), b[2+n:], true
}
