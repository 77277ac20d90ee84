package attest

import (
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// TestEndorse: a TPM signs a document that nobody asked for, and nothing else passes for that.
func TestEndorse(t *testing.T) {
	tpm := sealtest.Start(t)
	document := []byte("an escrow")
	e, err := Endorse(tpm, document)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Verify(document); err != nil {
		t.Error(err)
	}
	again, err := Endorse(tpm, []byte("another"))
	if err != nil || again.Key() != e.Key() {
		t.Fatalf("%v, keys %s and %s", err, e.Key(), again.Key())
	}
	r := &Record{Box: "b", AK: e.Key()}
	if err := e.By(r); err != nil {
		t.Error(err)
	}
	if tpm.Handles() != 0 {
		t.Errorf("%d handles are left in the TPM", tpm.Handles())
	}

	tpm.Swap()
	other, err := Endorse(tpm, document)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Verify(document); err != nil {
		t.Error(err)
	}
	if err := other.By(r); err == nil || !strings.Contains(err.Error(), "another TPM signed") {
		t.Errorf("another TPM: %v", err)
	}
	c, err := NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := Attest(tpm, Input{Challenge: c, Time: today})
	if err != nil {
		t.Fatal(err)
	}
	flipped := func(b []byte, i int) []byte { b = slices.Clone(b); b[i] ^= 1; return b }
	for name, bad := range map[string]Endorsement{
		"of another document": *again,
		"by another key":      {other.AKPublic, e.Quote, e.Signature},
		"an answer's quote":   {answer.AKPublic, answer.Quote, answer.Signature},
		"not restricted":      {flipped(e.AKPublic, 5), e.Quote, e.Signature}, // an attribute
		"quote":               {e.AKPublic, flipped(e.Quote, 40), e.Signature},
		"signature":           {e.AKPublic, e.Quote, flipped(e.Signature, len(e.Signature)-1)},
		"long":                {e.AKPublic, make([]byte, maxStructureBytes+1), e.Signature},
		"nothing":             {},
	} {
		if err := bad.Verify(document); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
