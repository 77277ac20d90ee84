package hwtest_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/spec"
)

// maxTPMCommands is what a later boot may ask of the TPM, all in all.
const maxTPMCommands = 12

// wantStates compares the names of the states in which the TPM opens.
func wantStates(t *testing.T, s *agent.Status, want ...string) {
	t.Helper()
	var got []string
	for _, state := range s.States {
		got = append(got, state.For)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("states %q, want %q", got, want)
	}
	if len(s.Problems) > 0 {
		t.Errorf("problems: %q", s.Problems)
	}
}

// settled is the status of a box that has so many states, or has had time to: it is ready
// before it has dropped those of a release that it left.
func settled(t *testing.T, m *hwtest.Machine, states int) *agent.Status {
	t.Helper()
	s := statusOf(t, m)
	for end := time.Now().Add(bootTime); len(s.States) != states && time.Now().Before(end); s = statusOf(t, m) {
		time.Sleep(time.Second)
	}
	return s
}

// updateBound takes a box whose seal binds the release through an update that works and
// one that does not. next is built from the same spec; the volumes open by the TPM at
// every start.
func updateBound(t *testing.T, m *hwtest.Machine, from, good, bad string) {
	t.Helper()
	if err := apply(m, good); err != nil {
		t.Fatal(err)
	}
	wantStates(t, statusOf(t, m), "slot a "+from, "slot b "+good)
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(`blessed slot=b version=`+good, bootTime)
	wantRecord(t, m, "first", "kept")
	wantStates(t, statusOf(t, m), "slot a "+from, "slot b "+good)

	if err := apply(m, bad); err != nil {
		t.Fatal(err)
	}
	reboot(t, m)
	for range 3 {
		m.Expect(tpmPattern, bootTime)
		m.Expect(`trial of `+bad+` in slot a failed`, bootTime)
	}
	m.Expect(tpmPattern, bootTime)
	m.Expect(`fell back version=`+bad, bootTime)
	m.Expect(`ready name=probe version=`+good+` slot=b`, bootTime)
	wantRecord(t, m, "first", "kept")
	s := settled(t, m, 1)
	wantStates(t, s, "slot b "+good)
	if s.Boot.TPMCommands > maxTPMCommands {
		t.Errorf("%d TPM commands in a later boot", s.Boot.TPMCommands)
	}
	if strings.Contains(m.Console(), "recovery key (or") {
		t.Error("somebody was asked for the recovery key")
	}
}

// TestUpdateWithoutSecureBoot: the volumes are bound to the boot programs (PCR 4), and
// sealed for those of the next release before it is written.
func TestUpdateWithoutSecureBoot(t *testing.T) {
	t.Parallel()
	nextRelease(t, "2.1.0", nil)
	nextRelease(t, "2.1.1", func(s *spec.Spec) { s.OnBoot[0].Command = []string{"/usr/lib/holdfast/holdfast-agent", "no-such-verb"} })
	m, _ := aBox(t, false)
	m.PowerOn()
	m.Expect(readyPattern, bootTime)
	updateBound(t, m, "1.0.0", "2.1.0", "2.1.1")
}

// TestStrict: every register of firmware and release is bound by its value.
func TestStrict(t *testing.T) {
	t.Parallel()
	strict := func(s *spec.Spec) { s.Seal.Policy = "strict" }
	p := theProduct(t)
	first := buildRelease(t, t.TempDir(), p.keys, "1.0.1", strict)
	nextRelease(t, "2.3.0", strict)
	nextRelease(t, "2.3.1", func(s *spec.Spec) {
		strict(s)
		s.OnBoot[0].Command = []string{"/usr/lib/holdfast/holdfast-agent", "no-such-verb"}
	})
	m := hwtest.New(t, first.disk(), hwtest.Options{Forward: []int{80}, SecureBoot: p.firmwareKeys(t)})
	m.PowerOn()
	m.Expect(recoveryPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	store(t, m, "first", "kept")
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	s := statusOf(t, m)
	if !slices.Equal(s.SealedPCRs, []int{0, 2, 4, 7, 11}) {
		t.Errorf("sealed to %v", s.SealedPCRs)
	}
	updateBound(t, m, "1.0.1", "2.3.0", "2.3.1")
}
