package build

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
)

// A machine is an architecture of the spec, as programs and as firmware name it.
type machine struct {
	elf    elf.Machine
	pe     uint16
	suffix string // of systemd's EFI programs
}

func machines() map[string]machine {
	return map[string]machine{
		"amd64": {elf.EM_X86_64, uki.MachineAMD64, "x64"},
		"arm64": {elf.EM_AARCH64, uki.MachineARM64, "aa64"},
	}
}

// checkPrograms refuses programs that would let no box start, which would show only
// there: signed and published. The runtime is checked where one is needed.
func (b *builder) checkPrograms() error {
	arch, m := b.spec.Arch, machines()[b.spec.Arch]
	if err := checkStatic(b.in.Agent, m); err != nil {
		return fmt.Errorf("device binary%s: %w; build it with: CGO_ENABLED=0 GOARCH=%s go build ./cmd/holdfast-agent", named(b.in.Agent), err, arch)
	}
	if err := checkEFI(tree.Bytes(b.in.Stub), m, "systemd-boot"); err != nil {
		return fmt.Errorf("EFI stub: %w; give linux%s.efi.stub of Debian's package systemd-boot-efi", err, m.suffix)
	}
	if err := checkEFI(b.in.Loader, m, "systemd-stub"); err != nil {
		return fmt.Errorf("boot loader%s: %w; give systemd-boot%s.efi of Debian's package systemd-boot-efi", named(b.in.Loader), err, m.suffix)
	}
	return nil
}

// checkRuntime is the same for the container runtime.
func (b *builder) checkRuntime() error {
	if err := checkStatic(b.in.Runtime, machines()[b.spec.Arch]); err != nil {
		return fmt.Errorf("container runtime%s: %w; give a static runc for %s", named(b.in.Runtime), err, b.spec.Arch)
	}
	return nil
}

// named is where a program comes from, if it is a file.
func named(c uki.Blob) string {
	if f, ok := c.(tree.File); ok {
		return " " + f.Path
	}
	return ""
}

// checkStatic wants an ELF program that needs nothing of the root it runs in: the
// initrd has no libraries.
func checkStatic(c tree.Content, m machine) error {
	content, err := readProgram(c)
	if err != nil {
		return err
	}
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("its %d bytes are no program of Linux (ELF): %w", len(content), err)
	}
	if f.Machine != m.elf || f.Class != elf.ELFCLASS64 {
		return fmt.Errorf("it is for %v, %v, and the spec for %v", f.Machine, f.Class, m.elf)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN || f.Entry == 0 {
		return fmt.Errorf("it is no program but of type %v", f.Type)
	}
	loaded := false
	for _, p := range f.Progs {
		loaded = loaded || p.Type == elf.PT_LOAD
		if p.Type != elf.PT_INTERP {
			continue
		}
		name, err := io.ReadAll(io.LimitReader(p.Open(), 256))
		if err != nil {
			return fmt.Errorf("read the name of its dynamic linker: %w", err)
		}
		return fmt.Errorf("it is not static but needs %q, which is not there", strings.TrimRight(string(name), "\x00"))
	}
	if !loaded {
		return errors.New("it has nothing to be loaded")
	}
	return nil
}

// sdMagic is the section by which systemd's EFI programs say what they are.
const sdMagic = ".sdmagic"

// checkEFI wants a bare EFI application for the machine that does not call itself other.
func checkEFI(c uki.Blob, m machine, other string) error {
	content, err := readProgram(c)
	if err != nil {
		return err
	}
	f, err := uki.Parse(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return err
	}
	if f.Machine != m.pe {
		return fmt.Errorf("it is for the machine %#x, and the spec for %#x", f.Machine, m.pe)
	}
	if f.Subsystem != uki.SubsystemApplication {
		return fmt.Errorf("it is not an EFI application but of subsystem %d", f.Subsystem)
	}
	if _, ok := f.Section(".linux"); ok {
		return errors.New("it holds a kernel: it is a UKI")
	}
	if _, ok := f.Section(sdMagic); !ok {
		return nil // others have none
	}
	r, err := f.Open(sdMagic)
	if err != nil {
		return err
	}
	magic, err := io.ReadAll(io.LimitReader(r, 256))
	if err == nil && strings.Contains(string(magic), other) {
		err = fmt.Errorf("it is %s", other)
	}
	return err
}

// readProgram reads a program, which is small enough for memory.
func readProgram(c uki.Blob) ([]byte, error) {
	if c == nil {
		return nil, errors.New("none is given")
	}
	if c.Size() > maxProgramBytes {
		return nil, fmt.Errorf("program of %d bytes; %d is the most", c.Size(), maxProgramBytes)
	}
	r, err := c.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, maxProgramBytes))
}

// maxProgramBytes bounds what is read into memory; an ESP holds no more anyway.
const maxProgramBytes = 1 << 29
