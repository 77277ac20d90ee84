package attest

import (
	"compress/gzip"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"math/big"
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

// vendor is a TPM manufacturer's authority.
type vendor struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newVendor(t testing.TB, name string) vendor {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: today.AddDate(-5, 0, 0),
		NotAfter: today.AddDate(20, 0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return vendor{key, cert}
}

// certify makes an EK certificate as manufacturers do: no subject, the TPM in a
// critical alternative name.
func (v vendor) certify(t testing.TB, ek crypto.PublicKey, manufacturer string) []byte {
	t.Helper()
	attribute := func(oid asn1.ObjectIdentifier, text string) pkix.RelativeDistinguishedNameSET {
		return pkix.RelativeDistinguishedNameSET{{Type: oid, Value: text}}
	}
	name, err := asn1.Marshal(pkix.RDNSequence{attribute(oidManufacturer, manufacturer), attribute(oidModel, "SLB 9672"), attribute(oidVersion, "id:000F0006")})
	if err != nil {
		t.Fatal(err)
	}
	names, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: today.AddDate(-1, 0, 0), NotAfter: today.AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageKeyEncipherment, UnknownExtKeyUsage: []asn1.ObjectIdentifier{oidEKUsage},
		ExtraExtensions: []pkix.Extension{{Id: oidAltName, Critical: true, Value: names}}}
	der, err := x509.CreateCertificate(rand.Reader, template, v.cert, ek, v.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// rig is a box with a TPM, and a vendor that knows it.
type rig struct {
	tpm    *sealtest.TPM
	boot   boot
	maker  vendor
	policy Policy
	input  Input
}

// newRig is a TPM in which a recorded boot was measured, up to the running system.
func newRig(t testing.TB, name string) *rig {
	t.Helper()
	r := &rig{tpm: sealtest.Start(t), boot: recorded(t, name, 0), maker: newVendor(t, "Test Root of TPMs")}
	r.measure(t)
	r.install(t, r.maker.certify(t, r.ek(t, tpm2.ECCEKTemplate), "id:49424D00"), 0x01c0000a)
	roots, skipped, err := NewRoots(r.maker.cert.Raw)
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
func (r *rig) measure(t testing.TB) {
	t.Helper()
	log, err := pcr.ParseLog(r.boot.Log)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range log.Events {
		if d, ok := e.SHA256(); ok && e.Type != pcr.EventNoAction {
			r.extend(t, int(e.PCR), d)
		}
	}
	r.tpm.Extend(11, "enter-initrd")
	r.tpm.Extend(15, "macs")
	r.tpm.Extend(11, "leave-initrd")
}

func (r *rig) extend(t testing.TB, index int, d pcr.Digest) {
	t.Helper()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
	}.Execute(r.tpm)
	if err != nil {
		t.Fatal(err)
	}
}

// ek is the TPM's endorsement key of a template.
func (r *rig) ek(t testing.TB, template tpm2.TPMTPublic) crypto.PublicKey {
	t.Helper()
	k, err := makePrimary(r.tpm, template)
	if err != nil {
		t.Fatal(err)
	}
	defer k.flush(r.tpm)
	public, err := parseEK(k.public)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

// install writes an EK certificate as the TPM's maker does, with padding behind it.
func (r *rig) install(t testing.TB, der []byte, index tpm2.TPMHandle) {
	t.Helper()
	padded := append(der, 0xff, 0xff, 0xff)
	public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(padded)),
		Attributes: tpm2.TPMANV{OwnerWrite: true, AuthRead: true, OwnerRead: true, NoDA: true}}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(public)}).Execute(r.tpm); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(padded); at += 512 {
		name, err := tpm2.NVName(&public)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tpm2.NVWrite{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: index, Name: *name},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: padded[at:min(at+512, len(padded))]}, Offset: uint16(at)}.Execute(r.tpm)
		if err != nil {
			t.Fatal(err)
		}
		public.Attributes.Written = true
	}
}

// remove frees an NV index.
func (r *rig) remove(t testing.TB, index tpm2.TPMHandle) {
	t.Helper()
	rsp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(r.tpm)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NVIndex: tpm2.NamedHandle{Handle: index, Name: rsp.NVName}}.Execute(r.tpm)
	if err != nil {
		t.Fatal(err)
	}
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
