package pcr

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// EventType says what a record measures. PFP §10.4.1.
type EventType uint32

// The types that records of a UEFI boot have.
const (
	EventNoAction              EventType = 0x03
	EventSeparator             EventType = 0x04
	EventAction                EventType = 0x05
	EventSCRTMContents         EventType = 0x07
	EventSCRTMVersion          EventType = 0x08
	EventCPUMicrocode          EventType = 0x09
	EventPlatformConfigFlags   EventType = 0x0a
	EventIPL                   EventType = 0x0d
	EventPostCode              EventType = 0x01
	EventVariableDriverConfig  EventType = 0x80000001
	EventVariableBoot          EventType = 0x80000002
	EventBootServicesApp       EventType = 0x80000003
	EventBootServicesDriver    EventType = 0x80000004
	EventRuntimeServicesDriver EventType = 0x80000005
	EventGPT                   EventType = 0x80000006
	EventEFIAction             EventType = 0x80000007
	EventFirmwareBlob          EventType = 0x80000008
	EventHandoffTables         EventType = 0x80000009
	EventFirmwareBlob2         EventType = 0x8000000a
	EventHandoffTables2        EventType = 0x8000000b
	EventVariableBoot2         EventType = 0x8000000c
	EventVariableAuthority     EventType = 0x800000e0
)

func (t EventType) String() string {
	switch t {
	case EventPostCode:
		return "POST code"
	case EventNoAction:
		return "note"
	case EventSeparator:
		return "separator"
	case EventAction, EventEFIAction:
		return "action"
	case EventSCRTMContents:
		return "firmware root of trust"
	case EventSCRTMVersion:
		return "firmware version"
	case EventCPUMicrocode:
		return "CPU microcode"
	case EventPlatformConfigFlags:
		return "platform configuration"
	case EventIPL:
		return "boot loader measurement"
	case EventVariableDriverConfig:
		return "firmware variable"
	case EventVariableBoot, EventVariableBoot2:
		return "boot variable"
	case EventBootServicesApp:
		return "program"
	case EventBootServicesDriver, EventRuntimeServicesDriver:
		return "driver"
	case EventGPT:
		return "partition table"
	case EventFirmwareBlob, EventFirmwareBlob2:
		return "firmware volume"
	case EventHandoffTables, EventHandoffTables2:
		return "firmware tables"
	case EventVariableAuthority:
		return "key that verified an image"
	}
	return fmt.Sprintf("type 0x%08x", uint32(t))
}

const maxTextRunes = 120 // of a description, which goes on a console

// Describe says in a few words what the record measures: the name of a
// variable, the path of a program, a boot loader's text. It trusts nothing: the
// text is cut, printable, and not covered by the register.
func (e Event) Describe() string {
	switch e.Type {
	case EventSeparator:
		return e.Type.String() + " " + describeSeparator(e.Data)
	case EventVariableDriverConfig, EventVariableBoot, EventVariableBoot2, EventVariableAuthority:
		if name, data, ok := e.Variable(); ok {
			return fmt.Sprintf("%v %s (%d bytes)", e.Type, printable(name), len(data))
		}
	case EventBootServicesApp, EventBootServicesDriver, EventRuntimeServicesDriver:
		if path := imagePath(e.Data); path != "" {
			return e.Type.String() + " " + printable(path)
		}
	case EventIPL, EventAction, EventEFIAction, EventSCRTMVersion, EventPostCode, EventNoAction:
		if text := eventText(e.Data); text != "" {
			return fmt.Sprintf("%v %q", e.Type, text)
		}
	}
	return fmt.Sprintf("%v (%d bytes)", e.Type, len(e.Data))
}

// describeSeparator: PFP §10.4.1, EV_SEPARATOR. Some firmware gives it a wrong length.
func describeSeparator(data []byte) string {
	if len(data) != 4 {
		return fmt.Sprintf("of %d bytes instead of 4", len(data))
	}
	switch v := binary.LittleEndian.Uint32(data); v {
	case 0, 0xffffffff:
		return "(end of firmware measurements)"
	case 1:
		return "(firmware reports an error)"
	default:
		return fmt.Sprintf("0x%08x", v)
	}
}

// Variable is the name and content of the measured UEFI variable. PFP
// §10.2.6, UEFI_VARIABLE_DATA.
func (e Event) Variable() (name string, data []byte, ok bool) {
	const fixed = 16 + 8 + 8 // vendor GUID, name length in UTF-16 units, data length in bytes
	if len(e.Data) < fixed {
		return "", nil, false
	}
	nameUnits := binary.LittleEndian.Uint64(e.Data[16:])
	dataBytes := binary.LittleEndian.Uint64(e.Data[24:])
	body := e.Data[fixed:]
	if nameUnits > uint64(len(body)/2) {
		return "", nil, false
	}
	data = body[2*nameUnits:]
	if dataBytes > uint64(len(data)) {
		return "", nil, false
	}
	return utf16Text(body[:2*nameUnits]), data[:dataBytes], true
}

// imagePath is the device path of a UEFI_IMAGE_LOAD_EVENT, as far as it names
// files: PFP §10.2.3, UEFI 2.10 §10.3.
func imagePath(data []byte) string {
	const fixed = 8 + 8 + 8 + 8 // location, length, link time, length of path
	if len(data) < fixed {
		return ""
	}
	pathBytes := binary.LittleEndian.Uint64(data[24:])
	path := data[fixed:]
	if pathBytes < uint64(len(path)) {
		path = path[:pathBytes]
	}
	var parts []string
	for len(path) >= 4 {
		size := int(binary.LittleEndian.Uint16(path[2:]))
		if size < 4 || size > len(path) {
			break
		}
		node := path[4:size]
		switch kind := binary.BigEndian.Uint16(path); kind {
		case 0x0404: // media, file path
			parts = append(parts, utf16Text(node))
		case 0x0401: // media, hard drive
			if len(node) >= 4 {
				parts = append(parts, fmt.Sprintf("partition %d ", binary.LittleEndian.Uint32(node)))
			}
		case 0x0406, 0x0407: // media, firmware file and firmware volume
			if len(node) == 16 {
				parts = append(parts, "firmware/"+hex.EncodeToString(node[:4]))
			}
		}
		path = path[size:]
	}
	return strings.Join(parts, "")
}

// eventText reads text that is UTF-16 with systemd-boot and the stub, and
// ASCII with GRUB and the firmware; anything else gives "".
func eventText(data []byte) string {
	trimmed := strings.TrimRight(string(data), "\x00")
	if trimmed == "" {
		return ""
	}
	if strings.IndexByte(trimmed, 0) < 0 && utf8.ValidString(trimmed) {
		return printable(trimmed)
	}
	if len(data)%2 == 0 {
		if text := utf16Text(data); text != "" && strings.IndexByte(text, 0) < 0 {
			return printable(text)
		}
	}
	return ""
}

// utf16Text decodes UTF-16LE up to its terminating NUL.
func utf16Text(b []byte) string {
	units := make([]uint16, len(b)/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	for len(units) > 0 && units[len(units)-1] == 0 {
		units = units[:len(units)-1]
	}
	return string(utf16.Decode(units))
}

// printable replaces what could disturb a console and cuts what is long.
func printable(s string) string {
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n++; n > maxTextRunes {
			b.WriteString("…")
			break
		}
		if !unicode.IsPrint(r) {
			r = '?'
		}
		b.WriteRune(r)
	}
	return b.String()
}
