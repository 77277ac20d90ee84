package agent

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// opensAll says whether a recovery key opens every volume.
func (b *box) opensAll(key string) bool {
	b.t.Helper()
	for _, p := range b.parts() {
		h, _, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			b.t.Fatal(err)
		}
		opened := false
		for _, t := range keyTokens(h) {
			for _, slot := range t.slots {
				if volumeKey, err := h.UnlockSlot(p.Device, slot, []byte(key)); err == nil {
					luks2.Wipe(volumeKey)
					opened = true
				}
			}
		}
		if !opened {
			return false
		}
	}
	return true
}

// serials are the recovery keys that have a slot on every volume, and on any.
func (b *box) serials() (every, some []int) {
	b.t.Helper()
	seen := map[int]int{}
	for _, p := range b.parts() {
		h, _, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			b.t.Fatal(err)
		}
		for _, t := range keyTokens(h) {
			seen[t.serial]++
		}
	}
	some = slices.Sorted(maps.Keys(seen))
	for _, serial := range some {
		if seen[serial] == len(b.volumes) {
			every = append(every, serial)
		}
	}
	return every, some
}

func (b *box) wantSerials(want ...int) {
	b.t.Helper()
	if every, some := b.serials(); !slices.Equal(every, want) || !slices.Equal(some, want) {
		b.t.Errorf("recovery keys %v have slots on all volumes, %v on some; want %v", every, some, want)
	}
}

// TestReplace: a person asks for another key, has it, and the old one is void. The TPM's
// and the management key's slots are as they were.
func TestReplace(t *testing.T) {
	b, k := newBox(t, 2), newKeepers(t, 1, 1)
	s, c := b.mustProvision(k.config)
	s.write("records")
	old := s.recoveryKey()
	before, err := c.Escrow()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.TakeReceipt(k.receipt(t, before)); err != nil {
		t.Fatal(err)
	}
	r, err := c.Replace()
	if err != nil {
		t.Fatal(err)
	}
	key := r.Key.String()
	if r.Serial != 2 || key == old {
		t.Fatalf("key %d", r.Serial)
	}
	b.wantSerials(1, 2)
	if st := c.Status(); st.Serial != 1 || st.Escrow != EscrowReceipted || !strings.Contains(st.Replacing, "recovery key 2 waits") {
		t.Errorf("%+v", st)
	}
	if e, err := c.Escrow(); err != nil || e.Serial != 1 {
		t.Errorf("the escrow to hand out is %+v, %v", e, err)
	}
	if err := c.Commit(3); err == nil {
		t.Error("another number is taken")
	}
	if err := c.Commit(2); err != nil {
		t.Fatal(err)
	}
	b.wantSerials(2)
	if !b.opensAll(key) || b.opensAll(old) {
		t.Error("it is not the new key that opens")
	}
	c.wantEscrow(t, EscrowMade) // the receipt was for the other
	after, err := c.Escrow()
	if err != nil || k.recover(t, after.Marshal()) != key {
		t.Errorf("the escrow has not the new key: %v", err)
	}
	if err := after.SameBox(before); err != nil {
		t.Error(err)
	}
	entries, err := os.ReadDir(c.Dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("left in the folder: %v, %v", entries, err)
	}
	s.wantNoSecret(key)
	s.wantNoSecret(old)
	b.powerOn()
	b.mustBoot("", "tpm").wantData("records")
	b.powerOn()
	b.noTPM = seal.ErrNoTPM
	b.mustBoot(key+"\n", "recovery").wantData("records")

	// Once more, by a process that begins anew; cancelled, and then gone through with.
	c = s.custody(k.config)
	cancelled, err := c.Replace()
	if err != nil || cancelled.Serial != 3 {
		t.Fatalf("%+v, %v", cancelled, err)
	}
	if err := c.Abandon(); err != nil {
		t.Fatal(err)
	}
	b.wantSerials(2)
	if !b.opensAll(key) || b.opensAll(cancelled.Key.String()) {
		t.Error("after a change of mind it is not the old key that opens")
	}
	if r, err = c.Replace(); err != nil || r.Serial != 4 {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := c.Commit(4); err != nil {
		t.Fatal(err)
	}
	b.wantSerials(4)
	if c.Abandon() != nil || c.Settle() != nil {
		t.Error("there is something left to do")
	}
}

// TestReplaceByEscrow: nobody is shown the key, so the old one holds until the new one's
// escrow has arrived, over restarts too.
func TestReplaceByEscrow(t *testing.T) {
	for _, receipts := range []bool{false, true} {
		t.Run(fmt.Sprintf("receipts %v", receipts), func(t *testing.T) {
			b, k := newBox(t, 1), newKeepers(t, 1, 1)
			k.config.Console = image.ConsoleNone
			if !receipts {
				k.config.ReceiptKeyPEM, k.config.URL = "", "https://escrow.example/boxes"
			}
			s, c := b.mustProvision(k.config)
			first, err := c.Escrow()
			if err != nil {
				t.Fatal(err)
			}
			r, err := c.Replace()
			if err != nil || r.Key != nil || r.Serial != 2 {
				t.Fatalf("%+v, %v", r, err)
			}
			if err := c.Commit(2); err == nil {
				t.Error("a person puts a key in force that nobody has")
			}
			c = s.custody(k.config)
			if err := c.Settle(); err != nil {
				t.Fatal(err)
			}
			b.wantSerials(1, 2)
			second, err := c.Escrow()
			if err != nil || second.Serial != 2 {
				t.Fatalf("the escrow to hand out is %+v, %v", second, err)
			}
			if st := c.Status(); st.Serial != 1 || !strings.Contains(st.Replacing, "when its escrow has arrived") {
				t.Errorf("%+v", st)
			}
			// What arrives late, of the first, changes nothing.
			if err := c.HandedOut(first, "late"); err != nil {
				t.Fatal(err)
			}
			b.wantSerials(1, 2)
			// Nor does what a stick takes away, which may never get anywhere.
			if err := c.HandedOut(second, "medium /dev/sda1"); err != nil {
				t.Fatal(err)
			}
			b.wantSerials(1, 2)
			if c.undelivered() == nil {
				t.Error("on a stick it has arrived")
			}
			if err := c.HandedOut(second, "https://escrow.example/boxes"); err != nil {
				t.Fatal(err)
			}
			if receipts {
				b.wantSerials(1, 2)
				if err := c.TakeReceipt(k.receipt(t, second)); err != nil {
					t.Fatal(err)
				}
				c.wantEscrow(t, EscrowReceipted)
			} else {
				c.wantEscrow(t, EscrowHandedOut)
			}
			b.wantSerials(2)
			if !b.opensAll(k.recover(t, second.Marshal())) || b.opensAll(k.recover(t, first.Marshal())) {
				t.Error("it is not the new key that opens")
			}
		})
	}
}

// TestReplaceRefused: what must not be begun, or ends without a change.
func TestReplaceRefused(t *testing.T) {
	b, k := newBox(t, 2), newKeepers(t, 1, 1)
	s, c := b.mustProvision(k.config)
	old := s.recoveryKey()
	fails := func(want string) {
		t.Helper()
		if r, err := c.Replace(); err == nil || !strings.Contains(err.Error(), want) || r != nil {
			t.Errorf("%v, want %q", err, want)
		}
		if c.Settle() != nil || c.Status().Replacing != "" {
			t.Errorf("left behind: %+v", c.Status())
		}
		b.wantSerials(1)
	}
	c.Config = image.Recovery{Console: image.ConsoleNone}
	fails("nobody would have it")
	c.Config = k.config
	c.Config.Holders = []image.Holder{{Name: "a", Recipient: "age1xyz"}}
	fails("is not the public key")
	c.Config = k.config
	management := filepath.Join(s.m.Root, "media", stateFolder, managementKeyFile)
	kept, err := os.ReadFile(management)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(management); err != nil {
		t.Fatal(err)
	}
	fails("the key that authorises a change")
	if err := os.WriteFile(management, []byte("not it"), 0o600); err != nil {
		t.Fatal(err)
	}
	fails("no keyslot opens")
	if err := os.WriteFile(management, kept, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Rand = io.LimitReader(strings.NewReader(strings.Repeat("x", 40)), 40)
	fails("EOF")
	c.Rand = nil
	if !b.opensAll(old) {
		t.Error("the old key does not open any more")
	}
	// An account that was lost is begun anew, above what the headers have.
	if r, err := c.Replace(); err != nil || c.Commit(r.Serial) != nil {
		t.Fatal(err)
	}
	state := filepath.Join(c.Dir, custodyState)
	if err := os.WriteFile(state, []byte("\x00\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Settle(); err == nil || !strings.Contains(err.Error(), "recovery replace") {
		t.Errorf("a damaged account: %v", err)
	}
	_, some := b.serials()
	r, err := c.Replace()
	if err != nil || r.Serial <= some[len(some)-1] {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := c.Commit(r.Serial); err != nil {
		t.Fatal(err)
	}
	b.wantSerials(r.Serial)
	if !b.opensAll(r.Key.String()) {
		t.Error("the key does not open")
	}
}

// TestSettleKeepsTheLastKey: an account that is not of these volumes takes no key away.
func TestSettleKeepsTheLastKey(t *testing.T) {
	b := newBox(t, 1)
	s, c := b.mustProvision(image.Recovery{})
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := c.save(account{Serial: 5, Last: 5, Dropping: true}); err != nil {
		t.Fatal(err)
	}
	if err := c.Settle(); err == nil || !strings.Contains(err.Error(), "no keyslot of recovery key 5") {
		t.Errorf("error %v", err)
	}
	if !b.opensAll(s.recoveryKey()) {
		t.Error("the only recovery key was dropped")
	}
}

// replacement is one recorded on a disk, with what the folder held at each moment.
type replacement struct {
	*box
	t        *testing.T
	k        *keepers
	s        *session
	dev      *powercut.Device
	old, new string
	// folders are the contents of the account's folder, each from a number of Syncs on.
	folders []folderAt
}

type folderAt struct {
	syncs int
	files folder
}

// recordReplacement replaces the key of a box, by a person or by its escrow.
func recordReplacement(t *testing.T, byEscrow bool) *replacement {
	k := newKeepers(t, 1, 1)
	if byEscrow {
		k.config.Console = image.ConsoleNone
	}
	r := &replacement{box: newBox(t, 2), t: t, k: k}
	s, c := r.mustProvision(k.config)
	r.s = s
	first, err := c.Escrow()
	if err != nil {
		t.Fatal(err)
	}
	r.old = k.recover(t, first.Marshal())
	r.dev = powercut.New(r.disk.(*partition.Memory))
	r.disk = r.dev
	r.folders = []folderAt{{0, readFolder(t, c.Dir)}}
	c.changed = func() {
		if r.dev.Unsynced() {
			t.Error("the account changes while a header is on its way")
		}
		r.folders = append(r.folders, folderAt{r.dev.Syncs(), readFolder(t, c.Dir)})
	}
	made, err := c.Replace()
	if err != nil {
		t.Fatal(err)
	}
	if byEscrow {
		e, err := c.Escrow()
		if err != nil {
			t.Fatal(err)
		}
		r.new = k.recover(t, e.Marshal())
		if err := c.TakeReceipt(k.receipt(t, e)); err != nil {
			t.Fatal(err)
		}
	} else {
		r.new = made.Key.String()
		if err := c.Commit(made.Serial); err != nil {
			t.Fatal(err)
		}
	}
	if r.dev.Unsynced() {
		t.Error("success before the last write was synced")
	}
	return r
}

// TestPowerCutWhileReplacing visits the states in which a cut can leave disk and account.
// In each one key that somebody has opens all volumes, before and after the next start
// has settled, which leaves no other.
func TestPowerCutWhileReplacing(t *testing.T) {
	for _, byEscrow := range []bool{false, true} {
		t.Run(fmt.Sprintf("by escrow %v", byEscrow), func(t *testing.T) {
			r := recordReplacement(t, byEscrow)
			random, every := 1, 10
			if campaign() {
				random, every = 10, 1
			}
			n, seen := 0, map[string]int{}
			check := func(name string, disk *partition.Memory, f folderAt) {
				n++
				r.disk = disk
				seen[r.checkCut(name, f, n%every == 0)]++
				if t.Failed() {
					t.Fatalf("state %d: %s", n, name)
				}
			}
			for name, disk := range r.dev.States(1, random) {
				// The account changes only where nothing is unsynced: beside a part of what
				// follows Sync i is what it was last at i, beside all of it also what it became then.
				i, done, all := 0, 0, 1
				k, _ := fmt.Sscanf(name, "after sync %d, %d of %d writes", &i, &done, &all)
				whole := k == 3 && done == all && !strings.Contains(name, "sectors")
				for n, f := range r.folders {
					last := f.syncs <= i && (n == len(r.folders)-1 || r.folders[n+1].syncs > i)
					if last || k == 0 && f.syncs == 0 || whole && f.syncs == i+1 {
						check(fmt.Sprintf("%s, account %d", name, n), disk.Clone(), f)
					}
				}
			}
			check("the end", r.dev.Now(), r.folders[len(r.folders)-1])
			t.Logf("%d writes, %d syncs, %d contents of the account; %d states: %v", r.dev.Writes(), r.dev.Syncs(), len(r.folders), n, seen)
			if n < 30 || seen["old"] == 0 || seen["new"] == 0 || byEscrow != (seen["both"] > 0) {
				t.Errorf("%d states, kinds %v", n, seen)
			}
		})
	}
}

// checkCut starts the box from a state, and says which key holds: "old", "new", or
// "both" while the new one's escrow is awaited.
func (r *replacement) checkCut(name string, f folderAt, thorough bool) string {
	t := r.t
	t.Helper()
	c := r.s.custody(r.k.config)
	if err := os.RemoveAll(c.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for file, content := range f.files {
		if err := os.WriteFile(filepath.Join(c.Dir, file), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a, err := c.load()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.parts() { // as a boot does before anything else
		h, report, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			t.Fatal(err)
		}
		if !report.Sound() {
			if err := h.Repair(p.Device); err != nil {
				t.Fatal(err)
			}
		}
	}
	holds, key := a.Serial, r.old
	if holds == 2 {
		key = r.new
	}
	if every, _ := r.serials(); !slices.Contains(every, holds) || thorough && !r.opensAll(key) {
		t.Errorf("%s: the key in force, %d, does not open all volumes", name, holds)
	}
	if err := c.Settle(); err != nil {
		t.Errorf("%s: settle: %v", name, err)
	}
	if a, err = c.load(); err != nil || a.Dropping {
		t.Errorf("%s: %+v, %v", name, a, err)
	}
	kind := map[int]string{1: "old", 2: "new"}[a.Serial]
	if a.Next != nil {
		kind = "both"
		r.wantSerials(1, 2)
	} else {
		r.wantSerials(a.Serial)
	}
	if e, err := c.Escrow(); err != nil || e.Serial != map[string]int{"old": 1, "new": 2, "both": 2}[kind] {
		t.Errorf("%s: escrow %+v, %v", name, e, err)
	}
	r.wantOtherSlots()
	if thorough {
		if kind != "new" && !r.opensAll(r.old) || kind != "old" && !r.opensAll(r.new) {
			t.Errorf("%s: kind %s: the key does not open", name, kind)
		}
		r.powerOn()
		r.mustBoot("", "tpm")
	}
	return kind
}

// wantOtherSlots: the management key opens, there is a TPM's slot, and nothing is left over.
func (r *replacement) wantOtherSlots() {
	r.t.Helper()
	for _, p := range r.parts() {
		h, report, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil || !report.Sound() {
			r.t.Fatalf("%v, %+v", err, report)
		}
		management, err := os.ReadFile(filepath.Join(r.s.m.Root, p.Mount, stateFolder, managementKeyFile))
		if err != nil {
			r.t.Fatal(err)
		}
		key, _, err := h.Unlock(p.Device, management)
		if err != nil || !bytes.Equal(key, r.s.storage.mapped["/dev/mapper/"+p.Name].volumeKey) {
			r.t.Errorf("the management key: %v", err)
		}
		if n := len(h.Keyslots()); n != 2+len(keyTokens(h)) {
			r.t.Errorf("%d keyslots for %d recovery keys", n, len(keyTokens(h)))
		}
	}
}

// TestRecoveryTokenForSystemd: our field in the token does not keep systemd's form from
// being what it is.
func TestRecoveryTokenForSystemd(t *testing.T) {
	b := newBox(t, 1)
	s, c := b.mustProvision(image.Recovery{})
	r, err := c.Replace()
	if err != nil || c.Commit(r.Serial) != nil {
		t.Fatal(err)
	}
	p := s.parts()[0]
	h, _, err := luks2.Read(p.Device, p.Device.Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, raw := range h.Tokens() {
		if tokenType(raw) == recoveryTokenType {
			if got := string(raw); !strings.HasPrefix(got, `{"type":"systemd-recovery","keyslots":["`) || !strings.HasSuffix(got, `"],"holdfast_serial":2}`) {
				t.Errorf("token %s", got)
			}
			return
		}
	}
	t.Error("no token")
}
