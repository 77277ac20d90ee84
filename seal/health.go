package seal

import (
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// SelfTest has the TPM test what it has not tested since it was powered (Part 3 §10.2),
// and asks for the result (§10.4). A TPM that has failed answers little else.
func SelfTest(t TPM) error {
	t = patient{t}
	if _, err := bareCommand(t, uint32(tpm2.TPMCCSelfTest), 0); err != nil { // fullTest NO
		return fmt.Errorf("TPM self-test: %w", err)
	}
	answer, err := bareCommand(t, uint32(tpm2.TPMCCGetTestResult))
	if err != nil {
		return fmt.Errorf("TPM test result: %w", err)
	}
	// TPM2B_MAX_BUFFER of the maker's, and a response code.
	if len(answer) < 2 || len(answer) != 2+int(binary.BigEndian.Uint16(answer))+4 {
		return fmt.Errorf("TPM test result: %d bytes that are not a buffer and a code", len(answer))
	}
	switch code := binary.BigEndian.Uint32(answer[len(answer)-4:]); code {
	case 0, rcTesting, rcNeedsTest:
		return nil
	default:
		return fmt.Errorf("the TPM has failed its self-test: %w", tpm2.TPMRC(code))
	}
}

const rcNeedsTest = 0x153 // TPM_RC_NEEDS_TEST: nothing has failed; Part 2 §6.6.3

// bareCommand sends a command without handles and sessions (Part 1 §18), and returns the
// parameters of the answer.
func bareCommand(t TPM, code uint32, parameters ...byte) ([]byte, error) {
	const header = 2 + 4 + 4
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	b = binary.BigEndian.AppendUint32(b, uint32(header+len(parameters)))
	b = binary.BigEndian.AppendUint32(b, code)
	answer, err := t.Send(append(b, parameters...))
	if err != nil {
		return nil, err
	}
	if len(answer) < header {
		return nil, fmt.Errorf("the TPM answers with %d bytes", len(answer))
	}
	if rc := binary.BigEndian.Uint32(answer[6:]); rc != 0 {
		return nil, tpm2.TPMRC(rc)
	}
	return answer[header:], nil
}

// TryOwner makes the storage key as a transient object and forgets it: what a seal
// needs of the owner hierarchy, without leaving anything behind. It takes up to a second.
func TryOwner(t TPM) error {
	t = patient{t}
	srk, err := createPrimary(t, srkTemplate())
	if err != nil {
		return err
	}
	srk.Close(t)
	return nil
}

// Space is the room in the TPM's non-volatile memory, as far as it says (F41).
type Space struct {
	// StorageKey and Counter: what this system would put there is there already.
	StorageKey, Counter bool
	// NVIndices are defined, by whomever.
	NVIndices uint32
	// PersistentLeft and CountersLeft are the TPM's estimates of how many more objects
	// and counters it can keep. A CountersMax of 0 is no limit of its own.
	PersistentLeft, CountersLeft, CountersMax uint32
}

// ReadSpace asks for it.
func ReadSpace(t TPM) (s Space, err error) {
	t = patient{t}
	fixed, err := properties(t, tpm2.TPMPTNVCountersMax, 1)
	if err != nil {
		return s, err
	}
	variable, err := properties(t, tpm2.TPMPTHRNVIndex, 12)
	if err != nil {
		return s, err
	}
	s.CountersMax = fixed[tpm2.TPMPTNVCountersMax]
	s.NVIndices, s.PersistentLeft = variable[tpm2.TPMPTHRNVIndex], variable[tpm2.TPMPTHRPersistentAvail]
	s.CountersLeft = variable[tpm2.TPMPTNVCountersAvail]
	srk, err := readKey(t, srkHandle)
	s.StorageKey = err == nil && isSRK(srk.public)
	_, err = Counter{Index: CounterIndex}.find(t)
	s.Counter = err == nil
	return s, nil
}
