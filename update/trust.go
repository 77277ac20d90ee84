package update

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The files on the data volume.
const (
	trustName = "trust.json"
	stateName = "state.json"

	maxTrustBytes = 64 << 20 // 256 roots of an unusual size; one is 2 KiB
)

// trust is the verified metadata of a device, in one file, so that a power cut
// leaves one consistent set. The bytes are those that were signed. All of it is
// verified again whenever it is read: the chain of roots from the built-in one,
// the rest by its keys.
type trust struct {
	Format int `json:"format"` // 1
	// Roots are those after the built-in one, in order, or else that one. The last
	// is what the rest was verified under.
	Roots     [][]byte `json:"roots"`
	Timestamp []byte   `json:"timestamp,omitempty"`
	Snapshot  []byte   `json:"snapshot,omitempty"`
	Targets   []byte   `json:"targets,omitempty"`
}

// loadTrust reads the store. None is an empty one. A damaged one is put aside and
// counts as none, as a device that can never update again is worse off than one
// that has forgotten which versions it saw.
func loadTrust(dir string) (t trust, damaged bool, err error) {
	damaged, err = loadJSON(filepath.Join(dir, trustName), maxTrustBytes, &t)
	if err != nil || damaged || t.Format != 1 {
		t = trust{Format: 1}
	}
	return t, damaged, err
}

func (t trust) save(dir string) error {
	b, err := json.Marshal(t)
	if err != nil {
		return err
	}
	if err := WriteFile(filepath.Join(dir, trustName), b, 0o600); err != nil {
		return fmt.Errorf("keep verified metadata: %w", err)
	}
	return nil
}

// loadJSON reads a file of format 1. One that is not there leaves v as it is; one
// that cannot be understood is renamed to NAME.damaged.
func loadJSON(path string, limit int64, v interface{ valid() error }) (damaged bool, err error) {
	b, err := readFile(path, limit)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil && !errors.Is(err, errTooLong):
		return false, fmt.Errorf("read %s: %w", path, err)
	case err == nil:
		if err = json.Unmarshal(b, v); err == nil {
			err = v.valid()
		}
	}
	if err == nil {
		return false, nil
	}
	if err := os.Rename(path, path+".damaged"); err != nil {
		return true, fmt.Errorf("put the damaged %s aside: %w", path, err)
	}
	return true, syncFolder(filepath.Dir(path))
}

func (t *trust) valid() error {
	if t.Format != 1 || len(t.Roots) > 2*maxRootRotations {
		return fmt.Errorf("format %d with %d roots", t.Format, len(t.Roots))
	}
	return nil
}
