package agent

import (
	"crypto/subtle"
	"fmt"
	"io"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// handOver gives a new box's recovery key to those who are to have it: in an escrow on
// the first volume, and on the console. The volumes are not published yet, so that a
// box whose key nobody was given does not come about.
func (m *Machine) handOver(b image.Boot, vols []*volume, key *luks2.RecoveryKey) error {
	r := b.Appliance.Recovery
	if len(r.Holders) > 0 {
		c := newCustody(m.Log, b.Appliance, m.Root)
		c.Rand, c.OpenTPM = m.Rand, m.openTPM
		var uuids []string
		for _, v := range vols {
			uuids = append(uuids, v.header.UUID())
		}
		if err := c.create(key, uuids); err != nil {
			return fmt.Errorf("escrow of the recovery key: %w", err)
		}
		m.Log.Info("recovery key escrowed", "holders", len(r.Holders), "needed", max(r.Threshold, 1))
	}
	if r.Console == image.ConsoleNone {
		fmt.Fprintf(m.Console, "\r\nThe recovery key of this box is not shown. It is in the escrow for %s.\r\n\r\n", strings.Join(holderNames(r.Holders), ", "))
		return nil
	}
	title := "RECOVERY KEY of this box. Write it down: it is shown once, and it is the only\r\n  way to the data when the TPM or the mainboard is gone."
	if len(r.Holders) > 0 {
		title = "RECOVERY KEY of this box. Write it down: it is shown once. It opens the data\r\n  when the TPM or the mainboard is gone; " + strings.Join(holderNames(r.Holders), ", ") + " can read it too."
	}
	showRecoveryKey(m.Console, key, r.Console, title, "It is void only if a later start of this box shows another one.")
	if r.Confirm {
		return m.confirmKey(key, r.Console)
	}
	return nil
}

func holderNames(holders []image.Holder) (names []string) {
	for _, h := range holders {
		names = append(names, h.Name)
	}
	return names
}

// showRecoveryKey prints the key where a person sees it, and nowhere else: the
// console is not part of any log the agent keeps. With a QR code it fits 80x25, and
// whatever shows no half blocks still has the text.
func showRecoveryKey(console io.Writer, k *luks2.RecoveryKey, mode, above, below string) {
	text := k.Passphrase()
	defer luks2.Wipe(text)
	if mode == image.ConsoleQR {
		if lines, err := qrLines(string(text)); err == nil {
			fmt.Fprintf(console, "%s\r\n", strings.Join(lines, "\r\n"))
			fmt.Fprintf(console, "  %s\r\n  %s\r\n  %s\r\n", oneLine(above), text, below)
			return
		}
	}
	rule := strings.Repeat("=", 78)
	fmt.Fprintf(console, "\r\n%s\r\n  %s\r\n\r\n  %s\r\n\r\n  %s\r\n%s\r\n\r\n", rule, above, text, below, rule)
}

// oneLine is the first sentence of two.
func oneLine(text string) string {
	first, _, _ := strings.Cut(text, ". ")
	return first + ": write it down, it is shown once."
}

// confirmKey waits until the key was typed back. A key that was noted wrong would be
// found out on the day it is needed.
func (m *Machine) confirmKey(key *luks2.RecoveryKey, mode string) error {
	in := m.keyboard()
	for {
		fmt.Fprint(m.Console, "\r\ntype the recovery key back (or: show, reboot, poweroff): ")
		line, err := readLine(in)
		if err != nil {
			return fmt.Errorf("read the recovery key: %w", err)
		}
		switch promptWord(line, "show", "reboot", "poweroff") {
		case "show":
			showRecoveryKey(m.Console, key, mode, "RECOVERY KEY of this box. Write it down", "")
			continue
		case "reboot":
			return ErrReboot
		case "poweroff":
			return ErrPowerOff
		}
		if len(line) == 0 {
			continue
		}
		err = sameKey(key, line)
		luks2.Wipe(line)
		if err != nil {
			fmt.Fprintf(m.Console, "\r\nnot the same: %v\r\n", err)
			continue
		}
		fmt.Fprint(m.Console, "\r\nThat is the recovery key.\r\n")
		return nil
	}
}

// sameKey compares what was typed with the key. It names the first group that differs
// to the person who has the key on the screen.
func sameKey(key *luks2.RecoveryKey, typed []byte) error {
	other, err := luks2.ParseRecoveryKey(typed)
	if err != nil {
		return err
	}
	defer other.Wipe()
	want, got := key.Bytes(), other.Bytes()
	defer luks2.Wipe(want)
	defer luks2.Wipe(got)
	const group = 4 // bytes, eight letters
	for i := 0; i < len(want); i += group {
		if subtle.ConstantTimeCompare(want[i:i+group], got[i:i+group]) != 1 {
			return fmt.Errorf("group %d is another", i/group+1)
		}
	}
	return nil
}
