package keys

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/seal"
)

// here makes the folder of a machine that has the public files of the folder vault and
// none of these private keys, which are carried to in to-sign beside it.
func here(t *testing.T, vault string, carried ...string) (dir, folder string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "keys")
	mustRun(t, "coreutils", "cp", "-a", vault, dir)
	signers := Signers{}
	for _, name := range carried {
		if err := os.Remove(filepath.Join(dir, name+".key")); err != nil {
			t.Fatal(err)
		}
		signers[name] = SignerConfig{Carried: "../to-sign"}
	}
	text, err := signers.marshal()
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, signersName), text, 0o600)
	return dir, filepath.Join(filepath.Dir(dir), "to-sign")
}

// carriedDB signs with the key db, which is elsewhere.
func carriedDB(t *testing.T, dir string, digest []byte) ([]byte, error) {
	t.Helper()
	k, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := k.DB.Signer()
	if err != nil {
		t.Fatal(err)
	}
	return For(s, "a test\nof this").Sign(nil, digest, crypto.SHA256)
}

// TestCarried asks for a signature, has it made by our program and by openssl as the
// documentation says, and takes it.
func TestCarried(t *testing.T) {
	vault, made := create(t)
	for name, sign := range map[string]func(folder, base string){
		"holdfast": func(folder, base string) {
			list, err := Answer(folder, vault)
			if err != nil || len(list) != 1 || list[0].Outcome != Signed || list[0].With != "db.key" || list[0].For != "a test of this" || list[0].AnswerName() != base+".sig" {
				t.Errorf("Answer: %+v, %v", list, err)
			}
			if list, err = Answer(folder, vault); err != nil || list[0].Outcome != Present {
				t.Errorf("again: %+v, %v", list, err)
			}
		},
		"openssl": func(folder, base string) {
			mustRun(t, "openssl", "sh", "-euc", `cd "$1"; f=$2
echo "${f##*-}" | tr a-f A-F | basenc --base16 -d | openssl pkeyutl -sign -inkey "$3" -pkeyopt digest:sha256 -out "$f.sig"`, "sh", folder, base, filepath.Join(vault, "db.key"))
		},
	} {
		dir, folder := here(t, vault, DB)
		digest := sha256.Sum256([]byte(name))
		base := "db-" + hex.EncodeToString(digest[:])
		var before []byte
		for range 2 {
			_, err := carriedDB(t, dir, digest[:])
			wanted := Wanted(fmt.Errorf("x: %w", errors.Join(err, err)))
			if len(wanted) != 1 || wanted[0].Key != DB || wanted[0].Request != filepath.Join(folder, base+".request") || !errors.Is(err, seal.ErrSignatureWanted) {
				t.Fatalf("%s: %v", name, err)
			}
			text, err := os.ReadFile(wanted[0].Request)
			if err != nil || before != nil && !bytes.Equal(before, text) {
				t.Errorf("%s: the request becomes %s, %v", name, text, err)
			}
			before = text
		}
		sign(folder, base)
		if left := names(t, folder); !slices.Equal(left, []string{base + ".request", base + ".sig"}) {
			t.Errorf("%s: the folder holds %q", name, left)
		}
		got, err := carriedDB(t, dir, digest[:])
		want, err2 := made.DB.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil || err2 != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %x, %v; the key itself gives %x, %v", name, got, err, want, err2)
		}
		k, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.DB.Key.Sign(nil, digest[:20], crypto.SHA1); err == nil || len(Wanted(err)) != 0 {
			t.Errorf("SHA-1: %v", err)
		}
	}
}

// TestBadAnswers is what a stick may bring back instead of a signature.
func TestBadAnswers(t *testing.T) {
	vault, made := create(t)
	dir, folder := here(t, vault, DB)
	digest, other := sha256.Sum256([]byte("x")), sha256.Sum256([]byte("y"))
	if _, err := carriedDB(t, dir, digest[:]); len(Wanted(err)) != 1 {
		t.Fatal(err)
	}
	sign := func(key crypto.Signer, digest [32]byte) []byte {
		b, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := sign(made.DB.Key, digest)
	at := filepath.Join(folder, "db-"+hex.EncodeToString(digest[:])+".sig")
	elsewhere := filepath.Join(t.TempDir(), "good")
	put(t, elsewhere, good, 0o644)
	write := func(b []byte) func() { return func() { put(t, at, b, 0o644) } }
	for name, do := range map[string]func(){
		"empty": write(nil), "truncated": write(good[:100]), "garbage": write(bytes.Repeat([]byte{0xaa}, 256)),
		"another key's": write(sign(made.KEK.Key, digest)), "another digest's": write(sign(made.DB.Key, other)),
		"longer": write(append(slices.Clone(good), '\n')), "huge": write(make([]byte, 16<<20)),
		"link":   func() { os.Symlink(elsewhere, at) },
		"folder": func() { os.Mkdir(at, 0o755) },
		"pipe":   func() { mustRun(t, "coreutils", "mkfifo", at) },
	} {
		do()
		for who, err := range map[string]error{
			"Sign":   func() error { _, err := carriedDB(t, dir, digest[:]); return err }(),
			"Answer": func() error { _, err := Answer(folder, vault); return err }(),
		} {
			if !errors.Is(err, ErrBadAnswer) || !strings.Contains(err.Error(), at) || len(Wanted(err)) != 0 {
				t.Errorf("%s, %s: %v", name, who, err)
			}
		}
		if err := os.Remove(at); err != nil {
			t.Fatal(err)
		}
	}
	// Without the key, it is for the other machine to judge.
	write(good[:100])()
	few := filepath.Join(t.TempDir(), "few")
	if err := os.Mkdir(few, 0o700); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "coreutils", "cp", "-a", filepath.Join(vault, "KEK.key"), few)
	if list, err := Answer(folder, few); err != nil || len(list) != 1 || list[0].Outcome != Present {
		t.Errorf("without the key: %+v, %v", list, err)
	}
}

// TestInterrupted: what a write that was cut off leaves is no request and no answer.
func TestInterrupted(t *testing.T) {
	vault, _ := create(t)
	dir, folder := here(t, vault, DB)
	digest := sha256.Sum256([]byte("x"))
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(folder, ".unfinished-1"), []byte("{"), 0o600)
	if list, err := Answer(folder, vault); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := carriedDB(t, dir, digest[:]); len(Wanted(err)) != 1 {
		t.Error(err)
	}
	if list, err := Answer(folder, vault); err != nil || len(list) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := carriedDB(t, dir, digest[:]); err != nil {
		t.Error(err)
	}
	// Where nothing can be written, that is said, and no signature is wanted.
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	put(t, folder, nil, 0o644)
	if _, err := carriedDB(t, dir, digest[:]); err == nil || len(Wanted(err)) != 0 || !strings.Contains(err.Error(), folder) {
		t.Errorf("a file in the folder's place: %v", err)
	}
}

// TestBadRequests is what a stick may bring to the machine with the keys.
func TestBadRequests(t *testing.T) {
	vault, _ := create(t)
	dir, folder := here(t, vault, DB)
	digest := sha256.Sum256([]byte("x"))
	_, err := carriedDB(t, dir, digest[:])
	if len(Wanted(err)) != 1 {
		t.Fatal(err)
	}
	at := Wanted(err)[0].Request
	good, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	hexDigest := hex.EncodeToString(digest[:])
	for name, row := range map[string]struct{ old, new, want string }{
		"cut off":                {"\n}\n", "", "unexpected EOF"},
		"more than is known":     {`"key"`, `"sign": "all", "key"`, "unknown field"},
		"another format":         {"request 1", "request 2", "format"},
		"another folder":         {`"key": "db"`, `"key": "../db"`, "no key"},
		"another key's name":     {`"key": "db"`, `"key": "KEK"`, "its name should be KEK-"},
		"another digest":         {hexDigest, strings.Repeat("0", 64), "its name should be db-0"},
		"a short digest":         {hexDigest, hexDigest[:40], "not SHA-256"},
		"capitals":               {hexDigest, strings.ToUpper(hexDigest), "not SHA-256"},
		"no digest":              {hexDigest, strings.Repeat("x", 64), "not SHA-256"},
		"huge":                   {"a test", strings.Repeat("a", maxRequestBytes), "bytes allowed"},
		"a key that is not here": {`"public_key_sha256": "`, `"public_key_sha256": "00`, ""},
	} {
		put(t, at, bytes.Replace(good, []byte(row.old), []byte(row.new), 1), 0o644)
		list, err := Answer(folder, vault)
		if row.want == "" {
			if err != nil || len(list) != 1 || list[0].Outcome != NoKey {
				t.Errorf("%s: %+v, %v", name, list, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), at) {
			t.Errorf("%s: %v, want %q", name, err, row.want)
		}
		if left := names(t, folder); len(left) != 1 {
			t.Errorf("%s: the folder holds %q", name, left)
		}
	}
	put(t, filepath.Join(vault, "db.key"), nil, 0o644)
	if _, err := Answer(folder, vault); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("private key open to all: %v", err)
	}
	if _, err := Answer(folder, t.TempDir()); err == nil || !strings.Contains(err.Error(), "chmod 0700") {
		t.Errorf("a folder open to all: %v", err)
	}
}

// TestAnswerByProgram: on the machine with the keys, they may be in a token.
func TestAnswerByProgram(t *testing.T) {
	vault, _ := create(t)
	dir, folder := here(t, vault, DB)
	digest := sha256.Sum256([]byte("x"))
	if _, err := carriedDB(t, dir, digest[:]); len(Wanted(err)) != 1 {
		t.Fatal(err)
	}
	token := filepath.Join(t.TempDir(), "token")
	if err := os.Mkdir(token, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Answer(folder, token); err == nil || !strings.Contains(err.Error(), "no private key") {
		t.Errorf("empty: %v", err)
	}
	mustRun(t, "coreutils", "cp", filepath.Join(vault, "db.pem"), token)
	script(t, token, "sign", "exec openssl pkeyutl -sign -inkey "+vault+"/db.key -pkeyopt digest:sha256\n")
	put(t, filepath.Join(token, signersName), []byte(`{"db": {"command": ["./sign"]}, "KEK": {"carried": "../more"}}`), 0o600)
	if list, err := Answer(folder, token); err != nil || len(list) != 1 || list[0].Outcome != Signed {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := carriedDB(t, dir, digest[:]); err != nil {
		t.Error(err)
	}
}

// carry does the same until no signature is wanted, and returns how often it was carried.
func carry(t *testing.T, folder, vault string, do func(round int) error) (rounds int) {
	t.Helper()
	for {
		err := do(rounds)
		if err == nil {
			return rounds
		}
		if len(Wanted(err)) == 0 || rounds == 5 {
			t.Fatalf("round %d: %v", rounds, err)
		}
		list, err := Answer(folder, vault)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range list {
			if a.Outcome == NoKey {
				t.Fatalf("no key for %s: %s", a.AnswerName(), a.For)
			}
		}
		rounds++
	}
}

// same compares files of two folders.
func same(t *testing.T, a, b string, files ...string) {
	t.Helper()
	for _, name := range files {
		x, err1 := os.ReadFile(filepath.Join(a, name))
		y, err2 := os.ReadFile(filepath.Join(b, name))
		if err1 != nil || err2 != nil || !bytes.Equal(x, y) {
			t.Errorf("%s differs: %v, %v", name, err1, err2)
		}
	}
}

// TestCreateCarried makes a folder from keys that are all elsewhere: the same as there.
func TestCreateCarried(t *testing.T) {
	vault, made := create(t)
	for name, want := range map[string]int{"certificates": 1, "public keys": 2} {
		parent := t.TempDir()
		dir, folder := filepath.Join(parent, "keys"), filepath.Join(parent, "to-sign")
		rounds := carry(t, folder, vault, func(round int) error {
			cfg := config()
			cfg.Now = testTime.Add(time.Duration(round) * time.Hour) // the clock goes on
			cfg.Public, cfg.Signers = map[string]Public{}, Signers{}
			for _, n := range append(pairNames(), policyName) {
				text, err := os.ReadFile(filepath.Join(vault, n+".pem"))
				if err != nil {
					t.Fatal(err)
				}
				p, err := ParsePublic(text)
				if err != nil {
					t.Fatal(err)
				}
				if name == "public keys" {
					p.Cert = nil
				}
				cfg.Public[n], cfg.Signers[n] = p, SignerConfig{Carried: "../to-sign"}
			}
			_, err := Create(dir, cfg)
			if _, missing := os.Stat(dir); err != nil && missing == nil {
				t.Error("the folder is there before it is whole")
			}
			return err
		})
		if rounds != want {
			t.Errorf("%s: carried %d times, want %d", name, rounds, want)
		}
		same(t, dir, vault, "PK.pem", "PK.auth", "KEK.pem", "KEK.auth", "db.pem", "db.auth", "db-next.pem", "db-next.auth", "policy.pem")
		if k, err := Load(dir); err != nil || k.Owner() != made.Owner() {
			t.Errorf("%s: %v", name, err)
		}
		if left := names(t, parent); !slices.Equal(left, []string{"keys", "to-sign"}) {
			t.Errorf("%s: beside the folder lie %q", name, left)
		}
	}
}

// TestCreateMixed: only PK and KEK are elsewhere. The keys that are made here are the
// same ones in every run, or what is signed would not be.
func TestCreateMixed(t *testing.T) {
	vault, _ := create(t)
	parent := t.TempDir()
	dir, folder := filepath.Join(parent, "keys"), filepath.Join(parent, "to-sign")
	rounds := carry(t, folder, vault, func(round int) error {
		cfg := config()
		cfg.Now = testTime.Add(time.Duration(round) * time.Hour)
		cfg.Public, cfg.Signers = map[string]Public{}, Signers{}
		for _, n := range []string{PK, KEK} {
			text, err := os.ReadFile(filepath.Join(vault, n+".pem"))
			if err != nil {
				t.Fatal(err)
			}
			if cfg.Public[n], err = ParsePublic(text); err != nil {
				t.Fatal(err)
			}
			cfg.Signers[n] = SignerConfig{Carried: "../to-sign"}
		}
		_, err := Create(dir, cfg)
		if err != nil {
			info, err := os.Stat(dir + waitingSuffix)
			if err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("what waits: %v, %v", info, err)
			}
		}
		return err
	})
	if left := names(t, parent); rounds != 1 || !slices.Equal(left, []string{"keys", "to-sign"}) {
		t.Errorf("carried %d times; beside the folder lie %q", rounds, left)
	}
	k, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.DB.Signer(); err != nil {
		t.Error(err)
	}
}

// TestRotateCarried: KEK is elsewhere, and in the second row db-next as well.
func TestRotateCarried(t *testing.T) {
	for name, row := range map[string]struct {
		carried []string
		given   bool // the new db-next is elsewhere
		want    int
	}{
		"KEK":                   {[]string{PK, KEK}, false, 1},
		"KEK, db and db-next":   {[]string{KEK, DB, DBNext}, false, 1},
		"and the new one's key": {[]string{KEK, DB, DBNext}, true, 2},
	} {
		vault, made := create(t)
		dir, folder := here(t, vault, row.carried...)
		cfg := config()
		if row.given {
			mustRun(t, "openssl", "openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-quiet", "-out", filepath.Join(vault, "fresh.key"))
			if err := os.Chmod(filepath.Join(vault, "fresh.key"), 0o600); err != nil {
				t.Fatal(err)
			}
			p, err := ParsePublic([]byte(mustRun(t, "openssl", "openssl", "pkey", "-in", filepath.Join(vault, "fresh.key"), "-pubout")))
			if err != nil {
				t.Fatal(err)
			}
			cfg.Public, cfg.Signers = map[string]Public{DBNext: p}, Signers{DBNext: {Carried: "../to-sign"}}
		}
		rounds := carry(t, folder, vault, func(round int) error {
			cfg.Now = testTime.Add(time.Duration(round+1) * time.Hour)
			_, err := Rotate(dir, cfg)
			return err
		})
		k, err := Load(dir)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if rounds != row.want || !k.DB.Cert.Equal(made.DBNext.Cert) || k.DBNext.Cert.Equal(made.DBNext.Cert) {
			t.Errorf("%s: carried %d times, want %d; db is now %v", name, rounds, row.want, k.DB.Cert.Subject)
		}
		if left := names(t, filepath.Dir(dir)); !slices.Equal(left, []string{"keys", "to-sign"}) {
			t.Errorf("%s: beside the folder lie %q", name, left)
		}
		// The key that was db-next there is db here.
		digest := sha256.Sum256([]byte("x"))
		if rounds := carry(t, folder, vault, func(int) error { _, err := carriedDB(t, dir, digest[:]); return err }); row.carried[0] == KEK && rounds != 1 {
			t.Errorf("%s: db signs after %d times", name, rounds)
		}
	}
}

// TestWaitingOfAnother: what an earlier run kept is taken for nothing else.
func TestWaitingOfAnother(t *testing.T) {
	vault, _ := create(t)
	dir, _ := here(t, vault, PK, KEK)
	cfg := config()
	if _, err := Rotate(dir, cfg); len(Wanted(err)) != 2 {
		t.Fatal(err)
	}
	left := filepath.Join(t.TempDir(), "left")
	mustRun(t, "coreutils", "cp", "-a", dir+waitingSuffix, left)
	// Finished, but cut off before the folder was removed.
	carry(t, filepath.Join(filepath.Dir(dir), "to-sign"), vault, func(int) error { _, err := Rotate(dir, cfg); return err })
	mustRun(t, "coreutils", "cp", "-a", left, dir+waitingSuffix)
	if _, err := Rotate(dir, cfg); err == nil || !strings.Contains(err.Error(), "in the way") || len(Wanted(err)) != 0 {
		t.Errorf("the next rotation took the last one's: %v", err)
	}
	if _, err := OpenWaiting(dir, "keys dbx", testTime); err == nil {
		t.Error("something else took a rotation's")
	}
	for name, do := range map[string]func(at string) error{
		"a file":      func(at string) error { return os.WriteFile(at, nil, 0o600) },
		"empty":       func(at string) error { return os.Mkdir(at, 0o700) },
		"open to all": func(at string) error { return os.Mkdir(at, 0o755) },
	} {
		out := filepath.Join(t.TempDir(), "out")
		if err := do(out + waitingSuffix); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenWaiting(out, "x", testTime); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCarriedRefusals(t *testing.T) {
	for want, text := range map[string]string{
		"choose one":        `{"db": {"carried": "../x", "command": ["x"]}}`,
		`beside it: "../x"`: `{"db": {"carried": "x"}}`,
	} {
		if _, err := ParseSigners([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// FuzzRequest: a request that is read comes out as it was, and its names stay in the folder.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"format": "holdfast signature request 1", "key": "db", "for": "x", "digest_sha256": "` + strings.Repeat("0a", 32) + `", "public_key_sha256": "x"}`))
	f.Add([]byte(`{"key": "../db"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRequest(b)
		if err != nil {
			return
		}
		if !filepath.IsLocal(r.AnswerName()) || filepath.Base(r.AnswerName()) != r.AnswerName() {
			t.Errorf("an answer would be written to %q", r.AnswerName())
		}
		text, err := r.marshal()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseRequest(text); err != nil || *again != *r {
			t.Errorf("%+v comes back as %+v, %v", r, again, err)
		}
	})
}
