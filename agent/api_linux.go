package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

// The local API: HTTP and JSON over a unix socket that only root may open.
const (
	// SocketPath is where the running agent answers.
	SocketPath = "/run/holdfast/agent.sock"
	// statePath is what the initrd leaves for later stages. It lies on a tmpfs
	// that only root writes, and is all there is after a hand-off.
	statePath = "/run/holdfast/state.json"
)

// maxAnswer caps what a client reads from the socket.
const maxAnswer = 4 << 20

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

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// Client talks to the running agent.
type Client struct{ http http.Client }

// NewClient returns a client for the agent of this system.
func NewClient() *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", SocketPath)
	}
	return &Client{http.Client{Transport: &http.Transport{DialContext: dial}, Timeout: time.Minute}}
}

// Status asks the agent, or, after a hand-off to another init, reads what the
// initrd left.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	s := &Status{}
	err := c.call(ctx, http.MethodGet, "/v1/status", s)
	if errors.Is(err, fs.ErrNotExist) {
		b, err := os.ReadFile(statePath)
		if err != nil {
			return nil, fmt.Errorf("no agent runs here and no initrd of Holdfast left its state: %w", err)
		}
		return s, json.Unmarshal(b, s)
	}
	return s, err
}

// Logs returns the last lines a container printed.
func (c *Client) Logs(ctx context.Context, name string, lines int) (log []string, err error) {
	return log, c.call(ctx, http.MethodGet, fmt.Sprintf("/v1/logs/%s?n=%d", name, lines), &log)
}

// Power asks for a clean power-off or reboot.
func (c *Client) Power(ctx context.Context, reboot bool) error {
	action := "off"
	if reboot {
		action = "reboot"
	}
	return c.call(ctx, http.MethodPost, "/v1/power/"+action, nil)
}

func (c *Client) call(ctx context.Context, method, path string, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("agent: %s", string(body))
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(body, answer)
}
