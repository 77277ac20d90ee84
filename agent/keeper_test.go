package agent

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf16"

	"github.com/google/go-tpm/tpm2"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// platform plays a UEFI firmware and systemd's stub: what they measure goes into the
// TPM and into a log of the TCG's form.
type platform struct {
	code       string
	secureBoot bool
	variables  map[string][]byte
	tpm        seal.TPM
	log        pcr.Log
	loader     string // on the disk
	// verifier has the certificate in db of releases that are not signed by the usual one.
	verifier map[string]string
	// others are programs of somebody else, by the start that they come before: 0 is the
	// boot loader's, and the last one is behind all.
	others map[int]string
	// refused is how many boot options are tried before the one that starts.
	refused int
	// direct: the last option is the kernel image itself.
	direct bool
	// forge leaves a record out of the log.
	forge bool
}

func newPlatform(secureBoot bool) *platform {
	return &platform{code: "firmware 1", secureBoot: secureBoot, variables: map[string][]byte{
		"PK": signatureList("platform"), "KEK": signatureList("exchange"), "db": signatureList("vendor's"), "dbx": {},
	}}
}

// signatureList is an EFI_SIGNATURE_LIST with one thing that stands for a certificate
// (UEFI 2.10 §32.4.1).
func signatureList(certificate string) []byte {
	b, _ := hex.DecodeString("a159c0a5e494a74a87b5ab155c2bf072") // EFI_CERT_X509_GUID
	entry := append(make([]byte, signatureOwnerBytes), certificate...)
	b = binary.LittleEndian.AppendUint32(b, uint32(28+len(entry)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(entry)))
	return append(b, entry...)
}

// measure extends and logs; the digest is that of the data unless there is another.
func (f *platform) measure(t testing.TB, index int, kind pcr.EventType, data []byte, digest *pcr.Digest) {
	t.Helper()
	d := sha256.Sum256(data)
	if digest != nil {
		d = *digest
	}
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
	}.Execute(f.tpm)
	if err != nil {
		t.Fatal(err)
	}
	f.log.Events = append(f.log.Events, pcr.Event{
		PCR: uint32(index), Type: kind, Data: data, Digests: []pcr.TaggedDigest{{Alg: pcr.SHA256, Digest: d[:]}},
	})
}

// variable is a UEFI_VARIABLE_DATA (PFP §10.4.1).
func variable(guid, name string, data []byte) []byte {
	b, _ := hex.DecodeString(guid)
	units := utf16.Encode([]rune(name))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(units)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	for _, u := range units {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return append(b, data...)
}

const (
	globalGUID   = "61dfe48bca93d211aa0d00e098032b8c"
	databaseGUID = "cbb219d73a3d9645a3bcdad00e67656f"
)

// boot measures a start of the release, up to the initrd.
func (f *platform) boot(t testing.TB, version string) {
	t.Helper()
	f.log = pcr.Log{Class: pcr.CryptoAgile, Header: specID()}
	f.measure(t, 0, pcr.EventSCRTMVersion, []byte(f.code), nil)
	f.measure(t, 2, pcr.EventEFIAction, []byte("option ROM"), nil)
	on := byte(0)
	if f.secureBoot {
		on = 1
	}
	f.measure(t, 7, pcr.EventVariableDriverConfig, variable(globalGUID, "SecureBoot", []byte{on}), nil)
	for _, name := range []string{"PK", "KEK", "db", "dbx"} {
		guid := globalGUID
		if name[0] == 'd' {
			guid = databaseGUID
		}
		f.measure(t, 7, pcr.EventVariableDriverConfig, variable(guid, name, f.variables[name]), nil)
	}
	for i := range 8 {
		f.measure(t, i, pcr.EventSeparator, make([]byte, 4), nil)
	}
	f.measure(t, 4, pcr.EventEFIAction, []byte("Calling EFI Application from Boot Option"), nil)
	for range f.refused {
		f.measure(t, 4, pcr.EventEFIAction, []byte("Returning from EFI Application from Boot Option"), nil)
		f.measure(t, 4, pcr.EventEFIAction, []byte("Calling EFI Application from Boot Option"), nil)
	}
	programs := []string{f.loader, "uki " + version}
	if !f.secureBoot {
		programs = append(programs, "linux "+version)
	}
	if f.direct {
		programs = programs[1:]
	}
	verified := map[string]bool{}
	foreign := func(n int) {
		if what := f.others[n]; what != "" {
			d := pcr.Digest(sha256.Sum256([]byte(what)))
			f.measure(t, 4, pcr.EventBootServicesApp, make([]byte, 32), &d)
		}
	}
	defer func() { foreign(len(programs)) }()
	for n, p := range programs {
		foreign(n)
		by := "vendor's"
		for v, certificate := range f.verifier {
			if p == "uki "+v || p == "loader "+v[:1] {
				by = certificate
			}
		}
		if f.secureBoot && !verified[by] {
			verified[by] = true
			f.measure(t, 7, pcr.EventVariableAuthority, variable(databaseGUID, "db", signatureList(by)[28:]), nil)
		}
		d := pcr.Digest(sha256.Sum256([]byte(p)))
		f.measure(t, 4, pcr.EventBootServicesApp, make([]byte, 32), &d)
		if p == "uki "+version {
			for _, m := range sectionsOf(version) {
				f.measure(t, 11, pcr.EventIPL, append([]byte(m[0]), 0), nil)
				f.measure(t, 11, pcr.EventIPL, []byte(m[1]), nil)
			}
		}
	}
}

// specID is a TCG_EfiSpecIDEvent with SHA-256 (PFP §10.4.5.1).
func specID() *pcr.Event {
	data := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2)
	data = binary.LittleEndian.AppendUint32(data, 1)
	data = binary.LittleEndian.AppendUint16(data, uint16(pcr.SHA256))
	data = binary.LittleEndian.AppendUint16(data, 32)
	return &pcr.Event{Type: pcr.EventNoAction, Digests: []pcr.TaggedDigest{{Alg: pcr.SHA1, Digest: make([]byte, 20)}}, Data: append(data, 0)}
}

func sectionsOf(version string) [][2]string {
	return [][2]string{{".linux", "kernel " + version}, {".cmdline", "roothash " + version}}
}

// valuesOf are the reference values of a release.
func valuesOf(version string) image.Expected {
	var measured []pcr.Measured
	for _, s := range sectionsOf(version) {
		measured = append(measured, pcr.Measured{Name: s[0], SHA256: sha256.Sum256([]byte(s[1]))})
	}
	hash := func(s string) string { d := sha256.Sum256([]byte(s)); return hex.EncodeToString(d[:]) }
	stub := pcr.UKI(measured)
	return image.Expected{
		PCR11:              map[string]string{"": hex.EncodeToString(stub[:])},
		LoaderAuthenticode: hash("loader " + version[:1]), UKIAuthenticode: hash("uki " + version), LinuxAuthenticode: hash("linux " + version),
		DBCertificateSHA256: hash("vendor's"),
	}
}

// signaturesOf is the .pcrsig section of a release of that epoch.
func signaturesOf(t testing.TB, version string, epoch uint64) []byte {
	t.Helper()
	stub, err := parseDigest(valuesOf(version).PCR11[""])
	if err != nil {
		t.Fatal(err)
	}
	list, err := seal.SignEpochs(vendorKey(), pcr.Extend(stub, []byte(phaseEnterInitrd)), epoch)
	if err != nil {
		t.Fatal(err)
	}
	b, err := list.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// station is a whole appliance: slots, data volumes, TPM and firmware.
type station struct {
	*box
	a  *appliance
	fw *platform
	s  *session
	k  *Keeper
	// epochs of releases; others have the policy's.
	epochs map[string]int64
	boots  int
	now    time.Time
}

// newStation is a box with release 1.0.0 in slot a, provisioned.
func newStation(t *testing.T, policy image.SealPolicy, secureBoot bool, versions ...string) *station {
	t.Helper()
	return newStationTyped(t, policy, secureBoot, "", versions...)
}

// newStationTyped has a person at the first boot.
func newStationTyped(t *testing.T, policy image.SealPolicy, secureBoot bool, typed string, versions ...string) *station {
	t.Helper()
	v := newVendor(t)
	for _, version := range append([]string{"1.0.0"}, versions...) {
		v.publish(version, releaseOptions{expected: valuesOf(version)})
	}
	st := &station{
		box: newBox(t, 2), a: &appliance{vendor: v, dev: v.newDisk("1.0.0"), dir: filepath.Join(t.TempDir(), "update"), now: today},
		fw: newPlatform(secureBoot), epochs: map[string]int64{}, now: today,
	}
	st.policy, st.secureBoot, st.fw.tpm = policy, secureBoot, st.tpm
	st.start(typed, "provisioned")
	return st
}

// start boots what the loader chooses, and wants the volumes open by that method.
func (st *station) start(typed, method string) {
	st.t.Helper()
	if err := st.try(typed); err != nil {
		st.t.Fatalf("%v\nconsole: %s\nlog: %s", err, st.s.console.out.String(), st.s.log.text.String())
	}
	st.s.wantOpen(method)
}

// try boots, up to the system. A slot that is not on trial settles.
func (st *station) try(typed string) error {
	st.t.Helper()
	if err := st.a.load(); err != nil {
		st.t.Fatal(err)
	}
	r, err := st.a.whole(st.a.on)
	if err != nil {
		st.t.Fatal(err)
	}
	st.boots++
	st.tpm.Reset()
	st.fw.loader = st.loaderOnDisk()
	st.fw.boot(st.t, r.Version)
	st.policy.Epoch = cmp.Or(st.epochs[r.Version], st.policy.Epoch)
	log := st.fw.log
	if st.fw.forge {
		log.Events = slices.DeleteFunc(slices.Clone(log.Events), func(e pcr.Event) bool {
			return string(e.Data) == "option ROM" || strings.HasPrefix(string(e.Data), "roothash")
		})
	}
	st.version, st.slot, st.log = r.Version, string(st.a.on.Slot), log.Marshal()
	st.signatures = signaturesOf(st.t, r.Version, uint64(st.policy.Epoch))
	st.onTrial = st.a.on.Counted
	st.authorisation = func() ([]byte, error) { return readAuthorisation(st.a.disk()) }
	if st.s, err = st.boot(typed); err != nil {
		return err
	}
	if err := st.a.start(r); err != nil {
		st.t.Fatal(err)
	}
	st.k = st.keeper()
	st.a.u.Prepare = st.k.Prepare
	return nil
}

// loaderOnDisk names the boot loader; releases of one major version have the same.
func (st *station) loaderOnDisk() string {
	esp, err := st.a.esp()
	if err != nil {
		st.t.Fatal(err)
	}
	f, err := esp.Open("EFI/BOOT/BOOTX64.EFI")
	if err != nil {
		st.t.Fatal(err)
	}
	content, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
	if err != nil {
		st.t.Fatal(err)
	}
	for _, r := range st.a.releases {
		if bytes.Equal(r.loader, content) {
			return "loader " + r.Version[:1]
		}
	}
	st.t.Fatal("the boot loader is of no release")
	return ""
}

func (st *station) keeper() *Keeper {
	sealer := st.s.sealer()
	signatures, err := seal.ParseSignatures(st.signatures)
	if err != nil {
		st.t.Fatal(err)
	}
	sealer.Signatures = signatures
	log := st.log
	return &Keeper{
		Sealer: *sealer, Policy: st.description().Appliance.Seal, Name: "testbox", Version: st.version, Slot: partition.Slot(st.slot),
		SecureBoot: st.s.status.SecureBoot, Method: st.s.status.Volumes[0].Method, PCRs: pcrValues(st.s.status.PCRs),
		OpenDisk: func() (*partition.Disk, io.Closer, error) {
			d, err := partition.Open(st.a.dev)
			return d, io.NopCloser(nil), err
		},
		EventLog:  func() ([]byte, error) { return log, nil },
		Variables: func() (map[string][]byte, error) { return maps.Clone(st.fw.variables), nil },
		Programs: func() (pcr.Release, []pcr.Digest, error) {
			running, err := releaseOf(valuesOf(st.version))
			if err != nil {
				return running, nil, err
			}
			on, err := releaseOf(valuesOf(strings.TrimPrefix(st.loaderOnDisk(), "loader ") + ".0.0"))
			if st.fw.direct {
				on.Loader.Authenticode = sha256.Sum256([]byte("somebody else's"))
			}
			return running, []pcr.Digest{on.Loader.Authenticode}, err
		},
		BootID: fmt.Sprint(st.boots), Now: func() time.Time { return st.now },
	}
}

func (st *station) mustSettle() Settled {
	st.t.Helper()
	r, err := st.k.Settle()
	if err != nil {
		st.t.Fatal(err)
	}
	return r
}

// good is a boot that turned out well.
func (st *station) good() Settled {
	st.t.Helper()
	if st.a.on.Counted {
		st.a.bless()
	}
	return st.mustSettle()
}

func (st *station) apply(version string) {
	st.t.Helper()
	st.a.mustApply(st.a.source(), version, version)
}

// TestUpdatesOfEachPolicy updates, and falls back, under each policy, with Secure Boot
// and without. The volumes open by the TPM at every boot (F48, F50).
func TestUpdatesOfEachPolicy(t *testing.T) {
	for _, policy := range []string{seal.PolicyStandard, seal.PolicyStrict, seal.PolicyRollbackProof, seal.PolicyDiskTheftOnly} {
		for _, secureBoot := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, Secure Boot %v", policy, secureBoot), func(t *testing.T) {
				st := newStation(t, image.SealPolicy{Policy: policy, Epoch: 1}, secureBoot, "1.1.0", "1.2.0")
				st.mustSettle()
				st.wantStates("slot a 1.0.0")
				st.start("", "tpm")
				if n := st.s.status.Boot.TPMCommands; n > 12 {
					t.Errorf("%d TPM commands in a later boot", n)
				}
				if text := strings.Join(st.s.status.Rules, "\n"); strings.Contains(text, "hash is kept") {
					t.Errorf("rules without values: %s", text)
				}
				ofRelease := policy == seal.PolicyStrict || !secureBoot && policy != seal.PolicyDiskTheftOnly
				st.mustSettle()
				st.apply("1.1.0")
				if ofRelease {
					st.wantStates("slot a 1.0.0", "slot b 1.1.0")
				}
				st.start("", "tpm")
				if st.version != "1.1.0" {
					t.Fatalf("%s boots", st.version)
				}
				r := st.good()
				if ofRelease {
					st.wantStates("slot a 1.0.0", "slot b 1.1.0")
				} else {
					st.wantStates("slot b 1.1.0; slot a 1.0.0")
				}
				if len(r.Problems) > 0 || r.Repaired != "" {
					t.Errorf("settled: %+v", r)
				}
				st.start("", "tpm")
				if n := st.s.status.Boot.TPMCommands; n > 12 {
					t.Errorf("%d TPM commands in the second boot of an update", n)
				}
				st.mustSettle()
				// One that never gets well.
				st.apply("1.2.0")
				for range updateTries {
					st.start("", "tpm")
					if st.version != "1.2.0" {
						t.Fatalf("%s boots", st.version)
					}
				}
				st.start("", "tpm")
				if st.version != "1.1.0" {
					t.Fatalf("%s boots after the trial", st.version)
				}
				st.mustSettle()
				st.wantStates("slot b 1.1.0")
				if left := st.tpm.Handles(); left != 0 {
					t.Errorf("%d handles left in the TPM", left)
				}
			})
		}
	}
}

// TestCommandsOfABoot: what a later boot asks of the TPM, everything included, is 12
// commands at most, whatever the policy and however many volumes; without an event log
// it is one more.
func TestCommandsOfABoot(t *testing.T) {
	var table []string
	for _, policy := range []string{seal.PolicyStandard, seal.PolicyStrict, seal.PolicyRollbackProof, seal.PolicyDiskTheftOnly} {
		for _, pin := range []bool{false, true} {
			typed := ""
			first := ""
			if pin {
				typed, first = "1234\n", "1234\n1234\n"
			}
			st := newStationTyped(t, image.SealPolicy{Policy: policy, Epoch: 1, PIN: pin}, true, first)
			st.mustSettle()
			st.tpm.Forgive()
			st.start(typed, "tpm")
			n := 0
			for _, times := range st.s.tpmLog.sent {
				n += times
			}
			table = append(table, fmt.Sprintf("%s, PIN %v: %d", policy, pin, n))
			if n > 12 || st.s.status.Boot.TPMCommands != n {
				t.Errorf("%s, PIN %v: %d commands, status says %d: %v", policy, pin, n, st.s.status.Boot.TPMCommands, st.s.tpmLog.sent)
			}
			// A log that is wrong costs commands, and nothing else.
			st.mustSettle()
			st.tpm.Forgive()
			st.fw.forge = true
			st.start(typed, "tpm")
			if out := st.s.console.out.String(); strings.Count(out, "PIN (or") > 1 {
				t.Errorf("%s: %s", policy, out)
			}
		}
	}
	t.Log("TPM commands of a later boot with two volumes:\n" + strings.Join(table, "\n"))
}

// TestProgramsOfOthers: what the firmware starts besides the release, before the boot
// loader (F11), between it and the kernel, or behind, is measured at the next start too,
// and is not taken for the release.
func TestProgramsOfOthers(t *testing.T) {
	for _, secureBoot := range []bool{true, false} {
		for n := range 4 {
			if secureBoot && n == 3 {
				continue
			}
			t.Run(fmt.Sprintf("before start %d, Secure Boot %v", n, secureBoot), func(t *testing.T) {
				policy := seal.PolicyStrict
				if !secureBoot {
					policy = seal.PolicyStandard
				}
				st := newStation(t, image.SealPolicy{Policy: policy}, secureBoot, "1.1.0", "2.0.0")
				key := st.s.recoveryKey()
				st.mustSettle()
				st.fw.others = map[int]string{n: "remote management agent"}
				st.start(key+"\n", "recovery")
				st.mustSettle()
				for _, version := range []string{"1.1.0", "2.0.0"} { // the second has another boot loader
					st.apply(version)
					st.start("", "tpm")
					if st.version != version {
						t.Fatalf("%s boots", st.version)
					}
					st.good()
					st.start("", "tpm")
					st.mustSettle()
				}
				want := valuesOf("2.0.0")
				if got := st.k.notes().Releases["slot a 2.0.0"]; got.LoaderAuthenticode != want.LoaderAuthenticode || got.UKIAuthenticode != want.UKIAuthenticode {
					t.Errorf("the release that runs is taken for %+v", got)
				}
			})
		}
	}
}

// TestAnotherLog: what the log shows is not what lies on the disk. Nothing is predicted
// of the programs; with Secure Boot the keys still are.
func TestAnotherLog(t *testing.T) {
	for _, secureBoot := range []bool{true, false} {
		st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, secureBoot, "1.1.0")
		st.k.Programs = func() (pcr.Release, []pcr.Digest, error) {
			r, err := releaseOf(valuesOf("9.9.9"))
			return r, []pcr.Digest{r.Loader.Authenticode}, err
		}
		st.mustSettle()
		_, err := st.a.u.Apply(t.Context(), st.a.source(), "test", "1.1.0")
		if secureBoot == (err != nil) || err != nil && !strings.Contains(err.Error(), "it shows programs") {
			t.Errorf("Secure Boot %v: %v", secureBoot, err)
		}
		st.fw.variables["dbx"] = signatureList("revoked")
		r, err := st.k.Reseal(ResealOptions{})
		if err != nil || secureBoot != (len(r.Added) == 1) {
			t.Errorf("Secure Boot %v: %+v, %v", secureBoot, r, err)
		}
	}
}

// TestThreeUpdatesWithoutReboot: none of them is authorised by the TPM, the states do
// not pile up, and what was there before the first still boots (F48).
func TestThreeUpdatesWithoutReboot(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStrict}, true, "1.1.0", "1.2.0", "1.3.0")
	st.mustSettle()
	for _, version := range []string{"1.1.0", "1.2.0", "1.3.0"} {
		st.apply(version)
	}
	st.wantStates("slot a 1.0.0", "slot b 1.2.0", "slot b 1.3.0")
	unseals := st.s.tpmLog.sent[commandUnseal]
	for range updateTries {
		st.start("", "tpm")
		if st.version != "1.3.0" {
			t.Fatalf("%s boots", st.version)
		}
	}
	if unseals != 2 { // the trial of the first seal, and nothing since
		t.Logf("%d unseals in the boot of the updates", unseals)
	}
	st.start("", "tpm")
	if st.version != "1.0.0" {
		t.Fatalf("%s boots", st.version)
	}
	st.mustSettle()
	st.wantStates("slot a 1.0.0")
}

// TestAnotherLoader: a release brings another boot loader, which starts the old slot too.
func TestAnotherLoader(t *testing.T) {
	for _, secureBoot := range []bool{true, false} {
		policy := seal.PolicyStrict
		if !secureBoot {
			policy = seal.PolicyStandard
		}
		t.Run(policy, func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: policy}, secureBoot, "2.0.0", "2.1.0")
			st.mustSettle()
			st.apply("2.0.0")
			st.wantStates("slot a 1.0.0", "slot b 2.0.0", "slot a 1.0.0, next loader")
			if r := st.mustSettle(); r.Changed() { // as a reseal does
				t.Errorf("settled after the installation: %+v", r)
			}
			for range updateTries {
				st.start("", "tpm")
				if st.version != "2.0.0" {
					t.Fatalf("%s boots", st.version)
				}
			}
			st.start("", "tpm") // the old release by the new loader
			if st.version != "1.0.0" || st.fw.loader != "loader 2" {
				t.Fatalf("%s boots by %s", st.version, st.fw.loader)
			}
			st.mustSettle()
			st.wantStates("slot a 1.0.0")
			st.apply("2.1.0")
			st.wantStates("slot a 1.0.0", "slot b 2.1.0")
			st.start("", "tpm")
			st.good()
			st.wantStates("slot a 1.0.0", "slot b 2.1.0")
		})
	}
}

// TestAnotherCertificate: the releases are signed by two keys, both in db (F50).
func TestAnotherCertificate(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
	st.fw.variables["db"] = append(signatureList("vendor's"), signatureList("vendor's second")...)
	st.fw.verifier = map[string]string{"2.0.0": "vendor's second"}
	next := valuesOf("2.0.0")
	sum := sha256.Sum256([]byte("vendor's second"))
	next.DBCertificateSHA256 = hex.EncodeToString(sum[:])
	st.a.publish("2.0.0", releaseOptions{expected: next})
	st.start(st.s.recoveryKey()+"\n", "recovery")
	st.mustSettle()
	st.start("", "tpm")
	st.mustSettle()
	st.apply("2.0.0")
	st.wantStates("slot a 1.0.0", "slot b 2.0.0", "slot a 1.0.0, next loader")
	st.start("", "tpm")
	if st.version != "2.0.0" {
		t.Fatalf("%s boots", st.version)
	}
	st.good()
	st.start("", "tpm")
	st.mustSettle()
	// Back to the old one, which the new loader starts.
	st.apply("1.0.0")
	st.start("", "tpm")
}

// TestUnpredictable: without a log there is no telling, and the box takes nothing that
// it could not start.
func TestUnpredictable(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, false, "1.1.0")
	st.k.EventLog = func() ([]byte, error) { return nil, fs.ErrNotExist }
	before := st.disk.(*partition.Memory).Clone()
	_, err := st.a.u.Apply(t.Context(), st.a.source(), "test", "1.1.0")
	if !errors.Is(err, errUnfit) || !strings.Contains(err.Error(), "could not open the data volumes without the recovery key") {
		t.Errorf("error %v", err)
	}
	wantSame(t, before, st.disk)
	st.a.wantEntries("a 1.0.0")
	// With Secure Boot another release changes nothing that is bound.
	st = newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true, "1.1.0")
	st.k.EventLog = func() ([]byte, error) { return nil, fs.ErrNotExist }
	st.apply("1.1.0")
}

// TestRepair: after other firmware, the recovery key opens once, and the box seals itself
// to what that very boot measured (F3, F57). Doing it again changes nothing (F49).
func TestRepair(t *testing.T) {
	for _, repair := range []string{"", repairManual} {
		t.Run(cmp.Or(repair, "automatic"), func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: seal.PolicyStrict, Repair: repair}, true, "1.1.0")
			key := st.s.recoveryKey()
			st.mustSettle()
			st.fw.code = "firmware 2"
			st.start(key+"\n", "recovery")
			r := st.mustSettle()
			if repair == repairManual {
				if len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "holdfast-agent reseal") || r.Changed() {
					t.Errorf("settled: %+v", r)
				}
				if _, err := st.k.Reseal(ResealOptions{}); err != nil {
					t.Fatal(err)
				}
			} else if !strings.Contains(r.Repaired, "sealed to the present state") || len(r.Added) != 1 || len(r.Dropped) != 1 {
				t.Errorf("settled: %+v", r)
			}
			st.wantStates("slot a 1.0.0")
			st.start("", "tpm")
			if r := st.mustSettle(); r.Changed() || r.Repaired != "" {
				t.Errorf("settled again: %+v", r)
			}
			// Another TPM, with the same registers (F37).
			st.tpm.Swap()
			st.start(key+"\n", "recovery")
			if r = st.mustSettle(); repair == repairManual {
				if len(r.Problems) != 1 || r.Changed() {
					t.Errorf("settled with another TPM: %+v", r)
				}
				if _, err := st.k.Reseal(ResealOptions{}); err != nil {
					t.Fatal(err)
				}
			} else if r.Repaired == "" {
				t.Errorf("settled with another TPM: %+v", r)
			}
			st.start("", "tpm")
		})
	}
}

// TestSecondLoader: the firmware refused the first copy of the boot loader and started the
// second, and the first was put back. What binds PCR 4 asks for the recovery key, once: in
// that boot it is sealed to the next one, too, and a release that is installed from there
// opens in its first. What does not bind it opens all the way.
func TestSecondLoader(t *testing.T) {
	for name, c := range map[string]struct {
		policy, repair string
		secureBoot     bool
		opens          bool
	}{
		"standard":                   {seal.PolicyStandard, "", true, true},
		"strict":                     {seal.PolicyStrict, "", true, false},
		"strict, repaired by hand":   {seal.PolicyStrict, repairManual, true, false},
		"standard, Secure Boot off":  {seal.PolicyStandard, "", false, false},
		"rollback-proof":             {seal.PolicyRollbackProof, "", true, true},
		"a board that tries another": {seal.PolicyStrict, "", true, false},
		"disk-theft-only":            {seal.PolicyDiskTheftOnly, "", false, true},
	} {
		t.Run(name, func(t *testing.T) {
			policy := image.SealPolicy{Policy: c.policy, Repair: c.repair}
			if c.policy == seal.PolicyRollbackProof {
				policy.Epoch = 1
			}
			st := newStation(t, policy, c.secureBoot, "1.1.0")
			key, usual := st.s.recoveryKey(), 0
			if strings.HasPrefix(name, "a board") {
				usual = 1 // the network, before the disk, at each boot
				st.fw.refused = usual
				st.start(key+"\n", "recovery")
			}
			st.mustSettle()
			st.wantStates("slot a 1.0.0")

			st.fw.refused = usual + 1
			if c.opens {
				st.start("", "tpm")
			} else {
				st.start(key+"\n", "recovery")
			}
			st.k.Retried = func() bool { return true }
			if r := st.mustSettle(); len(r.Problems) > 0 || (c.opens || c.repair == repairManual) == r.Changed() {
				t.Errorf("settled: %+v", r)
			}
			if c.opens || c.repair == repairManual {
				st.wantStates("slot a 1.0.0")
			} else {
				st.wantStates("slot a 1.0.0", "slot a 1.0.0, first loader again")
			}
			if c.repair != repairManual {
				st.apply("1.1.0")
				st.fw.refused = usual
				st.start("", "tpm")
				st.good()
				return
			}
			st.fw.refused = usual
			st.start("", "tpm")
			st.mustSettle()
			st.wantStates("slot a 1.0.0")
		})
	}
}

// TestWithoutLoader: the firmware refused both copies of the boot loader and started the
// kernel image by its own entry. What binds PCR 4 asks for the recovery key, once: loaders
// that come back open, and a release installed from there, with the boot loader it brings,
// opens in its first boot, as does the old one when it falls back.
func TestWithoutLoader(t *testing.T) {
	for name, c := range map[string]struct {
		policy     string
		secureBoot bool
		usual      int    // options that come to nothing at each boot, before the disk
		next       string // that of major version 2 has another boot loader
	}{
		"strict":                          {seal.PolicyStrict, true, 0, "1.1.0"},
		"strict, network first":           {seal.PolicyStrict, true, 2, "2.0.0"},
		"standard":                        {seal.PolicyStandard, true, 0, "1.1.0"},
		"standard, Secure Boot off":       {seal.PolicyStandard, false, 0, "2.0.0"},
		"rollback-proof, Secure Boot off": {seal.PolicyRollbackProof, false, 1, "1.1.0"},
	} {
		t.Run(name, func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: c.policy, Epoch: 1}, c.secureBoot, c.next, "2.1.0")
			key, bound := st.s.recoveryKey(), ofRelease(st.policy, c.secureBoot)
			usually := func() { st.fw.direct, st.fw.refused = false, c.usual }
			bare := func() {
				t.Helper()
				st.fw.direct, st.fw.refused = true, c.usual+2
				if bound {
					st.start(key+"\n", "recovery")
				} else {
					st.start("", "tpm")
				}
			}
			usually()
			if c.usual > 0 {
				st.start(key+"\n", "recovery")
			}
			st.mustSettle()

			bare()
			if r := st.mustSettle(); bound != (r.Repaired != "") || len(r.Problems) > 0 || len(r.Dropped) > 0 {
				t.Errorf("settled: %+v", r)
			}
			if bound {
				st.wantStates("slot a 1.0.0, by the boot loader", "slot a 1.0.0")
			}
			st.start("", "tpm")
			if r := st.mustSettle(); r.Changed() {
				t.Errorf("settled again: %+v", r)
			}
			usually()
			st.start("", "tpm")
			st.mustSettle()
			st.wantStates("slot a 1.0.0")

			bare()
			st.apply(c.next)
			st.mustSettle() // it waits for the appliance, and an update does not
			usually()
			for range updateTries {
				st.start("", "tpm")
				if st.version != c.next || st.fw.loader != "loader "+c.next[:1] {
					t.Fatalf("%s boots by %s", st.version, st.fw.loader)
				}
			}
			st.start("", "tpm") // the old release by the new loader
			if st.version != "1.0.0" || st.fw.loader != "loader "+c.next[:1] {
				t.Fatalf("%s boots by %s", st.version, st.fw.loader)
			}
			st.mustSettle()
			st.wantStates("slot a 1.0.0")
			st.apply("2.1.0")
			st.start("", "tpm")
			st.good()
			st.start("", "tpm")
		})
	}
}

// TestLoaderNotKnown is such a boot of a box that has less to go by: a spec that leaves it
// to a person, notes that are lost, and a program of somebody else that may be a loader.
func TestLoaderNotKnown(t *testing.T) {
	bare := func(policy image.SealPolicy, others map[int]string) *station {
		t.Helper()
		st := newStation(t, policy, true, "2.0.0")
		st.mustSettle()
		st.fw.direct, st.fw.refused, st.fw.others = true, 2, others
		st.start(st.s.recoveryKey()+"\n", "recovery")
		return st
	}
	usually := func(st *station, version string) {
		t.Helper()
		st.fw.direct, st.fw.refused = false, 0
		st.start("", "tpm")
		if st.version != version {
			t.Errorf("%s boots", st.version)
		}
	}
	st := bare(image.SealPolicy{Policy: seal.PolicyStrict, Repair: repairManual}, nil)
	if r := st.mustSettle(); r.Changed() || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "holdfast-agent reseal") {
		t.Errorf("settled: %+v", r)
	}
	if _, err := st.k.Reseal(ResealOptions{}); err != nil {
		t.Fatal(err)
	}
	st.wantStates("slot a 1.0.0, by the boot loader", "slot a 1.0.0")
	usually(st, "1.0.0")

	st = bare(image.SealPolicy{Policy: seal.PolicyStrict}, nil)
	if err := os.Remove(st.k.notesPath()); err != nil {
		t.Fatal(err)
	}
	st.mustSettle()
	st.wantStates("slot a 1.0.0")
	st.apply("2.0.0")
	st.wantStates("slot a 1.0.0", "slot b 2.0.0", "slot a 1.0.0, next loader")
	usually(st, "2.0.0")

	st = bare(image.SealPolicy{Policy: seal.PolicyStrict}, map[int]string{0: "another loader"})
	st.mustSettle()
	_, err := st.a.u.Apply(t.Context(), st.a.source(), "test", "2.0.0")
	if !errors.Is(err, errUnfit) || !strings.Contains(err.Error(), "no start of the boot loader") || !strings.Contains(err.Error(), "At the bench, holdfast apply writes it") {
		t.Errorf("error %v", err)
	}
}

// TestMendBeforeAsking: a TPM that refuses has what made this boot another one put right,
// and the box restarted, before anybody is asked; with nothing to put right it asks.
func TestMendBeforeAsking(t *testing.T) {
	start := func(s *session) error { return errors.Join(s.m.EnterPhase(phaseEnterInitrd), s.open()) }
	for _, onTrial := range []bool{false, true} {
		b := newBox(t, 1)
		b.secureBoot = false
		first := b.mustBoot("", "provisioned")
		first.write("records")
		key := first.recoveryKey()
		b.powerOn()
		b.tpm.Extend(4, "an attempt that failed")
		mended := 0
		s := b.session(key + "\n")
		s.m.OnTrial = onTrial
		s.m.Mend = func() bool { mended++; return true }
		if err := start(s); !errors.Is(err, ErrReboot) || mended != 1 {
			t.Errorf("on trial %v: %v, mended %d times", onTrial, err, mended)
		}
		if out := s.console.out.String(); strings.Contains(out, "recovery key (or") || len(s.storage.mapped) != 0 {
			t.Errorf("on trial %v: mapped %v, console %s", onTrial, s.storage.mapped, out)
		}
		b.powerOn()
		s = b.session("")
		s.m.Mend = func() bool { t.Error("mended without need"); return true }
		if err := start(s); err != nil {
			t.Fatal(err)
		}
		s.wantOpen("tpm")
		b.powerOn()
		b.tpm.Extend(4, "another attempt")
		s = b.session(key + "\n")
		s.m.Mend = func() bool { return false }
		if err := start(s); err != nil {
			t.Fatal(err)
		}
		s.wantOpen("recovery")
	}
}

// TestRepairKeyslot: the key area of the TPM's keyslot is damaged, on one volume or the
// other. The TPM gives its secret, which opens nothing; after a start by the recovery key
// the state is made anew, once.
func TestRepairKeyslot(t *testing.T) {
	for n, repair := range []string{"", "", repairManual} {
		policy := []string{seal.PolicyStandard, seal.PolicyRollbackProof, seal.PolicyStandard}[n]
		damaged := n % 2 // volume
		t.Run(fmt.Sprintf("volume %d, %s, repair %q", damaged, policy, repair), func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: policy, Epoch: 1, Repair: repair}, true)
			key := st.s.recoveryKey()
			st.mustSettle()
			before := tokensOn(t, st.box)
			put(t, st.parts()[damaged].Device, bytes.Repeat([]byte{0xaa}, 512), 32<<10+258048+4096)
			st.start(key+"\n", "recovery")
			out := st.s.console.out.String()
			if !strings.Contains(out, "the TPM gave its key, and the keyslot for it does not open") || strings.Contains(out, "firmware update") {
				t.Errorf("console: %s", out)
			}
			problems := strings.Join(st.s.status.Problems, "\n")
			if !strings.Contains(problems, "keyslot") || strings.Contains(problems, "TPM refused") {
				t.Errorf("problems %q", problems)
			}
			if s := st.s.status.States; len(s) != 1 || !s[0].Damaged || s[0].Opened {
				t.Errorf("states %+v", s)
			}
			r := st.mustSettle()
			if repair == repairManual {
				if len(r.Problems) != 1 || r.Changed() {
					t.Errorf("settled: %+v", r)
				}
				if _, err := st.k.Reseal(ResealOptions{}); err != nil {
					t.Fatal(err)
				}
			} else if r.Repaired == "" || len(r.Added) != 1 || len(r.Dropped) != 1 {
				t.Errorf("settled: %+v", r)
			}
			after := tokensOn(t, st.box)
			if len(after) != 1 || sameBlob(before[0], after[0]) || after[0].PolicyHash != before[0].PolicyHash {
				t.Errorf("tokens %+v", after)
			}
			if r := st.mustSettle(); r.Changed() {
				t.Errorf("settled in the same boot: %+v", r)
			}
			var status Status
			status.describe(st.k)
			if len(status.States) != 1 || status.States[0].Damaged {
				t.Errorf("states after the repair: %+v", status.States)
			}
			st.start("", "tpm")
			if r := st.mustSettle(); r.Changed() || r.Repaired != "" {
				t.Errorf("settled at the next start: %+v", r)
			}
		})
	}
}

// refusingDevice has no write succeed.
type refusingDevice struct{ partition.Device }

func (refusingDevice) WriteAt([]byte, int64) (int, error) { return 0, unix.EIO }

// TestKeyslotFails: a keyslot that cannot be written is said once, and is no reason to open
// anything again: the volumes stay as they are, and the next boot tries it once (F52).
func TestKeyslotFails(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
	key := st.s.recoveryKey()
	st.fw.variables["dbx"] = signatureList("revoked")
	st.start(key+"\n", "recovery")
	before, mounts := st.disk.(*partition.Memory).Clone(), len(st.s.storage.mounts)
	for i := range st.k.Volumes {
		st.k.Volumes[i].Device = refusingDevice{st.k.Volumes[i].Device}
	}
	if _, err := st.k.Settle(); !errors.Is(err, unix.EIO) {
		t.Errorf("error %v", err)
	}
	wantSame(t, before, st.disk)
	if n := len(st.s.storage.mounts); n != mounts || len(st.s.storage.mapped) != len(st.k.Volumes) {
		t.Errorf("%d mounts, were %d; %d volumes are mapped", n, mounts, len(st.s.storage.mapped))
	}
	st.start(key+"\n", "recovery")
	st.mustSettle()
	st.start("", "tpm")
}

// TestRepairImpossible: without a TPM nothing is sealed, and nothing is lost.
func TestRepairImpossible(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
	key := st.s.recoveryKey()
	st.fw.variables["dbx"] = signatureList("revoked")
	st.start(key+"\n", "recovery")
	st.noTPM = seal.ErrNoTPM
	before := st.disk.(*partition.Memory).Clone()
	if _, err := st.k.Settle(); !errors.Is(err, seal.ErrNoTPM) {
		t.Errorf("error %v", err)
	}
	wantSame(t, before, st.disk)
	st.noTPM = nil
	st.start(key+"\n", "recovery")
	st.mustSettle()
	st.start("", "tpm")
}

// TestPendingChange: somebody writes dbx at run time (F1).
func TestPendingChange(t *testing.T) {
	for _, policy := range []string{seal.PolicyStandard, seal.PolicyStrict} {
		t.Run(policy, func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: policy}, true, "1.1.0")
			st.mustSettle()
			st.apply("1.1.0")
			st.start("", "tpm")
			st.good()
			if w, err := st.k.NextBoot(); err != nil || len(w) > 0 {
				t.Errorf("warnings %q, %v", w, err)
			}
			st.fw.variables["dbx"] = signatureList("revoked")
			w, err := st.k.NextBoot()
			if err != nil || len(w) != 1 || !strings.Contains(w[0], "holdfast-agent reseal") {
				t.Errorf("warnings %q, %v", w, err)
			}
			if r := st.mustSettle(); r.Changed() {
				t.Errorf("sealed to the change without being asked to: %+v", r)
			}
			if _, err := st.k.Reseal(ResealOptions{}); err != nil {
				t.Fatal(err)
			}
			if policy == seal.PolicyStandard {
				st.wantStates("slot b 1.1.0; slot a 1.0.0", "slot b 1.1.0, pending; slot a 1.0.0, pending")
			} else {
				st.wantStates("slot b 1.1.0", "slot a 1.0.0", "slot b 1.1.0, pending", "slot a 1.0.0, pending")
			}
			if w, err := st.k.NextBoot(); err != nil || len(w) > 0 {
				t.Errorf("warnings after the reseal %q, %v", w, err)
			}
			st.mustSettle() // nothing happens to what is pending
			st.start("", "tpm")
			st.mustSettle()
			if policy == seal.PolicyStandard {
				st.wantStates("slot b 1.1.0; slot a 1.0.0")
			} else {
				st.wantStates("slot b 1.1.0", "slot a 1.0.0")
			}
			st.start("", "tpm")
		})
	}
}

// TestPredictDBX seals before an update of dbx is written (F9).
func TestPredictDBX(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
	if _, err := st.k.Reseal(ResealOptions{DBX: []byte("<html>")}); err == nil || !strings.Contains(err.Error(), "update of dbx") {
		t.Errorf("error %v", err)
	}
	dbx := signatureList("revoked")
	if _, err := st.k.Reseal(ResealOptions{DBX: dbx}); err != nil {
		t.Fatal(err)
	}
	st.wantStates("slot a 1.0.0", "slot a 1.0.0, pending")
	st.start("", "tpm") // before it is written
	st.mustSettle()
	st.wantStates("slot a 1.0.0", "slot a 1.0.0, pending")
	st.fw.variables["dbx"] = dbx
	st.start("", "tpm")
	st.mustSettle()
	st.wantStates("slot a 1.0.0")
	// One that never comes is forgotten.
	if _, err := st.k.Reseal(ResealOptions{DBX: signatureList("others")}); err != nil {
		t.Fatal(err)
	}
	st.now = st.now.Add(pendingTime + time.Hour)
	st.start("", "tpm")
	st.mustSettle()
	st.wantStates("slot a 1.0.0")
}

// TestSuspend: for some boots any state of the firmware will do (F8).
func TestSuspend(t *testing.T) {
	for _, policy := range []string{seal.PolicyStandard, seal.PolicyStrict, seal.PolicyRollbackProof} {
		t.Run(policy, func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: policy, Epoch: 1}, true)
			st.mustSettle()
			if _, err := st.k.Reseal(ResealOptions{Suspend: MaxSuspendBoots + 1}); err == nil {
				t.Error("suspended for ever")
			}
			if _, err := st.k.Reseal(ResealOptions{Suspend: 2}); err != nil {
				t.Fatal(err)
			}
			st.wantStates("slot a 1.0.0", "suspended")
			st.fw.code, st.fw.variables["dbx"] = "firmware 2", signatureList("revoked")
			st.start("", "tpm")
			if d := strings.Join(st.s.status.Degraded, "\n"); !strings.Contains(d, `state "suspended"`) {
				t.Errorf("degraded: %s", d)
			}
			st.mustSettle()
			st.mustSettle() // the same boot
			st.wantStates("slot a 1.0.0", "suspended")
			st.fw.code = "firmware 3"
			st.start("", "tpm")
			st.mustSettle()
			st.wantStates("slot a 1.0.0")
			st.start("", "tpm")
			if len(st.s.status.Degraded) > 0 {
				t.Errorf("degraded: %q", st.s.status.Degraded)
			}
			// And by its age.
			if _, err := st.k.Reseal(ResealOptions{Suspend: 10}); err != nil {
				t.Fatal(err)
			}
			st.now = st.now.Add(suspendTime + time.Minute)
			st.mustSettle()
			st.wantStates("slot a 1.0.0")
		})
	}
}

// TestEpochs: a release of a higher epoch raises the counter when it is good, and not
// before; headers of the past do not open from then on.
func TestEpochs(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyRollbackProof, Epoch: 1}, true, "2.0.0")
	st.epochs["1.0.0"], st.epochs["2.0.0"] = 1, 2
	st.mustSettle()
	st.apply("2.0.0")
	before, err := seal.ReadCounter(st.tpm, seal.CounterIndex)
	if err != nil {
		t.Fatal(err)
	}
	st.start("", "tpm")
	old := st.disk.(*partition.Memory).Clone()
	if now, err := seal.ReadCounter(st.tpm, seal.CounterIndex); err != nil || now != before {
		t.Errorf("counter %d on trial, %d before; %v", now, before, err)
	}
	// Cut after the new state was written and before the counter.
	cut := *st.k
	opened := 0
	cut.OpenTPM = func() (seal.TPM, error) {
		if opened++; opened == 3 {
			return nil, errors.New("power cut")
		}
		return st.tpm, nil
	}
	st.a.bless()
	if _, err := cut.Settle(); err == nil || !strings.Contains(err.Error(), "power cut") {
		t.Fatalf("error %v", err)
	}
	if n := len(tokensOn(t, st.box)); n != 2 {
		t.Errorf("%d tokens after the cut", n)
	}
	st.start("", "tpm")
	st.mustSettle()
	if now, err := seal.ReadCounter(st.tpm, seal.CounterIndex); err != nil || now != before+1 {
		t.Errorf("counter %d, %d before; %v", now, before, err)
	}
	if list := tokensOn(t, st.box); len(list) != 1 || list[0].Ref != seal.EpochRef(2) || list[0].Counter.Max != before+1 {
		t.Errorf("tokens %+v", list)
	}
	st.start("", "tpm")
	if r := st.mustSettle(); r.Changed() {
		t.Errorf("settled again: %+v", r)
	}
	// The old header, put back.
	st.disk = old
	if err := st.try("poweroff\n"); !errors.Is(err, ErrPowerOff) {
		t.Errorf("with an old header: %v", err)
	}
}

func tokensOn(t *testing.T, b *box) (list []seal.Token) {
	t.Helper()
	p := b.parts()[0]
	h, _, err := luks2.Read(p.Device, p.Device.Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range tpmTokens(h) {
		list = append(list, token.Token)
	}
	return list
}

// TestPIN: chosen at the first boot, asked for at each, and known to updates. Its prompt
// and the recovery key's are not taken for one another (F58).
func TestPIN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBox(t, 2)
		b.policy.PIN = true
		// A power cut after the use of a PIN counts as a wrong one (F31); swtpm allows three.
		next := func() {
			b.tpm.Reboot()
			b.powerOn()
		}
		first := b.mustBoot("12\npoweroff\n4711é\n4712\n4711é\n4711é\n", "provisioned")
		key := first.recoveryKey()
		out := first.console.out.String()
		for _, want := range []string{"at least 4 characters", "takes for a command", "the two differ", "the same once more"} {
			if !strings.Contains(out, want) {
				t.Errorf("console %q, want %q in it", out, want)
			}
		}
		next()
		s := b.mustBoot("wrong pin\n4711é\n", "tpm")
		if out := s.console.out.String(); strings.Count(out, "PIN (or: recovery, reboot, poweroff): ") != 2 || !strings.Contains(out, "this is not the PIN") || strings.Contains(out, "recovery key") {
			t.Errorf("console %q", out)
		}
		for _, log := range []*session{first, s} {
			if strings.Contains(log.log.text.String(), "4711") {
				t.Error("the PIN is in the log")
			}
		}
		next()
		b.mustBoot("recovery\n"+key+"\n", "recovery")
		next()
		if _, err := b.boot("reboot\n"); !errors.Is(err, ErrReboot) {
			t.Errorf("reboot: %v", err)
		}
		// A recovery key at the wrong prompt costs the TPM nothing.
		next()
		s = b.mustBoot(key+"\n4711é\n", "tpm")
		if n := s.tpmLog.sent[commandUnseal]; n != 1 {
			t.Errorf("%d unseals", n)
		}
		info, err := os.Stat(filepath.Join(s.m.Root, "data", stateFolder, pinFile))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
		// A changed state of the firmware wants the PIN and the recovery key apart.
		next()
		b.tpm.Extend(7, "other keys")
		s = b.mustBoot(key+"\n", "recovery")
		if strings.Contains(s.console.out.String(), "PIN (or") {
			t.Errorf("console %q", s.console.out.String())
		}
	})
}

// TestUpdateWithPIN seals for the next release without asking anybody.
func TestUpdateWithPIN(t *testing.T) {
	v := image.SealPolicy{Policy: seal.PolicyStrict, PIN: true}
	st := newStationTyped(t, v, true, "1234\n1234\n", "1.1.0")
	st.mustSettle()
	st.apply("1.1.0")
	st.start("1234\n", "tpm")
	if st.version != "1.1.0" {
		t.Fatalf("%s boots", st.version)
	}
	st.good()
	st.wantStates("slot a 1.0.0", "slot b 1.1.0")
	st.start("1234\n", "tpm")
}

// TestNotes: the keeper's notes may be lost or damaged.
func TestNotes(t *testing.T) {
	for name, content := range map[string][]byte{"lost": nil, "damaged": []byte("{"), "of another format": []byte(`{"format": 9}`), "endless": bytes.Repeat([]byte("[1,"), maxNotesBytes)} {
		t.Run(name, func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: seal.PolicyStrict}, true, "1.1.0")
			st.mustSettle()
			st.apply("1.1.0")
			if content == nil {
				os.Remove(st.k.notesPath())
			} else {
				putFile(t, st.k.notesPath(), content)
			}
			st.start("", "tpm")
			st.good()
			st.wantStates("slot a 1.0.0", "slot b 1.1.0")
			st.start("", "tpm")
		})
	}
}

// TestStatusOfStates: every state with its whole policy, and the one that opened.
func TestStatusOfStates(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStrict}, true, "1.1.0")
	st.mustSettle()
	st.apply("1.1.0")
	status := st.s.status
	tokens, known, err := st.k.inForce()
	if err != nil {
		t.Fatal(err)
	}
	status.setStates(tokens, st.k.Opened, st.k.Damaged, known)
	if len(status.States) != 2 {
		t.Fatalf("states: %+v", status.States)
	}
	for _, state := range status.States {
		text := strings.Join(state.Rules, "\n")
		for _, i := range []int{0, 2, 4, 7, 11} {
			if !strings.Contains(text, fmt.Sprintf("PCR %s: exactly ", pcr.Label(i))) {
				t.Errorf("state %q: PCR %d is missing in %s", state.For, i, text)
			}
		}
		if state.Opened != (state.For == "slot a 1.0.0") {
			t.Errorf("state %q: opened %v", state.For, state.Opened)
		}
	}
	var b strings.Builder
	status.WriteTo(&b)
	other := "state     slot b 1.1.0\n            " + strings.Join(status.States[1].Rules, "\n            ") + "\n"
	if !strings.Contains(b.String(), "state     slot a 1.0.0, which opened") || !strings.Contains(b.String(), other) {
		t.Errorf("status:\n%s", b.String())
	}
	if !slices.Equal(status.SealedPCRs, []int{0, 2, 4, 7, 11}) || len(status.PCRs) == 0 {
		t.Errorf("sealed PCRs %v, registers %v", status.SealedPCRs, status.PCRs)
	}
}

// TestLockoutInStatus: wrong PINs are counted, and a lockout is named with the time that
// is left (F32, F35).
func TestLockoutInStatus(t *testing.T) {
	for _, pin := range []bool{true, false} {
		st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
		st.mustSettle()
		show := func() (Status, string) {
			t.Helper()
			s := st.s.status
			s.describe(st.k)
			var b strings.Builder
			if _, err := s.WriteTo(&b); err != nil {
				t.Fatal(err)
			}
			return s, b.String()
		}
		if s, text := show(); s.Lockout == nil || s.Lockout.In || s.Lockout.Count != 0 || !strings.Contains(text, "TPM       0 of ") {
			t.Errorf("%+v\n%s", s.Lockout, text)
		}
		st.mustSetPIN("4711")
		tokens := tokensOn(t, st.box)
		if !pin {
			st.mustSetPIN("")
		}
		l, err := seal.ReadLockout(st.tpm)
		if err != nil {
			t.Fatal(err)
		}
		signatures, err := seal.ParseSignatures(st.signatures)
		if err != nil {
			t.Fatal(err)
		}
		// As in the initrd, where PCR 11 is what was signed.
		st.tpm.Reset()
		st.fw.boot(t, st.version)
		if err := seal.ExtendPCR(st.tpm, phasePCR, []byte(phaseEnterInitrd)); err != nil {
			t.Fatal(err)
		}
		for range l.Max {
			if _, err := seal.Unseal(st.tpm, tokens[0], signatures, []byte("0000")); err == nil {
				t.Fatal("a wrong PIN opens")
			}
		}
		s, text := show()
		if s.Lockout == nil || !s.Lockout.In || s.Lockout.WaitSec == 0 || !strings.Contains(text, "TPM       LOCKOUT: no PIN is taken for up to ") {
			t.Errorf("%+v\n%s", s.Lockout, text)
		}
		p := strings.Join(s.Problems, "\n")
		if !strings.Contains(p, "dictionary-attack lockout: for up to ") || pin == strings.Contains(p, "not concerned") {
			t.Errorf("PIN %v: problems %q", pin, p)
		}
		st.noTPM = errors.New("the bus is dead")
		if _, text := show(); !strings.Contains(text, "lockout not known: the bus is dead") {
			t.Errorf("without a TPM:\n%s", text)
		}
	}
}

// switchedOff is a TPM whose power goes at a command.
type switchedOff struct {
	seal.TPM
	off func()
	at  int
}

func (s *switchedOff) Send(command []byte) ([]byte, error) {
	if s.at--; s.at < 0 {
		return nil, errors.New("the power is off")
	}
	answer, err := s.TPM.Send(command)
	if s.at == 0 {
		s.off()
	}
	return answer, err
}

// TestHardKillsDoNotLock: 50 power cuts, each behind another command of a boot or of the
// settling in it, leave the TPM's count of failures where it was, and the box opens (F31).
func TestHardKillsDoNotLock(t *testing.T) {
	for _, policy := range []string{seal.PolicyStandard, seal.PolicyStrict, seal.PolicyRollbackProof} {
		t.Run(policy, func(t *testing.T) {
			st := newStation(t, image.SealPolicy{Policy: policy, Epoch: 1}, true)
			st.mustSettle()
			seen := 0
			for cut := range 50 {
				st.tpm.Reset()
				st.fw.boot(t, st.version)
				st.log = st.fw.log.Marshal()
				s := st.session("")
				power := &switchedOff{TPM: st.tpm, off: st.tpm.Reset, at: 1 + cut%25}
				s.m.OpenTPM = func() (seal.TPM, error) { return power, nil }
				err := s.m.EnterPhase(phaseEnterInitrd)
				if err == nil {
					if err = s.open(); err == nil {
						err = s.m.Leave(&s.status)
					}
				}
				if err == nil { // the cut comes later, or with the next start
					k := *st.k
					k.Root = s.m.Root
					k.OpenTPM = s.m.OpenTPM
					_, err = k.Settle()
				}
				if err != nil {
					seen++
				}
			}
			if seen < 15 {
				t.Errorf("%d of 50 cuts hit a command that was needed", seen)
			}
			if l, err := seal.ReadLockout(st.tpm); err != nil || l.Count != 0 || l.In {
				t.Errorf("after 50 power cuts: %+v, %v", l, err)
			}
			st.start("", "tpm")
			st.mustSettle()
		})
	}
}

// TestStatusIsWhole: a state that the header tells less of than the TPM asks for, and a
// key that somebody has added, are not passed over (F5, F55).
func TestStatusIsWhole(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard}, true)
	st.mustSettle()
	show := func() (status Status) {
		t.Helper()
		status = st.s.status
		status.describe(st.k)
		return status
	}
	if s := show(); len(s.Degraded) != 0 || strings.Contains(strings.Join(s.Rules, ""), "NOT TRUE") {
		t.Errorf("degraded %q, rules %q", s.Degraded, s.Rules)
	}
	p := st.parts()[1]
	edit := func(p Partition, change func(h *luks2.Header, key []byte)) {
		t.Helper()
		passphrase, err := os.ReadFile(filepath.Join(st.k.Root, p.Volume.Mount, stateFolder, managementKeyFile))
		if err != nil {
			t.Fatal(err)
		}
		h, _, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			t.Fatal(err)
		}
		key, _, err := h.Unlock(p.Device, passphrase)
		if err != nil {
			t.Fatal(err)
		}
		change(h, key)
		if err := h.Write(p.Device); err != nil {
			t.Fatal(err)
		}
	}
	edit(p, func(h *luks2.Header, key []byte) {
		for _, k := range []luks2.KDF{{Type: luks2.PBKDF2, Hash: "sha256", Iterations: 1000}, luks2.HighEntropyKDF()} {
			if _, err := h.AddKeyslot(key, []byte("somebody's"), k, nil); err != nil {
				t.Fatal(err)
			}
		}
	})
	if s := show(); len(s.Degraded) != 1 || !strings.Contains(s.Degraded[0], "data volume media opens without the TPM") || !strings.HasSuffix(s.Degraded[0], "keyslot 3, 4") {
		t.Errorf("degraded %q", s.Degraded)
	}
	edit(st.parts()[0], func(h *luks2.Header, _ []byte) {
		token := tpmTokens(h)[0]
		token.PCRs = nil
		raw, err := token.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.SetToken(token.id, raw); err != nil {
			t.Fatal(err)
		}
	})
	if s := show(); !strings.Contains(strings.Join(s.Rules, "\n"), "NOT TRUE") {
		t.Errorf("rules %q", s.Rules)
	}
}
