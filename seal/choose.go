package seal

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Choose says which of a header's tokens the present boot fulfils, without
// asking for a secret: the registers are read once, for all of them together.
// Tokens under another storage key than the TPM has are passed over (F37).
//
// The error is a [*PolicyError] when no token matches; i is then the one that
// came closest, or -1 when there are no tokens. now holds every register that
// any token names, whenever they could be read.
func Choose(t TPM, tokens []Token, signatures Signatures) (i int, now map[int]pcr.Digest, err error) {
	found, err := choose(patient{t}, tokens, signatures)
	if err != nil {
		return found.closest, found.now, err
	}
	return found.ordered(tokens, true)[0].index, found.now, nil
}

// choice is the outcome of comparing tokens with the registers.
type choice struct {
	now     map[int]pcr.Digest
	matches []match
	closest int // where there are no matches
}

// match is a token that the registers fulfil, and what shows the TPM that.
type match struct {
	index     int
	key       policyKey
	signature Signature
	ticket    *tpm2.TPMTTKVerified // nil: the TPM must verify the signature first
}

// How far a token is from matching.
const (
	lacksKey       = iota // another TPM's
	lacksValues           // a literal register differs
	lacksSignature        // the literal ones are right
)

func choose(t TPM, tokens []Token, signatures Signatures) (choice, error) {
	found := choice{closest: -1}
	if len(tokens) == 0 {
		return found, errors.New("there is no TPM token")
	}
	var bound []int
	for _, token := range tokens {
		bound = append(bound, token.Policy("token").Bound()...)
	}
	slices.Sort(bound)
	now, err := ReadPCRs(t, slices.Compact(bound))
	if err != nil {
		return found, err
	}
	return chooseWith(t, tokens, now, signatures)
}

func chooseWith(t TPM, tokens []Token, now map[int]pcr.Digest, signatures Signatures) (choice, error) {
	found := choice{closest: -1, now: now}
	if len(tokens) == 0 {
		return found, errors.New("there is no TPM token")
	}
	foreign, err := otherKey(t, tokens)
	if err != nil {
		return found, err
	}
	best, reason := -1, error(nil)
	for i, token := range tokens {
		rank := lacksKey
		m, failure := match{}, error(ErrWrongTPM)
		if !foreign[i] {
			m, rank, failure = token.match(found.now, signatures)
		}
		if failure == nil {
			m.index = i
			found.matches = append(found.matches, m)
			continue
		}
		if rank > best {
			best, found.closest, reason = rank, i, failure
		}
	}
	if len(found.matches) == 0 {
		return found, reason
	}
	return found, nil
}

// otherKey marks the tokens under a storage key that the TPM does not have. It
// asks the TPM only if the tokens disagree, and marks none if none is right:
// an evicted key can be made again.
func otherKey(t TPM, tokens []Token) ([]bool, error) {
	foreign := make([]bool, len(tokens))
	if !slices.ContainsFunc(tokens, func(k Token) bool { return !bytes.Equal(k.srkName(), tokens[0].srkName()) }) {
		return foreign, nil
	}
	srk, err := readKey(t, srkHandle)
	if err != nil && !errors.Is(err, tpm2.TPMRCHandle) {
		return nil, err
	}
	ours := 0
	for i, k := range tokens {
		foreign[i] = k.SRK != nil && !bytes.Equal(k.srkName(), srk.Name)
		if !foreign[i] {
			ours++
		}
	}
	if ours == 0 {
		clear(foreign)
	}
	return foreign, nil
}

func (t Token) srkName() []byte {
	if t.SRK == nil {
		return nil
	}
	return t.SRK.Name
}

// match compares a token with the registers, so that a boot that cannot
// succeed is explained and costs nothing. The TPM decides.
func (t Token) match(now map[int]pcr.Digest, signatures Signatures) (m match, rank int, err error) {
	fail := func(reason string) error {
		of := map[int]pcr.Digest{}
		for _, i := range t.Policy("token").Bound() {
			of[i] = now[i]
		}
		return &PolicyError{Reason: reason, For: t.For, Signed: t.SignedPCRs, Literal: t.PCRs, Now: of}
	}
	if err := t.checkObject(); err != nil {
		return match{}, lacksKey, err
	}
	digest, err := t.policyNow(now).Digest()
	if err != nil {
		return match{}, lacksValues, err
	}
	if digest != t.PolicyHash {
		return match{}, lacksValues, fail(fmt.Sprintf("PCR %v differs from the time of sealing", t.PCRs))
	}
	if len(t.SignedPCRs) == 0 {
		return match{}, 0, nil
	}
	if m.key, err = parsePolicyKey(t.PolicyKeyPEM); err != nil {
		return match{}, lacksSignature, err
	}
	var reason string
	if m.signature, reason, err = signatures.find(m.key, t.SignedPCRs, t.Ref, now); err != nil {
		return match{}, lacksSignature, err
	}
	if reason != "" {
		return match{}, lacksSignature, fail(reason)
	}
	m.ticket = t.ticket(m.signature.Policy)
	return m, 0, nil
}

// look is match with registers read anew, for a further try. It leaves the kept
// ticket out: it may be why the last try went wrong.
func look(t TPM, token Token, signatures Signatures) (match, error) {
	now, err := ReadPCRs(t, token.Policy("token").Bound())
	if err != nil {
		return match{}, err
	}
	m, _, err := token.match(now, signatures)
	m.ticket = nil
	return m, err
}

// ordered puts the match to be tried first in front: one that needs no PIN
// while there is none, then the one with the highest counter, because a lower
// bound is the one that may be past.
func (c choice) ordered(tokens []Token, havePIN bool) []match {
	rank := func(m match) (pin int, limit uint64) {
		k := tokens[m.index]
		if k.PIN && !havePIN {
			pin = 1
		}
		if k.Counter != nil {
			limit = k.Counter.Max
		}
		return pin, limit
	}
	return slices.SortedStableFunc(slices.Values(c.matches), func(a, b match) int {
		aPIN, aMax := rank(a)
		bPIN, bMax := rank(b)
		return cmp.Or(cmp.Compare(aPIN, bPIN), cmp.Compare(bMax, aMax))
	})
}

// Ticket is a TPM's own note that it has verified a signature once: a MAC by
// its owner hierarchy, void in every other TPM and after a clear, worth nothing
// without the registers that it is about, and not secret.
type Ticket struct {
	Policy pcr.Digest // [Signature.Policy]
	MAC    []byte     // digest of the TPMT_TK_VERIFIED
}

// maxTicketBytes is SHA-512's; Part 2 §10.6.5 leaves the hash to the TPM.
const maxTicketBytes = 64

// AddTickets has the TPM verify, now, those signatures that are for the token
// (of its key, its registers and its reference), and keeps the tickets in it:
// an unseal in such a boot then takes three commands less, one of them an RSA
// operation of the chip. Give the signatures of every image that may be booted
// next, at most 8 are kept; tickets for others are dropped. A boot without a
// ticket, or with one that the TPM does not take, verifies as ever.
func AddTickets(t TPM, token *Token, signatures Signatures) error {
	t = patient{t}
	if len(token.SignedPCRs) == 0 {
		return nil
	}
	key, err := parsePolicyKey(token.PolicyKeyPEM)
	if err != nil {
		return err
	}
	wanted, err := pcr.Sorted(token.SignedPCRs)
	if err != nil {
		return err
	}
	tickets := map[pcr.Digest]Ticket{}
	var kept []Ticket
	for _, s := range signatures {
		have, _ := pcr.Sorted(s.PCRs)
		if _, twice := tickets[s.Policy]; twice || len(kept) == maxTickets || s.Ref != token.Ref ||
			s.KeyFingerprint != key.fingerprint || !slices.Equal(have, wanted) || s.verify(key) != nil {
			continue
		}
		ticket, err := verifyInTPM(t, key, s)
		if err != nil {
			return fmt.Errorf("verify a PCR signature for later: %w", err)
		}
		tickets[s.Policy] = Ticket{s.Policy, ticket.Digest.Buffer}
		kept = append(kept, tickets[s.Policy])
	}
	token.Tickets = kept
	return nil
}

// ticket is the kept one for a policy, or nil.
func (t Token) ticket(policy pcr.Digest) *tpm2.TPMTTKVerified {
	for _, k := range t.Tickets {
		if k.Policy == policy {
			return &tpm2.TPMTTKVerified{Tag: tpm2.TPMSTVerified, Hierarchy: tpm2.TPMRHOwner, Digest: tpm2.TPM2BDigest{Buffer: k.MAC}}
		}
	}
	return nil
}
