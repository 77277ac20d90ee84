package seal

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// CounterIndex is where a device keeps its counter unless that index is taken:
// in the owner's part of the TPM's NV memory (TCG Registry of Reserved TPM 2.0
// Handles §2.2), away from the indices that secboot, Windows and systemd use.
const CounterIndex uint32 = 0x01af0001

// The owner's NV indices.
const (
	firstOwnerIndex uint32 = 0x01800000
	lastOwnerIndex  uint32 = 0x01bfffff
	counterBytes           = 8 // of every TPM_NT_COUNTER; Part 2 §13.4
)

// ErrNoCounter means that the TPM has no counter at the index: it was never
// made, it was removed, or the TPM was cleared.
var ErrNoCounter = errors.New("the TPM has no such counter")

// Counter is a bound on one of the TPM's NV counters: a policy with it is met
// while the counter is at most Max. Incrementing the counter beyond Max ends,
// for ever, every key sealed under it: the bytes may be put back on the disk,
// but a counter cannot be put back. One that is removed and made anew starts
// above the highest value that any counter of this TPM ever had
// (Part 3 §31.7, Part 1 §37.2.3), so that does not help either.
//
// Everything else about the counter (type, attributes, empty policy) is fixed
// by this package and hashed into the name that the policy digest holds: an
// ordinary index at the same handle that says what one likes has another name.
type Counter struct {
	Index uint32
	Max   uint64
}

// public is the counter as it is defined, and once it has been incremented
// (written). Anyone may read it and anyone who can talk to the TPM may
// increment it: that destroys access and gives none. noDA: F31. Not orderly:
// the count is in NV memory before the TPM answers.
func (c Counter) public(written bool) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(c.Index),
		NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{
			NT: tpm2.TPMNTCounter, OwnerRead: true, AuthRead: true, OwnerWrite: true, AuthWrite: true,
			NoDA: true, Written: written,
		},
		DataSize: counterBytes,
	}
}

// handle is the counter with the name it has once it was incremented: computed
// here, not asked for.
func (c Counter) handle() (tpm2.NamedHandle, error) {
	public := c.public(true)
	name, err := tpm2.NVName(&public)
	if err != nil {
		return tpm2.NamedHandle{}, fmt.Errorf("name of counter 0x%08x: %w", c.Index, err)
	}
	return tpm2.NamedHandle{Handle: tpm2.TPMHandle(c.Index), Name: *name}, nil
}

// auth is the handle with the counter's own, empty, auth value.
func (c Counter) auth() (tpm2.AuthHandle, error) {
	h, err := c.handle()
	return tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: tpm2.PasswordAuth(nil)}, err
}

func (c Counter) validate() error {
	if c.Index < firstOwnerIndex || c.Index > lastOwnerIndex {
		return fmt.Errorf("counter 0x%08x: the owner's indices are 0x%08x to 0x%08x", c.Index, firstOwnerIndex, lastOwnerIndex)
	}
	return nil
}

// operand is Max as TPM2_PolicyNV compares it.
func (c Counter) operand() []byte { return binary.BigEndian.AppendUint64(nil, c.Max) }

// appendPolicy is the digest of a session that held old, after TPM2_PolicyNV
// "counter <= Max": SHA256(old || TPM_CC_PolicyNV || SHA256(operandB || offset
// || operation) || name). Part 3 §23.9.
func (c Counter) appendPolicy(old pcr.Digest) (pcr.Digest, error) {
	h, err := c.handle()
	if err != nil {
		return pcr.Digest{}, err
	}
	args := binary.BigEndian.AppendUint16(c.operand(), 0)
	args = binary.BigEndian.AppendUint16(args, uint16(tpm2.TPMEOUnsignedLE))
	digest := sha256.Sum256(args)
	b := binary.BigEndian.AppendUint32(old[:], uint32(tpm2.TPMCCPolicyNV))
	b = append(b, digest[:]...)
	return sha256.Sum256(append(b, h.Name.Buffer...)), nil
}

// execute is TPM2_PolicyNV in a session. What the TPM refuses is a
// [PolicyError]: the boot may be the right one, and the key is of the past.
func (c Counter) execute(t TPM, session tpm2.TPMHandle) error {
	auth, err := c.auth()
	if err != nil {
		return err
	}
	_, err = tpm2.PolicyNV{
		AuthHandle:    auth,
		NVIndex:       tpm2.NamedHandle{Handle: auth.Handle, Name: auth.Name},
		PolicySession: session,
		OperandB:      tpm2.TPM2BOperand{Buffer: c.operand()},
		Operation:     tpm2.TPMEOUnsignedLE,
	}.Execute(t)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, tpm2.TPMRCPolicy):
		return &PolicyError{Reason: fmt.Sprintf("the TPM's counter 0x%08x has passed %d: the release in force has a higher security epoch, and an older key was left or put back", c.Index, c.Max)}
	case errors.Is(err, tpm2.TPMRCHandle), errors.Is(err, tpm2.TPMRCNVUninitialized):
		return &PolicyError{Reason: fmt.Sprintf("the TPM's counter 0x%08x is gone: somebody removed it, or the TPM was cleared", c.Index)}
	case errors.Is(err, tpm2.TPMRCNVRange), errors.Is(err, tpm2.TPMRCNVAuthorization), errors.Is(err, tpm2.TPMRCBadAuth), errors.Is(err, tpm2.TPMRCAuthFail), errors.Is(err, tpm2.TPMRCAuthUnavailable):
		return &PolicyError{Reason: fmt.Sprintf("what is at the TPM's index 0x%08x is not the counter that was there (%v)", c.Index, err)}
	}
	return fmt.Errorf("policy over counter 0x%08x: %w", c.Index, err)
}

// EnsureCounter returns the counter at an index of the owner's
// ([CounterIndex]) with its present value as Max, making it if nothing is
// there. Whatever else is there is left alone and an error: choose another
// index and record it. The value is not authenticated by the TPM; see the
// package comment about someone on its bus.
func EnsureCounter(t TPM, index uint32) (Counter, error) {
	t = patient{t}
	c := Counter{Index: index}
	if err := c.validate(); err != nil {
		return Counter{}, err
	}
	written, err := c.find(t)
	if errors.Is(err, ErrNoCounter) {
		err = c.define(t)
	}
	if err != nil {
		return Counter{}, err
	}
	// Before its first increment a counter has no value. A power cut can leave it so.
	if !written {
		if err := c.increment(t); err != nil {
			return Counter{}, err
		}
	}
	c.Max, err = c.read(t)
	return c, err
}

// ReadCounter is the counter's present value. [ErrNoCounter] when there is none.
func ReadCounter(t TPM, index uint32) (uint64, error) {
	t = patient{t}
	c := Counter{Index: index}
	written, err := c.find(t)
	if err == nil && !written {
		err = fmt.Errorf("counter 0x%08x was made and never incremented: %w", index, ErrNoCounter)
	}
	if err != nil {
		return 0, err
	}
	return c.read(t)
}

// IncrementCounter adds one and returns the counter with its new value as Max.
// It cannot be undone. Seal for the new value first: "at most Max+1" is true
// before the increment and after it, so a power cut at any moment leaves a key
// that opens.
func IncrementCounter(t TPM, index uint32) (Counter, error) {
	t = patient{t}
	c := Counter{Index: index}
	if _, err := c.find(t); err != nil {
		return Counter{}, err
	}
	if err := c.increment(t); err != nil {
		return Counter{}, err
	}
	var err error
	c.Max, err = c.read(t)
	return c, err
}

// RemoveCounter frees the index: for ever, every key sealed under the counter
// is lost. Nothing there is no error; something else there is.
func RemoveCounter(t TPM, index uint32) error {
	t = patient{t}
	c := Counter{Index: index}
	written, err := c.find(t)
	if errors.Is(err, ErrNoCounter) {
		return nil
	}
	if err != nil {
		return err
	}
	public := c.public(written)
	name, err := tpm2.NVName(&public)
	if err != nil {
		return fmt.Errorf("name of counter 0x%08x: %w", index, err)
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: *name},
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("remove counter 0x%08x: %w", index, err)
	}
	return nil
}

// find looks whether the index is a counter of ours and was ever incremented.
func (c Counter) find(t TPM) (written bool, err error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(c.Index)}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return false, fmt.Errorf("NV index 0x%08x: %w", c.Index, ErrNoCounter)
	}
	if err != nil {
		return false, fmt.Errorf("read the public area of NV index 0x%08x: %w", c.Index, err)
	}
	for _, written := range []bool{false, true} {
		if string(rsp.NVPublic.Bytes()) == string(tpm2.Marshal(c.public(written))) {
			return written, nil
		}
	}
	return false, fmt.Errorf("NV index 0x%08x is taken by something that is not a counter of this system; choose another index", c.Index)
}

func (c Counter) define(t TPM) error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		PublicInfo: tpm2.New2B(c.public(false)),
	}.Execute(t)
	if errors.Is(err, tpm2.TPMRCNVSpace) {
		return fmt.Errorf("make counter 0x%08x: the TPM's NV memory is full; remove indices that nobody needs: %w", c.Index, err)
	}
	if err != nil {
		return fmt.Errorf("make counter 0x%08x: %w", c.Index, err)
	}
	return nil
}

// increment works on a counter that was never incremented too: a password
// session does not depend on the name.
func (c Counter) increment(t TPM) error {
	auth, err := c.auth()
	if err != nil {
		return err
	}
	if _, err := (tpm2.NVIncrement{AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: auth.Handle, Name: auth.Name}}).Execute(t); err != nil {
		return fmt.Errorf("increment counter 0x%08x: %w", c.Index, err)
	}
	return nil
}

func (c Counter) read(t TPM) (uint64, error) {
	auth, err := c.auth()
	if err != nil {
		return 0, err
	}
	rsp, err := tpm2.NVRead{AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: auth.Handle, Name: auth.Name}, Size: counterBytes}.Execute(t)
	if err != nil {
		return 0, fmt.Errorf("read counter 0x%08x: %w", c.Index, err)
	}
	if len(rsp.Data.Buffer) != counterBytes {
		return 0, fmt.Errorf("read counter 0x%08x: the TPM gave %d bytes, not %d", c.Index, len(rsp.Data.Buffer), counterBytes)
	}
	return binary.BigEndian.Uint64(rsp.Data.Buffer), nil
}
