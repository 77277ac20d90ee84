package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/update"
)

const (
	// escrowRequest is a file on a medium that asks for the escrow.
	escrowRequest = "escrow-request"
	// maxReceipts of a medium are looked at.
	maxReceipts = 64

	postTime    = time.Minute
	postAgain   = 6 * time.Hour   // when the escrow has arrived and the receipt has not
	postSoon    = 2 * time.Second // after an escrow was made
	maxPosted   = 64 << 10
	postRetry   = time.Minute
	postLongest = 2 * time.Hour
)

// deliver sends the escrow to the spec's URL until its receipt is there, or, without
// receipts, until it has arrived; and again when there is another.
func (c *Custody) deliver(ctx context.Context) {
	if c.Config.URL == "" {
		return
	}
	var sent [32]byte
	retry, due := postRetry, time.After(firstCheckMin+rand.N(firstCheckMin))
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.news:
			if e := c.undelivered(); e != nil && e.Digest() != sent {
				retry, due = postRetry, time.After(postSoon)
			}
			continue
		case <-due:
		}
		e := c.undelivered()
		if e == nil {
			due = nil // until there is another
			continue
		}
		sent = e.Digest()
		wait := postAgain
		if err := c.Post(ctx, e); err != nil {
			c.Log.Warn("escrow not delivered", "url", c.Config.URL, "error", err)
			wait = retry/2 + rand.N(retry/2)
			retry = min(2*retry, postLongest)
		} else {
			retry = postRetry
		}
		due = time.After(wait)
	}
}

// undelivered is the escrow that has yet to arrive; nil when there is none.
func (c *Custody) undelivered() *escrow.Escrow {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, e, err := c.current()
	if err != nil {
		return nil
	}
	if c.Config.ReceiptKeyPEM != "" {
		if c.receipt(e) != nil {
			return nil
		}
		return e
	}
	handed := a.Handed
	if a.Next != nil && e.Serial == a.Next.Serial {
		handed = a.Next.Handed
	}
	if c.arrived(handed) || c.Config.URL == "" && handed != nil {
		return nil
	}
	return e
}

// Post sends the escrow to the spec's URL once. It has arrived when the answer is the
// receipt, or names the escrow's SHA-256: whoever else may answer in a network, such as
// a hotel's login page, does not.
func (c *Custody) Post(ctx context.Context, e *escrow.Escrow) error {
	ctx, cancel := context.WithTimeout(ctx, postTime)
	defer cancel()
	client, err := webClient(c.Config.CAPEM)
	if err != nil {
		return err
	}
	if c.web != nil {
		client.Transport = c.web
	}
	defer client.CloseIdleConnections()
	p := posting{c.Config.URL, "application/json", "holdfast-agent " + c.Product + "/" + c.Release, e.Marshal(), maxPosted}
	status, body, err := p.send(ctx, client)
	if err != nil {
		return err
	}
	if status/100 != 2 {
		return fmt.Errorf("the server answers %d %s", status, http.StatusText(status))
	}
	sum := e.Digest()
	if !bytes.Contains(body, []byte(hex.EncodeToString(sum[:]))) {
		return errors.New("the answer neither is the receipt nor names the escrow's SHA-256: it may be from somebody on the way")
	}
	if err := c.HandedOut(e, c.Config.URL); err != nil {
		return err
	}
	if c.Config.ReceiptKeyPEM == "" || !bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")) {
		return nil
	}
	return c.TakeReceipt(body)
}

// fromFolder takes the receipts in the top folder of a medium, and says whether the
// medium asks for the escrow. Only plain files count; case does not, nor the ending
// that some systems give to every text.
func (c *Custody) fromFolder(dir string) (asks bool, err error) {
	requests, err := filesIn(dir, 1, func(name string) bool {
		return strings.TrimSuffix(strings.ToLower(name), ".txt") == escrowRequest
	})
	if err != nil {
		return false, err
	}
	asks = len(requests) > 0
	paths, err := filesIn(dir, maxReceipts, func(name string) bool {
		name = strings.ToLower(name)
		return strings.HasPrefix(name, escrow.ReceiptPrefix) && strings.HasSuffix(name, ".json")
	})
	if err != nil || c.Config.ReceiptKeyPEM == "" {
		return asks, err
	}
	var all []error
	for _, path := range paths {
		b, err := readLimited(path, escrow.MaxReceiptBytes)
		if err == nil {
			err = c.TakeReceipt(b)
		}
		if err == nil {
			return asks, nil
		}
		all = append(all, fmt.Errorf("%s: %w", printable(filepath.Base(path)), err))
	}
	return asks, errors.Join(all...)
}

// filesIn lists at most so many plain files of a folder.
func filesIn(dir string, most int, wanted func(name string) bool) (list []string, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	for seen := 0; seen < maxMediaNames && len(list) < most; {
		entries, err := d.ReadDir(mediaNamesAtOnce)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		seen += len(entries)
		for _, e := range entries {
			if e.Type().IsRegular() && wanted(e.Name()) && len(list) < most {
				list = append(list, filepath.Join(dir, e.Name()))
			}
		}
	}
	return list, nil
}

// ToFolder writes the escrow into a folder and notes that it was handed out there.
func (c *Custody) ToFolder(dir, to string) (path string, err error) {
	e, err := c.Escrow()
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, e.FileName())
	if err := update.WriteFile(path, e.Marshal(), 0o644); err != nil {
		return "", err
	}
	return path, c.HandedOut(e, to)
}
