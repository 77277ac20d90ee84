package agent

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/attest"
)

// Status is what `holdfast-agent status --json` prints. Fields are added, never
// renamed.
type Status struct {
	Name         string `json:"name"`
	Version      string `json:"version"`
	Architecture string `json:"architecture"`
	// Slot is "a" or "b", found by the root hash; "" when the root is on no known slot.
	Slot     string `json:"slot"`
	RootHash string `json:"root_hash"`
	// Verity describes the running root.
	Verity image.Verity `json:"verity"`
	// Disk is the device the root was found on.
	Disk string `json:"disk,omitempty"`
	// Slots are the installed releases.
	Slots []SlotStatus `json:"slots,omitempty"`
	// EncryptSlots says that the running release has its slots be encrypted. The kernel
	// images on the ESP are in the clear all the same.
	EncryptSlots bool `json:"encrypt_slots,omitempty"`
	// Policy is the sealing policy in force, whole, a line a rule.
	Policy string   `json:"policy"`
	Rules  []string `json:"rules,omitempty"`
	// SealedPCRs are the registers whose values the volumes' key is bound to.
	SealedPCRs []int `json:"sealed_pcrs,omitempty"`
	// States are all in which the TPM opens the volumes; Rules and SealedPCRs are of the
	// one that did in this boot, or of the first.
	States []StateStatus `json:"states,omitempty"`
	// SecureBoot says that the firmware enforces the vendor's keys.
	SecureBoot bool `json:"secure_boot"`
	// Keys are the firmware's, and what the release changes in them; nil until a boot is
	// good, and after a hand-off.
	Keys *SecureBootStatus `json:"secure_boot_keys,omitempty"`
	// BootLoader is about the boot loader's copies; nil until a boot is good.
	BootLoader *LoaderStatus `json:"boot_loader,omitempty"`
	// PCRs are registers at the moment the volumes were opened, in hex, as far as they
	// are known: those that the state that opened binds, or all after a refusal.
	PCRs map[int]string `json:"pcrs,omitempty"`
	// Lockout is what the TPM counts against guessing of PINs; nil when it was not asked.
	Lockout *LockoutStatus `json:"tpm_lockout,omitempty"`
	// Measured is what the initrd extended into registers, in order: no log of the
	// firmware has that.
	Measured []attest.Measurement `json:"measured,omitempty"`
	// Repaired says, after a boot that the recovery key opened, that the TPM opens again.
	Repaired string   `json:"repaired,omitempty"`
	Degraded []string `json:"degraded,omitempty"` // why protection is less than the policy's best
	Problems []string `json:"problems,omitempty"` // what a person should look at

	Volumes  []VolumeStatus  `json:"volumes,omitempty"`
	Services []ServiceStatus `json:"services,omitempty"`
	// Update is what is pending and what happened last; nil in a release that takes no updates.
	Update *UpdateStatus `json:"update,omitempty"`
	// Recovery is how the recovery key is kept; nil without data volumes.
	Recovery *RecoveryStatus `json:"recovery,omitempty"`
	// Evidence is what the vendor's verifier said last; nil in a release that asks none.
	Evidence *EvidenceStatus `json:"evidence,omitempty"`

	Boot BootTimes `json:"boot"`
	// ResidentBytes is the agent's memory now, PeakBytes the most it has had.
	ResidentBytes int64 `json:"resident_bytes,omitempty"`
	PeakBytes     int64 `json:"peak_bytes,omitempty"`
}

// LockoutStatus is a TPM's count of failed authorizations (F32, F35).
type LockoutStatus struct {
	In         bool   `json:"in_lockout"`
	Count      uint32 `json:"failures"`
	Max        uint32 `json:"max_failures"`        // lockout begins here
	ForgiveSec uint32 `json:"forgive_one_sec"`     // until one failure is forgiven
	WaitSec    uint64 `json:"wait_sec,omitempty"`  // in lockout, at most, with the power on
	Error      string `json:"not_known,omitempty"` // why the TPM did not say
}

func (l *LockoutStatus) line() string {
	every := (time.Duration(l.ForgiveSec) * time.Second).String()
	switch {
	case l.Error != "":
		return "lockout not known: " + l.Error
	case l.In:
		return fmt.Sprintf("LOCKOUT: no PIN is taken for up to %v more with the power on; %d of %d failures counted, one is forgiven every %s",
			time.Duration(l.WaitSec)*time.Second, l.Count, l.Max, every)
	}
	return fmt.Sprintf("%d of %d failures counted against guessing, one is forgiven every %s", l.Count, l.Max, every)
}

// SlotStatus is one installed release.
type SlotStatus struct {
	Slot     string `json:"slot"`
	Version  string `json:"version"`
	Sequence int64  `json:"sequence"` // of installations on this disk
	State    string `json:"state"`    // "good", or what is wrong
	Running  bool   `json:"running,omitempty"`
	// Encrypted says that no file system is in the slot in the clear.
	Encrypted bool `json:"encrypted"`
}

// VolumeStatus is one data volume.
type VolumeStatus struct {
	Name   string `json:"name"`
	Mount  string `json:"mount"`
	Device string `json:"device"`
	UUID   string `json:"uuid"`
	// Method says how it was opened in this boot: "tpm", "recovery" or "provisioned".
	Method string `json:"method"`
	// Integrity is what its sectors are checked with, "hmac-sha256", or empty.
	Integrity string `json:"integrity,omitempty"`
}

// ServiceStatus is one container.
type ServiceStatus struct {
	Name     string `json:"name"`
	Kind     string `json:"kind"` // onboot, service
	State    State  `json:"state"`
	PID      int    `json:"pid,omitempty"`
	Restarts int    `json:"restarts"`
	Reason   string `json:"reason,omitempty"`
}

// BootTimes are milliseconds; the TPM's part is counted apart because it
// depends on the chip.
type BootTimes struct {
	InitrdMilliseconds int64 `json:"initrd_ms"` // from the agent's first instruction to data mounted
	TPMMilliseconds    int64 `json:"tpm_ms"`
	TPMCommands        int   `json:"tpm_commands"`
	KernelMilliseconds int64 `json:"kernel_ms"` // from the kernel's start to the agent's
}

// State is where a container is in its life.
type State string

// The states of a container.
const (
	Waiting   State = "waiting"
	Starting  State = "starting"
	Running   State = "running" // without a health check, or not yet answered
	Healthy   State = "healthy"
	Unhealthy State = "unhealthy"
	Exited    State = "exited"
	Failed    State = "failed"
)

// WriteTo prints the status for a person.
func (s *Status) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s on %s\n", s.Name, s.Version, s.Architecture)
	hash := orNone(s.RootHash)
	if len(hash) > 16 {
		hash = hash[:16] + "…"
	}
	fmt.Fprintf(&b, "slot      %s (root hash %s)\n", orNone(s.Slot), hash)
	s.policy(&b)
	if s.Keys != nil {
		s.Keys.lines(&b)
	}
	for _, d := range s.Degraded {
		fmt.Fprintf(&b, "DEGRADED  %s\n", d)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(&b, "PROBLEM   %s\n", p)
	}
	if s.Lockout != nil {
		fmt.Fprintf(&b, "TPM       %s\n", s.Lockout.line())
	}
	if s.Repaired != "" {
		fmt.Fprintf(&b, "repaired  %s\n", s.Repaired)
	}
	if s.BootLoader != nil {
		s.BootLoader.lines(&b)
	}
	s.encryption(&b)
	fmt.Fprintf(&b, "boot      initrd %d ms, of it TPM %d ms in %d commands\n", s.Boot.InitrdMilliseconds, s.Boot.TPMMilliseconds, s.Boot.TPMCommands)
	s.table(&b)
	if s.Recovery != nil {
		s.Recovery.lines(&b)
	}
	if s.Update != nil {
		s.Update.lines(&b)
	}
	if s.Evidence != nil {
		s.Evidence.lines(&b)
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

// policy tells what opens the volumes: the policy in force and every state.
func (s *Status) policy(b *strings.Builder) {
	fmt.Fprintf(b, "policy    %s\n", orNone(s.Policy))
	for _, r := range s.Rules {
		fmt.Fprintf(b, "            %s\n", r)
	}
	for _, t := range s.States {
		opened := ""
		if t.Opened {
			opened = ", which opened the data volumes in this boot"
		}
		if t.Damaged {
			opened = ", whose keyslot is damaged on a data volume"
		}
		fmt.Fprintf(b, "state     %s%s\n", orNone(t.For), opened)
		if !slices.Equal(t.Rules, s.Rules) {
			for _, r := range t.Rules {
				fmt.Fprintf(b, "            %s\n", r)
			}
		}
	}
}

// table lists slots, volumes and services.
func (s *Status) table(b *strings.Builder) {
	tw := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	for _, r := range s.Slots {
		running := ""
		if r.Running {
			running = "running"
		}
		fmt.Fprintf(tw, "release\t%s\t%s\t%s\t%s\n", r.Slot, r.Version, r.State, running)
	}
	for _, v := range s.Volumes {
		fmt.Fprintf(tw, "volume\t%s\t%s\topened by %s\t%s", v.Name, v.Mount, v.Method, v.UUID)
		if v.Integrity != "" {
			fmt.Fprintf(tw, " %s", v.Integrity)
		}
		fmt.Fprintln(tw)
	}
	for _, c := range s.Services {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d restarts", c.Kind, c.Name, c.State, c.Restarts)
		if c.Reason != "" {
			fmt.Fprintf(tw, "\t%s", c.Reason)
		}
		fmt.Fprintln(tw)
	}
	tw.Flush()
}

// encryption says what of the releases is encrypted, where the spec asks for it.
func (s *Status) encryption(b *strings.Builder) {
	if !s.EncryptSlots {
		return
	}
	for _, r := range s.Slots {
		if r.Encrypted {
			fmt.Fprintf(b, "slot %s    encrypted with a key on the data volumes\n", r.Slot)
			continue
		}
		fmt.Fprintf(b, "slot %s    IN THE CLEAR: the next update encrypts it, and so does a boot of it whose release encrypts slots\n", r.Slot)
	}
	fmt.Fprintln(b, "slots     what starts before them is not encrypted: kernel, initrd and agent on the boot partition")
}

// maxTextBytes is how much of a text that may have come from a medium or a network is shown.
const maxTextBytes = 1500

// brief cuts a text, on the console and in status.
func brief(s string) string {
	if len(s) <= maxTextBytes {
		return s
	}
	return strings.ToValidUTF8(s[:maxTextBytes], "") + "…"
}

// printable is a text in one line that does nothing to a terminal: a file's name on
// a stick, for one, can have any bytes.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, brief(s))
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
