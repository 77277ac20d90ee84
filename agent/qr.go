package agent

import (
	"fmt"
	"strings"

	"rsc.io/qr"
)

// quietZone is how many light modules surround a QR code (ISO/IEC 18004 §9.1).
const quietZone = 4

// qrLines draws text as a QR code, two modules a character cell one above the other:
// a recovery key comes to 41 columns and 21 lines, which leaves room for words on a
// screen of 80 by 25. Light modules are the lit ones, as screens are mostly dark. The
// half blocks are in the fonts of the kernel's console and of VGA (code page 437).
//
// Level L is enough where nothing smears: higher ones would not fit.
func qrLines(text string) ([]string, error) {
	code, err := qr.Encode(text, qr.L)
	if err != nil {
		return nil, fmt.Errorf("QR code: %w", err)
	}
	light := func(x, y int) bool { return !code.Black(x-quietZone, y-quietZone) } // outside is light
	side := code.Size + 2*quietZone
	var lines []string
	for y := 0; y < side; y += 2 {
		var b strings.Builder
		for x := range side {
			upper, lower := light(x, y), y+1 < side && light(x, y+1)
			switch {
			case upper && lower:
				b.WriteRune('█')
			case upper:
				b.WriteRune('▀')
			case lower:
				b.WriteRune('▄')
			default:
				b.WriteByte(' ')
			}
		}
		lines = append(lines, b.String())
	}
	return lines, nil
}
