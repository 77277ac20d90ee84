package attest

import (
	"testing"
)

// TestGood is a box that is as it should be: at first contact, and later.
func TestGood(t *testing.T) {
	r := newRig(t, "secure")
	r.enrol(t)
	c := r.challenge(t)
	v := Verify(r.answer(t, c), c, &r.policy)
	for i, check := range v.Checks {
		if check.Name != Checks()[i] {
			t.Errorf("check %d is %s, not %s", i, check.Name, Checks()[i])
		}
		t.Logf("%-10s %-7s %s %s", check.Name, check.Result, check.Text, check.Event)
		if check.Result != Pass {
			t.Errorf("%s: %s", check.Name, check.Result)
		}
	}
	if !v.Good() || len(v.Checks) != len(Checks()) || v.Release != "ledger 1.0.0" {
		t.Errorf("verdict %s of %d checks, release %q", v.Result, len(v.Checks), v.Release)
	}
	if n := r.tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}
