package agent

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/attest"
)

// verifierServer is a vendor's verifier that gives one challenge, counts requests, and
// ends as told.
func (w *asked) verifierServer(end http.HandlerFunc) (s *httptest.Server, requests *atomic.Int32) {
	w.t.Helper()
	requests = new(atomic.Int32)
	c := w.ask()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /box/challenge", func(rw http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		rw.Write(c.Marshal())
	})
	mux.HandleFunc("POST /box/answer", func(rw http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if b, err := io.ReadAll(r.Body); err != nil {
			w.t.Error(err)
		} else if a, err := attest.ParseAnswer(b); err != nil || !a.Answers(c) {
			w.t.Errorf("the answer: %v", err)
		}
		end(rw, r)
	})
	s = httptest.NewTLSServer(mux)
	w.t.Cleanup(s.Close)
	return s, requests
}

func (w *asked) reporter(s *httptest.Server) *Reporter {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	w.spec.URL, w.spec.CAPEM = s.URL+"/box/", string(ca)
	sys := w.system()
	r := sys.newReporter()
	r.Evidence, r.Now = w.evidence, func() time.Time { return today }
	return r
}

// TestReporter: what the verifier says is in the status, good or not, and nothing else
// comes of it; what is no verdict is an error, and the last verdict stays.
func TestReporter(t *testing.T) {
	w := newAsked(t, true)
	if w.system().newReporter() != nil {
		t.Error("a release that names no verifier sends evidence")
	}
	verdict := func(code int, v any) http.HandlerFunc {
		return func(rw http.ResponseWriter, _ *http.Request) {
			rw.WriteHeader(code)
			_ = json.NewEncoder(rw).Encode(v)
		}
	}
	bad := attest.Verdict{Result: attest.Fail, Checks: []attest.Check{{Name: attest.CheckKernel, Result: attest.Pass}, {Name: attest.CheckDBX, Result: attest.Fail, Text: "dbx lacks\x1b[31m " + strings.Repeat("x", 9999)}}}
	var last EvidenceStatus
	for _, tt := range []struct {
		name, result, err string
		requests          int32
		end               http.HandlerFunc
	}{
		{"good", "pass", "", 2, verdict(http.StatusOK, attest.Verdict{Result: attest.Pass})},
		{"not good", "fail", "", 2, verdict(http.StatusForbidden, bad)},
		{"broken", "", "answers 500", 2, verdict(http.StatusInternalServerError, bad)},
		{"moved", "", "answers 302", 2, func(rw http.ResponseWriter, r *http.Request) {
			http.Redirect(rw, r, "https://login.example/", http.StatusFound)
		}},
		{"a login page", "", "no verdict", 2, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "<html>") }},
		{"an empty verdict", "", "no verdict", 2, verdict(http.StatusOK, attest.Verdict{})},
		{"too long", "", "more than 65536 bytes", 2, verdict(http.StatusOK, strings.Repeat("x", maxVerdictBytes))},
		{"first contact that does not end", "unknown", "", 4, verdict(http.StatusForbidden, attest.Verdict{Result: attest.Unknown, Checks: []attest.Check{{Name: attest.CheckAK, Result: attest.Unknown}}})},
	} {
		server, requests := w.verifierServer(tt.end)
		r := w.reporter(server)
		r.status = last
		err := r.Report(t.Context())
		s := r.Status()
		if (err == nil) != (tt.err == "") || !strings.Contains(s.LastError, tt.err) || requests.Load() != tt.requests {
			t.Errorf("%s: %v after %d requests, status %+v", tt.name, err, requests.Load(), s)
		}
		if tt.err == "" && (s.Result != tt.result || s.Judged != today || s.LastError != "") || tt.err != "" && s.Result != last.Result {
			t.Errorf("%s: %+v", tt.name, s)
		}
		if tt.result == "fail" && (len(s.Checks) != 1 || len(s.Checks[0]) > maxSaidBytes || strings.Contains(s.Checks[0], "\x1b") || !strings.HasPrefix(s.Checks[0], "dbx fail: dbx lacks")) {
			t.Errorf("%q", s.Checks)
		}
		last = r.status
	}
	server, requests := w.verifierServer(verdict(http.StatusOK, attest.Verdict{Result: attest.Pass}))
	r := w.reporter(server)
	r.Config.CAPEM = ""
	if err := r.Report(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") || requests.Load() != 0 {
		t.Errorf("a server that nobody vouches for: %v, %d requests", err, requests.Load())
	}
	var text strings.Builder
	s := Status{Evidence: &EvidenceStatus{URL: "https://v", Judged: today, Result: "fail", Checks: []string{"dbx fail: gone"}, LastError: "down"}}
	if _, err := s.WriteTo(&text); err != nil || !strings.Contains(text.String(), "evidence  fail at 2026-") || !strings.Contains(text.String(), "dbx fail: gone\nevidence  not sent: down\n") {
		t.Errorf("%v, %s", err, text.String())
	}
}

// TestReporterWithoutTPM: no answer leaves, and it is said why.
func TestReporterWithoutTPM(t *testing.T) {
	w := newAsked(t, true)
	server, requests := w.verifierServer(nil)
	r := w.reporter(server)
	r.Evidence = func() *Evidence {
		e := w.evidence()
		e.Lock = func() (func(), error) { return nil, ErrSyncing }
		return e
	}
	if err := r.Report(t.Context()); !errors.Is(err, ErrSyncing) || requests.Load() != 1 || !strings.Contains(r.Status().LastError, "answer the challenge") {
		t.Errorf("%v after %d requests, %+v", err, requests.Load(), r.Status())
	}
}

// TestRepeat: soon after the start, then as often as is said, sooner after an error and
// ever less so, and never in step.
func TestRepeat(t *testing.T) {
	for _, tt := range []struct {
		name        string
		every, span time.Duration
		err         error
		least, most int
	}{
		{"each day", 24 * time.Hour, 240 * time.Hour, nil, 9, 12},
		{"each minute", time.Minute, time.Hour, nil, 50, 68},
		{"once", 1 << 62, 8760 * time.Hour, nil, 1, 1},
		{"soon", 24 * time.Hour, firstCheckMin + firstCheckMax, nil, 1, 1},
		{"down", 24 * time.Hour, 48 * time.Hour, errors.New("down"), 20, 60},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithTimeout(t.Context(), tt.span)
				defer stop()
				n := 0
				repeat(ctx, tt.every, func() error { n++; return tt.err })
				if n < tt.least || n > tt.most {
					t.Errorf("%d times in %v, want %d to %d", n, tt.span, tt.least, tt.most)
				}
			})
		})
	}
}

// TestEvidenceURL: the parts of the spec that decide whether anything is sent.
func TestEvidenceURL(t *testing.T) {
	w := newAsked(t, true)
	w.spec = image.Evidence{URL: "https://127.0.0.1:1/none", EverySec: 60}
	s := w.system()
	s.reporter = s.newReporter()
	if e := s.status().Evidence; e == nil || e.URL != w.spec.URL || !e.Judged.IsZero() {
		t.Errorf("%+v", e)
	}
	if err := s.reporter.Report(t.Context()); err == nil || s.status().Evidence.LastError == "" {
		t.Errorf("nobody listens: %v, %+v", err, s.status().Evidence)
	}
}
