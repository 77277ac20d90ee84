package agent

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// SealState is a state of the box in which the TPM shall open the data volumes.
type SealState struct {
	// For says which, for people and for keeping the state of a slot as long as that
	// slot may boot: "slot a 1.0.0", "slot b 1.1.0, dbx pending", "suspended".
	For    string
	Policy seal.Policy
}

// Sealer changes the states in which the TPM opens the data volumes, while they are
// open. What authorises it is the management key that lies on them, never the TPM:
// the old states may be gone for good when new ones are needed (F48).
type Sealer struct {
	Log *slog.Logger
	// Volumes are all that share the TPM's secrets. The first one's tokens decide at boot.
	Volumes []Partition
	// Root is where the volumes are mounted below.
	Root string
	// OpenTPM opens the TPM for one Sync; what can be closed is.
	OpenTPM func() (seal.TPM, error)
	// Opened is the policy hash of the state that opened this boot, if any: it is the
	// last one to go where there is little room.
	Opened pcr.Digest
	// Damaged is the state whose secret the TPM gave in this boot and whose keyslot did
	// not open with it, by [StateStatus.Sealed]; it is made anew.
	Damaged string
	// PIN is what the person types at boot; nil in policies without one. renew says that
	// what is there was sealed with another one.
	PIN   []byte
	renew bool
	// Signatures are those of the release that runs: verified now, they need not be at
	// its later boots ([seal.AddTickets]).
	Signatures seal.Signatures
	// Rand defaults to crypto/rand.
	Rand io.Reader
	// Patience is how long to wait for another process that is at it.
	Patience time.Duration
}

// SyncReport is what [Sealer.Sync] did, by the names of states.
type SyncReport struct {
	Added   []string `json:"added,omitempty"`
	Kept    []string `json:"kept,omitempty"`
	Dropped []string `json:"dropped,omitempty"`
}

// Changed says whether anything was written.
func (r SyncReport) Changed() bool { return len(r.Added)+len(r.Dropped) > 0 }

// ErrSyncing says that another process is changing the states.
var ErrSyncing = errors.New("the TPM states of the data volumes are being changed by another process")

// sealLock is a file in stateFolder; who changes headers holds it.
const sealLock = "seal.lock"

// Sync makes the wanted states, and those existing ones for which keep is true of
// some of their names (it is "" for a state of a release that named none), the only
// ones in which the TPM opens the volumes. keep may be nil. What is there already, under this TPM's storage key (F37), stays as it is.
//
// Everything that can fail for want of room does before the first write. Then, with
// syncs between: the other volumes get what is new, the first volume gets it, loses
// what is not wanted, and the others lose that. The first one's tokens decide at
// boot, so whatever it names the others have at every moment. The keyslots of the
// recovery key and of the management key are not touched. A Sync that was cut off is
// completed by the next.
func (s *Sealer) Sync(wanted []SealState, keep func(name string, t seal.Token) bool, record *seal.Record) (report SyncReport, err error) {
	unlock, err := s.lock()
	if err != nil {
		return report, err
	}
	defer unlock()
	return s.locked(wanted, keep, record)
}

// locked is Sync for who holds the lock.
func (s *Sealer) locked(wanted []SealState, keep func(string, seal.Token) bool, record *seal.Record) (report SyncReport, err error) {
	tpm, err := s.OpenTPM()
	if err != nil {
		return report, fmt.Errorf("change the TPM states of the data volumes: %w", err)
	}
	if c, ok := tpm.(io.Closer); ok {
		defer c.Close()
	}
	srk, err := seal.EnsureSRK(tpm)
	if err != nil {
		return report, fmt.Errorf("change the TPM states of the data volumes: %w", err)
	}
	defer srk.Close(tpm)
	y := &syncing{Sealer: s, tpm: tpm, srk: srk, record: record}
	defer y.wipe()
	if err := y.open(); err != nil {
		return report, err
	}
	if err := y.compare(wanted, keep); err != nil {
		return report, err
	}
	if err := y.seal(); err != nil {
		return report, err
	}
	err = y.write()
	return y.report(), err
}

// found takes over what the initrd found of the states.
func (s *Sealer) found(states []StateStatus) {
	for _, t := range states {
		if d, err := parseDigest(t.PolicyHash); err == nil && t.Opened {
			s.Opened = d
		}
		if t.Damaged {
			s.Damaged = t.Sealed
		}
	}
}

// lock keeps other processes, and other calls, out.
func (s *Sealer) lock() (unlock func(), err error) {
	if len(s.Volumes) == 0 {
		return nil, errors.New("there is no data volume, so there is nothing to seal")
	}
	path := filepath.Join(s.Root, s.Volumes[0].Volume.Mount, stateFolder, sealLock)
	for deadline := time.Now().Add(s.Patience); ; time.Sleep(20 * time.Millisecond) {
		f, err := lockFile(path, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { f.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, err
		case !time.Now().Before(deadline):
			return nil, ErrSyncing
		}
	}
}

// syncing is one Sync.
type syncing struct {
	*Sealer
	tpm    seal.TPM
	srk    seal.SRK
	record *seal.Record
	vols   []*sealedVolume // as in Sealer
	states []*sealedState  // those on the first volume
	fresh  []*freshState
	spare  *sealedState // stays although it is not wanted
}

// sealedVolume is an open volume with its header.
type sealedVolume struct {
	Partition
	header     *luks2.Header
	key        []byte
	management int // keyslot
	edited     bool
}

// sealedState is one that the volumes have.
type sealedState struct {
	token seal.Token
	names []string // of states, as stored
	keep  []string // those that are still wanted; none is: drop
	// wanted: its policy is one of those that were asked for.
	wanted bool
}

// freshState is one that they are to get.
type freshState struct {
	names  []string
	policy seal.Policy
	secret []byte
	token  seal.Token
}

func (y *syncing) wipe() {
	for _, v := range y.vols {
		luks2.Wipe(v.key)
	}
	for _, f := range y.fresh {
		luks2.Wipe(f.secret)
	}
}

// open reads every header anew, whitelisted (F81), and opens it by the management key.
func (y *syncing) open() error {
	for _, p := range y.Volumes {
		h, report, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			return fmt.Errorf("data volume %s: %w", p.Name, err)
		}
		if !report.Sound() {
			y.Log.Warn("mending a copy of the LUKS header", "volume", p.Name)
			if err := h.Repair(p.Device); err != nil {
				return fmt.Errorf("data volume %s: %w", p.Name, err)
			}
		}
		v := &sealedVolume{Partition: p, header: h}
		y.vols = append(y.vols, v)
		path := filepath.Join(y.Root, p.Volume.Mount, stateFolder, managementKeyFile)
		passphrase, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("data volume %s: the key that may change its states: %w", p.Name, err)
		}
		v.key, v.management, err = h.Unlock(p.Device, passphrase)
		luks2.Wipe(passphrase)
		if err != nil {
			return fmt.Errorf("data volume %s: by its management key: %w", p.Name, err)
		}
	}
	return nil
}

// compare settles which states stay, which go and which have to be made.
func (y *syncing) compare(wanted []SealState, keep func(string, seal.Token) bool) error {
	names := map[pcr.Digest][]string{}
	var order []SealState
	for _, w := range wanted {
		digest, err := w.Policy.Digest()
		if err != nil {
			return fmt.Errorf("state %q: %w", w.For, err)
		}
		if names[digest] == nil {
			order = append(order, w)
		}
		names[digest] = merge(names[digest], splitNames(w.For))
	}
	have := map[pcr.Digest]bool{}
	for _, token := range tpmTokens(y.vols[0].header) {
		s := &sealedState{token: token.Token, names: splitNames(token.For), wanted: names[token.PolicyHash] != nil}
		y.states = append(y.states, s)
		if !y.whole(token.Token) || have[token.PolicyHash] {
			continue
		}
		for _, n := range s.names {
			if keep != nil && keep(n, token.Token) && !(n == "" && s.wanted) {
				s.keep = append(s.keep, n)
			}
		}
		s.keep = merge(s.keep, names[token.PolicyHash])
		have[token.PolicyHash] = len(s.keep) > 0
	}
	for _, w := range order {
		digest, _ := w.Policy.Digest()
		if !have[digest] {
			y.fresh = append(y.fresh, &freshState{names: names[digest], policy: w.Policy})
		}
	}
	if len(y.fresh) == 0 && !slices.ContainsFunc(y.states, func(s *sealedState) bool { return len(s.keep) > 0 }) {
		return errors.New("no state would be left in which the TPM opens the data volumes")
	}
	return nil
}

// whole says whether a state of the first volume can open: it hangs from this TPM's
// storage key, with the present PIN, its keyslots are not known to be damaged, and the other
// volumes have it too.
func (y *syncing) whole(t seal.Token) bool {
	if y.renew || t.SRK == nil || !bytes.Equal(t.SRK.Name, y.srk.Name) || sealedID(t) == y.Damaged {
		return false
	}
	for _, v := range y.vols[1:] {
		if !slices.ContainsFunc(tpmTokens(v.header), func(o tpmToken) bool { return sameBlob(o.Token, t) }) {
			return false
		}
	}
	return true
}

// seal makes the new states' secrets and has the TPM seal them.
func (y *syncing) seal() error {
	random := y.Rand
	if random == nil {
		random = rand.Reader
	}
	for _, f := range y.fresh {
		f.secret = make([]byte, secretBytes)
		if _, err := io.ReadFull(random, f.secret); err != nil {
			return fmt.Errorf("read randomness: %w", err)
		}
		var pin []byte
		if f.policy.PIN {
			pin = y.PIN
		}
		var err error
		if f.token, err = seal.Seal(y.tpm, y.srk, f.secret, f.policy, pin); err != nil {
			return fmt.Errorf("state %q: %w", joinNames(f.names), err)
		}
		f.token.For = joinNames(f.names)
		if err := y.addTickets(&f.token); err != nil {
			return fmt.Errorf("state %q: %w", f.token.For, err)
		}
	}
	for _, s := range y.states {
		if len(s.keep) == 0 {
			continue
		}
		if err := y.addTickets(&s.token); err != nil {
			return fmt.Errorf("state %q: %w", s.token.For, err)
		}
	}
	return nil
}

// maxKeptTickets are for the releases in both slots, and one more: a header's room is
// short.
const maxKeptTickets = 3

// addTickets has the TPM verify what it has not yet, and keeps the newest tickets.
func (y *syncing) addTickets(t *seal.Token) error {
	lacks := func(s seal.Signature) bool {
		return s.Ref == t.Ref && slices.Equal(s.PCRs, t.SignedPCRs) &&
			!slices.ContainsFunc(t.Tickets, func(k seal.Ticket) bool { return k.Policy == s.Policy })
	}
	if len(t.SignedPCRs) == 0 || !slices.ContainsFunc(y.Signatures, lacks) {
		return nil
	}
	fresh := *t
	if err := seal.AddTickets(y.tpm, &fresh, slices.DeleteFunc(slices.Clone(y.Signatures), func(s seal.Signature) bool { return !lacks(s) })); err != nil {
		return err
	}
	fresh.Tickets = append(fresh.Tickets, t.Tickets...)
	t.Tickets = fresh.Tickets[:min(len(fresh.Tickets), maxKeptTickets)]
	return nil
}

// write brings the headers to the new states. Where old and new ones together do not
// fit in, old ones go first, all but one of those that may open this boot.
func (y *syncing) write() error {
	err := y.eachVolume(y.vols, y.add)
	if err == nil {
		if err := y.commit(append(slices.Clone(y.vols[1:]), y.vols[0])); err != nil {
			return err
		}
		return y.drop()
	}
	if len(y.states) > 0 {
		y.spare = y.spared()
	}
	noRoom := func(err error) error { return fmt.Errorf("no room for another TPM state: %w", err) }
	if err2 := y.reread(); err2 != nil {
		return err2
	}
	if before := y.dropped(); before == 0 {
		return noRoom(err)
	}
	if err := errors.Join(y.eachVolume(y.vols, y.remove), y.eachVolume(y.vols, y.add)); err != nil {
		return noRoom(err) // nothing was written
	}
	if err := errors.Join(y.reread(), y.drop()); err != nil {
		return err
	}
	y.spare = nil
	return y.write()
}

// spared is the old state that stays until the new ones are down, if it is not one of
// those that stay anyway: the one that opened this boot.
func (y *syncing) spared() *sealedState {
	stays := false
	for _, s := range y.states {
		if s.token.PolicyHash == y.Opened && len(s.keep) == 0 {
			return s
		}
		stays = stays || s.wanted || s.token.PolicyHash == y.Opened
	}
	if stays {
		return nil
	}
	return y.states[len(y.states)-1]
}

// dropped counts what would be removed.
func (y *syncing) dropped() (n int) {
	for _, v := range y.vols {
		n += len(y.unwanted(v))
	}
	return n
}

func (y *syncing) eachVolume(vols []*sealedVolume, do func(*sealedVolume) error) error {
	for _, v := range vols {
		if err := do(v); err != nil {
			return fmt.Errorf("data volume %s: %w", v.Name, err)
		}
	}
	return nil
}

// reread forgets the edits in memory.
func (y *syncing) reread() error {
	return y.eachVolume(y.vols, func(v *sealedVolume) (err error) {
		v.header, _, err = luks2.Read(v.Device, v.Device.Size())
		v.edited = false
		return err
	})
}

// add edits one header in memory: new states, and new names of those that stay.
func (y *syncing) add(v *sealedVolume) error {
	for _, t := range tpmTokens(v.header) {
		i := slices.IndexFunc(y.states, func(s *sealedState) bool { return sameBlob(s.token, t.Token) })
		if i < 0 || len(y.states[i].keep) == 0 {
			continue
		}
		names, tickets := joinNames(y.states[i].keep), y.states[i].token.Tickets
		if t.For == names && len(t.Tickets) == len(tickets) {
			continue
		}
		t.For, t.Tickets = names, tickets
		raw, err := t.Marshal()
		if err != nil {
			return err
		}
		v.edited = true
		if _, err := v.header.SetToken(t.id, raw); err != nil {
			return err
		}
	}
	for _, f := range y.fresh {
		v.edited = true
		passphrase := seal.Passphrase(f.secret)
		slot, err := v.header.AddKeyslot(v.key, passphrase, luks2.HighEntropyKDF(), y.Rand)
		luks2.Wipe(passphrase)
		if err != nil {
			return err
		}
		t := f.token
		t.Keyslots, t.VolumeMAC = []string{strconv.Itoa(slot)}, volumeMAC(f.secret, v.key)
		raw, err := t.Marshal()
		if err != nil {
			return err
		}
		if _, err := v.header.SetToken(luks2.NextToken, raw); err != nil {
			return err
		}
	}
	return y.setRecord(v)
}

// setRecord replaces what explains a refusal, when the states change.
func (y *syncing) setRecord(v *sealedVolume) error {
	if y.record == nil || len(y.fresh) == 0 {
		return nil
	}
	record := *y.record
	record.SRKName = y.srk.Name
	raw, err := record.Marshal()
	if err != nil {
		return err
	}
	id := luks2.NextToken
	for i, t := range v.header.Tokens() {
		if tokenType(t) == recordType {
			id = i
		}
	}
	_, err = v.header.SetToken(id, raw)
	return err
}

// commit writes the headers that were edited, in this order.
func (y *syncing) commit(order []*sealedVolume) error {
	return y.eachVolume(order, func(v *sealedVolume) error {
		if !v.edited {
			return nil
		}
		if err := y.guard(v); err != nil {
			return fmt.Errorf("its header is not changed: %w", err)
		}
		v.edited = false
		return v.header.Write(v.Device)
	})
}

// drop takes what is not wanted off the headers, the first one first.
func (y *syncing) drop() error {
	if err := y.eachVolume(y.vols, y.remove); err != nil {
		return err
	}
	return y.commit(y.vols)
}

// remove edits one header in memory.
func (y *syncing) remove(v *sealedVolume) error {
	for _, slot := range y.unwanted(v) {
		v.edited = true
		if err := v.header.RemoveKeyslot(slot); err != nil {
			return err
		}
	}
	return nil
}

// unwanted lists the keyslots of states that are not wanted, those whose token cannot
// be read, and leftovers: cheap keyslots that no token names and that are not the
// management key's. What a person added has a costly derivation and stays.
func (y *syncing) unwanted(v *sealedVolume) (slots []int) {
	named := map[int]bool{v.management: true}
	for _, raw := range v.header.Tokens() {
		for _, slot := range tokenSlots(raw) {
			named[slot] = true
			if seal.IsTokenType(tokenType(raw)) && !y.wants(raw) && slot != v.management {
				slots = append(slots, slot)
			}
		}
	}
	for _, k := range v.header.Keyslots() {
		if !named[k.ID] && k.KDF == luks2.HighEntropyKDF() {
			slots = append(slots, k.ID)
		}
	}
	slices.Sort(slots)
	return slices.Compact(slots)
}

// wants says whether a TPM token is of a state that stays or was just made.
func (y *syncing) wants(raw json.RawMessage) bool {
	t, err := seal.ParseToken(raw)
	if err != nil {
		return false
	}
	stays := func(s *sealedState) bool { return (len(s.keep) > 0 || s == y.spare) && sameBlob(s.token, t) }
	return slices.ContainsFunc(y.states, stays) ||
		slices.ContainsFunc(y.fresh, func(f *freshState) bool { return sameBlob(f.token, t) })
}

// guard is the last look before a write: the management key's slot, every recovery
// slot and a TPM state are in the header.
func (y *syncing) guard(v *sealedVolume) error {
	now, _, err := luks2.Read(v.Device, v.Device.Size())
	if err != nil {
		return err
	}
	slots := map[int]bool{}
	for _, k := range v.header.Keyslots() {
		slots[k.ID] = true
	}
	for _, raw := range now.Tokens() {
		for _, slot := range tokenSlots(raw) {
			if tokenType(raw) == recoveryTokenType && !slots[slot] {
				return fmt.Errorf("keyslot %d of the recovery key would be lost", slot)
			}
		}
	}
	switch {
	case !slots[v.management]:
		return fmt.Errorf("keyslot %d of the management key would be lost", v.management)
	case len(tpmTokens(v.header)) == 0:
		return errors.New("no TPM state would be left")
	}
	return nil
}

func (y *syncing) report() (r SyncReport) {
	for _, f := range y.fresh {
		r.Added = append(r.Added, joinNames(f.names))
	}
	for _, s := range y.states {
		if len(s.keep) > 0 {
			r.Kept = append(r.Kept, joinNames(s.keep))
		} else {
			r.Dropped = append(r.Dropped, joinNames(s.names))
		}
	}
	return r
}

// tpmToken is a sealed key in a header.
type tpmToken struct {
	seal.Token
	id int
}

// tpmTokens lists the sealed keys of a header that can be read, in the order of their ids.
func tpmTokens(h *luks2.Header) (list []tpmToken) {
	tokens := h.Tokens()
	for _, id := range slices.Sorted(maps.Keys(tokens)) {
		if !seal.IsTokenType(tokenType(tokens[id])) {
			continue
		}
		if t, err := seal.ParseToken(tokens[id]); err == nil {
			list = append(list, tpmToken{t, id})
		}
	}
	return list
}

// recoveryTokenType is systemd's, of [luks2.RecoveryToken].
const recoveryTokenType = "systemd-recovery"

// tokenSlots are the keyslots of a token.
func tokenSlots(raw json.RawMessage) (slots []int) {
	var t struct{ Keyslots []string }
	if json.Unmarshal(raw, &t) != nil {
		return nil
	}
	for _, text := range t.Keyslots {
		if n, err := strconv.Atoi(text); err == nil {
			slots = append(slots, n)
		}
	}
	return slots
}

// sameBlob says whether two tokens hold the same sealed object.
func sameBlob(a, b seal.Token) bool {
	return bytes.Equal(a.Private, b.Private) && bytes.Equal(a.Public, b.Public)
}

// nameSeparator stands between the names of states that one sealed key is for.
const nameSeparator = "; "

// maxNamesBytes is what a token holds.
const maxNamesBytes = 200

// joinNames leaves names out that do not fit.
func joinNames(names []string) string {
	all := ""
	for _, n := range names {
		if next := all + nameSeparator + n; all != "" && len(next) <= maxNamesBytes {
			all = next
		} else if all == "" && len(n) <= maxNamesBytes {
			all = n
		}
	}
	return all
}

func splitNames(names string) []string {
	return strings.Split(names, nameSeparator)
}

// merge appends what is not there yet.
func merge[T comparable](list, more []T) []T {
	for _, m := range more {
		if !slices.Contains(list, m) {
			list = append(list, m)
		}
	}
	return list
}
