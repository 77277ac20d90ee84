package agent

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update"
)

// newBundle is a bundle in form alone, encrypted to whoever is named.
func newBundle(t *testing.T, to ...age.Recipient) string {
	t.Helper()
	var plain bytes.Buffer
	w, err := update.NewBundleWriter(&plain)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{update.RootPath(1), update.TimestampPath, update.SnapshotPath(2), update.TargetsPath(2)} {
		if err := w.Add(path, int64(len(path)), strings.NewReader(path)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	content := plain.Bytes()
	if len(to) > 0 {
		var sealed bytes.Buffer
		w, err := age.Encrypt(&sealed, to...)
		if err == nil {
			_, err = w.Write(content)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		content = sealed.Bytes()
	}
	path := filepath.Join(t.TempDir(), "gate.bundle")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestEncryptedBundle: the fleet's key in the root opens what is encrypted to it.
func TestEncryptedBundle(t *testing.T) {
	newKey := func() *age.X25519Identity {
		k, err := age.GenerateX25519Identity()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	fleet, former, other := newKey(), newKey(), newKey()
	keys := []byte("# public key: " + fleet.Recipient().String() + "\n" + fleet.String() + "\n" + former.String() + "\n")
	broken := newBundle(t, fleet.Recipient())
	if err := os.Truncate(broken, 3000); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		bundle string
		key    []byte
		is     error
		want   string
	}{
		"plain, no key":           {newBundle(t), nil, nil, ""},
		"plain, with a key":       {newBundle(t), keys, nil, ""},
		"encrypted":               {newBundle(t, other.Recipient(), fleet.Recipient()), keys, nil, ""},
		"encrypted to the former": {newBundle(t, former.Recipient()), keys, nil, ""},
		"no key":                  {newBundle(t, fleet.Recipient()), nil, update.ErrEncrypted, "this release has no fleet key; bring a bundle that is not encrypted"},
		"another fleet's":         {newBundle(t, other.Recipient()), keys, update.ErrUntrusted, "not encrypted to the key of this fleet"},
		"cut off":                 {broken, keys, update.ErrUntrusted, ""},
		"a key that is none":      {newBundle(t, fleet.Recipient()), bytes.Replace(keys, []byte("KEY-1"), []byte("KEY-1QQ"), 1), nil, "fleet key cannot be read"},
	} {
		t.Run(name, func(t *testing.T) {
			u := &Updater{FleetKey: tt.key}
			src, closer, err := u.openSource(tt.bundle)
			if tt.is != nil || tt.want != "" {
				if err == nil || tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
					t.Fatalf("error %v, want %v with %q", err, tt.is, tt.want)
				}
				if strings.Contains(err.Error(), fleet.String()[20:40]) {
					t.Errorf("the error tells the key: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer closer.Close()
			r, _, err := src.Fetch(t.Context(), update.TimestampPath, 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if got, err := io.ReadAll(r); err != nil || string(got) != update.TimestampPath {
				t.Errorf("read %q, %v", got, err)
			}
		})
	}
}

// TestWebSource: the address says what kind of repository it is.
func TestWebSource(t *testing.T) {
	for url, want := range map[string]string{
		"https://updates.example/gate":              "http",
		"http://updates.plant/gate":                 "http",
		"oci://registry.example/acme/gate":          "oci",
		"oci://localhost:5000/gate:stable":          "oci",
		"":                                          "the release names no repository",
		"oci://registry.example":                    "is not oci://HOST/NAME:TAG",
		"oci://registry.example/gate@sha256:00":     "give its tag",
		"ftp://updates.example/gate":                "give it as https://HOST/PATH",
		"https://updates.example/gate?token=stolen": "give it as https://HOST/PATH",
	} {
		u := &Updater{Config: image.Update{URL: url}}
		src, _, err := u.openSource("")
		got := ""
		switch src.(type) {
		case *update.HTTP:
			got = "http"
		case *update.OCI:
			got = "oci"
		}
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) || err == nil && got != want {
			t.Errorf("%s: %s, want %s", url, got, want)
		}
	}
	u := &Updater{Config: image.Update{URL: "oci://registry.example/gate", CAPEM: "hello"}}
	if _, _, err := u.openSource(""); err == nil || !strings.Contains(err.Error(), "certificates") {
		t.Errorf("with certificates that are none: %v", err)
	}
}
