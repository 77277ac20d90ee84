package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// record is one of a firmware's log.
func record(index uint32, kind pcr.EventType, data string) pcr.Event {
	d := sha256.Sum256([]byte(data))
	return pcr.Event{PCR: index, Type: kind, Data: []byte(data), Digests: []pcr.TaggedDigest{{Alg: pcr.SHA256, Digest: d[:]}}}
}

// fromFirmware is a UEFI_IMAGE_LOAD_EVENT of a file in a firmware volume.
func fromFirmware(file string) string {
	id := sigdb.FromUUID(uuid.MustParse(file))
	path := append([]byte{4, 7, 20, 0}, make([]byte, 16)...)
	path = append(path, 4, 6, 20, 0)
	path = append(path, id[:]...)
	path = append(path, 0x7f, 0xff, 4, 0)
	b := make([]byte, 24)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(path)))
	return string(append(b, path...))
}

func certificate(t *testing.T, name string, rsaBits int) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Unix(1<<32, 0)}
	var public, private any
	if rsaBits > 0 {
		k, err := rsa.GenerateKey(rand.Reader, rsaBits)
		if err != nil {
			t.Fatal(err)
		}
		public, private = &k.PublicKey, k
	} else {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public, private = &k.PublicKey, k
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// goodFacts are those of a box with nothing to complain about.
func goodFacts(t *testing.T) Facts {
	t.Helper()
	f := Facts{
		Policy: seal.PolicyStandard, EFI: true, VariableBytes: 100 << 10, IOMMUGroups: 12,
		Disk: "nvme0n1", ESPBytes: 900 << 20, LargestBytes: 40 << 20,
		Now: today, NotBefore: today.Add(-time.Hour), RTC: true, Watchdogs: []string{"iTCO_wdt"},
		Fitness: seal.Fitness{
			Family: "2.0", Manufacturer: "IFX", Model: "SLB9670", Firmware: "7.85.4555.0", LockoutMax: 32, LockoutSec: 7200,
			Banks: []seal.Bank{{Alg: pcr.SHA256}, {Alg: pcr.SHA384}},
		},
		Space: seal.Space{NVIndices: 3, PersistentLeft: 4, CountersLeft: 6},
	}
	for i := range 24 {
		f.Fitness.Banks[0].PCRs = append(f.Fitness.Banks[0].PCRs, i)
	}
	db := sigdb.Database{sigdb.Certificate(certificate(t, "vendor", 0), sigdb.GUID{})}
	f.SecureBoot = &SecureBootState{On: true, DeployedMode: true, Databases: map[string]sigdb.Database{sigdb.DB: db}}
	f.Log.Class = pcr.CryptoAgile
	for i := range uint32(8) {
		f.Log.Events = append(f.Log.Events, record(i, pcr.EventAction, "firmware"), record(i, pcr.EventSeparator, "\x00\x00\x00\x00"))
	}
	f.measured()
	return f
}

// measured makes the registers what the log says.
func (f *Facts) measured() { f.Fitness.PCRs = f.Log.Replay() }

// logs appends records, and measures them.
func (f *Facts) logs(events ...pcr.Event) {
	f.Log.Events = append(f.Log.Events, events...)
	f.measured()
}

// TestExamine spoils one thing at a time. Exactly one check then is not as it was; one
// that cannot be made any more is unknown. A lockout of an earlier life (F33), programs
// of the firmware and of cards (F13) and variables' room are seen before an installation.
func TestExamine(t *testing.T) {
	if d := Examine(goodFacts(t)); !d.Fit || slices.ContainsFunc(d.Checks, func(c Check) bool { return c.Verdict != OK || c.Remedy != "" || c.Seen == "" }) {
		t.Fatalf("a good box: %+v", d)
	}
	hash := sigdb.Hashes([][32]byte{{1}}, sigdb.GUID{})
	for _, tt := range []struct {
		name  string
		spoil func(f *Facts)
		check string
		want  Verdict
		seen  string
	}{
		{"in a container", func(f *Facts) { f.EFI, f.Masked = false, true }, "efi", Unknown, "/sys/firmware is empty"},
		{"legacy boot", func(f *Facts) { f.EFI = false }, "efi", Bad, "not started by UEFI"},
		{"no TPM", func(f *Facts) { f.TPMError = seal.ErrNoTPM; f.Fitness = seal.Fitness{} }, "tpm", Bad, "no TPM found"},
		{"TPM 1.2", func(f *Facts) { f.TPMError = seal.ErrTPM12; f.Fitness = seal.Fitness{} }, "tpm", Bad, "version 1.2"},
		{"TPM of family 1.2", func(f *Facts) { f.Fitness.Family = "1.2" }, "tpm", Bad, `family "1.2"`},
		{"self-test", func(f *Facts) { f.SelfTestError = errors.New("TPM_RC_FAILURE") }, "tpm-self-test", Bad, "TPM_RC_FAILURE"},
		{"lockout", func(f *Facts) { f.Fitness.InLockout, f.Fitness.LockoutCount = true, 32 }, "tpm-lockout", Warn, "32 of 32 failures counted, one is forgiven every 2h"},
		{"lockout, with a PIN", func(f *Facts) { f.Fitness.InLockout, f.Fitness.LockoutCount, f.PIN = true, 32, true }, "tpm-lockout", Bad, "no PIN is taken"},
		{"near lockout", func(f *Facts) { f.Fitness.LockoutCount = 20 }, "tpm-lockout", Warn, "20 of 32"},
		{"owner's password", func(f *Facts) { f.Fitness.OwnerAuthSet = true }, "tpm-owner", Bad, "password"},
		{"owner hierarchy disabled", func(f *Facts) { f.OwnerError = errors.New("TPM_RC_HIERARCHY") }, "tpm-owner", Bad, "TPM_RC_HIERARCHY"},
		{"no NV space", func(f *Facts) { f.Space.PersistentLeft = 0 }, "tpm-space", Warn, "room for 0 persistent keys"},
		{"no counter left", func(f *Facts) { f.Space.CountersLeft, f.Policy = 0, seal.PolicyRollbackProof }, "tpm-space", Bad, "0 counters"},
		{"NV space not told", func(f *Facts) { f.SpaceError = errors.New("bus") }, "tpm-space", Unknown, "bus"},
		{"no SHA-256 bank", func(f *Facts) { f.Fitness.Banks = []seal.Bank{{Alg: pcr.SHA1, PCRs: []int{0}}} }, "sha256-bank", Bad, "sha1 with 1 registers"},
		{"PCR 7 not in the bank", func(f *Facts) { f.Fitness.Banks[0].PCRs = []int{0, 1, 11} }, "sha256-bank", Bad, "PCR [7]"},
		{"PCR 7 never extended", func(f *Facts) {
			f.Log.Events = slices.DeleteFunc(f.Log.Events, func(e pcr.Event) bool { return e.PCR == 7 })
			f.measured()
			f.Fitness.PCRs[7] = pcr.Digest{}
		}, "registers", Bad, "PCR [7]"},
		{"PCR 3 never extended", func(f *Facts) {
			f.Log.Events = slices.DeleteFunc(f.Log.Events, func(e pcr.Event) bool { return e.PCR == 3 })
			f.measured()
			f.Fitness.PCRs[3] = pcr.Digest{}
		}, "registers", Warn, "PCR [3]"},
		{"no log", func(f *Facts) { f.LogError = errors.New("securityfs") }, "event-log", Unknown, "securityfs"},
		{"SHA-1 log", func(f *Facts) { f.Log = pcr.Log{Class: pcr.SHA1Only} }, "event-log", Warn, "SHA-1 only"},
		{"odd log", func(f *Facts) { f.Log.Notes = []string{"record 7 names PCR 99"} }, "event-log", Warn, "PCR 99"},
		{"log leads elsewhere", func(f *Facts) { f.Fitness.PCRs[1] = pcr.Digest{1} }, "log-replay", Warn, "not to PCR [1]"},
		{"log leads elsewhere, bound", func(f *Facts) { f.Fitness.PCRs[7] = pcr.Digest{1} }, "log-replay", Bad, "PCR [7]"},
		{"Secure Boot and audit mode", func(f *Facts) { f.SecureBoot.AuditMode = true }, "secure-boot", Bad, "AuditMode 1"},
		{"Secure Boot and setup mode", func(f *Facts) { f.SecureBoot.SetupMode = true }, "secure-boot", Bad, "enforces nothing"},
		{"setup mode", func(f *Facts) { f.SecureBoot.SetupMode, f.SecureBoot.On = true, false }, "secure-boot", Warn, "SetupMode 1"},
		{"audit mode", func(f *Facts) { f.SecureBoot.AuditMode, f.SecureBoot.On = true, false }, "secure-boot", Bad, "audit mode"},
		{"Secure Boot off", func(f *Facts) { f.SecureBoot.On = false }, "secure-boot", Warn, "this exact loader"},
		{"odd factory keys", func(f *Facts) { f.SecureBoot.Notes = []string{"db: negative serial"} }, "secure-boot", Warn, "negative serial"},
		{"variables unreadable", func(f *Facts) { f.SecureBoot, f.SecureBootError = nil, ErrVariables }, "secure-boot", Unknown, ErrVariables.Error()},
		{"program by hash", func(f *Facts) { f.SecureBoot.Databases[sigdb.DB] = append(f.SecureBoot.Databases[sigdb.DB], hash) }, "db-hashes", Warn, "1 of the 2 entries"},
		{"RSA-1024", func(f *Facts) {
			f.SecureBoot.Databases[sigdb.KEK] = sigdb.Database{sigdb.Certificate(certificate(t, "old", 1024), sigdb.GUID{})}
		}, "weak-algorithms", Warn, `KEK: "old" has an RSA key of 1024 bits`},
		{"DMA protection off", func(f *Facts) { f.logs(record(7, pcr.EventEFIAction, "DMA Protection Disabled")) }, "dma-protection", Bad, "DMA"},
		{"the same with a zero byte", func(f *Facts) { f.logs(record(7, pcr.EventEFIAction, "DMA Protection Disabled\x00")) }, "dma-protection", Bad, "DMA"},
		{"no IOMMU", func(f *Facts) { f.IOMMUGroups = 0 }, "dma-protection", Warn, "no IOMMU"},
		{"debug mode", func(f *Facts) { f.logs(record(7, pcr.EventEFIAction, "UEFI Debug Mode")) }, "firmware-debug", Bad, "debugger"},
		{"Absolute", func(f *Facts) { f.logs(record(2, pcr.EventBootServicesDriver, fromFirmware(absoluteInstaller))) }, "absolute", Warn, "PCR 2"},
		{"variables full", func(f *Facts) { f.VariableBytes = 4 << 10 }, "variable-space", Bad, "4 KB free"},
		{"variables nearly full", func(f *Facts) { f.VariableBytes = 20 << 10 }, "variable-space", Warn, "20 KB free"},
		{"crash dumps", func(f *Facts) { f.CrashDumps = 9 }, "variable-space", Warn, "9 variables are crash dumps"},
		{"room not told", func(f *Facts) { f.VariableBytes = -1 }, "variable-space", Unknown, "does not say"},
		{"ESP full", func(f *Facts) { f.ESPBytes = 10 << 20 }, "esp", Bad, "10 MB free"},
		{"ESP damaged", func(f *Facts) { f.DiskError = errors.New("no FAT") }, "esp", Warn, "no FAT"},
		{"no Holdfast disk", func(f *Facts) { f.Disk = "" }, "esp", Unknown, "no Holdfast disk"},
		{"clock behind", func(f *Facts) { f.Now = time.Unix(0, 0) }, "clock", Warn, "1970"},
		{"clock far ahead", func(f *Facts) { f.Now = f.Now.Add(30 * 365 * 24 * time.Hour) }, "clock", Warn, "long after"},
		{"no RTC", func(f *Facts) { f.RTC = false }, "clock", Warn, "while the box is off"},
		{"virtual machine", func(f *Facts) { f.VM = "QEMU" }, "virtual-machine", Warn, "QEMU"},
		{"no watchdog", func(f *Facts) { f.Watchdogs = nil }, "watchdog", Warn, "none"},
		{"softdog", func(f *Facts) { f.Watchdogs = []string{"Software Watchdog"} }, "watchdog", Warn, "Software"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := goodFacts(t)
			tt.spoil(&f)
			d := Examine(f)
			if d.Fit != (tt.want != Bad) {
				t.Errorf("fit: %v", d.Fit)
			}
			found := false
			for _, c := range d.Checks {
				switch {
				case c.Name == tt.check:
					found = true
					if c.Verdict != tt.want || !strings.Contains(c.Seen, tt.seen) {
						t.Errorf("%+v, want %s with %q", c, tt.want, tt.seen)
					}
					if (tt.want == Bad || tt.want == Warn) && c.Remedy == "" {
						t.Error("no remedy")
					}
				case c.Verdict != OK && c.Verdict != Unknown:
					t.Errorf("also %+v", c)
				}
			}
			if !found {
				t.Errorf("no check %s", tt.check)
			}
		})
	}
}

// TestExamineByPolicy: what only matters where a policy binds it.
func TestExamineByPolicy(t *testing.T) {
	agent := record(4, pcr.EventBootServicesApp, fromFirmware("12345678-1234-1234-1234-123456789abc"))
	rom := record(2, pcr.EventBootServicesDriver, strings.Repeat("\x00", 32))
	for _, tt := range []struct {
		event         pcr.Event
		check, policy string
		want          Verdict
	}{
		{agent, "pre-os-programs", seal.PolicyStandard, OK}, {agent, "pre-os-programs", seal.PolicyStrict, Warn},
		{rom, "option-roms", seal.PolicyStandard, OK}, {rom, "option-roms", seal.PolicyStrict, Warn},
	} {
		f := goodFacts(t)
		f.Policy = tt.policy
		f.logs(tt.event)
		i := slices.IndexFunc(Examine(f).Checks, func(c Check) bool { return c.Name == tt.check })
		if c := Examine(f).Checks[i]; c.Verdict != tt.want {
			t.Errorf("%s: %+v", tt.policy, c)
		}
	}
	f := goodFacts(t)
	f.Policy = "none such"
	if d := Examine(f); d.Fit || len(d.Checks) != 1 {
		t.Errorf("an unknown policy: %+v", d)
	}
}

// TestExamineNothing: no facts at all are a box that is not fit, and no panic.
func TestExamineNothing(t *testing.T) {
	d := Examine(Facts{SecureBootError: ErrVariables})
	if d.Fit {
		t.Error("a box that says nothing is fit")
	}
	seen := map[string]bool{}
	for _, c := range d.Checks {
		if seen[c.Name] {
			t.Errorf("check %s twice", c.Name)
		}
		seen[c.Name] = true
	}
	var text strings.Builder
	if _, err := d.WriteTo(&text); err != nil || !strings.Contains(text.String(), "NOT FIT for policy standard") {
		t.Errorf("%v: %s", err, text.String())
	}
	b, err := json.Marshal(d)
	var back Diagnosis
	if err := errors.Join(err, json.Unmarshal(b, &back)); err != nil || len(back.Checks) != len(d.Checks) {
		t.Errorf("%v: %s", err, b)
	}
}

// TestFirmwareFile: the log is the firmware's, and may hold anything.
func TestFirmwareFile(t *testing.T) {
	whole := fromFirmware(absoluteInstaller)
	if got := firmwareFile([]byte(whole)).String(); got != absoluteInstaller {
		t.Errorf("got %s", got)
	}
	for n := range len(whole) - 4 {
		if got := firmwareFile([]byte(whole[:n])); got != uuid.Nil {
			t.Errorf("cut to %d bytes: %v", n, got)
		}
	}
}
