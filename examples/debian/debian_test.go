package debian_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
)

const (
	bootTime  = 4 * time.Minute
	redisPort = 6379
	probePort = 80
	// guestHost is this machine, seen from the box.
	guestHost = "10.0.2.2"
	agentPath = "/usr/lib/holdfast/holdfast-agent"
)

// redis sends one inline command and returns the first line of the answer.
func redis(m *hwtest.Machine, command string) (string, error) {
	conn, err := net.DialTimeout("tcp", m.Address(redisPort), 10*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(conn, "%s\r\n", command); err != nil {
		return "", err
	}
	in := bufio.NewReader(conn)
	line, err := in.ReadString('\n')
	if strings.HasPrefix(line, "$") && err == nil { // a bulk string follows its length
		line, err = in.ReadString('\n')
	}
	return strings.TrimSpace(line), err
}

// run runs a program in the box, as a person who may do that would. code is -1 when
// the box was not reached.
func run(m *hwtest.Machine, argv ...string) (code int, out string) {
	resp, err := (&http.Client{Timeout: 3 * bootTime}).Post("http://"+m.Address(probePort)+"/run?"+url.Values{"arg": argv}.Encode(), "", nil)
	if err != nil {
		return -1, err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return -1, err.Error()
	}
	line, out, _ := strings.Cut(string(text), "\n")
	if code, err = strconv.Atoi(line); err != nil {
		return -1, string(text)
	}
	return code, out
}

// vendor has the example's releases, and the server they come from.
type vendor struct {
	t         *testing.T
	dir, repo string
	url       string
	encrypted bool // its releases have the slots be encrypted
	firmware  *hwtest.SecureBootKeys
}

func newVendor(t *testing.T) *vendor {
	t.Helper()
	v := &vendor{t: t, dir: t.TempDir(), firmware: &hwtest.SecureBootKeys{}}
	v.repo = filepath.Join(v.dir, "repo")
	v.holdfast("repo", "init", v.repo)
	server := httptest.NewServer(http.FileServer(http.Dir(v.repo)))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	v.url = "http://" + guestHost + ":" + u.Port()
	k, err := keys.Load("../../build/keys")
	if err != nil {
		t.Fatal(err)
	}
	for name, into := range map[string]*[]byte{keys.PK: &v.firmware.PK, keys.KEK: &v.firmware.KEK, keys.DB: &v.firmware.DB} {
		if *into, err = k.SignatureList(name); err != nil {
			t.Fatal(err)
		}
	}
	probe := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(v.dir, "probe/usr/bin/probe"), "../../hwtest/testdata/probe")
	probe.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := probe.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, msg)
	}
	return v
}

func (v *vendor) holdfast(args ...string) {
	v.t.Helper()
	if msg, err := exec.Command("../../build/bin/holdfast", args...).CombinedOutput(); err != nil {
		v.t.Fatalf("holdfast %s (run make inputs first): %v\n%s", strings.Join(args, " "), err, msg)
	}
}

// probeUnit gives the test a hand in a box that nobody can log in to.
const probeUnit = `
  - path: etc/systemd/system/probe.service
    mode: "0644"
    contents: |
      [Service]
      ExecStart=/usr/bin/probe
  - {path: etc/systemd/system/multi-user.target.wants/probe.service, symlink: ../probe.service}
`

// build makes a release of the example that takes updates. change edits the spec.
func (v *vendor) build(version string, change ...string) (out string) {
	v.t.Helper()
	text, err := os.ReadFile("appliance.yaml")
	if err != nil {
		v.t.Fatal(err)
	}
	folder, err := filepath.Abs("../../build")
	if err != nil {
		v.t.Fatal(err)
	}
	edit := append([]string{
		"../../build", folder, "version: 1.0.0", "version: " + version,
		"\nhandoff:", "\n  - dir:" + filepath.Join(v.dir, "probe") + "\n\nhandoff:", "\nfiles:\n", "\nfiles:" + probeUnit,
	}, change...)
	if v.encrypted {
		edit = append(edit, "  slot: 512MiB\n", "  slot: 512MiB\n  encrypt_slots: true\n")
	}
	for i := 0; i < len(edit); i += 2 {
		if !strings.Contains(string(text), edit[i]) {
			v.t.Fatalf("appliance.yaml has no %q", edit[i])
		}
	}
	spec := strings.NewReplacer(edit...).Replace(string(text)) +
		fmt.Sprintf("\nupdate: {root: %s, url: %q}\n", filepath.Join(v.repo, "metadata/1.root.json"), v.url)
	path := filepath.Join(v.dir, version+".yaml")
	if err := os.WriteFile(path, []byte(spec), 0o600); err != nil {
		v.t.Fatal(err)
	}
	out = filepath.Join(v.dir, version)
	v.holdfast("build", path, "-o", out)
	return out
}

// updates is what `holdfast-agent update status` says in the box.
func updates(t *testing.T, m *hwtest.Machine) (s agent.UpdateStatus) {
	t.Helper()
	code, out := run(m, agentPath, "update", "status", "--json")
	if i := strings.IndexByte(out, '{'); code != 0 || i < 0 {
		t.Fatalf("update status: %d, %s", code, out)
	} else if err := json.Unmarshal([]byte(out[i:]), &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return s
}

// restart presses the power button and switches the box on again.
func restart(m *hwtest.Machine) {
	m.PowerButton(bootTime) // logind sees it
	m.PowerOn()
}

func wantPaid(t *testing.T, m *hwtest.Machine, when string) {
	t.Helper()
	if got, err := redis(m, "GET customer:42"); err != nil || got != "paid" {
		t.Errorf("GET %s: %q, %v", when, got, err)
	}
}

// TestHandOff: systemd has the machine, and does with the agent's commands what the
// agent does elsewhere. In the campaign the slots are encrypted, which takes minutes
// under emulation: the root's mappings stay when systemd takes over, updates are written
// encrypted beside it, and falling back is to such a slot.
func TestHandOff(t *testing.T) {
	v := newVendor(t)
	v.encrypted = os.Getenv("HOLDFAST_CAMPAIGN") == "1"
	m := hwtest.Boot(t, filepath.Join(v.build("1.0.0"), build.RawName), hwtest.Options{SecureBoot: v.firmware, Forward: []int{redisPort, probePort}})
	if v.encrypted {
		took := m.Expect(`slot encrypted slot=a ms=(\d+)`, bootTime)[1]
		t.Logf("the root was encrypted in place in %s ms, under emulation", took)
	}
	m.Expect(`handing over init=/sbin/init`, bootTime)
	m.Expect(`"name":"debian-box".*"method":"provisioned"`, bootTime)
	wantSlots(t, m, v.encrypted, "a")
	if got, err := redis(m, "SET customer:42 paid"); err != nil || got != "+OK" {
		t.Fatalf("SET: %q, %v", got, err)
	}
	updateByHand(t, m, v)
	m.PowerCut()
	m.PowerOn()
	m.Expect(`starting name=debian-box version=2.0.0`, bootTime)
	m.Expect(`"name":"debian-box".*"method":"tpm"`, bootTime)
	wantPaid(t, m, "after the power cut")
	wantSlots(t, m, v.encrypted, "a", "b")
	for _, attempt := range []string{"\n", "root\n", "\x03", "\n\n"} {
		m.Send(attempt)
	}
	brokenFromStick(t, m, v)
	endOfLife(t, m, v)
	for _, bad := range []string{"login:", "Password:", "# ", "sh-5", "emergency mode", "EXT4-fs error"} {
		if strings.Contains(m.Console(), bad) {
			t.Errorf("the console says %q", bad)
		}
	}
}

// wantSlots wants `holdfast-agent status`, a process under systemd, to find these slots.
func wantSlots(t *testing.T, m *hwtest.Machine, encrypted bool, want ...string) {
	t.Helper()
	code, out := run(m, agentPath, "status", "--json")
	var s agent.Status
	if i := strings.IndexByte(out, '{'); code != 0 || i < 0 {
		t.Fatalf("status: %d, %s", code, out)
	} else if err := json.Unmarshal([]byte(out[i:]), &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got []string
	for _, slot := range s.Slots {
		got = append(got, slot.Slot)
		if slot.Encrypted != encrypted {
			t.Errorf("slot %s is encrypted: %v", slot.Slot, slot.Encrypted)
		}
	}
	slices.Sort(got)
	if s.EncryptSlots != encrypted || !slices.Equal(got, want) {
		t.Errorf("slots %q, want %q; to be encrypted: %v", got, want, s.EncryptSlots)
	}
}

// updateByHand installs 2.0.0 from the repository, with others getting in the way.
func updateByHand(t *testing.T, m *hwtest.Machine, v *vendor) {
	v.holdfast("repo", "add", v.repo, v.build("2.0.0"))
	if s := updates(t, m); s.Version != "1.0.0" || s.Slot != "a" || s.Pending != nil {
		t.Errorf("status of the first release: %+v", s)
	}
	if code, out := run(m, agentPath, "update", "check"); code != 0 || !strings.Contains(out, "available: 2.0.0") {
		t.Errorf("update check: %d, %s", code, out)
	}
	done := make(chan string, 1)
	go func() {
		code, out := run(m, agentPath, "update", "apply")
		done <- fmt.Sprintf("%d\n%s", code, out)
	}()
	for deadline := time.Now().Add(bootTime); updates(t, m).Doing == ""; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the installation does not begin")
		}
	}
	if code, out := run(m, agentPath, "update", "apply"); code != 1 || !strings.Contains(out, "another update is under way") {
		t.Errorf("a second update apply: %d, %s", code, out)
	}
	if out := <-done; !strings.HasPrefix(out, "0\n") {
		t.Fatalf("update apply: %s", out)
	}
	if s := updates(t, m); s.Pending == nil || s.Pending.Version != "2.0.0" || s.Doing != "" {
		t.Errorf("status after apply: %+v", s)
	}
	restart(m)
	m.Expect(`starting name=debian-box version=2.0.0`, bootTime)
	m.Expect(`volume open name=data method=tpm`, bootTime)
	m.Expect(`"name":"debian-box".*"method":"tpm"`, bootTime)
	wantPaid(t, m, "in the new release")
	for deadline := time.Now().Add(bootTime); updates(t, m).Pending != nil; time.Sleep(time.Second) {
		if time.Now().After(deadline) {
			t.Fatalf("2.0.0 is not blessed: %+v", updates(t, m))
		}
	}
	s := updates(t, m)
	if n := len(s.Journal); n != 2 || s.Journal[0].Result != update.Applied || s.Journal[1].Result != update.Committed || s.Version != "2.0.0" {
		t.Errorf("status after the trial: %+v", s)
	}
	if code, out := run(m, agentPath, "update", "apply"); code != 3 {
		t.Errorf("update apply with nothing new: %d, %s", code, out)
	}
	if code, out := run(m, agentPath, "reject", "not on trial"); code != 3 {
		t.Errorf("reject of a release that was blessed: %d, %s", code, out)
	}
}

// brokenFromStick installs 3.0.0, whose service does not come up, from a medium that a
// person mounts. systemd has it left, and the old release says why.
func brokenFromStick(t *testing.T, m *hwtest.Machine, v *vendor) {
	v.holdfast("repo", "add", v.repo, v.build("3.0.0", "ExecStart=/usr/bin/redis-server", "ExecStart=/bin/false"), "--rollout", "0")
	bundle, stick := filepath.Join(v.dir, "3.bundle"), filepath.Join(v.dir, "stick")
	v.holdfast("bundle", "3.0.0", "--repo", v.repo, "-o", bundle)
	for _, argv := range [][]string{
		{"truncate", "-s", "512M", stick}, {"mkfs.vfat", "-F", "32", stick}, {"mcopy", "-i", stick, bundle, "::RELEASE.BUNDLE"},
	} {
		if msg, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", argv[0], err, msg)
		}
	}
	if err := m.VM().Plug(stick, false); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Second) {
		code, out := run(m, "/bin/mount", "-o", "ro,nosuid,nodev,noexec", "/dev/vdb", "/mnt")
		if code == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("mount: %d, %s", code, out)
		}
	}
	if code, out := run(m, agentPath, "update", "apply", "/mnt/release.bundle"); code != 0 {
		t.Fatalf("update apply of a bundle: %d, %s", code, out)
	}
	m.PowerButton(bootTime)
	lastTry(t, m)
	m.PowerOn()
	m.Expect(`starting name=debian-box version=3.0.0`, bootTime)
	m.Expect(`starting name=debian-box version=2.0.0`, 2*bootTime)
	m.Expect(`"name":"debian-box".*"method":"tpm"`, bootTime)
	wantPaid(t, m, "after falling back")
	s := updates(t, m)
	if len(s.Failed) != 1 || s.Failed[0].Version != "3.0.0" || !strings.Contains(s.Failed[0].Reason, "redis-server is not up") || s.Version != "2.0.0" || s.Pending != nil {
		t.Errorf("status after falling back: %+v", s)
	}
	if n := len(s.Journal); n == 0 || s.Journal[n-1].Result != update.FellBack {
		t.Errorf("journal after falling back: %+v", s.Journal)
	}
	if code, out := run(m, agentPath, "update", "check"); code != 3 {
		t.Errorf("update check after falling back: %d, %s", code, out)
	}
}

// endOfLife destroys the keys, and has the vendor judge the proof. He has never had an
// answer of the box, so whose TPM signed stays unknown.
func endOfLife(t *testing.T, m *hwtest.Machine, v *vendor) {
	const in = "/run/proof.json"
	if code, out := run(m, agentPath, "decommission", "--yes", "--proof", in); code != 0 || strings.Contains(out, "warning") {
		t.Errorf("decommission: %d, %s", code, out)
	}
	code, text := run(m, "/bin/cat", in)
	proof := filepath.Join(v.dir, "proof.json")
	if err := os.WriteFile(proof, []byte(text), 0o600); code != 0 || err != nil {
		t.Fatalf("read the proof: %d, %v", code, err)
	}
	t.Logf("a proof of %d bytes", len(text))
	judge := exec.Command("../../build/bin/holdfast", "attest", "erasure", proof, "--release", filepath.Join(v.dir, "2.0.0"),
		"--keys", "../../build/keys", "--software-tpm", "--first-contact", "--accept", "ek,ak")
	out, err := judge.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "decommission of debian-box") || !strings.Contains(string(out), ": PASS\n") {
		t.Errorf("holdfast attest erasure: %v\n%s", err, out)
	}
}

// lastTry leaves the release on trial one boot, which is two boots less to wait for.
func lastTry(t *testing.T, m *hwtest.Machine) {
	t.Helper()
	dev, err := partition.OpenFile(m.Disk)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	d, err := partition.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Arm(partition.SlotA, 1); err != nil {
		t.Fatal(err)
	}
}
