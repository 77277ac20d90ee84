package hwtest_test

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/partition"
)

// TestBoards: boards whose firmware, or what is plugged into them, is not as it was in
// the factory. No boot, update, commit or fallback may depend on it. With
// HOLDFAST_CAMPAIGN=1 there are more of them.
func TestBoards(t *testing.T) {
	t.Parallel()
	nextRelease(t, "2.5.0", nil)
	tests := map[string]func(*testing.T){
		"variables are full":                   variablesFull,
		"variables are lost and refuse writes": variablesLost,
		"install media were left in":           installMediaLeftIn,
	}
	if os.Getenv("HOLDFAST_CAMPAIGN") == "1" {
		tests["started from the install medium"] = startedFromMedium
		tests["copy and nobody to tell"] = copyUntold
		tests["a release is revoked"] = releaseRevoked
		tests["the first boot loader is foreign under strict"] = foreignLoaderStrict
		tests["both boot loaders are foreign under strict"] = foreignLoadersStrict
		tests["a kernel image is foreign under strict"] = foreignKernelStrict
		tests["keys are not kept"] = keysForgotten
		tests["no room for keys"] = noRoomForKeys
		tests["it is reset to the factory's state"] = factoryReset
		tests["the disk changes what is on it"] = authenticatedVolume
		tests["own root is damaged and a medium is there"] = mediumForDamagedRoot
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

// variablesFull (F65): with no room for one more variable, a release on trial is counted
// and committed, the next one is installed, and when that fails its tries run out. Two
// boots, for firmware is slow when it looks for room at each of its own variables.
func variablesFull(t *testing.T) {
	good := buildRelease(t, t.TempDir(), theProduct(t).keys, "2.4.0", nil)
	nextRelease(t, "2.6.0", func(s *spec.Spec) {
		s.OnBoot[0].Command = []string{"/usr/lib/holdfast/holdfast-agent", "no-such-verb"}
	})
	m, _ := aBox(t, true)
	install(t, m.Disk, good, 2)
	if err := m.FillVariables(); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(`on trial slot=b version=2.4.0 tries_left=1`, bootTime)
	m.Expect(`blessed slot=b version=2.4.0`, bootTime)
	wantRecord(t, m, "first", "kept")
	if err := apply(m, "2.6.0"); err != nil {
		t.Fatal(err)
	}
	m.PowerButton(bootTime)
	if e := entry(t, m.Disk, partition.SlotA); !e.Counted || e.Version != "2.6.0" {
		t.Fatalf("boot entry %+v", e)
	}
	d, _ := openDisk(t, m.Disk)
	if err := d.Arm(partition.SlotA, 1); err != nil { // two tries less to wait for
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(`on trial slot=a version=2.6.0 tries_left=0`, bootTime)
	m.Expect(`trial of 2.6.0 in slot a failed`, bootTime)
	m.Expect(`bye reboot=true`, bootTime)
	m.PowerCut()
	if a, b := entry(t, m.Disk, partition.SlotA), entry(t, m.Disk, partition.SlotB); !a.Bad() || !b.Good() {
		t.Errorf("the loader would not fall back: %+v, %+v", a, b)
	}
	if free, err := m.FreeVariableBytes(); err != nil || free > 1024 {
		t.Errorf("%d bytes are free in the variable store after all (%v)", free, err)
	}
}

// updateOnBoard installs the release of this file and waits for its commit.
func updateOnBoard(t *testing.T, m *hwtest.Machine) {
	t.Helper()
	installOnBoard(t, m)
	wantRecord(t, m, "first", "kept")
}

func installOnBoard(t *testing.T, m *hwtest.Machine) {
	t.Helper()
	if err := apply(m, "2.5.0"); err != nil {
		t.Fatal(err)
	}
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(`blessed slot=b version=2.5.0`, bootTime)
}

// variablesLost (F59 to F67): the board's battery was empty, and its firmware keeps
// nothing any more: no boot entries, no room to make one. Then the keys are gone too,
// which is another machine to the TPM: the data need the recovery key, and no more.
func variablesLost(t *testing.T) {
	keys := theProduct(t).firmwareKeys(t)
	m, box := aBox(t, true)
	if err := m.ResetFirmware(keys); err != nil {
		t.Fatal(err)
	}
	m.ReadOnlyVariables(true)
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	updateOnBoard(t, m)
	m.PowerButton(bootTime)

	m.ReadOnlyVariables(false)
	if err := m.ResetFirmware(&hwtest.SecureBootKeys{}); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	expectClosed(t, m)
	if !strings.Contains(m.Console(), "7: Secure Boot keys and state") {
		t.Errorf("the prompt does not say what changed:\n%s", m.Console())
	}
	m.Send(box.recovery + "\n")
	m.Expect(`ready name=probe version=2.5.0 slot=b`, bootTime)
	wantRecord(t, m, "first", "kept")
}

// installMediaLeftIn (F77): the very image that the box was made from, on an SSD and on
// a stick, a copy of the box's disk, and an older release. All have the same labels and
// GUIDs, and all come first. The box uses the disk it was started from, and updates it.
func installMediaLeftIn(t *testing.T) {
	p := theProduct(t)
	older := buildRelease(t, t.TempDir(), p.keys, "0.9.0", nil)
	m, _ := aBox(t, true)
	unwritten := []func(){
		attach(t, m, p.disk(), hwtest.Drive{Bus: hwtest.NVMe}), attach(t, m, p.disk(), hwtest.Drive{Bus: hwtest.USB}),
		attach(t, m, m.Disk, hwtest.Drive{}), attach(t, m, older.disk(), hwtest.Drive{}),
	}
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	store(t, m, "second", "not on the copy")
	s := statusOf(t, m)
	if s.Disk != "/dev/vdc" || len(s.Volumes) != 1 || s.Volumes[0].Method != "tpm" {
		t.Errorf("the box runs from %s, volumes %+v", s.Disk, s.Volumes)
	}
	for _, disk := range []string{"/dev/nvme0n1", "/dev/vda"} {
		if !slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, "disk "+disk+" holds this release too") }) {
			t.Errorf("the status does not name %s: %q", disk, s.Problems)
		}
	}
	updateOnBoard(t, m)
	wantRecord(t, m, "second", "not on the copy")
	m.PowerButton(bootTime)
	for _, check := range unwritten {
		check()
	}
}

// attach plugs a copy of a disk image in. The check it returns is for afterwards: not a
// byte of it may have changed.
func attach(t *testing.T, m *hwtest.Machine, image string, d hwtest.Drive) (unwritten func()) {
	t.Helper()
	d.Image = filepath.Join(t.TempDir(), "drive")
	tool(t, "cp", "--sparse=always", image, d.Image)
	m.Attach(d)
	return unchanged(t, d.Image)
}

// unchanged notes what a file holds; the check it returns is for afterwards.
func unchanged(t *testing.T, path string) func() {
	t.Helper()
	before := tool(t, "sha256sum", path)
	return func() {
		t.Helper()
		if tool(t, "sha256sum", path) != before {
			t.Errorf("%s was written to", path)
		}
	}
}

// startedFromMedium: somebody chose the medium in the firmware's menu. It is a box of
// its own then, and leaves the other one alone.
func startedFromMedium(t *testing.T) {
	m, _ := aBox(t, true)
	attach(t, m, theProduct(t).disk(), hwtest.Drive{First: true})
	check := unchanged(t, m.Disk)
	m.PowerOn()
	m.Expect(`root verified device=/dev/vda2`, bootTime)
	m.Expect(`holdfast [\d.]+: provisioned`, bootTime)
	m.Expect(readyPattern, bootTime)
	installOnBoard(t, m)
	m.PowerButton(bootTime)
	check()
}

// copyUntold: without a TPM there is no event log, and a copy of the disk is like the
// disk. Neither is used.
func copyUntold(t *testing.T) {
	m, _ := aBox(t, true)
	m.RemoveTPM()
	checks := []func(){attach(t, m, m.Disk, hwtest.Drive{}), unchanged(t, m.Disk)}
	m.PowerOn()
	m.Expect(`waiting for the disk why="several disks hold this release`, bootTime)
	m.Expect(`holdfast: error: .*/dev/vda, /dev/vdb; none is used: leave one of them plugged in`, bootTime)
	m.PowerCut()
	for _, check := range checks {
		check()
	}
}

// mediumForDamagedRoot: a medium with the same root is no spare part for the box's own.
func mediumForDamagedRoot(t *testing.T) {
	p := theProduct(t)
	m, _ := aBox(t, true)
	flipRoot(t, m.Disk, partition.RootAName, (p.manifest.Verity.DataBlocks+1)*4096)
	check := attach(t, m, p.disk(), hwtest.Drive{Bus: hwtest.NVMe})
	m.PowerOn()
	m.Expect(`holdfast: error: .*this boot was started from /dev/vda, whose root is missing or damaged; another disk has it and is not used: /dev/nvme0n1`, bootTime)
	m.PowerCut()
	check()
}

// factoryReset: the command, given on the running box, destroys the data and what opened
// it, and restarts. The box makes volumes anew, which another recovery key opens, and the
// TPM in later boots; release and firmware stay as they are.
func factoryReset(t *testing.T) {
	p := theProduct(t)
	first := buildRelease(t, t.TempDir(), p.keys, "1.0.0", func(s *spec.Spec) {
		s.Services[0].Binds[0] = spec.Bind{Source: "/data", Destination: "/data"} // the agent's part of the volume too
	})
	m := hwtest.New(t, first.disk(), hwtest.Options{SecureBoot: p.firmwareKeys(t), Forward: []int{80}})
	m.PowerOn()
	before := m.Expect(recoveryPattern, bootTime)[1]
	m.Expect(readyPattern, bootTime)
	store(t, m, "first", "of the first owner")
	if code, text := agentTool(t, m, "reset", "--factory"); code != 1 || !strings.Contains(text, "not confirmed; nothing was changed") {
		t.Errorf("without a confirmation it ends with %d: %s", code, text)
	}
	wantRecord(t, m, "first", "of the first owner")
	old := extract(t, m.Disk, "data")
	if err := opens(t, old, before); err != nil {
		t.Errorf("the first recovery key: %v", err)
	}
	if _, err := call(m, http.MethodPost, "/run?arg=/usr/lib/holdfast/holdfast-agent&arg=reset&arg=--factory&arg=--yes", ""); err != nil {
		t.Logf("answer to the reset: %v", err) // it may be cut off by the restart
	}
	m.Expect(`shutting down reboot=true`, bootTime)
	m.Expect(`bye reboot=true`, bootTime)
	m.Expect(`first boot: provisioning`, bootTime)
	after := m.Expect(recoveryPattern, bootTime)[1]
	m.Expect(readyPattern, bootTime)
	if got, err := call(m, http.MethodGet, "/record/first", ""); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("a record of the first owner's: %q, %v", got, err)
	}
	store(t, m, "second", "of the next owner")
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "second", "of the next owner")
	wantStates(t, statusOf(t, m), "slot a 1.0.0")
	m.PowerButton(bootTime)
	volume := extract(t, m.Disk, "data")
	if err := opens(t, volume, after); err != nil {
		t.Errorf("the new recovery key: %v", err)
	}
	if before == after || opens(t, volume, before) == nil {
		t.Error("the first owner's recovery key opens the volume")
	}
}

// statusOf asks the agent in the box.
func statusOf(t *testing.T, m *hwtest.Machine) *agent.Status {
	t.Helper()
	s := &agent.Status{}
	text, err := call(m, http.MethodGet, "/v1/status", "")
	if err == nil {
		err = json.Unmarshal([]byte(text), s)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}
