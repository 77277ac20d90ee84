package build

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
)

// kernelImage makes a LinuxKit-style kernel image: /kernel and /kernel.tar with
// the modules, in an OCI layout.
func kernelImage(t *testing.T, dir string, modules map[string][]byte) {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		h := &tar.Header{Name: "lib/modules/6.6.1-linuxkit/" + name, Mode: 0o644, Size: int64(len(modules[name]))}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(modules[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	root := tree.NewDir(0o755)
	for name, content := range map[string]tree.Content{"/kernel": tree.Bytes("MZ a kernel"), "/kernel.tar": tree.Bytes(archive.Bytes())} {
		if err := root.Put(name, &tree.Node{Mode: tree.TypeRegular | 0o644, Content: content}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := oci.WriteLayout(dir, []*tree.Node{root}, oci.Config{}, oci.LayoutOptions{}); err != nil {
		t.Fatal(err)
	}
}

// module is the least ELF file with a .modinfo section.
func module(t *testing.T, info string) []byte {
	t.Helper()
	names := "\x00.modinfo\x00.shstrtab\x00"
	const header, section = 64, 64
	infoAt := uint64(header)
	namesAt := infoAt + uint64(len(info))
	tableAt := (namesAt + uint64(len(names)) + 7) &^ 7
	b := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	put := func(v any) {
		var err error
		if b, err = binary.Append(b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	put(struct {
		Type, Machine                           uint16
		Version                                 uint32
		Entry, Programs, Sections               uint64
		Flags                                   uint32
		Size, PSize, PCount, SSize, SCount, Str uint16
	}{1, 62, 1, 0, 0, tableAt, 0, header, 0, 0, section, 3, 2})
	b = append(append(b, info...), names...)
	b = append(b, make([]byte, tableAt-uint64(len(b)))...)
	for _, s := range []struct {
		name, kind uint32
		at, size   uint64
	}{{0, 0, 0, 0}, {1, 1, infoAt, uint64(len(info))}, {10, 3, namesAt, uint64(len(names))}} {
		put(struct {
			Name, Type                uint32
			Flags, Addr, Offset, Size uint64
			Link, Info                uint32
			Align, EntSize            uint64
		}{s.name, s.kind, 0, 0, s.at, s.size, 0, 0, 1, 0})
	}
	return b
}

// builtin says that everything the agent always needs is in the kernel.
const builtin = "kernel/drivers/md/dm-mod.ko\nkernel/drivers/md/dm-verity.ko\nkernel/drivers/md/dm-crypt.ko\nkernel/fs/erofs/erofs.ko\n" +
	"kernel/fs/ext4/ext4.ko\nkernel/fs/overlayfs/overlay.ko\nkernel/crypto/xts.ko\nkernel/crypto/sha256_generic.ko\n"

func openTestKernel(t *testing.T, dir, extra string) (*kernel, *builder, error) {
	t.Helper()
	text := "name: box\nversion: 1.0.0\nkernel:\n  image: oci:kernel\n" + extra + "onboot:\n  - {name: a, image: 'oci:a'}\n"
	s, err := spec.Parse("box.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	s.ApplyDefaults()
	b := &builder{ctx: context.Background(), spec: s, in: Inputs{Dir: dir, Progress: func(Step) {}}, sources: map[string]*source{}}
	t.Cleanup(b.close)
	k, err := b.openKernel()
	return k, b, err
}

func TestLinuxKitKernelImage(t *testing.T) {
	dir := t.TempDir()
	kernelImage(t, filepath.Join(dir, "kernel"), map[string][]byte{
		"modules.builtin":                   []byte(builtin),
		"kernel/drivers/net/virtio_net.ko":  module(t, "name=virtio_net\x00depends=failover\x00vermagic=6.6.1-linuxkit SMP\x00"),
		"kernel/net/core/failover.ko":       module(t, "name=failover\x00depends=\x00vermagic=6.6.1-linuxkit SMP\x00"),
		"kernel/drivers/net/unasked_for.ko": module(t, "name=unasked_for\x00depends=\x00vermagic=6.6.1-linuxkit SMP\x00"),
	})
	k, b, err := openTestKernel(t, dir, "  modules: [virtio_net]\n")
	if err != nil {
		t.Fatal(err)
	}
	if k.version != "6.6.1-linuxkit" || k.image.Size() != int64(len("MZ a kernel")) {
		t.Errorf("kernel %q of %d bytes", k.version, k.image.Size())
	}
	if want := []string{"failover", "virtio_net"}; !slices.Equal(b.manifest.Modules, want) {
		t.Errorf("modules %v, want %v in this order", b.manifest.Modules, want)
	}
	if k.root.Lookup("/lib/modules/6.6.1-linuxkit/kernel/drivers/net/unasked_for.ko") == nil {
		t.Error("kernel.tar does not go into the root")
	}
}

// TestPstore: the firmware's variables are not for a kernel's last words, whether the
// kernel has efi_pstore built in or as a module (F65).
func TestPstore(t *testing.T) {
	const off = "efi_pstore.pstore_disable=1"
	for name, c := range map[string]struct {
		files  map[string][]byte
		spec   string
		before string // the words that stand before panic=
	}{
		"built in":    {map[string][]byte{"modules.builtin": []byte(builtin + "kernel/drivers/firmware/efi/efi-pstore.ko\n")}, "", off},
		"as a module": {map[string][]byte{"modules.builtin": []byte(builtin), "kernel/drivers/firmware/efi/efi-pstore.ko": module(t, "name=efi_pstore\x00depends=\x00vermagic=6.6.1-linuxkit SMP\x00")}, "console=ttyS0", "console=ttyS0 " + off},
		"not there":   {map[string][]byte{"modules.builtin": []byte(builtin)}, "console=ttyS0", "console=ttyS0"},
		"wanted":      {map[string][]byte{"modules.builtin": []byte(builtin + "kernel/drivers/firmware/efi/efi-pstore.ko\n")}, "efi-pstore.pstore_disable=0", "efi-pstore.pstore_disable=0"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			kernelImage(t, filepath.Join(dir, "kernel"), c.files)
			k, b, err := openTestKernel(t, dir, "  cmdline: \""+c.spec+"\"\n")
			if err != nil {
				t.Fatal(err)
			}
			if line := b.cmdline(k); !strings.HasPrefix(line, strings.TrimLeft(c.before+" panic=", " ")) {
				t.Errorf("command line %q, want %q first", line, c.before)
			}
		})
	}
}

func TestKernelErrorsPointAtTheSpec(t *testing.T) {
	dir := t.TempDir()
	kernelImage(t, filepath.Join(dir, "kernel"), map[string][]byte{"modules.builtin": []byte(builtin)})
	for name, c := range map[string]struct{ extra, want string }{
		"unknown module": {"  modules: [virtio_nat]\n", "kernel.modules"},
		"no such binary": {"  binary: bzImage\n", "holds no /bzImage"},
		"no such tar":    {"  tar: modules.tar\n", "tar: none"},
	} {
		_, _, err := openTestKernel(t, dir, c.extra)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "box.yaml:") {
			t.Errorf("%s: error %v, want one in box.yaml with %q", name, err, c.want)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, "kernel")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openTestKernel(t, dir, ""); err == nil || !strings.Contains(err.Error(), "box.yaml:4:10: kernel.image") {
		t.Errorf("missing image: %v", err)
	}
}
