package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"

	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/partition"
)

// loadOption is what of an EFI_LOAD_OPTION (UEFI 2.10 §3.1.3) concerns a file on a
// partition of a GPT disk.
type loadOption struct {
	Active      bool
	Description string
	Drive       driveNode
	File        string // with backslashes, from the partition's root
}

// driveNode is the node of a device path that names the partition (UEFI 2.10 §10.3.5.1).
// Firmware finds it by the GUID on whatever disk; a path may begin with it.
type driveNode struct {
	Number              uint32 // from 1
	StartLBA, SizeInLBA uint64
	GUID                sigdb.GUID
	Format              uint8 // 2: GPT
	SignatureType       uint8 // 2: a GUID
}

const (
	loadOptionActive = 1

	mediaDevice, driveNodeType, fileNode = 4, 1, 4
	endPath, endEntire                   = 0x7f, 0xff

	pathHeaderBytes = 4
	lbaBytes        = 512
)

// marshal is the form of a variable Boot####.
func (o loadOption) marshal() []byte {
	drive := binary.LittleEndian.AppendUint32(nil, o.Drive.Number)
	drive = binary.LittleEndian.AppendUint64(drive, o.Drive.StartLBA)
	drive = binary.LittleEndian.AppendUint64(drive, o.Drive.SizeInLBA)
	drive = append(append(drive, o.Drive.GUID[:]...), o.Drive.Format, o.Drive.SignatureType)
	path := deviceNode(mediaDevice, driveNodeType, drive)
	path = append(path, deviceNode(mediaDevice, fileNode, utf16Z(o.File))...)
	path = append(path, deviceNode(endPath, endEntire, nil)...)

	attributes := uint32(0)
	if o.Active {
		attributes = loadOptionActive
	}
	b := binary.LittleEndian.AppendUint32(nil, attributes)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(path)))
	return append(append(b, utf16Z(o.Description)...), path...)
}

func deviceNode(kind, sub byte, content []byte) []byte {
	b := binary.LittleEndian.AppendUint16([]byte{kind, sub}, uint16(pathHeaderBytes+len(content)))
	return append(b, content...)
}

func utf16Z(s string) (b []byte) {
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// cutUTF16Z takes a text that ends with a zero off b.
func cutUTF16Z(b []byte) (s string, rest []byte, ok bool) {
	var units []uint16
	for len(b) >= 2 {
		u := binary.LittleEndian.Uint16(b)
		b = b[2:]
		if u == 0 {
			return string(utf16.Decode(units)), b, true
		}
		units = append(units, u)
	}
	return "", nil, false
}

// errOtherOption is for a load option that does not start a file of a GPT partition.
var errOtherOption = errors.New("not a file on a partition of a GPT disk")

// parseLoadOption reads a variable Boot####. What stands before the partition in the
// path, and data behind it, is passed over: firmware puts both there.
func parseLoadOption(b []byte) (o loadOption, err error) {
	if len(b) < 6 {
		return o, fmt.Errorf("a load option of %d bytes", len(b))
	}
	o.Active = binary.LittleEndian.Uint32(b)&loadOptionActive != 0
	pathBytes := int(binary.LittleEndian.Uint16(b[4:]))
	description, rest, ok := cutUTF16Z(b[6:])
	if !ok || pathBytes > len(rest) {
		return o, errors.New("a load option that is cut short")
	}
	o.Description = description
	path := rest[:pathBytes]
	found := false
	for len(path) >= pathHeaderBytes && path[0] != endPath {
		size := int(binary.LittleEndian.Uint16(path[2:]))
		if size < pathHeaderBytes || size > len(path) {
			return o, errors.New("a load option whose device path is damaged")
		}
		node := path[pathHeaderBytes:size]
		switch {
		case path[0] == mediaDevice && path[1] == driveNodeType:
			n, err := binary.Decode(node, binary.LittleEndian, &o.Drive)
			if err != nil || n != len(node) || o.Drive.Format != 2 || o.Drive.SignatureType != 2 {
				return o, errOtherOption
			}
			found = true
		case path[0] == mediaDevice && path[1] == fileNode:
			text, _, ok := cutUTF16Z(node)
			if !ok {
				return o, errors.New("a load option whose file name is damaged")
			}
			o.File += text
		}
		path = path[size:]
	}
	if !found || o.File == "" {
		return o, errOtherOption
	}
	return o, nil
}

// on says whether the option is for a file of this partition, wherever that lies.
func (o loadOption) on(p partition.Partition) bool {
	id, err := uuid.Parse(p.GUID)
	return err == nil && o.Drive.GUID == sigdb.FromUUID(id)
}

// espPath is a file of the ESP as package partition names it.
func espPath(file string) string { return strings.Trim(strings.ReplaceAll(file, `\`, "/"), "/") }

// newLoadOption is for a file on a partition of that number.
func newLoadOption(description string, number int, p partition.Partition, path string) (o loadOption, err error) {
	id, err := uuid.Parse(p.GUID)
	if err != nil {
		return o, fmt.Errorf("partition %s: %w", p.Name, err)
	}
	return loadOption{
		Active: true, Description: description, File: `\` + strings.ReplaceAll(path, "/", `\`),
		Drive: driveNode{uint32(number), uint64(p.StartBytes / lbaBytes), uint64(p.SizeBytes / lbaBytes), sigdb.FromUUID(id), 2, 2},
	}, nil
}

// parseBootOrder reads BootOrder, or BootCurrent with its one number.
func parseBootOrder(b []byte) (order []uint16, err error) {
	if len(b)%2 != 0 {
		return nil, fmt.Errorf("a boot order of %d bytes", len(b))
	}
	for ; len(b) > 0; b = b[2:] {
		order = append(order, binary.LittleEndian.Uint16(b))
	}
	return order, nil
}

func marshalBootOrder(order []uint16) []byte {
	var b bytes.Buffer
	for _, n := range order {
		b.Write([]byte{byte(n), byte(n >> 8)})
	}
	return b.Bytes()
}
