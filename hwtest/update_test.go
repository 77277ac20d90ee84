package hwtest_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
)

// webServer is the vendor's web server: below /NAME/ lies the repository of that
// name. All have the same keys, and so the same first root.
type webServer struct {
	once   sync.Once
	mu     sync.Mutex // one holdfast repo at a time
	server *httptest.Server
	dir    string
}

var web webServer

// guestHost is this machine, seen from the box.
const guestHost = "10.0.2.2"

func (w *webServer) start() {
	w.once.Do(func() {
		w.dir = filepath.Join(scratch, "web")
		w.server = httptest.NewServer(http.FileServer(http.Dir(w.dir)))
	})
}

// address is the URL of the repository that the spec names.
func (w *webServer) address() string {
	w.start()
	u, err := url.Parse(w.server.URL)
	if err != nil {
		panic(err)
	}
	return "http://" + guestHost + ":" + u.Port() + "/main"
}

func (w *webServer) close() {
	if w.server != nil {
		w.server.Close()
	}
}

// holdfast runs the operator's tool.
func (w *webServer) holdfast(t *testing.T, args ...string) []byte {
	t.Helper()
	w.start()
	bin := filepath.Join(scratch, "holdfast")
	if _, err := os.Stat(bin); err != nil {
		goBuild(t, bin, "../cmd/holdfast")
	}
	cmd := exec.Command(bin, args...)
	out, err := cmd.Output()
	if err != nil {
		var said []byte
		if e, ok := err.(*exec.ExitError); ok {
			said = e.Stderr
		}
		t.Fatalf("holdfast %s: %v\n%s%s", strings.Join(args, " "), err, said, out)
	}
	return out
}

// repository returns the folder of a repository, made when it is not there.
func (w *webServer) repository(t *testing.T) string {
	t.Helper()
	w.start()
	dir := filepath.Join(w.dir, "main")
	if _, err := os.Stat(dir); err != nil {
		w.holdfast(t, "repo", "init", dir)
	}
	return dir
}

// rootJSON writes what a spec's update section names.
func (w *webServer) rootJSON(t *testing.T, path string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := os.WriteFile(path, w.holdfast(t, "repo", "root", w.repository(t)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// publish adds a release for the part of the fleet that asks for it by version: the
// tests share the repository, and the automatic check must find nothing.
func (w *webServer) publish(t *testing.T, p *product) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holdfast(t, "repo", "add", w.repository(t), filepath.Join(p.dir, "out"), "--rollout", "0")
}

// bundle writes one release to a file.
func (w *webServer) bundle(t *testing.T, version, out string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holdfast(t, "bundle", version, "--repo", w.repository(t), "-o", out)
}

// nextRelease builds and publishes a release of the shared product.
func nextRelease(t *testing.T, version string, change func(*spec.Spec)) *product {
	t.Helper()
	p := buildRelease(t, t.TempDir(), theProduct(t).keys, version, change)
	web.publish(t, p)
	return p
}

// updateStatus asks the agent in the box.
func updateStatus(t *testing.T, m *hwtest.Machine) agent.UpdateStatus {
	t.Helper()
	text, err := call(m, http.MethodGet, "/v1/update", "")
	if err != nil {
		t.Fatal(err)
	}
	var s agent.UpdateStatus
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// The bars for the agent's memory: at rest, and over an installation.
const (
	maxResidentBytes = 40e6
	maxPeakBytes     = 64e6
)

// checkMemory asks the agent in the box for its memory.
func checkMemory(t *testing.T, m *hwtest.Machine, when string) {
	t.Helper()
	text, err := call(m, http.MethodGet, "/v1/status", "")
	if err != nil {
		t.Fatal(err)
	}
	var s agent.Status
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	t.Logf("agent's memory %s: %.1f MB, peak %.1f MB", when, float64(s.ResidentBytes)/1e6, float64(s.PeakBytes)/1e6)
	if s.ResidentBytes == 0 || s.ResidentBytes > maxResidentBytes && when == "at rest" || s.PeakBytes > maxPeakBytes {
		t.Errorf("the agent has %d bytes %s, at most %d at rest and %d over an installation are allowed", s.ResidentBytes, when, int64(maxResidentBytes), int64(maxPeakBytes))
	}
}

// apply has the box install a version from the spec's repository. While it asks there
// by itself, it is busy.
func apply(m *hwtest.Machine, version string) (err error) {
	for range 60 {
		_, err = call(m, http.MethodPost, "/v1/update/apply?version="+version, "")
		if err == nil || !strings.Contains(err.Error(), "another update is under way") {
			return err
		}
		time.Sleep(time.Second)
	}
	return err
}

func reboot(t *testing.T, m *hwtest.Machine) {
	t.Helper()
	if _, err := call(m, http.MethodPost, "/v1/power/reboot", ""); err != nil {
		t.Logf("answer to reboot: %v", err) // it may be cut off by what was asked for
	}
}

// TestUpdates: version 2 over HTTP, version 3 that never gets well, version 4 from a stick.
func TestUpdates(t *testing.T) {
	t.Parallel()
	nextRelease(t, "2.0.0", nil)
	nextRelease(t, "3.0.0", func(s *spec.Spec) { s.Services[0].Command = []string{"/probe-that-is-missing"} })
	nextRelease(t, "4.0.0", func(s *spec.Spec) { s.Update.URL = "" }) // what other tests publish meanwhile would make the stick an old one
	m, _ := aBox(t, true)
	m.PowerOn()
	m.Expect(readyPattern, bootTime)
	checkMemory(t, m, "at rest")
	if err := apply(m, "2.0.0"); err != nil {
		t.Fatal(err)
	}
	checkMemory(t, m, "after an installation")
	s := updateStatus(t, m)
	if s.Pending == nil || s.Pending.Version != "2.0.0" || s.Pending.Slot != "b" {
		t.Fatalf("pending is %+v", s.Pending)
	}
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(`blessed slot=b version=2.0.0`, bootTime)
	wantRecord(t, m, "first", "kept")
	s = updateStatus(t, m)
	if n := len(s.Journal); s.Pending != nil || n < 2 || s.Journal[n-1].Result != update.Committed || s.Journal[n-2].Result != update.Applied {
		t.Errorf("after the trial: pending %+v, journal %+v", s.Pending, s.Journal)
	}
	t.Logf("2.0.0 took %d bytes of %d", s.Journal[len(s.Journal)-2].FetchedBytes, theProduct(t).manifest.Root.SizeBytes)

	t.Run("a release that never gets well is left", func(t *testing.T) {
		if err := apply(m, "3.0.0"); err != nil {
			t.Fatal(err)
		}
		reboot(t, m)
		m.Expect(`trial of 3.0.0 in slot a failed`, bootTime)
		m.Expect(`fell back version=3.0.0`, 4*bootTime)
		m.Expect(`ready name=probe version=2.0.0 slot=b`, bootTime)
		wantRecord(t, m, "first", "kept")
		s := updateStatus(t, m)
		if len(s.Failed) != 1 || s.Failed[0].Version != "3.0.0" || !strings.Contains(s.Failed[0].Reason, "web is") || s.Version != "2.0.0" {
			t.Errorf("failures: %+v", s.Failed)
		}
	})

	t.Run("a stick", func(t *testing.T) {
		dir := t.TempDir()
		web.bundle(t, "4.0.0", filepath.Join(dir, "probe-4.bundle"))
		stick := filepath.Join(dir, "stick.img")
		tool(t, "truncate", "-s", "256M", stick)
		tool(t, "mkfs.vfat", "-F", "32", stick)
		tool(t, "mcopy", "-i", stick, filepath.Join(dir, "probe-4.bundle"), "::PROBE-4.BUNDLE")
		if err := m.VM().Plug(stick, false); err != nil {
			t.Fatal(err)
		}
		m.Expect(`installed version=4.0.0 slot=a from=medium:`, bootTime)
		m.Expect(`blessed slot=a version=4.0.0`, bootTime) // it restarts by itself, the stick left in
		wantRecord(t, m, "first", "kept")
		// Left in, it is looked at once more and has nothing new.
		m.Expect(`not installed from=medium:.*nothing to install`, bootTime)
		m.PowerButton(bootTime)
		if out := tool(t, "mdir", "-b", "-i", stick, "::"); !strings.Contains(out, "holdfast-result-probe-") {
			t.Errorf("no outcome on the stick:\n%s", out)
		}
		tool(t, "fsck.vfat", "-n", stick)
	})
}

// TestPowerCutsDuringUpdate pulls the plug at a random moment of an installation.
// Whatever was cut, the box boots a good slot and opens its data, and the update
// completes at the next try.
func TestPowerCutsDuringUpdate(t *testing.T) {
	t.Parallel()
	cuts, err := strconv.Atoi(cmp.Or(os.Getenv("HOLDFAST_CUTS"), "2"))
	if err != nil {
		t.Fatal(err)
	}
	seed, err := strconv.ParseUint(cmp.Or(os.Getenv("HOLDFAST_SEED"), "1"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	nextRelease(t, "2.2.0", func(s *spec.Spec) { s.Hostname = "changed" })
	for i := range cuts {
		t.Run(fmt.Sprintf("seed %d", seed+uint64(i)), func(t *testing.T) {
			t.Parallel()
			cutDuringUpdate(t, rand.New(rand.NewPCG(seed+uint64(i), 0)))
		})
	}
}

// cutSpan is about as long as an installation takes under emulation.
const cutSpan = 9 * time.Second

func cutDuringUpdate(t *testing.T, random *rand.Rand) {
	m, _ := aBox(t, true)
	m.PowerOn()
	m.Expect(readyPattern, bootTime)
	done := make(chan error, 1)
	go func() { done <- apply(m, "2.2.0") }()
	after := time.Duration(random.Int64N(int64(cutSpan)))
	select {
	case <-time.After(after):
	case err := <-done:
		t.Logf("installed before the cut: %v", err)
	}
	m.PowerCut()
	d, _ := openDisk(t, m.Disk)
	entries, err := d.Entries()
	if err != nil {
		t.Fatal(err)
	}
	good := slices.IndexFunc(entries, func(e partition.Entry) bool { return e.Slot == partition.SlotA && e.Good() })
	if good < 0 {
		t.Fatalf("slot a is not good after the cut: %+v", entries)
	}
	tool(t, "fsck.vfat", "-n", extract(t, m.Disk, "esp"))
	t.Logf("cut after %v, %d entries", after.Round(time.Millisecond), len(entries))

	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	version := m.Expect(`ready name=probe version=([\d.]+) slot=`, bootTime)[1]
	wantRecord(t, m, "first", "kept")
	if version == "1.0.0" {
		if err := apply(m, "2.2.0"); err != nil {
			t.Fatalf("the next try: %v", err)
		}
		reboot(t, m)
	}
	m.Expect(`blessed slot=b version=2.2.0`, bootTime)
	wantRecord(t, m, "first", "kept")
}
