// Package repo is the vendor's side of updates: it makes and signs the repositories
// that package update reads, and the bundles made of them.
//
// Call [Create] once, then [Open] and [Repo.Add] for each release, [Repo.Refresh]
// from a timer, and [Repo.Status] to see what runs out when. [Bundle] writes a release
// for the way by hand. What compresses a root and makes patches is passed in as a
// [Packer].
//
// # Keys
//
// Each of the four roles has keys of its own, one or several, and a threshold of
// how many must sign. Keys are crypto.Signers, so they may be in files, in a token
// or with a service; ed25519 and ECDSA P-256 are known. Keys of root and targets
// belong on another machine. When signatures are missing that the keys at hand
// cannot give, the new metadata waits in the folder pending and a [PendingError]
// names the file. Take it to the keys, call [Sign], bring the result back to
// [Repo.Import]; nothing that a device reads has changed before that. snapshot and
// timestamp depend on what was signed before them, so they come after.
//
// # Order of writes
//
// Blobs, descriptors, targets, snapshot, a new root, and timestamp.json last, each
// under a temporary name, synced and renamed. A reader sees the old state or the new
// one. Only in the moment between a root that replaces online keys and the
// timestamp can a reader be refused; it succeeds when it tries again. What is about
// to be written is in the folder pending first, and [Open] completes it after a cut.
//
// One process at a time may change a repository. What is published is verified
// before anything is added and signed, as the folder may lie on a web server; the
// order in which roots follow each other is checked, but that 1.root.json is the
// vendor's own is shown only by the keys that fit it.
package repo

import (
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/holdfast-os/holdfast/update"
)

// Roles of TUF.
const (
	Root      = metadata.ROOT
	Targets   = metadata.TARGETS
	Snapshot  = metadata.SNAPSHOT
	Timestamp = metadata.TIMESTAMP
)

// Roles lists them in the order in which their metadata is signed.
func Roles() []string { return []string{Root, Targets, Snapshot, Timestamp} }

const day = 24 * time.Hour

// defaultLifetime is how long metadata holds when nothing else is said. A device
// that was in a store room is brought up to date by newer roots and needs none that
// lasts; timestamp is what bounds a freeze (F88).
func defaultLifetime() map[string]time.Duration {
	return map[string]time.Duration{Root: 3 * 365 * day, Targets: 365 * day, Snapshot: 90 * day, Timestamp: 14 * day}
}

const (
	configName   = "repository.json"
	pendingDir   = "pending"
	maxFileBytes = 8 << 20
)

// config is what a repository remembers of its policy. It is not secret.
type config struct {
	Format      int              `json:"format"`       // 1
	LifetimeSec map[string]int64 `json:"lifetime_sec"` // by role
}

// Repo is a repository that can be changed.
type Repo struct {
	dir     string
	keys    []crypto.Signer
	now     time.Time
	config  config
	current published
}

// file is a piece of metadata and the bytes that stand for it.
type file[T metadata.Roles] struct {
	*metadata.Metadata[T]
	raw []byte
}

// published is what readers see. All is nil in a repository whose first root is not
// signed yet.
type published struct {
	root      file[metadata.RootType]
	targets   file[metadata.TargetsType]
	snapshot  file[metadata.SnapshotType]
	timestamp file[metadata.TimestampType]
}

// Open opens a repository for changes with the keys at hand, at time now. It
// completes a publication that was interrupted.
func Open(dir string, keys []crypto.Signer, now time.Time) (*Repo, error) {
	r := &Repo{dir: dir, keys: keys, now: now.UTC().Truncate(time.Second)}
	b, err := os.ReadFile(filepath.Join(dir, configName))
	if err != nil {
		return nil, fmt.Errorf("open repository: %w", err)
	}
	if err := json.Unmarshal(b, &r.config); err != nil || r.config.Format != 1 {
		return nil, fmt.Errorf("open repository: %s is not of format 1: %w", configName, errors.Join(err, update.ErrUntrusted))
	}
	d, err := r.loadDraft()
	if err != nil {
		return nil, fmt.Errorf("open repository: %w", err)
	}
	if d.ready() {
		if err := r.commit(d); err != nil {
			return nil, fmt.Errorf("complete an interrupted publication: %w", err)
		}
	}
	if err := r.load(); err != nil {
		return nil, fmt.Errorf("open repository %s: %w", dir, err)
	}
	return r, nil
}

// load reads what is published and verifies it, but for expiry.
func (r *Repo) load() error {
	r.current = published{}
	set, err := r.loadRoots()
	if err != nil || set == nil {
		return err
	}
	p := &r.current
	if p.timestamp, err = load[metadata.TimestampType](r, update.TimestampPath); err != nil {
		return err
	}
	if _, err := set.UpdateTimestamp(p.timestamp.raw); err != nil {
		return fmt.Errorf("published timestamp: %w: %w", update.ErrUntrusted, err)
	}
	info := p.timestamp.Signed.Meta["snapshot.json"]
	if info == nil {
		return fmt.Errorf("published timestamp: %w: it names no snapshot", update.ErrUntrusted)
	}
	if p.snapshot, err = load[metadata.SnapshotType](r, update.SnapshotPath(info.Version)); err != nil {
		return err
	}
	if _, err := set.UpdateSnapshot(p.snapshot.raw, false); err != nil {
		return fmt.Errorf("published snapshot: %w: %w", update.ErrUntrusted, err)
	}
	if info = p.snapshot.Signed.Meta["targets.json"]; info == nil {
		return fmt.Errorf("published snapshot: %w: it names no targets", update.ErrUntrusted)
	}
	if p.targets, err = load[metadata.TargetsType](r, update.TargetsPath(info.Version)); err != nil {
		return err
	}
	if _, err := set.UpdateTargets(p.targets.raw); err != nil {
		return fmt.Errorf("published targets: %w: %w", update.ErrUntrusted, err)
	}
	return nil
}

// loadRoots walks the chain of roots; nil is that there is none yet.
func (r *Repo) loadRoots() (set *trustedmetadata.TrustedMetadata, err error) {
	for version := int64(1); ; version++ {
		f, err := load[metadata.RootType](r, update.RootPath(version))
		if errors.Is(err, fs.ErrNotExist) {
			return set, nil
		}
		if err != nil {
			return nil, err
		}
		if set == nil {
			set, err = trustedmetadata.New(f.raw)
		} else {
			_, err = set.UpdateRoot(f.raw)
		}
		if err != nil {
			return nil, fmt.Errorf("published root version %d: %w: %w", version, update.ErrUntrusted, err)
		}
		set.RefTime = time.Time{} // what is over is renewed here
		r.current.root = f
	}
}

func load[T metadata.Roles](r *Repo, path string) (f file[T], err error) {
	b, err := readFile(filepath.Join(r.dir, path))
	if err != nil {
		return f, err
	}
	f.raw = b
	f.Metadata, err = new(metadata.Metadata[T]).FromBytes(b)
	if err != nil {
		return f, fmt.Errorf("read %s: %w", path, err)
	}
	return f, nil
}

func readFile(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxFileBytes {
		return nil, fmt.Errorf("%s is not a plain file of at most %d bytes", path, maxFileBytes)
	}
	return os.ReadFile(path)
}

// write puts a small file in its place.
func (r *Repo) write(path string, b []byte) error {
	full := filepath.Join(r.dir, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return err
	}
	return update.WriteFile(full, b, 0o644)
}

func (r *Repo) expires(role string) time.Time {
	return r.now.Add(time.Duration(r.config.LifetimeSec[role]) * time.Second)
}

// RootJSON is the newest published root, for the root file system of releases.
func (r *Repo) RootJSON() ([]byte, error) {
	if r.current.root.Metadata == nil {
		return nil, errors.New("the first root of the repository is not signed yet")
	}
	return r.current.root.raw, nil
}

func metaInfo(version int64, raw []byte) *metadata.MetaFiles {
	sum := sha256.Sum256(raw)
	return &metadata.MetaFiles{Version: version, Length: int64(len(raw)), Hashes: metadata.Hashes{"sha256": sum[:]}}
}
