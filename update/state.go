package update

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"
	"unicode/utf8"
)

// Limits of the state file.
const (
	maxStateBytes  = 256 << 10
	maxJournal     = 50
	maxFailed      = 20
	maxReasonChars = 500
	maxSourceChars = 200
)

// State is what a device remembers of its updates: one file on the data volume,
// replaced as a whole. Losing it is not dangerous. What must not be rolled back is
// in the metadata store beside it, and verified again whenever it is read.
type State struct {
	Format int `json:"format"` // 1
	// LastSeen and NewestVerified go into [ReferenceTime].
	LastSeen       time.Time `json:"last_seen"`
	NewestVerified time.Time `json:"newest_verified"`
	// Pending is the release that was written and waits for its trial or commit.
	Pending *Pending       `json:"pending,omitempty"`
	Failed  []Failed       `json:"failed,omitempty"`
	Journal []JournalEntry `json:"journal,omitempty"` // oldest first
}

// Pending is a release in a slot that is not committed.
type Pending struct {
	Slot     string    `json:"slot"`
	Version  string    `json:"version"`
	RootHash string    `json:"root_hash"`
	Sequence int64     `json:"sequence"`
	Since    time.Time `json:"since"`
	// PassedOver counts the starts of the box that came to another release while this one
	// had tries left. Boot is the start that was the last to see it (boot_id).
	PassedOver int    `json:"passed_over,omitempty"`
	Boot       string `json:"boot,omitempty"`
	// Reason is why the release on trial gave up, in its own words.
	Reason string `json:"reason,omitempty"`
}

// SetReason keeps why the trial failed, cut to what the state holds.
func (p *Pending) SetReason(reason string) { p.Reason = clip(reason, maxReasonChars) }

// Failed is a release that was tried and did not work.
type Failed struct {
	Version  string    `json:"version"`
	RootHash string    `json:"root_hash"`
	Reason   string    `json:"reason"`
	Time     time.Time `json:"time"`
}

// Result is how an attempt ended.
type Result string

// Results.
const (
	Applied   Result = "applied" // written, on trial at the next boot
	Committed Result = "committed"
	FellBack  Result = "fell-back"
	Refused   Result = "refused"
)

// JournalEntry is one event in the life of the device's releases.
type JournalEntry struct {
	Time         time.Time `json:"time"`
	From         string    `json:"from,omitempty"` // versions
	To           string    `json:"to,omitempty"`
	Source       string    `json:"source,omitempty"`
	Result       Result    `json:"result"`
	Reason       string    `json:"reason,omitempty"`
	FetchedBytes int64     `json:"fetched_bytes,omitempty"`
	Seconds      int64     `json:"seconds,omitempty"`
}

// LoadState reads the state from a folder on the data volume. None is a new one. A
// damaged one is renamed to state.json.damaged and a new one begun, whose journal
// says so at time now. An error is one of the volume; the State is usable with it.
func LoadState(dir string, now time.Time) (*State, error) {
	var s State
	damaged, err := loadJSON(filepath.Join(dir, stateName), maxStateBytes, &s)
	if damaged || err != nil || s.Format == 0 {
		s = State{Format: 1}
	}
	if damaged {
		s.Log(JournalEntry{Time: now, Result: Refused, Reason: "the state file was damaged and is now " + stateName + ".damaged; this is a new one"})
	}
	if err != nil {
		return &s, fmt.Errorf("load update state: %w", err)
	}
	return &s, nil
}

// Save replaces the file; a power cut or a full volume leaves the old one.
func (s *State) Save(dir string) error {
	b, err := s.encode()
	if err != nil {
		return fmt.Errorf("save update state: %w", err)
	}
	if err := WriteFile(filepath.Join(dir, stateName), b, 0o600); err != nil {
		return fmt.Errorf("save update state: %w", err)
	}
	return nil
}

func (s *State) encode() ([]byte, error) {
	s.Format = 1
	if err := s.valid(); err != nil {
		return nil, err
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	if err := e.Encode(s); err != nil {
		return nil, err
	}
	if text.Len() > maxStateBytes {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", text.Len(), maxStateBytes)
	}
	return text.Bytes(), nil
}

// decodeState reads the file.
func decodeState(b []byte) (*State, error) {
	if len(b) > maxStateBytes {
		return nil, errTooLong
	}
	var s State
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, err
	}
	return &s, s.valid()
}

// valid checks what else would be shown to people or acted on.
func (s *State) valid() error {
	if s.Format != 1 {
		return fmt.Errorf("format %d; this version knows format 1", s.Format)
	}
	if len(s.Journal) > maxJournal || len(s.Failed) > maxFailed {
		return fmt.Errorf("%d entries in the journal and %d failures, at most %d and %d are allowed", len(s.Journal), len(s.Failed), maxJournal, maxFailed)
	}
	if p := s.Pending; p != nil && (!ValidVersion(p.Version) || !validHash(p.RootHash) || !nameForm.MatchString(p.Slot) || p.Sequence < 0 ||
		!shortText(p.Reason, maxReasonChars) || p.PassedOver < 0 || !shortText(p.Boot, maxSourceChars)) {
		return errors.New("what is pending is not a release in a slot")
	}
	for _, f := range s.Failed {
		if !ValidVersion(f.Version) || !validHash(f.RootHash) || !shortText(f.Reason, maxReasonChars) {
			return errors.New("a failure is not of a release")
		}
	}
	for _, e := range s.Journal {
		if !slices.Contains([]Result{Applied, Committed, FellBack, Refused}, e.Result) || e.FetchedBytes < 0 || e.Seconds < 0 ||
			!shortText(e.Reason, maxReasonChars) || !shortText(e.Source, maxSourceChars) ||
			e.From != "" && !ValidVersion(e.From) || e.To != "" && !ValidVersion(e.To) {
			return errors.New("an entry of the journal is not one")
		}
	}
	return nil
}

// shortText is valid text that is not longer than clip leaves it.
func shortText(s string, chars int) bool {
	return utf8.ValidString(s) && len(s) <= chars
}

// clip makes a text fit into the state: what goes wrong can have long names.
func clip(s string, chars int) string {
	s = string([]rune(s)) // invalid bytes become U+FFFD
	if len(s) <= chars {
		return s
	}
	s = s[:chars-len("…")]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s + "…"
}

// Log appends to the journal; the oldest entries beyond 50 go. Versions that are not
// ones are left out and long texts cut.
func (s *State) Log(e JournalEntry) {
	e.Reason, e.Source = clip(e.Reason, maxReasonChars), clip(e.Source, maxSourceChars)
	if !ValidVersion(e.From) {
		e.From = ""
	}
	if !ValidVersion(e.To) {
		e.To = ""
	}
	e.FetchedBytes, e.Seconds, e.Time = max(e.FetchedBytes, 0), max(e.Seconds, 0), e.Time.UTC()
	s.Journal = append(s.Journal, e)
	s.Journal = slices.Clone(s.Journal[max(0, len(s.Journal)-maxJournal):])
}

// Fail notes that a release did not work, once for each root hash; the oldest
// beyond 20 are forgotten.
func (s *State) Fail(f Failed) {
	f.Reason, f.Time = clip(f.Reason, maxReasonChars), f.Time.UTC()
	s.Failed = slices.DeleteFunc(s.Failed, func(old Failed) bool { return old.RootHash == f.RootHash })
	s.Failed = append(s.Failed, f)
	s.Failed = slices.Clone(s.Failed[max(0, len(s.Failed)-maxFailed):])
}

// FailedHashes are the root hashes for [Device.Failed].
func (s *State) FailedHashes() []string {
	var list []string
	for _, f := range s.Failed {
		list = append(list, f.RootHash)
	}
	return list
}

// Checked remembers the times of a check, which never go back. What was taken from
// a medium past its end bears out no time.
func (s *State) Checked(a *Answer) {
	if a.Seen.After(s.LastSeen) {
		s.LastSeen = a.Seen
	}
	if a.Newest.After(s.NewestVerified) {
		s.NewestVerified = a.Newest
	}
}
