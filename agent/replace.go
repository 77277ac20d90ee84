package agent

import (
	"bytes"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// A recovery key is replaced so that at every moment one that somebody has opens all
// the volumes, whatever is cut off where:
//
//	the successor's escrow is written, and that there is to be a successor;
//	every volume gets a keyslot for it, which is tried;
//	the account names it as the one: a single write, and the turning point;
//	every volume loses the keyslots of all other recovery keys.
//
// Before the turning point the old key holds, after it the new one, and both open all
// volumes around it. [Custody.Settle] drops what a cut left behind. What authorises it
// is the management key on the volumes (F48). The token of a recovery key's slot
// says which key it is for; systemd passes over that.

// serialField is our addition to systemd's recovery token; a token without it is that
// of key 1.
const serialField = "holdfast_serial"

// keyToken is a token of a recovery key.
type keyToken struct {
	id, serial int
	slots      []int
}

// keyTokens lists the tokens of recovery keys, by id.
func keyTokens(h *luks2.Header) (list []keyToken) {
	tokens := h.Tokens()
	for _, id := range slices.Sorted(maps.Keys(tokens)) {
		if tokenType(tokens[id]) != recoveryTokenType {
			continue
		}
		var t struct {
			Serial int `json:"holdfast_serial"`
		}
		if err := json.Unmarshal(tokens[id], &t); err != nil {
			continue
		}
		list = append(list, keyToken{id, max(t.Serial, 1), tokenSlots(tokens[id])})
	}
	return list
}

func hasKey(h *luks2.Header, serial int) bool {
	return slices.ContainsFunc(keyTokens(h), func(t keyToken) bool { return t.serial == serial && len(t.slots) > 0 })
}

// headers is the open volumes while their headers are being changed.
type headers struct {
	c      *Custody
	vols   []Partition
	unlock func()
}

// lockHeaders opens the volumes and keeps others who change headers out.
func (c *Custody) lockHeaders() (*headers, error) {
	vols, closer, err := c.Open()
	if err != nil {
		return nil, err
	}
	// The same lock as for changes of the TPM states, which take far less.
	unlock, err := (&Sealer{Volumes: vols, Root: c.Root, Patience: headersTime}).lock()
	if err != nil {
		return nil, errors.Join(err, closer.Close())
	}
	return &headers{c, vols, func() { unlock(); closer.Close() }}, nil
}

// headersTime is how long to wait for somebody else who changes headers.
const headersTime = 30 * time.Second

// each reads every volume's header anew, whitelisted (F81), and writes it when do says
// that it changed.
func (h *headers) each(do func(p Partition, header *luks2.Header) (changed bool, err error)) error {
	for _, p := range h.vols {
		header, report, err := luks2.Read(p.Device, p.Device.Size())
		if err == nil && !report.Sound() {
			err = header.Repair(p.Device)
		}
		changed := false
		if err == nil {
			changed, err = do(p, header)
		}
		if err == nil && changed {
			err = header.Write(p.Device)
		}
		if err != nil {
			return fmt.Errorf("data volume %s: %w", p.Name, err)
		}
	}
	return nil
}

// Replaced is another recovery key that waits to take over.
type Replaced struct {
	Serial int `json:"serial"`
	// Key is the recovery key for the person who asked; nil when the spec says that
	// nobody is shown one.
	Key *luks2.RecoveryKey `json:"-"`
}

// Replace makes another recovery key that opens every volume. It takes the old one's
// place by [Custody.Commit] when a person has it, and by itself when its escrow has
// arrived where the spec says that nobody is shown a key. The caller wipes the key.
func (c *Custody) Replace() (r *Replaced, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Config.Console == image.ConsoleNone && len(c.Config.Holders) == 0 {
		return nil, errors.New("the release shows nobody the recovery key and names no holders: nobody would have it")
	}
	h, err := c.lockHeaders()
	if err != nil {
		return nil, fmt.Errorf("replace the recovery key: %w", err)
	}
	defer h.unlock()
	a, err := c.begin(h)
	if err != nil {
		return nil, fmt.Errorf("replace the recovery key: %w", err)
	}
	key, err := luks2.GenerateRecoveryKey(c.random())
	if err != nil {
		return nil, err
	}
	if err := h.introduce(&a, key); err != nil {
		key.Wipe()
		return nil, errors.Join(fmt.Errorf("replace the recovery key: %w", err), h.rollBack(a))
	}
	c.Log.Info("another recovery key was made", "serial", a.Next.Serial, "by_escrow", a.Next.ByEscrow)
	r = &Replaced{Serial: a.Next.Serial, Key: key}
	if a.Next.ByEscrow {
		key.Wipe()
		r.Key = nil
	}
	return r, nil
}

// begin drops an earlier attempt and notes this one. An account that was lost begins
// anew, above every number in the headers.
func (c *Custody) begin(h *headers) (account, error) {
	a, err := c.load()
	if errors.Is(err, errCustody) {
		a, err = account{Serial: 1, Last: 1}, nil
		c.Log.Warn("recovery key", "problem", errCustody)
	} else if err == nil && a.Next != nil {
		if err = h.rollBack(a); err == nil {
			a, err = c.load()
		}
	}
	if err != nil {
		return a, err
	}
	err = h.each(func(_ Partition, header *luks2.Header) (bool, error) {
		for _, t := range keyTokens(header) {
			a.Last = max(a.Last, t.serial)
		}
		return false, nil
	})
	if err != nil {
		return a, err
	}
	a.Last++
	a.Next = &successor{Serial: a.Last, ByEscrow: c.Config.Console == image.ConsoleNone}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return a, err
	}
	return a, c.save(a)
}

// introduce writes the successor's escrow and gives every volume a keyslot for it.
func (h *headers) introduce(a *account, key *luks2.RecoveryKey) error {
	passphrase := key.Passphrase()
	defer luks2.Wipe(passphrase)
	var uuids []string
	err := h.each(func(_ Partition, header *luks2.Header) (bool, error) {
		uuids = append(uuids, header.UUID())
		return false, nil
	})
	if err != nil {
		return err
	}
	if len(h.c.Config.Holders) > 0 {
		if err := h.c.makeEscrow(key, a.Next.Serial, uuids); err != nil {
			return fmt.Errorf("escrow: %w", err)
		}
	}
	err = h.each(func(p Partition, header *luks2.Header) (bool, error) {
		return true, h.add(p, header, passphrase, a.Next.Serial)
	})
	if err != nil {
		return err
	}
	if err := h.try(passphrase, a.Next.Serial); err != nil {
		return err
	}
	a.Next.Ready = true
	return h.c.save(*a)
}

// open unlocks a volume by the management key that lies on it.
func (h *headers) open(p Partition, header *luks2.Header) ([]byte, error) {
	management, err := readLimited(filepath.Join(h.c.Root, p.Mount, stateFolder, managementKeyFile), maxCustodyBytes)
	if err != nil {
		return nil, fmt.Errorf("the key that authorises a change: %w", err)
	}
	defer luks2.Wipe(management)
	key, _, err := header.Unlock(p.Device, management)
	return key, err
}

// add edits one header in memory.
func (h *headers) add(p Partition, header *luks2.Header, passphrase []byte, serial int) error {
	volumeKey, err := h.open(p, header)
	if err != nil {
		return err
	}
	defer luks2.Wipe(volumeKey)
	slot, err := header.AddKeyslot(volumeKey, passphrase, luks2.RecoveryKDF(0), h.c.Rand)
	if err != nil {
		return err
	}
	token := bytes.TrimSuffix(luks2.RecoveryToken(slot), []byte("}"))
	_, err = header.SetToken(luks2.NextToken, fmt.Appendf(token, `,%q:%d}`, serialField, serial))
	return err
}

// try opens every volume with the new key, as its header is on the medium.
func (h *headers) try(passphrase []byte, serial int) error {
	return h.each(func(p Partition, header *luks2.Header) (bool, error) {
		want, err := h.open(p, header)
		if err != nil {
			return false, err
		}
		defer luks2.Wipe(want)
		for _, t := range keyTokens(header) {
			if t.serial != serial {
				continue
			}
			got, err := header.UnlockSlot(p.Device, t.slots[0], passphrase)
			if err != nil {
				return false, fmt.Errorf("the new key, read back: %w", err)
			}
			defer luks2.Wipe(got)
			if subtle.ConstantTimeCompare(got, want) != 1 {
				return false, errors.New("the new key, read back, opens another volume key")
			}
			return false, nil
		}
		return false, errors.New("the new key's slot is not there")
	})
}

// Commit puts the successor in force, by the number that [Custody.Replace] gave it, and
// drops every other recovery key.
func (c *Custody) Commit(serial int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.load()
	if err != nil {
		return err
	}
	if a.Next == nil || a.Next.Serial != serial || !a.Next.Ready {
		return fmt.Errorf("no recovery key %d waits to take over", serial)
	}
	if a.Next.ByEscrow {
		return fmt.Errorf("recovery key %d takes over when its escrow has arrived, as nobody was shown it", serial)
	}
	return c.succeed(a)
}

// Abandon drops a successor that is not in force yet.
func (c *Custody) Abandon() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.load()
	if err != nil || a.Next == nil {
		return err
	}
	h, err := c.lockHeaders()
	if err != nil {
		return err
	}
	defer h.unlock()
	return h.rollBack(a)
}

// succeedWhenArrived puts a successor in force that nobody was shown, once its escrow
// is where it belongs: acknowledged, or handed out where there are no receipts.
func (c *Custody) succeedWhenArrived(a account) error {
	if a.Next == nil || !a.Next.ByEscrow || !a.Next.Ready {
		return nil
	}
	if c.Config.ReceiptKeyPEM == "" {
		if !c.arrived(a.Next.Handed) {
			return nil
		}
		return c.succeed(a)
	}
	e, err := c.readEscrow(a.Next.Serial)
	if err != nil || c.receipt(e) == nil {
		return err
	}
	return c.succeed(a)
}

// succeed is the turning point and what follows it.
func (c *Custody) succeed(a account) error {
	h, err := c.lockHeaders()
	if err != nil {
		return err
	}
	defer h.unlock()
	if err := h.wantKey(a.Next.Serial); err != nil {
		return err
	}
	a.Serial, a.Handed, a.Next, a.Dropping = a.Next.Serial, a.Next.Handed, nil, true
	if err := c.save(a); err != nil {
		return err
	}
	c.Log.Info("recovery key replaced", "serial", a.Serial)
	return h.dropOthers(a)
}

// wantKey is an error unless every volume has a keyslot of this key.
func (h *headers) wantKey(serial int) error {
	return h.each(func(_ Partition, header *luks2.Header) (bool, error) {
		if !hasKey(header, serial) {
			return false, fmt.Errorf("it has no keyslot of recovery key %d, so none of another is dropped", serial)
		}
		return false, nil
	})
}

// dropOthers takes every recovery key but the one in force off the volumes, and the
// files about them.
func (h *headers) dropOthers(a account) error {
	if err := h.wantKey(a.Serial); err != nil {
		return err
	}
	err := h.drop(func(serial int) bool { return serial != a.Serial })
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(h.c.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(h.c.Dir, e.Name())
		if (strings.HasPrefix(e.Name(), "escrow-") || strings.HasPrefix(e.Name(), "receipt-")) && path != h.c.escrowPath(a.Serial) && path != h.c.receiptPath(a.Serial) {
			if err := h.c.remove(path); err != nil {
				return err
			}
		}
	}
	a.Dropping = false
	return h.c.save(a)
}

// drop removes the keyslots of recovery keys by their number.
func (h *headers) drop(unwanted func(serial int) bool) error {
	return h.each(func(_ Partition, header *luks2.Header) (changed bool, err error) {
		for _, t := range keyTokens(header) {
			if !unwanted(t.serial) {
				continue
			}
			changed = true
			for _, slot := range t.slots {
				if err := header.RemoveKeyslot(slot); err != nil {
					return false, err
				}
			}
			if _, left := header.Tokens()[t.id]; left { // it named no slot
				if err := header.RemoveToken(t.id); err != nil {
					return false, err
				}
			}
		}
		return changed, nil
	})
}

// rollBack takes a successor off the volumes again; nothing else is touched.
func (h *headers) rollBack(a account) error {
	next := a.Next.Serial
	if err := h.drop(func(serial int) bool { return serial == next }); err != nil {
		return err
	}
	for _, path := range []string{h.c.escrowPath(next), h.c.receiptPath(next)} {
		if err := h.c.remove(path); err != nil {
			return err
		}
	}
	a.Next = nil
	return h.c.save(a)
}

// Settle ends what an earlier run of the box left undone. Call it once after the boot.
// On a box where nothing is, it reads one file.
func (c *Custody) Settle() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.load()
	if err != nil || a.Next == nil && !a.Dropping {
		return err
	}
	if a.Next != nil && a.Next.ByEscrow && a.Next.Ready {
		return c.succeedWhenArrived(a)
	}
	h, err := c.lockHeaders()
	if err != nil {
		return err
	}
	defer h.unlock()
	if a.Next != nil {
		c.Log.Warn("a replacement of the recovery key was cut off; the key before it holds", "serial", a.Serial, "void", a.Next.Serial)
		return h.rollBack(a)
	}
	return h.dropOthers(a)
}
