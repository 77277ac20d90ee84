package uki

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast-os/holdfast/image/pkcs7"
)

// ErrNotSigned says that a PE file carries no signature at all.
var ErrNotSigned = errors.New("not signed")

// Authenticode is the SHA-256 digest that a signature covers and that the
// firmware extends into PCR 4 when it starts the program: everything but the
// checksum, the address of the certificate table and the table itself
// (Windows Authenticode PE Signature Format, "Calculating the PE Image Hash").
// A file without signatures is hashed as if padded to 8 bytes, which is how it
// is signed.
func (f *File) Authenticode() ([32]byte, error) {
	if err := f.checkContiguous(); err != nil {
		return [32]byte{}, fmt.Errorf("authenticode digest: %w", err)
	}
	end, _, err := f.certTable()
	if err != nil {
		return [32]byte{}, err
	}
	rest := io.NewSectionReader(f.r, int64(len(f.raw)), end-int64(len(f.raw)))
	return f.authenticode(rest, end)
}

// authenticode hashes the headers and then rest, what follows them up to end.
func (h *headers) authenticode(rest io.Reader, end int64) (digest [32]byte, err error) {
	sum := sha256.New()
	checksum, dir := h.optOff+offChecksum, h.securityOff()
	sum.Write(h.raw[:checksum])
	sum.Write(h.raw[checksum+4 : dir])
	sum.Write(h.raw[dir+dataDirectoryBytes:])
	if _, err := io.Copy(sum, rest); err != nil {
		return digest, fmt.Errorf("authenticode digest: %w", err)
	}
	sum.Write(make([]byte, align(end, certAlign)-end))
	return [32]byte(sum.Sum(nil)), nil
}

func (h *headers) securityOff() int { return h.dirsOff + dirSecurity*dataDirectoryBytes }

// Sign returns image with a Secure Boot signature by key, whose certificate is
// cert, added behind any signatures it has. RSA keys only: no firmware is
// bound to take another kind. The same image and key give the same bytes.
//
// It reads image once; the returned blob reads it again and fails when it has
// changed since.
func Sign(image Blob, key crypto.Signer, cert *x509.Certificate) (Blob, error) {
	if err := checkSigner(key, cert); err != nil {
		return nil, fmt.Errorf("sign PE file: %w", err)
	}
	scan, err := scanImage(image)
	if err != nil {
		return nil, fmt.Errorf("sign PE file: %w", err)
	}
	der, err := pkcs7.Sign(key, cert, oidIndirectData(), indirectData(scan.digest))
	if err != nil {
		return nil, fmt.Errorf("sign PE file with the key of %q: %w", cert.Subject.CommonName, err)
	}
	f := scan.file
	certOff, _, err := f.certTable()
	if err != nil {
		return nil, err
	}
	table := append(scan.oldTable, winCertificate(der)...)
	if len(table) > maxCertBytes {
		return nil, fmt.Errorf("sign PE file: signatures of %d bytes, allowed are %d", len(table), maxCertBytes)
	}
	padBytes := align(certOff, certAlign) - certOff
	head := bytes.Clone(f.raw)
	le.PutUint32(head[f.securityOff():], uint32(certOff+padBytes))
	le.PutUint32(head[f.securityOff()+4:], uint32(len(table)))
	body := tail{limited{image, certOff}, int64(len(head))}
	return chain{
		{name: "header", blob: memory(head)},
		{name: "signed image", blob: body, padBytes: padBytes, sha256: scan.bodySHA256, checked: true},
		{name: "signature", blob: memory(table)},
	}, nil
}

func checkSigner(key crypto.Signer, cert *x509.Certificate) error {
	if key == nil || cert == nil {
		return errors.New("a key and its certificate are needed")
	}
	pub, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("the key is %T, Secure Boot takes RSA", key.Public())
	}
	if !pub.Equal(cert.PublicKey) {
		return fmt.Errorf("the key does not belong to the certificate of %q", cert.Subject.CommonName)
	}
	return nil
}

// scanned is what one pass over an image finds out.
type scanned struct {
	file       *File
	digest     [32]byte // Authenticode
	bodySHA256 [32]byte // of what lies between the headers and the certificates
	oldTable   []byte
}

func scanImage(image Blob) (s scanned, err error) {
	r, err := image.Open()
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if image.Size() > maxImageBytes {
		return s, fmt.Errorf("image of %d bytes, allowed are %d", image.Size(), maxImageBytes)
	}
	head := make([]byte, min(image.Size(), maxHeaderBytes))
	if _, err := io.ReadFull(r, head); err != nil {
		return s, fmt.Errorf("read PE header: %w", err)
	}
	f, err := parseHeaders(head, image.Size())
	if err != nil {
		return s, err
	}
	if err := f.checkContiguous(); err != nil {
		return s, err
	}
	certOff, certSize, err := f.certTable()
	if err != nil {
		return s, err
	}
	// head may reach beyond the headers, and even beyond the certificates.
	whole := io.MultiReader(bytes.NewReader(head[len(f.raw):]), r)
	sum := sha256.New()
	body := &io.LimitedReader{R: whole, N: certOff - int64(len(f.raw))}
	s.digest, err = f.authenticode(io.TeeReader(body, sum), certOff)
	if err != nil {
		return s, err
	}
	if body.N != 0 {
		return s, fmt.Errorf("read image: it ends %d bytes early: %w", body.N, io.ErrUnexpectedEOF)
	}
	s.file, s.bodySHA256 = f, [32]byte(sum.Sum(nil))
	s.oldTable = make([]byte, certSize)
	if _, err := io.ReadFull(whole, s.oldTable); err != nil {
		return s, fmt.Errorf("read signatures: %w", err)
	}
	return s, nil
}

// limited is the first sizeBytes of a Blob.
type limited struct {
	Blob
	sizeBytes int64
}

func (l limited) Size() int64 { return l.sizeBytes }

func (l limited) Open() (io.ReadCloser, error) {
	r, err := l.Blob.Open()
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(r, l.sizeBytes), r}, nil
}

// winCertificate wraps a PKCS #7 signature as WIN_CERTIFICATE, PE Format §4.7.
func winCertificate(der []byte) []byte {
	b := le.AppendUint32(nil, uint32(winCertHeaderSize+len(der)))
	b = le.AppendUint16(b, certRevision)
	b = le.AppendUint16(b, certTypePKCS7)
	b = append(b, der...)
	return append(b, make([]byte, align(int64(len(b)), certAlign)-int64(len(b)))...)
}

// Object identifiers as functions: an asn1.ObjectIdentifier is a slice, which
// a package variable would let anybody change.
func oidIndirectData() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4} // SPC_INDIRECT_DATA_OBJID
}

// digestInfoPrefix is everything of a SHA-256 DigestInfo but the digest (RFC 8017 §9.2).
const digestInfoPrefix = "\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"

// peImageData is SpcAttributeTypeAndOptionalValue for a PE image: the type
// SPC_PE_IMAGE_DATAOBJ, no flags, and the link "<<<Obsolete>>>" that the
// Authenticode document prescribes for file.
const peImageData = "\x30\x33\x06\x0a\x2b\x06\x01\x04\x01\x82\x37\x02\x01\x0f" +
	"\x30\x25\x03\x01\x00\xa0\x20\xa2\x1e\x80\x1c" +
	"\x00<\x00<\x00<\x00O\x00b\x00s\x00o\x00l\x00e\x00t\x00e\x00>\x00>\x00>"

// indirectData is the content of SpcIndirectDataContent, without its SEQUENCE.
func indirectData(digest [32]byte) []byte {
	return append([]byte(peImageData+digestInfoPrefix), digest[:]...)
}
