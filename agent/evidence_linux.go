package agent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
)

// newEvidence puts together what answers challenges on this box.
func (s *system) newEvidence() *Evidence {
	e := &Evidence{
		Log: s.log, Statement: s.statement, Now: time.Now,
		OpenTPM:  func() (seal.TPM, error) { return seal.OpenDevice() },
		EventLog: func() ([]byte, error) { return readEventLog(eventLogPath) },
	}
	if s.keeper != nil {
		e.Lock = s.keeper.lock
	}
	for _, f := range []struct {
		word, name string
		make       func() []byte
	}{
		{image.EvidenceJournal, journalFile, s.journalFile},
		{image.EvidenceStatus, statusFile, func() []byte { return keptStatus(*s.status()) }},
		{image.EvidenceLogs, logsFile, s.logsFile},
	} {
		if includes(s.app.Evidence, f.word) {
			e.Files = append(e.Files, EvidenceFile{f.name, f.make})
		}
	}
	if includes(s.app.Evidence, image.EvidenceEscrow) && len(s.app.Recovery.Holders) > 0 {
		e.Custody = s.custody
	}
	return e
}

// newReporter is nil where the release names no verifier.
func (s *system) newReporter() *Reporter {
	if s.app.Evidence.URL == "" {
		return nil
	}
	return &Reporter{Log: s.log, Config: s.app.Evidence, UserAgent: "holdfast-agent " + s.app.Name + "/" + s.app.Version, Evidence: s.newEvidence, Now: time.Now}
}

func (s *system) journalFile() []byte {
	if s.updater == nil {
		return nil
	}
	return keptJournal(s.updater.Status())
}

func (s *system) logsFile() []byte {
	var logs []printed
	for _, c := range s.containers() {
		logs = append(logs, printed{c.Name, c.log.tail(keptLines)})
	}
	return keptLogs(logs)
}

// statement is what the box says of itself. The lists are as long as a statement's may be.
func (s *system) statement() attest.Statement {
	out := attest.Statement{
		Product: said(s.app.Name), Release: said(s.app.Version), Architecture: said(s.app.Architecture), SealPolicy: said(s.initrd.Policy),
		Slots: s.saidSlots(), Measurements: s.initrd.Measured,
	}
	if id, err := os.ReadFile(bootIDPath); err == nil {
		out.BootID = said(strings.TrimSpace(string(id)))
	}
	for i, v := range s.initrd.Volumes {
		if i == 0 {
			out.Box = said(v.UUID)
		}
		out.Volumes = append(out.Volumes, attest.Volume{Name: said(v.Name), UUID: said(v.UUID), Method: said(v.Method)})
	}
	for _, c := range s.services {
		c.mu.Lock()
		state := c.state
		c.mu.Unlock()
		out.Services = append(out.Services, attest.Service{Name: said(c.Name), Digest: said(c.Digest), State: said(string(state))})
	}
	return out
}

// saidSlots are the slots. What is said of the one that runs comes from the boot, and not
// from the boot partition, which nothing verifies.
func (s *system) saidSlots() []attest.Slot {
	running := attest.Slot{Name: s.initrd.Slot, Release: said(s.app.Version), RootHash: said(s.initrd.RootHash), Running: true}
	disk, err := openSlots(s.initrd.Disk, s.initrd.Slot)
	if err != nil {
		return []attest.Slot{running}
	}
	defer disk.close()
	entries, err := disk.disk.Entries()
	if err != nil {
		return []attest.Slot{running}
	}
	var others []attest.Slot
	for _, e := range entries {
		if e.Slot == disk.slot {
			running.State = cmp.Or(running.State, slotState(e, true))
			continue
		}
		if len(others) < 4 { // entries of one slot; a sane boot partition has one
			others = append(others, attest.Slot{Name: said(string(e.Slot)), Release: said(e.Version), RootHash: said(e.RootHash), State: slotState(e, false)})
		}
	}
	return append([]attest.Slot{running}, others...)
}

// slotState is the word for a slot in a statement.
func slotState(e partition.Entry, running bool) string {
	switch {
	case e.Damage != nil:
		return "damaged"
	case e.Bad() && !running:
		return "bad"
	case e.Counted && !wasGood(e):
		return "trial"
	}
	return "good"
}

// refuseChallenges says of a medium that is mounted why its challenges stay unanswered.
func (s *system) refuseChallenges(dir string) {
	if s.app.Evidence.Stick {
		return
	}
	if paths, _, err := challengesIn(dir); err == nil && len(paths) > 0 {
		s.log.Warn("a challenge is not answered: this release lets no evidence leave on a medium; its spec would say evidence: {stick: true}",
			"file", printable(filepath.Base(paths[0])))
	}
}

// carry answers the challenges on a medium, beside them. still says whether the device is
// the same medium yet.
func (e *Evidence) carry(device string, still func() bool) error {
	m, err := openMedium(device, still)
	if m == nil || err != nil || m.fs == "" {
		return err
	}
	var folders []string
	var replies []reply
	err = m.read(func(dir string) (err error) {
		folders, replies, err = e.fromFolder(dir)
		return err
	})
	if len(replies) == 0 || !m.writable(err) {
		return err
	}
	wrote := m.write(func(string) error { return e.write(folders, replies, "medium "+device+", in an answer", still) })
	if wrote != nil {
		return errors.Join(err, fmt.Errorf("write the answer to the medium: %w", wrote))
	}
	e.Log.Info("the answer is on the medium", "device", device)
	return err
}

// fromFolder answers the challenges of a medium that is mounted.
func (e *Evidence) fromFolder(dir string) (folders []string, replies []reply, err error) {
	paths, more, err := challengesIn(dir)
	if err != nil || len(paths) == 0 {
		return nil, nil, err
	}
	if more {
		e.Log.Warn("there are more challenges than are answered", "answered", len(paths))
	}
	return e.answerAll(paths)
}

// Attested is an answer to a challenge, as the command attest gets it.
type Attested struct {
	// Name is what the answer's file is called on a medium.
	Name   string `json:"name"`
	Answer []byte `json:"answer"` // as [attest.ParseAnswer] takes it
	// Milliseconds is how long the box took.
	Milliseconds int64 `json:"ms"`
}

// answerAttest answers the challenge in the body. Its files are those that the spec
// names. The escrow among them does not count as handed out: nobody knows where it goes.
func (s *system) answerAttest(w http.ResponseWriter, r *http.Request) {
	challenge, err := io.ReadAll(http.MaxBytesReader(w, r.Body, attest.MaxChallengeBytes))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	out, err := s.newEvidence().answer(challenge)
	switch {
	case errors.Is(err, attest.ErrMalformed):
		http.Error(w, err.Error(), http.StatusBadRequest)
	case errors.Is(err, ErrSyncing) || errors.Is(err, seal.ErrNoTPM):
		http.Error(w, err.Error(), http.StatusConflict)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		s.log.Info("challenge answered", "bytes", len(out.content), "ms", out.spent.Milliseconds())
		writeJSON(w, Attested{out.name, out.content, out.spent.Milliseconds()})
	}
}

// Attest answers a challenge. After a hand-off to another init, where no agent runs, it
// is done in this process.
func (c *Client) Attest(ctx context.Context, challenge []byte) (*Attested, error) {
	a := &Attested{}
	err := c.send(ctx, http.MethodPost, "/v1/attest", bytes.NewReader(challenge), a)
	if errors.Is(err, fs.ErrNotExist) {
		return attestHere(challenge)
	}
	return a, err
}

func attestHere(challenge []byte) (*Attested, error) {
	s := &system{log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if err := s.load(); err != nil {
		return nil, err
	}
	s.openKeeper()
	s.custody = s.newCustody()
	var err error
	if s.updater, err = s.newUpdater(); err != nil {
		s.problem(fmt.Sprintf("updates: %v", err))
	}
	r, err := s.newEvidence().answer(challenge)
	if err != nil {
		return nil, err
	}
	return &Attested{r.name, r.content, r.spent.Milliseconds()}, nil
}
