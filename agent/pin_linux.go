package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/seal/luks2"
)

// echoOf turns the echo of a terminal on and off; where there is no terminal, there
// is none.
func echoOf(console *os.File) func(on bool) {
	return func(on bool) {
		fd := int(console.Fd())
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return
		}
		t.Lflag &^= unix.ECHO
		if on {
			t.Lflag |= unix.ECHO
		}
		// A console that goes on showing what is typed is no reason not to ask.
		_ = unix.IoctlSetTermios(fd, unix.TCSETS, t)
	}
}

// ReadPIN takes a new PIN from who sets one: typed twice at a terminal, which does not
// show it, or a line of something else.
func ReadPIN(in *os.File, out io.Writer) ([]byte, error) {
	m := &Machine{Console: struct {
		io.Reader
		io.Writer
	}{in, out}, Echo: echoOf(in)}
	if _, err := unix.IoctlGetTermios(int(in.Fd()), unix.TCGETS); err == nil {
		return m.choosePIN()
	}
	line, err := readLine(m.keyboard())
	if err != nil {
		return nil, fmt.Errorf("read the new PIN: %w", err)
	}
	return line, checkPIN(line)
}

// answerPIN sets the PIN that is in the body, or takes it away.
func (s *system) answerPIN(w http.ResponseWriter, r *http.Request) {
	var pin []byte
	defer func() { luks2.Wipe(pin) }()
	if r.Method == http.MethodPost {
		var err error
		if pin, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxPINBytes)); err == nil {
			err = checkPIN(pin)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	err := ErrNoVolumes
	var report SyncReport
	if s.keeper != nil {
		report, err = s.keeper.SetPIN(pin)
	}
	switch {
	case errors.Is(err, ErrSyncing) || errors.Is(err, ErrNoVolumes) || errors.Is(err, ErrPINWanted):
		http.Error(w, err.Error(), http.StatusConflict)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		writeJSON(w, report)
	}
}

// SetPIN has the TPM want this PIN at every start, or none when it is nil; see
// [Keeper.SetPIN]. After a hand-off to another init it is done in this process.
func (c *Client) SetPIN(ctx context.Context, pin []byte) (r SyncReport, err error) {
	if pin == nil {
		err = c.send(ctx, http.MethodDelete, "/v1/pin", nil, &r)
	} else {
		err = c.send(ctx, http.MethodPost, "/v1/pin", bytes.NewReader(pin), &r)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	k, err := OpenKeeper(slog.Default())
	if k == nil && err == nil {
		err = ErrNoVolumes
	}
	if err != nil {
		return r, err
	}
	return k.SetPIN(pin)
}
