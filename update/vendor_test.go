package update

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/holdfast-os/holdfast/image"
)

var noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// vendor is a repository in memory whose every part can be made wrong. It is made
// with go-tuf alone and shares nothing with update/repo.
type vendor struct {
	t    testing.TB
	keys map[string][]ed25519.PrivateKey
	root *metadata.Metadata[metadata.RootType]
	// versions and expires are what publish signs.
	versions map[string]int64
	expires  map[string]time.Time
	releases []Release
	channel  string
	percent  int
	files    map[string][]byte
}

// key is the n-th key of the test, always the same one.
func key(n byte) ed25519.PrivateKey { return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, 32)) }

func keyID(t testing.TB, k ed25519.PrivateKey) string {
	t.Helper()
	tk, err := metadata.KeyFromPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	id, err := tk.ID()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// newVendor has two root keys that must both sign, and one key for each other role.
func newVendor(t testing.TB) *vendor {
	t.Helper()
	v := &vendor{
		t: t, channel: "stable", percent: 100, files: map[string][]byte{},
		keys:     map[string][]ed25519.PrivateKey{"root": {key(1), key(2)}, "targets": {key(3)}, "snapshot": {key(4)}, "timestamp": {key(5)}},
		versions: map[string]int64{"targets": 1, "snapshot": 1, "timestamp": 1},
		expires: map[string]time.Time{
			"root": noon.AddDate(2, 0, 0), "targets": noon.AddDate(1, 0, 0), "snapshot": noon.AddDate(0, 1, 0), "timestamp": noon.AddDate(0, 0, 7),
		},
	}
	v.root = metadata.Root(v.expires["root"])
	for role, keys := range v.keys {
		for _, k := range keys {
			v.addKey(role, k)
		}
	}
	v.root.Signed.Roles["root"].Threshold = 2
	v.signRoot(v.keys["root"]...)
	v.release("2.0.0")
	v.publish()
	return v
}

func (v *vendor) addKey(role string, k ed25519.PrivateKey) {
	v.t.Helper()
	tk, err := metadata.KeyFromPublicKey(k.Public())
	if err == nil {
		err = v.root.Signed.AddKey(tk, role)
	}
	if err != nil {
		v.t.Fatal(err)
	}
}

// rotate replaces the only key of an online role in a new root.
func (v *vendor) rotate(role string, fresh ed25519.PrivateKey) {
	v.t.Helper()
	if err := v.root.Signed.RevokeKey(keyID(v.t, v.keys[role][0]), role); err != nil {
		v.t.Fatal(err)
	}
	v.keys[role] = []ed25519.PrivateKey{fresh}
	v.addKey(role, fresh)
	v.root.Signed.Version++
	v.signRoot(v.keys["root"]...)
}

func (v *vendor) signRoot(keys ...ed25519.PrivateKey) {
	v.t.Helper()
	v.files[RootPath(v.root.Signed.Version)] = signed(v.t, v.root, keys)
}

func signed[T metadata.Roles](t testing.TB, m *metadata.Metadata[T], keys []ed25519.PrivateKey) []byte {
	t.Helper()
	m.Signatures = nil
	payload, err := cjson.EncodeCanonical(m.Signed)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		m.Signatures = append(m.Signatures, metadata.Signature{KeyID: keyID(t, k), Signature: ed25519.Sign(k, payload)})
	}
	b, err := m.ToBytes(false)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// blob adds content.
func (v *vendor) blob(role string, content []byte) Blob {
	b := Blob{Role: role, SizeBytes: int64(len(content)), SHA256: digest(content)}
	v.files[BlobPath(b.SHA256)] = content
	return b
}

// pattern is content that is the same each time and has no two equal blocks.
func pattern(seed string, n int) []byte {
	var b []byte
	for i := 0; len(b) < n; i++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", seed, i))
		b = append(b, sum[:]...)
	}
	return b[:n]
}

// release makes a release of some 30 KB for a device like testDevice.
func (v *vendor) release(version string, change ...func(*Release)) {
	r := Release{Format: 1, Epoch: 3, PublishedSec: noon.AddDate(0, 0, -1).Unix()}
	r.Blobs = []Blob{v.blob(RolePack, pattern("pack"+version, 20000)), v.blob(RoleTree, pattern("tree"+version, 3000)),
		v.blob(RoleUKI, pattern("uki"+version, 5000)), v.blob(RoleLoader, pattern("loader", 100))}
	r.Manifest = image.Manifest{Format: 1, Name: "gate", Version: version, Architecture: "amd64",
		Verity: image.Verity{RootHash: digest([]byte("root" + version))},
		UKI:    image.File{SizeBytes: 5000, SHA256: r.Blobs[2].SHA256}, Loader: image.File{SizeBytes: 100, SHA256: r.Blobs[3].SHA256}}
	for _, f := range change {
		f(&r)
	}
	v.releases = append(v.releases, r)
}

// publish writes descriptors and signs all three roles.
func (v *vendor) publish() {
	v.t.Helper()
	tg := metadata.Targets(v.expires["targets"])
	tg.Signed.Version = v.versions["targets"]
	for _, r := range v.releases {
		text, err := json.Marshal(r)
		if err != nil {
			v.t.Fatal(err)
		}
		target := r.Target(v.channel, v.percent)
		custom, err := json.Marshal(target)
		if err != nil {
			v.t.Fatal(err)
		}
		sum := sha256.Sum256(text)
		v.files[DescriptorPath(target.Name(), digest(text))] = text
		tg.Signed.Targets[target.Name()] = &metadata.TargetFiles{Length: int64(len(text)), Hashes: metadata.Hashes{"sha256": sum[:]}, Custom: (*json.RawMessage)(&custom)}
	}
	v.files[TargetsPath(tg.Signed.Version)] = signed(v.t, tg, v.keys["targets"])
	v.signSnapshot(v.versions["targets"])
	v.signTimestamp(v.versions["snapshot"])
}

func (v *vendor) info(path string, version int64) *metadata.MetaFiles {
	b := v.files[path]
	sum := sha256.Sum256(b)
	return &metadata.MetaFiles{Version: version, Length: int64(len(b)), Hashes: metadata.Hashes{"sha256": sum[:]}}
}

func (v *vendor) signSnapshot(targets int64) {
	v.t.Helper()
	sn := metadata.Snapshot(v.expires["snapshot"])
	sn.Signed.Version = v.versions["snapshot"]
	sn.Signed.Meta["targets.json"] = v.info(TargetsPath(targets), targets)
	v.files[SnapshotPath(sn.Signed.Version)] = signed(v.t, sn, v.keys["snapshot"])
}

func (v *vendor) signTimestamp(snapshot int64) {
	v.t.Helper()
	ts := metadata.Timestamp(v.expires["timestamp"])
	ts.Signed.Version = v.versions["timestamp"]
	ts.Signed.Meta["snapshot.json"] = v.info(SnapshotPath(snapshot), snapshot)
	v.files[TimestampPath] = signed(v.t, ts, v.keys["timestamp"])
}

// next is a newer state of everything but root.
func (v *vendor) next() {
	for role := range v.versions {
		v.versions[role]++
	}
	v.publish()
}

// bundle is a bundle of what timestamp.json leads to, without the checks of
// BundleWriter, so that it can be one with wrong content.
func (v *vendor) bundle() []byte {
	v.t.Helper()
	var members []member
	snapshots, targets := map[int64]bool{}, map[int64]bool{}
	if ts, err := metadata.Timestamp().FromBytes(v.files[TimestampPath]); err == nil && ts.Signed.Meta["snapshot.json"] != nil {
		snapshots[ts.Signed.Meta["snapshot.json"].Version] = true
		if sn, err := metadata.Snapshot().FromBytes(v.files[SnapshotPath(ts.Signed.Meta["snapshot.json"].Version)]); err == nil && sn.Signed.Meta["targets.json"] != nil {
			targets[sn.Signed.Meta["targets.json"].Version] = true
		}
	}
	for name, b := range v.files {
		c, _, err := classify(name)
		if err != nil {
			v.t.Fatal(err)
		}
		var version int64
		fmt.Sscanf(name, "metadata/%d.", &version)
		if c == classSnapshot && !snapshots[version] || c == classTargets && !targets[version] {
			continue
		}
		members = append(members, member{name: name, length: int64(len(b)), class: c, offset: version})
	}
	slices.SortFunc(members, func(a, b member) int {
		if a.class != b.class {
			return int(a.class - b.class)
		}
		if a.class == classRoot {
			return int(a.offset - b.offset)
		}
		return strings.Compare(a.name, b.name)
	})
	var out, sums bytes.Buffer
	write := func(name string, b []byte) {
		h, err := encodeHeader(name, int64(len(b)))
		if err != nil {
			v.t.Fatal(err)
		}
		out.Write(h)
		out.Write(b)
		out.Write(make([]byte, padding(int64(len(b)))))
		sums.WriteString(sumLine(digest(b), name))
	}
	write(bundleMarker, []byte(bundleFormat))
	for _, m := range members {
		write(m.name, v.files[m.name])
	}
	write(bundleSums, bytes.Clone(sums.Bytes()))
	out.Write(make([]byte, 1024))
	return out.Bytes()
}

func (v *vendor) folder() string {
	v.t.Helper()
	dir := v.t.TempDir()
	for name, b := range v.files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, b, 0o644)); err != nil {
			v.t.Fatal(err)
		}
	}
	return dir
}

// server is a web server of the files as they are now; asked is what was asked for.
func (v *vendor) server() (s *httptest.Server, asked func() []string) {
	v.t.Helper()
	files := maps.Clone(v.files)
	var mu sync.Mutex
	var list []string
	s = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/")
		mu.Lock()
		list = append(list, name)
		mu.Unlock()
		b, ok := files[name]
		if !ok {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	v.t.Cleanup(s.Close)
	return s, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(list)
	}
}

func httpSource(t testing.TB, url string) *HTTP {
	t.Helper()
	h, err := NewHTTP(url, HTTPOptions{Backoff: time.Millisecond, Attempts: 3})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.CloseIdle)
	return h
}

// kinds are the sources that every attack is tried against.
var kinds = []string{"folder", "server", "bundle", "registry"}

func (v *vendor) source(kind string) Source {
	v.t.Helper()
	switch kind {
	case "folder":
		d, err := OpenDir(v.folder())
		if err != nil {
			v.t.Fatal(err)
		}
		v.t.Cleanup(func() { d.Close() })
		return d
	case "server":
		s, _ := v.server()
		return httpSource(v.t, s.URL)
	case "registry":
		files := maps.Clone(v.files)
		host, _ := newRegistry(v.t, registryFront(func(w http.ResponseWriter, r *http.Request) bool {
			_, hash, _ := strings.Cut(r.URL.Path, "/blobs/sha256:")
			b, ok := files[BlobPath(hash)]
			if ok = ok && digest(b) != hash; ok { // an attack that no registry would take
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
			}
			return ok
		}).before)
		v.push(host)
		return ociSource(v.t, host, HTTPOptions{})
	}
	b := v.bundle()
	s, err := OpenBundle(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		v.t.Fatal(err)
	}
	return s
}

func testDevice() Device {
	return Device{Product: "gate", Channel: "stable", Arch: "amd64", Version: "1.0.0", RootHash: digest([]byte("root1.0.0")), Epoch: 3, ID: "serial 1"}
}

// unit is a device with its store.
type unit struct {
	t      *testing.T
	root   []byte
	store  string
	now    time.Time
	expiry Expiry
	device Device
}

func newUnit(t *testing.T, v *vendor) *unit {
	return &unit{t: t, root: v.files[RootPath(1)], store: t.TempDir(), now: noon, device: testDevice()}
}

func (u *unit) check(s Source) (*Answer, error) {
	u.t.Helper()
	c, err := New(Options{Root: u.root, StateDir: u.store, Source: s, Now: u.now, Expiry: u.expiry})
	if err != nil {
		u.t.Fatal(err)
	}
	return c.Check(context.Background(), u.device)
}

// stored is all that the store holds.
func (u *unit) stored() map[string]string {
	u.t.Helper()
	files := map[string]string{}
	list, err := os.ReadDir(u.store)
	if err != nil {
		u.t.Fatal(err)
	}
	for _, e := range list {
		b, err := os.ReadFile(filepath.Join(u.store, e.Name()))
		if err != nil {
			u.t.Fatal(err)
		}
		files[e.Name()] = string(b)
	}
	return files
}

func (u *unit) mustFind(s Source, version string) *Candidate {
	u.t.Helper()
	a, err := u.check(s)
	if err != nil {
		u.t.Fatal(err)
	}
	if a.Candidate == nil || a.Candidate.Target.Version != version {
		u.t.Fatalf("no candidate %s: %+v", version, a)
	}
	return a.Candidate
}

func readBlob(c *Candidate, role string) ([]byte, error) {
	r, _, err := c.Blob(context.Background(), role, "")
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	return b, errors.Join(err, r.Close())
}
