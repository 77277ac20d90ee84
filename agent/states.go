package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Names of states; see [SealState.For].
const (
	suspendedName = "suspended"
	// pendingMark follows a slot's name while the values are those of a change of the
	// firmware's variables that has yet to happen.
	pendingMark = ", pending"
	// loaderMark follows the name of the slot that runs while a release with another boot
	// loader is being written: both slots are started by one.
	loaderMark = ", next loader"
	// firstMark follows the name of the slot that runs when it was started by the second
	// copy of the boot loader, after the firmware had refused the first.
	firstMark = ", first loader again"
	// loadedMark follows the name of the slot that runs when the firmware started its kernel
	// image itself, after it had refused the boot loader.
	loadedMark = ", by the boot loader"
)

// slotName is the state in which a slot boots its release.
func slotName(slot partition.Slot, version string) string {
	return fmt.Sprintf("slot %s %s", slot, version)
}

// bond is what rollback-proof binds besides registers: the security epoch that the box
// has come to, and the bound on the TPM's counter.
type bond struct {
	epoch   uint64
	counter seal.Counter
}

// newBond begins with the release's epoch and the counter as it is.
func newBond(tpm seal.TPM, epoch int64) (bond, error) {
	if epoch < 1 {
		return bond{}, fmt.Errorf("policy %s: the release's security epoch is %d, and epochs begin with 1", seal.PolicyRollbackProof, epoch)
	}
	counter, err := seal.EnsureCounter(tpm, seal.CounterIndex)
	return bond{uint64(epoch), counter}, err
}

// policyOf is the policy that the spec names, over these values; more may be given
// than it binds.
func policyOf(s image.SealPolicy, secureBoot bool, b bond, values map[int]pcr.Digest) (p seal.Policy, err error) {
	bound, err := seal.Literal(s.Policy, secureBoot)
	if err != nil {
		return p, err
	}
	literal := map[int]pcr.Digest{}
	for _, i := range bound {
		v, ok := values[i]
		if !ok {
			return p, fmt.Errorf("policy %s: the value of PCR %s is not known", s.Policy, pcr.Label(i))
		}
		literal[i] = v
	}
	key := []byte(s.PolicyKeyPEM)
	switch s.Policy {
	case seal.PolicyStrict:
		p = seal.Strict(literal)
	case seal.PolicyRollbackProof:
		p = seal.RollbackProof(key, b.epoch, b.counter, literal)
	case seal.PolicyDiskTheftOnly:
		p = seal.DiskTheftOnly(key)
	default:
		p = seal.Standard(key, literal)
	}
	p.PIN = s.PIN
	return p, nil
}

// relaxed is the policy while protection is suspended: what the vendor signed, in any
// state of the firmware. An epoch and a PIN stay.
func relaxed(s image.SealPolicy, b bond) seal.Policy {
	p := seal.DiskTheftOnly([]byte(s.PolicyKeyPEM))
	if s.Policy == seal.PolicyRollbackProof {
		p = seal.RollbackProof([]byte(s.PolicyKeyPEM), b.epoch, b.counter, nil)
	}
	p.PIN = s.PIN
	return p
}

// ofRelease says whether the policy binds registers that another release changes:
// then each slot needs a state of its own.
func ofRelease(s image.SealPolicy, secureBoot bool) bool {
	bound, _ := seal.Literal(s.Policy, secureBoot)
	return slices.Contains(bound, 4) || slices.Contains(bound, 11)
}

// releaseOf is what a release's reference values say that starts.
func releaseOf(e image.Expected) (r pcr.Release, err error) {
	for _, f := range []struct {
		name, text string
		into       *pcr.Digest
	}{
		{"loader_authenticode", e.LoaderAuthenticode, &r.Loader.Authenticode},
		{"uki_authenticode", e.UKIAuthenticode, &r.UKI.Authenticode},
		{"linux_authenticode", e.LinuxAuthenticode, &r.Linux},
		{"pcr11", e.PCR11[""], &r.PCR11},
		{"db_certificate_sha256", e.DBCertificateSHA256, &r.Loader.Certificate},
	} {
		if f.text == "" {
			continue
		}
		if *f.into, err = parseDigest(f.text); err != nil {
			return r, fmt.Errorf("the release's reference values: %s: %w", f.name, err)
		}
	}
	r.UKI.Certificate = r.Loader.Certificate // one signs both
	return r, nil
}

// expectedOf is the same as reference values, as far as a boot shows them.
func expectedOf(r pcr.Release) image.Expected {
	text := func(d pcr.Digest) string {
		if d == (pcr.Digest{}) {
			return ""
		}
		return hex.EncodeToString(d[:])
	}
	return image.Expected{
		PCR11: map[string]string{"": text(r.PCR11)}, LoaderAuthenticode: text(r.Loader.Authenticode), UKIAuthenticode: text(r.UKI.Authenticode),
		LinuxAuthenticode: text(r.Linux), DBCertificateSHA256: text(r.UKI.Certificate),
	}
}

// runningOf is what started in the present boot: the last of the kernel images in its log
// that may be the one that runs, and the last of the boot loaders before that in the same
// boot option; none where the firmware started the kernel image itself. Every other program
// is somebody else's, wherever it stands.
func runningOf(log pcr.Log, loaders []pcr.Digest, kernels []pcr.Release) (r pcr.Release, err error) {
	var apps []pcr.Digest
	for _, e := range log.Of(4) {
		if d, ok := e.SHA256(); ok && e.Type == pcr.EventBootServicesApp {
			apps = append(apps, d)
		}
	}
	var led []pcr.Digest
	for i := len(apps) - 1; i >= 0 && led == nil; i-- {
		if k := slices.IndexFunc(kernels, func(k pcr.Release) bool { return k.UKI.Authenticode == apps[i] }); k >= 0 {
			r, led = kernels[k], log.LedTo(apps[i])
		}
	}
	r.Loader = pcr.Program{}
	for _, d := range led {
		if slices.Contains(loaders, d) {
			r.Loader.Authenticode = d
		}
	}
	if len(led) == 0 || r.Loader == (pcr.Program{}) && len(led) > 1 {
		var list []string
		for _, d := range apps {
			list = append(list, fmt.Sprintf("%x…", d[:4]))
		}
		return pcr.Release{}, fmt.Errorf("the firmware's event log has no start of the boot loader and then the kernel image that are on the disk: it shows programs %s",
			orNone(strings.Join(list, ", ")))
	}
	r.Loader.Certificate, r.UKI.Certificate = verifiersOf(log, r)
	if r.Loader.Authenticode == (pcr.Digest{}) {
		r.Loader.Certificate = r.UKI.Certificate // one signs both
	}
	if r.PCR11 == (pcr.Digest{}) {
		r.PCR11 = log.Replay()[phasePCR] // by the stub, and by nobody else before the initrd
	}
	return r, nil
}

// verifiersOf are those that verified the programs: an entry of db is measured right
// before the first program that it lets start.
func verifiersOf(log pcr.Log, r pcr.Release) (loader, uki pcr.Digest) {
	var last pcr.Digest
	for _, e := range log.Events {
		name, entry, ok := e.Variable()
		if ok && e.Type == pcr.EventVariableAuthority && name == "db" && len(entry) > signatureOwnerBytes {
			last = sha256.Sum256(entry[signatureOwnerBytes:])
		}
		switch d, _ := e.SHA256(); {
		case e.Type != pcr.EventBootServicesApp:
		case d == r.Loader.Authenticode:
			loader = last
		case d == r.UKI.Authenticode:
			uki = last
		}
	}
	return loader, uki
}

// signatureOwnerBytes stand before the certificate in an entry of db (UEFI 2.10 §32.4.1).
const signatureOwnerBytes = 16

func parseDigest(text string) (d pcr.Digest, err error) {
	b, err := hex.DecodeString(text)
	if err == nil && len(b) != len(d) {
		err = errors.New("it has another length")
	}
	if err != nil {
		return d, fmt.Errorf("%q is not a SHA-256 digest in hex: %w", text, err)
	}
	return pcr.Digest(b), nil
}

// StateStatus is one state in which the TPM opens the data volumes.
type StateStatus struct {
	For        string `json:"for"`
	PolicyHash string `json:"policy_hash"`
	// Opened says that the volumes were opened by this one in this boot.
	Opened bool `json:"opened,omitempty"`
	// Damaged says that the TPM gave the secret of this one in this boot, and that a
	// volume's keyslot for it is damaged.
	Damaged bool     `json:"damaged,omitempty"`
	Rules   []string `json:"rules"` // the whole policy, a line a rule (F5)
	// PIN says that the TPM wants a PIN too.
	PIN bool `json:"pin,omitempty"`
	// Sealed is the SHA-256 of the sealed object: one that is made anew for the same
	// policy has another.
	Sealed string `json:"sealed"`
}

// setStates describes what is in force. known are register values from different
// moments: tokens have only their hash, so those are shown that lead to it.
func (s *Status) setStates(tokens []seal.Token, opened pcr.Digest, damaged string, known []map[int]pcr.Digest) {
	s.States, s.Rules, s.SealedPCRs = nil, nil, nil
	weak := map[string]bool{}
	for _, t := range tokens {
		name := s.Policy
		if slices.Contains(splitNames(t.For), suspendedName) {
			name = suspendedName
		}
		policy, rules := t.Describe(name, known...)
		state := StateStatus{For: t.For, PolicyHash: hex.EncodeToString(t.PolicyHash[:]), Rules: rules}
		state.Opened, state.Sealed = opened == t.PolicyHash, sealedID(t)
		state.Damaged, state.PIN = damaged == state.Sealed, t.PIN
		s.States = append(s.States, state)
		if s.Rules == nil || state.Opened {
			s.Rules, s.SealedPCRs = state.Rules, t.PCRs
		}
		if d := policy.Degraded(); d != "" {
			weak[fmt.Sprintf("state %q: %s", t.For, d)] = true
		} else if !s.SecureBoot && s.Policy != seal.PolicyStrict {
			weak[degradedWithoutSecureBoot] = true
		}
	}
	s.Degraded = slices.Sorted(maps.Keys(weak))
	if len(tokens) == 0 {
		s.Problems = append(s.Problems, "no TPM keyslot: only the recovery key opens the data volumes")
	}
}

// setLockout notes what the TPM counts. A lockout is a problem where a PIN is asked for;
// without one it keeps nobody out, and says that somebody guesses, or that power cuts are
// counted (F31).
func (s *Status) setLockout(l seal.Lockout, err error) {
	if errors.Is(err, seal.ErrNoTPM) {
		return // other lines speak of that
	}
	s.Lockout = &LockoutStatus{In: l.In, Count: l.Count, Max: l.Max, ForgiveSec: l.ForgiveSec, WaitSec: l.WaitSec}
	if err != nil {
		s.Lockout.Error = err.Error()
	}
	if l.In {
		text := fmt.Sprintf("the TPM is in dictionary-attack lockout: for up to %v more, with the power on, it takes no PIN", time.Duration(l.WaitSec)*time.Second)
		if !slices.ContainsFunc(s.States, func(t StateStatus) bool { return t.PIN }) {
			text += "; the data volumes open without one and are not concerned"
		}
		s.Problems = append(s.Problems, text)
	}
}

// sealedID tells sealed objects apart.
func sealedID(t seal.Token) string {
	sum := sha256.Sum256(slices.Concat(t.Public, t.Private))
	return hex.EncodeToString(sum[:])
}

// pcrTexts is for status; nil stays nil.
func pcrTexts(values map[int]pcr.Digest) map[int]string {
	if values == nil {
		return nil
	}
	out := map[int]string{}
	for i, v := range values {
		out[i] = hex.EncodeToString(v[:])
	}
	return out
}

// pcrValues reads them back; what cannot be read is left out.
func pcrValues(texts map[int]string) map[int]pcr.Digest {
	out := map[int]pcr.Digest{}
	for i, text := range texts {
		if d, err := parseDigest(text); err == nil {
			out[i] = d
		}
	}
	return out
}
