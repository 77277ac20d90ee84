package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
	"github.com/holdfast-os/holdfast/seal"
)

func (st *station) mustSetPIN(pin string) SyncReport {
	st.t.Helper()
	var b []byte
	if pin != "" {
		b = []byte(pin)
	}
	r, err := st.k.SetPIN(b)
	if err != nil {
		st.t.Fatal(err)
	}
	return r
}

// wantPIN starts with the PIN, "" for none, and finds that it is asked for once.
func (st *station) wantPIN(pin string) {
	st.t.Helper()
	st.tpm.Forgive()
	typed, asked := "", 0
	if pin != "" {
		typed, asked = pin+"\n", 1
	}
	st.start(typed, "tpm")
	if n := strings.Count(st.s.console.out.String(), "PIN (or"); n != asked {
		st.t.Errorf("asked for a PIN %d times, want %d", n, asked)
	}
}

// wantNotPIN finds that the PIN opens nothing.
func (st *station) wantNotPIN(pin string) {
	st.t.Helper()
	st.tpm.Forgive()
	if err := st.try(pin + "\n"); !errors.Is(err, io.EOF) || !strings.Contains(st.s.console.out.String(), "this is not the PIN") {
		st.t.Errorf("PIN %q: %v, console %s", pin, err, st.s.console.out.String())
	}
}

// TestSetPIN: added, changed and taken away on a running box, under each policy, with an
// update between and with one that waits for its first start.
func TestSetPIN(t *testing.T) {
	for _, policy := range []string{seal.PolicyStandard, seal.PolicyStrict, seal.PolicyRollbackProof} {
		for _, secureBoot := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, Secure Boot %v", policy, secureBoot), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					st := newStation(t, image.SealPolicy{Policy: policy, Epoch: 1}, secureBoot, "1.1.0", "2.0.0")
					st.mustSettle()
					for _, bad := range []string{"12", "reboot", strings.Repeat("1", 65)} {
						if _, err := st.k.SetPIN([]byte(bad)); err == nil {
							t.Errorf("PIN %q was taken", bad)
						}
					}
					st.mustSetPIN("1111")
					st.wantStates("slot a 1.0.0")
					st.wantPIN("1111")
					if r := st.mustSettle(); r.Changed() {
						t.Errorf("settled: %+v", r)
					}
					old := st.disk.(*partition.Memory).Clone()
					st.mustSetPIN("2222")
					st.wantNotPIN("1111")
					st.wantPIN("2222")
					st.mustSettle()
					st.apply("1.1.0")
					st.wantPIN("2222")
					st.good()
					// Before the first start of a release with another boot loader.
					st.apply("2.0.0")
					if r := st.mustSetPIN("3333"); strings.Contains(strings.Join(r.Added, ";"), "pending") {
						t.Errorf("report %+v", r)
					}
					for range updateTries { // all of its trial, and back
						st.wantPIN("3333")
						if st.version != "2.0.0" {
							t.Fatalf("%s boots", st.version)
						}
					}
					st.wantPIN("3333")
					if st.version != "1.1.0" {
						t.Fatalf("%s boots", st.version)
					}
					st.mustSettle()
					st.mustSetPIN("")
					st.wantPIN("")
					for _, v := range []string{"data", "media"} {
						if _, err := os.Stat(filepath.Join(st.s.m.Root, v, stateFolder, pinFile)); !os.IsNotExist(err) {
							t.Errorf("volume %s: %v", v, err)
						}
					}
					st.mustSettle()
					if left := st.tpm.Handles(); left != 0 {
						t.Errorf("%d handles left in the TPM", left)
					}
					// The disk of an earlier day opens with the PIN of that day, but where a
					// counter says that the day is over.
					st.disk = old
					st.tpm.Forgive()
					err := st.try("1111\npoweroff\n")
					if policy == seal.PolicyRollbackProof && !errors.Is(err, ErrPowerOff) {
						t.Errorf("an old header opens with an old PIN: %v", err)
					}
				})
			})
		}
	}
}

// TestPINOfTheRelease: one that the policy wants can be changed, and set after it was
// forgotten, and not taken away.
func TestPINOfTheRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStationTyped(t, image.SealPolicy{Policy: seal.PolicyStandard, PIN: true}, true, "1111\n1111\n")
		key := st.s.recoveryKey()
		st.mustSettle()
		if _, err := st.k.SetPIN(nil); !errors.Is(err, ErrPINWanted) {
			t.Errorf("taken away: %v", err)
		}
		st.tpm.Forgive()
		st.start("recovery\n"+key+"\n", "recovery")
		st.mustSetPIN("2222")
		st.wantNotPIN("1111")
		st.wantPIN("2222")
		// A release that wants one comes to a box that has none.
		st = newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
		st.mustSettle()
		st.policy.PIN = true
		st.start("", "tpm")
		if _, err := st.k.Settle(); !errors.Is(err, errNoPIN) || !strings.Contains(err.Error(), "holdfast-agent pin set") {
			t.Errorf("settled: %v", err)
		}
		st.mustSetPIN("4444")
		st.wantPIN("4444")
		st.mustSettle()
		// Without a TPM nothing is begun.
		st.noTPM = seal.ErrNoTPM
		if _, err := st.k.SetPIN([]byte("5555")); !errors.Is(err, seal.ErrNoTPM) {
			t.Errorf("without a TPM: %v", err)
		}
		st.noTPM = nil
		st.mustSettle()
		st.wantPIN("4444")
	})
}

// TestPowerCutsOverSetPIN: at every cut one of the two PINs opens both volumes, and from
// the next boot that is good on it is the new one alone.
func TestPowerCutsOverSetPIN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStationTyped(t, image.SealPolicy{Policy: seal.PolicyStandard}, true, "")
		st.mustSettle()
		st.mustSetPIN("1111")
		st.wantPIN("1111")
		st.mustSettle()
		folderOf := func() string {
			dir, err := filepath.EvalSymlinks(st.k.folder())
			if err != nil {
				t.Fatal(err)
			}
			return dir
		}
		dir := folderOf()
		dev := powercut.New(st.disk.(*partition.Memory))
		st.disk = dev
		for i := range st.k.Volumes {
			st.k.Volumes[i].Device = st.parts()[i].Device
		}
		before := readFolder(t, dir)
		st.mustSetPIN("2222")
		after := readFolder(t, dir)
		during := folder{}
		for name, b := range before {
			during[name] = b
		}
		during[pinNextFile] = []byte("2222")
		random := 1
		if campaign() {
			random = 30
		}
		seen, n := map[string]int{}, 0
		check := func(name string, disk partition.Device, f folder) {
			n++
			st.disk = disk
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(f.restore(t), dir); err != nil {
				t.Fatal(err)
			}
			st.tpm.Forgive()
			st.start("1111\n2222\n", "tpm") // what the person does who knows both
			opened := "the new one"
			if !strings.Contains(st.s.console.out.String(), "this is not the PIN") {
				opened = "the old one"
			}
			seen[opened]++
			if n%4 == 0 || campaign() {
				r := st.mustSettle()
				want := "1111"
				if len(f[pinNextFile]) > 0 {
					if want = "2222"; len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "the new PIN") {
						t.Errorf("settled: %+v", r)
					}
				}
				st.wantPIN(want)
				st.wantStates("slot a 1.0.0")
			}
			if t.Failed() {
				t.Fatalf("state %d: %s", n, name)
			}
		}
		for name, disk := range dev.States(5, random) {
			check(name, disk, during)
		}
		check("the end", dev.Now(), after)
		t.Logf("%d writes, %d states: %v", dev.Writes(), n, seen)
		if n < 10 || seen["the old one"] == 0 || seen["the new one"] == 0 {
			t.Errorf("%d states, opened by %v", n, seen)
		}
	})
}
