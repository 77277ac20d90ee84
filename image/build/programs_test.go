package build_test

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/tree"
)

// program is an ELF file of that type and machine with one segment and some noise, which
// no compression makes smaller.
func program(typ elf.Type, m elf.Machine, segment elf.ProgType, noiseBytes int) tree.Bytes {
	h := elf.Header64{Type: uint16(typ), Machine: uint16(m), Version: 1, Entry: 0x400078, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	var b bytes.Buffer
	content := []byte("/lib64/ld-linux-x86-64.so.2\x00")
	for _, part := range []any{h, elf.Prog64{Type: uint32(segment), Off: 120, Vaddr: 0x400078, Filesz: uint64(len(content)), Memsz: uint64(len(content))}, content} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			panic(err)
		}
	}
	noise := make([]byte, noiseBytes)
	rand.NewChaCha8([32]byte{}).Read(noise)
	return append(b.Bytes(), noise...)
}

// aProgram is one that nothing is wrong with.
func aProgram(noiseBytes int) tree.Bytes {
	return program(elf.ET_EXEC, elf.EM_X86_64, elf.PT_LOAD, noiseBytes)
}

// TestProgramsThatStartNoBox: what cannot run on a box is refused before it is signed.
func TestProgramsThatStartNoBox(t *testing.T) {
	k, cache := newKeys(t), newCache(t)
	w := newWorkshop(t, k, cache)
	w.in.Agent = program(elf.ET_DYN, elf.EM_X86_64, elf.PT_LOAD, 0) // at no fixed address, which is fine
	built := filepath.Join(w.dir, "built")
	if _, err := build.Build(context.Background(), parse(t, boxSpec), w.in, built); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/bin/sh") // Debian's is not static
	if err != nil {
		t.Fatal(err)
	}
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	loader, stub := read(filepath.Join(efiFolder, "systemd-bootx64.efi")), w.in.Stub
	other := func(b []byte, off int, v byte) tree.Bytes {
		b = bytes.Clone(b)
		b[int(binary.LittleEndian.Uint32(b[0x3c:]))+off] ^= v
		return b
	}
	garbage := tree.Bytes(bytes.Repeat([]byte{0xaa}, 4096))
	elves := map[string]struct {
		content tree.Content
		want    string
	}{
		"garbage":                {garbage, "4096 bytes are no program of Linux (ELF)"},
		"nothing":                {tree.Bytes(nil), "0 bytes are no program"},
		"a program cut short":    {aProgram(0)[:40], "no program"},
		"of another machine":     {program(elf.ET_EXEC, elf.EM_AARCH64, elf.PT_LOAD, 0), "it is for EM_AARCH64, ELFCLASS64, and the spec for EM_X86_64"},
		"not static":             {program(elf.ET_DYN, elf.EM_X86_64, elf.PT_INTERP, 0), `not static but needs "/lib64/ld-linux-x86-64.so.2"`},
		"the shell, not static":  {tree.Bytes(self), "not static but needs"},
		"an object, not linked":  {program(elf.ET_REL, elf.EM_X86_64, elf.PT_LOAD, 0), "ET_REL"},
		"nothing to load":        {program(elf.ET_EXEC, elf.EM_X86_64, elf.PT_NOTE, 0), "nothing to be loaded"},
		"an EFI program":         {tree.Bytes(loader), "no program of Linux"},
		"a file that is missing": {tree.File{Path: "absent", SizeBytes: 5}, "absent"},
	}
	efi := map[string]struct {
		content tree.Content
		want    string
	}{
		"garbage":            {garbage, "parse PE file"},
		"a Linux program":    {aProgram(4096), "parse PE file"},
		"a UKI":              {tree.Bytes(read(filepath.Join(built, build.ReleaseName, "uki.efi"))), "it holds a kernel: it is a UKI"},
		"of another machine": {other(loader, 4, 0xff), "it is for the machine 0x869b, and the spec for 0x8664"},
		"a driver":           {other(loader, 24+68, 10^11), "not an EFI application but of subsystem 11"},
	}
	try := func(name, want string, change func(*build.Inputs)) {
		t.Helper()
		in := w.in
		change(&in)
		_, err := build.Build(context.Background(), parse(t, boxSpec), in, filepath.Join(w.dir, "out"))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	before := sums(t, w.dir)
	for name, c := range elves {
		try("agent: "+name, c.want, func(in *build.Inputs) { in.Agent = c.content })
	}
	for name, c := range efi {
		try("loader: "+name, c.want, func(in *build.Inputs) { in.Loader = c.content })
	}
	try("stub for a loader", "boot loader: it is systemd-stub; give systemd-bootx64.efi", func(in *build.Inputs) { in.Loader = tree.Bytes(stub) })
	try("loader for a stub", "EFI stub: it is systemd-boot; give linuxx64.efi.stub", func(in *build.Inputs) { in.Stub = loader })
	try("stub of another machine", "EFI stub: it is for the machine", func(in *build.Inputs) { in.Stub = other(stub, 4, 0xff) })
	for _, name := range []string{"garbage", "not static"} { // the same check, later
		try("runtime: "+name, elves[name].want, func(in *build.Inputs) { in.Runtime = elves[name].content })
	}
	try("no agent", "device binary: none is given", func(in *build.Inputs) { in.Agent = nil })
	if after := sums(t, w.dir); after != before {
		t.Errorf("something was left:\n%s", after)
	}
}
