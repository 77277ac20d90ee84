package uki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

const (
	stubPath = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	bootPath = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
)

func readTool(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%s not installed: apt-get install systemd-boot-efi", path)
	}
	return b
}

// run executes a judge and returns what it printed.
func run(t testing.TB, pkg string, argv ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Fatalf("%s not installed: apt-get install %s", argv[0], pkg)
	}
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	return string(out), err
}

func mustRun(t testing.TB, pkg string, argv ...string) string {
	t.Helper()
	out, err := run(t, pkg, argv...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return out
}

func write(t testing.TB, b Blob) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.efi")
	if err := os.WriteFile(path, content(t, b), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func content(t testing.TB, b Blob) []byte {
	t.Helper()
	r, err := b.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// An odd buffer, so that no part boundary is ever met by luck.
	var buf bytes.Buffer
	if _, err := io.CopyBuffer(struct{ io.Writer }{&buf}, struct{ io.Reader }{r}, make([]byte, 997)); err != nil {
		t.Fatal(err)
	}
	if int64(buf.Len()) != b.Size() {
		t.Fatalf("blob has %d bytes and says %d", buf.Len(), b.Size())
	}
	return buf.Bytes()
}

func mustParse(t testing.TB, b []byte) *File {
	t.Helper()
	f, err := Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// program is a small PE file with the given sections.
func program(machine uint16, sections map[string][]byte, names ...string) []byte {
	const headBytes = 1024
	head := make([]byte, dosHeaderBytes, headBytes)
	copy(head, "MZ")
	le.PutUint32(head[offLFANew:], dosHeaderBytes)
	head = append(head, peSignature...)
	opt := optionalHeader{Magic: magicPE32Plus, SectionAlignment: 4096, FileAlignment: 512,
		SizeOfHeaders: headBytes, Subsystem: 10, NumberOfRvaAndSizes: 16, AddressOfEntryPoint: 4096}
	var table []sectionHeader
	var body []byte
	vma := uint32(4096)
	for _, name := range names {
		sh := sectionHeader{VirtualSize: uint32(len(sections[name])), VirtualAddress: vma,
			SizeOfRawData:    align(uint32(len(sections[name])), 512),
			PointerToRawData: uint32(headBytes + len(body)), Characteristics: scnInitialized | scnRead}
		copy(sh.Name[:], name)
		table = append(table, sh)
		body = append(body, sections[name]...)
		body = append(body, make([]byte, int(sh.SizeOfRawData)-len(sections[name]))...)
		vma = align(vma+sh.VirtualSize, 4096)
	}
	opt.SizeOfImage = vma
	coff := coffHeader{Machine: machine, NumberOfSections: uint16(len(table)), SizeOfOptionalHeader: 240, Characteristics: 0x206}
	for _, data := range []any{coff, opt, [16]dataDirectory{}, table} {
		head, _ = binary.Append(head, le, data)
	}
	return append(head[:headBytes:headBytes], body...)
}

func kernel(machine uint16) []byte {
	return program(machine, map[string][]byte{".text": bytes.Repeat([]byte{0x90}, 5000)}, ".text")
}

func smallStub() []byte {
	return program(MachineAMD64, map[string][]byte{".text": []byte("code"), ".sbat": []byte("sbat,1,a,b,1,c\nsystemd,1,d,e,252,f\n\x00"),
		".sdmagic": []byte("#### LoaderInfo")}, ".text", ".sbat", ".sdmagic")
}

func input(stub []byte) Input {
	return Input{
		Stub:         stub,
		Linux:        memory(kernel(MachineAMD64)),
		Initrd:       memory(bytes.Repeat([]byte("070701"), 333)),
		OSRelease:    []byte("ID=demo\nVERSION_ID=1\n"),
		Cmdline:      "console=ttyS0 panic=10",
		Uname:        "6.1.0-1-cloud-amd64",
		SBAT:         "holdfast.demo,1,Demo GmbH,demo,1,https://demo.example/",
		PCRPublicKey: []byte("-----BEGIN PUBLIC KEY-----\n"),
		PCRSig: func(m []pcr.Measured) ([]byte, error) {
			return fmt.Appendf(nil, `{"sha256":"%x"}`, pcr.UKI(m)), nil
		},
	}
}

// keyPair makes a db key and writes it for the judges.
func keyPair(t testing.TB, name string) (key *rsa.PrivateKey, cert *x509.Certificate, keyPath, certPath string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(77), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Unix(1_700_000_000, 0), NotAfter: time.Unix(2_000_000_000, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pk8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	keyPath, certPath = filepath.Join(dir, "db.key"), filepath.Join(dir, "db.pem")
	for path, b := range map[string]*pem.Block{keyPath: {Type: "PRIVATE KEY", Bytes: pk8}, certPath: {Type: "CERTIFICATE", Bytes: der}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return key, cert, keyPath, certPath
}

func TestStructSizes(t *testing.T) {
	for _, row := range []struct {
		v    any
		want int
	}{{coffHeader{}, coffHeaderBytes}, {optionalHeader{}, optionalHeaderBytes}, {dataDirectory{}, dataDirectoryBytes}, {sectionHeader{}, sectionHeaderBytes}} {
		if got := binary.Size(row.v); got != row.want {
			t.Errorf("%T has %d bytes, want %d", row.v, got, row.want)
		}
	}
}

// TestJudges has the reference tools look at one image built on the real stub.
func TestJudges(t *testing.T) {
	in := input(readTool(t, stubPath))
	im, err := Assemble(in)
	if err != nil {
		t.Fatal(err)
	}
	key, cert, _, certPath := keyPair(t, "judges")
	signed, err := Sign(im, key, cert)
	if err != nil {
		t.Fatal(err)
	}
	path := write(t, signed)

	if out := mustRun(t, "sbsigntool", "sbverify", "--cert", certPath, path); !strings.Contains(out, "Signature verification OK") || strings.Contains(out, "warning") {
		t.Errorf("sbverify says %q", out)
	}
	_, _, _, otherCert := keyPair(t, "judges") // the same name, another key
	if out, err := run(t, "sbsigntool", "sbverify", "--cert", otherCert, path); err == nil {
		t.Errorf("sbverify accepts another key: %s", out)
	}
	table := mustRun(t, "binutils", "objdump", "-h", path)
	f := mustParse(t, content(t, signed))
	for _, s := range f.Sections {
		line := fmt.Sprintf("%-13s %08x  %016x  %016x  %08x", s.Name, s.VirtualSizeBytes, s.VirtualAddress, s.VirtualAddress, s.RawOffset)
		if strings.Count(table, " "+s.Name+" ") != 1 || !strings.Contains(table, line) {
			t.Errorf("objdump does not show %q:\n%s", line, table)
		}
	}
	judgeContents(t, path, in)
	judgeMeasurement(t, in, im)
	if err := f.Verify(cert); err != nil {
		t.Error(err)
	}
	measured, err := f.Measured()
	if err != nil || pcr.UKI(measured) != im.PCR11 {
		t.Errorf("read back: PCR 11 is %x, %v; assembled %x", pcr.UKI(measured), err, im.PCR11)
	}
}

// judgeContents has objcopy extract the sections. It gives file sizes, so what
// follows the content must be padding.
func judgeContents(t *testing.T, path string, in Input) {
	t.Helper()
	for name, want := range map[string][]byte{".cmdline": []byte(in.Cmdline), ".osrel": in.OSRelease, ".initrd": in.Initrd.(memory),
		".linux": in.Linux.(memory), ".uname": []byte(in.Uname)} {
		out := filepath.Join(t.TempDir(), "section")
		mustRun(t, "binutils", "objcopy", "-O", "binary", "--only-section="+name, path, out)
		got, err := os.ReadFile(out)
		if err != nil || !bytes.HasPrefix(got, want) || len(bytes.Trim(got[len(want):], "\x00")) > 0 {
			t.Errorf("objcopy extracts %d bytes of %s, %v; want the %d put in", len(got), name, err, len(want))
		}
	}
}

func judgeMeasurement(t *testing.T, in Input, im *Image) {
	t.Helper()
	dir := t.TempDir()
	argv := []string{"/lib/systemd/systemd-measure", "calculate", "--bank=sha256", "--json=short", "--phase=enter-initrd", "--phase=enter-initrd:leave-initrd"}
	for name, b := range map[string][]byte{"linux": in.Linux.(memory), "initrd": in.Initrd.(memory), "osrel": in.OSRelease,
		"cmdline": []byte(in.Cmdline), "pcrpkey": in.PCRPublicKey} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		argv = append(argv, "--"+name+"="+filepath.Join(dir, name))
	}
	var said map[string][]struct{ Hash string }
	out := mustRun(t, "systemd", argv...)
	if err := json.Unmarshal([]byte(out), &said); err != nil || len(said["sha256"]) != 2 {
		t.Fatalf("systemd-measure: %v in %s", err, out)
	}
	v := pcr.Extend(im.PCR11, []byte("enter-initrd"))
	if got := hex.EncodeToString(v[:]); got != said["sha256"][0].Hash {
		t.Errorf("PCR 11 at enter-initrd: %s, systemd-measure %s", got, said["sha256"][0].Hash)
	}
	v = pcr.Extend(v, []byte("leave-initrd"))
	if got := hex.EncodeToString(v[:]); got != said["sha256"][1].Hash {
		t.Errorf("PCR 11 at leave-initrd: %s, systemd-measure %s", got, said["sha256"][1].Hash)
	}
}

func TestContentsAndReproducible(t *testing.T) {
	key, cert, _, _ := keyPair(t, "twice")
	for _, size := range []int{1, 511, 512, 513, 4096, 100_003} {
		in := input(smallStub())
		in.Initrd = memory(bytes.Repeat([]byte{0xAA}, size))
		var first []byte
		for range 2 {
			im, err := Assemble(in)
			if err != nil {
				t.Fatal(err)
			}
			signed, err := Sign(im, key, cert)
			if err != nil {
				t.Fatal(err)
			}
			got := content(t, signed)
			if first != nil && !bytes.Equal(first, got) {
				t.Fatalf("initrd of %d bytes: two builds differ", size)
			}
			first = got
		}
		f := mustParse(t, first)
		for name, want := range map[string]string{
			".cmdline": in.Cmdline, ".osrel": string(in.OSRelease), ".uname": in.Uname, ".pcrpkey": string(in.PCRPublicKey),
			".initrd": string(in.Initrd.(memory)), ".linux": string(in.Linux.(memory)), ".text": "code", ".sdmagic": "#### LoaderInfo",
			".sbat": "sbat,1,a,b,1,c\nsystemd,1,d,e,252,f\n" + in.SBAT + "\n",
		} {
			r, err := f.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(r); err != nil || string(got) != want {
				t.Errorf("initrd of %d bytes: %s holds %q, %v", size, name, got, err)
			}
		}
		if last := f.Sections[len(f.Sections)-1].Name; last != ".linux" {
			t.Errorf("the last section is %s", last)
		}
		if err := f.Verify(cert); err != nil {
			t.Error(err)
		}
	}
}

// TestPCRSig checks that the signature callback sees what the stub measures.
func TestPCRSig(t *testing.T) {
	im, err := Assemble(input(smallStub()))
	if err != nil {
		t.Fatal(err)
	}
	r, err := mustParse(t, content(t, im)).Open(".pcrsig")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if want := fmt.Sprintf(`{"sha256":"%x"}`, im.PCR11); err != nil || string(got) != want {
		t.Errorf(".pcrsig is %s, %v, want %s", got, err, want)
	}
	var names []string
	for _, m := range im.Measured {
		names = append(names, m.Name)
	}
	if got := strings.Join(names, " "); got != ".linux .osrel .cmdline .initrd .pcrpkey" {
		t.Errorf("measured in order %s", got)
	}
}

// TestSignLoader signs systemd-boot, and reads what sbsign makes.
func TestSignLoader(t *testing.T) {
	loader := readTool(t, bootPath)
	key, cert, keyPath, certPath := keyPair(t, "loader")
	signed, err := Sign(memory(loader), key, cert)
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, "sbsigntool", "sbverify", "--cert", certPath, write(t, signed))
	again, err := Sign(memory(loader), key, cert)
	if err != nil || !bytes.Equal(content(t, again), content(t, signed)) {
		t.Errorf("signed twice, the loader has other bytes (%v)", err)
	}

	bySbsign := filepath.Join(t.TempDir(), "sbsign.efi")
	mustRun(t, "sbsigntool", "sbsign", "--key", keyPath, "--cert", certPath, "--output", bySbsign, write(t, memory(loader)))
	theirs, err := os.ReadFile(bySbsign)
	if err != nil {
		t.Fatal(err)
	}
	f := mustParse(t, theirs)
	if err := f.Verify(cert); err != nil {
		t.Errorf("what sbsign signed: %v", err)
	}
	// One file, both signers: the digests agree, and each key verifies.
	key2, cert2, _, cert2Path := keyPair(t, "second")
	both, err := Sign(memory(theirs), key2, cert2)
	if err != nil {
		t.Fatal(err)
	}
	bothPath := write(t, both)
	mustRun(t, "sbsigntool", "sbverify", "--cert", certPath, bothPath)
	mustRun(t, "sbsigntool", "sbverify", "--cert", cert2Path, bothPath)
	fb := mustParse(t, content(t, both))
	if sigs, err := fb.Signatures(); err != nil || len(sigs) != 2 || sigs[0].Digest != sigs[1].Digest {
		t.Errorf("two signers: %d signatures, %v", len(sigs), err)
	}
	if err := errors.Join(fb.Verify(cert), fb.Verify(cert2)); err != nil {
		t.Error(err)
	}
}

func TestAttacks(t *testing.T) {
	key, cert, _, _ := keyPair(t, "vendor")
	_, stranger, _, _ := keyPair(t, "vendor") // the same name and serial, another key
	in := input(smallStub())
	im, err := Assemble(in)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := Sign(im, key, cert)
	if err != nil {
		t.Fatal(err)
	}
	good := content(t, signed)
	f := mustParse(t, good)
	cmdline, _ := f.Section(".cmdline")
	certOff, _, _ := f.certTable()
	secondName := f.sectionsOff + sectionHeaderBytes // header of the second section

	for _, row := range []struct {
		name   string
		change func([]byte) []byte
		want   string
	}{
		{"command line edited", func(b []byte) []byte { b[cmdline.RawOffset] ^= 1; return b }, "altered"},
		{"bytes in the padding", func(b []byte) []byte { b[cmdline.RawOffset+cmdline.RawSizeBytes-1] = 1; return b }, "altered"},
		{"section renamed", func(b []byte) []byte { b[secondName+1] = 'X'; return b }, "altered"},
		{"entry point moved", func(b []byte) []byte { b[f.optOff+16] ^= 4; return b }, "altered"},
		{"signature flipped", func(b []byte) []byte { b[len(b)-40] ^= 1; return b }, "signature"},
		{"truncated", func(b []byte) []byte { return b[:len(b)-1000] }, "cut off"},
		{"bytes appended", func(b []byte) []byte { return append(b, make([]byte, 8)...) }, "appended"},
		{"signature removed", func(b []byte) []byte {
			clear(b[f.securityOff() : f.securityOff()+8])
			return b[:certOff]
		}, ErrNotSigned.Error()},
		{"signature of another file", func(b []byte) []byte {
			in := input(smallStub())
			in.Cmdline = "init=/bin/sh"
			evil, err := Assemble(in)
			if err != nil {
				t.Fatal(err)
			}
			eb := content(t, evil)
			le.PutUint32(eb[f.securityOff():], uint32(align(int64(len(eb)), 8)))
			le.PutUint32(eb[f.securityOff()+4:], uint32(len(b))-uint32(certOff))
			return append(eb, b[certOff:]...)
		}, "altered"},
		{"second command line", func(b []byte) []byte {
			copy(b[secondName:], ".text\x00\x00\x00")
			return b
		}, "two sections"},
		{"name with a tail after NUL", func(b []byte) []byte {
			copy(b[secondName:], ".x\x00dline")
			return b
		}, "printable"},
		{"section outside the file", func(b []byte) []byte { le.PutUint32(b[secondName+20:], 1<<30); return b }, "cut off"},
		{"section over the one before", func(b []byte) []byte { le.PutUint32(b[secondName+12:], 4096); return b }, "overlaps"},
		{"65535 sections", func(b []byte) []byte { le.PutUint16(b[f.coffOff+2:], 0xffff); return b }, "sections"},
	} {
		t.Run(row.name, func(t *testing.T) {
			b := row.change(bytes.Clone(good))
			f, err := Parse(bytes.NewReader(b), int64(len(b)))
			if err == nil {
				err = f.Verify(cert)
			}
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got %v, want an error with %q", err, row.want)
			}
		})
	}
	if err := f.Verify(stranger); err == nil {
		t.Error("a certificate of the same name with another key verifies")
	}
	if err := f.Verify(cert); err != nil {
		t.Error(err)
	}
}

// flaky is a hostile Blob: another content at every opening.
type flaky struct {
	size  int64
	reads *int
	short bool
}

func (f flaky) Size() int64 { return f.size }

func (f flaky) Open() (io.ReadCloser, error) {
	*f.reads++
	b := kernel(MachineAMD64)
	if *f.reads > 2 { // once for its header, once to measure it
		if f.short {
			return io.NopCloser(bytes.NewReader(b[:len(b)-1])), nil
		}
		b[len(b)-1]++
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func TestKernelChangesDuringBuild(t *testing.T) {
	for _, short := range []bool{false, true} {
		in := input(smallStub())
		in.Linux = flaky{size: int64(len(kernel(MachineAMD64))), reads: new(int), short: short}
		im, err := Assemble(in)
		if err != nil {
			t.Fatal(err)
		}
		r, err := im.Open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err == nil || !strings.Contains(err.Error(), ".linux") {
			t.Errorf("short %v: got %v, want an error that names .linux", short, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRefusals(t *testing.T) {
	real := readTool(t, stubPath)
	for _, row := range []struct {
		name   string
		change func(*Input)
		want   string
	}{
		{"no kernel", func(in *Input) { in.Linux = nil }, "no kernel"},
		{"no command line", func(in *Input) { in.Cmdline = " " }, "command line is empty"},
		{"NUL in the command line", func(in *Input) { in.Cmdline = "a\x00b" }, "NUL"},
		{"kernel for arm64", func(in *Input) { in.Linux = memory(kernel(MachineARM64)) }, "machine arm64, the stub for x86-64"},
		{"kernel in gzip", func(in *Input) { in.Linux = memory("\x1f\x8b...") }, "uncompressed"},
		{"kernel is an ELF file", func(in *Input) { in.Linux = memory("\x7fELF") }, "CONFIG_EFI_STUB"},
		{"signature without key", func(in *Input) { in.PCRPublicKey = nil }, "public key"},
		{"two generations", func(in *Input) { in.SBAT = "systemd,2,a,b,c,d" }, "twice"},
		{"bad SBAT", func(in *Input) { in.SBAT = "mine,x,a,b,c,d" }, "generation"},
		{"stub is a UKI", func(in *Input) {
			im, err := Assemble(input(real))
			if err != nil {
				t.Fatal(err)
			}
			in.Stub = content(t, im)
		}, "already holds .linux"},
		{"stub without room", func(in *Input) {
			f := mustParse(t, real)
			s := bytes.Clone(real)
			f.opt.SizeOfHeaders = 0x380 // as if a stub had less
			f.opt.FileAlignment = 0x80
			binary.Encode(s[f.optOff:], le, f.opt)
			in.Stub = s
		}, "has room for"},
	} {
		in := input(real)
		row.change(&in)
		if _, err := Assemble(in); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: got %v, want an error with %q", row.name, err, row.want)
		}
	}
}

// zeros is a large kernel that takes no memory.
type zeros struct{ sizeBytes int64 }

func (z zeros) Size() int64 { return z.sizeBytes }

func (z zeros) Open() (io.ReadCloser, error) {
	head := kernel(MachineAMD64)
	return io.NopCloser(io.MultiReader(bytes.NewReader(head), io.LimitReader(zeroReader{}, z.sizeBytes-int64(len(head))))), nil
}

type zeroReader struct{}

func (zeroReader) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestLargeImageInLittleMemory(t *testing.T) {
	key, cert, _, _ := keyPair(t, "large")
	in := input(smallStub())
	in.Linux = zeros{200 << 20}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	im, err := Assemble(in)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := Sign(im, key, cert)
	if err != nil {
		t.Fatal(err)
	}
	r, err := signed.Open()
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, r); err != nil || n != signed.Size() || n < 200<<20 {
		t.Fatalf("copied %d of %d bytes: %v", n, signed.Size(), err)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
		t.Errorf("allocated %d MiB for an image of 200 MiB", used>>20)
	}
}

// cheap signs with a constant: the fuzzer has no time for RSA.
type cheap struct{ *rsa.PrivateKey }

func (cheap) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return make([]byte, 256), nil
}

func FuzzParse(f *testing.F) {
	key, cert, _, _ := keyPair(f, "fuzz")
	im, err := Assemble(input(smallStub()))
	if err != nil {
		f.Fatal(err)
	}
	signed, err := Sign(im, key, cert)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content(f, signed))
	f.Add(smallStub())
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := Parse(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		for _, s := range file.Sections {
			if r, err := file.Open(s.Name); err == nil {
				if n, err := io.Copy(io.Discard, r); err != nil || n != int64(s.VirtualSizeBytes) {
					t.Fatalf("section %s: read %d of %d bytes: %v", s.Name, n, s.VirtualSizeBytes, err)
				}
			}
		}
		old, sigErr := file.Signatures()
		digest, err := file.Authenticode()
		if err != nil || sigErr != nil {
			return
		}
		// Signing adds one signature and changes nothing that is signed.
		out, err := Sign(memory(b), cheap{key}, cert)
		if err != nil {
			return
		}
		again := mustParse(t, content(t, out))
		after, err := again.Authenticode()
		sigs, sigErr := again.Signatures()
		if err != nil || sigErr != nil || after != digest || len(sigs) != len(old)+1 || sigs[len(old)].Digest != sha256Of(t, file) {
			t.Fatalf("after signing: digest %x was %x, %d signatures were %d, %v %v", after, digest, len(sigs), len(old), err, sigErr)
		}
	})
}

// sha256Of computes the Authenticode digest the slow way.
func sha256Of(t *testing.T, f *File) [32]byte {
	b := make([]byte, f.sizeBytes)
	if _, err := f.r.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	end, _, _ := f.certTable()
	b = append(b[:end], make([]byte, (8-end%8)%8)...)
	dir, sum := f.optOff+112+4*8, f.optOff+64
	b = append(b[:dir:dir], b[dir+8:]...)
	b = append(b[:sum:sum], b[sum+4:]...)
	return sha256.Sum256(b)
}
