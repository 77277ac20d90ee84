package agent

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// The key of the encrypted slots lies on every data volume, beside the management key,
// so that whatever opens the volumes opens the slots, and nothing more is sealed.
//
// A factory reset destroys the volumes, and the slots have to open after it. Each boot
// that the TPM opened therefore leaves the key on the first volume a second time,
// encrypted under the secret that the TPM gave, beside the token of that secret. Reset
// copies this to the ESP: no one but this TPM, in this state of the box, opens it there.
// The next boot takes the key from it, before it makes new volumes, and overwrites it once
// the new volumes have the key. The end of the box's life overwrites it, too.
const (
	slotKeyFile = "slots.key"
	// slotCarryFile is on the first volume, slotCarryESP on the ESP after a reset.
	slotCarryFile = "slots.carry"
	slotCarryESP  = "holdfast/slots.carry"

	slotCarryLabel    = "holdfast slots 1"
	slotCarryFormat   = 1
	maxSlotCarryBytes = 32 << 10
)

// Slots is what [Machine] needs for a release whose slots are encrypted.
type Slots struct {
	Disk *partition.Disk
	// Slot was booted; Verity describes its root.
	Slot   partition.Slot
	Verity image.Verity

	key []byte
}

// device is the slot's partition, as it lies on the disk.
func (s *Slots) device() (partition.Device, error) {
	dev, _, err := s.Disk.Partition(s.Slot.Partition())
	return dev, err
}

func (s *Slots) inTheClear() (bool, error) {
	dev, err := s.device()
	if err != nil {
		return false, err
	}
	return slotcrypt.InTheClear(dev, s.Verity)
}

// TakeKey is the key of the box's slots, once the volumes are open. The caller wipes it.
func (s *Slots) TakeKey() []byte {
	key := s.key
	s.key = nil
	return key
}

// slotCarry is the key of the slots under a secret that the TPM gives.
type slotCarry struct {
	Format int             `json:"format"`
	Token  json.RawMessage `json:"token"`
	Nonce  []byte          `json:"nonce"`
	Key    []byte          `json:"key"` // AES-256-GCM
}

// slotCarryCipher is AES-256-GCM under HMAC-SHA256 of the label, keyed by the secret.
func slotCarryCipher(secret []byte) (cipher.AEAD, error) {
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(slotCarryLabel))
	kek := mac.Sum(nil)
	defer luks2.Wipe(kek)
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func newSlotCarry(token seal.Token, secret, key []byte, random io.Reader) ([]byte, error) {
	aead, err := slotCarryCipher(secret)
	if err != nil {
		return nil, err
	}
	token.Keyslots = []string{"0"} // a token has one; here it means nothing
	c := slotCarry{Format: slotCarryFormat, Nonce: make([]byte, aead.NonceSize())}
	if c.Token, err = token.Marshal(); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(random, c.Nonce); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	c.Key = aead.Seal(nil, c.Nonce, key, nil)
	return json.Marshal(c)
}

// readSlotCarry reads what newSlotCarry wrote; who has the disk may have changed it.
func readSlotCarry(text []byte) (c slotCarry, token seal.Token, err error) {
	if len(text) > maxSlotCarryBytes {
		return c, token, fmt.Errorf("%d bytes, at most %d expected", len(text), maxSlotCarryBytes)
	}
	if err := json.Unmarshal(text, &c); err != nil {
		return c, token, err
	}
	if c.Format != slotCarryFormat {
		return c, token, fmt.Errorf("format %d, and this release knows %d", c.Format, slotCarryFormat)
	}
	token, err = seal.ParseToken(c.Token)
	return c, token, err
}

func (c slotCarry) open(secret []byte) ([]byte, error) {
	aead, err := slotCarryCipher(secret)
	if err != nil {
		return nil, err
	}
	if len(c.Nonce) != aead.NonceSize() {
		return nil, fmt.Errorf("a nonce of %d bytes", len(c.Nonce))
	}
	key, err := aead.Open(nil, c.Nonce, c.Key, nil)
	if err != nil || len(key) != slotcrypt.KeyBytes {
		return nil, errors.New("the secret that the TPM gave does not open it: it was changed, or is of another box")
	}
	return key, nil
}

// errSlotKeyLost is for a slot that is encrypted when nothing has the key any more.
var errSlotKeyLost = errors.New("the slot is encrypted and its key is not on the data volumes: " +
	"restore them from a backup, or write the image again if the data may be lost")

// carriedSlotKey is the key that a factory reset carried over; nil when the slot needs
// none. It is called before volumes are made: without the key they would be of no use.
func (m *Machine) carriedSlotKey() ([]byte, error) {
	if clear, err := m.Slots.inTheClear(); clear || err != nil {
		return nil, err
	}
	text, err := readCarried(m.Slots.Disk)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errSlotKeyLost
	}
	if err != nil {
		return nil, err
	}
	key, err := m.openSlotCarry(text)
	if err != nil {
		return nil, fmt.Errorf("the key of the encrypted slots, carried over a factory reset: %w", err)
	}
	m.Log.Info("the key of the slots was carried over the factory reset")
	return key, nil
}

func (m *Machine) openSlotCarry(text []byte) ([]byte, error) {
	c, token, err := readSlotCarry(text)
	if err != nil {
		return nil, err
	}
	tpm, err := m.openTPM()
	if err != nil {
		return nil, err
	}
	signatures, err := m.signatures()
	if err != nil {
		return nil, err
	}
	secret, _, err := m.ask(tpm, []seal.Token{token}, signatures)
	if err != nil {
		return nil, err
	}
	defer luks2.Wipe(secret)
	return c.open(secret)
}

// settleSlotKey finds the key of the slots on the open volumes, or has them keep the one
// that was carried over; for a slot that is in the clear it makes one.
func (m *Machine) settleSlotKey(vols []*volume) error {
	key := m.Slots.key
	var err error
	if key == nil {
		key, err = m.findSlotKey(vols)
	}
	if err == nil && key == nil {
		key, err = m.carriedSlotKey()
	}
	if err != nil {
		return err
	}
	if key == nil {
		key = make([]byte, slotcrypt.KeyBytes)
		if _, err := io.ReadFull(m.Rand, key); err != nil {
			return fmt.Errorf("read randomness: %w", err)
		}
		m.Log.Info("the key of the slots was made")
	}
	m.Slots.key = key
	for _, v := range vols {
		if err := m.keepSlotFile(v, slotKeyFile, key); err != nil {
			return fmt.Errorf("keep the key of the slots on data volume %s: %w", v.Name, err)
		}
	}
	if err := dropCarried(m.Slots.Disk); err != nil {
		m.Log.Warn("what was carried over a factory reset is still on the boot partition", "error", err)
	}
	if err := m.prepareSlotCarry(vols[0], key); err != nil {
		m.Log.Warn("the key of the slots was not made ready for a factory reset", "error", err)
	}
	return nil
}

// findSlotKey is nil when no volume has the key.
func (m *Machine) findSlotKey(vols []*volume) ([]byte, error) {
	var dirs []string
	for _, v := range vols {
		dirs = append(dirs, filepath.Join(m.Root, v.Volume.Mount))
	}
	return slotKeyIn(dirs)
}

// readSlotKey is the key in the running system; nil when the box has none.
func readSlotKey(volumes []image.Volume) ([]byte, error) {
	var dirs []string
	for _, v := range volumes {
		dirs = append(dirs, v.Mount)
	}
	return slotKeyIn(dirs)
}

// slotKeyIn finds the key on the volumes that are mounted there. A file of another
// length was not finished, and its key never used.
func slotKeyIn(mounts []string) ([]byte, error) {
	for _, at := range mounts {
		path := filepath.Join(at, stateFolder, slotKeyFile)
		key, err := readLimited(path, slotcrypt.KeyBytes)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		if len(key) == slotcrypt.KeyBytes {
			return key, nil
		}
	}
	return nil, nil
}

func (m *Machine) slotFile(v *volume, name string) string {
	return filepath.Join(m.Root, v.Volume.Mount, stateFolder, name)
}

// keepSlotFile puts a file on the volume, whole or not at all, and leaves alone one that
// is right already.
func (m *Machine) keepSlotFile(v *volume, name string, content []byte) error {
	path := m.slotFile(v, name)
	have, err := os.ReadFile(path)
	defer luks2.Wipe(have)
	if err == nil && bytes.Equal(have, content) {
		return nil
	}
	if err := m.keepSecret(v, name+".new", content); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// prepareSlotCarry leaves on the volume what a factory reset carries over.
func (m *Machine) prepareSlotCarry(v *volume, key []byte) error {
	if m.opened == nil || len(m.secret) == 0 {
		return nil // the recovery key opened; what an earlier boot left may still do
	}
	if text, err := readLimited(m.slotFile(v, slotCarryFile), maxSlotCarryBytes); err == nil {
		if c, token, err := readSlotCarry(text); err == nil && sameBlob(token, *m.opened) {
			if have, err := c.open(m.secret); err == nil {
				same := bytes.Equal(have, key)
				luks2.Wipe(have)
				if same {
					return nil
				}
			}
		}
	}
	text, err := newSlotCarry(*m.opened, m.secret, key, m.Rand)
	if err != nil {
		return err
	}
	return m.keepSlotFile(v, slotCarryFile, text)
}

// carrySlotKey copies what a boot prepared to the ESP. first is the first volume's
// folder of ours.
func carrySlotKey(first string, disk *partition.Disk, now time.Time) error {
	text, err := readLimited(filepath.Join(first, slotCarryFile), maxSlotCarryBytes)
	if err == nil {
		_, _, err = readSlotCarry(text)
	}
	if err != nil {
		return fmt.Errorf("the slots are encrypted and their key cannot be carried over: %w; restart the box so that the TPM opens the volumes, and reset it then", err)
	}
	if err := dropCarried(disk); err != nil { // an earlier one must not stay in free clusters
		return err
	}
	esp, err := espOf(disk)
	if err != nil {
		return err
	}
	return esp.WriteFile(slotCarryESP, int64(len(text)), bytes.NewReader(text), now)
}

// readCarried is [fs.ErrNotExist] where nothing is carried over. Anybody who has had the
// disk may have written it.
func readCarried(disk *partition.Disk) ([]byte, error) {
	esp, err := espOf(disk)
	if err != nil {
		return nil, err
	}
	f, err := esp.Open(slotCarryESP)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, 0, min(f.Size(), maxSlotCarryBytes+1)))
}

// dropCarried overwrites and removes what is carried over: free clusters keep what was in
// them, and the TPM would open it for the box's whole life.
func dropCarried(disk *partition.Disk) error {
	esp, err := espOf(disk)
	if err != nil {
		return err
	}
	err = esp.Overwrite(slotCarryESP)
	if err == nil {
		err = esp.Remove(slotCarryESP)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
