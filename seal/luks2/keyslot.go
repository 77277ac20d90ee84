package luks2

import (
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/xts"
)

// Key derivation functions, as the header names them.
const (
	Argon2id = "argon2id"
	PBKDF2   = "pbkdf2"
)

// KDF is how a passphrase becomes the key of its keyslot. The zero KDF is
// RecoveryKDF(0).
type KDF struct {
	Type string // Argon2id or PBKDF2

	// PBKDF2: Hash is "sha256" or "sha512".
	Hash       string
	Iterations int

	// Argon2id: passes, memory in KiB, lanes.
	Time      uint32
	MemoryKiB uint32
	Parallel  uint8
}

// HighEntropyKDF is for passphrases that nobody can guess, 256 random bits or
// more: a key sealed by a TPM, a key on another volume. It costs milliseconds,
// and is what systemd-cryptenroll uses for its slots.
func HighEntropyKDF() KDF { return KDF{Type: PBKDF2, Hash: "sha512", Iterations: 1000} }

// RecoveryKDF is for what people keep or remember. memoryKiB 0 means 64 MiB;
// the device needs that much free memory to open the slot, as a first-boot
// device with little of it still has to.
func RecoveryKDF(memoryKiB uint32) KDF {
	return KDF{Type: Argon2id, Time: 4, MemoryKiB: cmp.Or(memoryKiB, 64<<10), Parallel: 4}
}

func (k KDF) orDefault() KDF {
	if k == (KDF{}) {
		return RecoveryKDF(0)
	}
	return k
}

// check holds for what is read as for what is written: this package makes no
// slot that it would not open.
func (k KDF) check() error {
	switch {
	case k.Type == PBKDF2 && newHash(k.Hash) == nil:
		return fmt.Errorf("pbkdf2 hash is %q, not sha256 or sha512", k.Hash)
	case k.Type == PBKDF2 && (k.Iterations < minIterations || k.Iterations > maxIterations):
		return fmt.Errorf("pbkdf2 iterations are %d, outside %d to %d", k.Iterations, minIterations, maxIterations)
	case k.Type == PBKDF2:
		return nil
	case k.Type != Argon2id:
		return fmt.Errorf("key derivation %q is not supported", k.Type)
	case k.Time < 1 || k.Time > maxArgonTime:
		return fmt.Errorf("argon2id time is %d, outside 1 to %d", k.Time, maxArgonTime)
	case k.Parallel < 1 || k.Parallel > maxArgonThreads:
		return fmt.Errorf("argon2id cpus are %d, outside 1 to %d", k.Parallel, maxArgonThreads)
	case k.MemoryKiB < max(minArgonMemory, 8*uint32(k.Parallel)) || k.MemoryKiB > maxArgonMemory:
		return fmt.Errorf("argon2id memory is %d KiB, outside %d to %d", k.MemoryKiB, max(minArgonMemory, 8*uint32(k.Parallel)), maxArgonMemory)
	case uint64(k.Time)*uint64(k.MemoryKiB) > maxArgonWork:
		return fmt.Errorf("argon2id time %d with memory %d KiB is more work than %d KiB filled", k.Time, k.MemoryKiB, maxArgonWork)
	}
	return nil
}

// derive makes the key of a key area. The KDF has been checked.
func (k KDF) derive(passphrase, salt []byte) ([]byte, error) {
	if k.Type == Argon2id {
		return argon2.IDKey(passphrase, salt, k.Time, k.MemoryKiB, k.Parallel, areaKeyBytes), nil
	}
	return pbkdf2Key(k.Hash, passphrase, salt, k.Iterations, areaKeyBytes)
}

func pbkdf2Key(hashName string, secret, salt []byte, iterations, n int) ([]byte, error) {
	key, err := pbkdf2.Key(newHash(hashName), string(secret), salt, iterations, n)
	if err != nil {
		return nil, fmt.Errorf("pbkdf2 with %s: %w", hashName, err)
	}
	return key, nil
}

// newHash returns nil for a hash that the subset does not name.
func newHash(name string) func() hash.Hash {
	switch name {
	case "sha256":
		return sha256.New
	case "sha512":
		return sha512.New
	}
	return nil
}

// AddKeyslot makes a keyslot in memory that opens with passphrase, and returns
// its id, the lowest free one. Passphrases are bytes: what a person typed comes
// without its newline (F54). volumeKey is checked against the header first.
// rand nil means crypto/rand. [Header.Write], or WriteNew, puts it on the device.
func (h *Header) AddKeyslot(volumeKey, passphrase []byte, k KDF, random io.Reader) (slot int, err error) {
	k = k.orDefault()
	if err := k.check(); err != nil {
		return 0, fmt.Errorf("add keyslot: %w", err)
	}
	if len(passphrase) == 0 {
		return 0, errors.New("add keyslot: the passphrase is empty")
	}
	ok, err := h.meta.matches(volumeKey)
	if err != nil {
		return 0, fmt.Errorf("add keyslot: %w", err)
	}
	if !ok {
		return 0, errors.New("add keyslot: the volume key is not this volume's")
	}
	id, area, err := h.freeSlot()
	if err != nil {
		return 0, fmt.Errorf("add keyslot: %w", err)
	}
	if random == nil {
		random = rand.Reader
	}
	salt, err := randomBytes(random, 32)
	if err != nil {
		return 0, fmt.Errorf("add keyslot: %w", err)
	}
	s := keyslot{priority: 1, afHash: cmp.Or(k.Hash, "sha256"), area: area, kdf: k, salt: salt}
	h.meta.keyslots[id] = s
	defer func() {
		if err != nil {
			delete(h.meta.keyslots, id)
		}
	}()
	if _, err := h.meta.encode(); err != nil {
		return 0, fmt.Errorf("add keyslot %d: %w", id, err)
	}
	material, err := s.seal(volumeKey, passphrase, random)
	if err != nil {
		return 0, fmt.Errorf("add keyslot %d: %w", id, err)
	}
	h.pending[id] = material
	h.edited()
	return id, nil
}

// RemoveKeyslot removes a keyslot and its id from all tokens; a token that was
// about this slot only goes too. [Header.Write] overwrites the key area.
func (h *Header) RemoveKeyslot(slot int) error {
	if _, ok := h.meta.keyslots[slot]; !ok {
		return fmt.Errorf("remove keyslot %d: there is none", slot)
	}
	if err := h.unassign(slot); err != nil {
		return fmt.Errorf("remove keyslot %d: %w", slot, err)
	}
	delete(h.meta.keyslots, slot)
	Wipe(h.pending[slot])
	delete(h.pending, slot)
	h.edited()
	return nil
}

// freeSlot finds the lowest free id and the first free area. Areas that the
// header on the device refers to are not free, even if the slot was removed in
// memory: until the new header is down, the old one has to open.
func (h *Header) freeSlot() (int, extent, error) {
	id := 0
	for ; ; id++ {
		if id == MaxKeyslots {
			return 0, extent{}, fmt.Errorf("all %d keyslots are taken", MaxKeyslots)
		}
		if _, taken := h.meta.keyslots[id]; !taken {
			break
		}
	}
	taken := append(h.meta.areas(), h.busy...)
	area := extent{keyslotsOffset, h.meta.areaBytes()}
	for {
		i := slices.IndexFunc(taken, area.overlaps)
		if i < 0 {
			break
		}
		area.offset = taken[i].end()
	}
	if area.end() > dataOffset {
		return 0, extent{}, fmt.Errorf("the keyslots area has no gap of %d bytes", h.meta.areaBytes())
	}
	return id, area, nil
}

// Unlock tries the keyslots and returns the volume key and the slot that
// opened. Slots of high priority come first, cheap ones before argon2id; slots
// of priority 0 are left out, as cryptsetup does. The caller wipes the key.
//
// The error is [ErrPassphrase] only if every slot was readable.
func (h *Header) Unlock(dev io.ReaderAt, passphrase []byte) (volumeKey []byte, slot int, err error) {
	slots := h.Keyslots()
	slots = slices.DeleteFunc(slots, func(s Keyslot) bool { return s.Priority == 0 })
	slices.SortStableFunc(slots, func(a, b Keyslot) int {
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), cmp.Compare(b.KDF.Type, a.KDF.Type))
	})
	var failed error
	for _, s := range slots {
		key, err := h.UnlockSlot(dev, s.ID, passphrase)
		if err == nil {
			return key, s.ID, nil
		}
		if !errors.Is(err, ErrPassphrase) {
			failed = errors.Join(failed, err)
		}
	}
	if failed != nil {
		return nil, 0, failed
	}
	return nil, 0, fmt.Errorf("unlock volume %s with %d keyslots: %w", h.uuid, len(slots), ErrPassphrase)
}

// UnlockSlot opens one keyslot. The error is [ErrPassphrase] if the passphrase
// is wrong, or if the key area was overwritten: the two cannot be told apart.
// A slot that was added and not written yet is opened from memory.
func (h *Header) UnlockSlot(dev io.ReaderAt, slot int, passphrase []byte) (volumeKey []byte, err error) {
	s, ok := h.meta.keyslots[slot]
	if !ok {
		return nil, fmt.Errorf("unlock keyslot %d: there is none", slot)
	}
	material := make([]byte, h.meta.materialBytes())
	defer Wipe(material)
	if p, ok := h.pending[slot]; ok {
		copy(material, p)
	} else if err := readFull(dev, material, s.area.offset); err != nil {
		return nil, fmt.Errorf("unlock keyslot %d: read key area at byte %d: %w", slot, s.area.offset, err)
	}
	key, err := s.open(material, passphrase)
	if err != nil {
		return nil, fmt.Errorf("unlock keyslot %d: %w", slot, err)
	}
	ok, err = h.meta.matches(key)
	if err == nil && !ok {
		err = ErrPassphrase
	}
	if err != nil {
		Wipe(key)
		return nil, fmt.Errorf("unlock keyslot %d: %w", slot, err)
	}
	return key, nil
}

// seal splits the volume key and encrypts the stripes.
func (s keyslot) seal(volumeKey, passphrase []byte, random io.Reader) ([]byte, error) {
	material, err := afSplit(s.afHash, volumeKey, random)
	if err != nil {
		return nil, err
	}
	if err := s.crypt(material, passphrase, (*xts.Cipher).Encrypt); err != nil {
		Wipe(material)
		return nil, err
	}
	return material, nil
}

// open decrypts material in place and merges the stripes to what is the volume
// key if the passphrase was right.
func (s keyslot) open(material, passphrase []byte) ([]byte, error) {
	if err := s.crypt(material, passphrase, (*xts.Cipher).Decrypt); err != nil {
		return nil, err
	}
	return afMerge(s.afHash, material), nil
}

// crypt runs one direction of XTS over a key area; sectors count from its start.
func (s keyslot) crypt(material, passphrase []byte, direction func(*xts.Cipher, []byte, []byte, uint64)) error {
	key, err := s.kdf.derive(passphrase, s.salt)
	if err != nil {
		return err
	}
	defer Wipe(key)
	c, err := xts.NewCipher(aes.NewCipher, key)
	if err != nil {
		return fmt.Errorf("set up %s: %w", Cipher, err)
	}
	for i := 0; i < len(material); i += keyAreaSector {
		sector := material[i : i+keyAreaSector]
		direction(c, sector, sector, uint64(i/keyAreaSector))
	}
	return nil
}

// matches says whether key is the volume key.
func (m *metadata) matches(key []byte) (bool, error) {
	if len(key) != m.keyBytes() {
		return false, fmt.Errorf("the volume key has %d bytes, not %d", len(key), m.keyBytes())
	}
	d := m.digest
	got, err := pbkdf2Key(d.hash, key, d.salt, d.iterations, len(d.value))
	if err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(got, d.value) == 1, nil
}

// checkVolumeKey refuses what no working random source makes.
func checkVolumeKey(key []byte, integrity string) error {
	if len(key) != KeyBytes(integrity) {
		return fmt.Errorf("the volume key has %d bytes, not %d", len(key), KeyBytes(integrity))
	}
	if bytes.Equal(key[:VolumeKeyBytes/2], key[VolumeKeyBytes/2:VolumeKeyBytes]) {
		return errors.New("the two halves of the volume key are equal, which XTS forbids: the random source is broken")
	}
	return nil
}

// readFull is ReadAt that forgives io.EOF at the end of the device.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
