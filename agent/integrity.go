package agent

import (
	"fmt"
	"log/slog"
	"regexp"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// badSector is what dm-crypt writes to the kernel's log when a sector does not match
// its tag; the reader gets EILSEQ, which a file system makes EIO.
var badSector = regexp.MustCompile(`crypt: (dm-[0-9]+): INTEGRITY AEAD ERROR, sector ([0-9]+)`)

// badSectorOf takes the device and the sector out of a record of /dev/kmsg.
func badSectorOf(record string) (device, sector string, ok bool) {
	if m := badSector.FindStringSubmatch(record); m != nil {
		return m[1], m[2], true
	}
	return "", "", false
}

// notAsWritten is for a person.
func notAsWritten(volume, sector string) string {
	return fmt.Sprintf("%s: sector %s is not as it was written and cannot be read: the disk is failing, or somebody changed it", volume, sector)
}

// progressOf logs how far the wipe of a new volume is, at each tenth.
func progressOf(log *slog.Logger, volume string) func(done, all int64) {
	log.Info("writing every sector of a new volume once, because it is authenticated", "volume", volume)
	last := int64(0)
	return func(done, all int64) {
		if tenth := done * 10 / all; tenth > last && tenth < 10 {
			last = tenth
			log.Info("writing", "volume", volume, "percent", 10*tenth)
		}
	}
}

// integrityChanged says that a volume is not as the release would make it now.
func integrityChanged(v image.Volume, h *luks2.Header) string {
	if h.Integrity() == v.Integrity {
		return ""
	}
	word := func(s string) string {
		if s == "" {
			return "no integrity"
		}
		return "integrity " + s
	}
	return fmt.Sprintf("data volume %s was made with %s and the release asks for %s: it stays as it was made until it is made anew",
		v.Name, word(h.Integrity()), word(v.Integrity))
}

// fixedSize says whether the last volume was made with integrity and so cannot grow
// with the disk: the tags behind its end would match nothing. A volume that cannot be
// read says so when it is opened.
func fixedSize(dev partition.Device) bool {
	if fresh, err := partition.Unprovisioned(dev); err != nil || fresh {
		return false
	}
	h, _, err := luks2.Read(dev, dev.Size())
	return err == nil && h.Integrity() != ""
}

// doesNotGrow is for a person.
func doesNotGrow(volume string, tableBytes, diskBytes int64) string {
	return strings.Join([]string{
		fmt.Sprintf("data volume %s is not grown: the disk has %d MiB and %d MiB are in use", volume, diskBytes>>20, tableBytes>>20),
		"a volume with integrity keeps the size it was made with",
		"to use the rest, save the data and write the image again",
	}, "; ")
}
