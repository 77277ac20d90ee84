package hwtest_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
)

// tool runs a judge and returns what it says; a missing one is a failure.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// extract copies a partition of a disk image into a file of its own.
func extract(t *testing.T, disk, name string) string {
	t.Helper()
	d, dev := openDisk(t, disk)
	_, p, err := d.Partition(name)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), name)
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < p.SizeBytes; off += int64(len(buf)) {
		n := min(int64(len(buf)), p.SizeBytes-off)
		if _, err := dev.ReadAt(buf[:n], p.StartBytes+off); err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(buf[:n], make([]byte, n)) {
			continue
		}
		if _, err := f.WriteAt(buf[:n], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(p.SizeBytes); err != nil {
		t.Fatal(err)
	}
	return out
}

func openDisk(t *testing.T, path string) (*partition.Disk, *partition.File) {
	t.Helper()
	dev, err := partition.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	d, err := partition.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	return d, dev
}

func TestJudgesAcceptTheDisk(t *testing.T) {
	p := theProduct(t)
	if out := tool(t, "sgdisk", "-v", p.disk()); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk -v: %s", out)
	}
	esp := extract(t, p.disk(), "esp")
	tool(t, "fsck.vfat", "-n", esp)
	if out := tool(t, "mdir", "-/", "-b", "-i", esp, "::"); !strings.Contains(out, "/EFI/BOOT/BOOTX64.EFI") {
		t.Errorf("mdir does not show the boot loader:\n%s", out)
	}
	root := extract(t, p.disk(), "root-a")
	v := p.manifest.Verity
	tool(t, "veritysetup", "verify", root, root, v.RootHash, "--hash-offset", itoa(v.DataBlocks*4096))
	tool(t, "fsck.erofs", root)
	cert := filepath.Join(p.dir, "keys/db.pem")
	for _, name := range []string{image.UKIName, image.LoaderName} {
		if out := tool(t, "sbverify", "--cert", cert, filepath.Join(p.release(), name)); !strings.Contains(out, "Signature verification OK") {
			t.Errorf("sbverify %s: %s", name, out)
		}
	}
}

func itoa(n int64) string { return string(json.Number(jsonText(n))) }

func jsonText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// statusIn finds the JSON that the onboot container printed.
func statusIn(t *testing.T, console string) *agent.Status {
	t.Helper()
	m := regexp.MustCompile(`status \| (\{.*\})`).FindStringSubmatch(console)
	if m == nil {
		t.Fatalf("no status on the console:\n%s", console)
	}
	s := &agent.Status{}
	if err := json.Unmarshal([]byte(m[1]), s); err != nil {
		t.Fatalf("status %s: %v", m[1], err)
	}
	return s
}

func TestFirstBootProvisions(t *testing.T) {
	t.Parallel()
	m, box := aBox(t, true)
	s := statusIn(t, box.console)
	if s.Name != "probe" || s.Version != "1.0.0" || s.Slot != "a" || len(s.Degraded) != 0 || len(s.Problems) != 0 {
		t.Errorf("status after the first boot: %+v", s)
	}
	if len(s.Volumes) != 1 || s.Volumes[0].Method != "provisioned" || s.Volumes[0].Mount != "/data" {
		t.Errorf("volumes after the first boot: %+v", s.Volumes)
	}
	for _, want := range []string{"volume closed name=data", "farewell | holdfast-agent", "bye reboot=false"} {
		if !strings.Contains(box.console, want) {
			t.Errorf("the first boot's console lacks %q; it ends:\n%s", want, box.console[max(0, len(box.console)-1500):])
		}
	}
	data := extract(t, m.Disk, "data")
	dump := tool(t, "cryptsetup", "luksDump", data)
	for _, want := range []string{"aes-xts-plain64", "systemd-recovery", "systemd-tpm2", "holdfast-state"} {
		if !strings.Contains(dump, want) {
			t.Errorf("luksDump does not show %s:\n%s", want, dump)
		}
	}
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(box.recovery), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "cryptsetup", "open", "--test-passphrase", "--type", "luks2", "--key-file", key, data)
	if out := tool(t, "sgdisk", "-v", m.Disk); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk -v after the first boot: %s", out)
	}
}

func TestSecondBootOpensByTPM(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, true)
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
	s := statusIn(t, m.Console())
	if len(s.Volumes) != 1 || s.Volumes[0].Method != "tpm" {
		t.Errorf("volumes after the second boot: %+v", s.Volumes)
	}
	if len(s.Rules) == 0 || s.Boot.TPMCommands == 0 {
		t.Errorf("status shows no policy or no TPM command: %+v", s)
	}
	t.Logf("second boot: initrd %d ms, TPM %d ms in %d commands", s.Boot.InitrdMilliseconds, s.Boot.TPMMilliseconds, s.Boot.TPMCommands)
	who, err := call(m, "GET", "/whoami", "")
	if err != nil || !strings.Contains(who, "CapEff:\t0000000000000400") {
		t.Errorf("the service has more or less than CAP_NET_BIND_SERVICE: %s (%v)", who, err)
	}
	log, err := call(m, "GET", "/file?path=/sys/kernel/security/tpm0/binary_bios_measurements", "")
	if err != nil {
		t.Fatalf("read the event log: %v", err)
	}
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	events := tool(t, "tpm2_eventlog", path)
	if want := theProduct(t).manifest.Expected.PCR11[""]; !strings.Contains(events, want) {
		t.Errorf("tpm2_eventlog does not compute the predicted PCR 11 %s", want)
	}
	if want := theProduct(t).manifest.Expected.UKIAuthenticode; !strings.Contains(events, want) {
		t.Errorf("tpm2_eventlog does not show the predicted Authenticode digest %s", want)
	}
	text := wantDiagnosis(t, m, true, map[string]agent.Verdict{
		"efi": agent.OK, "tpm": agent.OK, "tpm-self-test": agent.OK, "tpm-lockout": agent.OK, "tpm-owner": agent.OK, "tpm-space": agent.OK,
		"sha256-bank": agent.OK, "registers": agent.OK, "event-log": agent.OK, "log-replay": agent.OK, "secure-boot": agent.OK,
		"esp": agent.OK, "virtual-machine": agent.Warn,
	})
	if !strings.HasSuffix(text, "\nfit for policy standard\n") {
		t.Errorf("doctor says:\n%s", text)
	}
	call(m, "POST", "/die", "") // the connection breaks
	m.Expect(`service=web state=waiting reason="exit status 3"`, bootTime)
	m.Expect(`service=web state=healthy`, bootTime)
}

func TestPowerCutKeepsWhatWasAnswered(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, true)
	m.PowerOn()
	m.Expect(readyPattern, bootTime)
	for i := range 20 {
		store(t, m, "r"+itoa(int64(i)), strings.Repeat("x", 1000*i))
	}
	m.PowerCut()
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	for i := range 20 {
		wantRecord(t, m, "r"+itoa(int64(i)), strings.Repeat("x", 1000*i))
	}
}

func TestWithoutSecureBootIsDegraded(t *testing.T) {
	t.Parallel()
	m, box := aBox(t, false)
	first := statusIn(t, box.console)
	if len(first.Degraded) != 1 || !strings.Contains(first.Degraded[0], "Secure Boot is off") {
		t.Errorf("status does not say that Secure Boot is off: %+v", first.Degraded)
	}
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	s := statusIn(t, m.Console())
	if !slices.ContainsFunc(s.Rules, func(r string) bool { return strings.Contains(r, "PCR 4") || strings.Contains(r, "4:") }) {
		t.Errorf("the rules do not show PCR 4: %q", s.Rules)
	}
	text := wantDiagnosis(t, m, true, map[string]agent.Verdict{"tpm": agent.OK, "registers": agent.OK, "log-replay": agent.OK, "secure-boot": agent.Warn})
	if !strings.Contains(text, "else enrol them in the firmware setup") {
		t.Errorf("doctor says:\n%s", text)
	}
}

func TestRebootIsClean(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, true)
	m.PowerOn()
	m.Expect(readyPattern, bootTime)
	call(m, "POST", "/v1/power/reboot", "") // the service may be stopped before it has answered
	m.Expect(`shutting down reboot=true why="asked by the API"`, bootTime)
	m.Expect(`volume closed name=data`, bootTime)
	m.Expect(`bye reboot=true`, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
}

// TestDataGrowsToTheDisk writes a small image to a large disk, as everybody does.
func TestDataGrowsToTheDisk(t *testing.T) {
	t.Parallel()
	const size = 6 << 30
	m := hwtest.New(t, theProduct(t).disk(), hwtest.Options{Forward: []int{80}})
	if err := os.Truncate(m.Disk, size); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(`data partition grown`, bootTime)
	m.Expect(readyPattern, bootTime)
	space, err := call(m, "GET", "/space", "")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := strconv.ParseInt(space, 10, 64); err != nil || n < size*8/10 {
		t.Errorf("the data volume has %s bytes (%v) of a disk of %d", space, err, int64(size))
	}
	store(t, m, "large", strings.Repeat("0123456789abcdef", 4<<20/16))
	m.PowerButton(bootTime)
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	if out := tool(t, "sgdisk", "-v", m.Disk); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk -v after growing: %s", out)
	}
}

// expectClosed waits for the recovery prompt and checks that no volume was
// opened on the way to it.
func expectClosed(t *testing.T, m *hwtest.Machine) {
	t.Helper()
	m.Expect(promptPattern, bootTime)
	if strings.Contains(m.Console(), openPattern) {
		t.Error("a volume was opened")
	}
}

// expectRefused checks that for a while after the boot began nothing is opened
// and the appliance does not come up; want is what the console says instead.
func expectRefused(t *testing.T, m *hwtest.Machine, want string) {
	t.Helper()
	m.Expect(want, bootTime)
	time.Sleep(5 * time.Second)
	for _, bad := range []string{openPattern, "ready name="} {
		if strings.Contains(m.Console(), bad) {
			t.Errorf("the console says %q", bad)
		}
	}
}

func TestOtherTPM(t *testing.T) {
	t.Parallel()
	m, box := aBox(t, true)
	if err := m.ReplaceTPM(hwtest.TPM20); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	expectClosed(t, m)
	if !strings.Contains(m.Console(), "sealed by another TPM") {
		t.Error("the prompt does not say that the TPM is another")
	}
	for _, attempt := range []string{"", "sh", "/bin/sh", "\x03", "\x1a", strings.Repeat("A", 5000), strings.Repeat("cbdefghi-", 7) + "cbdefghi"} {
		m.Send(attempt + "\n")
		m.Expect(promptPattern, bootTime)
	}
	if strings.Contains(m.Console(), openPattern) {
		t.Fatal("a wrong key opened a volume")
	}
	m.Send(strings.ToUpper(strings.ReplaceAll(box.recovery, "-", " ")) + "\n") // sloppy typing
	m.Expect(`opened with the recovery key`, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
	if s := statusIn(t, m.Console()); s.Volumes[0].Method != "recovery" || len(s.Problems) == 0 {
		t.Errorf("status hides that the recovery key was used: %+v", s)
	}
	// The registers are the same and the TPM is not; it is sealed to all the same (F37).
	m.Expect(`repaired what="sealed to the present state`, bootTime)
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
}

func TestTPMCleared(t *testing.T) {
	t.Parallel()
	m, box := aBox(t, true)
	if err := m.ClearTPM(); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	expectClosed(t, m)
	m.Send(box.recovery + "\n")
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
}

func TestTPMAbsent(t *testing.T) {
	t.Parallel()
	m, box := aBox(t, true)
	m.RemoveTPM()
	m.PowerOn()
	expectClosed(t, m)
	m.Send(box.recovery + "\n")
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
	text := wantDiagnosis(t, m, false, map[string]agent.Verdict{
		"tpm": agent.Bad, "tpm-self-test": agent.Unknown, "sha256-bank": agent.Unknown, "registers": agent.Unknown, "secure-boot": agent.OK,
	})
	if !strings.Contains(text, "enable the TPM (PTT, fTPM, Security Device) in the firmware setup") || !strings.Contains(text, "\nNOT FIT for policy standard\n") {
		t.Errorf("doctor says:\n%s", text)
	}
	m.PowerCut()
	m.PutTPM()
	m.PowerOn()
	m.Expect(tpmPattern, bootTime) // nothing was spoilt
}

func TestTPMWithoutSHA256Bank(t *testing.T) {
	t.Parallel()
	m := hwtest.New(t, theProduct(t).disk(), hwtest.Options{TPM: hwtest.TPMWithoutSHA256})
	m.PowerOn()
	expectRefused(t, m, `none is made: .*SHA-256 bank is not enabled`)
}

func TestTPMAbsentAtFirstBoot(t *testing.T) {
	t.Parallel()
	m := hwtest.New(t, theProduct(t).disk(), hwtest.Options{TPM: hwtest.TPMAbsent})
	m.PowerOn()
	expectRefused(t, m, `none is made: .*no TPM found`)
}
