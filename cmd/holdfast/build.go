package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
)

// lockName is the lock file's, beside the spec.
const lockName = "appliance.lock"

// efiFolder is where Debian's package systemd-boot-efi puts stub and loader.
const efiFolder = "/usr/lib/systemd/boot/efi"

var efiSuffix = map[string]string{"amd64": "x64", "arm64": "aa64"}

// loadSpec reads, checks and completes a spec, and prints its warnings.
func (c *cli) loadSpec(path string) (*spec.Spec, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 2<<20)) // Parse says what is too large
	if err != nil {
		return nil, err
	}
	s, err := spec.Parse(path, data)
	if err != nil {
		return nil, err
	}
	for _, w := range s.Warnings {
		c.problem("warning", w)
	}
	if err := s.Validate(); err != nil {
		return nil, err
	}
	s.ApplyDefaults()
	return s, nil
}

func runBuild(ctx context.Context, c *cli, args []string) error {
	f := c.flags("build", "SPEC", `Make the release and the disk that SPEC describes in the folder given with -o. With keys
on another machine it ends with exit code 4 until their signatures are there, once or
twice: holdfast keys sign -h.

example: holdfast build ledger.yaml -o out`)
	out := f.String("o", "", "output `folder`; must not exist")
	agent := f.String("agent", "", "device binary (default: holdfast-agent beside this program)")
	runtime := f.String("runtime", "", "static runc for specs that bring none (default: runc beside this program, if there)")
	stub := f.String("stub", "", "systemd's EFI stub (default: from Debian's systemd-boot-efi)")
	loader := f.String("loader", "", "systemd-boot (default: from Debian's systemd-boot-efi)")
	cache := f.String("cache", "", "`folder` for layers kept between builds (default: the user's cache folder)")
	qcow := f.Bool("qcow2", false, "write disk.qcow2 as well")
	update := f.Bool("update-lock", false, "resolve tags anew and write "+lockName)
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *out == "" {
		return usageError{"build needs -o OUT", "holdfast build " + rest[0] + " -o out"}
	}
	s, err := c.loadSpec(rest[0])
	if err != nil {
		return err
	}
	in := build.Inputs{Dir: filepath.Dir(rest[0]), QCOW2: *qcow}
	if in.Agent, err = agentBinary(*agent); err != nil {
		return err
	}
	if in.Runtime, err = besideSelf(*runtime, "runc"); err != nil && (*runtime != "" || !errors.Is(err, fs.ErrNotExist)) {
		return fmt.Errorf("container runtime: %w", err)
	}
	if err := efiPrograms(&in, s.Arch, *stub, *loader); err != nil {
		return err
	}
	if in.Keys, err = keys.Load(resolve(in.Dir, s.Keys)); err != nil {
		err = fmt.Errorf("vendor keys: %w", err)
		if errors.Is(err, fs.ErrNotExist) {
			err = hinted{err, "make them with: holdfast keys new " + resolve(in.Dir, s.Keys)}
		}
		return err
	}
	if in.Cache, err = openCache(*cache); err != nil {
		return err
	}
	if in.Lock, err = oci.ReadLock(filepath.Join(in.Dir, lockName)); err != nil {
		return err
	}
	in.Lock.Update = *update
	p := newProgress(c.err)
	in.Progress = p.step
	m, err := build.Build(ctx, s, in, *out)
	p.end()
	if err != nil {
		return c.carried(err)
	}
	if *update {
		if err := in.Lock.Write(filepath.Join(in.Dir, lockName)); err != nil {
			return err
		}
	}
	fmt.Fprintf(c.out, "%s %s: root %s, UKI %s, disk %s in %s\n", m.Name, m.Version,
		bytesText(m.Root.SizeBytes), bytesText(m.UKI.SizeBytes), bytesText(m.Disk.SizeBytes), *out)
	return nil
}

func runLock(ctx context.Context, c *cli, args []string) error {
	rest, err := parse(c.flags("lock", "SPEC", "Ask the registries which digests the tags in SPEC stand for now, and write "+lockName+" beside it.\n\nexample: holdfast lock ledger.yaml"), args, 1)
	if err != nil {
		return err
	}
	s, err := c.loadSpec(rest[0])
	if err != nil {
		return err
	}
	path := filepath.Join(filepath.Dir(rest[0]), lockName)
	lock, err := oci.ReadLock(path)
	if err != nil {
		return err
	}
	lock.Update = true
	for _, ref := range s.ImageRefs() {
		parsed, err := oci.ParseRef(ref)
		if err != nil {
			return err
		}
		if err := lock.Resolve(ctx, parsed); err != nil {
			return err
		}
	}
	return lock.Write(path)
}

func resolve(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

func openCache(dir string) (*oci.Cache, error) {
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, nil // no home folder: build without
		}
		dir = filepath.Join(user, "holdfast")
	}
	return oci.OpenCache(dir)
}

// agentBinary finds the device binary.
func agentBinary(path string) (tree.Content, error) {
	agent, err := besideSelf(path, "holdfast-agent")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hinted{fmt.Errorf("device binary: %w", err), "build it with: CGO_ENABLED=0 go build ./cmd/holdfast-agent, and give it with --agent"}
	}
	return agent, err
}

// besideSelf is the file at path or, without one, the file of that name in this
// program's folder.
func besideSelf(path, name string) (tree.Content, error) {
	if path == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(filepath.Dir(self), name)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return tree.File{Path: path, SizeBytes: info.Size()}, nil
}

// efiPrograms reads stub and loader.
func efiPrograms(in *build.Inputs, arch, stub, loader string) error {
	suffix := efiSuffix[arch]
	if stub == "" {
		stub = filepath.Join(efiFolder, "linux"+suffix+".efi.stub")
	}
	if loader == "" {
		loader = filepath.Join(efiFolder, "systemd-boot"+suffix+".efi")
	}
	hint := "install Debian's package systemd-boot-efi, or give --stub and --loader"
	var err error
	if in.Stub, err = os.ReadFile(stub); err != nil {
		return hinted{fmt.Errorf("EFI stub: %w", err), hint}
	}
	info, err := os.Stat(loader)
	if err != nil {
		return hinted{fmt.Errorf("boot loader: %w", err), hint}
	}
	in.Loader = tree.File{Path: loader, SizeBytes: info.Size()}
	return nil
}

// bytesText writes a size for people.
func bytesText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, u := float64(n)/1024, 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	return strings.Replace(fmt.Sprintf("%.1f %ciB", f, units[u]), ".0 ", " ", 1)
}
