// Package sigdb reads and writes the databases that decide in UEFI Secure Boot
// (the variables PK, KEK, db and dbx), and the signed updates that change them
// (.auth files).
//
// [Parse] reads a variable's value and [Database.Marshal] writes one; [Hashes]
// and [Certificate] make lists to revoke or to trust. [ParseAuth] reads an
// update, [Auth.VerifiedBy] says for which change it was signed.
//
// The subset: EFI_SIGNATURE_LIST (UEFI 2.10 §32.4.1) of any type, kept byte for
// byte, and EFI_VARIABLE_AUTHENTICATION_2 (§8.2.2). What an entry of an unknown
// type means is not judged.
//
// What this does not protect: a database is only read here. Entries that are no
// valid certificates are common in factory databases (F25); they are kept and
// never make a database unreadable. Dates are not looked at (F90).
package sigdb

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"
)

// The variables of Secure Boot, UEFI 2.10 §32.3.
const (
	PK  = "PK"
	KEK = "KEK"
	DB  = "db"
	DBX = "dbx"
)

// MaxBytes bounds a database. The largest dbx in the field has 24 KB, and
// firmware takes 32 to 64 KB.
const MaxBytes = 512 << 10

// GUID is in the mixed-endian form of UEFI: the first three fields are little-endian.
type GUID [16]byte

// FromUUID changes the byte order.
func FromUUID(id uuid.UUID) GUID {
	return GUID{id[3], id[2], id[1], id[0], id[5], id[4], id[7], id[6],
		id[8], id[9], id[10], id[11], id[12], id[13], id[14], id[15]}
}

func (g GUID) String() string { return uuid.UUID(FromUUID(uuid.UUID(g))).String() }

func guid(text string) GUID { return FromUUID(uuid.MustParse(text)) }

// Vendor is the name space of a Secure Boot variable (UEFI 2.10 §3.3, §32.6.1).
func Vendor(variable string) (GUID, error) {
	switch variable {
	case PK, KEK:
		return guid("8be4df61-93ca-11d2-aa0d-00e098032b8c"), nil
	case DB, DBX:
		return guid("d719b2cb-3d3a-4596-a3bc-dad00e67656f"), nil
	}
	return GUID{}, fmt.Errorf("no Secure Boot variable %q; there are %s, %s, %s and %s", variable, PK, KEK, DB, DBX)
}

// Types of signatures, UEFI 2.10 §32.4.1.

// TypeX509 is a certificate in DER.
func TypeX509() GUID { return guid("a5c059a1-94e4-4aa7-87b5-ab155c2bf072") }

// TypeSHA256 is the Authenticode digest of a program.
func TypeSHA256() GUID { return guid("c1c41626-504c-4092-aca9-41f936934328") }

// TypeX509SHA256 is the SHA-256 of a certificate's signed part, and a time of revocation.
func TypeX509SHA256() GUID { return guid("3bd2a492-96c0-4079-b420-fcf98ef103ed") }

// List is one EFI_SIGNATURE_LIST.
type List struct {
	Type   GUID
	Header []byte // empty for all types there are
	// EntryBytes is SignatureSize: of each entry, with its owner.
	EntryBytes uint32
	Entries    []Entry
}

// Entry is one EFI_SIGNATURE_DATA.
type Entry struct {
	Owner GUID
	Data  []byte
}

// Database is the value of PK, KEK, db or dbx. The zero value is an empty one.
type Database []List

const (
	listHeaderBytes = 28
	ownerBytes      = 16
)

// listHeader is the fixed part of EFI_SIGNATURE_LIST.
type listHeader struct {
	SignatureType       GUID
	SignatureListSize   uint32
	SignatureHeaderSize uint32
	SignatureSize       uint32
}

// Parse reads a database. When it ends in something that is no list, what came
// before is returned with the error, for those who can use it.
func Parse(b []byte) (Database, error) {
	if len(b) > MaxBytes {
		return nil, fmt.Errorf("signature database of %d bytes, allowed are %d", len(b), MaxBytes)
	}
	var d Database
	for at := 0; at < len(b); {
		l, size, err := parseList(b[at:])
		if err != nil {
			return d, fmt.Errorf("signature list %d at byte %d: %w", len(d)+1, at, err)
		}
		d, at = append(d, l), at+size
	}
	return d, nil
}

func parseList(b []byte) (l List, size int, err error) {
	var h listHeader
	if _, err := binary.Decode(b, binary.LittleEndian, &h); err != nil {
		return l, 0, fmt.Errorf("%d bytes are too few for its header", len(b))
	}
	total, header, entry := int64(h.SignatureListSize), int64(h.SignatureHeaderSize), int64(h.SignatureSize)
	entries := total - listHeaderBytes - header
	switch {
	case total > int64(len(b)) || entries < 0:
		return l, 0, fmt.Errorf("size %d with a header of %d does not fit in the %d bytes left", total, header, len(b))
	case entry < ownerBytes || entries%entry != 0:
		return l, 0, fmt.Errorf("%d bytes are not a number of signatures of %d bytes each", entries, entry)
	}
	l = List{Type: h.SignatureType, Header: bytes.Clone(b[listHeaderBytes : listHeaderBytes+header]), EntryBytes: h.SignatureSize}
	for rest := b[listHeaderBytes+header : total]; len(rest) > 0; rest = rest[entry:] {
		l.Entries = append(l.Entries, Entry{GUID(rest[:ownerBytes]), bytes.Clone(rest[ownerBytes:entry])})
	}
	return l, int(total), nil
}

// Marshal gives the bytes that Parse reads.
func (d Database) Marshal() []byte {
	var b []byte
	for _, l := range d {
		size := listHeaderBytes + len(l.Header) + len(l.Entries)*int(l.EntryBytes)
		b, _ = binary.Append(b, binary.LittleEndian, listHeader{l.Type, uint32(size), uint32(len(l.Header)), l.EntryBytes}) // of fixed size: no error
		b = append(b, l.Header...)
		for _, e := range l.Entries {
			b = append(append(b, e.Owner[:]...), e.Data...)
		}
	}
	return b
}

// Certificate is a list with one certificate.
func Certificate(cert *x509.Certificate, owner GUID) List {
	return List{Type: TypeX509(), EntryBytes: uint32(ownerBytes + len(cert.Raw)), Entries: []Entry{{owner, cert.Raw}}}
}

// Hashes is a list of Authenticode digests, sorted, each once.
func Hashes(digests [][32]byte, owner GUID) List {
	l := List{Type: TypeSHA256(), EntryBytes: ownerBytes + sha256.Size}
	sorted := slices.SortedFunc(slices.Values(digests), func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) })
	for _, digest := range slices.Compact(sorted) {
		l.Entries = append(l.Entries, Entry{owner, digest[:]})
	}
	return l
}

// HasData says whether a signature of that type is in the database, whoever owns it.
func (d Database) HasData(kind GUID, data []byte) bool {
	for _, l := range d {
		if l.Type == kind && slices.ContainsFunc(l.Entries, func(e Entry) bool { return bytes.Equal(e.Data, data) }) {
			return true
		}
	}
	return false
}

// Covers says whether every signature of other is in the database.
func (d Database) Covers(other Database) bool {
	for _, l := range other {
		for _, e := range l.Entries {
			if !d.HasData(l.Type, e.Data) {
				return false
			}
		}
	}
	return true
}

// Same says whether both hold the same signatures, in whatever order and lists.
func (d Database) Same(other Database) bool { return d.Covers(other) && other.Covers(d) }

// Certificates lists the certificates that can be read, and says what it could
// not read. Factory databases have some with negative serial numbers and worse (F25).
func (d Database) Certificates() (certs []*x509.Certificate, odd error) {
	var all []error
	for i, l := range d {
		if l.Type != TypeX509() {
			continue
		}
		for _, e := range l.Entries {
			cert, err := x509.ParseCertificate(e.Data)
			if err != nil {
				all = append(all, fmt.Errorf("signature list %d: certificate of %d bytes is passed over: %w", i+1, len(e.Data), err))
				continue
			}
			certs = append(certs, cert)
		}
	}
	return certs, errors.Join(all...)
}

// Describe says in a line for each list what it holds.
func (d Database) Describe() []string {
	var lines []string
	hashes := 0
	for _, l := range d {
		switch l.Type {
		case TypeSHA256():
			hashes += len(l.Entries)
		case TypeX509():
			for _, e := range l.Entries {
				lines = append(lines, describeCertificate(e.Data))
			}
		case TypeX509SHA256():
			lines = append(lines, fmt.Sprintf("%d certificates by their SHA-256", len(l.Entries)))
		default:
			lines = append(lines, fmt.Sprintf("%d signatures of type %v", len(l.Entries), l.Type))
		}
	}
	if hashes > 0 {
		lines = append(lines, fmt.Sprintf("%d programs by their SHA-256", hashes))
	}
	return lines
}

func describeCertificate(der []byte) string {
	sum := sha256.Sum256(der)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Sprintf("a certificate that is not well-formed (SHA-256 %x)", sum[:8])
	}
	return fmt.Sprintf("certificate %q (SHA-256 %x)", cert.Subject.CommonName, sum[:8])
}
