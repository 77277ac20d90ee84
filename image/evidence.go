package image

// Evidence says what of a box's evidence may leave it, and how. A release that says
// nothing keeps it in the box: on the box itself, root may have it all the same.
type Evidence struct {
	// Stick answers challenges on a medium that is plugged in, on that medium.
	Stick bool `json:"stick,omitempty"`
	// URL is that of the vendor's verifier, https, which the box asks for challenges by
	// itself and sends the answers to; empty is none. CAPEM, when set, are the certificates
	// that the server's is judged by, instead of the usual ones.
	URL   string `json:"url,omitempty"`
	CAPEM string `json:"ca_pem,omitempty"`
	// EverySec is the time from one answer to the next; 0 is one after each start only.
	EverySec int64 `json:"every_sec,omitempty"`
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
