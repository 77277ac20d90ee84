package uki

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Section is one entry of the section table.
type Section struct {
	Name string
	// VirtualAddress is where the firmware puts the section, from the image's start.
	VirtualAddress uint32
	// VirtualSizeBytes is the length of the content; the stub measures that much.
	VirtualSizeBytes uint32
	// RawOffset and RawSizeBytes say where the content lies in the file, with
	// its padding.
	RawOffset, RawSizeBytes uint32
	Characteristics         uint32
}

// File is a PE file, such as a UKI, a stub or a boot loader.
type File struct {
	Machine   uint16
	Subsystem uint16
	Sections  []Section // in the order of the section table

	headers
	r io.ReaderAt
}

// headers are the decoded first SizeOfHeaders bytes of a PE file.
type headers struct {
	raw         []byte
	sizeBytes   int64 // of the file
	coffOff     int   // file offset of the COFF header
	optOff      int   // of the optional header
	dirsOff     int   // of the data directories
	sectionsOff int   // of the section table
	coff        coffHeader
	opt         optionalHeader
	dirs        []dataDirectory
}

// Parse reads the headers of the PE file of sizeBytes in r. It is strict: two
// sections of one name, sections that overlap in the file or in memory, and
// anything that lies outside the file are errors, since the firmware, the stub
// and this reader could otherwise see different contents in one signed file.
func Parse(r io.ReaderAt, sizeBytes int64) (*File, error) {
	head := make([]byte, max(0, min(sizeBytes, maxHeaderBytes)))
	if n, err := r.ReadAt(head, 0); n < len(head) {
		return nil, fmt.Errorf("read PE header: %w", err)
	}
	f, err := parseHeaders(head, sizeBytes)
	if err != nil {
		return nil, fmt.Errorf("parse PE file of %d bytes: %w", sizeBytes, err)
	}
	f.r = r
	return f, nil
}

// findCOFF returns the file offset of the COFF header.
func findCOFF(head []byte) (int, error) {
	if len(head) < dosHeaderBytes || !bytes.HasPrefix(head, []byte("MZ")) {
		return 0, errors.New("no DOS header (MZ)")
	}
	at := int64(le.Uint32(head[offLFANew:]))
	// The firmware reads this offset from the file; so may an attacker choose it.
	if at < 4 || at+int64(len(peSignature)+coffHeaderBytes) > int64(len(head)) {
		return 0, fmt.Errorf("PE header at offset %d lies outside the first %d bytes", at, len(head))
	}
	if string(head[at:at+4]) != peSignature {
		return 0, fmt.Errorf("no PE signature at offset %d", at)
	}
	return int(at) + len(peSignature), nil
}

// parseHeaders decodes head, the first bytes of a file of sizeBytes.
func parseHeaders(head []byte, sizeBytes int64) (*File, error) {
	if sizeBytes > maxImageBytes {
		return nil, fmt.Errorf("larger than the %d bytes allowed", maxImageBytes)
	}
	at, err := findCOFF(head)
	if err != nil {
		return nil, err
	}
	h := headers{sizeBytes: sizeBytes, coffOff: at, optOff: at + coffHeaderBytes}
	if err := h.decode(head); err != nil {
		return nil, err
	}
	f := &File{Machine: h.coff.Machine, Subsystem: h.opt.Subsystem, headers: h}
	if err := f.parseSections(); err != nil {
		return nil, err
	}
	if _, _, err := f.certTable(); err != nil {
		return nil, err
	}
	return f, nil
}

func (h *headers) decode(head []byte) error {
	if len(head) < h.optOff+optionalHeaderBytes {
		return fmt.Errorf("optional header at offset %d lies outside the first %d bytes", h.optOff, len(head))
	}
	if _, err := binary.Decode(head[h.coffOff:], le, &h.coff); err != nil {
		return err
	}
	if _, err := binary.Decode(head[h.optOff:], le, &h.opt); err != nil {
		return err
	}
	h.dirsOff = h.optOff + optionalHeaderBytes
	h.sectionsOff = h.optOff + int(h.coff.SizeOfOptionalHeader)
	dirs, size := h.opt.NumberOfRvaAndSizes, int64(h.opt.SizeOfHeaders)
	switch {
	case h.opt.Magic != magicPE32Plus:
		return fmt.Errorf("optional header magic %#x is not PE32+ (%#x)", h.opt.Magic, magicPE32Plus)
	case dirs <= dirSecurity || dirs > 16:
		return fmt.Errorf("%d data directories, expected 5 to 16", dirs)
	case h.sectionsOff < h.dirsOff+int(dirs)*dataDirectoryBytes:
		return fmt.Errorf("optional header of %d bytes is too short for %d data directories", h.coff.SizeOfOptionalHeader, dirs)
	case h.coff.NumberOfSections == 0 || h.coff.NumberOfSections > maxSections:
		return fmt.Errorf("%d sections, allowed are 1 to %d", h.coff.NumberOfSections, maxSections)
	case size > int64(len(head)):
		return fmt.Errorf("headers of %d bytes, allowed are %d", size, len(head))
	case int64(h.sectionsOff)+int64(h.coff.NumberOfSections)*sectionHeaderBytes > size:
		return fmt.Errorf("%d sections at offset %d do not fit in headers of %d bytes", h.coff.NumberOfSections, h.sectionsOff, size)
	case h.opt.SectionAlignment == 0 || h.opt.FileAlignment == 0 ||
		h.opt.SectionAlignment > 1<<21 || h.opt.FileAlignment > 1<<16:
		return fmt.Errorf("section alignment %d and file alignment %d make no sense", h.opt.SectionAlignment, h.opt.FileAlignment)
	}
	h.raw = head[:size]
	h.dirs = make([]dataDirectory, dirs)
	_, err := binary.Decode(head[h.dirsOff:], le, h.dirs)
	return err
}

func (f *File) parseSections() error {
	endVMA, endRaw := int64(0), int64(len(f.raw))
	seen := map[string]bool{}
	for i := range int(f.coff.NumberOfSections) {
		var sh sectionHeader
		if _, err := binary.Decode(f.raw[f.sectionsOff+i*sectionHeaderBytes:], le, &sh); err != nil {
			return err
		}
		name, err := sectionName(sh.Name)
		if err != nil {
			return fmt.Errorf("section %d: %w", i+1, err)
		}
		rawEnd := int64(sh.PointerToRawData) + int64(sh.SizeOfRawData)
		vmaEnd := int64(sh.VirtualAddress) + int64(sh.VirtualSize)
		switch {
		case seen[name]:
			return fmt.Errorf("two sections are called %s", name)
		case int64(sh.VirtualAddress) < endVMA:
			return fmt.Errorf("section %s at address %#x overlaps the one before, which ends at %#x", name, sh.VirtualAddress, endVMA)
		case vmaEnd > int64(f.opt.SizeOfImage):
			return fmt.Errorf("section %s ends at address %#x, the image at %#x", name, vmaEnd, f.opt.SizeOfImage)
		case sh.SizeOfRawData > 0 && int64(sh.PointerToRawData) < endRaw:
			return fmt.Errorf("section %s at file offset %d overlaps what ends at %d", name, sh.PointerToRawData, endRaw)
		case sh.SizeOfRawData > 0 && rawEnd > f.sizeBytes:
			return fmt.Errorf("section %s ends at file offset %d, the file at %d; it is cut off", name, rawEnd, f.sizeBytes)
		}
		seen[name] = true
		endVMA = vmaEnd
		if sh.SizeOfRawData > 0 {
			endRaw = rawEnd
		}
		f.Sections = append(f.Sections, Section{name, sh.VirtualAddress, sh.VirtualSize,
			sh.PointerToRawData, sh.SizeOfRawData, sh.Characteristics})
	}
	return nil
}

// sectionName insists on NUL padding and printable ASCII: the stub compares
// all eight bytes, other readers stop at the first NUL.
func sectionName(raw [8]byte) (string, error) {
	name := bytes.TrimRight(raw[:], "\x00")
	for _, c := range name {
		if c <= ' ' || c > '~' {
			return "", fmt.Errorf("name %q holds something other than printable ASCII", raw)
		}
	}
	if len(name) == 0 {
		return "", errors.New("it has no name")
	}
	return string(name), nil
}

// certTable returns where the attribute certificates lie; (end of file, 0)
// when there are none. PE Format §4.7 puts them at the file's very end.
func (h *headers) certTable() (off, size int64, err error) {
	d := h.dirs[dirSecurity]
	off, size = int64(d.VirtualAddress), int64(d.Size)
	switch {
	case off == 0 && size == 0:
		return h.sizeBytes, 0, nil
	case size > maxCertBytes:
		return 0, 0, fmt.Errorf("certificate table of %d bytes, allowed are %d", size, maxCertBytes)
	case off%certAlign != 0 || size < winCertHeaderSize:
		return 0, 0, fmt.Errorf("certificate table of %d bytes at offset %d is not aligned to %d or is too small", size, off, certAlign)
	case off < int64(len(h.raw)) || off+size != h.sizeBytes:
		return 0, 0, fmt.Errorf("certificate table at offset %d of %d bytes does not end with the file at %d; bytes were appended or cut off", off, size, h.sizeBytes)
	}
	return off, size, nil
}

// checkContiguous makes sure that hashing the file from front to back is what
// Authenticode prescribes (headers, then the sections by file offset, then the
// rest) and that no unsigned or unseen bytes hide between sections.
func (f *File) checkContiguous() error {
	end := int64(len(f.raw))
	for _, s := range f.Sections {
		if s.RawSizeBytes == 0 {
			continue
		}
		if int64(s.RawOffset) != end {
			return fmt.Errorf("gap of %d bytes in the file before section %s", int64(s.RawOffset)-end, s.Name)
		}
		end += int64(s.RawSizeBytes)
	}
	certOff, _, err := f.certTable()
	if err != nil {
		return err
	}
	if certOff < end {
		return fmt.Errorf("certificate table at offset %d overlaps the sections, which end at %d", certOff, end)
	}
	return nil
}

// Section returns the entry of that name.
func (f *File) Section(name string) (Section, bool) {
	for _, s := range f.Sections {
		if s.Name == name {
			return s, true
		}
	}
	return Section{}, false
}

// Open reads the content of a section, without the padding that follows it.
func (f *File) Open(name string) (*io.SectionReader, error) {
	s, ok := f.Section(name)
	if !ok {
		return nil, fmt.Errorf("there is no section %s", name)
	}
	if s.VirtualSizeBytes > s.RawSizeBytes {
		return nil, fmt.Errorf("section %s has %d bytes in memory and only %d in the file", name, s.VirtualSizeBytes, s.RawSizeBytes)
	}
	return io.NewSectionReader(f.r, int64(s.RawOffset), int64(s.VirtualSizeBytes)), nil
}

// Measured hashes the sections that stub 252 extends into PCR 11, in its
// order; [pcr.UKI] makes the register's value of them.
func (f *File) Measured() ([]pcr.Measured, error) {
	var list []pcr.Measured
	for _, name := range measuringOrder() {
		if s, ok := f.Section(name); !ok || s.VirtualSizeBytes == 0 {
			continue
		}
		r, err := f.Open(name)
		if err != nil {
			return nil, err
		}
		h := sha256.New()
		if _, err := io.Copy(h, r); err != nil {
			return nil, fmt.Errorf("hash section %s: %w", name, err)
		}
		list = append(list, pcr.Measured{Name: name, SHA256: [32]byte(h.Sum(nil))})
	}
	return list, nil
}
