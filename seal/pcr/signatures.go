package pcr

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
)

// Signature is an entry of db, dbx, KEK or PK: an EFI_SIGNATURE_DATA with the type
// of its list. UEFI 2.10 §32.4.1.
type Signature struct {
	Type, Owner [16]byte // GUIDs, as they are stored
	Data        []byte
}

// Signatures are the entries of such a variable, in order. No certificate is parsed:
// firmware makers put there what X.509 does not allow (F25).
func Signatures(variable []byte) ([]Signature, error) {
	lists, err := parseSignatureLists(variable)
	if err != nil {
		return nil, err
	}
	var all []Signature
	for _, l := range lists {
		for _, s := range l.Signatures {
			all = append(all, Signature{l.Type, [16]byte(s), s[ownerBytes:]})
		}
	}
	return all, nil
}

// Authority is the entry that an EV_EFI_VARIABLE_AUTHORITY record names, and the
// variable it is in. The record does not tell the entry's type. PFP §10.4.1.
func (e Event) Authority() (variable string, s Signature, ok bool) {
	name, data, ok := e.Variable()
	if !ok || e.Type != EventVariableAuthority || len(data) <= ownerBytes {
		return "", Signature{}, false
	}
	return name, Signature{Owner: [16]byte(data), Data: data[ownerBytes:]}, true
}

// Trusted says whether the event's data is what was measured: its digest is that of
// the data. It is not so for programs and firmware volumes, whose digest is that of
// what was started, and not where firmware measures otherwise than it logs.
func (e Event) Trusted() bool { return hashesItsData(e) }

// Same says whether two entries mean the same, whoever put them there.
func (s Signature) Same(o Signature) bool { return s.Type == o.Type && bytes.Equal(s.Data, o.Data) }

// String names the entry: "certificate CN=…, sha256 12ab34cd…".
func (s Signature) String() string {
	if s.Type == typeSHA256 && len(s.Data) == sha256.Size {
		return fmt.Sprintf("digest %x…", s.Data[:8])
	}
	sum := sha256.Sum256(s.Data)
	c, err := x509.ParseCertificate(s.Data)
	if err != nil {
		return fmt.Sprintf("entry of %d bytes, sha256 %x…", len(s.Data), sum[:8])
	}
	return fmt.Sprintf("certificate %s, sha256 %x…", printable(c.Subject.String()), sum[:8])
}
