package repo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/holdfast-os/holdfast/update"
)

// RoleStatus is a role's published metadata.
type RoleStatus struct {
	Role      string
	Version   int64
	Expires   time.Time
	Threshold int
	KeyIDs    []string
	// KeysHere is how many of the keys are at hand.
	KeysHere int
}

// Status is how a repository stands.
type Status struct {
	Roles    []RoleStatus // in the order of [Roles]; empty before the first root is signed
	Releases []update.Target
	// Pending are roles whose metadata waits for signatures.
	Pending []string
	// BundleUntil is how long a bundle made now is taken by a device that is
	// strict about expiry, BundleUntilLenient by one that takes carried ones late.
	BundleUntil, BundleUntilLenient time.Time
	// Warnings are for a person: what runs out, or has.
	Warnings []string
}

// Status reads the repository as it is published and pending.
func (r *Repo) Status() (*Status, error) {
	s := &Status{}
	for _, role := range Roles() {
		if _, err := os.Stat(filepath.Join(r.private, pendingPath(role))); err == nil {
			s.Pending = append(s.Pending, role)
		}
	}
	c := &r.current
	if c.root.Metadata == nil {
		s.Warnings = append(s.Warnings, "the first root is not signed; nothing is published")
		return s, nil
	}
	list, err := targetList(c.targets.Signed.Targets)
	if err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	s.Releases = list
	r.role(s, Root, c.root.Signed.Version, c.root.Signed.Expires)
	r.role(s, Targets, c.targets.Signed.Version, c.targets.Signed.Expires)
	r.role(s, Snapshot, c.snapshot.Signed.Version, c.snapshot.Signed.Expires)
	r.role(s, Timestamp, c.timestamp.Signed.Version, c.timestamp.Signed.Expires)
	for i, st := range s.Roles {
		if i == 0 || st.Expires.Before(s.BundleUntil) {
			s.BundleUntil = st.Expires
		}
		if st.Role == Root || st.Role == Targets && st.Expires.Before(s.BundleUntilLenient) {
			s.BundleUntilLenient = st.Expires
		}
	}
	return s, nil
}

func (r *Repo) role(s *Status, role string, version int64, expires time.Time) {
	keys := r.current.root.Signed.Roles[role]
	st := RoleStatus{Role: role, Version: version, Expires: expires, Threshold: keys.Threshold, KeyIDs: keys.KeyIDs}
	for _, k := range r.keys {
		if id, err := KeyID(k.Public()); err == nil && contains(keys, id) {
			st.KeysHere++
		}
	}
	s.Roles = append(s.Roles, st)
	left := expires.Sub(r.now)
	lifetime := time.Duration(r.config.LifetimeSec[role]) * time.Second
	switch {
	case left <= 0:
		s.Warnings = append(s.Warnings, fmt.Sprintf("%s is over since %s: devices refuse it", role, expires.Format(time.DateOnly)))
	case left < lifetime/4:
		s.Warnings = append(s.Warnings, fmt.Sprintf("%s ends on %s, in %d days: renew it", role, expires.Format(time.DateOnly), left/day))
	}
}

// Prune removes blobs and descriptors that no listed release names, and versions of
// snapshot and targets but the published one. Call it when nobody fetches them any
// more, such as a week after a release was withdrawn. It returns the bytes freed.
func (r *Repo) Prune() (freed int64, err error) {
	release, err := r.claim()
	if err != nil {
		return 0, fmt.Errorf("prune: %w", err)
	}
	defer release()
	keep := map[string]bool{}
	targets, err := r.targets()
	if err != nil {
		return 0, fmt.Errorf("prune: %w", err)
	}
	sets := []map[string]*metadata.TargetFiles{targets}
	if r.current.root.Metadata != nil {
		keep[update.SnapshotPath(r.current.snapshot.Signed.Version)] = true
		keep[update.TargetsPath(r.current.targets.Signed.Version)] = true
		sets = append(sets, r.current.targets.Signed.Targets)
	}
	for _, set := range sets {
		for name, tf := range set {
			rel, _, err := readRelease(r.dir, name, tf)
			if err != nil {
				return 0, fmt.Errorf("prune: %w", err)
			}
			keep[update.DescriptorPath(name, tf.Hashes["sha256"].String())] = true
			for _, b := range rel.Blobs {
				keep[update.BlobPath(b.SHA256)] = true
			}
		}
	}
	for _, folder := range []string{"blobs", "targets", "metadata"} {
		n, err := r.pruneFolder(folder, keep)
		freed += n
		if err != nil {
			return freed, fmt.Errorf("prune: %w", err)
		}
	}
	return freed, nil
}

func (r *Repo) pruneFolder(folder string, keep map[string]bool) (freed int64, err error) {
	err = filepath.WalkDir(filepath.Join(r.dir, folder), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		rel, err := filepath.Rel(r.dir, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		versioned := strings.HasSuffix(rel, ".snapshot.json") || strings.HasSuffix(rel, ".targets.json")
		if e.IsDir() || keep[rel] || folder == "metadata" && !versioned {
			return nil
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		freed += fi.Size()
		return os.Remove(path)
	})
	return freed, err
}
