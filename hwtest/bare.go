package hwtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-os/holdfast/hwtest/guest"
	"github.com/holdfast-os/holdfast/image/initrd"
	"github.com/holdfast-os/holdfast/image/kmod"
	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/tree"
)

// BareSystem is a system in an initrd, for [Options.Bare]: programs of others, and a
// program of ours that runs them with a kernel of which a host may have less.
type BareSystem struct {
	// Kernel is a Debian kernel package.
	Kernel string
	// Root is a folder whose files the system has; "" is none.
	Root string
	// Init is the first process, a static program that calls [guest.Start].
	Init string
	// Files are further ones, by their paths.
	Files map[string][]byte
	// Modules are loaded before it, with what they depend on.
	Modules []string
	// Cmdline is added to that of the console.
	Cmdline string
}

// Make writes kernel and initrd to the folder.
func (s BareSystem) Make(dir string) (_ *Bare, err error) {
	var open []io.Closer
	defer func() {
		for _, c := range open {
			err = errors.Join(err, c.Close())
		}
	}()
	files := func(ref string) (*tree.Node, error) {
		r, err := oci.ParseRef(ref)
		if err != nil {
			return nil, err
		}
		im, err := oci.Open(context.Background(), r, oci.Options{})
		if err != nil {
			return nil, err
		}
		open = append(open, im)
		return im.Tree(oci.TreeOptions{})
	}
	kernel, err := files("deb:" + s.Kernel)
	if err != nil {
		return nil, err
	}
	root := tree.NewDir(0o755)
	if s.Root != "" {
		if root, err = files("dir:" + s.Root); err != nil {
			return nil, err
		}
	}
	if err := s.complete(root, kernel); err != nil {
		return nil, fmt.Errorf("system of %s: %w", s.Init, err)
	}
	b := &Bare{Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd"), Cmdline: "console=ttyS0 quiet loglevel=4 panic=-1 " + s.Cmdline}
	if err := writeKernel(b.Kernel, kernel); err != nil {
		return nil, err
	}
	out, err := os.Create(b.Initrd)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	return b, initrd.Write(out, root, initrd.Options{Compress: true})
}

// complete puts into the root what a system needs besides its files.
func (s BareSystem) complete(root, kernel *tree.Node) error {
	_, modules, err := kmod.Resolve(kernel, s.Modules, nil)
	if err != nil {
		return err
	}
	info, err := os.Stat(s.Init)
	if err != nil {
		return err
	}
	put := func(path string, mode uint32, c tree.Content) error {
		if _, err := root.MkdirAll(filepath.Dir(path), 0); err != nil {
			return err
		}
		return root.Put(path, &tree.Node{Mode: 0o100000 | mode, Content: c})
	}
	var list []string
	for _, m := range modules {
		path := "/kernel/" + m.Name + ".ko" // /lib of a system may be a link
		list = append(list, path)
		if err := put(path, 0o644, m.Content); err != nil {
			return err
		}
	}
	for path, content := range s.Files {
		if err := put(path, 0o644, tree.Bytes(content)); err != nil {
			return err
		}
	}
	if err := put(guest.ModulesPath, 0o644, tree.Bytes(strings.Join(list, "\n"))); err != nil {
		return err
	}
	if err := put("/init", 0o755, tree.File{Path: s.Init, SizeBytes: info.Size()}); err != nil {
		return err
	}
	if _, err := root.MkdirAll("/dev", 0); err != nil {
		return err
	}
	return root.Put("/dev/console", &tree.Node{Mode: 0o020600, Major: 5, Minor: 1})
}

// writeKernel copies the package's only vmlinuz.
func writeKernel(path string, files *tree.Node) (err error) {
	boot := files.Lookup("/boot")
	if boot == nil {
		return errors.New("the kernel package has no /boot")
	}
	for _, name := range boot.Names() {
		if !strings.HasPrefix(name, "vmlinuz-") {
			continue
		}
		in, err := boot.Lookup("/" + name).Content.Open()
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.Create(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, in)
		return errors.Join(err, out.Close())
	}
	return errors.New("the kernel package has no /boot/vmlinuz-*")
}
