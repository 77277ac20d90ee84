package uki

import (
	"encoding/binary"
	"fmt"
)

// The structures of PE/COFF (Microsoft "PE Format", sections 3.3 to 4). All
// integers are little-endian.

// Machine types, PE Format §3.3.1.
const (
	MachineAMD64 = 0x8664
	MachineARM64 = 0xaa64
)

// SubsystemApplication is that of an EFI application, PE Format §3.4.2.
const SubsystemApplication = 10

const (
	dosHeaderBytes    = 64
	offLFANew         = 0x3c // file offset of the PE signature, in the DOS header
	peSignature       = "PE\x00\x00"
	magicPE32Plus     = 0x20b
	dirSecurity       = 4  // index of the attribute certificate table
	dirDebug          = 6  // holds file offsets, which moving sections would break
	offChecksum       = 64 // from the start of the optional header
	certRevision      = 0x0200
	certTypePKCS7     = 0x0002
	certAlign         = 8
	scnInitialized    = 0x00000040 // section flags, §4.1
	scnRead           = 0x40000000
	winCertHeaderSize = 8
)

// coffHeader, PE Format §3.3.
type coffHeader struct {
	Machine              uint16
	NumberOfSections     uint16
	TimeDateStamp        uint32
	PointerToSymbolTable uint32
	NumberOfSymbols      uint32
	SizeOfOptionalHeader uint16
	Characteristics      uint16
}

// optionalHeader is the PE32+ optional header up to its data directories, §3.4.
type optionalHeader struct {
	Magic                   uint16
	LinkerVersion           [2]uint8
	SizeOfCode              uint32
	SizeOfInitializedData   uint32
	SizeOfUninitializedData uint32
	AddressOfEntryPoint     uint32
	BaseOfCode              uint32
	ImageBase               uint64
	SectionAlignment        uint32
	FileAlignment           uint32
	Versions                [6]uint16 // operating system, image, subsystem
	Win32VersionValue       uint32
	SizeOfImage             uint32
	SizeOfHeaders           uint32
	CheckSum                uint32
	Subsystem               uint16
	DllCharacteristics      uint16
	StackAndHeap            [4]uint64 // reserve and commit
	LoaderFlags             uint32
	NumberOfRvaAndSizes     uint32
}

// dataDirectory, §3.4.3. For the certificate table the address is a file offset.
type dataDirectory struct {
	VirtualAddress uint32
	Size           uint32
}

// sectionHeader, §4.
type sectionHeader struct {
	Name                 [8]byte
	VirtualSize          uint32
	VirtualAddress       uint32
	SizeOfRawData        uint32
	PointerToRawData     uint32
	PointerToRelocations uint32
	PointerToLinenumbers uint32
	NumberOfRelocations  uint16
	NumberOfLinenumbers  uint16
	Characteristics      uint32
}

const (
	coffHeaderBytes     = 20
	optionalHeaderBytes = 112
	dataDirectoryBytes  = 8
	sectionHeaderBytes  = 40
)

var le = binary.LittleEndian

func align[T int64 | uint32](n, to T) T { return (n + to - 1) / to * to }

func machineName(m uint16) string {
	switch m {
	case MachineAMD64:
		return "x86-64"
	case MachineARM64:
		return "arm64"
	}
	return fmt.Sprintf("%#04x", m)
}
