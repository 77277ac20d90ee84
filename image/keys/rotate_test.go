package keys

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func auth(t *testing.T, b []byte) *sigdb.Auth {
	t.Helper()
	a, err := sigdb.ParseAuth(b)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestRotation follows db on a box through the steps of the package's documentation.
func TestRotation(t *testing.T) {
	dir, old := create(t)
	box := auth(t, old.DB.Auth).Content // enrolled
	next := auth(t, old.DBNext.Auth)
	if err := next.VerifiedBy(DB, true, old.KEK.Cert); err != nil {
		t.Error(err)
	}
	box = append(box, next.Content...)
	later := config()
	later.Now = testTime.Add(time.Hour)
	made, err := Rotate(dir, later)
	if err != nil {
		t.Fatal(err)
	}
	k, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !k.DB.Cert.Equal(old.DBNext.Cert) || !made.DB.Cert.Equal(k.DB.Cert) || !k.DBNext.Cert.Equal(made.DBNext.Cert) || k.DBNext.Cert.Equal(k.DB.Cert) || k.DB.Key == nil {
		t.Error("db is not what was db-next")
	}
	if !box.HasData(sigdb.TypeX509(), k.DB.Cert.Raw) {
		t.Error("a box that took the first step does not trust the new key")
	}
	replace := auth(t, k.DB.Auth)
	if err := replace.VerifiedBy(DB, false, k.KEK.Cert); err != nil || !replace.Time.After(auth(t, old.DB.Auth).Time) {
		t.Errorf("db.auth: %v; its time is %v", err, replace.Time)
	}
	if replace.Content.HasData(sigdb.TypeX509(), old.DB.Cert.Raw) || !replace.Content.HasData(sigdb.TypeX509(), k.DB.Cert.Raw) {
		t.Error("db.auth does not replace the old certificate by the new one")
	}
	var retired []string
	for _, n := range names(t, dir) {
		if strings.HasPrefix(n, "db-retired-") {
			retired = append(retired, n)
		}
	}
	if len(retired) != 2 {
		t.Errorf("the old key is kept as %v", retired)
	}
	if info, err := os.Stat(filepath.Join(dir, retired[0])); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s has mode %v, %v", retired[0], info.Mode(), err)
	}
	if got := names(t, filepath.Dir(dir)); len(got) != 1 {
		t.Errorf("beside the folder lie %v", got)
	}
}

// TestTrusted: what a verifier may find in db is the certificate of now, the next one and
// those before, until their file is removed; PK and KEK do not rotate.
func TestTrusted(t *testing.T) {
	dir, k := create(t)
	all := []*x509.Certificate{k.DB.Cert, k.DBNext.Cert}
	wantTrusted := func(without ...*x509.Certificate) {
		t.Helper()
		k, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		list, err := k.Trusted(DB)
		if err != nil {
			t.Fatal(err)
		}
		got, err := sigdb.Parse(list)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, cert := range all {
			want := !slices.Contains(without, cert)
			if got.HasData(sigdb.TypeX509(), cert.Raw) != want {
				t.Errorf("the certificate %x: want %v", cert.SerialNumber, want)
			}
			if want {
				n++
			}
		}
		if len(got) != n {
			t.Errorf("%d lists, want %d", len(got), n)
		}
		for _, name := range []string{PK, KEK} {
			trusted, err := k.Trusted(name)
			own, err2 := k.SignatureList(name)
			if err != nil || err2 != nil || !bytes.Equal(trusted, own) {
				t.Errorf("%s: %v, %v", name, err, err2)
			}
		}
	}
	wantTrusted()
	for i := range 2 {
		cfg := config()
		cfg.Now = testTime.Add(time.Duration(i+1) * time.Hour)
		made, err := Rotate(dir, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if len(made.Retired) != i+1 {
			t.Errorf("rotation %d returns %d retired certificates", i, len(made.Retired))
		}
		all = append(all, made.DBNext.Cert)
		wantTrusted()
	}
	sum := sha256.Sum256(all[0].Raw)
	retired := filepath.Join(dir, fmt.Sprintf("db-retired-%x.pem", sum[:4]))
	if err := os.Remove(retired); err != nil {
		t.Fatal(err)
	}
	wantTrusted(all[0])
	if err := os.WriteFile(retired, []byte("none"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "db-retired-") {
		t.Errorf("a damaged certificate: %v", err)
	}
}

// TestRotateStamps: firmware replaces db only by something later than the last change of
// it, that of db-next included, whatever the clock said at each of them.
func TestRotateStamps(t *testing.T) {
	dir, k := create(t)
	for _, at := range []time.Time{testTime, testTime.Add(999 * time.Millisecond), testTime.Add(-time.Hour), testTime.Add(time.Hour)} {
		last := auth(t, k.DBNext.Auth).Time // a box that has taken this has it
		cfg := config()
		cfg.Now = at
		var err error
		if k, err = Rotate(dir, cfg); err != nil {
			t.Fatal(err)
		}
		db, next := auth(t, k.DB.Auth).Time, auth(t, k.DBNext.Auth).Time
		if want := last.Add(time.Second); at.After(want) && !db.Equal(at.Truncate(time.Second)) || at.Before(want) && !db.Equal(want) {
			t.Errorf("rotated at %v: db.auth is of %v, before it came %v", at, db, last)
		}
		if !next.Equal(db) {
			t.Errorf("db-next.auth is of %v, db.auth of %v", next, db)
		}
		if got := k.DBNext.Cert.NotBefore; !got.Equal(at.Truncate(time.Second)) {
			t.Errorf("the certificate made at %v holds from %v", at, got)
		}
	}

	// A folder that got its db-next after its db, as old ones did.
	dir, _ = create(t)
	for _, ext := range []string{".key", ".pem", ".auth"} {
		if err := os.Remove(filepath.Join(dir, DBNext+ext)); err != nil {
			t.Fatal(err)
		}
	}
	cfg := config()
	cfg.Now = testTime.Add(time.Hour)
	made, err := Rotate(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	rotated, err := Rotate(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if before, after := auth(t, made.DBNext.Auth).Time, auth(t, rotated.DB.Auth).Time; !after.After(before) {
		t.Errorf("db.auth is of %v, and db-next.auth before it of %v", after, before)
	}
}

// TestOldFolder: a folder from before there was a db-next loads, and gets one that no
// box knows yet before the key is changed.
func TestOldFolder(t *testing.T) {
	dir, old := create(t)
	for _, ext := range []string{".key", ".pem", ".auth"} {
		if err := os.Remove(filepath.Join(dir, DBNext+ext)); err != nil {
			t.Fatal(err)
		}
	}
	k, err := Load(dir)
	if err != nil || k.DBNext.Cert != nil {
		t.Fatalf("%v, %v", k, err)
	}
	if _, err := k.DBNext.Signer(); err == nil || !strings.Contains(err.Error(), "db-next.key") {
		t.Errorf("signer of no key: %v", err)
	}
	later := config()
	later.Now = testTime.Add(time.Hour)
	if _, err := Rotate(dir, later); err != nil {
		t.Fatal(err)
	}
	if k, err = Load(dir); err != nil || !k.DB.Cert.Equal(old.DB.Cert) || k.DBNext.Cert == nil || !bytes.Equal(k.DB.Auth, old.DB.Auth) {
		t.Errorf("db changed: %v", err)
	}
}

// TestRotateCutOff: what is in the way is not removed, and nothing changes.
func TestRotateCutOff(t *testing.T) {
	dir, _ := create(t)
	before := names(t, dir)
	if err := os.Mkdir(dir+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	later := config()
	later.Now = testTime.Add(time.Hour)
	if _, err := Rotate(dir, later); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v", err)
	}
	if got := names(t, dir); !slices.Equal(got, before) {
		t.Errorf("now %v", got)
	}
	if err := os.Remove(filepath.Join(dir, "KEK.key")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir + ".new"); err != nil {
		t.Fatal(err)
	}
	if _, err := Rotate(dir, later); err == nil || !strings.Contains(err.Error(), "KEK.key") {
		t.Errorf("without the key exchange key: %v", err)
	}
	if _, err := Load(dir); err != nil {
		t.Error(err)
	}
}

// TestKeep: certificates of others are enrolled beside ours, now and after a rotation.
func TestKeep(t *testing.T) {
	_, other := create(t)
	theirs := sigdb.FromUUID(uuid.MustParse("77fa9abd-0359-4d32-bd60-28f4e78f784b"))
	cfg := config()
	cfg.KeepDB = sigdb.Database{sigdb.Certificate(other.DB.Cert, theirs)}
	cfg.KeepKEK = sigdb.Database{sigdb.Certificate(other.KEK.Cert, theirs)}
	dir := filepath.Join(t.TempDir(), "keys")
	if _, err := Create(dir, cfg); err != nil {
		t.Fatal(err)
	}
	cfg.Now = testTime.Add(time.Hour)
	if _, err := Rotate(dir, cfg); err != nil {
		t.Fatal(err)
	}
	k, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, cert := range map[string]*x509.Certificate{DB: other.DB.Cert, KEK: other.KEK.Cert} {
		list, err := k.SignatureList(name)
		if err != nil {
			t.Fatal(err)
		}
		p, _ := k.pair(name)
		if d := auth(t, p.Auth).Content; !bytes.Equal(d.Marshal(), list) || !d.HasData(sigdb.TypeX509(), cert.Raw) || !d.HasData(sigdb.TypeX509(), p.Cert.Raw) {
			t.Errorf("%s.auth enrols %v", name, d.Describe())
		}
	}
	if list, err := k.SignatureList(PK); err != nil || bytes.Contains(list, other.DB.Cert.Raw) {
		t.Errorf("PK: %v", err)
	}
}

func TestRevoke(t *testing.T) {
	_, k := create(t)
	_, other := create(t)
	b, err := k.Revoke(Revocation{Digests: [][32]byte{{1}}, Certificates: []*x509.Certificate{other.DB.Cert}}, testTime)
	if err != nil {
		t.Fatal(err)
	}
	first := auth(t, b)
	if err := first.VerifiedBy(DBX, true, k.KEK.Cert); err != nil {
		t.Error(err)
	}
	b, err = k.Revoke(Revocation{Digests: [][32]byte{{2}, {1}, {2}}, Certificates: []*x509.Certificate{other.DB.Cert}, Earlier: first.Content}, testTime.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	second := auth(t, b).Content
	n := 0
	for _, l := range second {
		n += len(l.Entries)
	}
	if !second.Covers(first.Content) || n != 3 {
		t.Errorf("the second has %d entries: %v", n, second.Describe())
	}
	for _, p := range []*Pair{&k.DB, &k.DBNext, &k.KEK, &k.PK} {
		if _, err := k.Revoke(Revocation{Certificates: []*x509.Certificate{p.Cert}}, testTime); err == nil || !strings.Contains(err.Error(), p.name+".pem") {
			t.Errorf("revoking %s: %v", p.name, err)
		}
	}
	if _, err := k.Revoke(Revocation{}, testTime); err == nil {
		t.Error("revoking nothing: no error")
	}
}

// script is a signing program in the keys' folder.
func script(t *testing.T, dir, name, text string) {
	t.Helper()
	put(t, filepath.Join(dir, name), []byte("#!/bin/sh\nset -eu\n"+text), 0o700)
}

// TestProgram signs through openssl, and meets programs that do not do what they should.
func TestProgram(t *testing.T) {
	mustRun(t, "openssl", "openssl", "version")
	dir, made := create(t)
	hsm := t.TempDir() // the key is not in the folder any more
	if err := os.Rename(filepath.Join(dir, "db.key"), filepath.Join(hsm, "db.key")); err != nil {
		t.Fatal(err)
	}
	openssl := "exec openssl pkeyutl -sign -inkey " + hsm + "/$1.key -pkeyopt digest:sha256\n"
	put(t, filepath.Join(dir, signersName), []byte(`{"db": {"command": ["./sign", "db"], "timeout_sec": 1}}`), 0o600)
	digest := sha256.Sum256([]byte("x"))
	sign := func(text string) ([]byte, error) {
		t.Helper()
		script(t, dir, "sign", text)
		k, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		s, err := k.DB.Signer()
		if err != nil {
			t.Fatal(err)
		}
		return s.Sign(nil, digest[:], crypto.SHA256)
	}
	got, err := sign(openssl)
	want, err2 := made.DB.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil || err2 != nil || !bytes.Equal(got, want) {
		t.Errorf("openssl signs %x, %v; the key %x, %v", got, err, want, err2)
	}
	for name, row := range map[string]struct{ text, want string }{
		"fails":          {"echo token is locked >&2; exit 3\n", "token is locked"},
		"hangs":          {"sleep 60\n", "did not end within 1s"},
		"writes nothing": {"true\n", "0 bytes it wrote are no signature"},
		"writes rubbish": {"head -c 256 /dev/urandom\n", "256 bytes it wrote are no signature"},
		"never stops":    {"yes\n", "more than 4096 bytes"},
		"other digest":   {"cat > /dev/null; echo y | openssl dgst -sha256 -binary | openssl pkeyutl -sign -inkey " + hsm + "/db.key -pkeyopt digest:sha256\n", "no signature by this key"},
	} {
		if _, err := sign(row.text); err == nil || !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), "key db by ./sign") {
			t.Errorf("a program that %s: %v, want %q", name, err, row.want)
		}
	}
	k, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.DB.Key.Sign(nil, digest[:20], crypto.SHA1); err == nil {
		t.Error("SHA-1: no error")
	}
	put(t, filepath.Join(dir, "db.key"), []byte(mustRun(t, "coreutils", "cat", filepath.Join(hsm, "db.key"))), 0o600)
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "remove one of them") {
		t.Errorf("key and program: %v", err)
	}
}

func TestSignersRefusals(t *testing.T) {
	dir, _ := create(t)
	for want, text := range map[string]string{
		"no key": `{"dbx": {"command": ["x"]}}`, "no command": `{"db": {"command": []}}`, "timeout of -1": `{"db": {"command": ["x"], "timeout_sec": -1}}`,
		"unknown field": `{"db": {"cmd": ["x"]}}`, "follows": `{} {}`, signersName: `[`,
	} {
		put(t, filepath.Join(dir, signersName), []byte(text), 0o600)
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	put(t, filepath.Join(dir, signersName), []byte(`{}`), 0o644)
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("writable by others: %v", err)
	}
}

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// TestSoftHSM makes all keys of a vendor from keys in a PKCS #11 token, through the
// script of the documentation.
func TestSoftHSM(t *testing.T) {
	if _, err := os.Stat(softHSM); err != nil {
		t.Fatal("softhsm2 not installed: apt-get install softhsm2 opensc")
	}
	dir := t.TempDir()
	t.Setenv("SOFTHSM2_CONF", filepath.Join(dir, "conf"))
	put(t, filepath.Join(dir, "conf"), []byte("directories.tokendir = "+dir+"\n"), 0o600)
	mustRun(t, "softhsm2", "softhsm2-util", "--init-token", "--free", "--label", "vendor", "--so-pin", "1234", "--pin", "1234")
	sign, err := filepath.Abs("testdata/sign-pkcs11")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOLDFAST_PKCS11_MODULE", softHSM)
	t.Setenv("HOLDFAST_PKCS11_PIN", "1234")
	cfg := config()
	cfg.Public, cfg.Signers = map[string]Public{}, Signers{}
	var text strings.Builder
	for i, name := range []string{PK, KEK, DB, DBNext, policyName} {
		id := "0" + string(rune('1'+i))
		mustRun(t, "opensc", "pkcs11-tool", "--module", softHSM, "--token-label", "vendor", "--login", "--pin", "1234",
			"--keypairgen", "--key-type", "rsa:2048", "--label", name, "--id", id)
		mustRun(t, "opensc", "pkcs11-tool", "--module", softHSM, "--token-label", "vendor",
			"--read-object", "--type", "pubkey", "--label", name, "--output-file", filepath.Join(dir, name+".der"))
		der, err := os.ReadFile(filepath.Join(dir, name+".der"))
		if err != nil {
			t.Fatal(err)
		}
		if cfg.Public[name], err = ParsePublic(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})); err != nil {
			t.Fatal(err)
		}
		text.WriteString(`, "` + name + `": {"command": ["` + sign + `", "` + id + `"]}`)
	}
	if cfg.Signers, err = ParseSigners([]byte("{" + text.String()[1:] + "}")); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(dir, "keys")
	if _, err := Create(folder, cfg); err != nil {
		t.Fatal(err)
	}
	for _, n := range names(t, folder) {
		if strings.HasSuffix(n, ".key") && n != "escrow.key" {
			t.Errorf("%s is in the folder", n)
		}
	}
	k, err := Load(folder)
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, "openssl", "openssl", "verify", "-attime", fmt.Sprint(testTime.Unix()+60), "-CAfile", filepath.Join(folder, "db.pem"), filepath.Join(folder, "db.pem"))
	policy, err := k.PolicySigner()
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("x"))
	if _, err := policy.Sign(nil, digest[:], crypto.SHA256); err != nil {
		t.Error(err)
	}
	// Rotated, the old db-next signs, and the new one is made in the folder.
	cfg.Now = testTime.Add(time.Hour)
	cfg.Public, cfg.Signers = nil, nil
	if _, err := Rotate(folder, cfg); err != nil {
		t.Fatal(err)
	}
	after, err := Load(folder)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := after.DB.Signer()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := signer.Sign(nil, digest[:], crypto.SHA256); err != nil || !after.DB.Cert.Equal(k.DBNext.Cert) {
		t.Errorf("the key that was db-next does not sign as db: %v", err)
	}
	if after.DBNext.Key == nil {
		t.Error("no new db-next was made")
	}
}
