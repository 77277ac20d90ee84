package agent

import (
	"strings"
	"testing"
)

// TestLoaderNote: what a boot says that restarted is taken once, in one line and no
// longer than a line should be: anybody who has had the disk may have written it.
func TestLoaderNote(t *testing.T) {
	b := newLoaderBox(t)
	for text, want := range map[string]string{
		"the boot loader was put back":        "the boot loader was put back",
		"one line\nanother \x1b[31mred":       "one line\uFFFDanother \uFFFD[31mred",
		strings.Repeat("x", 3*maxLoaderNotes): strings.Repeat("x", maxTextBytes) + "…",
		"":                                    "",
	} {
		b.put(loaderNote, []byte(text))
		if got, err := takeLoaderNote(b.Disk); got != want || err != nil {
			t.Errorf("%.40q, %v; want %.40q", got, err, want)
		}
		if got, err := takeLoaderNote(b.Disk); got != "" || err != nil {
			t.Errorf("taken twice: %.40q, %v", got, err)
		}
	}
}
