package agent

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/holdfast-os/holdfast"

// mayImport is the law of imports, from DESIGN.md section 2: what may stand below each
// layer, beside itself. Change it in a commit of its own, with the reason.
var mayImport = map[string][]string{
	"partition": {},
	"seal":      {},
	"image":     {"partition", "seal"},
	"update":    {"image", "partition", "seal"},
	"agent":     {"update", "image", "partition", "seal"},
	"hwtest":    {"agent", "update", "image", "partition", "seal"},
	"cmd":       {"hwtest", "agent", "update", "image", "partition", "seal"},
	"examples":  {"cmd", "hwtest", "agent", "update", "image", "partition", "seal"},
}

// notOnTheDevice is what the device binary must not link (I6): builders,
// writers, registry clients, and what only tests use. image/uki is not among them: the
// device reads signed programs by it, to see whether a change of dbx would keep them from
// starting; what it does to write one, the linker leaves out.
var notOnTheDevice = []string{
	module + "/image/build", module + "/image/oci", module + "/image/erofs", module + "/image/initrd",
	module + "/image/keys", module + "/image/spec", module + "/image/runtime", module + "/image/qcow2", module + "/image/deb",
	module + "/update/repo", module + "/update/delta/make",
	module + "/hwtest", module + "/examples", module + "/cmd/holdfast", module + "/seal/sealtest", module + "/partition/powercut",
	"github.com/google/go-containerregistry", "github.com/foxboron/go-uefi", "go.yaml.in/yaml/v3", "testing",
}

// tree is what the packages of the module import.
type tree struct {
	// imports and testImports have the files that name an import, by the
	// package's folder ("agent/dm") and the import's path.
	imports, testImports map[string]map[string][]string
}

// readTree parses the import declarations of every Go file of the module.
// Files for other systems and architectures count too.
func readTree(t *testing.T) tree {
	t.Helper()
	tr := tree{map[string]map[string][]string{}, map[string]map[string][]string{}}
	root := ".."
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := filepath.ToSlash(strings.TrimPrefix(strings.TrimPrefix(file, root), "/"))
		if d.IsDir() {
			_, noModule := os.Stat(filepath.Join(file, "go.mod"))
			if rel != "" && noModule == nil || d.Name() == "testdata" || rel == "build" || rel != "" && strings.ContainsAny(d.Name()[:1], "._") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		into := tr.imports
		if strings.HasSuffix(rel, "_test.go") {
			into = tr.testImports
		}
		pkg := path.Dir(rel)
		if into[pkg] == nil {
			into[pkg] = map[string][]string{}
		}
		for _, spec := range f.Imports {
			p, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			into[pkg][p] = append(into[pkg][p], rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// within says whether an import path is p or below it.
func within(imported, p string) bool {
	return imported == p || strings.HasPrefix(imported, p+"/")
}

// layer is the first element of a package's folder.
func layer(pkg string) string {
	first, _, _ := strings.Cut(pkg, "/")
	return first
}

// allowed judges one import of ours by the law.
func allowed(pkg, imported string, inTest bool) bool {
	to, ours := strings.CutPrefix(imported, module+"/")
	from := layer(pkg)
	if !ours || layer(to) == from {
		return true
	}
	if from == "hwtest" && inTest {
		return true // whole appliances, started by the real commands
	}
	return slices.Contains(mayImport[from], layer(to))
}

func TestLayers(t *testing.T) {
	tr := readTree(t)
	for _, must := range []string{"partition", "partition/fat32", "seal", "seal/luks2", "image", "image/build", "agent", "agent/dm", "cmd/holdfast-agent"} {
		if len(tr.imports[must]) == 0 && must != "image" {
			t.Errorf("package %s was not found; the test looks in the wrong place", must)
		}
	}
	for inTest, imports := range map[bool]map[string]map[string][]string{false: tr.imports, true: tr.testImports} {
		for pkg, imported := range imports {
			if _, ok := mayImport[layer(pkg)]; !ok {
				t.Errorf("package %s belongs to no layer", pkg)
			}
			for p, files := range imported {
				if !allowed(pkg, p, inTest) {
					t.Errorf("%s: package %s must not import %s", files[0], pkg, p)
				}
			}
		}
	}
}

// TestLayersLaw tries the law itself.
func TestLayersLaw(t *testing.T) {
	for _, tt := range []struct {
		pkg, imported string
		inTest, want  bool
	}{
		{"partition", "partition/fat32", false, true},
		{"partition", "seal", false, false},
		{"seal/luks2", "partition", false, false},
		{"seal", "partition", true, false},
		{"image/build", "seal/pcr", false, true},
		{"image/build", "agent", false, false},
		{"image", "hwtest", true, false},
		{"update", "agent", false, false},
		{"agent", "update", false, true},
		{"agent", "cmd/holdfast", false, false},
		{"agent", "hwtest", true, false},
		{"cmd/holdfast", "hwtest", false, true},
		{"cmd/holdfast", "examples/demo", false, false},
		{"hwtest", "cmd/holdfast", false, false},
		{"hwtest", "examples/demo", true, true},
		{"examples/demo", "hwtest", false, true},
	} {
		if got := allowed(tt.pkg, module+"/"+tt.imported, tt.inTest); got != tt.want {
			t.Errorf("%s imports %s (in a test: %v): allowed %v, want %v", tt.pkg, tt.imported, tt.inTest, got, tt.want)
		}
	}
}

// TestDeviceBinary follows the device binary's imports through our packages (I6).
func TestDeviceBinary(t *testing.T) {
	tr := readTree(t)
	const binary = module + "/cmd/holdfast-agent"
	from := map[string]string{binary: ""} // who imported it first
	for todo := []string{binary}; len(todo) > 0; todo = todo[1:] {
		pkg := strings.TrimPrefix(todo[0], module+"/")
		for _, p := range slices.Sorted(maps.Keys(tr.imports[pkg])) {
			if _, seen := from[p]; seen {
				continue
			}
			from[p] = todo[0]
			if within(p, module) {
				todo = append(todo, p)
			}
		}
	}
	for _, must := range []string{"agent", "agent/dm", "partition", "seal/luks2"} {
		if _, ok := from[module+"/"+must]; !ok {
			t.Errorf("the device binary does not link %s; the test follows the wrong thing", must)
		}
	}
	for p := range from {
		for _, no := range notOnTheDevice {
			if within(p, no) && p != binary {
				t.Errorf("the device binary links %s: %s", p, chain(from, p))
			}
		}
	}
}

func chain(from map[string]string, p string) string {
	var names []string
	for ; p != ""; p = from[p] {
		names = append(names, strings.TrimPrefix(p, module+"/"))
	}
	slices.Reverse(names)
	return strings.Join(names, " -> ")
}

// TestModulesAreJustified: every module that our code imports has a sentence in
// go.mod that says why, above its line or on it.
func TestModulesAreJustified(t *testing.T) {
	b, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	why := requirements(string(b))
	if len(why) < 10 {
		t.Fatalf("%d modules in go.mod", len(why))
	}
	tr := readTree(t)
	usedIn := map[string]string{}
	for _, imports := range []map[string]map[string][]string{tr.testImports, tr.imports} {
		for _, imported := range imports {
			for p, files := range imported {
				if m := moduleOf(p, why); m != "" {
					usedIn[m] = files[0]
				}
			}
		}
	}
	if len(usedIn) < 5 {
		t.Fatalf("only %d modules are used: %v", len(usedIn), usedIn)
	}
	var bare []string
	for m, file := range usedIn {
		if len(strings.Fields(why[m])) < 3 {
			bare = append(bare, fmt.Sprintf("  %s (%s)", m, file))
		}
	}
	if len(bare) > 0 {
		slices.Sort(bare)
		t.Errorf("%d of %d modules that we import have no comment in go.mod saying what we would write without them:\n%s",
			len(bare), len(usedIn), strings.Join(bare, "\n"))
	}
}

// moduleOf is the required module with the longest path that holds the package.
func moduleOf(imported string, why map[string]string) (module string) {
	for m := range why {
		if within(imported, m) && len(m) > len(module) {
			module = m
		}
	}
	return module
}

// requirements maps the modules of go.mod to their comments. A comment above a line is
// for that line only; "indirect" is no reason.
func requirements(gomod string) map[string]string {
	why := map[string]string{}
	above, inBlock := "", false
	for line := range strings.Lines(gomod) {
		code, comment, _ := strings.Cut(strings.TrimSpace(line), "//")
		fields := strings.Fields(code)
		switch {
		case len(fields) == 0:
			above += " " + comment
			if comment == "" {
				above = ""
			}
			continue
		case fields[0] == "require" && fields[len(fields)-1] == "(":
			inBlock = true
		case fields[0] == ")":
			inBlock = false
		case fields[0] == "require" || inBlock:
			m := strings.TrimPrefix(code, "require")
			comment = strings.Replace(comment, "indirect", "", 1)
			why[strings.Fields(m)[0]] = strings.TrimLeft(above+" "+comment, "; ")
		}
		above = ""
	}
	return why
}

func TestRequirements(t *testing.T) {
	got := requirements(`module x

require a.example/one v1.0.0 // reads the one format that matters

require (
	// Two is the reference implementation.
	// It would cost us a year.
	b.example/two v2.0.0
	c.example/three v3.0.0 // indirect
	d.example/four v4.0.0 // indirect; a reason of its own

	// A remark about nothing.

	e.example/five v5.0.0
)
`)
	for m, words := range map[string]int{"a.example/one": 6, "b.example/two": 11, "c.example/three": 0, "d.example/four": 5, "e.example/five": 0} {
		if text, ok := got[m]; !ok || len(strings.Fields(text)) != words {
			t.Errorf("%s: %q (%v), want %d words", m, text, ok, words)
		}
	}
	if m := moduleOf("b.example/two/sub", got); m != "b.example/two" || moduleOf("b.example/twofold", got) != "" || moduleOf("fmt", got) != "" {
		t.Errorf("module %q", m)
	}
}
