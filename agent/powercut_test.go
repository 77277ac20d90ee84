package agent

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// campaign is the long form of the power-cut tests, of some minutes: more random
// states, and more of them gone through to their end.
func campaign() bool { return os.Getenv("HOLDFAST_CAMPAIGN") == "1" }

// scratchEvery is how many unprovisioned states there are to one that is
// provisioned again. What a boot does there is much the same for all, and each
// costs an argon2id for each volume.
func scratchEvery() int {
	if campaign() {
		return 2
	}
	return 6
}

// firstRun is a first boot on a recorded disk, with what it promised and when.
type firstRun struct {
	*session
	dev *powercut.Device
	key string // the recovery key that was shown
	// provisionedAt is the number of Syncs that had returned when "provisioned" was
	// logged, writtenAt when the customer's data was synced.
	provisionedAt, writtenAt int
	ids                      []string // of the file systems
}

func recordFirstBoot(t *testing.T, b *box) *firstRun {
	t.Helper()
	b.powerOn()
	r := &firstRun{dev: powercut.New(b.disk.(*partition.Memory))}
	b.disk = r.dev
	r.session = b.session("")
	r.console.saw = func(text string) {
		if !recoveryKeyPattern.MatchString(text) {
			return
		}
		for i := range b.volumes {
			if !b.fresh(i) || r.dev.Unsynced() {
				t.Error("a volume was published before its key was shown, or the key was shown before the volumes were whole")
			}
		}
	}
	r.log.saw = func(message string) {
		if message == "provisioned" {
			r.provisionedAt = r.dev.Syncs()
			if r.dev.Unsynced() {
				t.Error("success was logged before the last write was synced")
			}
		}
	}
	if err := errors.Join(r.m.EnterPhase(phaseEnterInitrd), r.open()); err != nil {
		t.Fatal(err)
	}
	r.wantOpen("provisioned")
	r.key = r.recoveryKey()
	r.ids = r.fileSystems()
	r.write("records")
	r.writtenAt = r.dev.Syncs()
	if r.provisionedAt == 0 || r.writtenAt <= r.provisionedAt {
		t.Fatalf("provisioned after sync %d, data after sync %d", r.provisionedAt, r.writtenAt)
	}
	return r
}

func (s *session) fileSystems() (ids []string) {
	s.t.Helper()
	for _, v := range s.status.Volumes {
		f, err := s.storage.mapped[v.Device].fileSystem()
		if err != nil {
			s.t.Fatal(err)
		}
		ids = append(ids, hex.EncodeToString(f.ID[:]))
	}
	return ids
}

// TestPowerCutWhileProvisioning visits the states in which a cut during the
// first boot can leave the disk. The next boot either provisions from scratch,
// and then nothing had been promised, or opens what the first run made with the first run's keys.
func TestPowerCutWhileProvisioning(t *testing.T) {
	for _, n := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d volumes", n), func(t *testing.T) {
			b := newBox(t, n)
			r := recordFirstBoot(t, b)
			seeds, random := uint64(1), 2
			if campaign() {
				seeds, random = 6, 20
			}
			var seen [4]int
			for seed := range seeds {
				k := 0
				for name, disk := range r.dev.States(seed, random) {
					b.disk = disk
					k++
					kind := r.checkState(t, name, k)
					seen[kind]++
					if t.Failed() {
						t.Fatalf("seed %d, state %d: %s", seed, k, name)
					}
				}
			}
			b.disk = r.dev.Now()
			seen[r.checkState(t, fmt.Sprintf("after sync %d, all", r.dev.Syncs()), 5)]++
			t.Logf("%d writes, %d syncs; states: %d unprovisioned, %d between the publishes, %d opened, of them %d with the customer's data",
				r.dev.Writes(), r.dev.Syncs(), seen[fromScratch], seen[halfPublished], seen[whole]+seen[withData], seen[withData])
			if seen[fromScratch] == 0 || seen[whole] == 0 || seen[withData] == 0 || (n == 2) != (seen[halfPublished] > 0) {
				t.Errorf("kinds of states seen: %v", seen)
			}
		})
	}
}

// The kinds of states.
const (
	fromScratch = iota
	halfPublished
	whole
	withData
)

// checkState boots the state and returns its kind. k is its number.
func (r *firstRun) checkState(t *testing.T, name string, k int) int {
	t.Helper()
	var synced int
	if _, err := fmt.Sscanf(name, "after sync %d", &synced); err != nil && name != "before the first write" {
		t.Fatal(err)
	}
	if r.fresh(0) {
		if synced >= r.provisionedAt {
			t.Error("the disk is unprovisioned after success was logged")
		}
		for i := range r.volumes {
			if !r.fresh(i) {
				t.Errorf("volume %d was published before the first", i)
			}
		}
		if k%scratchEvery() == 0 {
			r.bootFromScratch(t)
		}
		return fromScratch
	}
	kind := whole
	for i := range r.volumes {
		if r.fresh(i) {
			kind = halfPublished
		}
	}
	s := r.bootWhole(t, "", "tpm")
	if synced >= r.writtenAt {
		kind = withData
		s.wantData("records")
	}
	if k%5 == 0 || kind == halfPublished {
		// Once more, without a TPM, by what the person wrote down.
		r.noTPM = seal.ErrNoTPM
		r.bootWhole(t, r.key+"\n", "recovery")
		r.noTPM = nil
	}
	return kind
}

// bootFromScratch wants new volumes, a new key, and a second boot that opens them.
func (r *firstRun) bootFromScratch(t *testing.T) {
	t.Helper()
	s := r.box.session("")
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	s.wantOpen("provisioned")
	if s.recoveryKey() == r.key {
		t.Error("the same recovery key twice")
	}
	s.write("second life")
	again := r.box.session("")
	if err := again.open(); err != nil {
		t.Fatal(err)
	}
	again.wantOpen("tpm")
	again.wantData("second life")
}

// bootWhole wants the first run's volumes, opened by the method, with sound headers after it.
func (r *firstRun) bootWhole(t *testing.T, typed, method string) *session {
	t.Helper()
	s := r.box.session(typed)
	if err := s.open(); err != nil {
		t.Fatalf("%v; console: %s", err, s.console.out.String())
	}
	s.wantOpen(method)
	if method == "tpm" && (s.console.out.Len() != 0 || s.tpmLog.sent[commandUnseal] != 1) {
		t.Errorf("console %q, %d unseals", s.console.out.String(), s.tpmLog.sent[commandUnseal])
	}
	for i, id := range s.fileSystems() {
		if id != r.ids[i] {
			t.Errorf("volume %d is not the first run's", i)
		}
	}
	for i, p := range s.parts() {
		h, report, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil || !report.Sound() {
			t.Fatalf("volume %d: %v, %+v", i, err, report)
		}
		management, err := os.ReadFile(filepath.Join(s.m.Root, p.Mount, stateFolder, managementKeyFile))
		if err != nil {
			t.Fatal(err)
		}
		key, _, err := h.Unlock(p.Device, management)
		if err != nil || !bytes.Equal(key, s.storage.mapped["/dev/mapper/"+p.Name].volumeKey) {
			t.Errorf("volume %d: the management key: %v", i, err)
		}
	}
	return s
}

// TestPowerCutWhileFinishing cuts the boot that finishes an interrupted
// provisioning, and the one that mends a header.
func TestPowerCutWhileFinishing(t *testing.T) {
	b := newBox(t, 2)
	r := recordFirstBoot(t, b)
	zero := make([]byte, 4096)
	for name, prepare := range map[string]func(disk *partition.Memory){
		"second volume not published": func(disk *partition.Memory) {
			marker := append([]byte(partition.UnprovisionedMarker), zero[len(partition.UnprovisionedMarker):]...)
			put(t, disk, marker, volumeBytes)
		},
		"primary torn on the first": func(disk *partition.Memory) { put(t, disk, zero, 4096) },
		"secondary torn on both": func(disk *partition.Memory) {
			put(t, disk, zero, 20<<10)
			put(t, disk, zero, 20<<10+volumeBytes)
		},
	} {
		t.Run(name, func(t *testing.T) {
			disk := r.dev.Now()
			prepare(disk)
			dev := powercut.New(disk)
			b.disk = dev
			r.bootWhole(t, "", "tpm").wantData("records")
			if dev.Writes() == 0 || dev.Unsynced() {
				t.Fatalf("%d writes, unsynced %v", dev.Writes(), dev.Unsynced())
			}
			states, random := 0, 10
			if campaign() {
				random = 500
			}
			for state, disk := range dev.States(3, random) {
				b.disk = disk
				states++
				r.bootWhole(t, "", "tpm").wantData("records")
				if t.Failed() {
					t.Fatal(state)
				}
			}
			if states < 3 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

// TestInterruptedTwice: two first boots that were cut, and a third that is not.
// What the two left behind does no harm.
func TestInterruptedTwice(t *testing.T) {
	b := newBox(t, 2)
	r := recordFirstBoot(t, b)
	var states []*partition.Memory
	for name, disk := range r.dev.States(5, 1) {
		if fresh, err := partition.Unprovisioned(disk); err == nil && fresh && !strings.Contains(name, "random") {
			states = append(states, disk)
		}
	}
	b.disk = states[len(states)-1] // everything there but the publishing
	second := recordFirstBoot(t, b)
	k := 0
	for name, disk := range second.dev.States(6, 0) {
		b.disk = disk
		if k++; second.fresh(0) && k%scratchEvery() != 0 {
			continue
		}
		second.checkState(t, name, 6*k)
		if t.Failed() {
			t.Fatal(name)
		}
	}
	if k < 20 {
		t.Errorf("only %d states", k)
	}
}
