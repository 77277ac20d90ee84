package hwtest_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
)

// replaceUKI puts what change makes of slot A's UKI in its place on the ESP, as
// somebody with the disk in his hands can.
func replaceUKI(t *testing.T, disk string, change func(old []byte) []byte) {
	t.Helper()
	d, _ := openDisk(t, disk)
	entries, err := d.Entries()
	if err != nil || len(entries) != 1 {
		t.Fatalf("boot entries: %v, %v", entries, err)
	}
	replaceOnESP(t, d, strings.TrimPrefix(entries[0].UKI, "/"), change)
}

func replaceOnESP(t *testing.T, d *partition.Disk, name string, change func(old []byte) []byte) {
	t.Helper()
	dev, p, err := d.Partition(partition.ESPName)
	if err != nil {
		t.Fatal(err)
	}
	esp, err := fat32.Open(dev, p.SizeBytes)
	if err != nil {
		t.Fatal(err)
	}
	f, err := esp.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	old, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
	if err != nil {
		t.Fatal(err)
	}
	changed := change(bytes.Clone(old))
	if bytes.Equal(changed, old) {
		t.Fatal("the attack changed nothing")
	}
	if err := esp.WriteFile(name, int64(len(changed)), bytes.NewReader(changed), time.Unix(0, 0)); err != nil {
		t.Fatal(err)
	}
	t.Logf("replaced %s on the ESP", path.Base(name))
}

// flipIn flips a bit in the middle of a section.
func flipIn(t *testing.T, section string) func([]byte) []byte {
	return func(b []byte) []byte {
		s := sectionOf(t, b, section)
		b[s.RawOffset+s.VirtualSizeBytes/2] ^= 1
		return b
	}
}

func sectionOf(t *testing.T, b []byte, name string) uki.Section {
	t.Helper()
	f, err := uki.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	s, ok := f.Section(name)
	if !ok {
		t.Fatalf("UKI has no section %s", name)
	}
	return s
}

// cmdlineWithShell overwrites a word of the command line with another of its length.
func cmdlineWithShell(t *testing.T) func([]byte) []byte {
	return func(b []byte) []byte {
		s := sectionOf(t, b, ".cmdline")
		text := b[s.RawOffset : s.RawOffset+s.VirtualSizeBytes]
		at := bytes.Index(text, []byte("quiet loglevel=4"))
		if at < 0 {
			t.Fatalf("command line %q", text)
		}
		copy(text[at:], "init=/bin/sh    ")
		return b
	}
}

// otherVendor is the same appliance, built and signed with other keys.
func otherVendor(t *testing.T) func([]byte) []byte {
	other := buildProduct(t, t.TempDir(), "1.0.0")
	return func([]byte) []byte {
		b, err := os.ReadFile(filepath.Join(other.release(), image.UKIName))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

func TestAttacksOnTheUKI(t *testing.T) {
	for name, attack := range map[string]func(*testing.T) func([]byte) []byte{
		"CommandLineChanged": cmdlineWithShell,
		"InitrdChanged":      func(t *testing.T) func([]byte) []byte { return flipIn(t, ".initrd") },
		"SignedByAnotherKey": otherVendor,
	} {
		t.Run(name+"/SecureBoot", func(t *testing.T) {
			t.Parallel()
			m, _ := aBox(t, true)
			replaceUKI(t, m.Disk, attack(t))
			m.PowerOn()
			expectRefused(t, m, `(?i)access denied|security violation|No bootable option`)
		})
		t.Run(name+"/WithoutSecureBoot", func(t *testing.T) {
			t.Parallel()
			m, _ := aBox(t, false)
			replaceUKI(t, m.Disk, attack(t))
			m.PowerOn()
			// A damaged initrd may not even unpack; what must not happen is an open volume.
			m.ExpectEither(bootTime, promptPattern, `Kernel panic`, `holdfast: error`)
			if strings.Contains(m.Console(), openPattern) {
				t.Error("a volume was opened")
			}
		})
	}
}

// flipRoot flips one bit of a slot.
func flipRoot(t *testing.T, disk, name string, off int64) {
	t.Helper()
	_, dev := openDisk(t, disk)
	d, err := partition.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	root, _, err := d.Partition(name)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := root.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := root.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// blockOf finds where in the root image the given bytes of the agent lie.
func blockOf(t *testing.T, p *product) int64 {
	t.Helper()
	agent, err := os.ReadFile(filepath.Join(p.dir, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.ReadFile(filepath.Join(p.release(), image.RootName))
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(root, agent[:4096])
	if at < 0 {
		t.Fatal("the agent is not in the root image")
	}
	return int64(at) + 8192
}

func TestAttacksOnTheRoot(t *testing.T) {
	p := theProduct(t)
	v := p.manifest.Verity
	for name, off := range map[string]int64{
		"SuperblockFlipped": 1024,
		"DataBlockFlipped":  blockOf(t, p),
		"TreeTopFlipped":    (v.DataBlocks + 1) * 4096,
		"TreeLeafFlipped":   v.TotalBytes - 4096 - (v.DataBlocks-blockOf(t, p)/4096)/128*4096 + 100,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, _ := aBox(t, true)
			flipRoot(t, m.Disk, partition.RootAName, off)
			m.PowerOn()
			// The top of the tree is what the root is found by, so the search goes
			// on until its time is up.
			m.ExpectEither(bootTime, `Kernel panic`, `holdfast: error`)
			if strings.Contains(m.Console(), openPattern) {
				t.Error("a volume was opened")
			}
		})
	}
}

// editVolume changes the LUKS volume while the box is off.
func editVolume(t *testing.T, disk string, edit func(dev partition.Device)) {
	t.Helper()
	d, _ := openDisk(t, disk)
	dev, _, err := d.Partition("data")
	if err != nil {
		t.Fatal(err)
	}
	edit(dev)
}

func write(t *testing.T, dev partition.Device, b []byte, off int64) {
	t.Helper()
	if _, err := dev.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

func TestTornPrimaryHeader(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, true)
	editVolume(t, m.Disk, func(dev partition.Device) { write(t, dev, bytes.Repeat([]byte{0xaa}, 2048), 512) })
	m.PowerOn()
	m.Expect(`mending a copy of the LUKS header`, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "first", "kept")
}

func TestHeaderDestroyedIsNotProvisionedAnew(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, true)
	editVolume(t, m.Disk, func(dev partition.Device) { write(t, dev, make([]byte, 64<<10), 0) })
	m.PowerOn()
	m.Expect(`was provisioned before, so it is not made anew`, bootTime)
	if strings.Contains(m.Console(), "RECOVERY KEY") {
		t.Error("a new volume was made over the old one")
	}
}

// TestCipherNull: both header copies say that the data is not encrypted, with
// right checksums (F81).
func TestCipherNull(t *testing.T) {
	t.Parallel()
	m, _ := aBox(t, true)
	editVolume(t, m.Disk, func(dev partition.Device) {
		for _, off := range []int64{0, 16 << 10} {
			b := make([]byte, 16<<10)
			if _, err := dev.ReadAt(b, off); err != nil {
				t.Fatal(err)
			}
			was := []byte(`"encryption":"aes-xts-plain64","sector_size"`)
			if !bytes.Contains(b, was) {
				was = []byte(`"encryption":"aes-xts-plain64"`)
			}
			forged := bytes.Replace(b, was, []byte(strings.Replace(string(was), "aes-xts-plain64", "cipher_null-ecb", 1)), 1)
			if bytes.Equal(forged, b) {
				t.Fatalf("no cipher found in the header: %.300s", b[4096:])
			}
			write(t, dev, luksChecksum(forged), off)
		}
	})
	m.PowerOn()
	m.Expect(`holdfast: error: .*data volume data`, bootTime)
	if strings.Contains(m.Console(), openPattern) {
		t.Error("a volume was opened")
	}
}

// TestUnextendedBank: a board whose firmware measures nothing has all-zero PCRs,
// which anybody can reproduce; such a box is refused at its first boot (F27) and
// a stolen disk stays shut in it.
func TestUnextendedBank(t *testing.T) {
	t.Parallel()
	p := theProduct(t)
	bare := bareBoot(t, p)
	m := hwtest.New(t, p.disk(), hwtest.Options{Bare: bare})
	m.PowerOn()
	expectRefused(t, m, `none is made: .*Nothing was measured into PCR`)
}

// bareBoot takes kernel, initrd and command line out of the UKI.
func bareBoot(t *testing.T, p *product) *hwtest.Bare {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.release(), image.UKIName))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{".linux", ".initrd"} {
		s := sectionOf(t, b, name)
		if err := os.WriteFile(filepath.Join(dir, name[1:]), b[s.RawOffset:s.RawOffset+s.VirtualSizeBytes], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &hwtest.Bare{Kernel: filepath.Join(dir, "linux"), Initrd: filepath.Join(dir, "initrd"), Cmdline: p.manifest.Cmdline}
}

// TestPowerCutsDuringFirstBoot cuts the power of new boxes at seeded random
// moments. The next boot provisions from scratch or goes on with what there is,
// and what was stored after "provisioned" is never lost.
// HOLDFAST_CUTS is their number, HOLDFAST_SEED the first seed.
func TestPowerCutsDuringFirstBoot(t *testing.T) {
	cuts, seed := environment(t, "HOLDFAST_CUTS", 2), environment(t, "HOLDFAST_SEED", 1)
	p := theProduct(t)
	for i := range cuts {
		t.Run(fmt.Sprintf("Seed%d", seed+i), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(uint64(seed+i), 0))
			m := hwtest.New(t, p.disk(), hwtest.Options{Forward: []int{80}, SecureBoot: p.firmwareKeys(t)})
			m.PowerOn()
			m.Expect(`first boot: provisioning`, bootTime)
			recovery, published := cutWithin(m, r)
			m.PowerOn()
			which, match := m.ExpectEither(bootTime, recoveryPattern, tpmPattern)
			if which == 0 {
				if published {
					t.Fatal("a provisioned volume was made anew")
				}
				recovery = match[1]
			}
			m.Expect(readyPattern, bootTime)
			store(t, m, "after", "the cut")
			m.PowerCut()
			if err := m.ReplaceTPM(hwtest.TPM20); err != nil {
				t.Fatal(err)
			}
			m.PowerOn()
			m.Expect(promptPattern, bootTime)
			m.Send(recovery + "\n") // the key that was shown last is the one that holds
			m.Expect(readyPattern, bootTime)
			wantRecord(t, m, "after", "the cut")
		})
	}
}

// cutWithin pulls the plug within the time a first boot takes, and says which
// recovery key was shown and whether the volume was published by then.
func cutWithin(m *hwtest.Machine, r *rand.Rand) (recovery string, published bool) {
	deadline := time.Now().Add(time.Duration(r.IntN(12000)) * time.Millisecond)
	for time.Now().Before(deadline) && !strings.Contains(m.Console(), "ready name=") {
		time.Sleep(5 * time.Millisecond)
	}
	m.PowerCut()
	console := m.Console()
	if match := recoveryRegexp.FindStringSubmatch(console); match != nil {
		recovery = match[1]
	}
	return recovery, strings.Contains(console, ": provisioned")
}

func environment(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}
