package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/dm"
)

const (
	kernelLogPath = "/dev/kmsg"
	// kernelRecordBytes is the most that one read gives (CONSOLE_EXT_LOG_MAX).
	kernelRecordBytes = 8192
	// badSectorsNamed is how many of a volume are named one by one.
	badSectorsNamed = 16
)

// firstBadSector looks through the kernel's log for a sector of the device that could
// not be read.
func firstBadSector(device string) (sector string, found bool) {
	f, err := os.OpenFile(kernelLogPath, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", false
	}
	defer f.Close()
	record := make([]byte, kernelRecordBytes)
	for {
		n, err := unix.Read(int(f.Fd()), record)
		if errors.Is(err, unix.EPIPE) { // overwritten meanwhile; the next read goes on
			continue
		}
		if err != nil || n <= 0 {
			return "", false
		}
		if d, sector, ok := badSectorOf(string(record[:n])); ok && mappingOf(d) == mappingOf(filepath.Base(device)) {
			return sector, true
		}
	}
}

// mappingOf is the name of the volume's mapping for dm-N; the kernel's message names
// that of the tags below it or that itself, by its version.
func mappingOf(device string) string {
	b, err := os.ReadFile(filepath.Join(sysPath, "class/block", device, "dm/name"))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(strings.TrimSpace(string(b)), dm.TagsSuffix)
}

// watchIntegrity reports the sectors that could not be read because they are not as
// they were written, those of the initrd too: the kernel's log is read from its start.
func (s *system) watchIntegrity(ctx context.Context) {
	names := map[string]string{} // of volumes, by mapping
	for _, v := range s.initrd.Volumes {
		if v.Integrity != "" {
			names[volumeMapping(v.Name)] = v.Name
		}
	}
	if len(names) == 0 {
		return
	}
	f, err := os.Open(kernelLogPath)
	if err != nil {
		s.problem("data that was changed on the disk would not be reported: " + err.Error())
		return
	}
	defer f.Close()
	context.AfterFunc(ctx, func() { f.Close() })
	seen := map[string]map[string]bool{}
	record := make([]byte, kernelRecordBytes)
	for {
		n, err := f.Read(record)
		if errors.Is(err, unix.EPIPE) {
			continue
		}
		if err != nil {
			return
		}
		device, sector, ok := badSectorOf(strings.ToValidUTF8(string(record[:n]), ""))
		if device = mappingOf(device); !ok || names[device] == "" || seen[device][sector] || len(seen[device]) >= badSectorsNamed {
			continue
		}
		if seen[device] == nil {
			seen[device] = map[string]bool{}
		}
		seen[device][sector] = true
		s.problem(notAsWritten("data volume "+names[device], sector))
	}
}
