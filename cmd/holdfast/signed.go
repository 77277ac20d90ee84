package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

// maxRootJSON is what a device reads of a root.
const maxRootJSON = 512 << 10

// signed is what a chain of signatures says, verified as a device does, but for
// which device it is. A client with an empty store did the work.
type signed struct {
	source update.Source
	root   []byte // trusted
	now    time.Time

	answer  *update.Answer
	targets []update.Target
	roles   []roleState
	// changes are between the trusted root and the source's newest.
	changes []string
}

// nobody is a device that no release is for, which makes the client list them all.
func nobody() update.Device {
	return update.Device{Product: "none", Channel: "none", Arch: "none", Version: "0", RootHash: strings.Repeat("0", 64)}
}

// readSigned verifies the source's metadata under root. Timestamp and snapshot may be
// over, as with what devices take that are lenient; roles say when they are.
func readSigned(ctx context.Context, source update.Source, root []byte, now time.Time) (*signed, error) {
	s := &signed{source: source, root: root, now: now}
	var err error
	if s.answer, err = s.check(ctx, nobody()); err != nil {
		return nil, err
	}
	for _, skipped := range s.answer.Skipped {
		if skipped.Reason != update.Unreadable {
			s.targets = append(s.targets, skipped.Target)
		}
	}
	if err := s.readRoles(ctx); err != nil {
		return nil, fmt.Errorf("read metadata: %w", err)
	}
	return s, nil
}

// check asks for a device, with a store that forgets.
func (s *signed) check(ctx context.Context, d update.Device) (a *update.Answer, err error) {
	store, err := os.MkdirTemp("", "holdfast-check-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(store)) }()
	client, err := update.New(update.Options{Root: s.root, StateDir: store, Source: s.source, Now: s.now, Expiry: update.LenientCarried})
	if err != nil {
		return nil, err
	}
	return client.Check(ctx, d)
}

// readRoles reads what the check has verified once more, for what an Answer does not tell.
func (s *signed) readRoles(ctx context.Context) error {
	trusted, err := new(metadata.Metadata[metadata.RootType]).FromBytes(s.root)
	if err != nil {
		return err
	}
	newest := trusted
	if s.answer.Root > trusted.Signed.Version {
		if newest, err = fetchMetadata[metadata.RootType](ctx, s.source, update.RootPath(s.answer.Root)); err != nil {
			return err
		}
	}
	timestamp, err := fetchMetadata[metadata.TimestampType](ctx, s.source, update.TimestampPath)
	if err != nil {
		return err
	}
	version := timestamp.Signed.Meta["snapshot.json"].Version
	snapshot, err := fetchMetadata[metadata.SnapshotType](ctx, s.source, update.SnapshotPath(version))
	if err != nil {
		return err
	}
	targets, err := fetchMetadata[metadata.TargetsType](ctx, s.source, update.TargetsPath(s.answer.Targets))
	if err != nil {
		return err
	}
	for _, r := range []roleState{
		{Role: repo.Root, Version: newest.Signed.Version, Expires: newest.Signed.Expires},
		{Role: repo.Targets, Version: targets.Signed.Version, Expires: targets.Signed.Expires},
		{Role: repo.Snapshot, Version: version, Expires: snapshot.Signed.Expires},
		{Role: repo.Timestamp, Version: timestamp.Signed.Version, Expires: timestamp.Signed.Expires},
	} {
		keys := newest.Signed.Roles[r.Role]
		r.Threshold, r.KeyIDs = keys.Threshold, keys.KeyIDs
		s.roles = append(s.roles, r)
		s.changes = append(s.changes, roleChanges(r.Role, trusted.Signed.Roles[r.Role], keys)...)
	}
	return nil
}

func roleChanges(role string, before, now *metadata.Role) (list []string) {
	if before.Threshold != now.Threshold {
		list = append(list, fmt.Sprintf("%s: %d keys must sign, it was %d", role, now.Threshold, before.Threshold))
	}
	for _, id := range now.KeyIDs {
		if !slices.Contains(before.KeyIDs, id) {
			list = append(list, role+": new key "+short(id))
		}
	}
	for _, id := range before.KeyIDs {
		if !slices.Contains(now.KeyIDs, id) {
			list = append(list, role+": key "+short(id)+" is not trusted any more")
		}
	}
	return list
}

func fetchMetadata[T metadata.Roles](ctx context.Context, source update.Source, path string) (m *metadata.Metadata[T], err error) {
	b, err := fetchAll(ctx, source, path, maxMetadataBytes)
	if err != nil {
		return nil, err
	}
	return new(metadata.Metadata[T]).FromBytes(b)
}

func fetchAll(ctx context.Context, source update.Source, path string, limit int64) (b []byte, err error) {
	r, _, err := source.Fetch(ctx, path, 0, -1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if b, err = io.ReadAll(io.LimitReader(r, limit+1)); err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, err
}

// until is the end of the roles that have to hold: all of them, or for lenient
// devices root and targets.
func (s *signed) until() (strict, lenient time.Time) {
	for i, r := range s.roles {
		if i == 0 || r.Expires.Before(strict) {
			strict = r.Expires
		}
		if r.Role == repo.Root || r.Role == repo.Targets && r.Expires.Before(lenient) {
			lenient = r.Expires
		}
	}
	return strict, lenient
}

// carried is a release that lies in a bundle.
type carried struct {
	*update.Candidate
	// whole says that the bundle has all of the root; otherwise it is for devices
	// that run one of from.
	whole bool
	from  []string
}

// descriptorPath has the name of the target without its hash.
var descriptorPath = regexp.MustCompile(`^targets/(.*/)[0-9a-f]{64}\.([^/]+)$`)

// findCarried verifies the one release that a bundle is for. The descriptor is first
// read as it lies there, to know for which device to ask; what comes of it was verified.
func (s *signed) findCarried(ctx context.Context, b *update.Bundle) (*carried, error) {
	var paths []string
	for _, p := range b.Paths() {
		if descriptorPath.MatchString(p) {
			paths = append(paths, p)
		}
	}
	if len(paths) != 1 {
		return nil, fmt.Errorf("the bundle holds %d releases, not one", len(paths))
	}
	m := descriptorPath.FindStringSubmatch(paths[0])
	i := slices.IndexFunc(s.targets, func(t update.Target) bool { return t.Name() == m[1]+m[2] })
	if i < 0 {
		return nil, fmt.Errorf("%w: the release %s in the bundle is not on the signed list; it was withdrawn, or somebody put it there", update.ErrUntrusted, m[1]+m[2])
	}
	text, err := fetchAll(ctx, b, paths[0], maxMetadataBytes)
	if err != nil {
		return nil, err
	}
	hint, err := update.ParseRelease(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", update.ErrUntrusted, err)
	}
	found := &carried{}
	for _, blob := range hint.Blobs {
		switch has := b.Has(update.BlobPath(blob.SHA256)); {
		case has && blob.Role == update.RolePack:
			found.whole = true
		case has && blob.Role == update.RolePatch:
			found.from = append(found.from, blob.From)
		}
	}
	a, err := s.check(ctx, found.askFor(s.targets[i]))
	if err != nil {
		return nil, err
	}
	if found.Candidate = a.Candidate; a.Candidate == nil {
		return nil, fmt.Errorf("%w: the bundle lacks content of %s", update.ErrUntrusted, s.targets[i].Name())
	}
	return found, nil
}

// askFor is a device that the release is for.
func (c *carried) askFor(t update.Target) update.Device {
	d := nobody()
	d.Product, d.Channel, d.Arch, d.Want, d.Epoch = t.Product, t.Channel, t.Arch, t.Version, t.Epoch
	if t.MinFrom != "" {
		d.Version = t.MinFrom
	}
	if len(t.Hardware) > 0 {
		d.Hardware = strings.TrimSuffix(t.Hardware[0], "*")
	}
	if !c.whole && len(c.from) > 0 {
		d.RootHash = c.from[0]
	}
	return d
}

// releases reads the descriptors of all releases that are listed.
func (s *signed) releases(ctx context.Context) (list []*update.Release, err error) {
	targets, err := fetchMetadata[metadata.TargetsType](ctx, s.source, update.TargetsPath(s.answer.Targets))
	if err != nil {
		return nil, err
	}
	for _, t := range s.targets {
		file := targets.Signed.Targets[t.Name()]
		if file == nil {
			return nil, fmt.Errorf("%w: %s is not on the signed list any more", update.ErrUntrusted, t.Name())
		}
		want := file.Hashes["sha256"]
		b, err := fetchAll(ctx, s.source, update.DescriptorPath(t.Name(), hex.EncodeToString(want)), maxMetadataBytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.Name(), err)
		}
		if sum := sha256.Sum256(b); !bytes.Equal(sum[:], want) {
			return nil, fmt.Errorf("%s: %w: its description is not the one that was signed; it was damaged, or somebody changed it", t.Name(), update.ErrUntrusted)
		}
		r, err := update.ParseRelease(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.Name(), err)
		}
		list = append(list, r)
	}
	return list, nil
}
