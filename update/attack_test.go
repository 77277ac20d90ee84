package update

import (
	"bytes"
	"context"
	"crypto/ed25519"
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
	"testing"
	"time"

	"filippo.io/age"
	"github.com/theupdateframework/go-tuf/v2/metadata"
	"golang.org/x/sys/unix"
)

// TestAttacks are the attacks of TUF §1.5.2 and those with stolen keys, each against
// a device that has seen version 2 of everything, from every kind of source. They
// must end in that error and leave the store as it was.
func TestAttacks(t *testing.T) {
	thief := key(66)
	for _, a := range []struct {
		name   string
		attack func(v *vendor, before map[string][]byte)
		want   error
	}{
		{"arbitrary software: release replaced", func(v *vendor, _ map[string][]byte) {
			for name := range v.files {
				if strings.HasPrefix(name, "targets/") {
					v.files[name] = bytes.Replace(v.files[name], []byte(`"epoch":3`), []byte(`"epoch":4`), 1)
				}
			}
		}, ErrUntrusted},
		{"arbitrary software: everything signed with own keys", func(v *vendor, _ map[string][]byte) {
			for role := range v.versions {
				v.keys[role] = []ed25519.PrivateKey{thief}
			}
			v.next()
		}, ErrUntrusted},
		{"arbitrary software: own root", func(v *vendor, _ map[string][]byte) {
			v.root.Signed.Version = 2
			v.signRoot(thief, key(67))
		}, ErrUntrusted},
		{"rollback: timestamp", func(v *vendor, before map[string][]byte) { v.files[TimestampPath] = before[TimestampPath] }, ErrOlder},
		{"rollback: snapshot, with the timestamp key", func(v *vendor, _ map[string][]byte) {
			v.versions["timestamp"]++
			v.signTimestamp(1)
		}, ErrOlder},
		{"rollback: targets, with timestamp and snapshot keys", func(v *vendor, _ map[string][]byte) {
			v.versions["timestamp"]++
			v.versions["snapshot"]++
			v.signSnapshot(1)
			v.signTimestamp(v.versions["snapshot"])
		}, ErrOlder},
		{"freeze: timestamp over", func(v *vendor, _ map[string][]byte) { v.expires["timestamp"] = noon.Add(-time.Second); v.next() }, ErrExpired},
		{"freeze: snapshot over", func(v *vendor, _ map[string][]byte) { v.expires["snapshot"] = noon.Add(-time.Second); v.next() }, ErrExpired},
		{"freeze: targets over", func(v *vendor, _ map[string][]byte) { v.expires["targets"] = noon.Add(-time.Second); v.next() }, ErrExpired},
		{"mix and match: old snapshot under the new name", func(v *vendor, before map[string][]byte) {
			v.next()
			v.files[SnapshotPath(3)] = before[SnapshotPath(1)]
		}, ErrUntrusted},
		{"mix and match: old targets under the new name", func(v *vendor, before map[string][]byte) {
			v.next()
			v.files[TargetsPath(3)] = before[TargetsPath(1)]
		}, ErrUntrusted},
		{"mix and match: snapshot of another version than timestamp says", func(v *vendor, _ map[string][]byte) {
			v.versions["timestamp"]++
			v.versions["snapshot"] = 4
			v.signSnapshot(2)
			v.files[SnapshotPath(3)] = v.files[SnapshotPath(4)]
			v.signTimestamp(3)
		}, ErrOlder},
		{"extraneous dependencies: one more blob", func(v *vendor, _ map[string][]byte) {
			for name, b := range v.files {
				if strings.HasPrefix(name, "targets/") {
					v.files[name] = bytes.Replace(b, []byte(`"blobs":[`), []byte(`"blobs":[{"role":"extra","size_bytes":1,"sha256":"`+digest(nil)+`"},`), 1)
				}
			}
		}, ErrUntrusted},
		{"wrong role: timestamp signed with the snapshot key", func(v *vendor, _ map[string][]byte) {
			v.keys["timestamp"] = v.keys["snapshot"]
			v.next()
		}, ErrUntrusted},
		{"wrong role: targets signed with the timestamp key", func(v *vendor, _ map[string][]byte) {
			v.keys["targets"] = v.keys["timestamp"]
			v.next()
		}, ErrUntrusted},
		{"wrong role: root signed with the other roles' keys", func(v *vendor, _ map[string][]byte) {
			v.root.Signed.Version = 2
			v.signRoot(v.keys["targets"][0], v.keys["timestamp"][0])
		}, ErrUntrusted},
		{"wrong role: a snapshot as timestamp", func(v *vendor, _ map[string][]byte) {
			v.versions["snapshot"]++
			v.keys["snapshot"] = v.keys["timestamp"]
			v.signSnapshot(2)
			v.files[TimestampPath] = v.files[SnapshotPath(3)]
		}, ErrUntrusted},
		{"threshold: one of two root keys", func(v *vendor, _ map[string][]byte) {
			v.root.Signed.Version = 2
			v.signRoot(v.keys["root"][0])
		}, ErrUntrusted},
		{"threshold: one root key twice", func(v *vendor, _ map[string][]byte) {
			v.root.Signed.Version = 2
			v.signRoot(v.keys["root"][0], v.keys["root"][0])
		}, ErrUntrusted},
		{"threshold: lowered by a root that one key signed", func(v *vendor, _ map[string][]byte) {
			v.root.Signed.Version = 2
			v.root.Signed.Roles["root"].Threshold = 1
			v.signRoot(v.keys["root"][0])
		}, ErrUntrusted},
		{"a root two versions on under the next name", func(v *vendor, _ map[string][]byte) {
			v.root.Signed.Version = 3
			v.signRoot(v.keys["root"]...)
			v.files[RootPath(2)] = v.files[RootPath(3)]
			delete(v.files, RootPath(3))
		}, ErrUntrusted},
		{"too much: timestamp", func(v *vendor, _ map[string][]byte) {
			v.files[TimestampPath] = append(v.files[TimestampPath], bytes.Repeat([]byte{' '}, maxTimestampBytes)...)
		}, ErrUntrusted},
		{"too much: snapshot beyond what timestamp says", func(v *vendor, _ map[string][]byte) {
			v.next()
			v.files[SnapshotPath(3)] = append(v.files[SnapshotPath(3)], ' ')
		}, ErrUntrusted},
		{"too much: a timestamp that says so of snapshot", func(v *vendor, _ map[string][]byte) {
			v.versions["timestamp"]++
			v.files[SnapshotPath(2)] = append(v.files[SnapshotPath(2)], bytes.Repeat([]byte{' '}, maxSnapshotBytes)...)
			v.signTimestamp(2)
			delete(v.files, SnapshotPath(2))
		}, ErrUntrusted},
		{"no hash of targets", func(v *vendor, _ map[string][]byte) {
			v.next()
			sn := metadata.Snapshot(v.expires["snapshot"])
			sn.Signed.Version = 3
			sn.Signed.Meta["targets.json"] = &metadata.MetaFiles{Version: 3}
			v.files[SnapshotPath(3)] = signed(v.t, sn, v.keys["snapshot"])
			v.signTimestamp(3)
		}, ErrUntrusted},
		{"null where a target should be, with all keys", func(v *vendor, _ map[string][]byte) {
			v.next()
			v.files[TargetsPath(3)] = []byte(`{"signed":{"_type":"targets","spec_version":"1.0.31","version":3,"expires":"2030-01-01T00:00:00Z","targets":{"a":null}},"signatures":[]}`)
			v.signSnapshot(3)
			v.signTimestamp(3)
		}, ErrUntrusted},
		{"null where a role should be", func(v *vendor, _ map[string][]byte) {
			v.files[RootPath(2)] = []byte(`{"signed":{"_type":"root","spec_version":"1.0.31","version":2,"consistent_snapshot":true,"expires":"2030-01-01T00:00:00Z","keys":{"a":null},"roles":{"root":null}},"signatures":null}`)
		}, ErrUntrusted},
		{"not JSON", func(v *vendor, _ map[string][]byte) { v.files[TimestampPath] = []byte("<html>Please log in</html>") }, ErrUntrusted},
		{"timestamp withheld", func(v *vendor, _ map[string][]byte) { delete(v.files, TimestampPath) }, ErrNotFound},
	} {
		for _, kind := range kinds {
			t.Run(a.name+"/"+kind, func(t *testing.T) {
				v := newVendor(t)
				before := maps.Clone(v.files)
				u := newUnit(t, v)
				v.next()
				u.mustFind(v.source("server"), "2.0.0")
				stored := u.stored()
				a.attack(v, before)
				got, err, want := attacked(u, v, kind, a.want)
				if !errors.Is(err, want) {
					t.Errorf("%+v, %v; want %v", got, err, want)
				}
				if !maps.Equal(stored, u.stored()) {
					t.Error("the store changed")
				}
			})
		}
	}
}

// attacked checks a source. A bundle whose index shows what is wrong does not even
// open, which is ErrUntrusted whatever it is.
func attacked(u *unit, v *vendor, kind string, want error) (*Answer, error, error) {
	u.t.Helper()
	if kind == "bundle" {
		b := v.bundle()
		s, err := OpenBundle(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return nil, err, ErrUntrusted
		}
		// Verify finds some of it too; the client must find all of it by itself.
		a, err := u.check(s)
		return a, err, want
	}
	a, err := u.check(v.source(kind))
	return a, err, want
}

// TestFastForward: a thief of a key made versions jump. It lasts until the key is
// replaced, and then what the device saw no longer counts, TUF §5.3.11.
func TestFastForward(t *testing.T) {
	for _, role := range []string{"timestamp", "snapshot"} {
		for _, kind := range kinds {
			t.Run(role+"/"+kind, func(t *testing.T) {
				v := newVendor(t)
				u := newUnit(t, v)
				u.mustFind(v.source(kind), "2.0.0")
				good := maps.Clone(v.versions)
				v.versions["timestamp"], v.versions["snapshot"] = 1<<40, 1<<40
				v.publish()
				u.mustFind(v.source(kind), "2.0.0")
				maps.Copy(v.versions, good)
				v.next()
				stored := u.stored()
				if _, err := u.check(v.source(kind)); !errors.Is(err, ErrOlder) {
					t.Fatalf("with the stolen key still in place: %v", err)
				}
				if !maps.Equal(stored, u.stored()) {
					t.Error("the store changed")
				}
				v.rotate(role, key(77))
				v.next()
				u.mustFind(v.source(kind), "2.0.0")
				// And the thief is out.
				v.keys[role] = []ed25519.PrivateKey{key(map[string]byte{"timestamp": 5, "snapshot": 4}[role])}
				v.next()
				if _, err := u.check(v.source(kind)); !errors.Is(err, ErrUntrusted) {
					t.Fatalf("the old key still works: %v", err)
				}
			})
		}
	}
}

// TestRotation goes through ten roots, with every key replaced, in one check, and
// in a device that has the first one built in and the others in its store.
func TestRotation(t *testing.T) {
	v := newVendor(t)
	u := newUnit(t, v)
	u.mustFind(v.source("server"), "2.0.0")
	for i := range byte(3) {
		for _, role := range []string{"targets", "snapshot", "timestamp"} {
			v.rotate(role, key(100+i))
		}
	}
	old := v.keys["root"]
	fresh := []ed25519.PrivateKey{key(110), key(111)}
	for i := range old {
		if err := v.root.Signed.RevokeKey(keyID(t, old[i]), "root"); err != nil {
			t.Fatal(err)
		}
		v.addKey("root", fresh[i])
	}
	v.root.Signed.Version++
	v.signRoot(append(slices.Clone(old), fresh...)...)
	v.next()
	a, err := u.check(v.source("bundle"))
	if err != nil || a.Root != 11 || a.Candidate == nil {
		t.Fatalf("%+v, %v", a, err)
	}
	u.mustFind(v.source("server"), "2.0.0")
	v.root.Signed.Version++
	v.signRoot(old...)
	if _, err := u.check(v.source("folder")); !errors.Is(err, ErrUntrusted) {
		t.Errorf("the replaced root keys still work: %v", err)
	}
	// A newer release has root 11 built in.
	delete(v.files, RootPath(12))
	u.root = v.files[RootPath(11)]
	u.mustFind(v.source("folder"), "2.0.0")
}

// TestLenient (F86): what a person carries may be late, when the device allows it, and
// then bears out no time; a server's may not; nothing may be older than what was seen.
func TestLenient(t *testing.T) {
	for _, kind := range kinds {
		v := newVendor(t)
		u := newUnit(t, v)
		u.now = noon.AddDate(0, 6, 0)
		if _, err := u.check(v.source(kind)); !errors.Is(err, ErrExpired) {
			t.Errorf("%s, strict: %v", kind, err)
		}
		u.expiry = LenientCarried
		a, err := u.check(v.source(kind))
		if kind == "server" || kind == "registry" {
			if !errors.Is(err, ErrExpired) {
				t.Errorf("a server, late: %v", err)
			}
			continue
		}
		if err != nil || a.Candidate == nil || !a.Late || !a.Seen.IsZero() {
			t.Errorf("%s, lenient: %+v, %v", kind, a, err)
		}
		s := State{LastSeen: noon}
		if s.Checked(a); !s.LastSeen.Equal(noon) {
			t.Errorf("%s: remembered %v", kind, s.LastSeen)
		}
		old := v.source(kind)
		v.next()
		u.mustFind(v.source(kind), "2.0.0")
		if _, err := u.check(old); !errors.Is(err, ErrOlder) {
			t.Errorf("%s, an old one: %v", kind, err)
		}
		u.now = noon.AddDate(1, 6, 0)
		if _, err := u.check(v.source(kind)); !errors.Is(err, ErrExpired) {
			t.Errorf("%s, targets over: %v", kind, err)
		}
		u.now = noon.AddDate(3, 0, 0)
		if _, err := u.check(v.source(kind)); !errors.Is(err, ErrExpired) {
			t.Errorf("%s, root over: %v", kind, err)
		}
	}
}

// TestClock: 1970 and 2099 on the real-time clock (F89).
func TestClock(t *testing.T) {
	v := newVendor(t)
	u := newUnit(t, v)
	old := v.source("server")
	v.expires["timestamp"] = noon.AddDate(0, 1, 0)
	v.next()
	var s State
	a, err := u.check(v.source("server"))
	if err != nil {
		t.Fatal(err)
	}
	s.Checked(a)
	if !s.LastSeen.Equal(noon) || !s.NewestVerified.Equal(noon.AddDate(0, 0, -1)) {
		t.Fatalf("%+v", s)
	}
	stored := u.stored()
	build := noon.AddDate(0, -3, 0)
	u.now = ReferenceTime(time.Unix(0, 0), build, s.NewestVerified, s.LastSeen)
	if !u.now.Equal(noon) {
		t.Errorf("in 1970 it is %v", u.now)
	}
	u.mustFind(v.source("server"), "2.0.0")
	// A new device in 1970 takes no metadata that was over when it was built.
	fresh := newUnit(t, v)
	fresh.now = ReferenceTime(time.Unix(0, 0), noon.AddDate(0, 0, 8), time.Time{}, time.Time{})
	if _, err := fresh.check(old); !errors.Is(err, ErrExpired) {
		t.Errorf("built later: %v", err)
	}
	u.now = ReferenceTime(time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC), build, s.NewestVerified, s.LastSeen)
	if _, err := u.check(v.source("server")); !errors.Is(err, ErrExpired) {
		t.Errorf("in 2099: %v", err)
	}
	u.now = ReferenceTime(noon, build, s.NewestVerified, s.LastSeen)
	u.mustFind(v.source("server"), "2.0.0")
	if !maps.Equal(stored, u.stored()) {
		t.Error("the store changed")
	}
}

// TestEndlessData: a server that never stops, for each file that a check reads.
func TestEndlessData(t *testing.T) {
	v := newVendor(t)
	v.root.Signed.Version = 2
	v.signRoot(v.keys["root"]...)
	for name := range v.files {
		if c, _, _ := classify(name); c == classBlob || name == RootPath(1) {
			continue
		}
		sent := 0
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked := strings.TrimPrefix(r.URL.Path, "/")
			if b, ok := v.files[asked]; ok && asked != name {
				w.Write(b)
				return
			} else if !ok {
				http.NotFound(w, r)
				return
			}
			block := bytes.Repeat([]byte(" "), 64<<10)
			for {
				n, err := w.Write(block)
				if sent += n; err != nil || sent > 1<<30 {
					return
				}
			}
		}))
		u := newUnit(t, v)
		_, err := u.check(httpSource(t, s.URL))
		s.CloseClientConnections()
		s.Close()
		if !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: %v", name, err)
		}
		if sent > 64<<20 {
			t.Errorf("%s: %d bytes were taken", name, sent)
		}
		if _, ok := u.stored()[trustName]; ok && !strings.Contains(name, "root") {
			// Root 2 was good and is kept; nothing else may be.
			var kept trust
			if err := json.Unmarshal([]byte(u.stored()[trustName]), &kept); err != nil || len(kept.Roots) != 1 || kept.Timestamp != nil {
				if !strings.HasPrefix(name, "targets/") {
					t.Errorf("%s: the store has %+v, %v", name, kept, err)
				}
			}
		}
	}
}

// TestSlowRetrieval: a server that sends a byte now and then.
func TestSlowRetrieval(t *testing.T) {
	v := newVendor(t)
	u := newUnit(t, v)
	stall := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, ok := v.files[strings.TrimPrefix(r.URL.Path, "/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		for i := range b {
			w.Write(b[i : i+1])
			w.(http.Flusher).Flush()
			select {
			case <-time.After(20 * time.Millisecond):
			case <-r.Context().Done():
				return
			case <-stall:
				return
			}
		}
	}))
	defer s.Close()
	defer close(stall)
	h, err := NewHTTP(s.URL, HTTPOptions{RateWindow: 300 * time.Millisecond, Backoff: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer h.CloseIdle()
	start := time.Now()
	if _, err := u.check(h); !errors.Is(err, ErrSlow) {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v to notice", took)
	}
	if len(u.stored()) != 0 {
		t.Error("the store changed")
	}
}

// TestOnlyWhatIsNeeded: extraneous files of a repository are never asked for.
func TestOnlyWhatIsNeeded(t *testing.T) {
	v := newVendor(t)
	v.blob("nobody's", []byte("extra"))
	v.release("1.5.0")
	v.next()
	s, asked := v.server()
	u := newUnit(t, v)
	c := u.mustFind(httpSource(t, s.URL), "2.0.0")
	if _, err := readBlob(c, RoleUKI); err != nil {
		t.Fatal(err)
	}
	uki, _ := c.Release.Blob(RoleUKI, "")
	r := c.Release
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{RootPath(2), TimestampPath, SnapshotPath(2), TargetsPath(2), DescriptorPath(c.Target.Name(), digest(text)), BlobPath(uki.SHA256)}
	if !slices.Equal(asked(), want) {
		t.Errorf("asked for %q, want %q", asked(), want)
	}
	// Nothing is new: two small requests and the release.
	s, asked = v.server()
	u.mustFind(httpSource(t, s.URL), "2.0.0")
	if got := asked(); len(got) != 3 {
		t.Errorf("asked for %q", got)
	}
}

// TestBlobReplaced: the reader that hands out the bytes finds it (I4).
func TestBlobReplaced(t *testing.T) {
	for _, kind := range kinds {
		for what, change := range map[string]func([]byte) []byte{
			"one bit": func(b []byte) []byte { b = bytes.Clone(b); b[len(b)-1] ^= 1; return b },
			"shorter": func(b []byte) []byte { return b[:len(b)-1] },
			"longer":  func(b []byte) []byte { return append(bytes.Clone(b), 0) },
			"empty":   func([]byte) []byte { return nil },
		} {
			v := newVendor(t)
			u := newUnit(t, v)
			pack := v.releases[0].Blobs[0]
			v.files[BlobPath(pack.SHA256)] = change(v.files[BlobPath(pack.SHA256)])
			c := u.mustFind(v.source(kind), "2.0.0")
			b, err := readBlob(c, RolePack)
			if len(b) != 0 || !errors.Is(err, ErrUntrusted) {
				t.Errorf("%s, %s: %d bytes, %v", kind, what, len(b), err)
			}
			path := filepath.Join(t.TempDir(), "x")
			if err := c.Save(context.Background(), pack, path); !errors.Is(err, ErrUntrusted) {
				t.Errorf("%s, %s: saved: %v", kind, what, err)
			}
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s, %s: it has its name", kind, what)
			}
		}
	}
}

// TestReasons: whatever a release is not for, and why.
func TestReasons(t *testing.T) {
	for _, tt := range []struct {
		name   string
		device func(*Device)
		change func(*Release)
		want   Reason
	}{
		{name: "taken"},
		{name: "another product", device: func(d *Device) { d.Product = "pump" }, want: OtherProduct},
		{name: "another channel", device: func(d *Device) { d.Channel = "beta" }, want: OtherChannel},
		{name: "another architecture", device: func(d *Device) { d.Arch = "arm64" }, want: OtherArch},
		{name: "other hardware", change: func(r *Release) { r.Hardware = []string{"A", "B*"} }, device: func(d *Device) { d.Hardware = "A1" }, want: OtherHardware},
		{name: "this hardware", change: func(r *Release) { r.Hardware = []string{"A", "B*"} }, device: func(d *Device) { d.Hardware = "B-12" }},
		{name: "it runs", device: func(d *Device) { d.RootHash = digest([]byte("root2.0.0")) }, want: Running},
		{name: "not newer", device: func(d *Device) { d.Version = "2.0" }, want: NotNewer},
		{name: "older epoch", device: func(d *Device) { d.Epoch = 4 }, want: LowerEpoch},
		{name: "too far apart", change: func(r *Release) { r.MinFrom = "1.0.1" }, want: TooFarApart},
		{name: "near enough", change: func(r *Release) { r.MinFrom = "1.0.0" }},
		{name: "failed", device: func(d *Device) { d.Failed = []string{digest([]byte("root2.0.0"))} }, want: HasFailed},
		{name: "failed and wanted", device: func(d *Device) { d.Failed = []string{digest([]byte("root2.0.0"))}; d.Want = "2.0.0" }},
		{name: "wanted downgrade", device: func(d *Device) { d.Version, d.Want = "3", "2.0.0" }},
		{name: "wanted downgrade below the epoch", device: func(d *Device) { d.Version, d.Want, d.Epoch = "3", "2.0.0", 4 }, want: LowerEpoch},
		{name: "another is wanted", device: func(d *Device) { d.Want = "2.1" }, want: NotWanted},
	} {
		for _, kind := range kinds {
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				v := newVendor(t)
				v.releases = nil
				if tt.change == nil {
					tt.change = func(*Release) {}
				}
				v.release("2.0.0", tt.change)
				v.publish()
				u := newUnit(t, v)
				if tt.device != nil {
					tt.device(&u.device)
				}
				a, err := u.check(v.source(kind))
				if err != nil {
					t.Fatal(err)
				}
				if tt.want == "" && a.Candidate == nil || tt.want != "" && (a.Candidate != nil || len(a.Skipped) != 1 || a.Skipped[0].Reason != tt.want) {
					t.Errorf("%+v; want %q", a, tt.want)
				}
			})
		}
	}
}

// TestStick: folders that are not a plain repository.
func TestStick(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(t *testing.T, dir string, v *vendor) // of a good one
		want error
	}{
		{"link out of it", func(t *testing.T, dir string, v *vendor) {
			link(t, "/etc/passwd", filepath.Join(dir, TimestampPath))
		}, nil},
		{"link within it", func(t *testing.T, dir string, v *vendor) {
			if err := os.Rename(filepath.Join(dir, TimestampPath), filepath.Join(dir, "x")); err != nil {
				t.Fatal(err)
			}
			link(t, "../x", filepath.Join(dir, TimestampPath))
		}, nil},
		{"folder that is a link", func(t *testing.T, dir string, v *vendor) {
			other := v.folder()
			if err := os.RemoveAll(filepath.Join(dir, "metadata")); err != nil {
				t.Fatal(err)
			}
			link(t, filepath.Join(other, "metadata"), filepath.Join(dir, "metadata"))
		}, nil},
		{"FIFO", func(t *testing.T, dir string, v *vendor) {
			path := filepath.Join(dir, TimestampPath)
			if err := errors.Join(os.Remove(path), unix.Mkfifo(path, 0o644)); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"folder for a file", func(t *testing.T, dir string, v *vendor) {
			path := filepath.Join(dir, TimestampPath)
			if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o755)); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"file for a folder", func(t *testing.T, dir string, v *vendor) {
			path := filepath.Join(dir, "metadata")
			if err := errors.Join(os.RemoveAll(path), os.WriteFile(path, nil, 0o644)); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"large sparse timestamp", func(t *testing.T, dir string, v *vendor) {
			if err := os.Truncate(filepath.Join(dir, TimestampPath), 1<<40); err != nil {
				t.Fatal(err)
			}
		}, ErrUntrusted},
		{"empty", func(t *testing.T, dir string, v *vendor) {
			if err := os.RemoveAll(filepath.Join(dir, "metadata")); err != nil {
				t.Fatal(err)
			}
		}, ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newVendor(t)
			u := newUnit(t, v)
			dir := v.folder()
			tt.make(t, dir, v)
			d, err := OpenDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if _, err := u.check(d); err == nil || tt.want != nil && !errors.Is(err, tt.want) || tt.want == nil && !strings.Contains(err.Error(), "only plain files") {
				t.Errorf("%v; want %v", err, tt.want)
			}
			if len(u.stored()) != 0 {
				t.Error("the store changed")
			}
		})
	}
	t.Run("many files", func(t *testing.T) {
		v := newVendor(t)
		dir := v.folder()
		for i := range 3000 {
			if err := os.WriteFile(filepath.Join(dir, "metadata", fmt.Sprintf("%d.junk", i)), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		d, err := OpenDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		newUnit(t, v).mustFind(d, "2.0.0")
	})
}

func link(t *testing.T, to, at string) {
	t.Helper()
	if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := os.Symlink(to, at); err != nil {
		t.Fatal(err)
	}
}

// TestPathsLeadNowhere: no source is asked for anything but files of a repository.
func TestPathsLeadNowhere(t *testing.T) {
	v := newVendor(t)
	for _, kind := range kinds {
		s := v.source(kind)
		for _, path := range []string{"", "/", "..", "metadata/../../etc/passwd", "/etc/passwd", "metadata/0.root.json", "metadata/01.root.json",
			"metadata/1.root.json/", "blobs/sha256/../x", "blobs/sha256/" + strings.Repeat("A", 64), "targets/../../../x/" + digest(nil) + ".1.json",
			"targets/gate/stable/..%2f/" + digest(nil) + ".1.json", "metadata/timestamp.json?x", "metadata\\timestamp.json", "holdfast-bundle", "SHA256SUMS"} {
			r, _, err := s.Fetch(context.Background(), path, 0, -1)
			if err == nil {
				r.Close()
				t.Errorf("%s gave %q", kind, path)
			}
		}
	}
}

// TestDamagedBundles flips a bit in every 512 bytes of a small bundle and in every
// 64 KiB of a larger one, and cuts them off.
func TestDamagedBundles(t *testing.T) {
	small := newVendor(t)
	large := newVendor(t)
	large.releases = nil
	large.release("2.0.0", func(r *Release) { r.Blobs[0] = large.blob(RolePack, pattern("large", 3<<20)) })
	large.publish()
	for v, step := range map[*vendor]int{small: 512, large: 64 << 10} {
		good := v.bundle()
		u := newUnit(t, v)
		for i := 0; i < len(good); i += step {
			at := min(i+i/step*37%step, len(good)-1)
			bad := bytes.Clone(good)
			bad[at] ^= 1 << (i / step % 8)
			damaged(t, u, good, bad, fmt.Sprintf("bit at byte %d of %d", at, len(good)))
		}
		for i := 0; i < len(good); i += step {
			damaged(t, u, good, good[:i], fmt.Sprintf("cut off at %d of %d", i, len(good)))
		}
		damaged(t, u, good, append(bytes.Clone(good), 0), "one byte more")
		damaged(t, u, good, append(bytes.Clone(good), good...), "twice")
	}
}

// damaged wants a bundle to be found damaged, and a device that checks it without
// Verify to get right bytes or an error.
func damaged(t *testing.T, u *unit, good, bad []byte, what string) {
	t.Helper()
	b, err := OpenBundle(bytes.NewReader(bad), int64(len(bad)))
	if err != nil {
		if !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: open: %v", what, err)
		}
		return
	}
	if err := b.Verify(context.Background()); !errors.Is(err, ErrUntrusted) {
		t.Errorf("%s: verify: %v", what, err)
	}
	u.store = t.TempDir()
	a, err := u.check(b)
	if err != nil {
		if !errors.Is(err, ErrUntrusted) && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: check: %v", what, err)
		}
		if len(u.stored()) != 0 && !strings.Contains(err.Error(), "targets/") {
			t.Errorf("%s: the store changed on %v", what, err)
		}
		return
	}
	if a.Candidate == nil {
		return // what names a file was hit
	}
	for _, blob := range a.Candidate.Release.Blobs {
		got, err := readBlob(a.Candidate, blob.Role)
		if err == nil && digest(got) != blob.SHA256 || err != nil && !errors.Is(err, ErrUntrusted) && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: blob %q of %d bytes: %v", what, blob.Role, len(got), err)
		}
	}
}

// TestBundlesTooLarge: members that say they have more than the file, or than they may.
func TestBundlesTooLarge(t *testing.T) {
	v := newVendor(t)
	good := v.bundle()
	for name, header := range map[string][]byte{
		"blob beyond the end":   mustHeader(t, BlobPath(digest(nil)), MaxBlobBytes),
		"timestamp of 8 GiB":    mustHeader(t, TimestampPath, MaxBlobBytes),
		"sums of 1 MiB":         mustHeader(t, bundleSums, 1<<20),
		"a name of nothing":     mustHeader(t, "etc/passwd", 3),
		"a name that goes back": mustHeader(t, "../../x", 3),
	} {
		bad := append(bytes.Clone(good[:1024]), header...)
		bad = append(bad, good[1024:]...)
		if _, err := OpenBundle(bytes.NewReader(bad), int64(len(bad))); !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range 1100 {
		v.blob("", pattern(fmt.Sprint(i), 1))
		v.blob("", fmt.Append(nil, i))
	}
	b := v.bundle()
	if _, err := OpenBundle(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "members") {
		t.Errorf("many members: %v", err)
	}
	if _, err := OpenBundle(failing{}, 1<<40); err == nil {
		t.Error("a medium that cannot be read")
	}
}

type failing struct{}

func (failing) ReadAt([]byte, int64) (int, error) { return 0, unix.EIO }

func mustHeader(t *testing.T, name string, size int64) []byte {
	t.Helper()
	h, err := encodeHeader(name, size)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestFullVolume: the store cannot be written. The check says so, and the old one stays.
func TestFullVolume(t *testing.T) {
	v := newVendor(t)
	u := newUnit(t, v)
	u.mustFind(v.source("server"), "2.0.0")
	s := State{LastSeen: noon}
	if err := s.Save(u.store); err != nil {
		t.Fatal(err)
	}
	stored := u.stored()
	v.next()
	// The temporary file's name leads to a device that is always full.
	for _, name := range []string{trustName, stateName} {
		link(t, "/dev/full", filepath.Join(u.store, name+".new"))
	}
	if _, err := u.check(v.source("server")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v", err)
	}
	s.LastSeen = noon.Add(time.Hour)
	if err := s.Save(u.store); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v", err)
	}
	if !maps.Equal(stored, u.stored()) {
		t.Error("the store changed")
	}
	u.mustFind(v.source("server"), "2.0.0")
	if maps.Equal(stored, u.stored()) {
		t.Error("with room again, nothing was kept")
	}
}

// TestDamagedStore: a device that lost its memory can still update, and says so.
func TestDamagedStore(t *testing.T) {
	v := newVendor(t)
	u := newUnit(t, v)
	v.rotate("timestamp", key(9))
	v.next()
	u.mustFind(v.source("server"), "2.0.0")
	path := filepath.Join(u.store, trustName)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"empty": nil, "zeros": make([]byte, len(good)), "cut off": good[:len(good)/2], "format 2": []byte(`{"format":2}`)} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		a, err := u.check(v.source("server"))
		if err != nil || a.Candidate == nil || !a.Damaged {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
		if aside, err := os.ReadFile(path + ".damaged"); err != nil || !bytes.Equal(aside, content) {
			t.Errorf("%s: not put aside: %v", name, err)
		}
	}
	// Each part changed by itself is verified again and fetched anew.
	for _, part := range []string{"roots", "timestamp", "snapshot", "targets"} {
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(good, &fields); err != nil {
			t.Fatal(err)
		}
		fields[part] = json.RawMessage(`"eyJzaWduZWQiOnt9fQ=="`)
		if part == "roots" {
			fields[part] = json.RawMessage(`["eyJzaWduZWQiOnt9fQ=="]`)
		}
		b, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		u.mustFind(v.source("server"), "2.0.0")
	}
}

// TestServerBreaksOff: reading goes on where it stopped.
func TestServerBreaksOff(t *testing.T) {
	v := newVendor(t)
	u := newUnit(t, v)
	blob := v.releases[0].Blobs[0]
	content := v.files[BlobPath(blob.SHA256)]
	requests := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/")
		b, ok := v.files[name]
		if !ok {
			http.NotFound(w, r)
			return
		}
		if name != BlobPath(blob.SHA256) {
			w.Write(b)
			return
		}
		if requests++; requests == 2 {
			http.Error(w, "busy", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("ETag", `"one"`)
		http.ServeContent(&shortWriter{ResponseWriter: w, left: 3000}, r, "", time.Time{}, bytes.NewReader(b))
	}))
	defer s.Close()
	c := u.mustFind(httpSource(t, s.URL), "2.0.0")
	got, err := readBlob(c, RolePack)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d of %d bytes, %v", len(got), len(content), err)
	}
	if requests < 7 {
		t.Errorf("only %d requests", requests)
	}
}

// shortWriter breaks a response off.
type shortWriter struct {
	http.ResponseWriter
	left int
}

func (s *shortWriter) Write(p []byte) (int, error) {
	n, err := s.ResponseWriter.Write(p[:min(len(p), s.left)])
	if s.left -= n; s.left == 0 {
		s.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func (s *shortWriter) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{s}, r)
}

// TestEndlessAgeHeader: a file that says it is encrypted and whose header goes on
// and on is refused from its first bytes, with an error that can be shown.
func TestEndlessAgeHeader(t *testing.T) {
	k, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for name, line := range map[string]string{
		"one line": strings.Repeat("\xff", 3<<20), "lines": strings.Repeat("-> X25519 a\n\n", 200_000), "nothing": "",
		"an end, then a line": "---\n" + strings.Repeat("\x00", 3<<20), "a line, then an end": strings.Repeat("\x01", maxAgeHeader) + "\n--- ",
	} {
		text := ageMagic + line
		r := &countedReader{r: strings.NewReader(text)}
		_, err := OpenBundle(r, int64(len(text)), k)
		if !errors.Is(err, ErrUntrusted) || len(err.Error()) > 1000 {
			t.Errorf("%s: %.300q", name, err)
		}
		if r.n > 3*maxAgeHeader {
			t.Errorf("%s: %d bytes read", name, r.n)
		}
	}
}

type countedReader struct {
	r *strings.Reader
	n int
}

func (c *countedReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.r.ReadAt(p, off)
	c.n += n
	return n, err
}
