package update

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"
)

// Expiry is how strictly expiry is taken.
type Expiry int

const (
	// Strict refuses whatever is over at the reference time.
	Strict Expiry = iota
	// LenientCarried takes timestamp and snapshot of a bundle or stick although
	// they are over: they say that the news is fresh, and what a person carries to
	// a place without a network seldom is (F86). Root and targets must still hold,
	// and nothing is taken that is older than what the store has seen. A server is
	// judged strictly all the same.
	LenientCarried
)

// Options are what a [Client] needs. Root, StateDir, Source and Now are required.
type Options struct {
	// Root is the root.json of the running release, any version of it.
	Root []byte
	// StateDir is the folder on the data volume where verified metadata is kept.
	// One client at a time uses it.
	StateDir string
	Source   Source
	// Now is what [ReferenceTime] gave. It stays the same over one check (F87).
	Now    time.Time
	Expiry Expiry
}

// Client follows one repository.
type Client struct{ o Options }

// New checks the options and the trusted root. It reads no source.
func New(o Options) (*Client, error) {
	switch {
	case o.StateDir == "" || o.Source == nil || o.Now.IsZero():
		return nil, errors.New("update client: StateDir, Source and Now are required")
	case len(o.Root) > maxRootBytes:
		return nil, fmt.Errorf("update client: root.json of %d bytes, at most %d are allowed", len(o.Root), maxRootBytes)
	}
	err := guarded(func() error {
		_, err := trustedmetadata.New(o.Root)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("update client: root.json of the running release: %w", err)
	}
	o.Now = o.Now.UTC()
	return &Client{o}, nil
}

// Answer is what a check found.
type Answer struct {
	// Candidate is what to install, or nil when there is nothing.
	Candidate *Candidate
	// Skipped says of each release why it was not taken, newest first.
	Skipped []Skipped
	// Root, Timestamp and Targets are the versions of the verified metadata.
	Root, Timestamp, Targets int64
	// Expires is the end of the verified timestamp.
	Expires time.Time
	// Late says that timestamp or snapshot were taken although they are over.
	Late bool
	// Seen and Newest go into [State] by [State.Checked]: the reference time when
	// the metadata bears it out, and the newest time of publication in it.
	Seen, Newest time.Time
	// Damaged says that the metadata store could not be read and was begun anew.
	// What was seen before is forgotten.
	Damaged bool
}

// Check verifies the source's metadata and chooses a release for the device.
//
// Errors: [ErrUntrusted], [ErrExpired], [ErrOlder], [ErrSlow] and [ErrNotFound],
// or of the store. A new root is kept as soon as it is verified, TUF §5.3.8. Of the
// rest nothing is kept unless all of it is good.
func (c *Client) Check(ctx context.Context, d Device) (*Answer, error) {
	if err := d.check(); err != nil {
		return nil, fmt.Errorf("check for updates: %w", err)
	}
	kept, damaged, err := loadTrust(c.o.StateDir)
	if err != nil {
		return nil, fmt.Errorf("check for updates: %w", err)
	}
	w := &walk{o: c.o, ctx: ctx, kept: kept}
	for _, step := range []func() error{w.roots, w.timestamp, w.snapshot, w.targets, w.keep} {
		if err := guarded(step); err != nil {
			return nil, fmt.Errorf("check for updates: %w", err)
		}
	}
	a := &Answer{
		Root: w.set.Root.Signed.Version, Timestamp: w.set.Timestamp.Signed.Version,
		Targets: w.set.Targets[metadata.TARGETS].Signed.Version,
		Expires: w.set.Timestamp.Signed.Expires, Late: w.late, Damaged: damaged,
	}
	if !w.late {
		a.Seen = c.o.Now
	}
	if err := c.choose(ctx, d, w.set, a); err != nil {
		return nil, fmt.Errorf("check for updates: %w", err)
	}
	return a, nil
}

// guarded turns a panic over hostile metadata into an error. The caller may be
// PID 1, and go-tuf 2.4.2 dereferences null where it expects a target or a role.
func guarded(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: metadata that cannot be processed: %v", ErrUntrusted, p)
		}
	}()
	return f()
}

// walk is one pass through TUF §5.3.
type walk struct {
	o       Options
	ctx     context.Context
	set     *trustedmetadata.TrustedMetadata
	kept    trust // what the store holds; what is verified goes in
	changed bool
	late    bool
}

// lenient says whether the end of timestamp and snapshot is overlooked.
func (w *walk) lenient() bool {
	_, ok := w.o.Source.(carried)
	return ok && w.o.Expiry == LenientCarried
}

// fetch reads a whole file of metadata.
func (w *walk) fetch(path string, limit int64) (b []byte, err error) {
	r, size, err := w.o.Source.Fetch(w.ctx, path, 0, -1)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if size > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, at most %d are allowed", path, ErrUntrusted, size, limit)
	}
	b, err = readAll(r, limit)
	if errors.Is(err, errTooLong) {
		return nil, fmt.Errorf("%s: %w: %w", path, ErrUntrusted, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

// roots walks from the built-in root through the stored ones to the source's
// newest, TUF §5.3.2 to §5.3.11.
func (w *walk) roots() error {
	set, err := trustedmetadata.New(w.o.Root)
	if err != nil {
		return err
	}
	w.set = set
	before := w.lastStoredRoot()
	stored := w.kept.Roots
	w.kept.Roots = nil
	for _, b := range stored {
		r, err := metadata.Root().FromBytes(b)
		if err != nil || r.Signed.Version > set.Root.Signed.Version+1 {
			break // damaged; the source has it again
		}
		if r.Signed.Version <= set.Root.Signed.Version {
			continue // the running release has it built in
		}
		if _, err := set.UpdateRoot(b); err != nil {
			break
		}
		w.kept.Roots = append(w.kept.Roots, b)
	}
	if err := w.newerRoots(); err != nil {
		return err
	}
	if len(w.kept.Roots) == 0 {
		w.kept.Roots = [][]byte{w.o.Root} // what the rest of the store was verified under
	}
	// A store that is still empty is written at the end of a good check.
	w.changed = w.changed || len(stored) > 0 && len(stored) != len(w.kept.Roots)
	root := set.Root.Signed
	// Compared with the root under which the store was written: A to B and back to
	// A in between leaves nothing that the thief of a key could have kept.
	if before != nil && (replaced(before, &root, metadata.TIMESTAMP) || replaced(before, &root, metadata.SNAPSHOT)) {
		w.kept.Timestamp, w.kept.Snapshot = nil, nil
		w.changed = true
	}
	if w.changed {
		if err := w.keep(); err != nil {
			return err
		}
	}
	if !root.ConsistentSnapshot || !strings.HasPrefix(root.SpecVersion, "1.") {
		return fmt.Errorf("root version %d: specification %.20q, consistent snapshots %v; only TUF 1 with consistent snapshots is known",
			root.Version, root.SpecVersion, root.ConsistentSnapshot)
	}
	if root.IsExpired(w.o.Now) {
		return expired(metadata.ROOT, root.Version, root.Expires, w.o.Now)
	}
	w.set.RefTime = w.o.Now
	if w.lenient() {
		w.set.RefTime = time.Time{} // before all expiry; targets are judged below
	}
	return nil
}

// newerRoots fetches one root after the other until there is none.
func (w *walk) newerRoots() error {
	for range maxRootRotations {
		next := w.set.Root.Signed.Version + 1
		b, err := w.fetch(RootPath(next), maxRootBytes)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.set.UpdateRoot(b); err != nil {
			return judged(metadata.ROOT, err)
		}
		w.kept.Roots = append(w.kept.Roots, b)
		w.changed = true
	}
	return fmt.Errorf("%w: more than %d new versions of root", ErrUntrusted, maxRootRotations)
}

// lastStoredRoot is the root that the stored timestamp was verified under. It
// decides only whether that one still counts, never what is trusted.
func (w *walk) lastStoredRoot() *metadata.RootType {
	if n := len(w.kept.Roots); n > 0 {
		if r, err := metadata.Root().FromBytes(w.kept.Roots[n-1]); err == nil {
			return &r.Signed
		}
	}
	return nil
}

// replaced says whether a key of the role went away, TUF §5.3.11.
func replaced(before, now *metadata.RootType, role string) bool {
	if before.Roles[role] == nil || now.Roles[role] == nil {
		return true
	}
	for _, id := range before.Roles[role].KeyIDs {
		if !slices.Contains(now.Roles[role].KeyIDs, id) {
			return true
		}
	}
	return false
}

// timestamp is TUF §5.4.
func (w *walk) timestamp() error {
	if w.kept.Timestamp != nil {
		_, err := w.set.UpdateTimestamp(w.kept.Timestamp)
		if err != nil && !errors.Is(err, &metadata.ErrExpiredMetadata{}) {
			w.kept.Timestamp = nil // not of these keys any more, or damaged
		}
	}
	b, err := w.fetch(TimestampPath, maxTimestampBytes)
	if err != nil {
		return err
	}
	_, err = w.set.UpdateTimestamp(b)
	switch {
	case errors.Is(err, &metadata.ErrEqualVersionNumber{}):
		// The one in the store counts, whatever this one says.
	case errors.Is(err, &metadata.ErrExpiredMetadata{}):
		return expired(metadata.TIMESTAMP, w.set.Timestamp.Signed.Version, w.set.Timestamp.Signed.Expires, w.o.Now)
	case err != nil:
		return judged(metadata.TIMESTAMP, err)
	default:
		w.kept.Timestamp, w.changed = b, true
	}
	t := w.set.Timestamp.Signed
	if t.IsExpired(w.o.Now) {
		if !w.lenient() {
			return expired(metadata.TIMESTAMP, t.Version, t.Expires, w.o.Now)
		}
		w.late = true
	}
	return nil
}

// snapshot is TUF §5.5.
func (w *walk) snapshot() error {
	info, err := fileInfo(w.set.Timestamp.Signed.Meta, "snapshot.json", maxSnapshotBytes)
	if err != nil {
		return err
	}
	if w.kept.Snapshot == nil || info.VerifyLengthHashes(w.kept.Snapshot) != nil {
		if w.kept.Snapshot != nil {
			// For its version numbers alone; whatever is wrong with it, another is coming.
			_, _ = w.set.UpdateSnapshot(w.kept.Snapshot, true)
		}
		if w.kept.Snapshot, err = w.fetch(SnapshotPath(info.Version), info.Length); err != nil {
			return err
		}
		w.changed = true
	}
	_, err = w.set.UpdateSnapshot(w.kept.Snapshot, false)
	switch {
	case errors.Is(err, &metadata.ErrExpiredMetadata{}):
		return expired(metadata.SNAPSHOT, w.set.Snapshot.Signed.Version, w.set.Snapshot.Signed.Expires, w.o.Now)
	case err != nil:
		return judged(metadata.SNAPSHOT, err)
	}
	w.late = w.late || w.set.Snapshot.Signed.IsExpired(w.o.Now)
	return nil
}

// targets is TUF §5.6, without delegations.
func (w *walk) targets() error {
	info, err := fileInfo(w.set.Snapshot.Signed.Meta, "targets.json", maxTargetsBytes)
	if err != nil {
		return err
	}
	if w.kept.Targets == nil || info.VerifyLengthHashes(w.kept.Targets) != nil {
		if w.kept.Targets, err = w.fetch(TargetsPath(info.Version), info.Length); err != nil {
			return err
		}
		w.changed = true
	}
	t, err := w.set.UpdateTargets(w.kept.Targets)
	if err != nil && !errors.Is(err, &metadata.ErrExpiredMetadata{}) {
		return judged(metadata.TARGETS, err)
	}
	if err != nil {
		return fmt.Errorf("targets version %d: %w: %w", info.Version, ErrExpired, err)
	}
	if t.Signed.IsExpired(w.o.Now) {
		return expired(metadata.TARGETS, t.Signed.Version, t.Signed.Expires, w.o.Now)
	}
	return nil
}

// keep writes what was verified, when it differs from what the store holds.
func (w *walk) keep() error {
	if !w.changed {
		return nil
	}
	w.changed = false
	return w.kept.save(w.o.StateDir)
}

// fileInfo finds a file's length and hash, which our repositories always say. TUF
// lets them be left out; then an unverified file would have to be parsed.
func fileInfo(meta map[string]*metadata.MetaFiles, name string, limit int64) (*metadata.MetaFiles, error) {
	info := meta[name]
	if info == nil || info.Version < 1 || len(info.Hashes["sha256"]) != sha256.Size {
		return nil, fmt.Errorf("%w: metadata has no version and SHA-256 of %s", ErrUntrusted, name)
	}
	if info.Length < 1 || info.Length > limit {
		return nil, fmt.Errorf("%w: %s is said to have %d bytes, from 1 to %d are allowed", ErrUntrusted, name, info.Length, limit)
	}
	return info, nil
}

// judged says what an error of go-tuf means to the caller.
func judged(role string, err error) error {
	if errors.Is(err, &metadata.ErrBadVersionNumber{}) && role != metadata.ROOT {
		return fmt.Errorf("%s: %w: %w; the medium is an old one, or somebody brings back old releases", role, ErrOlder, err)
	}
	return fmt.Errorf("%s: %w: %w; it was damaged, belongs to another repository, or somebody changed it", role, ErrUntrusted, err)
}

func expired(role string, version int64, at, now time.Time) error {
	return fmt.Errorf("%s version %d: %w on %s and it is %s here; nobody renewed the repository, somebody withholds its news, or the clock is wrong",
		role, version, ErrExpired, at.Format(time.DateOnly), now.Format(time.DateOnly))
}

// sameSum says whether the content has the hash.
func sameSum(content, sum []byte) bool {
	got := sha256.Sum256(content)
	return bytes.Equal(got[:], sum)
}
