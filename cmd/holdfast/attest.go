package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"

	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/attest/corim"
	"github.com/holdfast-os/holdfast/seal/attest/tpmtools"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

const attestUsage = `usage: holdfast attest VERB [OPTIONS] ...

  challenge              make the file that boxes answer; with --answer, for first contact
  verify ANSWER          judge an answer, or a folder of them  [--json]
  export ANSWER -o FILE  an answer in the format of go-tpm-tools, for other verifiers
  erasure PROOF          judge a box's proof that the keys of its data are destroyed  [--json]
  corim -o FILE          the releases' reference values as a CoRIM, for other verifiers

A first contact takes two answers: the second is to a challenge made with --answer FIRST,
and is verified with --first-contact --record.

example:
  holdfast attest challenge -o stick/
  holdfast attest verify stick/ --challenge holdfast-challenge-5f3a9c01.json \
    --roots tpm-roots/ --repo repo --records boxes/
exit codes: 0 every answer is good, 1 failed, 2 usage, 3 an answer failed or is unknown,
  5 a proof that no TPM signed
`

func runAttest(ctx context.Context, c *cli, args []string) error {
	if len(args) == 0 {
		return usageError{"attest wants a verb: challenge, verify, export, erasure or corim", "holdfast attest -h"}
	}
	switch args[0] {
	case "challenge":
		return attestChallenge(ctx, c, args[1:])
	case "verify":
		return attestVerify(ctx, c, args[1:])
	case "export":
		return attestExport(ctx, c, args[1:])
	case "erasure":
		return attestErasure(ctx, c, args[1:])
	case "corim":
		return attestCoRIM(ctx, c, args[1:])
	case "help", "-h", "--help":
		_, err := io.WriteString(c.out, attestUsage)
		return err
	}
	return usageError{fmt.Sprintf("no verb attest %q", args[0]), "holdfast attest -h"}
}

func attestChallenge(_ context.Context, c *cli, args []string) error {
	f := c.flags("attest challenge", "", `Make a challenge: a file with a nonce, for one box or for many. Send it, keep a copy,
and give attest verify that copy. Boxes take it from a stick, under the name it has.
With --answer it holds a credential for each of the boxes that gave these answers,
which only the TPM that has both keys of the answer can open: first contact.

example: holdfast attest challenge --answer first/ -o stick/`)
	var answers texts
	f.Var(&answers, "answer", "`file` or folder with answers of boxes at first contact; repeat")
	out := f.String("o", ".", "`file` or folder to write to")
	if _, err := parse(f, args, 0); err != nil {
		return err
	}
	credentials, err := credentialsFor(c, answers)
	if err != nil {
		return err
	}
	challenge, err := attest.NewChallenge(time.Now(), credentials...)
	if err != nil {
		return err
	}
	path := *out
	if strings.HasSuffix(path, "/") {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, challenge.FileName())
	}
	if err := writeWhole(path, challenge.Marshal(), 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.out, path)
	return err
}

// credentialsFor makes one for each box, however many answers there are of it. Of several
// files, those that cannot be read are left out with a warning.
func credentialsFor(c *cli, answers []string) (list []attest.Credential, err error) {
	for _, path := range answers {
		files, err := filesAt("--answer", path, attest.AnswerPrefix)
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			credential, err := credentialFor(file)
			if err != nil && len(files) == 1 {
				return nil, err
			}
			if err != nil {
				fmt.Fprintln(c.err, "warning:", plain(err.Error())+": left out")
				continue
			}
			if !slices.ContainsFunc(list, func(o attest.Credential) bool { return bytes.Equal(o.AK, credential.AK) }) {
				list = append(list, credential)
			}
		}
	}
	if len(answers) > 0 && len(list) == 0 {
		return nil, errors.New("--answer: none of the files is an answer that can be read")
	}
	return list, nil
}

func credentialFor(file string) (k attest.Credential, err error) {
	b, err := readSmall(file, attest.MaxAnswerBytes)
	if err != nil {
		return k, err
	}
	a, err := attest.ParseAnswer(b)
	if err != nil {
		return k, fmt.Errorf("%s: %w", file, err)
	}
	if k, err = attest.NewCredential(a); err != nil {
		return k, fmt.Errorf("%s: %w", file, err)
	}
	return k, nil
}

// filesAt is the file, or those in the folder whose names begin so. None is an error. One
// that was never finished, since the stick was pulled out, does not count.
func filesAt(option, path, prefix string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), prefix) && !strings.HasSuffix(e.Name(), update.UnfinishedSuffix) {
			files = append(files, filepath.Join(path, e.Name()))
		}
	}
	if len(files) == 0 {
		if prefix != "" {
			prefix = " " + prefix + "…"
		}
		return nil, fmt.Errorf("%s: the folder %s has no file%s", option, path, prefix)
	}
	return files, nil
}

// attestOptions are what verify is told.
type attestOptions struct {
	challenges, roots, releases, dbx, programs texts
	repo, root, keys, records, accept, files   string
	record, firstContact, software, insecure   bool
	asJSON                                     bool
	manifests                                  []*image.Manifest // of releases that may run
	maxAge                                     time.Duration
}

// judging are the flags for what answers and proofs are judged by.
func (o *attestOptions) judging(f *flag.FlagSet) {
	f.Var(&o.challenges, "challenge", "`file` or folder with the challenges as they were sent; repeat")
	f.Var(&o.roots, "roots", "`file` or folder with certificates of TPM manufacturers, PEM or DER; repeat")
	f.StringVar(&o.repo, "repo", "", "`folder` of the update repository: its releases may run")
	f.StringVar(&o.root, "root", "", "`file` root.json to verify the repository with, instead of its own first")
	f.Var(&o.releases, "release", "`folder` of a build or manifest.json of a release that may run; repeat")
	f.StringVar(&o.keys, "keys", "", "`folder` with the vendor's Secure Boot certificates, instead of those that the releases tell")
	f.Var(&o.dbx, "dbx", "`file` with more revocations that every box must have: a signature list or .auth; repeat")
	f.Var(&o.programs, "program", "Authenticode `digest` in hex of a program that may start before the loader; repeat")
	f.StringVar(&o.records, "records", "", "`folder` with what is recorded of the boxes")
	f.BoolVar(&o.firstContact, "first-contact", false, "take boxes that nothing is recorded of")
	f.StringVar(&o.accept, "accept", "", "comma-separated `checks` that may be unknown")
	f.BoolVar(&o.software, "software-tpm", false, "take TPMs that are programs")
	f.BoolVar(&o.insecure, "no-secure-boot", false, "take boxes whose Secure Boot is off")
	f.DurationVar(&o.maxAge, "max-age", 30*24*time.Hour, "how old a challenge may be")
	f.BoolVar(&o.asJSON, "json", false, "one JSON object instead of text")
}

// flags are those of verify.
func (o *attestOptions) flags(f *flag.FlagSet) {
	o.judging(f)
	f.BoolVar(&o.record, "record", false, "record the boxes whose answers are good")
	f.StringVar(&o.files, "files", "", "`folder` to write the answers' files to: journal, logs")
}

func attestVerify(ctx context.Context, c *cli, args []string) error {
	f := c.flags("attest verify", "ANSWER", `Judge ANSWER, a file or a folder of them, and say of each check whether it passed, failed
or is unknown, which event differs and what it means. What is not given is unknown, and
what is unknown is not good. Exit code 3: an answer is not good. A box that was changed
by its owner's will, a new firmware say: remove its record and make first contact again.
The repository tells what may run, the keys, and what its releases demand in dbx; a box
adds that some starts after it has taken the release, and until then dbx is unknown.

example: holdfast attest verify stick/ --challenge sent.json --roots roots/ --repo repo --records boxes/`)
	var o attestOptions
	o.flags(f)
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if len(o.challenges) == 0 {
		return usageError{"attest verify needs --challenge FILE, the one that was sent", "make one: holdfast attest challenge"}
	}
	if o.record && o.records == "" {
		return usageError{"--record needs --records DIR", "holdfast attest verify -h"}
	}
	policy, err := o.policy(ctx, c)
	if err != nil {
		return err
	}
	challenges, err := readChallenges(o.challenges)
	if err != nil {
		return err
	}
	files, err := filesAt("ANSWER", rest[0], attest.AnswerPrefix)
	if err != nil {
		return err
	}
	result, err := o.judge(files, challenges, policy)
	if err != nil {
		return err
	}
	if err := show(c, result, o.asJSON); err != nil {
		return err
	}
	return result.err()
}

// policy reads all that answers are judged by.
func (o *attestOptions) policy(ctx context.Context, c *cli) (*attest.Policy, error) {
	p := &attest.Policy{Now: time.Now(), MaxAge: o.maxAge, SoftwareTPM: o.software, NoSecureBoot: o.insecure}
	if o.accept != "" {
		p.Accept = strings.Split(o.accept, ",")
		for _, name := range p.Accept {
			if !slices.Contains(attest.Checks(), name) {
				return nil, usageError{fmt.Sprintf("--accept %.40q is no check", name), "the checks are " + strings.Join(attest.Checks(), ", ")}
			}
		}
	}
	if o.firstContact {
		p.Accept = append(p.Accept, attest.FirstContact()...)
	}
	for _, text := range o.programs {
		b, err := hex.DecodeString(text)
		if err != nil || len(b) != sha256.Size {
			return nil, usageError{fmt.Sprintf("--program %.70q is not a SHA-256 digest in hex", text), "holdfast inspect tells those of EFI programs"}
		}
		p.Programs = append(p.Programs, pcr.Digest(b))
	}
	for _, read := range []func(context.Context, *cli, *attest.Policy) error{o.readRoots, o.readReferences, o.readKeys} {
		if err := read(ctx, c, p); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (o *attestOptions) readRoots(_ context.Context, c *cli, p *attest.Policy) (err error) {
	var files [][]byte
	for _, path := range o.roots {
		list, err := filesAt("--roots", path, "")
		if err != nil {
			return err
		}
		for _, file := range list {
			b, err := readSmall(file, 1<<20)
			if err != nil {
				return err
			}
			files = append(files, b)
		}
	}
	if len(files) == 0 {
		return nil
	}
	var skipped []error
	p.Roots, skipped, err = attest.NewRoots(files...)
	for _, s := range skipped {
		fmt.Fprintln(c.err, "warning:", plain(s.Error()))
	}
	return err
}

func (o *attestOptions) readReferences(ctx context.Context, _ *cli, p *attest.Policy) error {
	for _, path := range o.releases {
		if filepath.Base(path) == "manifest.json" {
			path = filepath.Dir(path)
		}
		_, m, err := releaseFolder(path)
		if err != nil {
			return err
		}
		o.manifests = append(o.manifests, m)
	}
	if o.repo != "" {
		releases, err := o.published(ctx)
		if err != nil {
			return err
		}
		for _, release := range releases {
			o.manifests = append(o.manifests, &release.Manifest)
		}
	}
	for _, m := range o.manifests {
		r, err := m.Reference()
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(p.References, func(have attest.Reference) bool { return have.Boot == r.Boot }) {
			p.References = append(p.References, r) // a release may be in several channels
		}
	}
	return nil
}

// published reads the releases of the repository, verified.
func (o *attestOptions) published(ctx context.Context) (list []*update.Release, err error) {
	root := o.root
	if root == "" {
		root = filepath.Join(o.repo, update.RootPath(1))
	}
	trusted, err := readSmall(root, maxRootJSON)
	if err != nil {
		return nil, err
	}
	source, err := update.OpenDir(o.repo)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	s, err := readSigned(ctx, source, trusted, time.Now())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.repo, err)
	}
	return s.releases(ctx)
}

// readKeys takes the keys from the folder, or else from the releases.
func (o *attestOptions) readKeys(_ context.Context, _ *cli, p *attest.Policy) error {
	dbx, err := o.readDBX()
	if err != nil {
		return err
	}
	if o.keys == "" {
		if len(dbx) == 0 && !slices.ContainsFunc(o.manifests, func(m *image.Manifest) bool { return len(m.Expected.SecureBoot) > 0 }) {
			return nil // the check of the keys says that there are none
		}
		p.Keys, err = image.VendorKeys(dbx, o.manifests...)
		return err
	}
	k, err := keys.Load(o.keys)
	if err != nil {
		return err
	}
	content := map[string][]byte{}
	for _, name := range []string{keys.PK, keys.KEK, keys.DB} {
		if content[name], err = k.Trusted(name); err != nil {
			return err
		}
	}
	p.Keys, err = attest.NewKeys(content[keys.PK], content[keys.KEK], content[keys.DB], dbx)
	return err
}

func (o *attestOptions) readDBX() (dbx []byte, err error) {
	for _, path := range o.dbx {
		b, err := readSmall(path, 1<<20)
		if err != nil {
			return nil, err
		}
		list, err := pcr.VariableAfter(nil, b, false)
		if err != nil { // not an .auth file
			list = b
		}
		dbx = append(dbx, list...)
	}
	return dbx, nil
}

func readChallenges(paths []string) (list []*attest.Challenge, err error) {
	for _, path := range paths {
		files, err := filesAt("--challenge", path, attest.ChallengePrefix)
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			b, err := readSmall(file, attest.MaxChallengeBytes)
			if err != nil {
				return nil, err
			}
			challenge, err := attest.ParseChallenge(b)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			list = append(list, challenge)
		}
	}
	return list, nil
}

// judge makes the verdict on each file. One that cannot be judged, or whose box's record
// cannot be read, has failed, and keeps nobody from judging the others.
func (o *attestOptions) judge(files []string, challenges []*attest.Challenge, policy *attest.Policy) (*attestation, error) {
	result := &attestation{Type: "attestation", Answers: make([]judged, len(files))}
	records := recordsIn(o.records)
	var items []attest.Item
	var at []int // the place of each item among the answers
	for i, file := range files {
		item, err := o.item(file, challenges, records)
		result.Answers[i] = judged{File: file, Recorded: item.Known != nil}
		if err != nil {
			result.Answers[i].Verdict = notJudged(err.Error(), "Nothing was verified. A damaged answer is fetched again; a damaged record comes from a copy, or is removed for a new first contact.")
			continue
		}
		items, at = append(items, item), append(at, i)
	}
	verdicts := attest.VerifyAll(items, policy)
	for i, v := range verdicts {
		result.Answers[at[i]].Verdict = v
		if err := o.keep(items[i], records, &result.Answers[at[i]]); err != nil {
			return nil, err
		}
	}
	return result, nil
}

// recordsIn are those in the folder; "" has none.
func recordsIn(dir string) *attest.Records {
	if dir == "" {
		return &attest.Records{}
	}
	return &attest.Records{Dir: os.DirFS(dir)}
}

func notJudged(text, meaning string) attest.Verdict {
	return attest.Verdict{Result: attest.Fail, Checks: []attest.Check{{Name: attest.CheckAnswer, Result: attest.Fail, Text: text, Meaning: meaning}}}
}

// item is an answer with the challenge it is to, or else the first one, and what is
// recorded of the box. The error belongs to this answer.
func (o *attestOptions) item(file string, challenges []*attest.Challenge, records *attest.Records) (item attest.Item, err error) {
	item.Challenge = challenges[0]
	if item.Answer, err = readSmall(file, attest.MaxAnswerBytes); err != nil {
		return item, err
	}
	a, err := attest.ParseAnswer(item.Answer)
	if err != nil {
		if a, err = tpmtools.Parse(item.Answer); err != nil {
			return item, nil // the verdict says what ParseAnswer does
		}
		item.Answer = a.Marshal()
	}
	if i := slices.IndexFunc(challenges, a.Answers); i >= 0 {
		item.Challenge = challenges[i]
	}
	item.Known, _, err = records.Find(a)
	if err != nil {
		return item, fmt.Errorf("%s: %w", o.records, err)
	}
	return item, nil
}

func attestExport(_ context.Context, c *cli, args []string) error {
	f := c.flags("attest export", "ANSWER", `Write ANSWER as go-tpm-tools has attestations, the protobuf message attest.Attestation,
and print the nonce in hex that its verifier has to be given. The message has no place
for the endorsement key, what the box says of itself, or its files.

example: holdfast attest export holdfast-answer-5f3a9c01-….bin -o attestation.pb`)
	out := f.String("o", "", "`file` to write")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *out == "" {
		return usageError{"attest export needs -o FILE", "holdfast attest export -h"}
	}
	b, err := readSmall(rest[0], attest.MaxAnswerBytes)
	if err != nil {
		return err
	}
	a, err := attest.ParseAnswer(b)
	if err != nil {
		return fmt.Errorf("%s: %w", rest[0], err)
	}
	message, err := tpmtools.Marshal(a)
	if err != nil {
		return err
	}
	nonce, err := tpmtools.Nonce(a)
	if err != nil {
		return err
	}
	if err := writeWhole(*out, message, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.out, "%x\n", nonce)
	return err
}

func attestCoRIM(ctx context.Context, c *cli, args []string) error {
	f := c.flags("attest corim", "", `Write the reference values of releases as a CoRIM (draft-ietf-rats-corim-10). With --sign
it is in a COSE_Sign1, signed by an Ed25519 or ECDSA P-256 key in PKCS #8, as openssl
genpkey makes it; the product is the signer's name.

example: holdfast attest corim --repo repo --sign corim-key.pem -o ledger.corim`)
	var o attestOptions
	f.StringVar(&o.repo, "repo", "", "`folder` of the update repository: all its releases")
	f.StringVar(&o.root, "root", "", "`file` root.json to verify the repository with, instead of its own first")
	f.Var(&o.releases, "release", "`folder` of a build or manifest.json of a release; repeat")
	key := f.String("sign", "", "`file` with the private key to sign with")
	out := f.String("o", "", "`file` to write")
	if _, err := parse(f, args, 0); err != nil {
		return err
	}
	if *out == "" || o.repo == "" && len(o.releases) == 0 {
		return usageError{"attest corim needs -o FILE, and --repo or --release", "holdfast attest corim -h"}
	}
	var p attest.Policy
	if err := o.readReferences(ctx, c, &p); err != nil {
		return err
	}
	if len(p.References) == 0 {
		return fmt.Errorf("%s has no release", o.repo)
	}
	b, err := corim.Marshal(p.References[0].Product, p.References)
	if err != nil {
		return err
	}
	if *key != "" {
		signer, err := repo.LoadKey(*key)
		if err != nil {
			return err
		}
		if b, err = corim.Sign(b, signer, p.References[0].Product); err != nil {
			return err
		}
	}
	if err := writeWhole(*out, b, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.out, "%s: %d releases\n", *out, len(p.References))
	return err
}

// keep writes what was asked for: the record of a good box, and the answer's files.
func (o *attestOptions) keep(item attest.Item, records *attest.Records, answer *judged) error {
	a, err := attest.ParseAnswer(item.Answer)
	if err != nil {
		return nil // the verdict says so
	}
	if o.record && answer.Verdict.Good() {
		other, file, err := records.Find(a) // again: an answer before this one may have been of its TPM
		if err != nil {
			return err
		}
		if other != nil && file != a.RecordName() {
			answer.Verdict = notJudged("it is of the same TPM as "+file+", which was recorded just now", "Hostile: one box passes for two. Innocent: its data was made anew between two answers.")
			return nil
		}
		record, err := attest.NewRecord(a, answer.Verdict, item.Known, time.Now())
		if err != nil {
			return err
		}
		if err := os.MkdirAll(o.records, 0o755); err != nil {
			return err
		}
		if err := update.WriteFile(filepath.Join(o.records, a.RecordName()), record.Marshal(), 0o644); err != nil {
			return err
		}
		answer.Recorded = true
		records.Add(a.RecordName(), record)
	}
	if o.files == "" {
		return nil
	}
	dir := filepath.Join(o.files, strings.TrimSuffix(filepath.Base(answer.File), ".bin"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, file := range a.Attachments {
		if err := update.WriteFile(filepath.Join(dir, file.Name), file.Data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// attestation is what verify tells.
type attestation struct {
	Type    string   `json:"type"` // "attestation"
	Answers []judged `json:"answers"`
}

// judged is one answer of it.
type judged struct {
	File     string         `json:"file"`
	Verdict  attest.Verdict `json:"verdict"`
	Recorded bool           `json:"recorded"` // the box is
}

func (r *attestation) wrong() []string { return nil }

func (r *attestation) count(result attest.Result) (n int) {
	for _, a := range r.Answers {
		if a.Verdict.Result == result {
			n++
		}
	}
	return n
}

// print shows every check of a single answer, and of many what is not in order.
func (r *attestation) print(s *sheet) {
	for _, a := range r.Answers {
		who := a.File
		if a.Verdict.Device != "" { // the answer can be read
			who += ": " + a.Verdict.Device
		}
		s.line(who + ": " + strings.ToUpper(string(a.Verdict.Result)))
		s.checks(a.Verdict, len(r.Answers) > 1)
	}
	s.line(fmt.Sprintf("%d good, %d unknown, %d failed", r.count(attest.Pass), r.count(attest.Unknown), r.count(attest.Fail)))
}

// checks are the rows of a verdict; brief leaves out what is in order.
func (s *sheet) checks(v attest.Verdict, brief bool) {
	for _, check := range v.Checks {
		if brief && check.Result == attest.Pass {
			continue
		}
		result := string(check.Result)
		if slices.Contains(v.Accepted, check.Name) {
			result = "accepted"
		}
		s.fact(result, check.Name, check.Text)
		if check.Event != "" {
			s.fact("", "", "differs: "+check.Event)
		}
		if check.Meaning != "" {
			s.fact("", "", check.Meaning)
		}
	}
}

// err is what makes the exit code 3.
func (r *attestation) err() error {
	bad := len(r.Answers) - r.count(attest.Pass)
	if bad == 0 {
		return nil
	}
	err := fmt.Errorf("%w: %d of %d answers are not good", errVerification, bad, len(r.Answers))
	for _, a := range r.Answers {
		if a.Verdict.Of(attest.CheckAK).Result == attest.Unknown && len(a.Verdict.Checks) > 1 {
			return hinted{err, "first contact: holdfast attest challenge --answer " + a.File}
		}
	}
	return err
}
