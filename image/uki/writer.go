package uki

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// stub is the EFI program that the other sections are added to.
type stub struct {
	*File
	sbat string // its own revocation components
}

func parseStub(content []byte) (*stub, error) {
	f, err := Parse(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return nil, fmt.Errorf("EFI stub: %w", err)
	}
	// A signed stub is taken too; its signature is dropped with the table.
	if len(f.dirs) > dirDebug && f.dirs[dirDebug].Size > 0 {
		return nil, errors.New("EFI stub: it has a debug directory, whose file offsets would no longer be right")
	}
	s := &stub{File: f}
	for _, name := range measuringOrder() {
		if _, ok := f.Section(name); ok {
			return nil, fmt.Errorf("EFI stub: it already holds %s; give the bare stub, not a UKI", name)
		}
	}
	if _, ok := f.Section(".sbat"); ok {
		r, err := f.Open(".sbat")
		if err != nil {
			return nil, fmt.Errorf("EFI stub: %w", err)
		}
		text, err := io.ReadAll(io.LimitReader(r, maxTextBytes))
		if err != nil {
			return nil, fmt.Errorf("EFI stub: read .sbat: %w", err)
		}
		s.sbat = string(bytes.TrimRight(text, "\x00"))
	}
	return s, nil
}

// layout places the stub's sections, without its .sbat (the payloads carry the
// merged one), and then the payloads, and writes the header for them.
//
// The stub's sections keep their addresses, as its code depends on them, and
// move in the file so that no gap is left where .sbat was: what lies in a gap
// is outside every section, and signing tools reject it. The new .sbat goes to
// the end because section addresses have to rise through the table.
func (s *stub) layout(payloads []payload) (chain, error) {
	var table []sectionHeader
	var parts chain
	rawPos, vmaEnd := int64(len(s.raw)), int64(0)
	fileAlign := int64(s.opt.FileAlignment)
	if rawPos%fileAlign != 0 {
		return nil, fmt.Errorf("EFI stub: headers of %d bytes are not aligned to %d", rawPos, fileAlign)
	}
	add := func(sh sectionHeader, p part) {
		sh.SizeOfRawData = uint32(align(p.blob.Size(), fileAlign))
		sh.PointerToRawData = uint32(rawPos)
		p.padBytes = int64(sh.SizeOfRawData) - p.blob.Size()
		table, parts = append(table, sh), append(parts, p)
		rawPos += int64(sh.SizeOfRawData)
		vmaEnd = int64(sh.VirtualAddress) + int64(sh.VirtualSize)
	}
	for i, sec := range s.Sections {
		if sec.Name == ".sbat" {
			continue
		}
		var sh sectionHeader
		if _, err := binary.Decode(s.raw[s.sectionsOff+i*sectionHeaderBytes:], le, &sh); err != nil {
			return nil, err
		}
		content, err := io.ReadAll(io.NewSectionReader(s.r, int64(sec.RawOffset), int64(sec.RawSizeBytes)))
		if err != nil {
			return nil, err
		}
		add(sh, part{name: sec.Name, blob: memory(content)})
	}
	vmaEnd = max(vmaEnd, int64(s.opt.SizeOfImage))
	for _, p := range payloads {
		sh := sectionHeader{
			VirtualSize:     uint32(p.blob.Size()), // exact: the stub measures this many bytes
			VirtualAddress:  uint32(align(vmaEnd, sectionVMAAlign)),
			Characteristics: scnInitialized | scnRead,
		}
		copy(sh.Name[:], p.name)
		if int64(sh.VirtualAddress)+p.blob.Size() > maxImageBytes {
			return nil, fmt.Errorf("with section %s the image exceeds %d bytes", p.name, maxImageBytes)
		}
		add(sh, part{name: p.name, blob: p.blob, sha256: p.sha256, checked: true})
	}
	head, err := s.header(table, vmaEnd)
	if err != nil {
		return nil, err
	}
	return append(chain{{name: "header", blob: memory(head)}}, parts...), nil
}

// header is the stub's header with another section table.
func (s *stub) header(table []sectionHeader, vmaEnd int64) ([]byte, error) {
	room := (len(s.raw) - s.sectionsOff) / sectionHeaderBytes
	if len(table) > room {
		return nil, fmt.Errorf("the EFI stub's header has room for %d sections and %d are needed; use another stub or leave optional sections out", room, len(table))
	}
	coff, opt := s.coff, s.opt
	coff.NumberOfSections = uint16(len(table))
	// The symbol table is at a file offset that is gone, and debug readers
	// follow it.
	coff.PointerToSymbolTable, coff.NumberOfSymbols = 0, 0
	opt.SizeOfImage = align(uint32(vmaEnd), max(opt.SectionAlignment, sectionVMAAlign))
	opt.CheckSum = 0 // optional for EFI programs, and not covered by the signature
	opt.SizeOfInitializedData = 0
	for _, sh := range table {
		if sh.Characteristics&scnInitialized != 0 {
			opt.SizeOfInitializedData += sh.SizeOfRawData
		}
	}
	dirs := append([]dataDirectory(nil), s.dirs...)
	dirs[dirSecurity] = dataDirectory{}

	head := append([]byte(nil), s.raw[:s.sectionsOff]...)
	for _, w := range []struct {
		off  int
		data any
	}{{s.coffOff, coff}, {s.optOff, opt}, {s.dirsOff, dirs}} {
		if _, err := binary.Encode(head[w.off:], le, w.data); err != nil {
			return nil, err
		}
	}
	head, err := binary.Append(head, le, table)
	if err != nil {
		return nil, err
	}
	return append(head, make([]byte, len(s.raw)-len(head))...), nil
}
