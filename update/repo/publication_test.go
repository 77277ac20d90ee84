package repo

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/update"
)

// TestPublished: what a copy needs, in an order without gaps, and nothing else.
func TestPublished(t *testing.T) {
	r, dir, _ := create(t, Options{})
	add(t, r, "1.0.0", AddOptions{Channel: "stable"})
	add(t, r, "1.1.0", AddOptions{Channel: "stable"})
	if err := r.RenewRoot(); err != nil {
		t.Fatal(err)
	}
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := errors.Join(os.WriteFile(filepath.Join(blobs, ".add-123"), []byte("left"), 0o600),
		os.Symlink("/etc/passwd", filepath.Join(blobs, strings.Repeat("a", 64)))); err != nil {
		t.Fatal(err)
	}
	list, err := Published(dir)
	if err != nil {
		t.Fatal(err)
	}
	at := map[string]int{}
	for i, f := range list {
		rc, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		if err = errors.Join(err, rc.Close()); err != nil || int64(len(b)) != f.SizeBytes || digest(b) != f.SHA256 {
			t.Errorf("%s: %d bytes of %d, %v", f.Path, len(b), f.SizeBytes, err)
		}
		at[f.Path] = i
	}
	last := len(list) - 1
	for path, want := range map[string]int{update.TimestampPath: last, update.SnapshotPath(3): last - 1, update.TargetsPath(3): last - 2,
		update.RootPath(2): last - 3, update.RootPath(1): last - 4} {
		if i, ok := at[path]; !ok || i != want {
			t.Errorf("%s is number %d (%v) of %d, want %d", path, i, ok, len(list), want)
		}
	}
	for _, path := range []string{update.SnapshotPath(2), update.TargetsPath(1), "blobs/sha256/.add-123", update.BlobPath(strings.Repeat("a", 64))} {
		if _, ok := at[path]; ok {
			t.Errorf("%s is listed", path)
		}
	}
	for _, version := range []string{"1.0.0", "1.1.0"} {
		rel, _, err := r.release("gate/stable/amd64/" + version + ".json")
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range rel.Blobs {
			if _, ok := at[update.BlobPath(b.SHA256)]; !ok {
				t.Errorf("%s of %s is not listed", b.Role, version)
			}
		}
	}
	if err := os.Truncate(filepath.Join(dir, list[0].Path), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := Published(dir); err == nil || !strings.Contains(err.Error(), list[0].Path) {
		t.Errorf("with a blob cut off: %v", err)
	}
}
