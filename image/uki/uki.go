// Package uki makes and reads Unified Kernel Images (UAPI.5): one PE/COFF file
// that holds systemd's EFI stub, the kernel, its initrd and its command line,
// so that one Secure Boot signature and one measurement cover what boots.
//
// To make one, call [Assemble] and then [Sign]; both return a [Blob], which is
// read once or many times and never lies in memory or in a temporary file. To
// look into one, call [Parse]. Sign also signs other EFI programs, such as the
// systemd-boot loader.
//
// The subset: PE32+ for x86-64 and arm64, one file alignment, sections without
// gaps between them. Written are .osrel, .cmdline, .initrd, .uname, .sbat,
// .pcrpkey, .pcrsig and .linux; .splash, .dtb, .ucode and profiles are not.
// Signatures are Authenticode with SHA-256 and RSA, without signed attributes,
// because a signing time would make two builds differ.
//
// What this does not protect: with Secure Boot off nobody checks the signature,
// and the stub then takes a command line from the boot loader in preference to
// .cmdline (and says so in PCR 12). The measurement, not the file, is what a
// sealed key has to depend on.
package uki

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Limits on what is read and written.
const (
	maxHeaderBytes  = 64 << 10 // SizeOfHeaders; stubs and kernels use 1 to 4 KiB
	maxSections     = 96       // what the Windows loader takes; PE/COFF §3.3
	maxImageBytes   = 1 << 30  // PE offsets are 32 bits, and an ESP is small
	maxCertBytes    = 1 << 20  // attribute certificate table
	maxTextBytes    = 1 << 20  // each section that is not the kernel or the initrd
	sectionVMAAlign = 4096     // page size: the firmware sets protections by page
)

// Blob is content that can be read from its start any number of times.
type Blob interface {
	// Size is the length in bytes. Open's reader gives exactly that many.
	Size() int64
	Open() (io.ReadCloser, error)
}

// Input is what goes into a Unified Kernel Image.
type Input struct {
	// Stub is systemd's EFI stub, such as linuxx64.efi.stub of version 252.
	Stub []byte
	// Linux is the kernel, a PE file for the stub's machine (bzImage, arm64 Image).
	Linux Blob
	// Initrd may be nil.
	Initrd Blob
	// OSRelease is the content of os-release(5).
	OSRelease []byte
	// Cmdline must not be empty: without .cmdline the stub boots with whatever
	// command line the loader hands it.
	Cmdline string
	// Uname is the kernel's version as uname -r prints it; empty leaves .uname out.
	Uname string
	// SBAT holds revocation components of the vendor, one CSV line each, added
	// to those of the stub. Empty keeps the stub's alone.
	SBAT string
	// PCRPublicKey is the PEM public key that signs PCR 11 policies (.pcrpkey).
	PCRPublicKey []byte
	// PCRSig makes the .pcrsig section (JSON, UAPI.5) from what the stub will
	// measure. It is not itself measured. Nil leaves .pcrsig out.
	PCRSig func(measured []pcr.Measured) ([]byte, error)
}

// Image is an assembled, unsigned UKI. It is a [Blob].
type Image struct {
	// Measured is what the stub extends into PCR 11, in its order.
	Measured []pcr.Measured
	// PCR11 is the register's SHA-256 value when the stub starts the kernel,
	// before any boot phase.
	PCR11 [32]byte

	chain
}

// measuringOrder lists the sections that stub 252 measures, in its order:
// systemd 252, src/fundamental/tpm-pcr.h. Newer stubs measure .uname and .sbat
// too; a prediction for them needs another list.
func measuringOrder() []string {
	return []string{".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".pcrpkey"}
}

// payload is one section to be written, with its digest once it is known.
type payload struct {
	name   string
	blob   Blob
	sha256 [32]byte
}

// Assemble plans a UKI and predicts its measurement. It reads the kernel and
// the initrd once, to hash them; the returned image reads them again and fails
// when they have changed since. The same input gives the same bytes.
func Assemble(in Input) (*Image, error) {
	stub, err := parseStub(in.Stub)
	if err != nil {
		return nil, err
	}
	if err := in.check(stub.Machine); err != nil {
		return nil, fmt.Errorf("assemble UKI: %w", err)
	}
	payloads, err := in.payloads(stub)
	if err != nil {
		return nil, fmt.Errorf("assemble UKI: %w", err)
	}
	im := &Image{Measured: measure(payloads)}
	im.PCR11 = pcr.UKI(im.Measured)
	if in.PCRSig != nil {
		sig, err := in.PCRSig(im.Measured)
		if err != nil {
			return nil, fmt.Errorf("assemble UKI: sign PCR 11 policy: %w", err)
		}
		p, err := bytesPayload(".pcrsig", sig)
		if err != nil {
			return nil, fmt.Errorf("assemble UKI: %w", err)
		}
		// The kernel stays last: it is the largest, and a boot that unpacks it
		// in place runs over the end of its section.
		last := len(payloads) - 1
		payloads = append(payloads[:last], p, payloads[last])
	}
	im.chain, err = stub.layout(payloads)
	if err != nil {
		return nil, fmt.Errorf("assemble UKI: %w", err)
	}
	return im, nil
}

func (in *Input) check(machine uint16) error {
	switch {
	case in.Linux == nil:
		return errors.New("no kernel given")
	case len(in.OSRelease) == 0:
		return errors.New("no os-release given")
	case strings.TrimSpace(in.Cmdline) == "":
		return errors.New("the kernel command line is empty; the boot loader could then choose one")
	case strings.ContainsAny(in.Cmdline, "\x00\n"):
		return fmt.Errorf("the kernel command line %q holds a NUL or a line break", in.Cmdline)
	case strings.ContainsAny(in.Uname, "\x00\n \t/"):
		return fmt.Errorf("the kernel version %q holds a space, a slash or a control character", in.Uname)
	case in.PCRSig != nil && len(in.PCRPublicKey) == 0:
		return errors.New("a PCR signature is asked for without the public key it belongs to")
	}
	return checkKernel(in.Linux, machine)
}

// payloads returns the sections but .pcrsig in file order, each with its digest.
func (in *Input) payloads(stub *stub) ([]payload, error) {
	sbat, err := mergeSBAT(stub.sbat, in.SBAT)
	if err != nil {
		return nil, err
	}
	var list []payload
	for _, s := range []struct {
		name    string
		content []byte
	}{
		{".osrel", in.OSRelease},
		{".cmdline", []byte(in.Cmdline)},
		{".uname", []byte(in.Uname)},
		{".sbat", []byte(sbat)},
		{".pcrpkey", in.PCRPublicKey},
	} {
		if len(s.content) == 0 {
			continue // the stub ignores an empty section, so none is written
		}
		p, err := bytesPayload(s.name, s.content)
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	if in.Initrd != nil && in.Initrd.Size() > 0 {
		p, err := blobPayload(".initrd", in.Initrd)
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	kernel, err := blobPayload(".linux", in.Linux)
	if err != nil {
		return nil, err
	}
	return append(list, kernel), nil
}

func bytesPayload(name string, content []byte) (payload, error) {
	if len(content) == 0 || len(content) > maxTextBytes {
		return payload{}, fmt.Errorf("section %s has %d bytes, allowed are 1 to %d", name, len(content), maxTextBytes)
	}
	return payload{name, memory(content), sha256.Sum256(content)}, nil
}

func blobPayload(name string, b Blob) (payload, error) {
	if b.Size() > maxImageBytes {
		return payload{}, fmt.Errorf("section %s has %d bytes, allowed are %d", name, b.Size(), maxImageBytes)
	}
	digest, err := digestBlob(b)
	if err != nil {
		return payload{}, fmt.Errorf("read content of section %s: %w", name, err)
	}
	return payload{name, b, digest}, nil
}

func measure(payloads []payload) []pcr.Measured {
	var list []pcr.Measured
	for _, name := range measuringOrder() {
		for _, p := range payloads {
			if p.name == name {
				list = append(list, pcr.Measured{Name: p.name, SHA256: p.sha256})
			}
		}
	}
	return list
}

// checkKernel catches the kernels that the firmware would refuse only at boot.
func checkKernel(kernel Blob, machine uint16) (err error) {
	r, err := kernel.Open()
	if err != nil {
		return fmt.Errorf("open kernel: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	head := make([]byte, min(kernel.Size(), maxHeaderBytes))
	if _, err := io.ReadFull(r, head); err != nil {
		return fmt.Errorf("read kernel: %w", err)
	}
	if bytes.HasPrefix(head, []byte{0x1f, 0x8b}) {
		return errors.New("the kernel is compressed with gzip and the firmware cannot start it; give the uncompressed Image")
	}
	at, err := findCOFF(head)
	if err != nil {
		return fmt.Errorf("the kernel is not an EFI program (built without CONFIG_EFI_STUB?): %w", err)
	}
	if got := le.Uint16(head[at:]); got != machine {
		return fmt.Errorf("the kernel is for machine %s, the stub for %s", machineName(got), machineName(machine))
	}
	return nil
}
