package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/dm"
	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// openEncrypted opens the volumes, where the slots' key lies, and then the root: a slot
// that is in the clear is encrypted first. The volumes are mounted apart until there is
// a root to put them below.
func (i *initrd) openEncrypted() error {
	slot := partition.Slot(i.status.Slot)
	if !slot.Valid() {
		return fmt.Errorf("the root is on %s, which is no slot, and encrypted slots are asked for", i.root.device)
	}
	for _, v := range i.boot.Appliance.Volumes {
		if err := os.MkdirAll(filepath.Join(beforeRoot, v.Mount), 0o755); err != nil {
			return err
		}
	}
	slots := &Slots{Slot: slot, Verity: i.boot.Root}
	if err := i.openVolumes(beforeRoot, slots); err != nil {
		return err
	}
	device, err := i.openSlot(slots)
	if err != nil {
		return fmt.Errorf("slot %s: %w", slot, err)
	}
	if err := i.mapRoot(device); err != nil {
		return err
	}
	for _, v := range i.boot.Appliance.Volumes {
		if err := mount(filepath.Join(beforeRoot, v.Mount), filepath.Join(sysroot, v.Mount), "", unix.MS_MOVE, ""); err != nil {
			return err
		}
	}
	return nil
}

// openSlot maps the slot, encrypted before when it is in the clear.
func (i *initrd) openSlot(s *Slots) (device string, err error) {
	key := s.TakeKey()
	defer luks2.Wipe(key)
	if key == nil {
		return "", errors.New("there is no data volume, and so no key")
	}
	cipher, err := slotcrypt.New(key)
	if err != nil {
		return "", err
	}
	dev, err := s.device()
	if err != nil {
		return "", err
	}
	state, err := cipher.Look(dev, i.boot.Root)
	if err != nil {
		return "", err
	}
	if state == slotcrypt.Plain {
		began := time.Now()
		i.log.Info("encrypting the slot; after a power cut it goes on where it was", "slot", s.Slot, "bytes", i.boot.Root.TotalBytes)
		if err := cipher.Convert(dev, i.boot.Root, i.sayEncrypted()); err != nil {
			return "", err
		}
		i.log.Info("slot encrypted", "slot", s.Slot, "ms", time.Since(began).Milliseconds())
	}
	return dm.CryptReadOnly(slotMapping, i.root.device, slotcrypt.Name, key, dev.Size(), slotcrypt.BlockBytes)
}

// sayEncrypted says now and then how far it is.
func (i *initrd) sayEncrypted() func(done, total int64) {
	said := time.Now()
	return func(done, total int64) {
		if time.Since(said) >= progressTime {
			said = time.Now()
			i.log.Info("encrypting the slot", "percent", done*100/max(total, 1))
		}
	}
}
