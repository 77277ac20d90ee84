package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// ErrReboot and ErrPowerOff are what a person asked for at the recovery prompt.
var (
	ErrReboot   = errors.New("reboot asked for at the recovery prompt")
	ErrPowerOff = errors.New("power-off asked for at the recovery prompt")
)

// wrongKeyDelay slows down guessing at the console; the key has 256 bits, so
// this is about noise, not about strength.
const wrongKeyDelay = 2 * time.Second

// recover explains why the TPM refused and asks for the recovery key until the
// volumes are open. It accepts a key, "reboot" and "poweroff", and nothing else:
// this prompt never becomes a shell (F80).
func (m *Machine) recover(vols []*volume, cause error) error {
	fmt.Fprintf(m.Console, "\r\n%s\r\n", strings.ReplaceAll(m.explanation(cause), "\n", "\r\n"))
	in := m.keyboard()
	for {
		fmt.Fprint(m.Console, "\r\nrecovery key (or: reboot, poweroff): ")
		line, err := readLine(in)
		if err != nil {
			return fmt.Errorf("read the recovery key: %w", err)
		}
		switch promptWord(line, "reboot", "poweroff") {
		case "reboot":
			return ErrReboot
		case "poweroff":
			return ErrPowerOff
		}
		if len(line) == 0 {
			continue
		}
		err = m.tryRecovery(vols, line)
		luks2.Wipe(line)
		if err == nil {
			m.opened = nil // by the TPM, no state did
			m.Log.Info("opened with the recovery key")
			return nil
		}
		fmt.Fprintf(m.Console, "\r\nnot opened: %v\r\n", err)
		time.Sleep(wrongKeyDelay)
	}
}

// keyboard is the one reader of the console: what it has read ahead is not lost from
// one prompt to the next.
func (m *Machine) keyboard() *bufio.Reader {
	if m.typed == nil {
		m.typed = bufio.NewReaderSize(m.Console, 4096)
	}
	return m.typed
}

// tryRecovery opens the volumes with what a person typed. That they open shows only
// that the key is theirs, and not that they are this box's (F80).
func (m *Machine) tryRecovery(vols []*volume, typed []byte) error {
	key, err := luks2.ParseRecoveryKey(typed)
	if err != nil {
		return err
	}
	defer key.Wipe()
	passphrase := key.Passphrase()
	defer luks2.Wipe(passphrase)
	for _, v := range vols {
		volumeKey, _, err := v.header.Unlock(v.Device, passphrase)
		if errors.Is(err, luks2.ErrPassphrase) {
			return fmt.Errorf("data volume %s: this is not its recovery key", v.Name)
		}
		if err != nil {
			return fmt.Errorf("data volume %s: %w", v.Name, err)
		}
		v.open(volumeKey, "recovery")
		if err := m.checkReleased(v); err != nil {
			return err
		}
	}
	return checkBox(vols)
}

// explanation says in plain words what happened and what it may mean.
func (m *Machine) explanation(cause error) string {
	var b strings.Builder
	var keyslot *keyslotError
	if errors.As(cause, &keyslot) {
		b.WriteString("The data volumes stay closed.\n")
	} else {
		b.WriteString("The data volumes stay closed: the TPM does not give their key to this boot.\n")
	}
	fmt.Fprintf(&b, "  reason: %v\n", cause)
	if len(m.changes) > 0 {
		b.WriteString("  changed since the data was sealed:\n")
	}
	for _, c := range m.changes {
		fmt.Fprintf(&b, "    %s\n", c)
	}
	switch {
	case keyslot != nil:
		b.WriteString("  Innocent: the disk has a damaged sector, or its header was restored from a backup.\n" +
			"  Hostile: somebody put another volume in its place.\n")
	case errors.Is(cause, seal.ErrNoTPM):
		b.WriteString("  This box has no TPM that answers: it may be switched off in the firmware settings, or be gone.\n")
	case errors.Is(cause, seal.ErrWrongTPM):
		b.WriteString("  Innocent: the mainboard was replaced, the disk moved, or the TPM cleared by a firmware update.\n" +
			"  Hostile: somebody took the disk and started it in another box.\n")
	case errors.Is(cause, errRecoveryWanted):
		// Nothing is wrong that would have to be explained.
	case errors.Is(cause, seal.ErrLockout):
		b.WriteString("  The TPM is locked against guessing; it opens again by itself after the time above.\n")
	default:
		b.WriteString("  Innocent: a firmware update, or changed firmware settings.\n" +
			"  Hostile: somebody changed what this box starts.\n")
	}
	return b.String()
}

// readLine reads one line of at most the reader's buffer, without blanks around it, and
// leaves nothing of it in that buffer: it may be a secret.
func readLine(in *bufio.Reader) ([]byte, error) {
	line, err := in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		for errors.Is(err, bufio.ErrBufferFull) {
			luks2.Wipe(line)
			line, err = in.ReadSlice('\n')
		}
		luks2.Wipe(line)
		return nil, err
	}
	defer luks2.Wipe(line)
	if err != nil && (err != io.EOF || len(line) == 0) {
		return nil, err
	}
	return bytes.Clone(bytes.TrimSpace(line)), nil
}

// promptWord is the one of the words that was typed, or "".
func promptWord(line []byte, words ...string) string {
	for _, w := range words {
		if bytes.EqualFold(line, []byte(w)) {
			return w
		}
	}
	return ""
}
