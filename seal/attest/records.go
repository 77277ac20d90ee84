package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
)

// Records is a vendor's folder of [Record] files, each under its box's
// [Answer.RecordName]. The zero Records has none. It must not be used by several
// goroutines at once, and notices of what was written behind a Find only what it
// is told by Add.
type Records struct {
	// Dir is the folder; a folder that is not there has no records.
	Dir fs.FS

	// byKey are the files by their EK's digest and by their AK's name.
	byKey   map[string]string
	damaged error
}

// Find returns what is recorded of the box that gave the answer, and the name of the
// file; nil where it is nobody's. The box is known by its TPM, whatever it calls itself:
// an intruder who changes its name is judged by its own record. Where no record has the
// keys, it is the record that has the name, and Verify says that the keys are others.
// A TPM has more keys than those that are recorded, though: an answer with others, under
// another name, is a stranger's.
//
// The error is that the record is damaged, or that one is which may be this box's.
func (r *Records) Find(a *Answer) (*Record, string, error) {
	if r.Dir == nil {
		return nil, "", nil
	}
	keys := []string{hex.EncodeToString(nameOf(a.AKPublic))}
	if len(a.EKPublic) > 0 {
		sum := sha256.Sum256(a.EKPublic)
		keys = append(keys, hex.EncodeToString(sum[:]))
	}
	name := a.RecordName()
	named, err := r.read(name)
	if err != nil {
		return nil, "", err
	}
	if named != nil && (named.AK == keys[0] || len(keys) > 1 && named.EK == keys[1]) {
		return named, name, nil
	}
	if err := r.scan(); err != nil {
		return nil, "", err
	}
	for _, key := range keys {
		if other, ok := r.byKey[key]; ok {
			found, err := r.read(other)
			return found, other, err
		}
	}
	switch {
	case named != nil:
		return named, name, nil
	case r.damaged != nil:
		return nil, "", fmt.Errorf("there is no %s, and one that may be of the same box is damaged: %w", name, r.damaged)
	}
	return nil, "", nil
}

// Add tells of a record that was written to the file since.
func (r *Records) Add(file string, record *Record) {
	if r.byKey != nil { // else it will be read
		r.byKey[record.EK], r.byKey[record.AK] = file, file
	}
}

// scan reads all records, once.
func (r *Records) scan() error {
	if r.byKey != nil {
		return nil
	}
	entries, err := fs.ReadDir(r.Dir, ".")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list records: %w", err)
	}
	r.byKey = map[string]string{}
	for _, e := range entries {
		file := e.Name()
		if !strings.HasPrefix(file, RecordPrefix) || !strings.HasSuffix(file, ".json") {
			continue // half a record that is being written, for one
		}
		record, err := r.read(file)
		switch {
		case err != nil:
			r.damaged = err
		case record != nil:
			r.byKey[record.EK], r.byKey[record.AK] = file, file
		}
	}
	return nil
}

// read returns nil where there is no such file.
func (r *Records) read(name string) (record *Record, err error) {
	f, err := r.Dir.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := io.ReadAll(io.LimitReader(f, maxRecordBytes+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if record, err = ParseRecord(b); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return record, nil
}
