package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// TestTemplates: a box whose TPM has a certificate for a key of one template alone is
// enrolled by it, and the key is of that template.
func TestTemplates(t *testing.T) {
	for _, template := range ekTemplates() {
		t.Run(template.name, func(t *testing.T) {
			r := newRig(t, "secure")
			r.tpm.RemoveNV(eccIndex)
			r.certify(r.maker, template.area, "id:49424D00", uint32(template.certificate))
			r.enrol(t)
			c := r.challenge(t)
			a := r.answer(t, c)
			if v := Verify(a, c, &r.policy); !v.Good() {
				t.Errorf("%+v", v)
			}
			if want, ok := template.of(r.tpm.EK(template.area)); !ok || !bytes.Equal(a.EKPublic, want) {
				t.Errorf("the box shows the endorsement key\n%x, want\n%x", a.EKPublic, want)
			}
			if n := r.tpm.Handles(); n != 0 {
				t.Errorf("%d handles are left in the TPM", n)
			}
		})
	}
}

// TestOtherTemplate: a certificate is of the key, and not of its attributes; but those
// have to be a template's.
func TestOtherTemplate(t *testing.T) {
	r := newRig(t, "secure")
	c := r.challenge(t)
	a := r.answer(t, c)
	p, err := parsePublic(a.EKPublic)
	if err != nil {
		t.Fatal(err)
	}
	p.Attributes |= attributeSign
	a.EKPublic = p.marshal()
	if v := Verify(a, c, &r.policy); v.Of(CheckEK).Result != Fail {
		t.Errorf("an endorsement key that signs: %+v", v.Of(CheckEK))
	}
	if _, err := NewCredential(a); err == nil {
		t.Error("a credential for an endorsement key that signs")
	}
	for _, key := range []any{&ecdsa.PublicKey{Curve: elliptic.P521()}, &rsa.PublicKey{N: big.NewInt(15), E: 3}, "a key"} {
		if list, err := eksOf(key); err == nil {
			t.Errorf("%T: %d public areas", key, len(list))
		}
	}
}

// TestFactory: swtpm's own tools make a TPM with endorsement keys and certificates of the
// high range only, as makers of TPMs do. Our templates give these keys, and the box is
// enrolled by them.
func TestFactory(t *testing.T) {
	dir, err := os.MkdirTemp("", "swtpm") // short: a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ca := filepath.Join(dir, "ca")
	files := map[string]string{
		"localca.conf": fmt.Sprintf("statedir = %[1]s\nsigningkey = %[1]s/key.pem\nissuercert = %[1]s/issuer.pem\ncertserial = %[1]s/serial\n", ca),
		"options":      "--platform-manufacturer Holdfast\n--platform-version 1\n--platform-model test\n",
		"setup.conf": fmt.Sprintf("create_certs_tool = swtpm_localca\ncreate_certs_tool_config = %[1]s/localca.conf\ncreate_certs_tool_options = %[1]s/options\n"+
			"active_pcr_banks = sha256\n", dir),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, folder := range []string{ca, filepath.Join(dir, "state0")} {
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	setup := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", filepath.Join(dir, "state0"), "--config", filepath.Join(dir, "setup.conf"), "--create-ek-cert", "--rsa-keysize", "3072")
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("%v (apt-get install swtpm-tools)\n%s", err, out)
	}
	r := newRigOn(t, "secure", sealtest.StartWith(t, sealtest.Options{Dir: dir}))
	for _, template := range ekTemplates() {
		if template.name != "H-3" && template.name != "H-6" {
			continue
		}
		der, err := readNV(r.tpm, template.certificate)
		if err != nil {
			t.Fatal(err)
		}
		key, err := certificateKey(trimDER(der))
		if err != nil || !r.tpm.EK(template.area).(interface{ Equal(crypto.PublicKey) bool }).Equal(key) {
			t.Errorf("%s: the template gives another key than the certificate is for: %v", template.name, err)
		}
	}
	var roots [][]byte
	for _, name := range []string{"swtpm-localca-rootca-cert.pem", "issuer.pem"} {
		b, err := os.ReadFile(filepath.Join(ca, name))
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, b)
	}
	r.policy.Now, r.policy.MaxAge = time.Now().Add(time.Minute), 1<<62 // the certificates are of now
	if r.policy.Roots, _, err = NewRoots(roots...); err != nil {
		t.Fatal(err)
	}
	r.enrol(t)
	c := r.challenge(t)
	a := r.answer(t, c)
	v := Verify(a, c, &r.policy)
	if p, err := parsePublic(a.EKPublic); err != nil || !v.Good() || p.Curve != tpm2.TPMECCNistP384 || p.NameAlg != tpm2.TPMAlgSHA384 {
		t.Errorf("%+v: %v", v, err)
	}
	t.Logf("%s", v.Of(CheckEK).Text)
}
