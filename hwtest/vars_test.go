package hwtest

import (
	"bytes"
	"os"
	"testing"
)

// TestVariableStore fills the store of a fresh board: what was there stays readable, to
// the last byte, and deleted variables make room.
func TestVariableStore(t *testing.T) {
	fw, err := findFirmware(true)
	if err != nil {
		t.Fatal(err)
	}
	template, err := os.ReadFile(fw.vars)
	if err != nil {
		t.Fatal(err)
	}
	keys := SecureBootKeys{PK: []byte("platform key"), KEK: []byte("exchange key"), DB: bytes.Repeat([]byte("db"), 3000)}
	file, err := enroll(template, keys)
	if err != nil {
		t.Fatal(err)
	}
	v, err := openVariables(file)
	if err != nil {
		t.Fatal(err)
	}
	enrolled, err := v.free()
	if err != nil {
		t.Fatal(err)
	}
	kept := bytes.Clone(file[v.at:enrolled])
	if err := v.fill(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(file[v.at:enrolled], kept) || !bytes.Equal(file[:v.at], template[:v.at]) || !bytes.Equal(file[v.end:], template[v.end:]) {
		t.Error("more than the free room was written")
	}
	var junk []int // where
	at := v.at
	free, err := v.walk(func(state uint8, record []byte) {
		if bytes.Contains(record, guidJunk[:]) {
			junk = append(junk, at)
		}
		at += len(record)
	})
	if err != nil || v.end-free > 64+len("Junk0000\x00")*2 {
		t.Errorf("%d bytes are free (%v)", v.end-free, err)
	}
	if want := (v.end - enrolled) / (junkBytes + 100); len(junk) < want {
		t.Errorf("%d junk variables, want %d", len(junk), want)
	}
	file[junk[0]+2] &^= 2 // deleted: VAR_DELETED clears this bit
	again, err := v.compact()
	if err != nil || free-again < junkBytes || !bytes.Equal(file[v.at:enrolled], kept) {
		t.Errorf("a deleted variable makes %d bytes of room (%v)", free-again, err)
	}
	if _, err := openVariables(template[:100]); err == nil {
		t.Error("a torn store was opened")
	}
}
