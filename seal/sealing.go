package seal

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// PolicyError means that the TPM is the right one and the boot is not: the
// registers do not have the values the key was sealed for.
type PolicyError struct {
	Reason  string // a sentence without its full stop
	For     string // the token's [Token.For]
	Signed  []int  // registers that need a signature
	Literal []int  // registers that need their old value
	Now     map[int]pcr.Digest
}

func (e *PolicyError) Error() string {
	var parts []string
	if len(e.Signed) > 0 {
		parts = append(parts, fmt.Sprintf("signed PCR %v", e.Signed))
	}
	if len(e.Literal) > 0 {
		parts = append(parts, fmt.Sprintf("literal PCR %v", e.Literal))
	}
	whose := "the key's policy"
	if e.For != "" {
		whose = fmt.Sprintf("the policy of the key for %q", e.For)
	}
	if len(parts) > 0 {
		whose += " (" + strings.Join(parts, ", ") + ")"
	}
	return fmt.Sprintf("%s does not match this boot: %s", whose, e.Reason)
}

const (
	maxSecretBytes = 128 // MAX_SYM_DATA, Part 2 §11.1.16
	saltBytes      = 32
	pinRounds      = 10000 // PBKDF2 rounds of systemd 253 and later
)

// Seal puts a secret under the policy. pin is nil unless policy.PIN is set.
// The literal values are those of the policy, which may be predicted ones; they
// are not compared with the TPM's present registers. Registers 0 to 7 and 11
// are refused while un-extended, because then anyone can reproduce them (F27).
// The object has noDA unless there is a PIN (F31) and never userWithAuth (F46).
// The token's Keyslots are the caller's to fill.
func Seal(t TPM, srk SRK, secret []byte, policy Policy, pin []byte) (Token, error) {
	t = patient{t}
	if len(secret) == 0 || len(secret) > maxSecretBytes {
		return Token{}, fmt.Errorf("seal %d bytes: 1 to %d expected", len(secret), maxSecretBytes)
	}
	if policy.PIN != (len(pin) > 0) {
		return Token{}, fmt.Errorf("seal for policy %q: a PIN is wanted: %v, given: %v", policy.Name, policy.PIN, len(pin) > 0)
	}
	for _, i := range checked() {
		if v, ok := policy.PCRs[i]; ok && pcr.Unextended(v) {
			return Token{}, fmt.Errorf("seal to PCR %s: nothing was measured into it, so anyone could reproduce it; enable the TPM's SHA-256 measurements in the firmware setup", pcr.Label(i))
		}
	}
	digest, err := policy.Digest()
	if err != nil {
		return Token{}, fmt.Errorf("seal: %w", err)
	}
	token := Token{
		PCRs:         slices.Sorted(maps.Keys(policy.PCRs)),
		SignedPCRs:   slices.Sorted(slices.Values(policy.SignedPCRs)),
		PolicyKeyPEM: policy.PolicyKeyPEM,
		Ref:          policy.Ref,
		Counter:      policy.Counter,
		PolicyHash:   digest,
		PIN:          policy.PIN,
		SRK:          &SRKRef{Handle: uint32(srk.handle), Name: srk.Name, Public: tpm2.Marshal(srk.public)},
	}
	var auth []byte
	if policy.PIN {
		token.Salt = make([]byte, saltBytes)
		rand.Read(token.Salt) // never fails: crypto/rand
		if auth, err = pinAuth(pin, token.Salt); err != nil {
			return Token{}, err
		}
	}
	if err := create(t, srk, secret, auth, &token); err != nil {
		return Token{}, fmt.Errorf("seal for policy %q: %w", policy.Name, tpmError(t, err))
	}
	return token, nil
}

// create makes the sealed object and puts it into the token.
func create(t TPM, srk SRK, secret, auth []byte, token *Token) error {
	rsp, err := tpm2.Create{
		ParentHandle: srk.auth(),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			UserAuth: tpm2.TPM2BAuth{Buffer: auth},
			Data:     tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type:             tpm2.TPMAlgKeyedHash,
			NameAlg:          tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: !token.PIN},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: token.PolicyHash[:]},
		}),
	}.Execute(t)
	if err != nil {
		return err
	}
	token.Private, token.Public = rsp.OutPrivate.Buffer, rsp.OutPublic.Bytes()
	return token.checkObject()
}

// pinAuth is the object's auth value: SHA-256 of the PIN (systemd 252), or of
// the base64 text of PBKDF2-HMAC-SHA256(PIN, salt), without trailing zeros, which a
// TPM drops (Part 1 §19.6.5).
func pinAuth(pin, salt []byte) ([]byte, error) {
	text := pin
	if len(salt) > 0 {
		key, err := pbkdf2.Key(sha256.New, string(pin), salt, pinRounds, sha256.Size)
		if err != nil {
			return nil, fmt.Errorf("stretch the PIN: %w", err)
		}
		text = base64.StdEncoding.AppendEncode(nil, key)
		defer clear(text)
	}
	auth := sha256.Sum256(text)
	return bytes.TrimRight(auth[:], "\x00"), nil
}

// Pauses between tries while something measures into PCRs (F17). IMA does so
// in bursts while a system starts; the sum is about ten seconds.
const (
	maxUnsealTries = 40
	maxUnsealPause = 500 * time.Millisecond
)

// Unseal asks the TPM for the secret. signatures are those of the running
// image ([ParseSignatures]); pin is nil unless the token wants one.
//
// Errors: [ErrPINNeeded], [ErrWrongPIN], [*LockoutError], [*PolicyError],
// [ErrWrongTPM], [ErrNoSHA256], or a transport's. Each should end in the
// recovery prompt (F36). Wipe the secret after use.
//
// Whatever happens, no session and no object is left in the TPM.
func Unseal(t TPM, token Token, signatures Signatures, pin []byte) ([]byte, error) {
	secret, _, err := UnsealAny(t, []Token{token}, signatures, pin)
	return secret, err
}

// UnsealAny is [Unseal] for a header with a token for each state the box may be
// in: it reads the registers once and asks for the one secret whose policy they
// fulfil ([Choose]). i is that token, or on an error the one the error is about
// (-1 if there is none). A further token that matches is tried only where the
// first was refused for what cannot be seen beforehand, a counter that has
// moved on or a damaged object, and never after a wrong PIN.
func UnsealAny(t TPM, tokens []Token, signatures Signatures, pin []byte) (secret []byte, i int, err error) {
	t = patient{t}
	found, err := choose(t, tokens, signatures)
	return unsealFound(t, tokens, found, err, signatures, pin)
}

// UnsealWith is [UnsealAny] with registers that the caller knows, all that the tokens
// name: it does not read them. They may come from the firmware's event log, which nobody
// vouches for: they choose the token, and the TPM decides. Where it refuses although they
// fit, read the registers ([ReadPCRs]) and compare.
func UnsealWith(t TPM, tokens []Token, now map[int]pcr.Digest, signatures Signatures, pin []byte) (secret []byte, i int, err error) {
	t = patient{t}
	found, err := chooseWith(t, tokens, now, signatures)
	return unsealFound(t, tokens, found, err, signatures, pin)
}

func unsealFound(t TPM, tokens []Token, found choice, err error, signatures Signatures, pin []byte) (secret []byte, i int, _ error) {
	if err != nil {
		return nil, found.closest, fmt.Errorf("unseal: %w", tpmError(t, err))
	}
	var first error
	for _, m := range found.ordered(tokens, len(pin) > 0) {
		secret, err := unsealMatched(t, tokens[m.index], m, signatures, pin)
		if err == nil {
			return secret, m.index, nil
		}
		if first == nil {
			first, i = err, m.index
		}
		var refused *PolicyError
		if errors.As(err, &refused) {
			refused.For = tokens[m.index].For
		} else if !errors.Is(err, ErrWrongTPM) {
			break
		}
	}
	return nil, i, first
}

// unsealMatched loads the object and tries until nothing interferes.
func unsealMatched(t TPM, token Token, m match, signatures Signatures, pin []byte) ([]byte, error) {
	if token.PIN && len(pin) == 0 {
		return nil, ErrPINNeeded
	}
	parent, object, err := load(t, token)
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", tpmError(t, err))
	}
	defer parent.Close(t)
	defer flush(t, object.Handle)
	for try := 1; ; try++ {
		secret, err := unsealOnce(t, parent, object, token, m, pin)
		if err == nil {
			return secret, nil
		}
		if token.PIN && errors.Is(err, tpm2.TPMRCAuthFail) {
			return nil, fmt.Errorf("unseal: %w: %w", ErrWrongPIN, err)
		}
		if !errors.Is(err, tpm2.TPMRCPCRChanged) || try == maxUnsealTries {
			return nil, fmt.Errorf("unseal, try %d: %w", try, tpmError(t, err))
		}
		// Jitter, so that we do not march in step with the other measurer.
		limit := min(maxUnsealPause, time.Duration(try)*5*time.Millisecond)
		time.Sleep(time.Duration(mathrand.Int64N(int64(limit))))
		if m, err = look(t, token, signatures); err != nil {
			return nil, fmt.Errorf("unseal, try %d: %w", try+1, tpmError(t, err))
		}
	}
}

// load has the TPM load the sealed object. It asks for the storage key's
// public area only when the key does not do what the token says it is. The
// plain password session gives nothing away: the object is encrypted, the
// key's auth value is empty, and the session that unseals is bound to both
// names.
func load(t TPM, token Token) (SRK, tpm2.NamedHandle, error) {
	if parent, ok := token.SRK.claimed(); ok {
		object, err := loadUnder(t, parent, token)
		if err == nil || !wrongParent(err) {
			return parent, object, err
		}
	}
	parent, err := parentOf(t, token)
	if err != nil {
		return SRK{}, tpm2.NamedHandle{}, err
	}
	object, err := loadUnder(t, parent, token)
	if err != nil {
		parent.Close(t)
		return SRK{}, tpm2.NamedHandle{}, err
	}
	return parent, object, nil
}

func loadUnder(t TPM, parent SRK, token Token) (tpm2.NamedHandle, error) {
	rsp, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: parent.handle, Name: parent.tpmName(), Auth: tpm2.PasswordAuth(nil)},
		InPrivate:    tpm2.TPM2BPrivate{Buffer: token.Private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](token.Public),
	}.Execute(t)
	if err != nil {
		return tpm2.NamedHandle{}, fmt.Errorf("load the sealed object: %w", err)
	}
	return tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: objectName(token.Public)}, nil
}

// wrongParent: nothing is at the handle, or a key of another kind, or another
// storage key. The refused password of such a key counts for lockout if it
// lacks noDA; that is one count in a boot that needs help anyway.
func wrongParent(err error) bool {
	for _, rc := range []tpm2.TPMRC{
		tpm2.TPMRCHandle, tpm2.TPMRCIntegrity, tpm2.TPMRCType, tpm2.TPMRCKey, tpm2.TPMRCAttributes, tpm2.TPMRCHash, tpm2.TPMRCSymmetric,
		tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail, tpm2.TPMRCAuthUnavailable, tpm2.TPMRCAuthType,
	} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// objectName is the name of a TPMT_PUBLIC whose name algorithm is SHA-256:
// computed here, not taken from the TPM's answer.
func objectName(public []byte) tpm2.TPM2BName {
	digest := sha256.Sum256(public)
	return tpm2.TPM2BName{Buffer: append([]byte{0, byte(tpm2.TPMAlgSHA256)}, digest[:]...)}
}

// unsealOnce runs the policy in a session of its own. What may be slow comes
// before the first PolicyPCR: from there on any extend spoils the session.
func unsealOnce(t TPM, parent SRK, object tpm2.NamedHandle, token Token, m match, pin []byte) (secret []byte, err error) {
	var auth []byte
	if token.PIN {
		if auth, err = pinAuth(pin, token.Salt); err != nil {
			return nil, err
		}
		defer clear(auth)
	}
	if m.ticket == nil && len(token.SignedPCRs) > 0 {
		ticket, err := verifyInTPM(t, m.key, m.signature)
		if err != nil {
			return nil, err
		}
		m.ticket = &ticket
	}
	session, err := startPolicySession(t, parent, auth)
	if err != nil {
		return nil, err
	}
	defer session.wipe()
	defer func() {
		if err != nil { // else the TPM has ended the session itself
			flush(t, session.handle)
		}
	}()
	if err := runPolicy(t, session.handle, token, m); err != nil {
		return nil, err
	}
	rsp, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.Handle, Name: object.Name, Auth: session}}.Execute(t)
	if err != nil {
		return nil, err
	}
	return rsp.OutData.Buffer, nil
}

// verifyInTPM has the TPM check the signature and returns its ticket. The owner
// hierarchy, because a ticket of the null hierarchy is void. Part 3 §20.1.
func verifyInTPM(t TPM, key policyKey, signature Signature) (tpm2.TPMTTKVerified, error) {
	loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(key.public), Hierarchy: tpm2.TPMRHOwner}.Execute(t)
	if err != nil {
		return tpm2.TPMTTKVerified{}, fmt.Errorf("load the policy key: %w", err)
	}
	defer flush(t, loaded.ObjectHandle)
	digest := signature.digest()
	rsp, err := tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: loaded.ObjectHandle, Name: tpm2.TPM2BName{Buffer: key.name}},
		Digest:    tpm2.TPM2BDigest{Buffer: digest[:]},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA,
			&tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: signature.Sig}})},
	}.Execute(t)
	if err != nil {
		return tpm2.TPMTTKVerified{}, fmt.Errorf("verify the PCR signature: %w", err)
	}
	return rsp.Validation, nil
}

// runPolicy satisfies the policy in the order of [Policy.Digest].
func runPolicy(t TPM, session tpm2.TPMHandle, token Token, m match) error {
	if len(token.SignedPCRs) > 0 {
		if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(token.SignedPCRs)}).Execute(t); err != nil {
			return fmt.Errorf("policy over signed PCR %v: %w", token.SignedPCRs, err)
		}
		_, err := tpm2.PolicyAuthorize{
			PolicySession:  session,
			ApprovedPolicy: tpm2.TPM2BDigest{Buffer: m.signature.Policy[:]},
			PolicyRef:      tpm2.TPM2BDigest{Buffer: []byte(token.Ref)},
			KeySign:        tpm2.TPM2BName{Buffer: m.key.name},
			CheckTicket:    *m.ticket,
		}.Execute(t)
		if errors.Is(err, tpm2.TPMRCValue) {
			// PCR 11 moved between our look and PolicyPCR, or a kept ticket is
			// not this TPM's: look again.
			return fmt.Errorf("approve signed PCR %v: %w", token.SignedPCRs, tpm2.TPMRCPCRChanged)
		}
		if err != nil {
			return fmt.Errorf("approve signed PCR %v: %w", token.SignedPCRs, err)
		}
	}
	if token.Counter != nil {
		if err := token.Counter.execute(t, session); err != nil {
			return err
		}
	}
	if len(token.PCRs) > 0 {
		if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(token.PCRs)}).Execute(t); err != nil {
			return fmt.Errorf("policy over literal PCR %v: %w", token.PCRs, err)
		}
	}
	if token.PIN {
		if _, err := (tpm2.PolicyAuthValue{PolicySession: session}).Execute(t); err != nil {
			return fmt.Errorf("policy with PIN: %w", err)
		}
	}
	return nil
}

// tpmError turns the TPM's codes into this package's errors.
func tpmError(t TPM, err error) error {
	switch {
	case errors.Is(err, tpm2.TPMRCLockout):
		return lockoutError(t)
	case errors.Is(err, tpm2.TPMRCIntegrity):
		return fmt.Errorf("%w: %w", ErrWrongTPM, err)
	case errors.Is(err, tpm2.TPMRCPolicyFail):
		return &PolicyError{Reason: "the TPM says so (" + err.Error() + ")"}
	}
	return err
}

func lockoutError(t TPM) error {
	l, err := ReadLockout(t)
	if err != nil {
		return &LockoutError{}
	}
	return &LockoutError{Counter: l.Count, Max: l.Max, WaitSec: l.wait()}
}

// Lockout is what the TPM counts against guessing of PINs (Part 1 §19.8). Keys without a
// PIN are not concerned.
type Lockout struct {
	In         bool   // no PIN is taken
	Count, Max uint32 // failed authorizations so far; lockout begins at Max
	// ForgiveSec is the time, while the TPM is powered, until one failure is forgiven.
	ForgiveSec uint32
	// WaitSec is, in lockout, the longest time until the TPM takes one more try.
	WaitSec uint64
}

// ReadLockout asks the TPM, with one command.
func ReadLockout(t TPM) (l Lockout, err error) {
	v, err := properties(patient{t}, tpm2.TPMPTPermanent, 20)
	if err != nil {
		return l, err
	}
	l = Lockout{
		In: v[tpm2.TPMPTPermanent]&permanentInLockout != 0, Count: v[tpm2.TPMPTLockoutCounter],
		Max: v[tpm2.TPMPTMaxAuthFail], ForgiveSec: v[tpm2.TPMPTLockoutInterval],
	}
	if l.In {
		l.WaitSec = l.wait()
	}
	return l, nil
}

// permanentInLockout is a bit of TPMA_PERMANENT, Part 2 §8.6.
const permanentInLockout = 1 << 9

func (l Lockout) wait() uint64 {
	over := uint64(1)
	if l.Count > l.Max {
		over += uint64(l.Count - l.Max)
	}
	return over * uint64(l.ForgiveSec)
}
