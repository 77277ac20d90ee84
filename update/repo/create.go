package repo

import (
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Options are the policy of a new repository. The zero value makes one key for each
// role, all of which are needed.
type Options struct {
	// Keys is how many keys are made for a role; 0 is one, or none when Public has
	// some for it.
	Keys map[string]int
	// Public are keys of a role that are elsewhere.
	Public map[string][]crypto.PublicKey
	// Threshold is how many keys of a role must sign; 0 is one.
	Threshold map[string]int
	// Lifetime of a role's metadata; 0 is 3 years for root, 365 days for targets,
	// 90 for snapshot and 14 for timestamp. Root cannot be renewed by a timer; the
	// other end of each is in [Repo.Status].
	Lifetime map[string]time.Duration
	// Random is where keys come from; nil is the system's.
	Random io.Reader
}

// Create makes a repository in dir, which must be empty or not exist, dir.private
// beside it, and keys in keysDir, ROLE-N.pem. With keys elsewhere it returns the Repo and a [PendingError].
func Create(dir, keysDir string, now time.Time, o Options) (*Repo, error) {
	if err := wantEmpty(dir); err != nil {
		return nil, fmt.Errorf("create repository: %w", err)
	}
	if o.Random == nil {
		o.Random = rand.Reader
	}
	r := &Repo{dir: dir, private: privateFolder(dir), now: now.UTC().Truncate(time.Second), config: config{Format: 1, LifetimeSec: map[string]int64{}}}
	for role, lifetime := range defaultLifetime() {
		if l := o.Lifetime[role]; l != 0 {
			lifetime = l
		}
		if lifetime < time.Hour {
			return nil, fmt.Errorf("create repository: %s would hold %v; at least an hour is asked for", role, lifetime)
		}
		r.config.LifetimeSec[role] = int64(lifetime / time.Second)
	}
	for d, perm := range map[string]fs.FileMode{dir: 0o755, r.private: 0o700, keysDir: 0o700} {
		if err := os.MkdirAll(d, perm); err != nil {
			return nil, fmt.Errorf("create repository: %w", err)
		}
	}
	release, err := lock(r.private)
	if err != nil {
		return nil, fmt.Errorf("create repository: %w", err)
	}
	r.alone = true
	defer func() { r.alone = false; release() }()
	if err := wantEmpty(dir); err != nil { // of a Create at the same time
		return nil, fmt.Errorf("create repository: %w", err)
	}
	root := metadata.Root(r.expires(Root))
	for _, role := range Roles() {
		if err := r.addKeys(root, role, keysDir, o); err != nil {
			return nil, fmt.Errorf("create repository: keys of %s: %w", role, err)
		}
	}
	if err := r.saveConfig(); err != nil {
		return nil, fmt.Errorf("create repository: %w", err)
	}
	err = r.advance(&draft{root: root})
	var waits *PendingError
	if err != nil && !errors.As(err, &waits) {
		return nil, fmt.Errorf("create repository: %w", err)
	}
	return r, err
}

// wantEmpty is that there is nothing in the folders of a repository but a lock.
func wantEmpty(dir string) error {
	for _, d := range []string{dir, privateFolder(dir)} {
		list, err := os.ReadDir(d)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range list {
			if d == dir || e.Name() != lockName {
				return fmt.Errorf("%s is not empty", d)
			}
		}
	}
	return nil
}

// addKeys makes and registers the keys of a role.
func (r *Repo) addKeys(root *metadata.Metadata[metadata.RootType], role, keysDir string, o Options) error {
	n := o.Keys[role]
	public := o.Public[role]
	if n == 0 && len(public) == 0 {
		n = 1
	}
	for i := range n {
		k, err := NewKey(filepath.Join(keysDir, fmt.Sprintf("%s-%d.pem", role, i+1)), o.Random)
		if err != nil {
			return err
		}
		r.keys = append(r.keys, k)
		public = append(public[:len(public):len(public)], k.Public())
	}
	for _, p := range public {
		k, err := tufKey(p)
		if err != nil {
			return err
		}
		if err := root.Signed.AddKey(k, role); err != nil {
			return err
		}
	}
	threshold := max(o.Threshold[role], 1)
	if have := len(root.Signed.Roles[role].KeyIDs); threshold > have {
		return fmt.Errorf("%d must sign and there are %d", threshold, have)
	}
	root.Signed.Roles[role].Threshold = threshold
	return nil
}

// Refresh renews snapshot and timestamp, and targets when less than half of its
// time is left and its keys are at hand. Call it well before the timestamp is over,
// such as every day. What waits for signatures goes on waiting; what is published is
// renewed meanwhile.
func (r *Repo) Refresh() error {
	release, err := r.claim()
	if err != nil {
		return fmt.Errorf("refresh: %w", err)
	}
	defer release()
	d, err := r.loadDraft()
	if err != nil {
		return fmt.Errorf("refresh: %w", err)
	}
	if r.current.root.Metadata == nil {
		return r.advance(d) // or the PendingError that says what is missing
	}
	if d.root != nil || d.targets != nil {
		err := r.advance(d)
		var waits *PendingError
		if errors.As(err, &waits) && r.canSign(Snapshot) && r.canSign(Timestamp) {
			return r.renewPublished()
		}
		return err
	}
	d.snapshot, d.timestamp = nil, nil
	t := r.current.targets
	if t.Signed.Expires.Sub(r.now) < time.Duration(r.config.LifetimeSec[Targets])*time.Second/2 && r.canSign(Targets) {
		if err := r.draftTargets(d); err != nil {
			return fmt.Errorf("refresh: %w", err)
		}
	} else {
		d.snapshot = r.newSnapshot(metaInfo(t.Signed.Version, t.raw))
	}
	return r.advance(d)
}

// renewPublished signs snapshot and timestamp of what is published and leaves the
// draft alone. Between the two writes the old timestamp names the old
// snapshot, which stays.
func (r *Repo) renewPublished() error {
	cur, roles := &r.current, r.current.root.Signed.Roles
	s := r.newSnapshot(metaInfo(cur.targets.Signed.Version, cur.targets.raw))
	if err := addSignatures(s, r.keys, roles[Snapshot].KeyIDs); err != nil {
		return fmt.Errorf("refresh: %w", err)
	}
	b, err := s.ToBytes(true)
	if err != nil {
		return fmt.Errorf("refresh: %w", err)
	}
	t := metadata.Timestamp(r.expires(Timestamp))
	t.Signed.Version = cur.timestamp.Signed.Version + 1
	t.Signed.Meta["snapshot.json"] = metaInfo(s.Signed.Version, b)
	if err := addSignatures(t, r.keys, roles[Timestamp].KeyIDs); err != nil {
		return fmt.Errorf("refresh: %w", err)
	}
	if err := r.commitOnline(s, t); err != nil {
		return fmt.Errorf("refresh: %w", err)
	}
	return r.load()
}

// canSign says whether the keys at hand reach a role's threshold.
func (r *Repo) canSign(role string) bool {
	n := 0
	for _, k := range r.keys {
		if id, err := KeyID(k.Public()); err == nil && contains(r.current.root.Signed.Roles[role], id) {
			n++
		}
	}
	return n >= r.current.root.Signed.Roles[role].Threshold
}

func contains(role *metadata.Role, id string) bool {
	for _, k := range role.KeyIDs {
		if k == id {
			return true
		}
	}
	return false
}

// draftTargets begins a new version of targets from the pending or published one.
func (r *Repo) draftTargets(d *draft) error {
	cur := r.current.targets.Metadata
	switch {
	case d.targets != nil: // has its version already
	case cur == nil:
		d.targets = metadata.Targets(r.expires(Targets))
	default:
		m, err := new(metadata.Metadata[metadata.TargetsType]).FromBytes(r.current.targets.raw)
		if err != nil {
			return err
		}
		m.Signed.Version++
		d.targets = m
	}
	d.targets.Signed.Expires = r.expires(Targets)
	d.targets.Signatures = nil
	d.snapshot, d.timestamp = nil, nil
	return nil
}

// editTargets changes the list of releases and publishes it.
func (r *Repo) editTargets(edit func(targets map[string]*metadata.TargetFiles) error) error {
	d, err := r.loadDraft()
	if err != nil {
		return err
	}
	if err := r.draftTargets(d); err != nil {
		return err
	}
	if d.targets.Signed.Targets == nil {
		d.targets.Signed.Targets = map[string]*metadata.TargetFiles{}
	}
	if err := edit(d.targets.Signed.Targets); err != nil {
		return err
	}
	return r.advance(d)
}

// Rotate replaces a key of a role by another in a new root: without an old id it
// adds one, without a new key it takes one away. Devices take the new root when it
// has the signatures of the threshold before and after. Everything whose keys
// changed is signed anew.
func (r *Repo) Rotate(role, oldID string, fresh crypto.PublicKey) error {
	return r.editRoot(func(root *metadata.RootType) error {
		if root.Roles[role] == nil {
			return fmt.Errorf("rotate: there is no role %q", role)
		}
		if oldID != "" {
			if err := root.RevokeKey(oldID, role); err != nil {
				return fmt.Errorf("rotate key of %s: %w", role, err)
			}
		}
		if fresh != nil {
			k, err := tufKey(fresh)
			if err != nil {
				return fmt.Errorf("rotate key of %s: %w", role, err)
			}
			if err := root.AddKey(k, role); err != nil {
				return fmt.Errorf("rotate key of %s: %w", role, err)
			}
		}
		if n := len(root.Roles[role].KeyIDs); n < root.Roles[role].Threshold {
			return fmt.Errorf("rotate key of %s: %d keys are left and %d must sign", role, n, root.Roles[role].Threshold)
		}
		return nil
	})
}

// RenewRoot publishes a root like the one before, that holds longer.
func (r *Repo) RenewRoot() error { return r.editRoot(func(*metadata.RootType) error { return nil }) }

func (r *Repo) editRoot(edit func(*metadata.RootType) error) error {
	release, err := r.claim()
	if err != nil {
		return fmt.Errorf("new root: %w", err)
	}
	defer release()
	d, err := r.loadDraft()
	if err != nil {
		return err
	}
	if d.root == nil {
		if r.current.root.Metadata == nil {
			return errors.New("the repository has no root yet")
		}
		if d.root, err = new(metadata.Metadata[metadata.RootType]).FromBytes(r.current.root.raw); err != nil {
			return err
		}
		d.root.Signed.Version++
	}
	d.root.Signed.Expires = r.expires(Root)
	d.root.Signatures = nil
	if err := edit(&d.root.Signed); err != nil {
		return err
	}
	return r.advance(d)
}

// AddKeys gives an open repository further keys, such as the one that a rotation
// brings in.
func (r *Repo) AddKeys(keys ...crypto.Signer) { r.keys = append(r.keys, keys...) }
