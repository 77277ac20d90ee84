// Package spec reads what a person writes: the YAML that describes an
// appliance. It takes LinuxKit's format as it is and adds the keys that
// LinuxKit has no words for (disk, sealing, network, health, restart).
//
// Start with [Parse]; put several files together with [Merge]; ask
// [Spec.Validate] whether there is enough for a build; read the effective values
// after [Spec.ApplyDefaults]. [Starter] is a spec to begin with. A container's
// image may carry more of its configuration in a label: [Image.MergeLabel].
//
// # Strictness
//
// Nothing is dropped in silence. A key that is not known, given twice or of the
// wrong type is an error with file, line and column, and all errors come at
// once, as [*Errors]. A key that LinuxKit has and that means nothing here is in
// [Spec.Warnings], or, where leaving it out would change what runs, an error of
// Validate that says what to use instead. So LinuxKit's files parse as they are
// (all its valid examples do, in a test), but for values that could not work at
// run time, such as a relative destination; and what cannot be built is found before the build.
//
// # Subset of YAML
//
// One document, at most 1 MiB and 100,000 values after aliases are expanded;
// text keys; no binary or own tags. yes, no, on and off are text and not accepted as a boolean.
//
// # Where the meaning differs from LinuxKit
//
//   - noNewPrivileges is true unless stated otherwise (LinuxKit: false).
//   - env adds to the image's environment by name (LinuxKit: replaces all of it).
//   - A bind without options is rw,rbind,rprivate (LinuxKit: rshared).
//   - maskedPaths and readonlyPaths have runc's defaults unless the container has
//     CAP_SYS_ADMIN, which could undo them (LinuxKit: none); the same holds for
//     /sys being read-only (LinuxKit: only with readonly).
//   - uid, gid and user may be names, looked up in the image (LinuxKit: the name
//     of a container, which gets a number of its own). Without them the image's
//     own user holds (LinuxKit: root).
//   - trust, kernel.ucode, runtime.namespace and a volume's platforms are accepted
//     with a warning and ignored.
//   - runtime.interfaces, runtime.bindNS, runtime.mounts and runtime.cgroups are
//     accepted by Parse and refused by Validate.
//   - A volume is a folder in memory; one with an image is read-only.
//
// # What it does not protect
//
// A spec is trusted input of the build: its author decides what the appliance
// runs. The limits above only keep a broken file from taking the builder down.
package spec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	maxFileBytes = 1 << 20
	maxValues    = 100_000
	maxDepth     = 32
)

// Spec is an appliance as its author wrote it. Zero values are "not given";
// [Spec.ApplyDefaults] fills them in.
type Spec struct {
	Name     string `yaml:"name"`    // [a-z0-9-], at most 32
	Version  string `yaml:"version"` // 1.2.3 or 1.2.3-rc1
	Arch     string `yaml:"arch"`    // GOARCH; default amd64
	Epoch    Epoch  `yaml:"epoch"`   // times in the image; default 1980-01-01
	Hostname string `yaml:"hostname"`

	Kernel     Kernel   `yaml:"kernel"`
	Init       []string `yaml:"init"` // images unpacked over the root, in order
	OnBoot     []Image  `yaml:"onboot"`
	OnShutdown []Image  `yaml:"onshutdown"`
	Services   []Image  `yaml:"services"`
	Files      []File   `yaml:"files"`
	Volumes    []Volume `yaml:"volumes"`
	Trust      *Trust   `yaml:"trust"` // ignored

	Handoff Argv              `yaml:"handoff"` // argv of the image's own init
	Network []Interface       `yaml:"network"`
	Sysctl  map[string]string `yaml:"sysctl,number"`
	Disk    Disk              `yaml:"disk"`
	Seal    Seal              `yaml:"seal"`

	SecureBoot SecureBoot `yaml:"secureboot"`

	Update Update `yaml:"update"`

	Recovery Recovery `yaml:"recovery"`

	Evidence Evidence `yaml:"evidence"`

	Keys string `yaml:"keys"` // folder with the vendor's keys

	// Warnings are about what was accepted and has no effect, or may surprise.
	Warnings []Problem `yaml:"-"`

	pos positions
}

// Kernel names the image with the kernel and what else the boot needs of it.
type Kernel struct {
	Image   string `yaml:"image"` // an OCI image, or deb:FILE
	Cmdline string `yaml:"cmdline"`
	Binary  string `yaml:"binary"` // file in the image; default kernel
	Tar     string `yaml:"tar"`    // tar in the image with /lib/modules; default kernel.tar, "none" is none
	Ucode   string `yaml:"ucode"`  // ignored
	// Modules are loaded in the initrd, with what they depend on.
	Modules []string `yaml:"modules"`
}

// File is one file, folder or symbolic link over the root. Exactly one of
// Directory, Symlink, Contents, Source and Metadata is set.
type File struct {
	Path      string  `yaml:"path"`
	Directory bool    `yaml:"directory"`
	Symlink   string  `yaml:"symlink"`
	Contents  *string `yaml:"contents"`
	Source    string  `yaml:"source"`   // file on the build machine, ~/ allowed
	Metadata  string  `yaml:"metadata"` // "yaml" or "json": this spec, see [Spec.Marshal]
	Optional  bool    `yaml:"optional"` // Source may be missing
	Mode      *Mode   `yaml:"mode"`     // default 0600, folders 0700
	UID       *ID     `yaml:"uid"`      // default 0; a name is looked up in the root
	GID       *ID     `yaml:"gid"`
}

// Volume is a folder that containers share, in memory; with Image set, a
// read-only one with that image's files. What is to last belongs on Disk.Data.
type Volume struct {
	Name      string   `yaml:"name"`
	Image     string   `yaml:"image"`
	ReadOnly  bool     `yaml:"readonly"`
	Format    string   `yaml:"format"`    // "filesystem"; "oci" is refused by Validate
	Platforms []string `yaml:"platforms"` // ignored
}

// Trust is LinuxKit's; nothing reads it, there or here.
type Trust struct {
	Image []string `yaml:"image"`
	Org   []string `yaml:"org"`
}

// Interface is the configuration of one network device. It has the fields of image.Interface.
type Interface struct {
	Name      string   `yaml:"name"` // "*" is the first one with a link
	DHCP      bool     `yaml:"dhcp"`
	Addresses []string `yaml:"addresses"` // CIDR
	Gateway   string   `yaml:"gateway"`
	DNS       []string `yaml:"dns"`
}

// Disk is the layout of the device's disk, all sizes whole MiB.
type Disk struct {
	Size Size `yaml:"size"` // of the image; default 4 GiB; the device's may be larger
	ESP  Size `yaml:"esp"`  // default 1 GiB
	Slot Size `yaml:"slot"` // each of the two; 0: the builder takes twice the release or more
	// Data are the encrypted volumes; nil is one named data on /data, empty is none.
	Data []Data `yaml:"data"`
	// EncryptSlots has each device encrypt its root slots with a key of its own, which
	// lies on the data volumes and so opens with them. The first boot encrypts the slot
	// that the builder wrote, in place, which takes as long as reading and writing it. The
	// kernel image on the boot partition is not encrypted. See package agent/slotcrypt.
	EncryptSlots bool `yaml:"encrypt_slots"`
}

// Data is an encrypted volume. The last one may leave Size out and grows to the end of the disk.
type Data struct {
	Name  string `yaml:"name"`
	Mount string `yaml:"mount"`
	Size  Size   `yaml:"size"`
	// Integrity "hmac-sha256" makes a sector that was changed on the disk a read error
	// instead of other data. It costs a write of the whole volume at the first boot, a
	// fiftieth of the room, and half the speed of reading and writing where the processor
	// is the limit; the volume cannot grow later. It does not notice an older state of the same sector that is put back.
	Integrity string `yaml:"integrity"`
}

// Seal says who may open the data volumes.
type Seal struct {
	// Policy is one of these. What each binds is in package seal.
	//
	//	standard         images the vendor signed, on this machine, in this state of its
	//	                 Secure Boot keys; the default
	//	strict           this image, this firmware, this boot loader, and no other
	//	rollback-proof   standard, and no image of a lower security epoch than the device
	//	                 has seen (update.epoch, from 1); needs a counter in the TPM
	//	disk-theft-only  images the vendor signed, whatever the firmware did before:
	//	                 degraded, and shown as such
	Policy string `yaml:"policy"`
	// PIN asks whoever starts the device for a PIN as well. The TPM counts wrong ones.
	PIN bool `yaml:"pin"`
	// Repair says what follows a boot that needed the recovery key: "automatic", the
	// default, seals anew for the state the device is in, "manual" waits for somebody to
	// say so with holdfast-agent reseal.
	Repair string `yaml:"repair"`
}

// SecureBoot says how boxes get the vendor's keys, and how a release changes them.
type SecureBoot struct {
	// Enroll is "force" where a device whose firmware is in setup mode at its first start
	// gets the vendor's keys by itself, and starts once more before anything is sealed to
	// them; "manual" where the boot loader's menu and the firmware's set-up find them on
	// the disk. The default, "off", leaves it to the factory.
	Enroll string `yaml:"enroll"`
	// DB and DBX are signed updates (.auth) of the variables of these names, files on
	// the build machine, ~/ allowed: db-next.auth or db.auth of the keys' folder, and
	// what holdfast keys dbx makes. A box applies them once it has kept the release.
	DB  string `yaml:"db"`
	DBX string `yaml:"dbx"`
}

// Update says which repository new releases come from, and when they are taken.
// A spec without it makes a release that takes none.
type Update struct {
	// Root is the repository's root.json, a file on the build machine, ~/ allowed.
	Root    string `yaml:"root"`
	URL     string `yaml:"url"`     // https, http or oci://HOST/NAME:TAG; "" is none: releases come by hand only
	Channel string `yaml:"channel"` // default stable
	CA      string `yaml:"ca"`      // PEM file on the build machine
	// FleetKey is a file on the build machine with an age identity, as age-keygen makes
	// it, for bundles that are encrypted to the fleet. It is in the root as it is, which
	// keeps it from who carries a bundle, and from nobody who can read a release; see
	// [image.FleetKeyPath].
	FleetKey string   `yaml:"fleet_key"`
	Check    Interval `yaml:"check"` // default 6h
	// Window is when the device may restart into a new release; default any time.
	Window    Window `yaml:"window"`
	Automatic *bool  `yaml:"automatic"`  // default true
	Stick     *bool  `yaml:"stick"`      // default true
	WriteBack bool   `yaml:"write_back"` // tells the stick how it went
	Epoch     int64  `yaml:"epoch"`      // security epoch
	Hardware  string `yaml:"hardware"`
}

// given says whether the spec has the section.
func (u *Update) given() bool { return *u != Update{} }

// Parse reads one file. name is what errors call it. The error, when the
// contents are to blame, is [*Errors] with all there is to say; a spec that
// parses may still lack what a build needs, see [Spec.Validate].
func Parse(name string, data []byte) (*Spec, error) {
	root, err := parseYAML(name, data)
	if err != nil {
		return nil, err
	}
	s := &Spec{}
	d := decoder{report: report{pos: positions{"": {name, 1, 1}}}, file: name}
	d.value(root, "", reflect.ValueOf(s).Elem(), 0)
	s.pos = d.pos
	d.checkSpec(s)
	sortProblems(d.warns)
	s.Warnings = d.warns
	if err := d.err(); err != nil {
		return nil, err
	}
	return s, nil
}

// Pos says where the value at path was written, for errors found later: a
// missing image is s.Pos("services[2].image"). A path that was not written
// gives the nearest thing around it.
func (s *Spec) Pos(path string) Position { return s.pos.at(path) }

// parseYAML gives the root of the only document in data.
func parseYAML(name string, data []byte) (*yaml.Node, error) {
	fail := func(line int, message, hint string) error {
		return &Errors{List: []Problem{{Position{name, line, 0}, "", message, hint}}}
	}
	if len(data) > maxFileBytes {
		return nil, fail(0, fmt.Sprintf("%d bytes are more than the %d a spec may have", len(data), maxFileBytes), "")
	}
	var document, more yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&document); errors.Is(err, io.EOF) {
		return nil, fail(0, "the file is empty", "")
	} else if err != nil {
		line, message := syntaxError(err)
		return nil, fail(line, message, syntaxHint(data, line, message))
	}
	switch err := dec.Decode(&more); {
	case err == nil:
		return nil, fail(more.Line, "a second document begins here", "one file holds one spec; several files are merged")
	case !errors.Is(err, io.EOF):
		line, message := syntaxError(err)
		return nil, fail(line, message, "")
	}
	if document.Kind != yaml.DocumentNode || len(document.Content) != 1 {
		return nil, fail(0, "the file is empty", "")
	}
	return document.Content[0], nil
}

// syntaxError takes the line out of an error of the YAML library, which has it only as text.
func syntaxError(err error) (line int, message string) {
	message = strings.TrimPrefix(err.Error(), "yaml: ")
	if m := regexp.MustCompile(`^line (\d+): `).FindStringSubmatch(message); m != nil {
		line, _ = strconv.Atoi(m[1]) // digits by the pattern; 0 when absurd
		message = message[len(m[0]):]
	}
	return line, "not valid YAML: " + message
}

// syntaxHint names the two mistakes behind most YAML that does not parse.
func syntaxHint(data []byte, line int, message string) string {
	lines := bytes.Split(data, []byte("\n"))
	for i := max(0, line-2); i < min(len(lines), line+1); i++ {
		if bytes.HasPrefix(bytes.TrimLeft(lines[i], " "), []byte("\t")) {
			return fmt.Sprintf("line %d is indented with a tab; YAML takes only spaces", i+1)
		}
	}
	if strings.Contains(message, "did not find expected key") {
		return "look at the indentation of the lines before it"
	}
	return ""
}

// ImageRefs lists every image reference of the spec once, in the order they
// stand there.
func (s *Spec) ImageRefs() []string {
	var refs []string
	add := func(ref string) {
		if ref != "" && !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
	}
	add(s.Kernel.Image)
	for _, ref := range s.Init {
		add(ref)
	}
	s.sections(func(_ string, _ kind, im *Image) { add(im.Image) })
	for _, v := range s.Volumes {
		add(v.Image)
	}
	return refs
}
