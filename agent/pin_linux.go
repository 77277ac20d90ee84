package agent

import (
	"os"

	"golang.org/x/sys/unix"
)

// echoOf turns the echo of a terminal on and off; where there is no terminal, there
// is none.
func echoOf(console *os.File) func(on bool) {
	return func(on bool) {
		fd := int(console.Fd())
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return
		}
		t.Lflag &^= unix.ECHO
		if on {
			t.Lflag |= unix.ECHO
		}
		// A console that goes on showing what is typed is no reason not to ask.
		_ = unix.IoctlSetTermios(fd, unix.TCSETS, t)
	}
}
