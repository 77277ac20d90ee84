package pcr

import "slices"

// What the firmware measures into PCR 4 around each boot option that it tries
// (PFP §10.4.4).
const (
	callingAction   = "Calling EFI Application from Boot Option"
	returningAction = "Returning from EFI Application from Boot Option"
)

// Retried says that a boot option came back and the firmware went on with another.
func (l Log) Retried() bool {
	return slices.ContainsFunc(l.Of(4), isReturn)
}

func isReturn(e Event) bool { return e.Type == EventEFIAction && string(e.Data) == returningAction }

func isCall(e Event) bool { return e.Type == EventEFIAction && string(e.Data) == callingAction }

// LedTo are the programs, by their Authenticode digests, that the boot option started which
// led to this one, which is the last of them; none where the log does not show it. Where
// the firmware does not measure its calls they are all that were started.
func (l Log) LedTo(program Digest) (list []Digest) {
	events := l.Of(4)
	for i := len(events) - 1; i >= 0; i-- {
		switch e := events[i]; {
		case len(list) > 0 && isCall(e):
			return list
		case len(list) > 0 && e.Type == EventBootServicesApp, starts(program)(e):
			d, _ := e.SHA256()
			list = slices.Insert(list, 0, d)
		}
	}
	return list
}

// WithoutRetry is the log of the same boot if the boot option tried right before the one
// that started the program, by its Authenticode digest, had not been there: one that the
// firmware refused, or that came back. ok is false where the log shows none.
//
// It leaves out what PCR 4 has of that option: the programs it started, the return from
// it, and the call of the next. What EDK2 measures elsewhere, it measures at the first
// option only.
func (l Log) WithoutRetry(program Digest) (without Log, ok bool) {
	at := func(before int, is func(Event) bool) int {
		for i := before - 1; i >= 0; i-- {
			if e := l.Events[i]; e.PCR == 4 && is(e) {
				return i
			}
		}
		return -1
	}
	started := at(len(l.Events), starts(program))
	called := at(started, isCall)
	returned := at(called, isReturn)
	tried := at(returned, isCall)
	if started < 0 || called < 0 || returned < 0 || tried < 0 {
		return l, false
	}
	without = l
	without.Events = slices.Clone(l.Events[:tried+1])
	for i := tried + 1; i < len(l.Events); i++ {
		e := l.Events[i]
		if i == called || i == returned || i < called && e.PCR == 4 && isProgram(e) {
			continue
		}
		without.Events = append(without.Events, e)
	}
	return without, true
}

func starts(program Digest) func(Event) bool {
	return func(e Event) bool {
		d, _ := e.SHA256()
		return e.PCR == 4 && e.Type == EventBootServicesApp && d == program
	}
}

// StartedBy is the log of the same boot if the firmware had not started the program
// itself, but the loader, and that the program; both by their Authenticode digests. ok is
// false where the log does not show the program.
func (l Log) StartedBy(program, loader Digest) (with Log, ok bool) {
	for i := len(l.Events) - 1; i >= 0; i-- {
		if e := l.Events[i]; starts(program)(e) {
			e = measured(Event{PCR: e.PCR, Type: e.Type}, loader)
			with = l
			with.Events = slices.Insert(slices.Clone(l.Events), i, e)
			return with, true
		}
	}
	return l, false
}
