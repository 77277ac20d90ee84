package luks2

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// authenticated formats a volume with integrity and one cheap slot, "one".
func authenticated(t testing.TB, sectorSize int) *Header {
	t.Helper()
	key := random(t, 1, KeyBytes(HMACSHA256))
	h, err := Format(FormatOptions{UUID: testUUID, SizeBytes: testSize, Rand: testRand(2), SectorSize: sectorSize, Integrity: HMACSHA256}, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.AddKeyslot(key, []byte("one"), HighEntropyKDF(), testRand(3)); err != nil {
		t.Fatal(err)
	}
	return h
}

const integrityObject = `,"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`

// TestCryptsetupOpensIntegrity has cryptsetup read the header, open the keyslot and
// add another that we open.
func TestCryptsetupOpensIntegrity(t *testing.T) {
	for _, sectorSize := range []int{512, 4096} {
		t.Run(fmt.Sprint(sectorSize), func(t *testing.T) {
			f := file(t)
			provision(t, authenticated(t, sectorSize), f)
			wantCryptsetupOpens(t, f.Name(), "one", 0)
			dump := mustCryptsetup(t, "", "luksDump", f.Name())
			for _, want := range []string{"integrity: hmac(sha256)", "cipher: aes-xts-plain64", "Key:        768 bits", fmt.Sprintf("sector: %d [bytes]", sectorSize)} {
				if !strings.Contains(dump, want) {
					t.Errorf("luksDump does not say %q:\n%s", want, dump)
				}
			}
			mustCryptsetup(t, "", "luksAddKey", "-q", "--key-file", keyFile(t, "one"), "--pbkdf", "pbkdf2",
				"--pbkdf-force-iterations", "1000", f.Name(), keyFile(t, "theirs"))
			h := read(t, f)
			key, slot, err := h.Unlock(f, []byte("theirs"))
			if err != nil || slot != 1 || string(key) != string(random(t, 1, KeyBytes(HMACSHA256))) {
				t.Errorf("slot %d, %d bytes, %v", slot, len(key), err)
			}
			if h.Integrity() != HMACSHA256 {
				t.Errorf("integrity %q", h.Integrity())
			}
			if _, err := h.AddKeyslot(key, []byte("next"), HighEntropyKDF(), nil); err != nil {
				t.Fatal(err)
			}
			if err := h.Write(f); err != nil {
				t.Fatal(err)
			}
			wantCryptsetupOpens(t, f.Name(), "next", 2)
		})
	}
}

// TestIntegrityDowngrade: somebody who takes the tags' description out of the header
// gets no volume that is read without them (F81).
func TestIntegrityDowngrade(t *testing.T) {
	for _, tt := range []struct {
		name    string
		edits   [][2]string
		refused string // "" is that no keyslot opens
	}{
		{"integrity left out", [][2]string{{integrityObject, ""}}, "key_size is 96, outside 64 to 64"},
		{"and a key for that", [][2]string{{integrityObject, ""}, {`"key_size":96`, `"key_size":64`}}, ""},
		{"and a key area for that", [][2]string{{integrityObject, ""}, {`"key_size":96`, `"key_size":64`}, {`"size":"385024"`, `"size":"258048"`}}, ""},
		{"cipher_null below the tags", [][2]string{{`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"cipher_null-ecb","sector_size"`}}, "segments.0.encryption"},
		{"another tag", [][2]string{{`"hmac(sha256)"`, `"none"`}}, "segments.0.integrity.type"},
		{"weaker tag", [][2]string{{`"hmac(sha256)"`, `"hmac(sha1)"`}}, "segments.0.integrity.type"},
		{"no journal", [][2]string{{`"keyslots_size":"16744448"`, `"keyslots_size":"16744448","flags":["no-journal"]`}}, "no-journal"},
		{"recovery mode, which checks nothing", [][2]string{{`"keyslots_size":"16744448"`, `"keyslots_size":"16744448","flags":["integrity-recovery"]`}}, "integrity-recovery"},
		{"journal encryption", [][2]string{{`"journal_encryption":"none"`, `"journal_encryption":"cipher_null"`}}, "journal_encryption"},
		{"key size in the tags", [][2]string{{`"type":"hmac(sha256)"`, `"type":"hmac(sha256)","key_size":0`}}, `field "key_size"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := dirty(t)
			provision(t, authenticated(t, 4096), dev)
			for _, w := range []which{primary, secondary} {
				c := decodeForEdit(t, dev, w)
				text, _, _ := strings.Cut(string(c.json), "\x00")
				for _, e := range tt.edits {
					if !strings.Contains(text, e[0]) {
						t.Fatalf("%q is not in %s", e[0], text)
					}
					text = strings.Replace(text, e[0], e[1], 1)
				}
				put(t, dev, w, c.bin, text)
			}
			h, _, err := Read(dev, testSize)
			if tt.refused != "" {
				if err == nil || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("error %v, want one with %q", err, tt.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := h.Unlock(dev, []byte("one")); !errors.Is(err, ErrPassphrase) {
				t.Errorf("error %v, want ErrPassphrase", err)
			}
		})
	}
}

func TestIntegrityFormatRefuses(t *testing.T) {
	o := FormatOptions{UUID: testUUID, SizeBytes: testSize, Integrity: HMACSHA256}
	if _, err := Format(o, testVolumeKey(t)); err == nil || !strings.Contains(err.Error(), "64 bytes, not 96") {
		t.Errorf("short key: %v", err)
	}
	o.Integrity = "crc32c"
	if _, err := Format(o, testVolumeKey(t)); err == nil || !strings.Contains(err.Error(), `"crc32c"`) {
		t.Errorf("unkeyed: %v", err)
	}
}
