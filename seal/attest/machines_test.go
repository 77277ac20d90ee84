package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// machineLogs are the event logs of real machines in go-eventlog's test data, which has
// go-attestation's too.
func machineLogs(t testing.TB) map[string][]byte {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/google/go-eventlog").Output()
	if err != nil {
		t.Fatal(err)
	}
	logs := map[string][]byte{}
	err = filepath.WalkDir(filepath.Join(strings.TrimSpace(string(dir)), "testdata"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) == ".go" {
			return err
		}
		b, err := os.ReadFile(path)
		var dump struct{ Log struct{ Raw []byte } }
		if filepath.Ext(path) == ".json" && json.Unmarshal(b, &dump) == nil {
			b = dump.Log.Raw
		}
		logs[filepath.Base(path)] = b
		return err
	})
	if err != nil || len(logs) < 10 {
		t.Fatalf("%d logs: %v", len(logs), err)
	}
	return logs
}

// ofLog is an answer of a machine that has measured just what the log says. A program
// signs it, so its key is bound to nothing.
func ofLog(t testing.TB, raw []byte, c *Challenge) *Answer {
	t.Helper()
	log, err := pcr.ParseLog(raw)
	if err != nil {
		t.Fatal(err)
	}
	a := &Answer{Statement: &Statement{Type: statementType, Format: 1, Time: today, Product: "p", Release: "1"}, EventLog: raw}
	values := log.Replay()
	for _, p := range Selection() {
		v := values[p]
		a.Registers = append(a.Registers, v[:]...)
	}
	data, sum := c.qualifyingData(a.Statement.marshal()), sha256.Sum256(a.Registers)
	bitmap := make([]byte, 3)
	for _, p := range Selection() {
		bitmap[p/8] |= 1 << (p % 8)
	}
	q := &quote{Signer: make([]byte, nameBytes), ExtraData: data[:], Selections: []selection{{uint16(tpm2.TPMAlgSHA256), bitmap}}, Digest: sum[:]}
	a.Quote = q.marshal()
	forgeWithProgram(t, c, a, true)
	return a
}

// TestMachines: whatever the logs of real machines are like (F18 to F26), none is good,
// and whether Secure Boot is on we say as go-attestation does, or that we do not know.
func TestMachines(t *testing.T) {
	program := filepath.Join(t.TempDir(), "judge")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir, build.Env = "judge", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the judge: %v\n%s", err, out)
	}
	c, err := NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	b := recorded(t, "secure", 0)
	policy := &Policy{Now: today, SoftwareTPM: true, Keys: mustKeys(t, b.Before["PK"], b.Before["KEK"], b.Before["db"], nil), References: []Reference{{Product: "p", Version: "1", Boot: b.Release}}}
	told := map[Result]int{}
	for name, raw := range machineLogs(t) {
		v := Verify(ofLog(t, raw, c), c, policy)
		judge := exec.Command(program, "log")
		judge.Stdin = bytes.NewReader(raw)
		out, err := judge.Output()
		if err != nil {
			t.Fatal(err)
		}
		theirs, ours := strings.TrimSpace(string(out)), v.Of(CheckSecureBoot)
		told[ours.Result]++
		t.Logf("%s: log %s, Secure Boot %s (%s), keys %s; go-attestation: %s", name, v.Of(CheckLog).Result, ours.Result, ours.Text, v.Of(CheckKeys).Result, theirs)
		if v.Good() || v.Of(CheckKeys).Result == Pass || v.Of(CheckKernel).Result == Pass || v.Of(CheckLoader).Result == Pass {
			t.Errorf("%s: %+v", name, v)
		}
		if v.Of(CheckSignature).Result != Pass || v.Of(CheckRegisters).Result != Pass {
			t.Errorf("%s: %+v", name, v)
		}
		if ours.Result == Pass && theirs != "true" || ours.Result == Fail && theirs == "true" {
			t.Errorf("%s: Secure Boot %s, go-attestation says %s", name, ours.Result, theirs)
		}
	}
	if told[Pass] == 0 || told[Fail] == 0 || told[Unknown] == 0 {
		t.Errorf("Secure Boot was found %v; the logs show nothing", told)
	}
}
