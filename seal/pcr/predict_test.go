package pcr

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-eventlog/testdata"
)

// boot is one boot of OVMF with swtpm, as hwtest's TestPrediction has seen it.
type boot struct {
	Log      []byte
	PCRs     map[int]string
	Release  Release
	Payloads map[string][]byte // .auth files that the system let the firmware append
	Before   map[string][]byte // PK, KEK, db and dbx, as the system found them
	After    map[string][]byte // those it appended to

	log Log
	now map[int]Digest
}

// boots are a series, one after the other on one box: "secure" or "open".
func boots(t testing.TB, name string) []boot {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var series []boot
	if err := json.NewDecoder(z).Decode(&series); err != nil {
		t.Fatal(err)
	}
	for i := range series {
		b := &series[i]
		if b.log, err = ParseLog(b.Log); err != nil {
			t.Fatal(err)
		}
		b.now = map[int]Digest{}
		for index, text := range b.PCRs {
			value, err := hex.DecodeString(text)
			if err != nil || len(value) != 32 {
				t.Fatalf("PCR %d is %q", index, text)
			}
			b.now[index] = Digest(value)
		}
	}
	return series
}

// variables are those at the end of the boot.
func (b boot) variables() map[string][]byte {
	v := maps.Clone(b.Before)
	maps.Copy(v, b.After)
	return v
}

// TestPredictBoots: from each boot's log follow the registers the TPM held in the
// next. The second of the secure ones appends to KEK, db and dbx (F7), the third starts a
// UKI, and the fourth a loader too, that the new key has signed.
func TestPredictBoots(t *testing.T) {
	for name, count := range map[string]int{"secure": 4, "open": 2} {
		series := boots(t, name)
		if len(series) != count {
			t.Fatalf("%s: %d boots, want %d", name, len(series), count)
		}
		for i, b := range series[1:] {
			t.Run(fmt.Sprintf("%s %d", name, i+2), func(t *testing.T) {
				last := series[i]
				p := Predict(last.log, last.now, Change{Running: last.Release, Next: b.Release, Variables: last.variables()})
				got, err := p.Of(Predictable()...)
				if err != nil {
					t.Fatal(err)
				}
				changed := 0
				for index, v := range got {
					want := b.now[index]
					if index == 11 {
						want = Extend(want, []byte("enter-initrd")) // which the recorded system did not do
					}
					if v != want {
						t.Errorf("PCR %d is predicted as %x, and was %x", index, v, want)
					}
					if v != last.now[index] {
						changed++
					}
				}
				if changed < 2 {
					t.Errorf("%d registers change: the series shows nothing", changed)
				}
			})
		}
	}
}

var eventLogPCR = regexp.MustCompile(`(?m)^    (\d+) *: 0x([0-9a-f]{64})$`)

// TestReplayByTPM2Tools: tpm2_eventlog, the TPM and the replay agree.
func TestReplayByTPM2Tools(t *testing.T) {
	for _, name := range []string{"secure", "open"} {
		for i, b := range boots(t, name) {
			file := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(file, b.Log, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("tpm2_eventlog", file).Output()
			if err != nil {
				t.Fatalf("tpm2_eventlog: %v (not installed: apt-get install tpm2-tools)", err)
			}
			judged := map[int]Digest{}
			for _, m := range eventLogPCR.FindAllStringSubmatch(string(out), -1) {
				var index int
				fmt.Sscan(m[1], &index)
				value, _ := hex.DecodeString(m[2])
				judged[index] = Digest(value)
			}
			if replayed := b.log.Replay(); len(judged) < 9 || !maps.Equal(judged, replayed) {
				t.Errorf("%s %d: tpm2_eventlog has %x, the replay %x", name, i, judged, replayed)
			}
			for _, index := range []int{0, 1, 2, 3, 4, 5, 6, 7, 9, 11} {
				if judged[index] != b.now[index] {
					t.Errorf("%s %d: tpm2_eventlog has %x for PCR %d, the TPM %x", name, i, judged[index], index, b.now[index])
				}
			}
		}
	}
}

// TestPredictNothing: what does not change stays, on any firmware whose log leads to
// its registers, in whatever form it writes its boot options (F24); only what starts must
// be known.
func TestPredictNothing(t *testing.T) {
	for name, raw := range map[string][]byte{
		"arch workstation": testdata.ArchLinuxWorkstationEventLog,
		"glinux":           testdata.GlinuxAlexEventLog,
		"rhel 8":           testdata.Rhel8EventLog,
		"ubuntu 18.04":     testdata.Ubuntu1804AmdSevEventLog,
		"ubuntu 21.04":     testdata.Ubuntu2104NoDbxEventLog,
		"without SB":       testdata.Ubuntu2104NoSecureBootEventLog,
		"ubuntu 24.04":     testdata.Ubuntu2404AmdSevSnpEventLog,
	} {
		t.Run(name, func(t *testing.T) {
			log, err := ParseLog(raw)
			if err != nil {
				t.Fatal(err)
			}
			now := log.Replay()
			p := Predict(log, now, Change{Variables: map[string][]byte{}})
			for _, i := range []int{0, 2, 7} {
				if v, ok := p.Values[i]; !ok || v != now[i] {
					t.Errorf("PCR %d: %x (%s), want %x", i, v, p.Unpredictable[i], now[i])
				}
			}
			if p.Unpredictable[4] == "" || p.Unpredictable[11] == "" {
				t.Error("what starts is not known, and PCR 4 and 11 are predicted")
			}
			dbx := hashList("somebody", "revoked")
			p = Predict(log, now, Change{Variables: map[string][]byte{"dbx": dbx}})
			v, ok := p.Values[7]
			if want := replayWithDBX(log, dbx); !ok || v != want || v == now[7] {
				t.Errorf("PCR 7 with another dbx: %x (%s), want %x", v, p.Unpredictable[7], want)
			}
		})
	}
}

// replayWithDBX folds PCR 7 with the record of dbx put together anew.
func replayWithDBX(log Log, dbx []byte) (v Digest) {
	for _, e := range log.Of(7) {
		d, _ := e.SHA256()
		if name, _, ok := e.Variable(); ok && name == "dbx" {
			d = sha256.Sum256(slices.Concat(e.Data[:16], variable("dbx", dbx)[16:]))
		}
		v = ExtendDigest(v, d)
	}
	return v
}

// hashList is a signature list of SHA-256 digests.
func hashList(owner string, texts ...string) []byte {
	l := signatureList{Type: typeSHA256, SignatureBytes: 48}
	for _, text := range texts {
		l.Signatures = append(l.Signatures, append(mustSum([]byte(owner))[:16], mustSum([]byte(text))...))
	}
	return appendSignatureList(nil, l)
}

func certList(owner string, certificates ...string) (b []byte) {
	for _, c := range certificates {
		l := signatureList{Type: typeX509, SignatureBytes: uint32(16 + len(c)), Signatures: [][]byte{append(mustSum([]byte(owner))[:16], c...)}}
		b = appendSignatureList(b, l)
	}
	return b
}

// box is a made-up boot that tests damage: two option ROMs, an agent in the firmware,
// our two programs, and no record of "Calling EFI Application" (F18). Its certificates are words.
type box struct {
	events []Event
	now    map[int]Digest // as the events have it, where not set
	change Change
	class  Class
	notes  []string
}

func digestOf(text string) Digest { return sha256.Sum256([]byte(text)) }

func program(pcr uint32, text string) Event {
	return measured(Event{PCR: pcr, Type: EventBootServicesApp, Data: []byte("image " + text)}, digestOf(text))
}

func dbEntry(owner, certificate string) Event {
	return authorityEvent(append(mustSum([]byte(owner))[:16], certificate...))
}

func newBox(secureBoot byte) *box {
	vars := map[string][]byte{"PK": certList("pk", "pk"), "KEK": certList("kek", "kek"), "db": certList("oem", "vendor", "roms"), "dbx": hashList("oem", "bad")}
	ours := Release{Loader: Program{digestOf("loader"), digestOf("vendor")}, UKI: Program{digestOf("uki"), digestOf("vendor")}, Linux: digestOf("linux"), PCR11: digestOf("pcr11")}
	next := Release{Loader: Program{digestOf("loader2"), digestOf("vendor")}, UKI: Program{digestOf("uki2"), digestOf("vendor")}, Linux: digestOf("linux2"), PCR11: digestOf("pcr11 2")}
	b := &box{class: CryptoAgile, change: Change{Running: ours, Next: next, Variables: map[string][]byte{}}, now: map[int]Digest{11: Extend(Extend(ours.PCR11, []byte("enter-initrd")), []byte("leave-initrd"))}}
	add := func(e Event) {
		if len(e.Digests) == 0 {
			e = measured(e, sha256.Sum256(e.Data))
		}
		b.events = append(b.events, e)
	}
	add(Event{PCR: 0, Type: EventSCRTMVersion, Data: []byte("v1")})
	add(Event{PCR: 7, Type: EventVariableDriverConfig, Data: variable("SecureBoot", []byte{secureBoot})})
	for _, name := range secureBootVariables() {
		add(Event{PCR: 7, Type: EventVariableDriverConfig, Data: variable(name, vars[name])})
	}
	add(Event{PCR: 7, Type: EventEFIAction, Data: []byte("DMA Protection Disabled")}) // F10
	for range 2 {
		add(Event{PCR: 7, Type: EventVariableDriverConfig, Data: variable("VendorPolicy", []byte("odd"))})
	}
	if secureBoot == 1 {
		add(dbEntry("oem", "roms"))
	}
	add(program(2, "rom"))
	add(Event{PCR: 2, Type: EventSeparator, Data: make([]byte, 4)})
	add(Event{PCR: 4, Type: EventSeparator, Data: make([]byte, 50)}) // F21
	add(Event{PCR: 7, Type: EventSeparator, Data: make([]byte, 4)})
	add(program(4, "management agent")) // F11
	if secureBoot == 1 {
		add(dbEntry("oem", "vendor"))
	}
	add(program(4, "loader"))
	add(Event{PCR: 4, Type: EventEFIAction, Data: []byte("odd action")})
	add(program(4, "uki"))
	if secureBoot == 0 {
		add(program(4, "linux"))
	}
	add(Event{PCR: 5, Type: EventEFIAction, Data: []byte("Exit Boot Services Invocation")})
	return b
}

func (b *box) predict() Prediction {
	log := Log{Class: b.class, Events: b.events, Notes: b.notes}
	now := map[int]Digest{12: {}}
	maps.Copy(now, log.Replay())
	maps.Copy(now, b.now)
	return Predict(log, now, b.change)
}

// at finds a record by what it holds.
func (b *box) at(t *testing.T, contains string) int {
	t.Helper()
	i := slices.IndexFunc(b.events, func(e Event) bool { return bytes.Contains(e.Data, []byte(contains)) })
	if i < 0 {
		t.Fatalf("no record holds %q", contains)
	}
	return i
}

func (b *box) remove(t *testing.T, contains string) {
	i := b.at(t, contains)
	b.events = slices.Delete(b.events, i, i+1)
}

func (b *box) insert(t *testing.T, before string, e ...Event) {
	b.events = slices.Insert(b.events, b.at(t, before), e...)
}

// replayed folds what newBox gives after edit.
func replayed(secureBoot byte, index int, edit func(*box)) Digest {
	b := newBox(secureBoot)
	edit(b)
	return fold(Log{Class: CryptoAgile, Events: b.events}.Of(index))
}

// exchange puts records in the place of that which holds text.
func exchange(t *testing.T, text string, with ...Event) func(*box) {
	return func(b *box) {
		i := b.at(t, text)
		b.events = slices.Replace(b.events, i, i+1, with...)
	}
}

func TestPredictMadeUp(t *testing.T) {
	vendorUTF16 := string(utf16Bytes("db")) + string(mustSum([]byte("oem"))[:16]) + "vendor"
	both := func(edits ...func(*box)) func(*box) {
		return func(b *box) {
			for _, e := range edits {
				e(b)
			}
		}
	}
	programs := both(exchange(t, "image loader", program(4, "loader2")), exchange(t, "image uki", program(4, "uki2")))
	db := func(content []byte) func(*box) { return func(b *box) { setDB(t, b, content) } }
	rotated := certList("oem", "vendor", "roms", "vendor2")
	tests := []struct {
		name       string
		secureBoot byte
		change     func(*Change)
		index      int
		want       func(*box) // what the next boot measures otherwise
	}{
		{"programs", 1, nil, 4, programs},
		{"programs and the kernel inside", 0, nil, 4, both(programs, exchange(t, "image linux", program(4, "linux2")))},
		{"option ROMs stay", 1, nil, 2, func(*box) {}},
		{"firmware stays", 1, nil, 0, func(*box) {}},
		{"nothing in PCR 7", 1, nil, 7, func(*box) {}},
		{"db grows", 1, func(c *Change) { c.Variables["db"] = rotated }, 7, db(rotated)},
		{"Secure Boot is off and db grows", 0, func(c *Change) { c.Variables["db"] = rotated }, 7, db(rotated)},
		{"the UKI is signed by another", 1, func(c *Change) { c.Variables["db"] = rotated; c.Next.UKI.Certificate = digestOf("vendor2") }, 7,
			both(db(rotated), func(b *box) { b.insert(t, "image loader", dbEntry("oem", "vendor2")) })},
		{"all is signed by another", 1, func(c *Change) {
			c.Variables["db"] = rotated
			c.Next.UKI.Certificate, c.Next.Loader.Certificate = digestOf("vendor2"), digestOf("vendor2")
		}, 7, both(db(rotated), exchange(t, vendorUTF16, dbEntry("oem", "vendor2")))},
		{"all is signed by who signed an option ROM", 1, func(c *Change) {
			c.Next.UKI.Certificate, c.Next.Loader.Certificate = digestOf("roms"), digestOf("roms")
		}, 7, func(b *box) { b.remove(t, vendorUTF16) }},
		{"db has other things of the same bytes", 1, func(c *Change) {
			c.Variables["db"] = append(appendSignatureList(nil, signatureList{Type: [16]byte{1}, SignatureBytes: 22, Signatures: [][]byte{append(make([]byte, 16), "vendor"...)}}), rotated...)
		}, 7, db(append(appendSignatureList(nil, signatureList{Type: [16]byte{1}, SignatureBytes: 22, Signatures: [][]byte{append(make([]byte, 16), "vendor"...)}}), rotated...))},
		{"the vendor's entry gets another owner", 1, func(c *Change) {
			c.Variables["db"] = slices.Concat(certList("oem", "roms"), certList("service", "vendor"))
		}, 7,
			both(db(slices.Concat(certList("oem", "roms"), certList("service", "vendor"))), exchange(t, vendorUTF16, dbEntry("service", "vendor")))},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBox(tt.secureBoot)
			if tt.change != nil {
				tt.change(&b.change)
			}
			p := b.predict()
			if len(p.Unpredictable) != 0 || len(p.Values) != len(Predictable()) {
				t.Fatalf("%d values; unpredictable %v", len(p.Values), p.Unpredictable)
			}
			if want := replayed(tt.secureBoot, tt.index, tt.want); p.Values[tt.index] != want {
				t.Errorf("PCR %d is predicted as %x, want %x", tt.index, p.Values[tt.index], want)
			}
			if want := Extend(digestOf("pcr11 2"), []byte("enter-initrd")); p.Values[11] != want {
				t.Errorf("PCR 11 is predicted as %x, want %x", p.Values[11], want)
			}
		})
	}
}

// TestPredictAmongOthers: programs of others were verified before and after ours; one
// certificate in the place of one leaves no doubt about the order.
func TestPredictAmongOthers(t *testing.T) {
	list := certList("oem", "vendor", "roms", "tool", "vendor2")
	with := func(certificates ...string) *box {
		b := newBox(1)
		setDB(t, b, list)
		b.remove(t, string(utf16Bytes("db"))+string(mustSum([]byte("oem"))[:16])+"vendor")
		for _, c := range append(certificates, "tool") {
			b.insert(t, "image loader", dbEntry("oem", c))
		}
		return b
	}
	for name, tt := range map[string]struct {
		certificate string
		want        []string
	}{"another": {"vendor2", []string{"vendor2"}}, "one that was measured before": {"roms", nil}} {
		b := with("vendor")
		b.change.Next.UKI.Certificate, b.change.Next.Loader.Certificate = digestOf(tt.certificate), digestOf(tt.certificate)
		p := b.predict()
		if want := fold(Log{Class: CryptoAgile, Events: with(tt.want...).events}.Of(7)); p.Values[7] != want {
			t.Errorf("%s: %x (%s), want %x", name, p.Values[7], p.Unpredictable[7], want)
		}
	}
}

// TestPredictKeepsPrograms: a program of somebody else that was started, wherever that
// was, is started again; the release's are replaced each time they are.
func TestPredictKeepsPrograms(t *testing.T) {
	for _, secureBoot := range []byte{0, 1} {
		for name, add := range map[string]func(b *box, loader, uki string){
			"before the loader": func(b *box, loader, _ string) { b.insert(t, "image "+loader, program(4, "vendor's agent")) },
			"between":           func(b *box, _, uki string) { b.insert(t, "image "+uki, program(4, "driver")) },
			"behind":            func(b *box, _, _ string) { b.events = append(b.events, program(4, "add-on")) },
			"loader twice":      func(b *box, loader, uki string) { b.insert(t, "image "+uki, program(4, loader)) },
			"UKI twice":         func(b *box, _, uki string) { b.events = append(b.events, program(4, uki)) },
		} {
			b := newBox(secureBoot)
			add(b, "loader", "uki")
			p := b.predict()
			var want Digest
			for _, e := range (Log{Class: CryptoAgile, Events: b.events}).Of(4) {
				d, _ := e.SHA256()
				switch d {
				case b.change.Running.Loader.Authenticode:
					d = b.change.Next.Loader.Authenticode
				case b.change.Running.UKI.Authenticode:
					d = b.change.Next.UKI.Authenticode
				case b.change.Running.Linux:
					d = b.change.Next.Linux
				}
				want = ExtendDigest(want, d)
			}
			if p.Values[4] != want {
				t.Errorf("%s, Secure Boot %d: %x (%s), want %x", name, secureBoot, p.Values[4], p.Unpredictable[4], want)
			}
		}
	}
}

// TestPredictOddLists: what cannot be read does no harm while it stays (F25).
func TestPredictOddLists(t *testing.T) {
	for _, odd := range []string{"db", "dbx"} {
		b := newBox(1)
		i := slices.IndexFunc(b.events, func(e Event) bool { name, _, _ := e.Variable(); return name == odd })
		data := variable(odd, []byte("short"))
		b.events[i] = measured(Event{PCR: 7, Type: EventVariableDriverConfig, Data: data}, sha256.Sum256(data))
		b.change.Next = b.change.Running
		b.change.Variables = map[string][]byte{odd: []byte("short"), "KEK": certList("kek", "kek", "kek2")}
		p := b.predict()
		want := Log{Class: CryptoAgile, Events: b.events}.Of(7)
		for j, e := range want {
			if name, _, _ := e.Variable(); name == "KEK" {
				want[j] = measured(e, sha256.Sum256(variable("KEK", b.change.Variables["KEK"])))
			}
		}
		if p.Values[7] != fold(want) {
			t.Errorf("%s: %x (%s), want %x", odd, p.Values[7], p.Unpredictable[7], fold(want))
		}
	}
}

// refusal is a damaged box, or a change that cannot be followed, for which just these
// registers have no value.
type refusal struct {
	name       string
	secureBoot byte
	damage     func(*testing.T, *box)
	pcrs       []int
	reason     string // part of each
}

func refusals() []refusal {
	vendor := string(utf16Bytes("db")) + string(mustSum([]byte("oem"))[:16]) + "vendor"
	otherDigest := func(contains string) func(*testing.T, *box) {
		return func(t *testing.T, b *box) {
			i := b.at(t, contains)
			b.events[i] = measured(b.events[i], digestOf("less than the record"))
			// A db entry must have to change for its record to matter.
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "more")
		}
	}
	set := func(name string, content []byte) func(*testing.T, *box) {
		return func(_ *testing.T, b *box) { b.change.Variables[name] = content }
	}
	return []refusal{
		{"the firmware left no log", 1, func(_ *testing.T, b *box) {
			b.now = newNow(b)
			b.events, b.class = nil, Empty
		}, []int{0, 2, 4, 7, 12}, "the firmware left no log"},
		{"the log has SHA-1 only", 1, func(_ *testing.T, b *box) {
			b.now, b.class = newNow(b), SHA1Only
		}, []int{0, 2, 4, 7, 12}, "SHA-1 digests only"},
		{"the log is cut off", 1, func(t *testing.T, b *box) {
			b.now = newNow(b)
			b.events, b.notes = b.events[:b.at(t, "image loader")], []string{"record 14 cannot be read"}
		}, []int{4}, "(record 14 cannot be read)"},
		{"a record is not in the log", 1, func(t *testing.T, b *box) {
			b.now = newNow(b)
			b.remove(t, "v1")
			b.insert(t, "image rom", Event{PCR: 0, Type: EventSeparator, Digests: []TaggedDigest{{SHA256, mustSum(nil)}}})
		}, []int{0}, "the log does not lead to the present value of PCR 0: 1 records give"},
		{"a record has no SHA-256 digest", 1, func(t *testing.T, b *box) {
			b.now = newNow(b)
			b.events[b.at(t, "image rom")].Digests = []TaggedDigest{{SHA1, make([]byte, 20)}}
		}, []int{2}, "has no SHA-256 digest"},
		{"nothing is measured (F27)", 1, func(t *testing.T, b *box) {
			b.now[0] = Digest{}
			b.remove(t, "v1")
		}, []int{0}, "no record measures into the register"},
		{"PCR 12 was extended behind the log", 1, func(_ *testing.T, b *box) { b.now[12] = digestOf("extended") }, []int{12}, "no record measures"},
		{"a command line was typed", 1, func(_ *testing.T, b *box) {
			b.events = append(b.events, measured(Event{PCR: 12, Type: EventIPL, Data: []byte("init=/bin/sh")}, digestOf("init=/bin/sh")))
		}, []int{12}, "came from outside the kernel image"},
		{"PCR 11 holds something else", 1, func(_ *testing.T, b *box) { b.now[11] = digestOf("another stub") }, []int{11}, "in no boot phase"},
		{"PCR 11 of the next release is not known", 1, func(_ *testing.T, b *box) { b.change.Next.PCR11 = Digest{} }, []int{11}, "what the kernel image measures is not known"},
		{"PCR 11 of the running release is not known", 1, func(_ *testing.T, b *box) { b.change.Running.PCR11 = Digest{} }, []int{11}, "what the kernel image measures is not known"},

		{"the next loader is not known", 1, func(_ *testing.T, b *box) { b.change.Next.Loader.Authenticode = Digest{} }, []int{4}, "are not all known"},
		{"the running UKI is not known", 1, func(_ *testing.T, b *box) { b.change.Running.UKI.Authenticode = Digest{} }, []int{4}, "are not all known"},
		{"another loader started", 1, func(_ *testing.T, b *box) { b.change.Running.Loader.Authenticode = digestOf("older loader") }, []int{4}, "no record of the running release's boot loader: it shows program"},
		{"another UKI started", 1, func(_ *testing.T, b *box) { b.change.Running.UKI.Authenticode = digestOf("older uki") }, []int{4}, "no record of the running release's kernel image"},
		{"no program started", 1, func(t *testing.T, b *box) {
			for _, text := range []string{"image management agent", "image loader", "image uki"} {
				b.remove(t, text)
			}
		}, []int{4}, "it shows no program"},
		{"the digest is not a program's", 1, func(t *testing.T, b *box) { b.events[b.at(t, "image uki")].Type = EventIPL }, []int{4}, "no record of the running release's kernel image"},
		{"the UKI started before the loader", 1, func(t *testing.T, b *box) {
			b.remove(t, "image uki")
			b.insert(t, "image loader", program(4, "uki"))
		}, []int{4}, "after its boot loader"},
		{"the next kernel inside is not known", 0, func(_ *testing.T, b *box) { b.change.Next.Linux = Digest{} }, []int{4}, "the kernel inside the kernel image is measured"},
		{"the running kernel inside is not known", 0, func(_ *testing.T, b *box) { b.change.Running.Linux = Digest{} }, []int{4}, "may be the kernel inside"},

		{"a variable nobody knows", 1, set("dbt", nil), []int{7}, `the variable "dbt"`},
		{"dbx is not in the log", 1, func(t *testing.T, b *box) { b.remove(t, string(utf16Bytes("dbx"))) }, []int{7}, "no record of the variable dbx"},
		{"dbx is in the log twice", 1, func(t *testing.T, b *box) {
			b.events = append(b.events, b.events[b.at(t, string(utf16Bytes("dbx")))])
		}, []int{7}, "measures the variable dbx twice"},
		{"the content of KEK alone is hashed", 1, otherDigest(string(utf16Bytes("KEK"))), []int{7}, "measures the variable KEK otherwise"},
		{"SecureBoot is long", 1, func(t *testing.T, b *box) {
			data := variable("SecureBoot", []byte{1, 0})
			b.events[b.at(t, string(utf16Bytes("SecureBoot")))] = measured(Event{PCR: 7, Type: EventVariableDriverConfig, Data: data}, sha256.Sum256(data))
		}, []int{7}, "SecureBoot has 2 bytes"},
		{"PK is deleted", 1, set("PK", []byte{}), []int{7}, "setup mode and Secure Boot is off"},
		{"PK is enrolled", 0, func(t *testing.T, b *box) {
			data := variable("PK", nil)
			b.events[b.at(t, string(utf16Bytes("PK")))] = measured(Event{PCR: 7, Type: EventVariableDriverConfig, Data: data}, sha256.Sum256(data))
			b.change.Variables["PK"] = certList("pk", "pk")
		}, []int{7}, "takes the firmware out of setup mode"},
		{"dbx is damaged", 1, set("dbx", []byte("short")), []int{7}, "the dbx of the next boot: signature list at offset 0"},
		{"db is damaged", 1, set("db", []byte("short")), []int{7}, "the db of the next boot: signature list at offset 0"},
		{"dbx names the loader", 1, set("dbx", hashList("x", "bad", "loader2")), []int{7}, "names the boot loader"},
		{"dbx names the UKI", 1, set("dbx", hashList("x", "uki2")), []int{7}, "names the kernel image"},
		{"dbx names the certificate", 1, set("dbx", certList("x", "vendor")), []int{7}, "names the boot loader or its certificate"},
		{"db loses the certificate", 1, set("db", certList("oem", "roms")), []int{7}, "lacks the certificate"},
		{"db loses the option ROM's certificate", 1, set("db", certList("oem", "vendor")), []int{7}, "lacks an entry that verified a program of others"},
		{"the new certificate is not in db", 1, func(_ *testing.T, b *box) { b.change.Next.UKI.Certificate = digestOf("vendor2") }, []int{7}, "that verifies the kernel image"},
		{"only the UKI changes, and its certificate is not in db", 1, func(_ *testing.T, b *box) {
			b.change.Next.Loader = b.change.Running.Loader
			b.change.Next.UKI.Certificate = digestOf("vendor2")
		}, []int{7}, "that verifies the kernel image"},
		{"only the loader changes, and its certificate is not in db", 1, func(_ *testing.T, b *box) {
			b.change.Next.UKI = b.change.Running.UKI
			b.change.Next.Loader.Certificate = digestOf("vendor2")
		}, []int{7}, "that verifies the boot loader"},
		{"the running certificate was not in db", 1, func(_ *testing.T, b *box) { b.change.Running.UKI.Certificate = digestOf("vendor0") }, []int{7}, "the present db: it lacks"},
		{"no certificate is known", 1, func(_ *testing.T, b *box) {
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "more")
			b.change.Running.Loader.Certificate, b.change.Next.Loader.Certificate = Digest{}, Digest{}
		}, []int{7}, "the certificates that verify"},
		{"the certificate is not in the log", 1, func(t *testing.T, b *box) {
			b.remove(t, vendor)
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "more")
		}, []int{7}, "the log shows 0 of the 1 certificates"},
		{"the certificate's record hashes less", 1, otherDigest(vendor), []int{7}, "measures the certificate of the running release otherwise"},
		{"the certificate is in the log twice", 1, func(t *testing.T, b *box) {
			b.events = append(b.events, dbEntry("oem", "vendor"), program(4, "add-on"))
			b.events = slices.Delete(b.events, len(b.events)-1, len(b.events))
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "more")
		}, []int{7}, "in another order"},
		{"the certificate verified an option ROM", 1, func(t *testing.T, b *box) {
			b.remove(t, vendor)
			b.insert(t, "image rom", dbEntry("oem", "vendor"))
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "more")
		}, []int{7}, "verified another program too"},
		{"the certificates are in another order", 1, func(t *testing.T, b *box) {
			b.insert(t, "image loader", dbEntry("oem", "roms2")) // after the vendor's
			setDB(t, b, certList("oem", "vendor", "roms", "roms2"))
			b.change.Running.Loader.Certificate, b.change.Next.Loader.Certificate = digestOf("roms2"), digestOf("roms2")
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "roms2", "more")
		}, []int{7}, "in another order"},
		{"the present db is damaged", 1, func(t *testing.T, b *box) {
			setDB(t, b, []byte("short"))
			b.change.Variables["db"] = certList("oem", "vendor", "roms")
		}, []int{7}, "the present db: signature list at offset 0"},
		{"nothing started after the certificate", 1, func(t *testing.T, b *box) {
			b.remove(t, vendor)
			b.events = append(b.events, dbEntry("oem", "vendor"))
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "more")
		}, []int{7}, "no program after the certificate"},
		{"two certificates among those of others", 1, func(t *testing.T, b *box) {
			b.insert(t, "image uki", dbEntry("oem", "roms"))
			b.change.Variables["db"] = certList("oem", "vendor", "roms", "vendor2")
			b.change.Next.UKI.Certificate = digestOf("vendor2")
		}, []int{7}, "not clear in which order"},
		{"the new certificate verified a later program", 1, func(t *testing.T, b *box) {
			roms := string(utf16Bytes("db")) + string(mustSum([]byte("oem"))[:16]) + "roms"
			b.remove(t, roms)
			b.insert(t, "image uki", dbEntry("oem", "roms"))
			b.change.Next.UKI.Certificate, b.change.Next.Loader.Certificate = digestOf("roms"), digestOf("roms")
		}, []int{7}, "verified a later program of others"},
	}
}

// setDB replaces the record of db.
func setDB(t *testing.T, b *box, content []byte) {
	i := slices.IndexFunc(b.events, func(e Event) bool { name, _, _ := e.Variable(); return name == "db" })
	if i < 0 {
		t.Fatal("no record of db")
	}
	data := variable("db", content)
	b.events[i] = measured(Event{PCR: 7, Type: EventVariableDriverConfig, Data: data}, sha256.Sum256(data))
}

// newNow are the registers the undamaged log leads to.
func newNow(b *box) map[int]Digest {
	now := Log{Class: CryptoAgile, Events: b.events}.Replay()
	maps.Copy(now, b.now)
	return now
}

// TestPredictRefuses: each refusal takes away just the registers it concerns; first of
// all those that the log does not lead to today (F14).
func TestPredictRefuses(t *testing.T) {
	for _, r := range refusals() {
		t.Run(r.name, func(t *testing.T) {
			b := newBox(r.secureBoot)
			r.damage(t, b)
			p := b.predict()
			if got := slices.Sorted(maps.Keys(p.Unpredictable)); !slices.Equal(got, r.pcrs) {
				t.Fatalf("no prediction of %v (%v), want none of %v", got, p.Unpredictable, r.pcrs)
			}
			for _, i := range r.pcrs {
				if !strings.Contains(p.Unpredictable[i], r.reason) {
					t.Errorf("PCR %d: %q does not say %q", i, p.Unpredictable[i], r.reason)
				}
				if _, ok := p.Values[i]; ok {
					t.Errorf("PCR %d has a value and none", i)
				}
			}
			if len(p.Values)+len(p.Unpredictable) != len(Predictable()) {
				t.Errorf("%d values and %d reasons for %d registers", len(p.Values), len(p.Unpredictable), len(Predictable()))
			}
			var u *UnpredictableError
			if _, err := p.Of(Predictable()...); !errors.As(err, &u) || u.PCR != r.pcrs[0] || u.Reason != p.Unpredictable[r.pcrs[0]] {
				t.Errorf("Of gives %v", err)
			}
		})
	}
}

// TestPredictionOf: never an empty success, never fewer than asked for (F15).
func TestPredictionOf(t *testing.T) {
	p := newBox(1).predict()
	got, err := p.Of(7, 4)
	if err != nil || len(got) != 2 || got[7] != p.Values[7] || got[4] != p.Values[4] {
		t.Errorf("Of(7, 4) = %x, %v", got, err)
	}
	for reason, pcrs := range map[string][]int{"no PCR": {}, "listed twice": {7, 7}, "PCR 24": {24}, "predict PCR 1: what goes into it is not known": {7, 1}} {
		if got, err := p.Of(pcrs...); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%d: %x and %v, want %q", pcrs, got, err, reason)
		}
	}
	if got, err := (Prediction{}).Of(7); err == nil {
		t.Errorf("the zero Prediction gives %x", got)
	}
	b := newBox(1)
	delete(b.now, 11)
	if p := b.predict(); p.Unpredictable[11] != "its present value was not read" {
		t.Errorf("PCR 11 was not read, and: %q", p.Unpredictable[11])
	}
}

// TestPredictDoesNotWrite: the log and the change are as before.
func TestPredictDoesNotWrite(t *testing.T) {
	b := newBox(1)
	b.change.Variables["db"] = certList("oem", "vendor", "roms", "vendor2")
	b.change.Next.UKI.Certificate = digestOf("vendor2")
	before := fmt.Sprintf("%x %v", b.events, b.change)
	first := b.predict()
	if second := b.predict(); !maps.Equal(first.Values, second.Values) {
		t.Errorf("the second prediction differs: %x, %x", first.Values, second.Values)
	}
	if after := fmt.Sprintf("%x %v", b.events, b.change); after != before {
		t.Error("the prediction changed what it was given")
	}
}

// FuzzPredict: whatever the log says, a register that does not change is predicted as
// it is, and a log that does not lead to a register predicts nothing of it.
func FuzzPredict(f *testing.F) {
	for _, name := range []string{"secure", "open"} {
		f.Add(boots(f, name)[0].Log)
	}
	f.Add(logOf(newBox(1).events...).Marshal())
	running := boots(f, "secure")[0].Release
	f.Fuzz(func(t *testing.T, raw []byte) {
		log, err := ParseLog(raw)
		if err != nil {
			return
		}
		now := log.Replay()
		p := Predict(log, now, Change{Running: running, Next: running})
		for i, v := range p.Values {
			if want := now[i]; i != 11 && v != want {
				t.Fatalf("PCR %d: nothing changes, and %x becomes %x", i, want, v)
			}
		}
		for i, v := range now {
			now[i] = Extend(v, nil)
		}
		other := Predict(log, now, Change{Running: running, Next: running})
		for i := range other.Values {
			if i != 12 {
				t.Fatalf("PCR %d: the log does not lead to it, and it is predicted", i)
			}
		}
	})
}

func ExamplePredict() {
	vendor := sha256.Sum256([]byte("the DER certificate in db"))
	release := func(name string) Release {
		return Release{
			Loader: Program{Authenticode: sha256.Sum256([]byte("loader")), Certificate: vendor},
			UKI:    Program{Authenticode: sha256.Sum256([]byte(name)), Certificate: vendor},
			PCR11:  sha256.Sum256([]byte("sections of " + name)),
		}
	}
	running, next := release("1.0.0"), release("1.1.0")
	log := Log{Class: CryptoAgile, Events: []Event{
		{PCR: 4, Type: EventBootServicesApp, Digests: []TaggedDigest{{SHA256, running.Loader.Authenticode[:]}}},
		{PCR: 4, Type: EventBootServicesApp, Digests: []TaggedDigest{{SHA256, running.UKI.Authenticode[:]}}},
	}}
	now := map[int]Digest{4: log.Replay()[4], 7: {}, 11: Extend(running.PCR11, []byte("enter-initrd"))}
	p := Predict(log, now, Change{Running: running, Next: next})
	values, err := p.Of(4, 11)
	fmt.Printf("%d values, %v\n", len(values), err)
	_, err = p.Of(7, 11)
	fmt.Println(err)
	// Output:
	// 2 values, <nil>
	// predict PCR 7: the log does not lead to the present value of PCR 7: no record measures into the register
}
