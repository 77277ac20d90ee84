package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// wantFails wants exactly these checks to have failed, and says what they found.
func wantFails(t *testing.T, v Verdict, names ...string) {
	t.Helper()
	var got []string
	for _, c := range v.Checks {
		if c.Result == Fail {
			got = append(got, c.Name)
			t.Logf("%s: %s [%s]", c.Name, c.Text, c.Event)
			if c.Event == "" || c.Meaning == "" {
				t.Errorf("%s does not say what differs or what it means", c.Name)
			}
		}
	}
	if !slices.Equal(got, names) {
		t.Errorf("failed: %q, want %q\n%+v", got, names, v)
	}
	if v.Good() || len(names) > 0 && v.Result != Fail {
		t.Errorf("the verdict is %s", v.Result)
	}
}

// append adds a record to the log and measures it.
func (r *rig) append(t *testing.T, index int, kind pcr.EventType, data []byte, d pcr.Digest) {
	t.Helper()
	log, err := pcr.ParseLog(r.input.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	zero := func(n int) []byte { return make([]byte, n) }
	log.Events = append(log.Events, pcr.Event{PCR: uint32(index), Type: kind, Data: data, Digests: []pcr.TaggedDigest{
		{Alg: pcr.SHA1, Digest: zero(20)}, {Alg: pcr.SHA256, Digest: d[:]}, {Alg: pcr.SHA384, Digest: zero(48)}, {Alg: pcr.SHA512, Digest: zero(64)}}})
	r.input.EventLog = log.Marshal()
	r.tpm.ExtendDigest(index, d)
}

// TestAttacks: in each case exactly the named checks fail. The box was recorded before.
func TestAttacks(t *testing.T) {
	type attack struct {
		name  string
		fails []string
		// box changes the box, judge what the vendor knows, and forge the answer on its way.
		box   func(*testing.T, *rig)
		judge func(*testing.T, *Policy)
		forge func(*testing.T, *rig, *Challenge, *Answer)
	}
	reference := func(change func(*Reference)) func(*testing.T, *Policy) {
		return func(_ *testing.T, p *Policy) {
			p.References = slices.Clone(p.References)
			change(&p.References[0])
		}
	}
	known := func(change func(*Record)) func(*testing.T, *Policy) {
		return func(_ *testing.T, p *Policy) {
			k := *p.Known
			k.Registers = maps.Clone(k.Registers)
			change(&k)
			p.Known = &k
		}
	}
	say := func(change func(*Statement)) func(*testing.T, *rig) {
		return func(_ *testing.T, r *rig) { change(&r.input.Statement) }
	}
	other := hex.EncodeToString(make([]byte, 32))
	program := sha256.Sum256([]byte("another program"))
	for _, a := range []attack{
		{name: "old answer replayed", fails: []string{CheckChallenge}, forge: func(t *testing.T, r *rig, _ *Challenge, a *Answer) { *a = *r.answer(t, r.challenge(t)) }},
		{name: "old quote in a new answer", fails: []string{CheckChallenge}, forge: func(t *testing.T, r *rig, _ *Challenge, a *Answer) {
			old := r.answer(t, r.challenge(t))
			a.Quote, a.Signature, a.Registers = old.Quote, old.Signature, old.Registers
		}},
		{name: "statement changed", fails: []string{CheckChallenge}, forge: func(_ *testing.T, _ *rig, _ *Challenge, a *Answer) { a.Statement.Volumes[0].Method = "recovery" }},
		{name: "statement removed", fails: []string{CheckChallenge}, forge: func(_ *testing.T, _ *rig, _ *Challenge, a *Answer) { a.Statement = nil }},
		{name: "stale", fails: []string{CheckFreshness}, judge: func(_ *testing.T, p *Policy) { p.Now = today.AddDate(0, 0, 31) }},
		{name: "from the future", fails: []string{CheckFreshness}, judge: func(_ *testing.T, p *Policy) { p.Now = today.AddDate(0, 0, -1) }},
		{name: "another manufacturer's roots", fails: []string{CheckEK}, judge: func(t *testing.T, p *Policy) {
			p.Roots, _, _ = NewRoots(sealtest.NewManufacturer(t, "Test Root of TPMs", today).Cert.Raw)
		}},
		{name: "another EK", fails: []string{CheckEK, CheckAK}, judge: known(func(k *Record) { k.EK = other })},
		{name: "another box's certificate", fails: []string{CheckEK}, box: func(t *testing.T, r *rig) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			r.tpm.RemoveNV(eccIndex)
			r.tpm.WriteNV(eccIndex, r.maker.Certify(key.Public(), "id:49424D00"))
		}, forge: func(t *testing.T, r *rig, _ *Challenge, a *Answer) { a.EKPublic = ekPublic(t, r) }},
		{name: "TPM firmware other than it says", fails: []string{CheckHardware}, forge: func(t *testing.T, r *rig, c *Challenge, a *Answer) {
			a.Statement.TPM.Firmware = "7.2.3.1"
			requote(t, r, c, a, Selection())
		}},
		{name: "AK of a program", fails: []string{CheckAK}, forge: func(t *testing.T, _ *rig, c *Challenge, a *Answer) { forgeWithProgram(t, c, a, true) }},
		{name: "AK that signs anything", fails: []string{CheckAK}, forge: func(t *testing.T, _ *rig, c *Challenge, a *Answer) { forgeWithProgram(t, c, a, false) }},
		{name: "another AK of the same TPM", fails: []string{CheckAK}, box: func(_ *testing.T, r *rig) { r.input.RSA = true }},
		{name: "signature damaged", fails: []string{CheckSignature}, forge: func(_ *testing.T, _ *rig, _ *Challenge, a *Answer) { a.Signature[len(a.Signature)-1] ^= 1 }},
		{name: "quote edited", fails: []string{CheckSignature}, forge: func(t *testing.T, _ *rig, _ *Challenge, a *Answer) {
			q, err := parseQuote(a.Quote)
			if err != nil {
				t.Fatal(err)
			}
			q.ResetCount += 9
			a.Quote = q.marshal()
		}},
		{name: "fewer registers quoted", fails: []string{CheckSelection}, forge: func(t *testing.T, r *rig, c *Challenge, a *Answer) { requote(t, r, c, a, []int{0, 1, 2, 3}) }},
		{name: "IMA's register quoted too", fails: []string{CheckSelection}, forge: func(t *testing.T, r *rig, c *Challenge, a *Answer) {
			requote(t, r, c, a, append(Selection(), 10))
		}},
		{name: "register edited", fails: []string{CheckRegisters}, forge: func(_ *testing.T, _ *rig, _ *Challenge, a *Answer) { a.Registers[4*32]++ }},
		{name: "log truncated", fails: []string{CheckLog}, forge: func(_ *testing.T, _ *rig, _ *Challenge, a *Answer) { a.EventLog = a.EventLog[:len(a.EventLog)*2/3] }},
		{name: "log of a record less", fails: []string{CheckLog}, forge: editLog(func(l *pcr.Log) { l.Events = slices.Delete(l.Events, 4, 5) })},
		{name: "log of a record more", fails: []string{CheckLog}, forge: editLog(func(l *pcr.Log) { l.Events = append(l.Events, l.Events[len(l.Events)-1]) })},
		{name: "log with a digest changed", fails: []string{CheckLog}, forge: editLog(func(l *pcr.Log) { l.Events[6].Digests[1].Digest[0] ^= 1 })},
		{name: "measured and not logged", fails: []string{CheckLog}, box: func(_ *testing.T, r *rig) { r.tpm.ExtendDigest(1, program) }},
		{name: "started by others, and told in the statement instead of the log", fails: []string{CheckLog}, box: func(t *testing.T, r *rig) {
			r.input.EventLog = hidden(t, r, 7, pcr.EventVariableAuthority, authorityData("MokListRT", make([]byte, 40)))
			r.input.EventLog = hidden(t, r, 4, pcr.EventBootServicesApp, []byte("a foreign program"))
		}, forge: tell(MeasuredBytes(7, authorityData("MokListRT", make([]byte, 40)), ""), MeasuredBytes(4, []byte("a foreign program"), ""))},
		{name: "DMA protection off, and told in the statement instead of the log", fails: []string{CheckLog}, box: func(t *testing.T, r *rig) {
			r.input.EventLog = hidden(t, r, 7, pcr.EventEFIAction, []byte("DMA Protection Disabled"))
		}, forge: tell(MeasuredText(7, "DMA Protection Disabled"))},
		{name: "another firmware, and told in the statement instead of the log", fails: []string{CheckLog, CheckFirmware}, box: func(t *testing.T, r *rig) {
			r.input.EventLog = hidden(t, r, 2, pcr.EventBootServicesDriver, []byte("a foreign driver"))
		}, forge: tell(MeasuredBytes(2, []byte("a foreign driver"), ""))},
		{name: "behind the kernel image, and told in the statement", fails: []string{CheckKernel}, box: func(_ *testing.T, r *rig) { r.tpm.Extend(11, "more") },
			forge: tell(MeasuredText(11, "more"))},
		{name: "another kernel image", fails: []string{CheckKernel}, judge: reference(func(r *Reference) { r.Boot.PCR11[0]++ })},
		{name: "another release", fails: []string{CheckKernel, CheckLoader}, judge: reference(func(r *Reference) {
			r.Version, r.Boot.PCR11, r.Boot.UKI.Authenticode = "2.0.0", program, program
		})},
		{name: "measured behind the boot", fails: []string{CheckLog, CheckKernel}, box: func(t *testing.T, r *rig) { r.tpm.Extend(11, "more") }},
		{name: "another boot loader", fails: []string{CheckLoader}, judge: reference(func(r *Reference) { r.Boot.Loader.Authenticode[0]++ })},
		{name: "another program behind the loader", fails: []string{CheckLoader}, box: func(t *testing.T, r *rig) {
			r.append(t, 4, pcr.EventBootServicesApp, make([]byte, 32), program)
		}},
		{name: "DMA protection off", fails: []string{CheckSecureBoot}, box: func(t *testing.T, r *rig) {
			r.append(t, 7, pcr.EventEFIAction, []byte("DMA Protection Disabled"), sha256.Sum256([]byte("DMA Protection Disabled")))
		}},
		{name: "a foreign key in db", fails: []string{CheckKeys}, judge: func(t *testing.T, p *Policy) {
			b := recorded(t, "secure", 0).Before
			p.Keys = mustKeys(t, b["PK"], b["KEK"], b["KEK"], b["dbx"])
		}},
		{name: "a foreign PK", fails: []string{CheckKeys}, judge: func(t *testing.T, p *Policy) {
			b := recorded(t, "secure", 0).Before
			p.Keys = mustKeys(t, b["KEK"], b["KEK"], b["db"], b["dbx"])
		}},
		{name: "revocations missing in dbx", fails: []string{CheckDBX}, judge: func(t *testing.T, p *Policy) {
			b := recorded(t, "secure", 2).Before
			p.Keys = mustKeys(t, b["PK"], b["KEK"], b["db"], b["dbx"])
		}},
		{name: "revocations of its release removed from dbx", fails: []string{CheckDBX}, judge: reference(func(r *Reference) { r.DBX = revoked(t, 2) })},
		{name: "revocations removed, and an earlier release started", fails: []string{CheckDBX}, judge: func(t *testing.T, p *Policy) {
			k := *p.Known
			k.Revocations = "1.1.0"
			p.Known, p.References = &k, append(slices.Clone(p.References), Reference{Product: "ledger", Version: "1.1.0", DBX: revoked(t, 2)})
		}},
		{name: "verified by a key of shim's", fails: []string{CheckKeys}, box: func(t *testing.T, r *rig) {
			data := authorityData("MokListRT", make([]byte, 40))
			r.append(t, 7, pcr.EventVariableAuthority, data, sha256.Sum256(data))
		}},
		{name: "command line from outside", fails: []string{CheckExtras}, box: func(t *testing.T, r *rig) {
			r.append(t, 12, pcr.EventIPL, []byte("init=/bin/sh"), sha256.Sum256([]byte("init=/bin/sh")))
		}},
		{name: "another firmware", fails: []string{CheckFirmware}, judge: known(func(k *Record) {
			k.Registers[0] = other
			k.Firmware = slices.Clone(k.Firmware)
			k.Firmware[1].SHA256, k.Firmware[1].Text = other, "firmware volume of old"
		})},
		{name: "another disk", fails: []string{CheckVolumes}, judge: known(func(k *Record) { k.Registers[15] = other })},
		{name: "TPM set back", fails: []string{CheckClock}, judge: known(func(k *Record) { k.ResetCount++ })},
		{name: "clock set back", fails: []string{CheckClock}, judge: known(func(k *Record) { k.ClockMs += 1e9 })},
		{name: "says another box", fails: []string{CheckIdentity}, box: say(func(s *Statement) { s.Box = "another" })},
		{name: "says another release", fails: []string{CheckIdentity}, box: say(func(s *Statement) { s.Release = "1.0.1" })},
		{name: "another root", fails: []string{CheckIdentity}, box: say(func(s *Statement) { s.Slots[0].RootHash = "bb" })},
		{name: "another service", fails: []string{CheckIdentity}, box: say(func(s *Statement) { s.Services[0].Digest = "sha256:99" })},
		{name: "a service less", fails: []string{CheckIdentity}, box: say(func(s *Statement) { s.Services = nil })},
	} {
		t.Run(a.name, func(t *testing.T) {
			r := newRig(t, "secure")
			r.enrol(t)
			if a.box != nil {
				a.box(t, r)
			}
			if a.judge != nil {
				a.judge(t, &r.policy)
			}
			c := r.challenge(t)
			answer := r.answer(t, c)
			if a.forge != nil {
				a.forge(t, r, c, answer)
			}
			wantFails(t, Verify(answer, c, &r.policy), a.fails...)
		})
	}
}

// revoked is the dbx of a recorded boot.
func revoked(t *testing.T, i int) []pcr.Signature {
	t.Helper()
	list, err := pcr.Signatures(recorded(t, "secure", i).Before["dbx"])
	if err != nil || len(list) == 0 {
		t.Fatalf("%d entries: %v", len(list), err)
	}
	return list
}

// TestRevocationsPending: a box that has just taken a release lacks what it brings for
// dbx, which is unknown as long as it was never seen with it, and a failure from then on.
func TestRevocationsPending(t *testing.T) {
	r := newRig(t, "secure")
	r.enrol(t)
	if r.policy.Known.Revocations != "1.0.0" {
		t.Fatalf("the record names %q", r.policy.Known.Revocations)
	}
	before := *r.policy.Known
	r.policy.References[0].DBX = revoked(t, 2)
	r.policy.Known.Revocations = "0.9.0" // withdrawn meanwhile: nothing to hold it to
	c := r.challenge(t)
	a := r.answer(t, c)
	v := Verify(a, c, &r.policy)
	for _, check := range v.Checks {
		if (check.Result == Pass) != (check.Name != CheckDBX) {
			t.Errorf("%+v", check)
		}
	}
	if got := v.Of(CheckDBX); v.Result != Unknown || got.Result != Unknown || !strings.HasPrefix(got.Text, "pending: ") {
		t.Errorf("%+v", v)
	}
	r.policy.Accept = []string{CheckDBX}
	v = Verify(a, c, &r.policy)
	record, err := NewRecord(a, v, r.policy.Known, today)
	if err != nil || record.Revocations != "0.9.0" {
		t.Errorf("accepted: the record names %q, %v", record.Revocations, err)
	}
	r.policy.Known = &before
	wantFails(t, Verify(a, c, &r.policy), CheckDBX)
}

func mustKeys(t *testing.T, pk, kek, db, dbx []byte) *Keys {
	t.Helper()
	k, err := NewKeys(pk, kek, db, dbx)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// hidden measures a record, and is the log without it.
func hidden(t *testing.T, r *rig, index int, kind pcr.EventType, data []byte) []byte {
	t.Helper()
	log := r.input.EventLog
	r.append(t, index, kind, data, sha256.Sum256(data))
	return log
}

// tell has the box say that it measured these itself, in a statement that its TPM signs.
func tell(list ...Measurement) func(*testing.T, *rig, *Challenge, *Answer) {
	return func(t *testing.T, r *rig, c *Challenge, a *Answer) {
		a.Statement.Measurements = append(a.Statement.Measurements, list...)
		requote(t, r, c, a, Selection())
		_, err := ParseAnswer(a.Marshal())
		foreign := slices.ContainsFunc(list, func(m Measurement) bool { return m.PCR != 11 && m.PCR != 15 })
		if foreign != errors.Is(err, ErrMalformed) {
			t.Errorf("the file is read with %v", err)
		}
	}
}

func editLog(edit func(*pcr.Log)) func(*testing.T, *rig, *Challenge, *Answer) {
	return func(t *testing.T, _ *rig, _ *Challenge, a *Answer) {
		log, err := pcr.ParseLog(a.EventLog)
		if err != nil {
			t.Fatal(err)
		}
		edit(&log)
		a.EventLog = log.Marshal()
	}
}

// authorityData is a UEFI_VARIABLE_DATA.
func authorityData(name string, content []byte) []byte {
	b := make([]byte, 16)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(name)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(content)))
	for _, c := range []byte(name) {
		b = append(b, c, 0)
	}
	return append(b, content...)
}

func ekPublic(t *testing.T, r *rig) []byte {
	t.Helper()
	public, ok := ekTemplates()[0].of(r.tpm.EK(tpm2.ECCEKTemplate))
	if !ok {
		t.Fatal("no endorsement key on P-256")
	}
	return public
}

// requote has the TPM sign again, over other registers or for another statement.
func requote(t *testing.T, r *rig, c *Challenge, a *Answer, registers []int) {
	t.Helper()
	ak, err := makeAK(r.tpm, false)
	if err != nil {
		t.Fatal(err)
	}
	defer ak.flush(r.tpm)
	var bitmap [3]byte
	for _, p := range registers {
		bitmap[p/8] |= 1 << (p % 8)
	}
	data := c.qualifyingData(a.Statement.marshal())
	rsp, err := tpm2.Quote{SignHandle: ak.auth(tpm2.PasswordAuth(nil)), QualifyingData: tpm2.TPM2BData{Buffer: data[:]},
		InScheme:  tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap[:]}}}}.Execute(r.tpm)
	if err != nil {
		t.Fatal(err)
	}
	a.Quote, a.Signature = rsp.Quoted.Bytes(), tpm2.Marshal(rsp.Signature)
}

// forgeWithProgram signs the quote with a key of a program. An honest one says that it
// is not restricted.
func forgeWithProgram(t testing.TB, _ *Challenge, a *Answer, restricted bool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public := akTemplate(tpm2.TPMAlgECC)
	public.ObjectAttributes.Restricted = restricted
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	a.AKPublic = tpm2.Marshal(public)
	sum := sha256.Sum256(a.Quote)
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	a.Signature = tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA,
		&tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s.Bytes()}})})
}

// TestSecureBootOff is a box that starts anything.
func TestSecureBootOff(t *testing.T) {
	r := newRig(t, "open")
	b := recorded(t, "secure", 0).Before
	r.policy.Keys = mustKeys(t, b["PK"], b["KEK"], b["db"], nil)
	r.policy.Accept = append(FirstContact(), CheckAK)
	c := r.challenge(t)
	a := r.answer(t, c)
	wantFails(t, Verify(a, c, &r.policy), CheckSecureBoot, CheckKeys)
	r.policy.NoSecureBoot = true
	wantFails(t, Verify(a, c, &r.policy), CheckKeys) // in setup mode
	r.policy.Keys, r.policy.Accept = nil, append(r.policy.Accept, CheckKeys)
	if v := Verify(a, c, &r.policy); !v.Good() {
		t.Errorf("allowed: %+v", v)
	}
}

// TestInitrd: what answers from the initrd could still have the disk's key.
func TestInitrd(t *testing.T) {
	r := newRig(t, "secure")
	r.policy.Accept = append(FirstContact(), CheckAK)
	r.tpm.Reset()
	r.input.Statement.Measurements = nil
	r.tpm.Measure(r.boot.Log)
	c := r.challenge(t)
	wantFails(t, Verify(r.answer(t, c), c, &r.policy), CheckKernel)
	r.tpm.Extend(11, "enter-initrd")
	wantFails(t, Verify(r.answer(t, c), c, &r.policy), CheckKernel)
	r.tpm.Extend(11, "leave-initrd")
	if v := Verify(r.answer(t, c), c, &r.policy); !v.Good() {
		t.Errorf("running: %+v", v)
	}
}

// lying is a TPM whose driver tells another manufacturer.
type lying struct {
	tpm interface{ Send([]byte) ([]byte, error) }
}

func (l lying) Send(command []byte) ([]byte, error) {
	rsp, err := l.tpm.Send(command)
	if binary.BigEndian.Uint32(command[6:]) == uint32(tpm2.TPMCCGetCapability) {
		rsp = bytes.ReplaceAll(rsp, []byte("IBM\x00"), []byte("IFX\x00"))
	}
	return rsp, err
}

// TestSoftwareTPM: swtpm as what it is, and as a chip of Infineon's.
func TestSoftwareTPM(t *testing.T) {
	r := newRig(t, "secure")
	r.policy.SoftwareTPM = false
	r.policy.Accept = append(FirstContact(), CheckAK, CheckHardware)
	certificate := func(m sealtest.Manufacturer, id string) {
		r.tpm.RemoveNV(eccIndex)
		r.certify(m, tpm2.ECCEKTemplate, id, eccIndex)
	}
	answer := func(c *Challenge, lies bool) *Answer {
		if !lies {
			return r.answer(t, c)
		}
		in := r.input
		in.Challenge = c
		a, err := Attest(lying{r.tpm}, in)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for _, tt := range []struct {
		name         string
		maker        sealtest.Manufacturer
		manufacturer string
		lies         bool
		fails        []string
	}{
		{"says what it is", r.maker, "id:49424D00", false, []string{CheckHardware}},
		{"certified by swtpm's own tools", r.maker, "id:00001014", false, []string{CheckHardware}},
		{"with a certificate of a chip", r.maker, "id:49465800", false, []string{CheckHardware}},
		{"as a chip, with a certificate of its own making", sealtest.NewManufacturer(t, "Test Root of TPMs", today), "id:49465800", true, []string{CheckEK}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			certificate(tt.maker, tt.manufacturer)
			c := r.challenge(t)
			wantFails(t, Verify(answer(c, tt.lies), c, &r.policy), tt.fails...)
		})
	}
	certificate(r.maker, "id:49465800")
	c := r.challenge(t)
	if v := Verify(answer(c, true), c, &r.policy); v.Of(CheckHardware).Result != Pass || !strings.Contains(v.Of(CheckHardware).Text, "chip of IFX") {
		t.Errorf("a TPM that its maker certified as a chip: %+v", v.Of(CheckHardware))
	}
	certificate(r.maker, "id:474F4F47") // Google makes chips and virtual ones
	r.policy.Accept = append(FirstContact(), CheckAK)
	c = r.challenge(t)
	if v := Verify(answer(c, false), c, &r.policy); v.Good() {
		t.Errorf("a TPM of which it is not known what it is: %+v", v)
	}
}

// TestCredential: what a credential shows, and what not.
func TestCredential(t *testing.T) {
	r := newRig(t, "secure")
	r.policy.Accept = FirstContact()
	first := r.challenge(t)
	a := r.answer(t, first)
	v := Verify(a, first, &r.policy)
	if v.Result != Unknown || v.Of(CheckAK).Result != Unknown {
		t.Errorf("before the credential: %+v", v)
	}
	if _, err := NewRecord(a, v, nil, today); err == nil {
		t.Error("a box is recorded whose key is bound to nothing")
	}
	credential, err := NewCredential(a)
	if err != nil {
		t.Fatal(err)
	}
	c := r.challenge(t, credential)
	a = r.answer(t, c)
	if v := Verify(a, c, &r.policy); !v.Good() {
		t.Errorf("opened: %+v", v)
	}
	a.Statement.Activation = make([]byte, nonceBytes)
	requote(t, r, c, a, Selection())
	wantFails(t, Verify(a, c, &r.policy), CheckAK)
	a.Statement.Activation = nil
	requote(t, r, c, a, Selection())
	wantFails(t, Verify(a, c, &r.policy), CheckAK)
	damaged := credential
	damaged.Blob = bytes.Clone(credential.Blob)
	damaged.Blob[10] ^= 1
	c = r.challenge(t, damaged)
	wantFails(t, Verify(r.answer(t, c), c, &r.policy), CheckAK) // and no error on the box
	r.input.RSA = true
	c = r.challenge(t, credential) // for the other AK
	if v := Verify(r.answer(t, c), c, &r.policy); v.Of(CheckAK).Result != Unknown {
		t.Errorf("credential for another key: %+v", v.Of(CheckAK))
	}
}

// TestUnknown: what is not given or cannot be read is unknown, and never good.
func TestUnknown(t *testing.T) {
	r := newRig(t, "secure")
	r.enrol(t)
	c := r.challenge(t)
	good := r.answer(t, c)
	for _, tt := range []struct {
		name    string
		unknown []string
		change  func(*Answer, *Policy)
	}{
		{"no roots, no record", []string{CheckEK, CheckAK, CheckFirmware, CheckVolumes, CheckClock}, func(_ *Answer, p *Policy) { p.Roots, p.Known = nil, nil }},
		{"no certificate, no record", []string{CheckEK, CheckAK, CheckFirmware, CheckVolumes, CheckClock}, func(a *Answer, p *Policy) { a.Certificates, p.Known = nil, nil }},
		{"no release", []string{CheckKernel, CheckLoader, CheckDBX, CheckIdentity}, func(_ *Answer, p *Policy) { p.References = nil }},
		{"no keys", []string{CheckKeys}, func(_ *Answer, p *Policy) { p.Keys = nil }},
		{"no time", []string{CheckFreshness}, func(_ *Answer, p *Policy) { p.Now = time.Time{} }},
		{"no log", []string{CheckLog, CheckLoader, CheckSecureBoot, CheckKeys, CheckDBX}, func(a *Answer, _ *Policy) { a.EventLog = nil }},
		{"SHA-1 log", []string{CheckLog, CheckLoader, CheckSecureBoot, CheckKeys, CheckDBX}, func(a *Answer, _ *Policy) {
			a.EventLog = binary.LittleEndian.AppendUint32(append([]byte{7, 0, 0, 0, 4, 0, 0, 0}, make([]byte, 20)...), 0)
		}},
		{"certificate that is none", []string{CheckEK}, func(a *Answer, _ *Policy) { a.Certificates = [][]byte{{0x30, 1, 2}} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, p := *good, r.policy
			tt.change(&a, &p)
			v := Verify(&a, c, &p)
			var got []string
			for _, check := range v.Checks {
				if check.Result == Unknown {
					got = append(got, check.Name)
				}
			}
			if !slices.Equal(got, tt.unknown) || v.Result != Unknown || v.Good() {
				t.Errorf("%s: unknown %q, want %q: %+v", v.Result, got, tt.unknown, v)
			}
			p.Accept = tt.unknown
			if v := Verify(&a, c, &p); !v.Good() || !slices.Equal(v.Accepted, tt.unknown) {
				t.Errorf("accepted: %+v", v)
			}
		})
	}
	v := Verify(good, nil, &Policy{SoftwareTPM: true})
	if v.Result != Unknown {
		t.Errorf("an empty policy: %s", v.Result)
	}
	if v := Verify(&Answer{}, c, &Policy{}); v.Good() || len(v.Checks) != len(Checks()) {
		t.Errorf("an empty answer: %+v", v)
	}
	if v := Verify(nil, nil, nil); v.Result != Fail {
		t.Errorf("a call without anything: %+v", v)
	}
}

// TestRelabelled: the type of a record is not measured, so a program can be logged as
// something else. It stays a program, or becomes unknown.
func TestRelabelled(t *testing.T) {
	r := newRig(t, "secure")
	r.enrol(t)
	body := bytes.Repeat([]byte("MZ\x90\x00"), 100)
	r.append(t, 4, pcr.EventEFIAction, body, sha256.Sum256(body))
	c := r.challenge(t)
	a := r.answer(t, c)
	if v := Verify(a, c, &r.policy); v.Of(CheckLoader).Result != Unknown || v.Good() {
		t.Errorf("a program logged as an action: %+v", v.Of(CheckLoader))
	}
}
