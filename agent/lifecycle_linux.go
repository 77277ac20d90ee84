package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/attest/erasure"
)

// OpenEraser is for this box, which runs. challenge is the vendor's, for the proof; nil is
// none. Nothing is written before one of the eraser's methods is called.
func OpenEraser(log *slog.Logger, challenge *attest.Challenge) (*Eraser, error) {
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
	e.Sign = func(t seal.TPM, p *erasure.Proof) error {
		in := attest.Input{Challenge: challenge, Statement: s.statement(), Time: time.Now()}
		if in.EventLog, err = os.ReadFile(eventLogPath); err != nil {
			log.Warn("the proof goes without the firmware's event log", "error", err)
		}
		return p.Sign(t, in)
	}
	if s.app.EncryptSlots {
		withDisk := func(do func(*partition.Disk) error) error {
			disk, err := openSlots(s.initrd.Disk, s.initrd.Slot)
			if err != nil {
				return err
			}
			defer disk.close()
			return do(disk.disk)
		}
		e.CarrySlotKey = func() error {
			return withDisk(func(d *partition.Disk) error {
				return carrySlotKey(filepath.Join(s.app.Volumes[0].Mount, stateFolder), d, time.Now())
			})
		}
		e.DropSlotKey = func() error { return withDisk(dropCarried) }
	}
	return e, nil
}
