package agent

import (
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/sigdb"
)

// board is a box in setup mode, with a disk that remembers.
type board struct {
	*Enrolment
	t      *testing.T
	fw     *firmware
	note   []byte
	unsave error
}

func newBoard(t *testing.T) *board {
	ours, _ := vendors(t)
	b := &board{t: t, fw: &firmware{free: -1, broken: map[string]error{}}}
	b.lose()
	b.Enrolment = &Enrolment{
		Log: slog.New(slog.DiscardHandler), Vars: b.fw, Fresh: true,
		Auths: map[string][]byte{sigdb.PK: ours.PK.Auth, sigdb.KEK: ours.KEK.Auth, sigdb.DB: ours.DB.Auth},
		Load: func() ([]byte, error) {
			if b.note == nil {
				return nil, fs.ErrNotExist
			}
			return b.note, nil
		},
		Save: func(n []byte) error {
			if b.unsave == nil {
				b.note = n
			}
			return b.unsave
		},
	}
	return b
}

// lose is a board's restart without its keys.
func (b *board) lose() {
	b.fw.stamps = map[string]time.Time{}
	b.fw.values = map[string][]byte{"SecureBoot": {0}, "SetupMode": {1}, "AuditMode": {0}, "DeployedMode": {0}}
}

// keep is one with them.
func (b *board) keep() {
	if len(b.fw.values["PK"]) > 0 {
		b.fw.values["SetupMode"], b.fw.values["SecureBoot"] = []byte{0}, []byte{1}
	}
}

func (b *board) run(name string, restart bool, failure string) {
	b.t.Helper()
	got, err := b.Run()
	if got != restart || (err == nil) != (failure == "") || err != nil && !strings.Contains(err.Error(), failure) {
		b.t.Errorf("%s: restart %v, %v; want %v, %q", name, got, err, restart, failure)
	}
}

// TestEnrolmentKept: one boot enrols and restarts, the next finds the keys and may seal to
// them; a firmware that is reset later gets them again.
func TestEnrolmentKept(t *testing.T) {
	ours, _ := vendors(t)
	want := image.SecureBoot{Enroll: "force", Keys: certificatesOf(ours)}
	b := newBoard(t)
	b.run("first boot", true, "")
	if on, _, err := SecureBootFor(b.fw, want); on || err != nil {
		t.Errorf("the boot that enrols may seal: %v, %v", on, err)
	}
	b.keep()
	b.run("second boot", false, "")
	if on, why, err := SecureBootFor(b.fw, want); !on || why != "" || err != nil {
		t.Errorf("the boot that reads them back: %v, %q, %v", on, why, err)
	}
	b.Fresh = false
	b.run("later", false, "")
	b.lose()
	b.run("after a reset of the firmware", true, "")
	b.keep()
	b.run("and its restart", false, "")
	if got := string(b.note); got != "{\"attempts\":0,\"kept\":true}\n" {
		t.Errorf("noted %s", got)
	}
}

// TestEnrolmentLost (F4): a board that loses them is not restarted for ever, and nothing
// is sealed to them.
func TestEnrolmentLost(t *testing.T) {
	ours, _ := vendors(t)
	b := newBoard(t)
	restarts := 0
	for range 10 {
		if restart, _ := b.Run(); restart {
			restarts++
		}
		b.lose()
		if on, why, _ := SecureBootFor(b.fw, image.SecureBoot{Enroll: "force", Keys: certificatesOf(ours)}); on || !strings.Contains(why, "does not keep keys") {
			t.Errorf("%v, %q", on, why)
		}
	}
	if restarts != enrolmentAttempts {
		t.Errorf("%d restarts", restarts)
	}
	b.run("then", false, "lost the Secure Boot keys that were enrolled 2 times")
}

func TestEnrolmentRefusals(t *testing.T) {
	b := newBoard(t)
	b.Fresh = false
	b.run("data sealed without keys", false, "")
	b = newBoard(t)
	b.fw.values["SetupMode"] = []byte{0}
	b.run("off, and no setup mode", false, "")
	b = newBoard(t)
	b.unsave = errors.New("ESP is read-only")
	b.run("what cannot be remembered", false, "ESP is read-only")
	b = newBoard(t)
	b.fw.broken["SetupMode"] = unix.EIO
	b.run("unreadable", false, "unavailable")
	b = newBoard(t)
	b.fw.full = true
	b.run("full", true, "variable store is full")
	b = newBoard(t)
	b.note = []byte(`{"attempts": -5}`)
	b.run("a note of somebody else", true, "")
	b = newBoard(t)
	b.Auths[sigdb.KEK] = nil
	b.run("no key to enrol", true, "enrol KEK")
	if len(b.fw.values["PK"]) > 0 {
		t.Error("the platform key was enrolled without a key exchange key")
	}
}
