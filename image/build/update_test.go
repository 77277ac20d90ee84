package build_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/tree"
)

// tufRoot is a root.json that holdfast repo init made.
func tufRoot(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/tuf-root.json")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newFleetKey is a file as age-keygen makes it.
func newFleetKey(t *testing.T) (file string, id *age.X25519Identity) {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("# created: 2026-11-21T10:00:00Z\n# public key: %v\n%v\n", id.Recipient(), id), id
}

func (w *workshop) write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), content, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestUpdateSection: whom the device trusts is in the verified root as it was given.
func TestUpdateSection(t *testing.T) {
	k := newKeys(t)
	fleetKey, _ := newFleetKey(t)
	w := newWorkshop(t, k, newCache(t))
	certificates := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: k.DB.Cert.Raw})
	w.write(t, "root.json", tufRoot(t))
	w.write(t, "ca.pem", certificates)
	w.write(t, "fleet.key", []byte(fleetKey))
	section := "update: {root: root.json, fleet_key: fleet.key, url: 'https://updates.example', ca: ca.pem, window: '22:00-04:30', automatic: false, epoch: 4}\n"
	m, err := build.Build(context.Background(), parse(t, boxSpec+section), w.in, filepath.Join(w.dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	if m.Epoch != 4 {
		t.Errorf("the manifest has epoch %d", m.Epoch)
	}
	img, err := os.Open(filepath.Join(w.dir, "out", build.ReleaseName, image.RootName))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	root, err := erofs.Open(img, m.Root.SizeBytes)
	if err != nil {
		t.Fatal(err)
	}
	read := func(path string) []byte {
		n, err := root.Lookup(path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(root.Data(n))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if got := read(image.TUFRootPath); !bytes.Equal(got, tufRoot(t)) {
		t.Errorf("%s has %d other bytes", image.TUFRootPath, len(got))
	}
	// What carries no key in the open carries it in the root, for root alone.
	if got := read(image.FleetKeyPath); string(got) != fleetKey {
		t.Errorf("%s has %d other bytes", image.FleetKeyPath, len(got))
	}
	if n, err := root.Lookup(image.FleetKeyPath); err != nil || n.Mode != tree.TypeRegular|0o600 || n.UID != 0 || n.GID != 0 {
		t.Errorf("%s: %+v, %v", image.FleetKeyPath, n, err)
	}
	var app image.Appliance
	if err := json.Unmarshal(read(image.AppliancePath), &app); err != nil {
		t.Fatal(err)
	}
	want := image.Update{
		URL: "https://updates.example", Channel: "stable", CAPEM: string(certificates), CheckSec: 6 * 3600,
		WindowStartMin: 22 * 60, WindowEndMin: 4*60 + 30, Stick: true, Epoch: 4,
	}
	if app.Update != want {
		t.Errorf("the appliance has %+v, want %+v", app.Update, want)
	}
}

// TestUpdateSectionRefused: what a device could not begin to trust with is found by the build.
func TestUpdateSectionRefused(t *testing.T) {
	k, cache := newKeys(t), newCache(t)
	const section = "update: {root: root.json, url: 'https://updates.example', ca: ca.pem, fleet_key: fleet.key}\n"
	at := "box.yaml:11:" // the line of the section
	fleetKey, secret := newFleetKey(t)
	for name, c := range map[string]struct {
		root, ca []byte
		want     string
		fleet    string
	}{
		"no root":        {nil, nil, at + "16: update.root: ", fleetKey},
		"not JSON":       {[]byte("hello"), nil, at + "16: update.root: ", fleetKey},
		"another role":   {bytes.Replace(tufRoot(t), []byte(`"_type": "root"`), []byte(`"_type": "targets"`), 1), nil, at + "16: update.root: ", fleetKey},
		"changed":        {bytes.Replace(tufRoot(t), []byte(`"threshold": 1`), []byte(`"threshold": 2`), 1), nil, at + "16: update.root: ", fleetKey},
		"too large":      {bytes.Repeat([]byte(" "), 600<<10), nil, "524288 is the most", fleetKey},
		"no certificate": {tufRoot(t), []byte("hello"), at + "63: update.ca: ca.pem holds no certificate in PEM", fleetKey},
		"no key":         {tufRoot(t), nil, at + "82: update.fleet_key: ", ""},
		"a recipient":    {tufRoot(t), nil, at + "82: update.fleet_key: fleet.key is a recipient, for holdfast bundle", secret.Recipient().String() + "\n"},
		"a damaged key":  {tufRoot(t), nil, at + "82: update.fleet_key: fleet.key is no age identity", strings.Replace(fleetKey, "AGE-SECRET-KEY-1", "AGE-SECRET-KEY-1QQ", 1)},
		"a large key":    {tufRoot(t), nil, "16384 is the most", strings.Repeat("#\n", 9000)},
	} {
		w := newWorkshop(t, k, cache)
		if c.root != nil {
			w.write(t, "root.json", c.root)
		}
		w.write(t, "ca.pem", c.ca)
		if c.fleet != "" {
			w.write(t, "fleet.key", []byte(c.fleet))
		}
		before := sums(t, w.dir)
		_, err := build.Build(context.Background(), parse(t, boxSpec+section), w.in, filepath.Join(w.dir, "out"))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), secret.String()[20:40]) {
			t.Errorf("%s: the error tells the key: %v", name, err)
		}
		if sums(t, w.dir) != before {
			t.Errorf("%s: the build left something", name)
		}
	}
}
