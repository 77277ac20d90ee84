package main

import (
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/attest/erasure"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// boxes are the boxes of the scripts, by folder and name.
type boxes struct {
	t   *testing.T
	all map[string]*testBox
}

// testBox is a TPM in which a firmware with the vendor's keys has measured a release.
type testBox struct {
	tpm   *sealtest.TPM
	input attest.Input
}

// boot is the command mkbox NAME KEYS[,OTHERS] RELEASE [DBX]: a box with KEYS, and in db
// OTHERS too, that runs the release, with the entries of that file in dbx. The root of its
// TPM's maker is in NAME.root.pem. A name that is there already starts again.
func (b *boxes) boot(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 3)
	name := ts.MkAbs(args[0])
	box := b.all[name]
	if box == nil {
		box = &testBox{tpm: sealtest.Start(b.t)}
		b.all[name] = box
		maker := sealtest.NewManufacturer(b.t, "Root of "+args[0], time.Now())
		box.tpm.WriteNV(0x01c0000a, maker.Certify(box.tpm.EK(tpm2.ECCEKTemplate), "id:49424D00"))
		ts.Check(os.WriteFile(name+".root.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: maker.Cert.Raw}), 0o644))
	} else {
		box.tpm.Reboot()
	}
	text, err := os.ReadFile(filepath.Join(ts.MkAbs(args[2]), image.ManifestName))
	ts.Check(err)
	var m image.Manifest
	ts.Check(json.Unmarshal(text, &m))
	r, err := m.Reference()
	ts.Check(err)
	dir, others, _ := strings.Cut(args[1], ",")
	k, err := keys.Load(ts.MkAbs(dir))
	ts.Check(err)
	fw := sealtest.Firmware{SecureBoot: true, Variables: map[string][]byte{}, UKI: r.Sections,
		Programs: []pcr.Digest{r.Boot.Loader.Authenticode, r.Boot.UKI.Authenticode}}
	for _, v := range []string{keys.PK, keys.KEK, keys.DB} {
		fw.Variables[v], err = k.SignatureList(v)
		ts.Check(err)
	}
	if len(args) > 3 {
		fw.Variables["dbx"], err = os.ReadFile(ts.MkAbs(args[3]))
		ts.Check(err)
	}
	entries, err := pcr.Signatures(fw.Variables[keys.DB])
	ts.Check(err)
	if others != "" {
		also, err := keys.Load(ts.MkAbs(others))
		ts.Check(err)
		list, err := also.SignatureList(keys.DB)
		ts.Check(err)
		fw.Variables[keys.DB] = append(fw.Variables[keys.DB], list...)
	}
	fw.Authority = append(entries[0].Owner[:], entries[0].Data...)
	box.input = attest.Input{EventLog: fw.Log(), Time: time.Now(), Statement: attest.Statement{
		Product: m.Name, Release: m.Version, Box: "0b7d9f0e-0000-4000-8000-00000000000" + args[0][len(args[0])-1:],
		Slots:        []attest.Slot{{Name: "a", Release: m.Version, RootHash: m.Verity.RootHash, Running: true}},
		Measurements: []attest.Measurement{attest.MeasuredText(11, "enter-initrd"), attest.MeasuredText(11, "leave-initrd")},
	}, Attachments: []attest.Attachment{{Name: "journal.json", Data: []byte("[]\n")}}}
	box.tpm.Measure(box.input.EventLog)
	for _, m := range box.input.Statement.Measurements {
		box.tpm.Extend(m.PCR, m.Text)
	}
	box.tpm.Extend(15, args[0])
}

// answer is the command answer NAME CHALLENGE FOLDER [BOX]: BOX is what it calls itself.
func (b *boxes) answer(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 3)
	text, err := os.ReadFile(ts.MkAbs(args[1]))
	ts.Check(err)
	box := b.all[ts.MkAbs(args[0])]
	in := box.input
	if len(args) > 3 {
		in.Statement.Box = args[3]
	}
	in.Challenge, err = attest.ParseChallenge(text)
	ts.Check(err)
	a, err := attest.Attest(box.tpm, in)
	ts.Check(err)
	ts.Check(os.MkdirAll(ts.MkAbs(args[2]), 0o755))
	ts.Check(os.WriteFile(filepath.Join(ts.MkAbs(args[2]), a.FileName(in.Challenge)), a.Marshal(), 0o644))
}

// erase is the command erase NAME PROOF [CHALLENGE]: the box's life is over. A CHALLENGE
// "none" is a box whose TPM is dead.
func (b *boxes) erase(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: erase NAME PROOF [CHALLENGE]")
	}
	box := b.all[ts.MkAbs(args[0])]
	in := box.input
	const marker = "HOLDFAST-DECOMMISSIONED\n"
	p := erasure.New(erasure.Decommission, in.Statement.Product, in.Statement.Release, marker, time.Now())
	p.Volumes = []erasure.Volume{{Name: "data", UUID: in.Statement.Box, Keyslots: 3, AreaBytes: erasure.HeadBytes,
		Before: erasure.Overwritten("keys", erasure.HeadBytes), After: erasure.Overwritten(marker, erasure.HeadBytes)}}
	in.Statement.Volumes = []attest.Volume{{Name: "data", UUID: in.Statement.Box, Method: "tpm"}}
	switch {
	case len(args) == 3 && args[2] == "none":
		p.Unsigned = "TPM: there is none"
	case len(args) == 3:
		text, err := os.ReadFile(ts.MkAbs(args[2]))
		ts.Check(err)
		in.Challenge, err = attest.ParseChallenge(text)
		ts.Check(err)
		fallthrough
	default:
		ts.Check(p.Sign(box.tpm, in))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), p.Marshal(), 0o644))
}
