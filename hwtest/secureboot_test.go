package hwtest_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// plant writes a release into a slot of a box that is off; ukiOf, if not nil, makes
// another kernel image of the release's.
func plant(t *testing.T, disk string, p *product, slot partition.Slot, tries int, ukiOf func([]byte) []byte) {
	t.Helper()
	d, _ := openDisk(t, disk)
	contents, err := build.Contents(p.release(), p.manifest)
	if err != nil {
		t.Fatal(err)
	}
	if ukiOf != nil {
		b, err := os.ReadFile(filepath.Join(p.release(), image.UKIName))
		if err != nil {
			t.Fatal(err)
		}
		contents.UKI = partition.Bytes(ukiOf(b))
	}
	o := partition.WriteOptions{Tries: tries, Running: slot.Other(), Time: time.Unix(p.manifest.BuildTimeSec, 0)}
	if err := d.WriteSlot(context.Background(), slot, contents, o, nil); err != nil {
		t.Fatal(err)
	}
}

// unsignedPE takes the signatures off a program.
func unsignedPE(t *testing.T, b []byte) []byte {
	t.Helper()
	f, err := uki.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	sigs, err := f.Signatures()
	if err != nil || len(sigs) != 1 {
		t.Fatalf("%d signatures, %v", len(sigs), err)
	}
	// PE Format §3.4.3: the address and size of the certificate table, data directory 4.
	pe := int(uint32(b[0x3c]) | uint32(b[0x3d])<<8 | uint32(b[0x3e])<<16)
	entry := b[pe+24+112+4*8:]
	at := int(uint32(entry[0]) | uint32(entry[1])<<8 | uint32(entry[2])<<16 | uint32(entry[3])<<24)
	out := bytes.Clone(b[:at])
	clear(out[pe+24+112+4*8 : pe+24+112+5*8])
	return out
}

// signedBy signs a program with another vendor's key instead.
func signedBy(t *testing.T, k *keys.Keys, b []byte) []byte {
	t.Helper()
	signed, err := uki.Sign(tree.Bytes(unsignedPE(t, b)), k.DB.Key, k.DB.Cert)
	if err != nil {
		t.Fatal(err)
	}
	r, err := signed.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// refusedPattern is what systemd-boot and OVMF say of a program that Secure Boot refuses.
const refusedPattern = `(?i)access denied|security violation`

// TestForeignKernelImages: whatever the boot loader insists on, and how many tries that
// has, a kernel image that the firmware refuses leaves a box that comes back by itself on
// the good slot, with its volumes open, and says what it was.
func TestForeignKernelImages(t *testing.T) {
	t.Parallel()
	next := buildRelease(t, t.TempDir(), theProduct(t).keys, "2.6.0", nil)
	stranger, err := keys.Create(filepath.Join(t.TempDir(), "keys"), keys.Config{Organization: "Test vendor", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("UnsignedOnTrial", func(t *testing.T) {
		t.Parallel()
		m, _ := aBox(t, true)
		plant(t, m.Disk, next, partition.SlotB, 3, func(b []byte) []byte { return unsignedPE(t, b) })
		m.PowerOn()
		wantRefusedKernel(t, m, "the firmware refuses its kernel image: not signed")
		if s := updateStatus(t, m); len(s.Failed) != 1 || s.Failed[0].Version != "2.6.0" {
			t.Errorf("failed releases %+v", s.Failed)
		}
	})
	t.Run("ForeignInAGoodSlot", func(t *testing.T) {
		t.Parallel()
		m, _ := aBox(t, true)
		plant(t, m.Disk, next, partition.SlotB, 0, nil)
		m.PowerOn()
		m.Expect(`boot confirmed slot=b version=2.6.0`, bootTime)
		m.Expect(`the firmware's boot entries are made`, bootTime)
		m.PowerButton(bootTime)
		e := entry(t, m.Disk, partition.SlotB)
		if !e.Good() {
			t.Fatalf("the confirmed slot is not good: %+v", e)
		}
		d, _ := openDisk(t, m.Disk)
		replaceOnESP(t, d, e.UKI, func(b []byte) []byte { return signedBy(t, stranger, b) })
		m.PowerOn()
		wantRefusedKernel(t, m, "it was good and does not boot any more: the firmware refuses its kernel image")
	})
}

// wantRefusedKernel is the start of a box whose release 2.6.0 in slot b the firmware does
// not start, by either boot loader.
func wantRefusedKernel(t *testing.T, m *hwtest.Machine, reason string) {
	t.Helper()
	for range 2 {
		m.Expect(refusedPattern, bootTime)
	}
	m.Expect(`restarting without a release that the firmware refuses version=2.6.0 slot=b`, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(`ready name=probe version=1.0.0 slot=a`, bootTime)
	wantRecord(t, m, "first", "kept")
	s := updateStatus(t, m)
	if n := len(s.Journal); n == 0 || !strings.Contains(s.Journal[n-1].Reason, reason) {
		t.Errorf("journal %+v; want %q", s.Journal, reason)
	}
	if e := entry(t, m.Disk, partition.SlotB); !e.Bad() {
		t.Errorf("the refused release has tries left: %+v", e)
	}
	if l := waitLoader(t, m); l == nil || l.Started != "EFI/BOOT/BOOTX64.EFI" || len(l.ReleaseEntries) != 1 {
		t.Errorf("status of the boot loader %+v", l)
	}
}

// TestForeignLoader: a boot loader that the vendor did not sign is refused, and the
// firmware goes on with the second copy by its boot entry; the box puts the first one
// back, and starts from it again. With both copies foreign, it starts the release.
func TestForeignLoader(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, true)
	stranger, err := keys.Create(filepath.Join(t.TempDir(), "keys"), keys.Config{Organization: "Test vendor", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	foreign := func(b []byte) []byte { return signedBy(t, stranger, b) }
	d, _ := openDisk(t, m.Disk)
	before := loaderCopies(t, m)
	replaceOnESP(t, d, "EFI/BOOT/BOOTX64.EFI", foreign)
	m.PowerOn()
	m.Expect(refusedPattern, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRepaired(t, m, "EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi")
	wantRecord(t, m, "first", "kept")
	retried := eventLog(t, m)
	m.PowerButton(bootTime)
	if after := loaderCopies(t, m); after != before {
		t.Error("the copies of the boot loader are not what they were")
	}

	replaceOnESP(t, d, "EFI/systemd/systemd-bootx64.efi", foreign)
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRepaired(t, m, "EFI/systemd/systemd-bootx64.efi", "EFI/BOOT/BOOTX64.EFI")
	if strings.Contains(m.Console(), "Access Denied") {
		t.Error("the first copy was not the one that started")
	}
	// What strict expects of the boot after the repair, it is (PCR 4), and standard binds
	// nothing of the attempt that was refused (PCR 7).
	usual := eventLog(t, m)
	loader, err := hex.DecodeString(theProduct(t).manifest.Expected.LoaderAuthenticode)
	if err != nil {
		t.Fatal(err)
	}
	without, ok := retried.WithoutRetry(pcr.Digest(loader))
	if a, b := retried.Replay(), usual.Replay(); !ok || a[4] == b[4] || without.Replay()[4] != b[4] || a[7] != b[7] {
		t.Errorf("registers of the boot by the second copy %x, without its retry (%v) %x, and of the usual boot %x", a, ok, without.Replay(), b)
	}
	m.PowerCut()

	for _, path := range []string{"EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"} {
		replaceOnESP(t, d, path, foreign)
	}
	m.PowerOn()
	m.Expect(tpmPattern, bootTime) // the firmware starts the release
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
	if direct := eventLog(t, m).Replay(); direct[7] != usual.Replay()[7] {
		t.Errorf("PCR 7 is %x without a boot loader, and %x with it", direct[7], usual.Replay()[7])
	}
	if l := waitLoader(t, m); l == nil || !strings.Contains(l.Problem, "install a release, which brings its own") {
		t.Errorf("status of the boot loader %+v", l)
	}
}

// waitLoader is the status of the boot loaders, once a boot has come so far; nil if it never does.
func waitLoader(t *testing.T, m *hwtest.Machine) *agent.LoaderStatus {
	t.Helper()
	s := statusOf(t, m)
	for end := time.Now().Add(bootTime); s.BootLoader == nil && time.Now().Before(end); s = statusOf(t, m) {
		time.Sleep(time.Second)
	}
	return s.BootLoader
}

// wantRepaired is a box that started from one copy of the boot loader and put back the other.
func wantRepaired(t *testing.T, m *hwtest.Machine, damaged, started string) {
	t.Helper()
	l := waitLoader(t, m)
	want := "the boot loader " + damaged + " was put back from " + started
	if l == nil || !strings.HasPrefix(l.Repaired, want) || l.Started != started || l.Entry == "" || l.Problem != "" {
		t.Errorf("status of the boot loader %+v, want %q", l, want)
	}
	if n := strings.Count(m.Console(), "boot loader repaired copy="+damaged+" from="+started); n != 1 {
		t.Errorf("the repair is on the console %d times", n)
	}
}

// eventLog is the firmware's, of the boot that is running.
func eventLog(t *testing.T, m *hwtest.Machine) pcr.Log {
	t.Helper()
	raw, err := call(m, "GET", "/file?path=/sys/kernel/security/tpm0/binary_bios_measurements", "")
	if err != nil {
		t.Fatalf("read the event log: %v", err)
	}
	log, err := pcr.ParseLog([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// foreignLoaderStrict: where PCR 4 is bound, a start by the second copy has another value
// in it; the box puts the first copy back and restarts before it asks for anything.
func foreignLoaderStrict(t *testing.T) {
	p := theProduct(t)
	first := buildRelease(t, t.TempDir(), p.keys, "1.0.2", func(s *spec.Spec) { s.Seal.Policy = "strict" })
	stranger, err := keys.Create(filepath.Join(t.TempDir(), "keys"), keys.Config{Organization: "Test vendor", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	m := hwtest.New(t, first.disk(), hwtest.Options{Forward: []int{80}, SecureBoot: p.firmwareKeys(t)})
	m.PowerOn()
	m.Expect(recoveryPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	store(t, m, "first", "kept")
	m.PowerButton(bootTime)
	d, _ := openDisk(t, m.Disk)
	replaceOnESP(t, d, "EFI/BOOT/BOOTX64.EFI", func(b []byte) []byte { return signedBy(t, stranger, b) })
	m.PowerOn()
	m.Expect(refusedPattern, bootTime)
	m.Expect(`the TPM does not open the data volumes`, bootTime)
	m.Expect(`boot loader repaired copy=EFI/BOOT/BOOTX64.EFI from=EFI/systemd/systemd-bootx64.efi`, bootTime)
	m.Expect(`restarting, as the firmware had tried another program before`, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
	s := statusOf(t, m)
	if l := s.BootLoader; l == nil || !strings.Contains(l.Repaired, "EFI/BOOT/BOOTX64.EFI was put back") || l.Started != "EFI/BOOT/BOOTX64.EFI" {
		t.Errorf("status of the boot loader %+v", l)
	}
	if strings.Contains(m.Console(), "recovery key (or") {
		t.Error("somebody was asked for the recovery key")
	}
}

// foreignLoadersStrict: with neither boot loader the firmware starts the release, which has
// another PCR 4, and somebody types the recovery key, once: that boot opens by the TPM from
// then on, and so do one by loaders that came back, the first of a release installed
// without them, by those it brought, and the old release started by these.
func foreignLoadersStrict(t *testing.T) {
	p := theProduct(t)
	strict := func(s *spec.Spec) { s.Seal.Policy = "strict" }
	first := buildRelease(t, t.TempDir(), p.keys, "1.0.2", strict)
	nextRelease(t, "2.6.3", strict)
	stranger, err := keys.Create(filepath.Join(t.TempDir(), "keys"), keys.Config{Organization: "Test vendor", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	m := hwtest.New(t, first.disk(), hwtest.Options{Forward: []int{80}, SecureBoot: p.firmwareKeys(t)})
	m.PowerOn()
	recovery := m.Expect(recoveryPattern, bootTime)[1]
	m.Expect(readyPattern, bootTime)
	store(t, m, "first", "kept")
	waitLoader(t, m)
	m.PowerButton(bootTime)

	loaders := [2]string{"EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"}
	d, _ := openDisk(t, m.Disk)
	var before []byte
	foreign := func() {
		for _, path := range loaders {
			replaceOnESP(t, d, path, func(b []byte) []byte { before = b; return signedBy(t, stranger, b) })
		}
	}
	foreign()
	m.PowerOn()
	m.Expect(promptPattern, 2*bootTime) // after a restart that helped nothing
	m.Send(recovery + "\n")
	m.Expect(`repaired what="sealed to the present state`, bootTime)
	if l := waitLoader(t, m); l == nil || !strings.HasPrefix(l.Started, "EFI/holdfast/a-") || !strings.Contains(l.Problem, "install a release") {
		t.Errorf("status of the boot loader %+v", l)
	}
	m.PowerButton(bootTime)

	for _, path := range loaders {
		replaceOnESP(t, d, path, func([]byte) []byte { return before })
	}
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.PowerCut()

	foreign()
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	if err := apply(m, "2.6.3"); err != nil {
		t.Fatal(err)
	}
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(`blessed slot=b version=2.6.3`, bootTime)
	wantRecord(t, m, "first", "kept")
	if l := waitLoader(t, m); l == nil || l.Started != loaders[0] || l.Problem != "" {
		t.Errorf("status of the boot loader %+v", l)
	}
	m.PowerButton(bootTime)
	loaderCopies(t, m)

	if err := d.GiveUp(partition.SlotB, 3); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(`ready name=probe version=1.0.2 slot=a`, bootTime)
	wantRecord(t, m, "first", "kept")
}

// foreignKernelStrict is that of a release that the firmware refuses: what it has tried
// before it starts the good one is in PCR 4, and a restart has the volumes open.
func foreignKernelStrict(t *testing.T) {
	p := theProduct(t)
	strict := func(s *spec.Spec) { s.Seal.Policy = "strict" }
	first, next := buildRelease(t, t.TempDir(), p.keys, "1.0.2", strict), buildRelease(t, t.TempDir(), p.keys, "2.6.2", strict)
	m := hwtest.New(t, first.disk(), hwtest.Options{Forward: []int{80}, SecureBoot: p.firmwareKeys(t)})
	m.PowerOn()
	m.Expect(recoveryPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	store(t, m, "first", "kept")
	waitLoader(t, m)
	m.PowerButton(bootTime)
	for tries, restart := range map[int]string{
		1: `restarting, as the firmware had tried another program before`,
		3: `restarting without a release that the firmware refuses version=2.6.2 slot=b`,
	} {
		plant(t, m.Disk, next, partition.SlotB, tries, func(b []byte) []byte { return unsignedPE(t, b) })
		m.PowerOn()
		m.Expect(refusedPattern, bootTime)
		m.Expect(restart, bootTime)
		m.Expect(tpmPattern, bootTime)
		m.Expect(`ready name=probe version=1.0.2 slot=a`, bootTime)
		wantRecord(t, m, "first", "kept")
		if e := entry(t, m.Disk, partition.SlotB); !e.Bad() {
			t.Errorf("the refused release has tries left: %+v", e)
		}
		waitLoader(t, m)
		m.PowerButton(bootTime)
		if n := strings.Count(m.Console(), "Restarting system"); n != 1 || strings.Contains(m.Console(), "recovery key (or") {
			t.Errorf("%d tries: %d restarts, or somebody was asked for the recovery key", tries, n)
		}
	}
}

// loaderCopies are both, one after the other.
func loaderCopies(t *testing.T, m *hwtest.Machine) string {
	t.Helper()
	d, _ := openDisk(t, m.Disk)
	list, err := d.Loaders()
	if err != nil || list[0].Damage != nil || list[1].Damage != nil || !bytes.Equal(list[0].Content, list[1].Content) {
		t.Fatalf("the copies of the boot loader: %v, %v, %v", err, list[0].Damage, list[1].Damage)
	}
	return string(list[0].Content) + string(list[1].Content)
}

// writeFile puts a file into a product's folder, for its spec to name.
func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// releaseRevoked: a release brings the next key's certificate for db and revokes the
// first release in dbx. The box makes one change a boot and opens its data by the TPM
// all the way; what was revoked does not start any more, and the box comes back.
func releaseRevoked(t *testing.T) {
	p := theProduct(t)
	digest, err := hex.DecodeString(p.manifest.Expected.UKIAuthenticode)
	if err != nil || len(digest) != 32 {
		t.Fatalf("digest %x, %v", digest, err)
	}
	dbx, err := p.keys.Revoke(keys.Revocation{Digests: [][32]byte{[32]byte(digest)}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	between := buildRelease(t, t.TempDir(), p.keys, "2.7.0", nil)
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "dbx.auth"), dbx)
	writeFile(t, filepath.Join(dir, "db-next.auth"), p.keys.DBNext.Auth)
	last := buildRelease(t, dir, p.keys, "2.8.0", func(s *spec.Spec) {
		s.SecureBoot.DB, s.SecureBoot.DBX = "db-next.auth", "dbx.auth"
	})
	m, _ := aBox(t, true)

	// While the revoked release is the one to fall back to, dbx has to wait, and db need not.
	plant(t, m.Disk, last, partition.SlotB, 0, nil)
	m.PowerOn()
	m.Expect(`ready name=probe version=2.8.0 slot=b`, bootTime)
	m.Expect(`blocked="the change of dbx that this release brings is not made: release 1.0.0 in slot a would not start any more`, bootTime)
	m.Expect(`Secure Boot database changed variable=db`, bootTime)
	m.Expect(`why="for the change of db to be in force"`, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(`boot confirmed slot=b version=2.8.0`, bootTime)
	m.PowerButton(bootTime) // while the TPM states are seen to
	m.Expect(`volume closed name=data`, 0)

	// With another release in its place, it is made.
	plant(t, m.Disk, between, partition.SlotA, 0, nil)
	plant(t, m.Disk, last, partition.SlotB, 0, nil) // the newer one again
	m.PowerOn()
	m.Expect(tpmPattern, bootTime)
	m.Expect(`Secure Boot database changed variable=dbx`, bootTime)
	m.Expect(`why="for the change of dbx to be in force"`, bootTime)
	m.Expect(tpmPattern, bootTime)
	expectAll(m, `ready name=probe version=2.8.0 slot=b`, `boot confirmed slot=b version=2.8.0`, `TPM states added=.* dropped=`)
	wantRecord(t, m, "first", "kept")
	s := statusOf(t, m)
	if s.Keys == nil || s.Keys.Pending != "" || len(s.Keys.Problems) > 0 || !s.Keys.Vendor || len(s.Keys.Keys["db"]) != 2 {
		t.Errorf("status of the keys: %+v", s.Keys)
	}
	m.PowerButton(bootTime)

	plant(t, m.Disk, p, partition.SlotA, 1, nil)
	m.PowerOn()
	m.Expect(refusedPattern, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(`ready name=probe version=2.8.0 slot=b`, bootTime)
	wantRecord(t, m, "first", "kept")
}

// expectAll waits for these, in whatever order they come.
func expectAll(m *hwtest.Machine, patterns ...string) {
	for len(patterns) > 0 {
		i, _ := m.ExpectEither(bootTime, patterns...)
		patterns = slices.Delete(patterns, i, i+1)
	}
}

// enrolling is a product whose boxes enrol the vendor's keys, which the factory did not.
func enrolling(t *testing.T) *product {
	t.Helper()
	return buildRelease(t, t.TempDir(), theProduct(t).keys, "1.0.0", func(s *spec.Spec) { s.SecureBoot.Enroll = "force" })
}

// setupMode is a firmware without keys.
func setupMode() *hwtest.SecureBootKeys { return &hwtest.SecureBootKeys{} }

const enrolPattern = `enrolling the vendor's Secure Boot keys attempt=`

// TestEnrolment: a board in setup mode gets the vendor's keys, and the boot that reads
// them back seals to them (F4). Keys that vanish later come back in the same way.
func TestEnrolment(t *testing.T) {
	t.Parallel()
	m := hwtest.New(t, enrolling(t).disk(), hwtest.Options{SecureBoot: setupMode(), Forward: []int{80}})
	m.PowerOn()
	m.Expect(enrolPattern+`1`, bootTime)
	m.Expect(`first boot: provisioning`, bootTime)
	m.Expect(recoveryPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	if n := strings.Count(m.Console(), ": starting name=probe"); n != 2 {
		t.Errorf("the agent was started %d times until the box was ready, not twice:\n%s", n, m.Console())
	}
	store(t, m, "first", "kept")
	s := statusOf(t, m)
	for end := time.Now().Add(bootTime); s.Keys == nil && time.Now().Before(end); s = statusOf(t, m) { // they are looked at when all else is done
		time.Sleep(time.Second)
	}
	if !s.SecureBoot || s.Keys == nil || !s.Keys.Vendor || s.Keys.Mode != "on" || len(s.Degraded) > 0 {
		t.Errorf("Secure Boot %v, keys %+v, degraded %q", s.SecureBoot, s.Keys, s.Degraded)
	}
	m.PowerButton(bootTime)

	if err := m.ResetFirmware(setupMode()); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(enrolPattern+`1`, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
}

// keysForgotten (F4): where the firmware keeps no keys, enrolling them is given up and
// nothing rests on them. A board that did keep them and then does not any more is another
// one to the TPM.
func keysForgotten(t *testing.T) {
	p := enrolling(t)
	forgetful := hwtest.New(t, p.disk(), hwtest.Options{SecureBoot: setupMode(), ReadOnlyVariables: true})
	forgetful.PowerOn()
	forgetful.Expect(enrolPattern+`1`, bootTime)
	forgetful.Expect(enrolPattern+`2`, bootTime)
	forgetful.Expect(`Secure Boot is not in force \(setup mode.* does not keep keys over a restart`, bootTime)
	forgetful.Expect(`degraded reason="Secure Boot is off`, bootTime)
	forgetful.Expect(recoveryPattern, bootTime)
	forgetful.Expect(readyPattern, bootTime)
	forgetful.PowerCut()

	m := hwtest.New(t, p.disk(), hwtest.Options{SecureBoot: setupMode(), Forward: []int{80}})
	m.PowerOn()
	recovery := m.Expect(recoveryPattern, 2*bootTime)[1]
	m.Expect(readyPattern, bootTime)
	store(t, m, "first", "kept")
	m.PowerButton(bootTime)
	if err := m.ResetFirmware(setupMode()); err != nil {
		t.Fatal(err)
	}
	m.ReadOnlyVariables(true)
	m.PowerOn()
	m.Expect(`does not keep keys over a restart`, 3*bootTime)
	m.Expect(promptPattern, bootTime)
	m.Send(recovery + "\n")
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
}

// noRoomForKeys (F65): a variable store that is full when the keys are to be enrolled
// leaves the box without Secure Boot, and with a warning that names the cause, in that
// boot and in later ones. It works all the same.
func noRoomForKeys(t *testing.T) {
	m := hwtest.New(t, enrolling(t).disk(), hwtest.Options{SecureBoot: setupMode(), Forward: []int{80}})
	if err := m.FillVariables(); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(`Secure Boot keys error="enrol .*the firmware's variable store is full: .*\d+ bytes are needed`, bootTime)
	m.Expect(recoveryPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantNoRoom(t, m, "")
	wantDiagnosis(t, m, false, map[string]agent.Verdict{"variable-space": agent.Bad, "secure-boot": agent.Warn})
	store(t, m, "first", "kept")
	reboot(t, m)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantNoRoom(t, m, "it is tried again after a factory reset")
	wantRecord(t, m, "first", "kept")
}

// wantNoRoom wants one problem that names the cause, and what else.
func wantNoRoom(t *testing.T, m *hwtest.Machine, also string) {
	t.Helper()
	s := statusOf(t, m)
	var said []string
	for _, p := range s.Problems {
		if strings.Contains(p, "Secure Boot") || strings.Contains(p, "variable store") {
			said = append(said, p)
		}
	}
	if len(said) != 1 || !strings.HasPrefix(said[0], "Secure Boot is not in force (setup mode: there is no platform key), ") ||
		!strings.Contains(said[0], "variable store is full: ") || !strings.Contains(said[0], "empties it") || !strings.Contains(said[0], also) {
		t.Errorf("the status says of the keys: %q", said)
	}
}
