package hwtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf16"
)

// OVMF keeps its variables in a firmware volume (PI 1.7 vol. 3 §3.2.1) that
// holds an authenticated variable store (edk2 MdeModulePkg
// Include/Guid/VariableFormat.h). Writing keys into a fresh store is what the
// factory does, and saves the enrolment boot.

type guid [16]byte // mixed endian, as on disk

var (
	guidAuthVariableStore = guid{0x78, 0x2c, 0xf3, 0xaa, 0x7b, 0x94, 0x9a, 0x43, 0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92}
	guidGlobalVariable    = guid{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	guidImageSecurity     = guid{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
)

// Attributes of the Secure Boot variables: non-volatile, boot service access,
// runtime access, time-based authenticated write (UEFI 2.10 §8.2).
const secureBootAttributes = 0x01 | 0x02 | 0x04 | 0x20

type variableStoreHeader struct {
	Signature guid
	Size      uint32
	Format    uint8
	State     uint8
	_         [6]byte
}

type authVariableHeader struct {
	StartID        uint16
	State          uint8
	_              uint8
	Attributes     uint32
	MonotonicCount uint64
	Year           uint16
	Month, Day     uint8
	_              [12]byte // rest of EFI_TIME
	PubKeyIndex    uint32
	NameSize       uint32
	DataSize       uint32
	VendorGUID     guid
}

// enroll returns a copy of an OVMF variable file with the keys appended to its
// variables.
func enroll(vars []byte, k SecureBootKeys) ([]byte, error) {
	vars = bytes.Clone(vars)
	if len(vars) < 64 || !bytes.Equal(vars[40:44], []byte("_FVH")) {
		return nil, errors.New("no firmware volume at offset 0")
	}
	at := int(binary.LittleEndian.Uint16(vars[48:])) // HeaderLength
	var store variableStoreHeader
	n, err := binary.Decode(vars[min(at, len(vars)):], binary.LittleEndian, &store)
	if err != nil || store.Signature != guidAuthVariableStore {
		return nil, fmt.Errorf("no authenticated variable store at offset %d", at)
	}
	end := at + int(store.Size)
	if end > len(vars) {
		return nil, fmt.Errorf("variable store of %d bytes ends behind the file of %d", store.Size, len(vars))
	}
	if at, err = freeOffset(vars[:end], at+n); err != nil {
		return nil, err
	}
	for _, v := range []struct {
		name  string
		guid  guid
		value []byte
	}{
		{"db", guidImageSecurity, k.DB}, {"dbx", guidImageSecurity, k.DBX},
		{"KEK", guidGlobalVariable, k.KEK}, {"PK", guidGlobalVariable, k.PK},
	} {
		if len(v.value) == 0 {
			continue
		}
		record := appendVariable(nil, v.name, v.guid, v.value)
		if at+len(record) > end {
			return nil, fmt.Errorf("variable %s of %d bytes does not fit: %d bytes free", v.name, len(record), end-at)
		}
		copy(vars[at:], record)
		at += len(record)
	}
	return vars, nil
}

// freeOffset skips the variables in the store and returns where the next goes.
func freeOffset(store []byte, at int) (int, error) {
	for {
		var h authVariableHeader
		n, err := binary.Decode(store[at:], binary.LittleEndian, &h)
		if err != nil {
			return 0, fmt.Errorf("variable store is full at offset %d", at)
		}
		if h.StartID != 0x55aa {
			return at, nil
		}
		size := int64(n) + int64(h.NameSize) + int64(h.DataSize)
		if size > int64(len(store)-at) {
			return 0, fmt.Errorf("variable at offset %d has %d bytes, %d are left", at, size, len(store)-at)
		}
		at = align4(at + int(size))
	}
}

func appendVariable(b []byte, name string, vendor guid, value []byte) []byte {
	utf := append(utf16.Encode([]rune(name)), 0)
	h := authVariableHeader{
		StartID: 0x55aa, State: 0x3f /* added */, Attributes: secureBootAttributes,
		Year: 2020, Month: 1, Day: 1,
		NameSize: uint32(2 * len(utf)), DataSize: uint32(len(value)), VendorGUID: vendor,
	}
	b, err := binary.Append(b, binary.LittleEndian, h)
	if err != nil {
		panic(err) // fixed-size struct
	}
	if b, err = binary.Append(b, binary.LittleEndian, utf); err != nil {
		panic(err)
	}
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0xff)
	}
	return b
}

func align4(n int) int { return (n + 3) &^ 3 }
