// Package pcr computes what a TPM's platform configuration registers will
// hold, and reads the firmware's event log to say why they hold what they do.
//
// Prediction: [UKI] is PCR 11 after the systemd stub has measured a unified
// kernel image, [Extend] adds a boot phase to it, and [Policy] is the policy
// digest that a vendor signs for such a value. Diagnosis: [ParseLog] reads a
// TCG2 crypto-agile event log and [Log.Replay] folds it into register values.
// Both together are [Predict]: what the registers of this box will hold after its
// next boot, with another release or other Secure Boot keys.
//
// Subset: the SHA-256 bank, registers 0 to 23, and the log of the TCG PC Client
// Platform Firmware Profile 1.05. A SHA-1 log is recognised and described, but
// not replayed.
//
// What this does not protect: an event log is a claim made by firmware and may
// be changed by whoever controls the running system. A replayed value means
// something only where it equals the register, and the text of an event, unlike
// its digest, is not covered by the register at all.
//
// The package uses no TPM and imports nothing but the standard library.
package pcr

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
)

// Count is the number of registers a PC Client TPM has (0 to Count-1).
const Count = 24

// Digest is a value of the SHA-256 bank, or a SHA-256 policy digest.
type Digest = [sha256.Size]byte

// Measured is one PE section of a unified kernel image: its name with the dot
// (".linux") and the digest of its first VirtualSize bytes.
type Measured struct {
	Name   string
	SHA256 Digest
}

// UKI is PCR 11 after the systemd stub: for each section in the given order,
// the name with its terminating NUL and then the content. It is the caller's
// job to leave out what the stub does not measure (.pcrsig; with systemd 252
// also .uname and .sbat) and to use the stub's order. UAPI.5.
func UKI(sections []Measured) Digest {
	var v Digest
	for _, s := range sections {
		v = Extend(v, append([]byte(s.Name), 0))
		v = ExtendDigest(v, s.SHA256)
	}
	return v
}

// Extend is the register after data (a boot phase such as "enter-initrd") was
// measured into it: SHA256(v || SHA256(data)).
func Extend(v Digest, data []byte) Digest { return ExtendDigest(v, sha256.Sum256(data)) }

// ExtendDigest is the register after TPM2_PCR_Extend with the digest d: SHA256(v || d).
func ExtendDigest(v, d Digest) Digest {
	return sha256.Sum256(append(v[:], d[:]...))
}

// Unextended says whether v is a value that no measurement can give: the all
// zero or all one bits of a register since its reset.
func Unextended(v Digest) bool {
	for _, b := range v {
		if b != v[0] {
			return false
		}
	}
	return v[0] == 0 || v[0] == 0xff
}

// Names of TPM 2.0 constants that policy digests contain. TPM 2.0 Part 2 §6.3, §6.5.2.
const (
	algSHA256   = 0x000b
	ccPolicyPCR = 0x0000017f
	selectBytes = Count / 8
)

// Sorted checks a list of registers and returns it in ascending order. A
// register outside 0 to 23 and one that is named twice are errors.
func Sorted(pcrs []int) ([]int, error) {
	sorted := slices.Sorted(slices.Values(pcrs))
	for i, p := range sorted {
		if p < 0 || p >= Count {
			return nil, fmt.Errorf("PCR %d: a TPM has PCR 0 to %d", p, Count-1)
		}
		if i > 0 && sorted[i-1] == p {
			return nil, fmt.Errorf("PCR %d is listed twice", p)
		}
	}
	return sorted, nil
}

// AppendPolicy is the digest of a policy session that held old, after
// TPM2_PolicyPCR over these registers of the SHA-256 bank with these values:
// SHA256(old || TPM_CC_PolicyPCR || TPML_PCR_SELECTION || SHA256(values in
// ascending order)). TPM 2.0 Part 3 §23.7.
func AppendPolicy(old Digest, pcrs []int, values map[int]Digest) (Digest, error) {
	sorted, err := Sorted(pcrs)
	if err != nil {
		return Digest{}, err
	}
	if len(sorted) == 0 {
		return Digest{}, fmt.Errorf("policy over no PCR")
	}
	var selected [selectBytes]byte
	composite := sha256.New()
	for _, p := range sorted {
		v, ok := values[p]
		if !ok {
			return Digest{}, fmt.Errorf("policy over PCR %d: no value given", p)
		}
		selected[p/8] |= 1 << (p % 8)
		composite.Write(v[:])
	}
	b := binary.BigEndian.AppendUint32(old[:], ccPolicyPCR)
	b = binary.BigEndian.AppendUint32(b, 1) // one bank
	b = binary.BigEndian.AppendUint16(b, algSHA256)
	b = append(b, selectBytes)
	b = append(b, selected[:]...)
	return sha256.Sum256(composite.Sum(b)), nil
}

// Policy is the digest of a session that ran only TPM2_PolicyPCR: what a vendor
// signs so that [AppendPolicy]'s owner may change the values later.
func Policy(pcrs []int, values map[int]Digest) (Digest, error) {
	return AppendPolicy(Digest{}, pcrs, values)
}

// Label names a register in plain words: "7: Secure Boot keys and state".
// UAPI.7 (Linux TPM PCR Registry) and TCG PC Client PFP §3.3.4.
func Label(index int) string {
	return fmt.Sprintf("%d: %s", index, Meaning(index))
}

// Meaning is [Label] without the number.
func Meaning(index int) string {
	switch index {
	case 0:
		return "firmware code"
	case 1:
		return "firmware settings and hardware configuration"
	case 2:
		return "code of option ROMs and add-in cards"
	case 3:
		return "configuration of option ROMs and add-in cards"
	case 4:
		return "boot loader and the order in which the firmware tried loaders"
	case 5:
		return "partition table and boot loader configuration"
	case 6:
		return "host platform manufacturer's measurements"
	case 7:
		return "Secure Boot keys and state"
	case 8:
		return "GRUB's commands and kernel command line"
	case 9:
		return "files read by GRUB, initrds read by the kernel"
	case 10:
		return "Linux IMA"
	case 11:
		return "unified kernel image and boot phase"
	case 12:
		return "kernel command line overrides, credentials and add-ons"
	case 13:
		return "system extensions of the initrd"
	case 14:
		return "machine owner keys of shim"
	case 15:
		return "identity of machine and volumes"
	case 16:
		return "debugging"
	case 17, 18, 19, 20, 21, 22:
		return "dynamic launch (DRTM)"
	case 23:
		return "application use"
	}
	return "not a PC Client register"
}
