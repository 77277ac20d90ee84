// Package seal keeps a volume key in a TPM 2.0 so that only a boot the vendor
// approves of gets it back.
//
// Parties. The vendor holds an RSA key and signs, at build time, the values PCR
// 11 will have when an image of his reaches the initrd ([SignPCRPolicy]). The
// device makes a random secret, seals it under its TPM's storage root key with
// a [Policy] ([EnsureSRK], [Seal]) and keeps the result as a LUKS2 token, one
// for each state of the box that may open the disk. Each later boot calls
// [UnsealAny] with those tokens and the signatures its image carried. The
// secret, as text ([Passphrase]), opens a LUKS2 keyslot.
//
// Call first: [OpenDevice], then [Check] and [Fitness.Problems]; a TPM whose
// registers nobody extends "seals" to nothing. Every function takes the TPM as
// an argument, returns data, and has no effect but TPM commands. Commands have
// no time limit: a TPM may think for a minute and must not be interrupted
// (F38). A TPM is used by one caller at a time.
//
// Policies. [Standard] takes every image the vendor signed, on this machine
// with these Secure Boot keys; [Strict] takes one image; [DiskTheftOnly] ignores
// what the firmware measured; each may want a PIN. [RollbackProof] is Standard
// and knows security epochs. The vendor signs the registers of a release of
// epoch N for each of the epochs 1 to N ([SignEpochs]). The device seals for
// one epoch, and for "my TPM's counter is at most C" ([EnsureCounter]). When a
// release of a higher epoch is there to stay, the device seals for its epoch
// and C+1, then increments the counter ([IncrementCounter]), then drops the old
// tokens; a power cut anywhere in between leaves a token that opens. From then
// on an old release lacks the signature, and an old header, put back, lacks the
// counter. The vendor allows a downgrade by signing the old release's registers
// for the new epoch ([SignDowngrade]).
//
// The token is, field for field, that of systemd-cryptenroll ("systemd-tpm2"),
// so a rescue system with systemd 255 or later opens the disk too; fields of
// ours ("holdfast_…") are passed over by it. Where systemd could not satisfy
// the policy the token's type is "holdfast-tpm2", which systemd does not touch.
// Under the other type, systemd 257 tries, and the TPM refuses it.
//
// Subset: SHA-256 bank; RSA-2048 policy keys with RSASSA-PKCS1-v1_5; ECC P-256
// storage key; policies made of PolicyAuthorize over signed PCRs, PolicyNV over
// a counter, PolicyPCR over literal values, and PolicyAuthValue for a PIN, in
// that order. pcrlock (PolicyAuthorizeNV), sharded tokens and RSA storage keys
// that are not persistent are recognised and refused.
//
// Protected: the secret against someone who has the disk, or the whole device
// switched off, and who boots anything but an approved image in the approved
// firmware state; the secret on the bus between CPU and TPM against a listener
// (salted sessions, encrypted parameters: F83); against wearing out the TPM's
// dictionary-attack counter by power cuts (noDA, F31).
//
// NOT protected: the secret after [Unseal] returned it, in the memory of a
// machine that runs; against an old image that the vendor once signed, unless
// the policy is RollbackProof and the epoch has moved on since; against a header
// kept from before the policy became RollbackProof, which no counter ends;
// against somebody who increments the counter, which costs a recovery and gives
// nothing; against someone who can make the CPU run unmeasured code or can reset
// the TPM alone; against someone who both writes to the disk and sits on the
// TPM's bus when the key is sealed (he can lie about the counter as well). With
// Secure Boot off, PCR 11 proves nothing by itself: any system can extend it
// with the public hashes of a signed image (see [Policy.Degraded]). An error means "ask for the recovery key", never
// "give a shell". Wiping is done where this package owns the memory; copies
// inside the TPM library and the kernel cannot be reached.
package seal

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// TPM is a connection to a TPM 2.0: one command, one response.
type TPM = transport.TPM

// SecretBytes is the length of the secret that opens a volume.
const SecretBytes = 32

// Reasons why there is no secret, for callers that branch on them. All end in
// the recovery prompt; the texts differ.
var (
	// ErrNoTPM means that the machine has no TPM the kernel can drive.
	ErrNoTPM = errors.New("no TPM found")
	// ErrTPM12 means that the TPM speaks only version 1.2 (F43).
	ErrTPM12 = errors.New("the TPM is of version 1.2; version 2.0 is needed")
	// ErrBusy means that another process has the TPM's only channel open.
	ErrBusy = errors.New("the TPM is in use by another process")
	// ErrLockout means that the TPM refuses all guesses for a while; see [LockoutError].
	ErrLockout = errors.New("the TPM is in dictionary-attack lockout")
	// ErrWrongTPM means that the key was sealed by another TPM, or by this one
	// before it was cleared.
	ErrWrongTPM = errors.New("the key was sealed by another TPM, or this TPM has been cleared since")
	// ErrPINNeeded means that the token wants a PIN and none was given.
	ErrPINNeeded = errors.New("a PIN is needed")
	// ErrWrongPIN means that the PIN is not the one the key was sealed with.
	ErrWrongPIN = errors.New("wrong PIN")
	// ErrNoSHA256 means that the TPM keeps no SHA-256 registers (F28).
	ErrNoSHA256 = errors.New("the TPM's SHA-256 bank is not enabled; enable it in the firmware setup")
)

// LockoutError is [ErrLockout] with the facts (F35).
type LockoutError struct {
	Counter, Max uint32 // failed tries now, and those allowed
	// WaitSec is the longest time in seconds until the TPM takes one more try,
	// counted while it is powered. 0 means unknown.
	WaitSec uint64
}

func (e *LockoutError) Error() string {
	if e.WaitSec == 0 {
		return fmt.Sprintf("%v (%d of %d tries used)", ErrLockout, e.Counter, e.Max)
	}
	return fmt.Sprintf("%v (%d of %d tries used); leave the machine on for up to %v and try again",
		ErrLockout, e.Counter, e.Max, time.Duration(e.WaitSec)*time.Second)
}

// Is makes errors.Is(err, ErrLockout) hold.
func (e *LockoutError) Is(target error) bool { return target == ErrLockout }

// Passphrase is what a LUKS2 keyslot is made with: the secret in standard
// base64, as systemd-cryptenroll does.
func Passphrase(secret []byte) []byte {
	return base64.StdEncoding.AppendEncode(nil, secret)
}

// Wipe overwrites b with zeros. Call it on a secret when it has been used.
func Wipe(b []byte) { clear(b) }

// The TPM answers with one of these when it wants the command again, unchanged.
// TPM 2.0 Part 2 §6.6.3.
const (
	rcYielded = 0x908
	rcTesting = 0x90a
	rcNVRate  = 0x920
	rcRetry   = 0x922

	firstPause = 2 * time.Millisecond
	lastPause  = time.Second
	maxPauses  = 70 // about one minute in all (F38)
)

// Patient is t with a command sent again for as long as the TPM asks for that, up to
// a minute. The functions of this package do so by themselves.
func Patient(t TPM) TPM { return patient{t} }

// patient sends a command again for as long as the TPM asks for that.
type patient struct{ TPM }

// Send is transport.TPM's method.
func (p patient) Send(command []byte) ([]byte, error) {
	pause := firstPause
	for tries := 0; ; tries++ {
		response, err := p.TPM.Send(command)
		if err != nil || tries == maxPauses || !wantsRetry(response) {
			return response, err
		}
		time.Sleep(pause)
		pause = min(2*pause, lastPause)
	}
}

func wantsRetry(response []byte) bool {
	if len(response) < 10 { // tag, size, code: Part 1 §18.3
		return false
	}
	switch binary.BigEndian.Uint32(response[6:]) {
	case rcYielded, rcTesting, rcNVRate, rcRetry:
		return true
	}
	return false
}

// flush forgets a transient object or session. Its error is not reported: what
// is left behind goes when the device is closed, and a secret that was had
// must not be lost over it.
func flush(t TPM, handle tpm2.TPMHandle) {
	_, _ = tpm2.FlushContext{FlushHandle: handle}.Execute(t)
}
