package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// run calls the program in this process.
func run(t *testing.T, args ...string) (code int, out, problems string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code = mainWith(context.Background(), &cli{strings.NewReader(""), &stdout, &stderr}, args)
	return code, stdout.String(), stderr.String()
}

// TestInspectSealedVolume explains a volume as the agent makes one, sealed by a TPM.
func TestInspectSealedVolume(t *testing.T) {
	dir := t.TempDir()
	k, err := keys.Create(filepath.Join(dir, "keys"), keys.Config{Organization: "Test", Now: time.Unix(1767225600, 0)})
	if err != nil {
		t.Fatal(err)
	}
	tpm := sealtest.Start(t)
	for i := range 8 {
		tpm.Extend(i, "measured by firmware")
	}
	now, err := seal.ReadPCRs(tpm, []int{0, 7})
	if err != nil {
		t.Fatal(err)
	}
	srk, err := seal.EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	defer srk.Close(tpm)
	policy := seal.Standard(k.PolicyPublicPEM, map[int][32]byte{7: now[7]})
	sealed, err := seal.Seal(tpm, srk, bytes.Repeat([]byte{7}, seal.SecretBytes), policy, nil)
	if err != nil {
		t.Fatal(err)
	}
	record := seal.Record{Policy: seal.PolicyStandard, PCRs: now, SRKName: srk.Name, Release: "1.2.3"}

	exact := "7: Secure Boot keys and state: exactly " + fmt.Sprintf("%x", now[7])
	for _, c := range []struct {
		name     string
		record   func(seal.Record) seal.Record
		wantText []string
	}{
		{"record of this seal", func(r seal.Record) seal.Record { return r },
			[]string{"the recovery key", "the TPM", "any value signed by the vendor", exact, "policy standard, release 1.2.3", "was " + fmt.Sprintf("%x", now[0])}},
		{"record of another seal", func(r seal.Record) seal.Record { r.PCRs = map[int][32]byte{7: {1}}; return r },
			[]string{"7: Secure Boot keys and state: one value, of which only the policy's hash is kept", "nobody can tell whether that is all"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "volume")
			writeSealedVolume(t, path, sealed, c.record(record))
			code, text, problems := run(t, "inspect", path)
			if code != 0 || problems != "" {
				t.Fatalf("exit %d, %s", code, problems)
			}
			for _, want := range c.wantText {
				if !strings.Contains(text, want) {
					t.Errorf("not in the text: %q\n%s", want, text)
				}
			}
			if strings.Contains(text, strings.Repeat("0", 64)) {
				t.Errorf("a register is said to be zero, which nobody knows:\n%s", text)
			}
		})
	}
}

// TestInspectLyingToken: what a token leaves out, its object is bound to all the same, and
// that is said (F5, F55).
func TestInspectLyingToken(t *testing.T) {
	k, err := keys.Create(filepath.Join(t.TempDir(), "keys"), keys.Config{Organization: "Test", Now: time.Unix(1767225600, 0)})
	if err != nil {
		t.Fatal(err)
	}
	tpm := sealtest.Start(t)
	for i := range 8 {
		tpm.Extend(i, "measured by firmware")
	}
	now, err := seal.ReadPCRs(tpm, []int{7})
	if err != nil {
		t.Fatal(err)
	}
	srk, err := seal.EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	defer srk.Close(tpm)
	sealed, err := seal.Seal(tpm, srk, bytes.Repeat([]byte{7}, seal.SecretBytes), seal.Standard(k.PolicyPublicPEM, now), nil)
	if err != nil {
		t.Fatal(err)
	}
	sealed.PCRs = nil
	path := filepath.Join(t.TempDir(), "volume")
	writeSealedVolume(t, path, sealed, seal.Record{Policy: seal.PolicyStandard, PCRs: now, SRKName: srk.Name, Release: "1.2.3"})
	if code, text, _ := run(t, "inspect", path); code != 0 || !strings.Contains(text, "NOT TRUE: the sealed object is bound to something else than its token says") {
		t.Errorf("exit %d\n%s", code, text)
	}
}

func writeSealedVolume(t *testing.T, path string, sealed seal.Token, record seal.Record) {
	t.Helper()
	v, err := newVolume()
	if err != nil {
		t.Fatal(err)
	}
	slot, err := v.AddKeyslot(v.key, []byte("sealed"), cheapKDF(), nil)
	if err != nil {
		t.Fatal(err)
	}
	sealed.Keyslots = []string{strconv.Itoa(slot)}
	for _, marshal := range []func() ([]byte, error){sealed.Marshal, record.Marshal} {
		raw, err := marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.SetToken(luks2.NextToken, raw); err != nil {
			t.Fatal(err)
		}
	}
	f, err := partition.CreateFile(path, volumeBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := v.writeTo(f); err != nil {
		t.Fatal(err)
	}
}

// TestSheetObeysNobody puts what a terminal would act on into every place.
func TestSheetObeysNobody(t *testing.T) {
	hostile := "a\x1b[2J\tb\nc\u202ed\x9b"
	s := &sheet{}
	s.line(hostile)
	s.fact(hostile, hostile, "", hostile, "")
	s.facts("empty", "", "")
	var out bytes.Buffer
	if err := s.writeTo(&out); err != nil {
		t.Fatal(err)
	}
	want := "a?[2J?b?c?d\ufffd\n  a?[2J?b?c?d\ufffd  a?[2J?b?c?d\ufffd    a?[2J?b?c?d\ufffd\n"
	if out.String() != want {
		t.Errorf("got  %q\nwant %q", out.String(), want)
	}
}

// FuzzInspect gives strangers' bytes to inspect. What it makes of them must come
// out as JSON that reads back equal and as text that no terminal obeys.
func FuzzInspect(f *testing.F) {
	for _, k := range kinds() {
		seed := make([]byte, 20<<10)
		at := k.offset
		if at < 0 {
			at += int64(len(seed))
		}
		copy(seed[at:], k.magic)
		f.Add(seed)
	}
	for _, name := range []string{"linuxx64.efi.stub", "systemd-bootx64.efi"} {
		program, err := os.ReadFile(filepath.Join(efiFolder, name))
		if err != nil {
			f.Fatalf("%v: apt-get install systemd-boot-efi", err)
		}
		f.Add(program)
	}
	var image bytes.Buffer
	if _, err := writeTestRoot(&image, testRelease{product: "ledger", version: "1.2.3"}); err != nil {
		f.Fatal(err)
	}
	f.Add(image.Bytes())
	f.Fuzz(func(t *testing.T, content []byte) {
		dev := partition.NewMemory(int64(len(content)))
		if _, err := dev.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		a, err := inspectFile(source{dev, t.Context()})
		if err != nil {
			return
		}
		var text, first, second bytes.Buffer
		c := &cli{nil, &text, nil}
		if err := show(c, a, false); err != nil {
			t.Fatal(err)
		}
		for _, r := range text.String() {
			if !unicode.IsPrint(r) && r != '\n' {
				t.Fatalf("%q on the terminal", r)
			}
		}
		if err := json.NewEncoder(&first).Encode(a); err != nil {
			t.Fatal(err)
		}
		var back any
		if err := json.Unmarshal(first.Bytes(), &back); err != nil {
			t.Fatal(err)
		}
		if err := json.NewEncoder(&second).Encode(back); err != nil {
			t.Fatal(err)
		}
		var again any
		if err := json.Unmarshal(second.Bytes(), &again); err != nil || !reflect.DeepEqual(back, again) {
			t.Fatalf("JSON does not read back equal: %v", err)
		}
	})
}
