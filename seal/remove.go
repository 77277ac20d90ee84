package seal

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// RemoveSRK takes the storage root key out of 0x81000001, if it is the one with that
// name; nil is any key of the form that [EnsureSRK] makes. Something else there stays.
//
// It frees the place and protects nothing: the same key is made again from the TPM's
// seed by who asks for it. Only clearing the TPM ends that, which is the firmware's.
func RemoveSRK(t TPM, name []byte) (removed bool, err error) {
	t = patient{t}
	srk, err := readKey(t, srkHandle)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !isSRK(srk.public) || name != nil && !bytes.Equal(name, srk.Name) {
		return false, nil
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     tpm2.NamedHandle{Handle: srkHandle, Name: srk.tpmName()},
		PersistentHandle: tpm2.TPMIDHPersistent(srkHandle),
	}.Execute(t)
	if err != nil {
		return false, fmt.Errorf("remove the storage root key at 0x%08x: %w", uint32(srkHandle), err)
	}
	return true, nil
}
