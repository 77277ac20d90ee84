package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-os/holdfast/seal/attest"
)

func TestAttestUsage(t *testing.T) {
	for _, args := range [][]string{{"attest"}, {"attest", "c.json"}, {"attest", "--challenge", ""}, {"attest", "--challenge", "c", "more"}, {"attest", "--nonce", "c"}} {
		if code := run(args); code != 2 {
			t.Errorf("%q: exit code %d, want 2", args, code)
		}
	}
	path := filepath.Join(t.TempDir(), "c.json")
	if err := os.WriteFile(path, bytes.Repeat([]byte(" "), attest.MaxChallengeBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := readSmall(path, attest.MaxChallengeBytes); err == nil {
		t.Errorf("a challenge of %d bytes is read", len(b))
	}
	if code := run([]string{"attest", "--challenge", path}); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
}
