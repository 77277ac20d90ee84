package seal

import (
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/sealtest"
)

func TestRemoveSRK(t *testing.T) {
	tpm := sealtest.Start(t)
	if removed, err := RemoveSRK(tpm, nil); err != nil || removed {
		t.Errorf("nothing there: %v, %v", removed, err)
	}
	srk, err := EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	name := append([]byte{}, srk.Name...)
	name[5] ^= 1
	if removed, err := RemoveSRK(tpm, name); err != nil || removed {
		t.Errorf("another key's name: %v, %v", removed, err)
	}
	if removed, err := RemoveSRK(tpm, srk.Name); err != nil || !removed {
		t.Errorf("our own: %v, %v", removed, err)
	}
	if _, err := readKey(tpm, srkHandle); !errors.Is(err, tpm2.TPMRCHandle) {
		t.Errorf("the key: %v", err)
	}
	// Somebody else's key at the handle stays.
	other, err := createPrimary(tpm, legacyTemplate())
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.EvictControl{
		Auth:         tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: tpm2.NamedHandle{Handle: other.handle, Name: other.tpmName()}, PersistentHandle: tpm2.TPMIDHPersistent(srkHandle),
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	flush(tpm, other.handle)
	if removed, err := RemoveSRK(tpm, nil); err != nil || removed {
		t.Errorf("another's key: %v, %v", removed, err)
	}
	if left := tpm.Handles(); left != 0 {
		t.Errorf("%d handles left", left)
	}
}
