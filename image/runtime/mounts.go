package runtime

import (
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-os/holdfast/image/spec"
)

// mounts collects a container's mounts, one to a destination.
type mounts struct {
	volumes []spec.Volume
	list    []specs.Mount
	mkdir   []string // folders of memory volumes
}

// build fills the list, parents before children.
func (m *mounts) build(c *spec.Image, admin bool) error {
	standard := standardMounts(admin)
	for _, t := range c.Tmpfs {
		options := t.Options
		if options == nil {
			options = []string{"nosuid", "nodev"}
		}
		if err := m.add(specs.Mount{Destination: t.Destination, Type: "tmpfs", Source: "tmpfs", Options: options}, false); err != nil {
			return err
		}
	}
	for _, raw := range c.Mounts {
		if err := m.addMount(raw); err != nil {
			return err
		}
	}
	for _, b := range c.Binds {
		if err := m.addBind(b.Source, b.Destination, b.Options, false); err != nil {
			return err
		}
	}
	for _, b := range c.BindsAdd { // the label's first, then the spec's, which wins
		if err := m.addBind(b.Source, b.Destination, b.Options, true); err != nil {
			return err
		}
	}
	for _, s := range standard {
		if !m.covers(s.Destination) {
			m.list = append(m.list, s)
		}
	}
	slices.SortFunc(m.list, func(a, b specs.Mount) int {
		return slices.Compare(strings.Split(a.Destination, "/"), strings.Split(b.Destination, "/"))
	})
	return nil
}

// covers says whether the spec mounts something of its own at the place, or binds
// a folder of the device above it, which brings what the device has there.
func (m *mounts) covers(destination string) bool {
	return slices.ContainsFunc(m.list, func(o specs.Mount) bool {
		return o.Destination == destination || o.Type == "bind" && strings.HasPrefix(destination, o.Destination+"/")
	})
}

func (m *mounts) add(mount specs.Mount, replace bool) error {
	mount.Destination = path.Clean(mount.Destination)
	if !path.IsAbs(mount.Destination) || mount.Destination == "/" {
		return fmt.Errorf("mount at %q: not an absolute path below /", mount.Destination)
	}
	i := slices.IndexFunc(m.list, func(o specs.Mount) bool { return o.Destination == mount.Destination })
	if i < 0 {
		m.list = append(m.list, mount)
		return nil
	}
	old := m.list[i]
	same := old.Type == mount.Type && old.Source == mount.Source && slices.Equal(old.Options, mount.Options)
	if !same && !replace {
		return fmt.Errorf("%s and %s are both to be mounted at %s", old.Source, mount.Source, mount.Destination)
	}
	m.list[i] = mount
	return nil
}

func (m *mounts) addMount(raw spec.Mount) error {
	if raw.IsVolume() || raw.Type == "bind" {
		return m.addBind(raw.Source, raw.Destination, raw.Options, false)
	}
	mount := specs.Mount{Destination: raw.Destination, Type: raw.Type, Source: raw.Source, Options: raw.Options}
	if mount.Type == "" {
		if _, ok := spec.MountDefaults(mount.Source); ok {
			mount.Type = mount.Source
		} else {
			mount.Type = typeAt(mount.Destination)
		}
	}
	if mount.Type == "" {
		return fmt.Errorf("mount at %s has no type: for a path of the device write type: bind", mount.Destination)
	}
	if mount.Destination == "" {
		mount.Destination, _ = spec.MountDefaults(mount.Type)
	}
	if mount.Destination == "" {
		return fmt.Errorf("mount of type %s has no destination", mount.Type)
	}
	if mount.Source == "" {
		mount.Source = mount.Type
	}
	return m.add(mount, false)
}

// typeAt is the file system that belongs at a well-known place.
func typeAt(destination string) string {
	for _, s := range standardMounts(false) {
		if s.Destination == destination {
			return s.Type
		}
	}
	return ""
}

// addBind adds a bind of a path of the device or of a volume.
func (m *mounts) addBind(source, destination string, options []string, replace bool) error {
	readOnly := false
	if !path.IsAbs(source) {
		i := slices.IndexFunc(m.volumes, func(v spec.Volume) bool { return v.Name == source })
		if i < 0 {
			return fmt.Errorf("there is no volume %q", source)
		}
		v := m.volumes[i]
		readOnly = v.ReadOnly || v.Image != ""
		if readOnly && slices.Contains(options, "rw") {
			return fmt.Errorf("volume %q is read-only and cannot be mounted rw", source)
		}
		source = path.Join(VolumesPath, v.Name)
		if v.Image == "" {
			source = path.Join(MemoryVolumesPath, v.Name)
			if !slices.Contains(m.mkdir, source) {
				m.mkdir = append(m.mkdir, source)
			}
		}
	}
	mount := specs.Mount{Destination: destination, Type: "bind", Source: source, Options: bindOptions(options, readOnly)}
	return m.add(mount, replace)
}

// bindOptions completes the options of a bind: recursive and private unless stated.
func bindOptions(options []string, readOnly bool) []string {
	options = slices.Clone(options)
	has := func(names ...string) bool {
		return slices.ContainsFunc(options, func(o string) bool { return slices.Contains(names, o) })
	}
	if readOnly && !has("ro") {
		options = append(options, "ro")
	}
	if !has("ro", "rw") {
		options = append(options, "rw")
	}
	if !has("bind", "rbind") {
		options = append(options, "rbind")
	}
	if !has("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable") {
		options = append(options, "rprivate")
	}
	return options
}

// standardMounts is what every container has. admin leaves /sys writable.
func standardMounts(admin bool) []specs.Mount {
	sys := []string{"nosuid", "noexec", "nodev", "ro"}
	if admin {
		sys = sys[:3]
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: sys},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
	}
}

// Mountpoints lists the paths in the rootfs that the runtime mounts on, sorted.
// A read-only rootfs has to have them all: the runtime cannot make them there.
// Make each missing one a folder; a bind of a single file has to be in the image.
// What lies inside another mount is left out, the runtime makes it there.
func Mountpoints(config []byte) ([]string, error) {
	var oci specs.Spec
	if err := json.Unmarshal(config, &oci); err != nil {
		return nil, fmt.Errorf("read mounts of config.json: %w", err)
	}
	var list []string
	for _, m := range oci.Mounts {
		inside := slices.ContainsFunc(list, func(above string) bool { return strings.HasPrefix(m.Destination, above+"/") })
		if !inside {
			list = append(list, m.Destination)
		}
	}
	return list, nil
}
