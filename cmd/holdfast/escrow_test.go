package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// scriptEscrow makes what a box makes at its first boot: a volume with a recovery key,
// and the escrow of that.
func scriptEscrow(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 5)
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
		Serial: int(number(ts, args[2])), Time: time.Unix(1795262400, 0)}, p, ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)), rand.Reader)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), e.Marshal(), 0o644))
}
