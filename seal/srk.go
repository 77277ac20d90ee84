package seal

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// srkHandle is where the storage root key lives. TCG TPM v2.0 Provisioning
// Guidance §7.8; systemd uses it too.
const srkHandle tpm2.TPMHandle = 0x81000001

// SRK is the storage key that sealed objects hang from.
type SRK struct {
	// Name is the TPM's name of the key, two bytes of algorithm and a digest.
	// It is stored with the sealed object and compared before each use: a
	// handle only says where a key is, and TPM2_ReadPublic is not
	// authenticated (F37).
	Name []byte
	// Persistent says that the key is kept at 0x81000001.
	Persistent bool
	// Note says, when Persistent is false, what else is at that handle.
	Note string

	handle tpm2.TPMHandle
	public tpm2.TPMTPublic
}

// Close flushes a key that is not persistent.
func (s SRK) Close(t TPM) {
	if !s.Persistent {
		flush(patient{t}, s.handle)
	}
}

func (s SRK) tpmName() tpm2.TPM2BName { return tpm2.TPM2BName{Buffer: s.Name} }

// salted starts sessions whose secrets only the holder of this key can know,
// so that a listener on the bus learns nothing (F83).
func (s SRK) salted() tpm2.AuthOption { return tpm2.Salted(s.handle, s.public) }

// auth authorises a use of the key, whose auth value is empty. The session
// encrypts the command's first parameter, and its HMAC shows that the TPM has
// the key's private half.
func (s SRK) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: s.handle, Name: s.tpmName(),
		Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, s.salted(), tpm2.AESEncryption(128, tpm2.EncryptIn))}
}

// srkTemplate is the ECC P-256 storage key: attributes 0x00030472 with noDA,
// AES-128-CFB. Provisioning Guidance §7.5.1, but with an empty unique field as
// systemd has it, so that either makes the same key.
func srkTemplate() tpm2.TPMTPublic {
	t := storageTemplate()
	t.ObjectAttributes.NoDA = true
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return t
}

// guidanceTemplate has the 64 zero bytes of the guidance, with which Windows
// and other tools make the key.
func guidanceTemplate() tpm2.TPMTPublic {
	t := srkTemplate()
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
	})
	return t
}

// legacyTemplate is the primary key of systemd 248 to 253, which its tokens
// without tpm2_srk hang from: no noDA, unique empty.
func legacyTemplate() tpm2.TPMTPublic {
	t := storageTemplate()
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return t
}

func storageTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, Restricted: true, Decrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: tpm2.TPMTSymDefObject{
				Algorithm: tpm2.TPMAlgAES,
				KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(128)),
				Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
	}
}

// isSRK says whether a public area is one that srkTemplate gives: all but the
// point must be the same. fixedTPM and sensitiveDataOrigin say that the TPM
// made the key itself.
func isSRK(public tpm2.TPMTPublic) bool {
	if public.Type != tpm2.TPMAlgECC {
		return false
	}
	want := srkTemplate()
	public.Unique = want.Unique
	return bytes.Equal(tpm2.Marshal(public), tpm2.Marshal(want))
}

// EnsureSRK returns the storage root key at 0x81000001, making it if nothing is
// there. If something else is there (EVE keeps its endorsement key at that
// handle) it is left alone, and the same key is made as a transient object, as it is
// where the TPM's memory is full (F41): it has the same name, costs up to a second per
// boot, and SRK.Note says so.
// Close the result.
func EnsureSRK(t TPM) (SRK, error) {
	t = patient{t}
	srk, err := readKey(t, srkHandle)
	if err == nil && isSRK(srk.public) {
		return srk, nil
	}
	occupied := err == nil
	if err != nil && !errors.Is(err, tpm2.TPMRCHandle) {
		return SRK{}, err
	}
	srk, err = createPrimary(t, srkTemplate())
	if err != nil {
		return SRK{}, err
	}
	if occupied {
		srk.Note = fmt.Sprintf("the key at 0x%08x is not a storage root key; a transient one is used", uint32(srkHandle))
		return srk, nil
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     tpm2.NamedHandle{Handle: srk.handle, Name: srk.tpmName()},
		PersistentHandle: tpm2.TPMIDHPersistent(srkHandle),
	}.Execute(t)
	if errors.Is(err, tpm2.TPMRCNVSpace) {
		srk.Note = fmt.Sprintf("the TPM has no room to keep the storage root key at 0x%08x; a transient one is used", uint32(srkHandle))
		return srk, nil
	}
	defer flush(t, srk.handle)
	if err != nil {
		return SRK{}, fmt.Errorf("make the storage root key persistent at 0x%08x: %w", uint32(srkHandle), err)
	}
	kept, err := readKey(t, srkHandle)
	if err != nil {
		return SRK{}, err
	}
	if !bytes.Equal(kept.Name, srk.Name) {
		return SRK{}, fmt.Errorf("the key at 0x%08x is %x and not %x that was put there", uint32(srkHandle), kept.Name, srk.Name)
	}
	return kept, nil
}

// readKey reads the public area at a persistent handle and computes its name
// here, because the TPM's answer need not be true.
func readKey(t TPM, handle tpm2.TPMHandle) (SRK, error) {
	rsp, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(t)
	if err != nil {
		return SRK{}, fmt.Errorf("read the public area of 0x%08x: %w", uint32(handle), err)
	}
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		return SRK{}, fmt.Errorf("read the public area of 0x%08x: %w", uint32(handle), err)
	}
	name, err := tpm2.ObjectName(public)
	if err != nil {
		return SRK{}, fmt.Errorf("compute the name of 0x%08x: %w", uint32(handle), err)
	}
	return SRK{Name: name.Buffer, Persistent: true, handle: handle, public: *public}, nil
}

func createPrimary(t TPM, template tpm2.TPMTPublic) (SRK, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(t)
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return SRK{}, fmt.Errorf("make the storage key: the TPM's owner hierarchy has a password; clear the TPM in the firmware setup: %w", err)
	}
	if err != nil {
		return SRK{}, fmt.Errorf("make the storage key: %w", err)
	}
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		flush(t, rsp.ObjectHandle)
		return SRK{}, fmt.Errorf("make the storage key: %w", err)
	}
	name, err := tpm2.ObjectName(public)
	if err != nil {
		flush(t, rsp.ObjectHandle)
		return SRK{}, fmt.Errorf("make the storage key: %w", err)
	}
	return SRK{Name: name.Buffer, handle: rsp.ObjectHandle, public: *public}, nil
}

// claimed is the key that the token says is at a persistent handle, without
// asking: that it is, shows when it loads the token's object (the object is
// authenticated under the key) and when a session salted for it works.
func (r *SRKRef) claimed() (SRK, bool) {
	if r == nil || !r.persistent() {
		return SRK{}, false
	}
	public, err := unmarshalPublic(r.Public)
	if err != nil {
		return SRK{}, false
	}
	return SRK{Name: r.Name, Persistent: true, handle: tpm2.TPMHandle(r.Handle), public: *public}, true
}

// parentOf finds the key that a token's object hangs from. Close the result.
func parentOf(t TPM, token Token) (SRK, error) {
	if token.SRK == nil {
		return createPrimary(t, legacyTemplate())
	}
	if token.SRK.persistent() {
		srk, err := readKey(t, tpm2.TPMHandle(token.SRK.Handle))
		if err == nil && bytes.Equal(srk.Name, token.SRK.Name) {
			return srk, nil
		}
		if err != nil && !errors.Is(err, tpm2.TPMRCHandle) {
			return SRK{}, err
		}
	}
	// The handle was evicted or taken by something else. As long as the TPM
	// was not cleared, one of the templates still gives the same key.
	var made []byte
	for _, template := range []tpm2.TPMTPublic{srkTemplate(), guidanceTemplate()} {
		srk, err := createPrimary(t, template)
		if err != nil {
			return SRK{}, err
		}
		if bytes.Equal(srk.Name, token.SRK.Name) {
			return srk, nil
		}
		srk.Close(t)
		made = srk.Name
	}
	return SRK{}, fmt.Errorf("the storage key is %x, the key was sealed under %x: %w", made, token.SRK.Name, ErrWrongTPM)
}
