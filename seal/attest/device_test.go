package attest

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// TestRSA is a TPM with an RSA endorsement key, and one without ECC.
func TestRSA(t *testing.T) {
	r := newRig(t, "secure")
	r.tpm.RemoveNV(eccIndex)
	r.certify(r.maker, tpm2.RSAEKTemplate, "id:49424D00", rsaIndex)
	r.input.RSA = true
	r.enrol(t)
	c := r.challenge(t)
	a := r.answer(t, c)
	if v := Verify(a, c, &r.policy); !v.Good() {
		t.Errorf("%+v", v)
	}
	p, err := parsePublic(a.AKPublic)
	if err != nil || p.Type != tpm2.TPMAlgRSA {
		t.Errorf("the AK is of type %v: %v", p.Type, err)
	}
	if n := r.tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// TestPersistentEK: an endorsement key that is kept in the TPM is used, and stays.
func TestPersistentEK(t *testing.T) {
	r := newRig(t, "secure")
	k, err := makePrimary(r.tpm, tpm2.ECCEKTemplate)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: tpm2.NamedHandle{Handle: k.handle, Name: tpm2.TPM2BName{Buffer: k.name}}, PersistentHandle: 0x81010002}.Execute(r.tpm)
	if err != nil {
		t.Fatal(err)
	}
	k.flush(r.tpm)
	r.enrol(t)
	r.enrol(t)
	found, err := findEK(r.tpm, k.public)
	if err != nil || !found.persistent {
		t.Errorf("found %+v: %v", found, err)
	}
}

// TestNoCertificate: such a TPM is known from first contact on, and only then good.
func TestNoCertificate(t *testing.T) {
	r := newRig(t, "secure")
	r.tpm.RemoveNV(eccIndex)
	credential, err := NewCredential(r.answer(t, r.challenge(t)))
	if err != nil {
		t.Fatal(err)
	}
	c := r.challenge(t, credential)
	a := r.answer(t, c)
	r.policy.Accept = FirstContact()
	v := Verify(a, c, &r.policy)
	if v.Good() || v.Of(CheckEK).Result != Unknown {
		t.Errorf("first contact: %+v", v)
	}
	r.policy.Accept = append(r.policy.Accept, CheckEK) // as in the vendor's own factory
	v = Verify(a, c, &r.policy)
	if r.policy.Known, err = NewRecord(a, v, nil, today); err != nil {
		t.Fatal(err)
	}
	r.policy.Accept = nil
	c = r.challenge(t)
	if v := Verify(r.answer(t, c), c, &r.policy); !v.Good() {
		t.Errorf("later: %+v", v)
	}
}

// TestIssuersInTPM: the certificates of issuers that the TPM keeps are found and used.
func TestIssuersInTPM(t *testing.T) {
	r := newRig(t, "secure")
	r.tpm.WriteNV(0x01c00100, bytes.Repeat(r.maker.Cert.Raw, 2))
	c := r.challenge(t)
	a := r.answer(t, c)
	if len(a.Certificates) != 3 || !bytes.Equal(a.Certificates[1], r.maker.Cert.Raw) || !bytes.Equal(a.Certificates[2], r.maker.Cert.Raw) {
		t.Errorf("%d certificates", len(a.Certificates))
	}
	if v := Verify(a, c, &r.policy); v.Of(CheckEK).Result != Pass {
		t.Errorf("%+v", v.Of(CheckEK))
	}
}

// TestBusyRegister: something measures between reading and signing, once or always.
func TestBusyRegister(t *testing.T) {
	r := newRig(t, "secure")
	for _, times := range []int{1, 1000} {
		busy := &busyTPM{rig: r, t: t, times: times}
		in := r.input
		in.Challenge = r.challenge(t)
		_, err := Attest(busy, in)
		if times == 1 && err != nil || times > 1 && (err == nil || !strings.Contains(err.Error(), "all the time")) {
			t.Errorf("%d times: %v", times, err)
		}
	}
}

type busyTPM struct {
	*rig
	t     *testing.T
	times int
}

func (b *busyTPM) Send(command []byte) ([]byte, error) {
	if len(command) > 10 && command[9] == 0x58 && command[8] == 0x01 && b.times > 0 { // TPM_CC_Quote
		b.times--
		b.tpm.Extend(9, "something")
	}
	return b.tpm.Send(command)
}

// TestMalformed: documents that are refused, by name.
func TestMalformed(t *testing.T) {
	a, c, _ := sample(t)
	good := a.Marshal()
	for name, b := range map[string][]byte{
		"empty":            nil,
		"other magic":      append([]byte("holdfast-answer1"), good[16:]...),
		"other format":     append(append([]byte(answerMagic), 0, 0, 0, 2), good[20:]...),
		"cut":              good[:len(good)-1],
		"tail":             append(bytes.Clone(good), 0),
		"length too large": append(append([]byte(answerMagic), 0, 0, 0, 1), 0xff, 0xff, 0xff, 0xff),
		"journal changed":  bytes.Replace(good, []byte("\x00\x00\x00\x02{}"), []byte("\x00\x00\x00\x02[]"), 1),
		"unknown field":    bytes.Replace(good, []byte(`"product"`), []byte(`"Product"`), 1),
	} {
		if _, err := ParseAnswer(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{
		"other type":  bytes.Replace(c.Marshal(), []byte("holdfast-challenge"), []byte("holdfast-answer"), 1),
		"short nonce": (&Challenge{Type: challengeType, Format: 1, Nonce: []byte{1}, Time: today}).Marshal(),
		"reformatted": bytes.ReplaceAll(c.Marshal(), []byte("  "), []byte(" ")),
	} {
		if _, err := ParseChallenge(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("challenge, %s: %v", name, err)
		}
	}
	two := Credential{EK: make([]byte, 32), AK: make([]byte, nameBytes), Blob: []byte{1}, Seed: []byte{2}, Proof: make([]byte, 32)}
	if _, err := NewChallenge(today, two, two); err == nil {
		t.Error("two credentials for one key")
	}
}

// TestVerifyAll: verdicts come in order, damaged answers among them.
func TestVerifyAll(t *testing.T) {
	a, c, p := sample(t)
	good := a.Marshal()
	var items []Item
	for i := range 1000 {
		item := Item{good, c, p.Known}
		if i%10 == 3 {
			item.Answer = good[:i] // cut
		}
		items = append(items, item)
	}
	for i, v := range VerifyAll(items, &p) {
		if v.Good() != (i%10 != 3) {
			t.Errorf("item %d: %+v", i, v)
		}
	}
	if len(VerifyAll(nil, &p)) != 0 {
		t.Error("verdicts on nothing")
	}
}

// processorTime is what this process has used, in nanoseconds: on a busy machine the
// wall clock measures the others.
func processorTime(b *testing.B) int64 {
	b.Helper()
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		b.Fatal(err)
	}
	return used.Utime.Nano() + used.Stime.Nano()
}

// BenchmarkVerify is one verification from the bytes of a file, with the EK's chain
// verified before.
func BenchmarkVerify(b *testing.B) {
	a, c, p := sample(b)
	item := Item{a.Marshal(), c, p.Known}
	b.ReportAllocs()
	began := processorTime(b)
	for b.Loop() {
		if v := item.verify(&p); !v.Good() {
			b.Fatal(v)
		}
	}
	b.ReportMetric(float64(len(item.Answer)), "B/answer")
	b.ReportMetric(float64(processorTime(b)-began)/float64(b.N), "cpu-ns/op")
}

// BenchmarkVerifyPC is the same with the event log of a PC with the keys and the
// revocations of Microsoft.
func BenchmarkVerifyPC(b *testing.B) {
	c, err := NewChallenge(today)
	if err != nil {
		b.Fatal(err)
	}
	_, _, p := sample(b)
	item := Item{ofLog(b, machineLogs(b)["rhel8-uefi.bin"], c).Marshal(), c, p.Known}
	b.ReportAllocs()
	began := processorTime(b)
	for b.Loop() {
		if v := item.verify(&p); v.Of(CheckSignature).Result != Pass || v.Of(CheckLog).Result != Unknown {
			b.Fatal(v)
		}
	}
	b.ReportMetric(float64(len(item.Answer)), "B/answer")
	b.ReportMetric(float64(processorTime(b)-began)/float64(b.N), "cpu-ns/op")
}

// BenchmarkAttest is the device's part, on a swtpm.
func BenchmarkAttest(b *testing.B) {
	r := newRig(b, "secure")
	r.input.Challenge = r.challenge(b)
	for b.Loop() {
		if _, err := Attest(r.tpm, r.input); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFirstContact is the device's part where it has to make its RSA EK and opens
// a credential.
func BenchmarkFirstContact(b *testing.B) {
	r := newRig(b, "secure")
	r.tpm.RemoveNV(eccIndex)
	r.certify(r.maker, tpm2.RSAEKTemplate, "id:49424D00", rsaIndex)
	credential, err := NewCredential(r.answer(b, r.challenge(b)))
	if err != nil {
		b.Fatal(err)
	}
	r.input.Challenge = r.challenge(b, credential)
	for b.Loop() {
		if a, err := Attest(r.tpm, r.input); err != nil || a.Statement.Activation == nil {
			b.Fatal(err)
		}
	}
}

// ExampleVerify is the vendor's side, here with nothing to judge by.
func ExampleVerify() {
	c, err := NewChallenge(time.Unix(1795219200, 0))
	if err != nil {
		panic(err)
	}
	v := Verify(&Answer{}, c, &Policy{Now: c.Time})
	fmt.Println(v.Result, v.Of(CheckFreshness).Result, v.Of(CheckEK).Text)
	// Output: fail pass the box shows no endorsement key
}
