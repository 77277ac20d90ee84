package luks2

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/anatol/devmapper.go"
	"github.com/anatol/luks.go"
)

// cryptsetup runs the reference tool; stdin is for passphrases.
func cryptsetup(t testing.TB, stdin string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath("cryptsetup")
	if err != nil {
		path = "/usr/sbin/cryptsetup" // not in everybody's PATH
		if _, err := os.Stat(path); err != nil {
			t.Fatal("cryptsetup is not installed: apt-get install cryptsetup-bin")
		}
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustCryptsetup(t testing.TB, stdin string, args ...string) string {
	t.Helper()
	out, err := cryptsetup(t, stdin, args...)
	if err != nil {
		t.Fatalf("cryptsetup %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// file gives a file of testSize bytes, full of somebody else's.
func file(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "volume.img"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(dirty(t)); err != nil {
		t.Fatal(err)
	}
	return f
}

func keyFile(t testing.TB, secret string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(name, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// wantCryptsetupOpens asks for one slot, so that another that opens does not count.
func wantCryptsetupOpens(t testing.TB, image, passphrase string, slot int) {
	t.Helper()
	mustCryptsetup(t, "", "open", "--test-passphrase", "--key-slot", fmt.Sprint(slot), "--key-file", keyFile(t, passphrase), image)
}

func TestCryptsetupOpensOurs(t *testing.T) {
	for _, sectorSize := range []int{512, 4096} {
		t.Run(fmt.Sprint(sectorSize), func(t *testing.T) {
			f := file(t)
			h, err := Format(FormatOptions{
				UUID: testUUID, Label: "data", Subsystem: "holdfast", SizeBytes: testSize,
				Rand: testRand(2), SectorSize: sectorSize,
			}, testVolumeKey(t))
			if err != nil {
				t.Fatal(err)
			}
			recovery, err := GenerateRecoveryKey(testRand(7))
			if err != nil {
				t.Fatal(err)
			}
			binaryKey := string(random(t, 6, 32)) + "\x00\n"
			passphrases := []string{recovery.String(), "tpm", binaryKey, "sha256"}
			for i, k := range []KDF{RecoveryKDF(0), HighEntropyKDF(), cheapArgon, {Type: PBKDF2, Hash: "sha256", Iterations: 1000}} {
				addSlot(t, h, passphrases[i], k)
			}
			if _, err := h.SetToken(NextToken, RecoveryToken(0)); err != nil {
				t.Fatal(err)
			}
			provision(t, h, f)

			mustCryptsetup(t, "", "isLuks", "--type", "luks2", f.Name())
			for slot, passphrase := range passphrases {
				wantCryptsetupOpens(t, f.Name(), passphrase, slot)
			}
			if out, err := cryptsetup(t, "", "open", "--test-passphrase", "--key-file", keyFile(t, "wrong"), f.Name()); err == nil {
				t.Errorf("cryptsetup opens with a wrong passphrase: %s", out)
			}
			dump := mustCryptsetup(t, "", "luksDump", f.Name())
			for _, want := range []string{
				testUUID, "Label:         \tdata", "Subsystem:     \tholdfast", "offset: 16777216 [bytes]",
				fmt.Sprintf("sector: %d [bytes]", sectorSize), "0: systemd-recovery", "argon2id", "Keyslots area: \t16744448",
			} {
				if !strings.Contains(dump, want) {
					t.Errorf("luksDump does not say %q:\n%s", want, dump)
				}
			}

			// cryptsetup edits what we made, and we read it.
			mustCryptsetup(t, "", "luksAddKey", "-q", "--key-file", keyFile(t, "tpm"), "--key-slot", "9", "--pbkdf", "argon2id",
				"--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4", f.Name(), keyFile(t, "theirs"))
			mustCryptsetup(t, "", "luksKillSlot", "-q", f.Name(), "2")
			wantOpens(t, read(t, f), f, "theirs", 9)
			wantOpens(t, read(t, f), f, "tpm", 1)

			// And we edit what they edited.
			h = read(t, f)
			if err := h.RemoveKeyslot(9); err != nil {
				t.Fatal(err)
			}
			addSlot(t, h, "next", HighEntropyKDF())
			if err := h.Write(f); err != nil {
				t.Fatal(err)
			}
			wantCryptsetupOpens(t, f.Name(), "next", 2)
			if out, err := cryptsetup(t, "", "open", "--test-passphrase", "--key-file", keyFile(t, "theirs"), f.Name()); err == nil {
				t.Errorf("cryptsetup opens with the removed passphrase: %s", out)
			}
		})
	}
}

func TestWeOpenCryptsetups(t *testing.T) {
	for name, args := range map[string][]string{
		"argon2id":      {"--pbkdf", "argon2id", "--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4"},
		"pbkdf2":        {"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"},
		"sha512":        {"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha512"},
		"512 sectors":   {"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "512"},
		"label, flags":  {"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--label", "their label", "--subsystem", "x"},
		"benchmark its": {"--pbkdf", "pbkdf2", "--iter-time", "100"},
	} {
		t.Run(name, func(t *testing.T) {
			f := file(t)
			volumeKey := filepath.Join(t.TempDir(), "vk")
			if err := os.WriteFile(volumeKey, testVolumeKey(t), 0o600); err != nil {
				t.Fatal(err)
			}
			args = append([]string{"luksFormat", "-q", "--type", "luks2", "--volume-key-file", volumeKey, "--uuid", testUUID}, args...)
			mustCryptsetup(t, "", append(args, f.Name(), keyFile(t, "theirs"))...)
			h := read(t, f)
			wantOpens(t, h, f, "theirs", 0)

			slot := addSlot(t, h, "ours", cheapArgon)
			if _, err := h.SetToken(NextToken, RecoveryToken(slot)); err != nil {
				t.Fatal(err)
			}
			if err := h.Write(f); err != nil {
				t.Fatal(err)
			}
			wantCryptsetupOpens(t, f.Name(), "theirs", 0)
			wantCryptsetupOpens(t, f.Name(), "ours", slot)
			if dump := mustCryptsetup(t, "", "luksDump", f.Name()); !strings.Contains(dump, "systemd-recovery") || !strings.Contains(dump, testUUID) {
				t.Errorf("luksDump:\n%s", dump)
			}
		})
	}
}

// TestCryptsetupRefusedVariants are volumes of cryptsetup's that lie outside the subset.
func TestCryptsetupRefusedVariants(t *testing.T) {
	pbkdf := []string{"luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"256-bit key":     {[]string{"--key-size", "256"}, "keyslots.0.key_size"},
		"cbc":             {[]string{"--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"}, "segments.0.encryption"},
		"large metadata":  {[]string{"--luks2-metadata-size", "32k"}, "hdr_size is 32768"},
		"other offset":    {[]string{"--offset", "40960"}, "keyslots_size"},
		"small slot area": {[]string{"--luks2-keyslots-size", "4m"}, "keyslots_size"},
		"LUKS1":           {[]string{"--type", "luks1"}, "version is 1"},
	} {
		t.Run(name, func(t *testing.T) {
			f := file(t)
			if err := f.Truncate(32 << 20); err != nil {
				t.Fatal(err)
			}
			mustCryptsetup(t, "", append(append(append([]string{}, pbkdf...), tt.args...), f.Name(), keyFile(t, "x"))...)
			if _, _, err := Read(f, 32<<20); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

// TestTornPrimary has cryptsetup use our secondary header.
func TestTornPrimary(t *testing.T) {
	f := file(t)
	provision(t, newHeader(t), f)
	if _, err := f.WriteAt(make([]byte, sector), 5*sector); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("torn"), binaryHeaderBytes+9); err != nil {
		t.Fatal(err)
	}
	h, report, err := Read(f, testSize)
	if err != nil || !errors.Is(report.Primary.Err, errChecksum) {
		t.Fatalf("%v, %+v", err, report)
	}
	wantCryptsetupOpens(t, f.Name(), "one", 0) // and it repairs the primary header
	if err := h.Repair(f); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, read(t, f), f, "one", 0)
}

// TestPayload writes through another implementation of dm-crypt what our
// Segment and volume key say, and has cryptsetup and luks.go judge it:
// cryptsetup decrypts the whole volume in place, luks.go gives its own view of
// key and segment.
func TestPayload(t *testing.T) {
	for _, sectorSize := range []int{512, 4096} {
		t.Run(fmt.Sprint(sectorSize), func(t *testing.T) {
			f := file(t)
			h, err := Format(FormatOptions{UUID: testUUID, SizeBytes: testSize, Rand: testRand(2), SectorSize: sectorSize}, testVolumeKey(t))
			if err != nil {
				t.Fatal(err)
			}
			addSlot(t, h, "one", HighEntropyKDF())
			provision(t, h, f)
			h = read(t, f)
			key, _, err := h.Unlock(f, []byte("one"))
			if err != nil {
				t.Fatal(err)
			}
			off, size, gotSector, cipher := h.Segment()
			plain := random(t, 5, int(size))
			userspace(t, devmapper.CryptTable{
				Length: uint64(size), BackendDevice: f.Name(), BackendOffset: uint64(off),
				Encryption: cipher, Key: key, SectorSize: uint64(gotSector),
			}, os.O_RDWR, func(v devmapper.Volume) error { _, err := v.WriteAt(plain, 0); return err })

			got := make([]byte, size)
			userspace(t, luksGoTable(t, f.Name(), size), os.O_RDONLY, func(v devmapper.Volume) error { _, err := v.ReadAt(got, 0); return err })
			if !bytes.Equal(got, plain) {
				t.Error("luks.go's key and segment give other data")
			}

			// Decryption moves the data to the start of the file, and the header
			// into a file of its own.
			detached := filepath.Join(t.TempDir(), "header")
			mustCryptsetup(t, "", "reencrypt", "-q", "--decrypt", "--force-offline-reencrypt", "--header", detached, "--key-file", keyFile(t, "one"), f.Name())
			if _, err := f.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, plain) {
				t.Error("cryptsetup decrypts the volume to other data")
			}
		})
	}
}

func userspace(t testing.TB, table devmapper.CryptTable, flag int, use func(devmapper.Volume) error) {
	t.Helper()
	v, err := devmapper.OpenUserspaceVolume(flag, 0, table)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(use(v), v.Close()); err != nil {
		t.Fatal(err)
	}
}

// luksGoTable unlocks with luks.go, which keeps the key in an unexported field.
func luksGoTable(t testing.TB, image string, size int64) devmapper.CryptTable {
	t.Helper()
	d, err := luks.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	v, err := d.UnsealVolume(0, []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	return devmapper.CryptTable{
		Length: uint64(size), BackendDevice: image, BackendOffset: v.StorageOffset, IVTweak: v.StorageIvTweak,
		Encryption: v.StorageEncryption, SectorSize: v.StorageSectorSize,
		Key: reflect.ValueOf(v).Elem().FieldByName("key").Bytes(),
	}
}

// TestReleasedVolume opens a volume of the first released layout (F53): slot 0
// argon2id, made by this package; slot 1 and its token, by systemd-cryptenroll
// 252 --recovery-key. The file ends behind the last key area.
func TestReleasedVolume(t *testing.T) {
	const systemdKey = "unicdkgr-cunhcnjr-lktvutlr-hgvfhhfu-flrngcne-hilbgeej-cnrvcurk-tbhuldct"
	z, err := os.Open("testdata/v1.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	r, err := gzip.NewReader(z)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := io.ReadAll(io.LimitReader(r, testSize))
	if err != nil {
		t.Fatal(err)
	}
	dev := make(memory, testSize)
	copy(dev, stored)
	h := read(t, dev)
	if h.Label() != "data" || h.Subsystem() != "holdfast" || h.UUID() != testUUID {
		t.Errorf("label %q, subsystem %q, uuid %s", h.Label(), h.Subsystem(), h.UUID())
	}
	wantOpens(t, h, dev, "two", 0)
	k, err := ParseRecoveryKey([]byte(strings.ToUpper(strings.ReplaceAll(systemdKey, "-", " "))))
	if err != nil {
		t.Fatal(err)
	}
	wantOpens(t, h, dev, string(k.Passphrase()), 1)
	if got := h.Tokens()[0]; !sameJSON(t, got, RecoveryToken(1)) {
		t.Errorf("systemd's token is %s, ours is %s", got, RecoveryToken(1))
	}
}
