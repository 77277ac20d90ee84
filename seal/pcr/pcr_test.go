package pcr

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/google/go-eventlog/testdata"
)

func TestExtendKnownAnswers(t *testing.T) {
	// SHA256(0^32 || SHA256("")) and a separator's digest, by coreutils' sha256sum.
	if got, want := Extend(Digest{}, nil), sha256.Sum256(append(make([]byte, 32), mustSum(nil)...)); got != want {
		t.Errorf("Extend(0, empty) = %x, want %x", got, want)
	}
	one := UKI([]Measured{{".linux", sha256.Sum256([]byte("kernel"))}})
	want := ExtendDigest(Extend(Digest{}, []byte(".linux\x00")), sha256.Sum256([]byte("kernel")))
	if one != want {
		t.Errorf("UKI of one section = %x, want %x", one, want)
	}
	swapped := UKI([]Measured{{"b", one}, {"a", want}})
	if swapped == UKI([]Measured{{"a", want}, {"b", one}}) {
		t.Error("the order of sections does not matter")
	}
}

func mustSum(b []byte) []byte { s := sha256.Sum256(b); return s[:] }

// What tpm2_createpolicy of tpm2-tools 5.4 printed for sha256:4,7 on a TPM whose
// PCR 4 was zero and whose PCR 7 had been extended with "7".
func TestPolicyKnownAnswer(t *testing.T) {
	got, err := Policy([]int{7, 4}, map[int]Digest{4: {}, 7: Extend(Digest{}, []byte("7"))})
	if err != nil {
		t.Fatal(err)
	}
	const want = "256fadfacfc9ad2f7835bb50707ebc76fbd3c34f3ace99a03ea2d27b663765f5"
	if hex.EncodeToString(got[:]) != want {
		t.Errorf("policy %x, want %s", got, want)
	}
}

func TestPolicyRefuses(t *testing.T) {
	for name, pcrs := range map[string][]int{"none": {}, "24": {24}, "negative": {-1}, "twice": {7, 4, 7}, "no value": {8}} {
		if _, err := Policy(pcrs, map[int]Digest{4: {}, 7: {}, 24: {}, -1: {}}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestUnextended(t *testing.T) {
	ones := Digest{}
	for i := range ones {
		ones[i] = 0xff
	}
	sevens := Digest{}
	for i := range sevens {
		sevens[i] = 7
	}
	if !Unextended(Digest{}) || !Unextended(ones) {
		t.Error("all zero or all one bits are not seen as un-extended")
	}
	if Unextended(sevens) || Unextended(Extend(Digest{}, nil)) {
		t.Error("a measured value is seen as un-extended")
	}
}

func TestLabels(t *testing.T) {
	if got := Label(7); got != "7: Secure Boot keys and state" {
		t.Errorf("Label(7) = %q", got)
	}
	for i := range Count {
		if strings.Contains(Label(i), "not a PC Client") {
			t.Errorf("PCR %d has no name", i)
		}
	}
}

// logOf builds a crypto-agile log; each event gets SHA-1 and SHA-256 digests.
func logOf(events ...Event) Log {
	spec := append([]byte(specIDSignature), 0, 0, 0, 0, 0, 2, 0, 2)
	spec = binary.LittleEndian.AppendUint32(spec, 2)
	spec = append(spec, 4, 0, 20, 0, 0x0b, 0, 32, 0, 0)
	l := Log{Class: CryptoAgile, Header: &Event{Type: EventNoAction, Data: spec,
		Digests: []TaggedDigest{{SHA1, make([]byte, 20)}}}}
	for _, e := range events {
		if e.Digests == nil {
			e.Digests = []TaggedDigest{{SHA1, make([]byte, 20)}, {SHA256, mustSum(e.Data)}}
		}
		l.Events = append(l.Events, e)
	}
	return l
}

func utf16Bytes(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

func variable(name string, data []byte) []byte {
	b := make([]byte, 16)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(name)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	return append(append(b, utf16Bytes(name)...), data...)
}

func TestReplay(t *testing.T) {
	log := logOf(
		Event{PCR: 0, Type: EventNoAction, Data: []byte("StartupLocality\x00\x03")},
		Event{PCR: 0, Type: EventSCRTMVersion, Data: []byte("v1")},
		Event{PCR: 7, Type: EventVariableDriverConfig, Data: variable("SecureBoot", []byte{1})},
		Event{PCR: 7, Type: EventSeparator, Data: []byte{0, 0, 0, 0}},
		Event{PCR: 5, Type: EventGPT, Data: []byte("x"), Digests: []TaggedDigest{{SHA1, make([]byte, 20)}}},
		Event{PCR: 0xffffffff, Type: EventNoAction, Data: []byte("vendor")},
	)
	parsed, err := ParseLog(log.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	if parsed.Class != CryptoAgile || len(parsed.Notes) != 0 || len(parsed.Events) != 6 {
		t.Fatalf("class %v, notes %q, %d events", parsed.Class, parsed.Notes, len(parsed.Events))
	}
	want := map[int]Digest{
		0: Extend(Digest{31: 3}, []byte("v1")),
		7: Extend(Extend(Digest{}, variable("SecureBoot", []byte{1})), []byte{0, 0, 0, 0}),
	}
	if got := parsed.Replay(); !maps.Equal(got, want) {
		t.Errorf("Replay = %x, want %x; PCR 5 has an event without SHA-256 and must be left out", got, want)
	}
	if n := len(parsed.Of(7)); n != 2 {
		t.Errorf("%d events of PCR 7, want 2", n)
	}
}

// Logs as bad firmware writes them (F22, F30, takeaway 6): nothing is an
// error, and what can be replayed is.
func TestParseLogTolerates(t *testing.T) {
	good := logOf(Event{PCR: 4, Type: EventBootServicesApp, Data: []byte("app")})
	b := good.Marshal()
	headerless := Log{Class: CryptoAgile, Events: append(good.Events, good.Events...)}
	badTable := logOf(Event{PCR: 4, Type: EventEFIAction, Data: []byte("app")})
	badTable.Header.Data[24] = 200
	sha1 := Log{Class: SHA1Only, Events: []Event{{PCR: 0, Type: EventSCRTMContents, Digests: []TaggedDigest{{SHA1, make([]byte, 20)}}, Data: []byte("crtm")}}}
	unknown := logOf(Event{PCR: 4, Type: EventIPL, Digests: []TaggedDigest{{Hash(0x99), []byte{1}}}})
	tests := []struct {
		name   string
		log    []byte
		class  Class
		events int
		noted  bool
	}{
		{"nothing", nil, Empty, 0, false},
		{"zeros", make([]byte, 4096), Empty, 0, false},
		{"zero padding", append(good.Marshal(), make([]byte, 1000)...), CryptoAgile, 1, false},
		{"cut in a record", b[:len(b)-1], CryptoAgile, 0, true},
		{"garbage behind", append(good.Marshal(), "garbage, and enough of it to look"...), CryptoAgile, 1, true},
		{"no Spec ID event", headerless.Marshal(), CryptoAgile, 2, true},
		{"Spec ID event with an impossible table", badTable.Marshal(), CryptoAgile, 1, true},
		{"SHA-1 format", sha1.Marshal(), SHA1Only, 1, false},
		{"unknown algorithm", unknown.Marshal(), CryptoAgile, 0, true},
		{"event size of 4 GiB", append(good.Marshal(), 4, 0, 0, 0, 13, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255), CryptoAgile, 1, true},
		{"2^32 digests", append(good.Marshal(), 4, 0, 0, 0, 13, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0), CryptoAgile, 1, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, err := ParseLog(tt.log)
			if err != nil {
				t.Fatal(err)
			}
			if l.Class != tt.class || len(l.Events) != tt.events || (len(l.Notes) > 0) != tt.noted {
				t.Errorf("class %v, %d events, notes %q; want %v, %d, noted %v", l.Class, len(l.Events), l.Notes, tt.class, tt.events, tt.noted)
			}
			if string(l.Marshal()) != string(tt.log) {
				t.Error("Marshal does not give the log back")
			}
		})
	}
	if _, err := ParseLog(make([]byte, MaxLogBytes+1)); err == nil {
		t.Error("a log over the limit is read")
	}
}

func TestDescribe(t *testing.T) {
	devicePath := []byte{4, 1, 42, 0, 1, 0, 0, 0}
	devicePath = append(devicePath, make([]byte, 34)...)
	file := utf16Bytes(`\EFI\BOOT\BOOTX64.EFI` + "\x00")
	devicePath = append(devicePath, 4, 4, byte(4+len(file)), 0)
	devicePath = append(append(devicePath, file...), 0x7f, 0xff, 4, 0)
	image := binary.LittleEndian.AppendUint64(make([]byte, 24), uint64(len(devicePath)))
	image = append(image, devicePath...)
	tests := []struct {
		event Event
		want  string
	}{
		{Event{Type: EventSeparator, Data: []byte{0, 0, 0, 0}}, "separator (end of firmware measurements)"},
		{Event{Type: EventSeparator, Data: []byte{1, 0, 0, 0}}, "separator (firmware reports an error)"},
		{Event{Type: EventSeparator, Data: []byte{0}}, "separator of 1 bytes instead of 4"},
		{Event{Type: EventVariableDriverConfig, Data: variable("dbx", make([]byte, 76))}, "firmware variable dbx (76 bytes)"},
		{Event{Type: EventVariableDriverConfig, Data: []byte("short")}, "firmware variable (5 bytes)"},
		{Event{Type: EventBootServicesApp, Data: image}, `program partition 1 \EFI\BOOT\BOOTX64.EFI`},
		{Event{Type: EventIPL, Data: utf16Bytes(".linux\x00")}, `boot loader measurement ".linux"`},
		{Event{Type: EventIPL, Data: []byte("grub_cmd: linux\x00")}, `boot loader measurement "grub_cmd: linux"`},
		{Event{Type: EventEFIAction, Data: []byte("Calling EFI Application from Boot Option")}, `action "Calling EFI Application from Boot Option"`},
		{Event{Type: EventAction, Data: []byte("a\x1b[2J")}, `action "a?[2J"`},
		{Event{Type: 0x1234, Data: nil}, "type 0x00001234 (0 bytes)"},
	}
	for _, tt := range tests {
		if got := tt.event.Describe(); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.event.Type, got, tt.want)
		}
	}
}

// Logs of real machines. sum is over the replayed registers (index byte and
// value, ascending); every one of these replays was accepted by go-eventlog's
// ParseAndReplay as the registers that the log explains.
func TestRealLogs(t *testing.T) {
	tests := []struct {
		name  string
		log   []byte
		class Class
		sum   string
	}{
		{"arch workstation", testdata.ArchLinuxWorkstationEventLog, CryptoAgile, "0c69dd3f4fba448189317cbfdda3f351"},
		{"debian 10", testdata.Debian10EventLog, SHA1Only, "e3b0c44298fc1c149afbf4c8996fb924"},
		{"glinux", testdata.GlinuxAlexEventLog, CryptoAgile, "06a22ca370b8bbc9052bec0b626d8372"},
		{"rhel 8", testdata.Rhel8EventLog, CryptoAgile, "64a93f788b86034e4f8d5eb63b43dd41"},
		{"ubuntu 18.04", testdata.Ubuntu1804AmdSevEventLog, CryptoAgile, "d10d2e011cec3250a44bc22b5e30e562"},
		{"ubuntu 21.04", testdata.Ubuntu2104NoDbxEventLog, CryptoAgile, "a3a2e3b735d9a5aab4b985f7baccc6d3"},
		{"ubuntu 21.04 without Secure Boot", testdata.Ubuntu2104NoSecureBootEventLog, CryptoAgile, "e29e74acb4a4ea225bdd1f2e2fdddcfd"},
		{"ubuntu 24.04", testdata.Ubuntu2404AmdSevSnpEventLog, CryptoAgile, "d8546b7aaf0e1134bf820601de20ab68"},
		{"cos 101", testdata.Cos101AmdSevEventLog, CryptoAgile, "d6b51e6d8dcb0845655c14b3910e1f3c"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, err := ParseLog(tt.log)
			if err != nil {
				t.Fatal(err)
			}
			if l.Class != tt.class || len(l.Notes) != 0 {
				t.Errorf("class %v, notes %q", l.Class, l.Notes)
			}
			values, sum := l.Replay(), sha256.New()
			for _, i := range slices.Sorted(maps.Keys(values)) {
				v := values[i]
				sum.Write(append([]byte{byte(i)}, v[:]...))
			}
			if got := hex.EncodeToString(sum.Sum(nil)[:16]); got != tt.sum {
				t.Errorf("the replay's sum is %s, want %s", got, tt.sum)
			}
			var names []string
			for _, e := range l.Of(7) {
				if n, _, ok := e.Variable(); ok {
					names = append(names, n)
				}
			}
			if len(names) < 5 || !slices.Equal(names[:5], []string{"SecureBoot", "PK", "KEK", "db", "dbx"}) {
				t.Errorf("PCR 7 measures %q", names)
			}
			if string(l.Marshal()) != string(tt.log) {
				t.Error("Marshal does not give the log back")
			}
		})
	}
}

func FuzzParseLog(f *testing.F) {
	f.Add([]byte{})
	f.Add(logOf(Event{PCR: 7, Type: EventVariableDriverConfig, Data: variable("db", []byte{1, 2})}).Marshal())
	f.Add(testdata.Debian10EventLog[:2048])
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseLog(b)
		if err != nil {
			return
		}
		if string(l.Marshal()) != string(b) {
			t.Fatal("Marshal(ParseLog(b)) != b")
		}
		for i, v := range l.Replay() {
			if i < 0 || i >= Count {
				t.Fatalf("replayed PCR %d", i)
			}
			var want Digest
			for _, e := range l.Events {
				if loc, ok := startupLocality(e); ok && i == 0 && e.PCR == 0 && e.Type == EventNoAction && want == (Digest{}) {
					want[31] = loc
				}
				if e.PCR == uint32(i) && e.Type != EventNoAction {
					d, _ := e.SHA256()
					want = ExtendDigest(want, d)
				}
			}
			if v != want {
				t.Fatalf("PCR %d replays to %x, folding its records gives %x", i, v, want)
			}
		}
		for _, e := range l.Events {
			if strings.ContainsAny(e.Describe(), "\x00\x1b\n") {
				t.Fatalf("description %q disturbs a console", e.Describe())
			}
		}
	})
}

func ExampleUKI() {
	kernel := sha256.Sum256([]byte("kernel"))
	pcr11 := UKI([]Measured{{Name: ".linux", SHA256: kernel}})
	pcr11 = Extend(pcr11, []byte("enter-initrd"))
	fmt.Printf("%s = %x…\n", Label(11), pcr11[:4])
	// Output: 11: unified kernel image and boot phase = 65cb90ff…
}
