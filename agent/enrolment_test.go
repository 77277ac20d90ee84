package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/sigdb"
)

// emptyBoard is a box in setup mode, with a disk that remembers.
type emptyBoard struct {
	*Enrolment
	t      *testing.T
	fw     *firmware
	note   []byte
	unsave error
}

func newEmptyBoard(t *testing.T) *emptyBoard {
	ours, _ := vendors(t)
	b := &emptyBoard{t: t, fw: &firmware{free: -1, broken: map[string]error{}}}
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
func (b *emptyBoard) lose() {
	b.fw.stamps = map[string]time.Time{}
	b.fw.values = map[string][]byte{"SecureBoot": {0}, "SetupMode": {1}, "AuditMode": {0}, "DeployedMode": {0}}
}

// keep is one with them.
func (b *emptyBoard) keep() {
	if len(b.fw.values["PK"]) > 0 {
		b.fw.values["SetupMode"], b.fw.values["SecureBoot"] = []byte{0}, []byte{1}
	}
}

func (b *emptyBoard) run(name string, restart bool, failure string) {
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
	b := newEmptyBoard(t)
	b.run("first boot", true, "")
	if on, _, err := SecureBootFor(b.fw, want, nil); on || err != nil {
		t.Errorf("the boot that enrols may seal: %v, %v", on, err)
	}
	b.keep()
	b.run("second boot", false, "")
	if on, why, err := SecureBootFor(b.fw, want, nil); !on || why != "" || err != nil {
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
	b := newEmptyBoard(t)
	restarts := 0
	for range 10 {
		restart, err := b.Run()
		if restart {
			restarts++
			b.lose()
			continue
		}
		on, why, _ := SecureBootFor(b.fw, image.SecureBoot{Enroll: "force", Keys: certificatesOf(ours)}, err)
		if on || !strings.Contains(why, "does not keep keys over a restart") {
			t.Errorf("%v, %q", on, why)
		}
	}
	if restarts != enrolmentAttempts {
		t.Errorf("%d restarts", restarts)
	}
	b.run("then", false, "lost the Secure Boot keys that were enrolled 2 times")
	b.Board = "another mainboard"
	b.run("on another one", true, "")
}

func TestEnrolmentRefusals(t *testing.T) {
	b := newEmptyBoard(t)
	b.Fresh = false
	b.run("data sealed without keys", false, "")
	b = newEmptyBoard(t)
	b.fw.values["SetupMode"] = []byte{0}
	b.run("off, and no setup mode", false, "")
	b = newEmptyBoard(t)
	b.unsave = errors.New("ESP is read-only")
	b.run("what cannot be remembered", false, "ESP is read-only")
	b = newEmptyBoard(t)
	b.fw.broken["SetupMode"] = unix.EIO
	b.run("unreadable", false, "unavailable")
	b = newEmptyBoard(t)
	b.note = []byte(`{"attempts": -5}`)
	b.run("a note of somebody else", true, "")
	b = newEmptyBoard(t)
	b.Auths[sigdb.KEK] = nil
	b.run("no key to enrol", true, "enrol KEK")
	if len(b.fw.values["PK"]) > 0 {
		t.Error("the platform key was enrolled without a key exchange key")
	}
}

// TestEnrolmentNoRoom (F65): a full variable store is a warning that stays in the status,
// and never keeps a box from starting. Where a part was written, the box restarts, for
// the registers of the next boot differ.
func TestEnrolmentNoRoom(t *testing.T) {
	for name, c := range map[string]struct {
		fill     func(*firmware)
		restarts []bool // boot by boot
		failure  string
	}{
		"full":          {func(f *firmware) { f.full = true }, []bool{false, false}, "enrol db: the firmware's variable store is full: "},
		"it is known":   {func(f *firmware) { f.free = 4000 }, []bool{false, false}, "is full: 4000 bytes are free, "},
		"room for some": {func(f *firmware) { f.room = 2 }, []bool{true, true}, "enrol PK: the firmware's variable store is full"},
		"crash dumps": {func(f *firmware) { f.full, f.others = true, []EFIVar{{Name: "dump-type0-1-1-1-C"}} }, []bool{false, false},
			"1 variables in it are crash dumps"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newEmptyBoard(t)
			c.fill(b.fw)
			want := image.SecureBoot{Enroll: "force"}
			for n, restart := range c.restarts {
				b.run(fmt.Sprint("boot ", n+1), restart, c.failure)
				if n == 0 && !restart { // what a box says that sealed in this boot
					b.Fresh = false
					b.run("sealed", false, "; it is tried again after a factory reset")
					b.Fresh = true
				}
				if len(b.fw.values["PK"]) > 0 {
					t.Error("the platform key was enrolled")
				}
				b.fw.writes = nil // the store is as full as it was
			}
			for _, b.Fresh = range []bool{true, false} { // the last one has sealed
				b.run("then", false, "could not be enrolled: enrol")
			}
			if len(b.fw.writes) > 0 {
				t.Errorf("written after it was given up: %v", b.fw.writes)
			}
			_, failure := b.Run()
			on, why, err := SecureBootFor(b.fw, want, failure)
			if on || err != nil {
				t.Errorf("a seal rests on it: %v, %v", on, err)
			}
			if !strings.Contains(why, c.failure) || !strings.Contains(why, unix.ENOSPC.Error()) || strings.Contains(why, "does not keep") {
				t.Errorf("the cause is said to be: %s", why)
			}
			// Somebody has made room, and enrolled them by hand.
			b.fw.full, b.fw.free, b.fw.room = false, -1, 0
			for _, name := range []string{sigdb.DB, sigdb.KEK, sigdb.PK} {
				v, err := secureBootVar(name)
				if err == nil {
					err = b.fw.Write(v, sigdb.Attributes, b.Auths[name])
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			b.keep()
			b.run("enrolled", false, "")
			if got := string(b.note); got != "{\"attempts\":0,\"kept\":true}\n" {
				t.Errorf("noted %s", got)
			}
		})
	}
}

// TestEnrolmentRecovers: what had no room once and has it at the second attempt.
func TestEnrolmentRecovers(t *testing.T) {
	b := newEmptyBoard(t)
	b.fw.room = 1
	b.run("first", true, "enrol KEK")
	b.fw.room = 0
	b.run("second", true, "")
	b.keep()
	b.run("third", false, "")
}

// TestEnrolmentForeignNote: the note lies where anybody can write.
func TestEnrolmentForeignNote(t *testing.T) {
	b := newEmptyBoard(t)
	b.note = []byte(`{"attempts": 7, "failure": "\u001b[2J\nrecovery key:"}`)
	_, err := b.Run()
	if err == nil || strings.ContainsAny(err.Error(), "\x1b\n") {
		t.Errorf("%q", err)
	}
}
