package pkcs7

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	theirs "github.com/foxboron/go-uefi/pkcs7"
	"golang.org/x/crypto/cryptobyte"
)

// pair makes a key; a serial number may be one that Go's parser refuses to read back.
func pair(t testing.TB, name string) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(0x80f1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)} // over: dates do not count (F90)
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

func oidIndirectData() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}
}

// TestSameAsGoUEFI: two implementations give the same bytes.
func TestSameAsGoUEFI(t *testing.T) {
	key, cert := pair(t, "vendor")
	content := []byte("\x04\x05hello")
	ours, err := Sign(key, cert, oidIndirectData(), content)
	if err != nil {
		t.Fatal(err)
	}
	want, err := theirs.SignPKCS7(key, cert, oidIndirectData(), content, theirs.NoAttr())
	if err != nil || !bytes.Equal(ours, want) {
		t.Errorf("attached: %x\nwant %x, %v", ours, want, err)
	}
	if ours, err = SignDetached(key, cert, content); err != nil {
		t.Fatal(err)
	}
	if want, err = theirs.SignPKCS7(key, cert, theirs.OIDData, content, theirs.NoAttr()); err != nil {
		t.Fatal(err)
	}
	outer := cryptobyte.String(want)
	_, inner, err := theirs.ParseContentInfo(&outer)
	if err != nil || !bytes.Equal(ours, inner) {
		t.Errorf("detached: %x\nwant %x, %v", ours, []byte(inner), err)
	}
}

func TestSignAndVerify(t *testing.T) {
	key, cert := pair(t, "vendor")
	_, other := pair(t, "vendor") // the same name and serial number, another key
	_, stranger := pair(t, "stranger")
	content := []byte("\x04\x05hello")
	attached, err := Sign(key, cert, oidIndirectData(), content)
	if err != nil {
		t.Fatal(err)
	}
	detached, err := SignDetached(key, cert, content)
	if err != nil {
		t.Fatal(err)
	}
	for name, der := range map[string][]byte{"attached": attached, "detached": detached} {
		s, err := Parse(append(bytes.Clone(der), 0, 0, 0))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(s.Raw, der) || len(s.Certificates) != 1 || !s.Certificates[0].Equal(cert) {
			t.Errorf("%s: %d bytes with %d certificates", name, len(s.Raw), len(s.Certificates))
		}
		if err := s.Verify(cert, content); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for attack, err := range map[string]error{
			"other content": s.Verify(cert, []byte("x")), "other key": s.Verify(other, content), "other name": s.Verify(stranger, content),
		} {
			if err == nil {
				t.Errorf("%s, %s: verified", name, attack)
			}
		}
	}
	if s, err := Parse(attached); err != nil || !bytes.Equal(s.Content.Bytes, content) || !s.ContentType.Equal(oidIndirectData()) {
		t.Errorf("content %x, %v", s.Content.Bytes, err)
	}
}

// TestOpenSSL: OpenSSL verifies ours, and we verify what it signs with attributes.
func TestOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("openssl not installed: apt-get install openssl")
	}
	key, cert := pair(t, "vendor")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	pk8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	content := []byte("what is signed")
	for name, b := range map[string][]byte{
		"key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pk8}),
		"pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), "content": content,
	} {
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	run("cms", "-sign", "-binary", "-md", "sha256", "-inkey", at("key"), "-signer", at("pem"), "-in", at("content"), "-outform", "DER", "-out", at("theirs"))
	der, err := os.ReadFile(at("theirs"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(cert, content); err != nil {
		t.Errorf("what openssl signed: %v", err)
	}
	if err := s.Verify(cert, []byte("something else")); err == nil || !strings.Contains(err.Error(), "does not belong to the content") {
		t.Errorf("attributes of other content: %v", err)
	}
	bare, err := SignDetached(key, cert, content)
	if err != nil {
		t.Fatal(err)
	}
	var wrapped cryptobyte.Builder
	wrapped.AddASN1(0x30, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidSignedData())
		b.AddASN1(0xa0, func(b *cryptobyte.Builder) { b.AddBytes(bare) })
	})
	if err := os.WriteFile(at("ours"), wrapped.BytesOrPanic(), 0o600); err != nil {
		t.Fatal(err)
	}
	run("smime", "-verify", "-binary", "-inform", "DER", "-in", at("ours"), "-content", at("content"), "-CAfile", at("pem"), "-purpose", "any", "-no_check_time", "-out", os.DevNull)
}

func FuzzParse(f *testing.F) {
	key, cert := pair(f, "vendor")
	for _, attach := range []bool{true, false} {
		der, err := SignDetached(key, cert, []byte("x"))
		if attach {
			der, err = Sign(key, cert, oidIndirectData(), []byte("x"))
		}
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der)
		f.Add(der[:len(der)-9])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		again, err := Parse(s.Raw)
		if err != nil || !bytes.Equal(again.Raw, s.Raw) || !bytes.HasPrefix(b, s.Raw) {
			t.Errorf("parsed again: %v", err)
		}
		if s.Verify(cert, []byte("never signed")) == nil {
			t.Error("a signature nobody made")
		}
	})
}
