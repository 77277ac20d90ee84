// Command bench measures the builder, what becomes of an update, and the opening of a
// volume by the TPM, against the standard tools on the same input in the same run, and prints Markdown tables.
// `make bench` runs it.
//
// The reference makes the same parts: mkfs.erofs, veritysetup format, mkfs.vfat
// and mtools for the boot partition, sgdisk, and dd into a sparse image; it gets
// the UKI for nothing. Times are wall-clock medians with minimum and maximum,
// memory is the largest resident set of the process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/tree"
)

func main() {
	holdfast := flag.String("holdfast", "build/bin/holdfast", "the builder")
	inputs := flag.String("inputs", "build/inputs", "folder with linux-image.deb")
	keyDir := flag.String("keys", "build/keys", "the vendor's keys")
	trees := flag.String("trees", "build/bench", "folder with the roots, kernels and programs that updates are made of")
	systemd := flag.String("systemd", os.Getenv("HOLDFAST_SYSTEMD_ROOT"), "folder with Debian 13's systemd-cryptsetup, for unlock")
	what := flag.String("what", "build,apply,add,fetch,attest,unlock", "what to measure")
	runs := flag.Int("runs", 5, "counted runs of each")
	if len(os.Args) > 1 && os.Args[1] == rebuildVerb { // by itself, as a process whose memory is measured
		if err := rebuildRoot(os.Args[2:]); err != nil {
			fail(err)
		}
		return
	}
	flag.Parse()
	b := &bench{runs: *runs, systemd: *systemd}
	for _, p := range []struct {
		into *string
		path string
	}{{&b.holdfast, *holdfast}, {&b.inputs, *inputs}, {&b.keys, *keyDir}, {&b.trees, *trees}} {
		abs, err := filepath.Abs(p.path)
		if err != nil {
			fail(err)
		}
		*p.into = abs
	}
	if err := b.run(strings.Split(*what, ",")); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "error:", err)
	os.Exit(1)
}

type bench struct {
	holdfast, inputs, keys, trees, systemd, dir string
	runs                                        int
}

// measured is what one command cost, run by run.
type measured struct {
	wall []time.Duration
	rss  int64 // bytes, the largest
}

func (m measured) median() time.Duration {
	w := slices.Sorted(slices.Values(m.wall))
	return w[len(w)/2]
}

func (m measured) text() string {
	return fmt.Sprintf("%.2f s (%.2f to %.2f)", m.median().Seconds(), slices.Min(m.wall).Seconds(), slices.Max(m.wall).Seconds())
}

func (b *bench) run(what []string) (err error) {
	if b.dir, err = os.MkdirTemp("", "holdfast-bench"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	parts := map[string]func() error{"build": b.builds, "apply": b.applies, "add": b.adds, "fetch": b.fetches, "attest": b.attests, "unlock": b.unlocks}
	for _, w := range what {
		part, ok := parts[w]
		if !ok {
			return fmt.Errorf("-what %s: there are build, apply, add, fetch, attest and unlock", w)
		}
		if err := part(); err != nil {
			return fmt.Errorf("%s: %w", w, err)
		}
		fmt.Println()
	}
	return nil
}

func (b *bench) builds() error {
	if err := b.prepare("small", 3000, 230<<20); err != nil {
		return err
	}
	fmt.Println("| 230 MB root in 3,000 files | holdfast | standard tools | ratio | peak memory |")
	fmt.Println("|---|---|---|---|---|")
	for _, row := range []struct{ what, image, unpack string }{
		{"plain layer, cold cache", "small-plain", ""},
		{"gzip layer, cold cache; the tools unpack it with tar", "small-gzip", "small.tar.gz"},
	} {
		if err := b.compare(row.what, row.image, row.unpack); err != nil {
			return err
		}
	}
	if err := b.rebuilds(); err != nil {
		return err
	}
	return b.large()
}

// prepare makes a tree of generated files, and images of it.
func (b *bench) prepare(name string, files int, bytes int64) error {
	root := filepath.Join(b.dir, name)
	if err := generate(root, files, bytes); err != nil {
		return err
	}
	ref, err := oci.ParseRef("dir:" + root)
	if err != nil {
		return err
	}
	im, err := oci.Open(context.Background(), ref, oci.Options{})
	if err != nil {
		return err
	}
	defer im.Close()
	n, err := im.Tree(oci.TreeOptions{})
	if err != nil {
		return err
	}
	for suffix, compress := range map[string]bool{"-plain": false, "-gzip": true} {
		if _, err := oci.WriteLayout(filepath.Join(b.dir, name+suffix), []*tree.Node{n}, oci.Config{}, oci.LayoutOptions{Compress: compress}); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(b.dir, name+suffix+".yaml"), b.spec("oci:"+name+suffix), 0o644); err != nil {
			return err
		}
	}
	_, err = b.time(exec.Command("tar", "-C", root, "-czf", filepath.Join(b.dir, name+".tar.gz"), "."))
	return err
}

// generate writes files whose sizes spread like those of a real root: most are
// small, a few hold most of the bytes. Half of the content compresses.
func generate(root string, files int, total int64) error {
	r := rand.New(rand.NewPCG(1, 2))
	weights, sum := make([]float64, files), 0.0
	for i := range weights {
		weights[i] = r.ExpFloat64() * r.ExpFloat64() * r.ExpFloat64()
		sum += weights[i]
	}
	buf := make([]byte, 1<<16)
	for i, w := range weights {
		path := filepath.Join(root, fmt.Sprintf("usr/lib/part%02d/dir%02d/file%05d", i%20, i/20%20, i))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		for left := int64(w / sum * float64(total)); left > 0; left -= int64(len(buf)) {
			for j := range buf[:len(buf)/2] {
				buf[j] = byte(r.Uint32())
			}
			if _, err := f.Write(buf[:min(left, int64(len(buf)))]); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(root, "sbin"), 0o755)
}

func (b *bench) spec(image string) []byte {
	return fmt.Appendf(nil, "name: bench\nversion: 1.0.0\nkeys: %s\nkernel: {image: 'deb:%s/linux-image.deb', cmdline: console=ttyS0}\n"+
		"init: ['%s']\nhandoff: [/sbin/init]\ndisk: {size: 12GiB, esp: 512MiB, slot: 5GiB}\n", b.keys, b.inputs, image)
}

// time runs a command to its end.
func (b *bench) time(cmd *exec.Cmd) (measured, error) {
	cmd.Dir = b.dir
	var said []byte
	began := time.Now()
	said, err := cmd.CombinedOutput()
	took := time.Since(began)
	if err != nil {
		return measured{}, fmt.Errorf("%v: %w: %s", cmd.Args, err, said)
	}
	rss := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss * 1024
	return measured{[]time.Duration{took}, rss}, nil
}

// build runs the builder with a copy of the cache folder given, so that a cold
// cache is cold each time; it holds the kernel, which the reference gets too.
func (b *bench) build(spec, cache string) (m measured, err error) {
	out := filepath.Join(b.dir, "out")
	if m, err = b.time(exec.Command(b.holdfast, "build", spec, "-o", out, "--cache", cache)); err != nil {
		return m, err
	}
	return m, os.RemoveAll(out)
}

// kernelCache returns a new cache folder that knows the kernel and no layer.
func (b *bench) kernelCache() (string, error) {
	primed := filepath.Join(b.dir, "primed")
	if _, err := os.Stat(primed); err != nil {
		empty := tree.NewDir(0o755)
		if _, err := oci.WriteLayout(filepath.Join(b.dir, "empty"), []*tree.Node{empty}, oci.Config{}, oci.LayoutOptions{}); err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(b.dir, "empty.yaml"), b.spec("oci:empty"), 0o644); err != nil {
			return "", err
		}
		if _, err := b.build("empty.yaml", primed); err != nil {
			return "", err
		}
	}
	fresh, err := os.MkdirTemp(b.dir, "cache")
	if err != nil {
		return "", err
	}
	_, err = b.time(exec.Command("cp", "-al", primed+"/.", fresh))
	return fresh, err
}

// reference is the pipeline of the standard tools.
func (b *bench) reference(source string) (measured, error) {
	script := `set -e
rm -rf ref && mkdir ref
tree=small
if [ -n "$1" ]; then mkdir ref/tree && tar -C ref/tree -xzf "$1" && tree=ref/tree; fi
mkfs.erofs -T0 -U 00000000-0000-0000-0000-000000000001 ref/root.img "$tree" >/dev/null
size=$(stat -c %s ref/root.img)
veritysetup format --salt=00 --uuid=00000000-0000-0000-0000-000000000002 --hash-offset=$size ref/root.img ref/root.img >/dev/null
truncate -s 512M ref/esp.img
mkfs.vfat -F 32 ref/esp.img >/dev/null
mmd -i ref/esp.img ::EFI ::EFI/BOOT ::EFI/holdfast ::loader ::loader/entries
mcopy -i ref/esp.img uki/release/bootloader.efi ::EFI/BOOT/BOOTX64.EFI
mcopy -i ref/esp.img uki/release/uki.efi ::EFI/holdfast/a.efi
truncate -s 12G ref/disk.raw
sgdisk -n 1:2048:+512M -t 1:EF00 -n 2:0:+5G -n 3:0:+5G -n 4:0:0 ref/disk.raw >/dev/null
dd if=ref/esp.img of=ref/disk.raw bs=1M seek=1 conv=notrunc,sparse status=none
dd if=ref/root.img of=ref/disk.raw bs=1M seek=513 conv=notrunc,sparse status=none`
	if _, err := os.Stat(filepath.Join(b.dir, "uki")); err != nil {
		cache, err := b.kernelCache()
		if err != nil {
			return measured{}, err
		}
		if _, err := b.time(exec.Command(b.holdfast, "build", "small-plain.yaml", "-o", "uki", "--cache", cache)); err != nil {
			return measured{}, err
		}
	}
	return b.time(exec.Command("sh", "-c", script, "sh", source))
}

// compare alternates builder and reference, after one round that is not counted.
func (b *bench) compare(what, image, unpack string) error {
	var ours, theirs measured
	for i := range b.runs + 1 {
		cache, err := b.kernelCache()
		if err != nil {
			return err
		}
		our, err := b.build(image+".yaml", cache)
		if err != nil {
			return err
		}
		their, err := b.reference(unpack)
		if err != nil {
			return err
		}
		if i > 0 {
			ours.add(our)
			theirs.add(their)
		}
		if err := os.RemoveAll(cache); err != nil {
			return err
		}
	}
	fmt.Printf("| %s | %s | %s | %.2f | %d MiB |\n", what, ours.text(), theirs.text(),
		ours.median().Seconds()/theirs.median().Seconds(), ours.rss>>20)
	return nil
}

func (m *measured) add(o measured) {
	m.wall = append(m.wall, o.wall...)
	m.rss = max(m.rss, o.rss)
}

// rebuilds measures a warm cache, and a second small layer over a known one.
func (b *bench) rebuilds() error {
	cache, err := b.kernelCache()
	if err != nil {
		return err
	}
	var warm measured
	for i := range b.runs + 1 {
		m, err := b.build("small-gzip.yaml", cache)
		if err != nil {
			return err
		}
		if i > 0 {
			warm.add(m)
		}
	}
	fmt.Printf("| gzip layer, rebuild with a warm cache | %s | – | – | %d MiB |\n", warm.text(), warm.rss>>20)
	return nil
}

// large shows that memory does not grow with the root.
func (b *bench) large() error {
	if err := b.prepare("large", 3000, 2<<30); err != nil {
		return err
	}
	cache, err := b.kernelCache()
	if err != nil {
		return err
	}
	for _, image := range []string{"large-plain", "large-gzip"} {
		m, err := b.build(image+".yaml", cache)
		if err != nil {
			return err
		}
		fmt.Printf("| 2 GiB root, %s layer, one run | %.1f s | – | – | %d MiB |\n", image[len("large-"):], m.median().Seconds(), m.rss>>20)
	}
	return nil
}
