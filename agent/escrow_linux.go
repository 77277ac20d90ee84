package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// newCustody is nil for an appliance without data volumes.
func (s *system) newCustody() *Custody {
	if len(s.app.Volumes) == 0 {
		return nil
	}
	c := newCustody(s.log, s.app, "/")
	c.Open = func() ([]Partition, io.Closer, error) { return openData(s.initrd.Disk, s.app.Volumes) }
	c.OpenTPM = func() (seal.TPM, error) { return seal.OpenDevice() }
	return c
}

// settleRecovery ends what an earlier run left undone.
func (s *system) settleRecovery() {
	if s.custody = s.newCustody(); s.custody == nil {
		return
	}
	if err := s.custody.Settle(); err != nil {
		s.problem(fmt.Sprintf("recovery key: %v", err))
	}
}

// openData opens the partitions of the volumes on the disk that the system runs from.
func openData(device string, volumes []image.Volume) (parts []Partition, closer io.Closer, err error) {
	dev, err := partition.OpenShared(device)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, dev.Close())
		}
	}()
	disk, err := partition.Open(dev)
	if err != nil {
		return nil, nil, fmt.Errorf("disk %s: %w", device, err)
	}
	for _, v := range volumes {
		part, _, err := disk.Partition(v.Name)
		if err != nil {
			return nil, nil, err
		}
		number := slices.IndexFunc(disk.Layout().Partitions, func(p partition.Partition) bool { return p.Name == v.Name }) + 1
		parts = append(parts, Partition{Volume: v, Number: number, Device: part})
	}
	return parts, dev, nil
}

// carry looks at a medium for receipts and for a request for the escrow, and writes the
// escrow there when asked to, or when it writes back outcomes of updates anyway.
func (c *Custody) carry(device string, writeBack bool, still func() bool) error {
	if len(c.Config.Holders) == 0 {
		return nil
	}
	m, err := openMedium(device, still)
	if m == nil || err != nil || m.fs == "" {
		return err
	}
	asks := false
	err = m.read(func(dir string) (err error) {
		asks, err = c.fromFolder(dir)
		if releases, looked := findReleases(dir); looked == nil && len(releases) > 0 && writeBack {
			asks = asks || c.undelivered() != nil
		}
		return err
	})
	if !asks || !m.writable(err) {
		return err
	}
	wrote := m.write(func(dir string) error {
		_, err := c.ToFolder(dir, "medium "+device)
		return err
	})
	switch {
	case errors.Is(wrote, ErrNoEscrow):
		return err
	case wrote != nil:
		return errors.Join(err, fmt.Errorf("write the escrow to the medium: %w", wrote))
	}
	c.Log.Info("the medium may be pulled out", "device", device)
	return err
}

// serveRecovery adds the recovery key to the local API.
func (s *system) serveRecovery(mux *http.ServeMux) {
	handle := func(pattern string, do func(c *Custody, r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if s.custody == nil {
				http.Error(w, "this appliance has no data volume, and so no recovery key", http.StatusConflict)
				return
			}
			answer, err := do(s.custody, r)
			if err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
				return
			}
			writeJSON(w, answer)
		})
	}
	status := func(c *Custody, err error) (any, error) { return c.Status(), err }
	handle("GET /v1/recovery", func(c *Custody, _ *http.Request) (any, error) { return status(c, nil) })
	handle("GET /v1/recovery/escrow", func(c *Custody, _ *http.Request) (any, error) { return c.Escrow() })
	handle("POST /v1/recovery/handed-out", func(c *Custody, r *http.Request) (any, error) {
		e, err := c.Escrow()
		if err != nil {
			return nil, err
		}
		if sum := e.Digest(); r.URL.Query().Get("sha256") != hex.EncodeToString(sum[:]) {
			return nil, errors.New("that is not the escrow to hand out any more: another recovery key was made; take the escrow again")
		}
		return status(c, c.HandedOut(e, r.URL.Query().Get("to")))
	})
	handle("POST /v1/recovery/receipt", func(c *Custody, r *http.Request) (any, error) {
		return status(c, c.TakeReceipt([]byte(r.URL.Query().Get("receipt"))))
	})
	handle("POST /v1/recovery/replace", func(c *Custody, _ *http.Request) (any, error) {
		r, err := c.Replace()
		if err != nil {
			return nil, err
		}
		return newReplacement(r, c.Config), nil
	})
	handle("POST /v1/recovery/commit", func(c *Custody, r *http.Request) (any, error) {
		serial, err := strconv.Atoi(r.URL.Query().Get("serial"))
		if err != nil {
			return nil, errors.New("serial is the number of the key that replace made")
		}
		return status(c, c.Commit(serial))
	})
	handle("POST /v1/recovery/abandon", func(c *Custody, _ *http.Request) (any, error) { return status(c, c.Abandon()) })
}

// Replacement is another recovery key on its way from the agent to the person who asked.
type Replacement struct {
	Serial int `json:"serial"`
	// Key is "" when the spec says that nobody is shown one.
	Key string `json:"key,omitempty"`
	// Console is how the spec wants keys shown.
	Console string `json:"console,omitempty"`
}

func newReplacement(r *Replaced, config image.Recovery) *Replacement {
	out := &Replacement{Serial: r.Serial, Console: config.Console}
	if r.Key != nil {
		out.Key = r.Key.String()
		r.Key.Wipe()
	}
	return out
}

// Show prints the key for the person who asked.
func (r *Replacement) Show(w io.Writer) error {
	key, err := luks2.ParseRecoveryKey([]byte(r.Key))
	if err != nil {
		return err
	}
	defer key.Wipe()
	showRecoveryKey(w, key, r.Console, fmt.Sprintf("RECOVERY KEY %d of this box. Write it down: it is shown once, and takes the old\r\n  one's place when you have typed it back.", r.Serial),
		"Until then the old one holds.")
	return nil
}

// Matches is an error unless that is the key.
func (r *Replacement) Matches(typed []byte) error {
	key, err := luks2.ParseRecoveryKey([]byte(r.Key))
	if err != nil {
		return err
	}
	defer key.Wipe()
	return sameKey(key, typed)
}

// RecoveryClient asks the running agent about the recovery key, or, after a hand-off to
// another init, does in this process what the agent would.
func RecoveryClient(ctx context.Context, log *slog.Logger) (*Client, error) {
	c := NewClient()
	if _, err := c.RecoveryStatus(ctx); !errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	s := &system{log: log}
	if err := s.load(); err != nil {
		return nil, err
	}
	if s.custody = s.newCustody(); s.custody != nil {
		if err := s.custody.Settle(); err != nil {
			return nil, err
		}
	}
	mux := http.NewServeMux()
	s.serveRecovery(mux)
	c.http.Transport = inProcess{mux}
	return c, nil
}

// inProcess answers requests without a network.
type inProcess struct{ http.Handler }

// RoundTrip implements [http.RoundTripper].
func (p inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	w := &answer{header: http.Header{}, status: http.StatusOK}
	p.ServeHTTP(w, r)
	return &http.Response{StatusCode: w.status, Header: w.header, Body: io.NopCloser(&w.body), Request: r}, nil
}

// answer is what a handler wrote.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(status int)      { a.status = status }
func (a *answer) Write(b []byte) (int, error) { return a.body.Write(b) }

func (c *Client) recovery(ctx context.Context, action string, q url.Values) (*RecoveryStatus, error) {
	s := &RecoveryStatus{}
	return s, c.call(ctx, http.MethodPost, "/v1/recovery/"+action+"?"+q.Encode(), s)
}

// RecoveryStatus tells how the recovery key is kept.
func (c *Client) RecoveryStatus(ctx context.Context) (*RecoveryStatus, error) {
	s := &RecoveryStatus{}
	return s, c.call(ctx, http.MethodGet, "/v1/recovery", s)
}

// Escrow is the escrow to hand out.
func (c *Client) Escrow(ctx context.Context) (*escrow.Escrow, error) {
	e := &escrow.Escrow{}
	if err := c.call(ctx, http.MethodGet, "/v1/recovery/escrow", e); err != nil {
		return nil, err
	}
	return escrow.Parse(e.Marshal())
}

// HandedOut notes who was given the escrow that [Client.Escrow] returned.
func (c *Client) HandedOut(ctx context.Context, e *escrow.Escrow, to string) (*RecoveryStatus, error) {
	sum := e.Digest()
	return c.recovery(ctx, "handed-out", url.Values{"to": {to}, "sha256": {hex.EncodeToString(sum[:])}})
}

// TakeReceipt brings a receipt.
func (c *Client) TakeReceipt(ctx context.Context, receipt []byte) (*RecoveryStatus, error) {
	return c.recovery(ctx, "receipt", url.Values{"receipt": {string(receipt)}})
}

// ReplaceKey makes another recovery key; see [Custody.Replace].
func (c *Client) ReplaceKey(ctx context.Context) (*Replacement, error) {
	r := &Replacement{}
	return r, c.call(ctx, http.MethodPost, "/v1/recovery/replace", r)
}

// CommitKey puts another recovery key in force; see [Custody.Commit].
func (c *Client) CommitKey(ctx context.Context, serial int) (*RecoveryStatus, error) {
	return c.recovery(ctx, "commit", url.Values{"serial": {strconv.Itoa(serial)}})
}

// AbandonKey drops another recovery key that is not in force.
func (c *Client) AbandonKey(ctx context.Context) (*RecoveryStatus, error) {
	return c.recovery(ctx, "abandon", nil)
}
