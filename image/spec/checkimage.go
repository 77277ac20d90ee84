package spec

import (
	"path"
	"regexp"
	"slices"
	"strings"
)

// checkImage reports what is wrong in one container's entry.
func (r *report) checkImage(im *Image, at string, k kind) {
	if k != kindLabel {
		for _, text := range []keyed[string]{{"name", im.Name}, {"image", im.Image}} {
			if text.value == "" {
				r.errorf(join(at, text.key), "", "is missing")
			}
		}
		// The name becomes a folder and a cgroup.
		r.pattern(join(at, "name"), im.Name, `^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`, "1 to 63 letters, digits, dots, hyphens and underscores")
		r.imageName(join(at, "image"), im.Image)
	}
	if k == kindOnBoot {
		if im.Health != nil {
			r.errorf(join(at, "health"), "", "only services have a health check")
		}
		if im.Restart != "" {
			r.errorf(join(at, "restart"), "", "only services are restarted")
		}
	}
	if im.Health != nil {
		r.checkHealth(join(at, "health"), im.Health)
	}
	r.oneOf(join(at, "restart"), im.Restart, "always", "on-failure", "never")
	r.checkProcess(im, at)
	r.checkNamespaces(im, at)
	r.checkFilesystems(im, at)
	r.checkResources(im, at)
	r.checkRuntime(im, at)
}

func (r *report) checkProcess(im *Image, at string) {
	for _, list := range []keyed[[]string]{{"capabilities", im.Capabilities}, {"capabilities.add", im.CapabilitiesAdd}, {"ambient", im.Ambient}} {
		for i, c := range list.value {
			r.checkCapability(index(join(at, list.key), i), c, len(list.value))
		}
	}
	for i, e := range im.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			r.errorf(index(join(at, "env"), i), "write NAME=value", "%q sets no variable", e)
		}
	}
	r.absolute(join(at, "cwd"), im.Cwd)
	if im.Command != nil && len(im.Command) == 0 {
		r.errorf(join(at, "command"), "leave it out for the image's own", "the command is empty")
	}
	if im.User != "" {
		user, group, _ := strings.Cut(im.User, ":")
		for i, text := range []string{user, group} {
			if _, err := ParseID(text); err != nil && (i == 0 || strings.Contains(im.User, ":")) {
				r.errorf(join(at, "user"), "write user or user:group", "%s", err)
			}
		}
		if im.UID != nil || im.GID != nil {
			r.errorf(join(at, "user"), "", "user excludes uid and gid")
		}
	}
	if v := im.OOMScoreAdj; v != nil && (*v < -1000 || *v > 1000) {
		r.errorf(join(at, "oomScoreAdj"), "", "%d is not between -1000 and 1000", *v)
	}
	seen := map[string]bool{}
	for i, l := range im.Rlimits {
		if seen[l.Type] && l.Type != "" {
			r.errorf(index(join(at, "rlimits"), i), "", "%s is given twice", l.Type)
		}
		seen[l.Type] = true
	}
}

func (r *report) checkCapability(at, name string, of int) {
	if lower := strings.ToLower(name); lower == "all" || lower == "none" {
		if of > 1 {
			r.errorf(at, "", "%q stands alone or not at all", name)
		}
		return
	}
	if !slices.Contains(Capabilities(), name) && name != "" {
		full := strings.ToUpper(name)
		if !strings.HasPrefix(full, "CAP_") {
			full = "CAP_" + full
		}
		r.errorf(at, didYouMean(full, Capabilities()), "unknown capability %q", name)
	}
}

func (r *report) checkNamespaces(im *Image, at string) {
	for _, ns := range []keyed[string]{{"net", im.Net}, {"ipc", im.IPC}, {"uts", im.UTS}, {"pid", im.PID}, {"userns", im.UserNS}} {
		allowed := []string{"host", "root", "new"}
		if ns.key == "net" {
			allowed = append(allowed, "none")
		}
		if !path.IsAbs(ns.value) {
			r.oneOf(join(at, ns.key), ns.value, allowed...)
		}
	}
	r.pattern(join(at, "hostname"), im.Hostname, `^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$`, "1 to 63 letters, digits, dots and hyphens")
	r.checkSysctl(join(at, "sysctl"), im.Sysctl)
}

func (r *report) checkFilesystems(im *Image, at string) {
	for i, m := range im.Mounts {
		p := index(join(at, "mounts"), i)
		r.absolute(p+".destination", m.Destination)
		if m.Type == "" && m.Source == "" && m.Destination == "" {
			r.errorf(p, "", "the mount has neither type, source nor destination")
		}
	}
	for i, d := range im.Devices {
		r.checkDevice(index(join(at, "devices"), i), d)
	}
	for _, list := range []keyed[[]string]{{"maskedPaths", im.MaskedPaths}, {"readonlyPaths", im.ReadonlyPaths}} {
		for i, p := range list.value {
			r.absolute(index(join(at, list.key), i), p)
		}
	}
	r.oneOf(join(at, "rootfsPropagation"), im.RootfsPropagation,
		"private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
}

func (r *report) checkDevice(at string, d Device) {
	all := d.Path == "all"
	switch {
	case d.Path == "" && !r.reported(at+".path"):
		r.errorf(at, "", "the device has no path")
	case !all:
		r.absolute(at+".path", d.Path)
	}
	switch {
	case d.Type == "" && !r.reported(at+".type"):
		r.errorf(at, "b for a block device, c for a character device", "the device has no type")
	case all:
		r.oneOf(at+".type", d.Type, "a", "b", "c")
	default:
		r.oneOf(at+".type", d.Type, "b", "c", "u", "p")
	}
	if !all && d.Type != "p" && (d.Major == nil || d.Minor == nil) {
		r.errorf(at, "", "the device needs major and minor")
	}
	if !regexp.MustCompile(`^[rwm]{0,3}$`).MatchString(d.Mode) {
		r.errorf(at+".mode", "letters of rwm: read, write, make the node", "%q is not an access mode", d.Mode)
	}
}

// checkResources names the limits that cgroup version 2, the one the device has, does not know.
func (r *report) checkResources(im *Image, at string) {
	if im.CgroupsPath != "" && (!path.IsAbs(im.CgroupsPath) || path.Clean(im.CgroupsPath) != im.CgroupsPath) {
		r.errorf(join(at, "cgroupsPath"), "", "%q is not a clean absolute path", im.CgroupsPath)
	}
	if im.Resources == nil {
		return
	}
	at = join(at, "resources")
	for _, key := range []string{"memory.kernel", "memory.kernelTCP", "memory.swappiness", "memory.disableOOMKiller",
		"cpu.realtimeRuntime", "cpu.realtimePeriod", "blockIO.leafWeight", "network"} {
		if r.pos.has(join(at, key)) {
			r.warnf(join(at, key), "", "is passed on, but cgroup version 2 has no such limit")
		}
	}
}

func (r *report) checkRuntime(im *Image, at string) {
	if im.Runtime == nil {
		return
	}
	for i, p := range im.Runtime.Mkdir {
		r.relative(index(join(at, "runtime.mkdir"), i), p)
	}
	if im.Runtime.Namespace != "" {
		r.warnf(join(at, "runtime.namespace"), "", "ignored: there is no containerd")
	}
	for _, u := range im.Unsupported() {
		r.warnf(join(at, u[0]), u[1], "not in this version; a build refuses it")
	}
}
