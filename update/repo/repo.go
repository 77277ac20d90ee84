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
// cannot give, the new metadata waits in a file that a [PendingError] names. Take it
// to the keys, call [Sign], bring the result back to [Repo.Import]; nothing that a
// device reads has changed before that. snapshot and timestamp depend on what was
// signed before them, so they come after.
//
// # Order of writes
//
// Blobs, descriptors, targets, snapshot, a new root, and timestamp.json last, each
// under a temporary name, synced and renamed. A reader sees the old state or the new
// one. Only in the moment between a root that replaces online keys and the
// timestamp can a reader be refused; it succeeds when it tries again. What is about
// to be written is kept first, and [Open] completes it after a cut.
//
// # What is trusted
//
// Beside a repository DIR lies DIR.private, with its policy and what waits for
// signatures. It is not to be published, and who can write there decides what the
// keys at hand sign. DIR itself may lie on a web server: what is in it is verified
// before anything is added and signed, from the first root on, whose hash is in
// DIR.private, and must not be older than what was published from here.
//
// # Several processes
//
// Any number may read, and one at a time changes: methods that write take a lock in
// DIR.private, read the repository anew, and give the lock back. Another process waits
// or gets a [BusyError], see [Repo.Busy]. The lock of a process that was killed is free.
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
	tempPrefix   = "tmp-"
	maxFileBytes = 8 << 20
)

// config is the policy of a repository and where it stands. It is not secret.
type config struct {
	Format      int              `json:"format"`       // 1
	LifetimeSec map[string]int64 `json:"lifetime_sec"` // by role
	// RootSHA256 is of 1.root.json, and TimestampVersion the last one published, so
	// that no other repository, and no older one, is gone on from.
	RootSHA256       string `json:"root_sha256,omitempty"`
	TimestampVersion int64  `json:"timestamp_version,omitempty"`
}

// Repo is a repository that can be changed. It is not safe for concurrent use.
type Repo struct {
	// Busy is called while another process changes the repository, over and over, so it
	// has to take its time. Its error, such as that of a context, ends the wait. Without
	// Busy nobody waits, and the BusyError is returned.
	Busy func(*BusyError) error

	dir     string // published
	private string
	keys    []crypto.Signer
	now     time.Time
	config  config
	current published
	alone   bool // this process has the lock
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

// DamagedError says that a repository is there and a file of it is not, or cannot be
// read. Only a copy of the folder mends that.
type DamagedError struct {
	Folder string
	Err    error
}

func (e *DamagedError) Error() string { return e.Err.Error() }
func (e *DamagedError) Unwrap() error { return e.Err }

// openTime is how long Open tries to read what another process is writing: a
// publication is some small files.
const openTime = 5 * time.Second

// Open opens a repository for changes with the keys at hand, at time now. It
// completes a publication that was interrupted. It does not wait for a process that
// changes the repository, and shows what was published before. Where there is none it is
// fs.ErrNotExist, and no [DamagedError].
func Open(dir string, keys []crypto.Signer, now time.Time) (*Repo, error) {
	r := &Repo{dir: dir, private: privateFolder(dir), keys: keys, now: now.UTC().Truncate(time.Second)}
	for deadline := time.Now().Add(openTime); ; time.Sleep(20 * time.Millisecond) {
		err := r.read()
		if err == nil && r.settled() {
			return r, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			if _, missing := os.Stat(filepath.Join(r.private, configName)); missing != nil {
				return nil, fmt.Errorf("open repository: %w", err)
			}
		}
		release, locked := r.claim()
		var busy *BusyError
		switch {
		case locked == nil:
			release()
			return r, nil
		case err == nil && (errors.As(locked, &busy) || errors.Is(locked, fs.ErrPermission)):
			return r, nil // somebody else is at it, or has to be
		case !errors.As(locked, &busy) || time.Now().After(deadline):
			return nil, fmt.Errorf("open repository %s: %w", dir, locked)
		}
	}
}

// settled says that there is nothing to be written by who opens the repository.
func (r *Repo) settled() bool {
	c := r.current.timestamp.Metadata
	return !r.interrupted() && (c == nil || r.config.RootSHA256 != "" && r.config.TimestampVersion == c.Signed.Version)
}

// read reads policy and metadata. With the lock it completes what was interrupted.
func (r *Repo) read() error {
	b, err := readFile(filepath.Join(r.private, configName))
	if err != nil {
		if _, missing := os.Stat(filepath.Join(r.dir, update.RootPath(1))); missing == nil && errors.Is(err, fs.ErrNotExist) {
			return &DamagedError{r.private, err}
		}
		return err
	}
	r.config = config{}
	if err := json.Unmarshal(b, &r.config); err != nil {
		return &DamagedError{r.private, fmt.Errorf("read %s: %w", configName, err)}
	}
	if r.config.Format != 1 {
		return fmt.Errorf("%s has format %d; this version knows format 1", configName, r.config.Format)
	}
	if r.alone && r.interrupted() {
		if err := r.complete(); err != nil {
			return err
		}
	}
	err = r.load()
	if errors.Is(err, fs.ErrNotExist) {
		err = &DamagedError{r.dir, err}
	}
	return err
}

// load reads what is published and verifies it, but for expiry.
func (r *Repo) load() error {
	r.current = published{}
	set, err := r.loadRoots()
	if err != nil || set == nil {
		return err
	}
	p := &r.current
	if p.timestamp, err = load[metadata.TimestampType](r.dir, update.TimestampPath); err != nil {
		return err
	}
	if _, err := set.UpdateTimestamp(p.timestamp.raw); err != nil {
		return fmt.Errorf("published timestamp: %w: %w", update.ErrUntrusted, err)
	}
	info := p.timestamp.Signed.Meta["snapshot.json"]
	if info == nil {
		return fmt.Errorf("published timestamp: %w: it names no snapshot", update.ErrUntrusted)
	}
	if p.snapshot, err = load[metadata.SnapshotType](r.dir, update.SnapshotPath(info.Version)); err != nil {
		return err
	}
	if _, err := set.UpdateSnapshot(p.snapshot.raw, false); err != nil {
		return fmt.Errorf("published snapshot: %w: %w", update.ErrUntrusted, err)
	}
	if info = p.snapshot.Signed.Meta["targets.json"]; info == nil {
		return fmt.Errorf("published snapshot: %w: it names no targets", update.ErrUntrusted)
	}
	if p.targets, err = load[metadata.TargetsType](r.dir, update.TargetsPath(info.Version)); err != nil {
		return err
	}
	if _, err := set.UpdateTargets(p.targets.raw); err != nil {
		return fmt.Errorf("published targets: %w: %w", update.ErrUntrusted, err)
	}
	return r.remember()
}

// remember compares what is published with what this side knows of it.
func (r *Repo) remember() error {
	if r.private == "" {
		return nil
	}
	first, err := load[metadata.RootType](r.dir, update.RootPath(1))
	if err != nil {
		return err
	}
	sum, version := fmt.Sprintf("%x", sha256.Sum256(first.raw)), r.current.timestamp.Signed.Version
	c := &r.config
	switch {
	case c.RootSHA256 != "" && c.RootSHA256 != sum:
		return fmt.Errorf("published root version 1: %w: it is not the one that was made here", update.ErrUntrusted)
	case version < c.TimestampVersion:
		return fmt.Errorf("published timestamp version %d: %w: version %d was published from here; bring that back first", version, update.ErrOlder, c.TimestampVersion)
	case c.RootSHA256 == sum && version == c.TimestampVersion:
		return nil
	}
	if !r.alone {
		return nil // whoever publishes remembers it
	}
	c.RootSHA256, c.TimestampVersion = sum, version
	return r.saveConfig()
}

func (r *Repo) saveConfig() error {
	b, err := json.MarshalIndent(r.config, "", "  ")
	if err != nil {
		return err
	}
	return write(r.private, configName, append(b, '\n'))
}

// loadRoots walks the chain of roots; nil is that there is none yet.
func (r *Repo) loadRoots() (set *trustedmetadata.TrustedMetadata, err error) {
	for version := int64(1); ; version++ {
		f, err := load[metadata.RootType](r.dir, update.RootPath(version))
		if errors.Is(err, fs.ErrNotExist) && (version > 1 || r.config.RootSHA256 == "") {
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

func load[T metadata.Roles](dir, path string) (f file[T], err error) {
	b, err := readFile(filepath.Join(dir, path))
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

func privateFolder(dir string) string { return filepath.Clean(dir) + ".private" }

// write puts a small file in its place.
func write(dir, path string, b []byte) error {
	full := filepath.Join(dir, path)
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
