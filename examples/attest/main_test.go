package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// fleet is the service and a box.
type fleet struct {
	t      *testing.T
	v      *verifier
	server *httptest.Server
	tpm    *sealtest.TPM
	input  attest.Input

	maker     sealtest.Manufacturer
	variables map[string][]byte // of Secure Boot
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f, err := os.Open("../../seal/pcr/testdata/secure.json.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var series []struct {
		Log     []byte
		Release pcr.Release
		Before  map[string][]byte
	}
	if err := json.NewDecoder(z).Decode(&series); err != nil {
		t.Fatal(err)
	}
	boot, tpm := series[0], sealtest.Start(t)
	tpm.Measure(boot.Log)
	tpm.Extend(11, "enter-initrd")
	tpm.Extend(11, "leave-initrd")
	maker := sealtest.NewManufacturer(t, "Test Root of TPMs", time.Now())
	tpm.WriteNV(0x01c0000a, maker.Certify(tpm.EK(tpm2.ECCEKTemplate), "id:49424D00"))
	v := &verifier{dir: t.TempDir(), challenges: 5, enrol: true, now: time.Now, log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	v.policy = attest.Policy{SoftwareTPM: true, References: []attest.Reference{{Product: "ledger", Version: "1.0.0", Boot: boot.Release}}}
	if v.policy.Keys, err = attest.NewKeys(boot.Before["PK"], boot.Before["KEK"], boot.Before["db"], boot.Before["dbx"]); err != nil {
		t.Fatal(err)
	}
	if v.policy.Roots, _, err = attest.NewRoots(maker.Cert.Raw); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(v.handler())
	t.Cleanup(s.Close)
	return &fleet{t, v, s, tpm, attest.Input{EventLog: boot.Log, Statement: attest.Statement{
		Product: "ledger", Release: "1.0.0", Box: "0b7d9f0e-0000-4000-8000-000000000001"}}, maker, boot.Before}
}

func (f *fleet) post(path string, content []byte) (int, []byte) {
	f.t.Helper()
	rsp, err := http.Post(f.server.URL+path, "application/octet-stream", bytes.NewReader(content))
	if err != nil {
		f.t.Fatal(err)
	}
	defer rsp.Body.Close()
	b, err := io.ReadAll(rsp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return rsp.StatusCode, b
}

// ask gets a challenge and has the box answer it.
func (f *fleet) ask(first []byte) []byte {
	f.t.Helper()
	code, b := f.post("/challenge", first)
	if code != http.StatusOK {
		f.t.Fatalf("%d %s", code, b)
	}
	in := f.input
	in.Time = time.Now()
	var err error
	if in.Challenge, err = attest.ParseChallenge(b); err != nil {
		f.t.Fatal(err)
	}
	a, err := attest.Attest(f.tpm, in)
	if err != nil {
		f.t.Fatal(err)
	}
	return a.Marshal()
}

func (f *fleet) files(folder string) int {
	entries, _ := os.ReadDir(filepath.Join(f.v.dir, folder)) // none is 0
	return len(entries)
}

// TestFleet: first contact, a later check, a replay, and the alarm when the box changes.
func TestFleet(t *testing.T) {
	f := newFleet(t)
	first := f.ask(nil)
	if code, b := f.post("/answer", first); code != http.StatusForbidden || f.files("records") != 0 {
		t.Fatalf("a box whose key is bound to nothing: %d %s", code, b)
	}
	second := f.ask(first)
	if code, b := f.post("/answer", second); code != http.StatusOK || f.files("records") != 1 {
		t.Fatalf("first contact: %d %s", code, b)
	}
	f.v.enrol = false
	third := f.ask(nil)
	if code, b := f.post("/answer", third); code != http.StatusOK || f.files("alarms") != 0 {
		t.Fatalf("later: %d %s", code, b)
	}
	if code, b := f.post("/answer", third); code != http.StatusForbidden {
		t.Fatalf("replayed: %d %s", code, b)
	}
	if err := os.RemoveAll(filepath.Join(f.v.dir, "alarms")); err != nil {
		t.Fatal(err)
	}
	f.tpm.Extend(12, "init=/bin/sh")
	code, b := f.post("/answer", f.ask(nil))
	var v attest.Verdict
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	if code != http.StatusForbidden || v.Of(attest.CheckExtras).Result != attest.Fail || f.files("alarms") != 2 {
		t.Errorf("a command line from outside: %d %s; %d files of alarms", code, b, f.files("alarms"))
	}
	if f.files("challenges") != 0 {
		t.Errorf("%d challenges are left", f.files("challenges"))
	}
}

// TestRenamed: a box that has changed is known by its TPM and raises the alarm, whatever
// it calls itself, and does not become a second one.
func TestRenamed(t *testing.T) {
	for _, box := range []string{"", "0b7d9f0e-0000-4000-8000-000000000002", "none"} {
		f := newFleet(t)
		if code, b := f.post("/answer", f.ask(f.ask(nil))); code != http.StatusOK {
			t.Fatalf("first contact: %d %s", code, b)
		}
		f.input.Statement.Box = box
		first := f.ask(nil)
		for _, answer := range [][]byte{first, f.ask(first)} {
			if code, b := f.post("/answer", answer); code != http.StatusForbidden || f.files("records") != 1 || f.files("alarms") != 2 {
				t.Errorf("named %q: %d %s; %d records, %d files of alarms", box, code, b, f.files("records"), f.files("alarms"))
			}
		}
		f.v.enrol = false
		f.tpm.Extend(12, "init=/bin/sh")
		if err := os.RemoveAll(filepath.Join(f.v.dir, "alarms")); err != nil {
			t.Fatal(err)
		}
		_, b := f.post("/answer", f.ask(nil))
		var v attest.Verdict
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		if v.Of(attest.CheckIdentity).Result != attest.Fail || v.Of(attest.CheckExtras).Result != attest.Fail || f.files("alarms") != 2 {
			t.Errorf("named %q, changed: %s; %d files of alarms", box, b, f.files("alarms"))
		}
	}
}

// TestChallenges: those that nobody answers are not kept for ever, nor more than a number.
func TestChallenges(t *testing.T) {
	f := newFleet(t)
	first := f.ask(nil)
	for range 4 {
		f.post("/challenge", nil)
	}
	if _, b := f.post("/answer", first); !bytes.Contains(b, []byte("it answers this challenge")) {
		t.Errorf("the oldest of five is forgotten: %s", b)
	}
	first = f.ask(nil)
	for range 20 {
		f.post("/challenge", nil)
	}
	if n := f.files("challenges"); n != 5 {
		t.Errorf("%d challenges are kept, want 5", n)
	}
	if code, b := f.post("/answer", first); code != http.StatusForbidden || !bytes.Contains(b, []byte("no challenge is given")) {
		t.Errorf("more came since: %d %s", code, b)
	}
	last := f.ask(nil)
	now := time.Now()
	f.v.now = func() time.Time { return now.Add(lifetime + time.Second) }
	if code, b := f.post("/answer", last); code != http.StatusForbidden || !bytes.Contains(b, []byte("no challenge is given")) || f.files("challenges") != 0 {
		t.Errorf("late: %d %s; %d challenges are kept", code, b, f.files("challenges"))
	}
}

// TestBoxReports: the agent's own code talks to the service, over TLS with the release's
// certificate: first contact and more at one go, and later what is wrong is in its status.
func TestBoxReports(t *testing.T) {
	f := newFleet(t)
	server := httptest.NewTLSServer(f.v.handler())
	t.Cleanup(server.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	var log bytes.Buffer
	r := &agent.Reporter{
		Log: slog.New(slog.NewTextHandler(&log, nil)), Config: image.Evidence{URL: server.URL, CAPEM: string(ca)}, Now: time.Now,
		Evidence: func() *agent.Evidence {
			return &agent.Evidence{
				Log: slog.New(slog.DiscardHandler), Now: time.Now, OpenTPM: func() (seal.TPM, error) { return f.tpm, nil },
				Statement: func() attest.Statement { return f.input.Statement }, EventLog: func() ([]byte, error) { return f.input.EventLog, nil },
			}
		},
	}
	for range 2 {
		if err := r.Report(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := r.Status(); s.Result != "pass" || len(s.Checks) != 0 || f.files("records") != 1 || f.files("challenges") != 0 {
			t.Errorf("%+v, %d records, %d challenges are left", s, f.files("records"), f.files("challenges"))
		}
		f.v.enrol = false
	}
	f.tpm.Extend(12, "init=/bin/sh")
	if err := r.Report(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := r.Status(); s.Result != "fail" || len(s.Checks) == 0 || f.files("alarms") != 2 {
		t.Errorf("a command line from outside: %+v, %d files of alarms", s, f.files("alarms"))
	}
	server.Close()
	if err := r.Report(t.Context()); err == nil || r.Status().LastError == "" || r.Status().Result != "fail" {
		t.Errorf("the service is down: %v, %+v", err, r.Status())
	}
	if strings.Count(log.String(), "evidence judged") != 3 {
		t.Errorf("log %s", log.String())
	}
}

// TestConfigure: what is missing is named.
func TestConfigure(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	for _, name := range []string{"empty", "roots/intermediate", "none", "odd"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	digest := strings.Repeat("ab", 32)
	m := image.Manifest{Name: "ledger", Version: "1.0.0", Expected: image.Expected{
		PCR11: map[string]string{"": digest}, LoaderAuthenticode: digest, UKIAuthenticode: digest, SecureBoot: f.variables}}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"manifest.json": text, "none/manifest.json": []byte("{}"), "odd/manifest.json": []byte("{"),
		"roots/maker.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.maker.Cert.Raw})} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, tt := range []struct{ releases, roots, want string }{
		{dir, in("roots"), ""},
		{dir + "," + dir, in("roots"), ""},
		{"", in("roots"), "-release FOLDER"},
		{dir, "", "-roots FOLDER"},
		{dir + ",", in("roots"), `-release "": `},
		{in("empty"), in("roots"), `empty": open `},
		{in("odd"), in("roots"), `odd": `},
		{in("none"), in("roots"), `none": `},
		{dir, in("empty"), `empty": there are no files in it`},
		{dir, in("nowhere"), `nowhere": open `},
	} {
		v := &verifier{log: f.v.log}
		err := v.configure(tt.releases, tt.roots)
		if tt.want == "" && (err != nil || v.policy.Roots == nil || v.policy.Keys == nil || len(v.policy.References) == 0) {
			t.Errorf("-release %q -roots %q: %v", tt.releases, tt.roots, err)
		}
		if tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("-release %q -roots %q: %v, want %s", tt.releases, tt.roots, err, tt.want)
		}
	}
}

// TestStranger: nobody is recorded unless boxes are being enrolled, and what is no
// answer is refused.
func TestStranger(t *testing.T) {
	f := newFleet(t)
	f.v.enrol = false
	if code, b := f.post("/answer", f.ask(f.ask(nil))); code != http.StatusForbidden || f.files("records")+f.files("alarms") != 0 {
		t.Errorf("a box that nobody knows: %d %s", code, b)
	}
	for _, path := range []string{"/answer", "/challenge"} {
		if code, b := f.post(path, []byte("no answer")); code != http.StatusBadRequest {
			t.Errorf("%s: %d %s", path, code, b)
		}
		if code, b := f.post(path, make([]byte, attest.MaxAnswerBytes+1)); code != http.StatusRequestEntityTooLarge {
			t.Errorf("%s, too long: %d %s", path, code, b)
		}
	}
}
