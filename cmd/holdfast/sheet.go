package main

import (
	"io"
	"strings"
	"text/tabwriter"
	"unicode"
)

// sheet is aligned text for people. Whatever is put on it may come from a
// stranger's file, so nothing that a terminal obeys gets through.
type sheet struct{ lines []string }

// line is text by itself, such as a title; it ends the alignment of what is above.
func (s *sheet) line(text string) { s.lines = append(s.lines, plain(text)) }

// fact is a row under the title. Without cells there is nothing to tell and no row.
func (s *sheet) fact(name string, cells ...string) {
	for len(cells) > 0 && cells[len(cells)-1] == "" {
		cells = cells[:len(cells)-1]
	}
	if len(cells) == 0 {
		return
	}
	row := "  " + plain(name)
	for _, c := range cells {
		row += "\t" + plain(c)
	}
	s.lines = append(s.lines, row)
}

// facts is one row for each text, named once.
func (s *sheet) facts(name string, texts ...string) {
	for _, t := range texts {
		s.fact(name, t)
		name = ""
	}
}

func (s *sheet) writeTo(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if _, err := io.WriteString(t, strings.Join(s.lines, "\n")+"\n"); err != nil {
		return err
	}
	return t.Flush()
}

// plain makes text one printable line.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}
