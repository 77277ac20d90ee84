package image

import (
	"fmt"
	"net"
	"regexp"
	"strings"
)

// RegistryScheme begins the address of an update repository in an OCI registry.
const RegistryScheme = "oci://"

// Registry is where an update repository lies in an OCI registry.
type Registry struct {
	Host string // with the port, if any
	Name string
	Tag  string // never empty
	// Loopback says that Host is this machine, which alone may be asked without TLS.
	Loopback bool
}

// The names of OCI distribution-spec 1.1, "Pulling manifests".
var (
	registryHost = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?$`)
	registryName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	registryTag  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
)

// ParseRegistry reads oci://HOST[:PORT]/NAME[:TAG]; the tag is latest when there is none.
func ParseRegistry(address string) (Registry, error) {
	rest, ok := strings.CutPrefix(address, RegistryScheme)
	host, path, slash := strings.Cut(rest, "/")
	r := Registry{Host: host, Name: path, Tag: "latest"}
	if i := strings.LastIndexByte(path, ':'); i >= 0 {
		r.Name, r.Tag = path[:i], path[i+1:]
	}
	switch {
	case !ok || !slash || !registryHost.MatchString(host):
		return Registry{}, fmt.Errorf("%.300q is not oci://HOST/NAME:TAG", address)
	case strings.Contains(path, "@"):
		return Registry{}, fmt.Errorf("%.300q: a repository changes with every release, so give its tag and no digest", address)
	case len(r.Name) > 255 || !registryName.MatchString(r.Name):
		return Registry{}, fmt.Errorf("%.300q: %.300q is not a name that a registry takes: a-z, 0-9, /, and . _ - in between", address, r.Name)
	case !registryTag.MatchString(r.Tag):
		return Registry{}, fmt.Errorf("%.300q: %.200q is not a tag", address, r.Tag)
	case host == "docker.io":
		// Its API has another name, and short names are those of its own library.
		return Registry{}, fmt.Errorf("%.300q: write index.docker.io, where docker.io answers", address)
	}
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	ip := net.ParseIP(strings.Trim(name, "[]"))
	r.Loopback = name == "localhost" || ip != nil && ip.IsLoopback()
	return r, nil
}

// String is the address that [ParseRegistry] reads.
func (r Registry) String() string { return RegistryScheme + r.Host + "/" + r.Name + ":" + r.Tag }
