package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// inputEvent is struct input_event of linux/input.h on 64-bit machines.
type inputEvent struct {
	Sec, Usec int64
	Type      uint16
	Code      uint16
	Value     int32
}

const (
	eventKey = 1   // EV_KEY
	keyPower = 116 // KEY_POWER
)

// watchPowerButton calls pressed when a power button is. Input devices need
// the kernel's evdev and button drivers; without them nothing happens.
func watchPowerButton(pressed func()) {
	devices, _ := filepath.Glob("/dev/input/event*")
	for _, d := range devices {
		f, err := os.Open(d)
		if err != nil {
			continue
		}
		go func() {
			defer f.Close()
			for {
				var e inputEvent
				if binary.Read(f, binary.NativeEndian, &e) != nil {
					return
				}
				if e.Type == eventKey && e.Code == keyPower && e.Value == 1 {
					pressed()
				}
			}
		}()
	}
}

// endMachine syncs and switches off or reboots. It does not return.
func endMachine(reboot bool) {
	unix.Sync()
	cmd := unix.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		cmd = unix.LINUX_REBOOT_CMD_RESTART
	}
	unix.Reboot(cmd)
	select {} // the kernel is on its way down; PID 1 must not exit before
}

// failureDelay leaves the reason on the console long enough to be read.
const failureDelay = 10 * time.Second

// EndBoot ends a boot that cannot go on. A box that failed reboots, because
// nobody stands in front of it, and the boot counter then chooses the other
// slot; it never drops to a shell.
func EndBoot(console io.Writer, err error) {
	switch {
	case errors.Is(err, ErrPowerOff):
		endMachine(false)
	case errors.Is(err, ErrReboot):
		endMachine(true)
	}
	fmt.Fprintf(console, "\r\nholdfast: error: %s\r\nholdfast: rebooting in %v\r\n",
		strings.ReplaceAll(fmt.Sprint(err), "\n", "\r\n"), failureDelay)
	time.Sleep(failureDelay)
	endMachine(true)
}
