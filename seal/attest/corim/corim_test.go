package corim

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

func releases() []attest.Reference {
	r := attest.Reference{Product: "ledger", Version: "1.2.3", Boot: pcr.Release{
		Loader: pcr.Program{Authenticode: pcr.Digest{1}}, UKI: pcr.Program{Authenticode: pcr.Digest{2}}, PCR11: pcr.Digest{3}}}
	other := r
	other.Version = "1.2.4"
	return []attest.Reference{r, other}
}

// newJudge builds the program in ../judge, and is what runs it on a CoRIM.
func newJudge(t *testing.T) func(corim []byte, args ...string) (string, error) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "judge")
	build := exec.Command("go", "build", "-o", program, "./corim")
	build.Dir, build.Env = filepath.Join("..", "judge"), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the judge: %v\n%s", err, out)
	}
	return func(corim []byte, args ...string) (string, error) {
		run := exec.Command(program, args...)
		run.Stdin = bytes.NewReader(corim)
		out, err := run.CombinedOutput()
		return string(out), err
	}
}

// TestVeraison: Veraison's library reads the CoRIM, finds each CoMID valid, and in it the
// registers and programs.
func TestVeraison(t *testing.T) {
	b, err := Marshal("ledger", releases())
	if err != nil {
		t.Fatal(err)
	}
	judge := newJudge(t)
	out, err := judge(b)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	kernel := pcr.Extend(pcr.Extend(pcr.Digest{3}, []byte("enter-initrd")), []byte("leave-initrd"))
	for _, want := range []string{"corim ledger: 2 tags", "ledger 1.2.3: model ledger 1.2.3", "ledger 1.2.4: model ledger 1.2.4",
		`{"11":{"key-type":"uint","value":["sha-256;` + base64.StdEncoding.EncodeToString(kernel[:]) + `"]},"12":{"key-type":"uint","value":["sha-256;AAAAAA`,
		"key 4: sha-256 01" + strings.Repeat("00", 31), "key 4: sha-256 02" + strings.Repeat("00", 31)} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// TestSign: Veraison's libraries verify a signed CoRIM and read in it who signed; not one
// with a bit changed, and not with another key. Other kinds of keys sign nothing.
func TestSign(t *testing.T) {
	b, err := Marshal("ledger", releases())
	if err != nil {
		t.Fatal(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	judge, files := newJudge(t), map[string]string{}
	for name, key := range map[string]crypto.Signer{"EdDSA": edwards, "ES256": p256} {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		files[name] = filepath.Join(t.TempDir(), "public.pem")
		if err := os.WriteFile(files[name], pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		signed, err := Sign(b, key, "Ledger Works")
		if err != nil {
			t.Fatal(err)
		}
		out, err := judge(signed, files[name])
		if want := fmt.Sprintf("signed by Ledger Works, %s, key %x\ncorim ledger: 2 tags", name, sha256.Sum256(der)); err != nil || !strings.HasPrefix(out, want) {
			t.Errorf("%v\n%s\nwant %s", err, out, want)
		}
		for _, at := range []int{5, len(signed) / 2, len(signed) - 1} {
			forged := bytes.Clone(signed)
			forged[at] ^= 1
			if out, err := judge(forged, files[name]); err == nil {
				t.Errorf("%s with byte %d changed:\n%s", name, at, out)
			}
		}
		again, err := Sign(b, key, "Ledger Works")
		if same := bytes.Equal(signed, again); err != nil || name == "EdDSA" && !same {
			t.Errorf("%s signed again: the same bytes: %v, %v", name, same, err)
		}
	}
	signed, err := Sign(b, edwards, "Ledger Works")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := judge(signed, files["ES256"]); err == nil {
		t.Errorf("another key:\n%s", out)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sign(b, p384, "Ledger Works"); err == nil || !strings.Contains(err.Error(), "P-384") {
		t.Error(err)
	}
	if _, err := Sign(b, edwards, ""); err == nil {
		t.Error("signed by nobody")
	}
}

// TestSame: the same releases give the same bytes, and what is lacking is an error.
func TestSame(t *testing.T) {
	a, err := Marshal("ledger", releases())
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if b, err := Marshal("ledger", releases()); err != nil || !bytes.Equal(a, b) {
			t.Fatalf("other bytes: %v", err)
		}
	}
	for _, list := range [][]attest.Reference{nil, {{Product: "ledger", Version: "1"}}} {
		if _, err := Marshal("ledger", list); err == nil {
			t.Errorf("%v: no error", list)
		}
	}
}
