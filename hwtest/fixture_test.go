package hwtest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
)

// bootTime is generous: two emulated boots may share a busy machine.
const bootTime = 4 * time.Minute

const efiFolder = "/usr/lib/systemd/boot/efi"

// inputs is the folder `make inputs` fills.
func inputs(t *testing.T) string {
	dir := os.Getenv("HOLDFAST_INPUTS")
	if dir == "" {
		dir = "../build/inputs"
	}
	if _, err := os.Stat(filepath.Join(dir, "linux-image.deb")); err != nil {
		t.Fatalf("the inputs of the appliance under test are missing; run make inputs: %v", err)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

// probeSpec is the appliance under test. The onboot container prints what
// `holdfast-agent status --json` says inside the box.
const probeSpec = `
name: probe
version: %s
epoch: 2026-11-01T00:00:00Z
keys: keys
kernel:
  image: deb:%s/linux-image.deb
  cmdline: console=ttyS0 quiet loglevel=4
  modules: [virtio_net, virtio_blk]
network:
  - {name: "*", dhcp: true}
onboot:
  - name: status
    image: dir:probe
    command: [/usr/lib/holdfast/holdfast-agent, status, --json]
    readonly: true
    binds: ["/usr/lib/holdfast:/usr/lib/holdfast:ro", "/run/holdfast:/run/holdfast"]
services:
  - name: web
    image: dir:probe
    command: [/probe]
    capabilities: [CAP_NET_BIND_SERVICE]
    readonly: true
    runtime: {mkdir: [/data/records]}
    devices: [{path: all, type: a}] # for doctor, as are /dev and /sys/firmware
    maskedPaths: [/proc/kcore]
    binds: ["/data/records:/data", "/sys/kernel/security:/sys/kernel/security:ro", "/run/holdfast:/run/holdfast", "/dev:/dev",
      "/sys/firmware/efi/efivars:/sys/firmware/efi/efivars:ro", "/usr/lib/holdfast:/usr/lib/holdfast:ro"]
    health: {http: "http://127.0.0.1/health", interval: 2s, start: 120s}
onshutdown:
  - name: farewell
    image: dir:probe
    command: [/usr/lib/holdfast/holdfast-agent, version]
    readonly: true
    binds: ["/usr/lib/holdfast:/usr/lib/holdfast:ro"]
update: {root: root.json, url: "%s", write_back: true}
disk:
  size: 960MiB # a volume of an odd size
  esp: 128MiB
  slot: 64MiB
  data: [{name: data, mount: /data}]
`

// product is a built appliance with its keys.
type product struct {
	dir      string
	keys     *keys.Keys
	manifest *image.Manifest
}

func (p *product) disk() string    { return filepath.Join(p.dir, "out", build.RawName) }
func (p *product) release() string { return filepath.Join(p.dir, "out", build.ReleaseName) }

// buildProduct makes keys and an appliance in a folder of its own.
func buildProduct(t *testing.T, dir, version string) *product {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	k, err := keys.Create(filepath.Join(dir, "keys"), keys.Config{Organization: "Test vendor", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return buildRelease(t, dir, k, version, nil)
}

// buildRelease builds the appliance with these keys; change, if not nil, edits
// its spec.
func buildRelease(t *testing.T, dir string, k *keys.Keys, version string, change func(*spec.Spec)) *product {
	t.Helper()
	in := inputs(t)
	goBuild(t, filepath.Join(dir, "probe/probe"), "./testdata/probe")
	goBuild(t, filepath.Join(dir, "agent"), "../cmd/holdfast-agent")
	web.rootJSON(t, filepath.Join(dir, "root.json"))
	s, err := spec.Parse("probe.yaml", fmt.Appendf(nil, probeSpec, version, in, web.address()))
	if err == nil {
		err = s.Validate()
	}
	if err != nil {
		t.Fatal(err)
	}
	s.ApplyDefaults()
	if change != nil {
		change(s)
	}
	stub, err := os.ReadFile(filepath.Join(efiFolder, "linuxx64.efi.stub"))
	if err != nil {
		t.Fatalf("install Debian's package systemd-boot-efi: %v", err)
	}
	m, err := build.Build(context.Background(), s, build.Inputs{
		Dir: dir, Keys: k, Agent: file(t, filepath.Join(dir, "agent")), Stub: stub,
		Loader:  file(t, filepath.Join(efiFolder, "systemd-bootx64.efi")),
		Runtime: file(t, filepath.Join(in, "../bin/runc")),
	}, filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	return &product{dir: dir, keys: k, manifest: m}
}

func goBuild(t *testing.T, out, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, msg)
	}
}

func file(t *testing.T, path string) tree.File {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return tree.File{Path: path, SizeBytes: info.Size()}
}

// firmwareKeys are the product's keys as the factory enrols them.
func (p *product) firmwareKeys(t *testing.T) *hwtest.SecureBootKeys {
	t.Helper()
	lists := &hwtest.SecureBootKeys{}
	for name, into := range map[string]*[]byte{keys.PK: &lists.PK, keys.KEK: &lists.KEK, keys.DB: &lists.DB} {
		b, err := p.keys.SignatureList(name)
		if err != nil {
			t.Fatal(err)
		}
		*into = b
	}
	return lists
}

// shared is what many tests begin with; it is made once and copied.
type shared struct {
	sync.Once
	*product
	secure, open provisioned // boxes with Secure Boot on and off
}

var fixture shared

// provisioned is a box after its first boot, off, with one record stored.
type provisioned struct {
	once     sync.Once
	box      *hwtest.Box
	recovery string
	console  string // of the first boot
	failed   bool
}

const (
	recoveryPattern = `\b([cbdefghijklnrtuv]{8}(?:-[cbdefghijklnrtuv]{8}){7})\b`
	readyPattern    = `holdfast [\d.]+: ready name=probe`
	tpmPattern      = `volume open name=data method=tpm`
	promptPattern   = `recovery key \(or: reboot, poweroff\): `
	openPattern     = `volume open name=`
)

// theProduct is the appliance all tests share; TestMain removes its folder.
func theProduct(t *testing.T) *product {
	t.Helper()
	fixture.Do(func() { fixture.product = buildProduct(t, filepath.Join(scratch, "product"), "1.0.0") })
	if fixture.product == nil {
		t.Fatal("the appliance under test could not be built; see the first test that failed")
	}
	return fixture.product
}

// scratch outlives single tests.
var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "hwtest"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	web.close()
	os.RemoveAll(scratch)
	os.Exit(code)
}

// aBox returns a copy of the provisioned box, still off.
func aBox(t *testing.T, secureBoot bool) (*hwtest.Machine, *provisioned) {
	t.Helper()
	p := theProduct(t)
	from, name, o := &fixture.open, "open", hwtest.Options{Forward: []int{80}}
	if secureBoot {
		from, name = &fixture.secure, "secure"
		o.SecureBoot = p.firmwareKeys(t)
	}
	from.once.Do(func() {
		from.failed = true // unless it comes to the end
		from.provision(t, p, filepath.Join(scratch, name), o)
		from.failed = false
	})
	if from.failed {
		t.Fatal("the box's first boot failed; see the first test that failed")
	}
	m := from.box.Copy(t)
	t.Cleanup(func() {
		if m.VM() != nil && strings.Contains(m.Console(), "EXT4-fs error (device dm-") {
			t.Errorf("the kernel found damage in the data volume's file system:\n%s", m.Console())
		}
	})
	return m, from
}

func (f *provisioned) provision(t *testing.T, p *product, dir string, o hwtest.Options) {
	m := hwtest.New(t, p.disk(), o)
	m.PowerOn()
	f.recovery = m.Expect(recoveryPattern, bootTime)[1]
	m.Expect(`holdfast [\d.]+: provisioned`, bootTime)
	m.Expect(readyPattern, bootTime)
	store(t, m, "first", "kept")
	if l := waitLoader(t, m); l == nil || l.NoEntry != "" || len(l.ReleaseEntries) != 1 {
		t.Fatalf("status of the boot loader %+v", l)
	}
	m.PowerButton(bootTime)
	f.console = m.Console()
	// The test's folder goes with the test; the box moves out of it.
	if err := os.Rename(filepath.Dir(m.Dir), dir); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, filepath.Base(m.Disk))
	var err error
	if f.box, err = hwtest.NewBox(filepath.Join(dir, "box"), disk, o); err != nil {
		t.Fatal(err)
	}
}

// call asks the service in the box.
func call(m *hwtest.Machine, method, path, body string) (string, error) {
	req, err := http.NewRequest(method, "http://"+m.Address(80)+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := (&http.Client{Timeout: bootTime}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", errors.New(resp.Status + ": " + string(bytes.TrimSpace(text)))
	}
	return string(text), nil
}

func store(t *testing.T, m *hwtest.Machine, name, text string) {
	t.Helper()
	if _, err := call(m, http.MethodPut, "/record/"+name, text); err != nil {
		t.Fatalf("store record %s: %v", name, err)
	}
}

func wantRecord(t *testing.T, m *hwtest.Machine, name, want string) {
	t.Helper()
	got, err := call(m, http.MethodGet, "/record/"+name, "")
	if err != nil || got != want {
		t.Errorf("record %s is %q (%v), want %q", name, got, err, want)
	}
}

// agentTool runs a verb of the agent's program in the service's container, and gives its
// exit code and what it printed.
func agentTool(t *testing.T, m *hwtest.Machine, args ...string) (code int, text string) {
	t.Helper()
	argv := url.Values{"arg": append([]string{"/usr/lib/holdfast/holdfast-agent"}, args...)}
	answer, err := call(m, http.MethodPost, "/run?"+argv.Encode(), "")
	if err != nil {
		t.Fatalf("holdfast-agent %s: %v", strings.Join(args, " "), err)
	}
	first, text, _ := strings.Cut(answer, "\n")
	if code, err = strconv.Atoi(first); err != nil {
		t.Fatalf("holdfast-agent %s: %q", strings.Join(args, " "), answer)
	}
	return code, text
}

// wantDiagnosis has doctor judge the box: fit or not, by its exit code too, with these
// verdicts, and a remedy for each that is not ok. What it says for people is returned.
func wantDiagnosis(t *testing.T, m *hwtest.Machine, fit bool, verdicts map[string]agent.Verdict) string {
	t.Helper()
	wantCode := 1
	if fit {
		wantCode = 0
	}
	code, text := agentTool(t, m, "doctor", "--json")
	var d agent.Diagnosis
	if err := json.NewDecoder(strings.NewReader(text)).Decode(&d); err != nil {
		t.Fatalf("doctor: %v: %s", err, text)
	}
	if code != wantCode || d.Fit != fit {
		t.Errorf("doctor ends with %d, fit %v; want %d, %v", code, d.Fit, wantCode, fit)
	}
	for _, c := range d.Checks {
		if want, ok := verdicts[c.Name]; ok && c.Verdict != want {
			t.Errorf("doctor says %s of %s, not %s: %s", c.Verdict, c.Name, want, c.Seen)
		} else if ok && want != agent.OK && want != agent.Unknown && c.Remedy == "" {
			t.Errorf("doctor has no remedy for %s: %s", c.Name, c.Seen)
		}
		delete(verdicts, c.Name)
	}
	for name := range verdicts {
		t.Errorf("doctor does not look at %s", name)
	}
	code, text = agentTool(t, m, "doctor")
	if code != wantCode {
		t.Errorf("doctor for people ends with %d", code)
	}
	return text
}

var recoveryRegexp = regexp.MustCompile(recoveryPattern)

// luksChecksum puts the right checksum into a header copy (LUKS2 On-Disk Format
// §2.1: SHA-256 over binary header and JSON area, the field zeroed).
func luksChecksum(b []byte) []byte {
	const offset, size = 0x1c0, 64
	clear(b[offset : offset+size])
	sum := sha256.Sum256(b)
	copy(b[offset:], sum[:])
	return b
}
