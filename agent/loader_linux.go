package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
)

const (
	// bootEntryNote lies on the ESP: it is about the board.
	bootEntryNote     = "loader/holdfast-bootentry.json"
	maxBootEntryBytes = 4 << 10
	// loaderNote lies on the ESP from a repair before the volumes were open to the next
	// boot, whose status has it.
	loaderNote     = "loader/holdfast-loader.txt"
	maxLoaderNotes = 4 << 10
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

// mendLoader is [Machine.Mend]: where this boot came from the second copy of the boot
// loader, the attempt with the first is in PCR 4. Once that copy is right again, a
// restart has the registers that the volumes are sealed to. There is nothing to mend
// then, so there is one restart.
func (i *initrd) mendLoader() bool {
	s := (&LoaderKeeper{Log: i.log, Vars: efivarfs{efivarsPath}, Disk: i.disk, Now: time.Now}).Keep()
	if !s.retried() {
		return false
	}
	files, err := espOf(i.disk)
	if err == nil {
		err = files.WriteFile(loaderNote, int64(len(s.Repaired)), strings.NewReader(s.Repaired), time.Now())
	}
	if err != nil {
		i.log.Warn("the repair of the boot loader is not noted", "error", err)
	}
	i.log.Info("restarting with both boot loaders", "before", "asking for the recovery key")
	return true
}

// takeLoaderNote is what a boot has noted that mended the boot loader and restarted.
// Whoever can write the disk can have written it, and nothing rests on it.
func takeLoaderNote(disk *partition.Disk) (string, error) {
	files, err := espOf(disk)
	if err != nil {
		return "", err
	}
	f, err := files.Open(loaderNote)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 0, min(f.Size(), maxLoaderNotes)))
	return printable(string(text)), errors.Join(err, files.Remove(loaderNote))
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
	note, err := takeLoaderNote(d.disk)
	if err != nil {
		s.log.Warn("note on the boot loader", "error", err)
	}
	if status.Repaired == "" {
		status.Repaired = note
	}
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
