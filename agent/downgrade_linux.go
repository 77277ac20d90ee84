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
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal"
)

// Authorised is what [Client.Downgrade] put on the ESP.
type Authorised struct {
	Path string `json:"path"` // on the ESP
	// Refs are what the vendor's signatures in it are for: the epochs of boxes.
	Refs []string `json:"refs"`
}

// ErrNoEpochs says that the box's policy knows no security epochs, so that none is in the way.
var ErrNoEpochs = errors.New("the sealing policy of this release is not " + seal.PolicyRollbackProof + ": no downgrade has to be authorised")

// downgrade puts the vendor's authorisation where the initrd finds it. Nobody else may
// write the ESP meanwhile: it waits until nothing is installed and the slot is good.
func (s *system) downgrade(file []byte) (*Authorised, error) {
	if s.app.Seal.Policy != seal.PolicyRollbackProof {
		return nil, ErrNoEpochs
	}
	if s.updater != nil {
		end, err := s.updater.begin(0)
		if err != nil {
			return nil, err
		}
		defer end()
	}
	disk, err := openSlots(s.initrd.Disk, s.initrd.Slot)
	if err != nil {
		return nil, err
	}
	defer disk.close()
	entry, err := disk.running()
	if err != nil {
		return nil, err
	}
	if entry.Counted {
		return nil, errors.New("the release that runs has to prove itself first")
	}
	list, err := writeAuthorisation(disk.disk, []byte(s.app.Seal.PolicyKeyPEM), file, time.Now())
	if err != nil {
		return nil, err
	}
	a := &Authorised{Path: image.AuthorisationPath}
	for _, e := range list {
		a.Refs = append(a.Refs, e.Ref)
	}
	s.log.Info("a downgrade is authorised", "for", fmt.Sprint(a.Refs))
	return a, nil
}

func (s *system) answerDowngrade(w http.ResponseWriter, r *http.Request) {
	file, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxAuthorisationBytes))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a, err := s.downgrade(file)
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	writeJSON(w, a)
}

// Downgrade puts the vendor's authorisation of a downgrade at [image.AuthorisationPath], where
// the next boots find it. After a hand-off to another init it is done in this process.
func (c *Client) Downgrade(ctx context.Context, file []byte) (*Authorised, error) {
	a := &Authorised{}
	err := c.send(ctx, http.MethodPost, "/v1/downgrade", bytes.NewReader(file), a)
	if !errors.Is(err, fs.ErrNotExist) {
		return a, err
	}
	s := &system{log: slog.Default()}
	if err := s.load(); err != nil {
		return nil, err
	}
	if s.updater, err = OpenUpdater(s.log); err != nil {
		return nil, err
	}
	return s.downgrade(file)
}
