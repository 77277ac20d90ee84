// Command attest is a verifier that a vendor can run as it is: boxes ask it for a
// challenge and send their answers. It keeps no state but a folder, so that it can be
// stopped at any time, and several can share the folder.
//
//	go run ./examples/attest -store fleet -release out/release -roots tpm-roots -enrol
//
// It speaks the protocol in package seal/attest, with boxes whose spec has evidence: {url:
// https://HOST, ca: FILE}, and with whoever carries their files.
//
// The folder has challenges/ (each is good for one answer within an hour, and the last
// thousand are kept), records/ (one file for each box, see attest.Record), and alarms/:
// the verdict and the answer of each box that was good before and is not any more, and
// of each that says it is one. A box is known by its TPM, so that calling itself another
// does not help it. With -enrol, boxes that nobody knows are recorded at first contact;
// run it so in the factory, or while boxes are handed out. A box that says nothing
// raises no alarm: look at how old its record is.
//
// The connection needs no secrecy, and the boxes no password: what counts is signed by
// their TPMs. Put a proxy with TLS and a limit of requests in front of it all the same.
package main

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
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
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/update"
)

func main() {
	listen := flag.String("listen", "localhost:8443", "address")
	store := flag.String("store", "fleet", "folder to keep challenges, records and alarms in")
	release := flag.String("release", "", "folders of releases that may run, with commas; they tell the Secure Boot keys too")
	roots := flag.String("roots", "", "folder with the TPM manufacturers' certificates")
	enrol := flag.Bool("enrol", false, "record boxes that nobody knows")
	software := flag.Bool("software-tpm", false, "take TPMs that are programs")
	cert := flag.String("cert", "", "certificate and key for TLS, in one PEM file")
	flag.Parse()
	v := &verifier{dir: *store, challenges: 1000, enrol: *enrol, now: time.Now, log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	v.policy.SoftwareTPM = *software
	err := v.configure(*release, *roots)
	if err == nil {
		err = serve(*listen, *cert, v)
	}
	fmt.Fprintln(os.Stderr, "error:", err)
	os.Exit(1)
}

func serve(listen, cert string, v *verifier) error {
	s := &http.Server{Addr: listen, Handler: v.handler(), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, WriteTimeout: time.Minute}
	if cert == "" {
		return s.ListenAndServe()
	}
	pair, err := tls.LoadX509KeyPair(cert, cert)
	if err != nil {
		return err
	}
	s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}}
	return s.ListenAndServeTLS("", "")
}

// verifier is the service.
type verifier struct {
	policy attest.Policy
	dir    string
	// challenges is how many are kept; the oldest are given up for new ones, so that a
	// flood of requests is over when it ends.
	challenges int
	enrol      bool
	now        func() time.Time
	log        *slog.Logger
}

// lifetime is how long a challenge may be answered.
const lifetime = time.Hour

// configure reads what answers are judged by: releases, with commas, and a folder.
func (v *verifier) configure(releases, roots string) error {
	if releases == "" || roots == "" {
		return errors.New("-release FOLDER of what may run and -roots FOLDER of TPM manufacturers' certificates are needed")
	}
	var manifests []*image.Manifest
	for _, dir := range strings.Split(releases, ",") {
		text, err := os.ReadFile(filepath.Join(dir, image.ManifestName))
		if err != nil {
			return fmt.Errorf("-release %q: %w", dir, err)
		}
		var m image.Manifest
		if err := json.Unmarshal(text, &m); err != nil {
			return fmt.Errorf("-release %q: %w", dir, err)
		}
		r, err := m.Reference()
		if err != nil {
			return fmt.Errorf("-release %q: %w", dir, err)
		}
		v.policy.References, manifests = append(v.policy.References, r), append(manifests, &m)
	}
	var err error
	if v.policy.Keys, err = image.VendorKeys(nil, manifests...); err != nil {
		return fmt.Errorf("-release %q: %w", releases, err)
	}
	if err := v.readRoots(roots); err != nil {
		return fmt.Errorf("-roots %q: %w", roots, err)
	}
	return nil
}

func (v *verifier) readRoots(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var files [][]byte
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		files = append(files, b)
	}
	if len(files) == 0 {
		return errors.New("there are no files in it")
	}
	var skipped []error
	v.policy.Roots, skipped, err = attest.NewRoots(files...)
	for _, s := range skipped {
		v.log.Warn("not a certificate to trust", "roots", dir, "error", s)
	}
	return err
}

func (v *verifier) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /challenge", v.challenge)
	mux.HandleFunc("POST /answer", v.answer)
	return mux
}

// body reads a request's, and refuses what is too long.
func body(w http.ResponseWriter, r *http.Request) ([]byte, bool) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, attest.MaxAnswerBytes))
	if err != nil {
		http.Error(w, "the body cannot be read, or is too long", http.StatusRequestEntityTooLarge)
		return nil, false
	}
	return b, true
}

// challenge makes one and keeps it. With an answer, it is for that box's first contact.
func (v *verifier) challenge(w http.ResponseWriter, r *http.Request) {
	b, ok := body(w, r)
	if !ok {
		return
	}
	var credentials []attest.Credential
	if len(b) > 0 {
		a, err := attest.ParseAnswer(b)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		credential, err := attest.NewCredential(a)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		credentials = append(credentials, credential)
	}
	c, err := attest.NewChallenge(v.now(), credentials...)
	if err == nil {
		err = v.write("challenges", fmt.Sprintf("%s-%x.json", v.now().UTC().Format(stamp), c.Nonce), c.Marshal())
	}
	if err == nil {
		_, err = v.outstanding()
	}
	if err != nil {
		v.broken(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(c.Marshal()) // a box that went away asks again
}

func (v *verifier) broken(w http.ResponseWriter, err error) {
	v.log.Error("store", "error", err)
	http.Error(w, "the verifier's store is broken", http.StatusInternalServerError)
}

// write puts a file into a folder of the store, whole or not at all.
func (v *verifier) write(folder, name string, content []byte) error {
	if err := os.MkdirAll(filepath.Join(v.dir, folder), 0o755); err != nil {
		return err
	}
	return update.WriteFile(filepath.Join(v.dir, folder, name), content, 0o644)
}

// answer judges one, and records the box or raises the alarm.
func (v *verifier) answer(w http.ResponseWriter, r *http.Request) {
	b, ok := body(w, r)
	if !ok {
		return
	}
	a, err := attest.ParseAnswer(b)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c, err := v.claim(a)
	if err != nil {
		v.broken(w, err)
		return
	}
	records := attest.Records{Dir: os.DirFS(filepath.Join(v.dir, "records"))}
	known, file, err := records.Find(a)
	if err != nil {
		v.broken(w, err)
		return
	}
	p := v.policy
	p.Now, p.Known, p.MaxAge = v.now(), known, lifetime
	if known == nil && v.enrol {
		p.Accept = attest.FirstContact()
	}
	verdict := attest.Verify(a, c, &p)
	if err := v.keep(a, b, verdict, known, file); err != nil {
		v.broken(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if !verdict.Good() {
		w.WriteHeader(http.StatusForbidden)
	}
	_ = json.NewEncoder(w).Encode(verdict) // as above
}

// stamp begins the names of challenges, so that they are in the order of their age.
const stamp = "20060102T150405.000000000Z"

// outstanding are the challenges that may still be answered, as paths. The others go.
func (v *verifier) outstanding() (paths []string, err error) {
	dir := filepath.Join(v.dir, "challenges")
	entries, err := os.ReadDir(dir) // the oldest first
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	over := v.now().Add(-lifetime).UTC().Format(stamp)
	for i, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.Name() >= over && len(entries)-i <= v.challenges {
			paths = append(paths, path)
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // another instance may have
			return nil, err
		}
	}
	return paths, nil
}

// claim finds the challenge that the quote is over and takes it away, so that nobody's
// second answer counts. Nil when there is none.
func (v *verifier) claim(a *attest.Answer) (*attest.Challenge, error) {
	paths, err := v.outstanding()
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // another instance took it
		}
		if err != nil {
			return nil, err
		}
		c, err := attest.ParseChallenge(b)
		if err != nil || !a.Answers(c) {
			continue // half of one that is being written, or another
		}
		if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		return c, nil
	}
	return nil, nil
}

// keep records a good box. A known one that is not good is an alarm: somebody should
// look, and the answer says at what. It has the name of the record, not the one that the
// box claims.
func (v *verifier) keep(a *attest.Answer, answer []byte, verdict attest.Verdict, known *attest.Record, file string) error {
	if verdict.Good() {
		record, err := attest.NewRecord(a, verdict, known, v.now())
		if err != nil {
			return err
		}
		if known == nil {
			v.log.Info("new box", "box", verdict.Device, "release", verdict.Release)
		}
		return v.write("records", a.RecordName(), record.Marshal())
	}
	if known == nil {
		v.log.Warn("not good, and not known", "box", verdict.Device, "result", verdict.Result)
		return nil
	}
	text, err := json.MarshalIndent(verdict, "", "  ")
	if err != nil {
		return err
	}
	for _, c := range verdict.Checks {
		if c.Result == attest.Fail {
			v.log.Error("ALARM: a box has changed", "record", file, "box", verdict.Device, "check", c.Name, "found", c.Text, "differs", c.Event)
		}
	}
	name := strings.TrimSuffix(strings.TrimPrefix(file, attest.RecordPrefix), ".json")
	return errors.Join(v.write("alarms", name+".json", append(text, '\n')), v.write("alarms", name+".bin", answer))
}
