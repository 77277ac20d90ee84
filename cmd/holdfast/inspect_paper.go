package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/escrow"
)

// What travels beside images: bundles, escrows and answers. They have verbs of their own,
// which need more than the file to judge it.

// whole reads a small file.
func whole(src source, limit int64) ([]byte, error) {
	if src.Size() > limit {
		return nil, fmt.Errorf("%d bytes are more than the %d of one", src.Size(), limit)
	}
	return io.ReadAll(io.NewSectionReader(src, 0, src.Size()))
}

// inspectEscrow is that of the verb escrow.
func inspectEscrow(src source) (artefact, error) {
	text, err := whole(src, escrow.MaxBytes)
	if err != nil {
		return nil, err
	}
	e, err := escrow.Parse(text)
	if err != nil {
		return nil, err
	}
	return factsOf(e), nil
}

// answerFacts is what an answer claims. Nothing of it is verified.
type answerFacts struct {
	Type    string     `json:"type"` // "answer"
	Device  string     `json:"device"`
	Product string     `json:"product,omitempty"`
	Release string     `json:"release,omitempty"`
	Box     string     `json:"box,omitempty"`
	Time    *time.Time `json:"time,omitempty"`
	Files   []string   `json:"files,omitempty"`
}

func (a *answerFacts) wrong() []string { return nil }

func (a *answerFacts) print(s *sheet) {
	s.line("a box's answer to a challenge, not judged: holdfast attest verify does that")
	s.fact("claims to be of", a.Device, a.Product, a.Release)
	if a.Time != nil {
		s.fact("claims the time", dayText(*a.Time))
	}
	s.facts("brings", a.Files...)
}

func inspectAnswer(src source) (artefact, error) {
	b, err := whole(src, attest.MaxAnswerBytes)
	if err != nil {
		return nil, err
	}
	a, err := attest.ParseAnswer(b)
	if err != nil {
		return nil, err
	}
	facts := &answerFacts{Type: "answer", Device: a.Device()}
	if st := a.Statement; st != nil {
		facts.Product, facts.Release, facts.Box, facts.Time = st.Product, st.Release, st.Box, &st.Time
	}
	for _, f := range a.Attachments {
		facts.Files = append(facts.Files, f.Name)
	}
	return facts, nil
}

func refuseBundle(source) (artefact, error) {
	return nil, hinted{errors.New("a bundle, which means nothing without the root.json that its signatures come from"),
		"holdfast verify FILE --root root.json, with that of holdfast repo root"}
}

func refuseEncrypted(source) (artefact, error) {
	return nil, hinted{errors.New("encrypted by age; what it holds is for whoever has the key"),
		"a bundle: holdfast verify FILE --root root.json --identity KEY; anything else: age -d -i KEY FILE"}
}
