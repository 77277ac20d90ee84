package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/sigdb"
	imagetree "github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
)

// firmware is a variable store with the rules of EDK2's AuthVariableLib: signatures by
// the right key, stamps that rise, additions without what is there already.
type firmware struct {
	values map[string][]byte // PK, KEK, db, dbx and the modes, by name
	stamps map[string]time.Time
	others []EFIVar
	free   int64            // -1: it does not say
	broken map[string]error // by name, for reads
	full   bool
	room   int // so many writes, when not 0
	// rewrite is what a firmware of another maker makes of a value.
	rewrite func(value []byte) []byte
	writes  []string
}

func (f *firmware) Read(v EFIVar) (uint32, []byte, error) {
	if err := f.broken[v.Name]; err != nil {
		return 0, nil, err
	}
	value, ok := f.values[v.Name]
	if !ok {
		return 0, nil, fmt.Errorf("%s: %w", v.Name, fs.ErrNotExist)
	}
	return sigdb.Attributes, bytes.Clone(value), nil
}

func (f *firmware) Write(v EFIVar, attributes uint32, value []byte) error {
	return f.set(v, attributes, value)
}

func (f *firmware) Append(v EFIVar, attributes uint32, value []byte) error {
	return f.set(v, attributes|sigdb.AppendWrite, value)
}

func (f *firmware) set(v EFIVar, attributes uint32, value []byte) error {
	if vendor, err := sigdb.Vendor(v.Name); err != nil || vendor != v.Vendor || attributes&^sigdb.AppendWrite != sigdb.Attributes {
		return unix.EINVAL
	}
	a, err := sigdb.ParseAuth(value)
	if err != nil {
		return unix.EINVAL
	}
	appends := attributes&sigdb.AppendWrite != 0
	if f.values["SetupMode"][0] == 0 {
		signers := map[string]string{"PK": "PK", "KEK": "PK", "db": "KEK", "dbx": "KEK"}
		d, err := sigdb.Parse(f.values[signers[v.Name]])
		if err != nil {
			return unix.EIO
		}
		certs, _ := d.Certificates()
		if a.VerifiedBy(v.Name, appends, certs...) != nil || !appends && !a.Time.After(f.stamps[v.Name]) {
			return unix.EACCES
		}
	}
	if f.full || f.room > 0 && len(f.writes) >= f.room {
		return unix.ENOSPC
	}
	next := a.Content
	if appends {
		if next, err = sigdb.Parse(f.values[v.Name]); err != nil {
			return unix.EIO
		}
		next = addMissing(next, a.Content)
	}
	f.values[v.Name] = next.Marshal()
	if f.rewrite != nil {
		f.values[v.Name] = f.rewrite(f.values[v.Name])
	}
	if a.Time.After(f.stamps[v.Name]) {
		f.stamps[v.Name] = a.Time
	}
	f.writes = append(f.writes, v.Name)
	return nil
}

// addMissing is EDK2's FilterSignatureList: what is there already, with its owner, is left out.
func addMissing(have, more sigdb.Database) sigdb.Database {
	out := slices.Clone(have)
	for _, l := range more {
		l.Entries = slices.DeleteFunc(slices.Clone(l.Entries), func(e sigdb.Entry) bool {
			return slices.ContainsFunc(have, func(h sigdb.List) bool {
				return h.Type == l.Type && slices.ContainsFunc(h.Entries, func(o sigdb.Entry) bool {
					return o.Owner == e.Owner && bytes.Equal(o.Data, e.Data)
				})
			})
		})
		if len(l.Entries) > 0 {
			out = append(out, l)
		}
	}
	return out
}

func (f *firmware) List() ([]EFIVar, error)   { return f.others, nil }
func (f *firmware) FreeBytes() (int64, error) { return f.free, nil }

// signers are two vendors, made once: keys take long.
var signers = sync.OnceValues(func() (two [2]*keys.Keys, err error) {
	for i := range two {
		dir, err := os.MkdirTemp("", "keys")
		if err != nil {
			return two, err
		}
		defer os.RemoveAll(dir)
		two[i], err = keys.Create(filepath.Join(dir, "keys"), keys.Config{Organization: fmt.Sprint("Vendor ", i), Now: today.Add(-time.Hour)})
		if err != nil {
			return two, err
		}
	}
	return two, nil
})

func vendors(t *testing.T) (ours, theirs *keys.Keys) {
	t.Helper()
	two, err := signers()
	if err != nil {
		t.Fatal(err)
	}
	return two[0], two[1]
}

// enrolled is a box that left the factory with the vendor's keys.
func enrolled(t *testing.T, k *keys.Keys) *firmware {
	t.Helper()
	f := &firmware{free: -1, stamps: map[string]time.Time{}, broken: map[string]error{}, values: map[string][]byte{
		"SecureBoot": {1}, "SetupMode": {0}, "AuditMode": {0}, "DeployedMode": {0},
	}}
	for _, name := range []string{keys.PK, keys.KEK, keys.DB} {
		b, err := k.SignatureList(name)
		if err != nil {
			t.Fatal(err)
		}
		f.values[name], f.stamps[name] = b, today.Add(-time.Hour)
	}
	return f
}

// signedProgram is a boot loader with so many more bytes at its end, so that no two are
// the same, signed by the keys.
func signedProgram(t *testing.T, tail string, pairs ...keys.Pair) (content []byte, digest [32]byte) {
	t.Helper()
	const path = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%s not installed: apt-get install systemd-boot-efi", path)
	}
	b = append(b, make([]byte, 64)...)
	copy(b[len(b)-64:], tail)
	var blob uki.Blob = imagetree.Bytes(b)
	for _, p := range pairs {
		if blob, err = uki.Sign(blob, p.Key, p.Cert); err != nil {
			t.Fatal(err)
		}
	}
	r, err := blob.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if content, err = io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	f, err := uki.Parse(bytes.NewReader(content), int64(len(content)))
	if err == nil {
		digest, err = f.Authenticode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return content, digest
}

// keysBox is a box whose release brings changes of its keys.
type keysBox struct {
	*SecureBootKeeper
	t        *testing.T
	fw       *firmware
	ours     *keys.Keys
	files    map[string][]byte
	programs map[string][]byte
	sealed   []VariableChange
	refuse   error // what Seal says
}

func newKeysBox(t *testing.T) *keysBox {
	ours, _ := vendors(t)
	b := &keysBox{t: t, fw: enrolled(t, ours), ours: ours, files: map[string][]byte{}, programs: map[string][]byte{}}
	for _, name := range []string{"the boot loader", "release 1.1.0 in slot b", "release 1.0.0 in slot a"} {
		b.programs[name], _ = signedProgram(t, name, ours.DB)
	}
	b.SecureBootKeeper = &SecureBootKeeper{
		Log: slog.New(slog.DiscardHandler), Vars: b.fw, Wanted: image.SecureBoot{Keys: certificatesOf(ours)},
		Load: func(name string) ([]byte, error) {
			if f, ok := b.files[name]; ok {
				return f, nil
			}
			return nil, fs.ErrNotExist
		},
		Programs: func() (list []BootProgram, _ io.Closer, err error) {
			for _, name := range slices.Sorted(maps.Keys(b.programs)) {
				f, err := uki.Parse(bytes.NewReader(b.programs[name]), int64(len(b.programs[name])))
				if err != nil {
					return nil, nil, err
				}
				list = append(list, BootProgram{Name: name, File: f})
			}
			return list, io.NopCloser(nil), nil
		},
		Seal: func(c VariableChange) error {
			c.Variables = maps.Clone(c.Variables)
			b.sealed = append(b.sealed, c)
			return b.refuse
		},
	}
	return b
}

func certificatesOf(k *keys.Keys) map[string]string {
	m := map[string]string{}
	for name, p := range map[string]keys.Pair{"PK": k.PK, "KEK": k.KEK, "db": k.DB} {
		sum := sha256.Sum256(p.Cert.Raw)
		m[name] = hex.EncodeToString(sum[:])
	}
	return m
}

// brings adds a change to the release.
func (b *keysBox) brings(variable string, appends bool, auth []byte) {
	name := fmt.Sprintf("%s/%s-%d", image.SecureBootFolder, variable, len(b.files))
	b.files[name] = auth
	b.Wanted.Updates = append(b.Wanted.Updates, image.VariableUpdate{Variable: variable, Append: appends, File: name})
}

func (b *keysBox) revokes(r keys.Revocation) {
	b.t.Helper()
	auth, err := b.ours.Revoke(r, today)
	if err != nil {
		b.t.Fatal(err)
	}
	b.brings(sigdb.DBX, true, auth)
}

func (b *keysBox) plan() SecureBootPlan {
	b.t.Helper()
	p, err := b.Plan()
	if err != nil {
		b.t.Fatal(err)
	}
	return p
}

// step makes the next change, and wants it to be of that variable.
func (b *keysBox) step(variable string) VariableChange {
	b.t.Helper()
	p := b.plan()
	if p.Change == nil || p.Change.Variable != variable || len(p.Blocked) > 0 {
		b.t.Fatalf("planned: %+v, blocked %v; want %s", p.Change, p.Blocked, variable)
	}
	if err := b.Apply(context.Background(), *p.Change); err != nil {
		b.t.Fatal(err)
	}
	if got := b.fw.values[variable]; !bytes.Equal(got, p.Change.Variables[variable]) {
		b.t.Errorf("%s has %d bytes, %d were predicted", variable, len(got), len(p.Change.Variables[variable]))
	}
	return *p.Change
}

// blocked wants no change, and a sentence with these words.
func (b *keysBox) blocked(name string, words ...string) {
	b.t.Helper()
	p := b.plan()
	if p.Change != nil || len(p.Blocked) != 1 || len(b.fw.writes) > 0 {
		b.t.Errorf("%s: planned %+v, blocked %v, written %v", name, p.Change, p.Blocked, b.fw.writes)
		return
	}
	for _, w := range words {
		if !strings.Contains(p.Blocked[0], w) {
			b.t.Errorf("%s: %q does not say %q", name, p.Blocked[0], w)
		}
	}
}

// TestChangesOfKeys: one change a boot, each sealed for before it is written; a box that
// has them makes none.
func TestChangesOfKeys(t *testing.T) {
	b := newKeysBox(t)
	_, old := signedProgram(t, "release 0.9.0", b.ours.DB)
	b.brings(sigdb.DB, true, b.ours.DBNext.Auth)
	b.revokes(keys.Revocation{Digests: [][32]byte{old}})
	b.step(sigdb.DB)
	b.step(sigdb.DBX)
	if p := b.plan(); p.Change != nil || len(p.Blocked) > 0 {
		t.Errorf("a third: %+v, %v", p.Change, p.Blocked)
	}
	if len(b.sealed) != 2 || !slices.Equal(b.fw.writes, []string{"db", "dbx"}) {
		t.Errorf("sealed %d times, written %v", len(b.sealed), b.fw.writes)
	}
	db, err := sigdb.Parse(b.sealed[1].Variables["db"])
	if err != nil || !db.HasData(sigdb.TypeX509(), b.ours.DBNext.Cert.Raw) || len(b.sealed[1].Variables) != 4 || b.sealed[0].Variables["dbx"] == nil {
		t.Errorf("sealed for %v, %v", db.Describe(), err)
	}
	// What this was about.
	content, _ := signedProgram(t, "release 0.9.0", b.ours.DB)
	f, err := uki.Parse(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	if s, err := ReadSecureBoot(b.fw); err != nil || !errors.Is(f.Allowed(s.Databases["db"], s.Databases["dbx"]), uki.ErrForbidden) {
		t.Errorf("the old release starts: %v", err)
	}
	status := b.Status(b.plan(), nil)
	if status.Mode != "on" || !status.Vendor || status.Pending != "" || len(status.Keys["dbx"]) != 1 || len(status.Problems) > 0 {
		t.Errorf("status %+v", status)
	}
}

// TestRotationOfKeys: the old certificate goes once nothing that may start needs it, and
// the authorities that the firmware measures are told.
func TestRotationOfKeys(t *testing.T) {
	b := newKeysBox(t)
	b.brings(sigdb.DB, true, b.ours.DBNext.Auth)
	b.step(sigdb.DB)
	b.fw.writes = nil
	replace, err := sigdb.Sign(sigdb.DB, sigdb.Database{sigdb.Certificate(b.ours.DBNext.Cert, sigdb.GUID{})}, false, b.ours.KEK.Key, b.ours.KEK.Cert, today)
	if err != nil {
		t.Fatal(err)
	}
	b.Wanted.Updates = nil
	b.brings(sigdb.DB, false, replace)
	b.blocked("both slots are signed by the old key", "release 1.0.0 in slot a", "release 1.1.0 in slot b", "the boot loader")
	for _, name := range []string{"the boot loader", "release 1.1.0 in slot b"} {
		b.programs[name], _ = signedProgram(t, name, b.ours.DBNext)
	}
	b.blocked("the other slot is", "release 1.0.0 in slot a would not start any more", "once another release is in its place")
	var digest [32]byte
	b.programs["release 1.0.0 in slot a"], digest = signedProgram(t, "both", b.ours.DB, b.ours.DBNext)
	c := b.step(sigdb.DB)
	if c.Now[digest] != fingerprint(b.ours.DB.Cert) || c.Next[digest] != fingerprint(b.ours.DBNext.Cert) || len(c.Next) != 3 {
		t.Errorf("authorities %x, then %x", c.Now, c.Next)
	}
	if s, err := ReadSecureBoot(b.fw); err != nil || len(s.Databases["db"]) != 1 || s.Databases["db"].HasData(sigdb.TypeX509(), b.ours.DB.Cert.Raw) {
		t.Errorf("db still has the old certificate: %v, %v", s.Databases["db"].Describe(), err)
	}
	// Played again, an older value is refused by the firmware: its stamp does not rise.
	b.Wanted.Updates = nil
	b.brings(sigdb.DB, false, b.ours.DB.Auth)
	for name := range b.programs {
		b.programs[name], _ = signedProgram(t, name, b.ours.DB)
	}
	p := b.plan()
	if p.Change == nil {
		t.Fatalf("blocked %v", p.Blocked)
	}
	if err := b.Apply(context.Background(), *p.Change); !errors.Is(err, unix.EACCES) {
		t.Errorf("a replayed db: %v", err)
	}
}

// TestChangesThatKill: what would keep the release that runs, or the one to fall back to,
// from starting is not written.
func TestChangesThatKill(t *testing.T) {
	ours, theirs := vendors(t)
	for _, name := range []string{"the boot loader", "release 1.1.0 in slot b", "release 1.0.0 in slot a"} {
		b := newKeysBox(t)
		_, digest := signedProgram(t, name, ours.DB)
		b.revokes(keys.Revocation{Digests: [][32]byte{{1}, digest}})
		b.blocked(name+" by digest", name+" would not start any more", "forbidden by dbx", "dbx that this release brings")
	}
	b := newKeysBox(t)
	// Not by our tool, which refuses to make it.
	auth, err := sigdb.Sign(sigdb.DBX, sigdb.Database{sigdb.Certificate(ours.DB.Cert, sigdb.GUID{})}, true, ours.KEK.Key, ours.KEK.Cert, today)
	if err != nil {
		t.Fatal(err)
	}
	b.brings(sigdb.DBX, true, auth)
	b.blocked("the certificate of all", `certificate "Vendor 0 signature key"`)
	b = newKeysBox(t)
	b.programs["release 1.0.0 in slot a"], _ = signedProgram(t, "a", ours.DB, theirs.DB)
	b.revokes(keys.Revocation{Certificates: []*x509.Certificate{theirs.DB.Cert}})
	b.blocked("one of two signers", "release 1.0.0 in slot a")
	b = newKeysBox(t)
	b.revokes(keys.Revocation{Digests: [][32]byte{{1}}})
	b.Programs = func() ([]BootProgram, io.Closer, error) { return nil, nil, errors.New("ESP unreadable") }
	b.blocked("programs that cannot be read", "cannot be said", "ESP unreadable")
	b.Programs = func() ([]BootProgram, io.Closer, error) { return nil, io.NopCloser(nil), nil }
	b.blocked("no programs", "cannot be said")
}

// TestChangesInOddStates: only a firmware that enforces the vendor's keys is changed.
func TestChangesInOddStates(t *testing.T) {
	for name, modes := range map[string]map[string]byte{
		"off":            {"SecureBoot": 0},
		"setup mode":     {"SecureBoot": 0, "SetupMode": 1},
		"on, and setup":  {"SetupMode": 1}, // F26
		"on, and audit":  {"AuditMode": 1},
		"nothing at all": {"SecureBoot": 2},
	} {
		b := newKeysBox(t)
		for m, v := range modes {
			b.fw.values[m] = []byte{v}
		}
		b.revokes(keys.Revocation{Digests: [][32]byte{{1}}})
		b.blocked(name, "does not enforce Secure Boot")
	}
	_, theirs := vendors(t)
	b := newKeysBox(t)
	b.fw.values["KEK"], _ = theirs.SignatureList(keys.KEK)
	b.revokes(keys.Revocation{Digests: [][32]byte{{1}}})
	b.blocked("another vendor's KEK", "no key in this box's KEK")
	if s := b.Status(b.plan(), nil); s.Vendor || !strings.Contains(fmt.Sprint(s.Problems), "not in the firmware's KEK") {
		t.Errorf("status %+v", s)
	}
	// Deployed is as good as on, and a firmware before UEFI 2.5 has neither mode.
	b = newKeysBox(t)
	b.fw.values["DeployedMode"] = []byte{1}
	delete(b.fw.values, "AuditMode")
	b.revokes(keys.Revocation{Digests: [][32]byte{{1}}})
	b.step(sigdb.DBX)
}

// TestOddCertificates (F25): entries that are no certificates are noted and in nobody's way.
func TestOddCertificates(t *testing.T) {
	b := newKeysBox(t)
	odd := sigdb.Database{{Type: sigdb.TypeX509(), EntryBytes: 16 + 5, Entries: []sigdb.Entry{{Data: []byte("\x30\x03\x02\x01\xff")}}}}.Marshal()
	for _, name := range []string{"KEK", "db"} {
		b.fw.values[name] = slices.Concat(odd, b.fw.values[name])
	}
	b.fw.values["dbx"] = odd
	b.revokes(keys.Revocation{Digests: [][32]byte{{1}}})
	b.step(sigdb.DBX)
	if s := b.Status(b.plan(), nil); len(s.Notes) != 3 || !strings.Contains(s.Notes[0], "passed over") || !s.Vendor {
		t.Errorf("status %+v", s)
	}
}

// TestVariablesUnreadable (F67): no error but that Secure Boot is not managed.
func TestVariablesUnreadable(t *testing.T) {
	for _, name := range []string{"SecureBoot", "AuditMode", "db", "dbx"} {
		b := newKeysBox(t)
		b.fw.broken[name] = unix.EIO
		p, err := b.Plan()
		if !errors.Is(err, ErrVariables) || !strings.Contains(err.Error(), "unavailable") || !strings.Contains(err.Error(), name) || p.Change != nil {
			t.Errorf("%s: %v", name, err)
		}
		if s := b.Status(p, err); s.Mode != "unavailable" || len(s.Problems) != 1 {
			t.Errorf("status %+v", s)
		}
		if on, why, err := SecureBootFor(b.fw, b.Wanted, nil); on || why != "" || !errors.Is(err, ErrVariables) {
			t.Errorf("%s: on %v, %q, %v", name, on, why, err)
		}
	}
	b := newKeysBox(t)
	b.fw.values["SetupMode"] = nil
	if _, err := b.Plan(); !errors.Is(err, ErrVariables) {
		t.Errorf("no bytes: %v", err)
	}
}

// TestNoRoom (F65): a full store is said, with what fills it, and nothing is sealed for.
func TestNoRoom(t *testing.T) {
	b := newKeysBox(t)
	b.fw.others = []EFIVar{{Name: "dump-type0-1-1-1700000000-C"}, {Name: "Boot0000"}, {Name: "dump-type0-2-1-1700000000-C"}}
	b.revokes(keys.Revocation{Digests: [][32]byte{{1}}})
	b.fw.free = 1000
	b.blocked("the firmware says", "full: 1000 bytes are free", "2 variables in it are crash dumps")
	b.fw.free, b.fw.full, b.fw.others = -1, true, nil
	err := b.Apply(context.Background(), *b.plan().Change)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "restoring the defaults") {
		t.Errorf("the write says: %v", err)
	}
	if b.plan().Change == nil {
		t.Error("it is not tried again")
	}
}

// TestSealComesFirst: no change without a seal for it, and a second one when the firmware
// made another value than was predicted.
func TestSealComesFirst(t *testing.T) {
	b := newKeysBox(t)
	b.revokes(keys.Revocation{Digests: [][32]byte{{1}}})
	b.refuse = errors.New("PCR 7 is not predictable")
	err := b.Apply(context.Background(), *b.plan().Change)
	if err == nil || !strings.Contains(err.Error(), "dbx is not changed") || len(b.fw.writes) > 0 {
		t.Errorf("%v, written %v", err, b.fw.writes)
	}
	b.refuse = nil
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.Apply(ctx, *b.plan().Change); !errors.Is(err, context.Canceled) || len(b.fw.writes) > 0 {
		t.Errorf("on the way down: %v, written %v", err, b.fw.writes)
	}
	b.sealed = nil
	other := sigdb.Database{sigdb.Hashes([][32]byte{{1}}, sigdb.GUID{9})}.Marshal() // another owner
	b.fw.rewrite = func([]byte) []byte { return other }
	if err := b.Apply(context.Background(), *b.plan().Change); err != nil || len(b.sealed) != 2 || !bytes.Equal(b.sealed[1].Variables["dbx"], other) {
		t.Errorf("%v, sealed %d times", err, len(b.sealed))
	}
	if p := b.plan(); p.Change != nil {
		t.Error("it is in force, and planned again")
	}
}

// TestEnrolmentIsReadBack (F4): a seal rests on Secure Boot only in a boot that reads the
// keys back.
func TestEnrolmentIsReadBack(t *testing.T) {
	ours, theirs := vendors(t)
	want := image.SecureBoot{Enroll: "force", Keys: certificatesOf(ours)}
	kept := enrolled(t, ours)
	if on, why, err := SecureBootFor(kept, want, nil); err != nil || !on || why != "" {
		t.Errorf("kept: %v, %q", on, why)
	}
	foreign := enrolled(t, theirs)
	if on, why, err := SecureBootFor(foreign, want, nil); err != nil || !on || !strings.Contains(why, "somebody else") || !strings.Contains(why, "PK, KEK, db") {
		t.Errorf("another vendor's: %v, %q", on, why)
	}
	const sealed, off = "the data volumes were sealed without them", "that needs setup mode: "
	for name, c := range map[string]struct {
		change func(*firmware)
		cause  string
	}{
		"keys vanished": {func(f *firmware) {
			for _, v := range []string{"PK", "KEK", "db"} {
				delete(f.values, v)
			}
			f.values["SecureBoot"], f.values["SetupMode"] = []byte{0}, []byte{1}
		}, sealed},
		"says it is on without keys": {func(f *firmware) { f.values["SetupMode"] = []byte{1} }, sealed},
		"audit":                      {func(f *firmware) { f.values["AuditMode"] = []byte{1} }, off},
		"never heard of it":          {func(f *firmware) { f.values = map[string][]byte{} }, off},
	} {
		f := enrolled(t, ours)
		c.change(f)
		if on, why, err := SecureBootFor(f, want, errors.New("the cause")); err != nil || on || !strings.Contains(why, "keys: the cause") {
			t.Errorf("%s, with a cause: %v, %q", name, on, why)
		}
		if on, why, err := SecureBootFor(f, want, nil); err != nil || on || !strings.Contains(why, c.cause) {
			t.Errorf("%s: %v, %q", name, on, why)
		}
		if on, why, err := SecureBootFor(f, image.SecureBoot{}, nil); err != nil || on || strings.Contains(why, "restart") || why == "" {
			t.Errorf("%s, nothing to enrol: %v, %q", name, on, why)
		}
	}
}

// TestReleaseOfUnknownKeys: a box that missed a change of keys does not install what only
// boxes that have it start.
func TestReleaseOfUnknownKeys(t *testing.T) {
	ours, theirs := vendors(t)
	sum := func(c *x509.Certificate) string { d := fingerprint(c); return hex.EncodeToString(d[:]) }
	digest := strings.Repeat("ab", 32)
	raw, err := hex.DecodeString(digest)
	if err != nil {
		t.Fatal(err)
	}
	fw := enrolled(t, ours)
	fw.values["dbx"] = sigdb.Database{sigdb.Hashes([][32]byte{[32]byte(raw)}, sigdb.GUID{}), sigdb.Certificate(theirs.DB.Cert, sigdb.GUID{})}.Marshal()
	db, err := ours.SignatureList(keys.DB)
	if err != nil {
		t.Fatal(err)
	}
	fw.values["db"] = append(db, sigdb.Database{sigdb.Certificate(theirs.DB.Cert, sigdb.GUID{})}.Marshal()...)
	for want, e := range map[string]image.Expected{
		"":                           {DBCertificateSHA256: sum(ours.DB.Cert), UKIAuthenticode: strings.Repeat("cd", 32)},
		"that is not in db":          {DBCertificateSHA256: sum(ours.DBNext.Cert)},
		"its key (certificate":       {DBCertificateSHA256: sum(theirs.DB.Cert)},
		"its kernel image (abababab": {DBCertificateSHA256: sum(ours.DB.Cert), UKIAuthenticode: digest},
		"its boot loader (abababab":  {LoaderAuthenticode: digest},
	} {
		s, err := ReadSecureBoot(fw)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Starts(e); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		s.On = false
		if err := s.Starts(e); err != nil {
			t.Errorf("with Secure Boot off: %v", err)
		}
	}
	if s, err := ReadSecureBoot(fw); err != nil || s.Starts(image.Expected{}) != nil {
		t.Error("a release that says nothing, from before, is refused")
	}
}

// TestBootPrograms: those on a disk that may have to start, and not a slot that is bad.
func TestBootPrograms(t *testing.T) {
	ours, _ := vendors(t)
	v := newVendor(t, "1.0.0")
	loader, _ := signedProgram(t, "loader", ours.DB)
	releaseOf := func(version string) partition.Contents {
		r := makeRelease(t, version, releaseOptions{})
		kernel, digest := signedProgram(t, version, ours.DB)
		return partition.Contents{
			Root: partition.Bytes(r.root), UKI: partition.Bytes(kernel), Loader: partition.Bytes(loader),
			RootHash: r.Verity.RootHash, Version: version, Title: version, ReleaseID: hex.EncodeToString(digest[:]),
		}
	}
	disk, err := partition.Open(v.newDisk("1.0.0"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bootPrograms(disk, partition.SlotA); err == nil {
		t.Error("programs that are none were read")
	}
	write := func(slot partition.Slot, version string, tries int) {
		t.Helper()
		o := partition.WriteOptions{Tries: tries, Running: slot.Other(), Time: today}
		if err := disk.WriteSlot(context.Background(), slot, releaseOf(version), o, nil); err != nil {
			t.Fatal(err)
		}
	}
	names := func() string {
		t.Helper()
		list, err := bootPrograms(disk, partition.SlotB)
		if err != nil {
			t.Fatal(err)
		}
		var text []string
		for _, p := range list {
			text = append(text, p.Name)
			if _, err := p.File.Authenticode(); err != nil {
				t.Errorf("%s: %v", p.Name, err)
			}
		}
		return strings.Join(text, "; ")
	}
	write(partition.SlotB, "1.1.0", 0)
	write(partition.SlotA, "1.2.0", 1)
	// A slot whose tries are used up does not boot, whatever its release is.
	before := names()
	for _, e := range entriesOf(t, disk) {
		if e.Slot == partition.SlotA {
			device, esp, err := disk.Partition(partition.ESPName)
			if err != nil {
				t.Fatal(err)
			}
			files, err := fat32.Open(device, esp.SizeBytes)
			if err != nil {
				t.Fatal(err)
			}
			stem, _, _ := strings.Cut(e.FileName, "+")
			if err := files.Rename("loader/entries/"+e.FileName, "loader/entries/"+stem+"+0-1.conf"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := names(); strings.Contains(got, "slot a") || !strings.Contains(got, "slot b") {
		t.Errorf("with a bad slot: %s", got)
	}
	const loaders = "the boot loader EFI/BOOT/BOOTX64.EFI; the boot loader EFI/systemd/systemd-bootx64.efi; "
	if !strings.HasPrefix(before, loaders) || !strings.Contains(before, "release 1.1.0 in slot b") || !strings.Contains(before, "release 1.2.0 in slot a") {
		t.Errorf("programs: %s", before)
	}
}

func entriesOf(t *testing.T, disk *partition.Disk) []partition.Entry {
	t.Helper()
	entries, err := disk.Entries()
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// TestEFIVarFS: the kernel's form of variables, on any file system.
func TestEFIVarFS(t *testing.T) {
	vars := efivarfs{t.TempDir()}
	vendor, err := sigdb.Vendor(sigdb.DBX)
	if err != nil {
		t.Fatal(err)
	}
	v := EFIVar{sigdb.DBX, vendor}
	if _, _, err := vars.Read(v); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none there: %v", err)
	}
	if err := vars.Append(v, sigdb.Attributes, []byte("value")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(vars.dir, "dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f")
	if b, err := os.ReadFile(path); err != nil || string(b) != "\x67\x00\x00\x00value" {
		t.Errorf("written %q, %v", b, err)
	}
	if attributes, value, err := vars.Read(v); err != nil || attributes != sigdb.Attributes|sigdb.AppendWrite || string(value) != "value" {
		t.Errorf("read %#x %q, %v", attributes, value, err)
	}
	if err := vars.Write(v, sigdb.Attributes, []byte("other")); err != nil {
		t.Fatal(err)
	}
	putFile(t, filepath.Join(vars.dir, "Boot0000-8be4df61-93ca-11d2-aa0d-00e098032b8c"), nil)
	putFile(t, filepath.Join(vars.dir, "no variable"), nil)
	list, err := vars.List()
	if err != nil || len(list) != 2 || !slices.Contains(list, v) {
		t.Errorf("listed %v, %v", list, err)
	}
	if _, _, err := vars.Read(list[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an empty one: %v", err)
	}
	putFile(t, path, []byte("abc"))
	if _, _, err := vars.Read(v); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("one without attributes: %v", err)
	}
	putFile(t, path, make([]byte, maxVariableBytes+5))
	if _, _, err := vars.Read(v); err == nil {
		t.Error("a huge one was read")
	}
	if free, err := vars.FreeBytes(); err != nil || free <= 0 {
		t.Errorf("%d bytes free, %v", free, err)
	}
	none := efivarfs{filepath.Join(t.TempDir(), "none")}
	if err := none.Write(v, sigdb.Attributes, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file system: %v", err)
	}
	if _, err := none.FreeBytes(); err == nil {
		t.Error("room where there is no file system")
	}
}
