package tpmtools

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

var today = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// answer is a box's, whose TPM has measured a recorded boot of OVMF.
func answer(t testing.TB) (*attest.Answer, *attest.Challenge) {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "..", "pcr", "testdata", "secure.json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var series []struct{ Log []byte }
	if err := json.NewDecoder(z).Decode(&series); err != nil {
		t.Fatal(err)
	}
	tpm := sealtest.Start(t)
	tpm.Measure(series[0].Log)
	in := attest.Input{EventLog: series[0].Log, Time: today, Statement: attest.Statement{Product: "ledger", Release: "1.0.0", Measurements: []attest.Measurement{
		attest.MeasuredText(11, "enter-initrd"), attest.MeasuredBytes(15, []byte("macs"), "data volumes"), attest.MeasuredText(11, "leave-initrd")}}}
	tpm.Extend(11, "enter-initrd")
	tpm.Extend(15, "macs")
	tpm.Extend(11, "leave-initrd")
	if in.Challenge, err = attest.NewChallenge(today); err != nil {
		t.Fatal(err)
	}
	a, err := attest.Attest(tpm, in)
	if err != nil {
		t.Fatal(err)
	}
	return a, in.Challenge
}

// buildJudge builds go-tpm-tools' and go-attestation's verifiers.
func buildJudge(t *testing.T) (program string) {
	t.Helper()
	program = filepath.Join(t.TempDir(), "judge")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir = filepath.Join("..", "judge")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the judge: %v\n%s", err, out)
	}
	return program
}

// judge runs them.
func judge(t *testing.T, program string, message, nonce []byte) (o struct {
	SecureBoot bool `json:"secure_boot"`
	Events     int
	AKPub      string `json:"ak_pub"`
	Same       bool
}, err error) {
	t.Helper()
	run := exec.Command(program, hex.EncodeToString(nonce))
	run.Stdin = bytes.NewReader(message)
	var said bytes.Buffer
	run.Stderr = &said
	out, err := run.Output()
	if err != nil {
		return o, errors.New(said.String())
	}
	return o, json.Unmarshal(out, &o)
}

// TestJudged: go-tpm-tools' server verifies a box's answer, replays its log and sees
// that Secure Boot is on; go-attestation replays the log too. Neither takes it with
// another nonce or an edited log.
func TestJudged(t *testing.T) {
	a, _ := answer(t)
	message, err := Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	nonce, err := Nonce(a)
	if err != nil {
		t.Fatal(err)
	}
	program := buildJudge(t)
	o, err := judge(t, program, message, nonce)
	if err != nil {
		t.Fatal(err)
	}
	if !o.SecureBoot || !o.Same || o.AKPub != hex.EncodeToString(a.AKPublic) || o.Events < 30 {
		t.Errorf("the judge says %+v", o)
	}
	if _, err := judge(t, program, message, make([]byte, 32)); err == nil {
		t.Error("the judge takes another nonce")
	}
	edited := *a
	log, err := pcr.ParseLog(a.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	log.Events[6].Digests[1].Digest[0] ^= 1 // of SHA-256
	edited.EventLog = log.Marshal()
	message, err = Marshal(&edited)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := judge(t, program, message, nonce); err == nil {
		t.Error("the judge takes an edited log")
	}
}

// TestRoundTrip: what go-tpm-tools would read is what the box answered, but for what the
// message has no place for.
func TestRoundTrip(t *testing.T) {
	a, c := answer(t)
	message, err := Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	back, err := Parse(message)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(back.Quote, a.Quote) || !bytes.Equal(back.Signature, a.Signature) || !bytes.Equal(back.Registers, a.Registers) || !bytes.Equal(back.AKPublic, a.AKPublic) {
		t.Errorf("got back %+v", back)
	}
	again, err := Marshal(back)
	if err != nil || !bytes.Equal(again, message) {
		t.Errorf("marshal(parse(b)) != b: %v", err)
	}
	// The quote is over the statement too, which is not there any more.
	v := attest.Verify(back, c, &attest.Policy{Now: today, SoftwareTPM: true})
	for name, want := range map[string]attest.Result{attest.CheckChallenge: attest.Fail, attest.CheckSignature: attest.Pass,
		attest.CheckRegisters: attest.Pass, attest.CheckIdentity: attest.Unknown} {
		if got := v.Of(name); got.Result != want {
			t.Errorf("want %s: %+v", want, got)
		}
	}
}

// TestTheirClient: an attestation as gotpm makes one, over all registers and the nonce
// alone, is verified as far as it goes.
func TestTheirClient(t *testing.T) {
	a, c := answer(t)
	tpm := sealtest.Start(t)
	tpm.Measure(a.EventLog)
	tpm.Extend(11, "enter-initrd")
	tpm.Extend(11, "leave-initrd")
	theirs := gotpm(t, tpm, c.Nonce)
	theirs.EventLog = a.EventLog
	message, err := Marshal(theirs)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := Parse(message)
	if err != nil {
		t.Fatal(err)
	}
	v := attest.Verify(parsed, c, &attest.Policy{Now: today, SoftwareTPM: true})
	for _, name := range []string{attest.CheckChallenge, attest.CheckSignature, attest.CheckSelection, attest.CheckRegisters, attest.CheckLog, attest.CheckSecureBoot} {
		if got := v.Of(name); got.Result != attest.Pass {
			t.Errorf("%+v", got)
		}
	}
	if v.Good() || v.Of(attest.CheckIdentity).Result != attest.Unknown || v.Of(attest.CheckAK).Result != attest.Unknown {
		t.Errorf("%+v", v)
	}
}

// gotpm is the quote of go-tpm-tools' client: an AK of its template, all registers.
func gotpm(t *testing.T, tpm *sealtest.TPM, nonce []byte) *attest.Answer {
	t.Helper()
	ak, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, Restricted: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256, Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})}}),
	})}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	rsp, err := tpm2.Quote{SignHandle: tpm2.AuthHandle{Handle: ak.ObjectHandle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)}, QualifyingData: tpm2.TPM2BData{Buffer: nonce},
		InScheme:  tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0xff, 0xff}}}}}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	a := &attest.Answer{AKPublic: ak.OutPublic.Bytes(), Quote: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}
	for i := range pcr.Count {
		r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(uint(i))}}}}.Execute(tpm)
		if err != nil {
			t.Fatal(err)
		}
		a.Registers = append(a.Registers, r.PCRValues.Digests[0].Buffer...)
	}
	return a
}

// FuzzParse: what is read once is written and read the same.
func FuzzParse(f *testing.F) {
	a, _ := answer(f)
	message, err := Marshal(a)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(message)
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := Parse(b)
		if err != nil {
			if !errors.Is(err, attest.ErrMalformed) {
				t.Error(err)
			}
			return
		}
		once, err := Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(once)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := Marshal(again); err != nil || !bytes.Equal(once, twice) {
			t.Errorf("marshal(parse(marshal(a))) != marshal(a): %v", err)
		}
	})
}
