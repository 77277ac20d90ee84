package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
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
	"github.com/holdfast-os/holdfast/seal/pcr"
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

// leaveRefused restarts, once, without the release that the firmware has refused in this
// start of the box: the attempts are in PCR 4, and no boot loader is.
func (i *initrd) leaveRefused() error {
	e, refused, err := giveUpRefused(i.disk, efivarfs{efivarsPath}, partition.Slot(i.status.Slot))
	if err != nil {
		i.log.Warn("boot entries", "refused", refused, "error", err) // this boot goes on
		return nil
	}
	if !refused {
		return nil
	}
	i.log.Warn("restarting without a release that the firmware refuses", "version", e.Version, "slot", e.Slot)
	return ErrReboot
}

// mendLoader is [Machine.Mend]: what the firmware has tried in vain before this boot is in
// PCR 4. Once the first copy of the boot loader is right again, a restart has the
// registers that the volumes are sealed to; there is nothing to mend then. After anything
// else that came back, a release whose tries are used up for one, a restart is tried, and
// the note says that it was.
func (i *initrd) mendLoader() bool {
	s := (&LoaderKeeper{Log: i.log, Vars: efivarfs{efivarsPath}, Disk: i.disk, Now: time.Now}).Keep()
	files, err := espOf(i.disk)
	if err != nil {
		i.log.Warn("boot loader", "error", err)
		return false
	}
	note := s.Repaired
	if !s.retried() {
		if _, err := files.Open(loaderNote); !errors.Is(err, fs.ErrNotExist) || !cameBack() {
			return false
		}
		note = "restarted once, as the firmware had tried another program before, which was in PCR 4"
	}
	if err := files.WriteFile(loaderNote, int64(len(note)), strings.NewReader(note), time.Now()); err != nil {
		i.log.Warn("the repair of the boot loader is not noted", "error", err)
		return s.retried()
	}
	i.log.Info("restarting, as the firmware had tried another program before", "before", "asking for the recovery key")
	return true
}

// cameBack says whether a boot option came back before the one that this boot is from.
func cameBack() bool {
	raw, err := readEventLog(eventLogPath)
	if err != nil {
		return false
	}
	log, err := pcr.ParseLog(raw)
	return err == nil && log.Retried()
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
	var names []string
	entries, err := bootEntriesFor(s.log, vars, d.disk, d.slot, status.Copies[1].Path)
	if err == nil {
		names, err = entries.Ensure()
	}
	for i, name := range names {
		switch {
		case i == 0:
			status.Entry = name
		case name != "":
			status.ReleaseEntries = append(status.ReleaseEntries, name)
		}
	}
	if err != nil {
		status.NoEntry = err.Error()
		s.log.Warn("boot entries of the firmware", "error", err)
	}
	return status, nil
}

func bootEntriesFor(log *slog.Logger, vars EFIVars, disk *partition.Disk, running partition.Slot, loader string) (*BootEntries, error) {
	files, err := espOf(disk)
	if err != nil {
		return nil, err
	}
	releases, err := goodReleases(disk, running)
	if err != nil {
		return nil, err
	}
	parts := disk.Layout().Partitions
	i := slices.IndexFunc(parts, func(p partition.Partition) bool { return p.Name == partition.ESPName })
	return &BootEntries{
		Log: log, Vars: vars, Board: boardID(), ESP: parts[i], Number: i + 1, Loader: loader, Releases: releases,
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

// boardID tells this mainboard from another one by a hash of what SMBIOS has of it; empty
// where that says nothing.
func boardID() string {
	var text []byte
	for _, name := range []string{"product_uuid", "board_serial", "board_name"} {
		b, err := os.ReadFile(filepath.Join(sysPath, "class/dmi/id", name))
		if err == nil {
			text = append(append(text, bytes.TrimSpace(b)...), '\n')
		}
	}
	if len(text) == 0 {
		return ""
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
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
