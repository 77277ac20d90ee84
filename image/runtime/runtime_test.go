package runtime_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/runtime"
	"github.com/holdfast-os/holdfast/image/spec"
)

func service(t *testing.T, keys string) spec.Image {
	t.Helper()
	s, err := spec.Parse("t.yaml", []byte("services:\n  - name: web\n    image: web:1\n"+indent(keys)))
	if err != nil {
		t.Fatal(err)
	}
	return s.Services[0]
}

func indent(text string) string {
	if text == "" {
		return ""
	}
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ") + "\n"
}

var web = runtime.ImageConfig{Entrypoint: []string{"/web"}, Cmd: []string{"-v"}, Env: []string{"PATH=/bin", "A=1"}, WorkingDir: "/srv"}

// config runs Config and decodes the bytes strictly.
func config(t *testing.T, im spec.Image, img runtime.ImageConfig, o runtime.Options) (specs.Spec, image.Container) {
	t.Helper()
	data, entry, err := runtime.Config(im, img, o)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := runtime.Config(im, img, o)
	if err != nil || !bytes.Equal(data, again) {
		t.Fatalf("not deterministic (%v)", err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var oci specs.Spec
	if err := dec.Decode(&oci); err != nil {
		t.Fatal(err)
	}
	return oci, entry
}

func TestDefaultsGolden(t *testing.T) {
	data, entry, err := runtime.Config(service(t, ""), web, runtime.Options{})
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/default.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(data, want) {
		t.Errorf("got\n%s", data)
	}
	if !reflect.DeepEqual(entry, image.Container{Name: "web", Bundle: "/containers/services/web", Restart: "always"}) {
		t.Errorf("entry %+v", entry)
	}
}

func TestEntry(t *testing.T) {
	im := service(t, `
readonly: true
restart: never
runtime: {mkdir: [/data/web, var/x]}
binds: ["scratch:/s", "lib:/l:ro"]
health: {tcp: "127.0.0.1:80", interval: 10s, timeout: 2s, retries: 4, start: 1m}`)
	o := runtime.Options{Volumes: []spec.Volume{{Name: "scratch"}, {Name: "lib", Image: "x"}}}
	_, entry := config(t, im, web, o)
	want := image.Container{Name: "web", Bundle: "/containers/services/web", ReadOnly: true, Restart: "never",
		Mkdir:  []string{"/data/web", "/var/x", "/run/volumes/scratch"},
		Health: &image.Health{TCP: "127.0.0.1:80", IntervalSec: 10, TimeoutSec: 2, Retries: 4, StartSec: 60}}
	if !reflect.DeepEqual(entry, want) {
		t.Errorf("got  %+v\nwant %+v", entry, want)
	}
	im.Restart, im.Health = "", nil
	_, entry = config(t, im, web, runtime.Options{Section: runtime.OnBoot, Index: 7, Volumes: o.Volumes})
	if entry.Bundle != "/containers/onboot/007-web" || entry.Restart != "" {
		t.Errorf("onboot entry %+v", entry)
	}
}

func TestProcess(t *testing.T) {
	oci, _ := config(t, service(t, `
command: [/run, me]
env: [A=2, B=3]
cwd: /tmp
capabilities: [CAP_NET_BIND_SERVICE, CAP_CHOWN]
capabilities.add: [CAP_KILL]
noNewPrivileges: false
oomScoreAdj: -100
rlimits: ["nofile,10,unlimited"]`), web, runtime.Options{})
	p := oci.Process
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
	if !slices.Equal(p.Args, []string{"/run", "me"}) || !slices.Equal(p.Env, []string{"PATH=/bin", "A=2", "B=3"}) || p.Cwd != "/tmp" ||
		p.NoNewPrivileges || *p.OOMScoreAdj != -100 || p.Terminal ||
		!reflect.DeepEqual(p.Rlimits, []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 10, Hard: math.MaxUint64}}) {
		t.Errorf("process %+v", p)
	}
	want := specs.LinuxCapabilities{Bounding: caps, Effective: caps, Inheritable: caps, Permitted: caps, Ambient: caps}
	if !reflect.DeepEqual(*p.Capabilities, want) {
		t.Errorf("capabilities %+v", p.Capabilities)
	}
	oci, _ = config(t, service(t, "capabilities: [all]\nambient: []"), web, runtime.Options{})
	if got := oci.Process.Capabilities; len(got.Bounding) != 41 || got.Ambient != nil || oci.Linux.MaskedPaths != nil {
		t.Errorf("all: %d capabilities, ambient %v, masked %v", len(got.Bounding), got.Ambient, oci.Linux.MaskedPaths)
	}
	oci, _ = config(t, service(t, "capabilities: [none]\nambient: [CAP_KILL]"), web, runtime.Options{})
	if got := oci.Process.Capabilities; !slices.Equal(got.Permitted, []string{"CAP_KILL"}) {
		t.Errorf("ambient alone: %+v", got)
	}
	oci, _ = config(t, service(t, ""), runtime.ImageConfig{Cmd: []string{"x"}}, runtime.Options{})
	if oci.Process.Cwd != "/" || !strings.HasPrefix(oci.Process.Env[0], "PATH=/usr/local/sbin:") {
		t.Errorf("bare image: %+v", oci.Process)
	}
}

func TestUser(t *testing.T) {
	passwd := func() ([]byte, error) {
		return []byte("root:x:0:0:root:/:/bin/sh\n\nbroken\nweb:x:33:34::/:\nbad:x:y:z::/:\n"), nil
	}
	group := func() ([]byte, error) {
		return []byte("root:x:0:\nwww:x:34:\nssl:x:40:a,web\nlog:x:39:web\n"), nil
	}
	missing := func() ([]byte, error) { return nil, fmt.Errorf("open: %w", fs.ErrNotExist) }
	for _, c := range []struct{ keys, image, want string }{
		{"", "", "0:0 []"},
		{"", "web", "33:34 [39 40]"},
		{"", "33", "33:34 [39 40]"},
		{"", "1000", "1000:0 []"},
		{"", "1000:1001", "1000:1001 []"},
		{"", "web:ssl", "33:40 []"},
		{"", "web:", "33:34 [39 40]"},
		{"user: web", "nobody", "33:34 [39 40]"},
		{"user: web:7", "", "33:7 []"},
		{"user: \"5\"", "web", "5:0 []"},
		{"uid: 5", "web", "5:0 []"},
		{"uid: web\ngid: log", "", "33:39 []"},
		{"gid: 12", "web", "0:12 []"},
		{"user: root", "web", "0:0 []"},
		{"user: web\nadditionalGids: [www, 40, 2]", "", "33:34 [2 34 40 39]"},
		{"user: nobody", "", `container web: user "nobody" is not in the image's /etc/passwd: give its number`},
		{"uid: 1\ngid: nogroup", "", `container web: group "nogroup" is not in the image's /etc/group: give its number`},
		{"", "a b", `container web: user "a b": "a b" is neither a number nor a name`},
		{"uid: 4294967295", "", `container web: user 4294967295:0: the kernel has no such id`},
	} {
		img := web
		img.User, img.Passwd, img.Group = c.image, passwd, group
		data, _, err := runtime.Config(service(t, c.keys), img, runtime.Options{})
		got := fmt.Sprint(err)
		if err == nil {
			var oci specs.Spec
			if err := json.Unmarshal(data, &oci); err != nil {
				t.Fatal(err)
			}
			u := oci.Process.User
			got = fmt.Sprintf("%d:%d %v", u.UID, u.GID, u.AdditionalGids)
		}
		want := strings.Replace(c.want, "[2 34 40 39]", "[2 34 39 40]", 1)
		if got != want {
			t.Errorf("%q on image user %q: %s, want %s", c.keys, c.image, got, want)
		}
	}
	img := web
	img.User, img.Passwd, img.Group = "7", missing, missing
	if oci, _ := config(t, service(t, ""), img, runtime.Options{}); oci.Process.User.UID != 7 {
		t.Errorf("without passwd: %+v", oci.Process.User)
	}
	broken := errors.New("disk on fire")
	img.Passwd = func() ([]byte, error) { return nil, broken }
	if _, _, err := runtime.Config(service(t, ""), img, runtime.Options{}); !errors.Is(err, broken) {
		t.Errorf("unreadable passwd: %v", err)
	}
	img.Passwd = func() ([]byte, error) { return make([]byte, 2<<20), nil }
	if _, _, err := runtime.Config(service(t, ""), img, runtime.Options{}); err == nil {
		t.Error("a passwd of 2 MiB is read")
	}
}

func TestMounts(t *testing.T) {
	volumes := []spec.Volume{{Name: "mem"}, {Name: "memro", ReadOnly: true}, {Name: "im", Image: "x"}}
	oci, entry := config(t, service(t, `
tmpfs: ["/tmp:size=1M"]
mounts:
  - {type: cgroup, options: [rw]}
  - {destination: /m, type: bind, source: im}
  - {source: memro, destination: /n}
binds: ["/a:/a", "/a/b:/a/b:ro", "mem:/v", "/etc/x:/etc/x/:bind,rslave"]
binds.add: ["/other:/a"]`), web, runtime.Options{Volumes: volumes})
	var got []string
	for _, m := range oci.Mounts {
		got = append(got, fmt.Sprint(m.Destination, " ", m.Type, " ", m.Source, " ", m.Options))
	}
	want := []string{
		"/a bind /other [rw rbind rprivate]",
		"/a/b bind /a/b [ro rbind rprivate]",
		"/dev tmpfs tmpfs [nosuid strictatime mode=755 size=65536k]",
		"/dev/mqueue mqueue mqueue [nosuid noexec nodev]",
		"/dev/pts devpts devpts [nosuid noexec newinstance ptmxmode=0666 mode=0620]",
		"/dev/shm tmpfs shm [nosuid noexec nodev mode=1777 size=65536k]",
		"/etc/x bind /etc/x [bind rslave rw]",
		"/m bind /containers/volumes/im [ro rbind rprivate]",
		"/n bind /run/volumes/memro [ro rbind rprivate]",
		"/proc proc proc [nosuid noexec nodev]",
		"/sys sysfs sysfs [nosuid noexec nodev ro]",
		"/sys/fs/cgroup cgroup cgroup [rw]",
		"/tmp tmpfs tmpfs [size=1M]",
		"/v bind /run/volumes/mem [rw rbind rprivate]",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if !slices.Equal(entry.Mkdir, []string{"/run/volumes/memro", "/run/volumes/mem"}) {
		t.Errorf("mkdir %v", entry.Mkdir)
	}
	data, _, err := runtime.Config(service(t, `binds: ["/dev:/dev", "/a:/a", "/b:/a/b"]`), web, runtime.Options{})
	if err != nil {
		t.Fatal(err)
	}
	points, err := runtime.Mountpoints(data)
	if err != nil || !slices.Equal(points, []string{"/a", "/dev", "/proc", "/sys"}) {
		t.Errorf("mountpoints %v (%v)", points, err)
	}
	if bytes.Contains(data, []byte("/dev/pts")) {
		t.Error("a devpts lies over the device's /dev")
	}
}

func TestNamespaces(t *testing.T) {
	for _, c := range []struct{ keys, want string }{
		{"", "mount cgroup pid"},
		{"net: new\nipc: new\nuts: new\npid: host\nhostname: h", "mount cgroup network ipc uts"},
		{"net: none", "mount cgroup pid network"},
		{"net: /run/netns/a\nsysctl: {net.core.somaxconn: 5}", "mount cgroup pid network=/run/netns/a"},
		{"net: root\npid: root", "mount cgroup"},
		{"net: new\nuserns: new\nuidMappings: [{containerID: 0, hostID: 9, size: 9}]\ngidMappings: [{containerID: 0, hostID: 9, size: 9}]", "mount cgroup pid network user"},
		{"userns: new\nnet: new", "container web: userns: new needs uidMappings and gidMappings"},
		{"uidMappings: [{size: 1}]", "container web: uidMappings and gidMappings need userns: new"},
		{"userns: /run/u", "container web: userns: /run/u needs net: new: the kernel lets only the owner of the network namespace mount /sys"},
		{"hostname: h", `container web: hostname "h" would be the device's: add uts: new`},
		{"sysctl: {net.core.somaxconn: 5}", "container web: sysctl net.core.somaxconn would be the device's: add net: new, or use sysctl at the top of the spec"},
		{"sysctl: {kernel.shmmax: 5}", "container web: sysctl kernel.shmmax would be the device's: add ipc: new, or use sysctl at the top of the spec"},
		{"sysctl: {vm.swappiness: 5}", "container web: sysctl vm.swappiness is the device's: use sysctl at the top of the spec"},
	} {
		data, _, err := runtime.Config(service(t, c.keys), web, runtime.Options{})
		got := fmt.Sprint(err)
		if err == nil {
			var oci specs.Spec
			if err := json.Unmarshal(data, &oci); err != nil {
				t.Fatal(err)
			}
			var list []string
			for _, ns := range oci.Linux.Namespaces {
				list = append(list, strings.TrimSuffix(string(ns.Type)+"="+ns.Path, "="))
			}
			got = strings.Join(list, " ")
		}
		if got != c.want {
			t.Errorf("%q: %s, want %s", c.keys, got, c.want)
		}
	}
}

func TestRefused(t *testing.T) {
	for _, c := range []struct{ keys, want string }{
		{"runtime: {bindNS: {net: /run/netns/a}}", "runtime.bindNS is not in this version"},
		{"runtime: {interfaces: [{name: a}]}", "runtime.interfaces is not in this version"},
		{`binds: ["nothere:/x"]`, `there is no volume "nothere"`},
		{`binds: ["im:/x:rw"]`, `volume "im" is read-only`},
		{`binds: ["/a:/x", "/b:/x"]`, "/a and /b are both to be mounted at /x"},
		{`binds: ["/a:/"]`, `mount at "/": not an absolute path below /`},
		{`mounts: [{destination: /x, source: /y}]`, "mount at /x has no type: for a path of the device write type: bind"},
		{`mounts: [{type: overlay}]`, "mount of type overlay has no destination"},
	} {
		_, _, err := runtime.Config(service(t, c.keys), web, runtime.Options{Volumes: []spec.Volume{{Name: "im", Image: "x"}}})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.keys, err, c.want)
		}
	}
	if _, _, err := runtime.Config(service(t, ""), runtime.ImageConfig{}, runtime.Options{}); err == nil {
		t.Error("a container without a command is accepted")
	}
	im := service(t, "")
	im.Capabilities = []string{"CAP_NOT"}
	if _, _, err := runtime.Config(im, web, runtime.Options{}); err == nil {
		t.Error("an unknown capability is accepted")
	}
}

// Everything LinuxKit's schema has for resources and devices reaches config.json in OCI's spelling.
func TestResources(t *testing.T) {
	data, _, err := runtime.Config(service(t, `
devices: [{path: all, type: b}, {path: /dev/x, type: c, major: 1, minor: 3, mode: rw}]
resources:
  devices: [{allow: true, type: c, major: 1, minor: 2, access: r}]
  memory: {limit: 1, reservation: 2, swap: 3, kernel: 4, kernelTCP: 5, swappiness: 6, disableOOMKiller: true}
  cpu: {shares: 1, quota: 2, period: 3, realtimeRuntime: 4, realtimePeriod: 5, cpus: "0-1", mems: "0"}
  pids: {limit: 7}
  blockio:
    weight: 10
    leafWeight: 11
    weightDevice: [{major: 8, minor: 0, weight: 12, leafWeight: 13}]
    throttleReadBpsDevice: [{major: 8, minor: 1, rate: 14}]
    throttleWriteBpsDevice: [{major: 8, minor: 2, rate: 15}]
    throttleReadIOPSDevice: [{major: 8, minor: 3, rate: 16}]
    throttleWriteIOPSDevice: [{major: 8, minor: 4, rate: 17}]
  hugepageLimits: [{pageSize: 2097152, limit: 18}]
  network: {classID: 20, priorities: [{name: eth0, priority: 21}]}`), web, runtime.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var small bytes.Buffer
	if err := json.Compact(&small, data); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":2,"access":"r"},{"allow":true,"type":"b","access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rw"}]`,
		`"memory":{"limit":1,"reservation":2,"swap":3,"kernel":4,"kernelTCP":5,"swappiness":6,"disableOOMKiller":true}`,
		`"cpu":{"shares":1,"quota":2,"period":3,"realtimeRuntime":4,"realtimePeriod":5,"cpus":"0-1","mems":"0"}`,
		`"pids":{"limit":7}`,
		`"blockIO":{"weight":10,"leafWeight":11,"weightDevice":[{"major":8,"minor":0,"weight":12,"leafWeight":13}],"throttleReadBpsDevice":[{"major":8,"minor":1,"rate":14}],"throttleWriteBpsDevice":[{"major":8,"minor":2,"rate":15}],"throttleReadIOPSDevice":[{"major":8,"minor":3,"rate":16}],"throttleWriteIOPSDevice":[{"major":8,"minor":4,"rate":17}]}`,
		`"hugepageLimits":[{"pageSize":"2MB","limit":18}]`,
		`"network":{"classID":20,"priorities":[{"name":"eth0","priority":21}]}`,
		`"devices":[{"path":"/dev/x","type":"c","major":1,"minor":3}]`,
	} {
		if !strings.Contains(small.String(), want) {
			t.Errorf("config.json lacks %s", want)
		}
	}
}

// Every container of LinuxKit's examples gets a config, or is refused for what
// the device does not do.
func TestLinuxKitExamples(t *testing.T) {
	files, err := filepath.Glob("../spec/testdata/linuxkit/examples/*.yml")
	if err != nil || len(files) != 33 {
		t.Fatalf("%d examples (%v)", len(files), err)
	}
	made, refused := 0, map[string]bool{}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		s, err := spec.Parse(filepath.Base(name), data)
		if err != nil {
			continue // static-ip.yml; image/spec tests which
		}
		for section, list := range map[runtime.Section][]spec.Image{runtime.OnBoot: s.OnBoot, runtime.Services: s.Services, runtime.OnShutdown: s.OnShutdown} {
			for i, im := range list {
				_, _, err := runtime.Config(im, web, runtime.Options{Section: section, Index: i, Volumes: s.Volumes})
				if err == nil {
					made++
				} else {
					refused[filepath.Base(name)+" "+im.Name+strings.SplitAfter(err.Error(), im.Name)[1]] = true
				}
			}
		}
	}
	if made < 100 {
		t.Errorf("only %d configs", made)
	}
	for r := range refused {
		if !strings.Contains(r, "is not in this version: ") {
			t.Errorf("refused: %s", r)
		}
	}
	if len(refused) != 3 {
		t.Errorf("%d containers refused, want wg0 and wg1 of wireguard and getty of hostmount-writeable-overlay: %v", len(refused), refused)
	}
}

func FuzzMountpoints(f *testing.F) {
	f.Add([]byte(`{"mounts":[{"destination":"/a"},{"destination":"/a/b"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := runtime.Mountpoints(data)
		if err != nil {
			return
		}
		for i, a := range list {
			for _, b := range list[:i] {
				if strings.HasPrefix(a, b+"/") {
					t.Fatalf("%s lies in %s", a, b)
				}
			}
		}
	})
}

func ExampleConfig() {
	s, err := spec.Parse("appliance.yaml", []byte(`
services:
  - name: web
    image: registry.example/web:1
    capabilities: [CAP_NET_BIND_SERVICE]
    readonly: true
    health: {tcp: "127.0.0.1:80", interval: 10s}
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	config, entry, err := runtime.Config(s.Services[0], runtime.ImageConfig{Entrypoint: []string{"/web"}}, runtime.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	var oci specs.Spec
	if err := json.Unmarshal(config, &oci); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(entry.Bundle, entry.Restart, entry.Health.IntervalSec)
	fmt.Println(oci.Process.Args, oci.Process.NoNewPrivileges, oci.Process.Capabilities.Ambient, oci.Linux.CgroupsPath)
	// Output:
	// /containers/services/web always 10
	// [/web] true [CAP_NET_BIND_SERVICE] /holdfast/web
}
