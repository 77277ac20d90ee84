package attest

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// tool runs a program of tpm2-tools in a folder.
func tool(t *testing.T, dir, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s not installed: apt-get install tpm2-tools", name)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func write(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// akPEM is the AK as OpenSSL has it.
func akPEM(t *testing.T, a *Answer) []byte {
	t.Helper()
	p, err := parsePublic(a.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	key, err := p.key()
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// TestCheckQuote: tpm2_checkquote verifies our quote, with ECC and with RSA, and
// neither another nonce nor a quote that was changed.
func TestCheckQuote(t *testing.T) {
	r := newRig(t, "secure")
	for _, rsa := range []bool{false, true} {
		r.input.RSA = rsa
		c := r.challenge(t)
		a := r.answer(t, c)
		data := c.qualifyingData(a.Statement.marshal())
		damaged := bytes.Clone(a.Quote)
		damaged[len(damaged)-1] ^= 1
		dir := t.TempDir()
		write(t, dir, map[string][]byte{"ak.pem": akPEM(t, a), "quote": a.Quote, "sig": a.Signature, "damaged": damaged})
		for _, tt := range []struct {
			quote, nonce string
			good         bool
		}{{"quote", hex.EncodeToString(data[:]), true}, {"quote", hex.EncodeToString(make([]byte, 32)), false}, {"damaged", hex.EncodeToString(data[:]), false}} {
			out, err := tool(t, dir, "tpm2_checkquote", "-u", "ak.pem", "-m", tt.quote, "-s", "sig", "-g", "sha256", "-q", tt.nonce)
			if (err == nil) != tt.good {
				t.Errorf("RSA %v, %s, nonce %.8s: %v\n%s", rsa, tt.quote, tt.nonce, err, out)
			}
		}
	}
}

// TestEventLogTool: tpm2_eventlog replays the log in an answer to the values quoted; in
// PCR 11 to what it was before the phases.
func TestEventLogTool(t *testing.T) {
	a, _, _ := sample(t)
	dir := t.TempDir()
	write(t, dir, map[string][]byte{"log": a.EventLog})
	out, err := tool(t, dir, "tpm2_eventlog", "log")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, bank, ok := strings.Cut(out, "  sha256:\n")
	if !ok {
		t.Fatalf("no values of SHA-256 in\n%s", out)
	}
	log, err := pcr.ParseLog(a.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for _, m := range regexp.MustCompile(`(?m)^    (\d+) *: 0x([0-9a-f]{64})$`).FindAllStringSubmatch(bank, -1) {
		var index int
		fmt.Sscan(m[1], &index)
		want := a.values()[index]
		if index == 11 {
			want = log.Replay()[11]
		}
		if hex.EncodeToString(want[:]) != m[2] {
			t.Errorf("PCR %d: tpm2_eventlog says %s, the quote %x", index, m[2], want)
		}
		if compared++; compared == len(log.Replay()) {
			break // other banks follow
		}
	}
	if compared < 8 {
		t.Errorf("%d registers were compared in\n%s", compared, bank)
	}
}

// TestMakeCredential: the box opens a credential that tpm2_makecredential made.
func TestMakeCredential(t *testing.T) {
	r := newRig(t, "secure")
	r.tpm.RemoveNV(eccIndex)
	r.certify(r.maker, tpm2.RSAEKTemplate, "id:49424D00", rsaIndex)
	a := r.answer(t, r.challenge(t))
	dir := t.TempDir()
	secret := bytes.Repeat([]byte{7}, nonceBytes)
	write(t, dir, map[string][]byte{"secret": secret, "ek.pub": append(binary.BigEndian.AppendUint16(nil, uint16(len(a.EKPublic))), a.EKPublic...)})
	out, err := tool(t, dir, "tpm2_makecredential", "-T", "none", "-u", "ek.pub", "-s", "secret", "-n", hex.EncodeToString(nameOf(a.AKPublic)), "-o", "credential")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "credential"))
	if err != nil {
		t.Fatal(err)
	}
	cut := &cutter{rest: b}
	if magic, version := cut.number32(), cut.number32(); magic != 0xbadcc0de || version != 1 {
		t.Fatalf("a file %08x of version %d", magic, version)
	}
	ek, proof := sha256.Sum256(a.EKPublic), sha256.Sum256(secret)
	theirs := Credential{EK: ek[:], AK: nameOf(a.AKPublic), Blob: cut.sized(), Seed: cut.sized(), Proof: proof[:]}
	c := r.challenge(t, theirs)
	answer := r.answer(t, c)
	if !bytes.Equal(answer.Statement.Activation, secret) {
		t.Errorf("the box opened it as %x", answer.Statement.Activation)
	}
	if v := Verify(answer, c, &r.policy); v.Of(CheckAK).Result != Pass {
		t.Errorf("%+v", v.Of(CheckAK))
	}
}

// TestSystemdMeasure: the values of PCR 11 that systemd-measure computes for a kernel
// image are those that an answer is judged by.
func TestSystemdMeasure(t *testing.T) {
	const measure = "/usr/lib/systemd/systemd-measure"
	if _, err := os.Stat(measure); err != nil {
		t.Fatalf("%s not installed: apt-get install systemd", measure)
	}
	dir := t.TempDir()
	sections := map[string][]byte{".linux": []byte("kernel"), ".osrel": []byte("ID=ledger\n"), ".cmdline": []byte("quiet"), ".initrd": []byte("initrd")}
	var measured []pcr.Measured
	args := []string{"calculate", "--bank=sha256"}
	for _, name := range []string{".linux", ".osrel", ".cmdline", ".initrd"} {
		write(t, dir, map[string][]byte{name[1:]: sections[name]})
		measured = append(measured, pcr.Measured{Name: name, SHA256: sha256.Sum256(sections[name])})
		args = append(args, "--"+name[1:]+"="+filepath.Join(dir, name[1:]))
	}
	args = append(args, "--phase=enter-initrd:leave-initrd", "--phase=enter-initrd:leave-initrd:sysinit:ready")
	out, err := exec.Command(measure, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("systemd-measure: %v\n%s", err, out)
	}
	values := regexp.MustCompile(`11:sha256=([0-9a-f]{64})`).FindAllStringSubmatch(string(out), -1)
	if len(values) != 2 {
		t.Fatalf("systemd-measure says\n%s", out)
	}
	for i, phases := range []int{2, 4} {
		b, err := hex.DecodeString(values[i][1])
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := phaseOf(pcr.UKI(measured), pcr.Digest(b)); !ok || got != phases {
			t.Errorf("systemd-measure's %s is not the image after %d phases", values[i][1], phases)
		}
	}
}

// TestSwtpmCertificate is a TPM with the certificate that swtpm's own tools make: an RSA
// EK, an intermediate, and a maker that is no maker of chips.
func TestSwtpmCertificate(t *testing.T) {
	dir, err := os.MkdirTemp("", "swtpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ca := filepath.Join(dir, "ca")
	for _, d := range []string{ca, filepath.Join(dir, "state0")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	makes, err := exec.LookPath("swtpm_localca")
	if err != nil {
		t.Fatal("swtpm_localca not installed: apt-get install swtpm-tools")
	}
	write(t, dir, map[string][]byte{
		"localca.conf":    fmt.Appendf(nil, "statedir = %s\nsigningkey = %s/key.pem\nissuercert = %s/issuer.pem\ncertserial = %s/serial\n", ca, ca, ca, ca),
		"localca.options": []byte("--platform-manufacturer Holdfast\n--platform-version 1.0\n--platform-model test\n"),
		"setup.conf":      fmt.Appendf(nil, "create_certs_tool = %s\ncreate_certs_tool_config = %s/localca.conf\ncreate_certs_tool_options = %s/localca.options\n", makes, dir, dir),
	})
	if out, err := tool(t, dir, "swtpm_setup", "--tpm2", "--tpmstate", filepath.Join(dir, "state0"), "--config", filepath.Join(dir, "setup.conf"), "--create-ek-cert", "--overwrite"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r := newRig(t, "secure")
	r.tpm = sealtest.StartWith(t, sealtest.Options{Dir: dir})
	r.measure()
	var files [][]byte
	for _, name := range []string{"issuer.pem", "swtpm-localca-rootca-cert.pem"} {
		b, err := os.ReadFile(filepath.Join(ca, name))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, b)
	}
	roots, skipped, err := NewRoots(files...)
	if err != nil || len(skipped) > 0 {
		t.Fatal(err, skipped)
	}
	r.policy.Roots, r.policy.Now = roots, time.Now()
	c := r.challenge(t)
	a := r.answer(t, c)
	v := Verify(a, c, &r.policy)
	if v.Of(CheckEK).Result != Pass || v.Of(CheckHardware).Result != Pass {
		t.Errorf("%+v %+v", v.Of(CheckEK), v.Of(CheckHardware))
	}
	r.policy.SoftwareTPM = false
	if got := Verify(a, c, &r.policy).Of(CheckHardware); got.Result != Fail {
		t.Errorf("%+v", got)
	}
	if roots, _, err = NewRoots(files[1]); err != nil { // without the intermediate
		t.Fatal(err)
	}
	r.policy.Roots = roots
	if got := Verify(a, c, &r.policy).Of(CheckEK); got.Result != Fail {
		t.Errorf("%+v", got)
	}
}
