package luks2

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestRecoveryKey(t *testing.T) {
	k, err := GenerateRecoveryKey(bytes.NewReader([]byte("\x00\x01\x23\x45\x67\x89\xab\xcd\xef\xff" + strings.Repeat("\x10", 22))))
	if err != nil {
		t.Fatal(err)
	}
	const want = "cccbdefg-hijklnrt-uvvvbcbc-bcbcbcbc-bcbcbcbc-bcbcbcbc-bcbcbcbc-bcbcbcbc"
	if k.String() != want {
		t.Fatalf("key is %s, want %s", k, want)
	}
	for name, typed := range map[string]string{
		"as written":  want,
		"upper case":  strings.ToUpper(want),
		"no dashes":   strings.ReplaceAll(want, "-", ""),
		"spaces":      " " + strings.ReplaceAll(want, "-", " ") + "\r\n",
		"long dashes": strings.ReplaceAll(want, "-", " – "),
		"two lines":   want[:35] + "\n" + want[35:],
	} {
		got, err := ParseRecoveryKey([]byte(typed))
		if err != nil || *got != *k {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, tt := range map[string]struct{ typed, want string }{
		"letter":     {strings.Replace(want, "l", "m", 1), `group 2, letter 5: 'm'`},
		"first":      {"x" + want[1:], `group 1, letter 1: 'x'`},
		"digit":      {want[:len(want)-1] + "1", `group 8, letter 8: '1'`},
		"not ASCII":  {want[:9] + "ü" + want[10:], `group 2, letter 1: 'ü'`},
		"kelvin":     {strings.Replace(want, "k", "\u212a", 1), ""}, // lower case of the Kelvin sign is k
		"short":      {want[:len(want)-1], "63 letters, not 64"},
		"long":       {want + "-c", "65 letters, not 64"},
		"empty":      {"", "0 letters"},
		"zero bytes": {"\x00", `group 1, letter 1`},
	} {
		_, err := ParseRecoveryKey([]byte(tt.typed))
		if (err == nil) != (tt.want == "") || (err != nil && !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), want[:8]) {
			t.Errorf("%s: the error holds a part of the key", name)
		}
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("key", "key", k)
	if strings.Contains(log.String(), "cccb") {
		t.Errorf("the key is in the log: %s", &log)
	}
	k.Wipe()
	if *k != (RecoveryKey{}) {
		t.Error("the key is still there after Wipe")
	}
	if _, err := GenerateRecoveryKey(strings.NewReader("short")); err == nil {
		t.Error("a key was made without randomness")
	}
}

func FuzzRecoveryKey(f *testing.F) {
	f.Add("cccbdefg-hijklnrt-uvvvbcbc-bcbcbcbc-bcbcbcbc-bcbcbcbc-bcbcbcbc-bcbcbcbc")
	f.Fuzz(func(t *testing.T, typed string) {
		k, err := ParseRecoveryKey([]byte(typed))
		if err != nil {
			return
		}
		again, err := ParseRecoveryKey([]byte(k.String()))
		if err != nil || *again != *k {
			t.Fatalf("%q: %v", typed, err)
		}
	})
}

func ExampleRecoveryKey() {
	k, err := GenerateRecoveryKey(strings.NewReader("use crypto/rand.Reader in earnest"))
	if err != nil {
		fmt.Println(err)
		return
	}
	typed, err := ParseRecoveryKey([]byte(strings.ToUpper(k.String())))
	fmt.Println(err == nil && *typed == *k, len(k.String()))
	fmt.Println(string(RecoveryToken(2)))
	// Output:
	// true 71
	// {"type":"systemd-recovery","keyslots":["2"]}
}
