package attest

import (
	"compress/gzip"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

var today = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// boot is a recorded boot of OVMF with a TPM; see seal/pcr, whose records these are.
type boot struct {
	Log     []byte
	Release pcr.Release
	Before  map[string][]byte // PK, KEK, db and dbx
}

func recorded(t testing.TB, name string, i int) boot {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "pcr", "testdata", name+".json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var series []boot
	if err := json.NewDecoder(z).Decode(&series); err != nil {
		t.Fatal(err)
	}
	return series[i]
}

// Where EK certificates are.
const (
	eccIndex = 0x01c0000a
	rsaIndex = 0x01c00002
)

// rig is a box with a TPM, and a vendor that knows it.
type rig struct {
	tpm    *sealtest.TPM
	boot   boot
	maker  sealtest.Manufacturer
	policy Policy
	input  Input
}

// newRig is a TPM in which a recorded boot was measured, up to the running system.
func newRig(t testing.TB, name string) *rig {
	t.Helper()
	r := newRigOn(t, name, sealtest.Start(t))
	r.certify(r.maker, tpm2.ECCEKTemplate, "id:49424D00", eccIndex)
	return r
}

// newRigOn is the same on a TPM whose certificates are not our business.
func newRigOn(t testing.TB, name string, tpm *sealtest.TPM) *rig {
	t.Helper()
	r := &rig{tpm: tpm, boot: recorded(t, name, 0), maker: sealtest.NewManufacturer(t, "Test Root of TPMs", today)}
	r.measure()
	roots, skipped, err := NewRoots(r.maker.Cert.Raw)
	if err != nil || len(skipped) > 0 {
		t.Fatal(err, skipped)
	}
	before := r.boot.Before
	keys, err := NewKeys(before["PK"], before["KEK"], before["db"], before["dbx"])
	if name == "open" {
		other := recorded(t, "secure", 0).Before
		keys, err = NewKeys(other["PK"], other["KEK"], other["db"], other["dbx"])
	}
	if err != nil {
		t.Fatal(err)
	}
	r.policy = Policy{Now: today, Roots: roots, Keys: keys, SoftwareTPM: true, References: []Reference{{
		Product: "ledger", Version: "1.0.0", Boot: r.boot.Release, RootHash: "aa55", Services: map[string]string{"web": "sha256:1234"},
	}}}
	r.input = Input{EventLog: r.boot.Log, Time: today, Statement: Statement{
		Product: "ledger", Release: "1.0.0", Box: "0b7d9f0e-0000-4000-8000-000000000001",
		Slots:    []Slot{{Name: "a", Release: "1.0.0", RootHash: "aa55", Running: true, State: "good"}, {Name: "b"}},
		Volumes:  []Volume{{Name: "data", UUID: "0b7d9f0e-0000-4000-8000-000000000001", Method: "tpm"}},
		Services: []Service{{Name: "web", Digest: "sha256:1234", State: "running"}},
		Measurements: []Measurement{MeasuredText(11, "enter-initrd"), MeasuredBytes(15, []byte("macs"), "data volumes"),
			MeasuredText(11, "leave-initrd")},
	}, Attachments: []Attachment{{"journal.json", []byte("{}")}}}
	return r
}

// measure extends what the firmware logged, and the system's own.
func (r *rig) measure() {
	r.tpm.Measure(r.boot.Log)
	r.tpm.Extend(11, "enter-initrd")
	r.tpm.Extend(15, "macs")
	r.tpm.Extend(11, "leave-initrd")
}

// certify gives the TPM a certificate, with padding behind it as some makers have it.
func (r *rig) certify(m sealtest.Manufacturer, template tpm2.TPMTPublic, id string, index uint32) {
	r.tpm.WriteNV(index, append(m.Certify(r.tpm.EK(template), id), 0xff, 0xff, 0xff))
}

func (r *rig) challenge(t testing.TB, credentials ...Credential) *Challenge {
	t.Helper()
	c, err := NewChallenge(today.Add(-time.Hour), credentials...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// answer goes through the files, as it does in the field.
func (r *rig) answer(t testing.TB, c *Challenge) *Answer {
	t.Helper()
	asked, err := ParseChallenge(c.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	in := r.input
	in.Challenge = asked
	a, err := Attest(r.tpm, in)
	if err != nil {
		t.Fatal(err)
	}
	if a, err = ParseAnswer(a.Marshal()); err != nil {
		t.Fatal(err)
	}
	return a
}

// enrol is a first contact: afterwards the policy knows the box.
func (r *rig) enrol(t testing.TB) {
	t.Helper()
	first := r.challenge(t)
	credential, err := NewCredential(r.answer(t, first))
	if err != nil {
		t.Fatal(err)
	}
	second := r.challenge(t, credential)
	a := r.answer(t, second)
	p := r.policy
	p.Accept = FirstContact()
	v := Verify(a, second, &p)
	if !v.Good() {
		t.Fatalf("first contact: %+v", v)
	}
	record, err := NewRecord(a, v, nil, today)
	if err != nil {
		t.Fatal(err)
	}
	if r.policy.Known, err = ParseRecord(record.Marshal()); err != nil {
		t.Fatal(err)
	}
}
