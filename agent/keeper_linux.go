package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

const (
	// signaturesCopy is where the initrd leaves what the stub gave it.
	signaturesCopy = "/run/holdfast/tpm2-pcr-signature.json"
	bootIDPath     = "/proc/sys/kernel/random/boot_id"
	// syncPatience is how long one command waits for another.
	syncPatience = 30 * time.Second
	// warningTime is how long what was said of the next boot is good for.
	warningTime = time.Minute
)

// sealed is what the system knows of its keeper's work.
type sealed struct {
	mu       sync.Mutex
	settled  *Settled
	problem  string
	warnings []string
	asked    time.Time // when warnings were looked for
}

// ErrNoVolumes says that there is nothing to seal.
var ErrNoVolumes = errors.New("this release has no data volume, so there is nothing to seal")

// OpenKeeper is the keeper of the box's TPM states after a hand-off, where no agent
// runs, and for commands; nil in a release without data volumes.
func OpenKeeper(log *slog.Logger) (*Keeper, error) {
	s := &system{log: log}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s.newKeeper()
}

// openKeeper takes note of an error; the box works without.
func (s *system) openKeeper() {
	k, err := s.newKeeper()
	if err != nil {
		s.problem(fmt.Sprintf("TPM states: %v", err))
		return
	}
	s.keeper = k
}

func (s *system) newKeeper() (*Keeper, error) {
	if len(s.app.Volumes) == 0 || len(s.initrd.Volumes) == 0 {
		return nil, nil
	}
	dev, err := partition.OpenShared(s.initrd.Disk)
	if err != nil {
		return nil, err
	}
	disk, err := partition.Open(dev)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	k := &Keeper{
		Sealer: Sealer{Log: s.log, Root: "/", Patience: syncPatience, OpenTPM: func() (seal.TPM, error) { return seal.OpenDevice() }},
		Policy: s.app.Seal, Name: s.app.Name, Version: s.app.Version, Slot: partition.Slot(s.initrd.Slot),
		SecureBoot: s.initrd.SecureBoot, Method: s.initrd.Volumes[0].Method, PCRs: pcrValues(s.initrd.PCRs),
		EventLog: func() ([]byte, error) { return readEventLog(eventLogPath) }, Variables: secureBootVariables, Now: time.Now,
		OpenDisk: func() (*partition.Disk, io.Closer, error) {
			d, err := openSlots(s.initrd.Disk, s.initrd.Slot)
			if err != nil {
				return nil, nil, err
			}
			return d.disk, d.dev, nil
		},
	}
	k.Programs = s.programsOnce(k.OpenDisk)
	k.Retried = func() bool {
		l := s.loader.Load()
		if l == nil {
			l = loaderStatusHere() // of another process, after a hand-off
		}
		return l.retried()
	}
	for _, v := range s.app.Volumes {
		device, _, err := disk.Partition(v.Name)
		if err != nil {
			return nil, errors.Join(err, dev.Close())
		}
		k.Volumes = append(k.Volumes, Partition{Volume: v, Device: device})
	}
	k.found(s.initrd.States)
	if id, err := os.ReadFile(bootIDPath); err == nil {
		k.BootID = strings.TrimSpace(string(id))
	}
	if raw, err := os.ReadFile(signaturesCopy); err == nil {
		k.Signatures, _ = seal.ParseSignatures(raw) // they only save time
	}
	return k, nil
}

// programsOnce reads the programs on the disk until it succeeds, and then not again: they
// are tens of megabytes, and an update puts another boot loader there.
func (s *system) programsOnce(open func() (*partition.Disk, io.Closer, error)) func() (pcr.Release, []pcr.Digest, error) {
	var mu sync.Mutex
	var known bool
	var kernel pcr.Release
	var loaders []pcr.Digest
	return func() (pcr.Release, []pcr.Digest, error) {
		mu.Lock()
		defer mu.Unlock()
		if !known {
			disk, closer, err := open()
			if err != nil {
				return pcr.Release{}, nil, err
			}
			defer closer.Close()
			if kernel, loaders, err = runningPrograms(disk, partition.Slot(s.initrd.Slot)); err != nil {
				return pcr.Release{}, nil, err
			}
			known = true
		}
		return kernel, slices.Clone(loaders), nil
	}
}

// secureBootVariables reads PK, KEK, db and dbx; one that does not exist is empty.
func secureBootVariables() (map[string][]byte, error) {
	state, err := ReadSecureBoot(efivarfs{efivarsPath})
	if err != nil {
		return nil, err
	}
	return state.Values, nil
}

// settleStates makes the TPM states right, in a boot that is good. What goes wrong is
// a problem in status, and no more: the volumes are open (F52). After a boot that the
// recovery key opened, it waits until the appliance is up: a state that is not healthy
// is not one to seal to.
func (s *system) settleStates(ctx context.Context) {
	if s.keeper == nil {
		return
	}
	if s.keeper.Method == "recovery" {
		for !s.started.Load() || !s.ready() {
			if !sleep(ctx, time.Second) {
				return
			}
		}
	}
	r, err := s.keeper.Settle()
	s.noteSettled(&r, err)
}

// keepSealed settles at once, unless this boot has to prove itself first.
func (s *system) keepSealed(ctx context.Context) {
	if s.keeper != nil && s.keeper.Method == "recovery" {
		go s.settleStates(ctx)
		return
	}
	s.settleStates(ctx)
}

// settleHere is for the init of an image that took over, in a boot that is healthy.
func settleHere() error {
	k, err := OpenKeeper(slog.Default())
	if k == nil || err != nil {
		return err
	}
	r, err := k.Settle()
	for _, p := range r.Problems {
		slog.Warn("TPM states", "problem", p)
	}
	return err
}

func (s *system) noteSettled(r *Settled, err error) {
	s.sealed.mu.Lock()
	defer s.sealed.mu.Unlock()
	s.sealed.asked = time.Time{}
	if err != nil {
		s.log.Warn("TPM states", "error", err)
		s.sealed.problem = fmt.Sprintf("the TPM states of the data volumes could not be seen to: %v", err)
		return
	}
	if r.Repaired != "" {
		s.log.Info("repaired", "what", r.Repaired)
	}
	s.sealed.settled, s.sealed.problem = r, ""
}

// describeStates puts what is in force now into the status.
func (s *system) describeStates(out *Status) {
	if s.keeper == nil {
		return
	}
	out.describe(s.keeper)
	s.sealed.mu.Lock()
	defer s.sealed.mu.Unlock()
	if s.sealed.problem != "" {
		out.Problems = append(out.Problems, s.sealed.problem)
	}
	r := s.sealed.settled
	if r == nil {
		return
	}
	out.Repaired = r.Repaired
	if time.Since(s.sealed.asked) > warningTime {
		var err error
		if s.sealed.warnings, err = s.keeper.NextBoot(); err != nil {
			s.log.Info("nothing can be said of the next start", "reason", err)
		}
		s.sealed.asked = time.Now()
	}
	out.Problems = slices.Concat(out.Problems, r.Problems, s.sealed.warnings)
}

func (s *Status) describe(k *Keeper) {
	tokens, known, err := k.inForce()
	if err != nil {
		s.Problems = append(s.Problems, fmt.Sprintf("TPM states: %v", err))
		return
	}
	s.setStates(tokens, k.Opened, k.Damaged, known)
	s.Degraded = append(s.Degraded, k.otherKeys()...)
	s.setLockout(k.lockout())
}

// describeHere completes what the initrd left, where no agent runs.
func (s *Status) describeHere() {
	s.describeSlots()
	s.setLoader(loaderStatusHere())
	k, err := OpenKeeper(slog.New(slog.DiscardHandler))
	if k == nil && err == nil {
		return
	}
	var warnings []string
	if err == nil {
		s.describe(k)
		warnings, err = k.NextBoot()
	}
	s.Problems = append(s.Problems, warnings...)
	if err != nil {
		s.Problems = append(s.Problems, fmt.Sprintf("TPM states: %v", err))
	}
}

// resealHere is Reseal in this process.
func resealHere(o ResealOptions) (SyncReport, error) {
	k, err := OpenKeeper(slog.Default())
	if err != nil {
		return SyncReport{}, err
	}
	if k == nil {
		return SyncReport{}, ErrNoVolumes
	}
	return k.Reseal(o)
}

// reseal does what the command reseal says, in the running agent.
func (s *system) reseal(o ResealOptions) (SyncReport, error) {
	if s.keeper == nil {
		return SyncReport{}, ErrNoVolumes
	}
	report, err := s.keeper.Reseal(o)
	if err != nil {
		return report, err
	}
	r, err := s.keeper.Settle()
	s.noteSettled(&r, err)
	return report, nil
}
