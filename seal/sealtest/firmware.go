package sealtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Firmware is what a UEFI firmware, a boot loader and systemd's stub measure in one
// boot, as far as attestation looks at it.
type Firmware struct {
	SecureBoot bool
	// Variables are the contents of PK, KEK, db and dbx.
	Variables map[string][]byte
	// Authority is the entry of db that verified the programs: owner and certificate.
	Authority []byte
	// Programs are Authenticode digests, in the order in which they are started.
	Programs []pcr.Digest
	// UKI is what the stub measures into PCR 11.
	UKI []pcr.Measured
}

// guidGlobal is EFI_GLOBAL_VARIABLE, as it is stored. No test looks at it.
var guidGlobal = []byte{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}

// Log is the event log, crypto-agile, with SHA-256 alone.
func (f Firmware) Log() []byte {
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0)
	log := pcr.Log{Class: pcr.CryptoAgile, Header: &pcr.Event{Type: pcr.EventNoAction, Digests: []pcr.TaggedDigest{{Alg: pcr.SHA1, Digest: make([]byte, 20)}}, Data: spec}}
	add := func(index int, kind pcr.EventType, data []byte, d pcr.Digest) {
		log.Events = append(log.Events, pcr.Event{PCR: uint32(index), Type: kind, Data: data, Digests: []pcr.TaggedDigest{{Alg: pcr.SHA256, Digest: d[:]}}})
	}
	plain := func(index int, kind pcr.EventType, data []byte) { add(index, kind, data, sha256.Sum256(data)) }
	plain(0, pcr.EventSCRTMVersion, []byte("1.0"))
	add(0, pcr.EventFirmwareBlob2, []byte("volume"), sha256.Sum256([]byte("firmware code")))
	state := []byte{0}
	if f.SecureBoot {
		state[0] = 1
	}
	plain(7, pcr.EventVariableDriverConfig, variableData("SecureBoot", state))
	for _, name := range []string{"PK", "KEK", "db", "dbx"} {
		plain(7, pcr.EventVariableDriverConfig, variableData(name, f.Variables[name]))
	}
	for i := range 8 {
		plain(i, pcr.EventSeparator, make([]byte, 4))
	}
	if f.SecureBoot {
		plain(7, pcr.EventVariableAuthority, variableData("db", f.Authority))
	}
	plain(4, pcr.EventEFIAction, []byte("Calling EFI Application from Boot Option"))
	for _, p := range f.Programs {
		add(4, pcr.EventBootServicesApp, make([]byte, 32), p)
	}
	for _, s := range f.UKI {
		name := append([]byte(s.Name), 0)
		add(11, pcr.EventIPL, name, sha256.Sum256(name))
		add(11, pcr.EventIPL, name, s.SHA256)
	}
	return log.Marshal()
}

// variableData is a UEFI_VARIABLE_DATA. PFP §10.2.6.
func variableData(name string, content []byte) []byte {
	b := append([]byte{}, guidGlobal...)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(name)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(content)))
	for _, c := range []byte(name) {
		b = append(b, c, 0)
	}
	return append(b, content...)
}

// Measure extends what a log says into the SHA-256 bank.
func (t *TPM) Measure(log []byte) {
	t.tb.Helper()
	l, err := pcr.ParseLog(log)
	if err != nil {
		t.tb.Fatal(err)
	}
	for _, e := range l.Events {
		if d, ok := e.SHA256(); ok && e.Type != pcr.EventNoAction {
			t.ExtendDigest(int(e.PCR), d)
		}
	}
}

// ExtendDigest extends a register of the SHA-256 bank.
func (t *TPM) ExtendDigest(index int, d pcr.Digest) {
	t.tb.Helper()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
	}.Execute(t)
	if err != nil {
		t.tb.Fatalf("extend PCR %d: %v", index, err)
	}
}

// EK is the public half of the TPM's endorsement key of a template.
func (t *TPM) EK(template tpm2.TPMTPublic) crypto.PublicKey {
	t.tb.Helper()
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(template),
	}.Execute(t)
	if err != nil {
		t.tb.Fatalf("make the endorsement key: %v", err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}).Execute(t); err != nil {
		t.tb.Fatal(err)
	}
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		t.tb.Fatal(err)
	}
	key, err := tpm2.Pub(*public)
	if err != nil {
		t.tb.Fatal(err)
	}
	return key
}

// WriteNV makes an NV index that anybody can read, as the TPM's maker does for
// certificates.
func (t *TPM) WriteNV(index uint32, content []byte) {
	t.tb.Helper()
	public := tpm2.TPMSNVPublic{NVIndex: tpm2.TPMHandle(index), NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(content)),
		Attributes: tpm2.TPMANV{OwnerWrite: true, AuthRead: true, OwnerRead: true, NoDA: true}}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(public)}).Execute(t); err != nil {
		t.tb.Fatalf("make NV index 0x%08x: %v", index, err)
	}
	for at := 0; at < len(content); at += 512 {
		name, err := tpm2.NVName(&public)
		if err != nil {
			t.tb.Fatal(err)
		}
		_, err = tpm2.NVWrite{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: public.NVIndex, Name: *name},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: content[at:min(at+512, len(content))]}, Offset: uint16(at)}.Execute(t)
		if err != nil {
			t.tb.Fatalf("write NV index 0x%08x at %d: %v", index, at, err)
		}
		public.Attributes.Written = true
	}
}

// RemoveNV frees an NV index.
func (t *TPM) RemoveNV(index uint32) {
	t.tb.Helper()
	rsp, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(t)
	if err != nil {
		t.tb.Fatalf("find NV index 0x%08x: %v", index, err)
	}
	_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: rsp.NVName}}.Execute(t)
	if err != nil {
		t.tb.Fatalf("remove NV index 0x%08x: %v", index, err)
	}
}

// Manufacturer certifies endorsement keys.
type Manufacturer struct {
	Key  *ecdsa.PrivateKey
	Cert *x509.Certificate
	tb   testing.TB
}

// NewManufacturer makes one, whose root is valid from five years before now.
func NewManufacturer(tb testing.TB, name string, now time.Time) Manufacturer {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: now.AddDate(-5, 0, 0),
		NotAfter: now.AddDate(20, 0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return Manufacturer{key, cert, tb}
}

// Certify makes an EK certificate as manufacturers do: no subject, the TPM in a
// critical alternative name. id is the vendor's ("id:49465800"). TCG EK Credential
// Profile 2.5 §3.
func (m Manufacturer) Certify(ek crypto.PublicKey, id string) []byte {
	m.tb.Helper()
	marshal := func(v any) []byte {
		b, err := asn1.Marshal(v)
		if err != nil {
			m.tb.Fatal(err)
		}
		return b
	}
	attribute := func(last int, text string) pkix.RelativeDistinguishedNameSET {
		return pkix.RelativeDistinguishedNameSET{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, last}, Value: text}}
	}
	name := marshal(pkix.RDNSequence{attribute(1, id), attribute(2, "SLB 9672"), attribute(3, "id:000F0006")})
	names := marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: m.Cert.NotBefore.AddDate(1, 0, 0), NotAfter: m.Cert.NotAfter.AddDate(-1, 0, 0),
		KeyUsage: x509.KeyUsageKeyEncipherment, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: names}}}
	der, err := x509.CreateCertificate(rand.Reader, template, m.Cert, ek, m.Key)
	if err != nil {
		m.tb.Fatal(fmt.Errorf("certify an endorsement key: %w", err))
	}
	return der
}
