package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

const repoUsage = `usage: holdfast repo VERB DIR [OPTIONS] ARGUMENTS

  init DIR                       make the keys and the first root; DIR is for the web server
  root DIR                       print root.json, which a spec's update section names
  add DIR OUT                    publish the release that holdfast build -o OUT made
  rollout DIR VERSION PERCENT    how much of the fleet gets it
  promote DIR VERSION CHANNEL    list it in another channel, too
  withdraw DIR VERSION           take it off the list
  push DIR oci://HOST/NAME       publish it in a container registry, too
  refresh DIR                    renew what runs out; from a timer, every day
  status DIR                     what is published, until when it holds  [--json]
  rotate DIR ROLE                replace a key of root, targets, snapshot or timestamp
  sign FILE --keys KEYS          sign on the machine with the keys
  import DIR FILE                bring that back
  prune DIR                      remove what no listed release needs

Keys are in DIR.keys unless --keys says otherwise; those of root and targets belong on
another machine. What waits for their signatures is in DIR.private/pending, and ends
with exit code 4.

example: holdfast repo init repo && holdfast repo add repo out --rollout 10
'holdfast repo VERB -h' tells a verb's options.
`

// repoVerbs are the words behind repo.
func repoVerbs() []verb {
	return []verb{
		{"init", repoInit}, {"root", repoRoot}, {"add", repoAdd}, {"rollout", repoRollout}, {"promote", repoPromote},
		{"withdraw", repoWithdraw}, {"push", repoPush}, {"refresh", repoRefresh}, {"status", repoStatus}, {"rotate", repoRotate},
		{"sign", repoSign}, {"import", repoImport}, {"prune", repoPrune},
	}
}

func runRepo(ctx context.Context, c *cli, args []string) error {
	return waiting(noun(ctx, c, "repo", repoUsage, repoVerbs(), args))
}

// waiting says what to do about metadata that waits for signatures.
func waiting(err error) error {
	var p *repo.PendingError
	if !errors.As(err, &p) {
		return err
	}
	dir := filepath.Dir(filepath.Dir(p.Path))
	return hinted{err, fmt.Sprintf("take %s to the keys of %s: holdfast repo sign %s --keys KEYS; then: holdfast repo import %s %s",
		p.Path, p.Role, filepath.Base(p.Path), strings.TrimSuffix(dir, ".private"), filepath.Base(p.Path))}
}

// keysFlag is where the keys of a repository are.
func keysFlag(f *flag.FlagSet) *string {
	return f.String("keys", "", "`folder` with the keys at hand (default: DIR.keys)")
}

func keysFolder(given, dir string) string {
	if given != "" {
		return given
	}
	return filepath.Clean(dir) + ".keys"
}

// openRepo opens a repository with the keys at hand, which may be none. Where another
// process changes it, a verb that does so too waits until ctx ends.
func (c *cli) openRepo(ctx context.Context, dir, keys string) (*repo.Repo, error) {
	at := keysFolder(keys, dir)
	signers, err := repo.LoadKeys(at)
	if _, missing := os.Stat(at); keys == "" && errors.Is(missing, fs.ErrNotExist) {
		signers, err = nil, nil
	}
	if err != nil {
		return nil, err
	}
	r, err := repo.Open(dir, signers, time.Now())
	var damaged *repo.DamagedError
	if errors.As(err, &damaged) {
		return nil, hinted{err, "it is damaged; restore " + damaged.Folder + " from a copy"}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hinted{err, "make one with: holdfast repo init " + dir}
	}
	if err != nil {
		return nil, err
	}
	r.Busy = c.waitForOther(ctx)
	return r, nil
}

// waitForOther says so once, when it takes more than a moment.
func (c *cli) waitForOther(ctx context.Context) func(*repo.BusyError) error {
	const moment = 500 * time.Millisecond
	var began time.Time
	said := false
	return func(busy *repo.BusyError) error {
		if began.IsZero() {
			began = time.Now()
		}
		if !said && time.Since(began) > moment {
			fmt.Fprintf(c.err, "waiting: %v\n", busy)
			said = true
		}
		select {
		case <-time.After(50 * time.Millisecond):
			return nil
		case <-ctx.Done():
			return fmt.Errorf("stopped: %w", busy)
		}
	}
}

func repoInit(_ context.Context, c *cli, args []string) error {
	f := c.flags("repo init", "DIR", `Make a repository in DIR, its policy in DIR.private and its keys, which are never
overwritten. Publish DIR alone. Move root-*.pem and targets-*.pem from the keys to a
machine without a network; root's are needed to change keys, targets' for each release.

example: holdfast repo init repo --sign root=2/3`)
	keys := keysFlag(f)
	online := f.Int("online-days", 14, "how many `days` timestamp holds; a device that hears nothing newer stops updating then")
	release := f.Int("release-days", 365, "how many `days` the list of releases holds")
	root := f.Int("root-days", 3*365, "how many `days` root holds")
	sign := f.String("sign", "", "`ROLE=M/N,...`: make N keys for a role, M of which must sign (default 1/1)")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	const day = 24 * time.Hour
	o := repo.Options{Lifetime: map[string]time.Duration{
		repo.Timestamp: time.Duration(*online) * day, repo.Snapshot: time.Duration(max(*online, 90)) * day,
		repo.Targets: time.Duration(*release) * day, repo.Root: time.Duration(*root) * day,
	}}
	for name, days := range map[string]int{"online": *online, "release": *release, "root": *root} {
		if days < 1 || days > 20*365 {
			return usageError{fmt.Sprintf("--%s-days %d is not between 1 and 7300", name, days), "holdfast repo init -h"}
		}
	}
	if err := parseThresholds(*sign, &o); err != nil {
		return err
	}
	dir, at := rest[0], keysFolder(*keys, rest[0])
	if have, _ := filepath.Glob(filepath.Join(at, "*.pem")); len(have) > 0 {
		return hinted{fmt.Errorf("there are keys in %s, which are never overwritten", at), "choose another folder with --keys"}
	}
	if err := createRepo(dir, at, o); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s: publish it; it holds no secrets\n%s: policy and what waits for signatures; keep a copy\n%s: keys; move root-*.pem and targets-*.pem to a machine without a network\n",
		dir, filepath.Clean(dir)+".private", at)
	return nil
}

// createRepo leaves nothing behind when it fails, and nothing of another one that makes
// the same repository alone.
func createRepo(dir, keys string, o repo.Options) error {
	private := filepath.Clean(dir) + ".private"
	var made []string
	undo := func(err error) error {
		for _, d := range made {
			err = errors.Join(err, os.RemoveAll(d))
		}
		return err
	}
	for _, d := range []string{dir, private, keys} {
		if err := os.MkdirAll(filepath.Dir(filepath.Clean(d)), 0o755); err != nil {
			return undo(err)
		}
		perm := fs.FileMode(0o700)
		if d == dir {
			perm = 0o755
		}
		err := os.Mkdir(d, perm)
		if err == nil {
			made = append(made, d)
		} else if !errors.Is(err, fs.ErrExist) {
			return undo(err)
		}
	}
	if _, err := repo.Create(dir, keys, time.Now(), o); err != nil {
		return undo(err)
	}
	return nil
}

// parseThresholds reads "root=2/3,targets=1/2".
func parseThresholds(list string, o *repo.Options) error {
	o.Keys, o.Threshold = map[string]int{}, map[string]int{}
	if list == "" {
		return nil
	}
	for word := range strings.SplitSeq(list, ",") {
		role, numbers, _ := strings.Cut(word, "=")
		m, n, _ := strings.Cut(numbers, "/")
		must, err1 := strconv.Atoi(m)
		of, err2 := strconv.Atoi(n)
		if errors.Join(err1, err2) != nil || !slices.Contains(repo.Roles(), role) || must < 1 || of < must || of > 20 {
			return usageError{fmt.Sprintf("%q is not ROLE=M/N with a role of %s", word, strings.Join(repo.Roles(), ", ")), "holdfast repo init repo --sign root=2/3"}
		}
		o.Keys[role], o.Threshold[role] = of, must
	}
	return nil
}

func repoRoot(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo root", "DIR", `Print the newest root.json: whom devices trust. A spec names it in update: {root: FILE}.

example: holdfast repo root repo > root.json`)
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	r, err := c.openRepo(ctx, rest[0], "")
	if err != nil {
		return err
	}
	b, err := r.RootJSON()
	if err != nil {
		return err
	}
	_, err = c.out.Write(b)
	return err
}

// releaseFolder accepts a build's folder and a release's.
func releaseFolder(path string) (string, *image.Manifest, error) {
	if _, err := os.Stat(filepath.Join(path, image.ManifestName)); err != nil {
		path = filepath.Join(path, build.ReleaseName)
	}
	dir, err := os.OpenRoot(path)
	if err != nil {
		return "", nil, err
	}
	defer dir.Close()
	m, err := readManifest(dir)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", filepath.Join(path, image.ManifestName), err)
	}
	return path, m, nil
}

func repoAdd(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo add", "DIR OUT", `Publish the release that holdfast build -o OUT made. Every file is compared with its manifest.

example: holdfast repo add repo out --rollout 10 --notes 'fixes the clock'`)
	keys := keysFlag(f)
	o := repo.AddOptions{}
	f.StringVar(&o.Channel, "channel", "stable", "`name` of the channel")
	percent := f.Int("rollout", 100, "`percent` of the fleet that gets it")
	f.StringVar(&o.MinFrom, "min-from", "", "oldest `version` that can update to it")
	epoch := f.Int64("epoch", -1, "refuse a build whose spec has another security `epoch`")
	hardware := f.String("hardware", "", "`models` it is for, separated by commas; box-* is every box-… (default: all)")
	f.StringVar(&o.Notes, "notes", "", "`text` for people")
	f.IntVar(&o.KeepDeltas, "patches", 3, "make patches from this many `releases` before it")
	rest, err := parse(f, args, 2)
	if err != nil {
		return err
	}
	if *percent < 0 || *percent > 100 {
		return usageError{fmt.Sprintf("--rollout %d is not between 0 and 100", *percent), "holdfast repo add -h"}
	}
	if o.MinFrom != "" && !update.ValidVersion(o.MinFrom) {
		return usageError{fmt.Sprintf("--min-from %q is not a version", o.MinFrom), "numbers with dots, such as 1.0.0 or 1.0.0-rc1"}
	}
	if err := checkChannel("--channel ", o.Channel); err != nil {
		return err
	}
	o.RolloutPercent = *percent
	if *percent == 0 {
		o.RolloutPercent = -1 // 0 is all there
	}
	if *hardware != "" {
		o.Hardware = strings.Split(*hardware, ",")
	}
	folder, m, err := releaseFolder(rest[1])
	if err != nil {
		return hinted{err, "build it first: holdfast build SPEC -o " + rest[1]}
	}
	if *epoch >= 0 && *epoch != m.Epoch {
		return hinted{fmt.Errorf("%s was built with the security epoch %d, not %d", rest[1], m.Epoch, *epoch),
			fmt.Sprintf("write update: {epoch: %d} into the spec and build again; devices go by what is in the release", *epoch)}
	}
	o.Epoch = m.Epoch
	r, err := c.openRepo(ctx, rest[0], *keys)
	if err != nil {
		return err
	}
	p := newProgress(c.err)
	rel, err := r.Add(ctx, folder, o, packer{p.step})
	p.end()
	if rel == nil || err != nil && exitCode(err) != exitWaits {
		return err
	}
	s := &sheet{}
	printAdded(s, rel.Target(o.Channel, *percent), rel)
	return errors.Join(s.writeTo(c.out), err)
}

// checkChannel refuses a channel that no spec can name, and so no box be in.
func checkChannel(option, name string) error {
	if spec.ValidChannel(name) {
		return nil
	}
	return usageError{fmt.Sprintf("%s%q is not the name of a channel", option, name), spec.ChannelHint + ", such as stable"}
}

func printAdded(s *sheet, t update.Target, rel *update.Release) {
	s.line(t.Name())
	for _, b := range rel.Blobs {
		from := ""
		if b.From != "" {
			from = "from root " + short(b.From)
		}
		s.fact(b.Role, bytesText(b.SizeBytes), from)
	}
}

// short is the beginning of a hash, for people.
func short(hash string) string { return hash[:min(16, len(hash))] + "…" }

// edit is what the verbs share that change one listed release.
func (c *cli) edit(ctx context.Context, name, arguments, about string, args []string, n int, do func(r *repo.Repo, name string, rest []string) error) error {
	f := c.flags(name, arguments, about)
	keys := keysFlag(f)
	channel := f.String("channel", "", "`name` of its channel, where it is in several")
	rest, err := parse(f, args, n)
	if err != nil {
		return err
	}
	r, err := c.openRepo(ctx, rest[0], *keys)
	if err != nil {
		return err
	}
	status, err := r.Status()
	if err != nil {
		return err
	}
	t, err := pickRelease(status.Releases, rest[1], *channel)
	if err != nil {
		return err
	}
	return do(r, t.Name(), rest[2:])
}

// pickRelease finds a release by version or by its whole name.
func pickRelease(list []update.Target, version, channel string) (update.Target, error) {
	var found []update.Target
	var names []string
	for _, t := range list {
		if (t.Version == version || t.Name() == version) && (channel == "" || t.Channel == channel) {
			found = append(found, t)
			names = append(names, t.Name())
		}
	}
	switch len(found) {
	case 0:
		return update.Target{}, hinted{fmt.Errorf("no release %q is published", version), "holdfast repo status DIR lists them"}
	case 1:
		return found[0], nil
	}
	return update.Target{}, hinted{fmt.Errorf("%q is %s", version, strings.Join(names, " and ")), "give the whole name in place of the version"}
}

func repoRollout(ctx context.Context, c *cli, args []string) error {
	return c.edit(ctx, "repo rollout", "DIR VERSION PERCENT", `Change how much of the fleet gets a release. Growing never takes a device out again;
0 stops it for all that do not have it yet.

example: holdfast repo rollout repo 1.2.3 50`, args, 3, func(r *repo.Repo, name string, rest []string) error {
		percent, err := strconv.Atoi(strings.TrimSuffix(rest[0], "%"))
		if err != nil || percent < 0 || percent > 100 {
			return usageError{fmt.Sprintf("%q is not a percentage from 0 to 100", rest[0]), "holdfast repo rollout repo 1.2.3 50"}
		}
		return r.Rollout(name, percent)
	})
}

func repoPromote(ctx context.Context, c *cli, args []string) error {
	return c.edit(ctx, "repo promote", "DIR VERSION CHANNEL", `List a release in another channel, too, for all devices there. Its content is the same.

example: holdfast repo promote repo 1.2.3 stable`, args, 3, func(r *repo.Repo, name string, rest []string) error {
		if err := checkChannel("", rest[0]); err != nil {
			return err
		}
		return r.Promote(name, rest[0], 100)
	})
}

func repoWithdraw(ctx context.Context, c *cli, args []string) error {
	return c.edit(ctx, "repo withdraw", "DIR VERSION", `Take a release off the list. Devices that have it keep it; a newer version replaces it.

example: holdfast repo withdraw repo 1.2.3`, args, 2, func(r *repo.Repo, name string, _ []string) error {
		return r.Withdraw(name)
	})
}

func repoRefresh(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo refresh", "DIR", `Renew timestamp and snapshot, and the list of releases when half of its time is over
and its key is at hand. What waits for signatures goes on as far as the keys at hand reach.

example, in a crontab: 0 4 * * * holdfast repo refresh /srv/repo`)
	keys := keysFlag(f)
	root := f.Bool("root", false, "renew root, too, which needs its keys")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	r, err := c.openRepo(ctx, rest[0], *keys)
	if err != nil {
		return err
	}
	if *root {
		if err := r.RenewRoot(); err != nil {
			return err
		}
	}
	return r.Refresh()
}

func repoRotate(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo rotate", "DIR ROLE", `Replace a key of root, targets, snapshot or timestamp. Devices take the new one when as
many keys of root have signed as must. The new key is made in the folder of the keys.

example: holdfast repo rotate repo timestamp`)
	keys := keysFlag(f)
	old := f.String("old", "", "`id` of the key to take away, or its beginning, where the role has several")
	public := f.String("new", "", "PEM `file` with the public key, when the key was made elsewhere")
	rest, err := parse(f, args, 2)
	if err != nil {
		return err
	}
	role := rest[1]
	if !slices.Contains(repo.Roles(), role) {
		return usageError{fmt.Sprintf("%q is not a role", role), "one of " + strings.Join(repo.Roles(), ", ")}
	}
	r, err := c.openRepo(ctx, rest[0], *keys)
	if err != nil {
		return err
	}
	id, err := keyToReplace(r, role, *old)
	if err != nil {
		return err
	}
	if *public != "" {
		fresh, err := readPublicKey(*public)
		if err != nil {
			return err
		}
		return r.Rotate(role, id, fresh)
	}
	path, key, err := newKey(keysFolder(*keys, rest[0]), role)
	if err != nil {
		return err
	}
	r.AddKeys(key)
	if err := r.Rotate(role, id, key.Public()); err != nil {
		if exitCode(err) == exitWaits {
			fmt.Fprintln(c.out, path)
			return err
		}
		return errors.Join(err, os.Remove(path))
	}
	fmt.Fprintln(c.out, path)
	return nil
}

func keyToReplace(r *repo.Repo, role, prefix string) (string, error) {
	status, err := r.Status()
	if err != nil {
		return "", err
	}
	var fit []string
	for _, st := range status.Roles {
		if st.Role != role {
			continue
		}
		for _, id := range st.KeyIDs {
			if strings.HasPrefix(id, prefix) {
				fit = append(fit, id)
			}
		}
	}
	if len(fit) != 1 {
		return "", hinted{fmt.Errorf("%d keys of %s fit --old %q", len(fit), role, prefix), "holdfast repo status DIR --json lists them"}
	}
	return fit[0], nil
}

// newKey makes a key under the first free name.
func newKey(dir, role string) (string, crypto.Signer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, err
	}
	for i := 1; ; i++ {
		path := filepath.Join(dir, fmt.Sprintf("%s-%d.pem", role, i))
		key, err := repo.NewKey(path, rand.Reader)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		return path, key, err
	}
}

func readPublicKey(path string) (crypto.PublicKey, error) {
	b, err := readSmall(path, 64<<10)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, hinted{fmt.Errorf("%s is not a public key in PEM", path), "openssl pkey -in KEY.pem -pubout makes one"}
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// maxMetadataBytes is more than any metadata may have.
const maxMetadataBytes = 8 << 20

// readSmall reads a plain file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is not a plain file of at most %s", path, bytesText(limit))
	}
	return os.ReadFile(path)
}

func repoSign(_ context.Context, c *cli, args []string) error {
	f := c.flags("repo sign", "FILE", `Add the signatures of all keys in a folder to metadata that waits for them. Read FILE
before: it is JSON, and says all that the signatures will stand for.

example: holdfast repo sign targets.json --keys /media/vault`)
	keys := f.String("keys", "", "`folder` with the keys")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *keys == "" {
		return usageError{"repo sign needs --keys KEYS", "holdfast repo sign " + rest[0] + " --keys KEYS"}
	}
	waits, err := readSmall(rest[0], maxMetadataBytes)
	if err != nil {
		return err
	}
	signers, err := repo.LoadKeys(*keys)
	if err != nil {
		return err
	}
	signed, err := repo.Sign(waits, signers)
	if err != nil {
		return fmt.Errorf("%s: %w", rest[0], err)
	}
	return update.WriteFile(rest[0], signed, 0o644)
}

func repoImport(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo import", "DIR FILE", `Take the signatures in FILE, and publish when there are enough. Its content must be what waits.

example: holdfast repo import repo targets.json`)
	keys := keysFlag(f)
	rest, err := parse(f, args, 2)
	if err != nil {
		return err
	}
	signed, err := readSmall(rest[1], maxMetadataBytes)
	if err != nil {
		return err
	}
	r, err := c.openRepo(ctx, rest[0], *keys)
	if err != nil {
		return err
	}
	return r.Import(signed)
}

func repoPrune(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo prune", "DIR", `Remove content that no listed release needs. Do it when nobody fetches it any more,
such as a week after a release was withdrawn.

example: holdfast repo prune repo`)
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	r, err := c.openRepo(ctx, rest[0], "")
	if err != nil {
		return err
	}
	freed, err := r.Prune()
	fmt.Fprintf(c.out, "%s freed\n", bytesText(freed))
	return err
}
