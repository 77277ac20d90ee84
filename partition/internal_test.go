package partition

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

func TestStructSizes(t *testing.T) {
	for _, c := range []struct {
		of   any
		want int
	}{
		{protectiveMBR{}, 512},
		{mbrRecord{}, 16},
		{gptHeader{}, gptHeaderSize},
		{gptEntry{}, entryBytes},
	} {
		if got := binary.Size(c.of); got != c.want {
			t.Errorf("%T has %d bytes, the specification says %d", c.of, got, c.want)
		}
	}
}

func TestGUID(t *testing.T) {
	// UEFI 2.10 appendix A: the first three groups are little-endian.
	g, err := parseGUID(TypeESP)
	if err != nil {
		t.Fatal(err)
	}
	want := [16]byte{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}
	if g != want {
		t.Errorf("got % x, want % x", g, want)
	}
	if back := formatGUID(g); back != TypeESP {
		t.Errorf("format gives %s", back)
	}
	for _, bad := range []string{"", "c12a7328", "c12a7328f81f11d2ba4b00a0c93ec93b", TypeESP + "0", strings.Replace(TypeESP, "c", "x", 1)} {
		if _, err := parseGUID(bad); err == nil {
			t.Errorf("GUID %q was accepted", bad)
		}
	}
	a, b := seededGUID("x", "disk"), seededGUID("x", "partition esp")
	if a == b || a != seededGUID("x", "disk") || a[14] != '8' || !strings.ContainsRune("89ab", rune(a[19])) {
		t.Errorf("seeded GUIDs %s and %s are not distinct, repeatable version 8 UUIDs", a, b)
	}
}

// TestTableAttacks changes single facts of a valid table, with checksums made right again.
func TestTableAttacks(t *testing.T) {
	l, err := Plan(Spec{SizeBytes: 256 << 20, ESPBytes: 64 << 20, SlotBytes: 8 << 20, Seed: "t", Volumes: []VolumeSpec{{Name: "data"}}})
	if err != nil {
		t.Fatal(err)
	}
	sectors := l.SizeBytes / sectorBytes
	for name, change := range map[string]func(h *gptHeader, entries []gptEntry){
		"partition behind the end":      func(_ *gptHeader, e []gptEntry) { e[3].EndingLBA = uint64(sectors) },
		"partition over the primary":    func(_ *gptHeader, e []gptEntry) { e[0].StartingLBA = 2 },
		"partition of negative length":  func(_ *gptHeader, e []gptEntry) { e[1].EndingLBA = e[1].StartingLBA - 1 },
		"partition up to 2^64-1":        func(_ *gptHeader, e []gptEntry) { e[3].EndingLBA = 1<<64 - 1 },
		"overlap":                       func(_ *gptHeader, e []gptEntry) { e[1].EndingLBA = e[2].StartingLBA },
		"one name twice":                func(_ *gptHeader, e []gptEntry) { e[2].PartitionName = e[1].PartitionName },
		"hole in the entries":           func(_ *gptHeader, e []gptEntry) { e[1] = gptEntry{} },
		"name with a lone surrogate":    func(_ *gptHeader, e []gptEntry) { e[0].PartitionName[0] = 0xD800 },
		"name with text behind its end": func(_ *gptHeader, e []gptEntry) { e[0].PartitionName[35] = 'x' },
		"4 billion entries":             func(h *gptHeader, _ []gptEntry) { h.NumberOfPartitionEntries = 1<<32 - 1 },
		"entries of 4 GiB":              func(h *gptHeader, _ []gptEntry) { h.SizeOfPartitionEntry = 1<<32 - 1 },
		"entries at the last LBA":       func(h *gptHeader, _ []gptEntry) { h.PartitionEntryLBA = uint64(sectors - 1) },
		"backup behind the device":      func(h *gptHeader, _ []gptEntry) { h.AlternateLBA = uint64(sectors) },
		"backup at 2^64-1":              func(h *gptHeader, _ []gptEntry) { h.AlternateLBA = 1<<64 - 1 },
		"backup inside the primary":     func(h *gptHeader, _ []gptEntry) { h.AlternateLBA = 3 },
		"header that lies elsewhere":    func(h *gptHeader, _ []gptEntry) { h.MyLBA = 2 },
		"unusable usable range":         func(h *gptHeader, _ []gptEntry) { h.LastUsableLBA = 1<<64 - 1 },
		"newer revision":                func(h *gptHeader, _ []gptEntry) { h.Revision = 0x00020000 },
		"header of 4 GiB":               func(h *gptHeader, _ []gptEntry) { h.HeaderSize = 1<<32 - 1 },
	} {
		array, primary, _, err := encodeTable(l)
		if err != nil {
			t.Fatal(err)
		}
		var h gptHeader
		decodeStruct(primary, &h)
		entries := make([]gptEntry, entryCount)
		decodeStruct(array, entries)
		change(&h, entries)
		array = appendStruct(nil, entries)
		h.PartitionEntryArrayCRC32 = crc32.ChecksumIEEE(array)
		if h, err = decodeHeader(h.encode(), primaryLBA, sectors); err == nil {
			_, err = decodeEntries(array, h)
		}
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzGPT(f *testing.F) {
	l, err := Plan(Spec{SizeBytes: 256 << 20, ESPBytes: 64 << 20, SlotBytes: 8 << 20, Seed: "fuzz", Volumes: []VolumeSpec{{Name: "data"}}})
	if err != nil {
		f.Fatal(err)
	}
	array, primary, _, err := encodeTable(l)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(primary, array, true)
	f.Add(primary, array, false)
	sectors := l.SizeBytes / sectorBytes
	f.Fuzz(func(t *testing.T, header, array []byte, fix bool) {
		header = append(header, make([]byte, sectorBytes)...)[:sectorBytes]
		array = append(array, make([]byte, entryCount*entryBytes)...)[:entryCount*entryBytes]
		if fix { // the checksums keep a fuzzer out
			var h gptHeader
			decodeStruct(header, &h)
			h.PartitionEntryArrayCRC32 = crc32.ChecksumIEEE(array)
			header = h.encode()
		}
		h, err := decodeHeader(header, primaryLBA, sectors)
		if err != nil {
			return
		}
		parts, err := decodeEntries(array, h)
		if err != nil {
			return
		}
		l := Layout{DiskGUID: formatGUID(h.DiskGUID), SizeBytes: h.sizeBytes(), Partitions: parts}
		again, primary, backup, err := encodeTable(l)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		dev := NewMemory(sectors * sectorBytes)
		if err := errorsOf(writeAt(dev, primary, sectorBytes), writeAt(dev, again, 2*sectorBytes), writeAt(dev, backup, l.SizeBytes-sectorBytes),
			writeAt(dev, again, l.SizeBytes-backupSectors*sectorBytes)); err != nil {
			t.Fatal(err)
		}
		// The MBR is missing on purpose: only Grow minds.
		back, health, err := readTable(dev)
		if err != nil || health.primary != nil || health.backup != nil {
			t.Fatalf("what was written cannot be read: %v %+v", err, health)
		}
		if !reflect.DeepEqual(back, l) {
			t.Fatalf("read %+v, wrote %+v", back, l)
		}
	})
}

func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func FuzzEntryName(f *testing.F) {
	for _, s := range []string{
		"holdfast-a-000000000001.conf", "holdfast-b-000000000002+3.conf", "holdfast-b-000000000002+2-1.conf",
		"holdfast-b-000000000002+0-3.conf", "HOLDFAST-A-999999999999+00003-0.CONF", "holdfast-c-000000000001.conf",
		"holdfast-a-000000000000.conf", "holdfast-a-1.conf", "holdfast-a-000000000001+.conf", "auto-x.conf", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		e, ok := parseEntryName(name)
		if !ok {
			return
		}
		canonical := formatEntryName(e)
		back, ok := parseEntryName(canonical)
		if !ok {
			t.Fatalf("%q: its own form %q is not accepted", name, canonical)
		}
		back.FileName = e.FileName
		if back != e {
			t.Fatalf("%q: %+v, and %q: %+v", name, e, canonical, back)
		}
		if n := len(canonical); n < 28 || n > 45 || e.TriesLeft <= maxTries && e.TriesDone <= 99999 && n > 39 {
			t.Fatalf("%q has %d characters", canonical, n)
		}
	})
}

func FuzzEntry(f *testing.F) {
	e := Entry{Slot: SlotB, Sequence: 7, Title: "Acme Gate 1.2", Version: "1.2", ReleaseID: "acme-1.2", RootHash: strings.Repeat("0f", 32), UKI: "/EFI/holdfast/b-00.efi"}
	f.Add(formatEntry(e, "x64"))
	f.Add([]byte("version 000000000007\r\nefi /x\r\n"))
	f.Add([]byte("version 000000000008\nefi /x\n"))
	f.Add([]byte("version 000000000007\nversion 000000000007\nefi /x\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got := Entry{Slot: SlotB, Sequence: 7}
		if parseEntry(&got, text) != nil {
			return
		}
		back := Entry{Slot: SlotB, Sequence: 7}
		if err := parseEntry(&back, formatEntry(got, "x64")); err != nil {
			t.Fatalf("%+v: what was read cannot be written: %v", got, err)
		}
		if back != got {
			t.Fatalf("read %+v, again %+v", got, back)
		}
	})
}

func TestEntryRoundTrip(t *testing.T) {
	want := Entry{Slot: SlotA, Sequence: 12, Counted: true, TriesLeft: 2, TriesDone: 1, Title: "Acme Gäte", Version: "2.0~rc1",
		ReleaseID: "sha256:abc", RootHash: strings.Repeat("a0", 32), UKI: "/EFI/holdfast/a-0011223344556677.efi"}
	want.FileName = formatEntryName(want)
	if want.FileName != "holdfast-a-000000000012+2-1.conf" {
		t.Errorf("file name %s", want.FileName)
	}
	got, ok := parseEntryName(want.FileName)
	if !ok {
		t.Fatal("own name not accepted")
	}
	text := formatEntry(want, "x64")
	if err := parseEntry(&got, text); err != nil || got != want {
		t.Errorf("got %+v (%v), want %+v", got, err, want)
	}
	if !bytes.Contains(text, []byte("\nversion 000000000012\nsort-key holdfast\narchitecture x64\nefi /EFI/holdfast/a-0011223344556677.efi\n")) {
		t.Errorf("entry:\n%s", text)
	}
}

// TestVerifiedReader: a reader that takes exactly the promised bytes and never
// asks for the end does not get the last of a wrong content either.
func TestVerifiedReader(t *testing.T) {
	good := Bytes("the content that was signed")
	for text, ok := range map[string]bool{string(good): true, "the content that was sawned": false} {
		r := &verifiedReader{r: io.NopCloser(iotest.OneByteReader(strings.NewReader(text))), rest: good.Size(), want: good.SHA256(), hash: sha256.New()}
		got := make([]byte, len(good))
		if n, err := io.ReadFull(r, got); (err == nil) != ok || ok != (n == len(good)) {
			t.Errorf("%q: %d bytes, %v", text, n, err)
		}
	}
}
