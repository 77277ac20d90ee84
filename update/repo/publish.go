package repo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/holdfast-os/holdfast/update"
)

// draft is metadata on its way to readers; nil is a role that does not change.
type draft struct {
	root      *metadata.Metadata[metadata.RootType]
	targets   *metadata.Metadata[metadata.TargetsType]
	snapshot  *metadata.Metadata[metadata.SnapshotType]
	timestamp *metadata.Metadata[metadata.TimestampType]
}

// PendingError says that a role's metadata waits for signatures.
type PendingError struct {
	Role, Path string   // the file to take to Sign
	KeyIDs     []string // who may sign
	Threshold  int
	Signatures int // that are there
}

func (e *PendingError) Error() string {
	return fmt.Sprintf("%s has %d of %d signatures and is not published; sign %s where the keys are and import it", e.Role, e.Signatures, e.Threshold, e.Path)
}

// Folders in DIR.private. A draft that waits for signatures is in pending. One that
// has them all is in publishing from before its first file is published until after
// the last.
const (
	pendingDir    = "pending"
	publishingDir = "publishing"
)

func pendingPath(role string) string { return filepath.Join(pendingDir, role+".json") }

func (r *Repo) loadDraft() (*draft, error) { return loadDraft(filepath.Join(r.private, pendingDir)) }

func loadDraft(dir string) (d *draft, err error) {
	d = &draft{}
	if d.root, err = drafted[metadata.RootType](dir, Root); err != nil {
		return nil, err
	}
	if d.targets, err = drafted[metadata.TargetsType](dir, Targets); err != nil {
		return nil, err
	}
	if d.snapshot, err = drafted[metadata.SnapshotType](dir, Snapshot); err != nil {
		return nil, err
	}
	if d.timestamp, err = drafted[metadata.TimestampType](dir, Timestamp); err != nil {
		return nil, err
	}
	return d, nil
}

func drafted[T metadata.Roles](dir, role string) (*metadata.Metadata[T], error) {
	f, err := load[T](dir, role+".json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f.Metadata, err
}

// save writes the draft to a folder.
func (d *draft) save(dir string) error {
	return errors.Join(saveDraft(dir, Root, d.root), saveDraft(dir, Targets, d.targets),
		saveDraft(dir, Snapshot, d.snapshot), saveDraft(dir, Timestamp, d.timestamp))
}

func saveDraft[T metadata.Roles](dir, role string, m *metadata.Metadata[T]) error {
	if m == nil {
		err := os.Remove(filepath.Join(dir, role+".json"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	b, err := m.ToBytes(true)
	if err != nil {
		return err
	}
	return write(dir, role+".json", b)
}

// advance takes a draft as far as the keys at hand can: it completes what depends on
// what changed, signs, and publishes, or leaves it pending.
func (r *Repo) advance(d *draft) error {
	root := r.current.root.Metadata
	if root == nil && d.root == nil {
		return errors.New("the repository has no root, published or pending")
	}
	if d.root != nil {
		if err := r.settleRoot(d); err != nil {
			return err
		}
		root = d.root
	}
	if d.targets == nil && !signedBy(root, Targets, r.current.targets.Metadata) {
		if err := r.draftTargets(d); err != nil {
			return err
		}
	}
	targets := r.current.targets
	if d.targets != nil {
		if err := settle(r, d, root, Targets, d.targets); err != nil {
			return err
		}
		b, err := d.targets.ToBytes(true)
		if err != nil {
			return err
		}
		targets = file[metadata.TargetsType]{d.targets, b}
	}
	snapshot, err := r.settleSnapshot(d, root, targets)
	if err != nil {
		return err
	}
	if err := r.settleTimestamp(d, root, snapshot); err != nil {
		return err
	}
	if err := r.begin(d); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	if err := r.commit(d); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	return r.load()
}

// settleRoot wants a threshold of the root before and of the new one, TUF §5.3.4.
func (r *Repo) settleRoot(d *draft) error {
	before := r.current.root.Metadata
	ids := slices.Clone(d.root.Signed.Roles[Root].KeyIDs)
	if before != nil {
		ids = append(ids, before.Signed.Roles[Root].KeyIDs...)
	}
	if err := addSignatures(d.root, r.keys, ids); err != nil {
		return err
	}
	if before != nil && !signedBy(before, Root, d.root) {
		return r.pend(d, before, Root, d.root.Signatures)
	}
	if !signedBy(d.root, Root, d.root) {
		return r.pend(d, d.root, Root, d.root.Signatures)
	}
	return nil
}

func (r *Repo) settleSnapshot(d *draft, root *metadata.Metadata[metadata.RootType], targets file[metadata.TargetsType]) (f file[metadata.SnapshotType], err error) {
	info := metaInfo(targets.Signed.Version, targets.raw)
	names := func(s *metadata.Metadata[metadata.SnapshotType]) bool {
		m := s.Signed.Meta["targets.json"]
		return m != nil && m.Version == info.Version && m.Length == info.Length && m.Hashes.Equal(info.Hashes)
	}
	cur := r.current.snapshot
	if d.snapshot != nil && (!names(d.snapshot) || cur.Metadata != nil && d.snapshot.Signed.Version <= cur.Signed.Version) {
		d.snapshot = nil // of other targets, or overtaken by a refresh
	}
	if d.snapshot == nil {
		if cur.Metadata != nil && names(cur.Metadata) && signedBy(root, Snapshot, cur.Metadata) {
			return cur, nil
		}
		d.snapshot = r.newSnapshot(info)
	}
	if err := settle(r, d, root, Snapshot, d.snapshot); err != nil {
		return f, err
	}
	f.Metadata = d.snapshot
	f.raw, err = d.snapshot.ToBytes(true)
	return f, err
}

func (r *Repo) newSnapshot(targets *metadata.MetaFiles) *metadata.Metadata[metadata.SnapshotType] {
	s := metadata.Snapshot(r.expires(Snapshot))
	if r.current.snapshot.Metadata != nil {
		s.Signed.Version = r.current.snapshot.Signed.Version + 1
	}
	s.Signed.Meta["targets.json"] = targets
	return s
}

// settleTimestamp always makes a new one: it is what says that there is news.
func (r *Repo) settleTimestamp(d *draft, root *metadata.Metadata[metadata.RootType], snapshot file[metadata.SnapshotType]) error {
	info := metaInfo(snapshot.Signed.Version, snapshot.raw)
	cur := r.current.timestamp
	if d.timestamp != nil && cur.Metadata != nil && d.timestamp.Signed.Version <= cur.Signed.Version {
		d.timestamp = nil // overtaken by a refresh
	}
	if d.timestamp != nil {
		if m := d.timestamp.Signed.Meta["snapshot.json"]; m == nil || m.Version != info.Version || m.Length != info.Length || !m.Hashes.Equal(info.Hashes) {
			d.timestamp = nil
		}
	}
	if d.timestamp == nil {
		d.timestamp = metadata.Timestamp(r.expires(Timestamp))
		if cur.Metadata != nil {
			d.timestamp.Signed.Version = cur.Signed.Version + 1
		}
		d.timestamp.Signed.Meta["snapshot.json"] = info
	}
	return settle(r, d, root, Timestamp, d.timestamp)
}

// settle signs a draft unless its signatures suffice: what comes after holds its hash.
func settle[T metadata.Roles](r *Repo, d *draft, root *metadata.Metadata[metadata.RootType], role string, m *metadata.Metadata[T]) error {
	if signedBy(root, role, m) {
		return nil
	}
	ids := root.Signed.Roles[role].KeyIDs
	if err := addSignatures(m, r.keys, ids); err != nil {
		return err
	}
	if !signedBy(root, role, m) {
		return r.pend(d, root, role, m.Signatures)
	}
	return nil
}

// signedBy says whether the threshold of a role has signed m.
func signedBy[T metadata.Roles](root *metadata.Metadata[metadata.RootType], role string, m *metadata.Metadata[T]) bool {
	return m != nil && root != nil && root.VerifyDelegate(role, m) == nil
}

// pend keeps a draft for signatures from elsewhere.
func (r *Repo) pend(d *draft, root *metadata.Metadata[metadata.RootType], role string, have []metadata.Signature) error {
	if err := d.save(filepath.Join(r.private, pendingDir)); err != nil {
		return fmt.Errorf("keep %s for signing: %w", role, err)
	}
	e := &PendingError{Role: role, Path: filepath.Join(r.private, pendingPath(role)), KeyIDs: root.Signed.Roles[role].KeyIDs, Threshold: root.Signed.Roles[role].Threshold}
	for _, s := range have {
		if slices.Contains(e.KeyIDs, s.KeyID) {
			e.Signatures++
		}
	}
	return e
}

// begin makes the draft durable, so that it can be written again after a cut. It comes
// into its place at once: half of it would be taken for a draft that waits.
func (r *Repo) begin(d *draft) error {
	place := filepath.Join(r.private, publishingDir)
	if err := errors.Join(os.RemoveAll(place+".new"), d.save(place+".new")); err != nil {
		return err
	}
	if err := os.Rename(place+".new", place); err != nil {
		return err
	}
	return syncFolder(r.private)
}

// interrupted says whether a publication was begun and not ended.
func (r *Repo) interrupted() bool {
	_, err := os.Stat(filepath.Join(r.private, publishingDir))
	return err == nil
}

// complete ends what was interrupted.
func (r *Repo) complete() error {
	d, err := loadDraft(filepath.Join(r.private, publishingDir))
	switch {
	case err == nil && d.timestamp == nil:
		err = errors.New(publishingDir + " has no timestamp; it was not made here")
	case err == nil:
		err = r.commit(d)
	}
	if err != nil {
		return fmt.Errorf("complete an interrupted publication: %w", err)
	}
	return nil
}

// commit writes the draft where readers look, timestamp last. It can be repeated.
func (r *Repo) commit(d *draft) error {
	steps := []func() error{
		func() error { return writeVersion(r, d.targets, update.TargetsPath, versionOfTargets) },
		func() error { return writeVersion(r, d.snapshot, update.SnapshotPath, versionOfSnapshot) },
		func() error { return writeVersion(r, d.root, update.RootPath, versionOfRoot) },
		func() error {
			return writeVersion(r, d.timestamp, func(int64) string { return update.TimestampPath }, versionOfTimestamp)
		},
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	for _, dir := range []string{pendingDir, publishingDir} {
		if err := r.discard(dir); err != nil {
			return err
		}
	}
	return nil
}

// discard removes a draft by one rename, so that no half of it is taken for one.
func (r *Repo) discard(dir string) error {
	place := filepath.Join(r.private, dir)
	if err := os.RemoveAll(place + ".done"); err != nil {
		return err
	}
	if err := os.Rename(place, place+".done"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(place + ".done")
}

// commitOnline writes a snapshot and the timestamp that names it.
func (r *Repo) commitOnline(s *metadata.Metadata[metadata.SnapshotType], t *metadata.Metadata[metadata.TimestampType]) error {
	if err := writeVersion(r, s, update.SnapshotPath, versionOfSnapshot); err != nil {
		return err
	}
	return writeVersion(r, t, func(int64) string { return update.TimestampPath }, versionOfTimestamp)
}

func versionOfRoot(s *metadata.RootType) int64           { return s.Version }
func versionOfTargets(s *metadata.TargetsType) int64     { return s.Version }
func versionOfSnapshot(s *metadata.SnapshotType) int64   { return s.Version }
func versionOfTimestamp(s *metadata.TimestampType) int64 { return s.Version }

func writeVersion[T metadata.Roles](r *Repo, m *metadata.Metadata[T], path func(int64) string, version func(*T) int64) error {
	if m == nil {
		return nil
	}
	b, err := m.ToBytes(true)
	if err != nil {
		return err
	}
	return write(r.dir, path(version(&m.Signed)), b)
}

// Import takes back metadata that [Sign] has signed elsewhere, and goes on with what
// waited for it. Only the signatures are taken, and the content must be what waits.
func (r *Repo) Import(signed []byte) error {
	role, err := roleOf(signed)
	if err != nil {
		return fmt.Errorf("import: %w", err)
	}
	release, err := r.claim()
	if err != nil {
		return fmt.Errorf("import: %w", err)
	}
	defer release()
	d, err := r.loadDraft()
	if err != nil {
		return fmt.Errorf("import: %w", err)
	}
	switch role {
	case Root:
		err = merge(d.root, signed)
	case Targets:
		err = merge(d.targets, signed)
	case Snapshot:
		err = merge(d.snapshot, signed)
	case Timestamp:
		err = merge(d.timestamp, signed)
	}
	if err != nil {
		return fmt.Errorf("import %s: %w", role, err)
	}
	return r.advance(d)
}

// Resume goes on with what is pending, with the keys at hand.
func (r *Repo) Resume() error {
	release, err := r.claim()
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	defer release()
	d, err := r.loadDraft()
	if err != nil {
		return err
	}
	return r.advance(d)
}

func merge[T metadata.Roles](waiting *metadata.Metadata[T], signed []byte) error {
	m, err := new(metadata.Metadata[T]).FromBytes(signed)
	if err != nil {
		return err
	}
	if waiting == nil {
		return errors.New("nothing of this role waits for signatures")
	}
	same, err := sameSigned(waiting, m)
	if err != nil {
		return err
	}
	if !same {
		return fmt.Errorf("%w: what was signed is not what waits; it is an older draft, or somebody changed it", update.ErrUntrusted)
	}
	for _, s := range m.Signatures {
		waiting.Signatures = slices.DeleteFunc(waiting.Signatures, func(h metadata.Signature) bool { return h.KeyID == s.KeyID })
		waiting.Signatures = append(waiting.Signatures, s)
	}
	return nil
}

// sameSigned compares the signed parts.
func sameSigned[T metadata.Roles](a, b *metadata.Metadata[T]) (bool, error) {
	x, y := *a, *b
	x.Signatures, y.Signatures = nil, nil
	xb, err := x.ToBytes(false)
	if err != nil {
		return false, err
	}
	yb, err := y.ToBytes(false)
	return string(xb) == string(yb), err
}
