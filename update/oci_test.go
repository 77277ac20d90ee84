package update

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// newRegistry is go-containerregistry's; front, when set, stands before it.
func newRegistry(t testing.TB, front ...func(http.Handler) http.Handler) (host string, s *httptest.Server) {
	t.Helper()
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	for _, f := range front {
		h = f(h)
	}
	s = httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), s
}

func ociSource(t testing.TB, host string, o HTTPOptions) *OCI {
	t.Helper()
	o.Backoff, o.Attempts = time.Millisecond, 3
	s, err := NewOCI("oci://"+host+"/fleet/gate:stable", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.CloseIdle)
	return s
}

type rawManifest []byte

func (m rawManifest) RawManifest() ([]byte, error)      { return m, nil }
func (rawManifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func ociLayer(path, hash string, size int) map[string]any {
	return map[string]any{"mediaType": OCIFileType, "digest": "sha256:" + hash, "size": size, "annotations": map[string]string{OCITitle: path}}
}

// manifest is the publication of the vendor's files, changed in some way.
func (v *vendor) manifest(change ...func(map[string]any)) []byte {
	v.t.Helper()
	var layers []any
	for _, path := range slices.Sorted(maps.Keys(v.files)) {
		layers = append(layers, ociLayer(path, digest(v.files[path]), len(v.files[path])))
	}
	m := map[string]any{"schemaVersion": 2, "mediaType": ociManifestType, "artifactType": OCIArtifactType,
		"config": map[string]any{"mediaType": "application/vnd.oci.empty.v1+json", "digest": "sha256:" + digest([]byte("{}")), "size": 2}, "layers": layers}
	for _, f := range change {
		f(m)
	}
	b, err := json.Marshal(m)
	if err != nil {
		v.t.Fatal(err)
	}
	return b
}

// push publishes the vendor's files, with nothing of holdfast repo push.
func (v *vendor) push(host string, change ...func(map[string]any)) {
	v.t.Helper()
	ref, err := name.NewTag(host + "/fleet/gate:stable")
	if err != nil {
		v.t.Fatal(err)
	}
	for path, b := range v.files {
		if err := remote.WriteLayer(ref.Context(), static.NewLayer(b, OCIFileType)); err != nil {
			v.t.Fatalf("%s: %v", path, err)
		}
	}
	if err := remote.Put(ref, rawManifest(v.manifest(change...))); err != nil {
		v.t.Fatal(err)
	}
}

// TestRegistry: check, range and a whole blob, as the device does.
func TestRegistry(t *testing.T) {
	v := newVendor(t)
	var mu sync.Mutex
	var asked []string
	host, _ := newRegistry(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			if r.Method == http.MethodGet {
				asked = append(asked, strings.TrimPrefix(r.URL.Path, "/v2/fleet/gate/"))
			}
			mu.Unlock()
			next.ServeHTTP(w, r)
		})
	})
	v.push(host)
	asked = nil
	s := ociSource(t, host, HTTPOptions{UserAgent: "test"})
	c := newUnit(t, v).mustFind(s, "2.0.0")
	mu.Lock()
	if len(asked) != 5 || asked[0] != "manifests/stable" {
		t.Errorf("a check asked for %q, want the manifest and four files", asked)
	}
	mu.Unlock()
	for _, b := range c.Release.Blobs {
		path := filepath.Join(t.TempDir(), "blob")
		// The first bytes are there from an earlier attempt.
		if err := os.WriteFile(path+".part", v.files[BlobPath(b.SHA256)][:40], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.Save(context.Background(), b, path); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, v.files[BlobPath(b.SHA256)]) {
			t.Errorf("%s: %d bytes, %v", b.Role, len(got), err)
		}
	}
	b := c.Release.Blobs[0]
	r, err := c.Range(context.Background(), b, 777, 3000)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, v.files[BlobPath(b.SHA256)][777:3777]) {
		t.Errorf("range: %d bytes, %v", len(got), err)
	}
}

// registryFront answers some requests in place of the registry.
type registryFront func(w http.ResponseWriter, r *http.Request) (done bool)

func (f registryFront) before(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !f(w, r) {
			next.ServeHTTP(w, r)
		}
	})
}

// TestHostileRegistry: whatever a registry answers, the check ends soon, with an
// error, and leaves the store as it was.
func TestHostileRegistry(t *testing.T) {
	endless := func(w http.ResponseWriter, r *http.Request) bool {
		for chunk := bytes.Repeat([]byte(" "), 64<<10); r.Context().Err() == nil; {
			if _, err := w.Write(chunk); err != nil {
				break
			}
		}
		return true
	}
	on := func(part string, f registryFront) registryFront {
		return func(w http.ResponseWriter, r *http.Request) bool {
			return strings.Contains(r.URL.Path, part) && f(w, r)
		}
	}
	write := func(b []byte) registryFront {
		return func(w http.ResponseWriter, _ *http.Request) bool { w.Write(b); return true }
	}
	status := func(code int, header ...string) registryFront {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
			return true
		}
	}
	v := newVendor(t)
	sum := func(path string) string { return "sha256:" + digest(v.files[path]) }
	flipped := func(path string) registryFront {
		b := bytes.Clone(v.files[path])
		b[len(b)/2] ^= 1
		return on(sum(path), write(b))
	}
	manifest := func(change func(m map[string]any)) registryFront { return on("/manifests/", write(v.manifest(change))) }
	without := func(path string) registryFront {
		return manifest(func(m map[string]any) {
			m["layers"] = slices.DeleteFunc(m["layers"].([]any), func(l any) bool {
				return l.(map[string]any)["annotations"].(map[string]string)[OCITitle] == path
			})
		})
	}
	release := v.releases[0].Target(v.channel, v.percent)
	descriptor := ""
	for path := range v.files {
		if strings.HasPrefix(path, "targets/") && strings.HasSuffix(path, release.Version+".json") {
			descriptor = path
		}
	}
	more := func(n int) registryFront {
		return manifest(func(m map[string]any) {
			for range n {
				m["layers"] = append(m["layers"].([]any), map[string]any{})
			}
		})
	}
	for name, a := range map[string]struct {
		front registryFront
		want  error
	}{
		"one byte of timestamp":   {flipped(TimestampPath), ErrUntrusted},
		"one byte of snapshot":    {flipped(SnapshotPath(1)), ErrUntrusted},
		"one byte of targets":     {flipped(TargetsPath(1)), ErrUntrusted},
		"one byte of a release":   {flipped(descriptor), ErrUntrusted},
		"endless timestamp":       {on(sum(TimestampPath), endless), ErrUntrusted},
		"endless targets":         {on(sum(TargetsPath(1)), endless), ErrUntrusted},
		"endless manifest":        {on("/manifests/", endless), ErrUntrusted},
		"no timestamp":            {without(TimestampPath), ErrNotFound},
		"no snapshot":             {without(SnapshotPath(1)), ErrNotFound},
		"no targets":              {without(TargetsPath(1)), ErrNotFound},
		"no release":              {without(descriptor), ErrNotFound},
		"a blob is gone":          {on(sum(TargetsPath(1)), status(404)), ErrNotFound},
		"no tag":                  {on("/manifests/", status(404)), ErrNotFound},
		"manifest that says 1 TB": {on("/manifests/", status(200, "Content-Length", "1099511627776")), ErrUntrusted},
		"too many layers":         {more(maxManifestFiles), ErrUntrusted},
		"many tiny layers":        {on("/manifests/", write([]byte(`{"layers":[`+strings.Repeat("{},", 1<<20)+`{}]}`))), ErrUntrusted},
		"deep nesting":            {on("/manifests/", write([]byte(`{"x":`+strings.Repeat("[", 1<<21)))), ErrUntrusted},
		"not JSON":                {on("/manifests/", write([]byte("<html>Please log in</html>"))), ErrUntrusted},
		"null":                    {on("/manifests/", write([]byte("null"))), ErrUntrusted},
		"cut off":                 {on("/manifests/", write(v.manifest()[:500])), ErrUntrusted},
		"layers is a number":      {manifest(func(m map[string]any) { m["layers"] = 7 }), ErrUntrusted},
		"an image":                {manifest(func(m map[string]any) { delete(m, "artifactType") }), ErrUntrusted},
		"a path twice": {manifest(func(m map[string]any) {
			m["layers"] = append(m["layers"].([]any), ociLayer(TimestampPath, digest(nil), 0))
		}), ErrUntrusted},
		"digest that is a path": {manifest(func(m map[string]any) {
			m["layers"] = []any{ociLayer(TimestampPath, "../../../v2/other/blobs/sha256:"+digest(nil), 0)}
		}), ErrUntrusted},
		"digest of another kind": {manifest(func(m map[string]any) {
			m["layers"] = []any{map[string]any{"digest": "md5:00", "annotations": map[string]string{OCITitle: TimestampPath}}}
		}), ErrUntrusted},
		"snapshot where targets should be": {manifest(func(m map[string]any) {
			m["layers"] = []any{ociLayer(TimestampPath, digest(v.files[TimestampPath]), 1), ociLayer(SnapshotPath(1), digest(v.files[SnapshotPath(1)]), 1),
				ociLayer(TargetsPath(1), digest(v.files[SnapshotPath(1)]), 1)}
		}), ErrUntrusted},
		"password wanted":       {status(401, "WWW-Authenticate", `Basic realm="x"`), errors.New("make the repository public")},
		"forbidden":             {status(403), errors.New("make the repository public")},
		"token from this box":   {status(401, "WWW-Authenticate", `Bearer realm="http://10.0.0.1/admin"`), errors.New("which is not https")},
		"token from nowhere":    {status(401, "WWW-Authenticate", `Bearer service="x"`), errors.New("which is no address")},
		"sent away without TLS": {status(http.StatusTemporaryRedirect, "Location", "http://192.0.2.1/x"), errors.New("neither https nor this machine")},
		"sent to a file":        {status(http.StatusTemporaryRedirect, "Location", "file:///etc/passwd"), errors.New("neither https nor this machine")},
		"sent round": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}, errors.New("redirects")},
		"broken": {status(500), errors.New("given up after 3 attempts")},
	} {
		t.Run(name, func(t *testing.T) {
			var attack registryFront
			host, _ := newRegistry(t, registryFront(func(w http.ResponseWriter, r *http.Request) bool { return attack != nil && attack(w, r) }).before)
			v.push(host)
			attack = a.front
			u := newUnit(t, v)
			got, err := u.check(ociSource(t, host, HTTPOptions{}))
			if err == nil || !errors.Is(err, a.want) && !strings.Contains(err.Error(), a.want.Error()) {
				t.Errorf("%+v, %v; want %v", got, err, a.want)
			}
			if err == nil || len(err.Error()) > 1000 {
				t.Errorf("the error is %v", err)
			}
			if files := u.stored(); len(files) != 0 && a.want != ErrUntrusted && a.want != ErrNotFound {
				t.Errorf("the store has %v", slices.Collect(maps.Keys(files)))
			}
		})
	}
}

// TestRegistryBlob: content is judged by the reader, not by the registry's word.
func TestRegistryBlob(t *testing.T) {
	v := newVendor(t)
	b := v.releases[0].Blobs[0]
	good := v.files[BlobPath(b.SHA256)]
	bad := bytes.Clone(good)
	bad[9000] ^= 0x10
	for name, content := range map[string][]byte{"one bit": bad, "cut off": good[:9000], "longer": append(bytes.Clone(good), 1), "empty": {}} {
		var on bool
		host, _ := newRegistry(t, registryFront(func(w http.ResponseWriter, r *http.Request) bool {
			if on && strings.Contains(r.URL.Path, b.SHA256) {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
				return true
			}
			return false
		}).before)
		v.push(host)
		c := newUnit(t, v).mustFind(ociSource(t, host, HTTPOptions{}), "2.0.0")
		on = true
		path := filepath.Join(t.TempDir(), "blob")
		if err := c.Save(context.Background(), b, path); err == nil {
			t.Errorf("%s: saved", name)
		}
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s: the file is there", name)
		}
	}
}

// TestTagMoves: at every request of a check, the tag moves to a newer or to an older
// publication. A check sees one of them, and none that is older than what was seen.
func TestTagMoves(t *testing.T) {
	v := newVendor(t)
	old := v.manifest()
	oldFiles := maps.Clone(v.files)
	v.release("3.0.0")
	v.next()
	fresh := v.manifest()
	for at := range 6 {
		for to, from := range map[string][2][]byte{"forward": {old, fresh}, "back": {fresh, old}} {
			var mu sync.Mutex
			armed, n := false, 0
			host, _ := newRegistry(t, registryFront(func(w http.ResponseWriter, r *http.Request) bool {
				mu.Lock()
				defer mu.Unlock()
				if !armed {
					return false
				}
				n++
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				m := from[0]
				if n > at {
					m = from[1]
				}
				w.Write(m)
				return true
			}).before)
			v.push(host)
			for _, b := range oldFiles {
				ref, err := name.NewRepository(host + "/fleet/gate")
				if err == nil {
					err = remote.WriteLayer(ref, static.NewLayer(b, OCIFileType))
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			mu.Lock()
			armed = true
			mu.Unlock()
			u := newUnit(t, v)
			s := ociSource(t, host, HTTPOptions{})
			a, err := u.check(s)
			if err != nil || a.Candidate == nil {
				t.Errorf("%s at request %d: %+v, %v", to, at, a, err)
				continue
			}
			seen := a.Timestamp
			// The same source again, with the tag where it has come to.
			a, err = u.check(s)
			switch {
			case to == "back" && seen == 2:
				if !errors.Is(err, ErrOlder) {
					t.Errorf("back at request %d: %+v, %v", at, a, err)
				}
			case err != nil || to == "forward" && a.Candidate.Target.Version != "3.0.0":
				t.Errorf("%s at request %d, again: %+v, %v", to, at, a, err)
			}
		}
	}
	// A manifest that mixes both: the new timestamp over the old rest.
	mixed := v.manifest(func(m map[string]any) {
		m["layers"] = slices.DeleteFunc(m["layers"].([]any), func(l any) bool {
			title := l.(map[string]any)["annotations"].(map[string]string)[OCITitle]
			return oldFiles[title] == nil
		})
	})
	host, _ := newRegistry(t, registryFront(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			w.Write(mixed)
			return true
		}
		return false
	}).before)
	v.push(host)
	if a, err := newUnit(t, v).check(ociSource(t, host, HTTPOptions{})); !errors.Is(err, ErrNotFound) {
		t.Errorf("mixed: %+v, %v", a, err)
	}
}

// TestToken: the token that everybody gets, renewed when it is over, and never shown
// to the servers that a registry sends to.
func TestToken(t *testing.T) {
	v := newVendor(t)
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the store of the blobs got the token")
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(v.files[r.URL.Path[1:]]))
	}))
	defer store.Close()
	elsewhere := strings.Replace(store.URL, "127.0.0.1", "localhost", 1)
	var (
		mu             sync.Mutex
		armed          bool
		tokens, denied int
	)
	host, _ := newRegistry(t, registryFront(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if !armed {
			return false
		}
		if r.URL.Path == "/token" {
			if q := r.URL.Query(); q.Get("service") != "the, registry" || q.Get("scope") != "repository:fleet/gate:pull" || q.Get("account") != "a" {
				t.Errorf("asked for a token with %s", r.URL.RawQuery)
			}
			tokens++
			fmt.Fprintf(w, `{"%s":"t%d","expires_in":1}`, []string{"token", "access_token"}[tokens%2], tokens)
			return true
		}
		// Each token is good for the tag, and then no more.
		if r.Header.Get("Authorization") != fmt.Sprintf("Bearer t%d", tokens) || tokens == 0 {
			denied++
			w.Header().Add("WWW-Authenticate", `Basic realm="x"`)
			w.Header().Add("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token?account=a",service="the, registry",scope="repository:fleet/gate:pull"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		for _, b := range v.releases[0].Blobs {
			if strings.Contains(r.URL.Path, b.SHA256) {
				http.Redirect(w, r, elsewhere+"/"+BlobPath(b.SHA256), http.StatusTemporaryRedirect)
				return true
			}
		}
		return false
	}).before)
	v.push(host)
	armed = true
	s := ociSource(t, host, HTTPOptions{})
	c := newUnit(t, v).mustFind(s, "2.0.0")
	mu.Lock()
	if tokens != 1 || denied != 1 {
		t.Errorf("%d tokens, %d times denied", tokens, denied)
	}
	tokens++ // the one that the device has is over
	mu.Unlock()
	if got, err := readBlob(c, RolePack); err != nil || !bytes.Equal(got, v.files[BlobPath(v.releases[0].Blobs[0].SHA256)]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if tokens != 3 {
		t.Errorf("%d tokens", tokens)
	}
}

// TestTokenRefused: what a token's server may answer.
func TestTokenRefused(t *testing.T) {
	for name, a := range map[string]struct{ answer, want string }{
		"endless":      {strings.Repeat(" ", maxTokenBytes+1), "65536"},
		"not JSON":     {"hello", "answer: "},
		"none":         {"{}", "no token"},
		"header in it": {`{"token":"a\r\nX-Evil: 1"}`, "no token"},
		"not good":     {`{"token":"a"}`, "make the repository public"},
	} {
		var asked int
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				asked++
				io.WriteString(w, a.answer)
				return
			}
			w.Header().Set("WWW-Authenticate", `bearer realm=http://`+r.Host+`/token`)
			w.WriteHeader(http.StatusUnauthorized)
		}))
		_, _, err := ociSource(t, s.Listener.Addr().String(), HTTPOptions{}).Fetch(context.Background(), TimestampPath, 0, -1)
		if err == nil || !strings.Contains(err.Error(), a.want) || asked != 1 {
			t.Errorf("%s: %v after %d requests, want %s", name, err, asked, a.want)
		}
		s.Close()
	}
}

// TestRegistryTLS: with the vendor's own certificates, and a server that breaks off.
func TestRegistryTLS(t *testing.T) {
	v := newVendor(t)
	broken := 0
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/manifests/stable") {
			w.Write(v.manifest())
			return
		}
		_, hash, _ := strings.Cut(r.URL.Path, "sha256:")
		for _, b := range v.files {
			if digest(b) != hash {
				continue
			}
			// Another server of the network each time.
			w.Header().Set("ETag", fmt.Sprintf(`"%d"`, broken))
			if len(b) > 6000 && broken < 2 {
				broken++
				http.ServeContent(&shortWriter{ResponseWriter: w, left: 6000}, r, "", time.Time{}, bytes.NewReader(b))
				return
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
			return
		}
		http.NotFound(w, r)
	}))
	defer s.Close()
	host := s.Listener.Addr().String()
	c := newUnit(t, v).mustFind(ociSource(t, host, HTTPOptions{CAs: s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}), "2.0.0")
	if got, err := readBlob(c, RolePack); err != nil || !bytes.Equal(got, v.files[BlobPath(v.releases[0].Blobs[0].SHA256)]) || broken == 0 {
		t.Errorf("%d bytes, broken off %d times, %v", len(got), broken, err)
	}
	_, err := newUnit(t, v).check(ociSource(t, host, HTTPOptions{CAs: x509.NewCertPool()}))
	if err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("with other certificates: %v", err)
	}
}

// TestRegistryProxy: the device's proxy is asked, by the name that the spec has.
func TestRegistryProxy(t *testing.T) {
	v := newVendor(t)
	host, s := newRegistry(t)
	v.push(host)
	proxied := 0
	proxy := func(*http.Request) (*url.URL, error) { proxied++; return url.Parse(s.URL) }
	src, err := NewOCI("oci://localhost:1/fleet/gate:stable", HTTPOptions{Proxy: proxy})
	if err != nil {
		t.Fatal(err)
	}
	defer src.CloseIdle()
	newUnit(t, v).mustFind(src, "2.0.0")
	if proxied == 0 {
		t.Error("the proxy was not asked for")
	}
}

func FuzzManifest(f *testing.F) {
	v := newVendor(f)
	f.Add(v.manifest())
	f.Add([]byte(`{"artifactType":"` + OCIArtifactType + `","layers":[{}]}`))
	f.Add([]byte(`{"layers":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		view, err := parseManifest(b)
		if err != nil {
			return
		}
		layers := []any{}
		for path, hash := range view {
			if c, _, err := classify(path); err != nil || c == classBlob || !validHash(hash) {
				t.Fatalf("%q: %q", path, hash)
			}
			layers = append(layers, ociLayer(path, hash, 1))
		}
		text, err := json.Marshal(map[string]any{"layers": layers, "artifactType": OCIArtifactType})
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseManifest(text); err != nil || !maps.Equal(view, again) {
			t.Fatalf("%v, %v; want %v", again, err, view)
		}
	})
}

func FuzzBearer(f *testing.F) {
	f.Add(`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"`)
	f.Add(`bearer a=b, c="d\"e"`)
	f.Add(`Bearer "=,`)
	f.Fuzz(func(t *testing.T, s string) {
		params := parseBearer(s)
		text := "Bearer "
		for k, v := range params {
			if strings.TrimSpace(k) != k || strings.ContainsAny(k, "=") {
				t.Fatalf("key %q", k)
			}
			if strings.Trim(k, " \t,") != k || strings.ToLower(k) != k {
				return // not a token; nobody asks for it
			}
			text += k + `="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(v) + `",`
		}
		if again := parseBearer(text); params != nil && !maps.Equal(params, again) {
			t.Fatalf("%q: %q, then %q", s, params, again)
		}
	})
}
