package agent

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"os"
	"reflect"
	"slices"
	"strconv"
	"testing"

	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/seal"
)

// What lies on the ESP or in the header of a volume can be written by who has the disk;
// an event log comes from the firmware.

// FuzzSlotCarry: what is accepted and written again reads as the same.
func FuzzSlotCarry(f *testing.F) {
	text, err := os.ReadFile("../seal/testdata/systemd-257-everything.json")
	if err != nil {
		f.Fatal(err)
	}
	token, err := seal.ParseToken(text)
	if err != nil {
		f.Fatal(err)
	}
	carry, err := newSlotCarry(token, make([]byte, 32), make([]byte, slotcrypt.KeyBytes), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(carry)
	f.Add([]byte(`{"format":1,"token":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, token, err := readSlotCarry(text)
		if err != nil {
			return
		}
		again, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		c2, token2, err := readSlotCarry(again)
		if err != nil || !reflect.DeepEqual(token, token2) || !bytes.Equal(c.Nonce, c2.Nonce) || !bytes.Equal(c.Key, c2.Key) {
			t.Errorf("%+v is read again as %+v: %v", c, c2, err)
		}
		if key, err := c.open([]byte("a secret that it was not made with")); err == nil {
			t.Errorf("opened: %x", key)
		}
	})
}

// FuzzTokenSlots: the keyslots of a token are those that it lists.
func FuzzTokenSlots(f *testing.F) {
	f.Add([]byte(`{"type":"systemd-recovery","keyslots":["0","31"],"holdfast_serial":2}`))
	f.Add([]byte(`{"keyslots":["-1","x",""]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		slots := tokenSlots(raw)
		var texts []string
		for _, n := range slots {
			texts = append(texts, strconv.Itoa(n))
		}
		again, err := json.Marshal(map[string]any{"keyslots": texts})
		if err != nil || !slices.Equal(slots, tokenSlots(again)) {
			t.Errorf("%q has %v, and written again %v: %v", raw, slots, tokenSlots(again), err)
		}
	})
}

// FuzzEnrolmentRecord: what is remembered is what was noted, or nothing at all.
func FuzzEnrolmentRecord(f *testing.F) {
	f.Add([]byte(`{"attempts":1,"kept":true,"failure":"no room"}`))
	f.Add([]byte(`{"attempts":-1}`))
	f.Fuzz(func(t *testing.T, noted []byte) {
		e := &Enrolment{Load: func() ([]byte, error) { return noted, nil }, Save: func(b []byte) error { noted = b; return nil }}
		r := e.record()
		if err := e.save(r); err != nil || !reflect.DeepEqual(e.record(), r) || r.Attempts < 0 {
			t.Errorf("%+v is remembered as %+v: %v", r, e.record(), err)
		}
	})
}

// FuzzFirmwareFile: the file is the first one of the device path, whatever follows.
func FuzzFirmwareFile(f *testing.F) {
	id := uuid.MustParse("462caa21-7614-4503-836e-8ab6f4662331")
	guid := sigdb.FromUUID(id)
	node := append([]byte{4, 6, 20, 0}, guid[:]...)
	f.Add(node, []byte{0x7f, 0xff, 4, 0})
	f.Add([]byte{1, 1, 4, 0}, node)
	f.Fuzz(func(t *testing.T, path, rest []byte) {
		event := append(binary.LittleEndian.AppendUint64(make([]byte, 24), uint64(len(path))), path...)
		got := firmwareFile(event)
		if got != uuid.Nil && firmwareFile(append(slices.Clone(event), rest...)) != got {
			t.Errorf("%x names %v, and with %x behind it another file", path, got, rest)
		}
		if first := append(slices.Concat(event[:32], node), path...); firmwareFile(first) != id {
			t.Errorf("%x names %v", first, firmwareFile(first))
		}
	})
}
