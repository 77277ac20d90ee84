package attest

import (
	"bytes"
	"crypto"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// sample is an answer of a good box, and what it is judged by.
func sample(t testing.TB) (*Answer, *Challenge, Policy) {
	t.Helper()
	r := newRig(t, "secure")
	r.enrol(t)
	c := r.challenge(t)
	return r.answer(t, c), c, r.policy
}

// FuzzAnswer: what is read is written in the same bytes, and is judged without a panic;
// nothing but the sample itself is good.
func FuzzAnswer(f *testing.F) {
	a, c, policy := sample(f)
	good := a.Marshal()
	f.Add(good)
	small := *a
	small.EventLog, small.Certificates = nil, nil
	f.Add(small.Marshal())
	f.Add([]byte(answerMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseAnswer(b)
		if err != nil {
			return
		}
		if !bytes.Equal(a.Marshal(), b) {
			t.Error("marshal(parse(b)) != b")
		}
		v := Verify(a, c, &policy)
		if v.Good() && !bytes.Equal(a.Quote, parsed(t, good).Quote) || len(v.Checks) != len(Checks()) {
			t.Errorf("%d checks, %s", len(v.Checks), v.Result)
		}
	})
}

func parsed(t *testing.T, b []byte) *Answer {
	t.Helper()
	a, err := ParseAnswer(b)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func FuzzChallenge(f *testing.F) {
	c, err := NewChallenge(today, Credential{EK: make([]byte, 32), AK: make([]byte, nameBytes), Blob: []byte{1}, Seed: []byte{2}, Proof: make([]byte, 32)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(c.Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := ParseChallenge(b); err == nil && !bytes.Equal(c.Marshal(), b) {
			t.Error("marshal(parse(b)) != b")
		}
	})
}

func FuzzStatement(f *testing.F) {
	a, _, _ := sample(f)
	f.Add(a.Statement.marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStatement(b); err == nil && !bytes.Equal(s.marshal(), b) {
			t.Error("marshal(parse(b)) != b")
		}
	})
}

func FuzzRecord(f *testing.F) {
	_, _, p := sample(f)
	f.Add(p.Known.Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ParseRecord(b); err == nil && !bytes.Equal(r.Marshal(), b) {
			t.Error("marshal(parse(b)) != b")
		}
	})
}

// FuzzQuote: also, go-tpm reads the same fields.
func FuzzQuote(f *testing.F) {
	a, _, _ := sample(f)
	f.Add(a.Quote)
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuote(b)
		if err != nil {
			return
		}
		if !bytes.Equal(q.marshal(), b) {
			t.Error("marshal(parse(b)) != b")
		}
		theirs, err := tpm2.Unmarshal[tpm2.TPMSAttest](b)
		if err != nil {
			return // go-tpm limits some lengths
		}
		quoted, err := theirs.Attested.Quote()
		if err != nil || !bytes.Equal(theirs.ExtraData.Buffer, q.ExtraData) || !bytes.Equal(quoted.PCRDigest.Buffer, q.Digest) ||
			theirs.ClockInfo.ResetCount != q.ResetCount || theirs.FirmwareVersion != q.FirmwareVersion {
			t.Errorf("go-tpm reads %+v, we %+v", theirs, q)
		}
	})
}

// FuzzPublic: keys and signatures of TPMs.
func FuzzPublic(f *testing.F) {
	a, _, _ := sample(f)
	f.Add(a.AKPublic, a.Signature)
	f.Add(a.EKPublic, a.Signature)
	f.Add(tpm2.Marshal(akTemplate(tpm2.TPMAlgRSA)), a.Signature)
	f.Fuzz(func(t *testing.T, public, signature []byte) {
		p, err := parsePublic(public)
		if err != nil {
			return
		}
		if !bytes.Equal(p.marshal(), public) {
			t.Error("marshal(parse(b)) != b")
		}
		if key, err := p.key(); err == nil {
			theirs, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
			if err == nil {
				if want, err := tpm2.Pub(*theirs); err == nil && !key.(interface{ Equal(crypto.PublicKey) bool }).Equal(want) {
					t.Errorf("go-tpm reads %v, we %v", want, key)
				}
			}
			if verifySignature(key, signature, []byte("nobody signed this")) == nil {
				t.Error("a signature over something else is good")
			}
		}
	})
}

// FuzzCertificate: what a TPM has in its NV memory.
func FuzzCertificate(f *testing.F) {
	a, _, p := sample(f)
	f.Add(a.Certificates[0])
	f.Fuzz(func(t *testing.T, b []byte) {
		der := trimDER(b)
		if !bytes.Equal(trimDER(der), der) {
			t.Error("trim(trim(b)) != trim(b)")
		}
		e, err := p.Roots.verify([][]byte{b}, today)
		if err == nil && !bytes.Equal(b, a.Certificates[0]) {
			t.Errorf("another certificate is good: %+v", e)
		}
	})
}
