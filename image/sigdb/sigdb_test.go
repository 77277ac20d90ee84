package sigdb

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var stamp = time.Date(2026, 11, 21, 7, 9, 10, 999, time.UTC)

func pair(t testing.TB, name string) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: stamp, NotAfter: stamp.AddDate(9, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func owner() GUID { return guid("00112233-4455-6677-8899-aabbccddeeff") }

func run(t *testing.T, pkg string, argv ...string) string {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Fatalf("%s not installed: apt-get install %s", argv[0], pkg)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "TZ=UTC") // sign-efi-sig-list reads its time stamp as local time
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

func TestStructSizes(t *testing.T) {
	for _, row := range []struct {
		v    any
		want int
	}{{listHeader{}, listHeaderBytes}, {efiTime{}, efiTimeBytes}, {winCertificateGUID{}, winCertificateGUIDBytes}} {
		if got := binary.Size(row.v); got != row.want {
			t.Errorf("%T has %d bytes, want %d", row.v, got, row.want)
		}
	}
	if owner().String() != "00112233-4455-6677-8899-aabbccddeeff" || hex.EncodeToString(owner().slice()) != "33221100554477668899aabbccddeeff" {
		t.Errorf("GUID %v is %x", owner(), owner())
	}
}

func (g GUID) slice() []byte { return g[:] }

// negativeSerial is a certificate as some boards have in db: Go's parser refuses it (F25).
func negativeSerial(t testing.TB) []byte {
	_, cert := pair(t, "odd")
	b := bytes.Replace(cert.Raw, []byte{0x02, 0x01, 0x01}, []byte{0x02, 0x01, 0xff}, 1)
	if _, err := x509.ParseCertificate(b); err == nil {
		t.Fatal("a certificate with a negative serial number is read after all; the test needs another odd one")
	}
	return b
}

func TestDatabase(t *testing.T) {
	_, cert := pair(t, "vendor")
	odd := negativeSerial(t)
	d := Database{
		Certificate(cert, owner()),
		Hashes([][32]byte{{9}, {1}, {9}}, owner()),
		{Type: guid("826ca512-cf10-4ac9-b187-be01496631bd"), Header: []byte("head"), EntryBytes: 16 + 20}, // SHA-1, no entry
		{Type: TypeX509(), EntryBytes: uint32(16 + len(odd)), Entries: []Entry{{owner(), odd}}},
	}
	back, err := Parse(d.Marshal())
	if err != nil || !bytes.Equal(back.Marshal(), d.Marshal()) || len(back) != 4 {
		t.Fatalf("%d lists come back, %v", len(back), err)
	}
	if l := back[1]; len(l.Entries) != 2 || l.Entries[0].Data[0] != 1 {
		t.Errorf("hashes are neither sorted nor each there once: %v", l.Entries)
	}
	certs, err := back.Certificates()
	if len(certs) != 1 || !certs[0].Equal(cert) || err == nil || !strings.Contains(err.Error(), "list 4") {
		t.Errorf("%d certificates; passed over: %v", len(certs), err)
	}
	if !back.Covers(d[:2]) || d[:2].Covers(back) || !back.HasData(TypeX509(), odd) || back.HasData(TypeSHA256(), odd) || back.Same(d[:2]) || !back.Same(Database{d[3], d[1], d[0]}) {
		t.Error("comparison of databases")
	}
	text := strings.Join(back.Describe(), "; ")
	for _, want := range []string{`certificate "vendor"`, "2 programs", "not well-formed", "0 signatures of type 826ca512"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q does not say %q", text, want)
		}
	}
	// What comes before damage can be used.
	part, err := Parse(append(d.Marshal(), 1, 2, 3))
	if err == nil || !part.Same(d) {
		t.Errorf("with garbage behind: %d lists, %v", len(part), err)
	}
	for name, b := range map[string][]byte{
		"cut off": d.Marshal()[:50], "no room for an owner": withSize(d[:1].Marshal(), 24, 15), "a signature and a half": withSize(d[:1].Marshal(), 24, 100),
		"header beyond the end": withSize(d[:1].Marshal(), 20, 1<<31), "huge": make([]byte, MaxBytes+1),
	} {
		if got, err := Parse(b); err == nil {
			t.Errorf("%s: %d lists", name, len(got))
		}
	}
}

func withSize(b []byte, at int, n uint32) []byte {
	binary.LittleEndian.PutUint32(b[at:], n)
	return b
}

// TestJudges has efitools make the same lists and sign the same updates.
func TestJudges(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	put := func(name string, b []byte) {
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	get := func(name string) []byte {
		b, err := os.ReadFile(at(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	key, cert := pair(t, "kek")
	pk8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	put("kek.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pk8}))
	put("kek.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	loader := "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	run(t, "efitools", "hash-to-efi-sig-list", loader, at("hash.esl"))
	theirs, err := Parse(get("hash.esl"))
	if err != nil || len(theirs) != 1 || len(theirs[0].Entries) != 1 {
		t.Fatalf("hash-to-efi-sig-list: %+v, %v", theirs, err)
	}
	digest := [32]byte(theirs[0].Entries[0].Data)
	if ours := (Database{Hashes([][32]byte{digest}, theirs[0].Entries[0].Owner)}).Marshal(); !bytes.Equal(ours, get("hash.esl")) {
		t.Errorf("hash-to-efi-sig-list gives other bytes")
	}
	run(t, "efitools", "cert-to-efi-sig-list", "-g", owner().String(), at("kek.pem"), at("cert.esl"))
	if ours := (Database{Certificate(cert, owner())}).Marshal(); !bytes.Equal(ours, get("cert.esl")) {
		t.Errorf("cert-to-efi-sig-list gives other bytes")
	}
	for _, appends := range []bool{true, false} {
		args := []string{"sign-efi-sig-list", "-t", "2026-11-21 07:09:10", "-k", at("kek.key"), "-c", at("kek.pem")}
		if appends {
			args = append(args, "-a")
		}
		run(t, "efitools", append(args, DBX, at("hash.esl"), at("theirs.auth"))...)
		a, err := ParseAuth(get("theirs.auth"))
		if err != nil {
			t.Fatal(err)
		}
		if err := a.VerifiedBy(DBX, appends, cert); err != nil {
			t.Errorf("sign-efi-sig-list, appending %v: %v", appends, err)
		}
		if variable, claimed, signer, err := a.Claims(); err != nil || variable != DBX || claimed != appends || !signer.Equal(cert) {
			t.Errorf("it claims to be for %q, appending %v, %v", variable, claimed, err)
		}
		if a.VerifiedBy(DBX, !appends, cert) == nil || a.VerifiedBy(DB, appends, cert) == nil || !a.Time.Equal(stamp.Truncate(time.Second)) {
			t.Errorf("the update holds for another change than was signed; its time is %v", a.Time)
		}
		// The RSA signature is over the same bytes in both, so it is the same.
		ours, err := Sign(DBX, theirs, appends, key, cert, stamp)
		if err != nil {
			t.Fatal(err)
		}
		o, err := ParseAuth(ours)
		if err != nil || !bytes.Contains(get("theirs.auth"), o.Signature[len(o.Signature)-256:]) || !bytes.HasSuffix(ours, get("hash.esl")) {
			t.Errorf("appending %v: sign-efi-sig-list signs other bytes, %v", appends, err)
		}
	}
}

func TestAuthAttacks(t *testing.T) {
	key, cert := pair(t, "kek")
	_, other := pair(t, "other")
	good, err := Sign(DB, Database{Certificate(other, owner())}, true, key, cert, stamp)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Sign(DB, Database{Certificate(other, owner())}, true, key, cert, stamp)
	if err != nil || !bytes.Equal(good, again) {
		t.Errorf("the same arguments give other bytes, %v", err)
	}
	edit := func(at int, b byte) []byte {
		c := bytes.Clone(good)
		c[at] ^= b
		return c
	}
	for name, b := range map[string][]byte{
		"empty": nil, "cut in the signature": good[:200], "another kind of certificate": edit(22, 1),
		"signature beyond the end": edit(18, 0x40), "content cut off": good[:len(good)-1], "huge": make([]byte, MaxBytes+1),
	} {
		if _, err := ParseAuth(b); err == nil {
			t.Errorf("%s: read", name)
		}
	}
	for name, b := range map[string][]byte{
		"content changed": edit(len(good)-1, 1), "time changed": edit(2, 1), "signature changed": edit(15+int(binary.LittleEndian.Uint32(good[16:])), 1),
	} {
		a, err := ParseAuth(b)
		if err == nil && a.VerifiedBy(DB, true, cert) == nil {
			t.Errorf("%s: verified", name)
		}
		if err == nil {
			if variable, _, _, err := a.Claims(); err == nil {
				t.Errorf("%s: it claims to be for %s", name, variable)
			}
		}
	}
	a, err := ParseAuth(good)
	if err != nil || a.VerifiedBy(DB, true, other) == nil || a.VerifiedBy(DB, true) == nil || a.VerifiedBy("Boot0000", true, cert) == nil {
		t.Errorf("verified by nobody's key, %v", err)
	}
	if err := a.VerifiedBy(DB, true, other, cert); err != nil {
		t.Errorf("by the second of two: %v", err)
	}
	for name, err := range map[string]error{
		"no such variable": second(Sign("Boot0000", nil, false, key, cert, stamp)), "the year 1": second(Sign(DB, nil, false, key, cert, time.Time{})),
	} {
		if err == nil {
			t.Errorf("%s: signed", name)
		}
	}
}

func second(_ []byte, err error) error { return err }

func FuzzParse(f *testing.F) {
	_, cert := pair(f, "vendor")
	f.Add(Database{Certificate(cert, owner()), Hashes([][32]byte{{1}, {2}}, owner())}.Marshal())
	f.Add(make([]byte, 28))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Parse(b)
		got := d.Marshal()
		if err == nil && !bytes.Equal(got, b) || err != nil && !bytes.HasPrefix(b, got) {
			t.Errorf("%x\ncomes back as\n%x (%v)", b, got, err)
		}
		if !d.Same(d) {
			t.Error("a database is not the same as itself")
		}
		_, _ = d.Certificates()
		_ = d.Describe()
	})
}

func FuzzParseAuth(f *testing.F) {
	key, cert := pair(f, "kek")
	good, err := Sign(DBX, Database{Hashes([][32]byte{{1}}, owner())}, true, key, cert, stamp)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseAuth(b)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(b, a.Content.Marshal()) {
			t.Error("the content comes back changed")
		}
		if a.VerifiedBy(DBX, true, cert) == nil && !bytes.HasSuffix(good, a.Content.Marshal()) {
			t.Error("a signature nobody made")
		}
	})
}
