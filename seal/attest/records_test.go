package attest

import (
	"bytes"
	"errors"
	"testing"
	"testing/fstest"
)

// TestRecords: a box is found by its TPM, whatever it calls itself.
func TestRecords(t *testing.T) {
	r := newRig(t, "secure")
	r.enrol(t)
	record, answer := r.policy.Known, r.answer(t, r.challenge(t))
	const name, another = "holdfast-record-0b7d9f0e-0000-4000-8000-000000000001.json", "holdfast-record-0b7d9f0e-0000-4000-8000-000000000002.json"
	stranger := *record
	stranger.Box, stranger.EK, stranger.AK = another[16:52], record.AK[4:], "000b"+record.EK
	folder := func(damaged string) fstest.MapFS {
		all := fstest.MapFS{name: {Data: record.Marshal()}, another: {Data: stranger.Marshal()}, "notes.txt": {}}
		if damaged != "" {
			all[damaged] = &fstest.MapFile{Data: []byte("{")}
		}
		return all
	}
	for _, tt := range []struct {
		what    string
		change  func(*Answer)
		damaged string
		want    string // empty: an error
	}{
		{"as it is", func(*Answer) {}, "", name},
		{"another's record is damaged", func(*Answer) {}, another, name},
		{"its record is damaged", func(*Answer) {}, name, ""},
		{"without a name", func(a *Answer) { a.Statement.Box = "" }, "", name},
		{"under a new name", func(a *Answer) { a.Statement.Box = "0b7d9f0e-0000-4000-8000-000000000003" }, "", name},
		{"under another's name", func(a *Answer) { a.Statement.Box = another[16:52] }, "", name},
		{"without a statement", func(a *Answer) { a.Statement = nil }, "", name},
		{"without name and endorsement key", func(a *Answer) { a.Statement.Box, a.EKPublic = "", nil }, "", name},
		{"another key, its own name", func(a *Answer) { a.EKPublic, a.AKPublic = []byte{1}, []byte{2} }, "", name},
		{"another key, no name", func(a *Answer) { a.Statement.Box, a.EKPublic, a.AKPublic = "", []byte{1}, []byte{2} }, "", "none"},
		{"another key, no name, and a record is damaged", func(a *Answer) { a.Statement.Box, a.EKPublic, a.AKPublic = "", []byte{1}, []byte{2} }, name, ""},
	} {
		a, said := *answer, *answer.Statement
		a.Statement = &said
		tt.change(&a)
		records := Records{Dir: folder(tt.damaged)}
		for range 2 { // the second time from what it knows
			got, file, err := records.Find(&a)
			switch {
			case tt.want == "":
				if !errors.Is(err, ErrMalformed) || got != nil {
					t.Errorf("%s: %q, %v", tt.what, file, err)
				}
			case tt.want == "none":
				if got != nil || file != "" || err != nil {
					t.Errorf("%s: %q, %v", tt.what, file, err)
				}
			case err != nil || file != tt.want || !bytes.Equal(got.Marshal(), record.Marshal()):
				t.Errorf("%s: %q, %v", tt.what, file, err)
			}
		}
	}
	if got, _, err := (&Records{}).Find(answer); got != nil || err != nil {
		t.Errorf("without a folder: %v, %v", got, err)
	}
}
