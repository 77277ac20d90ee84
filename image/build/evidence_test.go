package build_test

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/erofs"
)

// TestEvidenceSection: what may leave the box is in the verified root, and the file
// systems of sticks are in the initrd where, and only where, somebody looks at sticks.
func TestEvidenceSection(t *testing.T) {
	w := newWorkshop(t, newKeys(t), newCache(t))
	for section, want := range map[string]image.Evidence{
		"": {},
		"evidence: {stick: true, include: [logs, journal]}\n": {Stick: true, Include: []string{image.EvidenceLogs, image.EvidenceJournal}},
	} {
		out := filepath.Join(w.dir, "out")
		if err := os.RemoveAll(out); err != nil {
			t.Fatal(err)
		}
		m, err := build.Build(context.Background(), parse(t, boxSpec+section), w.in, out)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(m.Modules, "vfat") != want.Stick {
			t.Errorf("%q: modules %q", section, m.Modules)
		}
		app := builtAppliance(t, out, m)
		if !reflect.DeepEqual(app.Evidence, want) {
			t.Errorf("%q: the appliance has %+v, want %+v", section, app.Evidence, want)
		}
	}
}

// builtAppliance is the description in a built root.
func builtAppliance(t *testing.T, out string, m *image.Manifest) (app image.Appliance) {
	t.Helper()
	img, err := os.Open(filepath.Join(out, build.ReleaseName, image.RootName))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	root, err := erofs.Open(img, m.Root.SizeBytes)
	if err != nil {
		t.Fatal(err)
	}
	n, err := root.Lookup(image.AppliancePath)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(root.Data(n))
	if err == nil {
		err = json.Unmarshal(text, &app)
	}
	if err != nil {
		t.Fatal(err)
	}
	return app
}
