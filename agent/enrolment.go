package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// enrolmentAttempts is how often keys are enrolled that the next boot does not find.
const enrolmentAttempts = 2

// EnrolmentRecord is what a disk remembers of its board.
type EnrolmentRecord struct {
	// Board is the one that the attempts were made on.
	Board string `json:"board,omitempty"`
	// Attempts were made since the keys were last found in force.
	Attempts int `json:"attempts"`
	// Kept says that a boot has found them in force.
	Kept bool `json:"kept"`
	// Failure is why the last attempt could not be completed.
	Failure string `json:"failure,omitempty"`
}

// Enrolment gives a firmware in setup mode the vendor's keys, in a boot that then ends in
// a restart. The next boot finds them in force, or this is tried once more and then given
// up: some boards lose keys over a restart (F4), or have no room for them (F65), and must
// not start for ever. The box is used without them then, and its status says so.
type Enrolment struct {
	Log  *slog.Logger
	Vars EFIVars
	// Board tells one mainboard from another, if it can be told; it may be empty.
	Board string
	// Auths are the signed values of PK, KEK and db.
	Auths map[string][]byte
	// Fresh says that nothing is sealed yet. Where something is, its seal is for a board
	// in the state it has, and keys are enrolled only when it had them before.
	Fresh bool
	// Load and Save keep the record on the disk; what Load cannot read is the zero value.
	Load func() ([]byte, error)
	Save func([]byte) error
}

// Run says whether the box has to restart now. An error is no reason to end the boot.
func (e *Enrolment) Run() (restart bool, err error) {
	s, err := ReadSecureBoot(e.Vars)
	if err != nil {
		return false, err
	}
	record := e.record()
	if s.Enforced() {
		if record.Attempts > 0 || !record.Kept {
			return false, e.save(EnrolmentRecord{Board: e.Board, Kept: true})
		}
		return false, nil
	}
	if !s.SetupMode || !e.Fresh && !record.Kept || record.Attempts >= enrolmentAttempts {
		return false, record.givenUp(s)
	}
	return e.attempt(record)
}

// givenUp says why a board that is in setup mode stays there.
func (r EnrolmentRecord) givenUp(s *SecureBootState) error {
	switch {
	case !s.SetupMode || r.Attempts == 0:
		return nil
	case r.Failure != "" && r.Attempts < enrolmentAttempts: // the volumes were sealed after it
		return fmt.Errorf("the vendor's Secure Boot keys could not be enrolled: %s; it is tried again after a factory reset", printable(r.Failure))
	case r.Failure != "":
		return fmt.Errorf("the vendor's Secure Boot keys could not be enrolled: %s", printable(r.Failure))
	}
	return fmt.Errorf("the firmware does not keep keys over a restart: it has lost the Secure Boot keys that were enrolled %d times; they are not enrolled again by themselves", r.Attempts)
}

// attempt restarts the box as soon as one variable has changed: the registers of the next
// boot are others then, and nothing may be sealed to those of this one.
func (e *Enrolment) attempt(record EnrolmentRecord) (restart bool, err error) {
	record.Attempts++
	record.Failure = ""
	// First: an enrolment that is not remembered could be repeated for ever.
	if err := e.save(record); err != nil {
		return false, err
	}
	e.Log.Info("enrolling the vendor's Secure Boot keys", "attempt", record.Attempts)
	written, err := e.write()
	if err != nil {
		record.Failure = err.Error()
		err = errors.Join(err, e.save(record))
	}
	return written > 0, err
}

// write puts the platform key last: it ends the setup mode. It says how many variables
// were written.
func (e *Enrolment) write() (written int, err error) {
	needed := 0
	for _, auth := range e.Auths {
		needed += len(auth) + variableOverhead
	}
	if err := checkRoom(e.Vars, needed); err != nil {
		return 0, fmt.Errorf("enrol db, KEK and PK: %w", err)
	}
	for _, name := range []string{sigdb.DB, sigdb.KEK, sigdb.PK} {
		v, err := secureBootVar(name)
		if err != nil {
			return written, err
		}
		err = e.Vars.Write(v, sigdb.Attributes, e.Auths[name])
		if errors.Is(err, unix.ENOSPC) {
			err = noRoom(e.Vars, len(e.Auths[name]), err)
		}
		if err != nil {
			return written, fmt.Errorf("enrol %s: %w", name, err)
		}
		written++
	}
	return written, nil
}

func (e *Enrolment) record() (r EnrolmentRecord) {
	b, err := e.Load()
	if err != nil || json.Unmarshal(b, &r) != nil || r.Attempts < 0 {
		return EnrolmentRecord{Board: e.Board}
	}
	if r.Board != e.Board { // what one did not keep, its successor may
		return EnrolmentRecord{Board: e.Board, Kept: r.Kept}
	}
	return r
}

func (e *Enrolment) save(r EnrolmentRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := e.Save(append(b, '\n')); err != nil {
		return fmt.Errorf("note on the enrolment of keys: %w", err)
	}
	return nil
}
