package main

import (
	"bytes"
	"context"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// push puts a new random image under the tag and returns its digest.
func push(t *testing.T, tag string) string {
	t.Helper()
	base, err := random.Image(1024, 2)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(tag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	var img v1.Image = base
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest.String()
}

func TestLockPinsAndUpdates(t *testing.T) {
	server := httptest.NewServer(registry.New())
	defer server.Close()
	tag := strings.TrimPrefix(server.URL, "http://") + "/vendor/app:1"
	first := push(t, tag)

	dir := t.TempDir()
	path := filepath.Join(dir, "box.yaml")
	text := "name: box\nversion: 1.0.0\nkernel: {image: 'deb:none.deb'}\nservices:\n  - {name: app, image: '" + tag + "'}\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	lock := func() string {
		var out, errs bytes.Buffer
		if code := mainWith(context.Background(), &cli{in: strings.NewReader(""), out: &out, err: &errs}, []string{"lock", path}); code != exitDone {
			t.Fatalf("holdfast lock exits %d: %s", code, errs.String())
		}
		b, err := os.ReadFile(filepath.Join(dir, lockName))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := lock(); !strings.Contains(got, tag+" "+first) {
		t.Errorf("the lock does not pin %s to %s:\n%s", tag, first, got)
	}
	second := push(t, tag)
	if got := lock(); !strings.Contains(got, tag+" "+second) || strings.Contains(got, first) {
		t.Errorf("locking again does not move %s to %s:\n%s", tag, second, got)
	}
}
