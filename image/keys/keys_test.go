package keys

import (
	"bytes"
	"crypto/rsa"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"

	"filippo.io/age"
	"github.com/google/uuid"
)

var testTime = time.Date(2026, 11, 21, 8, 9, 10, 999, time.FixedZone("", 3600))

func config() Config { return Config{Organization: "Démo & Söhne GmbH", Now: testTime} }

func mustRun(t *testing.T, pkg string, argv ...string) string {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Fatalf("%s not installed: apt-get install %s", argv[0], pkg)
	}
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

func create(t *testing.T) (dir string, k *Keys) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "keys")
	k, err := Create(dir, config())
	if err != nil {
		t.Fatal(err)
	}
	return dir, k
}

func put(t *testing.T, path string, content []byte, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, content, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestCreateAndLoad(t *testing.T) {
	dir, made := create(t)
	var got []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		got = append(got, fmt.Sprintf("%s %o", d.Name(), fi.Mode().Perm()))
		return err
	})
	want := "keys 700, KEK.auth 644, KEK.key 600, KEK.pem 644, PK.auth 644, PK.key 600, PK.pem 644, db-next.auth 644, db-next.key 600, db-next.pem 644, db.auth 644, db.key 600, db.pem 644, escrow.key 600, escrow.pub 644, policy.key 600, policy.pem 644"
	if err != nil || strings.Join(got, ", ") != want {
		t.Errorf("got  %s, %v\nwant %s", strings.Join(got, ", "), err, want)
	}
	if left, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(left) != 1 {
		t.Errorf("beside the folder lie %v, %v", left, err)
	}
	k, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []struct{ a, b *Pair }{{&k.PK, &made.PK}, {&k.KEK, &made.KEK}, {&k.DB, &made.DB}, {&k.DBNext, &made.DBNext}} {
		if !p.a.Cert.Equal(p.b.Cert) || !p.a.Key.(*rsa.PrivateKey).Equal(p.b.Key) || !bytes.Equal(p.a.Auth, p.b.Auth) {
			t.Errorf("%s comes back changed", p.b.name)
		}
		if p.a.Cert.NotBefore != testTime.UTC().Truncate(time.Second) || p.a.Cert.NotAfter.Year() != 2046 {
			t.Errorf("%s is valid from %v to %v", p.a.name, p.a.Cert.NotBefore, p.a.Cert.NotAfter)
		}
	}
	if !k.PolicyKey.Equal(made.PolicyKey) || !bytes.Equal(k.PolicyPublicPEM, made.PolicyPublicPEM) || k.PolicyKey.E != 65537 {
		t.Error("the policy key comes back changed")
	}
	if k.Escrow.String() != made.Escrow.String() || k.Owner() != made.Owner() || k.Owner().Version() != 8 || k.Owner().Variant() != uuid.RFC4122 {
		t.Errorf("escrow key or owner %s comes back changed", k.Owner())
	}
	// What escrow.key holds opens what was encrypted to escrow.pub.
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, k.EscrowRecipient)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := age.Decrypt(&sealed, k.Escrow); err != nil {
		t.Error(err)
	}
}

func TestReproducible(t *testing.T) {
	var first []byte
	for range 2 {
		cryptotest.SetGlobalRandom(t, 7)
		dir, _ := create(t)
		var all []byte
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 16 {
			t.Fatalf("%d files, %v", len(entries), err)
		}
		for _, e := range entries {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b...)
		}
		if first != nil && !bytes.Equal(first, all) {
			t.Error("the same randomness and time give other files")
		}
		first = all
	}
}

// TestJudges has OpenSSL, sbsigntool and efitools read the keys.
func TestJudges(t *testing.T) {
	dir, k := create(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	out := t.TempDir()
	for _, name := range []string{PK, KEK, DB} {
		text := mustRun(t, "openssl", "openssl", "x509", "-in", path(name+".pem"), "-noout", "-text", "-nameopt", "utf8,sep_comma_plus")
		for _, want := range []string{"O=Démo & Söhne GmbH", "(2048 bit)", "CA:TRUE", "sha256WithRSAEncryption", "Exponent: 65537"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s.pem: openssl does not show %q", name, want)
			}
		}
		mustRun(t, "openssl", "openssl", "verify", "-attime", fmt.Sprint(testTime.Unix()+60), "-CAfile", path(name+".pem"), path(name+".pem"))
		mustRun(t, "openssl", "openssl", "rsa", "-in", path(name+".key"), "-check", "-noout")

		list, err := k.SignatureList(name)
		if err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(out, name+".esl"), list, 0o600)
		said := mustRun(t, "efitools", "sig-list-to-certs", filepath.Join(out, name+".esl"), filepath.Join(out, name))
		der, err := os.ReadFile(filepath.Join(out, name+"-0.der"))
		pair, _ := k.pair(name)
		if err != nil || !bytes.Equal(der, pair.Cert.Raw) || !strings.Contains(said, k.Owner().String()) {
			t.Errorf("%s: sig-list-to-certs gives %d bytes, %v, and says %q; owner is %s", name, len(der), err, said, k.Owner())
		}
		theirs := filepath.Join(out, name+".theirs")
		mustRun(t, "efitools", "cert-to-efi-sig-list", "-g", k.Owner().String(), path(name+".pem"), theirs)
		if b, err := os.ReadFile(theirs); err != nil || !bytes.Equal(b, list) {
			t.Errorf("%s: cert-to-efi-sig-list gives other bytes, %v", name, err)
		}
	}
	mustRun(t, "openssl", "openssl", "pkey", "-pubin", "-in", path("policy.pem"), "-noout")
	pub := mustRun(t, "openssl", "openssl", "pkey", "-in", path("policy.key"), "-pubout")
	if pub != string(k.PolicyPublicPEM) {
		t.Errorf("openssl writes policy.pem as %s", pub)
	}
	loader := "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	if _, err := os.Stat(loader); err != nil {
		t.Fatalf("%s not installed: apt-get install systemd-boot-efi", loader)
	}
	signed := filepath.Join(out, "signed.efi")
	mustRun(t, "sbsigntool", "sbsign", "--key", path("db.key"), "--cert", path("db.pem"), "--output", signed, loader)
	mustRun(t, "sbsigntool", "sbverify", "--cert", path("db.pem"), signed)
}

// TestAuthJudges takes the .auth files apart and has OpenSSL verify each
// signature, then compares with what efitools makes for the same second.
func TestAuthJudges(t *testing.T) {
	t.Setenv("TZ", "UTC") // sign-efi-sig-list reads its time stamp as local time
	dir, k := create(t)
	out := t.TempDir()
	attributes := []byte{0x27, 0, 0, 0}
	for _, row := range []struct{ name, signer, guid string }{
		{PK, PK, "61dfe48bca93d211aa0d00e098032b8c"},
		{KEK, PK, "61dfe48bca93d211aa0d00e098032b8c"},
		{DB, KEK, "cbb219d73a3d9645a3bcdad00e67656f"},
	} {
		pair, _ := k.pair(row.name)
		list, _ := k.SignatureList(row.name)
		auth := pair.Auth
		certLen := int(binary.LittleEndian.Uint32(auth[16:]))
		if !bytes.Equal(auth[:16], []byte{0xea, 0x07, 11, 21, 7, 9, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0}) || len(auth) != 16+certLen+len(list) {
			t.Fatalf("%s.auth begins with %x and has %d bytes", row.name, auth[:40], len(auth))
		}
		var tbs []byte
		for _, c := range row.name {
			tbs = append(tbs, byte(c), 0)
		}
		guid, err := hex.DecodeString(row.guid)
		if err != nil {
			t.Fatal(err)
		}
		tbs = slices.Concat(tbs, guid, attributes, auth[:16], list)
		// OpenSSL wants the ContentInfo around the SignedData.
		sd := auth[40 : 16+certLen]
		wrapped := slices.Concat([]byte{0x30, 0x82}, be16(len(sd)+15), []byte("\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02\xa0\x82"), be16(len(sd)), sd)
		p7, content := filepath.Join(out, row.name+".p7"), filepath.Join(out, row.name+".tbs")
		put(t, p7, wrapped, 0o600)
		put(t, content, tbs, 0o600)
		mustRun(t, "openssl", "openssl", "smime", "-verify", "-inform", "DER", "-in", p7, "-content", content, "-binary",
			"-CAfile", filepath.Join(dir, row.signer+".pem"), "-purpose", "any", "-attime", fmt.Sprint(testTime.Unix()+60), "-out", os.DevNull)

		esl, theirs := filepath.Join(out, row.name+".esl"), filepath.Join(out, row.name+".auth")
		put(t, esl, list, 0o600)
		mustRun(t, "efitools", "sign-efi-sig-list", "-t", "2026-11-21 07:09:10", "-k", filepath.Join(dir, row.signer+".key"),
			"-c", filepath.Join(dir, row.signer+".pem"), row.name, esl, theirs)
		b, err := os.ReadFile(theirs)
		if err != nil || !bytes.Equal(b[:16], auth[:16]) || !bytes.HasSuffix(b, list) {
			t.Errorf("%s: sign-efi-sig-list agrees neither on the time %x nor on the list: %x, %v", row.name, auth[:16], b[:16], err)
		}
		// The RSA signature is over the same bytes in both, so it is the same.
		if end := 16 + certLen; !bytes.Contains(b, auth[end-256:end]) {
			t.Errorf("%s: sign-efi-sig-list signs other bytes", row.name)
		}
	}
}

func be16(n int) []byte { return []byte{byte(n >> 8), byte(n)} }

func TestNeverOverwrites(t *testing.T) {
	dir, _ := create(t)
	before, err := os.ReadFile(filepath.Join(dir, "db.key"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = Create(dir, config())
	if err == nil || !strings.Contains(err.Error(), "KEK.auth, KEK.key") || !strings.Contains(err.Error(), "never overwritten") {
		t.Errorf("second time: %v", err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, "db.key")); err != nil || !bytes.Equal(before, after) {
		t.Errorf("db.key changed: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	put(t, file, []byte("x"), 0o600)
	if _, err := Create(file, config()); err == nil || !strings.Contains(err.Error(), "not a folder") {
		t.Errorf("over a file: %v", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(link, config()); err == nil {
		t.Error("over a symbolic link: no error")
	}
	empty := t.TempDir()
	if _, err := Create(empty, config()); err != nil {
		t.Errorf("into an empty folder: %v", err)
	}
	if _, err := Load(empty); err != nil {
		t.Error(err)
	}
}

// TestAllOrNothing lets another process win the race for the name.
func TestAllOrNothing(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "keys")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "precious"), []byte("x"), 0o600)
	if err := writeFolder(dir, []outFile{{"a", []byte("b"), true}}); err == nil {
		t.Error("a folder with a file in it was replaced")
	}
	if err := writeFolder(filepath.Join(parent, "other"), []outFile{{"a", nil, true}, {"a", nil, true}}); err == nil {
		t.Error("one file twice: no error")
	}
	entries, err := os.ReadDir(parent)
	if err != nil || len(entries) != 1 || entries[0].Name() != "keys" {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if _, err := Create(filepath.Join(parent, "no", "such"), config()); err == nil {
		t.Error("without a parent: no error")
	}
}

func TestConfig(t *testing.T) {
	for _, row := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no organization", Config{Organization: " ", Now: testTime}, "no organization"},
		{"long organization", Config{Organization: strings.Repeat("ö", 41), Now: testTime}, "40 characters"},
		{"line break", Config{Organization: "a\nb", Now: testTime}, "control"},
		{"no UTF-8", Config{Organization: "a\xff", Now: testTime}, "control"},
		{"no clock", Config{Organization: "a"}, "cannot be right"},
		{"dead battery", Config{Organization: "a", Now: time.Unix(0, 0)}, "cannot be right"},
	} {
		dir := filepath.Join(t.TempDir(), "keys")
		if _, err := Create(dir, row.cfg); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: got %v, want an error with %q", row.name, err, row.want)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s: the folder exists", row.name)
		}
	}
}

func TestLoadRefusals(t *testing.T) {
	good, _ := create(t)
	other, _ := create(t)
	from := func(dir, name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	small := mustRun(t, "openssl", "openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", "-quiet")
	ec := mustRun(t, "openssl", "openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-quiet")
	for _, row := range []struct {
		name, file string
		content    []byte
		mode       fs.FileMode
		want       string
	}{
		{"key readable by all", "db.key", from(good, "db.key"), 0o644, "chmod 0600"},
		{"key readable by the group", "escrow.key", from(good, "escrow.key"), 0o640, "chmod 0600"},
		{"key of another vendor", "db.key", from(other, "db.key"), 0o600, "db.key does not belong"},
		{"policy key of another vendor", "policy.key", from(other, "policy.key"), 0o600, "policy.key does not belong"},
		{"escrow key of another vendor", "escrow.key", from(other, "escrow.key"), 0o600, "escrow.key does not belong"},
		{"enrolment of another vendor", "KEK.auth", from(other, "KEK.auth"), 0o644, "two vendors"},
		{"platform key of another vendor", "PK.pem", from(other, "PK.pem"), 0o644, "PK.key does not belong"},
		{"key of 1024 bits", "db.key", []byte(small), 0o600, "1024 bits"},
		{"elliptic curve", "policy.key", []byte(ec), 0o600, "expected an RSA key"},
		{"certificate where the key should be", "db.key", from(good, "db.pem"), 0o600, `expected "PRIVATE KEY"`},
		{"two blocks", "db.pem", append(from(good, "db.pem"), from(good, "KEK.pem")...), 0o644, "more than one"},
		{"truncated", "db.key", from(good, "db.key")[:500], 0o600, "not a PEM file"},
		{"empty", "policy.pem", nil, 0o644, "not a PEM file"},
		{"huge", "db.auth", make([]byte, maxFileBytes+1), 0o644, "bytes allowed"},
		{"not age", "escrow.key", []byte("AGE-SECRET-KEY-1SECRET\n"), 0o600, "not an age identity"},
		{"bad recipient", "escrow.pub", []byte("age1xyz"), 0o644, "escrow.pub"},
	} {
		dir := filepath.Join(t.TempDir(), "keys")
		mustRun(t, "coreutils", "cp", "-a", good, dir)
		put(t, filepath.Join(dir, row.file), row.content, row.mode)
		_, err := Load(dir)
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: got %v, want an error with %q", row.name, err, row.want)
		}
		if err != nil && strings.Contains(err.Error(), "SECRET-KEY-1SECRET") {
			t.Errorf("%s: the error quotes a secret: %v", row.name, err)
		}
	}
	if err := os.Chmod(other, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(other); err == nil || !strings.Contains(err.Error(), "chmod 0700") {
		t.Errorf("folder open to all: %v", err)
	}
	if _, err := Load(filepath.Join(good, "none")); err == nil {
		t.Error("no folder: no error")
	}
	if _, err := Load(filepath.Join(good, "db.pem")); err == nil {
		t.Error("a file instead of a folder: no error")
	}
}

// TestOfflineKeys: private keys may be elsewhere, public files may not.
func TestOfflineKeys(t *testing.T) {
	dir, _ := create(t)
	for _, name := range []string{"PK.key", "KEK.key", "policy.key", "escrow.key"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	k, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.PK.Signer(); err == nil || !strings.Contains(err.Error(), "PK.key") {
		t.Errorf("PK.Signer: %v", err)
	}
	if _, err := k.PolicySigner(); err == nil || !strings.Contains(err.Error(), "policy.key") {
		t.Errorf("PolicySigner: %v", err)
	}
	if s, err := k.DB.Signer(); err != nil || s == nil || k.Escrow != nil || k.EscrowRecipient == nil {
		t.Errorf("db signer %v, %v, escrow %v for %v", s, err, k.Escrow, k.EscrowRecipient)
	}
	for _, name := range []string{"PK.pem", "db.auth", "policy.pem", "escrow.pub"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", name, err)
		}
		put(t, filepath.Join(dir, name), b, 0o644)
	}
}

func TestUnknownVariable(t *testing.T) {
	_, k := create(t)
	if _, err := k.SignatureList("dbx"); err == nil {
		t.Error("SignatureList: no error for dbx")
	}
}

func ExampleCreate() {
	parent, err := os.MkdirTemp("", "example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(parent)
	dir := filepath.Join(parent, "keys")
	if _, err := Create(dir, Config{Organization: "Example", Now: testTime}); err != nil {
		fmt.Println(err)
		return
	}
	k, err := Load(dir)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(k.DB.Cert.Subject)
	// Output: CN=Example signature key,O=Example
}
