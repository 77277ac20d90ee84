package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/attest"
)

const (
	// roundTime bounds one exchange with the verifier: an answer has up to 100 KB, and a
	// link may be bad.
	roundTime       = 10 * time.Minute
	maxVerdictBytes = 64 << 10
	// maxShownChecks of a verdict are kept, those that did not pass.
	maxShownChecks = 32
)

// Reporter brings the box's evidence to the vendor's verifier by itself: it fetches a
// challenge and sends the answer. The protocol is in package attest. What the verifier
// says changes nothing on the box but the status: it is for people, and whoever could
// forge it must not be able to do more.
type Reporter struct {
	Log    *slog.Logger
	Config image.Evidence
	// UserAgent is how the box calls itself to the server.
	UserAgent string
	// Evidence makes the answers.
	Evidence func() *Evidence
	Now      func() time.Time

	mu     sync.Mutex
	status EvidenceStatus
}

// EvidenceStatus is what became of the evidence that the box sends.
type EvidenceStatus struct {
	URL string `json:"url"`
	// Judged is when the verifier last judged an answer, by the box's clock, Result what it
	// said (pass, fail, unknown), and Checks are those that did not pass.
	Judged time.Time `json:"judged,omitzero"`
	Result string    `json:"result,omitempty"`
	Checks []string  `json:"checks,omitempty"`
	// LastError is why the last attempt came to nothing; empty when it did not.
	LastError string `json:"last_error,omitempty"`
}

// Status tells how it goes.
func (r *Reporter) Status() EvidenceStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.status
	s.URL, s.Checks = r.Config.URL, slices.Clone(s.Checks)
	return s
}

func (s *EvidenceStatus) lines(w io.Writer) {
	if s.Judged.IsZero() {
		fmt.Fprintf(w, "evidence  not yet judged by %s\n", s.URL)
	} else {
		fmt.Fprintf(w, "evidence  %s at %s, says %s\n", s.Result, s.Judged.UTC().Format("2006-01-02 15:04 UTC"), s.URL)
	}
	for _, c := range s.Checks {
		fmt.Fprintf(w, "            %s\n", c)
	}
	if s.LastError != "" {
		fmt.Fprintf(w, "evidence  not sent: %s\n", s.LastError)
	}
}

// follow reports until ctx ends. It is started once the release that runs is kept, and so
// after each update.
func (r *Reporter) follow(ctx context.Context) {
	every := time.Duration(r.Config.EverySec) * time.Second
	if every <= 0 { // once a start is all
		every = 1 << 62
	}
	repeat(ctx, every, func() error { return r.Report(ctx) })
}

// Report has one answer judged; at first contact, two. The result, or the error, is in
// the status too. A verdict that is not good is no error.
func (r *Reporter) Report(ctx context.Context) error {
	v, err := r.round(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.status.LastError = printable(err.Error())
		r.Log.Warn("evidence not delivered", "url", r.Config.URL, "error", r.status.LastError)
		return err
	}
	r.status = EvidenceStatus{Judged: r.Now().UTC(), Result: string(v.Result)}
	for _, c := range v.Checks {
		if c.Result != attest.Pass && !slices.Contains(v.Accepted, c.Name) && len(r.status.Checks) < maxShownChecks {
			r.status.Checks = append(r.status.Checks, said(fmt.Sprintf("%s %s: %s", c.Name, c.Result, c.Text)))
		}
	}
	r.Log.Info("evidence judged", "url", r.Config.URL, "result", r.status.Result)
	return nil
}

// round is one report. The verifier does not know the box's key when it says that it is
// not bound, and then asks once more for the proof.
func (r *Reporter) round(ctx context.Context) (attest.Verdict, error) {
	client, err := webClient(r.Config.CAPEM)
	if err != nil {
		return attest.Verdict{}, err
	}
	defer client.CloseIdleConnections()
	v, answer, err := r.exchange(ctx, client, nil)
	if err != nil || !slices.ContainsFunc(v.Checks, func(c attest.Check) bool { return c.Name == attest.CheckAK && c.Result == attest.Unknown }) {
		return v, err
	}
	v, _, err = r.exchange(ctx, client, answer)
	return v, err
}

// exchange fetches a challenge, with a credential where first is an answer, and sends
// the answer to it. The escrow in it does not count as handed out: a verifier need not
// keep it.
func (r *Reporter) exchange(ctx context.Context, client *http.Client, first []byte) (v attest.Verdict, answer []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, roundTime)
	defer cancel()
	challenge, err := r.post(ctx, client, "challenge", first, attest.MaxChallengeBytes, http.StatusOK)
	if err != nil {
		return v, nil, err
	}
	reply, err := r.Evidence().answer(challenge)
	if err != nil {
		return v, nil, fmt.Errorf("answer the challenge: %w", err)
	}
	text, err := r.post(ctx, client, "answer", reply.content, maxVerdictBytes, http.StatusOK, http.StatusForbidden)
	if err != nil {
		return v, nil, err
	}
	if err := json.Unmarshal(text, &v); err != nil || v.Result != attest.Pass && v.Result != attest.Fail && v.Result != attest.Unknown {
		return v, nil, fmt.Errorf("%s/answer gives no verdict: it may be from somebody on the way", r.Config.URL)
	}
	return v, reply.content, nil
}

func (r *Reporter) post(ctx context.Context, client *http.Client, what string, content []byte, limit int64, taken ...int) ([]byte, error) {
	p := posting{strings.TrimSuffix(r.Config.URL, "/") + "/" + what, "application/octet-stream", r.UserAgent, content, limit}
	status, body, err := p.send(ctx, client)
	if err == nil && !slices.Contains(taken, status) {
		err = fmt.Errorf("the server answers %d %s", status, http.StatusText(status))
	}
	if err != nil {
		return nil, fmt.Errorf("post to %s: %w", p.url, err)
	}
	return body, nil
}
