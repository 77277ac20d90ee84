package keys

import (
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unicode/utf16"

	"github.com/foxboron/go-uefi/pkcs7"
	"github.com/google/uuid"
	"golang.org/x/crypto/cryptobyte"
)

// Variable attributes, UEFI 2.10 §8.2: non-volatile, boot and runtime access,
// time-based authenticated write access.
const variableAttributes = 0x01 | 0x02 | 0x04 | 0x20

// WIN_CERTIFICATE, UEFI 2.10 §32.2.4.
const (
	winCertRevision    = 0x0200
	winCertTypeEFIGUID = 0x0ef1
)

// GUIDs of UEFI 2.10 §3.3 (global variables), §32.6.1 (image security
// database), §32.4.1 (X.509 certificate) and §8.2.2 (PKCS #7).
const (
	guidGlobal   = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	guidSecurity = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
	guidX509     = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072"
	guidPKCS7    = "4aafd29d-68df-49ee-8aa9-347d375665a7"
)

// signatureListHeader is EFI_SIGNATURE_LIST and the fixed part of its one
// EFI_SIGNATURE_DATA.
type signatureListHeader struct {
	SignatureType       [16]byte
	SignatureListSize   uint32
	SignatureHeaderSize uint32
	SignatureSize       uint32
	SignatureOwner      [16]byte
}

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
	CertType        [16]byte
}

const (
	signatureListHeaderBytes = 44
	efiTimeBytes             = 16
	winCertificateGUIDBytes  = 24
)

// efiGUID is the mixed-endian form: the first three fields are little-endian.
func efiGUID(id uuid.UUID) [16]byte {
	return [16]byte{id[3], id[2], id[1], id[0], id[5], id[4], id[7], id[6],
		id[8], id[9], id[10], id[11], id[12], id[13], id[14], id[15]}
}

func signatureList(cert *x509.Certificate, owner uuid.UUID) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, signatureListHeader{
		SignatureType:     efiGUID(uuid.MustParse(guidX509)),
		SignatureListSize: uint32(signatureListHeaderBytes + len(cert.Raw)),
		SignatureSize:     uint32(16 + len(cert.Raw)),
		SignatureOwner:    efiGUID(owner),
	})
	if err != nil {
		panic(err) // a fixed-size structure
	}
	return append(b, cert.Raw...)
}

// SignVariable makes an .auth file: content for the variable PK, KEK or db,
// signed by key, whose certificate is cert (UEFI 2.10 §8.2.2). PK and KEK are
// signed by the platform key, db by the key exchange key. The firmware takes it
// when at, which counts in whole seconds of UTC, is later than the stamp of the
// variable it has. The same arguments give the same bytes.
func SignVariable(name string, content []byte, key crypto.Signer, cert *x509.Certificate, at time.Time) ([]byte, error) {
	stamp, err := newEFITime(at)
	if err != nil {
		return nil, fmt.Errorf("sign variable %s: %w", name, err)
	}
	vendor := guidGlobal
	switch name {
	case PK, KEK:
	case DB:
		vendor = guidSecurity
	default:
		return nil, fmt.Errorf("sign variable %q: only %s, %s and %s are supported", name, PK, KEK, DB)
	}
	var signed []byte
	for _, field := range []any{
		utf16.Encode([]rune(name)), // without a final NUL
		efiGUID(uuid.MustParse(vendor)),
		uint32(variableAttributes),
		stamp,
		content,
	} {
		if signed, err = binary.Append(signed, binary.LittleEndian, field); err != nil {
			return nil, fmt.Errorf("sign variable %s: %w", name, err)
		}
	}
	sig, err := detachedSignature(signed, key, cert)
	if err != nil {
		return nil, fmt.Errorf("sign variable %s: %w", name, err)
	}
	auth, err := binary.Append(nil, binary.LittleEndian, stamp)
	if err != nil {
		return nil, err
	}
	auth, err = binary.Append(auth, binary.LittleEndian, winCertificateGUID{
		Length:          uint32(winCertificateGUIDBytes + len(sig)),
		Revision:        winCertRevision,
		CertificateType: winCertTypeEFIGUID,
		CertType:        efiGUID(uuid.MustParse(guidPKCS7)),
	})
	if err != nil {
		return nil, err
	}
	return append(append(auth, sig...), content...), nil
}

// detachedSignature is a PKCS #7 SignedData. go-uefi's SignEFIVariable would do
// the rest too, but stamps the variable with the local time of its own clock.
func detachedSignature(signed []byte, key crypto.Signer, cert *x509.Certificate) ([]byte, error) {
	der, err := pkcs7.SignPKCS7(key, cert, pkcs7.OIDData, signed, pkcs7.NoAttr())
	if err != nil {
		return nil, err
	}
	// The firmware wants the SignedData without the ContentInfo around it; with
	// it, older EDK2 releases refuse the variable.
	outer := cryptobyte.String(der)
	_, inner, err := pkcs7.ParseContentInfo(&outer)
	if err != nil {
		return nil, err
	}
	return inner, nil
}

func newEFITime(t time.Time) (efiTime, error) {
	t = t.UTC()
	if t.Year() < 1998 || t.Year() > 9999 {
		return efiTime{}, errors.New("the time is outside the years 1998 to 9999")
	}
	return efiTime{Year: uint16(t.Year()), Month: uint8(t.Month()), Day: uint8(t.Day()),
		Hour: uint8(t.Hour()), Minute: uint8(t.Minute()), Second: uint8(t.Second())}, nil
}
