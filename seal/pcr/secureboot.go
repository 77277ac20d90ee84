package pcr

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// secureBootVariables are what [Change.Variables] may name.
func secureBootVariables() []string { return []string{"PK", "KEK", "db", "dbx"} }

// secureBoot puts the new variables and the entries of db that will verify the next
// release in the place of the present ones in the records of PCR 7.
func (w *prediction) secureBoot(events []Event) ([]Event, error) {
	for name := range w.change.Variables {
		if !slices.Contains(secureBootVariables(), name) {
			return nil, fmt.Errorf("a new content of the variable %q is given, of which it is not known how the firmware measures it", name)
		}
	}
	present, err := measuredVariables(events)
	if err != nil {
		return nil, err
	}
	next := maps.Clone(present)
	maps.Copy(next, w.change.Variables)
	on, err := secureBootStays(present, next)
	if err != nil {
		return nil, err
	}
	for i, e := range events {
		name, data, ok := e.Variable()
		if !ok || e.Type != EventVariableDriverConfig || !slices.Contains(secureBootVariables(), name) || bytes.Equal(data, next[name]) {
			continue
		}
		events[i] = withVariable(e, next[name])
	}
	sameLists := bytes.Equal(present["db"], next["db"]) && bytes.Equal(present["dbx"], next["dbx"])
	if !on || sameLists && w.change.Running.Loader == w.change.Next.Loader && w.change.Running.UKI == w.change.Next.UKI {
		return events, nil // what verifies stays, however odd the firmware's lists are (F25)
	}
	lists := map[string][]signatureList{}
	for name, b := range map[string][]byte{"present db": present["db"], "db of the next boot": next["db"], "dbx of the next boot": next["dbx"]} {
		if lists[name], err = parseSignatureLists(b); err != nil {
			return nil, fmt.Errorf("the %s: %w", name, err)
		}
	}
	if err := w.notRevoked(lists["dbx of the next boot"], lists["db of the next boot"]); err != nil {
		return nil, err
	}
	if w.sameCertificates() && bytes.Equal(present["db"], next["db"]) {
		return events, nil
	}
	return w.authorities(events, lists["present db"], lists["db of the next boot"])
}

// measuredVariables are the contents of the Secure Boot variables at the present
// boot. Each must be there once, and measured with all of its record.
func measuredVariables(events []Event) (map[string][]byte, error) {
	values := map[string][]byte{}
	for _, e := range events {
		name, data, ok := e.Variable()
		if !ok || e.Type != EventVariableDriverConfig {
			continue
		}
		if name != "SecureBoot" && !slices.Contains(secureBootVariables(), name) {
			continue
		}
		if _, twice := values[name]; twice {
			return nil, fmt.Errorf("the log measures the variable %s twice", name)
		}
		if !hashesItsData(e) {
			return nil, fmt.Errorf("the firmware measures the variable %s otherwise than its log says", name)
		}
		values[name] = data
	}
	for _, name := range append(secureBootVariables(), "SecureBoot") {
		if _, ok := values[name]; !ok {
			return nil, fmt.Errorf("the log has no record of the variable %s", name)
		}
	}
	return values, nil
}

// hashesItsData says whether what was extended is the digest of the whole record,
// as PFP §10.4.1 has it for variables; some records hash less.
func hashesItsData(e Event) bool {
	d, ok := e.SHA256()
	return ok && d == sha256.Sum256(e.Data)
}

// secureBootStays says whether Secure Boot is on now and after the change. That it
// is switched is not predicted: what then follows depends on the firmware.
func secureBootStays(present, next map[string][]byte) (on bool, err error) {
	state := present["SecureBoot"]
	if len(state) > 1 {
		return false, fmt.Errorf("the variable SecureBoot has %d bytes, not 1", len(state))
	}
	on = len(state) == 1 && state[0] == 1
	hadPK, hasPK := len(present["PK"]) > 0, len(next["PK"]) > 0
	switch {
	case hadPK && !hasPK:
		return on, errors.New("without the platform key (PK) the firmware goes into setup mode and Secure Boot is off")
	case !hadPK && hasPK:
		return on, errors.New("a new platform key (PK) takes the firmware out of setup mode, and may switch Secure Boot on")
	}
	return on, nil
}

// withVariable is e, the record of a variable, for another content.
func withVariable(e Event, content []byte) Event {
	const fixed = 16 + 8 + 8
	name := 2 * binary.LittleEndian.Uint64(e.Data[16:]) // [Event.Variable] has checked it
	data := slices.Concat(e.Data[:24], binary.LittleEndian.AppendUint64(nil, uint64(len(content))), e.Data[fixed:fixed+name], content)
	e.Data = data
	return measured(e, sha256.Sum256(data))
}

func (w *prediction) sameCertificates() bool {
	now, next := w.change.Running, w.change.Next
	return now.Loader.Certificate == next.Loader.Certificate && now.UKI.Certificate == next.UKI.Certificate
}

// authorities replaces the records of the db entries that verified the running
// release. The firmware measures each entry once, when it first verifies an image
// (edk2; PFP §3.3.4.8), before it starts the image.
func (w *prediction) authorities(events []Event, dbNow, dbNext []signatureList) ([]Event, error) {
	now, next := w.change.Running, w.change.Next
	for _, c := range []Digest{now.Loader.Certificate, now.UKI.Certificate, next.Loader.Certificate, next.UKI.Certificate} {
		if c == (Digest{}) {
			return nil, errors.New("the certificates that verify the boot loader and the kernel image, now and next, are not all known")
		}
	}
	old, err := entriesFor(dbNow, now)
	if err != nil {
		return nil, fmt.Errorf("the present db: %w", err)
	}
	fresh, err := entriesFor(dbNext, next)
	if err != nil {
		return nil, fmt.Errorf("the db of the next boot: %w", err)
	}
	first, rest, err := w.cutAuthorities(events, old)
	if err != nil {
		return nil, err
	}
	if err := stillIn(dbNext, rest); err != nil {
		return nil, err
	}
	return placeAuthorities(rest, first, fresh)
}

// entriesFor are the entries of db that verify the release's programs, in the order
// in which the firmware needs them, each once. Of several with the same certificate
// it takes the first.
func entriesFor(db []signatureList, r Release) (entries [][]byte, err error) {
	for _, p := range r.programs() {
		entry := entryOf(db, p.Certificate)
		if entry == nil {
			return nil, fmt.Errorf("it lacks the certificate %x… that verifies the %s; the firmware would not start it", p.Certificate[:4], p.name)
		}
		if !slices.ContainsFunc(entries, func(e []byte) bool { return bytes.Equal(e, entry) }) {
			entries = append(entries, entry)
		}
	}
	return entries, nil
}

// namedProgram is one of a release's two.
type namedProgram struct {
	name string
	Program
}

func (r Release) programs() []namedProgram {
	return []namedProgram{{"boot loader", r.Loader}, {"kernel image", r.UKI}}
}

// entryOf is the first EFI_SIGNATURE_DATA with the certificate, or nil.
func entryOf(lists []signatureList, certificate Digest) []byte {
	for _, l := range lists {
		if l.Type != typeX509 {
			continue
		}
		for _, s := range l.Signatures {
			if sha256.Sum256(s[ownerBytes:]) == certificate {
				return s
			}
		}
	}
	return nil
}

// isAuthority says whether e is the record of an entry of db, and of which.
func isAuthority(e Event) (entry []byte, ok bool) {
	name, data, ok := e.Variable()
	return data, ok && e.Type == EventVariableAuthority && name == "db"
}

// cutAuthorities takes the records of the entries out and says where the first was.
// Each must be there once and in this order, and belong to a program of the running
// release.
func (w *prediction) cutAuthorities(events []Event, entries [][]byte) (first int, rest []Event, err error) {
	found := 0
	for _, e := range events {
		entry, ok := isAuthority(e)
		if !ok || !slices.ContainsFunc(entries, func(x []byte) bool { return bytes.Equal(x, entry) }) {
			rest = append(rest, e)
			continue
		}
		if found == len(entries) || !bytes.Equal(entries[found], entry) {
			return 0, nil, errors.New("the log measures the certificates of the running release in another order than the programs need them")
		}
		if !hashesItsData(e) {
			return 0, nil, errors.New("the firmware measures the certificate of the running release otherwise than its log says")
		}
		if err := w.verifiedOurs(entry); err != nil {
			return 0, nil, err
		}
		if found == 0 {
			first = len(rest)
		}
		found++
	}
	if found < len(entries) {
		return 0, nil, fmt.Errorf("the log shows %d of the %d certificates in db that verify the running release", found, len(entries))
	}
	return first, rest, nil
}

// verifiedOurs returns nil when the program that was started next after the entry was
// measured is the running release's: an option ROM that the same certificate verified
// earlier would go on doing so.
func (w *prediction) verifiedOurs(entry []byte) error {
	seen := false
	for _, e := range w.log.Events {
		if got, ok := isAuthority(e); ok && bytes.Equal(got, entry) {
			seen = true
		}
		if !seen || !isProgram(e) {
			continue
		}
		switch d, _ := e.SHA256(); d {
		case w.change.Running.Loader.Authenticode, w.change.Running.UKI.Authenticode:
			return nil
		}
		return fmt.Errorf("the certificate of the running release verified another program too: %s", e.Describe())
	}
	return errors.New("the log shows no program after the certificate of the running release")
}

// stillIn returns nil when the entries of db that verified other programs are in the
// new db.
func stillIn(db []signatureList, events []Event) error {
	for _, e := range events {
		entry, ok := isAuthority(e)
		if !ok {
			continue
		}
		if !slices.ContainsFunc(db, func(l signatureList) bool { return l.has(entry) }) {
			return errors.New("the db of the next boot lacks an entry that verified a program of others in the present boot")
		}
	}
	return nil
}

// placeAuthorities puts the entries' records where the running release's were. What
// was measured before is not measured again. It must be clear what comes before what:
// among records of others only one can be placed.
func placeAuthorities(rest []Event, first int, entries [][]byte) ([]Event, error) {
	var fresh []Event
	for _, entry := range entries {
		same := func(e Event) bool {
			got, ok := isAuthority(e)
			return ok && bytes.Equal(got, entry)
		}
		if slices.ContainsFunc(rest[:first], same) {
			continue
		}
		if slices.ContainsFunc(rest[first:], same) {
			return nil, errors.New("the certificate of the next release verified a later program of others in the present boot")
		}
		fresh = append(fresh, authorityEvent(entry))
	}
	if len(fresh) > 1 && slices.ContainsFunc(rest[first:], func(e Event) bool { return e.Type == EventVariableAuthority }) {
		return nil, errors.New("programs of others were verified among the running release's, and it is not clear in which order the next boot does")
	}
	return slices.Insert(slices.Clone(rest), first, fresh...), nil
}

// authorityEvent is the record of an entry of db. PFP §10.4.1, EV_EFI_VARIABLE_AUTHORITY.
func authorityEvent(entry []byte) Event {
	const name = "db"
	data := slices.Clone(guidImageSecurity[:])
	data = binary.LittleEndian.AppendUint64(data, uint64(len(name)))
	data = binary.LittleEndian.AppendUint64(data, uint64(len(entry)))
	for _, c := range []byte(name) {
		data = append(data, c, 0)
	}
	data = append(data, entry...)
	return measured(Event{PCR: 7, Type: EventVariableAuthority, Data: data}, sha256.Sum256(data))
}

// notRevoked returns nil when the new dbx lets the firmware start the next release.
func (w *prediction) notRevoked(dbx, db []signatureList) error {
	for _, p := range w.change.Next.programs() {
		if revokes(dbx, db, p.Program) {
			return fmt.Errorf("the revocation list (dbx) of the next boot names the %s or its certificate; the firmware would not start it", p.name)
		}
	}
	return nil
}

// revokes says whether dbx names the program or the certificate in db that verifies
// it: UEFI 2.10 §32.4.1.
func revokes(dbx, db []signatureList, p Program) bool {
	var body Digest // of the part of the certificate that is signed
	if entry := entryOf(db, p.Certificate); entry != nil {
		body = certificateBody(entry[ownerBytes:])
	}
	for _, l := range dbx {
		for _, s := range l.Signatures {
			data := s[ownerBytes:]
			switch {
			case l.Type == typeSHA256 && p.Authenticode != (Digest{}) && bytes.Equal(data, p.Authenticode[:]),
				l.Type == typeX509 && sha256.Sum256(data) == p.Certificate,
				l.Type == typeX509SHA256 && body != (Digest{}) && bytes.HasPrefix(data, body[:]):
				return true
			}
		}
	}
	return false
}
