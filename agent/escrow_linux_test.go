package agent

import (
	"net/http"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/escrow"
)

// TestRecoveryAPI goes the way of the command, without a socket.
func TestRecoveryAPI(t *testing.T) {
	b, k := newBox(t, 1), newKeepers(t, 1, 1)
	k.config.Console = image.ConsoleQR
	s, custody := b.mustProvision(k.config)
	mux := http.NewServeMux()
	(&system{custody: custody}).serveRecovery(mux)
	c := NewClient()
	c.http.Transport = inProcess{mux}
	ctx := t.Context()
	must := func(st *RecoveryStatus, err error) *RecoveryStatus {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := must(c.RecoveryStatus(ctx)); st.Escrow != EscrowMade || st.Serial != 1 {
		t.Errorf("%+v", st)
	}
	e, err := c.Escrow(ctx)
	if err != nil || k.recover(t, e.Marshal()) != s.recoveryKey() {
		t.Fatalf("escrow: %v", err)
	}
	if _, err := c.HandedOut(ctx, &escrow.Escrow{}, "file"); err == nil || !strings.Contains(err.Error(), "take the escrow again") {
		t.Errorf("another escrow than the one to hand out: %v", err)
	}
	if st := must(c.HandedOut(ctx, e, "file /data/e.json")); st.Escrow != EscrowHandedOut || st.HandedTo != "file /data/e.json" {
		t.Errorf("%+v", st)
	}
	if st := must(c.TakeReceipt(ctx, k.receipt(t, e))); st.Escrow != EscrowReceipted {
		t.Errorf("%+v", st)
	}
	if _, err := c.TakeReceipt(ctx, []byte("{}")); err == nil || !strings.Contains(err.Error(), "escrow receipt") {
		t.Error(err)
	}
	for _, end := range []string{"abandon", "commit"} {
		r, err := c.ReplaceKey(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var shown strings.Builder
		if err := r.Show(&shown); err != nil || !strings.Contains(shown.String(), r.Key) || !strings.Contains(shown.String(), "█") {
			t.Errorf("%v, %q", err, shown.String())
		}
		if err := r.Matches([]byte(strings.ToUpper(r.Key))); err != nil {
			t.Error(err)
		}
		if err := r.Matches([]byte(s.recoveryKey())); err == nil || !strings.Contains(err.Error(), "is another") {
			t.Errorf("the old key: %v", err)
		}
		if end == "abandon" {
			if st := must(c.AbandonKey(ctx)); st.Serial != 1 || st.Replacing != "" {
				t.Errorf("%+v", st)
			}
			continue
		}
		if _, err := c.CommitKey(ctx, r.Serial+1); err == nil {
			t.Error("another number is taken")
		}
		if st := must(c.CommitKey(ctx, r.Serial)); st.Serial != r.Serial || st.Escrow != EscrowMade {
			t.Errorf("%+v", st)
		}
		s.wantNoSecret(r.Key)
	}
	none := http.NewServeMux()
	(&system{}).serveRecovery(none)
	c.http.Transport = inProcess{none}
	if _, err := c.RecoveryStatus(ctx); err == nil || !strings.Contains(err.Error(), "no data volume") {
		t.Error(err)
	}
}
