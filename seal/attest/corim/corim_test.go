package corim

import (
	"bytes"
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

func releases() []attest.Reference {
	r := attest.Reference{Product: "ledger", Version: "1.2.3", Boot: pcr.Release{
		Loader: pcr.Program{Authenticode: pcr.Digest{1}}, UKI: pcr.Program{Authenticode: pcr.Digest{2}}, PCR11: pcr.Digest{3}}}
	other := r
	other.Version = "1.2.4"
	return []attest.Reference{r, other}
}

// TestVeraison: Veraison's library reads the CoRIM, finds each CoMID valid, and in it the
// registers and programs.
func TestVeraison(t *testing.T) {
	b, err := Marshal("ledger", releases())
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "judge")
	build := exec.Command("go", "build", "-o", program, "./corim")
	build.Dir, build.Env = filepath.Join("..", "judge"), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the judge: %v\n%s", err, out)
	}
	run := exec.Command(program)
	run.Stdin = bytes.NewReader(b)
	out, err := run.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	kernel := pcr.Extend(pcr.Extend(pcr.Digest{3}, []byte("enter-initrd")), []byte("leave-initrd"))
	for _, want := range []string{"corim ledger: 2 tags", "ledger 1.2.3: model ledger 1.2.3", "ledger 1.2.4: model ledger 1.2.4",
		`{"11":{"key-type":"uint","value":["sha-256;` + base64.StdEncoding.EncodeToString(kernel[:]) + `"]},"12":{"key-type":"uint","value":["sha-256;AAAAAA`,
		"key 4: sha-256 01" + strings.Repeat("00", 31), "key 4: sha-256 02" + strings.Repeat("00", 31)} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// TestSame: the same releases give the same bytes, and what is lacking is an error.
func TestSame(t *testing.T) {
	a, err := Marshal("ledger", releases())
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if b, err := Marshal("ledger", releases()); err != nil || !bytes.Equal(a, b) {
			t.Fatalf("other bytes: %v", err)
		}
	}
	for _, list := range [][]attest.Reference{nil, {{Product: "ledger", Version: "1"}}} {
		if _, err := Marshal("ledger", list); err == nil {
			t.Errorf("%v: no error", list)
		}
	}
}
