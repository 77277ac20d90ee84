// Package hwtest boots an appliance the way a customer's box does – UEFI
// firmware, a TPM, a disk, a console – under QEMU, OVMF and swtpm, and gives a
// test the things a person in front of the box could do: read and type on the
// console, press the power button, pull the plug, swap the TPM, change the
// firmware's keys.
//
// # What to call first
//
// In a test, [Boot] a disk image and [Machine.Expect] what the console should
// say:
//
//	func TestRecordSurvivesPowerCut(t *testing.T) {
//		m := hwtest.Boot(t, "out/disk.raw", hwtest.Options{Forward: []int{8080}})
//		m.Expect(`ready`, time.Minute)
//		resp, err := http.Get("http://" + m.Address(8080) + "/health")
//		…
//		m.PowerCut()
//		m.PowerOn()
//		m.Expect(`ready`, time.Minute)
//	}
//
// Outside a test, [NewBox] and [Box.PowerOn] are the same without a test to fail.
//
// A [Box] is the hardware: its folder keeps the TPM's state and the firmware's
// variables from one power-on to the next. A [VM] is one power-on of it. The
// disk image given to [Boot] is not written: the box works on a sparse copy.
//
// # What it needs
//
// Debian packages qemu-system-x86, ovmf, swtpm and swtpm-tools. KVM is used only
// when a probe has shown that a guest really runs on it (see [Accelerator]);
// software emulation takes 20 to 35 seconds to user space.
//
// # What it does not show
//
// QEMU's disk keeps every write issued before a power cut, in order: a cut here
// never tears or reorders writes. States like that are enumerated in process by
// partition/powercut.
package hwtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// TPMKind says which TPM is on the board.
type TPMKind int

const (
	// TPM20 is a TPM 2.0 with SHA-1 and SHA-256 banks, as shipped.
	TPM20 TPMKind = iota
	// TPMAbsent is a board without one.
	TPMAbsent
	// TPMWithoutSHA256 has only the SHA-1 bank allocated.
	TPMWithoutSHA256
)

// SecureBootKeys are EFI signature lists (UEFI 2.10 §32.4.1) that the firmware
// has enrolled when it leaves the factory.
type SecureBootKeys struct {
	PK, KEK, DB, DBX []byte
}

// Options describe a box. The zero value is a box with 1 GiB of memory, a TPM 2.0
// and Secure Boot off.
type Options struct {
	MemoryMiB int
	// CPUs is 2 when 0, and 1 under emulation: emulated processors that wait for
	// one another stand still on a busy machine, until the guest's watchdog bites.
	CPUs int
	TPM  TPMKind
	// SecureBoot, when set, is enrolled before the first power-on.
	SecureBoot *SecureBootKeys
	// Forward are TCP ports of the guest reachable at [VM.Address]. With the
	// value of HostPorts for it, or else any free port of the loopback interface.
	Forward   []int
	HostPorts map[int]int
	// Bare starts this kernel, initrd and command line under a firmware that
	// measures nothing: a board whose SHA-256 bank is there and never extended.
	Bare *Bare
	// ReadOnlyVariables makes the firmware's variable store refuse writes.
	ReadOnlyVariables bool
	// Drives are further disks; see [Box.Attach].
	Drives []Drive
	// Log, when set, receives everything the console prints.
	Log io.Writer
	// Accelerator is "kvm", "tcg" or "" for what [Accelerator] finds.
	Accelerator string
}

// Bare is a kernel started without UEFI.
type Bare struct{ Kernel, Initrd, Cmdline string }

// Drive is a disk on the board beside the box's own: an install medium that was left
// in, the old disk, a copy.
type Drive struct {
	Image string // raw, written in place
	Bus   Bus
	// First makes the firmware start from it, and not from the box's own disk.
	First bool
}

// Bus is how a [Drive] is connected.
type Bus int

const (
	// VirtIO is how the box's own disk is connected. The drive has the lower address:
	// it is /dev/vda, and the box's own comes after it.
	VirtIO Bus = iota
	// NVMe is a slot for an SSD.
	NVMe
	// USB is a stick. Debian's cloud kernels have no driver for it; the firmware does.
	USB
)

// Box is one machine: board, firmware variables, TPM and disk.
type Box struct {
	// Dir keeps tpm/ and firmware.vars; Disk is the disk image, written in place.
	Dir, Disk string
	opts      Options
}

// NewBox assembles a box in dir, keeping the firmware variables and TPM state
// that an earlier NewBox left there.
func NewBox(dir, disk string, o Options) (*Box, error) {
	if o.MemoryMiB == 0 {
		o.MemoryMiB = 1024
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	b := &Box{Dir: dir, Disk: disk, opts: o}
	if _, err := os.Stat(b.varsPath()); errors.Is(err, os.ErrNotExist) {
		if err := b.ResetFirmware(o.SecureBoot); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(b.tpmDir()); errors.Is(err, os.ErrNotExist) {
		if err := b.ReplaceTPM(o.TPM); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b *Box) varsPath() string { return filepath.Join(b.Dir, "firmware.vars") }
func (b *Box) tpmDir() string   { return filepath.Join(b.Dir, "tpm") }

// ResetFirmware gives the board factory-fresh firmware variables: no boot
// entries, and the keys enrolled. With none in keys, a board that can do Secure
// Boot is in setup mode; with keys nil, it cannot. The box must be off.
func (b *Box) ResetFirmware(keys *SecureBootKeys) error {
	fw, err := findFirmware(keys != nil)
	if err != nil {
		return err
	}
	vars, err := os.ReadFile(fw.vars)
	if err != nil {
		return fmt.Errorf("read firmware variable template: %w", err)
	}
	if keys != nil {
		if vars, err = enroll(vars, *keys); err != nil {
			return fmt.Errorf("enroll Secure Boot keys in %s: %w", fw.vars, err)
		}
	}
	b.opts.SecureBoot = keys
	return os.WriteFile(b.varsPath(), vars, 0o600)
}

// ReadOnlyVariables makes the firmware's variable store refuse writes from the next
// power-on, or take them again.
func (b *Box) ReadOnlyVariables(on bool) { b.opts.ReadOnlyVariables = on }

// Attach plugs a further disk in before the next power-on; [VM.Plug] does while the box
// is on. The box must be off.
func (b *Box) Attach(d Drive) { b.opts.Drives = append(slices.Clone(b.opts.Drives), d) }

// Detach takes out what Attach plugged in. The box must be off.
func (b *Box) Detach(image string) {
	b.opts.Drives = slices.DeleteFunc(slices.Clone(b.opts.Drives), func(d Drive) bool { return d.Image == image })
}

// ReplaceTPM puts another, factory-fresh TPM on the board: what unsealed on the
// old one does not on this. The box must be off.
func (b *Box) ReplaceTPM(kind TPMKind) error {
	b.opts.TPM = kind
	if err := os.RemoveAll(b.tpmDir()); err != nil {
		return err
	}
	if kind == TPMAbsent {
		return nil
	}
	return manufactureTPM(b.tpmDir(), kind)
}

// RemoveTPM takes the TPM off the board without erasing it; PutTPM brings it back.
func (b *Box) RemoveTPM() { b.opts.TPM = TPMAbsent }

// PutTPM puts back the TPM that RemoveTPM took away.
func (b *Box) PutTPM() { b.opts.TPM = TPM20 }

// TB is the part of testing.TB the harness uses, so that programs which boot
// boxes outside a test do not link package testing.
type TB interface {
	Helper()
	Name() string
	Failed() bool
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
	TempDir() string
}

// Machine is a box under test: what goes wrong fails the test.
type Machine struct {
	*Box
	t  TB
	vm *VM
}

// Boot copies disk (sparsely; the original is not touched), assembles a box
// around the copy and powers it on. When the test ends the box is switched off;
// when the test failed, the tail of the console is logged and the whole console
// log is kept under $HOLDFAST_LOGS, if set.
func Boot(t TB, disk string, o Options) *Machine {
	t.Helper()
	m := New(t, disk, o)
	m.PowerOn()
	return m
}

// Copy assembles a second box that is in every respect like b: disk, TPM and
// firmware. A test that needs a box with a history (provisioned, updated) makes
// it once and copies it. The box must be off.
func (b *Box) Copy(t TB) *Machine {
	t.Helper()
	dir := t.TempDir()
	work := filepath.Join(dir, "disk"+filepath.Ext(b.Disk))
	to := filepath.Join(dir, "box")
	err := errors.Join(copySparse(work, b.Disk), os.CopyFS(filepath.Join(to, "tpm"), os.DirFS(b.tpmDir())),
		copySparse(filepath.Join(to, "firmware.vars"), b.varsPath()))
	if err != nil {
		t.Fatalf("hwtest: copy box: %v", err)
	}
	c, err := NewBox(to, work, b.opts)
	if err != nil {
		t.Fatalf("hwtest: copy box: %v", err)
	}
	m := &Machine{Box: c, t: t}
	t.Cleanup(m.finish)
	return m
}

// New is [Boot] without the power-on, for tests that change the box first.
func New(t TB, disk string, o Options) *Machine {
	t.Helper()
	dir := t.TempDir()
	work := filepath.Join(dir, "disk"+filepath.Ext(disk))
	if disk != "" {
		if err := copySparse(work, disk); err != nil {
			t.Fatalf("hwtest: %v", err)
		}
	} else {
		work = ""
	}
	b, err := NewBox(filepath.Join(dir, "box"), work, o)
	if err != nil {
		t.Fatalf("hwtest: %v", err)
	}
	m := &Machine{Box: b, t: t}
	t.Cleanup(m.finish)
	return m
}

func (m *Machine) finish() {
	if m.vm != nil {
		m.vm.PowerCut()
	}
	if !m.t.Failed() {
		return
	}
	log, err := os.ReadFile(m.consoleLog())
	if err != nil {
		return
	}
	m.t.Logf("end of the console of %s:\n%s", m.t.Name(), tail(log, 6000))
	if keep := os.Getenv("HOLDFAST_LOGS"); keep != "" {
		name := filepath.Join(keep, filepath.Base(m.t.Name())+".console.log")
		if err := os.WriteFile(name, log, 0o644); err == nil {
			m.t.Logf("whole console: %s", name)
		}
	}
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[len(b)-n:]
	}
	return b
}

// PowerOn switches the box on.
func (m *Machine) PowerOn() {
	m.t.Helper()
	vm, err := m.Box.PowerOn(context.Background())
	if err != nil {
		m.t.Fatalf("hwtest: power on: %v", err)
	}
	m.vm = vm
}

// Expect waits until the console since the last Expect matches the regular
// expression and returns the match and its groups.
func (m *Machine) Expect(pattern string, within time.Duration) []string {
	m.t.Helper()
	match, err := m.vm.Expect(pattern, within)
	if err != nil {
		m.t.Fatalf("hwtest: %v", err)
	}
	return match
}

// ExpectEither waits for the first of several patterns and says which it was.
func (m *Machine) ExpectEither(within time.Duration, patterns ...string) (int, []string) {
	m.t.Helper()
	i, match, err := m.vm.ExpectAny(within, patterns...)
	if err != nil {
		m.t.Fatalf("hwtest: %v", err)
	}
	return i, match
}

// Console is everything printed since the power-on.
func (m *Machine) Console() string { return m.vm.Console() }

// Send types text on the console. End a line with "\n".
func (m *Machine) Send(text string) {
	m.t.Helper()
	if err := m.vm.Send(text); err != nil {
		m.t.Fatalf("hwtest: type on the console: %v", err)
	}
}

// PowerCut pulls the plug: machine and TPM stop between two instructions.
func (m *Machine) PowerCut() {
	m.vm.PowerCut()
}

// PowerButton presses it (ACPI) and waits until the machine is off.
func (m *Machine) PowerButton(within time.Duration) {
	m.t.Helper()
	if err := m.vm.PowerButton(); err != nil {
		m.t.Fatalf("hwtest: press power button: %v", err)
	}
	m.WaitOff(within)
}

// WaitOff waits until the machine has switched itself off.
func (m *Machine) WaitOff(within time.Duration) {
	m.t.Helper()
	if err := m.vm.Wait(within); err != nil {
		m.t.Fatalf("hwtest: %v", err)
	}
}

// Reset presses the reset button.
func (m *Machine) Reset() {
	m.t.Helper()
	if err := m.vm.Reset(); err != nil {
		m.t.Fatalf("hwtest: reset: %v", err)
	}
}

// Address is where a forwarded port of the guest is reached from here.
func (m *Machine) Address(port int) string { return m.vm.Address(port) }

// VM is the machine's present power-on.
func (m *Machine) VM() *VM { return m.vm }
