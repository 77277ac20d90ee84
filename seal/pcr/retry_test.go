package pcr

import (
	"crypto/sha256"
	"slices"
	"strings"
	"testing"
)

// attempts is a log of boot options, one after the other, each a list of programs; what
// the firmware measures at the first one only is among it.
func attempts(options ...[]string) (l Log) {
	l.Class = CryptoAgile
	add := func(pcr uint32, kind EventType, text string) {
		d := sha256.Sum256([]byte(text))
		l.Events = append(l.Events, Event{PCR: pcr, Type: kind, Digests: []TaggedDigest{{SHA256, d[:]}}, Data: []byte(text)})
	}
	add(0, EventSCRTMVersion, "firmware")
	for i, programs := range options {
		if i > 0 {
			add(4, EventEFIAction, returningAction)
		}
		add(4, EventEFIAction, callingAction)
		if i == 0 {
			add(4, EventSeparator, "\x00\x00\x00\x00")
			add(7, EventSeparator, "\x00\x00\x00\x00")
		}
		for _, p := range programs {
			add(7, EventVariableAuthority, "authority of "+p)
			add(4, EventBootServicesApp, p)
		}
	}
	add(5, EventEFIAction, "Exit Boot Services Invocation")
	return l
}

func namesOf(l Log) string {
	var list []string
	for _, e := range l.Of(4) {
		list = append(list, strings.SplitN(string(e.Data), " ", 2)[0])
	}
	return strings.Join(list, " ")
}

func TestWithoutRetry(t *testing.T) {
	const sep = "\x00\x00\x00\x00"
	none := []string(nil)
	ours := []string{"loader", "uki"}
	for name, c := range map[string]struct {
		log  Log
		want string // "": there is none
	}{
		"one attempt":             {attempts(ours), ""},
		"refused, then ours":      {attempts(none, ours), "Calling " + sep + " loader uki"},
		"network, refused, ours":  {attempts(none, none, ours), "Calling " + sep + " Returning Calling loader uki"},
		"one that started":        {attempts([]string{"foreign"}, ours), "Calling " + sep + " loader uki"},
		"ours, and it came back":  {attempts(ours, ours), "Calling " + sep + " loader uki"},
		"a later one":             {attempts(ours, none), ""},
		"another loader":          {attempts(none, []string{"other", "uki"}), ""},
		"no programs at all":      {attempts(none, none), ""},
		"a log without an action": {Log{Class: CryptoAgile, Events: attempts(ours).Of(4)[1:]}, ""},
	} {
		before := namesOf(c.log)
		got, ok := c.log.WithoutRetry(sha256.Sum256([]byte("loader")))
		if ok != (c.want != "") || ok && namesOf(got) != c.want || namesOf(c.log) != before {
			t.Errorf("%s: %v, %q; want %q", name, ok, namesOf(got), c.want)
		}
		if want := strings.Contains(before, "Returning"); c.log.Retried() != want {
			t.Errorf("%s: retried %v", name, !want)
		}
	}
	direct := attempts(none, none, []string{"uki"})
	for range 2 {
		direct, _ = direct.WithoutRetry(sha256.Sum256([]byte("uki")))
	}
	with, ok := direct.StartedBy(sha256.Sum256([]byte("uki")), sha256.Sum256([]byte("loader")))
	if usual := attempts(ours); !ok || with.Replay()[4] != usual.Replay()[4] || with.Replay()[7] == usual.Replay()[7] || len(direct.LedTo(sha256.Sum256([]byte("uki")))) != 1 {
		t.Errorf("by the loader: %v, %q", ok, namesOf(with))
	}
	if _, ok := direct.StartedBy(sha256.Sum256([]byte("loader")), Digest{}); ok || direct.LedTo(sha256.Sum256([]byte("loader"))) != nil {
		t.Error("a program that was not started was")
	}
	if led := attempts([]string{"foreign", "loader"}, ours).LedTo(sha256.Sum256([]byte("uki"))); len(led) != 2 || led[0] != sha256.Sum256([]byte("loader")) {
		t.Errorf("led to by %x", led)
	}
	// It is the boot that would have been, wherever nothing else was started.
	got, _ := attempts(none, ours).WithoutRetry(sha256.Sum256([]byte("loader")))
	want := attempts(ours)
	for i, v := range want.Replay() {
		if got.Replay()[i] != v {
			t.Errorf("PCR %d differs", i)
		}
	}
	if !slices.EqualFunc(got.Events, want.Events, func(a, b Event) bool { return a.PCR == b.PCR && string(a.Data) == string(b.Data) }) {
		t.Errorf("events %v", got.Events)
	}
}
