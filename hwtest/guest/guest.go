// Package guest is what the first process of a system of hwtest.BareSystem begins
// and ends with. Call [Start] first and [End] last; what is printed in between is on
// the box's console.
//
// It is for tests and measurements: there is no shell, no udev and no log in such a
// system, and its end is a power-off that waits for nothing.
package guest

import (
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// ModulesPath lists the modules to load, in order, one a line.
const ModulesPath = "/modules"

// EndWord is printed when the system has come to its end, after what went wrong.
const EndWord = "GUEST END"

const path = "/usr/sbin:/usr/bin:/sbin:/bin"

// Start mounts what programs expect, takes the console and loads the modules.
func Start() error {
	for _, m := range []struct{ kind, at string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"}, {"tracefs", "/sys/kernel/tracing"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	os.Stdout, os.Stderr = console, console
	os.Setenv("PATH", path)
	log.SetOutput(console)
	list, err := os.ReadFile(ModulesPath)
	if err != nil {
		return err
	}
	for _, module := range strings.Fields(string(list)) {
		f, err := os.Open(module)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("load %s: %w", module, err)
		}
	}
	return nil
}

// Run runs a program of the system and returns what it printed; its failure is an
// error that says what.
func Run(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	// There is no udev to wait for.
	cmd.Env = []string{"PATH=" + path, "DM_DISABLE_UDEV=1", "LANG=C.UTF-8"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// End prints what went wrong, if anything did, and EndWord, and switches the box off.
func End(err error) {
	if err != nil {
		fmt.Println("GUEST ERROR", err)
	}
	fmt.Println(EndWord)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
