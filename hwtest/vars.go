package hwtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
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
	guidJunk              = guid{0x4a, 0x55, 0x4e, 0x4b, 0x4a, 0x55, 0x4e, 0x4b, 0x4a, 0x55, 0x4e, 0x4b, 0x4a, 0x55, 0x4e, 0x4b}
	guidImageSecurity     = guid{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
)

// Attributes of the Secure Boot variables: non-volatile, boot service access,
// runtime access, time-based authenticated write (UEFI 2.10 §8.2).
const secureBootAttributes = 0x01 | 0x02 | 0x04 | 0x20

const (
	junkAttributes = 0x01 | 0x02 | 0x04 // non-volatile, boot service and runtime access
	junkBytes      = 1024

	variableStart = 0x55aa
	variableAdded = 0x3f // VAR_ADDED; a bit less is on the way to being deleted
)

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

// variables is the variable store inside a firmware's variable file.
type variables struct {
	file    []byte
	at, end int // of the records, in file
}

func openVariables(file []byte) (v variables, err error) {
	if len(file) < 64 || !bytes.Equal(file[40:44], []byte("_FVH")) {
		return v, errors.New("no firmware volume at offset 0")
	}
	at := int(binary.LittleEndian.Uint16(file[48:])) // HeaderLength
	var store variableStoreHeader
	n, err := binary.Decode(file[min(at, len(file)):], binary.LittleEndian, &store)
	if err != nil || store.Signature != guidAuthVariableStore {
		return v, fmt.Errorf("no authenticated variable store at offset %d", at)
	}
	end := at + int(store.Size)
	if end > len(file) || end < at+n {
		return v, fmt.Errorf("variable store of %d bytes at offset %d of a file of %d", store.Size, at, len(file))
	}
	return variables{file, at + n, end}, nil
}

// enroll returns a copy of an OVMF variable file with the keys appended to its
// variables.
func enroll(file []byte, k SecureBootKeys) ([]byte, error) {
	v, err := openVariables(bytes.Clone(file))
	if err != nil {
		return nil, err
	}
	free, err := v.free()
	if err != nil {
		return nil, err
	}
	for _, key := range []struct {
		name  string
		guid  guid
		value []byte
	}{
		{"db", guidImageSecurity, k.DB}, {"dbx", guidImageSecurity, k.DBX},
		{"KEK", guidGlobalVariable, k.KEK}, {"PK", guidGlobalVariable, k.PK},
	} {
		if len(key.value) == 0 {
			continue
		}
		record := appendVariable(nil, key.name, key.guid, secureBootAttributes, key.value)
		if free+len(record) > v.end {
			return nil, fmt.Errorf("variable %s of %d bytes does not fit: %d bytes free", key.name, len(record), v.end-free)
		}
		free += copy(v.file[free:], record)
	}
	return v.file, nil
}

// walk calls visit with the records in their order and returns where the next goes.
func (v variables) walk(visit func(state uint8, record []byte)) (free int, err error) {
	at := v.at
	for {
		var h authVariableHeader
		n, err := binary.Decode(v.file[at:v.end], binary.LittleEndian, &h)
		if err != nil || h.StartID != variableStart {
			return at, nil // full, or the first that was never written
		}
		size := int64(n) + int64(h.NameSize) + int64(h.DataSize)
		if size > int64(v.end-at) {
			return 0, fmt.Errorf("variable at offset %d has %d bytes, %d are left", at, size, v.end-at)
		}
		next := min(align4(at+int(size)), v.end)
		visit(h.State, v.file[at:next])
		at = next
	}
}

// free is where the next variable goes.
func (v variables) free() (int, error) { return v.walk(func(uint8, []byte) {}) }

// compact drops the deleted records, as firmware does when it needs their room, and
// returns where the next goes.
func (v variables) compact() (free int, err error) {
	var live []byte
	_, err = v.walk(func(state uint8, record []byte) {
		if state == variableAdded {
			live = append(live, record...)
		}
	})
	if err != nil {
		return 0, err
	}
	n := v.at + copy(v.file[v.at:], live)
	for i := n; i < v.end; i++ {
		v.file[i] = 0xff // as erased flash is
	}
	return n, nil
}

// fill adds variables of a vendor nobody knows until not one more fits, however small.
func (v variables) fill() error {
	at, err := v.compact()
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		name := fmt.Sprintf("Junk%04d", n)
		least := len(appendVariable(nil, name, guidJunk, junkAttributes, []byte{0}))
		if at+least > v.end {
			return nil
		}
		value := make([]byte, min(junkBytes, v.end-at-least+1))
		at += copy(v.file[at:v.end], appendVariable(nil, name, guidJunk, junkAttributes, value))
	}
}

// FillVariables fills the firmware's variable store with variables that nobody asked
// for, as crash dumps and set-up tools do over the years, until not one more fits.
// The box must be off.
func (b *Box) FillVariables() error {
	file, err := os.ReadFile(b.varsPath())
	if err != nil {
		return err
	}
	v, err := openVariables(file)
	if err == nil {
		err = v.fill()
	}
	if err != nil {
		return fmt.Errorf("fill the variables in %s: %w", b.varsPath(), err)
	}
	return os.WriteFile(b.varsPath(), file, 0o600)
}

// FreeVariableBytes is how much room the firmware's variable store has left, with the
// room of deleted variables. The box must be off.
func (b *Box) FreeVariableBytes() (int, error) {
	file, err := os.ReadFile(b.varsPath())
	if err != nil {
		return 0, err
	}
	v, err := openVariables(file)
	if err != nil {
		return 0, fmt.Errorf("variables in %s: %w", b.varsPath(), err)
	}
	free, err := v.compact() // of the copy in memory
	if err != nil {
		return 0, fmt.Errorf("variables in %s: %w", b.varsPath(), err)
	}
	return v.end - free, nil
}

func appendVariable(b []byte, name string, vendor guid, attributes uint32, value []byte) []byte {
	utf := append(utf16.Encode([]rune(name)), 0)
	h := authVariableHeader{
		StartID: variableStart, State: variableAdded, Attributes: attributes,
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
