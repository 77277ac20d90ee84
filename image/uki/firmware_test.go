package uki

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// issue makes a key whose certificate ca signed.
func issue(t *testing.T, name string, ca *x509.Certificate, caKey *rsa.PrivateKey) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(5), Subject: pkix.Name{CommonName: name}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

// TestAllowed: what the firmware would start.
func TestAllowed(t *testing.T) {
	key, cert, _, _ := keyPair(t, "vendor")
	key2, cert2, _, _ := keyPair(t, "next")
	_, stranger, _, _ := keyPair(t, "stranger")
	leafKey, leaf := issue(t, "leaf", cert, key)
	unsigned := memory(readTool(t, bootPath))
	signed := func(b Blob, k *rsa.PrivateKey, c *x509.Certificate) *File {
		s, err := Sign(b, k, c)
		if err != nil {
			t.Fatal(err)
		}
		return mustParse(t, content(t, s))
	}
	one := signed(unsigned, key, cert)
	both := signed(memory(content(t, must(t)(Sign(unsigned, key, cert)))), key2, cert2)
	none := mustParse(t, unsigned)
	digest, err := one.Authenticode()
	if err != nil {
		t.Fatal(err)
	}
	certs := func(list ...*x509.Certificate) (d sigdb.Database) {
		for _, c := range list {
			d = append(d, sigdb.Certificate(c, sigdb.GUID{}))
		}
		return d
	}
	hash := sigdb.Database{sigdb.Hashes([][32]byte{digest}, sigdb.GUID{})}
	tbs := sha256.Sum256(cert.RawTBSCertificate)
	byDigest := sigdb.Database{{Type: sigdb.TypeX509SHA256(), EntryBytes: 16 + 48, Entries: []sigdb.Entry{{Data: append(tbs[:], make([]byte, 16)...)}}}}
	odd := sigdb.Database{{Type: sigdb.TypeX509(), EntryBytes: 20, Entries: []sigdb.Entry{{Data: []byte{0x30, 2, 5, 0}}}}}
	for _, row := range []struct {
		name    string
		f       *File
		db, dbx sigdb.Database
		want    string // "" is allowed
	}{
		{"signed by a trusted key", one, certs(stranger, cert), nil, ""},
		{"beside odd entries", one, append(odd, certs(cert)...), odd, ""},
		{"signed by another key", one, certs(stranger), nil, "no certificate in db"},
		{"empty db", one, nil, nil, "no certificate in db"},
		{"not signed", none, certs(cert), nil, "not signed"},
		{"not signed, trusted by digest", none, hash, nil, ""},
		{"revoked by digest", one, certs(cert), hash, "by its digest"},
		{"trusted and revoked by digest", none, hash, hash, "by its digest"},
		{"key revoked", one, certs(cert), certs(cert), `certificate "vendor"`},
		{"key revoked by digest", one, certs(cert), byDigest, `certificate "vendor"`},
		{"another key revoked", one, certs(cert), certs(stranger), ""},
		{"two signers, one trusted", both, certs(cert2), nil, ""},
		{"two signers, one revoked", both, certs(cert2), certs(cert), "forbidden"},
		{"issuer trusted", signed(unsigned, leafKey, leaf), certs(cert), nil, ""},
		{"issuer revoked", signed(unsigned, leafKey, leaf), certs(leaf), certs(cert), `certificate "leaf"`},
	} {
		err := row.f.Allowed(row.db, row.dbx)
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v, want %q", row.name, err, row.want)
		}
		if strings.HasPrefix(row.want, "by its") && !errors.Is(err, ErrForbidden) {
			t.Errorf("%s: %v is not ErrForbidden", row.name, err)
		}
	}
	altered := content(t, must(t)(Sign(unsigned, key, cert)))
	altered[bytes.Index(altered, []byte(".text"))+2000] ^= 1
	if err := mustParse(t, altered).Allowed(certs(cert), nil); err == nil {
		t.Error("an altered program is allowed")
	}
}

func must(t *testing.T) func(Blob, error) Blob {
	return func(b Blob, err error) Blob {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}
