package hwtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// VM is one power-on of a [Box].
type VM struct {
	qemu    *exec.Cmd
	tpm     *exec.Cmd
	console *console
	qmp     string         // socket
	ports   map[int]string // guest port to host address
	sockets string         // folder of sockets; short, for sun_path has 108 bytes
	done    chan struct{}  // closed when QEMU has ended
	exit    error          // valid after done
	stderr  *boundedBuffer
}

func (b *Box) consoleLog() string { return filepath.Join(b.Dir, "console.log") }

// ConsoleLog is the file that holds the console of every power-on so far.
func (b *Box) ConsoleLog() string { return b.consoleLog() }

// PowerOn starts the box. It returns as soon as the machine runs; use
// [VM.Expect] to see how far it gets.
func (b *Box) PowerOn(ctx context.Context) (_ *VM, err error) {
	accel := b.opts.Accelerator
	if accel == "" {
		if accel, err = Accelerator(ctx); err != nil {
			return nil, err
		}
	}
	sockets, err := os.MkdirTemp("", "hf")
	if err != nil {
		return nil, err
	}
	vm := &VM{sockets: sockets, qmp: filepath.Join(sockets, "qmp"), ports: map[int]string{}, done: make(chan struct{}), stderr: &boundedBuffer{max: 16 << 10}}
	defer func() {
		if err != nil {
			vm.PowerCut()
		}
	}()
	args, err := b.arguments(vm, accel)
	if err != nil {
		return nil, err
	}
	if b.opts.TPM != TPMAbsent {
		if vm.tpm, err = startTPM(b.tpmDir(), filepath.Join(sockets, "tpm")); err != nil {
			return nil, err
		}
	}
	listener, err := net.Listen("unix", filepath.Join(sockets, "console"))
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	vm.qemu = exec.Command("qemu-system-x86_64", args...)
	vm.qemu.Stderr = vm.stderr
	vm.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := start(vm.qemu); err != nil {
		return nil, fmt.Errorf("start QEMU (Debian package qemu-system-x86): %w", err)
	}
	go func() {
		vm.exit = vm.qemu.Wait()
		close(vm.done)
	}()
	conn, err := acceptOrExit(listener, vm.done)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(vm.stderr.String()))
	}
	vm.console, err = newConsole(conn, b.consoleLog(), b.opts.Log)
	return vm, err
}

// acceptOrExit waits for QEMU to connect its serial port.
func acceptOrExit(l net.Listener, done <-chan struct{}) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	accepted := make(chan result, 1)
	go func() {
		c, err := l.Accept()
		accepted <- result{c, err}
	}()
	select {
	case r := <-accepted:
		return r.conn, r.err
	case <-done:
		return nil, errors.New("QEMU ended at once")
	case <-time.After(30 * time.Second):
		return nil, errors.New("QEMU did not open its console in 30 s")
	}
}

// arguments is QEMU's command line. The disk has the only boot index, unless a drive
// is to be First, so that the firmware tries nothing else before it: what it tries
// lands in PCR 4.
func (b *Box) arguments(vm *VM, accel string) ([]string, error) {
	cpus := b.opts.CPUs
	if cpus == 0 {
		cpus = 2
		if accel == "tcg" {
			cpus = 1
		}
	}
	args := []string{
		"-nodefaults", "-display", "none", "-no-user-config",
		"-m", strconv.Itoa(b.opts.MemoryMiB), "-smp", strconv.Itoa(cpus),
		"-chardev", "socket,id=console,path=" + filepath.Join(vm.sockets, "console"),
		"-serial", "chardev:console",
		"-qmp", "unix:" + vm.qmp + ",server=on,wait=off",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
	}
	args = append(args, acceleratorArguments(accel)...)
	if b.opts.Bare != nil {
		args = append(args, "-machine", "q35", "-bios", "qboot.rom", "-kernel", b.opts.Bare.Kernel, "-initrd", b.opts.Bare.Initrd, "-append", b.opts.Bare.Cmdline)
	} else {
		fw, err := findFirmware(b.opts.SecureBoot != nil)
		if err != nil {
			return nil, err
		}
		args = append(args, fw.arguments(b.varsPath(), b.opts.ReadOnlyVariables)...)
	}
	for n, d := range b.opts.Drives {
		args = append(args, d.arguments(n)...)
	}
	if b.Disk != "" {
		format := "raw"
		if filepath.Ext(b.Disk) == ".qcow2" {
			format = "qcow2"
		}
		args = append(args, "-drive", "if=none,id=disk,format="+format+",discard=unmap,file="+strings.ReplaceAll(b.Disk, ",", ",,"),
			"-device", "virtio-blk-pci,drive=disk,bootindex=1")
	}
	netdev := "user,id=net"
	for _, port := range b.opts.Forward {
		host, err := freePort(b.opts.HostPorts[port])
		if err != nil {
			return nil, err
		}
		vm.ports[port] = host
		netdev += fmt.Sprintf(",hostfwd=tcp:%s-:%d", host, port)
	}
	args = append(args, "-netdev", netdev, "-device", "virtio-net-pci,netdev=net,romfile=")
	args = append(args, "-device", "pcie-root-port,id="+stickPort+",chassis=1")
	if b.opts.TPM != TPMAbsent {
		args = append(args, "-chardev", "socket,id=tpm,path="+filepath.Join(vm.sockets, "tpm"),
			"-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0")
	}
	return args, nil
}

// arguments plug the n-th further disk in.
func (d Drive) arguments(n int) []string {
	id := fmt.Sprintf("drive%d", n)
	device := map[Bus]string{
		VirtIO: "virtio-blk-pci,drive=" + id,
		NVMe:   "nvme,serial=" + id + ",drive=" + id,
		USB:    "usb-storage,bus=usb" + id + ".0,removable=on,drive=" + id,
	}[d.Bus]
	if d.First {
		device += ",bootindex=0"
	}
	var args []string
	if d.Bus == USB {
		args = append(args, "-device", "qemu-xhci,id=usb"+id)
	}
	return append(args, "-drive", "if=none,id="+id+",format=raw,discard=unmap,file="+strings.ReplaceAll(d.Image, ",", ",,"), "-device", device)
}

// stickPort is where [VM.Plug] plugs in.
const stickPort = "stickport"

// freePort returns loopback:want, or a free port when want is 0.
func freePort(want int) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(want))
	if err != nil {
		return "", fmt.Errorf("forward host port %d: %w", want, err)
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// Address is where a forwarded port of the guest is reached from here.
func (vm *VM) Address(port int) string { return vm.ports[port] }

// PowerCut pulls the plug: machine and TPM are killed. Safe to call twice.
func (vm *VM) PowerCut() {
	if vm.qemu != nil && vm.qemu.Process != nil {
		vm.qemu.Process.Kill()
		<-vm.done
	}
	vm.release()
}

func (vm *VM) release() {
	if vm.tpm != nil {
		vm.tpm.Process.Kill()
		vm.tpm.Wait()
		vm.tpm = nil
	}
	if vm.console != nil {
		vm.console.close()
	}
	os.RemoveAll(vm.sockets)
}

// Done is closed when the machine is off.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Wait waits until the machine has switched itself off.
func (vm *VM) Wait(within time.Duration) error {
	select {
	case <-vm.done:
	case <-time.After(within):
		return fmt.Errorf("machine is still on after %v; end of its console:\n%s", within, tail([]byte(vm.Console()), 2000))
	}
	vm.release()
	if vm.exit != nil {
		return fmt.Errorf("QEMU: %w: %s", vm.exit, strings.TrimSpace(vm.stderr.String()))
	}
	return nil
}

// PowerButton presses the ACPI power button.
func (vm *VM) PowerButton() error { return vm.command("system_powerdown", nil) }

// Reset presses the reset button.
func (vm *VM) Reset() error { return vm.command("system_reset", nil) }

// boundedBuffer keeps the first max bytes written to it.
type boundedBuffer struct {
	max int
	b   strings.Builder
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	if room := b.max - b.b.Len(); room > 0 {
		b.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (b *boundedBuffer) String() string { return b.b.String() }
