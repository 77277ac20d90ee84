package agent

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
)

const (
	updateFolder = "update" // in stateFolder
	// updateFallbackDir is for appliances without a data volume; it lasts until the next boot.
	updateFallbackDir = "/run/holdfast/update"

	// firstCheckMin to firstCheckMax after its start the box asks for news, or a tenth
	// of the time between two checks: a street that gets its power back does not ask in one moment.
	firstCheckMin = 5 * time.Second
	firstCheckMax = 10 * time.Minute
	// retryMin to retryMax is the pause after a check that failed.
	retryMin = time.Minute
	retryMax = 2 * time.Hour
)

// OpenUpdater is the updater after a hand-off to another init, where no agent runs;
// nil in a release that takes no updates. It has settled what went before, unless
// another process is at work, which has. Processes keep out of each other's way.
func OpenUpdater(log *slog.Logger) (*Updater, error) {
	s := &system{log: log}
	if err := s.load(); err != nil {
		return nil, err
	}
	s.openKeeper()
	u, err := s.newUpdater()
	if u == nil || err != nil {
		return nil, err
	}
	return u, u.share(filepath.Dir(statePath))
}

// share keeps this process out of the way of others with the same folder for locks,
// and settles unless one of them is at work: an installation that goes on looks like
// one that was cut off.
func (u *Updater) share(locks string) error {
	u.locks = locks
	end, err := u.begin(0)
	if errors.Is(err, ErrUpdating) {
		u.set(func(r *UpdateStatus) { r.Doing = err.Error() })
		return nil
	}
	if err != nil {
		return err
	}
	defer end()
	return u.Settle()
}

// newUpdater is nil, nil in a release that takes no updates.
func (s *system) newUpdater() (*Updater, error) {
	trust, err := os.ReadFile(image.TUFRootPath)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	u := &Updater{
		Log: s.log, Config: s.app.Update, Trust: trust, BuildTime: time.Unix(s.app.BuildTimeSec, 0),
		Dir: updateFallbackDir, Slot: partition.Slot(s.initrd.Slot), Root: s.initrd.Verity, Now: time.Now,
		Device: update.Device{
			Product: s.app.Name, Channel: s.app.Update.Channel, Arch: runtime.GOARCH, Version: s.app.Version,
			RootHash: s.initrd.RootHash, Epoch: s.app.Update.Epoch, Hardware: s.app.Update.Hardware,
		},
		OpenDisk: func() (*partition.Disk, io.Closer, error) {
			d, err := openSlots(s.initrd.Disk, s.initrd.Slot)
			if err != nil {
				return nil, nil, err
			}
			return d.disk, d.dev, nil
		},
		Refused: func(disk *partition.Disk, e partition.Entry) error {
			return (&LoaderKeeper{Log: s.log, Vars: efivarfs{efivarsPath}, Disk: disk, Now: time.Now}).Refused(e)
		},
	}
	if id, err := os.ReadFile(bootIDPath); err == nil {
		u.Boot = strings.TrimSpace(string(id))
	}
	if s.custody == nil {
		s.custody = s.newCustody()
	}
	if s.custody != nil {
		u.Hold = s.custody.Hold
	}
	if u.FleetKey, err = os.ReadFile(image.FleetKeyPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if len(s.app.Volumes) > 0 {
		u.Dir = filepath.Join(s.app.Volumes[0].Mount, stateFolder, updateFolder)
	}
	u.Prepare, u.mounted = s.prepare, s.refuseChallenges
	if len(s.app.Volumes) > 0 {
		u.SlotKey = func() ([]byte, error) { return readSlotKey(s.app.Volumes) }
	}
	if len(s.initrd.Volumes) > 0 {
		u.Device.ID = s.initrd.Volumes[0].UUID // made at random when the box was provisioned
	}
	return u, nil
}

// webSource is the repository at the spec's URL.
func (u *Updater) webSource() (update.Source, error) {
	if u.Config.URL == "" {
		return nil, errors.New("the release names no repository; bring a bundle, or give a path")
	}
	var o update.HTTPOptions
	if u.Config.CAPEM != "" {
		o.CAs = x509.NewCertPool()
		if !o.CAs.AppendCertsFromPEM([]byte(u.Config.CAPEM)) {
			return nil, errors.New("the release's certificates for the repository cannot be read")
		}
	}
	o.UserAgent = "holdfast-agent " + u.Device.Product + "/" + u.Device.Version
	if strings.HasPrefix(u.Config.URL, image.RegistryScheme) {
		return update.NewOCI(u.Config.URL, o)
	}
	return update.NewHTTP(u.Config.URL, o)
}

// openBundle opens a bundle, with the fleet's key when it is encrypted.
func (u *Updater) openBundle(r io.ReaderAt, size int64) (*update.Bundle, error) {
	var fleet []age.Identity
	if len(u.FleetKey) > 0 {
		var err error
		if fleet, err = age.ParseIdentities(bytes.NewReader(u.FleetKey)); err != nil {
			return nil, errors.New("the release's fleet key cannot be read") // age would quote it
		}
	}
	b, err := update.OpenBundle(r, size, fleet...)
	var other *age.NoIdentityMatchError
	switch {
	case errors.Is(err, update.ErrEncrypted):
		return nil, fmt.Errorf("%w: this release has no fleet key; bring a bundle that is not encrypted, or build one with update.fleet_key", err)
	case errors.As(err, &other):
		return nil, fmt.Errorf("%w: it is not encrypted to the key of this fleet, or damaged", err)
	}
	return b, err
}

// openSource opens what a person names: nothing is the repository, a folder is one
// too, a file is a bundle.
func (u *Updater) openSource(path string) (update.Source, io.Closer, error) {
	if path == "" {
		src, err := u.webSource()
		return src, io.NopCloser(nil), err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if info.IsDir() {
		d, err := update.OpenDir(path)
		return d, d, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is a %v: give a bundle, or the folder of a repository", path, info.Mode().Type())
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	b, err := u.openBundle(f, info.Size())
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return b, f, nil
}

// sourceName is what the journal says of a source.
func (u *Updater) sourceName(path string) string {
	if path == "" {
		return u.Config.URL
	}
	return path
}

// CheckFrom is Check with a path: none is the spec's repository, a folder is one too,
// a file is a bundle.
func (u *Updater) CheckFrom(ctx context.Context, path, want string) error {
	src, closer, err := u.openSource(path)
	if err != nil {
		return err
	}
	defer closer.Close()
	_, err = u.Check(ctx, src, want)
	return err
}

// ApplyFrom is Apply with a path, as [Updater.CheckFrom] has it.
func (u *Updater) ApplyFrom(ctx context.Context, path, want string) (version string, err error) {
	src, closer, err := u.openSource(path)
	if err != nil {
		return "", err
	}
	defer closer.Close()
	return u.Apply(ctx, src, u.sourceName(path), want)
}

// follow asks the repository for news until ctx ends, and installs them when the
// spec says so. reboot is called after an installation, when the window allows it.
func (u *Updater) follow(ctx context.Context, reboot func(version string)) {
	if u.Config.URL == "" || u.Config.CheckSec == 0 {
		return
	}
	repeat(ctx, time.Duration(u.Config.CheckSec)*time.Second, func() error {
		version, err := u.step(ctx)
		switch {
		case errors.Is(err, ErrNoUpdate):
			return nil
		case err != nil:
			u.Log.Warn("update", "error", err)
		case version != "":
			u.rebootInWindow(ctx, func() { reboot(version) })
		}
		return err
	})
}

// repeat does something until ctx ends: soon after the start, then every so often, and
// sooner after an error, with pauses that grow. Chance keeps boxes from doing it in step.
func repeat(ctx context.Context, every time.Duration, do func() error) {
	wait, retry := firstCheckMin+rand.N(min(firstCheckMax, every/10+1)), retryMin
	for sleep(ctx, wait) {
		if do() == nil {
			wait, retry = every/10*9+rand.N(every/5+1), retryMin
			continue
		}
		wait = retry/2 + rand.N(retry/2)
		retry = min(2*retry, retryMax)
	}
}

// step is one check; version is what it installed.
func (u *Updater) step(ctx context.Context) (version string, err error) {
	if u.Config.Automatic {
		return u.ApplyFrom(ctx, "", "")
	}
	return "", u.CheckFrom(ctx, "", "")
}

// sleep says whether the time passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// rebootInWindow waits for the time of day that the spec allows.
func (u *Updater) rebootInWindow(ctx context.Context, reboot func()) {
	said := false
	for {
		now := u.Now().UTC()
		if inWindow(now.Hour()*60+now.Minute(), u.Config.WindowStartMin, u.Config.WindowEndMin) {
			reboot()
			return
		}
		if !said {
			u.Log.Info("the new release waits for the window to restart in", "from_min", u.Config.WindowStartMin, "to_min", u.Config.WindowEndMin)
			said = true
		}
		if !sleep(ctx, 20*time.Second) {
			return
		}
	}
}

// inWindow: a window may span midnight; one of no length is the whole day.
func inWindow(minute, start, end int) bool {
	switch {
	case start == end:
		return true
	case start < end:
		return minute >= start && minute < end
	}
	return minute >= start || minute < end
}

// settleUpdates says how the last installation ended.
func (s *system) settleUpdates() {
	u, err := s.newUpdater()
	if err != nil {
		s.problem(fmt.Sprintf("updates: %v", err))
		return
	}
	if u == nil {
		return
	}
	if err := u.Settle(); err != nil {
		s.problem(fmt.Sprintf("updates: %v", err))
	}
	s.updater = u
}

// updates follows the sources until ctx ends. It begins once the slot that runs is
// good: before that, the other one may be all that boots.
func (s *system) updates(ctx context.Context) {
	restart := func(version string) { s.requestPower(true, fmt.Sprintf("to start release %s", version)) }
	if s.updater != nil {
		go s.updater.follow(ctx, restart)
	}
	if s.custody != nil {
		go s.custody.deliver(ctx)
	}
	if s.reporter != nil {
		go s.reporter.follow(ctx)
	}
	if s.takesFromMedia() || s.carriesEscrow() || s.app.Evidence.Stick {
		go watchMedia(ctx, s.initrd.Disk, func(device string, still func() bool) { s.lookAt(ctx, device, still, restart) })
	}
}

// takesFromMedia says whether updates come by media.
func (s *system) takesFromMedia() bool { return s.updater != nil && s.app.Update.Stick }

// carriesEscrow says whether media are looked at for the escrow: a release that wants no
// updates from media does not want receipts from there either.
func (s *system) carriesEscrow() bool {
	return s.custody != nil && len(s.app.Recovery.Holders) > 0 && (s.updater == nil || s.app.Update.Stick)
}

// lookAt takes from a medium what there is for this box: first a receipt, for which an
// update on it may wait; then a challenge, which is answered by the release that runs
// now, and once more by the next one if the medium is still there when that has started.
func (s *system) lookAt(ctx context.Context, device string, still func() bool, restart func(version string)) {
	if s.carriesEscrow() {
		if err := s.custody.carry(device, s.app.Update.WriteBack, still); err != nil {
			s.log.Warn("medium", "device", device, "error", err)
		}
	}
	if s.app.Evidence.Stick {
		if err := s.newEvidence().carry(device, still); err != nil {
			s.log.Warn("medium", "device", device, "error", err)
		}
	}
	if !s.takesFromMedia() {
		return
	}
	version, err := s.updater.fromMedium(ctx, device, still)
	if err != nil {
		s.log.Warn("medium", "device", device, "error", err)
	}
	if version != "" {
		// There are other media, with a challenge or a receipt, until the window opens.
		go s.updater.rebootInWindow(ctx, func() { restart(version) })
	}
}
