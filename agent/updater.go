package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/delta"
)

// updateTries is how often a new release may boot before the old one is back.
const updateTries = 3

// Errors of [Updater].
var (
	// ErrNoUpdate says that a check found nothing to install.
	ErrNoUpdate = errors.New("nothing to install")
	// ErrUpdating says that an installation or check is going on.
	ErrUpdating = errors.New("another update is under way")
)

// Updater installs releases into the slot that does not run, and keeps the
// account of it in one folder of the data volume. Fill in the exported fields,
// call [Updater.Settle] once after the boot, then the rest from any goroutine.
type Updater struct {
	Log    *slog.Logger
	Config image.Update
	// Trust is the root.json of the release that runs.
	Trust []byte
	// FleetKey, if any, has the age identities that open encrypted bundles.
	FleetKey []byte
	// Device is what runs, as far as choosing goes; Failed is filled in here.
	Device update.Device
	// BuildTime bounds the clock from below.
	BuildTime time.Time
	// Dir is the folder on the data volume.
	Dir string
	// Slot runs; Root is its dm-verity description.
	Slot partition.Slot
	Root image.Verity
	// OpenDisk opens the disk with the slots.
	OpenDisk func() (*partition.Disk, io.Closer, error)
	// Prepare, when set, makes the data volumes open in the first boot of a release that
	// is to be written into a slot. It is called before the first write; an error says why
	// this box cannot boot the release.
	Prepare func(image.Manifest, partition.Slot) error
	// SlotKey, when set, reads the key of the box's encrypted slots, which is wiped after
	// use; nil is none.
	SlotKey func() ([]byte, error)
	// Refused, when set, says why the firmware does not start the kernel image of a boot
	// entry, nil when nothing speaks against it.
	Refused func(*partition.Disk, partition.Entry) error
	// Hold, when set, says why none may be installed now; it is asked each time.
	Hold func() error
	// Boot names this start of the box (boot_id); empty where that is not known.
	Boot string
	Now  func() time.Time
	// mounted, when set, has a look at each medium too.
	mounted func(dir string)

	// locks is where processes that share Dir have their locks; "" when there is only this one.
	locks string

	working sync.Mutex // held over a check or an installation
	// remembered is held while the state is read, changed and written; the one who
	// judges a trial writes it beside the one who checks. No other lock is taken within.
	remembered sync.Mutex

	mu     sync.Mutex
	report UpdateStatus // what changes while working
}

// UpdateStatus is what `holdfast-agent update status --json` prints.
type UpdateStatus struct {
	Version string `json:"version"` // that runs
	Slot    string `json:"slot"`
	Channel string `json:"channel"`
	URL     string `json:"url,omitempty"`
	// Doing is what goes on now, empty for nothing; DoneBytes of TotalBytes are written and read back.
	Doing      string `json:"doing,omitempty"`
	DoneBytes  int64  `json:"done_bytes,omitempty"`
	TotalBytes int64  `json:"total_bytes,omitempty"`
	// Available is the version that the last check found; LastError why the last work failed.
	Available string    `json:"available,omitempty"`
	Notes     string    `json:"notes,omitempty"`
	LastCheck time.Time `json:"last_check,omitzero"`
	LastError string    `json:"last_error,omitempty"`
	// Damaged says that what was known of the repository was lost.
	Damaged bool `json:"damaged,omitempty"`

	Pending *update.Pending       `json:"pending,omitempty"`
	Failed  []update.Failed       `json:"failed,omitempty"`
	Journal []update.JournalEntry `json:"journal,omitempty"` // oldest first
}

// lines prints what a person wants to know at a glance.
func (r *UpdateStatus) lines(b *strings.Builder) {
	if r.Doing != "" {
		fmt.Fprintf(b, "update    %s", r.Doing)
		if r.TotalBytes > 0 {
			fmt.Fprintf(b, ", %d %%", r.DoneBytes*100/r.TotalBytes)
		}
		fmt.Fprintln(b)
	}
	if p := r.Pending; p != nil && r.Doing == "" {
		fmt.Fprintf(b, "update    %s in slot %s waits for its boot or its trial\n", p.Version, p.Slot)
	}
	if r.LastError != "" {
		fmt.Fprintf(b, "update    last attempt: %s\n", printable(r.LastError))
	}
	for i := len(r.Failed) - 1; i >= 0 && i >= len(r.Failed)-3; i-- {
		f := r.Failed[i]
		fmt.Fprintf(b, "FAILED    release %s, %s: %s\n", f.Version, f.Time.UTC().Format(time.RFC3339), printable(f.Reason))
	}
}

// WriteTo prints the status for a person.
func (r *UpdateStatus) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "running   %s in slot %s, channel %s\n", r.Version, r.Slot, orNone(r.Channel))
	fmt.Fprintf(&b, "source    %s\n", orNone(r.URL))
	if !r.LastCheck.IsZero() {
		fmt.Fprintf(&b, "checked   %s, available: %s\n", r.LastCheck.Format(time.RFC3339), orNone(r.Available))
	}
	if r.Notes != "" {
		fmt.Fprintf(&b, "notes     %s\n", strings.ReplaceAll(strings.TrimSpace(r.Notes), "\n", "\n          "))
	}
	r.lines(&b)
	for _, e := range r.Journal {
		fmt.Fprintf(&b, "%s  %-9s %s → %s", e.Time.UTC().Format(time.RFC3339), e.Result, orNone(e.From), orNone(e.To))
		if e.Source != "" {
			fmt.Fprintf(&b, " from %s, %d bytes in %d s", printable(e.Source), e.FetchedBytes, e.Seconds)
		}
		if e.Reason != "" {
			fmt.Fprintf(&b, ": %s", printable(e.Reason))
		}
		fmt.Fprintln(&b)
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

// reserveBytes are kept in the folder and given back while there is work to do,
// so that a full data volume does not keep the box from the release that fixes it.
const reserveBytes = 512 << 10

func (u *Updater) reservePath() string { return filepath.Join(u.Dir, "reserve") }
func (u *Updater) hasState() bool {
	_, err := os.Stat(filepath.Join(u.Dir, "state.json"))
	return err == nil
}

// reserve takes the space again, or as much of it as there is.
func (u *Updater) reserve() {
	f, err := os.OpenFile(u.reservePath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	block := make([]byte, 16<<10)
	for info, err := f.Stat(); err == nil && info.Size() < reserveBytes; info, err = f.Stat() {
		if _, err := f.Write(block); err != nil {
			return
		}
	}
}

// state changes what is remembered. A volume that does not take it is reported
// and is no reason to stop: the slots' own entries decide what boots.
func (u *Updater) state(change func(*update.State)) *update.State {
	u.remembered.Lock()
	defer u.remembered.Unlock()
	if u.locks != "" {
		lock, err := lockFile(filepath.Join(u.locks, stateLock), unix.LOCK_EX)
		if err != nil {
			u.Log.Warn("update state", "error", err)
		} else {
			defer lock.Close()
		}
	}
	s, err := update.LoadState(u.Dir, u.Now())
	if err != nil {
		u.Log.Warn("update state", "error", err)
	}
	if err == nil && change == nil && len(s.Journal) > 0 && !u.hasState() {
		change = func(*update.State) {} // a damaged one was put aside, and the new one says so
	}
	if change != nil {
		change(s)
		err := s.Save(u.Dir)
		if errors.Is(err, unix.ENOSPC) {
			os.Remove(u.reservePath())
			err = s.Save(u.Dir)
			u.reserve()
		}
		if err != nil {
			u.Log.Warn("update state not kept", "error", err)
		}
	}
	return s
}

// Status is the state with what is going on.
func (u *Updater) Status() UpdateStatus {
	s := u.state(nil)
	u.mu.Lock()
	out := u.report
	u.mu.Unlock()
	out.Version, out.Slot, out.Channel, out.URL = u.Device.Version, string(u.Slot), u.Config.Channel, u.Config.URL
	out.Pending, out.Failed, out.Journal = s.Pending, s.Failed, s.Journal
	return out
}

func (u *Updater) set(change func(*UpdateStatus)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	change(&u.report)
}

// Settle says how the last installation ended, from what boots now: the entries
// of the disk are the truth, the state is the memory of why. Call it before the
// slot that runs is judged.
func (u *Updater) Settle() error {
	if err := os.MkdirAll(u.Dir, 0o700); err != nil {
		return fmt.Errorf("folder for updates: %w", err)
	}
	defer u.reserve()
	disk, closer, err := u.OpenDisk()
	if err != nil {
		return err
	}
	defer closer.Close()
	entries, err := disk.Entries()
	if err != nil {
		return err
	}
	onTrial := slices.ContainsFunc(entries, func(e partition.Entry) bool { return e.Slot == u.Slot && e.Counted && !wasGood(e) })
	p := u.state(nil).Pending
	running := p != nil && string(u.Slot) == p.Slot && u.Root.RootHash == p.RootHash
	i := entryOf(p, entries)
	switch {
	case running && !onTrial:
		u.Commit()
	case onTrial:
		if !running {
			u.adopt(entries)
		}
		// the caller judges
	case i >= 0 && (entries[i].Bad() || entries[i].Damage != nil):
		u.fellBack(p, u.damageOf(disk, entries[i]))
	case i >= 0:
		u.Log.Info("a release waits for its first boot", "version", p.Version, "slot", p.Slot)
		u.notePassedOver(p.Boot)
	default:
		if p != nil {
			u.Log.Info("the last installation was cut off", "version", p.Version, "slot", p.Slot)
			u.state(func(s *update.State) { s.Pending = nil }) // what is written of it is found by the next attempt
		}
		u.noteBroken(disk, entries)
	}
	return nil
}

// notePassedOver counts the starts of the box that did not come to the release that waits,
// each once.
func (u *Updater) notePassedOver(last string) {
	if u.Boot == "" || u.Boot == last {
		return
	}
	u.state(func(s *update.State) {
		if p := s.Pending; p != nil {
			p.Boot = u.Boot
			p.PassedOver++
		}
	})
}

// entryOf is where the boot entry of p is, -1 when there is none. One that cannot be
// read does not say which root it is for.
func entryOf(p *update.Pending, entries []partition.Entry) int {
	return slices.IndexFunc(entries, func(e partition.Entry) bool {
		return p != nil && string(e.Slot) == p.Slot && e.Sequence == p.Sequence && (e.RootHash == p.RootHash || e.Damage != nil)
	})
}

// adopt makes what runs on trial the pending release, so that its end is noted: it
// was written on a bench, or its note gave way to that of a later installation that
// was cut off before it touched the slot.
func (u *Updater) adopt(entries []partition.Entry) {
	i := slices.IndexFunc(entries, func(e partition.Entry) bool { return e.Slot == u.Slot })
	u.state(func(s *update.State) {
		s.Pending = &update.Pending{Slot: string(u.Slot), Version: u.Device.Version, RootHash: u.Root.RootHash,
			Sequence: entries[i].Sequence, Since: u.Now().UTC()}
	})
}

// wasGood tells a slot that was blessed before and whose boots the initrd counts
// (F74) from one on trial.
func wasGood(e partition.Entry) bool { return e.Counted && e.TriesLeft+e.TriesDone > updateTries }

// noteBroken reports a newer release that was left with nothing pending: mostly one
// that was good and does not boot any more (F74). Installing that again may repair it,
// so it is not one that failed.
func (u *Updater) noteBroken(disk *partition.Disk, entries []partition.Entry) {
	var own int64
	for _, e := range entries {
		if e.Slot == u.Slot {
			own = max(own, e.Sequence)
		}
	}
	for _, e := range entries {
		s := u.state(nil)
		switch {
		case e.Slot == u.Slot || !e.Bad() || e.Sequence < own || slices.Contains(s.FailedHashes(), e.RootHash):
		case !wasGood(e):
			u.fellBack(&update.Pending{Version: e.Version, RootHash: e.RootHash}, u.damageOf(disk, e))
		default:
			u.Log.Warn("the newer release was good and does not boot any more", "version", e.Version, "slot", e.Slot)
			if left(s, e.Version, u.Device.Version) {
				continue // to judge a kernel image, all of it is read
			}
			reason := "it was good and does not boot any more: its slot may be damaged"
			if damage := u.damageOf(disk, e); damage != nil {
				reason = fmt.Sprintf("it was good and does not boot any more: %v", damage)
			}
			u.state(func(s *update.State) {
				s.Log(update.JournalEntry{Time: u.Now(), From: e.Version, To: u.Device.Version, Result: update.FellBack, Reason: reason})
			})
		}
	}
}

// left says whether the journal has, since a release last came in, that the box left this one.
func left(s *update.State, from, to string) bool {
	for _, have := range slices.Backward(s.Journal) {
		if have.Result == update.Applied || have.Result == update.Committed {
			return false
		}
		if have.Result == update.FellBack && have.From == from && have.To == to {
			return true
		}
	}
	return false
}

// damageOf is what is known to be wrong with a release that was left.
func (u *Updater) damageOf(disk *partition.Disk, e partition.Entry) error {
	if e.Damage != nil {
		return fmt.Errorf("its boot entry is damaged: %w", e.Damage)
	}
	if u.Refused == nil {
		return nil
	}
	if err := u.Refused(disk, e); err != nil {
		return fmt.Errorf("the firmware refuses its kernel image: %w", err)
	}
	return nil
}

// silent is the reason when a release left none.
const silent = "none of its boots came so far as to say why: a panic, the watchdog, power lost, or the TPM did not open the data"

// fellBack notes that p was left. damage is what is known to be wrong with it.
func (u *Updater) fellBack(p *update.Pending, damage error) {
	reason := p.Reason
	switch {
	case reason == "" && damage != nil:
		reason = damage.Error()
	case reason == "":
		reason = silent
	}
	u.Log.Warn("fell back", "version", p.Version, "reason", reason)
	u.state(func(s *update.State) {
		s.Pending = nil
		if p.RootHash == "" || !update.ValidVersion(p.Version) {
			return // of an entry that says nothing
		}
		s.Fail(update.Failed{Version: p.Version, RootHash: p.RootHash, Reason: reason, Time: u.Now()})
		s.Log(update.JournalEntry{Time: u.Now(), From: p.Version, To: u.Device.Version, Result: update.FellBack, Reason: reason})
	})
}

// Commit notes that the release that runs was blessed.
func (u *Updater) Commit() {
	u.state(func(s *update.State) {
		if p := s.Pending; p != nil && p.RootHash == u.Root.RootHash {
			s.Pending = nil
			s.Log(update.JournalEntry{Time: u.Now(), To: p.Version, Result: update.Committed})
		}
	})
}

// TrialFailed notes, in the release on trial, why it is left; the old one reports it.
func (u *Updater) TrialFailed(reason error) {
	u.state(func(s *update.State) {
		if p := s.Pending; p != nil && p.RootHash == u.Root.RootHash {
			p.SetReason(reason.Error())
		}
	})
}

// Check asks a source what there is for this box; want, when set, is the one
// version a person asked for. Nothing for it is ErrNoUpdate, with the reasons.
func (u *Updater) Check(ctx context.Context, src update.Source, want string) (*update.Candidate, error) {
	end, err := u.begin(settlingTime)
	if err != nil {
		return nil, err
	}
	defer end()
	return u.check(ctx, src, want)
}

// begin makes sure that nobody else checks or installs until end is called. Another
// process that is at work gets so much time to end it.
func (u *Updater) begin(patience time.Duration) (end func(), err error) {
	if !u.working.TryLock() {
		return nil, ErrUpdating
	}
	if u.locks == "" {
		return u.working.Unlock, nil
	}
	release, err := claimFile(filepath.Join(u.locks, workLock), patience)
	if err != nil {
		u.working.Unlock()
		return nil, err
	}
	return func() { release(); u.working.Unlock() }, nil
}

func (u *Updater) check(ctx context.Context, src update.Source, want string) (_ *update.Candidate, err error) {
	u.set(func(r *UpdateStatus) { r.Doing, r.LastError = "checking", "" })
	defer func() {
		u.set(func(r *UpdateStatus) {
			r.Doing, r.LastCheck = "", u.Now().UTC()
			if err != nil && !errors.Is(err, ErrNoUpdate) {
				r.LastError = brief(err.Error())
			}
		})
	}()
	s := u.state(nil)
	if err := os.Remove(u.reservePath()); err == nil {
		defer u.reserve()
	}
	client, err := update.New(update.Options{
		Root: u.Trust, StateDir: u.Dir, Source: src, Expiry: update.LenientCarried,
		Now: update.ReferenceTime(u.Now(), u.BuildTime, s.NewestVerified, s.LastSeen),
	})
	if err != nil {
		return nil, err
	}
	d := u.Device
	d.Want, d.Failed = want, s.FailedHashes()
	answer, err := client.Check(ctx, d)
	if err != nil {
		return nil, err
	}
	u.state(func(s *update.State) { s.Checked(answer) })
	u.set(func(r *UpdateStatus) {
		r.Damaged = r.Damaged || answer.Damaged
		r.Available, r.Notes = "", ""
		if c := answer.Candidate; c != nil {
			r.Available, r.Notes = c.Release.Manifest.Version, c.Release.Notes
		}
	})
	if answer.Candidate == nil {
		return nil, fmt.Errorf("%w: %s", ErrNoUpdate, explain(answer, d))
	}
	return answer.Candidate, nil
}

// explain says why nothing was chosen: of the version that was asked for, or else of
// the newest release for this box that the source has.
func explain(a *update.Answer, d update.Device) string {
	mine := slices.DeleteFunc(slices.Clone(a.Skipped), func(s update.Skipped) bool {
		return s.Target.Product != d.Product || s.Target.Channel != d.Channel || s.Target.Arch != d.Arch
	})
	for _, fits := range []func(update.Skipped) bool{
		func(s update.Skipped) bool { return s.Target.Version == d.Want },
		func(s update.Skipped) bool { return d.Want == "" && s.Reason != update.NotCarried },
		func(update.Skipped) bool { return d.Want == "" },
	} {
		if i := slices.IndexFunc(mine, fits); i >= 0 {
			return fmt.Sprintf("version %s: %s", mine[i].Target.Version, mine[i].Reason)
		}
	}
	switch {
	case len(mine) > 0:
		return fmt.Sprintf("there is no version %s in channel %s", d.Want, d.Channel)
	case len(a.Skipped) > 0:
		return fmt.Sprintf("%s: %s", a.Skipped[0].Name, a.Skipped[0].Reason)
	}
	return "there is no release in channel " + d.Channel
}

// Apply checks a source and installs what it has; name says where from. The box
// has to boot for it to take effect. What waits for its first boot already is left
// as it is.
func (u *Updater) Apply(ctx context.Context, src update.Source, name, want string) (version string, err error) {
	end, err := u.begin(settlingTime)
	if err != nil {
		return "", err
	}
	defer end()
	began := u.Now()
	c, err := u.check(ctx, src, want)
	if errors.Is(err, ErrNoUpdate) {
		return "", err
	}
	entry := update.JournalEntry{From: u.Device.Version, Source: name, Result: update.Refused}
	if err == nil {
		version = c.Release.Manifest.Version
		entry.To = version
		err = u.install(ctx, c)
		entry.FetchedBytes = c.Fetched()
	}
	if n := u.passedOver(); errors.Is(err, errWaits) && n >= maxPassedOver {
		err = fmt.Errorf("version %s is in slot %s with tries left, and %d starts of the box did not come to it: the firmware starts something else than the disk's boot loader, see its boot order; restart then", version, u.Slot.Other(), n)
		u.set(func(r *UpdateStatus) { r.LastError = brief(err.Error()) })
		return version, err
	}
	if errors.Is(err, errWaits) {
		u.Log.Info("installed already, and waits for a restart", "version", version, "slot", u.Slot.Other())
		return version, nil
	}
	entry.Time, entry.Seconds = u.Now(), int64(u.Now().Sub(began).Seconds())
	if err != nil {
		u.set(func(r *UpdateStatus) { r.LastError = brief(err.Error()) })
		entry.Reason = err.Error()
		if worthKeeping(err) {
			u.state(func(s *update.State) { logOnce(s, entry) })
		}
		return version, err
	}
	entry.Result = update.Applied
	u.state(func(s *update.State) { s.Log(entry) })
	u.Log.Info("installed", "version", version, "slot", u.Slot.Other(), "from", name, "fetched_bytes", entry.FetchedBytes, "seconds", entry.Seconds)
	return version, nil
}

// maxPassedOver is how many restarts a release is worth that none of them comes to.
const maxPassedOver = 3

func (u *Updater) passedOver() int {
	if p := u.state(nil).Pending; p != nil {
		return p.PassedOver
	}
	return 0
}

// worthKeeping: a network that is away every night would push all else out of the journal.
func worthKeeping(err error) bool {
	for _, e := range []error{update.ErrUntrusted, update.ErrExpired, update.ErrOlder, errUnfit} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// maxRefusals of the journal say what was refused: sticks with bundles for other
// boxes must not push out how the releases came and went.
const maxRefusals = 10

// logOnce leaves out what was noted since a release last came in. A refusal of the
// same release from the same source for another reason takes the old one's place:
// a reason can have the day's date in it.
func logOnce(s *update.State, e update.JournalEntry) {
	var cut update.State
	cut.Log(e) // as the journal has it
	e = cut.Journal[0]
	refusals := 0
	for i := len(s.Journal) - 1; i >= 0; i-- {
		have := s.Journal[i]
		if have.Result == update.Applied || have.Result == update.Committed {
			break
		}
		if have.Result != e.Result || have.From != e.From || have.To != e.To || have.Source != e.Source && e.Result != update.Refused {
			continue
		}
		if have.Reason == e.Reason {
			return
		}
		if e.Result == update.Refused && have.Source == e.Source {
			s.Journal = slices.Delete(s.Journal, i, i+1)
		}
	}
	s.Log(e)
	for i := len(s.Journal) - 1; i >= 0; i-- {
		if s.Journal[i].Result != update.Refused {
			continue
		}
		if refusals++; refusals > maxRefusals {
			s.Journal = slices.Delete(s.Journal, i, i+1)
		}
	}
}

var (
	// errUnfit marks a release that this box cannot take as it is.
	errUnfit = errors.New("this box cannot take it")
	// errWaits says that the release is in its slot, whole, and was not booted yet.
	errWaits = errors.New("it waits for its first boot")
)

// install writes the other slot. All that can be known beforehand is checked
// before the first write.
func (u *Updater) install(ctx context.Context, c *update.Candidate) error {
	if u.Hold != nil {
		if err := u.Hold(); err != nil {
			return fmt.Errorf("%w: %w", errUnfit, err)
		}
	}
	m := c.Release.Manifest
	u.set(func(r *UpdateStatus) { r.Doing = "installing " + m.Version })
	defer u.set(func(r *UpdateStatus) { r.Doing, r.DoneBytes, r.TotalBytes = "", 0, 0 })
	disk, closer, err := u.OpenDisk()
	if err != nil {
		return err
	}
	defer closer.Close()
	if err := u.unlessWaiting(c, disk); err != nil {
		return err
	}
	if err := u.shield(disk, m.Disk.EncryptSlots); err != nil {
		return err
	}
	root, err := u.rebuild(ctx, c, disk)
	if err != nil {
		return err
	}
	contents, err := c.Contents(ctx, func() (io.ReadCloser, error) { return root.Open(ctx) })
	if err != nil {
		return err
	}
	if u.locks != "" {
		lock, err := lockFile(filepath.Join(u.locks, diskLock), unix.LOCK_EX) // a Bless takes a moment
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	other := u.Slot.Other()
	plan, err := disk.PlanSlot(other, contents, partition.WriteOptions{Tries: updateTries, Running: u.Slot, Time: u.Now(), SkipEqual: true})
	if err != nil {
		return fmt.Errorf("%w: %w", errUnfit, err)
	}
	if u.Prepare != nil {
		if err := u.Prepare(m, other); err != nil {
			return fmt.Errorf("%w: %w", errUnfit, err)
		}
	}
	p := &update.Pending{Slot: string(other), Version: m.Version, RootHash: m.Verity.RootHash, Sequence: plan.Sequence(), Since: u.Now().UTC(), Boot: u.Boot}
	var before *update.Pending
	u.state(func(s *update.State) { before, s.Pending = s.Pending, p })
	u.Log.Info("installing", "version", m.Version, "slot", other, "by", root.Stats().Source, "fetch_bytes", root.Stats().BytesToFetch)
	if err := plan.Apply(ctx, u.progress(m.Version)); err != nil {
		u.abandon(disk, p, before)
		return err
	}
	return nil
}

// shield has an encrypted slot be read decrypted, and the other one be written encrypted
// where the new release wants that. Where the box has no key yet, the release is written
// in the clear, and encrypted by its first boot.
func (u *Updater) shield(disk *partition.Disk, encrypt bool) error {
	if u.SlotKey == nil {
		return nil
	}
	key, err := u.SlotKey()
	if err != nil {
		return fmt.Errorf("read the key of the slots: %w", err)
	}
	if key == nil {
		return nil
	}
	defer luks2.Wipe(key)
	slot, _, err := disk.Partition(u.Slot.Partition())
	if err != nil {
		return err
	}
	clear, err := slotcrypt.InTheClear(slot, u.Root)
	if err != nil {
		return err
	}
	cipher, err := slotcrypt.New(key)
	if err != nil {
		return err
	}
	if !clear {
		disk.Through(u.Slot, cipher.View)
	}
	if encrypt {
		disk.Through(u.Slot.Other(), cipher.View)
	}
	return nil
}

// unlessWaiting is errWaits when the other slot has the very release, whole and with tries left.
func (u *Updater) unlessWaiting(c *update.Candidate, disk *partition.Disk) error {
	p, m := u.state(nil).Pending, c.Release.Manifest
	entries, err := disk.Entries()
	if err != nil {
		return err
	}
	i := entryOf(p, entries)
	if i >= 0 && p.Slot == string(u.Slot.Other()) && p.RootHash == m.Verity.RootHash && entries[i].ReleaseID == m.UKI.SHA256 &&
		entries[i].Damage == nil && !entries[i].Bad() {
		return errWaits
	}
	return nil
}

// abandon forgets an installation that failed, unless its boot entry came about. What
// was pending before is so again when the slot was not touched.
func (u *Updater) abandon(disk *partition.Disk, p, before *update.Pending) {
	entries, err := disk.Entries()
	if err != nil || entryOf(p, entries) >= 0 {
		return
	}
	if entryOf(before, entries) < 0 {
		before = nil
	}
	u.state(func(s *update.State) { s.Pending = before })
}

// progressTime is how often the console says how far an installation is.
const progressTime = 5 * time.Second

func (u *Updater) progress(version string) func(done, total int64) {
	reported := u.Now()
	return func(done, total int64) {
		u.set(func(r *UpdateStatus) { r.DoneBytes, r.TotalBytes = done, total })
		if now := u.Now(); now.Sub(reported) >= progressTime {
			reported = now
			u.Log.Info("installing", "version", version, "percent", done*100/max(total, 1))
		}
	}
}

// rebuild settles how the new root comes about; see [update.Candidate.Rebuild].
func (u *Updater) rebuild(ctx context.Context, c *update.Candidate, disk *partition.Disk) (*delta.Rebuild, error) {
	on := update.Local{OldVerity: u.Root}
	for slot, into := range map[partition.Slot]*io.ReaderAt{u.Slot: &on.Old, u.Slot.Other(): &on.Target} {
		device, part, err := disk.Partition(slot.Partition())
		if err != nil {
			return nil, err
		}
		// A slot that is too small is refused by the plan, which says so better.
		if part.SizeBytes >= c.Release.Manifest.Verity.TotalBytes || slot == u.Slot {
			*into = device
		}
	}
	return c.Rebuild(ctx, on)
}
