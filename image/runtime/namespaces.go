package runtime

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-os/holdfast/image/spec"
)

// namespacesOf lists the namespaces in a fixed order and refuses settings that
// would reach the device's own, which runc would only refuse on the device.
func namespacesOf(c *spec.Image) ([]specs.LinuxNamespace, error) {
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	own := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range []struct {
		kind specs.LinuxNamespaceType
		text string
	}{
		{specs.PIDNamespace, c.PID},
		{specs.NetworkNamespace, c.Net},
		{specs.IPCNamespace, c.IPC},
		{specs.UTSNamespace, c.UTS},
		{specs.UserNamespace, c.UserNS},
	} {
		text := ns.text
		if text == "" && ns.kind == specs.PIDNamespace {
			text = "new"
		}
		switch {
		case text == "" || text == "host" || text == "root":
			continue
		case text == "new" || text == "none" && ns.kind == specs.NetworkNamespace:
			list = append(list, specs.LinuxNamespace{Type: ns.kind})
		case path.IsAbs(text):
			list = append(list, specs.LinuxNamespace{Type: ns.kind, Path: text})
		default:
			return nil, fmt.Errorf("%s namespace %q is not known: one of host, new and a path", ns.kind, text)
		}
		own[ns.kind] = true
	}
	if c.Hostname != "" && !own[specs.UTSNamespace] {
		return nil, fmt.Errorf("hostname %q would be the device's: add uts: new", c.Hostname)
	}
	if err := checkUserNamespace(c, own); err != nil {
		return nil, err
	}
	return list, checkSysctl(c.Sysctl, own)
}

func checkUserNamespace(c *spec.Image, own map[specs.LinuxNamespaceType]bool) error {
	mapped := len(c.UIDMappings) > 0 && len(c.GIDMappings) > 0
	switch {
	case c.UserNS == "new" && !mapped:
		return fmt.Errorf("userns: new needs uidMappings and gidMappings")
	case (len(c.UIDMappings) > 0 || len(c.GIDMappings) > 0) && c.UserNS != "new":
		return fmt.Errorf("uidMappings and gidMappings need userns: new")
	case own[specs.UserNamespace] && !own[specs.NetworkNamespace]:
		return fmt.Errorf("userns: %s needs net: new: the kernel lets only the owner of the network namespace mount /sys", c.UserNS)
	}
	return nil
}

// checkSysctl lets a container set only what is its own.
func checkSysctl(m map[string]string, own map[specs.LinuxNamespaceType]bool) error {
	for _, key := range slices.Sorted(maps.Keys(m)) {
		name := strings.ReplaceAll(key, "/", ".")
		kind, setting := specs.LinuxNamespaceType(""), ""
		switch {
		case strings.HasPrefix(name, "net."):
			kind, setting = specs.NetworkNamespace, "net: new"
		case strings.HasPrefix(name, "fs.mqueue."), strings.HasPrefix(name, "kernel.msg"), strings.HasPrefix(name, "kernel.shm"), name == "kernel.sem":
			kind, setting = specs.IPCNamespace, "ipc: new"
		case name == "kernel.domainname":
			kind, setting = specs.UTSNamespace, "uts: new"
		default:
			return fmt.Errorf("sysctl %s is the device's: use sysctl at the top of the spec", key)
		}
		if !own[kind] {
			return fmt.Errorf("sysctl %s would be the device's: add %s, or use sysctl at the top of the spec", key, setting)
		}
	}
	return nil
}
