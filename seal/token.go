package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// TokenType is the LUKS2 token type of sealed keys that systemd can open too:
// its own.
const TokenType = "systemd-tpm2"

// OwnTokenType is the type of those it cannot: systemd knows neither policy
// references nor counters, would leave them out, and would try in vain. It
// passes over tokens of a type it does not know. See [IsTokenType].
const OwnTokenType = "holdfast-tpm2"

// IsTokenType says whether [ParseToken] is for LUKS2 tokens of that type.
func IsTokenType(name string) bool { return name == TokenType || name == OwnTokenType }

const (
	maxForBytes   = 200
	maxTickets    = 8
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
	// Ref and Counter are those of [Policy].
	Ref        string
	Counter    *Counter
	PolicyHash pcr.Digest
	PIN        bool
	Salt       []byte // of the PIN; nil in tokens of systemd 252
	// For says, for people, which state of the box the token is for: "slot a
	// 1.0.0". At most 200 bytes of printable text. It decides nothing.
	For string
	// Tickets spare the TPM work; see [AddTickets].
	Tickets []Ticket
	// VolumeMAC is, on a volume, a MAC of its key under the secret, made and checked by
	// the caller: it tells a volume whose keyslot is damaged from another volume that
	// bears a copy of this token. 32 bytes, or nil in tokens of others.
	VolumeMAC []byte
	// SRK is the storage key; nil in tokens of systemd 252, which make a
	// primary key anew each time.
	SRK *SRKRef
}

// Type is the LUKS2 token type: [TokenType] whenever systemd could open it.
func (t Token) Type() string {
	if t.Ref != "" || t.Counter != nil {
		return OwnTokenType
	}
	return TokenType
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

	For     string       `json:"holdfast_for,omitempty"`
	Ref     string       `json:"holdfast_ref,omitempty"`
	Counter *counterJSON `json:"holdfast_nv,omitempty"`
	Tickets []ticketJSON `json:"holdfast_tickets,omitempty"`
	Volume  []byte       `json:"holdfast_volume,omitempty"`

	// Newer fields whose meaning changes how the object is opened.
	PolicyKeyRef string          `json:"tpm2_pubkey_ref,omitempty"`
	Argon2id     json.RawMessage `json:"tpm2_argon2id_memcost,omitempty"`
}

// counterJSON has numbers as strings, as LUKS2 does with those of 64 bits.
type counterJSON struct {
	Index string `json:"index"` // "0x01af0001"
	Max   string `json:"max"`   // decimal
}

type ticketJSON struct {
	Pol string `json:"pol"`
	MAC []byte `json:"mac"`
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
	p := Policy{
		Name: name, SignedPCRs: t.SignedPCRs, PolicyKeyPEM: t.PolicyKeyPEM, Ref: t.Ref, Counter: t.Counter,
		PIN: t.PIN, PCRs: map[int]pcr.Digest{},
	}
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

// Describe lists, for people, all that the sealed object is bound to (F5, F55); name is
// [Policy.Name]. A token tells the parts of its policy, and nobody vouches for what it
// tells; the object holds a hash. Register values that lead from the one to the other,
// looked for in known, show that the list is true and whole; otherwise the last line says
// how much of it is.
func (t Token) Describe(name string, known ...map[int]pcr.Digest) (p Policy, lines []string) {
	p = t.Policy(name)
	if len(p.PCRs) == 0 {
		known = append(known, nil)
	}
	proven := false
	for _, values := range known {
		with, complete := t.Policy(name), true
		for i := range with.PCRs {
			v, ok := values[i]
			with.PCRs[i], complete = v, complete && ok
		}
		if digest, err := with.Digest(); complete && err == nil && digest == t.PolicyHash {
			p, proven = with, true
			break
		}
	}
	lines = p.Describe()
	if !proven {
		for i, l := range lines {
			lines[i] = strings.Replace(l, fmt.Sprintf("exactly %x", pcr.Digest{}), "one value, of which only the policy's hash is kept", 1)
		}
	}
	switch {
	case !proven && len(p.PCRs) > 0:
		lines = append(lines, "as the token says: without the values that were sealed to, nobody can tell whether that is all")
	case !proven:
		lines = append(lines, "NOT TRUE: the sealed object is bound to something else than its token says")
	}
	if public, err := unmarshalPublic(t.Public); err == nil && !t.PIN && !public.ObjectAttributes.NoDA {
		lines = append(lines, "without noDA: the TPM counts power cuts as wrong guesses (F31)")
	}
	return p, lines
}

// Marshal is the token as JSON for a LUKS2 header.
func (t Token) Marshal() ([]byte, error) {
	if err := t.checkOwn(); err != nil {
		return nil, fmt.Errorf("TPM token: %w", err)
	}
	j := tokenJSON{
		Type: t.Type(), Keyslots: append([]string{}, t.Keyslots...),
		Blob:       oneString(base64.StdEncoding.EncodeToString(append(sized(t.Private), sized(t.Public)...))),
		PCRs:       append([]int{}, t.PCRs...),
		Bank:       "sha256",
		PrimaryAlg: "ecc",
		PolicyHash: oneString(hex.EncodeToString(t.PolicyHash[:])),
		PIN:        t.PIN,
		SignedPCRs: t.SignedPCRs,
		PolicyKey:  t.PolicyKeyPEM,
		Salt:       t.Salt,
		For:        t.For,
		Ref:        t.Ref,
		Volume:     t.VolumeMAC,
	}
	if t.SRK != nil {
		j.SRK = t.SRK.marshal()
	}
	if t.Counter != nil {
		j.Counter = &counterJSON{fmt.Sprintf("0x%08x", t.Counter.Index), strconv.FormatUint(t.Counter.Max, 10)}
	}
	for _, k := range t.Tickets {
		j.Tickets = append(j.Tickets, ticketJSON{hex.EncodeToString(k.Policy[:]), k.MAC})
	}
	return json.Marshal(j)
}

// ParseToken reads a token of type [TokenType] or [OwnTokenType]. Unknown fields are passed over;
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
		SignedPCRs: j.SignedPCRs, PolicyKeyPEM: j.PolicyKey, Salt: j.Salt, For: j.For, Ref: j.Ref, VolumeMAC: j.Volume,
	}
	if err := j.own(&t); err != nil {
		return Token{}, fmt.Errorf("TPM token: %w", err)
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
	case !IsTokenType(j.Type):
		return fmt.Errorf("type is %q, not %q or %q", j.Type, TokenType, OwnTokenType)
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

// own reads the fields that systemd does not have.
func (j tokenJSON) own(t *Token) error {
	if c := j.Counter; c != nil {
		index, err := strconv.ParseUint(strings.TrimPrefix(c.Index, "0x"), 16, 32)
		if err != nil || fmt.Sprintf("0x%08x", index) != c.Index {
			return fmt.Errorf("holdfast_nv: index %q; write it as 0x%08x", c.Index, CounterIndex)
		}
		limit, err := strconv.ParseUint(c.Max, 10, 64)
		if err != nil || strconv.FormatUint(limit, 10) != c.Max {
			return fmt.Errorf("holdfast_nv: max %q is not a decimal number of 64 bits", c.Max)
		}
		t.Counter = &Counter{Index: uint32(index), Max: limit}
	}
	if len(j.Tickets) > maxTickets {
		return fmt.Errorf("holdfast_tickets: %d, at most %d expected", len(j.Tickets), maxTickets)
	}
	for i, k := range j.Tickets {
		ticket := Ticket{MAC: k.MAC}
		if err := decodeHex(ticket.Policy[:], k.Pol); err != nil {
			return fmt.Errorf("holdfast_tickets %d: pol: %w", i, err)
		}
		t.Tickets = append(t.Tickets, ticket)
	}
	// Under the wrong type, systemd would try what it cannot do, or not try what it can.
	if t.Type() != j.Type {
		return fmt.Errorf("type is %q, but a token with this policy is of type %q", j.Type, t.Type())
	}
	return t.checkOwn()
}

// checkOwn holds for what is written and what is read.
func (t Token) checkOwn() error {
	if len(t.For) > maxForBytes || !utf8.ValidString(t.For) || strings.ContainsFunc(t.For, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("holdfast_for: %d bytes; at most %d of printable text expected", len(t.For), maxForBytes)
	}
	if err := checkRef(t.Ref); err != nil {
		return fmt.Errorf("holdfast_ref: %w", err)
	}
	if n := len(t.VolumeMAC); n != 0 && n != sha256.Size {
		return fmt.Errorf("holdfast_volume: %d bytes, not %d", n, sha256.Size)
	}
	if t.Ref != "" && len(t.SignedPCRs) == 0 {
		return errors.New("holdfast_ref without tpm2_pubkey_pcrs")
	}
	if t.Counter != nil {
		if err := t.Counter.validate(); err != nil {
			return fmt.Errorf("holdfast_nv: %w", err)
		}
	}
	if len(t.Tickets) > 0 && len(t.SignedPCRs) == 0 {
		return errors.New("holdfast_tickets without tpm2_pubkey_pcrs")
	}
	for i, k := range t.Tickets {
		if len(k.MAC) == 0 || len(k.MAC) > maxTicketBytes {
			return fmt.Errorf("holdfast_tickets %d: %d bytes", i, len(k.MAC))
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
