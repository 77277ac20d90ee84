package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

// texts is an option that may be given several times.
type texts []string

func (t *texts) String() string     { return strings.Join(*t, ",") }
func (t *texts) Set(s string) error { *t = append(*t, s); return nil }

func runBundle(ctx context.Context, c *cli, args []string) error {
	f := c.flags("bundle", "RELEASE", `Write a published release with all its signatures to one file, to be carried by hand.
RELEASE is its version, or the folder it was built in. No keys are needed.

example: holdfast bundle 1.2.3 --repo repo -o ledger-1.2.3.bundle`)
	out := f.String("o", "", "output `file`; must not exist")
	dir := f.String("repo", "repo", "`folder` of the repository")
	channel := f.String("channel", "stable", "`name` of the channel")
	var from, recipients texts
	f.Var(&from, "from", "only what a device needs that runs this `release`: a version, build folder or root hash; repeat")
	f.Var(&recipients, "recipient", "encrypt to this `recipient`, age1…; repeat")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *out == "" {
		return usageError{"bundle needs -o FILE", "holdfast bundle " + rest[0] + " --repo " + *dir + " -o FILE"}
	}
	o := repo.BundleOptions{Channel: *channel}
	for _, r := range recipients {
		parsed, err := age.ParseRecipients(strings.NewReader(r))
		if err != nil {
			return usageError{fmt.Sprintf("--recipient %q: %v", r, err), "age-keygen prints one, age1…"}
		}
		o.Recipients = append(o.Recipients, parsed...)
	}
	if _, err := os.Lstat(*out); err == nil {
		return hinted{fmt.Errorf("%s exists already", *out), "remove it or choose another name"}
	}
	s, err := readRepo(ctx, *dir)
	if err != nil {
		return err
	}
	t, err := s.resolve(rest[0], *channel)
	if err != nil {
		return err
	}
	o.Product, o.Arch, o.Version = t.Product, t.Arch, t.Version
	for _, old := range from {
		hash, err := s.rootHash(old, t)
		if err != nil {
			return err
		}
		o.From = append(o.From, hash)
	}
	size, err := writeBundle(ctx, *dir, *out, o)
	if err != nil {
		return err
	}
	strict, lenient := s.until()
	fmt.Fprintf(c.out, "%s: %s, %s\n", *out, t.Name(), bytesText(size))
	fmt.Fprintf(c.out, "usable until %s, by lenient devices until %s\n", dayText(strict), dayText(lenient))
	if strict.Before(s.now) {
		c.problemText("warning", "devices that are strict about carried updates refuse it: the repository was not renewed", "holdfast repo refresh "+*dir)
	}
	return nil
}

// problemText prints one remark and its remedy.
func (c *cli) problemText(kind, text, hint string) {
	fmt.Fprintf(c.err, "%s: %s\nhint: %s\n", kind, text, hint)
}

// readRepo verifies a published repository under its own first root, which is what
// the person trusts who names it.
func readRepo(ctx context.Context, dir string) (_ *signed, err error) {
	root, err := readSmall(filepath.Join(dir, update.RootPath(1)), maxRootJSON)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hinted{err, "name the folder of the repository with --repo"}
	}
	if err != nil {
		return nil, err
	}
	source, err := update.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	return readSigned(ctx, source, root, time.Now())
}

// resolve finds a listed release by version, whole name or build folder.
func (s *signed) resolve(release, channel string) (update.Target, error) {
	info, err := os.Stat(release)
	if err != nil || !info.IsDir() {
		t, err := pickRelease(s.targets, release, channel)
		var h hinted
		if errors.As(err, &h) {
			h.hint = "add it with holdfast repo add; holdfast repo status lists what there is"
			return t, h
		}
		return t, err
	}
	_, m, err := releaseFolder(release)
	if err != nil {
		return update.Target{}, err
	}
	for _, t := range s.targets {
		if t.Channel == channel && t.RootHash == m.Verity.RootHash && t.Product == m.Name && t.Version == m.Version {
			return t, nil
		}
	}
	return update.Target{}, hinted{fmt.Errorf("the build in %s, %s %s with root %s, is not published in channel %s", release, m.Name, m.Version, short(m.Verity.RootHash), channel),
		"publish it first: holdfast repo add REPO " + release}
}

var rootHashForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// rootHash finds what --from names.
func (s *signed) rootHash(old string, t update.Target) (string, error) {
	if rootHashForm.MatchString(old) {
		return old, nil
	}
	if info, err := os.Stat(old); err == nil && info.IsDir() {
		_, m, err := releaseFolder(old)
		if err != nil {
			return "", err
		}
		return m.Verity.RootHash, nil
	}
	for _, have := range s.targets {
		if have.Version == old && have.Product == t.Product && have.Arch == t.Arch {
			return have.RootHash, nil
		}
	}
	return "", hinted{fmt.Errorf("--from %s: no such release is listed", old), "give its root hash, or the folder it was built in"}
}

// writeBundle makes the file appear only when it is whole.
func writeBundle(ctx context.Context, dir, out string, o repo.BundleOptions) (size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(out), ".holdfast-bundle-")
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = repo.Bundle(ctx, dir, f, o)
	if err == nil {
		err = errors.Join(f.Chmod(0o644), f.Sync())
	}
	info, statErr := f.Stat()
	if err = errors.Join(err, statErr, f.Close()); err != nil {
		return 0, err
	}
	return info.Size(), os.Rename(f.Name(), out)
}

// openedBundle is a bundle whose content was compared with its sums and its
// signatures with the trusted root.
type openedBundle struct {
	file    *partition.File
	signed  *signed
	carried *carried
}

// openBundle checks the file at path as a device would.
func openBundle(ctx context.Context, p *progress, path, root, identity string) (_ *openedBundle, err error) {
	trusted, err := readSmall(root, maxRootJSON)
	if err != nil {
		return nil, fmt.Errorf("trusted root: %w", err)
	}
	var identities []age.Identity
	if identity != "" {
		text, err := readSmall(identity, 64<<10)
		if err != nil {
			return nil, err
		}
		if identities, err = age.ParseIdentities(strings.NewReader(string(text))); err != nil {
			return nil, fmt.Errorf("%s: %w", identity, err)
		}
	}
	if _, err := os.Stat(path); err != nil {
		return nil, err // in words for files, not for disks
	}
	file, err := partition.OpenReadOnly(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", path, err), file.Close())
		}
	}()
	seen := &watched{r: interruptible{ctx, file}, step: build.Step{What: "check " + filepath.Base(path), TotalBytes: file.Size()}, progress: p.step}
	bundle, err := update.OpenBundle(seen, file.Size(), identities...)
	if err != nil {
		if errors.Is(err, update.ErrEncrypted) {
			err = hinted{err, "give the key with --identity FILE"}
		}
		return nil, err
	}
	if err := bundle.Verify(ctx); err != nil {
		return nil, err
	}
	s, err := readSigned(ctx, bundle, trusted, time.Now())
	if err != nil {
		return nil, err
	}
	found, err := s.findCarried(ctx, bundle)
	if err != nil {
		return nil, err
	}
	seen.progress = func(build.Step) {} // what is read from here on is somebody else's step
	return &openedBundle{file, s, found}, nil
}

// bundle is what verify tells.
type bundle struct {
	Type      string          `json:"type"` // "bundle"
	SizeBytes int64           `json:"size_bytes"`
	Target    update.Target   `json:"target"`
	Notes     string          `json:"notes,omitempty"`
	Manifest  *image.Manifest `json:"manifest"`
	Blobs     []update.Blob   `json:"blobs"` // those that it has
	// Whole says that it has all of the root. Otherwise it is for devices that run
	// one of the root hashes From.
	Whole bool        `json:"whole"`
	From  []string    `json:"from,omitempty"`
	Roles []roleState `json:"roles"`
	// Changes are of keys, between the trusted root and the bundle's newest.
	Changes []string `json:"changes,omitempty"`
	// Until is when strict devices stop taking it, UntilLenient when lenient ones do.
	Until        time.Time `json:"until"`
	UntilLenient time.Time `json:"until_lenient"`
	// Late says that strict devices refuse it already.
	Late bool `json:"late"`
}

func (b *bundle) wrong() []string { return nil }

func (o *openedBundle) describe() *bundle {
	rel := o.carried.Release
	b := &bundle{
		Type: "bundle", SizeBytes: o.file.Size(), Target: o.carried.Target, Notes: rel.Notes, Manifest: &rel.Manifest,
		Whole: o.carried.whole, From: o.carried.from, Roles: o.signed.roles, Changes: o.signed.changes, Late: o.signed.answer.Late,
	}
	b.Until, b.UntilLenient = o.signed.until()
	for _, blob := range rel.Blobs {
		if o.carried.Has(blob) {
			b.Blobs = append(b.Blobs, blob)
		}
	}
	return b
}

func (b *bundle) print(s *sheet) {
	t := b.Target
	s.line(fmt.Sprintf("bundle of %s %s, %s, channel %s, %s", t.Product, t.Version, t.Arch, t.Channel, bytesText(b.SizeBytes)))
	s.fact("published", timeText(t.PublishedSec))
	s.fact("built as of", timeText(b.Manifest.BuildTimeSec))
	s.fact("root hash", t.RootHash)
	s.fact("asks for", targetTerms(t))
	s.facts("notes", strings.Split(strings.TrimSpace(b.Notes), "\n")...)
	takes := "any release"
	if !b.Whole {
		takes = "root " + strings.Join(b.From, ", ")
	}
	s.fact("updates from", takes)
	for i, blob := range b.Blobs {
		s.fact(when(i == 0, "holds"), blob.Role, bytesText(blob.SizeBytes))
	}
	for _, r := range b.Roles {
		s.fact(r.Role, r.cells()...)
	}
	s.facts("keys changed", b.Changes...)
	late := ""
	if b.Late {
		late = " (OVER: only lenient devices take it)"
	}
	s.fact("usable until", dayText(b.Until)+late)
	s.fact("", "by lenient devices until "+dayText(b.UntilLenient))
}

func runVerify(ctx context.Context, c *cli, args []string) (err error) {
	f := c.flags("verify", "BUNDLE", `Check BUNDLE as a device with this root.json would, and say what it is: every byte
against its hash, every signature, and until when it is usable. A device that has
seen newer metadata, or is strict about expiry, refuses more. Exit code 3: it is
damaged, forged, or over.

example: holdfast verify ledger-1.2.3.bundle --root root.json`)
	root := f.String("root", "", "`file` root.json of the appliance, from holdfast repo root")
	identity := f.String("identity", "", "`file` with the age key, when the bundle is encrypted")
	asJSON := f.Bool("json", false, "one JSON object instead of text")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *root == "" {
		return usageError{"verify needs --root root.json", "holdfast verify " + rest[0] + " --root root.json"}
	}
	p := newProgress(c.err)
	if *asJSON {
		p = newProgress(io.Discard)
	}
	o, err := openBundle(ctx, p, rest[0], *root, *identity)
	p.end()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.file.Close()) }()
	return show(c, o.describe(), *asJSON)
}
