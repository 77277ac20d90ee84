package agent

import (
	"log/slog"
	"path/filepath"
	"time"
)

// OpenEraser is for this box, which runs. Nothing is written before one of its methods
// is called.
func OpenEraser(log *slog.Logger) (*Eraser, error) {
	s := &system{log: log}
	if err := s.load(); err != nil {
		return nil, err
	}
	k, err := s.newKeeper()
	if err != nil {
		return nil, err
	}
	if k == nil {
		return nil, ErrNoVolumes
	}
	e := &Eraser{
		Log: log, Name: k.Name, Version: k.Version, Volumes: k.Volumes, OpenTPM: k.OpenTPM, Now: time.Now, Lock: k.lock,
	}
	if s.app.EncryptSlots {
		e.CarrySlotKey = func() error {
			disk, err := openSlots(s.initrd.Disk, s.initrd.Slot)
			if err != nil {
				return err
			}
			defer disk.close()
			return carrySlotKey(filepath.Join(s.app.Volumes[0].Mount, stateFolder), disk.disk, time.Now())
		}
	}
	return e, nil
}
