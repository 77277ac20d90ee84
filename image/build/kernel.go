package build

import (
	"fmt"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image/kmod"
	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
)

// kernel is what the boot needs of a kernel image or package.
type kernel struct {
	version string // as uname -r prints it
	image   tree.Content
	modules []kmod.Module
	// root is what of the kernel goes into the root file system: LinuxKit's
	// kernel.tar, nil for a package.
	root *tree.Node
	// pstore says that the kernel would keep its panics in the firmware's variables.
	pstore bool
}

// alwaysModules are the kernel features the agent itself uses; those that are
// built in need no module.
var alwaysModules = []string{
	"dm_mod", "dm_verity", "dm_crypt", "erofs", "ext4", "overlay", "xts", "sha256_generic",
}

// integrityModules are what volumes with integrity need besides.
var integrityModules = []string{"dm_integrity", "authenc", "hmac"}

// usefulModules are taken when the kernel has them as modules: the faster
// ciphers, the TPM and firmware interfaces, and the disks, networks and power
// buttons of common hardware and of virtual machines.
var usefulModules = []string{
	"aesni_intel", "sha256_ssse3", "aes_generic", "cbc",
	"tpm_crb", "tpm_tis", "efivarfs", "evdev", "button",
	"virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net", "virtio_rng",
	"nvme", "ahci", "sd_mod", "usb_storage", "uas", "xhci_pci",
	"iTCO_wdt", "i6300esb", "sp5100_tco", "softdog", // the last one only without the others
}

// mediaModules read the file systems of sticks.
var mediaModules = []string{"vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "exfat"}

// openKernel finds kernel and modules: in a Debian package under boot/ and
// lib/modules/, in a LinuxKit kernel image as kernel and kernel.tar.
func (b *builder) openKernel() (*kernel, error) {
	src, err := b.open(b.spec.Kernel.Image, "kernel.image")
	if err != nil {
		return nil, err
	}
	k := &kernel{}
	files := src.root
	if n := find(src.root, b.spec.Kernel.Binary); n != nil {
		k.image = n.Content
		if k.root, err = b.kernelTar(src.root); err != nil {
			return nil, err
		}
		files = k.root
	} else if k.image = debianKernel(src.root); k.image == nil {
		return nil, b.at("kernel.image", fmt.Errorf("%s holds no /%s and no /boot/vmlinuz-*", b.spec.Kernel.Image, b.spec.Kernel.Binary))
	}
	if files == nil {
		files = tree.NewDir(0o755)
	}
	names := append(append([]string{}, alwaysModules...), b.spec.Kernel.Modules...)
	if slices.ContainsFunc(b.spec.Disk.Data, func(d spec.Data) bool { return d.Integrity != "" }) {
		names = append(names, integrityModules...)
	}
	useful := usefulModules
	if b.readsMedia() {
		useful = slices.Concat(useful, mediaModules)
	}
	if k.version, k.modules, err = kmod.Resolve(files, names, useful); err != nil {
		return nil, b.at("kernel.modules", err)
	}
	if k.pstore, err = kmod.Has(files, "efi_pstore"); err != nil {
		return nil, b.at("kernel.image", err)
	}
	b.manifest.Kernel = k.version
	for _, m := range k.modules {
		b.manifest.Modules = append(b.manifest.Modules, m.Name)
	}
	return k, nil
}

// readsMedia says whether the agent looks at media that are plugged in: for updates,
// for the escrow's receipt, or for challenges.
func (b *builder) readsMedia() bool {
	u := b.spec.Update
	if u.Root == "" {
		return b.spec.Evidence.Stick || len(b.spec.Recovery.Holders) > 0
	}
	return b.spec.Evidence.Stick || u.Stick == nil || *u.Stick
}

func find(root *tree.Node, p string) *tree.Node {
	if n := root.Lookup(p); n != nil && n.Type() == tree.TypeRegular && n.Content != nil {
		return n
	}
	return nil
}

// debianKernel is the only vmlinuz in boot/.
func debianKernel(root *tree.Node) tree.Content {
	boot := root.Lookup("/boot")
	if boot == nil {
		return nil
	}
	for _, name := range boot.Names() {
		if strings.HasPrefix(name, "vmlinuz-") {
			if n := find(boot, name); n != nil {
				return n.Content
			}
		}
	}
	return nil
}

// kernelTar reads LinuxKit's tar of modules, which lies in the kernel image.
func (b *builder) kernelTar(root *tree.Node) (*tree.Node, error) {
	name := b.spec.Kernel.Tar
	if name == "" || name == "none" {
		return nil, nil
	}
	n := find(root, name)
	if n == nil {
		return nil, b.at("kernel.tar", fmt.Errorf("%s holds no /%s; write `tar: none` when it has no modules", b.spec.Kernel.Image, name))
	}
	files, err := b.tarTree(n.Content)
	if err != nil {
		return nil, b.at("kernel.tar", fmt.Errorf("/%s of %s: %w", name, b.spec.Kernel.Image, err))
	}
	return files, nil
}

// tarTree indexes a tar that lies inside an image.
func (b *builder) tarTree(c tree.Content) (*tree.Node, error) {
	im, err := oci.OpenTar(b.ctx, c, oci.Options{Cache: b.in.Cache})
	if err != nil {
		return nil, err
	}
	b.opened = append(b.opened, im)
	return im.Tree(oci.TreeOptions{EpochSec: b.epochSec()})
}
