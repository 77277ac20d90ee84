package agent

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal"
)

// TestResealAPI: what the command asks the agent for, and what status says then.
func TestResealAPI(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
	var log bytes.Buffer
	s := &system{log: slog.New(slog.NewTextHandler(&log, nil)), keeper: st.k}
	s.initrd = st.s.status
	ask := func(s *system, query string, body []byte, code int) (r SyncReport) {
		t.Helper()
		w := httptest.NewRecorder()
		s.answerReseal(w, httptest.NewRequest(http.MethodPost, "/v1/reseal"+query, bytes.NewReader(body)))
		if w.Code != code {
			t.Errorf("%q: %d %s, want %d", query, w.Code, w.Body, code)
		}
		if code == http.StatusOK {
			if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil {
				t.Error(err)
			}
		}
		return r
	}
	ask(&system{}, "", nil, http.StatusConflict)
	ask(s, "?suspend=x", nil, http.StatusBadRequest)
	ask(s, "?suspend=99", nil, http.StatusInternalServerError)
	ask(s, "", make([]byte, maxDBXBytes+1), http.StatusBadRequest)
	ask(s, "", []byte("no lists"), http.StatusInternalServerError)
	if r := ask(s, "", nil, http.StatusOK); len(r.Kept) != 1 || r.Changed() {
		t.Errorf("reseal: %+v", r)
	}
	if r := ask(s, "?suspend=3", nil, http.StatusOK); len(r.Added) != 1 {
		t.Errorf("suspend: %+v", r)
	}
	if r := ask(s, "", signatureList("revoked"), http.StatusOK); len(r.Added) != 1 {
		t.Errorf("dbx: %+v", r)
	}
	unlock, err := st.k.lock()
	if err != nil {
		t.Fatal(err)
	}
	ask(s, "", nil, http.StatusConflict)
	unlock()

	status := s.initrd
	s.describeStates(&status)
	if len(status.States) != 3 || len(status.Problems) != 0 || len(status.Degraded) != 1 || !strings.Contains(status.Degraded[0], "suspended") {
		t.Errorf("status: %+v, problems %q, degraded %q", status.States, status.Problems, status.Degraded)
	}
	// What is wrong with the next start is found without a restart of the agent.
	ask(s, "", nil, http.StatusOK)
	st.fw.variables["dbx"] = signatureList("written by somebody")
	suspended := st.k.notes()
	suspended.Suspended = nil
	if err := st.k.save(suspended); err != nil {
		t.Fatal(err)
	}
	s.noteSettled(&Settled{}, nil)
	status = s.initrd
	s.describeStates(&status)
	if len(status.Problems) != 1 || !strings.Contains(status.Problems[0], "holdfast-agent reseal") {
		t.Errorf("problems %q", status.Problems)
	}
}

// TestPINAPI: the PIN goes in by the body, and none comes out.
func TestPINAPI(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
	var log bytes.Buffer
	s := &system{log: slog.New(slog.NewTextHandler(&log, nil)), keeper: st.k}
	ask := func(s *system, method, pin string, code int) string {
		t.Helper()
		w := httptest.NewRecorder()
		s.answerPIN(w, httptest.NewRequest(method, "/v1/pin", strings.NewReader(pin)))
		if w.Code != code {
			t.Errorf("%s %q: %d %s, want %d", method, pin, w.Code, w.Body, code)
		}
		return w.Body.String()
	}
	ask(&system{}, http.MethodPost, "4711", http.StatusConflict)
	ask(s, http.MethodPost, "12", http.StatusBadRequest)
	ask(s, http.MethodPost, strings.Repeat("1", maxPINBytes+1), http.StatusBadRequest)
	if text := ask(s, http.MethodPost, "4711", http.StatusOK); !strings.Contains(text, "slot a 1.0.0") || strings.Contains(text+log.String()+st.s.log.text.String(), "4711") {
		t.Errorf("answer %s, log %s", text, log.String())
	}
	status := st.s.status
	status.describe(st.k)
	if rules := strings.Join(status.Rules, "\n"); !strings.Contains(rules, "PIN") {
		t.Errorf("status says %s", rules)
	}
	ask(s, http.MethodDelete, "", http.StatusOK)
	st.k.Policy.PIN = true
	ask(s, http.MethodDelete, "", http.StatusConflict)
}

func TestReadPIN(t *testing.T) {
	for text, want := range map[string]string{"4711\n": "4711", "4711": "4711", "12\n": "", "": "", "poweroff\n": ""} {
		path := filepath.Join(t.TempDir(), "in")
		putFile(t, path, []byte(text))
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		pin, err := ReadPIN(f, io.Discard)
		f.Close()
		if (err == nil) != (want != "") || err == nil && string(pin) != want {
			t.Errorf("%q: %q, %v", text, pin, err)
		}
	}
}
