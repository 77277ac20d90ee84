package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// loggedRegisters are those that the firmware's log must lead to. PCR 15 is the
// system's own: see [verification.volumes].
func loggedRegisters() []int { return []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14} }

// readLog replays the log, and what the box measured itself, against the registers.
func (w *verification) readLog() {
	w.explained = map[int]bool{}
	log, err := pcr.ParseLog(w.a.EventLog)
	if err != nil {
		w.unknown(CheckLog, "the event log: %v", err)
		return
	}
	w.log = log
	switch {
	case w.values == nil:
		w.unknown(CheckLog, "there are no registers to compare with")
		return
	case log.Class != pcr.CryptoAgile:
		w.unknown(CheckLog, "the event log is %v: it tells nothing about the registers quoted", log.Class)
		return
	}
	replayed := log.Replay()
	var wrong, unclear []int
	for _, i := range loggedRegisters() {
		events := log.Of(i)
		v, ok := replayed[i]
		switch {
		case len(events) > 0 && !ok:
			unclear = append(unclear, i) // an event without a SHA-256 digest
		case w.leadsTo(i, v):
			w.explained[i] = true
		default:
			wrong = append(wrong, i)
		}
	}
	notes := ""
	if len(log.Notes) > 0 {
		notes = " (" + strings.Join(log.Notes, "; ") + ")"
	}
	switch {
	case len(wrong) > 0:
		i := wrong[0]
		w.fail(CheckLog, fmt.Sprintf("the log does not lead to PCR %v%s", wrong, notes), w.suspect(i, replayed[i]),
			"Innocent: firmware that measures what it does not log (F14). Hostile: the log was changed to hide what was started.")
	case len(unclear) > 0:
		w.unknown(CheckLog, "PCR %v: the log has records without a SHA-256 digest%s", unclear, notes)
	default:
		w.pass(CheckLog, "%d records lead to the registers%s", len(log.Events), notes)
	}
}

// leadsTo says whether a value from the log is the register's, or becomes it by what the
// system measured since: what the box tells of, and the phases of a boot. In a register
// of the firmware's the log alone counts: whatever was started could tell of itself in
// the statement instead, where nobody looks for it.
func (w *verification) leadsTo(index int, v pcr.Digest) bool {
	want := w.values[index]
	if v == want {
		return true
	}
	if !slices.Contains(ownRegisters(), index) {
		return false
	}
	own := v
	if w.a.Statement != nil {
		for _, m := range w.a.Statement.Measurements {
			if m.PCR == index {
				own = pcr.ExtendDigest(own, m.digest())
			}
		}
	}
	if own == want {
		return true
	}
	_, ok := phaseOf(v, want)
	return index == 11 && ok
}

// phaseOf says after how many boot phases a register that began as stub holds value.
func phaseOf(stub, value pcr.Digest) (phases int, ok bool) {
	for n := 0; ; n++ {
		if stub == value {
			return n, true
		}
		if n == len(pcr.Phases()) {
			return 0, false
		}
		stub = pcr.Extend(stub, []byte(pcr.Phases()[n]))
	}
}

// maxSuspects bounds the search for the record that makes the difference.
const maxSuspects = 64

// suspect names the record without which the log would fit, if it is only one.
func (w *verification) suspect(index int, replayed pcr.Digest) string {
	events, want := w.log.Of(index), w.values[index]
	text := fmt.Sprintf("PCR %s: %d records lead to %x…, the TPM has %x…", pcr.Label(index), len(events), replayed[:4], want[:4])
	if len(events) > maxSuspects {
		return text
	}
	for skip := range events {
		var v pcr.Digest
		for i, e := range events {
			if d, _ := e.SHA256(); i != skip {
				v = pcr.ExtendDigest(v, d)
			}
			if i >= skip && v == want {
				return text + "; it would fit without the records from this one on: " + e.Describe()
			}
		}
		if v == want {
			return text + "; it would fit without " + events[skip].Describe()
		}
	}
	return text
}

// kernel finds the release whose PCR 11 the box has.
func (w *verification) kernel() {
	w.reference = w.claimed()
	if w.values == nil {
		w.unknown(CheckKernel, "there are no registers")
		return
	}
	if len(w.p.References) == 0 {
		w.unknown(CheckKernel, "no release is given to compare with")
		return
	}
	for i := range w.p.References {
		r := &w.p.References[i]
		n, ok := phaseOf(r.Boot.PCR11, w.values[11])
		if !ok || r.Boot.PCR11 == (pcr.Digest{}) {
			continue
		}
		w.reference, w.matched, w.verdict.Release = r, true, strings.TrimSpace(r.Product+" "+r.Version)
		if n < 2 {
			w.fail(CheckKernel, fmt.Sprintf("the kernel image of %s, still in its initrd", w.verdict.Release), "boot phase",
				"The box did not close its TPM behind the initrd: whoever controls it can have the disk's key.")
			return
		}
		w.pass(CheckKernel, "the kernel image of %s, in phase %s", w.verdict.Release, pcr.Phases()[n-1])
		return
	}
	var names []string
	for _, r := range w.p.References {
		names = append(names, r.Version)
	}
	value := w.values[11]
	w.fail(CheckKernel, fmt.Sprintf("PCR 11 holds %x…, which is none of %s", value[:4], strings.Join(names, ", ")), w.differingSection(),
		"Innocent: a release that is not among those given. Hostile: another kernel, initrd or command line was started.")
}

// claimed is the release that the box says it runs, or the only one there is.
func (w *verification) claimed() *Reference {
	for i := range w.p.References {
		r := &w.p.References[i]
		if s := w.a.Statement; s != nil && s.Product == r.Product && s.Release == r.Version {
			return r
		}
	}
	if len(w.p.References) == 1 {
		return &w.p.References[0]
	}
	return nil
}

// differingSection is the first section of the kernel image that is not the release's:
// the stub measures each as its name and its content. UAPI.5.
func (w *verification) differingSection() string {
	if w.reference == nil || len(w.reference.Sections) == 0 || !w.explained[11] {
		return "PCR " + pcr.Label(11)
	}
	events := w.log.Of(11)
	for i, s := range w.reference.Sections {
		for j, want := range []pcr.Digest{sha256.Sum256(append([]byte(s.Name), 0)), s.SHA256} {
			at := 2*i + j
			if at >= len(events) {
				return fmt.Sprintf("section %s of the kernel image is missing", s.Name)
			}
			if got, _ := events[at].SHA256(); got != want {
				return fmt.Sprintf("section %s of the kernel image: it has %x…, release %s has %x…", s.Name, got[:4], w.reference.Version, want[:4])
			}
		}
	}
	if len(events) > 2*len(w.reference.Sections) {
		return "one more section or measurement: " + events[2*len(w.reference.Sections)].Describe()
	}
	return "what was measured into PCR 11 behind the kernel image"
}

func isProgram(e pcr.Event) bool {
	switch e.Type {
	case pcr.EventBootServicesApp, pcr.EventBootServicesDriver, pcr.EventRuntimeServicesDriver:
		return true
	}
	return false
}

// isMarker says whether a record that claims not to be a program is none: the type is
// not measured, and a program's digest could stand behind any. Short printable text with
// the digest is not what an EFI program begins with.
func isMarker(e pcr.Event) bool {
	if !e.Trusted() {
		return false
	}
	text := strings.TrimRight(string(e.Data), "\x00")
	return e.Type == pcr.EventSeparator && len(e.Data) == 4 ||
		(e.Type == pcr.EventEFIAction || e.Type == pcr.EventAction) && text != "" && checkText(text) == nil
}

// loader judges the programs in PCR 4: the release's boot loader, its kernel image, with
// Secure Boot off the kernel inside it, and before them only what is allowed. The paths
// in the records are not measured and prove nothing; the digests do.
func (w *verification) loader() {
	r := w.reference
	switch {
	case r == nil:
		w.unknown(CheckLoader, "it is not known which release to compare with")
		return
	case r.Boot.Loader.Authenticode == (pcr.Digest{}) || r.Boot.UKI.Authenticode == (pcr.Digest{}):
		w.unknown(CheckLoader, "the release's reference values do not have its programs")
		return
	case !w.explained[4]:
		w.unknown(CheckLoader, "the log does not lead to PCR 4")
		return
	}
	const hostile = "Innocent: another loader was tried first, as a firmware's setup or network boot. Hostile: somebody else's program was started."
	seenLoader, seenUKI := false, false
	var strangers []string
	for _, e := range w.log.Of(4) {
		if !isProgram(e) {
			if !isMarker(e) {
				strangers = append(strangers, e.Describe())
			}
			continue
		}
		d, _ := e.SHA256()
		switch {
		case d == r.Boot.Loader.Authenticode:
			seenLoader = true
		case d == r.Boot.UKI.Authenticode && seenLoader:
			seenUKI = true
		case d == r.Boot.Linux && seenUKI && d != (pcr.Digest{}):
		case seenLoader:
			w.fail(CheckLoader, "a program that is not the release's was started behind the boot loader", fmt.Sprintf("%s, %x…", e.Describe(), d[:4]), hostile)
			return
		case !slices.Contains(w.p.Programs, d):
			strangers = append(strangers, fmt.Sprintf("%s, %x…", e.Describe(), d[:4]))
		}
	}
	switch {
	case !seenLoader:
		w.fail(CheckLoader, "release "+r.Version+"'s boot loader was not started; there are "+orNone(strangers), "program in PCR 4", hostile)
	case !seenUKI:
		w.fail(CheckLoader, "release "+r.Version+"'s kernel image was not started", "program in PCR 4", hostile)
	case len(strangers) > 0:
		w.unknown(CheckLoader, "PCR 4 has what is not the release's: %s; where it is a program that belongs to the firmware, allow its digest", strings.Join(strangers, "; "))
	default:
		w.pass(CheckLoader, "the boot loader and the kernel image of %s", r.Version)
	}
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, "; ")
}

// extras judges what can be added to a boot from outside its kernel image.
func (w *verification) extras() {
	if w.values == nil {
		w.unknown(CheckExtras, "there are no registers")
		return
	}
	want := map[int]pcr.Digest{8: {}, 12: {}, 13: {}, 14: {}}
	if w.reference != nil {
		want[12] = w.reference.Boot.PCR12
	}
	for _, i := range []int{8, 12, 13, 14} {
		if w.values[i] == want[i] {
			continue
		}
		event := "PCR " + pcr.Label(i)
		if events := w.log.Of(i); len(events) > 0 && w.explained[i] {
			event = fmt.Sprintf("PCR %d: %s", i, events[len(events)-1].Describe())
		}
		w.fail(CheckExtras, fmt.Sprintf("PCR %d is not what the release alone gives", i), event,
			"A kernel command line, credentials, system extensions or keys came from outside the release.")
		return
	}
	w.pass(CheckExtras, "nothing was added from outside the kernel image")
}

// firmware compares PCR 0 and 2 with the record.
func (w *verification) firmware() {
	known := w.p.Known
	if known == nil || w.values == nil {
		w.unknown(CheckFirmware, "there is nothing recorded, or no register, to compare")
		return
	}
	for _, i := range []int{0, 2} {
		value := w.values[i]
		if hex.EncodeToString(value[:]) == known.Registers[i] {
			continue
		}
		w.fail(CheckFirmware, fmt.Sprintf("PCR %s is not as recorded on %s", pcr.Label(i), known.Last.Format(timeForm)), w.changedEvent(i),
			"Innocent: a firmware update, or an add-in card was changed. Hostile: the firmware was replaced. If it is in order, remove the record and make first contact again.")
		return
	}
	w.pass(CheckFirmware, "as recorded on %s", known.Last.Format(timeForm))
}

// changedEvent is the first record that is not the recorded one.
func (w *verification) changedEvent(index int) string {
	if !w.explained[index] {
		return "PCR " + pcr.Label(index)
	}
	var before []RecordedEvent
	for _, e := range w.p.Known.Firmware {
		if e.PCR == index {
			before = append(before, e)
		}
	}
	now := w.log.Of(index)
	for n, e := range now {
		d, _ := e.SHA256()
		if n >= len(before) {
			return fmt.Sprintf("PCR %d, record %d is new: %s", index, n+1, e.Describe())
		}
		if hex.EncodeToString(d[:]) != before[n].SHA256 {
			return fmt.Sprintf("PCR %d, record %d: %s, was %s", index, n+1, e.Describe(), before[n].Text)
		}
	}
	if len(now) < len(before) {
		return fmt.Sprintf("PCR %d, record %d is gone: %s", index, len(now)+1, before[len(now)].Text)
	}
	return fmt.Sprintf("PCR %d began with another value", index)
}

// volumes compares PCR 15, into which the box measures the data volumes by their keys.
func (w *verification) volumes() {
	known := w.p.Known
	value, ok := w.values[15]
	switch {
	case !ok:
		w.unknown(CheckVolumes, "there are no registers")
	case known == nil:
		w.unknown(CheckVolumes, "nothing is recorded to compare with")
	case hex.EncodeToString(value[:]) == known.Registers[15]:
		w.pass(CheckVolumes, "the data volumes of %s", known.Last.Format(timeForm))
	default:
		w.fail(CheckVolumes, "the data volumes are not the recorded ones, or were not opened as then", "PCR "+pcr.Label(15),
			"Innocent: the recovery key was used, or the data was erased and made anew. Hostile: the disk was replaced.")
	}
}

// clock wants the TPM's counters to have gone forwards.
func (w *verification) clock() {
	known, q := w.p.Known, w.quote
	switch {
	case known == nil || q == nil:
		w.unknown(CheckClock, "nothing is recorded to compare with")
	case q.ResetCount < known.ResetCount:
		w.fail(CheckClock, fmt.Sprintf("the TPM was reset %d times, and on %s it had been %d", q.ResetCount, known.Last.Format(timeForm), known.ResetCount), "reset count in the quote",
			"Innocent: the TPM was cleared, which sets it to 0. Hostile: an answer from before is replayed, or a virtual TPM was set back.")
	case q.ResetCount == known.ResetCount && q.ClockMs < known.ClockMs:
		w.fail(CheckClock, "the TPM's clock is behind that of "+known.Last.Format(timeForm), "clock in the quote",
			"An answer from before is replayed, or a virtual TPM was set back.")
	default:
		w.pass(CheckClock, "%d resets since then", q.ResetCount-known.ResetCount)
	}
}

// identity compares what the box says with what was measured, recorded and released.
func (w *verification) identity() {
	s, known := w.a.Statement, w.p.Known
	if s == nil {
		w.unknown(CheckIdentity, "the box makes no statement")
		return
	}
	differs := func(field, says, is string) bool {
		if says == is {
			return false
		}
		w.fail(CheckIdentity, fmt.Sprintf("it says %s %q, and it is %q", field, says, is), field,
			"Innocent: a mistake in the agent. Hostile: a release that is broken into says what it is told to.")
		return true
	}
	if known != nil && (differs("box", s.Box, known.Box) || differs("product", s.Product, known.Product)) {
		return
	}
	r := w.reference
	if r == nil || !w.matched {
		w.unknown(CheckIdentity, "without an approved release there is nothing to compare the statement with")
		return
	}
	if differs("product", s.Product, r.Product) || differs("release", s.Release, r.Version) {
		return
	}
	for _, slot := range s.Slots {
		if slot.Running && r.RootHash != "" && differs("root hash of the running slot", slot.RootHash, r.RootHash) {
			return
		}
	}
	if name, says, is, ok := differingService(s.Services, r.Services); !ok {
		differs("service "+name, says, is)
		return
	}
	w.pass(CheckIdentity, "%s, release %s, %d volumes, %d services", w.a.Device(), s.Release, len(s.Volumes), len(s.Services))
}

// differingService compares the services with those of the release; nil is not compared.
func differingService(said []Service, want map[string]string) (name, says, is string, ok bool) {
	if want == nil {
		return "", "", "", true
	}
	for _, s := range said {
		if want[s.Name] != s.Digest {
			return s.Name, s.Digest, want[s.Name], false
		}
	}
	if len(said) != len(want) {
		return "", fmt.Sprintf("%d services", len(said)), fmt.Sprintf("%d services", len(want)), false
	}
	return "", "", "", true
}
