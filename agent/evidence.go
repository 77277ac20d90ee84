package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/update"
)

// Evidence answers the vendor's challenges: what the box's TPM signs of its state, what
// the box says of itself, and the files that its release lets go along. The key that
// signs is the TPM's own and is kept nowhere: the TPM makes the same one each time (see
// package attest), so it survives updates, resets and the loss of the data.
//
// Whoever has a challenge and may plug in a medium gets an answer, where the release
// allows that. Nothing in it is secret, but it tells which box this is, and what it runs.
type Evidence struct {
	Log *slog.Logger
	// OpenTPM opens the TPM for one answer; what can be closed is.
	OpenTPM func() (seal.TPM, error)
	// Lock keeps out who changes the TPM states; nil where there are none.
	Lock func() (unlock func(), err error)
	// Statement is what the box says of itself now.
	Statement func() attest.Statement
	// EventLog is the firmware's.
	EventLog func() ([]byte, error)
	// Files make the files that go along, in this order.
	Files []EvidenceFile
	// Custody has the escrow to take along; nil takes none.
	Custody *Custody
	Now     func() time.Time
}

// EvidenceFile is a file that goes along with an answer. None is left out.
type EvidenceFile struct {
	Name string
	Make func() []byte
}

// Names and limits of what goes along. The limits keep an answer below 100 KB.
const (
	journalFile   = "journal.json"
	statusFile    = "status.json"
	logsFile      = "logs.txt"
	escrowFile    = "escrow.json"
	maxKeptBytes  = 16 << 10 // of journal and status each
	maxLogsBytes  = 32 << 10
	maxChallenges = 8
	// maxSaidBytes is the longest text in a statement.
	maxSaidBytes = 200
)

// reply is an answer on its way out.
type reply struct {
	name    string // of its file
	content []byte
	escrow  *escrow.Escrow // that it takes along
	spent   time.Duration
}

// answer answers a challenge, as it was read from outside. It changes nothing on the box.
func (e *Evidence) answer(challenge []byte) (r reply, err error) {
	c, err := attest.ParseChallenge(challenge)
	if err != nil {
		return r, err
	}
	began := time.Now()
	in := attest.Input{Challenge: c, Statement: e.Statement(), Time: e.Now()}
	if in.EventLog, err = e.EventLog(); err != nil {
		e.Log.Warn("the answer goes without the firmware's event log", "error", err)
		in.EventLog = nil
	}
	in.Attachments, r.escrow = e.attachments()
	if e.Lock != nil {
		unlock, err := e.Lock()
		if errors.Is(err, ErrSyncing) {
			return r, err
		}
		if err != nil { // a volume that fails is no reason to tell nothing
			e.Log.Warn("answering without the lock over the TPM states", "error", err)
		} else {
			defer unlock()
		}
	}
	tpm, err := e.OpenTPM()
	if err != nil {
		return r, err
	}
	if c, ok := tpm.(io.Closer); ok {
		defer c.Close()
	}
	a, err := attest.Attest(tpm, in)
	if err != nil {
		return r, err
	}
	r.name, r.content, r.spent = a.FileName(c), a.Marshal(), time.Since(began)
	return r, nil
}

func (e *Evidence) attachments() (list []attest.Attachment, taken *escrow.Escrow) {
	for _, f := range e.Files {
		if content := f.Make(); len(content) > 0 {
			list = append(list, attest.Attachment{Name: f.Name, Data: content})
		}
	}
	if e.Custody == nil {
		return list, nil
	}
	if taken = e.Custody.undelivered(); taken != nil {
		list = append(list, attest.Attachment{Name: escrowFile, Data: taken.Marshal()})
	}
	return list, taken
}

// isChallenge goes by the name. Case does not count, nor the ending that some systems
// give to every text.
func isChallenge(name string) bool {
	name = strings.TrimSuffix(strings.ToLower(name), ".txt")
	return strings.HasPrefix(name, attest.ChallengePrefix) && strings.HasSuffix(name, ".json") ||
		strings.HasSuffix(name, ".challenge") && !strings.HasPrefix(name, ".")
}

// challengesIn lists the challenges in a medium's top folder and in [RepositoryFolder]
// below it, so many as are answered. more says that there are others.
func challengesIn(dir string) (paths []string, more bool, err error) {
	folders := []string{dir}
	if info, err := os.Lstat(filepath.Join(dir, RepositoryFolder)); err == nil && info.IsDir() {
		folders = append(folders, filepath.Join(dir, RepositoryFolder))
	}
	for _, folder := range folders {
		found, err := filesIn(folder, maxChallenges+1, isChallenge)
		if err != nil {
			return nil, false, err
		}
		slices.Sort(found)
		paths = append(paths, found...)
	}
	more = len(paths) > maxChallenges
	return paths[:min(len(paths), maxChallenges)], more, nil
}

// answerAll answers challenges by their paths; the replies are to lie in the folders of
// the same index. What is wrong with one does not keep the others from their answers.
func (e *Evidence) answerAll(paths []string) (folders []string, replies []reply, err error) {
	var all []error
	for _, path := range paths {
		b, err := readLimited(path, attest.MaxChallengeBytes)
		var r reply
		if err == nil {
			r, err = e.answer(b)
		}
		if err != nil {
			all = append(all, fmt.Errorf("%s is not answered: %w", printable(filepath.Base(path)), err))
			continue
		}
		folders, replies = append(folders, filepath.Dir(path)), append(replies, r)
	}
	return folders, replies, errors.Join(all...)
}

// write puts replies beside their challenges, each whole or not at all, as long as still
// is true.
func (e *Evidence) write(folders []string, replies []reply, to string, still func() bool) error {
	for i, r := range replies {
		if !still() {
			return errors.New("the medium was pulled out before it was answered")
		}
		if err := update.WriteFile(filepath.Join(folders[i], r.name), r.content, 0o644); err != nil {
			return err
		}
		e.Log.Info("challenge answered", "file", r.name, "bytes", len(r.content), "ms", r.spent.Milliseconds())
		if r.escrow != nil {
			if err := e.Custody.HandedOut(r.escrow, to); err != nil {
				return err
			}
		}
	}
	return nil
}

// said is a text as a statement may have it.
func said(text string) string {
	text = printable(text)
	if len(text) <= maxSaidBytes {
		return text
	}
	cut := maxSaidBytes
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut]
}

// keptJournal is what is known of updates, without the oldest entries where that is too
// much.
func keptJournal(u UpdateStatus) []byte {
	u.Failed, u.Journal = slices.Clone(u.Failed), slices.Clone(u.Journal)
	for i := range u.Failed {
		u.Failed[i].Reason = printable(u.Failed[i].Reason)
	}
	for i := range u.Journal {
		u.Journal[i].Reason, u.Journal[i].Source = printable(u.Journal[i].Reason), printable(u.Journal[i].Source)
	}
	kept := struct {
		Pending *update.Pending       `json:"pending,omitempty"`
		Failed  []update.Failed       `json:"failed,omitempty"`
		Journal []update.JournalEntry `json:"journal"`
		Omitted int                   `json:"omitted,omitempty"` // oldest entries
	}{u.Pending, u.Failed, u.Journal, 0}
	for {
		b, err := json.MarshalIndent(kept, "", " ")
		switch {
		case err != nil:
			return nil
		case len(b) <= maxKeptBytes:
			return b
		case len(kept.Journal) > 0:
			kept.Journal, kept.Omitted = kept.Journal[1:], kept.Omitted+1
		case len(kept.Failed) > 0:
			kept.Failed, kept.Omitted = kept.Failed[1:], kept.Omitted+1
		default:
			return nil
		}
	}
}

// keptStatus is the status, without what has a word of its own.
func keptStatus(s Status) []byte {
	if s.Update != nil {
		u := *s.Update
		u.Pending, u.Failed, u.Journal, u.LastError, u.Notes = nil, nil, nil, printable(u.LastError), ""
		s.Update = &u
	}
	for {
		b, err := json.MarshalIndent(s, "", " ")
		switch {
		case err != nil:
			return nil
		case len(b) <= maxKeptBytes:
			return b
		case len(s.Problems) > 0:
			s.Problems = s.Problems[:len(s.Problems)-1]
		case len(s.Services) > 0:
			s.Services = s.Services[:len(s.Services)-1]
		default:
			return nil
		}
	}
}

// printed is what a container printed last.
type printed struct {
	name  string
	lines []string
}

// keptLogs are the last lines of each, a fair share of the room for everyone.
func keptLogs(logs []printed) []byte {
	var out []byte
	for i, l := range logs {
		share := (maxLogsBytes - len(out)) / (len(logs) - i)
		text := "== " + printable(l.name) + "\n"
		share -= len(text)
		from := len(l.lines)
		for from > 0 && share >= len(printable(l.lines[from-1]))+1 {
			from--
			share -= len(printable(l.lines[from])) + 1
		}
		if share < 0 {
			break
		}
		for _, line := range l.lines[from:] {
			text += printable(line) + "\n"
		}
		out = append(out, text...)
	}
	return out
}

// includes says whether the spec lets the file go along.
func includes(e image.Evidence, word string) bool { return slices.Contains(e.Include, word) }
