package escrow

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

const boxUUID = "0b7d9f0e-3a51-4c0e-9d4e-8a3f5a1c2d3e"

var made = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// group is holders with their keys.
type group struct {
	policy     Policy
	identities []age.Identity
}

func newGroup(t testing.TB, threshold, n int) group {
	t.Helper()
	g := group{policy: Policy{Threshold: threshold}}
	for i := range n {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			t.Fatal(err)
		}
		g.identities = append(g.identities, id)
		g.policy.Holders = append(g.policy.Holders, Holder{fmt.Sprintf("holder-%d", i+1), id.Recipient().String()})
	}
	return g
}

func subject(serial int) Subject {
	return Subject{Box: boxUUID, Volumes: []string{boxUUID, strings.Replace(boxUUID, "0b7d", "ffff", 1)}, Product: "ledger", Release: "1.2.3", Serial: serial, Time: made}
}

func newKey(t testing.TB) *luks2.RecoveryKey {
	t.Helper()
	k, err := luks2.GenerateRecoveryKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func boxKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func mustNew(t testing.TB, key *luks2.RecoveryKey, g group) *Escrow {
	t.Helper()
	e, err := New(key, subject(1), g.policy, boxKey(t), rand.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (g group) open(t testing.TB, e *Escrow, holders ...int) (shares []*Share) {
	t.Helper()
	for _, i := range holders {
		got, err := e.Open(g.identities[i])
		if err != nil || len(got) != 1 {
			t.Fatalf("holder %d: %d shares, %v", i+1, len(got), err)
		}
		shares = append(shares, got...)
	}
	return shares
}

// TestRecover: every group that is large enough gets the key, none that is not does.
func TestRecover(t *testing.T) {
	for _, tt := range [][2]int{{1, 1}, {1, 3}, {2, 2}, {2, 3}, {3, 5}, {16, 16}} {
		t.Run(fmt.Sprintf("%d of %d", tt[0], tt[1]), func(t *testing.T) {
			g, key := newGroup(t, tt[0], tt[1]), newKey(t)
			file := mustNew(t, key, g).Marshal()
			t.Logf("%d bytes", len(file))
			e, err := Parse(file)
			if err != nil {
				t.Fatal(err)
			}
			for m := 1; m <= tt[1]; m++ {
				done := 0
				subsets(tt[1], m, func(chosen []int) {
					if done++; done > 6 {
						return
					}
					got, err := e.Recover(g.open(t, e, chosen...)...)
					var short *NotEnoughError
					switch {
					case m >= tt[0] && (err != nil || got.String() != key.String()):
						t.Errorf("holders %v do not get the key: %v", chosen, err)
					case m < tt[0] && (!errors.As(err, &short) || short.Have != m || short.Need != tt[0] || len(short.Missing) != tt[1]-m):
						t.Errorf("holders %v: %v", chosen, err)
					}
				})
			}
			all, err := e.Open(g.identities...)
			if err != nil || len(all) != tt[1] {
				t.Errorf("all keys at once: %d shares, %v", len(all), err)
			}
			if _, err := e.Recover(all[0], all[0]); tt[0] > 1 && err == nil {
				t.Error("a share counts twice")
			}
		})
	}
}

// TestSharesTravel: shares are carried as text.
func TestSharesTravel(t *testing.T) {
	g, key := newGroup(t, 2, 3), newKey(t)
	e := mustNew(t, key, g)
	var carried []*Share
	for _, s := range g.open(t, e, 2, 0) {
		text := s.Text()
		back, err := ParseShare(text)
		if err != nil || !bytes.Equal(back.Text(), text) {
			t.Fatalf("%v, %q", err, text)
		}
		carried = append(carried, back)
	}
	got, err := e.Recover(carried...)
	if err != nil || got.String() != key.String() {
		t.Fatalf("not the key: %v", err)
	}
	other := mustNew(t, key, g)
	if _, err := other.Recover(carried...); err == nil || !strings.Contains(err.Error(), "share is of escrow") {
		t.Errorf("shares of another escrow: %v", err)
	}
	carried[1].value[7] ^= 1
	if _, err := e.Recover(carried...); err == nil || !strings.Contains(err.Error(), "do not fit together") {
		t.Errorf("a damaged share: %v", err)
	}
	carried[0].Wipe()
	if !bytes.Equal(carried[0].value, make([]byte, secretBytes)) {
		t.Error("not wiped")
	}
}

// TestPostQuantum: age's hybrid keys are holders too.
func TestPostQuantum(t *testing.T) {
	id, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	g := group{policy: Policy{Holders: []Holder{{"vendor", id.Recipient().String()}}, Threshold: 1}, identities: []age.Identity{id}}
	e, err := Parse(mustNew(t, key, g).Marshal())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := e.Recover(g.open(t, e, 0)...); err != nil || got.String() != key.String() {
		t.Errorf("not the key: %v", err)
	}
}

// TestAttacks are files that must not be taken.
func TestAttacks(t *testing.T) {
	g, key := newGroup(t, 2, 3), newKey(t)
	good := mustNew(t, key, g)
	other := mustNew(t, key, newGroup(t, 2, 3))
	edit := func(change func(e *Escrow)) []byte {
		e, err := decode(good.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		change(e)
		return e.Marshal()
	}
	text := string(good.Marshal())
	for _, tt := range []struct {
		name string
		file []byte
		want string
	}{
		{"empty", nil, "JSON"},
		{"garbage", []byte("<html>"), "JSON"},
		{"truncated", []byte(text[:len(text)/2]), "JSON"},
		{"huge", bytes.Repeat([]byte(" "), MaxBytes+1), "more than"},
		{"reformatted", []byte(strings.ReplaceAll(text, "  ", "\t")), "one form"},
		{"trailing text", []byte(text + "{}"), "one form"},
		{"field twice", []byte(strings.Replace(text, `"format": 1,`, `"format": 1, "format": 1,`, 1)), "one form"},
		{"field in capitals", []byte(strings.Replace(text, `"box"`, `"Box"`, 1)), "one form"},
		{"unknown field", []byte(strings.Replace(text, `"format": 1,`, `"format": 1, "note": "",`, 1)), "unknown field"},
		{"another type", edit(func(e *Escrow) { e.Type = receiptType }), "type"},
		{"a later format", edit(func(e *Escrow) { e.Format = 2 }), "format 2"},
		{"another signature scheme", edit(func(e *Escrow) { e.Signature.Scheme = "none" }), "scheme"},
		{"no signature", edit(func(e *Escrow) { e.Signature.Value = nil }), "signature"},
		{"signed by another key", edit(func(e *Escrow) { e.Signature.PublicKey = other.Signature.PublicKey }), "signature is not right"},
		{"another box", edit(func(e *Escrow) { e.Box, e.Volumes = other.Volumes[1], other.Volumes[1:] }), "signature is not right"},
		{"box that is none of the volumes", edit(func(e *Escrow) { e.Box = other.Volumes[1] }), "UUIDs"},
		{"raised serial number", edit(func(e *Escrow) { e.Serial = 2 }), "signature is not right"},
		{"serial number 0", edit(func(e *Escrow) { e.Serial = 0 }), "serial"},
		{"lowered threshold", edit(func(e *Escrow) { e.Threshold = 1 }), "signature is not right"},
		{"threshold above the holders", edit(func(e *Escrow) { e.Threshold = 4 }), "4 holders are needed of 3"},
		{"a holder's share for another's", edit(func(e *Escrow) { e.Shares[0].Age = e.Shares[1].Age }), "signature is not right"},
		{"a share of another escrow", edit(func(e *Escrow) { e.Shares[0] = other.Shares[0] }), "signature is not right"},
		{"no shares", edit(func(e *Escrow) { e.Shares = nil }), "1 to 16 holders"},
		{"one holder as two, by key", edit(func(e *Escrow) { e.Shares[1].Recipient = e.Shares[0].Recipient }), "twice"},
		{"one holder as two, by name", edit(func(e *Escrow) { e.Shares[1].Name = e.Shares[0].Name }), "twice"},
		{"too many holders", edit(func(e *Escrow) { e.Shares = append(make([]SealedShare, MaxHolders), e.Shares...) }), "no age file"},
		{"a share that is no age file", edit(func(e *Escrow) { e.Shares[0].Age = []byte("key") }), "no age file"},
		{"a time with fractions", edit(func(e *Escrow) { e.Time = e.Time.Add(1) }), "whole seconds"},
		{"a product with an escape sequence", edit(func(e *Escrow) { e.Product = "\x1b[2J" }), "product"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := Parse(tt.file)
			if err == nil || !strings.Contains(err.Error(), tt.want) || e != nil {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
	t.Run("somebody else's key", func(t *testing.T) {
		if s, err := good.Open(newGroup(t, 1, 1).identities...); err == nil || !strings.Contains(err.Error(), "holder-1, holder-2, holder-3") {
			t.Errorf("%v, %v", s, err)
		}
		if _, err := good.Open(); err == nil {
			t.Error("no key opens")
		}
	})
	t.Run("a box's false share", func(t *testing.T) {
		// Signed by the box, and nonsense inside: the holder is told.
		for _, plain := range []string{"", "holdfast-share-1", strings.Repeat("x", 5000), string(g.open(t, good, 1)[0].Text())} {
			sealed, err := encrypt(g.policy.Holders[0], []byte(plain))
			if err != nil {
				t.Fatal(err)
			}
			bad := *good
			bad.Shares = append([]SealedShare{{g.policy.Holders[0], sealed}}, good.Shares[1:]...)
			if _, err := bad.Open(g.identities[0]); err == nil || !strings.Contains(err.Error(), "share of holder-1") {
				t.Errorf("%.20q: %v", plain, err)
			}
		}
	})
}

// TestSameBox: what a later escrow of a box must agree with.
func TestSameBox(t *testing.T) {
	g, key, box := newGroup(t, 1, 1), newKey(t), boxKey(t)
	escrow := func(s Subject, k ed25519.PrivateKey) *Escrow {
		e, err := New(key, s, g.policy, k, rand.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	first, second := escrow(subject(1), box), escrow(subject(2), box)
	moved := subject(2)
	moved.Box, moved.Volumes = moved.Volumes[1], moved.Volumes[1:]
	if err := second.SameBox(first); err != nil {
		t.Error(err)
	}
	for want, err := range map[string]error{
		"older than": first.SameBox(second), "not signed by the key": escrow(subject(2), boxKey(t)).SameBox(first),
		"of box": escrow(moved, box).SameBox(first),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// TestBadPolicies cannot be made.
func TestBadPolicies(t *testing.T) {
	g := newGroup(t, 1, 2)
	for want, p := range map[string]Policy{
		"1 to 16 holders, not 0":                  {Threshold: 1},
		"0 holders are needed of 2":               {Holders: g.policy.Holders},
		"is not 1 to 32 of the letters":           {Holders: []Holder{{"A Person", g.policy.Holders[0].Recipient}}, Threshold: 1},
		"holder a: \"age1xyz\" is not the public": {Holders: []Holder{{"a", "age1xyz"}}, Threshold: 1},
		"holder b: \"AGE-SECRET":                  {Holders: []Holder{{"b", "AGE-SECRET-KEY-1"}}, Threshold: 1},
		"holder c: ":                              {Holders: []Holder{{"c", g.policy.Holders[0].Recipient + "\n"}}, Threshold: 1},
		"more than 4096":                          {Holders: []Holder{{"d", strings.Repeat("x", 5000)}}, Threshold: 1},
	} {
		if _, err := New(newKey(t), subject(1), p, boxKey(t), rand.Reader, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(newKey(t), subject(1), g.policy, other, rand.Reader, nil); err == nil || !strings.Contains(err.Error(), "Ed25519") {
		t.Error(err)
	}
}

// TestSecretsStayOut: no error or log entry has a secret, and the file has none in the clear.
func TestSecretsStayOut(t *testing.T) {
	g, key := newGroup(t, 2, 2), newKey(t)
	e := mustNew(t, key, g)
	shares := g.open(t, e, 0, 1)
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "share", shares[0], "key", key)
	_, err := ParseShare(append([]byte("x"), shares[0].Text()...))
	fmt.Fprint(&log, shares[0], shares, err, string(e.Marshal()))
	for _, secret := range []string{key.String()[:8], fmt.Sprintf("%x", shares[0].value[:8]), fmt.Sprintf("%v", shares[0].value[:8])} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("%q is in %s", secret, log.String())
		}
	}
}

func TestReceipt(t *testing.T) {
	private, public, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	key, err := ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ParsePublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	g := newGroup(t, 1, 1)
	e, other := mustNew(t, newKey(t), g), mustNew(t, newKey(t), g)
	r, err := NewReceipt(e, key, made)
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseReceipt(r.Marshal(), pub)
	if err != nil {
		t.Fatal(err)
	}
	if err := back.Covers(e); err != nil {
		t.Error(err)
	}
	if err := back.Covers(other); err == nil || !strings.Contains(err.Error(), "not for") {
		t.Errorf("a receipt for another escrow: %v", err)
	}
	text := string(r.Marshal())
	sum := other.Digest()
	for name, tt := range map[string]struct{ file, want string }{
		"another digest":   {strings.Replace(text, r.SHA256, fmt.Sprintf("%x", sum), 1), "not signed by the key"},
		"another serial":   {strings.Replace(text, `"serial": 1`, `"serial": 2`, 1), "not signed by the key"},
		"an escrow":        {string(e.Marshal()[:400]), ""},
		"reformatted":      {strings.ReplaceAll(text, "\n", ""), "one form"},
		"huge":             {strings.Repeat(" ", MaxReceiptBytes+1), "more than"},
		"unsigned":         {strings.Replace(text, `"signature": "`, `"signature": "AA==`, 1), ""},
		"a later format":   {strings.Replace(text, `"format": 1`, `"format": 2`, 1), "format 2"},
		"nothing":          {"", "JSON"},
		"no receipt's key": {text, ""},
	} {
		use := pub
		if name == "no receipt's key" {
			use = nil
		}
		if _, err := ParseReceipt([]byte(tt.file), use); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseReceipt(r.Marshal(), boxKey(t).Public().(ed25519.PublicKey)); err == nil {
		t.Error("a stranger's receipt is taken")
	}
	for _, bad := range [][]byte{nil, public, append(private, "x"...)} {
		if _, err := ParsePrivateKey(bad); err == nil {
			t.Errorf("%q is a private key", bad)
		}
	}
	for _, bad := range [][]byte{nil, private, append(public, "x"...)} {
		if _, err := ParsePublicKey(bad); err == nil {
			t.Errorf("%q is a public key", bad)
		}
	}
}

// TestOpenSSLKeys: openssl's keys are ours, and ours openssl's.
func TestOpenSSLKeys(t *testing.T) {
	dir := t.TempDir()
	openssl := func(args ...string) []byte {
		t.Helper()
		if _, err := exec.LookPath("openssl"); err != nil {
			t.Fatal("openssl is not installed: apt-get install openssl")
		}
		cmd := exec.Command("openssl", args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %v: %v\n%s", args, err, out)
		}
		return out
	}
	openssl("genpkey", "-algorithm", "ed25519", "-out", "a.key")
	public, err := ParsePublicKey(openssl("pkey", "-in", "a.key", "-pubout"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "a.key"))
	if err != nil {
		t.Fatal(err)
	}
	if key, err := ParsePrivateKey(text); err != nil || !public.Equal(key.Public()) {
		t.Errorf("openssl's key: %v", err)
	}
	private, ours, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "b.key"), private, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := openssl("pkey", "-in", "b.key", "-pubout"); !bytes.Equal(got, ours) {
		t.Errorf("openssl sees the public key %s, want %s", got, ours)
	}
}

// TestReleasedFormat: files of format 1 must open for ever.
func TestReleasedFormat(t *testing.T) {
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	identities, err := age.ParseIdentities(bytes.NewReader(read("holders.key")))
	if err != nil {
		t.Fatal(err)
	}
	want := strings.TrimSpace(string(read("recovery.txt")))
	for _, name := range []string{"one.json", "two-of-three.json"} {
		e, err := Parse(read(name))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		shares, err := e.Open(identities...)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if key, err := e.Recover(shares...); err != nil || key.String() != want {
			t.Errorf("%s: not the key: %v", name, err)
		}
	}
	e, err := Parse(read("one.json"))
	if err != nil {
		t.Fatal(err)
	}
	public, err := ParsePublicKey(read("receipt.pub"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := ParseReceipt(read("receipt.json"), public)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Covers(e); err != nil {
		t.Error(err)
	}
}

func seeds(f *testing.F) {
	for _, name := range []string{"one.json", "two-of-three.json", "receipt.json"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
}

// FuzzEscrow: what is taken is written back the same, and within its limits.
func FuzzEscrow(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decode(b)
		if err != nil {
			return
		}
		if !bytes.Equal(e.Marshal(), b) || len(e.Shares) > MaxHolders || e.Threshold < 1 || e.Threshold > len(e.Shares) {
			t.Errorf("%q becomes %q", b, e.Marshal())
		}
		if whole, err := Parse(b); (err == nil) != (e.verify() == nil) || err == nil && whole.Digest() != e.Digest() {
			t.Errorf("Parse: %v, verify: %v", err, e.verify())
		}
	})
}

func FuzzReceipt(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeReceipt(b); err == nil && !bytes.Equal(r.Marshal(), b) {
			t.Errorf("%q becomes %q", b, r.Marshal())
		}
	})
}

func FuzzShare(f *testing.F) {
	f.Add((&Share{ID: strings.Repeat("a1", 16), Threshold: 2, X: 3, value: make([]byte, secretBytes)}).Text())
	f.Add([]byte("holdfast-share-1 x 1 1 00\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := ParseShare(b); err == nil && !bytes.Equal(s.Text(), b) {
			t.Errorf("%q becomes %q", b, s.Text())
		}
	})
}

// TestWriteReleasedFormat makes the files of testdata, once.
func TestWriteReleasedFormat(t *testing.T) {
	if os.Getenv("HOLDFAST_WRITE_TESTDATA") == "" {
		// The files are there; that they open is TestReleasedFormat's.
		if b, err := os.ReadFile("testdata/one.json"); err != nil || !json.Valid(b) {
			t.Fatal(err)
		}
		return
	}
	g, key, box := newGroup(t, 2, 3), newKey(t), boxKey(t)
	one := Policy{Holders: g.policy.Holders[:1], Threshold: 1}
	put := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join("testdata", name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	first, err := New(key, subject(1), one, box, rand.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	second, err := New(key, subject(2), g.policy, box, rand.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	private, public, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	receipt, err := NewReceipt(first, signer, made)
	if err != nil {
		t.Fatal(err)
	}
	var identities bytes.Buffer
	for _, id := range g.identities {
		fmt.Fprintln(&identities, id)
	}
	put("holders.key", identities.Bytes())
	put("recovery.txt", []byte(key.String()+"\n"))
	put("one.json", first.Marshal())
	put("two-of-three.json", second.Marshal())
	put("receipt.pub", public)
	put("receipt.json", receipt.Marshal())
}

func Example() {
	vendor, err := age.GenerateX25519Identity()
	if err != nil {
		fmt.Println(err)
		return
	}
	_, box, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		fmt.Println(err)
		return
	}
	key, err := luks2.GenerateRecoveryKey(rand.Reader)
	if err != nil {
		fmt.Println(err)
		return
	}
	// On the box.
	policy := Policy{Holders: []Holder{{"vendor", vendor.Recipient().String()}}, Threshold: 1}
	made, err := New(key, Subject{Box: boxUUID, Volumes: []string{boxUUID}, Product: "ledger", Release: "1.0.0", Serial: 1,
		Time: time.Unix(1795262400, 0)}, policy, box, rand.Reader, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	// At the vendor's.
	e, err := Parse(made.Marshal())
	if err != nil {
		fmt.Println(err)
		return
	}
	shares, err := e.Open(vendor)
	if err != nil {
		fmt.Println(err)
		return
	}
	back, err := e.Recover(shares...)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(e.Product, e.Release, e.Time.Format(time.DateOnly), back.String() == key.String())
	// Output: ledger 1.0.0 2026-11-21 true
}

// TestSignedByTheTPM: who keeps a record of the box knows whose escrow it is; whoever has
// the file can only take the signature off, and that is seen.
func TestSignedByTheTPM(t *testing.T) {
	tpm, g, box := sealtest.Start(t), newGroup(t, 1, 1), boxKey(t)
	endorse := func(document []byte) (*attest.Endorsement, error) { return attest.Endorse(tpm, document) }
	mustEndorse := func(serial int) *Escrow {
		t.Helper()
		e, err := New(newKey(t), subject(serial), g.policy, box, rand.Reader, endorse)
		if err != nil {
			t.Fatal(err)
		}
		if e, err = Parse(e.Marshal()); err != nil {
			t.Fatal(err)
		}
		return e
	}
	e := mustEndorse(1)
	r := &attest.Record{Box: boxUUID, AK: e.TPM.Key()}
	if err := e.By(r); err != nil {
		t.Error(err)
	}
	if err := e.By(&attest.Record{Box: strings.Replace(boxUUID, "0b7d", "0b7e", 1), AK: r.AK}); !errors.Is(err, ErrSignature) {
		t.Errorf("the record of another box: %v", err)
	}
	mixed := mustEndorse(2)
	mixed.TPM = e.TPM
	if _, err := Parse(mixed.Marshal()); !errors.Is(err, ErrSignature) {
		t.Errorf("the TPM's signature of another escrow: %v", err)
	}
	bare := *e
	bare.TPM = nil
	stripped, err := Parse(bare.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	if err := stripped.By(r); !errors.Is(err, ErrUnsigned) || errors.Is(err, ErrSignature) {
		t.Errorf("taken off: %v", err)
	}
	tpm.Swap()
	other := mustEndorse(3)
	if err := other.By(r); !errors.Is(err, ErrSignature) {
		t.Errorf("another TPM: %v", err)
	}
	if err := other.SameBox(e); err != nil {
		t.Errorf("a new mainboard under the same data volume: %v", err)
	}
	broken := errors.New("the TPM is dead")
	if _, err := New(newKey(t), subject(1), g.policy, box, rand.Reader, func([]byte) (*attest.Endorsement, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}
