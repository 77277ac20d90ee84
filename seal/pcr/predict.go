package pcr

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Program is an EFI program by what the firmware measures when it starts it.
type Program struct {
	// Authenticode is the program's SHA-256 Authenticode digest, which goes into PCR 4.
	Authenticode Digest
	// Certificate is the SHA-256 digest of the DER certificate in db that verifies
	// the program. With Secure Boot on its entry in db goes into PCR 7. Zero where
	// it is not known.
	Certificate Digest
}

// Release is what starts in a boot: reference values, as a release's manifest has
// them.
type Release struct {
	Loader, UKI Program
	// Linux is the Authenticode digest of the kernel inside the UKI. With Secure
	// Boot off, systemd's stub has the firmware start it, and so measure it; with
	// Secure Boot on it does not.
	Linux Digest
	// PCR11 is the register after the stub, before the first boot phase.
	PCR11 Digest
	// PCR12 is what command lines, credentials and add-ons from outside the UKI give:
	// zero, as long as there are none. Where there are and shall be, put the present
	// value here, in both releases.
	PCR12 Digest
}

// Change is what the next boot will find that the present one did not.
type Change struct {
	// Running is what started in the present boot, whose log it is. By its digests
	// alone, not by their paths, the log's records are recognised.
	Running Release
	// Next is what starts in the next boot: Running again, when only firmware
	// variables change.
	Next Release
	// Variables are the whole new contents, without attributes, of "PK", "KEK",
	// "db" and "dbx". Those not named stay as the present boot found them; so name
	// all that can be read, and what another program has changed since counts too
	// (F1). A variable that does not exist is empty. See [VariableAfter].
	Variables map[string][]byte
}

// Prediction is what the registers will hold when the next boot is in its initrd,
// in phase "enter-initrd". Every register of [Predictable] is in exactly one of the two.
type Prediction struct {
	Values map[int]Digest
	// Unpredictable says, in a sentence for people, why there is no value.
	Unpredictable map[int]string
}

// UnpredictableError says that a register that is needed cannot be predicted.
type UnpredictableError struct {
	PCR    int
	Reason string
}

func (e *UnpredictableError) Error() string {
	return fmt.Sprintf("predict PCR %d: %s", e.PCR, e.Reason)
}

// Of are the values of these registers, all of them: a policy over fewer registers
// than were asked for is a weaker one (F15). The error is an [*UnpredictableError]
// for the first register that has no value.
func (p Prediction) Of(pcrs ...int) (map[int]Digest, error) {
	sorted, err := Sorted(pcrs)
	if err != nil {
		return nil, err
	}
	if len(sorted) == 0 {
		return nil, errors.New("prediction of no PCR")
	}
	values := map[int]Digest{}
	for _, i := range sorted {
		v, ok := p.Values[i]
		if !ok {
			reason := p.Unpredictable[i]
			if reason == "" {
				reason = "what goes into it is not known"
			}
			return nil, &UnpredictableError{i, reason}
		}
		values[i] = v
	}
	return values, nil
}

// Predictable are the registers that [Predict] deals with.
func Predictable() []int { return []int{0, 2, 4, 7, 11, 12} }

// Phases are what systemd and Holdfast extend into PCR 11 one after the other;
// systemd 252, systemd-pcrphase.service(8).
func Phases() []string {
	return []string{"enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"}
}

// Predict computes the registers of the next boot from the log of the present one,
// which it changes as the firmware would, and replays. now are the registers of the
// present boot, read from the TPM.
//
// A register is predicted only where the log, unchanged, leads to its present value
// (F14), and where every record the change touches was found and understood. What it
// does not understand and what does not change is carried forward: unknown programs (F11),
// actions, drivers, separators of any form. One
// register without a value does not spoil the others.
//
// PCR 11 needs no log; there the present value must be one that Running gives. So must
// that of PCR 12: otherwise what somebody typed into the boot menu today would be
// expected tomorrow.
//
// It cannot know what nobody told it: a firmware update, another boot order, new
// hardware, Secure Boot switched on or off.
func Predict(log Log, now map[int]Digest, change Change) Prediction {
	p := Prediction{Values: map[int]Digest{}, Unpredictable: map[int]string{}}
	w := prediction{log: log, now: now, change: change}
	for _, i := range Predictable() {
		v, err := w.register(i)
		if err != nil {
			p.Unpredictable[i] = err.Error()
			continue
		}
		p.Values[i] = v
	}
	return p
}

// prediction is one call of [Predict].
type prediction struct {
	log    Log
	now    map[int]Digest
	change Change
}

func (w *prediction) register(index int) (Digest, error) {
	now, ok := w.now[index]
	if !ok {
		return Digest{}, errors.New("its present value was not read")
	}
	if index == 11 {
		return w.pcr11(now)
	}
	if err := w.explains(index, now); err != nil {
		return Digest{}, err
	}
	var err error
	events := w.log.Of(index)
	switch index {
	case 4:
		events, err = w.programs(events)
	case 7:
		events, err = w.secureBoot(events)
	case 12:
		return w.pcr12(now)
	default:
		return now, nil
	}
	if err != nil {
		return Digest{}, err
	}
	return fold(events), nil
}

// explains returns nil when the log leads to the register's present value.
func (w *prediction) explains(index int, now Digest) error {
	wrong := func(format string, args ...any) error {
		text := fmt.Sprintf(format, args...)
		if len(w.log.Notes) > 0 {
			text += " (" + strings.Join(w.log.Notes, "; ") + ")"
		}
		return fmt.Errorf("the log does not lead to the present value of PCR %d: %s", index, text)
	}
	events := w.log.Of(index)
	switch w.log.Class {
	case Empty:
		return wrong("the firmware left no log")
	case SHA1Only:
		return wrong("it holds SHA-1 digests only")
	}
	if len(events) == 0 {
		// What nothing is measured into is zero, and only a register of the boot
		// loader may be (F27).
		if now == (Digest{}) && index == 12 {
			return nil
		}
		return wrong("no record measures into the register")
	}
	replayed, ok := w.log.Replay()[index]
	if !ok {
		return wrong("a record that measures into the register has no SHA-256 digest")
	}
	if replayed != now {
		return wrong("%d records give %x…, it holds %x…", len(events), replayed[:4], now[:4])
	}
	return nil
}

func (w *prediction) pcr11(now Digest) (Digest, error) {
	v := w.change.Running.PCR11
	if v == (Digest{}) || w.change.Next.PCR11 == (Digest{}) {
		return Digest{}, errors.New("what the kernel image measures is not known")
	}
	found := v == now
	for _, phase := range Phases() {
		v = Extend(v, []byte(phase))
		found = found || v == now
	}
	if !found {
		return Digest{}, fmt.Errorf("PCR 11 holds %x…, which the running release gives in no boot phase", now[:4])
	}
	return Extend(w.change.Next.PCR11, []byte(Phases()[0])), nil
}

func (w *prediction) pcr12(now Digest) (Digest, error) {
	if now != w.change.Running.PCR12 {
		return Digest{}, fmt.Errorf("PCR 12 holds %x… and not what the running release gives: a command line, credentials or add-ons came from outside the kernel image", now[:4])
	}
	return w.change.Next.PCR12, nil
}

// fold extends the events' digests one after the other. All have one: the log they
// come from leads to the present value.
func fold(events []Event) (v Digest) {
	for _, e := range events {
		d, _ := e.SHA256()
		v = ExtendDigest(v, d)
	}
	return v
}

// measured is e with another digest.
func measured(e Event, d Digest) Event {
	e.Digests = []TaggedDigest{{SHA256, d[:]}}
	return e
}

// isProgram says whether e is an image that was started.
func isProgram(e Event) bool {
	switch e.Type {
	case EventBootServicesApp, EventBootServicesDriver, EventRuntimeServicesDriver:
		return true
	}
	return false
}

// programs puts the next release's programs in the place of the running one's in
// the records of PCR 4. What else was started, before or behind, stays.
func (w *prediction) programs(events []Event) ([]Event, error) {
	running, next := w.change.Running, w.change.Next
	for _, d := range []Digest{running.Loader.Authenticode, running.UKI.Authenticode, next.Loader.Authenticode, next.UKI.Authenticode} {
		if d == (Digest{}) {
			return nil, errors.New("the digests of the boot loader and the kernel image, now and next, are not all known")
		}
	}
	is := func(d Digest) func(Event) bool {
		return func(e Event) bool {
			got, _ := e.SHA256()
			return isProgram(e) && got == d && d != (Digest{})
		}
	}
	isLoader, isUKI, isLinux := is(running.Loader.Authenticode), is(running.UKI.Authenticode), is(running.Linux)
	started := slices.IndexFunc(events, isLoader)
	if started < 0 {
		return nil, errors.New("the log has no record of the running release's boot loader: " + programsIn(events))
	}
	ukiAt := slices.IndexFunc(events[started:], isUKI)
	if ukiAt < 0 {
		return nil, errors.New("the log has no record of the running release's kernel image after its boot loader: " + programsIn(events))
	}
	ukiAt += started
	for i := started; i < len(events); i++ {
		switch e := events[i]; {
		case !isProgram(e):
		case isLoader(e):
			events[i] = measured(e, next.Loader.Authenticode)
		case isUKI(e) && i >= ukiAt:
			events[i] = measured(e, next.UKI.Authenticode)
		case isLinux(e) && i > ukiAt:
			if next.Linux == (Digest{}) {
				return nil, errors.New("the kernel inside the kernel image is measured, and the next one's digest is not known")
			}
			events[i] = measured(e, next.Linux)
		case i > ukiAt && running.Linux == (Digest{}):
			return nil, fmt.Errorf("a program that started after the kernel image may be the kernel inside, whose digest is not known: %s", e.Describe())
		}
	}
	return events, nil
}

// programsIn lists what the log says was started.
func programsIn(events []Event) string {
	var list []string
	for _, e := range events {
		if isProgram(e) {
			d, _ := e.SHA256()
			list = append(list, fmt.Sprintf("%s, %x…", e.Describe(), d[:4]))
		}
	}
	if len(list) == 0 {
		return "it shows no program"
	}
	return "it shows " + strings.Join(list, "; ")
}
