// Package attest lets a vendor who never sees a box tell a true one from a tampered
// one: this hardware, this release, this firmware state, these volumes, now.
//
// Parties and documents. The vendor makes a [Challenge] ([NewChallenge]) and sends it,
// by network or as a file on a stick; one challenge may go to many boxes. The box calls
// [Attest], which has its TPM sign the registers ([Selection]) over a digest of the
// challenge and of what the box says about itself ([Statement]), and sends back an
// [Answer]: quote, keys, certificates, the event log, and files of the agent's. The
// vendor calls [Verify] (or [VerifyAll], for a fleet) with the answer, the same
// challenge and a [Policy]: the TPM manufacturers' [Roots], the [Reference] values of
// his releases, his Secure Boot [Keys], and the [Record] he has of the box
// ([Records.Find]). The result is a [Verdict] of named checks, each pass, fail or
// unknown, with the event that differs and what it means.
//
// First contact takes two answers. The first one shows the box's endorsement key (EK),
// with the manufacturer's certificate, and its attestation key (AK), which the TPM
// makes anew from a template and is the same each time. [NewCredential] encrypts a
// secret so that only a TPM that holds both can decrypt it; it goes into the second
// challenge ([Challenge.Credentials]), and the second answer shows the secret. From
// then on [NewRecord] keeps the binding, and any challenge will do.
//
// What a check can rest on: the registers are what the TPM signed. A log is a claim of
// whoever runs the box, and counts for a register only where it replays to the quoted
// value; in PCR 11 and 15, which the running system extends, what the box says that it
// extended counts too. The statement (slots, volumes, services) is signed, but nobody
// measured it: it is as true as the release that runs, which is why the other checks
// come first.
//
// Revocations are demanded by releases: one that brings an addition to dbx demands its
// entries of every box that runs it ([Reference.DBX]). A box adds them after it has
// committed to the release, one change a boot, and shows them behind the next start.
// Until then [CheckDBX] is unknown, and so not good; a box that was once seen with them
// ([Record.Revocations]) and lacks them now has failed, whichever release it runs.
//
// What cannot be judged is [Unknown], and an unknown is never good: [Verdict.Good]
// takes all checks to pass, except those whose being unknown the caller accepts by name
// ([Policy.Accept]). No document makes this package panic; see [Verify].
//
// A box can bring its evidence by itself, over https. URL is the verifier's:
//
//	POST URL/challenge              200, a challenge
//	POST URL/challenge  (an answer) 200, a challenge with a credential for that box
//	POST URL/answer     (an answer) 200 it is good, or 403 it is not; the [Verdict] as JSON
//
// A body is the file, of type application/octet-stream. When the verdict says that the AK
// is not bound ([CheckAK] is unknown), the box asks for a challenge once more, with its
// answer, and answers that: first contact in four requests. A challenge is good for one
// answer. Every other status is an error, after which the box comes again later, with
// pauses that grow. The box takes nothing from the verdict but a line for its status, and
// the server is who it is by its certificate only: what counts is signed by the TPM.
//
// What this does not protect: a box whose approved release is broken into at run time,
// which measures what it did before; against a TPM that is taken out and talked to by
// another computer; against a manufacturer who certifies keys that are in no TPM. It
// hides nothing: EK and AK are the same for all verifiers, for the TPM's life.
//
// Subset: TPM 2.0, the SHA-256 bank, one quote; AK of ECC P-256, or RSA 2048 where the
// TPM has no ECC; EK of the TCG's templates L-1 and H-1 (RSA 2048), L-2 and H-2 (ECC
// P-256), H-3 (ECC P-384) and H-6 (RSA 3072). The
// device side is in device.go and sends TPM commands; nothing else here needs a TPM.
// The answer is a binary file of ours; the statement and the challenge are JSON.
// Package tpmtools reads and writes the attestations of go-tpm-tools.
package attest

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Limits on what comes from outside.
const (
	// MaxChallengeBytes is the longest challenge [ParseChallenge] reads.
	MaxChallengeBytes = 1 << 20
	// MaxAnswerBytes is the longest answer [ParseAnswer] reads.
	MaxAnswerBytes = 8 << 20
	// MaxLogBytes is the longest event log in an answer; a PC's has 10 to 100 KB.
	MaxLogBytes = 4 << 20
	// MaxAttachmentBytes is the most that the files of an answer have together.
	MaxAttachmentBytes = 3 << 20

	maxStatementBytes   = 64 << 10
	maxStructureBytes   = 1 << 10 // a key, quote or signature of a TPM
	maxCertificateBytes = 8 << 10
	maxCertificates     = 8
	maxAttachments      = 16
	maxCredentials      = 1024
)

// nonceBytes is the length of a challenge's nonce, and of a credential's secret.
const nonceBytes = 32

// ErrMalformed means that a document is not one of those of this package, or damaged.
var ErrMalformed = errors.New("malformed")

// Selection are the registers that every quote covers, in the SHA-256 bank, in
// ascending order: all that a boot measures into, but for IMA's (10). A quote of any
// other selection is refused: what is left out could hold anything.
func Selection() []int { return []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15} }

// AllRegisters are those that go-tpm-tools quotes: every one. A quote over them, with
// all values given, is taken too; it covers more, and hides nothing.
func AllRegisters() []int {
	all := make([]int, pcr.Count)
	for i := range all {
		all[i] = i
	}
	return all
}

const (
	challengeType = "holdfast-challenge"
	statementType = "holdfast-statement"
	quotedFirst   = "holdfast attest, format 1\x00" // no other data that an AK signs begins like this
)

// Challenge is what the vendor asks. It is no secret, and must not be one that somebody
// else chose: keep what you sent, and give [Verify] that.
type Challenge struct {
	Type   string    `json:"type"` // "holdfast-challenge"
	Format int       `json:"format"`
	Nonce  []byte    `json:"nonce"` // 32 random bytes
	Time   time.Time `json:"time"`  // the vendor's, UTC, whole seconds
	// Credentials are for boxes at first contact, each for one AK.
	Credentials []Credential `json:"credentials,omitempty"`
}

// Credential is a secret that only the TPM with both keys can decrypt: TPM 2.0 Part 1
// §24 (credential protection), tpm2_makecredential.
type Credential struct {
	EK   []byte `json:"ek_sha256"` // SHA-256 of the EK's TPMT_PUBLIC
	AK   []byte `json:"ak_name"`   // TPM name of the AK
	Blob []byte `json:"blob"`      // TPMS_ID_OBJECT
	Seed []byte `json:"seed"`      // encrypted seed: TPM2B_ENCRYPTED_SECRET without its size
	// Proof is the SHA-256 of the secret, which has 256 random bits.
	Proof []byte `json:"proof_sha256"`
}

// NewChallenge makes a challenge with a fresh nonce.
func NewChallenge(now time.Time, credentials ...Credential) (*Challenge, error) {
	c := &Challenge{Type: challengeType, Format: 1, Nonce: make([]byte, nonceBytes), Time: now.UTC().Truncate(time.Second), Credentials: credentials}
	rand.Read(c.Nonce) // never fails: crypto/rand
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("make challenge: %w", err)
	}
	return c, nil
}

// Marshal is the file. The same challenge gives the same bytes.
func (c *Challenge) Marshal() []byte { return indented(c) }

// ParseChallenge reads what [Challenge.Marshal] wrote, and nothing else. The error is
// [ErrMalformed].
func ParseChallenge(b []byte) (*Challenge, error) {
	var c Challenge
	if err := readJSON(b, MaxChallengeBytes, &c, c.check, c.Marshal); err != nil {
		return nil, fmt.Errorf("challenge: %w: %w", ErrMalformed, err)
	}
	return &c, nil
}

func (c *Challenge) check() error {
	switch {
	case c.Type != challengeType:
		return fmt.Errorf("its type is %.40q, not %s", c.Type, challengeType)
	case c.Format != 1:
		return fmt.Errorf("it has format %d; this program knows format 1", c.Format)
	case len(c.Nonce) != nonceBytes:
		return fmt.Errorf("its nonce has %d bytes, not %d", len(c.Nonce), nonceBytes)
	case len(c.Credentials) > maxCredentials:
		return fmt.Errorf("it has %d credentials, more than %d", len(c.Credentials), maxCredentials)
	}
	for i, k := range c.Credentials {
		if len(k.EK) != sha256.Size || len(k.AK) != nameBytes || len(k.Proof) != sha256.Size || badLength(k.Blob) || badLength(k.Seed) {
			return fmt.Errorf("credential %d has fields of a wrong length", i)
		}
		if slices.ContainsFunc(c.Credentials[:i], func(o Credential) bool { return string(o.AK) == string(k.AK) }) {
			return fmt.Errorf("credential %d is a second one for the same key", i)
		}
	}
	return checkTime(c.Time)
}

func badLength(b []byte) bool { return len(b) == 0 || len(b) > maxStructureBytes }

// nameBytes is the length of a TPM name with SHA-256: the algorithm and the digest.
const nameBytes = 2 + sha256.Size

// credentialFor is the one for an AK, or nil.
func (c *Challenge) credentialFor(ak []byte) *Credential {
	for i := range c.Credentials {
		if string(c.Credentials[i].AK) == string(ak) {
			return &c.Credentials[i]
		}
	}
	return nil
}

// qualifyingData is what the TPM signs with the registers: SHA-256 over a label, the
// digest of the challenge's file and that of the statement.
func (c *Challenge) qualifyingData(statement []byte) pcr.Digest {
	asked, said := sha256.Sum256(c.Marshal()), sha256.Sum256(statement)
	return sha256.Sum256(slices.Concat([]byte(quotedFirst), asked[:], said[:]))
}

func checkTime(t time.Time) error {
	if t.Location() != time.UTC || t.Nanosecond() != 0 || t.Year() < 1970 || t.Year() > 9999 {
		return errors.New("its time is not whole seconds in UTC")
	}
	return nil
}
