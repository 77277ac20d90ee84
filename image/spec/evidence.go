package spec

import (
	"net/url"
	"slices"

	"github.com/holdfast-os/holdfast/image"
)

// Evidence says what a box may tell its vendor of itself: the registers of its TPM,
// signed, the firmware's event log, and what it is and runs. Whoever gives it a challenge
// gets that, so nothing leaves the box unless it says so here. On the box, root has the
// evidence at any time with holdfast-agent attest.
type Evidence struct {
	// Stick answers a challenge (holdfast attest challenge) on a medium that is plugged
	// in, in a file beside it. The default is false.
	Stick bool `yaml:"stick"`
	// URL is an https address of the vendor's verifier. The box asks it for a challenge and
	// sends the answer after each start, once the release is kept, and so after each update,
	// and then Every so often, by default 24h; "never" is after starts only. The protocol is
	// in package seal/attest, a server in examples/attest.
	URL   string   `yaml:"url"`
	CA    string   `yaml:"ca"` // PEM file on the build machine
	Every Interval `yaml:"every"`
	// Include are files that go along with an answer, by these words. The default is none.
	//
	//	journal  what became of the last 50 updates
	//	status   what holdfast-agent status tells
	//	logs     the last lines that each container printed, whatever they say
	//	escrow   the escrow of the recovery key, encrypted, while its receipt is outstanding
	Include []string `yaml:"include"`
}

// DefaultEvery is evidence.every when not given.
const DefaultEvery Interval = 24 * 60 * 60

func (s *Evidence) applyDefaults() {
	if s.URL != "" && s.Every == 0 {
		s.Every = DefaultEvery
	}
}

func (r *report) checkEvidence(s *Evidence) {
	if s.URL != "" {
		parsed, err := url.Parse(s.URL)
		if err != nil || parsed.Scheme != "https" || parsed.Host == "" || parsed.User != nil || parsed.RawQuery != "" || parsed.Fragment != "" {
			r.errorf("evidence.url", "write https://attest.example/boxes", "%q is not an https address without user, query and fragment", s.URL)
		}
	}
	for _, key := range []string{"evidence.ca", "evidence.every"} {
		if r.pos.has(key) && !r.pos.has("evidence.url") {
			r.warnf(key, "", "has no effect without url")
		}
	}
	for i, word := range s.Include {
		at := index("evidence.include", i)
		r.oneOf(at, word, image.EvidenceJournal, image.EvidenceStatus, image.EvidenceLogs, image.EvidenceEscrow)
		if word == "" || slices.Contains(s.Include[:i], word) {
			r.errorf(at, "", "%q is empty or there already", word)
		}
	}
}

// validateEvidence looks at what belongs together and may come from several files.
func (r *report) validateEvidence(s *Spec) {
	e := &s.Evidence
	if i := slices.Index(e.Include, image.EvidenceEscrow); i >= 0 && len(s.Recovery.Holders) == 0 {
		r.errorf(index("evidence.include", i), "write recovery: {holders: [{name: vendor, key: keys/escrow.pub}]}", "without holders there is no escrow")
	}
	if e.Stick && len(s.Handoff) > 0 {
		r.errorf("evidence.stick", "let that init run holdfast-agent attest", "after a hand-off no agent runs that looks at media")
	}
	if e.URL != "" && len(s.Handoff) > 0 {
		r.errorf("evidence.url", "let that init run holdfast-agent attest", "after a hand-off no agent runs that asks for challenges")
	}
}
