package update

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCompareVersions(t *testing.T) {
	// In order; what stands on one line compares equal. Semantic Versioning 2.0.0 §11.
	order := [][]string{
		{"0"}, {"0.0.1"}, {"0.9"}, {"1.0.0-alpha"}, {"1.0.0-alpha.1"}, {"1.0.0-alpha.beta"}, {"1.0.0-beta"}, {"1.0.0-beta.2"},
		{"1.0.0-beta.11"}, {"1.0.0-rc.1", "1-rc.1"}, {"1", "1.0", "1.0.0", "1.0.0.0", "01.0"}, {"1.0.0.1"}, {"1.2"}, {"1.10"},
		{"2"}, {"18446744073709551616"}, {"18446744073709551617"},
	}
	for i, as := range order {
		for j, bs := range order {
			for _, a := range as {
				for _, b := range bs {
					want := 0
					if i < j {
						want = -1
					} else if i > j {
						want = 1
					}
					if got := CompareVersions(a, b); got != want || !ValidVersion(a) {
						t.Errorf("%s and %s: %d, want %d", a, b, got, want)
					}
				}
			}
		}
	}
	for _, bad := range []string{"", "v1", "1.", "1.2.3.4.5", "1/2", "1-", "-1", "1..2", strings.Repeat("1", 31), "1\n"} {
		if ValidVersion(bad) {
			t.Errorf("%q is valid", bad)
		}
	}
}

// TestRollout: shares are about right, growing ones only add devices, and versions
// differ in who goes first. The buckets are for ever: two of them are written down.
func TestRollout(t *testing.T) {
	count := map[int]int{}
	moved := 0
	for i := range 4000 {
		id := fmt.Sprintf("serial-%d", i)
		in := false
		for percent := 0; percent <= 100; percent += 10 {
			now := InRollout(id, "1.2.3", percent)
			if in && !now {
				t.Fatalf("%s is out again at %d percent", id, percent)
			}
			if in = now; in {
				count[percent]++
			}
		}
		if InRollout(id, "1.2.3", 10) != InRollout(id, "1.2.4", 10) {
			moved++
		}
	}
	if count[0] != 0 || count[100] != 4000 {
		t.Errorf("%v", count)
	}
	for percent := 10; percent < 100; percent += 10 {
		if got := count[percent] * 100 / 4000; got < percent-3 || got > percent+3 {
			t.Errorf("%d percent are %d", percent, got)
		}
	}
	if moved < 400 {
		t.Errorf("only %d devices change their place with the version", moved)
	}
	if InRollout("", "1.2.3", 99) || !InRollout("", "1.2.3", 100) {
		t.Error("a device without an ID")
	}
	for id, bucket := range map[string]int{"serial 1": 68, "serial 2": 7} {
		if InRollout(id, "1.0", bucket) || !InRollout(id, "1.0", bucket+1) {
			t.Errorf("%s is not in bucket %d any more", id, bucket)
		}
	}
}

// TestNewestFirst: of several releases the newest that fits, also past one that does not.
func TestNewestFirst(t *testing.T) {
	v := newVendor(t)
	v.release("2.10.0")
	v.release("2.9.0")
	v.release("3.0.0-rc1", func(r *Release) { r.Epoch = 2 })
	v.next()
	for _, kind := range []string{"folder", "server"} {
		u := newUnit(t, v)
		a, err := u.check(v.source(kind))
		if err != nil || a.Candidate == nil || a.Candidate.Target.Version != "2.10.0" {
			t.Fatalf("%+v, %v", a, err)
		}
		var got []string
		for _, s := range a.Skipped {
			got = append(got, s.Target.Version+" "+string(s.Reason))
		}
		want := []string{"3.0.0-rc1 " + string(LowerEpoch), "2.9.0 " + string(Superseded), "2.0.0 " + string(Superseded)}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q", kind, got)
		}
		u.device.Failed = []string{a.Candidate.Target.RootHash}
		u.mustFind(v.source(kind), "2.9.0")
	}
	// A stick without the newest offers the next.
	delete(v.files, BlobPath(v.releases[1].Blobs[0].SHA256))
	newUnit(t, v).mustFind(v.source("folder"), "2.9.0")
}

func TestRolloutAndSticks(t *testing.T) {
	v := newVendor(t)
	v.percent = 0
	v.next()
	for _, kind := range kinds {
		a, err := newUnit(t, v).check(v.source(kind))
		if err != nil || (a.Candidate == nil) != (kind == "server" || kind == "registry") {
			t.Errorf("%s: %+v, %v", kind, a, err)
		}
	}
}

func TestNew(t *testing.T) {
	v := newVendor(t)
	good := Options{Root: v.files[RootPath(1)], StateDir: t.TempDir(), Source: v.source("folder"), Now: noon}
	for name, change := range map[string]func(*Options){
		"no root": func(o *Options) { o.Root = nil }, "another file as root": func(o *Options) { o.Root = v.files[TimestampPath] },
		"null in root": func(o *Options) { o.Root = []byte(`{"signed":{"_type":"root","roles":{"root":null}},"signatures":[]}`) },
		"no time":      func(o *Options) { o.Now = time.Time{} }, "no store": func(o *Options) { o.StateDir = "" }, "no source": func(o *Options) { o.Source = nil },
		"large root": func(o *Options) { o.Root = make([]byte, maxRootBytes+1) },
	} {
		o := good
		change(&o)
		if _, err := New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	c, err := New(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Device){
		"product": func(d *Device) { d.Product = "../x" }, "version": func(d *Device) { d.Version = "latest" },
		"root hash": func(d *Device) { d.RootHash = "abc" }, "want": func(d *Device) { d.Want = "x" },
	} {
		d := testDevice()
		change(&d)
		if _, err := c.Check(context.Background(), d); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func testState() *State {
	s := &State{Format: 1, LastSeen: noon, NewestVerified: noon.Add(-time.Hour), Pending: &Pending{Slot: "b", Version: "2.0.0", RootHash: digest(nil), Sequence: 7, Since: noon}}
	s.Fail(Failed{Version: "1.9", RootHash: digest([]byte("1.9")), Reason: "no health", Time: noon})
	s.Log(JournalEntry{Time: noon, From: "1.9", To: "2.0.0", Source: "https://updates.example", Result: Applied, FetchedBytes: 1 << 33, Seconds: 61})
	return s
}

func TestState(t *testing.T) {
	dir := t.TempDir()
	s, err := LoadState(dir, noon)
	if err != nil || !reflect.DeepEqual(s, &State{Format: 1}) {
		t.Fatalf("none: %+v, %v", s, err)
	}
	want := testState()
	if err := want.Save(dir); err != nil {
		t.Fatal(err)
	}
	if s, err = LoadState(dir, noon); err != nil || !reflect.DeepEqual(s, want) {
		t.Fatalf("%+v, %v", s, err)
	}
	path := filepath.Join(dir, stateName)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"empty": nil, "zeros": make([]byte, 4096), "cut off": good[:len(good)-10], "format 2": []byte(`{"format":2}`),
		"too large":     append(bytes.Clone(good), bytes.Repeat([]byte(" "), maxStateBytes)...),
		"not a version": bytes.Replace(good, []byte(`"2.0.0"`), []byte(`"../.."`), 1), "not a result": bytes.Replace(good, []byte("applied"), []byte("wiped"), 1),
		"not a hash": bytes.Replace(good, []byte(digest(nil)), []byte("00"), 1), "negative": bytes.Replace(good, []byte(`: 61`), []byte(`: -1`), 1),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := LoadState(dir, noon)
		if err != nil || len(s.Journal) != 1 || !strings.Contains(s.Journal[0].Reason, "damaged") || s.Pending != nil {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
		if aside, err := os.ReadFile(path + ".damaged"); err != nil || !bytes.Equal(aside, content) {
			t.Errorf("%s: not put aside: %v", name, err)
		}
		if err := s.Save(dir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestStateStaysSmall: whatever happens to a device for years.
func TestStateStaysSmall(t *testing.T) {
	s := &State{}
	for i := range 1000 {
		long := strings.Repeat(string(rune(0x4e00+i)), 400) + "\xff"
		s.Log(JournalEntry{Time: noon, From: "no version", To: "1.0", Source: long, Result: Refused, Reason: long, FetchedBytes: -1})
		s.Fail(Failed{Version: "1.0", RootHash: digest(fmt.Append(nil, i%30)), Reason: long})
		s.Fail(Failed{Version: "1.0", RootHash: digest(fmt.Append(nil, i%30)), Reason: "again"})
	}
	if len(s.Journal) != maxJournal || len(s.Failed) != maxFailed || s.Failed[maxFailed-1].Reason != "again" {
		t.Errorf("%d and %d entries", len(s.Journal), len(s.Failed))
	}
	if hashes := s.FailedHashes(); len(hashes) != maxFailed || slices.Contains(hashes[1:], hashes[0]) {
		t.Errorf("%q", hashes)
	}
	dir := t.TempDir()
	if err := s.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := LoadState(dir, noon)
	if err != nil || len(got.Journal) != maxJournal {
		t.Errorf("%d entries, %v", len(got.Journal), err)
	}
}

func TestBundleWriterRefuses(t *testing.T) {
	v := newVendor(t)
	text := v.files[TargetsPath(1)]
	for name, add := range map[string]func(b *BundleWriter) error{
		"other path":      func(b *BundleWriter) error { return b.Add("etc/passwd", 0, strings.NewReader("")) },
		"timestamp first": func(b *BundleWriter) error { return b.Add(TimestampPath, 1, strings.NewReader("x")) },
		"wrong size":      func(b *BundleWriter) error { return b.Add(RootPath(1), 5, bytes.NewReader(text)) },
		"too short":       func(b *BundleWriter) error { return b.Add(RootPath(1), 9, strings.NewReader("x")) },
		"gap in roots": func(b *BundleWriter) error {
			return errors.Join(b.Add(RootPath(1), 1, strings.NewReader("x")), b.Add(RootPath(3), 1, strings.NewReader("x")))
		},
		"nothing in it": func(b *BundleWriter) error { return b.Close() },
	} {
		b, err := NewBundleWriter(&bytes.Buffer{})
		if err != nil {
			t.Fatal(err)
		}
		if err := add(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzState(f *testing.F) {
	b, err := testState().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format":1,"journal":[{"result":"refused","time":"0001-01-01T00:00:00Z"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeState(b)
		if err != nil {
			return
		}
		one, err := s.encode()
		if err != nil {
			t.Fatalf("%q was read and cannot be written: %v", b, err)
		}
		again, err := decodeState(one)
		if err != nil {
			t.Fatalf("%q: %v", one, err)
		}
		if two, err := again.encode(); err != nil || !bytes.Equal(one, two) {
			t.Fatalf("%q became %q, %v", one, two, err)
		}
	})
}

func FuzzParseRelease(f *testing.F) {
	v := newVendor(f)
	b, err := v.releases[0].Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRelease(b)
		if err != nil {
			return
		}
		one, err := r.Encode()
		if err != nil {
			if len(b) < maxDescriptorBytes/8 { // indentation can make a large one too large
				t.Fatalf("%q was read and cannot be written: %v", b, err)
			}
			return
		}
		again, err := ParseRelease(one)
		if err != nil {
			t.Fatal(err)
		}
		if two, err := again.Encode(); err != nil || !bytes.Equal(one, two) {
			t.Fatalf("%q became %q, %v", one, two, err)
		}
	})
}

// FuzzBundle: what opens and verifies is what BundleWriter makes of its content.
func FuzzBundle(f *testing.F) {
	v := newVendor(f)
	f.Add(v.bundle())
	f.Fuzz(func(t *testing.T, in []byte) {
		b, err := OpenBundle(bytes.NewReader(in), int64(len(in)))
		if err != nil || b.Verify(context.Background()) != nil {
			return
		}
		var out bytes.Buffer
		w, err := NewBundleWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range b.members[1 : len(b.members)-1] {
			r, size, err := b.Fetch(context.Background(), m.name, 0, -1)
			if err == nil {
				err = w.Add(m.name, size, r)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil || !bytes.Equal(in, out.Bytes()) {
			t.Fatalf("a bundle of %d bytes is written as %d: %v", len(in), out.Len(), err)
		}
	})
}

func FuzzHeader(f *testing.F) {
	for _, name := range []string{"a", BlobPath(digest(nil)), "targets/" + strings.Repeat("p", 63) + "/stable/amd64/" + digest(nil) + ".1.0.json"} {
		h, err := encodeHeader(name, 12345)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(h)
	}
	f.Fuzz(func(t *testing.T, h []byte) {
		if len(h) != ustarBlock {
			return
		}
		name, size, err := decodeHeader(h)
		if err != nil {
			return
		}
		if got, err := encodeHeader(name, size); err != nil || !bytes.Equal(got, h) {
			t.Fatalf("%q, %d: %v", name, size, err)
		}
	})
}

// FuzzMetadata: a device that is given anything as any file of metadata answers with
// an error and keeps nothing.
func FuzzMetadata(f *testing.F) {
	v := newVendor(f)
	v.root.Signed.Version = 2
	v.signRoot(v.keys["root"]...)
	paths := []string{RootPath(2), TimestampPath, SnapshotPath(1), TargetsPath(1)}
	for i, p := range paths {
		f.Add(byte(i), v.files[p])
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, which byte, b []byte) {
		path := paths[int(which)%len(paths)]
		if bytes.Equal(b, v.files[path]) {
			return
		}
		w := *v
		w.t, w.files = t, maps.Clone(v.files)
		delete(w.files, RootPath(2))
		w.files[path] = b
		data := w.bundle()
		s, err := OpenBundle(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		if err := os.RemoveAll(filepath.Join(dir, trustName)); err != nil {
			t.Fatal(err)
		}
		u := &unit{t: t, root: v.files[RootPath(1)], store: dir, now: noon, device: testDevice()}
		a, err := u.check(s)
		// What is written differently and means the same is signed all the same, where
		// no hash says otherwise.
		if err == nil && (a.Candidate == nil || path == SnapshotPath(1) || path == TargetsPath(1)) {
			t.Fatalf("%s of %q: %+v", path, b, a)
		}
	})
}
