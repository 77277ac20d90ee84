package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"time"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// variable is the content of a Secure Boot variable, or a signed update of one.
type variable struct {
	Type      string `json:"type"` // "variable-update", "signature-list"
	SizeBytes int64  `json:"size_bytes"`
	// Variable, Append, Signer and Time are of an update.
	Variable string    `json:"variable,omitempty"`
	Append   bool      `json:"append,omitempty"`
	Signer   string    `json:"signer,omitempty"` // as it claims; nobody is trusted here
	Time     time.Time `json:"time,omitzero"`
	// Content is a line for each list of signatures.
	Content []string `json:"content"`
	findings
}

func inspectVariable(src source) (artefact, error) {
	if src.Size() > sigdb.MaxBytes {
		return nil, fmt.Errorf("%d bytes; a firmware variable has at most %d", src.Size(), sigdb.MaxBytes)
	}
	b, err := io.ReadAll(io.NewSectionReader(src, 0, src.Size()))
	if err != nil {
		return nil, err
	}
	v := &variable{Type: "signature-list", SizeBytes: src.Size()}
	a, err := sigdb.ParseAuth(b)
	if err != nil {
		d, err := sigdb.Parse(b)
		v.Content = d.Describe()
		if err != nil {
			v.problem("what follows is no signature list: %v", err)
		}
		return v, nil
	}
	v.Type, v.Time, v.Content = "variable-update", a.Time, a.Content.Describe()
	name, appends, signer, err := a.Claims()
	if err != nil {
		v.problem("%v", err)
		return v, nil
	}
	sum := sha256.Sum256(signer.Raw)
	v.Variable, v.Append, v.Signer = name, appends, fmt.Sprintf("%q (SHA-256 %x)", signer.Subject.CommonName, sum[:8])
	return v, nil
}

func (v *variable) print(s *sheet) {
	if v.Type == "signature-list" {
		s.line("signature list, " + bytesText(v.SizeBytes))
		s.facts("holds", v.Content...)
		return
	}
	what := "replaces"
	if v.Append {
		what = "adds to"
	}
	if v.Variable == "" {
		what = "is for no variable"
	}
	s.line(fmt.Sprintf("signed update of a firmware variable, %s", bytesText(v.SizeBytes)))
	s.fact(what, v.Variable)
	s.fact("signed by", v.Signer)
	s.fact("stamp", v.Time.Format(time.RFC3339))
	s.facts("holds", v.Content...)
}
