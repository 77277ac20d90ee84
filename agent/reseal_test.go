package agent

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// sealer changes the states of a session's open volumes.
func (s *session) sealer() *Sealer {
	r := &Sealer{Log: s.m.Log, Volumes: s.parts(), Root: s.m.Root, OpenTPM: func() (seal.TPM, error) { return s.tpmLog, s.noTPM }}
	r.found(s.status.States)
	return r
}

// state is the policy standard with the value that PCR 7 has after another extend
// with what, or has now.
func (s *session) state(name, what string) SealState {
	s.t.Helper()
	now, err := seal.ReadPCRs(s.tpm, []int{7})
	if err != nil {
		s.t.Fatal(err)
	}
	if what != "" {
		now[7] = pcr.Extend(now[7], []byte(what))
	}
	return SealState{For: name, Policy: seal.Standard([]byte(s.description().Appliance.Seal.PolicyKeyPEM), now)}
}

func (s *session) mustSync(wanted []SealState, keep func(string, seal.Token) bool) SyncReport {
	s.t.Helper()
	r, err := s.sealer().Sync(wanted, keep, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// wantStates compares the names of the states on every volume, and wants for each
// volume nothing but those, the recovery key and the management key.
func (b *box) wantStates(want ...string) {
	b.t.Helper()
	slices.Sort(want)
	for _, p := range b.parts() {
		h, report, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil || !report.Sound() {
			b.t.Fatalf("%v, %+v", err, report)
		}
		var got []string
		for _, t := range tpmTokens(h) {
			got = append(got, t.For)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			b.t.Errorf("volume %s has the states %q, want %q", p.Name, got, want)
		}
		if n := len(h.Keyslots()); n != len(want)+2 {
			b.t.Errorf("volume %s has %d keyslots, want %d", p.Name, n, len(want)+2)
		}
	}
}

// bootIn boots after one more extend of PCR 7, as another firmware would.
func (b *box) bootIn(what, typed, method string) *session {
	b.t.Helper()
	b.powerOn()
	if what != "" {
		b.tpm.Extend(7, what)
	}
	return b.mustBoot(typed, method)
}

func TestSync(t *testing.T) {
	b := newBox(t, 2)
	first := b.mustBoot("", "provisioned")
	key := first.recoveryKey()
	s := b.bootIn("", "", "tpm")

	now, next := s.state("now", ""), s.state("next", "dbx")
	if r := s.mustSync([]SealState{now, next}, nil); fmt.Sprint(r) != "{[next] [now] []}" {
		t.Errorf("first sync: %+v", r)
	}
	b.wantStates("now", "next")
	unseals := s.tpmLog.sent[commandUnseal]
	before := b.disk.(*partition.Memory).Clone()
	if r := s.mustSync([]SealState{next, now}, nil); r.Changed() {
		t.Errorf("the same again: %+v", r)
	}
	wantSame(t, before, b.disk)
	if s.tpmLog.sent[commandUnseal] != unseals {
		t.Error("a sync was authorised by the TPM")
	}
	b.bootIn("", "", "tpm")
	s = b.bootIn("dbx", "", "tpm")
	if got := s.tpmLog.sent[commandUnseal]; got != 1 {
		t.Errorf("%d unseals", got)
	}
	if r := s.mustSync([]SealState{s.state("now", "")}, nil); fmt.Sprint(r) != "{[] [now] [now]}" {
		t.Errorf("drop: %+v", r)
	}
	b.wantStates("now")
	b.bootIn("dbx", "", "tpm")
	b.bootIn("", key+"\n", "recovery")
	if left := b.tpm.Handles(); left != 0 {
		t.Errorf("%d handles left in the TPM", left)
	}
}

// TestSyncNames: states of one policy share a sealed key, and each name is kept as
// long as somebody wants it.
func TestSyncNames(t *testing.T) {
	b := newBox(t, 2)
	b.mustBoot("", "provisioned")
	s := b.bootIn("", "", "tpm")
	keep := func(names ...string) func(string, seal.Token) bool {
		return func(n string, _ seal.Token) bool { return slices.Contains(names, n) }
	}
	s.mustSync([]SealState{s.state("slot a 1", ""), s.state("slot b 2", "")}, nil)
	b.wantStates("slot a 1; slot b 2")
	s.mustSync([]SealState{s.state("slot b 2", "other keys")}, keep("slot a 1"))
	b.wantStates("slot a 1", "slot b 2")
	if r := s.mustSync([]SealState{s.state("slot b 2", "other keys")}, keep("slot a 1")); r.Changed() {
		t.Errorf("the same again: %+v", r)
	}
	s.mustSync([]SealState{s.state("slot b 2", "other keys")}, keep("slot a 3"))
	b.wantStates("slot b 2")
	b.bootIn("other keys", "", "tpm")
}

// TestSyncRefuses are Syncs that write nothing.
func TestSyncRefuses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(s *session, y *Sealer)
		want  string
	}{
		{"nothing wanted", nil, "no state would be left"},
		{"no TPM", func(s *session, y *Sealer) { s.noTPM = seal.ErrNoTPM }, seal.ErrNoTPM.Error()},
		{"no management key", func(s *session, y *Sealer) {
			os.Remove(filepath.Join(s.m.Root, "media", stateFolder, managementKeyFile))
		}, "data volume media"},
		{"wrong management key", func(s *session, y *Sealer) {
			putFile(s.t.(*testing.T), filepath.Join(s.m.Root, "data", stateFolder, managementKeyFile), []byte("guess"))
		}, luks2.ErrPassphrase.Error()},
		{"header gone", func(s *session, y *Sealer) { put(s.t.(*testing.T), s.disk, make([]byte, 64<<10), volumeBytes) }, "data volume media"},
		{"another at work", func(s *session, y *Sealer) {
			unlock, err := s.sealer().lock()
			if err != nil {
				s.t.Fatal(err)
			}
			s.t.Cleanup(unlock)
		}, ErrSyncing.Error()},
		{"a PIN that nobody knows", func(s *session, y *Sealer) {}, "a PIN is wanted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBox(t, 2)
			b.mustBoot("", "provisioned")
			s := b.bootIn("", "", "tpm")
			y := s.sealer()
			var wanted []SealState
			if tt.spoil != nil {
				tt.spoil(s, y)
				wanted = []SealState{s.state("now", ""), s.state("next", "dbx")}
				wanted[1].Policy.PIN = strings.HasPrefix(tt.name, "a PIN")
			}
			before := b.disk.(*partition.Memory).Clone()
			if _, err := y.Sync(wanted, nil, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			wantSame(t, before, b.disk)
		})
	}
}

// TestSyncFull fills a header with states, then wants all of them replaced.
func TestSyncFull(t *testing.T) {
	b := newBox(t, 2)
	b.mustBoot("", "provisioned")
	s := b.bootIn("", "", "tpm")
	states := []SealState{s.state("now", "")}
	var err error
	for err == nil && len(states) < 40 {
		states = append(states, s.state(fmt.Sprint("state ", len(states)), fmt.Sprint(len(states))))
		before := b.disk.(*partition.Memory).Clone()
		if _, err = s.sealer().Sync(states, nil, nil); err != nil {
			wantSame(t, before, b.disk)
		}
	}
	if err == nil || !strings.Contains(err.Error(), "no room for another TPM state") || len(states) < 5 {
		t.Fatalf("with %d states: %v", len(states), err)
	}
	t.Logf("%d states fit in; then: %v", len(states)-1, err)
	// All but the first anew.
	fresh := []SealState{states[0]}
	for i := range len(states) - 2 {
		fresh = append(fresh, s.state(fmt.Sprint("new ", i), fmt.Sprint("new ", i)))
	}
	if r := s.mustSync(fresh, nil); len(r.Added) != len(fresh)-1 || len(r.Kept) != 1 {
		t.Errorf("replaced: %+v", r)
	}
	b.bootIn("", "", "tpm")
	s = b.bootIn("new 1", "", "tpm")
	// And with nothing that stays: one old one does until the new are down.
	only := []SealState{s.state("present", ""), s.state("b", "b"), s.state("c", "c")}
	for _, w := range only {
		w.Policy.Name = "another"
	}
	s.mustSync(only[1:], nil)
	b.wantStates("b", "c")
}

// TestSyncAnotherTPM: the registers are the same and the storage key is not (F37).
func TestSyncAnotherTPM(t *testing.T) {
	b := newBox(t, 2)
	key := b.mustBoot("", "provisioned").recoveryKey()
	b.tpm.Swap()
	b.powerOn()
	s := b.mustBoot(key+"\n", "recovery")
	if r := s.mustSync([]SealState{s.state("now", "")}, func(string, seal.Token) bool { return true }); len(r.Added) != 1 || len(r.Dropped) != 1 {
		t.Errorf("%+v", r)
	}
	b.wantStates("now")
	b.bootIn("", "", "tpm")
}

// TestSyncLeftovers: keyslots of ours that no token names go, those of a person stay.
func TestSyncLeftovers(t *testing.T) {
	b := newBox(t, 2)
	b.mustBoot("", "provisioned")
	s := b.bootIn("", "", "tpm")
	p := b.parts()[1]
	h, _, err := luks2.Read(p.Device, p.Device.Size())
	if err != nil {
		t.Fatal(err)
	}
	volumeKey := []byte(keyOf(s, "media"))
	kept, err := h.AddKeyslot(volumeKey, []byte("a person's"), luks2.KDF{Type: luks2.Argon2id, Time: 1, MemoryKiB: 1024, Parallel: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	left, err := h.AddKeyslot(volumeKey, []byte("left over"), luks2.HighEntropyKDF(), nil)
	if err == nil {
		err = h.Write(p.Device)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.mustSync([]SealState{s.state("now", "")}, nil)
	h, _, err = luks2.Read(p.Device, p.Device.Size())
	if err != nil {
		t.Fatal(err)
	}
	has := map[int]bool{}
	for _, k := range h.Keyslots() {
		has[k.ID] = true
	}
	if !has[kept] || has[left] {
		t.Errorf("keyslots %v; %d is to stay and %d to go", slices.Sorted(maps.Keys(has)), kept, left)
	}
	b.bootIn("", "", "tpm")
}

// TestPowerCutsOverSync cuts a Sync that replaces states at every write. The box
// opens by its TPM in the old state until the last write, or in the new one from some
// write on, and at each moment in one of them; the next Sync completes.
func TestPowerCutsOverSync(t *testing.T) {
	for _, full := range []bool{false, true} {
		t.Run(fmt.Sprintf("full header %v", full), func(t *testing.T) {
			b := newBox(t, 2)
			b.mustBoot("", "provisioned")
			s := b.bootIn("", "", "tpm")
			old := []SealState{s.state("old", "")}
			if full {
				for i := range 20 {
					more := append(slices.Clone(old), s.state(fmt.Sprint("other ", i), fmt.Sprint("other ", i)))
					if _, err := s.sealer().Sync(more, nil, nil); err != nil {
						break
					}
					old = more
				}
			} else {
				s.mustSync(old, nil)
			}
			next := []SealState{s.state("new", "dbx"), s.state("new b", "dbx b")}
			b.cutSync(t, s, next)
		})
	}
}

func (b *box) cutSync(t *testing.T, s *session, next []SealState) {
	dev := powercut.New(b.disk.(*partition.Memory))
	b.disk = dev
	s.mustSync(next, nil)
	b.wantStates("new", "new b")
	if dev.Writes() == 0 || dev.Unsynced() {
		t.Fatalf("%d writes, unsynced %v", dev.Writes(), dev.Unsynced())
	}
	random := 1
	if campaign() {
		random = 60
	}
	seen, k := map[string]int{}, 0
	for name, disk := range dev.States(7, random) {
		b.disk = disk
		k++
		opens := ""
		for what, state := range map[string]string{"": "old", "dbx": "new"} {
			b.powerOn()
			if what != "" {
				b.tpm.Extend(7, what)
			}
			// A boot with nobody at the console.
			boot, err := b.boot("")
			if err == nil && boot.status.Volumes[0].Method == "tpm" && boot.status.Volumes[1].Method == "tpm" {
				opens += state
				if k%3 == 0 || campaign() {
					again := boot.mustSync(next, nil)
					if len(again.Added)+len(again.Kept) != 2 {
						t.Errorf("the next sync: %+v", again)
					}
					b.wantStates("new", "new b")
					b.bootIn("dbx", "", "tpm")
				}
			}
		}
		seen[opens]++
		if opens == "" {
			t.Errorf("state %d opens in neither: %s", k, name)
		}
		if t.Failed() {
			t.Fatalf("state %d: %s", k, name)
		}
	}
	t.Logf("%d writes, %d syncs, %d states; opened in %v", dev.Writes(), dev.Syncs(), k, seen)
	if seen["old"] == 0 || seen["oldnew"]+seen["newold"] == 0 || seen["new"] == 0 {
		t.Errorf("opened in %v", seen)
	}
}

// refuseWrites makes each write to the disk fail.
type refuseWrites struct{ partition.Device }

func (refuseWrites) WriteAt([]byte, int64) (int, error) { return 0, errors.New("I/O error") }

// TestSyncDiskFails: an error is one, and the box opens as before.
func TestSyncDiskFails(t *testing.T) {
	b := newBox(t, 2)
	b.mustBoot("", "provisioned")
	s := b.bootIn("", "", "tpm")
	disk := b.disk
	b.disk = refuseWrites{disk}
	if _, err := s.sealer().Sync([]SealState{s.state("next", "dbx")}, nil, nil); err == nil || !strings.Contains(err.Error(), "I/O error") {
		t.Errorf("error %v", err)
	}
	b.disk = disk
	b.bootIn("", "", "tpm")
}

// tokenOf is the first sealed key of a header.
func tokenOf(h *luks2.Header) (seal.Token, error) {
	list := tpmTokens(h)
	if len(list) == 0 {
		return seal.Token{}, errors.New("no TPM keyslot")
	}
	return list[0].Token, nil
}

// TestSealLockAndChildren: a child that is started meanwhile has the file open for a
// moment, and does not keep the lock.
func TestSealLockAndChildren(t *testing.T) {
	b := newBox(t, 1)
	s := b.mustBoot("", "provisioned").sealer()
	stop, done := make(chan struct{}), make(chan struct{})
	for range 2 {
		go func() {
			defer func() { done <- struct{}{} }()
			for {
				select {
				case <-stop:
					return
				default:
					_ = exec.Command("true").Run()
				}
			}
		}()
	}
	for range 3000 {
		unlock, err := s.lock()
		if err != nil {
			t.Error(err)
			break
		}
		unlock()
	}
	close(stop)
	<-done
	<-done
}
