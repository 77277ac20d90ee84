package spec_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/spec"
)

// What a person sees for each kind of mistake.
func TestErrorMessages(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "kernal: {image: x}", `f:1:1: unknown key "kernal" (did you mean "kernel"?)`},
		{"unknown key inside", "services:\n  - name: a\n    image: b\n    imagee: c", `f:4:5: services[0]: unknown key "imagee" (did you mean "image"?)`},
		{"key of compose", "services:\n  - name: a\n    image: b\n    ports: [80]", `f:4:5: services[0]: unknown key "ports" (with net: host, the default, ports need no mapping)`},
		{"linuxkit's own documentation is wrong", "onboot: [{name: a, image: b, rmlimits: []}]", `f:1:30: onboot[0]: unknown key "rmlimits" (use rlimits)`},
		{"nothing near", "zzzzzz: 1", `f:1:1: unknown key "zzzzzz"`},
		{"duplicate key", "name: a\nversion: 1.0.0\nname: b", `f:3:1: key "name" is given twice, first in line 1`},
		{"list wanted", "init: 5", `f:1:7: init: expected a list of strings, got a number`},
		{"list wanted, text given", "init: busybox", `f:1:7: init: expected a list of strings, got the text "busybox" (write ["busybox"])`},
		{"text wanted", "version: 1.0", `f:1:10: version: expected text, got a number (quote it: "1.0")`},
		{"text wanted, boolean given", "onboot: [{name: a, image: b, env: [true]}]", `f:1:36: onboot[0].env[0]: expected text, got true (quote it: "true")`},
		{"boolean wanted", "network: [{name: eth0, dhcp: yes}]", `f:1:30: network[0].dhcp: expected true or false, got the text "yes" (write true)`},
		{"number wanted", "services: [{name: a, image: b, oomScoreAdj: \"5\"}]", `f:1:45: services[0].oomScoreAdj: expected a whole number, got the text "5" (remove the quotes)`},
		{"mapping wanted", "kernel: linux", `f:1:9: kernel: expected a mapping (key: value), got the text "linux"`},
		{"list of mappings wanted", "services: {web: {image: x}}", `f:1:11: services: expected a list of mappings, got a mapping`},
		{"list in a mapping", "sysctl: [a]", `f:1:9: sysctl: expected a mapping (name: value), got a list`},
		{"key that is no text", "1: a", `f:1:1: a key is a number, not text (quote it: "1")`},
		{"no value in a list", "init: [~]", `f:1:8: init[0]: expected text, got nothing`},
		{"mode as a number", "files: [{path: a, contents: b, mode: 0644}]", `f:1:38: files[0].mode: expected an octal mode as text, such as "0644", got a number (quote it: "0644")`},
		{"mode not octal", "files: [{path: a, contents: b, mode: \"0888\"}]", `f:1:38: files[0].mode: "0888" is not an octal mode up to 7777`},
		{"capability", "onboot: [{name: a, image: b, capabilities: [CAP_SYS_ADMN]}]", `f:1:45: onboot[0].capabilities[0]: unknown capability "CAP_SYS_ADMN" (did you mean "CAP_SYS_ADMIN"?)`},
		{"capability without CAP_", "onboot: [{name: a, image: b, capabilities: [net_admin]}]", `f:1:45: onboot[0].capabilities[0]: unknown capability "net_admin" (did you mean "CAP_NET_ADMIN"?)`},
		{"all and more", "onboot: [{name: a, image: b, capabilities: [all, CAP_KILL]}]", `f:1:45: onboot[0].capabilities[0]: "all" stands alone or not at all`},
		{"restart", "services: [{name: a, image: b, restart: allways}]", `f:1:41: services[0].restart: "allways" is not known here (did you mean "always"?)`},
		{"health on boot", "onboot: [{name: a, image: b, health: {tcp: \"h:1\"}}]", `f:1:38: onboot[0].health: only services have a health check`},
		{"two probes", "services: [{name: a, image: b, health: {tcp: \"h:1\", exec: [x]}}]", `f:1:40: services[0].health: exactly one of http, tcp and exec has to be given, not 2`},
		{"duration", "services: [{name: a, image: b, health: {tcp: \"h:1\", interval: 10}}]", `f:1:63: services[0].health.interval: a duration needs its unit (write 10s for seconds)`},
		{"net", "services: [{name: a, image: b, net: bridge}]", `f:1:37: services[0].net: "bridge" is not known here (one of host, root, new, none)`},
		{"size", "disk: {size: 4GIB}", `f:1:14: disk.size: size "4GIB" has the unknown unit "GIB" (did you mean "GiB"?)`},
		{"size in short", "disk: {size: 4G}", `f:1:14: disk.size: size "4G" has the unknown unit "G" (GiB is a power of 1024, GB a power of 1000)`},
		{"size not in MiB", "disk: {esp: 1GB}", `f:1:13: disk.esp: 1000000000 bytes are not a whole number of MiB`},
		{"disk too small", "disk: {size: 1GiB, esp: 512MiB, slot: 512MiB}", `f:1:14: disk.size: 1536 MiB of partitions do not fit on 1024 MiB`},
		{"data in the system", "disk: {data: [{name: a, mount: /run/x}]}", `f:1:32: disk.data[0].mount: "/run/x" belongs to the system`},
		{"unknown integrity", "disk: {data: [{name: a, mount: /a, integrity: crc32c}]}", `f:1:47: disk.data[0].integrity: integrity "crc32c" is not known (write hmac-sha256, or leave it out)`},
		{"only the last grows", "disk: {data: [{name: a, mount: /a}, {name: b, mount: /b}]}", `f:1:15: disk.data[0]: only the last volume grows to the end of the disk (give it a size, or put it last)`},
		{"repair", "seal: {repair: auto}", `f:1:16: seal.repair: "auto" is not known here (one of automatic, manual)`},
		{"PIN in the spec", "seal: {pin: 1234}", `f:1:13: seal.pin: expected true or false, got a number`},
		{"policy", "seal: {policy: standart}", `f:1:16: seal.policy: "standart" is not known here (did you mean "standard"?)`},
		{"epoch", "epoch: tomorrow", `f:1:8: epoch: "tomorrow" is not a time (write 2026-01-31T00:00:00Z)`},
		{"epoch before FAT", "epoch: 0", `f:1:8: epoch: 0 is not between 1980 and 2107, which is what the boot partition can record`},
		{"address", "network: [{name: eth0, addresses: [10.0.0.2]}]", `f:1:36: network[0].addresses[0]: "10.0.0.2" is not an address (write the address with its prefix: 10.0.0.2/24)`},
		{"gateway", "network: [{name: eth0, addresses: [10.0.0.2/24], gateway: 10.0.1.1}]", `f:1:59: network[0].gateway: gateway 10.0.1.1 is in none of the interface's networks`},
		{"bind", "onboot: [{name: a, image: b, binds: [/data]}]", `f:1:38: onboot[0].binds[0]: bind "/data" has 1 parts (write source:destination or source:destination:options)`},
		{"relative bind", "onboot: [{name: a, image: b, binds: [\"./x:/x\"]}]", `f:1:38: onboot[0].binds[0]: source of bind "./x:/x" is neither an absolute path nor the name of a volume`},
		{"rlimit", "onboot: [{name: a, image: b, rlimits: [\"nofiles,1,2\"]}]", `f:1:40: onboot[0].rlimits[0]: unknown rlimit "nofiles" (did you mean "RLIMIT_NOFILE"?)`},
		{"file without content", "files: [{path: a}]", `f:1:9: files[0]: none of directory, symlink, contents, source and metadata is given (write contents: "" for an empty file)`},
		{"file with two", "files: [{path: a, contents: b, source: c}]", `f:1:9: files[0]: contents and source exclude each other`},
		{"file outside", "files: [{path: ../a, contents: b}]", `f:1:16: files[0].path: "../a" leaves its folder`},
		{"missing name", "services: [{image: a}]", `f:1:12: services[0].name: is missing`},
		{"empty name", "services: [{name: \"\", image: a}]", `f:1:19: services[0].name: is missing`},
		{"service twice", "services: [{name: a, image: a}, {name: a, image: b}]", `f:1:40: services[1].name: service "a" is there already, at f:1:19`},
		{"name that climbs", "services: [{name: ../a, image: a}]", `f:1:19: services[0].name: "../a" is not allowed here (use 1 to 63 letters, digits, dots, hyphens and underscores)`},
		{"number too large", "services: [{name: a, image: a, uid: 4294967296}]", `f:1:37: services[0].uid: 4294967296 is not between 0 and 4294967295`},
		{"handoff in one text", "handoff: /sbin/init -x", `f:1:10: handoff: a command with arguments is a list of strings (write a list: ["/sbin/init", "--option"])`},
		{"resources in lower case", "onboot: [{name: a, image: b, resources: {memory: {disableoomkiller: true}}}]", `f:1:51: onboot[0].resources.memory: unknown key "disableoomkiller" (did you mean "disableOOMKiller"?)`},
		{"not YAML", "a: [1", `f:1: not valid YAML: did not find expected ',' or ']'`},
		{"tab", "kernel:\n\timage: x", `f:2: not valid YAML: found character that cannot start any token (line 2 is indented with a tab; YAML takes only spaces)`},
		{"unknown anchor", "name: *x", `f: not valid YAML: unknown anchor 'x' referenced`},
		{"empty", "# nothing\n", `f: the file is empty`},
		{"two documents", "name: a\n---\nname: b", `f:2: a second document begins here (one file holds one spec; several files are merged)`},
		{"binary", "name: !!binary aGk=", `f:1:7: name: expected text, got a value with the tag !!binary`},
		{"several", "nam: a\nversion: x.y\ninit: 5\nservices: [{name: A, imag: b}]", `f:1:1: unknown key "nam" (did you mean "name"?)
f:2:10: version: "x.y" is not allowed here (use numbers with dots, such as 1.0.0 or 1.0.0-rc1)
f:3:7: init: expected a list of strings, got a number
f:4:12: services[0].image: is missing
f:4:22: services[0]: unknown key "imag" (did you mean "image"?)`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := spec.Parse("f", []byte(c.text))
			if err == nil {
				t.Fatal("accepted")
			}
			var list *spec.Errors
			if !errors.As(err, &list) {
				t.Fatalf("%T is not *Errors", err)
			}
			if err.Error() != c.want {
				t.Errorf("got\n%s\nwant\n%s", err, c.want)
			}
		})
	}
}

// Inputs that are small and ask for much.
func TestLimits(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c <= 'i'; c++ {
		bomb += fmt.Sprintf("%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1)
	}
	list := "onboot: [{name: a, image: b, command: &a [" + strings.Repeat("x,", 1000) + "x]}"
	for i := range 200 {
		list += fmt.Sprintf(",{name: a%d, image: b, command: *a}", i)
	}
	merges := "onboot:\n - &a {name: a, image: b}\n"
	for range 40 {
		merges += " - {<<: [" + strings.Repeat("*a,", 5000) + "]}\n"
	}
	for _, c := range []struct{ name, text, want string }{
		{"lists that double", bomb + "init: *i", "unknown key"},
		{"one list many times", list + "]", "more than 100000 values"},
		{"merge keys many times", merges, "more than 100000 values"},
		{"a list in itself", "onboot: &a [{name: x, image: y, <<: *a}]", "nested deeper than 32 levels"},
		{"a mapping in itself", "kernel: &k {image: x, <<: *k}", "nested deeper than 32 levels"},
		{"a large file", "name: " + strings.Repeat("x", 1<<20), "more than the 1048576 a spec may have"},
		{"deep", "init: " + strings.Repeat("[", 20000), "exceeded max depth"},
		{"many errors", "init: [" + strings.Repeat("1,", 5000) + "]", "init[99]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := spec.Parse("f", []byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %.300v, want %q", err, c.want)
			}
			var list *spec.Errors
			if !errors.As(err, &list) || len(list.List) > 100 || len(err.Error()) > 64<<10 {
				t.Errorf("%d problems in %d bytes", len(list.List), len(err.Error()))
			}
		})
	}
}

// What parses, but cannot be built.
func TestValidate(t *testing.T) {
	const base = "name: a\nversion: 1.0.0\nkernel: {image: k}\n"
	for _, c := range []struct{ text, want string }{
		{"services: [{name: a, image: b}]", `f:1:1: name: a build needs it (write name: my-appliance)
f:1:1: version: a build needs it (write version: 1.0.0)
f:1:1: kernel.image: a build needs it (write kernel: {image: ...})`},
		{base, `f:1:1: services: the appliance would run nothing (write services or handoff)`},
		{base + "arch: arm64\nhandoff: /init", `f:4:7: arch: building for arm64 is not in this version (use amd64)`},
		{base + "handoff: /init\nservices: [{name: a, image: b}]", `f:5:11: services: handoff makes the image's own init PID 1, which does not run them (let that init start them, or leave handoff out)`},
		{base + "services: [{name: a, image: \"@pkg:./x\"}]", `f:4:29: services[0].image: LinuxKit's package template "@pkg:./x" is not in this version (build the image and give its name)`},
		{base + "volumes: [{name: blank}]\nservices: [{name: a, image: b, binds: [\"blnk:/x\"]}]", `f:5:40: services[0].binds[0]: there is no volume "blnk" (did you mean "blank"?)`},
		{base + "volumes: [{name: im, image: x}]\nservices: [{name: a, image: b, mounts: [{type: bind, source: im, destination: /x, options: [rw]}]}]", `f:5:41: services[0].mounts[0]: volume "im" is read-only (drop rw)`},
		{base + "volumes: [{name: im, image: x, format: oci}]\nhandoff: /init", `f:4:40: volumes[0].format: a volume that is an OCI layout is not in this version (use filesystem)`},
		{base + "handoff: /init\nseal: {policy: rollback-proof}", `f:1:1: update.epoch: with seal.policy rollback-proof the security epoch is 1 to 64, not 0 (write update: {epoch: 1}, and one more when older releases shall no longer open the volumes)`},
		{base + "handoff: /init\nseal: {policy: rollback-proof}\nupdate: {root: r, epoch: 65}", `f:6:26: update.epoch: with seal.policy rollback-proof the security epoch is 1 to 64, not 65 (write update: {epoch: 1}, and one more when older releases shall no longer open the volumes)`},
		{base + "handoff: /init\nseal: {policy: rollback-proof, pin: true, repair: manual}\nupdate: {root: r, epoch: 64}", ""},
		{base + "handoff: /init\nseal: {policy: strict}", ""},
		{base + "handoff: /init\nseal: {policy: disk-theft-only}\nupdate: {root: r}", ""},
		{base + "handoff: /init", ""},
	} {
		err := mustParse(t, "f", c.text).Validate()
		if got := fmt.Sprint(err); got != c.want && !(err == nil && c.want == "") {
			t.Errorf("%s\ngot  %s\nwant %s", c.text, got, c.want)
		}
	}
	if err := new(spec.Spec).Validate(); err == nil {
		t.Error("an empty spec validates")
	}
}
