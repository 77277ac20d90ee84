package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/partition"
)

// A new release boots on trial: its boot entry counts tries down, and only when
// the appliance has been healthy for a while is the counter removed. Anything
// else – a panic, a watchdog, a service that does not come up – ends in another
// boot, and when the tries are used up, in the old slot.
const (
	// trialTime is how long a release on trial may take to become healthy.
	trialTime = 10 * time.Minute
	// settleTime is how long it must then stay healthy.
	settleTime = 10 * time.Second
	// trialRestarts is how often one service may have been restarted before the
	// trial has failed; some wait for one another by dying.
	trialRestarts = 5
)

// slots is the disk the system runs from, as far as boot entries go.
type slots struct {
	dev  *partition.File
	disk *partition.Disk
	slot partition.Slot // running
}

func openSlots(device, slot string) (*slots, error) {
	if !partition.Slot(slot).Valid() {
		return nil, fmt.Errorf("the root is on no slot of %s", device)
	}
	dev, err := partition.OpenShared(device)
	if err != nil {
		return nil, err
	}
	disk, err := partition.Open(dev)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return &slots{dev, disk, partition.Slot(slot)}, nil
}

func (s *slots) close() { s.dev.Close() }

// running is the entry this boot came from.
func (s *slots) running() (partition.Entry, error) {
	entries, err := s.disk.Entries()
	if err != nil {
		return partition.Entry{}, err
	}
	for _, e := range entries {
		if e.Slot == s.slot {
			return e, nil
		}
	}
	return partition.Entry{}, fmt.Errorf("no boot entry for slot %s", s.slot)
}

// describe lists the slots for status.
func (s *slots) describe() ([]SlotStatus, error) {
	entries, err := s.disk.Entries()
	if err != nil {
		return nil, err
	}
	var list []SlotStatus
	for _, e := range entries {
		state := "good"
		switch {
		case e.Damage != nil:
			state = "damaged: " + e.Damage.Error()
		case e.Bad() && e.Slot != s.slot: // the one that runs is on its last
			state = "bad: its tries are used up"
		case wasGood(e):
			state = fmt.Sprintf("good, and starting; %d tries left", e.TriesLeft)
		case e.Counted:
			state = fmt.Sprintf("on trial, %d tries left", e.TriesLeft)
		}
		one := SlotStatus{Slot: string(e.Slot), Version: e.Version, Sequence: e.Sequence, State: state, Running: e.Slot == s.slot}
		if dev, _, err := s.disk.Partition(e.Slot.Partition()); err == nil {
			one.Encrypted = !slotcrypt.Readable(dev)
		}
		list = append(list, one)
	}
	return list, nil
}

// judge decides about a release on trial: it blesses the slot, or reboots.
func (s *system) judge(ctx context.Context) {
	disk, err := openSlots(s.initrd.Disk, s.initrd.Slot)
	if err != nil {
		s.problem(fmt.Sprintf("boot entries: %v", err))
		return
	}
	defer disk.close()
	entry, err := disk.running()
	if err != nil {
		s.problem(fmt.Sprintf("boot entries: %v", err))
		return
	}
	if !entry.Counted {
		s.good(ctx)
		return
	}
	if wasGood(entry) {
		s.confirm(ctx, disk, entry)
		return
	}
	s.log.Info("on trial", "slot", entry.Slot, "version", entry.Version, "tries_left", entry.TriesLeft)
	if reason := s.failedTrial(ctx); reason != nil {
		if ctx.Err() == nil {
			s.problem(fmt.Sprintf("trial of %s in slot %s failed: %v", entry.Version, entry.Slot, reason))
			if s.updater != nil {
				s.updater.TrialFailed(reason)
			}
			s.requestPower(true, "failed trial")
		}
		return
	}
	if err := disk.disk.Bless(entry.Slot); err != nil {
		s.problem(fmt.Sprintf("bless slot %s: %v", entry.Slot, err))
		return
	}
	s.log.Info("blessed", "slot", entry.Slot, "version", entry.Version)
	if s.updater != nil {
		s.updater.Commit()
	}
	s.good(ctx)
}

// good is what remains to be done in a boot that keeps its release.
func (s *system) good(ctx context.Context) {
	s.keepLoaders()
	s.keepSealed(ctx)
	go s.keepKeys(ctx)
	s.updates(ctx)
}

// confirm takes the counter away again: this boot came to its services. How they
// are is no reason to leave a release that was good.
func (s *system) confirm(ctx context.Context, disk *slots, entry partition.Entry) {
	if !sleep(ctx, settleTime) {
		return
	}
	if err := disk.disk.Bless(entry.Slot); err != nil {
		s.problem(fmt.Sprintf("bless slot %s: %v", entry.Slot, err))
		return
	}
	s.log.Info("boot confirmed", "slot", entry.Slot, "version", entry.Version)
	s.good(ctx)
}

// failedTrial waits until the appliance has been healthy for settleTime and
// returns nil, or says why it never was.
func (s *system) failedTrial(ctx context.Context) error {
	deadline := time.Now().Add(trialTime)
	var since time.Time // when it became healthy
	for {
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		switch {
		case s.failed.Load():
			return errors.New("an onboot container failed")
		case !s.started.Load() || !s.ready():
			since = time.Time{}
			if s.mostRestarts() >= trialRestarts {
				return fmt.Errorf("a service was started %d times: %s", trialRestarts+1, s.unready())
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("not healthy after %v: %s", trialTime, s.unready())
			}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) > settleTime:
			return nil
		}
	}
}

// mostRestarts is the count of the service that was restarted most often.
func (s *system) mostRestarts() (n int) {
	for _, c := range s.services {
		c.mu.Lock()
		n = max(n, c.restarts)
		c.mu.Unlock()
	}
	return n
}

// unready names the services that are not up.
func (s *system) unready() string {
	text := ""
	for _, c := range s.services {
		c.mu.Lock()
		if c.state != Healthy && c.state != Running && c.state != Exited {
			text += fmt.Sprintf("%s is %s (%s); ", c.Name, c.state, c.reason)
		}
		c.mu.Unlock()
	}
	return text
}

// Bless removes the boot counter of the running slot: for the init of an image
// that took over, which alone knows when the system is healthy. That has to have
// lasted for a while already.
func Bless(s *Status) error {
	disk, err := openSlots(s.Disk, s.Slot)
	if err != nil {
		return err
	}
	defer disk.close()
	// First, while the entry still tells that this boot was a trial. What is wrong with
	// the account is no reason not to keep a release that is healthy.
	u, settled := OpenUpdater(slog.Default())
	if err := disk.bless(filepath.Dir(statePath)); err != nil {
		return err
	}
	if u != nil {
		u.Commit()
	}
	return errors.Join(settled, keepLoadersHere(u), settleHere())
}

// bless keeps out of the way of a process that writes the other slot: both write the
// ESP. One that does began when this slot was good already, and there is nothing to do;
// one that is about to gives way, because it is not.
func (s *slots) bless(locks string) error {
	entries, err := s.disk.Entries()
	if err != nil {
		return err
	}
	own := slices.DeleteFunc(entries, func(e partition.Entry) bool { return e.Slot != s.slot })
	if len(own) == 1 && own[0].Good() {
		return nil
	}
	lock, err := lockFile(filepath.Join(locks, diskLock), unix.LOCK_EX)
	if err != nil {
		slog.Warn("bless", "error", err) // a release that is healthy is kept all the same
	} else {
		defer lock.Close()
	}
	return s.disk.Bless(s.slot)
}

// ErrNotOnTrial says that there is nothing to reject.
var ErrNotOnTrial = errors.New("the release that runs is not on trial")

// Reject notes why the release that runs is not healthy, for the old one to report;
// the caller then reboots. For the init of an image that took over. A release that
// was good is kept whatever its health: it is [ErrNotOnTrial].
func Reject(s *Status, reason string) error {
	disk, err := openSlots(s.Disk, s.Slot)
	if err != nil {
		return err
	}
	defer disk.close()
	entry, err := disk.running()
	if err != nil {
		return err
	}
	if !entry.Counted || wasGood(entry) {
		return ErrNotOnTrial
	}
	u, err := OpenUpdater(slog.Default())
	if u != nil {
		u.TrialFailed(errors.New(reason))
	}
	if err != nil {
		// Without its reason it has to be left all the same.
		slog.Warn("why the trial failed is not noted", "error", err)
	}
	return nil
}

const (
	watchdogPath       = "/dev/watchdog"
	watchdogTimeoutSec = 60
	watchdogInterval   = 15 * time.Second
)

// feedWatchdog keeps the hardware's watchdog, or softdog, from rebooting the
// box for as long as this program runs. It is never disarmed: a shutdown that
// hangs should end in a reboot too.
func (s *system) feedWatchdog() {
	f, err := os.OpenFile(watchdogPath, os.O_WRONLY, 0)
	if err != nil {
		s.log.Info("no watchdog", "error", err)
		return
	}
	timeout := watchdogTimeoutSec
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.WDIOC_SETTIMEOUT, timeout); err != nil {
		s.log.Warn("watchdog", "error", err) // it has a time of its own, mostly 30 to 60 s
	}
	s.log.Info("watchdog armed", "timeout_sec", timeout)
	for {
		if _, err := f.Write([]byte{0}); err != nil {
			s.log.Warn("watchdog", "error", err)
			return
		}
		time.Sleep(watchdogInterval)
	}
}
