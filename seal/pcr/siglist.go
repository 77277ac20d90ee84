package pcr

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// maxVariableBytes is the largest content of a Secure Boot variable that is read;
// Microsoft's revocation list has 24 KB.
const maxVariableBytes = 1 << 20

// GUIDs, as they are stored: UEFI 2.10 §32.4.1, §32.6.1, §8.2.2.
var (
	typeSHA256        = [16]byte{0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28}
	typeX509          = [16]byte{0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72}
	typeX509SHA256    = [16]byte{0x92, 0xa4, 0xd2, 0x3b, 0xc0, 0x96, 0x79, 0x40, 0xb4, 0x20, 0xfc, 0xf9, 0x8e, 0xf1, 0x03, 0xed}
	guidPKCS7         = [16]byte{0x9d, 0xd2, 0xaf, 0x4a, 0xdf, 0x68, 0xee, 0x49, 0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7}
	guidImageSecurity = [16]byte{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
)

const ownerBytes = 16 // SignatureOwner, at the front of an EFI_SIGNATURE_DATA

// signatureList is an EFI_SIGNATURE_LIST. UEFI 2.10 §32.4.1.
type signatureList struct {
	Type           [16]byte
	Header         []byte
	SignatureBytes uint32
	Signatures     [][]byte // EFI_SIGNATURE_DATA: owner and data
}

// has says whether the list holds the EFI_SIGNATURE_DATA.
func (l signatureList) has(signature []byte) bool {
	return slices.ContainsFunc(l.Signatures, func(s []byte) bool { return bytes.Equal(s, signature) })
}

// parseSignatureLists reads the content of db, dbx, KEK or PK. It looks into no
// certificate: what vendors put there is often not what X.509 wants (F25).
func parseSignatureLists(b []byte) (lists []signatureList, err error) {
	const fixed = 16 + 4 + 4 + 4
	if len(b) > maxVariableBytes {
		return nil, fmt.Errorf("signature lists of %d bytes; %d are the most", len(b), maxVariableBytes)
	}
	for at := 0; at < len(b); {
		rest := b[at:]
		if len(rest) < fixed {
			return nil, fmt.Errorf("signature list at offset %d: %d bytes are left, its header has %d", at, len(rest), fixed)
		}
		listBytes, headerBytes := binary.LittleEndian.Uint32(rest[16:]), binary.LittleEndian.Uint32(rest[20:])
		l := signatureList{Type: [16]byte(rest), SignatureBytes: binary.LittleEndian.Uint32(rest[24:])}
		if uint64(listBytes) > uint64(len(rest)) || uint64(listBytes) < fixed+uint64(headerBytes) {
			return nil, fmt.Errorf("signature list at offset %d: it claims %d bytes with a header of %d more; %d are left", at, listBytes, headerBytes, len(rest))
		}
		l.Header = rest[fixed : fixed+headerBytes]
		body := rest[fixed+headerBytes : listBytes]
		if l.SignatureBytes <= ownerBytes || len(body)%int(l.SignatureBytes) != 0 {
			return nil, fmt.Errorf("signature list at offset %d: %d bytes of signatures of %d each", at, len(body), l.SignatureBytes)
		}
		for s := range slices.Chunk(body, int(l.SignatureBytes)) {
			l.Signatures = append(l.Signatures, s)
		}
		lists = append(lists, l)
		at += int(listBytes)
	}
	return lists, nil
}

func appendSignatureList(b []byte, l signatureList) []byte {
	const fixed = 16 + 4 + 4 + 4
	b = append(b, l.Type[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(fixed+len(l.Header)+len(l.Signatures)*int(l.SignatureBytes)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(l.Header)))
	b = binary.LittleEndian.AppendUint32(b, l.SignatureBytes)
	b = append(b, l.Header...)
	for _, s := range l.Signatures {
		b = append(b, s...)
	}
	return b
}

// AppendSignatures is the content of db, dbx or KEK after the firmware has appended
// the signature lists in addition to current (EFI_VARIABLE_APPEND_WRITE, UEFI 2.10
// §8.2.1): it leaves out signatures that are there already, of the same type, size
// and owner, and lists that this empties. Those that are twice in the addition, and
// not in current, stay twice; edk2's AuthVariableLib does that. Firmware of other
// makers may do otherwise: where it can be, read the variable after the write and
// predict from that.
func AppendSignatures(current, addition []byte) ([]byte, error) {
	have, err := parseSignatureLists(current)
	if err != nil {
		return nil, fmt.Errorf("append signatures: present content: %w", err)
	}
	added, err := parseSignatureLists(addition)
	if err != nil {
		return nil, fmt.Errorf("append signatures: addition: %w", err)
	}
	// By type, since signatures of different types may be the same bytes.
	known := map[string]bool{}
	for _, l := range have {
		for _, s := range l.Signatures {
			known[string(l.Type[:])+string(s)] = true
		}
	}
	result := slices.Clone(current)
	for _, l := range added {
		l.Signatures = slices.DeleteFunc(slices.Clone(l.Signatures), func(s []byte) bool { return known[string(l.Type[:])+string(s)] })
		if len(l.Signatures) > 0 {
			result = appendSignatureList(result, l)
		}
	}
	if len(result) > maxVariableBytes {
		return nil, fmt.Errorf("append signatures: the variable would have %d bytes; %d are the most", len(result), maxVariableBytes)
	}
	return result, nil
}

// VariableAfter is the content of a Secure Boot variable after the firmware has taken
// the payload, an EFI_VARIABLE_AUTHENTICATION_2 with signature lists behind it (the
// content of an .auth file; UEFI 2.10 §8.2.2), as a replacement or to be appended. It
// does not verify the signature: whether the firmware takes the payload, it says itself.
func VariableAfter(current, payload []byte, appendWrite bool) ([]byte, error) {
	content, err := authenticatedContent(payload)
	if err != nil {
		return nil, fmt.Errorf("authenticated variable: %w", err)
	}
	if appendWrite {
		return AppendSignatures(current, content)
	}
	if _, err := parseSignatureLists(content); err != nil {
		return nil, fmt.Errorf("authenticated variable: %w", err)
	}
	return append([]byte{}, content...), nil
}

// authenticatedContent is what follows the EFI_VARIABLE_AUTHENTICATION_2.
func authenticatedContent(payload []byte) ([]byte, error) {
	const timeBytes, certificateBytes = 16, 4 + 2 + 2 + 16
	const revision, typeGUID = 0x0200, 0x0ef1 // UEFI 2.10 §32.2.4
	if len(payload) < timeBytes+certificateBytes {
		return nil, fmt.Errorf("%d bytes; its header alone has %d", len(payload), timeBytes+certificateBytes)
	}
	c := payload[timeBytes:]
	length := binary.LittleEndian.Uint32(c)
	if binary.LittleEndian.Uint16(c[4:]) != revision || binary.LittleEndian.Uint16(c[6:]) != typeGUID || [16]byte(c[8:]) != guidPKCS7 {
		return nil, errors.New("it does not begin with a PKCS #7 signature; is it a signature list without one?")
	}
	if length < certificateBytes || uint64(length) > uint64(len(c)) {
		return nil, fmt.Errorf("its signature claims %d bytes; %d are left", length, len(c))
	}
	return c[length:], nil
}

// certificateBody is the digest of a certificate's TBSCertificate, by which a dbx may
// name it; zero when it is not one.
func certificateBody(der []byte) Digest {
	var certificate, body asn1.RawValue
	if _, err := asn1.Unmarshal(der, &certificate); err != nil {
		return Digest{}
	}
	if _, err := asn1.Unmarshal(certificate.Bytes, &body); err != nil {
		return Digest{}
	}
	return sha256.Sum256(body.FullBytes)
}
