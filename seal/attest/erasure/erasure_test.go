package erasure

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

var today = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

const (
	marker = "GONE\n"
	first  = "0b7d9f0e-0000-4000-8000-000000000001"
	second = "0b7d9f0e-0000-4000-8000-000000000002"
)

// proof is of a box with two volumes, not signed yet.
func proof() *Proof {
	p := New(Decommission, "ledger", "1.0.0", marker, today)
	for i, uuid := range []string{first, second} {
		p.Volumes = append(p.Volumes, Volume{Name: []string{"data", "media"}[i], UUID: uuid, Keyslots: 3,
			AreaBytes: HeadBytes, Before: Overwritten("keys of "+uuid, HeadBytes), After: Overwritten(marker, HeadBytes)})
	}
	return p
}

func input(c *attest.Challenge) attest.Input {
	return attest.Input{Challenge: c, Time: today, Statement: attest.Statement{Product: "ledger", Release: "1.0.0", Box: first,
		Volumes: []attest.Volume{{Name: "data", UUID: first}, {Name: "media", UUID: second}}}}
}

// accepting knows nothing of boot and box: package attest tests that these are judged.
func accepting() *attest.Policy {
	return &attest.Policy{Now: today, SoftwareTPM: true, Accept: slices.DeleteFunc(attest.Checks(), func(c string) bool { return c == attest.CheckFreshness })}
}

func reread(t *testing.T, p *Proof) *Proof {
	t.Helper()
	p, err := Parse(p.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProof(t *testing.T) {
	tpm := sealtest.Start(t)
	asked, err := attest.NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*attest.Challenge{"asked": asked, "by itself": nil} {
		p := proof()
		if err := p.Sign(tpm, input(c)); err != nil {
			t.Fatal(err)
		}
		p = reread(t, p)
		v, err := p.Verify(c, accepting())
		if err != nil || !v.Good() || v.Of(CheckErasure).Result != attest.Pass {
			t.Errorf("%s: %v, %+v", name, err, v)
		}
		if got := v.Of(attest.CheckFreshness).Result; (got == attest.Pass) != (c != nil) {
			t.Errorf("%s: freshness %s", name, got)
		}
		if p.Device() != "ledger "+first {
			t.Errorf("device %q", p.Device())
		}
	}
	bare := reread(t, proof())
	if _, err := bare.Verify(nil, accepting()); !errors.Is(err, ErrUnsigned) {
		t.Errorf("unsigned: %v", err)
	}
	if bare.Device() != "ledger "+first {
		t.Errorf("device %q", bare.Device())
	}
}

// TestAttacks: what the box signed, and what a holder of the file makes of it.
func TestAttacks(t *testing.T) {
	tpm := sealtest.Start(t)
	asked, err := attest.NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	other, err := attest.NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		says   func(*Proof)        // what is signed
		boxes  func(*attest.Input) // what the box says beside it
		edit   func(*Proof)        // what is changed afterwards
		fails  string
		reason string
	}{
		"edited":                  {edit: func(p *Proof) { p.Volumes[0].Keyslots++ }, fails: CheckErasure, reason: "not what the box signed"},
		"a volume less":           {edit: func(p *Proof) { p.Volumes = p.Volumes[:1] }, fails: CheckErasure, reason: "not what the box signed"},
		"a reset's for an end":    {says: func(p *Proof) { p.What = FactoryReset }, edit: func(p *Proof) { p.What = Decommission }, fails: CheckErasure, reason: "not what"},
		"a volume is not named":   {says: func(p *Proof) { p.Volumes = p.Volumes[:1] }, fails: CheckErasure, reason: "media " + second + " open"},
		"another box's volume":    {says: func(p *Proof) { p.Volumes[1].UUID = first }, fails: CheckErasure, reason: "media " + second + " open"},
		"a volume too many":       {boxes: func(in *attest.Input) { in.Statement.Volumes = in.Statement.Volumes[:1] }, fails: CheckErasure, reason: "2 volumes"},
		"half of the area":        {says: func(p *Proof) { p.Volumes[1].AreaBytes /= 2 }, fails: CheckErasure, reason: "8388608 bytes"},
		"read back as before":     {says: func(p *Proof) { p.Volumes[1].After = p.Volumes[1].Before }, fails: CheckErasure, reason: "read back"},
		"nothing was there":       {says: func(p *Proof) { p.Volumes[1].Before = p.Volumes[1].After }, fails: CheckErasure, reason: "no keys before"},
		"another release":         {says: func(p *Proof) { p.Version = "0.9.0" }, fails: CheckErasure, reason: "0.9.0"},
		"replayed":                {edit: func(p *Proof) { q := proof(); q.Time = today.Add(time.Hour); p.Time = q.Time }, fails: CheckErasure, reason: "not what"},
		"over another challenge":  {boxes: func(in *attest.Input) { in.Challenge = other }, fails: attest.CheckChallenge, reason: "not over this challenge"},
		"the box's own challenge": {boxes: func(in *attest.Input) { in.Challenge = nil }, fails: attest.CheckChallenge, reason: "not over this challenge"},
	} {
		p, in := proof(), input(asked)
		if tt.says != nil {
			tt.says(p)
		}
		if tt.boxes != nil {
			tt.boxes(&in)
		}
		if err := p.Sign(tpm, in); err != nil {
			t.Fatal(err)
		}
		if tt.edit != nil {
			tt.edit(p)
		}
		v, err := reread(t, p).Verify(asked, accepting())
		if c := v.Of(tt.fails); err != nil || v.Result != attest.Fail || c.Result != attest.Fail || !strings.Contains(c.Text, tt.reason) {
			t.Errorf("%s: %v, %s, %+v", name, err, v.Result, c)
		}
	}
	// An answer to the challenge proves no erasure, whatever is written around it.
	a, err := attest.Attest(tpm, input(asked))
	if err != nil {
		t.Fatal(err)
	}
	p := proof()
	p.Answer = a.Marshal()
	if v, err := p.Verify(asked, accepting()); err != nil || v.Of(CheckErasure).Result != attest.Fail {
		t.Errorf("an answer as a proof: %v, %+v", err, v)
	}
	// A proof that was asked for is not judged without what was asked.
	if err := p.Sign(tpm, input(asked)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Verify(nil, accepting()); err == nil {
		t.Error("verified without its challenge")
	}
}

// TestCompleted: where a run was interrupted, there may be nothing left to overwrite.
func TestCompleted(t *testing.T) {
	p := proof()
	p.Completed = true
	for i := range p.Volumes {
		p.Volumes[i].Before, p.Volumes[i].UUID, p.Volumes[i].Keyslots = p.Volumes[i].After, "", 0
	}
	if err := p.Sign(sealtest.Start(t), input(nil)); err != nil {
		t.Fatal(err)
	}
	if v, err := p.Verify(nil, accepting()); err != nil || !v.Good() {
		t.Errorf("%v, %+v", err, v)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(proof().Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%v", err)
			}
			return
		}
		if !bytes.Equal(p.Marshal(), b) {
			t.Error("read, it is written in another way")
		}
		if _, err := p.Verify(nil, accepting()); err == nil && len(p.Answer) == 0 {
			t.Error("nobody signed it, and it is verified")
		}
		_ = p.Device()
	})
}
