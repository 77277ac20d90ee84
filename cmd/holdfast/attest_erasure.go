package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/attest/erasure"
)

func attestErasure(ctx context.Context, c *cli, args []string) error {
	f := c.flags("attest erasure", "PROOF", `Judge PROOF, which a box wrote when its data was erased (holdfast-agent decommission or
reset --factory, each with --proof): that its TPM signed it, under an approved release,
with the recorded data volumes open, and that all their keys were overwritten and read
back. What is judged, and by what, is as for attest verify. Without --challenge, when
that was, only the box says. Exit code 3: it is not good. 5: no TPM signed it.

example: holdfast attest erasure proof.json --challenge sent.json --roots tpm-roots/ \
  --repo repo --keys keys --records boxes/`)
	var o attestOptions
	o.judging(f)
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	policy, err := o.policy(ctx, c)
	if err != nil {
		return err
	}
	sent, err := readChallenges(o.challenges)
	if err != nil {
		return err
	}
	b, err := readSmall(rest[0], erasure.MaxBytes)
	if err != nil {
		return err
	}
	proof, err := erasure.Parse(b)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errVerification, rest[0], err)
	}
	result := &erased{Type: "erasure", File: rest[0], Proof: *proof, device: proof.Device()}
	result.Proof.Challenge, result.Proof.Answer = nil, nil
	judged := result.judge(proof, sent, &o, policy)
	if judged != nil && !errors.Is(judged, erasure.ErrUnsigned) {
		return fmt.Errorf("%s: %w", rest[0], judged)
	}
	if err := show(c, result, o.asJSON); err != nil {
		return err
	}
	if judged == nil && !result.Verdict.Good() {
		return fmt.Errorf("%w: %s is not good", errVerification, rest[0])
	}
	return judged
}

// erased is what erasure tells.
type erased struct {
	Type    string          `json:"type"` // "erasure"
	File    string          `json:"file"`
	Proof   erasure.Proof   `json:"proof"`             // without its signature
	Verdict *attest.Verdict `json:"verdict,omitempty"` // none where nobody signed

	device string
}

// judge finds what is recorded of the box, and which of the challenges it was given.
func (r *erased) judge(p *erasure.Proof, sent []*attest.Challenge, o *attestOptions, policy *attest.Policy) error {
	a, err := p.Signature()
	if err != nil {
		return err
	}
	own := *policy
	if own.Known, _, err = recordsIn(o.records).Find(a); err != nil {
		return err
	}
	var challenge *attest.Challenge
	for _, c := range sent {
		if challenge == nil || a.Answers(c) {
			challenge = c
		}
	}
	v, err := p.Verify(challenge, &own)
	if err != nil {
		return hinted{err, "give the one that was sent with --challenge"}
	}
	r.Verdict = &v
	return nil
}

func (r *erased) wrong() []string { return r.Proof.Problems }

func (r *erased) print(s *sheet) {
	result := "UNSIGNED"
	if r.Verdict != nil {
		result = strings.ToUpper(string(r.Verdict.Result))
	}
	p := r.Proof
	s.line(fmt.Sprintf("%s: %s of %s: %s", r.File, p.What, r.device, result))
	s.fact("time", p.Time.Format("2006-01-02 15:04:05 UTC")+", by the box's clock, under release "+p.Version)
	for _, v := range p.Volumes {
		s.fact("volume", v.Name, v.UUID, fmt.Sprintf("%d keyslots, %d bytes overwritten and read back", v.Keyslots, v.AreaBytes))
	}
	if t := p.TPM; t != nil {
		s.fact("tpm", "counter", t.Counter)
		s.fact("", "storage key", t.StorageKey)
	}
	if p.Slots != "" {
		s.fact("slots", p.Slots)
	}
	if p.Unsigned != "" {
		s.fact("unsigned", p.Unsigned)
	}
	if r.Verdict != nil {
		s.checks(*r.Verdict, false)
	}
}
