package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// aToken is well-formed and was never in a TPM.
func aToken(t testing.TB) Token {
	p := standard(t)
	digest, err := p.Digest()
	if err != nil {
		t.Fatal(err)
	}
	srk := srkTemplate()
	name, err := tpm2.ObjectName(&srk)
	if err != nil {
		t.Fatal(err)
	}
	return Token{
		Keyslots: []string{"1"}, Private: []byte("private"), PCRs: []int{7}, SignedPCRs: []int{11},
		PolicyKeyPEM: p.PolicyKeyPEM, PolicyHash: digest,
		Public: tpm2.Marshal(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: digest[:]},
			Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
			Unique:           tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: make([]byte, 32)})}),
		SRK: &SRKRef{Handle: uint32(srkHandle), Name: name.Buffer, Public: tpm2.Marshal(srk)},
	}
}

func TestTokenRoundTrip(t *testing.T) {
	full := aToken(t)
	pin := full
	pin.PIN, pin.Salt = true, bytes.Repeat([]byte{9}, saltBytes)
	old := full
	old.SRK = nil
	literal := full
	literal.SignedPCRs, literal.PolicyKeyPEM = nil, nil
	own := full
	own.For, own.Ref, own.Counter = "slot b 1.1.0, dbx pending", EpochRef(3), &Counter{CounterIndex, 1<<64 - 1}
	own.Tickets = []Ticket{{Policy: bootedPCR(1), MAC: []byte("mac")}, {Policy: bootedPCR(2), MAC: bytes.Repeat([]byte{1}, maxTicketBytes)}}
	counted := literal
	counted.Counter = &Counter{Index: firstOwnerIndex}
	for _, token := range []Token{full, pin, old, literal, own, counted} {
		b, err := token.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseToken(b)
		if err != nil {
			t.Fatalf("%v in %s", err, b)
		}
		if !reflect.DeepEqual(got, token) {
			t.Errorf("round trip gives %+v, want %+v", got, token)
		}
	}
}

func TestParseTokenRefuses(t *testing.T) {
	token := aToken(t)
	good, err := token.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	set := func(name string, v any) func(map[string]any) { return func(m map[string]any) { m[name] = v } }
	tests := map[string]func(map[string]any){
		"another type":               set("type", "systemd-fido2"),
		"pcrlock":                    set("tpm2_pcrlock", true),
		"SHA-1 bank":                 set("tpm2-pcr-bank", "sha1"),
		"PCR 24":                     set("tpm2-pcrs", []int{24}),
		"PCR twice":                  set("tpm2-pcrs", []int{7, 7}),
		"no tpm2-pcrs":               func(m map[string]any) { delete(m, "tpm2-pcrs") },
		"no policy key":              func(m map[string]any) { delete(m, "tpm2_pubkey") },
		"policy key alone":           func(m map[string]any) { delete(m, "tpm2_pubkey_pcrs") },
		"policy key is no PEM":       set("tpm2_pubkey", []byte("x")),
		"policy reference":           set("tpm2_pubkey_ref", "initrd"),
		"policy hash of another":     set("tpm2-policy-hash", strings.Repeat("00", 32)),
		"policy hash short":          set("tpm2-policy-hash", "00"),
		"two shards":                 set("tpm2-blob", []string{"AAAA", "AAAA"}),
		"blob is no base64":          set("tpm2-blob", "?"),
		"blob cut":                   set("tpm2-blob", "AAAA"),
		"SRK cut":                    set("tpm2_srk", []byte{0x81, 0, 0, 1}),
		"SRK name of another":        set("tpm2_srk", badSRK(token)),
		"For too long":               set("holdfast_for", strings.Repeat("x", 201)),
		"For with a control byte":    set("holdfast_for", "slot a\x1b[2J"),
		"For with a newline":         set("holdfast_for", "slot a\n"),
		"reference, systemd's type":  set("holdfast_ref", "holdfast-epoch-1"),
		"counter, systemd's type":    set("holdfast_nv", map[string]string{"index": "0x01af0001", "max": "1"}),
		"own type, systemd's policy": set("type", OwnTokenType),
		"nine tickets":               set("holdfast_tickets", slices.Repeat([]any{map[string]string{"pol": strings.Repeat("0", 64), "mac": "AA=="}}, 9)),
		"ticket with a short policy": set("holdfast_tickets", []any{map[string]string{"pol": "00", "mac": "AA=="}}),
		"ticket without a MAC":       set("holdfast_tickets", []any{map[string]string{"pol": strings.Repeat("0", 64)}}),
		"ticket too long":            set("holdfast_tickets", []any{map[string]any{"pol": strings.Repeat("0", 64), "mac": make([]byte, 65)}}),
		"tickets, nothing signed": func(m map[string]any) {
			delete(m, "tpm2_pubkey")
			delete(m, "tpm2_pubkey_pcrs")
			m["holdfast_tickets"] = []any{map[string]string{"pol": strings.Repeat("0", 64), "mac": "AA=="}}
		},
		"RSA primary without handle": func(m map[string]any) { m["tpm2-primary-alg"] = "rsa"; delete(m, "tpm2_srk") },
	}
	for name, change := range tests {
		var m map[string]any
		if err := json.Unmarshal(good, &m); err != nil {
			t.Fatal(err)
		}
		change(m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseToken(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := ParseToken(make([]byte, maxTokenBytes+1)); err == nil {
		t.Error("too long: accepted")
	}
	open := token
	public, err := unmarshalPublic(token.Public)
	if err != nil {
		t.Fatal(err)
	}
	public.ObjectAttributes.UserWithAuth = true
	open.Public = tpm2.Marshal(public)
	b, err := open.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseToken(b); err == nil {
		t.Error("userWithAuth: accepted (F46)")
	}
}

// The fields of tokens that systemd cannot open.
func TestParseOwnTokenRefuses(t *testing.T) {
	token := aToken(t)
	token.Ref, token.Counter = EpochRef(1), &Counter{CounterIndex, 5}
	good, err := token.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"index without 0x":       {`"0x01af0001"`, `"01af0001"`},
		"index in other letters": {`"0x01af0001"`, `"0x01AF0001"`},
		"index of the firmware":  {`"0x01af0001"`, `"0x01c00002"`},
		"index of 33 bits":       {`"0x01af0001"`, `"0x101af0001"`},
		"max with a sign":        {`"max":"5"`, `"max":"+5"`},
		"max with a zero":        {`"max":"5"`, `"max":"05"`},
		"max of 65 bits":         {`"max":"5"`, `"max":"18446744073709551616"`},
		"max as a number":        {`"max":"5"`, `"max":5`},
		"no max":                 {`"max":"5"`, `"mux":"5"`},
		"reference with a space": {"holdfast-epoch-1", "holdfast epoch 1"},
		"reference too long":     {"holdfast-epoch-1", strings.Repeat("1", maxRefBytes+1)},
		"systemd's type":         {OwnTokenType, TokenType},
	} {
		bad := strings.Replace(string(good), change[0], change[1], 1)
		if bad == string(good) {
			t.Fatalf("%s: %s is not in %s", name, change[0], good)
		}
		if _, err := ParseToken([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, change := range map[string]func(*Token){
		"For too long":      func(t *Token) { t.For = strings.Repeat("x", maxForBytes+1) },
		"For is no UTF-8":   func(t *Token) { t.For = "\xff" },
		"reference alone":   func(t *Token) { t.SignedPCRs, t.PolicyKeyPEM = nil, nil },
		"counter elsewhere": func(t *Token) { t.Counter = &Counter{Index: 1} },
	} {
		changed := token
		change(&changed)
		if b, err := changed.Marshal(); err == nil {
			t.Errorf("%s: written as %s", name, b)
		}
	}
}

func badSRK(token Token) []byte {
	r := *token.SRK
	r.Name = bytes.Repeat([]byte{7}, len(r.Name))
	return r.marshal()
}

func TestParseTokenTolerates(t *testing.T) {
	good, err := aToken(t).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(good, &m); err != nil {
		t.Fatal(err)
	}
	m["tpm2_something_of_2030"] = map[string]int{"x": 1}
	m["tpm2-blob"] = []any{m["tpm2-blob"]}
	m["tpm2-policy-hash"] = []any{m["tpm2-policy-hash"]}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseToken(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, aToken(t)) {
		t.Errorf("got %+v", got)
	}
}

func FuzzParseToken(f *testing.F) {
	b, err := aToken(f).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	own := aToken(f)
	own.For, own.Ref, own.Counter, own.Tickets = "slot a", EpochRef(1), &Counter{CounterIndex, 1}, []Ticket{{MAC: []byte{1}}}
	if b, err = own.Marshal(); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		token, err := ParseToken(b)
		if err != nil {
			return
		}
		again, err := token.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseToken(again)
		if err != nil {
			t.Fatalf("%v in %s", err, again)
		}
		third, err := back.Marshal()
		if err != nil || !bytes.Equal(again, third) {
			t.Fatalf("Marshal(ParseToken(b)) is not stable: %s, %s", again, third)
		}
	})
}

func TestSignaturesRoundTrip(t *testing.T) {
	s := signed(t, vendorKey(), "image 1", "image 2")
	again := signed(t, vendorKey(), "image 1", "image 2")
	b, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	b2, err := again.Marshal()
	if err != nil || !bytes.Equal(b, b2) {
		t.Error("signing is not deterministic")
	}
	got, err := ParseSignatures(b)
	if err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("round trip: %v, %+v", err, got)
	}
	for name, bad := range map[string]string{
		"no JSON":       "{",
		"pol short":     `{"sha256":[{"pcrs":[11],"pkfp":"` + strings.Repeat("0", 64) + `","pol":"00","sig":""}]}`,
		"pkfp short":    `{"sha256":[{"pcrs":[11],"pkfp":"00","pol":"` + strings.Repeat("0", 64) + `","sig":""}]}`,
		"PCR 99":        `{"sha256":[{"pcrs":[99],"pkfp":"` + strings.Repeat("0", 64) + `","pol":"` + strings.Repeat("0", 64) + `","sig":""}]}`,
		"no PCR":        `{"sha256":[{"pcrs":[],"pkfp":"` + strings.Repeat("0", 64) + `","pol":"` + strings.Repeat("0", 64) + `","sig":""}]}`,
		"sig is no b64": `{"sha256":[{"pcrs":[11],"pkfp":"` + strings.Repeat("0", 64) + `","pol":"` + strings.Repeat("0", 64) + `","sig":"?"}]}`,
	} {
		if _, err := ParseSignatures([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if got, err := ParseSignatures([]byte(`{"sha1":[{"pcrs":[11]}],"sha384":[]}`)); err != nil || len(got) != 0 {
		t.Errorf("other banks: %v, %v", got, err)
	}
}

// Signatures with a reference come after all plain ones, which systemd looks for.
func TestSignaturesWithReference(t *testing.T) {
	s := release(t, "image 1", 2)
	mixed := Signatures{s[2], s[0], s[1]}
	b, err := mixed.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseSignatures(b)
	if err != nil || !reflect.DeepEqual(got, Signatures{s[0], s[2], s[1]}) {
		t.Errorf("%v, %+v", err, got)
	}
	if n := strings.Count(string(b), `"ref":`); n != 2 {
		t.Errorf("%d references in %s", n, b)
	}
	if _, err := ParseSignatures(bytes.Replace(b, []byte("holdfast-epoch-2"), []byte("holdfast epoch 2"), 1)); err == nil {
		t.Error("a reference with spaces is accepted")
	}
	if _, err := SignPCRPolicyRef(vendorKey(), image("image 1"), strings.Repeat("x", maxRefBytes+1)); err == nil {
		t.Error("a long reference is signed")
	}
	if _, err := SignEpochs(vendorKey(), image("image 1"), maxSignatures); err == nil {
		t.Error("more epochs are signed than can be read")
	}
}

func FuzzParseSignatures(f *testing.F) {
	b, err := release(f, "image 1", 1).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseSignatures(b)
		if err != nil {
			return
		}
		out, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseSignatures(out)
		if err != nil || len(back) != len(s) {
			t.Fatalf("%v: %s", err, out)
		}
		again, err := back.Marshal()
		if err != nil || !bytes.Equal(out, again) {
			t.Fatal("Marshal(ParseSignatures(b)) is not stable")
		}
	})
}

// F55: the record has a format number from the start.
func TestRecordRoundTrip(t *testing.T) {
	r := Record{Policy: PolicyStandard, PCRs: map[int]pcr.Digest{0: bootedPCR(0), 7: bootedPCR(7), 11: image("image 1"), 12: {}},
		SRKName: []byte{0, 0xb, 1, 2}, Release: "1.2.3"}
	b, err := r.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseRecord(b)
	if err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("%v: %+v, want %+v", err, got, r)
	}
	for name, bad := range map[string]string{
		"format 2": strings.Replace(string(b), `"format":1`, `"format":2`, 1),
		"type":     strings.Replace(string(b), RecordType, "other", 1),
		"PCR 24":   strings.Replace(string(b), `"12":`, `"24":`, 1),
		"PCR 07":   strings.Replace(string(b), `"7":`, `"07":`, 1),
		"srk_name": strings.Replace(string(b), `000b0102`, `zz`, 1),
	} {
		if bad == string(b) {
			t.Fatalf("%s: the test changes nothing", name)
		}
		if _, err := ParseRecord([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	b, err := Record{Policy: "standard", PCRs: map[int]pcr.Digest{7: {1}}, SRKName: []byte{1}}.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRecord(b)
		if err != nil {
			return
		}
		out, err := r.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseRecord(out)
		if err != nil {
			t.Fatal(err)
		}
		again, err := back.Marshal()
		if err != nil || !bytes.Equal(out, again) {
			t.Fatal("Marshal(ParseRecord(b)) is not stable")
		}
	})
}

// Nothing is bound that the status does not show (F5).
func TestDescribeListsEverythingBound(t *testing.T) {
	p := policies(t)["everything"]
	text := strings.Join(p.Describe(), "\n")
	for _, want := range []string{"PCR 7: Secure Boot keys and state: exactly", "PCR 11: unified kernel image and boot phase: any value signed", "a PIN"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
	if strings.Contains(text, "degraded") || !strings.Contains(strings.Join(policies(t)["signed"].Describe(), "\n"), "degraded") {
		t.Error("degraded is said of the wrong policy")
	}
	if got := p.Bound(); !reflect.DeepEqual(got, []int{7, 11}) {
		t.Errorf("Bound() = %v", got)
	}
}

func TestExplain(t *testing.T) {
	old := map[int]pcr.Digest{0: bootedPCR(0), 7: bootedPCR(7), 11: image("image 1")}
	now := map[int]pcr.Digest{0: bootedPCR(0), 7: pcr.Extend(pcr.Digest{}, []byte("new")), 11: image("image 1"), 12: {}}
	log := pcr.Log{Class: pcr.CryptoAgile, Events: []pcr.Event{
		{PCR: 7, Type: pcr.EventEFIAction, Data: []byte("DMA Protection Disabled"), Digests: []pcr.TaggedDigest{{Alg: pcr.SHA256, Digest: digestOf("new")}}},
	}}
	text := strings.Join(Explain(old, now, log), "\n")
	for _, want := range []string{"PCR 7: Secure Boot keys and state changed", "dbx", "DMA Protection Disabled"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
	if strings.Contains(text, "PCR 0") || strings.Contains(text, "PCR 11") || strings.Contains(text, "PCR 12") {
		t.Errorf("registers that did not change are named:\n%s", text)
	}
	log.Events[0].Digests[0].Digest = digestOf("a lie")
	if text := strings.Join(Explain(old, now, log), "\n"); strings.Contains(text, "DMA") || !strings.Contains(text, "explains nothing") {
		t.Errorf("a log that does not lead to the register is believed:\n%s", text)
	}
	if text := strings.Join(Explain(old, now, pcr.Log{}), "\n"); !strings.Contains(text, "empty") {
		t.Errorf("without a log:\n%s", text)
	}
	if got := Explain(old, old, log); len(got) != 1 || !strings.Contains(got[0], "No register differs") {
		t.Errorf("nothing changed: %q", got)
	}
}

// digestOf is what [pcr.Extend] extends with.
func digestOf(s string) []byte {
	d := sha256.Sum256([]byte(s))
	return d[:]
}

// Tokens that systemd-cryptenroll wrote, and a state token of our first
// format. They must be readable for ever.
func TestOldTokens(t *testing.T) {
	read := func(name string) []byte {
		b, err := os.ReadFile("testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.TrimSpace(b)
	}
	new257 := read("systemd-257-everything.json")
	token, err := ParseToken(new257)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := token.Marshal(); err != nil || !bytes.Equal(again, new257) {
		t.Errorf("systemd 257 wrote\n%s\nwe write\n%s", new257, again)
	}
	if !token.PIN || len(token.Salt) != saltBytes || !slices.Equal(token.PCRs, []int{7}) || !slices.Equal(token.SignedPCRs, []int{11}) {
		t.Errorf("token of systemd 257: %+v", token)
	}
	token, err = ParseToken(read("systemd-252-everything.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !token.PIN || token.Salt != nil || token.SRK != nil || !slices.Equal(token.SignedPCRs, []int{11}) {
		t.Errorf("token of systemd 252: %+v", token)
	}
	record, err := ParseRecord(read("state-1.json"))
	if err != nil {
		t.Fatal(err)
	}
	if record.Policy != PolicyStandard || record.Release != "1.0.0" || len(record.PCRs) != 3 || record.PCRs[7] != bootedPCR(7) {
		t.Errorf("record: %+v", record)
	}
}

func FuzzParseSRKRef(f *testing.F) {
	f.Add(aToken(f).SRK.marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseSRKRef(b)
		if err != nil {
			return
		}
		if !bytes.Equal(r.marshal(), b) {
			t.Fatalf("%x is written back as %x", b, r.marshal())
		}
	})
}

func FuzzUnmarshalPublic(f *testing.F) {
	token := aToken(f)
	f.Add(token.Public)
	f.Add(token.SRK.Public)
	key, err := parsePolicyKey(token.PolicyKeyPEM)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(tpm2.Marshal(key.public))
	f.Fuzz(func(t *testing.T, b []byte) {
		public, err := unmarshalPublic(b)
		if err != nil {
			return
		}
		if !bytes.Equal(tpm2.Marshal(public), b) {
			t.Fatal("Marshal(unmarshalPublic(b)) != b")
		}
	})
}

// F5, F55: the whole policy is told, and a token that leaves a part out is found out.
func TestTokenDescribe(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	now, err := ReadPCRs(tpm, []int{0, 2, 4, 7, 11, 12})
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range fourPolicies(t, tpm) {
		token, _ := sealed(t, tpm, p, pinFor(p))
		got, lines := token.Describe(p.Name, map[int]pcr.Digest{7: {1}}, now)
		want := p.Describe()
		if !slices.Equal(lines, want) || len(got.PCRs) != len(p.PCRs) {
			t.Errorf("%s: %q, want %q", name, lines, want)
		}
		_, lines = token.Describe(p.Name)
		if text := strings.Join(lines, "\n"); len(p.PCRs) > 0 == !strings.Contains(text, "nobody can tell") || strings.Contains(text, "NOT TRUE") || strings.Contains(text, fmt.Sprintf("%x", pcr.Digest{})) {
			t.Errorf("%s, without the values: %s", name, text)
		}
		for what, lie := range map[string]func(*Token){
			"no PIN":      func(k *Token) { k.PIN = !k.PIN },
			"no counter":  func(k *Token) { k.Counter = nil },
			"no epoch":    func(k *Token) { k.Ref = "" },
			"no register": func(k *Token) { k.PCRs = nil },
			"not signed":  func(k *Token) { k.SignedPCRs, k.PolicyKeyPEM = nil, nil },
		} {
			k := token
			lie(&k)
			_, lines := k.Describe(p.Name, now)
			told := !strings.Contains(strings.Join(lines, "\n"), "NOT TRUE") && !strings.Contains(strings.Join(lines, "\n"), "nobody can tell")
			same := fmt.Sprint(k.Policy("")) == fmt.Sprint(token.Policy(""))
			if told != same {
				t.Errorf("%s, %s: %q", name, what, lines)
			}
		}
	}
}
