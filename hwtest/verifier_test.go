package hwtest_test

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/attest"
)

// verifier is a vendor's server, as the box sees it; see package attest.
type verifier struct {
	url, ca string // the address, and the file with its certificate

	mu     sync.Mutex
	policy attest.Policy
	sent   []*attest.Challenge
}

func newVerifier(t *testing.T) *verifier {
	t.Helper()
	v := &verifier{ca: filepath.Join(t.TempDir(), "ca.pem")}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /box/challenge", func(w http.ResponseWriter, r *http.Request) { v.serve(w, r, v.challenge) })
	mux.HandleFunc("POST /box/answer", func(w http.ResponseWriter, r *http.Request) { v.serve(w, r, v.answer) })
	certificate, text := certificateFor(t, guestHost)
	if err := os.WriteFile(v.ca, text, 0o600); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(mux)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	s.StartTLS()
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	v.url = "https://" + guestHost + ":" + u.Port() + "/box"
	return v
}

// knows has it judge boxes of the release by the manufacturer's root.
func (v *verifier) knows(t *testing.T, p *product, roots string) {
	t.Helper()
	text, err := os.ReadFile(roots)
	if err != nil {
		t.Fatal(err)
	}
	reference, err := p.manifest.Reference()
	if err != nil {
		t.Fatal(err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.policy = attest.Policy{SoftwareTPM: true, References: []attest.Reference{reference}, Accept: attest.FirstContact()}
	if v.policy.Roots, _, err = attest.NewRoots(text); err != nil {
		t.Fatal(err)
	}
	if v.policy.Keys, err = image.VendorKeys(nil, p.manifest); err != nil {
		t.Fatal(err)
	}
}

func (v *verifier) serve(w http.ResponseWriter, r *http.Request, do func(body []byte) ([]byte, error)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, attest.MaxAnswerBytes))
	if err == nil {
		body, err = do(body)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Write(body)
}

func (v *verifier) challenge(first []byte) ([]byte, error) {
	var credentials []attest.Credential
	if len(first) > 0 {
		a, err := attest.ParseAnswer(first)
		if err != nil {
			return nil, err
		}
		credential, err := attest.NewCredential(a)
		if err != nil {
			return nil, err
		}
		credentials = append(credentials, credential)
	}
	c, err := attest.NewChallenge(time.Now(), credentials...)
	if err != nil {
		return nil, err
	}
	v.sent = append(v.sent, c)
	return c.Marshal(), nil
}

func (v *verifier) answer(b []byte) ([]byte, error) {
	a, err := attest.ParseAnswer(b)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(v.sent, a.Answers)
	if i < 0 {
		return nil, errors.New("no challenge of this server")
	}
	v.policy.Now = time.Now()
	return json.Marshal(attest.Verify(a, v.sent[i], &v.policy))
}

// wantJudged waits for the box to have brought its evidence to the verifier by itself.
func wantJudged(t *testing.T, m *hwtest.Machine) {
	t.Helper()
	for end := time.Now().Add(bootTime); ; time.Sleep(time.Second) {
		s := statusOf(t, m).Evidence
		if s != nil && s.Result == string(attest.Pass) && s.LastError == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the verifier has judged nothing good: %+v", s)
		}
	}
}

// pulledOut: the stick goes while answers are written to it. What is on it is whole, or
// the vendor does not take it for an answer; plugged in again, it has all of them.
func pulledOut(t *testing.T, m *hwtest.Machine, vendor []string) {
	t.Helper()
	stick, sent := newStick(t), t.TempDir()
	const challenges = 4
	for range challenges {
		web.holdfast(t, "attest", "challenge", "-o", sent)
	}
	files, err := filepath.Glob(filepath.Join(sent, attest.ChallengePrefix+"*"))
	if err != nil || len(files) != challenges {
		t.Fatal(files, err)
	}
	tool(t, "mcopy", slices.Concat([]string{"-i", stick}, files, []string{"::"})...)
	judge := func() (answers, unfinished int) {
		t.Helper()
		came := t.TempDir()
		tool(t, "mcopy", "-n", "-i", stick, "::*", came)
		count := func(pattern string) int {
			found, err := filepath.Glob(filepath.Join(came, attest.AnswerPrefix+pattern))
			if err != nil {
				t.Fatal(err)
			}
			return len(found)
		}
		if answers, unfinished = count("*.bin"), count("*.new"); answers == 0 {
			return 0, unfinished
		}
		text := web.holdfast(t, slices.Concat([]string{"attest", "verify", came, "--challenge", sent}, vendor)...)
		if n := strings.Count(string(text), `"file":`); n != answers {
			t.Errorf("%d answers are judged, %d are on the stick:\n%s", n, answers, text)
		}
		return answers, unfinished
	}
	if err := m.VM().PlugSlow(stick, 32<<10); err != nil {
		t.Fatal(err)
	}
	m.Expect(`challenge answered file=`, bootTime)
	if err := m.VM().Unplug(); err != nil {
		t.Fatal(err)
	}
	why := m.Expect(`warn: medium device=\S+ error=([^\r\n]*)`, bootTime)[1]
	answers, unfinished := judge()
	if answers == 0 || answers == challenges {
		t.Errorf("the stick was pulled out, and %d of %d answers are on it", answers, challenges)
	}
	t.Logf("pulled out: %d answers, %d unfinished: %s", answers, unfinished, why)
	if err := m.VM().Plug(stick, false); err != nil {
		t.Fatal(err)
	}
	m.Expect(`the answer is on the medium`, bootTime)
	if err := m.VM().Unplug(); err != nil {
		t.Fatal(err)
	}
	if answers, unfinished := judge(); answers != challenges || unfinished != 0 {
		t.Errorf("plugged in again: %d answers of %d, %d unfinished", answers, challenges, unfinished)
	}
}
