package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image/keys"
)

// carried says what to do about signatures that have to be made on another machine. What
// asks for them goes to standard output, a file a line.
func (c *cli) carried(err error) error {
	wanted := keys.Wanted(err)
	if len(wanted) == 0 {
		return err
	}
	var names, folders []string
	for _, w := range wanted {
		path := fromHere(w.Request)
		fmt.Fprintln(c.out, path)
		names, folders = append(names, w.Key), append(folders, filepath.Dir(path))
	}
	slices.Sort(names)
	slices.Sort(folders)
	names, folders = slices.Compact(names), slices.Compact(folders)
	by, in := strings.Join(names, " and "), strings.Join(folders, " and ")
	text := fmt.Sprintf("a signature by %s is wanted before anything is made; %s asks for it", by, in)
	if len(wanted) > 1 {
		text = fmt.Sprintf("%d signatures by %s are wanted before anything is made; %s asks for them", len(wanted), by, in)
	}
	var there []string
	for _, f := range folders {
		there = append(there, "holdfast keys sign "+filepath.Base(f)+" --keys KEYS")
	}
	return hinted{wantedError{text, err},
		fmt.Sprintf("take %s to the keys: %s; bring it back, and do this again", in, strings.Join(there, "; "))}
}

// wantedError is one sentence in place of as many as there are signatures.
type wantedError struct {
	text string
	err  error
}

func (e wantedError) Error() string { return e.text }
func (e wantedError) Unwrap() error { return e.err }

// fromHere is a path as a person would type it.
func fromHere(path string) string {
	dir, err := os.Getwd()
	if err != nil || !filepath.IsAbs(path) {
		return path
	}
	if rel, err := filepath.Rel(dir, path); err == nil && len(rel) < len(path) {
		return rel
	}
	return path
}

func runKeysSign(_ context.Context, c *cli, args []string) error {
	f := c.flags("keys sign", "FOLDER", `Sign what is asked for in FOLDER, on the machine with the keys. The other one has in
signers.json, in its folder of keys:  {"db": {"carried": "../to-sign"}}
What ends with exit code 4 there has written KEY-DIGEST.request files into that folder.
Each is signed whose private key, or program in signers.json, is in KEYS. Carry FOLDER
back, and do the same again there: a build needs this once, or twice when both db and
policy are here.

A signature is over a digest. Read the requests before, but do not believe what they say
they are for: build the same on a machine that you trust, with the same public files, and
compare the names of the requests. Remove those that nobody wants any more.

example: holdfast keys sign /media/stick/to-sign --keys keys
without this program: echo DIGEST | tr a-f A-F | basenc --base16 -d |
  openssl pkeyutl -sign -inkey KEY.key -pkeyopt digest:sha256 -out KEY-DIGEST.sig`)
	dir := f.String("keys", "", "`folder` with the private keys")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *dir == "" {
		return usageError{"keys sign needs --keys KEYS", "holdfast keys sign " + rest[0] + " --keys KEYS"}
	}
	list, err := keys.Answer(rest[0], *dir)
	left := 0
	for _, a := range list {
		if a.Outcome == keys.NoKey {
			left++
		}
		with := ""
		if a.Outcome == keys.Signed {
			with = " with " + a.With
		}
		fmt.Fprintf(c.out, "%s: %s%s: %s\n", a.AnswerName(), a.Outcome, with, plain(a.For))
	}
	switch {
	case err != nil:
		return err
	case len(list) == 0:
		return hinted{fmt.Errorf("%s asks for nothing: it has no .request files", rest[0]), "give the folder that holdfast named when it ended with exit code 4"}
	case left > 0:
		return fmt.Errorf("%d of %d requests need keys that are not in %s: %w", left, len(list), *dir, errNoKey)
	}
	return nil
}
