package agent

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// EFIVar names a variable of the firmware.
type EFIVar struct {
	Name   string
	Vendor sigdb.GUID
}

// EFIVars is the firmware's variable store. A variable that does not exist is
// [fs.ErrNotExist], a store without room [unix.ENOSPC], a signature that the firmware
// does not take [unix.EACCES].
type EFIVars interface {
	Read(v EFIVar) (attributes uint32, value []byte, err error)
	// Write replaces the value. That of a variable with authenticated writes is what an
	// .auth file holds.
	Write(v EFIVar, attributes uint32, value []byte) error
	// Append adds to the value (EFI_VARIABLE_APPEND_WRITE).
	Append(v EFIVar, attributes uint32, value []byte) error
	List() ([]EFIVar, error)
	// FreeBytes is the room for more, -1 when the firmware does not say.
	FreeBytes() (int64, error)
}

// ErrVariables says that the firmware's variables cannot be read. Secure Boot is not
// managed then; everything else goes on (F67).
var ErrVariables = errors.New("management of Secure Boot is unavailable: the firmware's variables cannot be read")

// SecureBootState is what the firmware says of Secure Boot.
type SecureBootState struct {
	// On is the variable SecureBoot. It alone proves little: see Enforced.
	On, SetupMode, AuditMode, DeployedMode bool
	// Values are those of PK, KEK, db and dbx, empty for one that does not exist.
	Values map[string][]byte
	// Databases are the same as far as they could be read; Notes say what could not.
	Databases map[string]sigdb.Database
	Notes     []string
}

// Enforced says whether the firmware starts nothing but what its keys allow. In setup
// mode anybody may enrol keys, and in audit mode everything is started; some boards say
// that Secure Boot is on all the same (F26, F82).
func (s *SecureBootState) Enforced() bool { return s.On && !s.SetupMode && !s.AuditMode }

// Mode is the state for people.
func (s *SecureBootState) Mode() string {
	switch {
	case s.AuditMode:
		return "audit mode: nothing is refused"
	case s.SetupMode:
		return "setup mode: there is no platform key"
	case !s.On:
		return "off"
	case s.DeployedMode:
		return "on, deployed"
	}
	return "on"
}

// ReadSecureBoot reads the state. A firmware without Secure Boot has no such variables,
// and none of its modes is on; one whose variables cannot be read is [ErrVariables].
func ReadSecureBoot(vars EFIVars) (*SecureBootState, error) {
	s := &SecureBootState{Values: map[string][]byte{}, Databases: map[string]sigdb.Database{}}
	global, err := sigdb.Vendor(sigdb.PK)
	if err != nil {
		return nil, err
	}
	for _, m := range []struct {
		name string
		into *bool
	}{{"SecureBoot", &s.On}, {"SetupMode", &s.SetupMode}, {"AuditMode", &s.AuditMode}, {"DeployedMode", &s.DeployedMode}} {
		_, value, err := vars.Read(EFIVar{m.name, global})
		if err == nil && len(value) != 1 {
			err = fmt.Errorf("it has %d bytes, not 1", len(value))
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrVariables, m.name, err)
		}
		*m.into = value[0] == 1
	}
	for _, name := range []string{sigdb.PK, sigdb.KEK, sigdb.DB, sigdb.DBX} {
		if err := s.readDatabase(vars, name); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *SecureBootState) readDatabase(vars EFIVars, name string) error {
	v, err := secureBootVar(name)
	if err != nil {
		return err
	}
	_, value, err := vars.Read(v)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s: %w", ErrVariables, name, err)
	}
	s.Values[name] = append([]byte{}, value...)
	d, err := sigdb.Parse(value)
	if err == nil {
		_, err = d.Certificates() // for its notes (F25)
	}
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			s.Notes = append(s.Notes, name+": "+strings.TrimSpace(line))
		}
	}
	s.Databases[name] = d
	return nil
}

func secureBootVar(name string) (EFIVar, error) {
	vendor, err := sigdb.Vendor(name)
	return EFIVar{name, vendor}, err
}

// CheckKeys returns nil when PK, KEK and db hold the vendor's certificates (by SHA-256
// of the DER, in hex, as in [image.SecureBoot]). Keys that were enrolled and did not
// stay over a restart are missing then (F4).
func (s *SecureBootState) CheckKeys(want map[string]string) error {
	var missing []string
	for _, name := range []string{sigdb.PK, sigdb.KEK, sigdb.DB} {
		if want[name] != "" && !holdsCertificate(s.Databases[name], want[name]) {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("the vendor's key is not in the firmware's %s", strings.Join(missing, ", "))
}

func holdsCertificate(d sigdb.Database, want string) bool {
	for _, l := range d {
		for _, e := range l.Entries {
			if sum := sha256.Sum256(e.Data); l.Type == sigdb.TypeX509() && hex.EncodeToString(sum[:]) == want {
				return true
			}
		}
	}
	return false
}

// Starts returns nil when the firmware would start a release, by what its manifest says:
// a box that missed a change of keys must not install what only boxes that have it start.
func (s *SecureBootState) Starts(e image.Expected) error {
	if !s.Enforced() {
		return nil
	}
	db, dbx := s.Databases[sigdb.DB], s.Databases[sigdb.DBX]
	cert := e.DBCertificateSHA256
	if cert != "" && !holdsCertificate(db, cert) {
		return fmt.Errorf("the firmware of this box would not start it: it is signed by a key (certificate %.16s…) that is not in db; "+
			"install the release first that brings this key (secureboot.db)", cert)
	}
	if cert != "" && holdsCertificate(dbx, cert) {
		return fmt.Errorf("the firmware of this box would not start it: its key (certificate %.16s…) is revoked in dbx", cert)
	}
	for name, text := range map[string]string{"boot loader": e.LoaderAuthenticode, "kernel image": e.UKIAuthenticode} {
		if digest, err := hex.DecodeString(text); err == nil && dbx.HasData(sigdb.TypeSHA256(), digest) {
			return fmt.Errorf("the firmware of this box would not start it: its %s (%.16s…) is revoked in dbx", name, text)
		}
	}
	return nil
}

// SecureBootFor says whether a seal may rest on Secure Boot in this boot, and if not,
// or not quite, why. Keys are enrolled in a boot that ends in a restart ([Enrolment]), so
// that it is another boot that reads them back: what a firmware does not keep is never
// sealed to (F4). enrolment is what [Enrolment.Run] said in this boot.
func SecureBootFor(vars EFIVars, want image.SecureBoot, enrolment error) (on bool, why string, err error) {
	s, err := ReadSecureBoot(vars)
	if err != nil {
		return false, "", err
	}
	keys := s.CheckKeys(want.Keys)
	switch {
	case !s.Enforced() && want.Enroll == "force":
		return false, fmt.Sprintf("Secure Boot is not in force (%s), though this release enrols the vendor's keys: %s", s.Mode(), notEnrolled(s, enrolment)), nil
	case !s.Enforced():
		return false, fmt.Sprintf("Secure Boot is not in force (%s)", s.Mode()), nil
	case keys != nil:
		return true, fmt.Sprintf("Secure Boot is on with keys of somebody else, who decides what starts: %v", keys), nil
	}
	return true, "", nil
}

// notEnrolled is the cause, with what to do.
func notEnrolled(s *SecureBootState, enrolment error) string {
	switch {
	case enrolment != nil:
		return enrolment.Error()
	case s.SetupMode:
		return "the data volumes were sealed without them; they are enrolled after a factory reset"
	}
	return "that needs setup mode: clear the keys, or switch Secure Boot on, in the firmware's set-up"
}

// BootProgram is an EFI program that has to start, now or as a fallback.
type BootProgram struct {
	Name string // for people: "slot b 1.1.0", "boot loader EFI/BOOT/BOOTX64.EFI"
	File *uki.File
}

// VariableChange is one step: one variable, and what the next boot will find.
type VariableChange struct {
	image.VariableUpdate
	Auth []byte
	// Variables are the whole contents of PK, KEK, db and dbx afterwards.
	Variables map[string][]byte
	// Authorities are the SHA-256 of the certificates in db that verify each program,
	// by its Authenticode digest, now and afterwards. The firmware measures them.
	Now, Next map[pcr.Digest]pcr.Digest
}

// SecureBootKeeper brings db and dbx to what the release that runs says, one change a
// boot. Fill in the fields; call [SecureBootKeeper.Plan], and [SecureBootKeeper.Apply]
// with its change, once the release is good and no other one waits.
type SecureBootKeeper struct {
	Log  *slog.Logger
	Vars EFIVars
	// Wanted is the release's.
	Wanted image.SecureBoot
	// Load reads a file of the verified root.
	Load func(name string) ([]byte, error)
	// Programs lists all that may have to start: the boot loader, and the kernel image
	// of every slot that may boot. They are read until they are closed.
	Programs func() ([]BootProgram, io.Closer, error)
	// Seal makes the data volumes open in the next boot too, as it is and with the
	// variables of the change. It is called before the change, and once more when the
	// firmware made something else of it.
	Seal func(VariableChange) error
}

// SecureBootPlan is what there is to do.
type SecureBootPlan struct {
	State *SecureBootState
	// Change is the next step, nil when there is none.
	Change *VariableChange
	// Blocked says, in sentences, which changes are wanted and cannot be made now.
	Blocked []string
}

// Plan reads the variables and finds the first change that is not there yet. It writes
// nothing. A change that would keep something from starting that may have to is
// blocked, by digest as well as by certificate.
func (k *SecureBootKeeper) Plan() (p SecureBootPlan, err error) {
	if p.State, err = ReadSecureBoot(k.Vars); err != nil {
		return p, err
	}
	for _, u := range k.Wanted.Updates {
		c, a, err := k.load(u)
		if err == nil && applied(p.State, u, a) {
			continue
		}
		if err == nil {
			err = k.check(p.State, c, a)
		}
		if err != nil {
			p.Blocked = append(p.Blocked, fmt.Sprintf("the change of %s that this release brings is not made: %v", u.Variable, err))
			continue
		}
		if p.Change == nil {
			p.Change = c
		}
	}
	return p, nil
}

func (k *SecureBootKeeper) load(u image.VariableUpdate) (*VariableChange, *sigdb.Auth, error) {
	b, err := k.Load(u.File)
	if err != nil {
		return nil, nil, err
	}
	a, err := sigdb.ParseAuth(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", u.File, err)
	}
	return &VariableChange{VariableUpdate: u, Auth: b}, a, nil
}

// applied says whether the variable has what the update brings.
func applied(s *SecureBootState, u image.VariableUpdate, a *sigdb.Auth) bool {
	if u.Append {
		return s.Databases[u.Variable].Covers(a.Content)
	}
	return s.Databases[u.Variable].Same(a.Content)
}

// check says why a change cannot be made, and completes it otherwise.
func (k *SecureBootKeeper) check(s *SecureBootState, c *VariableChange, a *sigdb.Auth) error {
	if !s.Enforced() {
		return fmt.Errorf("the firmware does not enforce Secure Boot (%s)", s.Mode())
	}
	keks, _ := s.Databases[sigdb.KEK].Certificates() // odd ones are in the state's notes
	if err := a.VerifiedBy(c.Variable, c.Append, keks...); err != nil {
		return fmt.Errorf("no key in this box's KEK has signed it: %w", err)
	}
	after, err := pcr.VariableAfter(s.Values[c.Variable], c.Auth, c.Append)
	if err != nil {
		return err
	}
	c.Variables = map[string][]byte{}
	for name, value := range s.Values {
		c.Variables[name] = value
	}
	c.Variables[c.Variable] = after
	if err := k.checkPrograms(s, c); err != nil {
		return err
	}
	return checkRoom(k.Vars, len(after)-len(s.Values[c.Variable])+len(c.Auth)+variableOverhead)
}

// checkPrograms has every program judged by the databases to be.
func (k *SecureBootKeeper) checkPrograms(s *SecureBootState, c *VariableChange) error {
	programs, closer, err := k.Programs()
	if err != nil {
		return fmt.Errorf("whether everything would still start cannot be said: %w", err)
	}
	defer closer.Close()
	if len(programs) == 0 {
		return errors.New("whether everything would still start cannot be said: no program was found")
	}
	db, err := sigdb.Parse(c.Variables[sigdb.DB])
	if err != nil {
		return fmt.Errorf("db: %w", err)
	}
	dbx, err := sigdb.Parse(c.Variables[sigdb.DBX])
	if err != nil {
		return fmt.Errorf("dbx: %w", err)
	}
	c.Now, c.Next = map[pcr.Digest]pcr.Digest{}, map[pcr.Digest]pcr.Digest{}
	var refused []error
	for _, p := range programs {
		if err := p.File.Allowed(db, dbx); err != nil {
			refused = append(refused, fmt.Errorf("%s would not start any more: %w", p.Name, err))
			continue
		}
		digest, err := p.File.Authenticode()
		if err != nil {
			return fmt.Errorf("%s: %w", p.Name, err)
		}
		for _, of := range []struct {
			db   sigdb.Database
			into map[pcr.Digest]pcr.Digest
		}{{s.Databases[sigdb.DB], c.Now}, {db, c.Next}} {
			cert, err := p.File.Authority(of.db)
			if err != nil {
				return fmt.Errorf("%s: %w", p.Name, err)
			}
			if cert != nil {
				of.into[digest] = fingerprint(cert)
			}
		}
	}
	if len(refused) > 0 {
		return fmt.Errorf("%w; it is made once another release is in its place", errors.Join(refused...))
	}
	return nil
}

func fingerprint(c *x509.Certificate) pcr.Digest { return sha256.Sum256(c.Raw) }

// variableOverhead is what a store needs beside the value, generously.
const variableOverhead = 1 << 10

// checkRoom refuses a write that would fill the store (F65). Firmware that does not say
// how much room there is finds out by itself.
func checkRoom(vars EFIVars, bytes int) error {
	free, err := vars.FreeBytes()
	if err != nil || free < 0 || free >= int64(bytes) {
		return nil
	}
	return noRoom(vars, bytes, unix.ENOSPC)
}

// noRoom says what was too much for the store, and what fills it, as far as that is known.
func noRoom(vars EFIVars, bytes int, err error) error {
	size := fmt.Sprintf("%d bytes are needed", bytes)
	if free, err := vars.FreeBytes(); err == nil && free >= 0 {
		size = fmt.Sprintf("%d bytes are free, %s", free, size)
	}
	dumps := 0
	if list, err := vars.List(); err == nil {
		for _, v := range list {
			if strings.HasPrefix(v.Name, "dump-type") {
				dumps++
			}
		}
	}
	remedy := "restoring the defaults in the firmware's set-up empties it"
	if dumps > 0 {
		remedy = fmt.Sprintf("%d variables in it are crash dumps of a kernel (dump-type…), which may be deleted", dumps)
	}
	return fmt.Errorf("the firmware's variable store is full: %s: %w; %s", size, err, remedy)
}

// Apply makes a change that Plan has found: seals for it, writes, and reads back. The
// change is in force from the next boot on, whose registers differ. After an error the
// variable is as it was, unless the error says otherwise.
func (k *SecureBootKeeper) Apply(ctx context.Context, c VariableChange) error {
	if err := k.Seal(c); err != nil {
		return fmt.Errorf("%s is not changed, since the data volumes might not open afterwards: %w", c.Variable, err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	v, err := secureBootVar(c.Variable)
	if err != nil {
		return err
	}
	write := k.Vars.Write
	if c.Append {
		write = k.Vars.Append
	}
	err = write(v, sigdb.Attributes, c.Auth)
	switch {
	case errors.Is(err, unix.ENOSPC):
		return noRoom(k.Vars, len(c.Auth), err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("the firmware refuses the change of %s: %w; it was not signed by a key of its KEK, or is older than what it has", c.Variable, err)
	case err != nil:
		return fmt.Errorf("change %s: %w", c.Variable, err)
	}
	return k.readBack(v, c)
}

// readBack seals once more when the firmware made other bytes of the update than was
// predicted, which some do: the next boot measures those.
func (k *SecureBootKeeper) readBack(v EFIVar, c VariableChange) error {
	_, value, err := k.Vars.Read(v)
	if err != nil {
		return fmt.Errorf("%s was changed and cannot be read back: %w", c.Variable, err)
	}
	if string(value) == string(c.Variables[c.Variable]) {
		k.Log.Info("Secure Boot database changed", "variable", c.Variable, "bytes", len(value))
		return nil
	}
	k.Log.Warn("the firmware made another value of the change than was predicted", "variable", c.Variable, "bytes", len(value), "predicted", len(c.Variables[c.Variable]))
	c.Variables[c.Variable] = value
	if err := k.Seal(c); err != nil {
		return fmt.Errorf("%s was changed, to another value than was predicted, and the data volumes may need the recovery key after the next start: %w", c.Variable, err)
	}
	return nil
}

// SecureBootStatus is what status shows of the firmware's keys.
type SecureBootStatus struct {
	// Mode is "on", "off" or what else the firmware says; "unavailable" when it says nothing.
	Mode string `json:"mode"`
	// Keys are, by variable, what it holds, a line each.
	Keys map[string][]string `json:"keys,omitempty"`
	// Vendor says that PK, KEK and db hold the vendor's keys.
	Vendor bool `json:"vendor"`
	// Pending is the change that the next boot will find made, or that waits.
	Pending  string   `json:"pending,omitempty"`
	Problems []string `json:"problems,omitempty"`
	Notes    []string `json:"notes,omitempty"` // oddities of the firmware's
}

// Status describes the plan, or the error that Plan gave.
func (k *SecureBootKeeper) Status(p SecureBootPlan, err error) *SecureBootStatus {
	if p.State == nil {
		return &SecureBootStatus{Mode: "unavailable", Problems: []string{fmt.Sprint(err)}}
	}
	s := &SecureBootStatus{Mode: p.State.Mode(), Keys: map[string][]string{}, Problems: p.Blocked, Notes: p.State.Notes}
	for name, d := range p.State.Databases {
		s.Keys[name] = d.Describe()
	}
	if err := p.State.CheckKeys(k.Wanted.Keys); err == nil {
		s.Vendor = true
	} else if p.State.Enforced() {
		s.Problems = append(s.Problems, err.Error())
	}
	if p.Change != nil {
		s.Pending = "a change of " + p.Change.Variable
	}
	return s
}

// Print writes what a person wants to know at a glance.
func (s *SecureBootStatus) Print(w io.Writer) error {
	var b strings.Builder
	s.lines(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

func (s *SecureBootStatus) lines(w io.Writer) {
	whose := "keys of somebody else"
	if s.Vendor {
		whose = "the vendor's keys"
	}
	fmt.Fprintf(w, "firmware  Secure Boot %s, %s\n", s.Mode, whose)
	if s.Pending != "" {
		fmt.Fprintf(w, "firmware  %s is pending\n", s.Pending)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "firmware  %s\n", printable(p))
	}
}
