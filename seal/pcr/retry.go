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
	return slices.ContainsFunc(l.Of(4), func(e Event) bool {
		return e.Type == EventEFIAction && string(e.Data) == returningAction
	})
}

// WithoutRetry is the log of the same boot if the boot option tried right before the one
// that started the program loader, by its Authenticode digest, had not been there: one
// that the firmware refused, or that came back. ok is false where the log shows none.
//
// It leaves out what PCR 4 has of that option: the programs it started, the return from
// it, and the call of the next. What EDK2 measures elsewhere, it measures at the first
// option only.
func (l Log) WithoutRetry(loader Digest) (without Log, ok bool) {
	at := func(before int, is func(Event) bool) int {
		for i := before - 1; i >= 0; i-- {
			if e := l.Events[i]; e.PCR == 4 && is(e) {
				return i
			}
		}
		return -1
	}
	action := func(text string) func(Event) bool {
		return func(e Event) bool {
			return e.Type == EventEFIAction && string(e.Data) == text
		}
	}
	started := at(len(l.Events), func(e Event) bool {
		d, _ := e.SHA256()
		return e.Type == EventBootServicesApp && d == loader
	})
	called := at(started, action(callingAction))
	returned := at(called, action(returningAction))
	tried := at(returned, action(callingAction))
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
