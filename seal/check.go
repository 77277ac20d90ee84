package seal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Fitness is what a TPM says about itself and what its registers show.
type Fitness struct {
	Family       string // "2.0"
	Manufacturer string // TCG vendor id: "INTC", "IFX", "IBM" (swtpm)
	Model        string // vendor string
	Firmware     string // "8.217.4.0"
	Banks        []Bank // allocated ones only
	// PCRs are registers 0 to 7 and 11 of the SHA-256 bank; empty without that bank.
	PCRs map[int]pcr.Digest

	OwnerAuthSet  bool // somebody took ownership; storage keys cannot be made
	InLockout     bool
	LockoutCount  uint32 // failed authorizations so far
	LockoutMax    uint32 // lockout begins here
	LockoutSec    uint32 // seconds until one failed authorization is forgiven
	LockoutRstSec uint32 // seconds after a failure of lockoutAuth itself
}

// Bank is a set of registers with one hash algorithm.
type Bank struct {
	Alg  pcr.Hash
	PCRs []int // allocated, ascending
}

// Problem is a reason not to rely on the TPM.
type Problem struct {
	Code   string // stable: "no-sha256-bank"
	Text   string // a sentence
	Remedy string // a sentence; may be empty
	// Blocks says that sealing must not go ahead; the others are warnings.
	Blocks bool
}

// String is the text with the remedy.
func (p Problem) String() string {
	return strings.TrimSpace(p.Text + " " + p.Remedy)
}

// checked are the registers that firmware and stub must have extended.
func checked() []int { return []int{0, 1, 2, 3, 4, 5, 6, 7, 11} }

// Check asks the TPM what it is and reads its registers. Banks come from
// TPM2_GetCapability and nowhere else (F29). An unfit TPM is not an error; see
// [Fitness.Problems]. [ErrTPM12] and transport errors are.
func Check(t TPM) (Fitness, error) {
	t = patient{t}
	var f Fitness
	fixed, err := properties(t, tpm2.TPMPTFamilyIndicator, 16)
	if err != nil {
		return Fitness{}, err
	}
	variable, err := properties(t, tpm2.TPMPTPermanent, 20)
	if err != nil {
		return Fitness{}, err
	}
	f.Family = fourChars(fixed[tpm2.TPMPTFamilyIndicator])
	f.Manufacturer = fourChars(fixed[tpm2.TPMPTManufacturer])
	for p := tpm2.TPMPTVendorString1; p <= tpm2.TPMPTVendorString4; p++ {
		f.Model += fourChars(fixed[p])
	}
	v1, v2 := fixed[tpm2.TPMPTFirmwareVersion1], fixed[tpm2.TPMPTFirmwareVersion2]
	f.Firmware = fmt.Sprintf("%d.%d.%d.%d", v1>>16, v1&0xffff, v2>>16, v2&0xffff)
	permanent := variable[tpm2.TPMPTPermanent] // TPMA_PERMANENT, Part 2 §8.6
	f.OwnerAuthSet = permanent&(1<<0) != 0
	f.InLockout = permanent&permanentInLockout != 0
	f.LockoutCount = variable[tpm2.TPMPTLockoutCounter]
	f.LockoutMax = variable[tpm2.TPMPTMaxAuthFail]
	f.LockoutSec = variable[tpm2.TPMPTLockoutInterval]
	f.LockoutRstSec = variable[tpm2.TPMPTLockoutRecovery]
	if f.Banks, err = banks(t); err != nil {
		return Fitness{}, err
	}
	f.PCRs = map[int]pcr.Digest{}
	if readable := intersect(f.bank(pcr.SHA256), checked()); len(readable) > 0 {
		if f.PCRs, err = ReadPCRs(t, readable); err != nil {
			return Fitness{}, err
		}
	}
	return f, nil
}

func (f Fitness) bank(alg pcr.Hash) []int {
	for _, b := range f.Banks {
		if b.Alg == alg {
			return b.PCRs
		}
	}
	return nil
}

func intersect(a, b []int) []int {
	return slices.DeleteFunc(slices.Clone(b), func(p int) bool { return !slices.Contains(a, p) })
}

// Unextended lists the registers among 0 to 7 and 11 that nothing was ever
// measured into (F27).
func (f Fitness) Unextended() []int {
	var list []int
	for _, p := range checked() {
		if v, ok := f.PCRs[p]; ok && pcr.Unextended(v) {
			list = append(list, p)
		}
	}
	return list
}

// Problems says why a key bound to these registers would not be safe, or could
// not be had back. Blocking ones come first.
func (f Fitness) Problems(bound []int) []Problem {
	var found []Problem
	block := func(code, text, remedy string) { found = append(found, Problem{code, text, remedy, true}) }
	warn := func(code, text, remedy string) { found = append(found, Problem{code, text, remedy, false}) }
	if f.Family != "2.0" {
		block("family", fmt.Sprintf("The TPM is of family %q.", f.Family), "Switch the TPM to version 2.0 in the firmware setup, if it can.")
	}
	have := f.bank(pcr.SHA256)
	if len(have) == 0 {
		block("no-sha256-bank", "The TPM's SHA-256 bank is not enabled; its banks are "+f.bankNames()+".", "Enable SHA-256 measurements in the firmware setup.")
	}
	for _, p := range bound {
		if len(have) > 0 && !slices.Contains(have, p) {
			block("pcr-missing", fmt.Sprintf("PCR %d is not allocated in the SHA-256 bank.", p), "Update the firmware.")
		}
	}
	for _, p := range f.Unextended() {
		if slices.Contains(bound, p) {
			block("pcr-unextended", fmt.Sprintf("Nothing was measured into PCR %s; whoever boots this machine could give it any value.", pcr.Label(p)),
				"Enable the TPM's SHA-256 measurements in the firmware setup or update the firmware.")
		}
	}
	if f.OwnerAuthSet {
		block("owner-auth", "The TPM's owner hierarchy has a password, so the storage key cannot be made.", "Clear the TPM in the firmware setup. That destroys every key it holds.")
	}
	for _, p := range f.Unextended() {
		if !slices.Contains(bound, p) {
			warn("pcr-unextended-unbound", fmt.Sprintf("Nothing was measured into PCR %s.", pcr.Label(p)), "")
		}
	}
	if f.InLockout {
		warn("lockout", (&LockoutError{f.LockoutCount, f.LockoutMax, uint64(f.LockoutSec)}).Error()+".", "Keys without a PIN are not concerned.")
	} else if f.LockoutMax > 0 && f.LockoutCount > f.LockoutMax/2 {
		warn("lockout-near", fmt.Sprintf("The TPM has counted %d failures and locks at %d.", f.LockoutCount, f.LockoutMax),
			fmt.Sprintf("It forgives one every %d s. Unclean power-offs count where some key lacks noDA.", f.LockoutSec))
	}
	return found
}

func (f Fitness) bankNames() string {
	var names []string
	for _, b := range f.Banks {
		names = append(names, b.Alg.String())
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// properties reads count TPM properties from first on. Part 3 §30.2.
func properties(t TPM, first tpm2.TPMPT, count uint32) (map[tpm2.TPMPT]uint32, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(first), PropertyCount: count}.Execute(t)
	if errors.Is(err, tpm2.TPMRC(0x1e)) { // TPM_RC_BAD_TAG: what a 1.2 TPM answers, Part 2 §6.6.2
		return nil, ErrTPM12
	}
	if err != nil {
		return nil, fmt.Errorf("read TPM properties from 0x%x: %w", uint32(first), err)
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return nil, fmt.Errorf("read TPM properties from 0x%x: %w", uint32(first), err)
	}
	values := map[tpm2.TPMPT]uint32{}
	for _, p := range list.TPMProperty {
		values[p.Property] = p.Value
	}
	return values, nil
}

// fourChars is a property that holds text, without its padding.
func fourChars(v uint32) string {
	b := binary.BigEndian.AppendUint32(nil, v)
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return -1
		}
		return r
	}, strings.TrimSpace(string(b)))
}

// banks lists the allocated banks; a bank with no register is not allocated.
func banks(t TPM) ([]Bank, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("ask the TPM for its PCR banks: %w", err)
	}
	list, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, fmt.Errorf("ask the TPM for its PCR banks: %w", err)
	}
	var found []Bank
	for _, s := range list.PCRSelections {
		if pcrs := selected(s); len(pcrs) > 0 {
			found = append(found, Bank{pcr.Hash(s.Hash), pcrs})
		}
	}
	return found, nil
}

func selected(s tpm2.TPMSPCRSelection) []int {
	var pcrs []int
	for i := range min(8*len(s.PCRSelect), pcr.Count) {
		if s.PCRSelect[i/8]&(1<<(i%8)) != 0 {
			pcrs = append(pcrs, i)
		}
	}
	return pcrs
}

// selection is the TPML_PCR_SELECTION of these registers in the SHA-256 bank.
func selection(pcrs []int) tpm2.TPMLPCRSelection {
	bitmap := make([]byte, pcr.Count/8)
	for _, p := range pcrs {
		bitmap[p/8] |= 1 << (p % 8)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap}}}
}

// ReadPCRs reads registers of the SHA-256 bank. A TPM gives out at most eight
// at a time, so they may come from different moments. [ErrNoSHA256] when the
// bank is not there.
func ReadPCRs(t TPM, pcrs []int) (map[int]pcr.Digest, error) {
	t = patient{t}
	wanted, err := pcr.Sorted(pcrs)
	if err != nil {
		return nil, err
	}
	values := map[int]pcr.Digest{}
	for len(wanted) > 0 {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection(wanted)}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("read PCR %v: %w", wanted, err)
		}
		var got []int
		for _, s := range rsp.PCRSelectionOut.PCRSelections {
			if s.Hash == tpm2.TPMAlgSHA256 {
				got = append(got, selected(s)...)
			}
		}
		// F30: a TPM without the bank answers with no digest at all.
		if len(got) == 0 || len(got) != len(rsp.PCRValues.Digests) {
			return nil, fmt.Errorf("read PCR %v: the TPM gave %d values for %d registers: %w", wanted, len(rsp.PCRValues.Digests), len(got), ErrNoSHA256)
		}
		for i, p := range got {
			d := rsp.PCRValues.Digests[i].Buffer
			if len(d) != len(pcr.Digest{}) || !slices.Contains(wanted, p) {
				return nil, fmt.Errorf("read PCR %v: the TPM gave %d bytes for PCR %d", wanted, len(d), p)
			}
			values[p] = pcr.Digest(d)
		}
		wanted = slices.DeleteFunc(wanted, func(p int) bool { _, ok := values[p]; return ok })
	}
	return values, nil
}

// maxEventBytes is what TPM2_PCR_Event takes. Part 3 §22.3.
const maxEventBytes = 1024

// ExtendPCR measures data into a register in every allocated bank, also in
// those whose hash this program does not know: the TPM does the hashing. In the
// SHA-256 bank the result is that of [pcr.Extend].
func ExtendPCR(t TPM, index int, data []byte) error {
	if _, err := pcr.Sorted([]int{index}); err != nil {
		return err
	}
	if len(data) > maxEventBytes {
		return fmt.Errorf("extend PCR %d with %d bytes: the TPM takes at most %d", index, len(data), maxEventBytes)
	}
	_, err := tpm2.PCREvent{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: tpm2.PasswordAuth(nil)},
		EventData: tpm2.TPM2BEvent{Buffer: data},
	}.Execute(patient{t})
	if err != nil {
		return fmt.Errorf("extend PCR %d with %d bytes: %w", index, len(data), err)
	}
	return nil
}
