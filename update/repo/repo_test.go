package repo

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"
	"github.com/theupdateframework/go-tuf/v2/metadata"
	tufconfig "github.com/theupdateframework/go-tuf/v2/metadata/config"
	"github.com/theupdateframework/go-tuf/v2/metadata/updater"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update"
)

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// zstdPacker is the least packer: whole roots, and patches that are copies of the
// bytes that differ at the same place.
type zstdPacker struct{}

func (zstdPacker) Pack(_ context.Context, root RootImage, w io.Writer) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	_, err = io.Copy(z, io.NewSectionReader(root.Content, 0, root.Verity.TotalBytes))
	return errors.Join(err, z.Close())
}

func (zstdPacker) Pieces(_ context.Context, root RootImage, w io.Writer) error {
	_, err := fmt.Fprintf(w, "pieces of %s", root.Verity.RootHash)
	return err
}

func (zstdPacker) Tree(_ context.Context, root RootImage, w io.Writer) error {
	_, err := io.Copy(w, io.NewSectionReader(root.Content, root.Verity.DataBlocks*4096, root.Verity.TotalBytes-root.Verity.DataBlocks*4096))
	return err
}

func (zstdPacker) Unpack(_ context.Context, pack, _ io.Reader, _ image.Verity, w io.Writer) error {
	z, err := zstd.NewReader(pack)
	if err != nil {
		return err
	}
	defer z.Close()
	_, err = io.Copy(w, z)
	return err
}

func (zstdPacker) Patch(_ context.Context, from, to RootImage, w io.Writer) error {
	a, b := make([]byte, 4096), make([]byte, 4096)
	for at := int64(0); at < to.Verity.TotalBytes; at += 4096 {
		if _, err := from.Content.ReadAt(a, at); err != nil && err != io.EOF {
			return err
		}
		if _, err := to.Content.ReadAt(b, at); err != nil && err != io.EOF {
			return err
		}
		if !bytes.Equal(a, b) {
			if _, err := fmt.Fprintf(w, "%d %x\n", at, sha256.Sum256(b)); err != nil {
				return err
			}
		}
	}
	return nil
}

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// release writes the folder of a build. The root has random content that versions
// share but for a block.
func release(t *testing.T, product, version, arch string) string {
	t.Helper()
	root := make([]byte, 48*4096)
	for i := range root {
		root[i] = byte(i>>8*7 + i*i>>3)
	}
	copy(root[5*4096:], version+arch+product)
	files := map[string][]byte{
		image.RootName: root, image.UKIName: []byte(strings.Repeat("uki "+version, 30000)), image.LoaderName: []byte("loader"),
	}
	m := image.Manifest{Format: 1, Name: product, Version: version, Architecture: arch, BuildTimeSec: now.Unix(),
		Verity: image.Verity{RootHash: digest(root[:4096*6]), DataBlocks: 40, TotalBytes: int64(len(root))}}
	for name, into := range map[string]*image.File{image.RootName: &m.Root, image.UKIName: &m.UKI, image.LoaderName: &m.Loader} {
		*into = image.File{Name: name, SizeBytes: int64(len(files[name])), SHA256: digest(files[name])}
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	files[image.ManifestName] = b
	dir := t.TempDir()
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func create(t *testing.T, o Options) (r *Repo, dir, keys string) {
	t.Helper()
	dir, keys = filepath.Join(t.TempDir(), "repo"), filepath.Join(t.TempDir(), "keys")
	r, err := Create(dir, keys, now, o)
	if err != nil {
		t.Fatal(err)
	}
	return r, dir, keys
}

func add(t *testing.T, r *Repo, version string, o AddOptions) *update.Release {
	t.Helper()
	if o.Channel == "" {
		o.Channel = "stable"
	}
	rel, err := r.Add(context.Background(), release(t, "gate", version, "amd64"), o, zstdPacker{})
	if err != nil {
		t.Fatal(err)
	}
	return rel
}

func rootJSON(t *testing.T, r *Repo) []byte {
	t.Helper()
	b, err := r.RootJSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func device(version string) update.Device {
	return update.Device{Product: "gate", Channel: "stable", Arch: "amd64", Version: version, RootHash: digest([]byte(version)), ID: "serial 1"}
}

func openDir(t *testing.T, dir string) *update.Dir {
	t.Helper()
	d, err := update.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func check(t *testing.T, root []byte, store string, s update.Source, at time.Time, d update.Device) (*update.Answer, error) {
	t.Helper()
	c, err := update.New(update.Options{Root: root, StateDir: store, Source: s, Now: at})
	if err != nil {
		t.Fatal(err)
	}
	return c.Check(context.Background(), d)
}

func mustFind(t *testing.T, a *update.Answer, err error, version string) *update.Candidate {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if a.Candidate == nil || a.Candidate.Release.Manifest.Version != version {
		t.Fatalf("no %s: %+v", version, a)
	}
	return a.Candidate
}

// TestDamagedOlderRelease adds a release for which a patch cannot be made.
func TestDamagedOlderRelease(t *testing.T) {
	r, dir, _ := create(t, Options{})
	first := add(t, r, "1.0.0", AddOptions{})
	pack, _ := first.Blob(update.RolePack, "")
	name := filepath.Join(dir, update.BlobPath(pack.SHA256))
	if err := os.Truncate(name, pack.SizeBytes/2); err != nil {
		t.Fatal(err)
	}
	o := AddOptions{Channel: "stable", KeepDeltas: 1}
	_, err := r.Add(context.Background(), release(t, "gate", "1.1.0", "amd64"), o, zstdPacker{})
	if err == nil || !strings.Contains(err.Error(), "unpack 1.0.0") || !strings.Contains(err.Error(), "withdraw") {
		t.Errorf("a patch from half a release: %v", err)
	}
	err = filepath.WalkDir(filepath.Dir(dir), func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), tempPrefix) {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	o.KeepDeltas = 0
	if _, err := r.Add(context.Background(), release(t, "gate", "1.1.0", "amd64"), o, zstdPacker{}); err != nil {
		t.Errorf("without patches: %v", err)
	}
}

// TestRoundTrip publishes two releases and fetches every blob of the newer one from
// a folder, a server and a bundle.
func TestRoundTrip(t *testing.T) {
	r, dir, _ := create(t, Options{Keys: map[string]int{Root: 2, Targets: 2}, Threshold: map[string]int{Root: 2, Targets: 2}})
	root := rootJSON(t, r)
	first := add(t, r, "1.0.0", AddOptions{})
	rel := add(t, r, "1.1.0", AddOptions{KeepDeltas: 3, Epoch: 2, Hardware: []string{"box-*"}})
	if _, ok := rel.Blob(update.RolePatch, first.Manifest.Verity.RootHash); !ok || len(rel.Blobs) != 6 {
		t.Fatalf("blobs %+v", rel.Blobs)
	}
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer server.Close()
	web, err := update.NewHTTP(server.URL, update.HTTPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer web.CloseIdle()
	var file bytes.Buffer
	if _, err := Bundle(context.Background(), dir, &file, BundleOptions{}); err != nil {
		t.Fatal(err)
	}
	bundle, err := update.OpenBundle(bytes.NewReader(file.Bytes()), int64(file.Len()))
	if err != nil {
		t.Fatal(err)
	}
	if err := bundle.Verify(context.Background()); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]update.Source{"folder": openDir(t, dir), "server": web, "bundle": bundle} {
		t.Run(name, func(t *testing.T) {
			d := device("1.0.0")
			d.Hardware = "box-7"
			store := t.TempDir()
			a, err := check(t, root, store, s, now, d)
			c := mustFind(t, a, err, "1.1.0")
			if pieces, ok := c.Release.Blob(update.RolePieces, ""); !ok || c.Has(pieces) == (name == "bundle") {
				t.Errorf("pieces: listed %v, there %v", ok, c.Has(pieces))
			}
			for _, b := range c.Release.Blobs {
				if c.Has(b) {
					compareBlob(t, c, b, dir)
				}
			}
			if a, err = check(t, root, store, s, now, d); err != nil || a.Candidate == nil {
				t.Fatalf("a second time: %+v, %v", a, err)
			}
			d.Hardware = "other"
			if a, err = check(t, root, store, s, now, d); err != nil || a.Candidate != nil && a.Candidate.Target.Version == "1.1.0" {
				t.Fatalf("other hardware: %+v, %v", a, err)
			}
		})
	}
}

// compareBlob fetches a blob in each way and compares with the repository's file.
func compareBlob(t *testing.T, c *update.Candidate, b update.Blob, dir string) {
	t.Helper()
	want, err := os.ReadFile(filepath.Join(dir, update.BlobPath(b.SHA256)))
	if err != nil {
		t.Fatal(err)
	}
	rd, _, err := c.Blob(context.Background(), b.Role, b.From)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(rd)
	if err = errors.Join(err, rd.Close()); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s: %d of %d bytes: %v", b.Role, len(got), len(want), err)
	}
	half := b.SizeBytes / 2
	rd, err = c.Range(context.Background(), b, half, b.SizeBytes-half)
	if err != nil {
		t.Fatal(err)
	}
	got, err = io.ReadAll(rd)
	if err = errors.Join(err, rd.Close()); err != nil || !bytes.Equal(got, want[half:]) {
		t.Fatalf("%s: range: %v", b.Role, err)
	}
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path+".part", want[:half], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(context.Background(), b, path); err != nil {
		t.Fatal(err)
	}
	if got, err = os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s: saved: %v", b.Role, err)
	}
	if err := os.WriteFile(path+".part", make([]byte, half), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(context.Background(), b, path); half > 0 && !errors.Is(err, update.ErrUntrusted) {
		t.Fatalf("%s: a part that is another's: %v", b.Role, err)
	}
}

// TestGoTUF has go-tuf's own client as the judge of the repository.
func TestGoTUF(t *testing.T) {
	r, dir, keys := create(t, Options{})
	root := rootJSON(t, r)
	rel := add(t, r, "1.0.0", AddOptions{})
	fresh, err := NewKey(filepath.Join(keys, "new.pem"), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{Timestamp, Root} {
		r.AddKeys(fresh)
		if err := r.Rotate(role, r.current.root.Signed.Roles[role].KeyIDs[0], fresh.Public()); err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer server.Close()
	cfg, err := tufconfig.New(server.URL+"/metadata", root)
	if err != nil {
		t.Fatal(err)
	}
	cfg.LocalMetadataDir, cfg.LocalTargetsDir = t.TempDir(), t.TempDir()
	cfg.RemoteTargetsURL = server.URL + "/targets"
	up, err := updater.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	up.UnsafeSetRefTime(now)
	if err := up.Refresh(); err != nil {
		t.Fatal(err)
	}
	name := rel.Target("stable", 100).Name()
	info, err := up.GetTargetInfo(name)
	if err != nil {
		t.Fatal(err)
	}
	_, b, err := up.DownloadTarget(info, filepath.Join(t.TempDir(), "x"), "")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := update.ParseRelease(b); err != nil || got.Manifest.Version != "1.0.0" {
		t.Fatalf("%+v, %v", got, err)
	}
	if v := up.GetTrustedMetadataSet().Root.Signed.Version; v != 3 {
		t.Fatalf("root version %d", v)
	}
}

// TestKeysElsewhere signs root and targets on another machine.
func TestKeysElsewhere(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed, err := NewKey(filepath.Join(t.TempDir(), "k"), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dir, keys := filepath.Join(t.TempDir(), "repo"), filepath.Join(t.TempDir(), "keys")
	o := Options{Public: map[string][]crypto.PublicKey{Root: {ec.Public(), ed.Public()}, Targets: {ec.Public()}}, Threshold: map[string]int{Root: 2}}
	r, err := Create(dir, keys, now, o)
	bring := func(err error, role string, by ...crypto.Signer) error {
		t.Helper()
		var waits *PendingError
		if !errors.As(err, &waits) || waits.Role != role {
			t.Fatalf("%v, expected %s to wait", err, role)
		}
		b, err := os.ReadFile(waits.Path)
		if err != nil {
			t.Fatal(err)
		}
		if b, err = Sign(b, by); err != nil {
			t.Fatal(err)
		}
		return r.Import(b)
	}
	err = bring(err, Root, ec)
	err = bring(err, Root, ed)
	if err = bring(err, Targets, ec); err != nil {
		t.Fatal(err)
	}
	root := rootJSON(t, r)
	_, err = r.Add(context.Background(), release(t, "gate", "2.0", "amd64"), AddOptions{Channel: "stable"}, zstdPacker{})
	if a, err := check(t, root, t.TempDir(), openDir(t, dir), now, device("1.0")); err != nil || a.Candidate != nil || len(a.Skipped) != 0 {
		t.Fatalf("before it was signed: %+v, %v", a, err)
	}
	var waits *PendingError
	if !errors.As(err, &waits) {
		t.Fatal(err)
	}
	forged, err2 := os.ReadFile(waits.Path)
	if err2 != nil {
		t.Fatal(err2)
	}
	forged, err2 = Sign(bytes.Replace(forged, []byte(`"epoch": 0`), []byte(`"epoch": 9`), 1), []crypto.Signer{ec})
	if err2 != nil {
		t.Fatal(err2)
	}
	if err := r.Import(forged); !errors.Is(err, update.ErrUntrusted) {
		t.Fatalf("import of another list: %v", err)
	}
	// What is published is renewed while the list waits.
	if err := r.Refresh(); err != nil {
		t.Fatal(err)
	}
	if st, err := r.Status(); err != nil || !slices.Equal(st.Pending, []string{Targets}) || st.Roles[3].Version != 2 {
		t.Fatalf("%+v, %v", st, err)
	}
	if a, err := check(t, root, t.TempDir(), openDir(t, dir), now, device("1.0")); err != nil || len(a.Skipped) != 0 || a.Timestamp != 2 {
		t.Fatalf("renewed meanwhile: %+v, %v", a, err)
	}
	// The pending file survives the process.
	online, err2 := LoadKeys(keys)
	if err2 != nil {
		t.Fatal(err2)
	}
	if r, err2 = Open(dir, online, now); err2 != nil {
		t.Fatal(err2)
	}
	if st, err := r.Status(); err != nil || !slices.Equal(st.Pending, []string{Targets}) {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := bring(err, Targets, ec); err != nil {
		t.Fatal(err)
	}
	a, err := check(t, root, t.TempDir(), openDir(t, dir), now, device("1.0"))
	mustFind(t, a, err, "2.0")
}

// TestInterrupted publishes with every write missing from some point on, and opens.
func TestInterrupted(t *testing.T) {
	r, dir, keyDir := create(t, Options{})
	root := rootJSON(t, r)
	add(t, r, "1.0.0", AddOptions{})
	keys, err := LoadKeys(keyDir)
	if err != nil {
		t.Fatal(err)
	}
	// A draft with all signatures that was begun and not written.
	d, err := r.loadDraft()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.draftTargets(d); err != nil {
		t.Fatal(err)
	}
	delete(d.targets.Signed.Targets, "gate/stable/amd64/1.0.0.json")
	if err := settle(r, d, r.current.root.Metadata, Targets, d.targets); err != nil {
		t.Fatal(err)
	}
	b, err := d.targets.ToBytes(true)
	if err != nil {
		t.Fatal(err)
	}
	sn, err := r.settleSnapshot(d, r.current.root.Metadata, file[metadata.TargetsType]{d.targets, b})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.settleTimestamp(d, r.current.root.Metadata, sn); err != nil {
		t.Fatal(err)
	}
	if err := r.begin(d); err != nil {
		t.Fatal(err)
	}
	store := t.TempDir()
	a, err := check(t, root, store, openDir(t, dir), now, device("0.9"))
	mustFind(t, a, err, "1.0.0")
	if _, err = Open(dir, keys, now); err != nil {
		t.Fatal(err)
	}
	if a, err = check(t, root, store, openDir(t, dir), now, device("0.9")); err != nil || a.Candidate != nil || len(a.Skipped) != 0 {
		t.Fatalf("after Open: %+v, %v", a, err)
	}
	if _, err := os.Stat(filepath.Join(privateFolder(dir), pendingDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder pending is left: %v", err)
	}
}

func TestLifeOfARelease(t *testing.T) {
	r, dir, _ := create(t, Options{})
	root := rootJSON(t, r)
	add(t, r, "1.0.0", AddOptions{RolloutPercent: -1})
	name := "gate/stable/amd64/1.0.0.json"
	store := t.TempDir()
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer server.Close()
	web, err := update.NewHTTP(server.URL, update.HTTPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	reason := func(want update.Reason) {
		t.Helper()
		a, err := check(t, root, store, web, now, device("0.9"))
		if err != nil {
			t.Fatal(err)
		}
		if want == "" {
			mustFind(t, a, nil, "1.0.0")
		} else if a.Candidate != nil || len(a.Skipped) != 1 || a.Skipped[0].Reason != want {
			t.Fatalf("%+v, want %q", a, want)
		}
	}
	reason(update.NotYet)
	if err := r.Rollout(name, 100); err != nil {
		t.Fatal(err)
	}
	reason("")
	if _, err := r.Add(context.Background(), release(t, "gate", "1.0.0", "amd64"), AddOptions{Channel: "stable"}, zstdPacker{}); err == nil {
		t.Error("one version was added twice")
	}
	if err := r.Promote(name, "beta", 100); err != nil {
		t.Fatal(err)
	}
	if err := r.Withdraw(name); err != nil {
		t.Fatal(err)
	}
	reason(update.OtherChannel)
	if err := r.Refresh(); err != nil {
		t.Fatal(err)
	}
	if freed, err := r.Prune(); err != nil || freed == 0 {
		t.Errorf("pruned %d bytes: %v", freed, err)
	}
	reason(update.OtherChannel)
	if err := r.Withdraw("gate/beta/amd64/1.0.0.json"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Prune(); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestNamesOutside publishes under names that no device asks for, or that lead out of
// the repository. Nothing may be written.
func TestNamesOutside(t *testing.T) {
	r, dir, _ := create(t, Options{})
	add(t, r, "1.0.0", AddOptions{})
	before := listing(t, filepath.Dir(dir))
	for name, o := range map[string]AddOptions{
		"a channel that leads out": {Channel: "../../../../escaped"},
		"a channel beside":         {Channel: "../x"},
		"a channel of two words":   {Channel: "Bad Name"},
		"no channel":               {},
		"no version":               {Channel: "beta", MinFrom: "garbage"},
		"a negative epoch":         {Channel: "beta", Epoch: -1},
		"more than all":            {Channel: "beta", RolloutPercent: 101},
	} {
		if _, err := r.Add(context.Background(), release(t, "gate", "1.1.0", "amd64"), o, zstdPacker{}); err == nil {
			t.Errorf("%s: added", name)
		}
	}
	if _, err := r.Add(context.Background(), release(t, "../../gate", "1.1.0", "amd64"), AddOptions{Channel: "beta"}, zstdPacker{}); err == nil {
		t.Error("a product that leads out was added")
	}
	for _, channel := range []string{"", "../../../../escaped", "Bad Name", "a/b"} {
		if err := r.Promote("gate/stable/amd64/1.0.0.json", channel, 100); err == nil {
			t.Errorf("promoted to channel %q", channel)
		}
	}
	if after := listing(t, filepath.Dir(dir)); !slices.Equal(after, before) {
		t.Errorf("it holds %q, and before %q", after, before)
	}
	if s, err := r.Status(); err != nil || len(s.Releases) != 1 || len(s.Pending) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

// listing names all files under a folder but the lock.
func listing(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() != lockName {
			list = append(list, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestStatus(t *testing.T) {
	r, dir, keyDir := create(t, Options{Lifetime: map[string]time.Duration{Timestamp: 8 * day}})
	add(t, r, "1.0.0", AddOptions{})
	s, err := r.Status()
	if err != nil || len(s.Warnings) != 0 || len(s.Releases) != 1 || len(s.Roles) != 4 || s.Roles[0].KeysHere != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	if !s.BundleUntil.Equal(now.Add(8*day)) || !s.BundleUntilLenient.Equal(now.Add(365*day)) {
		t.Errorf("a bundle would hold until %v, leniently %v", s.BundleUntil, s.BundleUntilLenient)
	}
	keys, err := LoadKeys(keyDir)
	if err != nil {
		t.Fatal(err)
	}
	for after, want := range map[time.Duration]string{7 * day: "timestamp ends on 2026-11-29, in 1 days: renew it", 9 * day: "timestamp is over since 2026-11-29: devices refuse it"} {
		if r, err = Open(dir, keys, now.Add(after)); err != nil {
			t.Fatal(err)
		}
		if s, err = r.Status(); err != nil || !slices.Equal(s.Warnings, []string{want}) {
			t.Errorf("after %v: %q, %v", after, s.Warnings, err)
		}
	}
	if r, err = Open(dir, keys, now.Add(200*day)); err != nil {
		t.Fatal(err)
	}
	if err := r.Refresh(); err != nil {
		t.Fatal(err)
	}
	if s, err = r.Status(); err != nil || len(s.Warnings) != 0 || s.Roles[1].Version != 3 {
		t.Errorf("refreshed: %+v, %v", s, err)
	}
}

func TestBundle(t *testing.T) {
	r, dir, _ := create(t, Options{})
	root := rootJSON(t, r)
	old := add(t, r, "1.0.0", AddOptions{})
	add(t, r, "1.1.0", AddOptions{KeepDeltas: 1})
	var one, two bytes.Buffer
	for _, w := range []io.Writer{&one, &two} {
		if _, err := Bundle(context.Background(), dir, w, BundleOptions{From: []string{old.Manifest.Verity.RootHash}}); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("two bundles of one release differ")
	}
	b, err := update.OpenBundle(bytes.NewReader(one.Bytes()), int64(one.Len()))
	if err != nil {
		t.Fatal(err)
	}
	d := device("1.0.0")
	a, err := check(t, root, t.TempDir(), b, now, d)
	if err != nil || a.Candidate != nil || !slices.ContainsFunc(a.Skipped, func(s update.Skipped) bool {
		return s.Target.Version == "1.1.0" && s.Reason == update.NotCarried
	}) {
		t.Errorf("a patch for another root: %+v, %v", a, err)
	}
	d.RootHash = old.Manifest.Verity.RootHash
	a, err = check(t, root, t.TempDir(), b, now, d)
	c := mustFind(t, a, err, "1.1.0")
	if pack, _ := c.Release.Blob(update.RolePack, ""); c.Has(pack) {
		t.Error("the bundle has the whole root")
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var sealed bytes.Buffer
	if _, err := Bundle(context.Background(), dir, &sealed, BundleOptions{Recipients: []age.Recipient{id.Recipient()}}); err != nil {
		t.Fatal(err)
	}
	if _, err := update.OpenBundle(bytes.NewReader(sealed.Bytes()), int64(sealed.Len())); err == nil {
		t.Error("opened without a key")
	}
	if b, err = update.OpenBundle(bytes.NewReader(sealed.Bytes()), int64(sealed.Len()), id); err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(context.Background()); err != nil {
		t.Error(err)
	}
	a, err = check(t, root, t.TempDir(), b, now, device("0.1"))
	mustFind(t, a, err, "1.1.0")
	if _, err := Bundle(context.Background(), dir, io.Discard, BundleOptions{Channel: "beta"}); err == nil {
		t.Error("a bundle of nothing")
	}
}

// TestTamperedRepository: what was changed on the web server is not signed again.
func TestTamperedRepository(t *testing.T) {
	r, dir, keyDir := create(t, Options{})
	add(t, r, "1.0.0", AddOptions{})
	keys, err := LoadKeys(keyDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{update.RootPath(1), update.TargetsPath(2), update.SnapshotPath(2), update.TimestampPath} {
		full := filepath.Join(dir, path)
		good, err := os.ReadFile(full)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, bytes.Replace(good, []byte("2"), []byte("3"), 1), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, keys, now); !errors.Is(err, update.ErrUntrusted) {
			t.Errorf("%s was changed: %v", path, err)
		}
		if err := os.WriteFile(full, good, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(dir, keys, now); err != nil {
		t.Error(err)
	}
	// Another repository in its place, and an older state of itself.
	other, otherDir, _ := create(t, Options{})
	add(t, other, "9.0.0", AddOptions{})
	old := filepath.Join(t.TempDir(), "old")
	if err := os.CopyFS(old, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if r, err = Open(dir, keys, now); err != nil {
		t.Fatal(err)
	}
	if err := r.Withdraw("gate/stable/amd64/1.0.0.json"); err != nil {
		t.Fatal(err)
	}
	for from, want := range map[string]error{otherDir: update.ErrUntrusted, old: update.ErrOlder} {
		if err := errors.Join(os.Rename(dir, dir+".mine"), os.CopyFS(dir, os.DirFS(from))); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, keys, now); !errors.Is(err, want) {
			t.Errorf("%v; want %v", err, want)
		}
		if err := errors.Join(os.RemoveAll(dir), os.Rename(dir+".mine", dir)); err != nil {
			t.Fatal(err)
		}
	}
	// A draft that was put among what is published is nobody's.
	planted := filepath.Join(dir, pendingDir, Targets+".json")
	if err := errors.Join(os.MkdirAll(filepath.Dir(planted), 0o755), os.WriteFile(planted, []byte(`{"signed":{"_type":"targets"}}`), 0o644)); err != nil {
		t.Fatal(err)
	}
	if r, err = Open(dir, keys, now); err != nil {
		t.Fatal(err)
	}
	if s, err := r.Status(); err != nil || len(s.Pending) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	folder := release(t, "gate", "1.1.0", "amd64")
	if err := os.WriteFile(filepath.Join(folder, image.UKIName), []byte("another"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Add(context.Background(), folder, AddOptions{Channel: "stable"}, zstdPacker{}); err == nil {
		t.Error("added a UKI that is not the manifest's")
	}
	for _, k := range []string{Root, Targets, Snapshot, Timestamp} {
		fi, err := os.Stat(filepath.Join(keyDir, k+"-1.pem"))
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("key of %s: %v, %v", k, fi, err)
		}
	}
}

// TestReaderMeanwhile: a reader that checks all the time while the repository
// changes never sees half of a change.
func TestReaderMeanwhile(t *testing.T) {
	r, dir, _ := create(t, Options{})
	root := rootJSON(t, r)
	add(t, r, "1.0.0", AddOptions{})
	source := openDir(t, dir)
	stop, done := make(chan struct{}), make(chan error, 1)
	checks := 0
	store := t.TempDir()
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			c, err := update.New(update.Options{Root: root, StateDir: store, Source: source, Now: now})
			if err == nil {
				var a *update.Answer
				if a, err = c.Check(context.Background(), device("0.9")); err == nil && a.Candidate == nil {
					err = fmt.Errorf("no candidate: %+v", a)
				}
			}
			if err != nil {
				done <- err
				return
			}
			checks++
		}
	}()
	for i := range 10 {
		add(t, r, fmt.Sprintf("1.%d.0", i+1), AddOptions{KeepDeltas: 1})
		if err := errors.Join(r.Refresh(), r.Rollout(fmt.Sprintf("gate/stable/amd64/1.%d.0.json", i+1), 50), r.RenewRoot()); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if checks < 5 {
		t.Errorf("only %d checks", checks)
	}
}

// TestCutAnywhere stops a publication at every file it writes, opens the repository
// again and finds the old list or the new one, each complete.
func TestCutAnywhere(t *testing.T) {
	r, dir, keyDir := create(t, Options{})
	root := rootJSON(t, r)
	add(t, r, "1.0.0", AddOptions{})
	keys, err := LoadKeys(keyDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Rollout("gate/stable/amd64/1.0.0.json", 100); err != nil {
		t.Fatal(err)
	}
	folder := release(t, "gate", "2.0.0", "amd64")
	olds, news := 0, 0
	for _, blocked := range []string{
		"blobs/sha256", "targets", publishingDir,
		update.TargetsPath(4) + ".new", update.SnapshotPath(4) + ".new", "metadata/timestamp.json.new",
	} {
		work := filepath.Join(t.TempDir(), "repo")
		if err := errors.Join(os.CopyFS(work, os.DirFS(dir)), os.CopyFS(privateFolder(work), os.DirFS(privateFolder(dir)))); err != nil {
			t.Fatal(err)
		}
		w, err := Open(work, keys, now)
		if err != nil {
			t.Fatal(err)
		}
		// What cannot be written is where a folder, or a file, is in the way.
		path := filepath.Join(work, blocked)
		if blocked == publishingDir {
			path = filepath.Join(privateFolder(work), blocked)
			err = os.WriteFile(path, nil, 0o644)
		} else if strings.HasSuffix(blocked, ".new") {
			err = os.MkdirAll(path, 0o755)
		} else {
			err = errors.Join(os.Rename(path, path+".away"), os.WriteFile(path, nil, 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Add(context.Background(), folder, AddOptions{Channel: "stable"}, zstdPacker{}); err == nil {
			t.Fatalf("%s: nothing was in the way", blocked)
		}
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(blocked, ".new") && blocked != publishingDir {
			if err := os.Rename(path+".away", path); err != nil {
				t.Fatal(err)
			}
		}
		a, err := check(t, root, t.TempDir(), openDir(t, work), now, device("0.9"))
		mustFind(t, a, err, "1.0.0")
		if w, err = Open(work, keys, now); err != nil {
			t.Fatalf("%s: %v", blocked, err)
		}
		a, err = check(t, root, t.TempDir(), openDir(t, work), now, device("0.9"))
		if err == nil && a.Candidate != nil && a.Candidate.Target.Version == "2.0.0" {
			news++
		} else {
			mustFind(t, a, err, "1.0.0")
			olds++
		}
		if err := w.Resume(); err != nil {
			t.Errorf("%s: %v", blocked, err)
		}
		if err := w.Refresh(); err != nil {
			t.Errorf("%s: %v", blocked, err)
		}
	}
	if olds != 3 || news != 3 {
		t.Errorf("%d ended with the old list and %d with the new one", olds, news)
	}
}
