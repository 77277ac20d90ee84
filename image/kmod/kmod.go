// Package kmod finds the kernel modules that an initrd needs. Given the names
// an appliance asks for and the files of a kernel package, [Resolve] returns
// those modules and everything they depend on, in the order to load them.
//
// Debian's kernel packages carry no modules.dep (depmod runs on the installed
// system), so the dependencies come from the modules themselves: the .modinfo
// section of each ELF file, as modinfo(8) reads it. Modules compressed with
// xz, zstd or gzip are handed out uncompressed, so that the device can give
// them to finit_module(2) as they are.
//
// The subset: depends, softdep, alias, name and vermagic. Aliases are followed
// only where a softdep names one; module options, weak dependencies and
// modprobe.d files are not read.
//
// A kernel package is trusted like the kernel in it. The limits here are
// against damaged files, and module signatures are left for the kernel to check.
package kmod

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image/tree"
)

// Module is a kernel module to put into the initrd.
type Module struct {
	// Name is as the kernel shows it, with underscores: "virtio_blk".
	Name string
	// Path is absolute and has no suffix of a compression:
	// "/lib/modules/6.1.0-1/kernel/drivers/block/virtio_blk.ko".
	Path string
	// Content is the uncompressed module.
	Content tree.Content
	// Soft says that nothing but a softdep asks for the module: an accelerated
	// cipher, say, that not every CPU can run. When it does not load, the boot
	// has to go on.
	Soft bool
}

// Resolve returns the kernel version under root's lib/modules, and the named
// modules with their dependencies in load order. Dashes and underscores in
// names are the same. What is built into the kernel needs no module and is left
// out. A name in optional that the kernel does not know is passed over; a name
// in names that it does not know is an error that proposes similar ones.
//
// The result depends on the order of names, which is kept as far as the
// dependencies allow, and on nothing else.
func Resolve(root *tree.Node, names, optional []string) (version string, mods []Module, err error) {
	ix, err := newIndex(root)
	if err != nil {
		return "", nil, err
	}
	r := resolver{index: ix, state: map[string]visit{}, hard: map[string]bool{}}
	var wanted []string
	var unknown []error
	for _, name := range names {
		if !ix.known(normal(name)) {
			unknown = append(unknown, ix.unknownError(name))
		}
		wanted = append(wanted, normal(name))
	}
	if len(unknown) > 0 {
		return "", nil, errors.Join(unknown...)
	}
	for _, name := range optional {
		if ix.known(normal(name)) {
			wanted = append(wanted, normal(name))
		}
	}
	for _, name := range wanted {
		if err := r.visit(name, nil); err != nil {
			return "", nil, fmt.Errorf("kernel %s: %w", ix.version, err)
		}
		if err := r.markHard(name); err != nil {
			return "", nil, fmt.Errorf("kernel %s: %w", ix.version, err)
		}
	}
	for _, name := range r.order {
		m := ix.info[name]
		mods = append(mods, Module{Name: name, Path: m.path, Content: m.content, Soft: !r.hard[name]})
	}
	return ix.version, mods, nil
}

// Has says whether the one kernel under root's lib/modules has a module, in a file or
// built in.
func Has(root *tree.Node, name string) (bool, error) {
	ix, err := newIndex(root)
	if err != nil {
		return false, err
	}
	return ix.known(normal(name)), nil
}

// normal is the kernel's form of a module name.
func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }

type visit int

const (
	visitOpen visit = iota + 1
	visitDone
)

type resolver struct {
	*index
	state map[string]visit
	order []string
	hard  map[string]bool // reached from a wanted name by depends alone
}

// visit puts name behind everything it needs. from is the way here, for errors.
func (r *resolver) visit(name string, from []string) error {
	from = append(from, name)
	if r.builtin[name] || r.state[name] == visitDone {
		return nil
	}
	if r.state[name] == visitOpen {
		return fmt.Errorf("modules depend on each other in a circle: %s", strings.Join(from, " → "))
	}
	m, err := r.load(name)
	if err != nil {
		return fmt.Errorf("module %s: %w", strings.Join(from, " → "), err)
	}
	r.state[name] = visitOpen
	if err := r.visitSoft(m.pre, from); err != nil {
		return err
	}
	for _, dep := range m.depends {
		if err := r.visit(dep, from); err != nil {
			return err
		}
	}
	r.state[name] = visitDone
	r.order = append(r.order, name)
	return r.visitSoft(m.post, from)
}

// visitSoft follows a softdep: what does not exist or is already on the way is
// passed over, as modprobe does.
func (r *resolver) visitSoft(deps []string, from []string) error {
	for _, dep := range deps {
		targets, err := r.providers(dep)
		if err != nil {
			return err
		}
		for _, t := range targets {
			if r.state[t] != 0 {
				continue
			}
			if err := r.visit(t, from); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *resolver) markHard(name string) error {
	if r.builtin[name] || r.hard[name] {
		return nil
	}
	m, err := r.load(name)
	if err != nil {
		return err
	}
	r.hard[name] = true
	for _, dep := range m.depends {
		if err := r.markHard(dep); err != nil {
			return err
		}
	}
	return nil
}

// unknownError names the modules that name may have meant.
func (ix *index) unknownError(name string) error {
	near := ix.near(normal(name))
	if len(near) == 0 {
		return fmt.Errorf("kernel %s has no module %q", ix.version, name)
	}
	return fmt.Errorf("kernel %s has no module %q; did you mean %s?", ix.version, name, strings.Join(near, ", "))
}

// near lists up to five known names that resemble name, the nearest first.
func (ix *index) near(name string) []string {
	type scored struct {
		name string
		far  int
	}
	var list []scored
	limit := max(1, len(name)/4)
	for _, known := range ix.names() {
		far := distance(name, known)
		switch {
		case far <= limit:
		case len(name) >= 4 && (strings.Contains(known, name) || len(known) >= 4 && strings.Contains(name, known)):
			far += limit // after the misspellings
		default:
			continue
		}
		list = append(list, scored{known, far})
	}
	slices.SortStableFunc(list, func(a, b scored) int { return a.far - b.far })
	var names []string
	for _, s := range list[:min(len(list), 5)] {
		names = append(names, s.name)
	}
	return names
}

// distance is Levenshtein's: insertions, deletions and changes of one byte.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
