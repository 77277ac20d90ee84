package spec

import (
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
	// Include are files that go along with an answer, by these words. The default is none.
	//
	//	journal  what became of the last 50 updates
	//	status   what holdfast-agent status tells
	//	logs     the last lines that each container printed, whatever they say
	//	escrow   the escrow of the recovery key, encrypted, while its receipt is outstanding
	Include []string `yaml:"include"`
}

func (r *report) checkEvidence(s *Evidence) {
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
}
