package agent

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/update"
)

// Keeper decides in which states the TPM opens the data volumes, as releases and
// firmware come and go, and has its [Sealer] see to it. Fill in the exported fields;
// call [Keeper.Settle] in every boot that is good, [Keeper.Prepare] before a slot is
// written.
type Keeper struct {
	Sealer
	Policy image.SealPolicy
	// Name and Version are of the release that runs, in Slot.
	Name, Version string
	Slot          partition.Slot
	SecureBoot    bool
	// Method is how this boot opened the volumes, as in [VolumeStatus].
	Method string
	// PCRs are registers at the moment the volumes were opened.
	PCRs map[int]pcr.Digest
	// OpenDisk opens the disk with the slots.
	OpenDisk func() (*partition.Disk, io.Closer, error)
	// EventLog is the firmware's.
	EventLog func() ([]byte, error)
	// Programs are the release that runs, as its kernel image on the disk says, and the
	// digests of the boot loaders that lie there. The log's records are recognised by
	// these: other programs may come before, between and behind them.
	Programs func() (running pcr.Release, loaders []pcr.Digest, err error)
	// Retried says that this boot came from the second copy of the boot loader and that the
	// first has been put back since: the next boot is expected without the attempt that
	// failed. Nil is no.
	Retried func() bool
	// Variables are the contents of PK, KEK, db and dbx as they are now, empty for one
	// that does not exist.
	Variables func() (map[string][]byte, error)
	// BootID tells boots apart.
	BootID string
	Now    func() time.Time
}

// notesFile in stateFolder holds what the keeper remembers. Losing it closes nothing.
const (
	notesFile     = "seal.json"
	maxNotesBytes = 256 << 10
)

// notes are what a header has no room for.
type notes struct {
	Format int `json:"format"` // 1
	// Values are the registers that the states bind, by policy hash and number, to show.
	Values map[string]map[int]string `json:"values,omitempty"`
	// Releases are the reference values of what is in the slots, by the name of the state.
	Releases map[string]image.Expected `json:"releases,omitempty"`
	// PreparedIn is the boot that last sealed for a release to be written, and Prepared the
	// name of its state.
	PreparedIn string `json:"prepared_in,omitempty"`
	Prepared   string `json:"prepared,omitempty"`
	// PendingSince is when values were sealed of a change that has yet to happen.
	PendingSince time.Time   `json:"pending_since,omitzero"`
	Suspended    *suspension `json:"suspended,omitempty"`
}

// suspension is protection given up for some boots (F8).
type suspension struct {
	BootsLeft int       `json:"boots_left"`
	Since     time.Time `json:"since"`
	LastBoot  string    `json:"last_boot"` // counted already
}

// repairManual is [image.SealPolicy.Repair] when nothing is sealed anew by itself.
const repairManual = "manual"

const (
	// suspendTime ends a suspension that is not used up.
	suspendTime = 7 * 24 * time.Hour
	// MaxSuspendBoots is the longest suspension.
	MaxSuspendBoots = 20
	// pendingTime is how long values of a change are kept that does not happen.
	pendingTime = 30 * 24 * time.Hour
)

func (n *suspension) over(now time.Time) bool {
	// A clock that went back says nothing about how long it has been.
	return n.BootsLeft <= 0 || now.After(n.Since.Add(suspendTime)) || now.Before(n.Since.Add(-suspendTime))
}

// folder is the agent's on the first volume.
func (k *Keeper) folder() string {
	return filepath.Join(k.Root, k.Volumes[0].Volume.Mount, stateFolder)
}

func (k *Keeper) notesPath() string { return filepath.Join(k.folder(), notesFile) }

// notes reads them; what cannot be read is begun anew.
func (k *Keeper) notes() *notes {
	n := &notes{}
	f, err := os.Open(k.notesPath())
	if err == nil {
		var b []byte
		b, err = io.ReadAll(io.LimitReader(f, maxNotesBytes))
		f.Close()
		if err == nil {
			err = json.Unmarshal(b, n)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.Log.Warn("notes on sealing", "error", err)
	}
	if err != nil || n.Format != 1 {
		n = &notes{Format: 1}
	}
	if n.Values == nil {
		n.Values = map[string]map[int]string{}
	}
	if n.Releases == nil {
		n.Releases = map[string]image.Expected{}
	}
	return n
}

func (k *Keeper) save(n *notes) error {
	b, err := json.MarshalIndent(n, "", " ")
	if err != nil {
		return err
	}
	if err := update.WriteFile(k.notesPath(), b, 0o600); err != nil {
		return fmt.Errorf("notes on sealing: %w", err)
	}
	return nil
}

// situation is what a decision is taken on, read anew for each.
type situation struct {
	notes   *notes
	tokens  []seal.Token
	entries []partition.Entry
	now     map[int]pcr.Digest // registers, 11 as it was in the initrd
	all     map[int]pcr.Digest // registers for the record
	policy  image.SealPolicy   // with the PIN that the box's owner may have added
	pin     []byte
	renew   bool // the PIN is another one than states were sealed with
	// completed says that the PIN was changed just now, because a change was cut off.
	completed bool
	srk       []byte // name of the TPM's storage key
	damaged   string // as in [Sealer]
	bond      bond
	raise     bool // the bond is of an epoch that the counter has not come to
}

// live says whether the TPM opens by that policy: one under another TPM's storage key
// does not (F37), nor one whose keyslot is damaged.
func (s *situation) live(p seal.Policy) bool {
	digest, err := p.Digest()
	return err == nil && slices.ContainsFunc(s.tokens, func(t seal.Token) bool { return t.PolicyHash == digest && s.ours(t) && sealedID(t) != s.damaged })
}

func (s *situation) ours(t seal.Token) bool { return t.SRK != nil && bytes.Equal(t.SRK.Name, s.srk) }

func (k *Keeper) look() (s *situation, err error) {
	s = &situation{notes: k.notes(), damaged: k.Damaged}
	if s.tokens, _, err = k.inForce(); err != nil {
		return nil, err
	}
	disk, closer, err := k.OpenDisk()
	if err != nil {
		return nil, err
	}
	defer closer.Close()
	if s.entries, err = disk.Entries(); err != nil {
		return nil, err
	}
	if err := k.readPIN(s); err != nil {
		return nil, err
	}
	return s, k.ask(s)
}

// begin is look for who is going to change states; until unlock nobody else does. A
// change of the PIN that was cut off is completed first.
func (k *Keeper) begin() (s *situation, unlock func(), err error) {
	if unlock, err = k.lock(); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	if s, err = k.look(); err == nil && s.renew && !k.waits(s) {
		if _, err = k.renewPIN(s); err == nil {
			k.Log.Info("a change of the PIN that was cut off is completed")
			s, err = k.look()
			if s != nil {
				s.completed = true
			}
		}
	}
	if err == nil && s.policy.PIN && len(s.pin) == 0 {
		err = errNoPIN
	}
	return s, unlock, err
}

// lockout is what the TPM counts now.
func (k *Keeper) lockout() (seal.Lockout, error) {
	tpm, err := k.OpenTPM()
	if err != nil {
		return seal.Lockout{}, err
	}
	if c, ok := tpm.(io.Closer); ok {
		defer c.Close()
	}
	return seal.ReadLockout(tpm)
}

// ask asks the TPM for its registers, and its counter where the policy has one.
func (k *Keeper) ask(s *situation) error {
	tpm, err := k.OpenTPM()
	if err != nil {
		return err
	}
	if c, ok := tpm.(io.Closer); ok {
		defer c.Close()
	}
	if s.all, err = seal.ReadPCRs(tpm, recordedPCRs); err != nil {
		return err
	}
	srk, err := seal.EnsureSRK(tpm)
	if err != nil {
		return err
	}
	s.srk = srk.Name
	srk.Close(tpm)
	delete(s.all, phasePCR) // of a later phase
	s.now = maps.Clone(s.all)
	if v, ok := k.PCRs[phasePCR]; ok {
		s.now[phasePCR], s.all[phasePCR] = v, v
	}
	if k.Policy.Policy != seal.PolicyRollbackProof {
		return nil
	}
	return k.bind(tpm, s)
}

// bind settles the epoch that the box has come to, and the counter's bound.
//
// An epoch that rises is sealed with the bound one above the counter's value first;
// only then the counter is incremented, and the states of the old epoch go. A cut
// between leaves tokens with both bounds, and the higher one is gone on with.
func (k *Keeper) bind(tpm seal.TPM, s *situation) error {
	counter, err := seal.EnsureCounter(tpm, seal.CounterIndex)
	if err != nil {
		return err
	}
	s.bond = bond{uint64(max(k.Policy.Epoch, 1)), counter}
	var reached uint64
	for _, t := range s.tokens {
		epoch := epochOf(t.Ref)
		if epoch == 0 || t.Counter == nil || t.Counter.Index != counter.Index || !s.ours(t) {
			continue
		}
		if t.Counter.Max < counter.Max || t.Counter.Max > counter.Max+1 {
			continue // of the past, or nothing that we have written
		}
		if epoch > reached {
			reached = epoch
			s.bond.counter.Max = t.Counter.Max
		}
	}
	if s.bond.epoch > reached && reached > 0 {
		s.bond.counter.Max = counter.Max + 1
	}
	s.bond.epoch = max(s.bond.epoch, reached)
	s.raise = s.bond.counter.Max > counter.Max
	return nil
}

// own is the name of the slot that runs.
func (k *Keeper) own() string { return slotName(k.Slot, k.Version) }

// bootable are the names of the slots that may boot next, the one that runs first.
func (k *Keeper) bootable(s *situation) []string {
	names := []string{k.own()}
	for _, e := range s.entries {
		if e.Slot != k.Slot && e.Damage == nil && !e.Bad() {
			names = append(names, slotName(e.Slot, e.Version))
		}
	}
	return names
}

// present are the states of the box as it is: of the release that runs, and of the
// other one as far as that is known.
func (k *Keeper) present(s *situation) ([]SealState, error) {
	p, err := policyOf(s.policy, k.SecureBoot, s.bond, s.now)
	if err != nil {
		return nil, err
	}
	states := []SealState{{For: k.own(), Policy: p}}
	mark := ""
	if b, err := k.running(s.notes); err == nil && b.bare {
		mark = loadedMark
	} else if k.retried() {
		mark = firstMark
	}
	if mark != "" {
		next, err := k.predict(s, firmwareChange{}, nil)
		switch {
		case err != nil:
			k.Log.Info("the next start, by the boot loader, is not predicted", "reason", err)
		case !samePolicy(p, next):
			states = append(states, SealState{For: k.own() + mark, Policy: next})
		}
	}
	return append(states, k.others(s, firmwareChange{}, "")...), nil
}

func (k *Keeper) retried() bool { return k.Retried != nil && k.Retried() }

// asNext is what the next boot is predicted from: the log and the registers of this one,
// by the boot loader, and without an attempt to boot that will not fail again.
func (k *Keeper) asNext(b seenBoot, s *situation) (pcr.Log, map[int]pcr.Digest) {
	if b.log.Replay()[4] != s.now[4] {
		return b.log, s.now
	}
	var log pcr.Log
	switch {
	case b.bare:
		log, _ = s.notes.loaded(b.log, b.release)
	case k.retried():
		log, _ = b.log.WithoutRetry(b.release.Loader.Authenticode)
	default:
		return b.log, s.now
	}
	now := maps.Clone(s.now)
	now[4] = log.Replay()[4]
	return log, now
}

// loaded is the log of a boot in which the firmware started the kernel image itself, as it
// would be by the release's boot loader. Of what the firmware tried before, it leaves out so
// much that PCR 4 is what a state is sealed to (known), for some boards try more at each
// boot; where none is, all of it.
func (n *notes) loaded(log pcr.Log, r pcr.Release) (as pcr.Log, known bool) {
	for ok := true; ok; log, ok = log.WithoutRetry(r.UKI.Authenticode) {
		as, _ = log.StartedBy(r.UKI.Authenticode, r.Loader.Authenticode)
		value := as.Replay()[4]
		for _, values := range n.Values {
			if pcrValues(values)[4] == value {
				return as, true
			}
		}
	}
	return as, false
}

// others are the states of the other slot as far as they can be predicted.
func (k *Keeper) others(s *situation, c firmwareChange, mark string) (states []SealState) {
	for _, n := range k.bootable(s)[1:] {
		e, ok := s.notes.Releases[n]
		if !ok {
			continue
		}
		p, err := k.predict(s, c, func(running pcr.Release) (pcr.Release, error) {
			next, err := releaseOf(e)
			if n != s.notes.Prepared || s.notes.PreparedIn != k.BootID {
				next.Loader = running.Loader // there is one on the disk, whatever that slot came with
			}
			return next, err
		})
		if err != nil {
			k.Log.Info("the other slot's state is left as it is", "state", n, "reason", err)
			continue
		}
		states = append(states, SealState{For: n + mark, Policy: p})
	}
	return states
}

// firmwareChange is what the next boot will find in the firmware's variables.
type firmwareChange struct {
	variables map[string][]byte // as in [pcr.Change]
	// now and next are the certificates in db that verify each program, by its
	// Authenticode digest, where they are known.
	now, next map[pcr.Digest]pcr.Digest
}

// predict is the policy for the next boot, of what next makes of the release that runs;
// nil is the same.
func (k *Keeper) predict(s *situation, c firmwareChange, next func(running pcr.Release) (pcr.Release, error)) (p seal.Policy, err error) {
	bound, err := seal.Literal(k.Policy.Policy, k.SecureBoot)
	if err != nil {
		return p, err
	}
	if len(bound) == 0 {
		return policyOf(s.policy, k.SecureBoot, s.bond, nil)
	}
	b, err := k.running(s.notes)
	if err != nil && (b.log.Class == pcr.Empty || slices.Contains(bound, 4) || slices.Contains(bound, 11)) {
		return p, err
	}
	change := pcr.Change{Running: b.release, Next: b.release, Variables: c.variables}
	if next != nil {
		if change.Next, err = next(b.release); err != nil {
			return p, err
		}
	}
	if b.bare && b.release.Loader.Authenticode == (pcr.Digest{}) { // any will do, to be replaced
		b.release.Loader.Authenticode = change.Next.Loader.Authenticode
		change.Running = b.release
	}
	verify(&change.Running, c.now)
	verify(&change.Next, c.next)
	log, now := k.asNext(b, s)
	values, err := pcr.Predict(log, now, change).Of(bound...)
	if err != nil {
		return p, err
	}
	return policyOf(s.policy, k.SecureBoot, s.bond, values)
}

// seenBoot is what a boot's log shows.
type seenBoot struct {
	log     pcr.Log
	release pcr.Release
	// bare says that the firmware started the kernel image itself. The release's boot
	// loader is then the one that would have, if that is known.
	bare bool
}

// running reads the log and finds what started in this boot: by what is on the disk, and
// by what was noted of releases, because the boot loader there may be the next one's by now.
func (k *Keeper) running(n *notes) (b seenBoot, err error) {
	raw, err := k.EventLog()
	if err != nil {
		return b, fmt.Errorf("the firmware's event log: %w", err)
	}
	if b.log, err = pcr.ParseLog(raw); err != nil {
		return b, err
	}
	onDisk, loaders, failure := k.Programs()
	kernels := []pcr.Release{onDisk}
	var noted []pcr.Digest // loaders
	for name, e := range n.Releases {
		r, err := releaseOf(e)
		if err != nil {
			continue
		}
		if r.Loader.Authenticode != (pcr.Digest{}) {
			noted = append(noted, r.Loader.Authenticode)
		}
		if name == k.own() {
			kernels = append(kernels, r)
		}
	}
	if b.release, err = runningOf(b.log, append(loaders, noted...), kernels); err != nil {
		if failure != nil {
			err = fmt.Errorf("%w; the programs on the disk: %w", err, failure)
		}
		return b, err
	}
	if b.bare = b.release.Loader.Authenticode == (pcr.Digest{}); b.bare {
		own, _ := releaseOf(n.Releases[k.own()])
		b.release.Loader.Authenticode = n.usualLoader(b, own.Loader.Authenticode, noted)
	}
	return b, nil
}

// usualLoader is the boot loader that the kernel image would have been started by: the one
// noted of it, unless states are sealed to another one's start.
func (n *notes) usualLoader(b seenBoot, own pcr.Digest, noted []pcr.Digest) pcr.Digest {
	for _, d := range append([]pcr.Digest{own}, noted...) {
		b.release.Loader.Authenticode = d
		if _, known := n.loaded(b.log, b.release); known {
			return d
		}
	}
	return own
}

// verify fills in the certificates that are known.
func verify(r *pcr.Release, certificates map[pcr.Digest]pcr.Digest) {
	for _, p := range []*pcr.Program{&r.Loader, &r.UKI} {
		if c, ok := certificates[p.Authenticode]; ok {
			p.Certificate = c
		}
	}
}

// keeps says which old states stay: those of the other slot as long as it may boot and
// nothing else is known to be right for it, and those of a change that has yet to happen.
func (k *Keeper) keeps(s *situation, wanted []SealState) func(name string, t seal.Token) bool {
	other := k.bootable(s)[1:]
	var sealed []string
	for _, w := range wanted {
		sealed = merge(sealed, splitNames(w.For))
	}
	return func(name string, t seal.Token) bool {
		slot, pending := strings.CutSuffix(name, pendingMark)
		over := t.Counter != nil && s.bond.counter.Max > 0 && t.Counter.Max < s.bond.counter.Max && !s.raise
		switch {
		case over || slices.Contains(sealed, name):
			return false
		case pending:
			slot = strings.TrimSuffix(slot, loaderMark)
			return !s.notes.PendingSince.IsZero() && (slot == k.own() || slices.Contains(other, slot))
		case name == k.own()+loaderMark:
			return s.notes.PreparedIn == k.BootID
		case name == "":
			return len(other) > 0 // of a release that named no states
		}
		return slices.Contains(other, name)
	}
}

// sync has the wanted states made, and notes their values.
func (k *Keeper) sync(s *situation, wanted []SealState, keep func(string, seal.Token) bool) (SyncReport, error) {
	for _, w := range wanted {
		digest, err := w.Policy.Digest()
		if err != nil {
			return SyncReport{}, err
		}
		s.notes.Values[hex.EncodeToString(digest[:])] = pcrTexts(w.Policy.PCRs)
	}
	record := &seal.Record{Policy: k.Policy.Policy, PCRs: s.all, Release: k.Name + " " + k.Version}
	sealer := k.Sealer
	sealer.PIN, sealer.renew = s.pin, s.renew
	report, err := sealer.locked(wanted, keep, record)
	if err != nil {
		return report, err
	}
	s.renew = false
	if report.Changed() {
		k.Log.Info("TPM states", "added", strings.Join(report.Added, ", "), "dropped", strings.Join(report.Dropped, ", "), "kept", strings.Join(report.Kept, ", "))
	}
	return report, k.tidy(s)
}

// tidy forgets values of states that are gone, reads the tokens again and keeps the rest.
func (k *Keeper) tidy(s *situation) error {
	before := k.notes()
	var err error
	if s.tokens, _, err = k.inForce(); err != nil {
		return err
	}
	hashes, names := map[string]bool{}, map[string]bool{}
	for _, t := range s.tokens {
		hashes[hex.EncodeToString(t.PolicyHash[:])] = true
		for _, n := range splitNames(t.For) {
			names[n] = true
		}
	}
	maps.DeleteFunc(s.notes.Values, func(hash string, _ map[int]string) bool { return !hashes[hash] })
	for _, n := range k.bootable(s) {
		names[n] = true
	}
	maps.DeleteFunc(s.notes.Releases, func(name string, _ image.Expected) bool { return !names[name] })
	if same(before, s.notes) {
		return nil
	}
	return k.save(s.notes)
}

func same(a, b *notes) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && string(x) == string(y)
}

// Settled is what [Keeper.Settle] found and did.
type Settled struct {
	SyncReport
	// Repaired says that the TPM opens again after a boot by the recovery key.
	Repaired string
	Problems []string
}

// Settle makes the states right for what may boot from here. Call it in a boot that is
// good, not on trial. After a boot that the recovery key opened it seals to the present
// state, unless the spec wants a person to say so.
func (k *Keeper) Settle() (r Settled, err error) {
	s, unlock, err := k.begin()
	if err != nil {
		return r, err
	}
	defer unlock()
	k.countBoot(s)
	wanted, err := k.present(s)
	if err != nil {
		return r, err
	}
	if k.waits(s) {
		if next, err := k.predict(s, firmwareChange{}, nil); err == nil && k.retried() && s.live(next) {
			return r, nil // the boot loader that failed is repaired, and the TPM opens again
		}
		r.Problems = append(r.Problems, "the TPM will not open the data volumes at the next start either; if this state of the box is as it should be, run holdfast-agent reseal")
		return r, nil
	}
	if s.completed {
		r.Problems = append(r.Problems, "a change of the PIN that was cut off has been completed: the new PIN is the one that counts")
	}
	k.settlePending(s, wanted)
	k.noteOwn(s)
	wanted = append(wanted, k.suspendedState(s)...)
	opens := s.live(wanted[0].Policy)
	if r.SyncReport, err = k.syncAndRaise(s, wanted, k.keeps(s, wanted)); err != nil {
		return r, err
	}
	if k.Method == "recovery" && !opens {
		r.Repaired = "sealed to the present state, after a start that the recovery key opened; the TPM opens the data volumes again"
	}
	return r, nil
}

// waits says whether it is for a person to seal to the present state.
func (k *Keeper) waits(s *situation) bool {
	if k.Method != "recovery" || k.Policy.Repair != repairManual || s.notes.Suspended != nil {
		return false
	}
	p, err := policyOf(s.policy, k.SecureBoot, s.bond, s.now)
	return err == nil && !s.live(p)
}

// inForce reads the states that the volumes have now, and the register values by which
// they are explained. It asks no TPM.
func (k *Keeper) inForce() (tokens []seal.Token, known []map[int]pcr.Digest, err error) {
	v := k.Volumes[0]
	h, _, err := luks2.Read(v.Device, v.Device.Size())
	if err != nil {
		return nil, nil, fmt.Errorf("data volume %s: %w", v.Name, err)
	}
	for _, t := range tpmTokens(h) {
		tokens = append(tokens, t.Token)
	}
	known = append(known, k.PCRs)
	for _, values := range k.notes().Values {
		known = append(known, pcrValues(values))
	}
	return tokens, known, nil
}

// otherKeys says which keyslots open the volumes besides those of the TPM's states, the
// recovery key and the management key: what somebody has added holds whatever the policy.
func (k *Keeper) otherKeys() (list []string) {
	for _, p := range k.Volumes {
		h, _, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			continue // said where the states are read
		}
		named := map[int]bool{}
		for _, raw := range h.Tokens() {
			for _, slot := range tokenSlots(raw) {
				named[slot] = named[slot] || seal.IsTokenType(tokenType(raw)) || tokenType(raw) == recoveryTokenType
			}
		}
		var others []string
		cheap := 0
		for _, s := range h.Keyslots() {
			if named[s.ID] {
				continue
			}
			if s.KDF == luks2.HighEntropyKDF() {
				cheap++ // the management key's, and no other
			}
			if s.KDF != luks2.HighEntropyKDF() || cheap > 1 {
				others = append(others, strconv.Itoa(s.ID))
			}
		}
		if len(others) > 0 {
			list = append(list, fmt.Sprintf("data volume %s opens without the TPM by what somebody has put into keyslot %s", p.Name, strings.Join(others, ", ")))
		}
	}
	return list
}

// noteOwn keeps what the log says of the release that runs, for when the other one does.
func (k *Keeper) noteOwn(s *situation) {
	b, err := k.running(s.notes)
	if err != nil {
		k.Log.Info("what this boot started is not known", "reason", err)
		return
	}
	s.notes.Releases[k.own()] = expectedOf(b.release)
}

// countBoot counts a suspension down, once in a boot.
func (k *Keeper) countBoot(s *situation) {
	p := s.notes.Suspended
	if p == nil {
		return
	}
	if p.LastBoot != k.BootID {
		p.BootsLeft--
		p.LastBoot = k.BootID
	}
	if p.over(k.Now()) {
		k.Log.Info("the suspension of protection has ended")
		s.notes.Suspended = nil
	}
}

// suspendedState is wanted while a suspension lasts.
func (k *Keeper) suspendedState(s *situation) []SealState {
	if s.notes.Suspended == nil {
		return nil
	}
	return []SealState{{For: suspendedName, Policy: relaxed(s.policy, s.bond)}}
}

// settlePending forgets a change that has happened, or that does not.
func (k *Keeper) settlePending(s *situation, wanted []SealState) {
	if s.notes.PendingSince.IsZero() {
		return
	}
	digest, err := wanted[0].Policy.Digest()
	happened := err == nil && slices.ContainsFunc(s.tokens, func(t seal.Token) bool {
		return t.PolicyHash == digest && slices.Contains(splitNames(t.For), k.own()+pendingMark)
	})
	age := k.Now().Sub(s.notes.PendingSince)
	if happened || age > pendingTime || age < -pendingTime {
		s.notes.PendingSince = time.Time{}
	}
}

// syncAndRaise is sync, and the counter's increment between sealing for an epoch and
// dropping what was before.
func (k *Keeper) syncAndRaise(s *situation, wanted []SealState, keep func(string, seal.Token) bool) (SyncReport, error) {
	if !s.raise {
		return k.sync(s, wanted, keep)
	}
	first, err := k.sync(s, wanted, func(string, seal.Token) bool { return true })
	if err != nil {
		return first, err
	}
	if err := k.increment(s.bond.counter); err != nil {
		return first, err
	}
	k.Log.Info("security epoch", "epoch", s.bond.epoch, "counter", s.bond.counter.Max)
	s.raise = false
	second, err := k.sync(s, wanted, keep)
	second.Added = first.Added
	return second, err
}

// increment brings the counter to the bound.
func (k *Keeper) increment(to seal.Counter) error {
	tpm, err := k.OpenTPM()
	if err != nil {
		return err
	}
	if c, ok := tpm.(io.Closer); ok {
		defer c.Close()
	}
	now, err := seal.ReadCounter(tpm, to.Index)
	if err != nil || now >= to.Max {
		return err
	}
	_, err = seal.IncrementCounter(tpm, to.Index)
	return err
}

// Prepare seals for the first boot of a release that is to be written into a slot,
// where its state is another one than the present. Call it before the slot's boot
// entry can exist; an error says why the box could not open its data with it.
func (k *Keeper) Prepare(m image.Manifest, slot partition.Slot) error {
	s, unlock, err := k.begin()
	if err != nil {
		return err
	}
	defer unlock()
	wanted, err := k.present(s)
	if err != nil {
		return err
	}
	if err := k.epochAllows(s, m); err != nil {
		return err
	}
	present, name := wanted[0].Policy, slotName(slot, m.Version)
	more, err := k.coming(s, name, m.Expected, present)
	switch {
	case err != nil && !ofRelease(k.Policy, k.SecureBoot):
		// What the policy binds is the firmware's, and stays.
		k.Log.Info("the next start is not predicted", "reason", err)
		return nil
	case err != nil:
		return fmt.Errorf("release %s could not open the data volumes without the recovery key: policy %s binds it, and its first start cannot be predicted: %w. "+
			"At the bench, holdfast apply writes it to the disk all the same; its first start then asks for the recovery key", m.Version, k.Policy.Policy, err)
	}
	s.notes.Releases[name], s.notes.Prepared, s.notes.PreparedIn = m.Expected, name, k.BootID
	if !slices.ContainsFunc(more, func(w SealState) bool { return !s.live(w.Policy) }) && !ofRelease(k.Policy, k.SecureBoot) {
		return k.save(s.notes)
	}
	wanted = append(append(wanted, more...), k.suspendedState(s)...)
	_, err = k.sync(s, wanted, k.keeps(s, wanted))
	return err
}

// epochAllows refuses a release that this box's TPM would not open the data volumes for:
// one of a lower security epoch than the box has come to, without the vendor's word.
func (k *Keeper) epochAllows(s *situation, m image.Manifest) error {
	if k.Policy.Policy != seal.PolicyRollbackProof || uint64(max(m.Epoch, 1)) >= s.bond.epoch {
		return nil
	}
	if value, err := parseDigest(m.Expected.PCR11["enter-initrd"]); err == nil {
		ok, err := k.authorised().Allow([]byte(k.Policy.PolicyKeyPEM), value, seal.EpochRef(s.bond.epoch))
		if err != nil || ok {
			return err
		}
	}
	return fmt.Errorf("release %s has security epoch %d, and this box has come to %d: its TPM would not open the data volumes. "+
		"The vendor may authorise one downgrade by a file (holdfast-agent downgrade FILE)", m.Version, m.Epoch, s.bond.epoch)
}

// authorised are the vendor's signatures on the ESP, as they are now.
func (k *Keeper) authorised() seal.Signatures {
	disk, closer, err := k.OpenDisk()
	if err != nil {
		return nil
	}
	defer closer.Close()
	m := Machine{Log: k.Log, Authorisation: func() ([]byte, error) { return readAuthorisation(disk) }}
	return m.authorised()
}

// coming are the states from the moment on that a release is written: of its first
// boot, and of the slot that runs where the release brings another boot loader; both
// once more for a change of the firmware's variables that is sealed for already.
func (k *Keeper) coming(s *situation, name string, e image.Expected, present seal.Policy) ([]SealState, error) {
	changes := map[string]firmwareChange{"": {}}
	if !s.notes.PendingSince.IsZero() {
		if variables, err := k.Variables(); err == nil {
			changes[pendingMark] = firmwareChange{variables: variables}
		}
	}
	var states []SealState
	for _, mark := range slices.Sorted(maps.Keys(changes)) {
		first, err := k.predict(s, changes[mark], func(pcr.Release) (pcr.Release, error) { return releaseOf(e) })
		if err != nil {
			return nil, err
		}
		states = append(states, SealState{For: name + mark, Policy: first})
		own, err := k.predict(s, changes[mark], func(running pcr.Release) (pcr.Release, error) {
			next, err := releaseOf(e)
			running.Loader = next.Loader
			return running, err
		})
		if err != nil {
			return nil, err
		}
		if mark != "" || !samePolicy(own, present) {
			states = append(states, SealState{For: k.own() + loaderMark + mark, Policy: own})
		}
	}
	return states, nil
}

// ResealOptions say what besides the present state to seal for.
type ResealOptions struct {
	// DBX, when set, is an update of the revocation list that is about to be written:
	// an .auth file, or signature lists to be appended.
	DBX []byte
	// Suspend seals, for so many boots, for every state of the firmware.
	Suspend int
}

// Reseal seals to the present state of the box and, where the firmware's variables are
// not what this boot found, to that of its next boot (F1). Somebody asks for it: it
// is not done by itself, because the variables may have been changed by anybody.
func (k *Keeper) Reseal(o ResealOptions) (SyncReport, error) {
	if o.Suspend < 0 || o.Suspend > MaxSuspendBoots {
		return SyncReport{}, fmt.Errorf("suspend protection for %d boots: 1 to %d are possible", o.Suspend, MaxSuspendBoots)
	}
	s, unlock, err := k.begin()
	if err != nil {
		return SyncReport{}, err
	}
	defer unlock()
	if o.Suspend > 0 {
		s.notes.Suspended = &suspension{BootsLeft: o.Suspend, Since: k.Now().UTC(), LastBoot: k.BootID}
	}
	variables, err := k.Variables()
	if err == nil && o.DBX != nil {
		variables, err = withDBX(variables, o.DBX)
	}
	var more []SealState
	if err == nil {
		more, err = k.changed(s, firmwareChange{variables: variables})
	}
	if err != nil && o.DBX != nil {
		return SyncReport{}, err
	}
	if err != nil {
		k.Log.Info("the next start is not predicted", "reason", err)
	}
	return k.reseal(s, more)
}

// SealChange seals for the present state and for the next boot with changed variables:
// all of PK, KEK, db and dbx. now and next are the certificates in db that verify the
// boot loader and the kernel images, by the programs' Authenticode digests; nil where
// no certificate changes. Call it before the variables are written (F9).
func (k *Keeper) SealChange(variables map[string][]byte, now, next map[pcr.Digest]pcr.Digest) error {
	s, unlock, err := k.begin()
	if err != nil {
		return err
	}
	defer unlock()
	more, err := k.changed(s, firmwareChange{variables, now, next})
	if err != nil {
		return err
	}
	_, err = k.reseal(s, more)
	return err
}

// reseal seals for the present and for what comes.
func (k *Keeper) reseal(s *situation, more []SealState) (SyncReport, error) {
	wanted, err := k.present(s)
	if err != nil {
		return SyncReport{}, err
	}
	if len(more) > 0 {
		s.notes.PendingSince = k.Now().UTC()
	}
	wanted = append(append(wanted, more...), k.suspendedState(s)...)
	return k.syncAndRaise(s, wanted, k.keeps(s, wanted))
}

// changed are the states after the firmware's variables have changed; none when that
// makes no difference.
func (k *Keeper) changed(s *situation, c firmwareChange) ([]SealState, error) {
	p, err := k.predict(s, c, nil)
	if err != nil {
		return nil, err
	}
	same, err := k.predict(s, firmwareChange{}, nil)
	if err != nil || samePolicy(same, p) {
		return nil, err
	}
	return append([]SealState{{For: k.own() + pendingMark, Policy: p}}, k.others(s, c, pendingMark)...), nil
}

func samePolicy(a, b seal.Policy) bool {
	x, err1 := a.Digest()
	y, err2 := b.Digest()
	return err1 == nil && err2 == nil && x == y
}

// withDBX is the variables after an update of dbx: an authenticated one, as vendors
// give out, or the bare lists.
func withDBX(variables map[string][]byte, update []byte) (map[string][]byte, error) {
	after, err := pcr.VariableAfter(variables["dbx"], update, true)
	if err != nil {
		bare, err2 := pcr.AppendSignatures(variables["dbx"], update)
		if err2 != nil {
			return nil, fmt.Errorf("the update of dbx is neither an authenticated one (%w) nor signature lists (%w)", err, err2)
		}
		after = bare
	}
	variables = maps.Clone(variables)
	variables["dbx"] = after
	return variables, nil
}

// NextBoot says, in sentences, why the next boot of this release would not open the data
// volumes by the TPM (F1): somebody has changed the firmware's variables since this boot
// measured them.
func (k *Keeper) NextBoot() ([]string, error) {
	bound, err := seal.Literal(k.Policy.Policy, k.SecureBoot)
	if err != nil || !slices.Contains(bound, 7) {
		return nil, err
	}
	variables, err := k.Variables()
	if err != nil {
		return nil, err
	}
	s, err := k.look()
	if err == nil && s.policy.PIN && len(s.pin) == 0 {
		err = errNoPIN
	}
	if err != nil {
		return nil, err
	}
	if _, err := k.predict(s, firmwareChange{}, nil); err != nil {
		return nil, err // nothing can be said of this box
	}
	next, err := k.predict(s, firmwareChange{variables: variables}, nil)
	remedy := "if that was meant to be, run holdfast-agent reseal before the next start; if not, somebody tampers with the firmware's keys"
	switch suspended := relaxed(s.policy, s.bond); {
	case s.live(suspended) && s.notes.Suspended != nil:
		return nil, nil
	case err != nil:
		return []string{fmt.Sprintf("the firmware's Secure Boot variables were changed since this start, and what the next one measures cannot be told (%v): keep the recovery key at hand", err)}, nil
	case s.live(next):
		return nil, nil
	}
	return []string{"the firmware's Secure Boot variables were changed since this start, and the TPM would not open the data volumes at the next one: " + remedy}, nil
}
