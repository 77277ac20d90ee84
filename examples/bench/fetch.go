package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/delta"
)

// kinds are the releases that devices with the first one get.
func kinds() []release {
	old := release{version: "1.0.0", debian: "first", etcd: "first", modules: "first", config: "snapshot-count: 10000\n"}
	small, security, kernel := old, old, old
	small.version, small.etcd, small.config = "1.0.1", "second", "snapshot-count: 50000\n"
	security.version, security.debian, security.service = "1.1.0", "second", true
	kernel = security
	kernel.version, kernel.modules = "1.2.0", "second"
	return []release{old, small, security, kernel}
}

// fetches compares what a device fetches, and what it takes to make the new root of
// that and of the old one. The others get the file system without its dm-verity tree.
func (b *bench) fetches() error {
	if err := programs(); err != nil {
		return err
	}
	// The releases of the other tables have the same versions and no modules.
	sub := *b
	sub.dir = filepath.Join(b.dir, "fetch")
	if err := os.Mkdir(sub.dir, 0o755); err != nil {
		return err
	}
	return sub.fetchAll(kinds())
}

func (b *bench) fetchAll(list []release) error {
	var versions []string
	for _, r := range list {
		if err := b.make(r); err != nil {
			return err
		}
		versions = append(versions, r.version)
		if err := b.cutTree(r.version); err != nil {
			return err
		}
	}
	if err := b.publish("repo", versions...); err != nil {
		return err
	}
	if _, err := b.time(exec.Command("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench", "-days", "3", "-keyout", "rauc.key", "-out", "rauc.crt")); err != nil {
		return err
	}
	old, err := os.Stat(b.data(list[0].version))
	if err != nil {
		return err
	}
	fmt.Printf("| from a root of %d MB | by | fetched | time | peak memory |\n|---|---|---|---|---|\n", old.Size()/1e6)
	for i, what := range []string{"small", "security", "kernel"} {
		for _, t := range []struct {
			name string
			run  func(old, now string) (fetched, error)
		}{
			{"Holdfast, patch", b.ours("patch")}, {"Holdfast, index", b.ours("index")}, {"Holdfast, pack", b.ours("pack")},
			{"casync", b.casync}, {"zstd -3 --patch-from", b.zstd}, {"RAUC", b.rauc}, {"RAUC, adaptive", b.raucAdaptive},
		} {
			f, err := t.run(list[0].version, list[i+1].version)
			if err != nil {
				return fmt.Errorf("%s release by %s: %w", what, t.name, err)
			}
			cost := "– | –"
			if len(f.wall) > 0 {
				cost = fmt.Sprintf("%s | %d MiB", f.text(), f.rss>>20)
			}
			fmt.Printf("| %s | %s | %.2f MB | %s |\n", what, t.name, float64(f.bytes)/1e6, cost)
		}
	}
	return nil
}

// data is the root image without its tree.
func (b *bench) data(version string) string { return filepath.Join(b.dir, version+".img") }

func (b *bench) cutTree(version string) error {
	m, err := b.manifest(version)
	if err != nil {
		return err
	}
	_, err = b.time(exec.Command("sh", "-c", `head -c "$1" "$2" > "$3"`, "sh",
		strconv.FormatInt(m.Verity.DataBlocks*delta.BlockSize, 10), b.rootImage(version), b.data(version)))
	return err
}

// fetched is what one way of updating took; without measurements it was computed.
type fetched struct {
	bytes int64
	measured
}

// repeat runs what makes b.dir/out, and compares that with what it should be.
func (b *bench) repeat(f *fetched, want string, command ...string) error {
	out := filepath.Join(b.dir, "out")
	for i := range b.runs + 1 {
		if err := os.RemoveAll(out); err != nil {
			return err
		}
		m, err := b.time(exec.Command(command[0], command[1:]...))
		if err != nil {
			return err
		}
		if i > 0 {
			f.add(m)
		}
	}
	if info, err := os.Stat(out); err == nil && info.IsDir() {
		out = filepath.Join(out, filepath.Base(want))
	}
	_, err := b.time(exec.Command("cmp", out, want))
	return err
}

// rebuildVerb makes this program one that rebuilds a root image as a device does.
const rebuildVerb = "rebuild"

func (b *bench) ours(way string) func(old, now string) (fetched, error) {
	return func(old, now string) (f fetched, err error) {
		self, err := os.Executable()
		if err != nil {
			return f, err
		}
		count := filepath.Join(b.dir, "count")
		if err := b.repeat(&f, b.rootImage(now), self, rebuildVerb, way, filepath.Join(b.dir, "repo"), old, b.rootImage(old), now, "out", count); err != nil {
			return f, err
		}
		text, err := os.ReadFile(count)
		if err != nil {
			return f, err
		}
		f.bytes, err = strconv.ParseInt(string(text), 10, 64)
		return f, err
	}
}

// rebuildRoot takes a way (patch, index or pack), a repository, a version and its root
// image, another version, and the files for its root image and for the number of bytes
// that were fetched.
func rebuildRoot(args []string) (err error) {
	if len(args) != 7 {
		return errors.New("bench runs " + rebuildVerb + " itself")
	}
	way, repo, out := args[0], args[1], args[5]
	was, err := published(repo, args[2])
	if err != nil {
		return err
	}
	now, err := published(repo, args[4])
	if err != nil {
		return err
	}
	v := was.Manifest.Verity
	o := delta.Options{Verity: now.Manifest.Verity, Tree: local(repo, now, update.RoleTree, ""), Pack: local(repo, now, update.RolePack, "")}
	if way != "pack" {
		old, err := os.Open(args[3])
		if err != nil {
			return err
		}
		defer old.Close()
		o.Old, o.OldVerity = old, v
	}
	if way != "pack" {
		o.Pieces = local(repo, now, update.RolePieces, "")
	}
	if way == "patch" {
		o.Patch = local(repo, now, update.RolePatch, v.RootHash)
	}
	r, err := delta.New(context.Background(), o)
	if err != nil {
		return err
	}
	if string(r.Stats().Source) != way {
		return fmt.Errorf("the root comes by %s instead of %s: %w", r.Stats().Source, way, errors.Join(r.Stats().OldUnused, r.Stats().PatchUnused))
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	s, err := r.Open(context.Background())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if _, err := io.Copy(f, s); err != nil {
		return err
	}
	return os.WriteFile(args[6], []byte(strconv.FormatInt(r.Fetched(), 10)), 0o644)
}

// local is a blob of a repository in a folder.
func local(repo string, rel *update.Release, role, from string) delta.Blob {
	b, ok := rel.Blob(role, from)
	if !ok {
		return delta.Blob{}
	}
	return delta.Blob{SizeBytes: b.SizeBytes, Fetch: func(_ context.Context, offset, length int64) (io.ReadCloser, error) {
		f, err := os.Open(filepath.Join(repo, update.BlobPath(b.SHA256)))
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{io.NewSectionReader(f, offset, length), f}, nil
	}}
}

// casync fetches an index and the chunks that the old one does not have. They come in
// files, so those in the store that are new are all that is counted.
func (b *bench) casync(old, now string) (f fetched, err error) {
	store := filepath.Join(b.dir, "store.castr")
	if err := os.RemoveAll(store); err != nil {
		return f, err
	}
	if _, err := b.time(exec.Command("casync", "make", "--store="+store, "old.caibx", b.data(old))); err != nil {
		return f, err
	}
	before, err := folderBytes(store)
	if err != nil {
		return f, err
	}
	if _, err := b.time(exec.Command("casync", "make", "--store="+store, "now.caibx", b.data(now))); err != nil {
		return f, err
	}
	after, err := folderBytes(store)
	if err != nil {
		return f, err
	}
	index, err := os.Stat(filepath.Join(b.dir, "now.caibx"))
	if err != nil {
		return f, err
	}
	f.bytes = after - before + index.Size()
	return f, b.repeat(&f, b.data(now), "casync", "extract", "--store="+store, "--seed="+b.data(old), "now.caibx", "out")
}

func folderBytes(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		n += info.Size()
		return err
	})
	return n, err
}

func (b *bench) zstd(old, now string) (f fetched, err error) {
	if _, err := b.time(exec.Command("zstd", "-q", "-f", "-3", "--long=31", "--patch-from="+b.data(old), b.data(now), "-o", "now.zst")); err != nil {
		return f, err
	}
	info, err := os.Stat(filepath.Join(b.dir, "now.zst"))
	if err != nil {
		return f, err
	}
	f.bytes = info.Size()
	return f, b.repeat(&f, b.data(now), "zstd", "-q", "-d", "--long=31", "--patch-from="+b.data(old), "now.zst", "-o", "out")
}

// bundle makes a RAUC bundle of a root.
func (b *bench) bundle(version, format, image, squashfs string) (string, error) {
	input, name := filepath.Join(b.dir, "rauc"), filepath.Join(b.dir, "now.raucb")
	if err := errors.Join(os.RemoveAll(input), os.RemoveAll(name), os.Mkdir(input, 0o755)); err != nil {
		return "", err
	}
	img := filepath.Base(b.data(version))
	if err := os.Link(b.data(version), filepath.Join(input, img)); err != nil {
		return "", err
	}
	manifest := fmt.Sprintf("[update]\ncompatible=bench\nversion=%s\n[bundle]\nformat=%s\n[image.rootfs]\nfilename=%s\n%s", version, format, img, image)
	if err := os.WriteFile(filepath.Join(input, "manifest.raucm"), []byte(manifest), 0o644); err != nil {
		return "", err
	}
	args := []string{"bundle", "--cert=rauc.crt", "--key=rauc.key", "--keyring=rauc.crt"}
	if squashfs != "" {
		args = append(args, "--mksquashfs-args="+squashfs)
	}
	_, err := b.time(exec.Command("rauc", append(args, input, name)...))
	return name, err
}

// rauc fetches the whole bundle, as rauc makes it by itself.
func (b *bench) rauc(_, now string) (f fetched, err error) {
	name, err := b.bundle(now, "plain", "", "")
	if err != nil {
		return f, err
	}
	info, err := os.Stat(name)
	if err != nil {
		return f, err
	}
	f.bytes = info.Size()
	return f, b.repeat(&f, b.data(now), "rauc", "extract", "--keyring=rauc.crt", name, "out")
}

// raucAdaptive computes what a streaming installation has to read, because one needs
// the kernel's network block device: of the squashfs in the bundle, as its inodes tell,
// the blocks that hold a 4 KiB chunk which the old root does not have, and the list of
// hashes. What the squashfs needs besides is not counted.
func (b *bench) raucAdaptive(old, now string) (f fetched, err error) {
	name, err := b.bundle(now, "verity", "adaptive=block-hash-index\n", "-comp zstd -b 64k")
	if err != nil {
		return f, err
	}
	files, err := squashfsFiles(name)
	if err != nil {
		return f, fmt.Errorf("%s: %w", name, err)
	}
	info, err := os.Stat(b.data(now))
	if err != nil {
		return f, err
	}
	hashes := info.Size() / delta.BlockSize * 32
	root, index := files[info.Size()], files[hashes]
	if root.blocks == nil || index.blocks == nil {
		return f, fmt.Errorf("%s: no files of %d and %d bytes", name, info.Size(), hashes)
	}
	for _, n := range index.blocks {
		f.bytes += n
	}
	need, err := b.missing(old, now, root.blockBytes)
	for i := range need {
		f.bytes += root.blocks[i]
	}
	return f, err
}

// missing says which pieces of the new image hold a block that the old one does not.
func (b *bench) missing(old, now string, pieceBytes int64) (map[int64]bool, error) {
	trees := map[string]*delta.Tree{}
	for _, v := range []string{old, now} {
		m, err := b.manifest(v)
		if err != nil {
			return nil, err
		}
		if trees[v], err = rootTree(b.rootImage(v), m.Verity); err != nil {
			return nil, err
		}
	}
	pieces := map[int64]bool{}
	for i, from := range delta.Match(trees[old], trees[now]) {
		if from == 1<<32-1 {
			pieces[int64(i)*delta.BlockSize/pieceBytes] = true
		}
	}
	return pieces, nil
}

func rootTree(path string, v image.Verity) (_ *delta.Tree, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	at := v.DataBlocks * delta.BlockSize
	return delta.ReadTree(io.NewSectionReader(f, at, v.TotalBytes-at), v)
}

// programs are those that fetches needs; a table without one of them would mislead.
func programs() error {
	for name, from := range map[string]string{"casync": "casync", "rauc": "rauc", "mksquashfs": "squashfs-tools", "zstd": "zstd", "openssl": "openssl"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%s not installed: apt-get install %s", name, from)
		}
	}
	return nil
}
