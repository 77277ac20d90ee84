package build_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/initrd"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/partition"
)

const efiFolder = "/usr/lib/systemd/boot/efi"

// TestMain gives what is made once for all tests a folder that goes away.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "build-test")
	if err == nil {
		err = os.Setenv("TMPDIR", dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func file(t *testing.T, path string) tree.File {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return tree.File{Path: path, SizeBytes: info.Size()}
}

// theAgent builds the device binary once.
var theAgent = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, "holdfast-agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "../../cmd/holdfast-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, msg)
	}
	return out, nil
})

// workshop is a folder with what a build needs.
type workshop struct {
	dir string
	in  build.Inputs
}

func newWorkshop(t *testing.T, k *keys.Keys, cache *oci.Cache) *workshop {
	t.Helper()
	kernel := filepath.Join(os.Getenv("HOLDFAST_INPUTS"), "linux-image.deb")
	if _, err := os.Stat(kernel); err != nil {
		t.Fatalf("run make inputs, and set HOLDFAST_INPUTS to build/inputs: %v", err)
	}
	agent, err := theAgent()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(kernel, filepath.Join(dir, "kernel.deb")); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{"root/sbin/init": "#!/bin/true\n", "root/etc/motd": "hello\n", "app/app": "#!/bin/true\n"} {
		at := filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	stub, err := os.ReadFile(filepath.Join(efiFolder, "linuxx64.efi.stub"))
	if err != nil {
		t.Fatalf("install Debian's package systemd-boot-efi: %v", err)
	}
	return &workshop{dir, build.Inputs{
		Dir: dir, Keys: k, Agent: file(t, agent), Stub: stub, Cache: cache, QCOW2: true,
		Loader: file(t, filepath.Join(efiFolder, "systemd-bootx64.efi")), Runtime: aProgram(0),
	}}
}

func newKeys(t *testing.T) *keys.Keys {
	t.Helper()
	k, err := keys.Create(filepath.Join(t.TempDir(), "keys"), keys.Config{Organization: "Test", Now: time.Unix(1.7e9, 0)})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// kernelCache is a cache folder that knows the kernel package and nothing else.
// Unpacking it takes most of a cold build, a minute under the race detector;
// [TestReproducible] does it again without a cache.
var kernelCache = sync.OnceValues(func() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "cache"); err != nil {
		return "", err
	}
	c, err := oci.OpenCache(dir)
	if err != nil {
		return "", err
	}
	ref, err := oci.ParseRef("deb:" + filepath.Join(os.Getenv("HOLDFAST_INPUTS"), "linux-image.deb"))
	if err != nil {
		return "", err
	}
	im, err := oci.Open(context.Background(), ref, oci.Options{Cache: c})
	if err != nil {
		return "", err
	}
	_, err = im.Tree(oci.TreeOptions{})
	return dir, errors.Join(err, im.Close())
})

// newCache returns a cache of the test's own, with the kernel in it.
func newCache(t *testing.T) *oci.Cache {
	t.Helper()
	from, err := kernelCache()
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "cache")
	if msg, err := exec.Command("cp", "-al", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, msg)
	}
	c, err := oci.OpenCache(to)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const boxSpec = `
name: box
version: 1.0.0
epoch: 2026-11-01T00:00:00Z
kernel: {image: "deb:kernel.deb", cmdline: console=ttyS0}
init: ["dir:root"]
services:
  - {name: app, image: "dir:app", command: [/app]}
  - {name: second, image: "dir:app", command: [/app, again]}
disk: {size: 512MiB, esp: 96MiB, slot: 64MiB, data: [{name: data, mount: /data}]}
`

func parse(t *testing.T, text string) *spec.Spec {
	t.Helper()
	s, err := spec.Parse("box.yaml", []byte(text))
	if err == nil {
		err = s.Validate()
	}
	if err != nil {
		t.Fatal(err)
	}
	s.ApplyDefaults()
	return s
}

// sums hashes every file below a folder.
func sums(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %x\n", strings.TrimPrefix(path, dir), h.Sum(nil))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestReproducible (I1): two folders, two umasks of time, one cache and none.
func TestReproducible(t *testing.T) {
	k := newKeys(t)
	var all []string
	for i, cache := range []*oci.Cache{newCache(t), nil} {
		w := newWorkshop(t, k, cache)
		when := time.Now().Add(-time.Duration(i) * 1000 * time.Hour)
		if err := os.Chtimes(filepath.Join(w.dir, "root/etc/motd"), when, when); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(w.dir, "out")
		if _, err := build.Build(context.Background(), parse(t, boxSpec), w.in, out); err != nil {
			t.Fatal(err)
		}
		all = append(all, sums(t, out))
	}
	if all[0] != all[1] {
		t.Errorf("two builds differ:\n%s\n%s", all[0], all[1])
	}
}

// TestTwoBuildsAtOnce share a cache and do not disturb each other.
func TestTwoBuildsAtOnce(t *testing.T) {
	k, cache := newKeys(t), newCache(t)
	outs := [2]string{}
	var all sync.WaitGroup
	for i := range outs {
		w := newWorkshop(t, k, cache)
		outs[i] = filepath.Join(w.dir, "out")
		s := parse(t, boxSpec)
		all.Go(func() {
			if _, err := build.Build(context.Background(), s, w.in, outs[i]); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if !t.Failed() && sums(t, outs[0]) != sums(t, outs[1]) {
		t.Error("two builds at once differ")
	}
}

// TestOneAssembler (I2): the technician's way to a disk gives the builder's bytes.
func TestOneAssembler(t *testing.T) {
	w := newWorkshop(t, newKeys(t), newCache(t))
	out := filepath.Join(w.dir, "out")
	m, err := build.Build(context.Background(), parse(t, boxSpec), w.in, out)
	if err != nil {
		t.Fatal(err)
	}
	layout, err := build.Layout(m)
	if err != nil {
		t.Fatal(err)
	}
	bench := partition.NewMemory(layout.SizeBytes)
	when := time.Unix(m.BuildTimeSec, 0).UTC()
	if _, err := partition.Format(bench, layout, partition.FormatOptions{Time: when}); err != nil {
		t.Fatal(err)
	}
	d, err := partition.Open(bench)
	if err != nil {
		t.Fatal(err)
	}
	contents, err := build.Contents(filepath.Join(out, build.ReleaseName), m)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteSlot(context.Background(), partition.SlotA, contents, partition.WriteOptions{Time: when}, nil); err != nil {
		t.Fatal(err)
	}
	raw, err := os.Open(filepath.Join(out, build.RawName))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < layout.SizeBytes; off += int64(len(a)) {
		if _, err := raw.ReadAt(a, off); err != nil {
			t.Fatal(err)
		}
		if _, err := bench.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Fatalf("the disks differ in the MiB at %d", off)
		}
	}
}

func TestInitrdIsSmall(t *testing.T) {
	agent, err := theAgent()
	if err != nil {
		t.Fatal(err)
	}
	root := tree.NewDir(0o755)
	if err := root.Put("/init", &tree.Node{Mode: tree.TypeRegular | 0o755, Content: file(t, agent)}); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := initrd.Write(&archive, root, initrd.Options{Compress: true}); err != nil {
		t.Fatal(err)
	}
	if archive.Len() > 12<<20 {
		t.Errorf("the initrd without modules has %d bytes, more than 12 MiB", archive.Len())
	}
	t.Logf("initrd without modules: %d bytes", archive.Len())
}

// TestNothingIsLeftOfAFailedBuild: an error leaves the folder as it was.
func TestNothingIsLeftOfAFailedBuild(t *testing.T) {
	k, cache := newKeys(t), newCache(t)
	for name, c := range map[string]struct{ old, new, want string }{
		"missing image":   {"dir:root", "dir:absent", "init[0]"},
		"disk too small":  {"size: 512MiB", "size: 256MiB", "disk"},
		"ESP too small":   {"esp: 96MiB", "esp: 64MiB", "ESP"}, // the agent is made large below
		"slot too small":  {"slot: 64MiB", "slot: 8MiB", "disk"},
		"unknown module":  {"cmdline: console=ttyS0", "modules: [no_such_module]", "no_such_module"},
		"missing runtime": {"", "", "container runtime"},
	} {
		w := newWorkshop(t, k, cache)
		if name == "missing runtime" {
			w.in.Runtime = nil
		}
		if name == "ESP too small" {
			w.in.Agent = aProgram(16 << 20)
		}
		before := sums(t, w.dir)
		out := filepath.Join(w.dir, "out")
		_, err := build.Build(context.Background(), parse(t, strings.Replace(boxSpec, c.old, c.new, 1)), w.in, out)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
		if after := sums(t, w.dir); after != before {
			t.Errorf("%s: the build left something:\n%s", name, after)
		}
	}
	w := newWorkshop(t, k, nil)
	if _, err := build.Build(context.Background(), parse(t, boxSpec), w.in, w.dir); !errors.Is(err, build.ErrExists) {
		t.Errorf("existing output: %v", err)
	}
}

// TestFilesAreStoredOnce: two containers of one image share its files.
func TestFilesAreStoredOnce(t *testing.T) {
	w := newWorkshop(t, newKeys(t), newCache(t))
	big := bytes.Repeat([]byte("0123456789abcdef"), 4<<20/16)
	if err := os.WriteFile(filepath.Join(w.dir, "app/big"), big, 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := build.Build(context.Background(), parse(t, boxSpec), w.in, filepath.Join(w.dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := theAgent()
	if err != nil {
		t.Fatal(err)
	}
	if most := file(t, agent).SizeBytes + int64(len(big))*3/2; m.Root.SizeBytes > most {
		t.Errorf("the root has %d bytes: the image of two containers is in it twice", m.Root.SizeBytes)
	}
	if _, err := os.Stat(filepath.Join(w.dir, "out", build.ReleaseName, image.ManifestName)); err != nil {
		t.Error(err)
	}
}
