package attest

import (
	"fmt"
	"strings"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// pcr7 is what the records of PCR 7 say.
type pcr7 struct {
	variables   map[string][]byte
	authorities []authority
	actions     []string
	// odd are records that cannot be judged.
	odd []string
}

// authority is an entry that verified a program.
type authority struct {
	variable string
	entry    pcr.Signature
	event    pcr.Event
}

// readPCR7 takes the records apart. What counts is only what was really hashed (F21,
// F25); a record whose digest is not that of its data proves nothing.
func readPCR7(events []pcr.Event) pcr7 {
	s := pcr7{variables: map[string][]byte{}}
	for _, e := range events {
		name, data, isVariable := e.Variable()
		variable, entry, isAuthority := e.Authority()
		_, twice := s.variables[name]
		switch {
		case !e.Trusted():
			s.odd = append(s.odd, e.Describe()+", which measures something else than it logs")
		case e.Type == pcr.EventSeparator && (string(e.Data) == "\x00\x00\x00\x00" || string(e.Data) == "\xff\xff\xff\xff"):
		case e.Type == pcr.EventVariableDriverConfig && isVariable && !twice:
			s.variables[name] = data
		case isAuthority:
			s.authorities = append(s.authorities, authority{variable, entry, e})
		case e.Type == pcr.EventEFIAction:
			s.actions = append(s.actions, strings.TrimRight(string(e.Data), "\x00"))
		default:
			s.odd = append(s.odd, e.Describe())
		}
	}
	return s
}

// secureBoot judges PCR 7, in three checks.
func (w *verification) secureBoot() {
	if !w.explained[7] {
		for _, name := range []string{CheckSecureBoot, CheckKeys, CheckDBX} {
			w.unknown(name, "the log does not lead to PCR 7")
		}
		return
	}
	s := readPCR7(w.log.Of(7))
	w.secureBootState(s)
	w.secureBootKeys(s)
	w.revocations(s)
}

// secureBootState: SecureBoot, PK and the modes together (F26). UEFI 2.10 §32.3.
func (w *verification) secureBootState(s pcr7) {
	for _, a := range s.actions {
		w.fail(CheckSecureBoot, fmt.Sprintf("the firmware has measured %.80q", a), "action in PCR 7",
			"A debugger may be attached, or protection against DMA is off: who has the hardware has the memory.")
		return
	}
	state, known := s.variables["SecureBoot"]
	if !known {
		w.unknown(CheckSecureBoot, "the log has no record of the variable SecureBoot")
		return
	}
	on := len(state) == 1 && state[0] == 1
	if audit := s.variables["AuditMode"]; len(audit) == 1 && audit[0] == 1 {
		on = false // everything starts, and is only noted
	}
	if len(s.variables["PK"]) == 0 {
		on = false // setup mode
	}
	switch {
	case !on && w.p.NoSecureBoot:
		w.pass(CheckSecureBoot, "Secure Boot is off, which is allowed")
	case !on:
		w.fail(CheckSecureBoot, "Secure Boot is off, in setup mode or in audit mode", "variables SecureBoot, PK, AuditMode in PCR 7",
			"The firmware starts what it is given. Innocent: it was never switched on. Hostile: it was switched off to start something else.")
	default:
		w.pass(CheckSecureBoot, "Secure Boot is on")
	}
}

// database is the content of one variable, or else why it cannot be told.
func (s pcr7) database(name string) ([]pcr.Signature, error) {
	if len(s.odd) > 0 {
		return nil, fmt.Errorf("PCR 7 has records that cannot be judged: %s", strings.Join(s.odd, "; "))
	}
	data, ok := s.variables[name]
	if !ok {
		return nil, fmt.Errorf("the log has no record of the variable %s", name)
	}
	entries, err := pcr.Signatures(data)
	if err != nil {
		return nil, fmt.Errorf("the variable %s: %w", name, err)
	}
	return entries, nil
}

// secureBootKeys: PK and KEK and db are the vendor's and no others, and what verified a
// program is of the vendor's db.
func (w *verification) secureBootKeys(s pcr7) {
	k := w.p.Keys
	if k == nil {
		w.unknown(CheckKeys, "no keys are given to compare with")
		return
	}
	for _, v := range []struct {
		name    string
		allowed []pcr.Signature
	}{{"PK", k.pk}, {"KEK", k.kek}, {"db", k.db}} {
		has, err := s.database(v.name)
		if err != nil {
			w.unknown(CheckKeys, "%v", err)
			return
		}
		if len(has) == 0 && len(v.allowed) > 0 {
			w.fail(CheckKeys, v.name+" is empty", v.name, "Innocent: the vendor's keys were never enrolled, or the firmware was reset. Hostile: they were deleted. Without a PK anybody can enrol keys.")
			return
		}
		if extra := without(has, v.allowed); len(extra) > 0 && len(v.allowed) > 0 {
			w.fail(CheckKeys, fmt.Sprintf("%s has %d entries that are not the vendor's", v.name, len(extra)), v.name+": "+extra[0].String(),
				"Innocent: the hardware maker's keys were left in. Hostile: somebody added a key, and what it signs starts.")
			return
		}
	}
	for _, a := range s.authorities {
		if a.variable != "db" || !hasData(k.db, a.entry.Data) {
			w.fail(CheckKeys, "a program was verified by an entry that is not in the vendor's db", a.variable+": "+a.entry.String(), "A program of others was started.")
			return
		}
	}
	w.pass(CheckKeys, "db has the vendor's keys only")
}

// revocations: dbx has what it must. What the vendor demands of every box ([NewKeys]),
// and what the release demands that the record names, must be there; what the release
// demands that runs comes into dbx only some boots after its first, and until it does,
// the check is unknown.
func (w *verification) revocations(s pcr7) {
	has, err := s.database("dbx")
	if err != nil {
		w.unknown(CheckDBX, "%v", err)
		return
	}
	var must []pcr.Signature
	if w.p.Keys != nil {
		must = w.p.Keys.dbx
	}
	if missing := without(must, has); len(missing) > 0 {
		w.fail(CheckDBX, fmt.Sprintf("dbx lacks %d of the %d entries that every box must have", len(missing), len(must)), "dbx: "+missing[0].String(),
			"Innocent: the box has not taken the revocations yet. Hostile: they were removed, and what they revoke starts.")
		return
	}
	if r := w.revoked(); r != nil {
		if missing := without(r.DBX, has); len(missing) > 0 {
			w.fail(CheckDBX, fmt.Sprintf("dbx lacks %d of the %d entries of release %s, and had them", len(missing), len(r.DBX), r.Version), "dbx: "+missing[0].String(),
				"Innocent: the firmware was reset to its factory settings, and the box adds them again. Hostile: they were removed, and what they revoke starts.")
			return
		}
	}
	if !w.matched {
		w.unknown(CheckDBX, "it is not known which release runs, nor what it demands in dbx")
		return
	}
	if missing := without(w.reference.DBX, has); len(missing) > 0 {
		w.unknown(CheckDBX, "pending: dbx lacks %d of the %d entries that release %s brings, the first of them %v; a box adds them once it keeps the release, and shows them behind the next start",
			len(missing), len(w.reference.DBX), w.reference.Version, missing[0])
		return
	}
	w.pass(CheckDBX, "dbx has all that is demanded: %d entries of every box, %d of this release", len(must), len(w.reference.DBX))
}

// revoked is the release whose entries the box was seen with; nil where there is none.
func (w *verification) revoked() *Reference {
	if w.p.Known == nil || w.p.Known.Revocations == "" {
		return nil
	}
	for i, r := range w.p.References {
		if r.Version == w.p.Known.Revocations && (r.Product == "" || r.Product == w.p.Known.Product) {
			return &w.p.References[i]
		}
	}
	return nil
}

// without are the entries of list that are not in taken.
func without(list, taken []pcr.Signature) (rest []pcr.Signature) {
	const by = 16 // from here on a map is faster
	if len(list) < by || len(taken) < by {
		for _, s := range list {
			if !hasSignature(taken, s) {
				rest = append(rest, s)
			}
		}
		return rest
	}
	known := make(map[string]bool, len(taken))
	for _, s := range taken {
		known[string(s.Type[:])+string(s.Data)] = true
	}
	for _, s := range list {
		if !known[string(s.Type[:])+string(s.Data)] {
			rest = append(rest, s)
		}
	}
	return rest
}

func hasSignature(list []pcr.Signature, s pcr.Signature) bool {
	for _, o := range list {
		if o.Same(s) {
			return true
		}
	}
	return false
}

func hasData(list []pcr.Signature, data []byte) bool {
	for _, o := range list {
		if string(o.Data) == string(data) {
			return true
		}
	}
	return false
}
