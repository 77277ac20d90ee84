package build_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
)

// TestCarriedSignatures builds where the keys are not. Carried to them and back, the files
// give what a build gives that has the keys, and nothing is there before it is whole.
func TestCarriedSignatures(t *testing.T) {
	vault := filepath.Join(t.TempDir(), "vault")
	whole, err := keys.Create(vault, keys.Config{Organization: "Test", Now: time.Unix(1.7e9, 0)})
	if err != nil {
		t.Fatal(err)
	}
	cache := newCache(t)
	text := boxSpec + "seal: {policy: rollback-proof}\nupdate: {root: root.json, epoch: 2}\n"
	root := tufRoot(t)
	make := func(k *keys.Keys) (*workshop, string, error) {
		w := newWorkshop(t, k, cache)
		w.write(t, "root.json", root)
		out := filepath.Join(w.dir, "out")
		_, err := build.Build(context.Background(), parse(t, text), w.in, out)
		return w, out, err
	}
	_, out, err := make(whole)
	if err != nil {
		t.Fatal(err)
	}
	want := sums(t, out)
	for name, c := range map[string]struct {
		carried []string
		rounds  []int // signatures that are wanted in each
	}{
		"db and policy": {[]string{"db", "policy"}, []int{4, 1}}, // plain and two epochs, loader; kernel image
		"db":            {[]string{"db"}, []int{2}},
	} {
		dir := filepath.Join(t.TempDir(), "keys")
		if text, err := exec.Command("cp", "-a", vault, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		var signers []string
		for _, key := range c.carried {
			if err := os.Remove(filepath.Join(dir, key+".key")); err != nil {
				t.Fatal(err)
			}
			signers = append(signers, `"`+key+`": {"carried": "../to-sign"}`)
		}
		if err := os.WriteFile(filepath.Join(dir, "signers.json"), []byte("{"+strings.Join(signers, ", ")+"}"), 0o600); err != nil {
			t.Fatal(err)
		}
		var rounds []int
		for {
			k, err := keys.Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			w, out, err := make(k)
			if err == nil {
				if got := sums(t, out); got != want {
					t.Errorf("%s: the build differs from that with the keys:\n%s\n%s", name, got, want)
				}
				break
			}
			wanted := keys.Wanted(err)
			if len(wanted) == 0 {
				t.Fatalf("%s: %v", name, err)
			}
			rounds = append(rounds, len(wanted))
			if left, _ := filepath.Glob(filepath.Join(w.dir, "*out*")); len(left) > 0 {
				t.Errorf("%s: before all signatures are there, %q is", name, left)
			}
			if left, _ := filepath.Glob(filepath.Join(w.dir, ".holdfast*")); len(left) > 0 {
				t.Errorf("%s: left behind: %q", name, left)
			}
			list, err := keys.Answer(filepath.Join(filepath.Dir(dir), "to-sign"), vault)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range list {
				if !strings.HasSuffix(a.For, " of box 1.0.0 for amd64") {
					t.Errorf("%s: %s is for %q", name, a.AnswerName(), a.For)
				}
			}
		}
		if !slices.Equal(rounds, c.rounds) {
			t.Errorf("%s: wanted %v signatures, round by round; should be %v", name, rounds, c.rounds)
		}
	}
}
