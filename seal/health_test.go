package seal

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/sealtest"
)

func TestHealthOfTPM(t *testing.T) {
	tpm := sealtest.Start(t)
	if err := SelfTest(tpm); err != nil {
		t.Error(err)
	}
	if err := TryOwner(tpm); err != nil {
		t.Error(err)
	}
	s, err := ReadSpace(tpm)
	if err != nil || s.StorageKey || s.Counter || s.PersistentLeft == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := EnsureSRK(tpm); err != nil {
		t.Fatal(err)
	}
	if _, err := EnsureCounter(tpm, CounterIndex); err != nil {
		t.Fatal(err)
	}
	after, err := ReadSpace(tpm)
	if err != nil || !after.StorageKey || !after.Counter || after.PersistentLeft != s.PersistentLeft-1 || after.NVIndices != s.NVIndices+1 {
		t.Errorf("%+v, %v", after, err)
	}
	_, err = tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("somebody's")},
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if err := TryOwner(tpm); err == nil || !strings.Contains(err.Error(), "has a password") {
		t.Errorf("an owned TPM: %v", err)
	}
	if left := tpm.Handles(); left != 0 {
		t.Errorf("%d handles left", left)
	}
}

// answers is a TPM with made-up answers, by command code.
type answers map[uint32][]byte

func (a answers) Send(command []byte) ([]byte, error) {
	return a[binary.BigEndian.Uint32(command[6:])], nil
}

func TestSelfTestAnswers(t *testing.T) {
	answer := func(rc uint32, parameters ...byte) []byte {
		b := binary.BigEndian.AppendUint16(nil, 0x8001)
		b = binary.BigEndian.AppendUint32(b, uint32(10+len(parameters)))
		return append(binary.BigEndian.AppendUint32(b, rc), parameters...)
	}
	for _, tt := range []struct {
		name         string
		test, result []byte
		want         string
	}{
		{"good", answer(0), answer(0, 0, 2, 0xaa, 0xaa, 0, 0, 0, 0), ""},
		{"still at it", answer(0), answer(0, 0, 0, 0, 0, 0x09, 0x0a), ""},
		{"failure mode", answer(0x101), nil, "TPM self-test"},
		{"failed", answer(0), answer(0, 0, 0, 0, 0, 1, 1), "has failed its self-test"},
		{"no answer", nil, nil, "0 bytes"},
		{"short result", answer(0), answer(0, 0), "1 bytes"},
		{"a buffer beyond the end", answer(0), answer(0, 0xff, 0xff, 0, 0, 0, 0), "6 bytes"},
	} {
		err := SelfTest(answers{0x143: tt.test, 0x17c: tt.result})
		if (tt.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
