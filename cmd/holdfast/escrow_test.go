package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// scriptEscrow makes what a box makes at its first boot: a volume with a recovery key,
// and the escrow of that.
func scriptEscrow(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 5)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), makeEscrow(ts, args, nil).Marshal(), 0o644))
}

// escrow is the command mkescrowof NAME RECORD, then as mkescrow: the box's TPM signs. It
// is recorded in the folder RECORD, as a first contact would have it.
func (b *boxes) escrow(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 7)
	tpm := b.all[ts.MkAbs(args[0])].tpm
	e := makeEscrow(ts, args[2:], func(document []byte) (*attest.Endorsement, error) { return attest.Endorse(tpm, document) })
	ts.Check(os.WriteFile(ts.MkAbs(args[3]), e.Marshal(), 0o644))
	r := attest.Record{Type: "holdfast-record", Format: 1, Box: e.Box, First: e.Time, Last: e.Time, Product: e.Product, Release: e.Release,
		EK: strings.Repeat("0", 64), AK: e.TPM.Key(), Registers: map[int]string{}}
	for _, i := range []int{0, 2, 15} {
		r.Registers[i] = r.EK
	}
	dir := ts.MkAbs(args[1])
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(os.WriteFile(filepath.Join(dir, (&attest.Answer{Statement: &attest.Statement{Box: e.Box}}).RecordName()), r.Marshal(), 0o644))
}

func makeEscrow(ts *testscript.TestScript, args []string, endorse func([]byte) (*attest.Endorsement, error)) *escrow.Escrow {
	key, err := luks2.GenerateRecoveryKey(rand.Reader)
	ts.Check(err)
	v, err := newVolume()
	ts.Check(err)
	_, err = v.AddKeyslot(v.key, key.Passphrase(), cheapKDF(), nil)
	ts.Check(err)
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	ts.Check(f.Truncate(volumeBytes))
	ts.Check(v.writeTo(f))

	p := escrow.Policy{Threshold: int(number(ts, args[3]))}
	for i, file := range args[4:] {
		p.Holders = append(p.Holders, escrow.Holder{Name: fmt.Sprintf("holder-%d", i+1), Recipient: strings.TrimSpace(ts.ReadFile(file))})
	}
	e, err := escrow.New(key, escrow.Subject{Box: v.UUID(), Volumes: []string{v.UUID()}, Product: "ledger", Release: "1.2.3",
		Serial: int(number(ts, args[2])), Time: time.Unix(1795262400, 0)}, p, ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)), rand.Reader, endorse)
	ts.Check(err)
	return e
}
