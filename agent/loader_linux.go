package agent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
)

const (
	// bootEntryNote lies on the ESP: it is about the board.
	bootEntryNote     = "loader/holdfast-bootentry.json"
	maxBootEntryBytes = 4 << 10
	// loaderStatusPath is for later processes of this boot.
	loaderStatusPath = "/run/holdfast/loader.json"
)

// keepLoaders sees to the boot loaders and their boot entry, in a boot that is good.
// Whatever goes wrong is in status, and no more: the box has started.
func (s *system) keepLoaders() {
	status, err := s.lookAfterLoaders()
	if err != nil {
		s.log.Warn("boot loader", "error", err)
		status = &LoaderStatus{Problem: fmt.Sprintf("the boot loaders could not be seen to: %v", err)}
	}
	s.loader.Store(status)
	b, err := json.Marshal(status)
	if err == nil {
		err = update.WriteFile(loaderStatusPath, b, 0o600)
	}
	if err != nil {
		s.log.Warn("boot loader", "error", err)
	}
}

// lookAfterLoaders keeps installations and other commands off the ESP meanwhile.
func (s *system) lookAfterLoaders() (*LoaderStatus, error) {
	if s.updater != nil {
		end, err := s.updater.begin(settlingTime)
		if err != nil {
			return nil, err
		}
		defer end()
	}
	lock, err := lockFile(filepath.Join(filepath.Dir(statePath), diskLock), unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	d, err := openSlots(s.initrd.Disk, s.initrd.Slot)
	if err != nil {
		return nil, err
	}
	defer d.close()
	vars := efivarfs{efivarsPath}
	status := (&LoaderKeeper{Log: s.log, Vars: vars, Disk: d.disk, Now: time.Now}).Keep()
	if len(status.Copies) < 2 {
		return status, nil
	}
	entry, err := bootEntryFor(s.log, vars, d.disk, status.Copies[1].Path)
	if err == nil {
		status.Entry, err = entry.Ensure()
	}
	if err != nil {
		status.NoEntry = err.Error()
		s.log.Warn("boot entry for the second boot loader", "error", err)
	}
	return status, nil
}

func bootEntryFor(log *slog.Logger, vars EFIVars, disk *partition.Disk, path string) (*BootEntry, error) {
	files, err := espOf(disk)
	if err != nil {
		return nil, err
	}
	parts := disk.Layout().Partitions
	i := slices.IndexFunc(parts, func(p partition.Partition) bool { return p.Name == partition.ESPName })
	return &BootEntry{
		Log: log, Vars: vars, ESP: parts[i], Number: i + 1, Path: path,
		Load: func() ([]byte, error) {
			f, err := files.Open(bootEntryNote)
			if err != nil {
				return nil, err
			}
			return io.ReadAll(io.NewSectionReader(f, 0, min(f.Size(), maxBootEntryBytes)))
		},
		Save: func(b []byte) error {
			return files.WriteFile(bootEntryNote, int64(len(b)), bytes.NewReader(b), time.Now())
		},
	}, nil
}

// loaderStatusHere is what a process of this boot has left; nil when none has.
func loaderStatusHere() *LoaderStatus {
	b, err := os.ReadFile(loaderStatusPath)
	var s LoaderStatus
	if err != nil || json.Unmarshal(b, &s) != nil {
		return nil
	}
	return &s
}

// keepLoadersHere is for the init of an image that took over, in a boot that is healthy.
// u is nil in a release that takes no updates.
func keepLoadersHere(u *Updater) error {
	s := &system{log: slog.Default(), updater: u}
	if err := s.load(); err != nil {
		return err
	}
	s.keepLoaders()
	return nil
}
