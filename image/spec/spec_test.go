package spec_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/spec"
)

func mustParse(t *testing.T, name, text string) *spec.Spec {
	t.Helper()
	s, err := spec.Parse(name, []byte(text))
	if err != nil {
		t.Fatalf("Parse(%s): %v", name, err)
	}
	return s
}

// Every file LinuxKit's own parser accepts must parse here, and the one it
// refuses must fail in the same line.
func TestLinuxKitExamples(t *testing.T) {
	index, err := os.ReadFile("testdata/linuxkit/INDEX.tsv")
	if err != nil {
		t.Fatal(err)
	}
	rows := strings.Split(strings.TrimSpace(string(index)), "\n")[1:]
	files, err := filepath.Glob("testdata/linuxkit/examples/*.yml")
	if err != nil || len(files) != len(rows) || len(rows) != 33 {
		t.Fatalf("%d files and %d rows in the index (%v), want 33", len(files), len(rows), err)
	}
	for _, row := range rows {
		column := strings.Split(row, "\t")
		data, err := os.ReadFile("testdata/linuxkit/" + column[0])
		if err != nil {
			t.Fatal(err)
		}
		s, err := spec.Parse(column[0], data)
		if column[1] == "accept" {
			if err != nil {
				t.Errorf("LinuxKit accepts %s:\n%v", column[0], err)
				continue
			}
			checkRoundTrip(t, s)
			if len(s.Init) > 0 && len(s.Warnings) == 0 {
				t.Errorf("%s: no warning about linuxkit/init", column[0])
			}
			continue
		}
		line := regexp.MustCompile(`line (\d+)`).FindStringSubmatch(column[3])[1]
		if want := column[0] + ":" + line + ": "; err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: got %v, want an error at %s", column[0], err, want)
		}
	}
}

// What the examples say must also be in the result: spot checks of every section.
func TestLinuxKitValues(t *testing.T) {
	read := func(name string) *spec.Spec {
		data, err := os.ReadFile("testdata/linuxkit/examples/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return mustParse(t, name, string(data))
	}
	s := read("docker-for-mac.yml")
	docker := s.Services[len(s.Services)-1]
	if docker.Name != "docker-dfm" || docker.Net != "host" || len(docker.Binds) != 8 || docker.Runtime.Mkdir[0] != "/var/lib/docker" ||
		docker.Mounts[0].Type != "cgroup" || docker.Capabilities[0] != "all" || docker.Binds[7].String() != "/usr/bin/vpnkit-iptables-wrapper:/usr/bin/iptables" {
		t.Errorf("docker-dfm: %+v", docker)
	}
	s = read("wireguard.yml")
	wg := s.OnBoot[2]
	if wg.Runtime.BindNS.Net != "/run/netns/wg0" || !wg.Runtime.Interfaces[0].CreateInRoot || len(wg.Unsupported()) != 2 {
		t.Errorf("wg0: %+v", wg.Runtime)
	}
	if got := *s.Files[0].Contents; !strings.HasPrefix(got, "[Interface]\n") {
		t.Errorf("wg0.conf: %q", got)
	}
	err := s.Validate()
	if err == nil || !strings.Contains(err.Error(), "wireguard.yml:23:9: onboot[2].runtime.interfaces: not in this version (make the network device") {
		t.Errorf("Validate lets runtime.interfaces pass: %v", err)
	}
	s = read("sshd.yml")
	if f := s.Files[0]; f.Source != "~/.ssh/id_rsa.pub" || !f.Optional || *f.Mode != 0o600 {
		t.Errorf("sshd files: %+v", f)
	}
}

const complete = `
name: ledger
version: 1.0.0
arch: amd64
epoch: 2026-01-01T00:00:00Z
hostname: ledger
kernel: {image: "deb:linux-image.deb", cmdline: "console=ttyS0", modules: [virtio_net]}
handoff: [/sbin/init]
network:
  - {name: eth0, dhcp: true}
  - {name: eth1, addresses: [10.0.0.2/24], gateway: 10.0.0.1, dns: [10.0.0.1, "fd00::1"]}
sysctl: {net.ipv4.ip_forward: 1}
disk: {size: 4GiB, esp: 1GiB, slot: 1000MiB, data: [{name: db, mount: /db, size: 64MiB}, {name: data, mount: /data}]}
seal: {policy: standard, pin: true, repair: manual}
keys: ./keys
onboot:
  - name: all
    image: x
    capabilities: [CAP_CHOWN]
    capabilities.add: [CAP_KILL]
    ambient: [CAP_CHOWN]
    mounts: [{destination: /proc, type: proc, source: proc, options: [ro]}]
    binds: ["/a:/a", "/b:/b:ro,rshared", "vol:/v"]
    binds.add: ["/c:/c"]
    tmpfs: ["/tmp", "/t:size=1M,mode=1777"]
    devices: [{path: all, type: b}, {path: /dev/x, type: c, major: 1, minor: 3, mode: rw}]
    command: [a, b]
    env: [A=b, C=]
    cwd: /w
    net: new
    ipc: new
    uts: new
    pid: host
    userns: /run/ns
    readonly: false
    maskedPaths: []
    readonlyPaths: [/proc/sys]
    rootfsPropagation: shared
    hostname: h
    cgroupsPath: /x/y
    annotations: {a: b}
    sysctl: {net.core.somaxconn: "9"}
    uid: 5
    gid: staff
    additionalGids: [6, wheel]
    noNewPrivileges: false
    oomScoreAdj: -5
    rlimits: ["nofile,1024,unlimited"]
    uidMappings: [{hostID: 1000, containerID: 1, size: 5}]
    gidMappings: [{hostID: 1000, containerID: 1, size: 5}]
    runtime:
      cgroups: [systemd]
      mounts: [{destination: d, type: overlay, source: overlay}]
      mkdir: [/m]
      interfaces: [{name: v, add: veth, peer: w, createInRoot: true}]
      bindNS: {cgroup: /c, ipc: /i, mnt: /m, net: /n, pid: /p, user: /u, uts: /t}
      namespace: other
    resources:
      devices: [{allow: true, type: c, major: 1, minor: 2, access: r}]
      memory: {limit: 512MiB, reservation: 2, swap: 3, kernel: 4, kernelTCP: 5, swappiness: 6, disableOOMKiller: true}
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
      hugepageLimits: [{pageSize: 2097152, limit: 18}, {pageSize: 1GB, limit: 19}]
      network: {classID: 20, priorities: [{name: eth0, priority: 21}]}
services:
  - name: web
    image: web:1
    user: www:www
    restart: on-failure
    health: {http: "http://127.0.0.1/", interval: 10s, timeout: 1m, retries: 3, start: 1h}
onshutdown: [{name: bye, image: x}]
files:
  - {path: a, directory: true, mode: "0755", uid: 1, gid: two}
  - {path: b, symlink: /a}
  - {path: c, contents: ""}
  - {path: d, source: ~/x, optional: true}
  - {path: e, metadata: json}
volumes:
  - {name: vol}
  - {name: im, image: alpine, readonly: true, format: filesystem, platforms: [linux/amd64]}
trust: {image: [a], org: [b]}
init: [base:1]
`

// checkRoundTrip marshals, parses again and compares what both say.
func checkRoundTrip(t *testing.T, s *spec.Spec) {
	t.Helper()
	text, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := spec.Parse("again", text)
	if err != nil {
		t.Fatalf("parse what was marshalled: %v\n%s", err, text)
	}
	twice, err := again.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(text, twice) {
		t.Fatalf("marshalled\n%s\nand after a parse\n%s", text, twice)
	}
	if a, b := values(s), values(again); !reflect.DeepEqual(a, b) {
		t.Fatalf("values differ after a round trip\n%+v\n%+v", a, b)
	}
}

// values are the exported fields but the warnings.
func values(s *spec.Spec) []any {
	var list []any
	v := reflect.ValueOf(s).Elem()
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.IsExported() && f.Name != "Warnings" {
			list = append(list, v.Field(i).Interface())
		}
	}
	return list
}

// Defect 5 of LinuxKit: keys that its schema has and its structs lose.
func TestEveryKeySurvives(t *testing.T) {
	s := mustParse(t, "complete.yaml", complete)
	checkRoundTrip(t, s)
	r, err := json.Marshal(s.OnBoot[0].Resources)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"devices":[{"allow":true,"type":"c","major":1,"minor":2,"access":"r"}],` +
		`"memory":{"limit":536870912,"reservation":2,"swap":3,"kernel":4,"kernelTCP":5,"swappiness":6,"disableOOMKiller":true},` +
		`"cpu":{"shares":1,"quota":2,"period":3,"realtimeRuntime":4,"realtimePeriod":5,"cpus":"0-1","mems":"0"},"pids":{"limit":7},` +
		`"blockIO":{"weight":10,"leafWeight":11,"weightDevice":[{"major":8,"minor":0,"weight":12,"leafWeight":13}],` +
		`"throttleReadBpsDevice":[{"major":8,"minor":1,"rate":14}],"throttleWriteBpsDevice":[{"major":8,"minor":2,"rate":15}],` +
		`"throttleReadIOPSDevice":[{"major":8,"minor":3,"rate":16}],"throttleWriteIOPSDevice":[{"major":8,"minor":4,"rate":17}]},` +
		`"hugepageLimits":[{"pageSize":"2MB","limit":18},{"pageSize":"1GB","limit":19}],` +
		`"network":{"classID":20,"priorities":[{"name":"eth0","priority":21}]}}`
	if string(r) != want {
		t.Errorf("resources\n%s\nwant\n%s", r, want)
	}
	if m := s.OnBoot[0].UIDMappings[0]; m.HostID != 1000 || m.ContainerID != 1 || m.Size != 5 {
		t.Errorf("uidMappings: %+v", m)
	}
	if s.Disk.Slot != 1000<<20 || s.Epoch != 1767225600 || s.Sysctl["net.ipv4.ip_forward"] != "1" || *s.OnBoot[0].ReadOnly ||
		s.OnBoot[0].MaskedPaths == nil || s.Services[0].Health.Timeout.Seconds() != 60 {
		t.Errorf("values: %+v", s)
	}
	// Nothing that was written may be missing from what is marshalled.
	text, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	keys := regexp.MustCompile(`([A-Za-z.]+): `).FindAllStringSubmatch(complete, -1)
	for _, k := range keys {
		key := strings.Replace(k[1], "blockio", "blockIO", 1)
		if !strings.Contains(string(text), key+": ") && !strings.Contains(string(text), key+":\n") {
			t.Errorf("key %s is lost", key)
		}
	}
}

func TestWarnings(t *testing.T) {
	s := mustParse(t, "w.yaml", complete)
	var got []string
	for _, w := range s.Warnings {
		got = append(got, w.Path)
	}
	want := []string{"onboot[0].runtime.cgroups", "onboot[0].runtime.mounts", "onboot[0].runtime.interfaces", "onboot[0].runtime.bindNS",
		"onboot[0].runtime.namespace", "onboot[0].resources.memory.kernel", "onboot[0].resources.memory.kernelTCP",
		"onboot[0].resources.memory.swappiness", "onboot[0].resources.memory.disableOOMKiller", "onboot[0].resources.cpu.realtimeRuntime",
		"onboot[0].resources.cpu.realtimePeriod", "onboot[0].resources.blockIO.leafWeight", "onboot[0].resources.network",
		"volumes[0]", "volumes[1].platforms", "trust"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("warnings\n%q\nwant\n%q", got, want)
	}
	s = mustParse(t, "n.yaml", "onboot:\ninit: [linuxkit/init:1]\nkernel: {image: x, ucode: intel.cpio}\n")
	var text []string
	for _, w := range s.Warnings {
		text = append(text, w.String())
	}
	wantText := `n.yaml:1:1: onboot: has no value and counts as not given (remove the key, or give it a value)
n.yaml:2:8: init[0]: Holdfast's agent is PID 1 and runs the containers; this image only takes space (remove it)
n.yaml:3:27: kernel.ucode: ignored: microcode in the boot image is not in this version`
	if strings.Join(text, "\n") != wantText {
		t.Errorf("got\n%s", strings.Join(text, "\n"))
	}
}

func TestStarter(t *testing.T) {
	s := mustParse(t, "appliance.yaml", string(spec.Starter("ledger")))
	if err := s.Validate(); err != nil {
		t.Error(err)
	}
	if s.Name != "ledger" || len(s.Warnings) != 0 {
		t.Errorf("name %q, warnings %v", s.Name, s.Warnings)
	}
	if n := bytes.Count(spec.Starter("x"), []byte("\n")); n > 70 {
		t.Errorf("%d lines are no single page", n)
	}
	// What is commented out must be right as well.
	open := regexp.MustCompile(`(?m)^(\s*)# (arch|hostname|init|  - registry|onboot|  - \{name: prepare|onshutdown|sysctl|slot|command|env|user|capabilities|runtime|restart|- \{name: eth1|evidence|update|  root|  url|  channel|  check|  window|  automatic)`)
	full := open.ReplaceAll(spec.Starter("ledger"), []byte("$1$2"))
	s = mustParse(t, "uncommented.yaml", string(full))
	if err := s.Validate(); err != nil || len(s.Init) != 1 || len(s.OnBoot) != 1 || len(s.Network) != 2 || s.Services[0].User != "web" || s.Disk.Slot == 0 ||
		s.Update.Root != "root.json" || s.Update.Window != (spec.Window{StartMin: 120, EndMin: 300}) || len(s.Warnings) != 0 {
		t.Errorf("uncommented: %v\n%s", err, full)
	}
}

func TestMerge(t *testing.T) {
	a := mustParse(t, "a.yaml", `
kernel: {image: k:1, cmdline: quiet, ucode: u.cpio}
volumes: [{name: data}]
services: [{name: one, image: x, binds: ["data:/d"]}]
sysctl: {a: 1, b: 1}
disk: {esp: 512MiB, data: [{name: a, mount: /a, size: 64MiB}]}
handoff: [/a, b]
`)
	b := mustParse(t, "b.yaml", `
name: merged
kernel: {cmdline: "", ucode: ""}
volumes: [{name: more}]
services: [{name: two, image: y, binds: ["data:/d", "more:/m"]}]
sysctl: {b: 2}
disk: {size: 5GiB, data: [{name: b, mount: /b}]}
handoff: /c
`)
	before, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s, err := spec.Merge(a, b)
	if err != nil {
		t.Fatal(err)
	}
	// LinuxKit's defect 12: the volumes of the earlier file are lost.
	if len(s.Volumes) != 2 || s.Volumes[0].Name != "data" || s.Volumes[1].Name != "more" {
		t.Errorf("volumes: %+v", s.Volumes)
	}
	if s.Kernel.Image != "k:1" || s.Kernel.Cmdline != "" || s.Kernel.Ucode != "" || s.Name != "merged" || s.Sysctl["a"] != "1" || s.Sysctl["b"] != "2" ||
		s.Disk.ESP != 512<<20 || s.Disk.Size != 5<<30 || len(s.Disk.Data) != 2 || !reflect.DeepEqual([]string(s.Handoff), []string{"/c"}) {
		t.Errorf("merged: %+v", s)
	}
	for path, want := range map[string]string{
		"services[0].image": "a.yaml:4:31", "services[1].image": "b.yaml:5:31", "services[1].binds[1]": "b.yaml:5:53",
		"disk.data[1].name": "b.yaml:7:34", "kernel.image": "a.yaml:2:17", "kernel.ucode": "b.yaml:3:30", "services[1].health.tcp": "b.yaml:5:12",
	} {
		if got := s.Pos(path).String(); got != want {
			t.Errorf("Pos(%s) = %s, want %s", path, got, want)
		}
	}
	after, err := a.Marshal()
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("Merge changed its input (%v)", err)
	}
	if err := s.Validate(); err == nil || strings.Contains(err.Error(), "volume") {
		t.Errorf("want errors, but none of volumes: %v", err)
	}
	c := mustParse(t, "c.yaml", "services: [{name: one, image: z}]")
	if _, err := spec.Merge(a, c); err == nil || err.Error() != `c.yaml:1:19: services[1].name: service "one" is there already, at a.yaml:4:19` {
		t.Errorf("same service twice: %v", err)
	}
}

func TestMergeLabel(t *testing.T) {
	s := mustParse(t, "s.yaml", `services:
  - name: a
    image: b
    binds.add: ["/y:/y"]
    capabilities.add: [CAP_KILL]
    net: host
    env: [A=1]
    user: web
    readonly: false
    maskedPaths: []
    runtime: {mkdir: [/own]}
`)
	im := s.Services[0]
	label := `{"binds":["/x:/x"],"binds.add":["/z:/z"],"capabilities":["CAP_CHOWN"],"net":"new","pid":"host","env":["B=2"],
"uid":5,"gid":6,"readonly":true,"maskedPaths":["/proc/kcore"],"runtime":{"mkdir":["/label"],"cgroups":["x"]},"resources":{"memory":{"disableOOMKiller":true}}}`
	if err := im.MergeLabel([]byte(label)); err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintln(im.Binds, im.BindsAdd, im.Capabilities, im.CapabilitiesAdd, im.Net, im.PID, im.Env, im.User, im.UID, im.GID,
		*im.ReadOnly, len(im.MaskedPaths), im.Runtime.Mkdir, im.Runtime.Cgroups, *im.Resources.Memory.DisableOOMKiller, im.Name, im.Image)
	const want = "[/x:/x] [/z:/z /y:/y] [CAP_CHOWN] [CAP_KILL] host host [A=1] web <nil> <nil> false 0 [/own] [x] true a b\n"
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(s.Services[0].Runtime.Cgroups) != 0 {
		t.Error("the label leaked into the spec that the image was copied from")
	}
	err := im.MergeLabel([]byte(`{"capabilites":["CAP_CHOWN"]}`))
	if err == nil || err.Error() != `label org.mobyproject.config:1:2: unknown key "capabilites" (did you mean "capabilities"?)` {
		t.Errorf("label with a typing mistake: %v", err)
	}
	var typed *spec.Errors
	if err := im.MergeLabel([]byte(`{`)); !errors.As(err, &typed) {
		t.Errorf("broken label: %v", err)
	}
}

func TestDefaults(t *testing.T) {
	s := mustParse(t, "d.yaml", "name: x\nfiles: [{path: a, directory: true}, {path: b, contents: \"\"}]\nservices: [{name: a, image: b}]\n")
	s.ApplyDefaults()
	if s.Arch != "amd64" || s.Epoch != spec.DefaultEpoch || s.Hostname != "x" || s.Kernel.Binary != "kernel" || s.Kernel.Tar != "kernel.tar" ||
		s.Disk.Size != 4<<30 || s.Disk.ESP != 1<<30 || s.Disk.Slot != 0 || len(s.Disk.Data) != 1 || s.Disk.Data[0].Mount != "/data" ||
		s.Seal.Policy != "standard" || s.Seal.Repair != "automatic" || s.Seal.PIN || *s.Files[0].Mode != 0o700 || *s.Files[1].Mode != 0o600 || s.Services[0].Restart != "always" {
		t.Errorf("defaults: %+v", s)
	}
	s = mustParse(t, "d.yaml", "disk: {data: []}")
	if s.ApplyDefaults(); len(s.Disk.Data) != 0 {
		t.Errorf("data: [] gave %+v", s.Disk.Data)
	}
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/linuxkit/examples/*.yml")
	if err != nil || len(files) == 0 {
		f.Fatal("no examples", err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(complete))
	f.Add(spec.Starter("fuzz"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("kernel: &k {image: x}\nonboot: [{<<: *k, name: a}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := spec.Parse("fuzz", data)
		again, err2 := spec.Parse("fuzz", data)
		if fmt.Sprint(err) != fmt.Sprint(err2) || !reflect.DeepEqual(s, again) {
			t.Fatalf("two parses differ: %v, %v", err, err2)
		}
		var typed *spec.Errors
		if err != nil {
			if !errors.As(err, &typed) || len(typed.List) == 0 {
				t.Fatalf("not *Errors: %v", err)
			}
			return
		}
		checkRoundTrip(t, s)
	})
}

func FuzzMergeLabel(f *testing.F) {
	f.Add([]byte(`{"binds":["/x:/x"],"capabilities":["all"],"runtime":{"mkdir":["/x"]}}`))
	f.Fuzz(func(t *testing.T, label []byte) {
		var once, twice spec.Image
		if err := once.MergeLabel(label); err != nil {
			return
		}
		if err := twice.MergeLabel(label); err != nil || !reflect.DeepEqual(once, twice) {
			t.Fatalf("two merges differ (%v)\n%+v\n%+v", err, once, twice)
		}
	})
}
