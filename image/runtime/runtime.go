// Package runtime turns a container of the spec and the config of its image
// into the OCI runtime's config.json and the entry that the device's agent
// reads. Start with [Config]; a builder also needs [Mountpoints].
//
// It writes version 1.0.2 of the OCI runtime specification, which every runc
// since 1.0 takes, and no seccomp section (the static runc has no libseccomp),
// no hooks, no SELinux or AppArmor label. The bytes depend on the arguments alone.
//
// # Defaults
//
// They keep a container from the device; each can be given up by name:
//
//	capabilities     none; what is listed is in all five sets, so that a
//	                 process that is not root has it too
//	noNewPrivileges  true
//	user             the image's, else root
//	net, ipc, uts    the device's (host), as in LinuxKit
//	pid              new; mount and cgroup namespaces are always new
//	userns           the device's (host)
//	mounts           /proc, /dev, /dev/pts, /dev/shm, /dev/mqueue, /sys and
//	                 /sys/fs/cgroup, the last two read-only
//	binds            rw,rbind,rprivate: what either side mounts later stays there.
//	                 Options without bind or rbind get rbind, without a propagation rprivate
//	devices          runc's (null, zero, full, random, urandom, tty, console, ptmx)
//	masked and read-only paths  runc's
//	cgroup           /holdfast/NAME
//	env              the image's, the spec's by name over it, and a PATH
//
// A container with CAP_SYS_ADMIN has no masked and read-only paths and a writable
// /sys unless the spec says otherwise: it could undo them, and LinuxKit's
// system containers write there.
//
// # What it does not protect
//
// Without userns: new, root in the container is root of the device, held back by
// the capabilities alone. net: host, the default, shares every socket of the
// device, abstract ones too.
package runtime

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/spec"
)

const (
	ociVersion  = "1.0.2"
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// VolumesPath holds one folder for each volume that has an image, in the root.
	VolumesPath = image.ContainersPath + "/volumes"
	// MemoryVolumesPath holds one folder for each volume without an image, on the
	// device's /run; the agent makes them (image.Container.Mkdir).
	MemoryVolumesPath = "/run/volumes"
)

// ImageConfig is what an image says of itself.
type ImageConfig struct {
	Entrypoint, Cmd, Env []string
	WorkingDir           string
	User                 string // user[:group], numbers or names
	// Passwd and Group read the image's /etc/passwd and /etc/group. They are called
	// only when needed; an error that is fs.ErrNotExist, or nil here, means that there is none.
	Passwd, Group func() ([]byte, error)
}

// Section is the part of the spec a container stands in.
type Section string

// The sections; the zero value is [Services].
const (
	OnBoot     Section = "onboot"
	Services   Section = "services"
	OnShutdown Section = "onshutdown"
)

// Options places a container in the release.
type Options struct {
	Section Section
	Index   int           // in the section, for OnBoot and OnShutdown
	Volumes []spec.Volume // of the spec, for binds and mounts by name
}

// Config makes config.json and the agent's entry for one container. The label
// is already merged into c ([spec.Image.MergeLabel]). The rootfs lies beside
// config.json, in rootfs.
func Config(c spec.Image, img ImageConfig, o Options) (config []byte, entry image.Container, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("container %s: %w", c.Name, err)
		}
	}()
	if list := c.Unsupported(); len(list) > 0 {
		return nil, entry, fmt.Errorf("%s is not in this version: %s", list[0][0], list[0][1])
	}
	process, err := processOf(&c, &img)
	if err != nil {
		return nil, entry, err
	}
	namespaces, err := namespacesOf(&c)
	if err != nil {
		return nil, entry, err
	}
	admin := slices.Contains(process.Capabilities.Bounding, "CAP_SYS_ADMIN")
	m := mounts{volumes: o.Volumes}
	if err := m.build(&c, admin); err != nil {
		return nil, entry, err
	}
	readOnly := c.ReadOnly != nil && *c.ReadOnly
	oci := specs.Spec{
		Version:     ociVersion,
		Process:     process,
		Root:        &specs.Root{Path: "rootfs", Readonly: readOnly},
		Hostname:    c.Hostname,
		Mounts:      m.list,
		Annotations: c.Annotations,
		Linux: &specs.Linux{
			UIDMappings:       mappings(c.UIDMappings),
			GIDMappings:       mappings(c.GIDMappings),
			Sysctl:            c.Sysctl,
			Resources:         resourcesOf(&c),
			CgroupsPath:       cmp.Or(c.CgroupsPath, "/holdfast/"+c.Name),
			Namespaces:        namespaces,
			Devices:           devicesOf(&c),
			RootfsPropagation: c.RootfsPropagation,
			MaskedPaths:       c.MaskedPaths,
			ReadonlyPaths:     c.ReadonlyPaths,
		},
	}
	if c.MaskedPaths == nil && !admin {
		oci.Linux.MaskedPaths = maskedPaths()
	}
	if c.ReadonlyPaths == nil && !admin {
		oci.Linux.ReadonlyPaths = readonlyPaths()
	}
	entry = entryOf(&c, o)
	entry.Mkdir = append(entry.Mkdir, m.mkdir...)
	config, err = encode(&oci)
	return config, entry, err
}

func encode(oci *specs.Spec) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	err := enc.Encode(oci)
	return b.Bytes(), err
}

func entryOf(c *spec.Image, o Options) image.Container {
	section := cmp.Or(o.Section, Services)
	e := image.Container{
		Name:     c.Name,
		Bundle:   path.Join(image.ContainersPath, string(section), c.Name),
		ReadOnly: c.ReadOnly != nil && *c.ReadOnly,
	}
	if section != Services {
		e.Bundle = path.Join(image.ContainersPath, string(section), fmt.Sprintf("%03d-%s", o.Index, c.Name))
	} else {
		e.Restart = cmp.Or(c.Restart, "always")
	}
	if c.Runtime != nil {
		for _, folder := range c.Runtime.Mkdir {
			e.Mkdir = append(e.Mkdir, path.Join("/", folder))
		}
	}
	if h := c.Health; h != nil {
		e.Health = &image.Health{
			HTTP: h.HTTP, TCP: h.TCP, Exec: h.Exec,
			IntervalSec: h.Interval.Seconds(), TimeoutSec: h.Timeout.Seconds(),
			Retries: h.Retries, StartSec: h.Start.Seconds(),
		}
	}
	return e
}

func processOf(c *spec.Image, img *ImageConfig) (*specs.Process, error) {
	args := c.Command
	if args == nil {
		args = slices.Concat(img.Entrypoint, img.Cmd)
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("the image has neither entrypoint nor command: write command")
	}
	user, err := userOf(c, img)
	if err != nil {
		return nil, err
	}
	capabilities, err := capabilitiesOf(c)
	if err != nil {
		return nil, err
	}
	p := &specs.Process{
		User:            user,
		Args:            args,
		Env:             environment(img.Env, c.Env),
		Cwd:             path.Join("/", cmp.Or(c.Cwd, img.WorkingDir)),
		Capabilities:    capabilities,
		NoNewPrivileges: c.NoNewPrivileges == nil || *c.NoNewPrivileges,
		OOMScoreAdj:     c.OOMScoreAdj,
	}
	for _, l := range c.Rlimits {
		p.Rlimits = append(p.Rlimits, specs.POSIXRlimit{Type: l.Type, Soft: l.Soft, Hard: l.Hard})
	}
	return p, nil
}

// environment puts own over base, variable by variable, and makes sure of a PATH.
func environment(base, own []string) []string {
	env := []string{}
	for _, e := range slices.Concat(base, own) {
		name, _, _ := strings.Cut(e, "=")
		i := slices.IndexFunc(env, func(old string) bool { return strings.HasPrefix(old, name+"=") })
		if i < 0 {
			env = append(env, e)
		} else {
			env[i] = e
		}
	}
	if !slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
		env = append([]string{defaultPath}, env...)
	}
	return env
}

func capabilitiesOf(c *spec.Image) (*specs.LinuxCapabilities, error) {
	base, err := expand(c.Capabilities)
	if err != nil {
		return nil, err
	}
	add, err := expand(c.CapabilitiesAdd)
	if err != nil {
		return nil, err
	}
	ambient, err := expand(c.Ambient)
	if err != nil {
		return nil, err
	}
	all := slices.Concat(base, add, ambient) // an ambient capability has to be permitted and inheritable
	slices.Sort(all)
	all = slices.Compact(all)
	if c.Ambient == nil {
		ambient = all
	}
	return &specs.LinuxCapabilities{Bounding: all, Effective: all, Inheritable: all, Permitted: all, Ambient: ambient}, nil
}

// expand checks the names of a capability list and resolves all and none.
func expand(list []string) ([]string, error) {
	known := spec.Capabilities()
	if len(list) == 1 {
		switch strings.ToLower(list[0]) {
		case "all":
			return known, nil
		case "none":
			return nil, nil
		}
	}
	for _, name := range list {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("unknown capability %q", name)
		}
	}
	return slices.Sorted(slices.Values(list)), nil
}

// resourcesOf is the spec's limits with the device rules: nothing but what is listed.
func resourcesOf(c *spec.Image) *specs.LinuxResources {
	r := specs.LinuxResources{}
	if c.Resources != nil {
		r = *c.Resources
	}
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	rules = append(rules, r.Devices...)
	for _, d := range c.Devices {
		rules = append(rules, specs.LinuxDeviceCgroup{
			Allow: true, Type: d.Type, Major: d.Major, Minor: d.Minor, Access: cmp.Or(d.Mode, "rwm"),
		})
	}
	r.Devices = rules
	return &r
}

// devicesOf is the nodes to make. Their mode is runc's, 0666: the device rules decide.
func devicesOf(c *spec.Image) []specs.LinuxDevice {
	var list []specs.LinuxDevice
	for _, d := range c.Devices {
		if d.Path == "all" {
			continue
		}
		node := specs.LinuxDevice{Path: d.Path, Type: d.Type}
		if d.Major != nil {
			node.Major = *d.Major
		}
		if d.Minor != nil {
			node.Minor = *d.Minor
		}
		list = append(list, node)
	}
	return list
}

func mappings(list []spec.IDMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range list {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.ContainerID, HostID: m.HostID, Size: m.Size})
	}
	return out
}

// maskedPaths is what runc spec writes.
func maskedPaths() []string {
	return []string{"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware"}
}

// readonlyPaths is what runc spec writes.
func readonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}

const maxID = math.MaxUint32 - 1 // (uid_t)-1 means "leave it as it is" to the kernel
