package attest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"regexp"
)

// The names of the files on a medium. A box looks for challenges by their prefix and
// writes its answer beside them; a vendor finds the answers by theirs.
const (
	ChallengePrefix = "holdfast-challenge-"
	AnswerPrefix    = "holdfast-answer-"
	RecordPrefix    = "holdfast-record-"
)

// FileName is "holdfast-challenge-NONCE.json", with the beginning of the nonce.
func (c *Challenge) FileName() string { return fmt.Sprintf("%s%x.json", ChallengePrefix, c.Nonce[:4]) }

// FileName is "holdfast-answer-NONCE-BOX.bin", for an answer to c: one for each box and
// challenge.
func (a *Answer) FileName(c *Challenge) string {
	return fmt.Sprintf("%s%x-%s.bin", AnswerPrefix, c.Nonce[:4], a.name())
}

// RecordName is where a vendor keeps the [Record] of the box that gave the answer:
// "holdfast-record-BOX.json". The name is as the box claims it: [Records.Find] finds the
// record of a box that claims another one.
func (a *Answer) RecordName() string {
	return RecordPrefix + a.name() + ".json"
}

// name is the box's UUID, or, where it tells none, the beginning of its EK's digest.
func (a *Answer) name() string {
	if a.Statement != nil && regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(a.Statement.Box) {
		return a.Statement.Box
	}
	sum := sha256.Sum256(a.EKPublic)
	return fmt.Sprintf("ek-%x", sum[:16])
}

// Answers says whether the quote is over this challenge, to choose among several. It
// verifies no signature.
func (a *Answer) Answers(c *Challenge) bool {
	q, err := parseQuote(a.Quote)
	if err != nil {
		return false
	}
	if a.Statement == nil {
		return bytes.Equal(q.ExtraData, c.Nonce)
	}
	want := c.qualifyingData(a.Statement.marshal())
	return bytes.Equal(q.ExtraData, want[:])
}
