package tree_test

import (
	"io"
	"reflect"
	"testing"

	"github.com/holdfast-os/holdfast/image/tree"
)

func file(text string) *tree.Node {
	return &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(text)}
}

func put(t *testing.T, root *tree.Node, path string, n *tree.Node) {
	t.Helper()
	if err := root.Put(path, n); err != nil {
		t.Fatal(err)
	}
}

func text(t *testing.T, n *tree.Node) string {
	t.Helper()
	if n == nil {
		return "(absent)"
	}
	r, err := n.Content.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestMergeKeepsFoldersAndReplacesTheRest(t *testing.T) {
	lower, upper := tree.NewDir(0o755), tree.NewDir(0o755)
	put(t, lower, "/etc/keep", file("lower"))
	put(t, lower, "/etc/both", file("lower"))
	put(t, lower, "/dir/child", file("lower"))
	put(t, upper, "/etc/both", file("upper"))
	put(t, upper, "/dir", file("now a file"))
	upper.Lookup("/etc").Mode = tree.TypeDir | 0o700
	lower.Merge(upper)

	got := map[string]string{}
	for _, p := range []string{"/etc/keep", "/etc/both", "/dir"} {
		got[p] = text(t, lower.Lookup(p))
	}
	want := map[string]string{"/etc/keep": "lower", "/etc/both": "upper", "/dir": "now a file"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("merged tree has %v, want %v", got, want)
	}
	if mode := lower.Lookup("/etc").Mode; mode != tree.TypeDir|0o700 {
		t.Errorf("/etc has mode %o, want the upper folder's", mode)
	}
}

func TestPathsStayInside(t *testing.T) {
	root := tree.NewDir(0o755)
	put(t, root, "../../etc/./passwd", file("x"))
	if root.Lookup("/etc/passwd") == nil {
		t.Error("../../etc/./passwd did not land at /etc/passwd")
	}
	if err := root.Put("/etc/passwd/below", file("x")); err == nil {
		t.Error("a file was put below a file")
	}
	var seen []string
	root.Walk(func(p string, n *tree.Node) error {
		seen = append(seen, p)
		return nil
	})
	if want := []string{"/", "/etc", "/etc/passwd"}; !reflect.DeepEqual(seen, want) {
		t.Errorf("walk saw %v, want %v", seen, want)
	}
}
