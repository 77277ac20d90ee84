package hwtest_test

import (
	"encoding/json"
	"encoding/pem"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// The bar for an answer, and what an emulated box on a busy machine may take for it; on a
// machine with nothing else to do it is a tenth of that.
const (
	maxAnswerBytes = 100 << 10
	maxAnswerTime  = 30 * time.Second
)

// TestEvidence: a challenge goes to a box on a stick and its answer comes back, at first
// contact and later; the vendor's command judges it with nothing but the release
// and the TPM manufacturer's certificate.
// The box brings its evidence to the vendor's verifier by itself, too, and a stick is
// pulled out in the middle of an answer.
func TestEvidence(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	verifier := newVerifier(t)
	p := buildRelease(t, dir, theProduct(t).keys, "1.0.0", func(s *spec.Spec) {
		s.Evidence = spec.Evidence{Stick: true, URL: verifier.url, CA: verifier.ca, Every: 60, Include: []string{image.EvidenceJournal, image.EvidenceStatus, image.EvidenceLogs}}
	})
	m := hwtest.New(t, p.disk(), hwtest.Options{SecureBoot: p.firmwareKeys(t), Forward: []int{80}})
	roots := certifyTPM(t, m, dir)
	verifier.knows(t, p, roots)
	m.PowerOn()
	m.Expect(readyPattern, bootTime)

	vendor := []string{"--roots", roots, "--release", p.release(), "--software-tpm",
		"--records", filepath.Join(dir, "records"), "--json"}
	first := filepath.Join(dir, "first.json")
	web.holdfast(t, "attest", "challenge", "-o", first)
	answer := visit(t, m, first)
	second := filepath.Join(dir, "second.json")
	web.holdfast(t, "attest", "challenge", "--answer", answer, "-o", second)
	answer = visit(t, m, second)
	files := filepath.Join(dir, "files")
	web.holdfast(t, slices.Concat([]string{"attest", "verify", answer, "--challenge", second, "--first-contact", "--record", "--files", files}, vendor)...)
	for _, name := range []string{"journal.json", "status.json", "logs.txt"} {
		if found, err := filepath.Glob(filepath.Join(files, "*", name)); err != nil || len(found) != 1 {
			t.Errorf("%s came along in %q (%v)", name, found, err)
		}
	}

	m.PowerButton(bootTime)
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	third := filepath.Join(dir, "third.json")
	web.holdfast(t, "attest", "challenge", "-o", third)
	answer = visit(t, m, third)
	text := web.holdfast(t, slices.Concat([]string{"attest", "verify", answer, "--challenge", third}, vendor)...)
	var judged struct {
		Answers []struct{ Verdict attest.Verdict }
	}
	if err := json.Unmarshal(text, &judged); err != nil || len(judged.Answers) != 1 {
		t.Fatalf("%s: %v", text, err)
	}
	v := judged.Answers[0].Verdict
	if !v.Good() || v.Release != "probe 1.0.0" || len(v.Accepted) != 0 {
		t.Errorf("%+v", v)
	}
	wantChecks(t, v)
	wantJudged(t, m)
	pulledOut(t, m, vendor)
}

// certifyTPM gives the box's TPM an endorsement key certificate, as its manufacturer
// does. The box is off. The file has the manufacturer's root.
func certifyTPM(t *testing.T, m *hwtest.Machine, dir string) (roots string) {
	t.Helper()
	maker := sealtest.NewManufacturer(t, "Test Root of TPMs", time.Now())
	t.Run("TPM factory", func(t *testing.T) { // ends the TPM's process
		bench, err := os.MkdirTemp("", "hf")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(bench) })
		if err := os.Symlink(filepath.Join(m.Dir, "tpm"), filepath.Join(bench, "state0")); err != nil {
			t.Fatal(err)
		}
		tpm := sealtest.StartWith(t, sealtest.Options{Dir: bench})
		tpm.WriteNV(0x01c0000a, maker.Certify(tpm.EK(tpm2.ECCEKTemplate), "id:49424D00"))
	})
	roots = filepath.Join(dir, "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: maker.Cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return roots
}

// visit brings a challenge to the box, and the answer back.
func visit(t *testing.T, m *hwtest.Machine, challenge string) (answer string) {
	t.Helper()
	stick := newStick(t)
	tool(t, "mcopy", "-i", stick, challenge, "::"+strings.ToUpper(attest.ChallengePrefix+filepath.Base(challenge)))
	if err := m.VM().Plug(stick, false); err != nil {
		t.Fatal(err)
	}
	said := m.Expect(`challenge answered file=\S+ bytes=(\d+) ms=(\d+)`, bootTime)
	m.Expect(`the answer is on the medium`, bootTime)
	if err := m.VM().Unplug(); err != nil {
		t.Fatal(err)
	}
	answer = fromStick(t, stick, attest.AnswerPrefix)
	info, err := os.Stat(answer)
	if err != nil {
		t.Fatal(err)
	}
	bytes, _ := strconv.Atoi(said[1]) // digits, by the pattern
	ms, _ := strconv.Atoi(said[2])
	t.Logf("an answer of %d bytes in %d ms", bytes, ms)
	if int64(bytes) != info.Size() || bytes > maxAnswerBytes || time.Duration(ms)*time.Millisecond > maxAnswerTime {
		t.Errorf("an answer of %d bytes (said to be %d) in %d ms; the bars are %d and %v", info.Size(), bytes, ms, maxAnswerBytes, maxAnswerTime)
	}
	return answer
}

// wantChecks wants all to pass but these.
func wantChecks(t *testing.T, v attest.Verdict, but ...string) {
	t.Helper()
	if len(v.Checks) < 10 {
		t.Errorf("only %d checks: %+v", len(v.Checks), v)
	}
	for _, c := range v.Checks {
		if (c.Result == attest.Pass) == slices.Contains(but, c.Name) {
			t.Errorf("%s %s: %s (%s)", c.Name, c.Result, c.Text, c.Event)
		}
	}
}

// TestEvidenceKeptIn: a release that says nothing of evidence answers nobody's stick. By
// the API, root gets the answer, and with Secure Boot off it says exactly that.
func TestEvidenceKeptIn(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, false)
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	c, err := attest.NewChallenge(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	file, stick := filepath.Join(t.TempDir(), c.FileName()), newStick(t)
	if err := os.WriteFile(file, c.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "mcopy", "-i", stick, file, "::")
	unwritten := unchanged(t, stick)
	if err := m.VM().Plug(stick, false); err != nil {
		t.Fatal(err)
	}
	m.Expect(`a challenge is not answered: this release lets no evidence leave on a medium`, bootTime)
	m.Expect(`no bundle and no repository on the medium`, bootTime)
	if err := m.VM().Unplug(); err != nil {
		t.Fatal(err)
	}
	unwritten()

	text, err := call(m, http.MethodPost, "/v1/attest", string(c.Marshal()))
	if err != nil {
		t.Fatal(err)
	}
	var answered agent.Attested
	if err := json.Unmarshal([]byte(text), &answered); err != nil {
		t.Fatal(err)
	}
	a, err := attest.ParseAnswer(answered.Answer)
	if err != nil {
		t.Fatal(err)
	}
	p := theProduct(t)
	reference, err := p.manifest.Reference()
	if err != nil {
		t.Fatal(err)
	}
	own := p.firmwareKeys(t)
	keys, err := attest.NewKeys(own.PK, own.KEK, own.DB, nil)
	if err != nil {
		t.Fatal(err)
	}
	policy := &attest.Policy{Now: time.Now(), SoftwareTPM: true, References: []attest.Reference{reference}, Keys: keys}
	unknown := append(attest.FirstContact(), attest.CheckEK, attest.CheckAK) // its TPM has no certificate
	v := attest.Verify(a, c, policy)
	wantChecks(t, v, append(unknown, attest.CheckSecureBoot, attest.CheckKeys)...) // nobody enrolled any
	if v.Of(attest.CheckSecureBoot).Result != attest.Fail || v.Of(attest.CheckKeys).Result != attest.Fail || len(a.Attachments) != 0 {
		t.Errorf("%+v; %d files", v, len(a.Attachments))
	}
}
