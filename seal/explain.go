package seal

import (
	"fmt"
	"maps"
	"slices"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// maxExplained is how many events of the log an explanation names per register.
const maxExplained = 12

// Explain says, one sentence a line, which registers changed since sealing and
// what that means. sealed are the old values (of [Record.PCRs], or of the
// policy), now the present ones; registers in only one of them are passed over.
// log may be the zero Log.
func Explain(sealed, now map[int]pcr.Digest, log pcr.Log) []string {
	var lines []string
	replayed := log.Replay()
	for _, i := range slices.Sorted(maps.Keys(sealed)) {
		old := sealed[i]
		v, ok := now[i]
		if !ok || v == old {
			continue
		}
		lines = append(lines, fmt.Sprintf("PCR %s changed: it was %x… when the key was sealed and is %x… now.", pcr.Label(i), old[:6], v[:6]))
		lines = append(lines, meaning(i, v))
		lines = append(lines, explainByLog(i, v, replayed, log)...)
	}
	if len(lines) == 0 {
		return []string{"No register differs from the time of sealing; the cause lies elsewhere (another TPM, a cleared TPM, or a missing signature)."}
	}
	return append(lines, log.Notes...)
}

// explainByLog names what was measured, but only if that is what the register holds.
func explainByLog(i int, v pcr.Digest, replayed map[int]pcr.Digest, log pcr.Log) []string {
	if i > 7 && i != 11 {
		return nil
	}
	r, ok := replayed[i]
	switch {
	case log.Class != pcr.CryptoAgile:
		return []string{fmt.Sprintf("The firmware's event log is %v and says nothing about PCR %d.", log.Class, i)}
	case !ok:
		return []string{fmt.Sprintf("The firmware's event log cannot be replayed for PCR %d.", i)}
	case r != v && i != 11:
		return []string{fmt.Sprintf("The firmware's event log does not lead to this value of PCR %d, so it explains nothing: the log is incomplete or the register was extended by something else.", i)}
	}
	var lines []string
	for n, e := range log.Of(i) {
		if n == maxExplained {
			lines = append(lines, fmt.Sprintf("  and %d more measurements", len(log.Of(i))-n))
			break
		}
		lines = append(lines, "  measured: "+e.Describe())
	}
	return lines
}

// meaning is the innocent and the hostile explanation.
func meaning(i int, now pcr.Digest) string {
	if pcr.Unextended(now) {
		return "Nothing was measured into it in this boot: the firmware's measurements were switched off, or the boot path was replaced."
	}
	switch i {
	case 0, 2:
		return "A firmware update or another add-in card does this; so does malicious firmware."
	case 1, 3, 6:
		return "A changed firmware setting or different hardware does this."
	case 4:
		return "Another boot loader, a changed boot order or a boot device that was tried first does this; so does booting something else from this machine."
	case 5:
		return "A changed partition table or boot loader configuration does this."
	case 7:
		return "An update of the Secure Boot keys or of the revocation list (dbx), or switching Secure Boot on or off, does this; so does an attacker who enrols his own keys."
	case 11:
		return "Another image, or a later phase of the same boot, does this; a properly signed image carries a signature for its own value."
	case 12:
		return "An edited kernel command line, a credential or an add-on does this."
	}
	return "Software that ran before this point measured something else."
}
