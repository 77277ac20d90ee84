package agent

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// pinFile holds, on an unlocked volume, the PIN: without it no new state could be
// sealed for an update, and who can read it has the volume open. It is not for use
// elsewhere.
const pinFile = "pin"

// PINs are UTF-8 text. The TPM counts wrong ones, so a short one does.
const (
	minPINChars = 4
	maxPINBytes = 64
)

// errRecoveryWanted is what somebody without the PIN asked for.
var errRecoveryWanted = errors.New("the recovery key was asked for instead of the PIN")

// askPIN asks at the console until the TPM takes the PIN. Its own count of wrong ones
// ends the guessing.
func (m *Machine) askPIN(tpm seal.TPM, tokens []seal.Token, signatures seal.Signatures) (secret []byte, i int, err error) {
	for {
		line, err := m.askHidden("PIN (or: recovery, reboot, poweroff): ")
		if err != nil {
			return nil, -1, fmt.Errorf("read the PIN: %w", err)
		}
		switch strings.ToLower(line) {
		case "":
			continue
		case "recovery":
			return nil, -1, errRecoveryWanted
		case "reboot":
			return nil, -1, ErrReboot
		case "poweroff":
			return nil, -1, ErrPowerOff
		}
		if err := checkPIN(line); err != nil { // the TPM need not count this
			fmt.Fprintf(m.Console, "\r\nnot opened: %v\r\n", err)
			continue
		}
		pin := []byte(line)
		secret, i, err := seal.UnsealAny(tpm, tokens, signatures, pin)
		luks2.Wipe(pin)
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
			fmt.Fprintf(m.Console, "\r\n%v\r\n", err)
			continue
		}
		again, err := m.askHidden("the same once more: ")
		if err != nil {
			return nil, fmt.Errorf("read the new PIN: %w", err)
		}
		if !bytes.Equal([]byte(pin), []byte(again)) {
			fmt.Fprint(m.Console, "\r\nthe two differ\r\n")
			continue
		}
		return []byte(pin), nil
	}
}

// checkPIN refuses what could not be typed at boot: the words that the prompt takes, and
// what is as long as a recovery key, which belongs to the other prompt (F58).
func checkPIN(pin string) error {
	switch {
	case utf8.RuneCountInString(pin) < minPINChars || len(pin) > maxPINBytes || !utf8.ValidString(pin):
		return fmt.Errorf("a PIN has at least %d characters and at most %d bytes", minPINChars, maxPINBytes)
	case strings.EqualFold(pin, "recovery") || strings.EqualFold(pin, "reboot") || strings.EqualFold(pin, "poweroff"):
		return fmt.Errorf("%q is what the prompt for the PIN takes for a command", pin)
	}
	return nil
}

// askHidden reads a line without showing it, where the console can do that.
func (m *Machine) askHidden(prompt string) (string, error) {
	in := m.keyboard()
	fmt.Fprint(m.Console, "\r\n"+prompt)
	if m.Echo != nil {
		m.Echo(false)
		defer m.Echo(true)
	}
	return readLine(in)
}
