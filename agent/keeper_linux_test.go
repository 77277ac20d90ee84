package agent

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
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
