package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/partition"
)

// boxFolder keeps the TPM and firmware state of `run` in the output folder.
const boxFolder = "box"

// Kernel, initrd and the firmware need the less; no PC has more than the more.
const (
	minMemoryMiB = 256
	maxMemoryMiB = 1 << 20
)

func runRun(ctx context.Context, c *cli, args []string) error {
	f := c.flags("run", "OUT", `Boot the disk in OUT (a build's folder, or a disk image) in QEMU. The TPM and the
firmware variables are kept in OUT/box, so a sealed disk opens again at the next run.
The console is this terminal; end with ctrl-] or by switching the appliance off.

example: holdfast run --forward 8080:80 out`)
	forward := f.String("forward", "", "TCP ports as `HOST:GUEST`, separated by commas")
	memory := f.Int("memory", 1024, "memory in `MiB`")
	secureBoot := f.String("secure-boot", "", "enrol the vendor keys in this `folder` in the firmware (first run only)")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *memory < minMemoryMiB {
		return usageError{fmt.Sprintf("--memory %d is less than the %d MiB that an appliance needs", *memory, minMemoryMiB), "holdfast run --memory 1024 " + rest[0]}
	}
	if *memory > maxMemoryMiB {
		return usageError{fmt.Sprintf("--memory %d is more than %d MiB", *memory, maxMemoryMiB), "holdfast run --memory 1024 " + rest[0]}
	}
	o := hwtest.Options{MemoryMiB: *memory, Log: c.out, HostPorts: map[int]int{}}
	if err := parseForward(*forward, &o); err != nil {
		return err
	}
	if *secureBoot != "" {
		if o.SecureBoot, err = firmwareKeys(*secureBoot); err != nil {
			return err
		}
	}
	disk, dir := rest[0], rest[0]+".box"
	if info, err := os.Stat(rest[0]); err != nil {
		return err
	} else if info.IsDir() {
		disk, dir = filepath.Join(rest[0], build.RawName), filepath.Join(rest[0], boxFolder)
	}
	if _, err := os.Stat(disk); err != nil {
		return hinted{err, "build it first: holdfast build SPEC -o " + rest[0]}
	}
	if err := checkBoots(disk); err != nil {
		return err
	}
	box, err := hwtest.NewBox(dir, disk, o)
	if err != nil {
		return err
	}
	accel, err := hwtest.Accelerator(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.err, "accelerator %s, state in %s\n", accel, dir)
	return c.attend(ctx, box)
}

// checkBoots refuses what would end in the firmware's shell.
func checkBoots(path string) (err error) {
	if err := refuseQCOW2Disk(path); err != nil {
		return err
	}
	dev, err := partition.OpenReadOnly(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if _, err := partition.Open(dev); err != nil {
		return hinted{fmt.Errorf("%s: %w", path, err), "give the folder of a build, or a disk that holdfast build made"}
	}
	return nil
}

// attend powers the box on and connects its console to this terminal.
func (c *cli) attend(ctx context.Context, box *hwtest.Box) error {
	vm, err := box.PowerOn(ctx)
	if err != nil {
		return err
	}
	defer vm.PowerCut()
	quit := make(chan struct{})
	if in, ok := c.in.(*os.File); ok && term.IsTerminal(int(in.Fd())) {
		old, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			return err
		}
		defer term.Restore(int(in.Fd()), old)
	}
	go typeInto(vm, c.in, quit)
	select {
	case <-vm.Done():
		return vm.Wait(time.Second)
	case <-quit:
	case <-ctx.Done():
	}
	return nil
}

// escape ends the session, as in telnet: ctrl-].
const escape = 0x1d

// typeInto sends what is typed until the escape; the end of the input (a
// script's) leaves the machine on.
func typeInto(vm *hwtest.VM, in io.Reader, quit chan<- struct{}) {
	buf := make([]byte, 256)
	for {
		n, err := in.Read(buf)
		text := string(buf[:n])
		before, _, found := strings.Cut(text, string(rune(escape)))
		if vm.Send(before) != nil || err != nil {
			return
		}
		if found {
			close(quit)
			return
		}
	}
}

func parseForward(list string, o *hwtest.Options) error {
	if list == "" {
		return nil
	}
	for pair := range strings.SplitSeq(list, ",") {
		host, guest, ok := strings.Cut(pair, ":")
		h, err1 := strconv.ParseUint(host, 10, 16)
		g, err2 := strconv.ParseUint(guest, 10, 16)
		if !ok || errors.Join(err1, err2) != nil || g == 0 {
			return usageError{fmt.Sprintf("%q is not HOST:GUEST", pair), "holdfast run --forward 8080:80 out"}
		}
		o.Forward = append(o.Forward, int(g))
		o.HostPorts[int(g)] = int(h)
	}
	return nil
}

// firmwareKeys are the vendor's Secure Boot keys as the factory enrols them.
func firmwareKeys(dir string) (*hwtest.SecureBootKeys, error) {
	k, err := keys.Load(dir)
	if err != nil {
		return nil, err
	}
	lists := &hwtest.SecureBootKeys{}
	for name, into := range map[string]*[]byte{"PK": &lists.PK, "KEK": &lists.KEK, "db": &lists.DB} {
		if *into, err = k.SignatureList(name); err != nil {
			return nil, err
		}
	}
	return lists, nil
}
