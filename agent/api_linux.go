package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/seal/attest"
)

// The local API: HTTP and JSON over a unix socket that only root may open.
const (
	// SocketPath is where the running agent answers.
	SocketPath = "/run/holdfast/agent.sock"
	// statePath is what the initrd leaves for later stages. It lies on a tmpfs
	// that only root writes, and is all there is after a hand-off.
	statePath = "/run/holdfast/state.json"
)

// maxAnswer caps what a client reads from the socket: an answer to a challenge, in base64,
// is the longest.
const maxAnswer = attest.MaxAnswerBytes/3*4 + 1<<20

// serveAPI answers until ctx ends.
func (s *system) serveAPI(ctx context.Context) error {
	os.Remove(SocketPath)
	l, err := net.Listen("unix", SocketPath)
	if err != nil {
		return fmt.Errorf("open API socket: %w", err)
	}
	if err := os.Chmod(SocketPath, 0o600); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, s.status())
	})
	mux.HandleFunc("GET /v1/logs/{name}", s.answerLogs)
	mux.HandleFunc("POST /v1/power/{action}", func(w http.ResponseWriter, r *http.Request) {
		action := r.PathValue("action")
		if action != "off" && action != "reboot" {
			http.Error(w, "power action is off or reboot, not "+action, http.StatusBadRequest)
			return
		}
		s.requestPower(action == "reboot", "asked by the API")
		w.WriteHeader(http.StatusAccepted)
	})
	mux.HandleFunc("POST /v1/reseal", s.answerReseal)
	mux.HandleFunc("POST /v1/downgrade", s.answerDowngrade)
	mux.HandleFunc("POST /v1/pin", s.answerPIN)
	mux.HandleFunc("DELETE /v1/pin", s.answerPIN)
	mux.HandleFunc("GET /v1/update", s.answerUpdate)
	mux.HandleFunc("POST /v1/update/{action}", s.answerUpdate)
	mux.HandleFunc("POST /v1/attest", s.answerAttest)
	s.serveRecovery(mux)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		<-ctx.Done()
		// The answer to "reboot" is still on its way out.
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		server.Shutdown(grace)
	}()
	go server.Serve(l)
	return nil
}

func (s *system) answerLogs(w http.ResponseWriter, r *http.Request) {
	n := 50
	if text := r.URL.Query().Get("n"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 1 || n > keptLines {
			http.Error(w, fmt.Sprintf("n is a number from 1 to %d", keptLines), http.StatusBadRequest)
			return
		}
	}
	for _, c := range s.containers() {
		if c.Name == r.PathValue("name") {
			writeJSON(w, c.log.tail(n))
			return
		}
	}
	http.Error(w, "no container "+r.PathValue("name"), http.StatusNotFound)
}

// maxDBXBytes is more than a firmware takes.
const maxDBXBytes = 1 << 20

// answerReseal seals to the present state and to the next. The body, if any, is an
// update of dbx that is about to be written; suspend in the query is a number of boots.
func (s *system) answerReseal(w http.ResponseWriter, r *http.Request) {
	var o ResealOptions
	var err error
	if text := r.URL.Query().Get("suspend"); text != "" {
		if o.Suspend, err = strconv.Atoi(text); err != nil {
			http.Error(w, "suspend is a number of boots, not "+text, http.StatusBadRequest)
			return
		}
	}
	if o.DBX, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxDBXBytes)); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if len(o.DBX) == 0 {
		o.DBX = nil
	}
	report, err := s.reseal(o)
	switch {
	case errors.Is(err, ErrSyncing) || errors.Is(err, ErrNoVolumes):
		http.Error(w, err.Error(), http.StatusConflict)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		writeJSON(w, report)
	}
}

// answerUpdate reports, checks or installs, and answers when that is done. The
// query has path (empty is the repository), version (empty is the newest) and
// reboot=window for a restart when the spec allows it.
func (s *system) answerUpdate(w http.ResponseWriter, r *http.Request) {
	u := s.updater
	if u == nil {
		http.Error(w, "this release takes no updates: its spec has no update section", http.StatusConflict)
		return
	}
	q := r.URL.Query()
	path, want := q.Get("path"), q.Get("version")
	if path != "" && !filepath.IsAbs(path) {
		http.Error(w, "path "+path+" is not absolute", http.StatusBadRequest)
		return
	}
	var err error
	switch action := r.PathValue("action"); action {
	case "":
	case "check":
		err = u.CheckFrom(r.Context(), path, want)
	case "apply":
		// It goes on when who asked hangs up: half an installation helps nobody.
		var version string
		version, err = u.ApplyFrom(context.WithoutCancel(r.Context()), path, want)
		if err == nil && q.Get("reboot") == "window" {
			go u.rebootInWindow(context.WithoutCancel(r.Context()), func() { s.requestPower(true, "to start release "+version) })
		}
	default:
		http.NotFound(w, r)
		return
	}
	switch {
	case errors.Is(err, ErrNoUpdate):
		http.Error(w, err.Error(), http.StatusNotFound)
	case errors.Is(err, ErrUpdating):
		http.Error(w, err.Error(), http.StatusConflict)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		writeJSON(w, u.Status())
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// Client talks to the running agent.
type Client struct{ http http.Client }

// NewClient returns a client for the agent of this system. It waits as long as its
// caller's context: a slow TPM takes a minute for a command, and an update longer.
func NewClient() *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", SocketPath)
	}
	return &Client{http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Status asks the agent, or, after a hand-off to another init, reads what the
// initrd left.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	s := &Status{}
	err := c.call(ctx, http.MethodGet, "/v1/status", s)
	if errors.Is(err, fs.ErrNotExist) {
		b, err := os.ReadFile(statePath)
		if err != nil {
			return nil, noBox(err)
		}
		if err := json.Unmarshal(b, s); err != nil {
			return nil, err
		}
		s.describeHere()
		return s, nil
	}
	return s, err
}

// Reseal seals the data volumes' key to the present state of the box, and to that of
// its next boot where it is another one; see [Keeper.Reseal]. After a hand-off to
// another init it is done in this process.
func (c *Client) Reseal(ctx context.Context, o ResealOptions) (r SyncReport, err error) {
	path := "/v1/reseal"
	if o.Suspend != 0 {
		path += "?suspend=" + strconv.Itoa(o.Suspend)
	}
	err = c.send(ctx, http.MethodPost, path, bytes.NewReader(o.DBX), &r)
	if errors.Is(err, fs.ErrNotExist) {
		return resealHere(o)
	}
	return r, err
}

// Logs returns the last lines a container printed.
func (c *Client) Logs(ctx context.Context, name string, lines int) (log []string, err error) {
	return log, c.call(ctx, http.MethodGet, fmt.Sprintf("/v1/logs/%s?n=%d", name, lines), &log)
}

// UpdateStatus is what the updater knows.
func (c *Client) UpdateStatus(ctx context.Context) (*UpdateStatus, error) {
	s := &UpdateStatus{}
	return s, c.call(ctx, http.MethodGet, "/v1/update", s)
}

// UpdateRequest says where an update comes from.
type UpdateRequest struct {
	// Path is a bundle or a repository's folder in the agent's own file system; empty is the spec's repository.
	Path string
	// Version, when set, is the one to install, older or newer.
	Version string
	// Reboot restarts the box after the installation, when the spec's window allows it.
	Reboot bool
}

// CheckUpdate asks what there is. Nothing to install is [ErrNoUpdate].
func (c *Client) CheckUpdate(ctx context.Context, r UpdateRequest) (*UpdateStatus, error) {
	return c.update(ctx, "check", r)
}

// ApplyUpdate installs, and returns when that is done; [Client.UpdateStatus] tells how far it is.
func (c *Client) ApplyUpdate(ctx context.Context, r UpdateRequest) (*UpdateStatus, error) {
	return c.update(ctx, "apply", r)
}

func (c *Client) update(ctx context.Context, action string, r UpdateRequest) (*UpdateStatus, error) {
	q := url.Values{"path": {r.Path}, "version": {r.Version}}
	if r.Reboot {
		q.Set("reboot", "window")
	}
	s := &UpdateStatus{}
	err := c.call(ctx, http.MethodPost, "/v1/update/"+action+"?"+q.Encode(), s)
	var refused *apiError
	if errors.As(err, &refused) && refused.status == http.StatusNotFound {
		return nil, fmt.Errorf("%w%s", ErrNoUpdate, strings.TrimPrefix(refused.text, ErrNoUpdate.Error()))
	}
	return s, err
}

// apiError is an answer that is not one of success.
type apiError struct {
	status int
	text   string
}

func (e *apiError) Error() string { return "agent: " + e.text }

// Power asks for a clean power-off or reboot.
func (c *Client) Power(ctx context.Context, reboot bool) error {
	action := "off"
	if reboot {
		action = "reboot"
	}
	return c.call(ctx, http.MethodPost, "/v1/power/"+action, nil)
}

func (c *Client) call(ctx context.Context, method, path string, answer any) error {
	return c.send(ctx, method, path, nil, answer)
}

func (c *Client) send(ctx context.Context, method, path string, body io.Reader, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	var dial *net.OpError
	if errors.Is(err, fs.ErrNotExist) && errors.As(err, &dial) {
		return fmt.Errorf("no agent runs here: %w", dial)
	}
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return &apiError{resp.StatusCode, strings.TrimSpace(string(text))}
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}
