package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/sealtest"
	"github.com/holdfast-os/holdfast/update"
)

// asked is a station whose TPM has a manufacturer, and a vendor who asks it.
type asked struct {
	*station
	stick  string
	log    bytes.Buffer
	policy attest.Policy
	spec   image.Evidence
}

func newAsked(t *testing.T, secureBoot bool, versions ...string) *asked {
	t.Helper()
	w := &asked{
		station: newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, secureBoot, versions...), stick: t.TempDir(),
		spec: image.Evidence{Stick: true, Include: []string{image.EvidenceJournal, image.EvidenceStatus, image.EvidenceLogs, image.EvidenceEscrow}},
	}
	maker := sealtest.NewManufacturer(t, "Test Root of TPMs", today)
	w.tpm.WriteNV(0x01c0000a, maker.Certify(w.tpm.EK(tpm2.ECCEKTemplate), "id:49424D00"))
	roots, _, err := attest.NewRoots(maker.Cert.Raw)
	if err != nil {
		t.Fatal(err)
	}
	v := w.fw.variables
	keys, err := attest.NewKeys(v["PK"], v["KEK"], v["db"], v["dbx"])
	if err != nil {
		t.Fatal(err)
	}
	w.policy = attest.Policy{Now: today, Roots: roots, SoftwareTPM: true, Keys: keys}
	for _, version := range append([]string{"1.0.0"}, versions...) {
		m := image.Manifest{Name: "testbox", Version: version, Expected: valuesOf(version), Verity: image.Verity{RootHash: rootHashOf(version)}}
		m.Expected.Services = map[string]string{"web": "sha256:" + version}
		r, err := m.Reference()
		if err != nil {
			t.Fatal(err)
		}
		w.policy.References = append(w.policy.References, r)
	}
	return w
}

func rootHashOf(version string) string { return strings.Repeat("0", 59) + version }

// system is the agent that runs in the boot.
func (w *asked) system() *system {
	s := &system{log: slog.New(slog.NewTextHandler(&w.log, nil)), keeper: w.k, updater: w.a.u, app: w.description().Appliance, initrd: w.s.status}
	s.app.Services = []image.Container{{Name: "web", Digest: "sha256:" + w.version}}
	s.app.Evidence = w.spec
	s.initrd.Name, s.initrd.Version, s.initrd.Slot, s.initrd.RootHash = s.app.Name, s.app.Version, w.slot, rootHashOf(w.version)
	c := s.newContainer(s.app.Services[0])
	c.log.path = ""
	s.services = append(s.services, c)
	return s
}

func (w *asked) evidence() *Evidence {
	e := w.system().newEvidence()
	e.OpenTPM = func() (seal.TPM, error) { return w.tpm, nil }
	e.EventLog = func() ([]byte, error) { return w.station.log, nil }
	e.Now = func() time.Time { return today }
	return e
}

// ask puts a challenge on the stick.
func (w *asked) ask(credentials ...attest.Credential) *attest.Challenge {
	w.t.Helper()
	c, err := attest.NewChallenge(today.Add(-time.Hour), credentials...)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.stick, c.FileName()), c.Marshal(), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return c
}

// visit plugs the stick in, and wants an answer to each of these challenges on it.
func (w *asked) visit(challenges ...*attest.Challenge) (answers []*attest.Answer) {
	w.t.Helper()
	e := w.evidence()
	folders, replies, err := e.fromFolder(w.stick)
	if err == nil {
		err = e.write(folders, replies, "a stick", func() bool { return true })
	}
	if err != nil {
		w.t.Fatal(err)
	}
	for _, c := range challenges {
		pattern := filepath.Join(w.stick, fmt.Sprintf("%s%x-%s.bin", attest.AnswerPrefix, c.Nonce[:4], w.s.status.Volumes[0].UUID))
		b, err := os.ReadFile(pattern)
		if err != nil {
			w.t.Fatal(err)
		}
		a, err := attest.ParseAnswer(b)
		if err != nil {
			w.t.Fatal(err)
		}
		answers = append(answers, a)
	}
	return answers
}

// enrol is the first contact; afterwards the vendor knows the box.
func (w *asked) enrol(accept ...string) {
	w.t.Helper()
	first := w.ask()
	credential, err := attest.NewCredential(w.visit(first)[0])
	if err != nil {
		w.t.Fatal(err)
	}
	second := w.ask(credential)
	a := w.visit(second)[0]
	p := w.policy
	p.Accept = append(attest.FirstContact(), accept...)
	v := attest.Verify(a, second, &p)
	w.wantAll(v, attest.FirstContact()...)
	if w.policy.Known, err = attest.NewRecord(a, v, nil, today); err != nil {
		w.t.Fatal(err)
	}
}

// wantAll wants all checks but these to pass.
func (w *asked) wantAll(v attest.Verdict, but ...string) {
	w.t.Helper()
	for _, c := range v.Checks {
		if (c.Result == attest.Pass) == slices.Contains(but, c.Name) {
			w.t.Errorf("%s %s: %s (%s)", c.Name, c.Result, c.Text, c.Event)
		}
	}
}

// TestEvidence: a stick goes to the box and back, through an update and a start by the
// recovery key; the vendor sees each for what it is.
func TestEvidence(t *testing.T) {
	w := newAsked(t, true, "1.1.0")
	w.mustSettle()
	w.start("", "tpm")
	w.good()
	w.enrol()
	c := w.ask()
	a := w.visit(c)[0]
	w.wantAll(attest.Verify(a, c, &w.policy))
	if s := a.Statement; s.Box != w.s.status.Volumes[0].UUID || len(s.Volumes) != 2 || len(s.Slots) != 1 || len(s.Measurements) != 3 || s.SealPolicy != seal.PolicyStandard {
		t.Errorf("statement %+v", s)
	}
	if !strings.Contains(w.log.String(), "challenge answered") {
		t.Errorf("log %s", w.log.String())
	}
	w.apply("1.1.0")
	w.start("", "tpm")
	w.good()
	a = w.visit(c)[0] // the stick was left in
	v := attest.Verify(a, c, &w.policy)
	w.wantAll(v)
	if v.Release != "testbox 1.1.0" || !bytes.Contains(attached(a, journalFile), []byte(`"1.1.0"`)) {
		t.Errorf("release %s, journal %s", v.Release, attached(a, journalFile))
	}
	w.policy.References = w.policy.References[:1]
	w.wantAll(attest.Verify(a, c, &w.policy), attest.CheckKernel, attest.CheckLoader, attest.CheckDBX, attest.CheckIdentity)
	if n := w.tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

func attached(a *attest.Answer, name string) []byte {
	for _, f := range a.Attachments {
		if f.Name == name {
			return f.Data
		}
	}
	return nil
}

// TestEvidenceWithoutSecureBoot: exactly that is what is wrong.
func TestEvidenceWithoutSecureBoot(t *testing.T) {
	w := newAsked(t, false)
	w.mustSettle()
	c := w.ask()
	a := w.visit(c)[0]
	w.wantAll(attest.Verify(a, c, &w.policy), append(attest.FirstContact(), attest.CheckAK, attest.CheckSecureBoot)...)
	w.policy.NoSecureBoot = true
	w.enrol()
}

// TestEvidenceAfterRecovery: the volumes were not opened as they were recorded.
func TestEvidenceAfterRecovery(t *testing.T) {
	w := newAsked(t, true)
	key := w.s.recoveryKey()
	w.mustSettle()
	w.start("", "tpm")
	w.enrol()
	w.fw.variables["dbx"] = signatureList("revoked")
	w.start(key+"\n", "recovery")
	c := w.ask()
	w.wantAll(attest.Verify(w.visit(c)[0], c, &w.policy), attest.CheckVolumes)
}

// TestEvidenceBadChallenges: what cannot be read is not answered, and keeps nothing else
// from its answer.
func TestEvidenceBadChallenges(t *testing.T) {
	w := newAsked(t, true)
	good := w.ask()
	put := func(name string, b []byte) { putFile(t, filepath.Join(w.stick, name), b) }
	put("0-empty.challenge", nil)
	put("1-noise.CHALLENGE", bytes.Repeat([]byte{0xaa}, 5000))
	put("2-huge.challenge", bytes.Repeat([]byte(" "), attest.MaxChallengeBytes+1))
	put("3-\x1b[2J.challenge", []byte("{}"))
	put("4-edited.challenge", bytes.ReplaceAll(good.Marshal(), []byte("  "), []byte("\t")))
	put(".hidden.challenge", nil)
	put("holdfast-challenge.json", nil)
	for _, do := range []error{
		os.Mkdir(filepath.Join(w.stick, "5-folder.challenge"), 0o700), unix.Mkfifo(filepath.Join(w.stick, "6-fifo.challenge"), 0o600),
		os.Symlink("/dev/zero", filepath.Join(w.stick, "7-zero.challenge")), os.Mkdir(filepath.Join(w.stick, RepositoryFolder), 0o700),
	} {
		if do != nil {
			t.Fatal(do)
		}
	}
	second, err := attest.NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	put(filepath.Join(RepositoryFolder, strings.ToUpper(second.FileName())+".TXT"), second.Marshal())
	e := w.evidence()
	folders, replies, err := e.fromFolder(w.stick)
	if err == nil || len(replies) != 2 || strings.Count(err.Error(), "is not answered") != 5 || strings.ContainsAny(err.Error(), "\x1b") {
		t.Errorf("%d answers: %v", len(replies), err)
	}
	if err := e.write(folders, replies, "a stick", func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	for folder, c := range map[string]*attest.Challenge{w.stick: good, filepath.Join(w.stick, RepositoryFolder): second} {
		found, err := filepath.Glob(filepath.Join(folder, attest.AnswerPrefix+"*.bin"))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %q, %v", folder, found, err)
		}
		b, err := os.ReadFile(found[0])
		if err != nil {
			t.Fatal(err)
		}
		if a, err := attest.ParseAnswer(b); err != nil || !a.Answers(c) {
			t.Errorf("%s: %v", found[0], err)
		}
	}
}

// TestEvidenceManyChallenges: some are answered, and the box goes on.
func TestEvidenceManyChallenges(t *testing.T) {
	w := newAsked(t, true)
	w.stick = onTmpfs(t, "size=64m,nr_inodes=150k")
	for range 20 {
		w.ask()
	}
	for i := range 100_000 {
		if err := unix.Mknod(filepath.Join(w.stick, fmt.Sprintf("%06d.challenge", i)), unix.S_IFREG|0o600, 0); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	_, replies, err := w.evidence().fromFolder(w.stick)
	if len(replies) > maxChallenges || !strings.Contains(w.log.String(), "more challenges") {
		t.Errorf("%d answers, %v, log %s", len(replies), err, w.log.String())
	}
	if d := time.Since(began); d > 20*time.Second {
		t.Errorf("it took %v", d)
	}
}

// TestEvidenceForbidden: nothing leaves, and it is said why.
func TestEvidenceForbidden(t *testing.T) {
	w := newAsked(t, true)
	for _, stick := range []bool{true, false} {
		w.spec.Stick = stick
		s := w.system()
		s.refuseChallenges(w.stick)
		if w.log.Len() > 0 {
			t.Errorf("a stick without a challenge: %s", w.log.String())
		}
	}
	w.ask()
	s := w.system()
	s.refuseChallenges(w.stick)
	if !strings.Contains(w.log.String(), "evidence: {stick: true}") || s.takesFromMedia() || s.carriesEscrow() {
		t.Errorf("it says %q", w.log.String())
	}
	w.spec.Include = nil
	c := w.ask()
	if a := w.visit(c)[0]; len(a.Attachments) != 0 {
		t.Errorf("%d files go along that the spec does not name", len(a.Attachments))
	}
}

// TestEvidencePulledOut: an answer is on the stick whole or not at all.
func TestEvidencePulledOut(t *testing.T) {
	w := newAsked(t, true)
	e := w.evidence()
	w.ask()
	w.ask()
	folders, replies, err := e.fromFolder(w.stick)
	if err != nil || len(replies) != 2 {
		t.Fatal(len(replies), err)
	}
	answers := func(dir string) []string {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(dir, attest.AnswerPrefix+"*"))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	calls := 0
	err = e.write(folders, replies, "a stick", func() bool { calls++; return calls == 1 })
	if found := answers(w.stick); err == nil || !strings.Contains(err.Error(), "pulled out") || len(found) != 1 {
		t.Errorf("%q: %v", found, err)
	}
	full := onTmpfs(t, "size=4k")
	err = e.write([]string{full}, replies[:1], "a stick", func() bool { return true })
	if found := answers(full); !errors.Is(err, unix.ENOSPC) || len(found) != 0 {
		t.Errorf("a full stick: %q, %v", found, err)
	}
	if err := e.write([]string{filepath.Join(w.stick, "gone")}, replies[:1], "a stick", func() bool { return true }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is gone: %v", err)
	}
}

// TestEvidenceEscrow: it goes along while it is outstanding, and counts as handed out
// once it is on the stick.
func TestEvidenceEscrow(t *testing.T) {
	w := newAsked(t, true)
	k := newKeepers(t, 1, 1)
	_, custody := newBox(t, 1).mustProvision(k.config)
	e := w.evidence()
	e.Custody = custody
	c := w.ask()
	folders, replies, err := e.fromFolder(w.stick)
	if err != nil {
		t.Fatal(err)
	}
	custody.wantEscrow(t, EscrowMade)
	if err := e.write(folders, replies, "a stick", func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	custody.wantEscrow(t, EscrowHandedOut)
	a, err := attest.ParseAnswer(replies[0].content)
	if err != nil {
		t.Fatal(err)
	}
	sent, err := escrow.Parse(attached(a, escrowFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := custody.TakeReceipt(k.receipt(t, sent)); err != nil {
		t.Fatal(err)
	}
	r, err := e.answer(c.Marshal())
	if a, _ := attest.ParseAnswer(r.content); err != nil || a == nil || attached(a, escrowFile) != nil {
		t.Errorf("the receipt is there, and the escrow goes along: %v", err)
	}
}

// TestEvidenceSize: what goes along is capped, and the answer with it.
func TestEvidenceSize(t *testing.T) {
	w := newAsked(t, true)
	s := w.system()
	web := s.services[0]
	for i := range 3 * keptLines {
		web.log.add(fmt.Sprintf("line %d \x1b[31m%s", i, strings.Repeat("x", 300)))
	}
	for range 8 {
		c := s.newContainer(image.Container{Name: "other"})
		c.log.path = ""
		c.log.add(strings.Repeat("y", 8<<10))
		s.services = append(s.services, c)
	}
	var u UpdateStatus
	for i := range 50 {
		u.Journal = append(u.Journal, update.JournalEntry{Time: today, From: "1.0.0", To: fmt.Sprint(i), Reason: strings.Repeat("\x00", 1<<20)})
		u.Failed = append(u.Failed, update.Failed{Version: "1", Reason: strings.Repeat("z", 1000)})
	}
	journal, logs := keptJournal(u), s.logsFile()
	if len(journal) == 0 || len(journal) > maxKeptBytes || !bytes.Contains(journal, []byte(`"omitted"`)) || len(u.Journal[0].Reason) != 1<<20 {
		t.Errorf("journal of %d bytes", len(journal))
	}
	if len(logs) == 0 || len(logs) > maxLogsBytes || !bytes.Contains(logs, []byte(fmt.Sprintf("line %d ", 3*keptLines-1))) || bytes.Count(logs, []byte("== other\n")) != 8 || bytes.ContainsAny(logs, "\x1b\x00") {
		t.Errorf("logs of %d bytes", len(logs))
	}
	w.a.u.set(func(r *UpdateStatus) { r.LastError = strings.Repeat("x", 1<<20) })
	status := *s.status()
	for range 1000 {
		status.Problems = append(status.Problems, strings.Repeat("p", 100))
	}
	if b := keptStatus(status); len(b) == 0 || len(b) > maxKeptBytes || !json.Valid(b) {
		t.Errorf("status of %d bytes", len(b))
	}
	e := w.evidence()
	e.Files = []EvidenceFile{{journalFile, func() []byte { return journal }}, {statusFile, func() []byte { return keptStatus(status) }}, {logsFile, func() []byte { return logs }}}
	r, err := e.answer(w.ask().Marshal())
	if err != nil || len(r.content) > 100<<10 {
		t.Errorf("an answer of %d bytes: %v", len(r.content), err)
	}
	t.Logf("an answer with all files full: %d bytes in %v", len(r.content), r.spent)
}

// TestEvidenceBusy: somebody changes the TPM states, there is no TPM, or a text is odd.
func TestEvidenceBusy(t *testing.T) {
	w := newAsked(t, true)
	w.k.Patience = 0
	unlock, err := w.k.lock()
	if err != nil {
		t.Fatal(err)
	}
	c := w.ask()
	if _, err := w.evidence().answer(c.Marshal()); !errors.Is(err, ErrSyncing) {
		t.Errorf("while states are changed: %v", err)
	}
	unlock()
	e := w.evidence()
	e.OpenTPM = func() (seal.TPM, error) { return nil, seal.ErrNoTPM }
	if _, err := e.answer(c.Marshal()); !errors.Is(err, seal.ErrNoTPM) {
		t.Errorf("without a TPM: %v", err)
	}
	e = w.evidence()
	e.Lock = func() (func(), error) { return nil, unix.EROFS }
	e.EventLog = func() ([]byte, error) { return nil, os.ErrNotExist }
	r, err := e.answer(c.Marshal())
	if err != nil {
		t.Fatalf("a volume that fails, no event log: %v", err)
	}
	a, err := attest.ParseAnswer(r.content)
	if err != nil {
		t.Fatal(err)
	}
	if v := attest.Verify(a, c, &w.policy); v.Of(attest.CheckLog).Result != attest.Unknown || v.Of(attest.CheckSignature).Result != attest.Pass {
		t.Errorf("%+v", v)
	}
	for text, want := range map[string]string{"plain": "plain", "a\x1bb": "a\ufffdb", strings.Repeat("é", 150): strings.Repeat("é", 100), "x" + strings.Repeat("é", 150): "x" + strings.Repeat("é", 99)} {
		if got := said(text); got != want {
			t.Errorf("%q becomes %q", text, got)
		}
	}
}

// TestAttestAPI: the challenge goes in by the body.
func TestAttestAPI(t *testing.T) {
	s := newAsked(t, true).system()
	for _, tt := range []struct {
		body []byte
		code int
	}{{nil, http.StatusBadRequest}, {[]byte("{}"), http.StatusBadRequest}, {make([]byte, attest.MaxChallengeBytes+1), http.StatusBadRequest}} {
		w := httptest.NewRecorder()
		s.answerAttest(w, httptest.NewRequest(http.MethodPost, "/v1/attest", bytes.NewReader(tt.body)))
		if w.Code != tt.code {
			t.Errorf("%d bytes: %d %s", len(tt.body), w.Code, w.Body)
		}
	}
}
