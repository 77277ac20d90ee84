package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/update"
)

// pinFile holds, on an unlocked volume, the PIN: without it no new state could be
// sealed for an update, and who can read it has the volume open. It is not for use
// elsewhere.
const pinFile = "pin"

// pinNextFile holds a PIN that is being set, on the first volume; empty, that it is being
// taken away. While it is there, some states may be sealed with the old one.
const pinNextFile = "pin.next"

// PINs are UTF-8 text. The TPM counts wrong ones, so a short one does.
const (
	minPINChars = 4
	maxPINBytes = 64
)

// errRecoveryWanted is what somebody without the PIN asked for.
var errRecoveryWanted = errors.New("the recovery key was asked for instead of the PIN")

// askPIN asks at the console until the TPM takes the PIN. Its own count of wrong ones
// ends the guessing.
func (m *Machine) askPIN(tpm seal.TPM, tokens []seal.Token, now map[int]pcr.Digest, signatures seal.Signatures) (secret []byte, i int, err error) {
	for {
		line, err := m.askHidden("PIN (or: recovery, reboot, poweroff): ")
		if err != nil {
			return nil, -1, fmt.Errorf("read the PIN: %w", err)
		}
		switch promptWord(line, "recovery", "reboot", "poweroff") {
		case "recovery":
			return nil, -1, errRecoveryWanted
		case "reboot":
			return nil, -1, ErrReboot
		case "poweroff":
			return nil, -1, ErrPowerOff
		}
		if len(line) == 0 {
			continue
		}
		if err := checkPIN(line); err != nil { // the TPM need not count this
			luks2.Wipe(line)
			fmt.Fprintf(m.Console, "\r\nnot opened: %v\r\n", err)
			continue
		}
		secret, i, err := seal.UnsealWith(tpm, tokens, now, signatures, line)
		luks2.Wipe(line)
		if !errors.Is(err, seal.ErrWrongPIN) {
			return secret, i, err
		}
		fmt.Fprint(m.Console, "\r\nnot opened: this is not the PIN\r\n")
		time.Sleep(wrongKeyDelay)
	}
}

// choosePIN has the person at the first boot choose.
func (m *Machine) choosePIN() ([]byte, error) {
	fmt.Fprintf(m.Console, "\r\nThis box wants a PIN at every start, of at least %d characters.\r\n", minPINChars)
	for {
		pin, err := m.askHidden("new PIN: ")
		if err != nil {
			return nil, fmt.Errorf("read the new PIN: %w", err)
		}
		if err := checkPIN(pin); err != nil {
			luks2.Wipe(pin)
			fmt.Fprintf(m.Console, "\r\n%v\r\n", err)
			continue
		}
		again, err := m.askHidden("the same once more: ")
		if err != nil {
			luks2.Wipe(pin)
			return nil, fmt.Errorf("read the new PIN: %w", err)
		}
		same := bytes.Equal(pin, again)
		luks2.Wipe(again)
		if !same {
			luks2.Wipe(pin)
			fmt.Fprint(m.Console, "\r\nthe two differ\r\n")
			continue
		}
		return pin, nil
	}
}

// checkPIN refuses what could not be typed at boot: the words that the prompt takes, and
// what is as long as a recovery key, which belongs to the other prompt (F58).
func checkPIN(pin []byte) error {
	switch {
	case utf8.RuneCount(pin) < minPINChars || len(pin) > maxPINBytes || !utf8.Valid(pin):
		return fmt.Errorf("a PIN has at least %d characters and at most %d bytes", minPINChars, maxPINBytes)
	case promptWord(pin, "recovery", "reboot", "poweroff") != "":
		return fmt.Errorf("%q is what the prompt for the PIN takes for a command", pin)
	}
	return nil
}

// askHidden reads a line without showing it, where the console can do that.
func (m *Machine) askHidden(prompt string) ([]byte, error) {
	in := m.keyboard()
	fmt.Fprint(m.Console, "\r\n"+prompt)
	if m.Echo != nil {
		m.Echo(false)
		defer m.Echo(true)
	}
	return readLine(in)
}

// ErrPINWanted says that the release's policy wants a PIN, so that there is no doing
// without.
var ErrPINWanted = errors.New("the policy of the release that runs wants a PIN: it can be changed, and not taken away")

var errNoPIN = errors.New("the release that runs wants a PIN, and none has been set: run holdfast-agent pin set")

// readPIN finds the PIN that states are sealed with: one that the release wants, or that
// the box's owner has added.
func (k *Keeper) readPIN(s *situation) (err error) {
	s.policy = k.Policy
	for _, name := range []string{pinFile, pinNextFile} {
		pin, err := os.ReadFile(filepath.Join(k.folder(), name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("the PIN that states are sealed with: %w", err)
		}
		s.pin, s.renew = pin, name == pinNextFile
	}
	s.policy.PIN = k.Policy.PIN || len(s.pin) > 0
	return nil
}

// SetPIN has the TPM want this PIN at every start, or none when it is nil, in every state
// and on every volume; with the old one it opens nothing any more when SetPIN returns.
// Nobody is asked for the old one: what authorises the change is the management key on
// the open volumes, so that somebody who has forgotten it can set another after a start
// by the recovery key.
//
// A state that cannot be predicted anew is dropped, and its next start wants the recovery
// key once; the report says which. A copy of the disk from before still opens with the
// old PIN, in this box; under the policy rollback-proof it does not. After a power cut the
// box opens with one of the two, and the change is completed in the next boot that is good.
func (k *Keeper) SetPIN(pin []byte) (SyncReport, error) {
	if len(pin) == 0 && k.Policy.PIN {
		return SyncReport{}, ErrPINWanted
	}
	if len(pin) > 0 {
		if err := checkPIN(pin); err != nil {
			return SyncReport{}, err
		}
	}
	unlock, err := k.lock()
	if err != nil {
		return SyncReport{}, err
	}
	defer unlock()
	if err := update.WriteFile(filepath.Join(k.folder(), pinNextFile), pin, 0o600); err != nil {
		return SyncReport{}, fmt.Errorf("note the new PIN: %w", err)
	}
	s, err := k.look()
	if err != nil { // nothing was begun
		return SyncReport{}, errors.Join(err, os.Remove(filepath.Join(k.folder(), pinNextFile)))
	}
	report, err := k.renewPIN(s)
	if err != nil {
		err = fmt.Errorf("%w; the change is noted, and completed in the next boot that is good", err)
	}
	return report, err
}

// renewPIN makes every state anew with the PIN that is noted, and then keeps that.
func (k *Keeper) renewPIN(s *situation) (SyncReport, error) {
	if k.Policy.Policy == seal.PolicyRollbackProof && !s.raise {
		s.bond.counter.Max++ // headers with the old PIN are of the past from now on
		s.raise = true
	}
	wanted, err := k.present(s)
	if err != nil {
		return SyncReport{}, err
	}
	awaited := k.awaited(s, wanted[0].Policy)
	wanted = slices.DeleteFunc(wanted, func(w SealState) bool { // better known, if it is there too
		return slices.ContainsFunc(awaited, func(a SealState) bool { return a.For == w.For })
	})
	wanted = append(append(wanted, awaited...), k.suspendedState(s)...)
	report, err := k.syncAndRaise(s, wanted, nil)
	if err != nil {
		return report, err
	}
	return report, k.keepPIN(s.pin)
}

// awaited are the states of what has been prepared for and has yet to happen, as far as
// they can be predicted once more.
func (k *Keeper) awaited(s *situation, present seal.Policy) (states []SealState) {
	if s.notes.PreparedIn == k.BootID {
		for _, name := range k.bootable(s)[1:] {
			if e, ok := s.notes.Releases[name]; ok {
				more, err := k.coming(s, name, e, present)
				if err != nil {
					k.Log.Info("the next start is not predicted", "reason", err)
				}
				states = append(states, more...)
			}
		}
	}
	if s.notes.PendingSince.IsZero() {
		return states
	}
	variables, err := k.Variables()
	if err == nil {
		var more []SealState
		more, err = k.changed(s, firmwareChange{variables: variables})
		states = append(states, more...)
	}
	if err != nil {
		k.Log.Info("the next start is not predicted", "reason", err)
	}
	return states
}

// keepPIN puts the new PIN in the place of the old one, on the first volume last.
func (k *Keeper) keepPIN(pin []byte) error {
	for i := len(k.Volumes) - 1; i >= 0; i-- {
		path := filepath.Join(k.Root, k.Volumes[i].Volume.Mount, stateFolder, pinFile)
		var err error
		if len(pin) > 0 {
			err = update.WriteFile(path, pin, 0o600)
		} else if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if err != nil {
			return fmt.Errorf("data volume %s: keep the new PIN: %w", k.Volumes[i].Name, err)
		}
	}
	if err := os.Remove(filepath.Join(k.folder(), pinNextFile)); err != nil {
		return fmt.Errorf("keep the new PIN: %w", err)
	}
	return syncFolder(k.folder())
}
