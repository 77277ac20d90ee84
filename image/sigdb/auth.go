package sigdb

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unicode/utf16"

	"github.com/holdfast-os/holdfast/image/pkcs7"
)

// Attributes of the Secure Boot variables, UEFI 2.10 §8.2: non-volatile, boot
// and runtime access, time-based authenticated write access.
const Attributes uint32 = 0x01 | 0x02 | 0x04 | 0x20

// AppendWrite is EFI_VARIABLE_APPEND_WRITE: add to what is there. It is part of
// what is signed, so that an update for the one is none for the other.
const AppendWrite uint32 = 0x40

// WIN_CERTIFICATE, UEFI 2.10 §32.2.4.
const (
	winCertRevision    = 0x0200
	winCertTypeEFIGUID = 0x0ef1
)

func typePKCS7() GUID { return guid("4aafd29d-68df-49ee-8aa9-347d375665a7") }

// efiTime is EFI_TIME, UEFI 2.10 §8.3; for variables all but date and time is zero.
type efiTime struct {
	Year                             uint16
	Month, Day, Hour, Minute, Second uint8
	_                                [9]byte // nanosecond, time zone, daylight, padding
}

// winCertificateGUID is WIN_CERTIFICATE_UEFI_GUID.
type winCertificateGUID struct {
	Length          uint32 // of this structure and the signature
	Revision        uint16
	CertificateType uint16
	CertType        GUID
}

const (
	efiTimeBytes            = 16
	winCertificateGUIDBytes = 24
)

// Auth is a signed update of a variable. Neither the variable's name nor whether
// it is replaced or added to is in the file; both are in what was signed.
type Auth struct {
	// Time is the update's stamp. A replacement has to be later than the stamp of
	// what it replaces; firmware checks that.
	Time time.Time
	// Signature is a bare PKCS #7 SignedData.
	Signature []byte
	Content   Database

	stamp   [efiTimeBytes]byte
	content []byte
}

// ParseAuth reads an .auth file. It verifies nothing; see [Auth.VerifiedBy].
func ParseAuth(b []byte) (*Auth, error) {
	var t efiTime
	var c winCertificateGUID
	if len(b) < efiTimeBytes+winCertificateGUIDBytes || len(b) > MaxBytes {
		return nil, fmt.Errorf("%d bytes are no signed update of a variable", len(b))
	}
	if _, err := binary.Decode(b, binary.LittleEndian, &t); err != nil {
		return nil, err
	}
	if _, err := binary.Decode(b[efiTimeBytes:], binary.LittleEndian, &c); err != nil {
		return nil, err
	}
	end := int64(efiTimeBytes) + int64(c.Length)
	switch {
	case c.Revision != winCertRevision || c.CertificateType != winCertTypeEFIGUID || c.CertType != typePKCS7():
		return nil, fmt.Errorf("no signed update of a variable: certificate of revision %#x and type %#x, expected %#x and %#x (PKCS #7)",
			c.Revision, c.CertificateType, winCertRevision, winCertTypeEFIGUID)
	case c.Length < winCertificateGUIDBytes || end > int64(len(b)):
		return nil, fmt.Errorf("signed update of a variable: signature of %d bytes does not fit in %d", c.Length, len(b))
	}
	a := &Auth{
		Time:      time.Date(int(t.Year), time.Month(t.Month), int(t.Day), int(t.Hour), int(t.Minute), int(t.Second), 0, time.UTC),
		Signature: b[efiTimeBytes+winCertificateGUIDBytes : end], stamp: [efiTimeBytes]byte(b), content: b[end:],
	}
	var err error
	if a.Content, err = Parse(a.content); err != nil {
		return nil, fmt.Errorf("signed update of a variable: %w", err)
	}
	return a, nil
}

// VerifiedBy returns nil when the update is for that variable, replaces it or
// appends to it as told, and was signed with the key of one of the certificates.
func (a *Auth) VerifiedBy(variable string, appends bool, certs ...*x509.Certificate) error {
	signed, err := signedBytes(variable, appends, a.stamp, a.content)
	if err != nil {
		return err
	}
	sd, err := pkcs7.Parse(a.Signature)
	if err != nil {
		return err
	}
	var all []error
	for _, cert := range certs {
		err := sd.Verify(cert, signed)
		if err == nil {
			return nil
		}
		all = append(all, fmt.Errorf("by %q: %w", cert.Subject.CommonName, err))
	}
	return fmt.Errorf("update of %s is not signed: %w", variable, errors.Join(append(all, errors.New("it does not hold for this variable and kind of change"))...))
}

// Claims says what the update is for and who signed it, by the certificates that it
// carries itself. Whoever asks for [Auth.VerifiedBy] knows whom to trust; this does not.
func (a *Auth) Claims() (variable string, appends bool, signer *x509.Certificate, err error) {
	sd, err := pkcs7.Parse(a.Signature)
	if err != nil {
		return "", false, nil, err
	}
	for _, variable := range []string{PK, KEK, DB, DBX} {
		for _, appends := range []bool{false, true} {
			for _, c := range sd.Certificates[:min(len(sd.Certificates), maxCarried)] {
				if a.VerifiedBy(variable, appends, c) == nil {
					return variable, appends, c, nil
				}
			}
		}
	}
	return "", false, nil, errors.New("its signature holds for no change of a Secure Boot variable: damaged, or forged")
}

// maxCarried bounds the certificates of a signature that are tried.
const maxCarried = 8

// Sign makes an .auth file: content for the variable, to replace its value or to
// be appended to it, signed by key, whose certificate is cert (UEFI 2.10 §8.2.2).
// PK and KEK are signed by the platform key, db and dbx by a key exchange key.
// at counts in whole seconds of UTC. The same arguments give the same bytes.
func Sign(variable string, content Database, appends bool, key crypto.Signer, cert *x509.Certificate, at time.Time) ([]byte, error) {
	stamp, err := newStamp(at)
	if err != nil {
		return nil, fmt.Errorf("sign variable %s: %w", variable, err)
	}
	value := content.Marshal()
	signed, err := signedBytes(variable, appends, stamp, value)
	if err != nil {
		return nil, fmt.Errorf("sign variable %s: %w", variable, err)
	}
	sig, err := pkcs7.SignDetached(key, cert, signed)
	if err != nil {
		return nil, fmt.Errorf("sign variable %s: %w", variable, err)
	}
	auth, err := binary.Append(stamp[:], binary.LittleEndian, winCertificateGUID{
		Length:          uint32(winCertificateGUIDBytes + len(sig)),
		Revision:        winCertRevision,
		CertificateType: winCertTypeEFIGUID,
		CertType:        typePKCS7(),
	})
	if err != nil {
		return nil, err
	}
	return append(append(auth, sig...), value...), nil
}

// signedBytes is what the signature is over, UEFI 2.10 §8.2.2.
func signedBytes(variable string, appends bool, stamp [efiTimeBytes]byte, content []byte) ([]byte, error) {
	vendor, err := Vendor(variable)
	if err != nil {
		return nil, err
	}
	attributes := Attributes
	if appends {
		attributes |= AppendWrite
	}
	var b []byte
	for _, field := range []any{utf16.Encode([]rune(variable)), vendor, attributes} { // the name without a final NUL
		if b, err = binary.Append(b, binary.LittleEndian, field); err != nil {
			return nil, err
		}
	}
	return bytes.Join([][]byte{b, stamp[:], content}, nil), nil
}

func newStamp(t time.Time) (stamp [efiTimeBytes]byte, err error) {
	t = t.UTC()
	if t.Year() < 1998 || t.Year() > 9999 {
		return stamp, errors.New("the time is outside the years 1998 to 9999")
	}
	_, err = binary.Encode(stamp[:], binary.LittleEndian, efiTime{Year: uint16(t.Year()), Month: uint8(t.Month()), Day: uint8(t.Day()),
		Hour: uint8(t.Hour()), Minute: uint8(t.Minute()), Second: uint8(t.Second())})
	return stamp, err
}
