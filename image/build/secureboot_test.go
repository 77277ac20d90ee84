package build_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
)

var signedAt = time.Unix(1.7e9+3600, 0)

func revoke(t *testing.T, k *keys.Keys, r keys.Revocation) []byte {
	t.Helper()
	b, err := k.Revoke(r, signedAt)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wantLists wants the manifest to tell a verifier what the variables may hold, and dbx must.
func wantLists(t *testing.T, m *image.Manifest, k *keys.Keys, dbx []byte) {
	t.Helper()
	a, err := sigdb.ParseAuth(dbx)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]byte{"dbx": a.Content.Marshal()}
	for _, name := range []string{keys.PK, keys.KEK, keys.DB} {
		if want[name], err = k.Trusted(name); err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(m.Expected.SecureBoot, want) {
		t.Errorf("the manifest tells %x, want %x", m.Expected.SecureBoot, want)
	}
	if r, err := m.Reference(); err != nil || len(r.DBX) != 2 {
		t.Errorf("the reference demands %d entries in dbx: %v", len(r.DBX), err)
	}
	if _, err := image.VendorKeys(nil, m, m); err != nil {
		t.Error(err)
	}
	if _, err := image.VendorKeys(nil, &image.Manifest{}); err == nil {
		t.Error("no release tells of keys, and that is no error")
	}
}

// TestSecureBootSection: a release carries its changes of db and dbx in the verified
// root, and its disk the keys for a firmware that has none. What keeps it from booting is
// found before anybody installs it.
func TestSecureBootSection(t *testing.T) {
	k, other := newKeys(t), newKeys(t)
	w := newWorkshop(t, k, newCache(t))
	w.in.QCOW2 = false
	dbx := revoke(t, k, keys.Revocation{Digests: [][32]byte{{1}}, Certificates: []*x509.Certificate{other.DB.Cert}})
	w.write(t, "next.auth", k.DBNext.Auth)
	w.write(t, "dbx.auth", dbx)
	section := "secureboot: {enroll: force, db: next.auth, dbx: dbx.auth}\n"
	m, err := build.Build(context.Background(), parse(t, boxSpec+section), w.in, filepath.Join(w.dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	digest := func(b []byte) string { sum := sha256.Sum256(b); return hex.EncodeToString(sum[:]) }
	want := image.SecureBoot{
		Enroll: "force",
		Keys:   map[string]string{"PK": digest(k.PK.Cert.Raw), "KEK": digest(k.KEK.Cert.Raw), "db": digest(k.DB.Cert.Raw)},
		Updates: []image.VariableUpdate{
			{Variable: "db", Append: true, File: image.SecureBootFolder + "/db.auth", SHA256: digest(k.DBNext.Auth)},
			{Variable: "dbx", Append: true, File: image.SecureBootFolder + "/dbx.auth", SHA256: digest(dbx)},
		},
	}
	release := filepath.Join(w.dir, "out", build.ReleaseName)
	app := applianceOf(t, filepath.Join(release, image.RootName), m.Root.SizeBytes)
	if !reflect.DeepEqual(app.SecureBoot, want) || !reflect.DeepEqual(m.SecureBoot, want.Updates) {
		t.Errorf("the appliance has %+v, the manifest %+v", app.SecureBoot, m.SecureBoot)
	}
	wantLists(t, m, k, dbx)
	root, err := os.ReadFile(filepath.Join(release, image.RootName))
	if err != nil || !bytes.Contains(root, dbx[:200]) || !bytes.Contains(root, k.DBNext.Auth[:200]) {
		t.Errorf("the updates are not in the root: %v", err)
	}
	wantOnESP(t, filepath.Join(w.dir, "out", build.RawName), map[string][]byte{
		"PK": k.PK.Auth, "KEK": k.KEK.Auth, "db": k.DB.Auth,
	})
	// A UKI cannot be named: the digest of what names it is in it.
	own := programDigest(t, filepath.Join(release, image.LoaderName))
	rotated := filepath.Join(t.TempDir(), "keys")
	if _, err := keys.Create(rotated, keys.Config{Organization: "Rotated", Now: time.Unix(1.7e9, 0)}); err != nil {
		t.Fatal(err)
	}
	later, err := keys.Rotate(rotated, keys.Config{Organization: "Rotated", Now: signedAt})
	if err != nil {
		t.Fatal(err)
	}
	replace, err := sigdb.Sign(sigdb.DB, sigdb.Database{sigdb.Certificate(k.DBNext.Cert, sigdb.GUID{})}, false, k.KEK.Key, k.KEK.Cert, signedAt)
	if err != nil {
		t.Fatal(err)
	}
	replaceDBX, err := sigdb.Sign(sigdb.DBX, sigdb.Database{sigdb.Hashes([][32]byte{{1}}, sigdb.GUID{})}, false, k.KEK.Key, k.KEK.Cert, signedAt)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		key  string
		file []byte
		want string
	}{
		"another vendor's":    {"dbx", revoke(t, other, keys.Revocation{Digests: [][32]byte{{1}}}), "boxes would refuse it"},
		"dbx as db":           {"db", dbx, "boxes would refuse it"},
		"dbx replaced":        {"dbx", replaceDBX, "what others have revoked"},
		"not signed":          {"dbx", sigdb.Database{sigdb.Hashes([][32]byte{{1}}, sigdb.GUID{})}.Marshal(), "no signed update"},
		"db without our key":  {"db", replace, "no certificate in db"},
		"dbx of the loader":   {"dbx", revoke(t, k, keys.Revocation{Digests: [][32]byte{own}}), "bootloader.efi: boxes that have applied"},
		"db of other keys":    {"db", later.DB.Auth, "boxes would refuse it"},
		"more than fits":      {"dbx", make([]byte, 64<<10+1), "65536 is the most"},
		"no such file at all": {"db", nil, "no such file"},
	} {
		w.write(t, "it.auth", c.file)
		if c.file == nil {
			if err := os.Remove(filepath.Join(w.dir, "it.auth")); err != nil {
				t.Fatal(err)
			}
		}
		_, err := build.Build(context.Background(), parse(t, boxSpec+"secureboot: {"+c.key+": it.auth}\n"), w.in, filepath.Join(w.dir, "bad"))
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "secureboot."+c.key) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if err := os.RemoveAll(filepath.Join(w.dir, "bad")); err != nil {
			t.Fatal(err)
		}
	}
}

func programDigest(t *testing.T, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := uki.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	digest, err := f.Authenticode()
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

// wantOnESP has mtools read the keys, and loader.conf, off the disk.
func wantOnESP(t *testing.T, disk string, auths map[string][]byte) {
	t.Helper()
	dev, err := partition.OpenReadOnly(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	d, err := partition.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	_, esp, err := d.Partition(partition.ESPName)
	if err != nil {
		t.Fatal(err)
	}
	read := func(name string) []byte {
		t.Helper()
		out := filepath.Join(t.TempDir(), "file")
		if msg, err := exec.Command("mcopy", "-n", "-i", disk+"@@"+strconv.FormatInt(esp.StartBytes, 10), "::"+name, out).CombinedOutput(); err != nil {
			t.Fatalf("mcopy %s (Debian package mtools): %v\n%s", name, err, msg)
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, want := range auths {
		if !bytes.Equal(read("loader/keys/auto/"+name+".auth"), want) {
			t.Errorf("%s.auth on the ESP is not the keys' own", name)
		}
	}
	if conf := string(read("loader/loader.conf")); !strings.Contains(conf, "\nsecure-boot-enroll manual\n") {
		t.Errorf("loader.conf: %s", conf)
	}
}
