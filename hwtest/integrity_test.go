package hwtest_test

import (
	"bytes"
	"crypto/aes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/xts"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// authenticatedVolume: a volume with integrity is made by the agent and read by
// cryptsetup on another kernel; what cryptsetup makes we read; and a bit that is
// flipped on the disk is a read error that the agent names, not other data.
func authenticatedVolume(t *testing.T) {
	dir := t.TempDir()
	k, err := keys.Create(filepath.Join(dir, "keys"), keys.Config{Organization: "Test vendor", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	p := buildRelease(t, dir, k, "1.0.0", func(s *spec.Spec) {
		s.Disk.Size = 384 << 20
		s.Disk.Data[0].Integrity = luks2.HMACSHA256
	})
	m := hwtest.New(t, p.disk(), hwtest.Options{Forward: []int{80}})
	m.PowerOn()
	recovery := m.Expect(recoveryPattern, bootTime)[1]
	m.Expect(readyPattern, bootTime)
	record := strings.Repeat("a record that is authenticated. ", 1<<13)
	store(t, m, "first", record)
	for i := range 8 { // so that no copy of the record is left in the journal
		store(t, m, "later"+itoa(int64(i)), strings.Repeat(itoa(int64(i)), 1<<20))
	}
	if s := statusIn(t, m.Console()); len(s.Volumes) != 1 || s.Volumes[0].Integrity != luks2.HMACSHA256 || len(s.Problems) != 0 {
		t.Errorf("volumes %+v, problems %q", s.Volumes, s.Problems)
	}
	m.PowerButton(bootTime)

	judgeIntegrity(t, m.Disk, recovery, record)

	// A larger disk changes nothing, and that is said.
	info, err := os.Stat(m.Disk)
	if err != nil {
		t.Fatal(err)
	}
	flipRecord(t, m.Disk, recovery)
	if err := os.Truncate(m.Disk, info.Size()+(512<<20)); err != nil {
		t.Fatal(err)
	}
	m.PowerOn()
	m.Expect(`data volume data is not grown: .* a volume with integrity keeps the size it was made with`, bootTime)
	m.Expect(tpmPattern, bootTime)
	m.Expect(readyPattern, bootTime)
	wantRecord(t, m, "later7", strings.Repeat("7", 1<<20))
	if got, err := call(m, "GET", "/record/first", ""); err == nil {
		t.Errorf("a record that was changed on the disk is read: %d bytes, equal to what was written: %v", len(got), got == record)
	}
	m.Expect(`data volume data: sector [0-9]+ is not as it was written and cannot be read`, bootTime)
}

// judgeIntegrity starts cryptsetup on the disk and on others.
func judgeIntegrity(t *testing.T, disk, recovery, record string) {
	t.Helper()
	root := os.Getenv("HOLDFAST_SYSTEMD_ROOT")
	if root == "" {
		t.Fatal("HOLDFAST_SYSTEMD_ROOT is not set: run make campaign")
	}
	dir := t.TempDir()
	goBuild(t, filepath.Join(dir, "judge"), "./testdata/judge")
	bare, err := hwtest.BareSystem{
		Kernel: filepath.Join(inputs(t), "linux-image.deb"), Root: root, Init: filepath.Join(dir, "judge"),
		Modules: []string{"virtio_pci", "virtio_blk", "dm_mod", "dm_crypt", "dm_integrity", "xts", "authenc", "hmac", "sha256_ssse3", "aesni_intel", "ext4", "algif_skcipher"},
		Cmdline: "key=" + recovery,
	}.Make(dir)
	if err != nil {
		t.Fatal(err)
	}
	drives := []hwtest.Drive{{Image: disk}}
	for _, name := range []string{"theirs", "plain"} {
		image := filepath.Join(dir, name)
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, 80<<20); err != nil {
			t.Fatal(err)
		}
		drives = append(drives, hwtest.Drive{Image: image})
	}
	m := hwtest.New(t, "", hwtest.Options{Bare: bare, TPM: hwtest.TPMAbsent, Drives: drives})
	m.PowerOn()
	m.WaitOff(bootTime)
	console := strings.ReplaceAll(m.Console(), "\r", "")
	for _, want := range []string{
		`(?m)^STATUS cipher: aes-xts-plain64$`, `(?m)^STATUS integrity: hmac\(sha256\)$`,
		fmt.Sprintf(`(?m)^OURS %x$`, sha256.Sum256([]byte(record))),
		`(?m)^THEIRS ok$`, `(?m)^TAMPERED true read .* invalid or incomplete multibyte`, `(?m)^SPEED plain `,
	} {
		if !regexp.MustCompile(want).MatchString(console) {
			t.Errorf("the judge does not say %q:\n%s", want, console)
		}
	}
	for _, line := range regexp.MustCompile(`(?m)^SPEED .*$`).FindAllString(console, -1) {
		t.Log(line)
	}
}

// flipRecord flips one bit of the ciphertext of the record, which it finds with the
// recovery key: dm-integrity puts 256 sectors of tags before each 32768 of data.
func flipRecord(t *testing.T, disk, recovery string) {
	t.Helper()
	const block, sector, areaSectors, tagSectors = 4096, 512, 32768, 256
	d, _ := openDisk(t, disk)
	dev, p, err := d.Partition("data")
	if err != nil {
		t.Fatal(err)
	}
	key, offset := volumeKey(t, dev, p.SizeBytes, recovery)
	x, err := xts.NewCipher(aes.NewCipher, key[:luks2.VolumeKeyBytes])
	if err != nil {
		t.Fatal(err)
	}
	all := make([]byte, p.SizeBytes-offset)
	if _, err := dev.ReadAt(all, offset); err != nil {
		t.Fatal(err)
	}
	plain := make([]byte, block)
	// The file system's superblock is sector 0; the journal, which comes first, may have
	// copies of it.
	base := -1
	for at := 0; at+block <= 32<<20; at += block {
		x.Decrypt(plain, all[at:at+block], 0)
		if binary.LittleEndian.Uint16(plain[1024+56:]) == 0xef53 && bytes.HasPrefix(plain[1024+120:], []byte("data\x00")) {
			base = at
		}
	}
	if base < 0 {
		t.Fatal("the file system is not found")
	}
	for s := 0; ; s += block / sector {
		at := base + (s/areaSectors*(areaSectors+tagSectors)+s%areaSectors)*sector
		if at+block > len(all) {
			t.Fatal("the record is not found")
		}
		x.Decrypt(plain, all[at:at+block], uint64(s))
		if bytes.Contains(plain, []byte("a record that is authenticated.")) {
			if _, err := dev.WriteAt([]byte{all[at+100] ^ 1}, offset+int64(at)+100); err != nil {
				t.Fatal(err)
			}
			t.Logf("flipped a bit of sector %d", s)
			return
		}
	}
}

// volumeKey is what somebody with the recovery key has, and where the data lies.
func volumeKey(t *testing.T, dev partition.Device, sizeBytes int64, recovery string) (key []byte, offset int64) {
	t.Helper()
	h, report, err := luks2.Read(dev, sizeBytes)
	if err != nil || !report.Sound() || h.Integrity() != luks2.HMACSHA256 {
		t.Fatalf("header %+v, %v", report, err)
	}
	if key, _, err = h.Unlock(dev, []byte(recovery)); err != nil {
		t.Fatal(err)
	}
	offset, _, _, _ = h.Segment()
	return key, offset
}
