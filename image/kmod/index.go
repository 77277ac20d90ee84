package kmod

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image/tree"
)

// Limits against damaged packages. Debian's largest module has 8 MiB without
// its debug information, modules.builtin.modinfo 0.5 MiB.
const (
	maxModuleBytes = 128 << 20
	maxListBytes   = 16 << 20
)

// index is what a kernel package offers.
type index struct {
	version  string
	base     string              // "/lib/modules/VERSION"
	files    map[string][]file   // by module name, sorted by path
	builtin  map[string]bool     // by module name
	info     map[string]*module  // those read so far
	aliases  map[string][]string // alias to sorted module names; nil until asked for
	inKernel map[string]bool     // aliases of what is built in
}

type file struct {
	path string // below base
	node *tree.Node
}

// module is a module file and what its .modinfo says.
type module struct {
	path    string
	content tree.Content
	modinfo
}

func newIndex(root *tree.Node) (*index, error) {
	base, version, err := findVersion(root)
	if err != nil {
		return nil, err
	}
	ix := &index{version: version, base: base, files: map[string][]file{}, builtin: map[string]bool{},
		info: map[string]*module{}, inKernel: map[string]bool{}}
	dir := root.Lookup(base)
	err = dir.Walk(func(p string, n *tree.Node) error {
		name, ok := moduleName(path.Base(p))
		if ok && n.Type() == tree.TypeRegular {
			ix.files[name] = append(ix.files[name], file{p, n})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := ix.readBuiltin(dir); err != nil {
		return nil, fmt.Errorf("kernel %s: %w", version, err)
	}
	return ix, nil
}

// findVersion insists on one kernel: with two, whose modules fit the image
// that boots would be a guess.
func findVersion(root *tree.Node) (base, version string, err error) {
	var found []string
	// A symbolic link from /lib to /usr/lib is not followed, so look at both.
	for _, parent := range []string{"/lib/modules", "/usr/lib/modules"} {
		dir := root.Lookup(parent)
		if dir == nil {
			continue
		}
		for _, name := range dir.Names() {
			if dir.Child(name).IsDir() {
				found = append(found, parent+"/"+name)
			}
		}
	}
	if len(found) != 1 {
		return "", "", fmt.Errorf("found %d kernels in /lib/modules and /usr/lib/modules, expected one: %s", len(found), strings.Join(found, ", "))
	}
	return found[0], path.Base(found[0]), nil
}

// moduleName is "virtio_blk" for virtio-blk.ko, virtio_blk.ko.xz and so on.
func moduleName(fileName string) (string, bool) {
	for _, suffix := range []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"} {
		if stem, ok := strings.CutSuffix(fileName, suffix); ok && stem != "" {
			return normal(stem), true
		}
	}
	return "", false
}

// readBuiltin reads modules.builtin (one path a line) and
// modules.builtin.modinfo (NUL-terminated "module.key=value"), where present.
func (ix *index) readBuiltin(dir *tree.Node) error {
	list, err := readList(dir, "modules.builtin")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		if name, ok := moduleName(path.Base(strings.TrimSpace(line))); ok {
			ix.builtin[name] = true
		}
	}
	list, err = readList(dir, "modules.builtin.modinfo")
	if err != nil {
		return err
	}
	for entry := range bytes.SplitSeq(list, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		if name, ok := strings.CutSuffix(key, ".alias"); ok {
			ix.builtin[normal(name)] = true
			ix.inKernel[normal(value)] = true
		}
	}
	return nil
}

func readList(dir *tree.Node, name string) ([]byte, error) {
	n := dir.Child(name)
	if n == nil || n.Content == nil {
		return nil, nil
	}
	b, err := readAll(n.Content, maxListBytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}

func (ix *index) known(name string) bool { return ix.builtin[name] || len(ix.files[name]) > 0 }

// names lists everything known, sorted.
func (ix *index) names() []string {
	var names []string
	for name := range ix.files {
		names = append(names, name)
	}
	for name := range ix.builtin {
		if len(ix.files[name]) == 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// load reads a module's .modinfo.
func (ix *index) load(name string) (*module, error) {
	if m := ix.info[name]; m != nil {
		return m, nil
	}
	f, err := ix.pick(name)
	if err != nil {
		return nil, err
	}
	m, err := ix.read(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.path, err)
	}
	// The first word of vermagic is the kernel release; the kernel refuses
	// a module that was built for another one, and does so only at boot.
	if release, _, _ := strings.Cut(m.vermagic, " "); release != ix.version {
		return nil, fmt.Errorf("%s was built for kernel %q, not for %s", f.path, release, ix.version)
	}
	ix.info[name] = m
	return m, nil
}

// pick chooses among files of one module: "updates" overrides the rest, as with
// depmod; beyond that two files are a mistake in the package.
func (ix *index) pick(name string) (file, error) {
	list := ix.files[name]
	if i := slices.IndexFunc(list, func(f file) bool { return strings.HasPrefix(f.path, "/updates/") }); i >= 0 {
		return list[i], nil
	}
	switch len(list) {
	case 0:
		return file{}, errors.New("the kernel package does not hold it")
	case 1:
		return list[0], nil
	}
	return file{}, fmt.Errorf("it exists twice: %s and %s", list[0].path, list[1].path)
}

func (ix *index) read(f file) (*module, error) {
	if f.node.Content == nil {
		return nil, errors.New("the file is empty")
	}
	content, raw, err := uncompressed(f.path, f.node.Content)
	if err != nil {
		return nil, err
	}
	info, err := readModinfo(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	p := f.path
	if i := strings.LastIndex(p, ".ko."); i >= 0 {
		p = p[:i] + ".ko"
	}
	return &module{path: ix.base + p, content: content, modinfo: info}, nil
}

// providers returns the modules a softdep means: the module of that name, else
// all that carry it as an alias. Patterns in aliases describe devices and are
// of no use here. What is built in provides at once.
func (ix *index) providers(dep string) ([]string, error) {
	if ix.builtin[dep] || ix.inKernel[dep] {
		return nil, nil
	}
	if len(ix.files[dep]) > 0 {
		return []string{dep}, nil
	}
	if ix.aliases == nil {
		if err := ix.readAliases(); err != nil {
			return nil, err
		}
	}
	return ix.aliases[dep], nil
}

func (ix *index) readAliases() error {
	ix.aliases = map[string][]string{}
	for _, name := range ix.names() {
		for _, f := range ix.files[name] {
			m, err := ix.read(f)
			if err != nil {
				return fmt.Errorf("read %s: %w", f.path, err)
			}
			for _, a := range m.alias {
				if !slices.Contains(ix.aliases[a], name) {
					ix.aliases[a] = append(ix.aliases[a], name)
				}
			}
		}
	}
	return nil
}

func readAll(c tree.Content, limit int64) (b []byte, err error) {
	r, err := c.Open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return readLimited(r, limit)
}

func readLimited(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("more than the %d bytes allowed", limit)
	}
	return b, nil
}
