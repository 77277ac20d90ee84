package spec

import (
	"path"
	"reflect"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Label is the image label that holds more of a container's configuration, in
// the same keys as a spec.
const Label = "org.mobyproject.config"

// Image is one onboot, service or onshutdown entry. A nil slice, nil pointer or
// empty string is "not given": the image's label and then its config hold.
type Image struct {
	Name  string `yaml:"name"`
	Image string `yaml:"image"`

	Command []string `yaml:"command"` // replaces entrypoint and command of the image
	Env     []string `yaml:"env"`     // NAME=value
	Cwd     string   `yaml:"cwd"`

	// Capabilities are CAP_ names, or "all" or "none" alone; none when not given.
	Capabilities    []string `yaml:"capabilities"`
	CapabilitiesAdd []string `yaml:"capabilities.add"`
	// Ambient is the ambient set; nil makes it the same as Capabilities.
	Ambient         []string `yaml:"ambient"`
	NoNewPrivileges *bool    `yaml:"noNewPrivileges"` // default true

	User           string `yaml:"user"` // user[:group], numbers or names; instead of UID and GID
	UID            *ID    `yaml:"uid"`
	GID            *ID    `yaml:"gid"`
	AdditionalGIDs []ID   `yaml:"additionalGids"`

	Mounts        []Mount  `yaml:"mounts"`
	Binds         []Bind   `yaml:"binds"`
	BindsAdd      []Bind   `yaml:"binds.add"`
	Tmpfs         []Tmpfs  `yaml:"tmpfs"`
	Devices       []Device `yaml:"devices"`
	ReadOnly      *bool    `yaml:"readonly"` // default false: changes go to memory
	MaskedPaths   []string `yaml:"maskedPaths"`
	ReadonlyPaths []string `yaml:"readonlyPaths"`
	// RootfsPropagation is private, slave, shared or unbindable, or one of these with an r before it.
	RootfsPropagation string `yaml:"rootfsPropagation"`

	Net         string      `yaml:"net"`    // host (the default), new, none or a path
	IPC         string      `yaml:"ipc"`    // host (the default), new or a path
	UTS         string      `yaml:"uts"`    // host (the default), new or a path
	PID         string      `yaml:"pid"`    // new (the default), host or a path
	UserNS      string      `yaml:"userns"` // host (the default), new or a path
	UIDMappings []IDMapping `yaml:"uidMappings"`
	GIDMappings []IDMapping `yaml:"gidMappings"`
	Hostname    string      `yaml:"hostname"`

	CgroupsPath string                `yaml:"cgroupsPath"`
	Resources   *specs.LinuxResources `yaml:"resources"`
	Rlimits     []Rlimit              `yaml:"rlimits"`
	OOMScoreAdj *int                  `yaml:"oomScoreAdj"`
	Sysctl      map[string]string     `yaml:"sysctl,number"`
	Annotations map[string]string     `yaml:"annotations"`

	Health  *Health  `yaml:"health"`  // services only
	Restart string   `yaml:"restart"` // services only: always (the default), on-failure, never
	Runtime *Runtime `yaml:"runtime"`
}

// Mount is an OCI mount. Type may be left out where Source or Destination say
// it (proc, sysfs, ...), Source and Destination where Type does. A Source
// without a slash and with no Type, or Type bind, is the name of a volume.
type Mount struct {
	Destination string   `yaml:"destination"`
	Type        string   `yaml:"type"`
	Source      string   `yaml:"source"`
	Options     []string `yaml:"options"`
}

// IsVolume says whether Source is the name of a volume.
func (m Mount) IsVolume() bool {
	if m.Type != "" && m.Type != "bind" || m.Source == "" || path.IsAbs(m.Source) {
		return false
	}
	_, guessed := MountDefaults(m.Source)
	return !guessed
}

// MountDefaults is the destination that a mount of a kernel file system has
// when it names none. ok is false for other types.
func MountDefaults(fsType string) (destination string, ok bool) {
	switch fsType {
	case "proc":
		return "/proc", true
	case "sysfs":
		return "/sys", true
	case "devpts":
		return "/dev/pts", true
	case "mqueue":
		return "/dev/mqueue", true
	case "cgroup", "cgroup2":
		return "/sys/fs/cgroup", true
	}
	return "", false
}

// Device is a device node made in the container and allowed to it. The path
// "all" makes none and allows every device of Type, or with Major and Minor the ones of that number.
type Device struct {
	Path  string `yaml:"path"`
	Type  string `yaml:"type"` // b, c, u, p; a with path all
	Major *int64 `yaml:"major"`
	Minor *int64 `yaml:"minor"`
	Mode  string `yaml:"mode"` // access: letters of rwm; default rwm
}

// IDMapping is a range of user or group ids in a user namespace.
type IDMapping struct {
	ContainerID uint32 `yaml:"containerID"`
	HostID      uint32 `yaml:"hostID"`
	Size        uint32 `yaml:"size"`
}

// Health is how the device finds out that a service works. Exactly one of HTTP,
// TCP and Exec is given; the rest have the defaults of image.Health.
type Health struct {
	HTTP     string   `yaml:"http"` // URL
	TCP      string   `yaml:"tcp"`  // host:port
	Exec     []string `yaml:"exec"` // argv in the container
	Interval Duration `yaml:"interval"`
	Timeout  Duration `yaml:"timeout"`
	Retries  int      `yaml:"retries"`
	Start    Duration `yaml:"start"` // how long it may be unhealthy after its start
}

// Runtime is what is done on the device around a container. Only Mkdir is done by
// Holdfast; the rest is LinuxKit's and refused by Validate, but for Namespace,
// which means containerd's and is ignored.
type Runtime struct {
	Mkdir      []string           `yaml:"mkdir"`
	Cgroups    []string           `yaml:"cgroups"`
	Mounts     []Mount            `yaml:"mounts"`
	Interfaces []RuntimeInterface `yaml:"interfaces"`
	BindNS     *BindNS            `yaml:"bindNS"`
	Namespace  string             `yaml:"namespace"`
}

// RuntimeInterface is a network device made for or moved into the container.
type RuntimeInterface struct {
	Name         string `yaml:"name"`
	Add          string `yaml:"add"`
	Peer         string `yaml:"peer"`
	CreateInRoot bool   `yaml:"createInRoot"`
}

// BindNS are paths that the container's namespaces are bound to.
type BindNS struct {
	Cgroup string `yaml:"cgroup"`
	IPC    string `yaml:"ipc"`
	Mnt    string `yaml:"mnt"`
	Net    string `yaml:"net"`
	PID    string `yaml:"pid"`
	User   string `yaml:"user"`
	UTS    string `yaml:"uts"`
}

// Unsupported lists what the device would have to do for this container and
// does not, as pairs of key and remedy.
func (im *Image) Unsupported() [][2]string {
	r := im.Runtime
	if r == nil {
		return nil
	}
	var list [][2]string
	if len(r.Interfaces) > 0 {
		list = append(list, [2]string{"runtime.interfaces", "make the network device in an onboot container with net: host and CAP_NET_ADMIN"})
	}
	if r.BindNS != nil && *r.BindNS != (BindNS{}) {
		list = append(list, [2]string{"runtime.bindNS", "use net: host, or one container for what shares a namespace"})
	}
	if len(r.Mounts) > 0 {
		list = append(list, [2]string{"runtime.mounts", "use mounts, tmpfs or disk.data"})
	}
	if len(r.Cgroups) > 0 {
		list = append(list, [2]string{"runtime.cgroups", "use resources; every container has a cgroup of its own"})
	}
	return list
}

// MergeLabel fills in what the spec left open from the image's label
// [Label], as LinuxKit does: a key of the spec replaces the label's,
// binds.add and capabilities.add append to it, runtime is merged key by key.
// The label is as strict as a spec; the error is [*Errors]. What a label asks for
// and the device does not do, image/runtime refuses.
func (im *Image) MergeLabel(label []byte) error {
	file := "label " + Label
	root, err := parseYAML(file, label) // JSON is YAML
	if err != nil {
		return err
	}
	var from Image
	d := decoder{report: report{pos: positions{"": {file, 1, 1}}}, file: file}
	d.value(root, "", reflect.ValueOf(&from).Elem(), 0)
	d.checkImage(&from, "", kindLabel)
	if err := d.err(); err != nil {
		return err
	}
	from.Name, from.Image = "", ""
	if im.User != "" || im.UID != nil || im.GID != nil {
		from.User, from.UID, from.GID = "", nil, nil // one user, from one place
	}
	bindsAdd := slices.Concat(from.BindsAdd, im.BindsAdd)
	capabilitiesAdd := slices.Concat(from.CapabilitiesAdd, im.CapabilitiesAdd)
	if im.Runtime != nil && from.Runtime != nil {
		merged := *im.Runtime
		fillZero(reflect.ValueOf(&merged).Elem(), reflect.ValueOf(*from.Runtime))
		im.Runtime = &merged
	}
	fillZero(reflect.ValueOf(im).Elem(), reflect.ValueOf(from))
	im.BindsAdd, im.CapabilitiesAdd = bindsAdd, capabilitiesAdd
	return nil
}

// fillZero copies the fields that to has not got. An empty list is not nil, so it counts as given.
func fillZero(to, from reflect.Value) {
	for i := range to.NumField() {
		if to.Field(i).IsZero() {
			to.Field(i).Set(from.Field(i))
		}
	}
}

// Capabilities lists the capabilities of Linux, sorted (capabilities(7), Linux 5.9 and later).
func Capabilities() []string {
	return []string{"CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_BPF",
		"CAP_CHECKPOINT_RESTORE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER",
		"CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_KILL", "CAP_LEASE", "CAP_LINUX_IMMUTABLE",
		"CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE",
		"CAP_NET_BROADCAST", "CAP_NET_RAW", "CAP_PERFMON", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
		"CAP_SETUID", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_SYS_MODULE",
		"CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
		"CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM"}
}
