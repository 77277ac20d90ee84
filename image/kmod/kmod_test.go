package kmod

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/holdfast-os/holdfast/image/tree"
)

const version = "6.1.0-1-test"

// ko makes a module: an ELF object with .modinfo and a signature behind it.
func ko(entries ...string) []byte {
	modinfo := strings.Join(append(entries, "vermagic="+version+" SMP preempt"), "\x00") + "\x00\x00"
	return elfObject(modinfo, ".modinfo")
}

func elfObject(content, section string) []byte {
	names := "\x00" + section + "\x00.shstrtab\x00"
	head := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64,
		Shentsize: 64, Shnum: 3, Shstrndx: 2, Shoff: uint64(64 + len(content) + len(names))}
	copy(head.Ident[:], "\x7fELF\x02\x01\x01")
	sections := [3]elf.Section64{{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(content)), Addralign: 1},
		{Name: uint32(2 + len(section)), Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + len(content)), Size: uint64(len(names)), Addralign: 1}}
	b, _ := binary.Append(nil, binary.LittleEndian, head)
	b = append(b, content+names...)
	b, _ = binary.Append(b, binary.LittleEndian, sections)
	return append(b, "PKCS7~Module signature appended~\n"...)
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b)
	z.Close()
	return out.Bytes()
}

func zst(b []byte) []byte {
	z, _ := zstd.NewWriter(nil)
	return z.EncodeAll(b, nil)
}

func xzip(b []byte) []byte {
	var out bytes.Buffer
	z, _ := xz.NewWriter(&out)
	z.Write(b)
	z.Close()
	return out.Bytes()
}

// kernel is a small kernel package.
func kernel(t testing.TB, extra map[string][]byte) *tree.Node {
	t.Helper()
	files := map[string][]byte{
		"kernel/drivers/block/virtio_blk.ko":      ko("alias=virtio:d00000002v*", "depends=virtio,virtio-ring"),
		"kernel/drivers/virtio/virtio.ko":         ko("depends="),
		"kernel/drivers/virtio/virtio_ring.ko.xz": xzip(ko("depends=virtio")),
		"kernel/drivers/md/dm-mod.ko.zst":         zst(ko("depends=")),
		"kernel/drivers/md/dm-crypt.ko.gz":        gz(ko("depends=dm-mod", "softdep=post: afterwards")),
		"kernel/fs/btrfs.ko":                      ko("depends=", "softdep=pre: crypto-sum sha256 gone", "softdep=aes pre: ecb"),
		"kernel/crypto/ecb.ko":                    ko("depends=", "softdep=pre: btrfs"), // a circle of soft ones
		"kernel/arch/x86/sum-ssse3.ko":            ko("depends=sum_lib", "alias=crypto-sum"),
		"kernel/crypto/sum_generic.ko":            ko("depends=sum_lib", "alias=crypto-sum"),
		"kernel/crypto/sum_lib.ko":                ko("depends="),
		"kernel/extra/afterwards.ko":              ko("depends=virtio"),
		"kernel/bad/loop-a.ko":                    ko("depends=loop-b"),
		"kernel/bad/loop-b.ko":                    ko("depends=loop-a"),
		"kernel/bad/orphan.ko":                    ko("depends=no_such"),
		"kernel/bad/twice.ko":                     ko("depends="),
		"kernel/bad/again/twice.ko":               ko("depends="),
		"kernel/bad/older.ko":                     elfObject("vermagic=5.10.0 SMP\x00", ".modinfo"),
		"modules.builtin":                         []byte("kernel/fs/ext4/ext4.ko\nkernel/drivers/char/tpm/tpm_crb.ko\n"),
		"modules.builtin.modinfo":                 []byte("sha256_generic.license=GPL\x00sha256_generic.alias=sha256\x00"),
		"modules.order":                           []byte("kernel/fs/btrfs.ko\n"),
	}
	for p, b := range extra {
		files[p] = b
	}
	root := tree.NewDir(0o755)
	for p, b := range files {
		if err := root.Put("/lib/modules/"+version+"/"+p, &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(b)}); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// show writes modules as "a b c?", with a question mark for soft ones.
func show(mods []Module) string {
	var names []string
	for _, m := range mods {
		name := m.Name
		if m.Soft {
			name += "?"
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

func TestResolve(t *testing.T) {
	for _, row := range []struct {
		names, optional, want string
	}{
		{"", "", ""},
		{"virtio_blk", "", "virtio virtio_ring virtio_blk"},
		{"virtio-blk virtio_blk", "virtio", "virtio virtio_ring virtio_blk"},
		{"virtio", "nothing-like-it virtio-ring", "virtio virtio_ring"},
		{"ext4 tpm-crb", "sha256_generic", ""}, // built in
		{"dm_crypt", "", "dm_mod dm_crypt virtio? afterwards?"},
		{"dm_crypt virtio", "", "dm_mod dm_crypt virtio afterwards?"}, // soft at first, then asked for
		{"btrfs", "", "sum_lib? sum_generic? sum_ssse3? ecb? btrfs"},
		{"ecb", "", "sum_lib? sum_generic? sum_ssse3? btrfs? ecb"},
	} {
		v, mods, err := Resolve(kernel(t, nil), strings.Fields(row.names), strings.Fields(row.optional))
		if err != nil || v != version || show(mods) != row.want {
			t.Errorf("%q and %q: got %q of %s, %v, want %q", row.names, row.optional, show(mods), v, err, row.want)
		}
	}
}

func TestHas(t *testing.T) {
	for name, want := range map[string]bool{"ext4": true, "dm-crypt": true, "sha256_generic": true, "nothing_like_it": false} {
		if got, err := Has(kernel(t, nil), name); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if _, err := Has(tree.NewDir(0o755), "ext4"); err == nil {
		t.Error("no kernel has it")
	}
}

func TestContents(t *testing.T) {
	_, mods, err := Resolve(kernel(t, nil), []string{"virtio_ring", "dm_crypt"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"virtio_ring": "kernel/drivers/virtio/virtio_ring.ko",
		"dm_mod":      "kernel/drivers/md/dm-mod.ko",
		"dm_crypt":    "kernel/drivers/md/dm-crypt.ko",
	}
	for _, m := range mods {
		b, err := readAll(m.Content, maxModuleBytes)
		if err != nil || int64(len(b)) != m.Content.Size() || !bytes.HasPrefix(b, []byte("\x7fELF")) || !bytes.HasSuffix(b, []byte("appended~\n")) {
			t.Errorf("%s: %d bytes, said %d: %v", m.Name, len(b), m.Content.Size(), err)
		}
		if p := want[m.Name]; p != "" && m.Path != "/lib/modules/"+version+"/"+p {
			t.Errorf("%s is to lie at %s", m.Name, m.Path)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, row := range []struct{ name, want string }{
		{"virtio_blkk", "did you mean virtio_blk"},
		{"vritio_ring", "did you mean virtio_ring"},
		{"crypt", "did you mean dm_crypt?"},
		{"ext3", "did you mean ext4?"},
		{"quite_another", `has no module "quite_another"`},
		{"loop-a", "circle: loop_a → loop_b → loop_a"},
		{"orphan", "orphan → no_such: the kernel package does not hold it"},
		{"twice", "exists twice: /kernel/bad/again/twice.ko and /kernel/bad/twice.ko"},
		{"older", `built for kernel "5.10.0", not for 6.1.0-1-test`},
		{"text", "bad magic"},
		{"no-info", "no .modinfo"},
		{"cut", "cut off"},
		{"empty", "empty"},
		{"badxz", "unpack"},
		{"badzst", "unpack"},
		{"badgz", "unpack"},
	} {
		root := kernel(t, map[string][]byte{
			"kernel/x/text.ko": []byte("not an ELF file at all"), "kernel/x/no-info.ko": elfObject("a=b\x00", ".other"),
			"kernel/x/cut.ko": elfObject("a=b", ".modinfo"), "kernel/x/badxz.ko.xz": xzip(ko())[:40],
			"kernel/x/badzst.ko.zst": []byte("zstandard"), "kernel/x/badgz.ko.gz": gz(ko())[:40],
		})
		if err := root.Put("/lib/modules/"+version+"/kernel/x/empty.ko", &tree.Node{Mode: tree.TypeRegular}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Resolve(root, []string{row.name}, nil); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: got %v, want an error with %q", row.name, err, row.want)
		}
	}
	_, _, err := Resolve(kernel(t, nil), []string{"aaaaa", "virtio", "zzzzz"}, nil)
	if err == nil || !strings.Contains(err.Error(), "aaaaa") || !strings.Contains(err.Error(), "zzzzz") {
		t.Errorf("two unknown names: got %v, want both named", err)
	}
}

func TestVersions(t *testing.T) {
	root := kernel(t, nil)
	if _, err := root.MkdirAll("/usr/lib/modules/6.2.0", 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Resolve(root, nil, nil); err == nil || !strings.Contains(err.Error(), "found 2 kernels") {
		t.Errorf("two kernels: %v", err)
	}
	if _, _, err := Resolve(tree.NewDir(0o755), nil, nil); err == nil || !strings.Contains(err.Error(), "found 0 kernels") {
		t.Errorf("no kernel: %v", err)
	}
	merged := tree.NewDir(0o755)
	merged.Set("lib", &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: "usr/lib"})
	if err := merged.Put("/usr/lib", kernel(t, nil).Child("lib")); err != nil {
		t.Fatal(err)
	}
	_, mods, err := Resolve(merged, []string{"virtio"}, nil)
	if err != nil || len(mods) != 1 || mods[0].Path != "/usr/lib/modules/"+version+"/kernel/drivers/virtio/virtio.ko" {
		t.Errorf("merged /usr: %+v, %v", mods, err)
	}
}

func TestUpdatesOverride(t *testing.T) {
	root := kernel(t, map[string][]byte{"updates/dkms/virtio.ko": ko("depends=sum_lib")})
	_, mods, err := Resolve(root, []string{"virtio"}, nil)
	if err != nil || show(mods) != "sum_lib virtio" || !strings.HasSuffix(mods[1].Path, "/updates/dkms/virtio.ko") {
		t.Errorf("got %q, %v", show(mods), err)
	}
}

// TestDebianKernel resolves in the package that HOLDFAST_KERNEL_DEB names, with
// modinfo as the judge.
func TestDebianKernel(t *testing.T) {
	deb := os.Getenv("HOLDFAST_KERNEL_DEB")
	if deb == "" {
		t.Fatal("HOLDFAST_KERNEL_DEB is not set: name the file that make inputs leaves as build/inputs/linux-image.deb")
	}
	for _, tool := range []string{"dpkg-deb", "modinfo"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s not installed: apt-get install dpkg kmod", tool)
		}
	}
	dir := t.TempDir()
	if out, err := exec.Command("dpkg-deb", "-x", deb, dir).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v\n%s", err, out)
	}
	root := diskTree(t, dir)
	start := time.Now()
	v, mods, err := Resolve(root, []string{"virtio_blk", "virtio_pci", "dm-verity", "dm_crypt", "erofs", "xts", "aesni_intel", "vfat", "overlay", "btrfs", "ext4", "tpm_crb"},
		[]string{"i6300esb", "e1000e"})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s, in %v", v, show(mods), time.Since(start).Round(time.Millisecond))
	loaded := map[string]bool{}
	for _, m := range mods {
		out, err := exec.Command("modinfo", "-F", "depends", filepath.Join(dir, m.Path)).Output()
		if err != nil {
			t.Fatalf("modinfo %s: %v", m.Path, err)
		}
		for dep := range strings.SplitSeq(strings.TrimSpace(string(out)), ",") {
			if dep != "" && !loaded[normal(dep)] {
				t.Errorf("%s comes before %s, which modinfo says it needs", m.Name, dep)
			}
		}
		loaded[m.Name] = true
	}
	for _, name := range []string{"virtio_ring", "dm_bufio", "dm_verity", "libcrc32c", "ecb", "blake2b_generic"} {
		if !loaded[name] {
			t.Errorf("%s is missing", name)
		}
	}
	if loaded["ext4"] || loaded["tpm_crb"] {
		t.Error("what is built in is listed")
	}
}

// disk is a file of the unpacked package.
type disk struct {
	path string
	size int64
}

func (d disk) Size() int64                  { return d.size }
func (d disk) Open() (io.ReadCloser, error) { return os.Open(d.path) }

func diskTree(t *testing.T, dir string) *tree.Node {
	t.Helper()
	root := tree.NewDir(0o755)
	err := filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
		if err != nil || !fi.Mode().IsRegular() {
			return err
		}
		return root.Put(strings.TrimPrefix(p, dir), &tree.Node{Mode: tree.TypeRegular | 0o644, Content: disk{p, fi.Size()}})
	})
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// FuzzModinfo: what is parsed and joined again is the same but for extra NULs,
// and parses the same.
func FuzzModinfo(f *testing.F) {
	f.Add([]byte("license=GPL\x00depends=a,b-c\x00\x00softdep=pre: x post: y\x00"))
	f.Add([]byte("alias=\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := parseModinfo(b)
		if err != nil {
			return
		}
		var again []byte
		for _, e := range entries {
			again = append(again, e.key+"="+e.value+"\x00"...)
		}
		if !bytes.Equal(again, squeeze(b)) {
			t.Fatalf("%q came back as %q", b, again)
		}
		second, err := parseModinfo(again)
		if err != nil || !slices.Equal(second, entries) {
			t.Fatalf("%q: %v and then %v, %v", b, entries, second, err)
		}
		m := newModinfo(entries)
		for _, name := range slices.Concat(m.depends, m.pre, m.post) {
			if name == "" || strings.ContainsAny(name, "-\x00") {
				t.Fatalf("%q names a module %q", b, name)
			}
		}
	})
}

func squeeze(b []byte) []byte {
	for bytes.Contains(b, []byte{0, 0}) {
		b = bytes.ReplaceAll(b, []byte{0, 0}, []byte{0})
	}
	return bytes.TrimPrefix(b, []byte{0})
}

// FuzzELF: whatever .modinfo is found in a file lies in that file.
func FuzzELF(f *testing.F) {
	f.Add(ko("depends=a"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := readModinfo(bytes.NewReader(b))
		if err == nil && !bytes.Contains(b, []byte(m.vermagic)) {
			t.Fatalf("vermagic %q is not in the file", m.vermagic)
		}
	})
}

func ExampleResolve() {
	root := tree.NewDir(0o755)
	for name, depends := range map[string]string{"virtio": "", "virtio_blk": "virtio"} {
		module := elfObject("depends="+depends+"\x00vermagic=6.1.0 SMP\x00", ".modinfo")
		err := root.Put("/lib/modules/6.1.0/kernel/"+name+".ko", &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(module)})
		if err != nil {
			fmt.Println(err)
			return
		}
	}
	version, modules, err := Resolve(root, []string{"virtio-blk"}, []string{"i6300esb"})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, m := range modules {
		fmt.Println(version, m.Path)
	}
	_, _, err = Resolve(root, []string{"virtio-blc"}, nil)
	fmt.Println(err)
	// Output:
	// 6.1.0 /lib/modules/6.1.0/kernel/virtio.ko
	// 6.1.0 /lib/modules/6.1.0/kernel/virtio_blk.ko
	// kernel 6.1.0 has no module "virtio-blc"; did you mean virtio_blk, virtio?
}
