package oci_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/tree"
)

func textFile(text string) *tree.Node {
	return &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(text)}
}

// twoLayers has a hard link across layers in it.
func twoLayers(t testing.TB, marker string) []*tree.Node {
	t.Helper()
	lower, upper := tree.NewDir(0o755), tree.NewDir(0o755)
	for _, err := range []error{
		lower.Put("/etc/motd", textFile("lower")), lower.Put("/bin/tool", textFile(strings.Repeat("tool", 5000))),
		upper.Put("/etc/motd", textFile(marker)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return []*tree.Node{lower, upper}
}

var testConfig = oci.Config{Entrypoint: []string{"/bin/tool"}, Cmd: []string{"-v"}, Env: []string{"A=1"}, WorkingDir: "/etc", User: "7:8",
	Labels: map[string]string{"k": "v"}}

// writeLayout makes a layout with the two layers.
func writeLayout(t testing.TB, o oci.LayoutOptions, marker string) (dir, digest string) {
	t.Helper()
	dir = t.TempDir()
	digest, err := oci.WriteLayout(dir, twoLayers(t, marker), testConfig, o)
	if err != nil {
		t.Fatal(err)
	}
	return dir, digest
}

func open(t testing.TB, ref string, o oci.Options) (*oci.Image, error) {
	t.Helper()
	r, err := oci.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	return oci.Open(context.Background(), r, o)
}

// read opens an image and gives one file of it.
func read(t testing.TB, ref, path string, o oci.Options) (string, error) {
	t.Helper()
	im, err := open(t, ref, o)
	if err != nil {
		return "", err
	}
	defer im.Close()
	root, err := im.Tree(oci.TreeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n := root.Lookup(path)
	if n == nil || n.Content == nil {
		return "", fmt.Errorf("%s: %w", path, fs.ErrNotExist)
	}
	r, err := n.Content.Open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return string(b), err
}

func wantRead(t testing.TB, ref, path, want string, o oci.Options) {
	t.Helper()
	got, err := read(t, ref, path, o)
	if err != nil || got != want {
		t.Errorf("%s: %s is %.40q, %v; want %.40q", ref, path, got, err, want)
	}
}

func wantError(t testing.TB, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want one with %q", err, want)
	}
}

func newCache(t testing.TB) (*oci.Cache, string) {
	t.Helper()
	dir := t.TempDir()
	c, err := oci.OpenCache(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c, dir
}

func TestParseRef(t *testing.T) {
	sum := strings.Repeat("a", 64)
	for _, s := range []string{"oci:a/b", "oci:a:v1", "oci:a@sha256:" + sum, "docker-archive:x.tar:img:1", "dir:/a", "tar:a.tar.xz", "deb:k.deb",
		"alpine", "alpine:3", "ghcr.io/a/b@sha256:" + sum, "localhost:5000/a:b@sha256:" + sum} {
		r, err := oci.ParseRef(s)
		if err != nil || r.String() != s {
			t.Errorf("%s: %v, %v", s, r, err)
		}
	}
	for _, s := range []string{"", "oci:", "dir:", "UPPER", "./path", "a b", "oci:a@sha256:zz", "x@sha256:12"} {
		if r, err := oci.ParseRef(s); err == nil {
			t.Errorf("%q was accepted as %v", s, r)
		}
	}
}

func TestLayout(t *testing.T) {
	for _, compress := range []bool{false, true} {
		dir, digest := writeLayout(t, oci.LayoutOptions{Compress: compress, Ref: "v1"}, "upper")
		again, _ := writeLayout(t, oci.LayoutOptions{Compress: compress, Ref: "v1"}, "upper")
		if a, b := hashTree(t, dir), hashTree(t, again); a != b {
			t.Errorf("two layouts of the same layers differ: %s, %s", a, b)
		}
		if compress { // validate reads gzip layers only
			validateLayout(t, dir)
		}
		tarred := filepath.Join(t.TempDir(), "layout.tar")
		run(t, "tar", "-C", dir, "-cf", tarred, ".")
		for _, ref := range []string{"oci:" + dir, "oci:" + dir + ":v1", "oci:" + dir + "@" + digest, "oci:" + tarred, "oci:" + tarred + ":v1"} {
			wantRead(t, ref, "/etc/motd", "upper", oci.Options{})
			im, err := open(t, ref, oci.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if im.Digest != digest || fmt.Sprint(im.Config) != fmt.Sprint(testConfig) {
				t.Errorf("%s: digest %s, config %v", ref, im.Digest, im.Config)
			}
			im.Close()
		}
		_, err := open(t, "oci:"+dir+":v2", oci.Options{})
		wantError(t, err, `no image "v2"`)
		_, err = open(t, "oci:"+dir, oci.Options{Architecture: "arm64"})
		wantError(t, err, "not for linux/arm64")
	}
}

// validateLayout asks go-containerregistry.
func validateLayout(t testing.TB, dir string) {
	t.Helper()
	path, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Errorf("go-containerregistry on our layout: %v", err)
	}
}

// The compressed tar of a layout goes through the cache.
func TestCompressedLayoutTar(t *testing.T) {
	dir, _ := writeLayout(t, oci.LayoutOptions{}, "upper")
	tarred := filepath.Join(t.TempDir(), "layout.tgz")
	run(t, "tar", "-C", dir, "-czf", tarred, ".")
	cache, _ := newCache(t)
	for range 2 {
		wantRead(t, "oci:"+tarred, "/etc/motd", "upper", oci.Options{Cache: cache})
	}
}

func TestSeveralImagesInLayout(t *testing.T) {
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	_, err = open(t, "oci:"+dir, oci.Options{})
	wantError(t, err, "empty")
	for _, tag := range []string{"one", "two"} {
		img := ggcrImage(t, tag)
		if err := path.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag})); err != nil {
			t.Fatal(err)
		}
	}
	_, err = open(t, "oci:"+dir, oci.Options{})
	wantError(t, err, "holds 2 images")
	wantError(t, err, "one (sha256:")
	wantRead(t, "oci:"+dir+":two", "/etc/motd", "two", oci.Options{})
}

// ggcrImage is made by go-containerregistry, for linux/amd64.
func ggcrImage(t testing.TB, marker string) v1.Image {
	t.Helper()
	img := empty.Image
	for _, root := range twoLayers(t, marker) {
		var b bytes.Buffer
		if err := oci.TarFromTree(&b, root); err != nil {
			t.Fatal(err)
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	return withPlatform(t, img, "amd64")
}

func withPlatform(t testing.TB, img v1.Image, arch string) v1.Image {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", arch
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

// ggcrIndex holds amd64 and arm64 and, as BuildKit writes it, an attestation.
func ggcrIndex(t testing.TB) v1.ImageIndex {
	t.Helper()
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: ggcrImage(t, "attestation"), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}})
	for _, arch := range []string{"arm64", "amd64"} {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: withPlatform(t, ggcrImage(t, arch), arch),
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	return index
}

func TestIndexChoosesPlatform(t *testing.T) {
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendIndex(ggcrIndex(t)); err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		wantRead(t, "oci:"+dir, "/etc/motd", arch, oci.Options{Architecture: arch})
	}
	_, err = open(t, "oci:"+dir, oci.Options{Architecture: "riscv64"})
	wantError(t, err, "no image for linux/riscv64")
}

// blobs lists the blobs of a layout by what they are.
func blobs(t testing.TB, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	entries, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, "blobs", "sha256", e.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		switch s := string(b); {
		case strings.Contains(s, `"manifests"`):
			found["index"] = path
		case strings.Contains(s, `"layers":[`):
			found["manifest"] = path
		case strings.Contains(s, `"rootfs"`):
			found["config"] = path
		default:
			found["layer"] = path
		}
	}
	return found
}

// LinuxKit takes a tampered layer out of its cache with exit status 0 when the
// name is an index.
func TestTamperedLayout(t *testing.T) {
	for _, compress := range []bool{false, true} {
		for _, what := range []string{"index", "manifest", "config", "layer"} {
			t.Run(fmt.Sprintf("%s, compressed %v", what, compress), func(t *testing.T) {
				inner, _ := writeLayout(t, oci.LayoutOptions{Compress: compress}, "upper")
				dir := wrapInIndex(t, inner)
				wantRead(t, "oci:"+dir, "/etc/motd", "upper", oci.Options{})
				path := blobs(t, dir)[what]
				if path == "" {
					t.Fatalf("the layout has no %s", what)
				}
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				b[len(b)/2] ^= 1
				if err := os.WriteFile(path, b, 0o644); err != nil {
					t.Fatal(err)
				}
				_, err = open(t, "oci:"+dir, oci.Options{})
				var wrong *oci.DigestError
				if !errors.As(err, &wrong) {
					t.Errorf("error %v, want a DigestError", err)
				}
				wantError(t, err, "changed by somebody")
			})
		}
	}
}

// wrapInIndex copies a layout so that index.json names an index.
func wrapInIndex(t testing.TB, inner string) string {
	t.Helper()
	from, err := layout.FromPath(inner)
	if err != nil {
		t.Fatal(err)
	}
	index, err := from.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	to, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := to.AppendIndex(index); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A manifest whose config does not belong to its layers, truncated and padded
// blobs, and a document that is index and manifest at once.
func TestForgedLayout(t *testing.T) {
	for name, c := range map[string]struct {
		forge func(t *testing.T, dir string)
		want  string
	}{
		"short layer":    {func(t *testing.T, dir string) { truncate(t, blobs(t, dir)["layer"], -1) }, "bytes, the manifest says"},
		"long layer":     {func(t *testing.T, dir string) { truncate(t, blobs(t, dir)["layer"], 1) }, "bytes, the manifest says"},
		"no layout file": {func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "oci-layout")) }, "not an OCI image layout"},
		"missing config": {func(t *testing.T, dir string) { remove(t, blobs(t, dir)["config"]) }, "config sha256:"},
		"index and manifest": {func(t *testing.T, dir string) {
			rewrite(t, dir, "manifest", func(s string) string { return strings.Replace(s, `{`, `{"manifests":[],`, 1) })
		}, "at once"},
		"schema 1": {func(t *testing.T, dir string) {
			rewrite(t, dir, "manifest", func(s string) string {
				return strings.Replace(s, `"schemaVersion":2`, `"schemaVersion":1`, 1)
			})
		}, "schema version 1"},
		"layer as a path": {func(t *testing.T, dir string) {
			rewrite(t, dir, "manifest", func(s string) string {
				i := strings.LastIndex(s, `"digest":"sha256:`) + len(`"digest":"sha256:`)
				return s[:i] + strings.Repeat("../", 21) + "a" + s[i+64:]
			})
		}, "digest"},
		"no layers": {func(t *testing.T, dir string) {
			rewrite(t, dir, "manifest", func(s string) string {
				i, j := strings.Index(s, `"layers":[`)+len(`"layers":[`), strings.LastIndex(s, "]")
				return s[:i] + s[j:]
			})
		}, "lists 0 layers, the config 2"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := writeLayout(t, oci.LayoutOptions{}, "upper")
			c.forge(t, dir)
			_, err := open(t, "oci:"+dir, oci.Options{})
			wantError(t, err, c.want)
		})
	}
}

func truncate(t testing.TB, path string, delta int64) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, info.Size()+delta); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// rewrite changes a blob and gives index.json its new digest.
func rewrite(t testing.TB, dir, what string, change func(string) string) {
	t.Helper()
	path := blobs(t, dir)[what]
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := change(string(old))
	if text == string(old) {
		t.Fatal("nothing to change")
	}
	sum := sha256.Sum256([]byte(text))
	hash := hex.EncodeToString(sum[:])
	indexPath := filepath.Join(dir, "index.json")
	index, err := os.ReadFile(indexPath)
	if err != nil {
		t.Fatal(err)
	}
	s := strings.ReplaceAll(string(index), filepath.Base(path), hash)
	s = strings.ReplaceAll(s, fmt.Sprintf(`"size":%d`, len(old)), fmt.Sprintf(`"size":%d`, len(text)))
	for p, b := range map[string]string{filepath.Join(filepath.Dir(path), hash): text, indexPath: s} {
		if err := os.WriteFile(p, []byte(b), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDockerArchive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "saved.tar")
	one, err := name.NewTag("example.org/one:1")
	if err != nil {
		t.Fatal(err)
	}
	two, err := name.NewTag("example.org/two:2")
	if err != nil {
		t.Fatal(err)
	}
	img := ggcrImage(t, "one")
	if err := tarball.WriteToFile(path, one, img); err != nil {
		t.Fatal(err)
	}
	wantRead(t, "docker-archive:"+path, "/etc/motd", "one", oci.Options{})
	im, err := open(t, "docker-archive:"+path, oci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if id, _ := img.ConfigName(); im.Digest != id.String() {
		t.Errorf("digest %s, the image's ID is %s", im.Digest, id)
	}
	if err := tarball.MultiWriteToFile(path, map[name.Tag]v1.Image{one: img, two: ggcrImage(t, "two")}); err != nil {
		t.Fatal(err)
	}
	wantRead(t, "docker-archive:"+path+":example.org/two:2", "/etc/motd", "two", oci.Options{})
	_, err = open(t, "docker-archive:"+path, oci.Options{})
	wantError(t, err, "holds 2 images")
	_, err = open(t, "docker-archive:"+path+":three", oci.Options{})
	wantError(t, err, `no image "three"`)
}

// Old `docker save` stores a layer that occurs twice as a symbolic link, and a
// changed layer shows in the config's diffIDs.
func TestDockerArchiveWithLinkAndTampering(t *testing.T) {
	for _, text := range []string{"one", "two"} {
		var l bytes.Buffer
		if err := oci.TarFromTree(&l, rootWith(t, "/etc/motd", "one")); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(l.Bytes())
		if text == "two" {
			l.Bytes()[bytes.Index(l.Bytes(), []byte("one"))] ^= 1
		}
		config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%x","sha256:%x"]}}`, sum, sum)
		root := tree.NewDir(0o755)
		for _, err := range []error{
			root.Put("manifest.json", textFile(fmt.Sprintf(`[{"Config":"%x.json","RepoTags":["a:b"],"Layers":["x/layer.tar","y/layer.tar"]}]`, sha256.Sum256([]byte(config))))),
			root.Put(fmt.Sprintf("%x.json", sha256.Sum256([]byte(config))), textFile(config)),
			root.Put("x/layer.tar", textFile(l.String())),
			root.Put("y/layer.tar", &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: "../x/layer.tar"}),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(t.TempDir(), "saved.tar")
		writeTar(t, path, root)
		got, err := read(t, "docker-archive:"+path, "/etc/motd", oci.Options{})
		if text == "one" && (err != nil || got != "one") {
			t.Errorf("got %q, %v", got, err)
		}
		if text == "two" {
			wantError(t, err, "diffID")
		}
	}
}

func rootWith(t testing.TB, path, text string) *tree.Node {
	t.Helper()
	root := tree.NewDir(0o755)
	if err := root.Put(path, textFile(text)); err != nil {
		t.Fatal(err)
	}
	return root
}

func writeTar(t testing.TB, path string, root *tree.Node) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := oci.TarFromTree(f, root); err != nil {
		t.Fatal(err)
	}
}

// run runs a standard tool.
func run(t testing.TB, tool string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Fatalf("%s not installed: apt-get install %s", tool, map[string]string{"xz": "xz-utils", "dpkg-deb": "dpkg"}[tool]+" "+tool)
	}
	out, err := exec.Command(tool, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", tool, args, err, out)
	}
	return string(out)
}

func hashTree(t testing.TB, dir string) string {
	t.Helper()
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		fmt.Fprintf(h, "%s %x\n", strings.TrimPrefix(path, dir), sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func TestTarAndDeb(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "root.tar")
	writeTar(t, plain, rootWith(t, "/etc/motd", "text"))
	run(t, "gzip", "-k", plain)
	run(t, "xz", "-k", plain)
	run(t, "zstd", "-q", plain)
	b, err := os.ReadFile(plain)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("sha256:%x", sha256.Sum256(b))
	cache, cacheDir := newCache(t)
	for _, name := range []string{"root.tar", "root.tar.gz", "root.tar.xz", "root.tar.zst"} {
		for _, o := range []oci.Options{{Dir: dir}, {Dir: dir, Cache: cache}, {Dir: dir, Cache: cache}} {
			wantRead(t, "tar:"+name, "/etc/motd", "text", o)
			im, err := open(t, "tar:"+name, o)
			if err != nil {
				t.Fatal(err)
			}
			if im.Digest != want {
				t.Errorf("%s: digest %s, want the plain tar's %s", name, im.Digest, want)
			}
			im.Close()
		}
	}
	if n := len(files(t, cacheDir, "index")); n != 3 {
		t.Errorf("the cache remembers %d files, want the 3 compressed ones", n)
	}
	pkg := filepath.Join(dir, "pkg")
	writeHost(t, filepath.Join(pkg, "DEBIAN/control"), "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m <m@example.org>\nDescription: d\n")
	writeHost(t, filepath.Join(pkg, "usr/share/p"), "package")
	if err := os.Chmod(filepath.Join(pkg, "DEBIAN"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "dpkg-deb", "--root-owner-group", "-b", pkg, filepath.Join(dir, "p.deb"))
	for range 2 {
		wantRead(t, "deb:p.deb", "/usr/share/p", "package", oci.Options{Dir: dir, Cache: cache})
	}
	im, err := open(t, "deb:p.deb", oci.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	sum := run(t, "sh", "-c", "dpkg-deb --fsys-tarfile '"+filepath.Join(dir, "p.deb")+"' | sha256sum")
	if "sha256:"+sum[:64] != im.Digest {
		t.Errorf("digest %s, dpkg-deb | sha256sum says %s", im.Digest, sum)
	}
}

func writeHost(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func files(t testing.TB, dir, sub string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, sub))
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, e := range entries {
		paths = append(paths, filepath.Join(dir, sub, e.Name()))
	}
	return paths
}

// GNU tar's sparse formats.
func TestSparseTar(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeHost(t, filepath.Join(src, "a"), "plain")
	for _, name := range []string{"s1", "s2"} {
		writeHost(t, filepath.Join(src, name), "start "+name)
		truncate(t, filepath.Join(src, name), 5<<20)
	}
	writeHost(t, filepath.Join(src, "z"), "after")
	for _, format := range []string{"--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"} {
		path := filepath.Join(dir, "s.tar")
		args := []string{"-S", "--sort=name", format, "-C", src, "-cf", path, "."}
		if format != "--format=gnu" {
			args = append([]string{"--format=posix"}, args...)
		}
		run(t, "tar", args...)
		if info, err := os.Stat(path); err != nil || info.Size() > 1<<20 {
			t.Fatalf("tar -S did not store holes: %v, %v", info, err)
		}
		for name, want := range map[string]string{"a": "plain", "s1": "start s1" + strings.Repeat("\x00", 5<<20), "s2": "start s2" + strings.Repeat("\x00", 5<<20), "z": "after"} {
			wantRead(t, "tar:"+path, name, want, oci.Options{})
		}
	}
}

func TestDir(t *testing.T) {
	dir := t.TempDir()
	writeHost(t, filepath.Join(dir, "etc/motd"), "text")
	if err := errors.Join(os.Link(filepath.Join(dir, "etc/motd"), filepath.Join(dir, "link")), os.Symlink("../../../etc", filepath.Join(dir, "out")),
		os.Chmod(filepath.Join(dir, "etc"), 0o2750|fs.ModeSetgid)); err != nil {
		t.Fatal(err)
	}
	im, err := open(t, "dir:"+dir, oci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	root, err := im.Tree(oci.TreeOptions{EpochSec: 1000})
	if err != nil {
		t.Fatal(err)
	}
	motd := root.Lookup("/etc/motd")
	if motd != root.Lookup("/link") || motd.MTimeSec != 1000 || root.Lookup("/out").Target != "../../../etc" || root.Lookup("/etc").Mode != 0o42750 {
		t.Errorf("tree is not as the folder: motd %+v, etc %o", motd, root.Lookup("/etc").Mode)
	}
	other, err := open(t, "dir:"+dir, oci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	if other.Digest != im.Digest || !strings.HasPrefix(im.Digest, "sha256:") {
		t.Errorf("digests %s and %s of one folder", im.Digest, other.Digest)
	}
	writeHost(t, filepath.Join(dir, "etc/motd"), "longer")
	_, err = motd.Content.Open()
	wantError(t, err, "changed during the build")
	_, err = open(t, "dir:"+filepath.Join(dir, "link"), oci.Options{})
	wantError(t, err, "not a folder")
}

// The round trip through tar(1): what it extracts is what we wrote.
func TestTarFromTreeWithTar(t *testing.T) {
	root := rootWith(t, "/d/"+strings.Repeat("n", 200), "long")
	n := root.Lookup("/d").Child(strings.Repeat("n", 200))
	n.Mode = tree.TypeRegular | 0o4755
	for _, err := range []error{root.Put("/hard", n), root.Put("/sym", &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: "hard"})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	writeTar(t, filepath.Join(dir, "t.tar"), root)
	out := filepath.Join(dir, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "tar", "-C", out, "-xpf", filepath.Join(dir, "t.tar"))
	a, err := os.Stat(filepath.Join(out, "sym"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.Lstat(filepath.Join(out, "d", strings.Repeat("n", 200)))
	if err != nil || !os.SameFile(a, b) || b.Mode()&fs.ModeSetuid == 0 {
		t.Errorf("tar extracted %v, %v, %v", a, b, err)
	}
}

func TestCacheTampered(t *testing.T) {
	dir, _ := writeLayout(t, oci.LayoutOptions{Compress: true}, "upper")
	for name, damage := range map[string]func(string){
		"changed": func(p string) {
			b, _ := os.ReadFile(p)
			b[len(b)/2] ^= 1
			os.WriteFile(p, b, 0o600)
		},
		"torn":    func(p string) { os.Truncate(p, 1000) },
		"empty":   func(p string) { os.Truncate(p, 0) },
		"missing": func(p string) { os.Remove(p) },
	} {
		t.Run(name, func(t *testing.T) {
			cache, cacheDir := newCache(t)
			o := oci.Options{Cache: cache}
			wantRead(t, "oci:"+dir, "/etc/motd", "upper", o)
			before := hashTree(t, cacheDir)
			layers := files(t, cacheDir, "layers")
			if len(layers) != 2 {
				t.Fatalf("cache holds %v", layers)
			}
			for _, p := range layers {
				damage(p)
			}
			if hashTree(t, cacheDir) == before {
				t.Fatal("nothing was damaged")
			}
			wantRead(t, "oci:"+dir, "/etc/motd", "upper", o)
			if hashTree(t, cacheDir) != before {
				t.Error("the cache was not repaired")
			}
		})
	}
}

// With the layers cached, the compressed blobs are not needed.
func TestCacheSavesUnpacking(t *testing.T) {
	dir, _ := writeLayout(t, oci.LayoutOptions{Compress: true}, "upper")
	cache, _ := newCache(t)
	wantRead(t, "oci:"+dir, "/etc/motd", "upper", oci.Options{Cache: cache})
	layer := blobs(t, dir)["layer"]
	b, err := os.ReadFile(layer)
	if err != nil {
		t.Fatal(err)
	}
	clear(b[10:]) // keeps the magic and the size
	if err := os.WriteFile(layer, b, 0o644); err != nil {
		t.Fatal(err)
	}
	wantRead(t, "oci:"+dir, "/etc/motd", "upper", oci.Options{Cache: cache})
	_, err = open(t, "oci:"+dir, oci.Options{})
	wantError(t, err, "digest is")
}

func TestCacheWithTwoBuilds(t *testing.T) {
	dir, _ := writeLayout(t, oci.LayoutOptions{Compress: true}, "upper")
	_, cacheDir := newCache(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			cache, err := oci.OpenCache(cacheDir)
			if err != nil {
				t.Error(err)
				return
			}
			if i%4 == 3 { // a vandal in between; files in use are beyond protection
				for _, p := range files(t, cacheDir, "layers") {
					if !strings.HasPrefix(filepath.Base(p), ".new") {
						torn := filepath.Join(cacheDir, fmt.Sprintf("torn%d", i))
						os.WriteFile(torn, make([]byte, 700), 0o600)
						os.Rename(torn, p)
					}
				}
			}
			wantRead(t, "oci:"+dir, "/bin/tool", strings.Repeat("tool", 5000), oci.Options{Cache: cache})
		})
	}
	wg.Wait()
	for _, p := range files(t, cacheDir, "layers") {
		if strings.HasPrefix(filepath.Base(p), ".new") {
			t.Errorf("%s was left behind", p)
		}
	}
}

func TestCacheOpenToEverybody(t *testing.T) {
	_, dir := newCache(t)
	if err := os.Chmod(filepath.Join(dir, "index"), 0o777); err != nil {
		t.Fatal(err)
	}
	_, err := oci.OpenCache(dir)
	wantError(t, err, "chmod o-w")
}

// A layer may not unpack to more than the limit, and leaves nothing behind.
func TestBomb(t *testing.T) {
	dir := t.TempDir()
	_, err := oci.WriteLayout(dir, []*tree.Node{rootWith(t, "/zeros", strings.Repeat("\x00", 8<<20))}, oci.Config{}, oci.LayoutOptions{Compress: true})
	if err != nil {
		t.Fatal(err)
	}
	cache, cacheDir := newCache(t)
	_, err = open(t, "oci:"+dir, oci.Options{MaxLayerBytes: 1 << 20, Cache: cache})
	wantError(t, err, "more than 1048576 bytes")
	if left := files(t, cacheDir, "layers"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// kernel.tar in an image, LinuxKit's way, plain and compressed.
func TestOpenTar(t *testing.T) {
	var b, z bytes.Buffer
	if err := oci.TarFromTree(&b, rootWith(t, "/lib/modules/x.ko", "module")); err != nil {
		t.Fatal(err)
	}
	z.WriteString(gzipped(t, b.Bytes()))
	cache, _ := newCache(t)
	for _, c := range []tree.Content{tree.Bytes(b.Bytes()), tree.Bytes(z.Bytes()),
		tree.Section{R: bytes.NewReader(append([]byte("xx"), b.Bytes()...)), Off: 2, SizeBytes: int64(b.Len())},
		tree.Section{R: bytes.NewReader(z.Bytes()), SizeBytes: int64(z.Len())}} {
		for _, o := range []oci.Options{{}, {Cache: cache}} {
			im, err := oci.OpenTar(context.Background(), c, o)
			if err != nil {
				t.Fatal(err)
			}
			root, err := im.Tree(oci.TreeOptions{})
			if err != nil || root.Lookup("/lib/modules/x.ko").Content.Size() != 6 {
				t.Errorf("%T: %v", c, err)
			}
			if err := im.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	_, err := oci.OpenTar(context.Background(), tree.Bytes("this is no tar"), oci.Options{})
	wantError(t, err, "open tar")
}

func gzipped(t testing.TB, b []byte) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "gzip", filepath.Join(dir, "f"))
	z, err := os.ReadFile(filepath.Join(dir, "f.gz"))
	if err != nil {
		t.Fatal(err)
	}
	return string(z)
}

// testRegistry serves an image on loopback, blobs in the folder it gives.
func testRegistry(t testing.TB) (host, blobDir string) {
	t.Helper()
	blobDir = t.TempDir()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(blobDir))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), blobDir
}

func push(t testing.TB, ref string, img v1.Image) string {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func TestRegistryAndLock(t *testing.T) {
	host, _ := testRegistry(t)
	ref := host + "/app:1"
	first := push(t, ref, ggcrImage(t, "first"))
	lockPath := filepath.Join(t.TempDir(), "lock")
	lock, err := oci.ReadLock(lockPath)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []oci.Options{{}, {Lock: lock}} {
		_, err = open(t, ref, o)
		wantError(t, err, "holdfast lock SPEC")
	}
	lock.Update = true
	wantRead(t, ref, "/etc/motd", "first", oci.Options{Lock: lock})
	if err := lock.Write(lockPath); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(lockPath)
	if err != nil || string(text) != ref+" "+first+"\n" {
		t.Errorf("lock file is %q, %v", text, err)
	}

	second := push(t, ref, ggcrImage(t, "second")) // the tag moves
	if lock, err = oci.ReadLock(lockPath); err != nil {
		t.Fatal(err)
	}
	wantRead(t, ref, "/etc/motd", "first", oci.Options{Lock: lock})
	wantRead(t, host+"/app@"+second, "/etc/motd", "second", oci.Options{})
	wantRead(t, host+"/app:1@"+second, "/etc/motd", "second", oci.Options{})
	lock.Update = true
	r, err := oci.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Resolve(context.Background(), r); err != nil {
		t.Fatal(err)
	}
	lock.Update = false
	wantRead(t, ref, "/etc/motd", "second", oci.Options{Lock: lock})
	_, err = open(t, host+"/app@sha256:"+strings.Repeat("0", 64), oci.Options{})
	wantError(t, err, "sha256:000000")
}

func TestRegistryIndex(t *testing.T) {
	host, _ := testRegistry(t)
	tag, err := name.NewTag(host + "/app:multi")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(tag, ggcrIndex(t)); err != nil {
		t.Fatal(err)
	}
	lock, err := oci.ReadLock(filepath.Join(t.TempDir(), "none"))
	if err != nil {
		t.Fatal(err)
	}
	lock.Update = true
	cache, _ := newCache(t)
	for _, arch := range []string{"amd64", "arm64"} {
		wantRead(t, tag.String(), "/etc/motd", arch, oci.Options{Lock: lock, Architecture: arch, Cache: cache})
	}
}

func TestRegistryTamperedBlob(t *testing.T) {
	host, blobDir := testRegistry(t)
	digest := push(t, host+"/app:1", ggcrImage(t, "first"))
	wantRead(t, host+"/app@"+digest, "/etc/motd", "first", oci.Options{})
	var damaged int
	err := filepath.WalkDir(blobDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(b, []byte("\x1f\x8b")) {
			return err
		}
		b[len(b)/2] ^= 1
		damaged++
		return os.WriteFile(path, b, 0o644)
	})
	if err != nil || damaged != 2 {
		t.Fatalf("damaged %d layers, %v", damaged, err)
	}
	_, err = open(t, host+"/app@"+digest, oci.Options{})
	wantError(t, err, "layer")
}

func TestLockFile(t *testing.T) {
	sum := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	path := filepath.Join(t.TempDir(), "lock")
	writeHost(t, path, "# made by hand\n\nzoo:1   "+sum("a")+"\n# stay on 3\nalpine:3 "+sum("b")+"\n# end\n")
	lock, err := oci.ReadLock(path)
	if err != nil {
		t.Fatal(err)
	}
	want := "# made by hand\n\n# stay on 3\nindex.docker.io/library/alpine:3 " + sum("b") + "\nindex.docker.io/library/zoo:1 " + sum("a") + "\n# end\n"
	for range 2 { // what it writes, it reads the same
		if err := lock.Write(path); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != want {
			t.Errorf("lock file is\n%s%v\nwant\n%s", got, err, want)
		}
		if lock, err = oci.ReadLock(path); err != nil {
			t.Fatal(err)
		}
	}
	for text, want := range map[string]string{"a\n": ":1: ", "\na b\n": ":2: ", "a:1 sha256:00\n": "digest",
		"a:1 " + sum("a") + "\nlibrary/a:1 " + sum("b") + "\n": "twice"} {
		writeHost(t, path, text)
		_, err := oci.ReadLock(path)
		wantError(t, err, want)
	}
	for _, local := range []string{"dir:x", "alpine@" + sum("c")} {
		r, err := oci.ParseRef(local)
		if err != nil {
			t.Fatal(err)
		}
		if err := lock.Resolve(context.Background(), r); err != nil {
			t.Errorf("%s: %v", local, err)
		}
	}
}

func TestCancelled(t *testing.T) {
	dir, _ := writeLayout(t, oci.LayoutOptions{Compress: true}, "upper")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, ref := range []string{"oci:" + dir, "dir:" + dir} {
		r, err := oci.ParseRef(ref)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = oci.Open(ctx, r, oci.Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: error %v", ref, err)
		}
	}
}

func TestWriteLayoutRefusesWhiteoutNames(t *testing.T) {
	_, err := oci.WriteLayout(t.TempDir(), []*tree.Node{rootWith(t, "/d/.wh.x", "")}, oci.Config{}, oci.LayoutOptions{})
	wantError(t, err, "/d/.wh.x")
}

// Two calls of Tree share nothing but contents.
func TestTreeTwice(t *testing.T) {
	dir, _ := writeLayout(t, oci.LayoutOptions{}, "upper")
	im, err := open(t, "oci:"+dir, oci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	one, err := im.Tree(oci.TreeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	one.Clear()
	two, err := im.Tree(oci.TreeOptions{})
	if err != nil || !slices.Equal(two.Names(), []string{"bin", "etc"}) {
		t.Errorf("names %v, %v", two.Names(), err)
	}
}
