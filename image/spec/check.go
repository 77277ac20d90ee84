package spec

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image"
)

const mib = 1 << 20

// kind is the section an image stands in.
type kind int

const (
	kindOnBoot kind = iota
	kindService
	kindLabel // no name and image of its own
)

// sections lists the images of a spec with their paths.
func (s *Spec) sections(each func(path string, k kind, im *Image)) {
	for _, section := range []struct {
		name string
		kind kind
		list []Image
	}{{"onboot", kindOnBoot, s.OnBoot}, {"onshutdown", kindOnBoot, s.OnShutdown}, {"services", kindService, s.Services}} {
		for i := range section.list {
			each(fmt.Sprintf("%s[%d]", section.name, i), section.kind, &section.list[i])
		}
	}
}

// checkSpec reports what is wrong in what was written. What is missing is Validate's.
func (r *report) checkSpec(s *Spec) {
	r.pattern("name", s.Name, `^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`, "1 to 32 letters a-z, digits and hyphens")
	// No "+": systemd-boot reads it as the beginning of a boot counter.
	r.pattern("version", s.Version, `^\d+(\.\d+){0,3}(-[0-9A-Za-z.-]{1,40})?$`, "numbers with dots, such as 1.0.0 or 1.0.0-rc1")
	r.oneOf("arch", s.Arch, "amd64", "arm64")
	r.pattern("hostname", s.Hostname, `^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$`, "1 to 63 letters, digits, dots and hyphens")
	r.checkKernel(&s.Kernel)
	for i, name := range s.Init {
		at := index("init", i)
		r.imageName(at, name)
		if repo, _, _ := strings.Cut(name, ":"); repo == "linuxkit/init" || repo == "linuxkit/containerd" {
			r.warnf(at, "remove it", "Holdfast's agent is PID 1 and runs the containers; this image only takes space")
		}
	}
	if len(s.Handoff) > 0 && !path.IsAbs(s.Handoff[0]) {
		r.errorf("handoff", "", "%q is not an absolute path", s.Handoff[0])
	}
	r.checkSysctl("sysctl", s.Sysctl)
	r.checkNetwork(s.Network)
	r.checkDisk(&s.Disk)
	r.checkSeal(s.Seal)
	r.oneOf("secureboot.enroll", s.SecureBoot.Enroll, "off", "manual", "force")
	r.checkUpdate(&s.Update)
	r.checkEvidence(&s.Evidence)
	r.checkRecovery(&s.Recovery)
	for i := range s.Files {
		r.checkFile(index("files", i), &s.Files[i])
	}
	r.checkVolumes(s.Volumes)
	r.checkImages(s)
	if s.Trust != nil {
		r.warnf("trust", "name images by digest (IMAGE@sha256:...) to pin them",
			"ignored, as in LinuxKit since 2021: no image signature is checked")
	}
}

// checkImages checks every image and that services have different names.
func (r *report) checkImages(s *Spec) {
	names := map[string]bool{}
	s.sections(func(_ string, _ kind, im *Image) { names[im.Name] = true })
	services := map[string]string{}
	s.sections(func(at string, k kind, im *Image) {
		r.checkImage(im, at, k)
		for _, id := range []keyed[*ID]{{"uid", im.UID}, {"gid", im.GID}} {
			if id.value != nil && id.value.Name != "" && names[id.value.Name] {
				r.warnf(at+"."+id.key, "", "LinuxKit gives the container %q an id of its own; here the name is looked up in the image", id.value.Name)
			}
		}
		if first, dup := services[im.Name]; dup && k == kindService && im.Name != "" {
			r.errorf(join(at, "name"), "", "service %q is there already, at %s", im.Name, r.pos.at(first))
		} else if k == kindService {
			services[im.Name] = join(at, "name")
		}
	})
}

func (r *report) checkKernel(k *Kernel) {
	r.imageName("kernel.image", k.Image)
	if strings.ContainsAny(k.Cmdline, "\n\x00") {
		r.errorf("kernel.cmdline", "", "the command line has a line break or a zero byte")
	}
	// COMMAND_LINE_SIZE of Linux on x86; the root hash and our own words need the rest.
	if longest := 1536; len(k.Cmdline) > longest {
		r.errorf("kernel.cmdline", "", "%d bytes are more than the %d that fit", len(k.Cmdline), longest)
	}
	r.relative("kernel.binary", k.Binary)
	if k.Tar != "none" {
		r.relative("kernel.tar", k.Tar)
	}
	for i, m := range k.Modules {
		r.pattern(index("kernel.modules", i), m, `^[A-Za-z0-9_-]+$`, "the name of a module, such as virtio_net")
	}
	if k.Ucode != "" {
		r.warnf("kernel.ucode", "", "ignored: microcode in the boot image is not in this version")
	}
}

// relative refuses a path that leaves the folder it is in.
func (r *report) relative(at, p string) {
	if slices.Contains(strings.Split(p, "/"), "..") {
		r.errorf(at, "", "%q leaves its folder", p)
	}
}

const channelForm = `^[a-z0-9][a-z0-9-]{0,30}$`

// ChannelHint says what [ValidChannel] accepts.
const ChannelHint = "1 to 31 letters a-z, digits and hyphens"

// ValidChannel says whether a spec can name that channel of updates.
func ValidChannel(s string) bool { return regexp.MustCompile(channelForm).MatchString(s) }

func (r *report) pattern(at, text, expression, what string) {
	if text != "" && !regexp.MustCompile(expression).MatchString(text) {
		r.errorf(at, "use "+what, "%q is not allowed here", text)
	}
}

func (r *report) oneOf(at, text string, allowed ...string) {
	if text == "" || slices.Contains(allowed, text) {
		return
	}
	remedy := didYouMean(text, allowed)
	if remedy == "" {
		remedy = "one of " + strings.Join(allowed, ", ")
	}
	r.errorf(at, remedy, "%q is not known here", text)
}

func (r *report) absolute(at, p string) {
	if p != "" && !path.IsAbs(p) {
		r.errorf(at, "", "%q is not an absolute path", p)
	}
}

// imageName checks the form loosely; the registry client knows the rest.
func (r *report) imageName(at, name string) {
	if strings.ContainsAny(name, " \t\n\"'") {
		r.errorf(at, "", "%q is not the name of an image", name)
	}
}

func (r *report) checkSysctl(at string, m map[string]string) {
	for _, key := range slices.Sorted(maps.Keys(m)) {
		value := m[key]
		if !regexp.MustCompile(`^[a-z0-9_][A-Za-z0-9_./*-]*$`).MatchString(key) || strings.Contains(key, "..") {
			r.errorf(join(at, key), `write net.ipv4.ip_forward: "1"`, "%q is not the name of a sysctl", key)
		}
		if strings.ContainsAny(value, "\n\x00") {
			r.errorf(join(at, key), "", "the value has a line break")
		}
	}
}

func (r *report) checkNetwork(list []Interface) {
	seen := map[string]bool{}
	for i, nic := range list {
		at := index("network", i)
		if nic.Name == "" && !r.reported(at+".name") {
			r.errorf(at, `write name: eth0, or name: "*" for the first with a link`, "the interface has no name")
		}
		if nic.Name != "*" {
			r.pattern(at+".name", nic.Name, `^[A-Za-z0-9_.-]{1,15}$`, "1 to 15 letters, digits, dots, hyphens and underscores")
		}
		if seen[nic.Name] {
			r.errorf(at+".name", "", "interface %q is there already", nic.Name)
		}
		seen[nic.Name] = true
		if !nic.DHCP && len(nic.Addresses) == 0 && !r.reported(at+".dhcp") && !r.reported(at+".addresses") {
			r.errorf(at, "give dhcp: true or addresses", "interface %q gets no address", nic.Name)
		}
		r.checkAddresses(at, nic)
	}
}

func (r *report) checkAddresses(at string, nic Interface) {
	var nets []netip.Prefix
	for i, a := range nic.Addresses {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			r.errorf(fmt.Sprintf("%s.addresses[%d]", at, i), "write the address with its prefix: 10.0.0.2/24", "%q is not an address", a)
			continue
		}
		nets = append(nets, p)
	}
	if nic.Gateway != "" {
		gw, err := netip.ParseAddr(nic.Gateway)
		switch {
		case err != nil:
			r.errorf(at+".gateway", "", "%q is not an IP address", nic.Gateway)
		case len(nets) == len(nic.Addresses) && !slices.ContainsFunc(nets, func(p netip.Prefix) bool { return p.Contains(gw) }) && !gw.IsLinkLocalUnicast():
			r.errorf(at+".gateway", "", "gateway %s is in none of the interface's networks", gw)
		}
	}
	for i, a := range nic.DNS {
		if _, err := netip.ParseAddr(a); err != nil {
			r.errorf(fmt.Sprintf("%s.dns[%d]", at, i), "", "%q is not an IP address", a)
		}
	}
}

func (r *report) checkDisk(d *Disk) {
	for _, c := range []struct {
		key   string
		size  Size
		least Size
	}{{"size", d.Size, 256 * mib}, {"esp", d.ESP, 64 * mib}, {"slot", d.Slot, 4 * mib}} {
		r.checkSize("disk."+c.key, c.size, c.least)
	}
	total := d.ESP + 2*d.Slot
	seen := map[string]string{"esp": "the boot partition", "root-a": "a slot", "root-b": "a slot"}
	mounts := map[string]string{}
	for i, v := range d.Data {
		at := index("disk.data", i)
		r.checkSize(at+".size", v.Size, 64*mib)
		total += v.Size
		if v.Name == "" && !r.reported(at+".name") || v.Mount == "" && !r.reported(at+".mount") {
			r.errorf(at, "write {name: data, mount: /data}", "a data volume needs name and mount")
		}
		r.pattern(at+".name", v.Name, `^[a-z0-9]([a-z0-9-]{0,14}[a-z0-9])?$`, "1 to 16 letters a-z, digits and hyphens")
		if other, dup := seen[v.Name]; dup && v.Name != "" {
			r.errorf(at+".name", "", "the name %q belongs to %s", v.Name, other)
		}
		seen[v.Name] = at
		r.checkMountpoint(at+".mount", v.Mount, mounts)
		if v.Integrity != "" && v.Integrity != "hmac-sha256" {
			r.errorf(at+".integrity", "write hmac-sha256, or leave it out", "integrity %q is not known", v.Integrity)
		}
		if v.Size == 0 && i < len(d.Data)-1 {
			r.errorf(at, "give it a size, or put it last", "only the last volume grows to the end of the disk")
		}
	}
	if d.Size != 0 && total > d.Size {
		r.errorf("disk.size", "", "%d MiB of partitions do not fit on %d MiB", total/mib, d.Size/mib)
	}
}

func (r *report) checkSize(at string, size, least Size) {
	const most = 1 << 50 // far above any disk, and sums of a few cannot overflow
	switch {
	case size == 0: // not given
	case size < least:
		r.errorf(at, "", "%d bytes are less than the %d MiB it takes", size, least/mib)
	case size > most:
		r.errorf(at, "", "%d bytes are more than any disk has", size)
	case !size.wholeMiB():
		r.errorf(at, "", "%d bytes are not a whole number of MiB", size)
	}
}

func (r *report) checkMountpoint(at, mount string, seen map[string]string) {
	if mount == "" {
		return
	}
	if !path.IsAbs(mount) || path.Clean(mount) != mount || mount == "/" {
		r.errorf(at, "write /data", "%q is not a clean absolute path below /", mount)
		return
	}
	for _, taken := range []string{"/proc", "/sys", "/dev", "/run", "/containers", "/usr/lib/holdfast"} {
		if mount == taken || strings.HasPrefix(mount, taken+"/") {
			r.errorf(at, "", "%q belongs to the system", mount)
		}
	}
	if other, dup := seen[mount]; dup {
		r.errorf(at, "", "%q is the mount of %s already", mount, other)
	}
	seen[mount] = at
}

func (r *report) checkSeal(s Seal) {
	r.oneOf("seal.policy", s.Policy, "standard", "strict", rollbackProof, "disk-theft-only")
	r.oneOf("seal.repair", s.Repair, "automatic", "manual")
}

func (r *report) checkUpdate(u *Update) {
	if u.URL != "" {
		// Without TLS too: what counts is signed, and a plant's own server may have no certificate.
		parsed, err := url.Parse(u.URL)
		_, notOCI := image.ParseRegistry(u.URL)
		switch {
		case strings.HasPrefix(u.URL, image.RegistryScheme):
			if notOCI != nil {
				r.errorf("update.url", "write oci://registry.example/NAME:TAG", "%v", notOCI)
			}
		case err != nil || parsed.Scheme != "https" && parsed.Scheme != "http" || parsed.Host == "":
			r.errorf("update.url", "write https://updates.example/repo", "%q is not a URL", u.URL)
		case parsed.RawQuery != "" || parsed.Fragment != "" || parsed.User != nil:
			r.errorf("update.url", "it goes into every release for all to read", "a repository's URL has no user, query or fragment")
		}
	}
	r.pattern("update.channel", u.Channel, channelForm, ChannelHint)
	r.pattern("update.hardware", u.Hardware, `^[!-)+-~]{1,64}$`, "1 to 64 characters without white space and *")
	if u.Epoch < 0 {
		r.errorf("update.epoch", "count from 0", "%d is negative", u.Epoch)
	}
	if u.URL == "" {
		for _, key := range []string{"update.ca", "update.check"} {
			if r.pos.has(key) && !r.pos.has("update.url") {
				r.warnf(key, "", "has no effect without url")
			}
		}
	}
}

func (r *report) checkFile(at string, f *File) {
	if f.Path == "" && !r.reported(at+".path") {
		r.errorf(at, "", "the file has no path")
	}
	if f.Path != "" && path.Clean("/"+f.Path) == "/" {
		r.errorf(at+".path", "", "%q is the root itself", f.Path)
	}
	r.relative(at+".path", f.Path)
	r.oneOf(at+".metadata", f.Metadata, "yaml", "json")
	given := []string{}
	for _, c := range []struct {
		key string
		set bool
	}{{"directory", f.Directory}, {"symlink", f.Symlink != ""}, {"contents", f.Contents != nil},
		{"source", f.Source != ""}, {"metadata", f.Metadata != ""}} {
		if c.set {
			given = append(given, c.key)
		}
	}
	switch {
	case len(given) > 1:
		r.errorf(at, "", "%s and %s exclude each other", given[0], given[1])
	case len(given) == 0:
		r.errorf(at, `write contents: "" for an empty file`, "none of directory, symlink, contents, source and metadata is given")
	}
	if f.Optional && f.Source == "" {
		r.warnf(at+".optional", "", "has no effect without source")
	}
}

func (r *report) checkVolumes(list []Volume) {
	seen := map[string]string{}
	for i, v := range list {
		at := index("volumes", i)
		if v.Name == "" && !r.reported(at+".name") {
			r.errorf(at, "", "the volume has no name")
		}
		r.pattern(at+".name", v.Name, `^[a-z0-9_-]{1,64}$`, "1 to 64 letters a-z, digits, hyphens and underscores")
		if first, dup := seen[v.Name]; dup {
			r.errorf(at+".name", "", "volume %q is there already, at %s", v.Name, r.pos.at(first))
		}
		seen[v.Name] = at + ".name"
		r.imageName(at+".image", v.Image)
		r.oneOf(at+".format", v.Format, "filesystem", "oci")
		switch {
		case v.Image == "":
			r.warnf(at, "use disk.data for what is to last", "the volume is in memory and empty after each start, as in LinuxKit")
		case !v.ReadOnly:
			r.warnf(at, "", "the volume has an image and is read-only here; LinuxKit lets containers write to it until the next start")
		}
		if v.Platforms != nil {
			r.warnf(at+".platforms", "", "ignored: the volume has the architecture of the appliance")
		}
	}
}

func (r *report) checkHealth(at string, h *Health) {
	n := 0
	if h.HTTP != "" {
		n++
		if u, err := url.Parse(h.HTTP); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			r.errorf(at+".http", "write http://127.0.0.1:8080/healthz", "%q is not a URL", h.HTTP)
		}
	}
	if h.TCP != "" {
		n++
		if _, port, err := net.SplitHostPort(h.TCP); err != nil || port == "" {
			r.errorf(at+".tcp", "write 127.0.0.1:8080", "%q is not host:port", h.TCP)
		}
	}
	if len(h.Exec) > 0 {
		n++
	}
	if n != 1 {
		r.errorf(at, "", "exactly one of http, tcp and exec has to be given, not %d", n)
	}
	if h.Retries < 0 || h.Retries > 1000 {
		r.errorf(at+".retries", "", "%d is not between 1 and 1000", h.Retries)
	}
}
