package build

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/runtime"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
)

const runtimePath = "/usr/bin/runc"

// rootFolders exist in every root, so that the agent has where to mount.
var rootFolders = []string{"/dev", "/etc", "/proc", "/run", "/sys", "/tmp", "/usr/lib/holdfast", "/var"}

// source is an opened image with its files.
type source struct {
	*oci.Image
	root *tree.Node
}

// open opens a reference of the spec; key is where it stands there. A reference
// that stands there twice is opened once, and its files are stored once.
func (b *builder) open(ref, key string) (*source, error) {
	if src := b.sources[ref]; src != nil {
		return &source{src.Image, src.root.CloneDirs()}, nil
	}
	parsed, err := oci.ParseRef(ref)
	if err != nil {
		return nil, b.at(key, err)
	}
	b.in.Progress(Step{What: "read " + ref})
	im, err := oci.Open(b.ctx, parsed, oci.Options{Dir: b.in.Dir, Cache: b.in.Cache, Lock: b.in.Lock, Architecture: b.spec.Arch})
	if err != nil {
		return nil, b.at(key, err)
	}
	b.opened = append(b.opened, im)
	root, err := im.Tree(oci.TreeOptions{EpochSec: b.epochSec()})
	if err != nil {
		return nil, b.at(key, err)
	}
	b.manifest.Images = append(b.manifest.Images, image.Source{Ref: ref, Digest: im.Digest})
	b.sources[ref] = &source{im, root}
	return &source{im, root.CloneDirs()}, nil
}

// at says where in the spec an error comes from.
func (b *builder) at(key string, err error) error {
	return fmt.Errorf("%v: %s: %w", b.spec.Pos(key), key, err)
}

// compose makes the root and what the device has to know of it.
func (b *builder) compose(k *kernel, t trust, r image.Recovery, e image.Evidence, sb secureBoot) (*tree.Node, *image.Appliance, error) {
	root := tree.NewDir(0o755)
	root.MTimeSec = b.epochSec()
	if k.root != nil {
		root.Merge(k.root)
	}
	for i, ref := range b.spec.Init {
		src, err := b.open(ref, fmt.Sprintf("init[%d]", i))
		if err != nil {
			return nil, nil, err
		}
		root.Merge(src.root)
	}
	app := b.appliance()
	app.Update, app.Recovery, app.SecureBoot, app.Evidence = t.update, r, sb.SecureBoot, e
	for _, dir := range rootFolders {
		if _, err := root.MkdirAll(dir, b.epochSec()); err != nil {
			return nil, nil, err
		}
	}
	for _, v := range app.Volumes {
		if _, err := root.MkdirAll(v.Mount, b.epochSec()); err != nil {
			return nil, nil, b.at("disk.data", err)
		}
	}
	for _, add := range []func(*tree.Node) error{
		func(n *tree.Node) error { return b.addContainers(n, app) }, b.addVolumes, b.addFiles,
		func(n *tree.Node) error { return b.addTrust(n, t) },
		func(n *tree.Node) error { return b.addSecureBoot(n, sb) },
		func(n *tree.Node) error { return b.addAgent(n, app) },
	} {
		if err := add(root); err != nil {
			return nil, nil, err
		}
	}
	return root, app, nil
}

// appliance translates the parts of the spec that the device reads.
func (b *builder) appliance() *image.Appliance {
	s := b.spec
	a := &image.Appliance{
		Format: 1, Name: s.Name, Version: s.Version, Architecture: s.Arch, BuildTimeSec: b.epochSec(),
		Hostname: s.Hostname, Handoff: s.Handoff, EncryptSlots: s.Disk.EncryptSlots,
		Seal: image.SealPolicy{
			Policy: s.Seal.Policy, PolicyKeyPEM: string(b.in.Keys.PolicyPublicPEM),
			PIN: s.Seal.PIN, Repair: s.Seal.Repair, Epoch: b.sealEpoch(),
		},
	}
	for _, d := range s.Disk.Data {
		a.Volumes = append(a.Volumes, image.Volume{Name: d.Name, Mount: d.Mount, SizeBytes: int64(d.Size), Integrity: d.Integrity})
	}
	for _, i := range s.Network {
		a.Network = append(a.Network, image.Interface(i))
	}
	for _, key := range sortedKeys(s.Sysctl) {
		a.Sysctl = append(a.Sysctl, key+"="+s.Sysctl[key])
	}
	return a
}

// addContainers unpacks every container's image into its own folder.
func (b *builder) addContainers(root *tree.Node, app *image.Appliance) error {
	for _, group := range []struct {
		section runtime.Section
		images  []spec.Image
		into    *[]image.Container
	}{
		{runtime.OnBoot, b.spec.OnBoot, &app.OnBoot},
		{runtime.Services, b.spec.Services, &app.Services},
		{runtime.OnShutdown, b.spec.OnShutdown, &app.OnShutdown},
	} {
		for i, c := range group.images {
			entry, err := b.addContainer(root, c, runtime.Options{Section: group.section, Index: i, Volumes: b.spec.Volumes})
			if err != nil {
				return err
			}
			*group.into = append(*group.into, *entry)
			if group.section == runtime.Services {
				b.expectService(entry)
			}
		}
	}
	if len(app.OnBoot)+len(app.Services)+len(app.OnShutdown) == 0 || find(root, runtimePath) != nil {
		return nil
	}
	if b.in.Runtime == nil {
		return b.at("init", fmt.Errorf("no container runtime at %s: give one with --runtime, or add an image that holds a static runc to init", runtimePath))
	}
	if err := b.checkRuntime(); err != nil {
		return err
	}
	return b.put(root, runtimePath, 0o755, b.in.Runtime)
}

// expectService notes a service among the reference values.
func (b *builder) expectService(c *image.Container) {
	if b.manifest.Expected.Services == nil {
		b.manifest.Expected.Services = map[string]string{}
	}
	b.manifest.Expected.Services[c.Name] = c.Digest
}

func (b *builder) addContainer(root *tree.Node, c spec.Image, o runtime.Options) (*image.Container, error) {
	key := fmt.Sprintf("%s[%d]", o.Section, o.Index)
	src, err := b.open(c.Image, key+".image")
	if err != nil {
		return nil, err
	}
	if label := src.Config.Labels[spec.Label]; label != "" {
		if err := c.MergeLabel([]byte(label)); err != nil {
			return nil, b.at(key+".image", err)
		}
	}
	config, entry, err := runtime.Config(c, runtime.ImageConfig{
		Entrypoint: src.Config.Entrypoint, Cmd: src.Config.Cmd, Env: src.Config.Env,
		WorkingDir: src.Config.WorkingDir, User: src.Config.User,
		Passwd: src.reader("/etc/passwd"), Group: src.reader("/etc/group"),
	}, o)
	if err != nil {
		return nil, b.at(key, err)
	}
	entry.Digest = src.Digest
	if err := b.addMountpoints(src.root, config); err != nil {
		return nil, b.at(key, err)
	}
	if err := root.Put(path.Join(entry.Bundle, "rootfs"), src.root); err != nil {
		return nil, err
	}
	return &entry, b.put(root, path.Join(entry.Bundle, "config.json"), 0o644, tree.Bytes(config))
}

// hosts is given to images that have none: most programs expect localhost to
// resolve, and images leave that to the engine that runs them.
const hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost\n"

// addMountpoints makes the folders a container's mounts need, and the files
// engines usually provide: its root is read-only, so the runtime cannot.
func (b *builder) addMountpoints(root *tree.Node, config []byte) error {
	for p, text := range map[string]string{"/etc/hosts": hosts, "/etc/resolv.conf": ""} {
		if root.Lookup(p) != nil {
			continue
		}
		if err := b.put(root, p, 0o644, tree.Bytes(text)); err != nil {
			return err
		}
	}
	points, err := runtime.Mountpoints(config)
	if err != nil {
		return err
	}
	for _, p := range points {
		if root.Lookup(p) != nil {
			continue
		}
		if _, err := root.MkdirAll(p, b.epochSec()); err != nil {
			return fmt.Errorf("mount point %s: %w", p, err)
		}
	}
	return nil
}

// maxAccountsBytes bounds an image's /etc/passwd and /etc/group.
const maxAccountsBytes = 1 << 20

// reader reads a small file of the image.
func (s *source) reader(p string) func() ([]byte, error) {
	return func() ([]byte, error) {
		n := find(s.root, p)
		if n == nil {
			return nil, fs.ErrNotExist
		}
		if n.Content.Size() > maxAccountsBytes {
			return nil, fmt.Errorf("%s has %d bytes; %d is the most", p, n.Content.Size(), maxAccountsBytes)
		}
		r, err := n.Content.Open()
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	}
}

// addVolumes unpacks the spec's volumes that have an image; the others are made
// in memory by the agent.
func (b *builder) addVolumes(root *tree.Node) error {
	for i, v := range b.spec.Volumes {
		if v.Image == "" {
			continue
		}
		src, err := b.open(v.Image, fmt.Sprintf("volumes[%d].image", i))
		if err != nil {
			return err
		}
		if err := root.Put(path.Join(runtime.VolumesPath, v.Name), src.root); err != nil {
			return err
		}
	}
	return nil
}

// put makes a regular file of root's.
func (b *builder) put(root *tree.Node, p string, perm uint32, c tree.Content) error {
	return root.Put(p, &tree.Node{Mode: tree.TypeRegular | perm, MTimeSec: b.epochSec(), Content: c})
}

// addAgent puts the agent, its description and what every root has.
func (b *builder) addAgent(root *tree.Node, app *image.Appliance) error {
	description, err := json.MarshalIndent(app, "", "  ")
	if err != nil {
		return err
	}
	if err := b.put(root, image.AppliancePath, 0o644, tree.Bytes(description)); err != nil {
		return err
	}
	if err := b.put(root, image.AgentPath, 0o755, b.in.Agent); err != nil {
		return err
	}
	if root.Lookup("/etc/os-release") == nil {
		if err := b.put(root, "/etc/os-release", 0o644, tree.Bytes(b.osRelease())); err != nil {
			return err
		}
	}
	if root.Lookup("/etc/resolv.conf") == nil {
		link := &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: "/run/holdfast/resolv.conf", MTimeSec: b.epochSec()}
		return root.Put("/etc/resolv.conf", link)
	}
	return nil
}

// osRelease is os-release(5) of the appliance.
func (b *builder) osRelease() []byte {
	s := b.spec
	return fmt.Appendf(nil, "ID=%s\nNAME=%s\nVERSION_ID=%s\nPRETTY_NAME=%s\nIMAGE_ID=%s\nIMAGE_VERSION=%s\n",
		s.Name, strconv.Quote(s.Name), s.Version, strconv.Quote(s.Name+" "+s.Version), s.Name, s.Version)
}
