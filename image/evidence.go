package image

// Evidence says what of a box's evidence may leave it, and how. A release that says
// nothing keeps it in the box: on the box itself, root may have it all the same.
type Evidence struct {
	// Stick answers challenges on a medium that is plugged in, on that medium.
	Stick bool `json:"stick,omitempty"`
	// Include are the files that go along with an answer; see the constants below.
	Include []string `json:"include,omitempty"`
}

// The words of Evidence.Include.
const (
	EvidenceJournal = "journal" // what became of the last 50 updates
	EvidenceStatus  = "status"  // what holdfast-agent status tells
	EvidenceLogs    = "logs"    // the last lines that containers printed
	EvidenceEscrow  = "escrow"  // the escrow of the recovery key, while its receipt is outstanding
)
