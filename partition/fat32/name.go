package fat32

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// splitPath cleans a slash-separated path into elements relative to the root.
func splitPath(p string) []string {
	p = path.Clean("/" + p)
	if p == "/" {
		return nil
	}
	return strings.Split(p[1:], "/")
}

// checkName says whether we may create a file of that name. Reading is more lenient.
func checkName(name string) error {
	if !utf8.ValidString(name) {
		return fmt.Errorf("name %q is not UTF-8", name)
	}
	if n := len(utf16.Encode([]rune(name))); n == 0 || n > maxNameUnits {
		return fmt.Errorf("name %q has %d UTF-16 units; 1 to %d fit one folder sector", name, n, maxNameUnits)
	}
	if i := strings.IndexFunc(name, forbidden); i >= 0 {
		return fmt.Errorf("name %q: character %q is not allowed on FAT", name, name[i])
	}
	if strings.TrimSpace(name) != name || strings.HasSuffix(name, ".") {
		return fmt.Errorf("name %q begins or ends in a space or ends in a dot", name)
	}
	return nil
}

func forbidden(r rune) bool { return r < 0x20 || r == 0x7F || strings.ContainsRune(`"*/:<>?\|`, r) }

// shortChar says whether c may stand in a short name (FAT 1.03, "Long Name Limits and Character Sets").
func shortChar(c rune) bool {
	return c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c < 0x80 && strings.ContainsRune("$%'-_@~`!(){}^#&", c)
}

// alias is the 11 bytes of a short name.
type alias [11]byte

// String is the name as it is shown when there is no long one.
func (a alias) String() string { return a.show(0) }

// show renders the short name, lower-casing as the NTRes bits say. Bytes that
// would break a path become '_': such a name is garbage, but it must not climb.
func (a alias) show(ntRes uint8) string {
	base, ext := a.part(0, 8, ntRes&ntLowerBase != 0), a.part(8, 11, ntRes&ntLowerExt != 0)
	if ext == "" {
		return base
	}
	return base + "." + ext
}

func (a alias) part(from, to int, lower bool) string {
	var s strings.Builder
	for i, c := range a[from:to] {
		if from == 0 && i == 0 && c == 0x05 { // stands for 0xE5, which would mean deleted
			c = 0xE5
		}
		switch {
		case c >= 0x80:
			s.WriteRune([]rune(cp437)[c-0x80])
		case c != ' ' && forbidden(rune(c)):
			s.WriteByte('_')
		case lower && c >= 'A' && c <= 'Z':
			s.WriteByte(c + 'a' - 'A')
		default:
			s.WriteByte(c)
		}
	}
	return strings.TrimRight(s.String(), " ")
}

// cp437 is the upper half of the OEM code page that Linux and firmware assume.
const cp437 = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐" +
	"└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0"

// checksum ties long name slots to their short entry (FAT 1.03, "ChkSum").
func (a alias) checksum() (sum uint8) {
	for _, c := range a {
		sum = sum<<7 | sum>>1
		sum += c
	}
	return sum
}

// makeAlias derives a short name that taken does not know (FAT 1.03, "The
// Basis-Name Generation Algorithm" and "The Numeric-Tail Generation Algorithm").
// Characters outside ASCII become '_': no code page is right everywhere.
func makeAlias(name string, taken func(string) bool) (alias, error) {
	base, ext, lossy := basisName(name)
	if a := joinAlias(base, ext); !lossy && !taken(a.String()) {
		return a, nil
	}
	for n := 1; n <= 999999; n++ {
		tail := "~" + strconv.Itoa(n)
		if a := joinAlias(base[:min(len(base), 8-len(tail))]+tail, ext); !taken(a.String()) {
			return a, nil
		}
	}
	return alias{}, errors.New("no short name left")
}

// basisName is upper-case base and extension, and whether anything but case was lost.
func basisName(name string) (base, ext string, lossy bool) {
	trimmed := strings.TrimLeft(strings.ReplaceAll(name, " ", ""), ".")
	lossy = trimmed != name
	base = trimmed
	if dot := strings.LastIndexByte(trimmed, '.'); dot >= 0 {
		base, ext = trimmed[:dot], trimmed[dot+1:]
	}
	clean := func(s string, limit int) string {
		var out []byte
		for _, r := range s {
			if r >= 'a' && r <= 'z' {
				r += 'A' - 'a'
			}
			if r == '.' {
				lossy = true
				continue
			}
			if !shortChar(r) {
				lossy, r = true, '_'
			}
			out = append(out, byte(r))
		}
		if len(out) > limit {
			lossy, out = true, out[:limit]
		}
		return string(out)
	}
	return clean(base, 8), clean(ext, 3), lossy
}

func joinAlias(base, ext string) (a alias) {
	copy(a[:], "           ")
	copy(a[:8], base)
	copy(a[8:], ext)
	return a
}

// entrySet is the slots of a file in disk order: long name slots, last part
// first, then the short entry. A name that is its own short name needs no long one.
func entrySet(name string, e dirEntry) []byte {
	short := appendStruct(nil, e)
	if alias(e.Name).String() == name {
		return short
	}
	units := utf16.Encode([]rune(name))
	n := (len(units) + unitsPerSlot - 1) / unitsPerSlot
	if len(units) < n*unitsPerSlot {
		units = append(units, 0)
	}
	for len(units) < n*unitsPerSlot {
		units = append(units, 0xFFFF)
	}
	var set []byte
	for i := n; i >= 1; i-- {
		part := units[(i-1)*unitsPerSlot:]
		l := longEntry{Ord: uint8(i), Attr: attrLongName, Chksum: alias(e.Name).checksum()}
		if i == n {
			l.Ord |= lastLong
		}
		copy(l.Name1[:], part)
		copy(l.Name2[:], part[5:])
		copy(l.Name3[:], part[11:])
		set = appendStruct(set, l)
	}
	return append(set, short...)
}

// longName collects the slots before a short entry.
type longName struct {
	slots []int // indexes in the folder, in disk order
	units []uint16
	next  uint8 // Ord that has to follow; 0: complete
	sum   uint8
}

// add takes a slot that continues the name, and says whether it did.
func (l *longName) add(slot int, e longEntry) bool {
	if e.Type != 0 || e.FstClusLO != 0 {
		return false
	}
	ord := e.Ord
	if ord&lastLong != 0 {
		ord &^= lastLong
		if len(l.slots) != 0 || ord == 0 || ord > maxLongSlots {
			return false
		}
		l.sum = e.Chksum
	} else if len(l.slots) == 0 || ord == 0 || ord != l.next || e.Chksum != l.sum {
		return false
	}
	l.slots = append(l.slots, slot)
	l.next = ord - 1
	part := slices.Concat(e.Name1[:], e.Name2[:], e.Name3[:])
	l.units = append(part, l.units...)
	return true
}

// owns says whether the collected slots are the name of short entry a.
func (l *longName) owns(a alias) bool {
	return len(l.slots) > 0 && l.next == 0 && l.sum == a.checksum()
}

// String is the name, or "" when it is not one that a path could hold.
func (l *longName) String() string {
	units := l.units
	if i := slices.Index(units, 0); i >= 0 {
		units = units[:i]
	}
	name := string(utf16.Decode(units))
	if name == "." || name == ".." || strings.ContainsFunc(name, forbidden) {
		return ""
	}
	return name
}
