package agent

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Facts are what a box says of itself before anything is installed, or afterwards. They
// are gathered by [Gather] and judged by [Examine]. An error beside a fact says why it
// is not known; the zero value of most is a box that has nothing.
type Facts struct {
	// Policy is the one that the data shall be sealed by; "" is standard.
	Policy string
	PIN    bool

	EFI bool
	// Masked says that /sys/firmware is not there to look at, as in a container.
	Masked bool

	// TPMError says why there is no TPM to ask; the following are empty then.
	TPMError      error
	SelfTestError error
	// OwnerError is what making a storage key gives.
	OwnerError error
	Fitness    seal.Fitness
	Space      seal.Space
	SpaceError error

	Log      pcr.Log
	LogError error

	SecureBoot      *SecureBootState
	SecureBootError error

	// VariableBytes are free in the firmware's variable store, -1 unknown; CrashDumps are
	// variables there that a kernel left.
	VariableBytes int64
	VariableError error
	CrashDumps    int

	// IOMMUs the kernel uses, groups of devices behind them.
	IOMMUGroups int
	IOMMUError  error

	// Disk is the Holdfast disk that was found; "" is none. ESPBytes are free on it,
	// LargestBytes is the largest kernel image there.
	Disk                   string
	DiskError              error
	ESPBytes, LargestBytes int64

	Now time.Time
	// NotBefore is a moment that has passed for sure: that of a build.
	NotBefore time.Time
	RTC       bool

	// VM names the hypervisor; "" is none.
	VM string

	// Watchdogs by what their drivers call them.
	Watchdogs []string
}

// Verdict is what a check comes to.
type Verdict string

// The verdicts. A box with one that is Bad is not fit.
const (
	OK      Verdict = "ok"
	Warn    Verdict = "warn"
	Bad     Verdict = "fail"
	Unknown Verdict = "unknown"
)

// Check is one thing that was looked at.
type Check struct {
	Name    string  `json:"name"` // stable
	Verdict Verdict `json:"verdict"`
	Seen    string  `json:"seen"`
	Remedy  string  `json:"remedy,omitempty"`
}

// Diagnosis is what doctor prints.
type Diagnosis struct {
	Fit    bool    `json:"fit"`
	Policy string  `json:"policy"`
	Checks []Check `json:"checks"`
}

// WriteTo prints it for a person.
func (d Diagnosis) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	for _, c := range d.Checks {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", c.Verdict, c.Name, printable(c.Seen))
		if c.Remedy != "" && c.Verdict != OK {
			fmt.Fprintf(tw, "\t\t  %s\n", printable(c.Remedy))
		}
	}
	tw.Flush()
	if d.Fit {
		fmt.Fprintf(&b, "fit for policy %s\n", d.Policy)
	} else {
		fmt.Fprintf(&b, "NOT FIT for policy %s\n", d.Policy)
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

// Examine judges the facts. It asks nobody: the same facts give the same checks.
func Examine(f Facts) Diagnosis {
	if f.Policy == "" {
		f.Policy = seal.PolicyStandard
	}
	e := examination{Facts: f, d: Diagnosis{Fit: true, Policy: f.Policy}}
	e.enforced = f.SecureBoot != nil && f.SecureBoot.Enforced()
	bound, err := seal.Literal(f.Policy, e.enforced)
	if err != nil {
		e.add("policy", Bad, err.Error(), "")
		return e.d
	}
	e.bound = append(bound, phasePCR)
	for _, check := range []func(){
		e.efi, e.tpm, e.selfTest, e.lockout, e.owner, e.space, e.bank, e.registers, e.eventLog, e.replay,
		e.secureBoot, e.databaseHashes, e.algorithms, e.dma, e.debugMode, e.programs, e.optionROMs, e.absolute,
		e.variables, e.esp, e.clock, e.vm, e.watchdog,
	} {
		check()
	}
	return e.d
}

type examination struct {
	Facts
	enforced bool
	bound    []int // registers that the policy binds, 11 among them
	d        Diagnosis
}

func (e *examination) add(name string, v Verdict, seen, remedy string) {
	if v == OK {
		remedy = ""
	}
	e.d.Checks = append(e.d.Checks, Check{name, v, seen, remedy})
	e.d.Fit = e.d.Fit && v != Bad
}

func (e *examination) efi() {
	if !e.EFI && e.Masked {
		e.add("efi", Unknown, "nothing is to be seen of the firmware: /sys/firmware is empty", "in a container: take /sys/firmware out of its maskedPaths")
		return
	}
	if !e.EFI {
		e.add("efi", Bad, "this system was not started by UEFI", "switch legacy boot (CSM) off in the firmware setup")
		return
	}
	e.add("efi", OK, "started by UEFI", "")
}

func (e *examination) tpm() {
	switch {
	case errors.Is(e.TPMError, seal.ErrTPM12):
		e.add("tpm", Bad, e.TPMError.Error(), "switch the TPM to version 2.0 in the firmware setup, if it can (F43)")
	case errors.Is(e.TPMError, seal.ErrBusy):
		e.add("tpm", Unknown, e.TPMError.Error(), "stop the program that uses it and try again")
	case e.TPMError != nil:
		e.add("tpm", Bad, e.TPMError.Error(), "enable the TPM (PTT, fTPM, Security Device) in the firmware setup")
	case e.Fitness.Family != "2.0":
		e.add("tpm", Bad, fmt.Sprintf("the TPM is of family %q", e.Fitness.Family), "switch it to version 2.0 in the firmware setup, if it can")
	default:
		e.add("tpm", OK, strings.TrimSpace(fmt.Sprintf("TPM 2.0, %s %s", e.Fitness.Manufacturer, e.Fitness.Model))+", firmware "+e.Fitness.Firmware, "")
	}
}

// asked says whether there is a TPM; without one the checks that need it say so, once each.
func (e *examination) asked(name string) bool {
	if e.TPMError == nil {
		return true
	}
	e.add(name, Unknown, "there is no TPM to ask", "")
	return false
}

func (e *examination) selfTest() {
	if !e.asked("tpm-self-test") {
		return
	}
	if e.SelfTestError != nil {
		e.add("tpm-self-test", Bad, e.SelfTestError.Error(), "switch the box off, not only restart it; a TPM that fails again is broken")
		return
	}
	e.add("tpm-self-test", OK, "passed", "")
}

func (e *examination) lockout() {
	if !e.asked("tpm-lockout") {
		return
	}
	f := e.Fitness
	every := "never"
	if f.LockoutSec > 0 {
		every = "every " + (time.Duration(f.LockoutSec) * time.Second).String()
	}
	seen := fmt.Sprintf("%d of %d failures counted, one is forgiven %s", f.LockoutCount, f.LockoutMax, every)
	wait := fmt.Sprintf("leave it switched on: the next try is free in at most %v, all are in %v; clearing the TPM in the firmware setup also helps, and destroys its keys",
		time.Duration(f.LockoutSec)*time.Second, time.Duration(f.LockoutCount)*time.Duration(f.LockoutSec)*time.Second)
	switch {
	case f.InLockout && e.PIN:
		e.add("tpm-lockout", Bad, "in lockout: "+seen+"; no PIN is taken", wait)
	case f.InLockout:
		e.add("tpm-lockout", Warn, "in lockout: "+seen+"; keys without a PIN are not concerned", wait)
	case f.LockoutMax > 0 && f.LockoutCount > f.LockoutMax/2:
		e.add("tpm-lockout", Warn, seen, "somebody guesses, or another system's keys count power cuts as failures (F31)")
	default:
		e.add("tpm-lockout", OK, seen, "")
	}
}

func (e *examination) owner() {
	if !e.asked("tpm-owner") {
		return
	}
	const remedy = "clear the TPM in the firmware setup; that destroys every key it holds"
	switch {
	case e.Fitness.OwnerAuthSet:
		e.add("tpm-owner", Bad, "the owner hierarchy has a password", remedy)
	case e.OwnerError != nil:
		e.add("tpm-owner", Bad, e.OwnerError.Error(), remedy)
	default:
		e.add("tpm-owner", OK, "a storage key can be made", "")
	}
}

func (e *examination) space() {
	if !e.asked("tpm-space") {
		return
	}
	s := e.Space
	if e.SpaceError != nil {
		e.add("tpm-space", Unknown, e.SpaceError.Error(), "")
		return
	}
	there := func(b bool) string {
		if b {
			return "there"
		}
		return "not there yet"
	}
	seen := fmt.Sprintf("%d indices in use, room for %d persistent keys and %d counters; storage key %s, counter %s",
		s.NVIndices, s.PersistentLeft, s.CountersLeft, there(s.StorageKey), there(s.Counter))
	const remedy = "remove indices and keys of earlier systems, or clear the TPM in the firmware setup (F41)"
	switch {
	case !s.Counter && s.CountersLeft == 0 && e.Policy == seal.PolicyRollbackProof:
		e.add("tpm-space", Bad, seen, remedy)
	case !s.StorageKey && s.PersistentLeft == 0, !s.Counter && s.CountersLeft == 0:
		e.add("tpm-space", Warn, seen, remedy)
	default:
		e.add("tpm-space", OK, seen, "")
	}
}

func (e *examination) bank() {
	if !e.asked("sha256-bank") {
		return
	}
	var names []string
	var have []int
	for _, b := range e.Fitness.Banks {
		names = append(names, fmt.Sprintf("%v with %d registers", b.Alg, len(b.PCRs)))
		if b.Alg == pcr.SHA256 {
			have = b.PCRs
		}
	}
	seen := strings.Join(names, ", ")
	missing := slices.DeleteFunc(slices.Clone(e.bound), func(i int) bool { return slices.Contains(have, i) })
	switch {
	case len(have) == 0:
		e.add("sha256-bank", Bad, "no SHA-256 bank; there is "+orNone(seen), "enable SHA-256 in the firmware setup's TPM page (F28)")
	case len(missing) > 0:
		e.add("sha256-bank", Bad, fmt.Sprintf("%s; PCR %v not in the SHA-256 bank", seen, missing), "update the firmware")
	default:
		e.add("sha256-bank", OK, seen, "")
	}
}

// registers: nothing was ever measured into those (F27). PCR 11 and 12 are the boot
// loader's and not looked at here: another system may have been started.
func (e *examination) registers() {
	if !e.asked("registers") {
		return
	}
	if len(e.Fitness.PCRs) == 0 {
		e.add("registers", Unknown, "no registers to read", "")
		return
	}
	var bound, other []int
	for i := range 8 {
		v, ok := e.Fitness.PCRs[i]
		switch {
		case !ok || !pcr.Unextended(v):
		case slices.Contains(e.bound, i) || i == 7:
			bound = append(bound, i)
		default:
			other = append(other, i)
		}
	}
	const remedy = "enable the measurements (Measured Boot, TPM device) in the firmware setup, or update the firmware"
	switch {
	case len(bound) > 0:
		e.add("registers", Bad, fmt.Sprintf("nothing was measured into PCR %v, which the data would be bound to: whoever starts the box gives it any value", bound), remedy)
	case len(other) > 0:
		e.add("registers", Warn, fmt.Sprintf("nothing was measured into PCR %v; policy %s does not bind it", other, e.Policy), remedy)
	default:
		e.add("registers", OK, "the firmware measures into PCR 0 to 7", "")
	}
}

const logRemedy = "without a log no change of state can be predicted: updates under policy strict or without Secure Boot, and changes of dbx, need the recovery key once"

func (e *examination) eventLog() {
	switch {
	case e.LogError != nil:
		e.add("event-log", Unknown, e.LogError.Error(), logRemedy)
	case e.Log.Class != pcr.CryptoAgile:
		e.add("event-log", Warn, fmt.Sprintf("%v, %d records", e.Log.Class, len(e.Log.Events)), logRemedy)
	case len(e.Log.Notes) > 0:
		e.add("event-log", Warn, fmt.Sprintf("%v, %d records; %s", e.Log.Class, len(e.Log.Events), strings.Join(e.Log.Notes, "; ")), "update the firmware")
	default:
		e.add("event-log", OK, fmt.Sprintf("%v, %d records", e.Log.Class, len(e.Log.Events)), "")
	}
}

// logged says whether there is a log that can be read.
func (e *examination) logged(name string) bool {
	if e.LogError == nil && e.Log.Class == pcr.CryptoAgile {
		return true
	}
	e.add(name, Unknown, "there is no event log that tells", "")
	return false
}

func (e *examination) replay() {
	if !e.logged("log-replay") {
		return
	}
	replayed := e.Log.Replay()
	var right, wrong, boundWrong []int
	for i := range 8 {
		now, read := e.Fitness.PCRs[i]
		switch v, ok := replayed[i]; {
		case !read:
		case ok && v == now || !ok && pcr.Unextended(now):
			right = append(right, i)
		case slices.Contains(e.bound, i):
			boundWrong = append(boundWrong, i)
		default:
			wrong = append(wrong, i)
		}
	}
	switch {
	case len(boundWrong)+len(wrong)+len(right) == 0:
		e.add("log-replay", Unknown, "no registers to compare with", "")
	case len(boundWrong) > 0:
		e.add("log-replay", Bad, fmt.Sprintf("the log does not lead to PCR %v, which the data would be bound to", boundWrong),
			"update the firmware. Innocent: it measures what it does not log. Hostile: somebody changed the log or extended the registers")
	case len(wrong) > 0:
		e.add("log-replay", Warn, fmt.Sprintf("the log leads to PCR %v and not to PCR %v", right, wrong), "policy strict cannot be used where it binds these; update the firmware")
	default:
		e.add("log-replay", OK, fmt.Sprintf("the log leads to PCR %v", right), "")
	}
}

func (e *examination) secureBoot() {
	s := e.SecureBoot
	if s == nil {
		e.add("secure-boot", Unknown, fmt.Sprint(e.SecureBootError), "the data is bound to the loader and the kernel by PCR 4 as long as Secure Boot is not known to be on (F67)")
		return
	}
	seen := fmt.Sprintf("%s (SecureBoot %d, SetupMode %d, AuditMode %d, DeployedMode %d)", s.Mode(), bit(s.On), bit(s.SetupMode), bit(s.AuditMode), bit(s.DeployedMode))
	switch {
	case s.On && (s.SetupMode || s.AuditMode):
		e.add("secure-boot", Bad, seen+": it says that it is on, and enforces nothing", "reset Secure Boot in the firmware setup, or update the firmware (F26)")
	case s.AuditMode:
		e.add("secure-boot", Bad, seen, "leave audit mode in the firmware setup")
	case s.SetupMode:
		e.add("secure-boot", Warn, seen, "fine before an installation that enrols the vendor's keys (secureboot: enroll: force); else enrol them in the firmware setup")
	case !s.On:
		e.add("secure-boot", Warn, seen+": the data is bound to this exact loader and kernel instead", "enrol the vendor's keys and switch Secure Boot on in the firmware setup")
	case len(s.Notes) > 0:
		e.add("secure-boot", Warn, seen+"; "+strings.Join(s.Notes, "; "), "some firmware's factory keys are not well-formed; they are passed over (F25)")
	default:
		e.add("secure-boot", OK, seen, "")
	}
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// databaseHashes: programs that are allowed by their own digest. Each of them is a
// record of its own in PCR 7, and a revocation by certificate does not reach it.
func (e *examination) databaseHashes() {
	if e.SecureBoot == nil {
		e.add("db-hashes", Unknown, "db is not known", "")
		return
	}
	n, all := 0, 0
	for _, l := range e.SecureBoot.Databases[sigdb.DB] {
		all += len(l.Entries)
		if l.Type == sigdb.TypeSHA256() {
			n += len(l.Entries)
		}
	}
	if n > 0 {
		e.add("db-hashes", Warn, fmt.Sprintf("%d of the %d entries of db allow single programs by their digest", n, all),
			"they make PCR 7 depend on which program starts (F13); remove them in the firmware setup")
		return
	}
	e.add("db-hashes", OK, fmt.Sprintf("%d entries in db, none of them a single program", all), "")
}

// minRSABits is what a certificate that lets programs start should have.
const minRSABits = 2048

func (e *examination) algorithms() {
	if e.SecureBoot == nil {
		e.add("weak-algorithms", Unknown, "the firmware's keys are not known", "")
		return
	}
	var weak []string
	count := 0
	for _, name := range []string{sigdb.PK, sigdb.KEK, sigdb.DB} {
		certs, _ := e.SecureBoot.Databases[name].Certificates() // odd ones are in the state's notes
		for _, c := range certs {
			count++
			if why := weakness(c); why != "" {
				weak = append(weak, fmt.Sprintf("%s: %q has %s", name, c.Subject.CommonName, why))
			}
		}
	}
	if len(weak) > 0 {
		e.add("weak-algorithms", Warn, strings.Join(weak, "; "), "who breaks such a key starts what he likes; remove it in the firmware setup")
		return
	}
	e.add("weak-algorithms", OK, fmt.Sprintf("%d certificates, none of them with a short key or an old hash", count), "")
}

// weakness of a certificate; a root's own signature proves nothing and may be old.
func weakness(c *x509.Certificate) string {
	if k, ok := c.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < minRSABits {
		return fmt.Sprintf("an RSA key of %d bits", k.N.BitLen())
	}
	if bytes.Equal(c.RawIssuer, c.RawSubject) {
		return ""
	}
	switch c.SignatureAlgorithm {
	case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.ECDSAWithSHA1:
		return "a signature by " + c.SignatureAlgorithm.String()
	}
	return ""
}

// Texts of actions in PCR 7, which firmware ends with a zero byte or not (edk2; F10).
const (
	dmaDisabled = "DMA Protection Disabled"
	debugMode   = "UEFI Debug Mode"
)

// action says whether PCR 7 has a record with that text. The text is what was hashed,
// whatever its type says.
func (e *examination) action(text string) bool {
	return slices.ContainsFunc(e.Log.Of(7), func(r pcr.Event) bool { return string(bytes.TrimRight(r.Data, "\x00")) == text })
}

func (e *examination) dma() {
	const remedy = "enable VT-d or AMD-Vi and DMA protection in the firmware setup: a plugged-in device reads the keys out of memory otherwise"
	switch {
	case e.action(dmaDisabled):
		e.add("dma-protection", Bad, "the firmware has measured that its protection against DMA is off", remedy+"; switching it on later changes PCR 7 (F10)")
	case e.IOMMUError != nil:
		e.add("dma-protection", Unknown, e.IOMMUError.Error(), remedy)
	case e.IOMMUGroups == 0:
		e.add("dma-protection", Warn, "the kernel uses no IOMMU", remedy)
	default:
		e.add("dma-protection", OK, fmt.Sprintf("%d groups of devices behind an IOMMU", e.IOMMUGroups), "")
	}
}

func (e *examination) debugMode() {
	if !e.logged("firmware-debug") {
		return
	}
	if e.action(debugMode) {
		e.add("firmware-debug", Bad, "the firmware has measured that a debugger may be attached", "switch the firmware's debug mode off")
		return
	}
	e.add("firmware-debug", OK, "not in debug mode", "")
}

// programs are those that the firmware starts by itself before any boot loader (F11):
// before the separator, or out of the firmware.
func (e *examination) programs() {
	if !e.logged("pre-os-programs") {
		return
	}
	var found []string
	before := true
	for _, r := range e.Log.Of(4) {
		switch {
		case r.Type == pcr.EventSeparator:
			before = false
		case r.Type == pcr.EventBootServicesApp && (before || firmwareFile(r.Data) != uuid.Nil):
			found = append(found, r.Describe())
		}
	}
	if len(found) == 0 {
		e.add("pre-os-programs", OK, "none before the boot loader", "")
		return
	}
	v, note := OK, "; policy "+e.Policy+" does not bind PCR 4 here"
	if slices.Contains(e.bound, 4) {
		v, note = Warn, ""
	}
	e.add("pre-os-programs", v, fmt.Sprintf("%d started by the firmware itself: %s%s", len(found), strings.Join(found, "; "), note),
		"their updates change PCR 4, and need the recovery key; switch off in the firmware setup what is not needed (BMC, agents, SysPrep)")
}

func (e *examination) optionROMs() {
	if !e.logged("option-roms") {
		return
	}
	var found []string
	for _, r := range e.Log.Of(2) {
		if r.Type == pcr.EventBootServicesDriver || r.Type == pcr.EventRuntimeServicesDriver {
			found = append(found, r.Describe())
		}
	}
	if len(found) == 0 {
		e.add("option-roms", OK, "no drivers of add-in cards", "")
		return
	}
	v, note := OK, "; policy "+e.Policy+" does not bind PCR 2"
	if slices.Contains(e.bound, 2) {
		v, note = Warn, ""
	}
	e.add("option-roms", v, fmt.Sprintf("%d drivers of add-in cards%s", len(found), note), "another card, or new firmware of one, changes PCR 2 and needs the recovery key (F13)")
}

// The files of Absolute's agent in firmware volumes.
const (
	absoluteInstaller  = "821aca26-29ea-4993-839f-597fc021708d"
	computraceLauncher = "8feeecf1-bcfd-4a78-9231-4801566b3567"
)

// absolute: an agent in the firmware that writes programs into the system that starts,
// which a verified root does not let it (F13).
func (e *examination) absolute() {
	if !e.logged("absolute") {
		return
	}
	for _, r := range e.Log.Events {
		if id := firmwareFile(r.Data).String(); id == absoluteInstaller || id == computraceLauncher {
			e.add("absolute", Warn, fmt.Sprintf("Absolute's agent is started by the firmware (%s, PCR %d)", id, r.PCR), "disable Absolute or Computrace in the firmware setup")
			return
		}
	}
	e.add("absolute", OK, "not started", "")
}

// firmwareFile is the file of a firmware volume that a UEFI_IMAGE_LOAD_EVENT names (PFP
// §10.2.3; PI 1.8 vol. 3 §8.3), or zero.
func firmwareFile(data []byte) uuid.UUID {
	const fixed = 8 + 8 + 8 + 8 // location, length, link time, length of path
	if len(data) < fixed {
		return uuid.Nil
	}
	path := data[fixed:]
	for len(path) >= 4 {
		size := int(binary.LittleEndian.Uint16(path[2:]))
		if size < 4 || size > len(path) {
			break
		}
		if path[0] == 4 && path[1] == 6 && size == 4+16 { // media, PIWG firmware file
			return uuid.UUID(sigdb.FromUUID(uuid.UUID(path[4:size]))) // the byte order is its own inverse
		}
		path = path[size:]
	}
	return uuid.Nil
}

// What the variable store should have free: an update of dbx takes 16 KB, and the kernel
// stops writing below 5 KB (F65).
const (
	wantedVariableBytes = 32 << 10
	leastVariableBytes  = 5 << 10
)

func (e *examination) variables() {
	seen := fmt.Sprintf("%d KB free", e.VariableBytes>>10)
	if e.CrashDumps > 0 {
		seen += fmt.Sprintf(", %d variables are crash dumps of a kernel", e.CrashDumps)
	}
	const remedy = "delete the variables dump-type… (efi_pstore.pstore_disable=1 keeps them away), or restore the defaults in the firmware setup"
	switch {
	case e.VariableError != nil:
		e.add("variable-space", Unknown, e.VariableError.Error(), "")
	case e.VariableBytes < 0 && e.CrashDumps == 0:
		e.add("variable-space", Unknown, "the firmware or the kernel does not say", "")
	case e.VariableBytes >= 0 && e.VariableBytes < leastVariableBytes:
		e.add("variable-space", Bad, seen, remedy)
	case e.CrashDumps > 0, e.VariableBytes < wantedVariableBytes:
		e.add("variable-space", Warn, seen, remedy)
	default:
		e.add("variable-space", OK, seen, "")
	}
}

func (e *examination) esp() {
	switch {
	case e.DiskError != nil:
		e.add("esp", Warn, fmt.Sprintf("disk %s: %v", e.Disk, e.DiskError), "the next update repairs what it can; else write the image again")
	case e.Disk == "":
		e.add("esp", Unknown, "no Holdfast disk is in this box", "")
	case e.ESPBytes < e.LargestBytes:
		e.add("esp", Bad, fmt.Sprintf("disk %s: %d MB free on the ESP, the largest kernel image has %d MB", e.Disk, e.ESPBytes>>20, e.LargestBytes>>20),
			"no update fits (F68); delete what does not belong there")
	default:
		e.add("esp", OK, fmt.Sprintf("disk %s: %d MB free on the ESP, the largest kernel image has %d MB", e.Disk, e.ESPBytes>>20, e.LargestBytes>>20), "")
	}
}

// clockSpan is how long after a build a clock is believed.
const clockSpan = 20 * 365 * 24 * time.Hour

func (e *examination) clock() {
	seen := e.Now.UTC().Format(time.RFC3339)
	if !e.RTC {
		seen += ", without a clock that runs while the box is off"
	}
	const remedy = "set the clock in the firmware setup, and replace its battery if it goes wrong again; the agent goes on from the release's build time (F89)"
	switch {
	case e.Now.Before(e.NotBefore):
		e.add("clock", Warn, seen+", before "+e.NotBefore.UTC().Format(time.RFC3339), remedy)
	case !e.NotBefore.IsZero() && e.Now.After(e.NotBefore.Add(clockSpan)):
		e.add("clock", Warn, seen+", long after "+e.NotBefore.UTC().Format(time.RFC3339), remedy)
	case !e.RTC:
		e.add("clock", Warn, seen, "give the box a time server")
	default:
		e.add("clock", OK, seen, "")
	}
}

func (e *examination) vm() {
	if e.VM != "" {
		e.add("virtual-machine", Warn, "a virtual machine: "+e.VM, "who runs the host reads its memory; a snapshot or a copy takes the TPM along, counters and all, so nothing is rollback-proof here")
		return
	}
	e.add("virtual-machine", OK, "none is seen", "")
}

func (e *examination) watchdog() {
	real := slices.DeleteFunc(slices.Clone(e.Watchdogs), func(name string) bool { return strings.Contains(strings.ToLower(name), "software") })
	switch {
	case len(e.Watchdogs) == 0:
		e.add("watchdog", Warn, "none", "a release that hangs is not left by itself; enable the watchdog in the firmware setup, or add its driver, or softdog, to kernel.modules")
	case len(real) == 0:
		e.add("watchdog", Warn, strings.Join(e.Watchdogs, ", "), "it is the kernel's own, and hangs with it; add the driver of the hardware's to kernel.modules")
	default:
		e.add("watchdog", OK, strings.Join(real, ", "), "")
	}
}
