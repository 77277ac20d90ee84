package hwtest

import (
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"
)

// console is the machine's serial port: everything it prints is kept, logged
// and matched against.
type console struct {
	conn net.Conn
	log  *os.File

	mu      sync.Mutex
	text    []byte
	matched int           // Expect looks behind this offset
	more    chan struct{} // replaced and closed at each arrival
	ended   bool
}

func newConsole(conn net.Conn, logPath string, also io.Writer) (*console, error) {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	c := &console{conn: conn, log: log, more: make(chan struct{})}
	go c.read(also)
	return c, nil
}

func (c *console) read(also io.Writer) {
	buf := make([]byte, 4096)
	for {
		n, err := c.conn.Read(buf)
		c.log.Write(buf[:n])
		if also != nil {
			also.Write(buf[:n])
		}
		c.mu.Lock()
		c.text = append(c.text, buf[:n]...)
		c.ended = err != nil
		close(c.more)
		c.more = make(chan struct{})
		c.mu.Unlock()
		if err != nil {
			c.log.Close()
			return
		}
	}
}

func (c *console) close() { c.conn.Close() }

// Console is everything printed since the power-on.
func (vm *VM) Console() string {
	vm.console.mu.Lock()
	defer vm.console.mu.Unlock()
	return string(vm.console.text)
}

// Send types text on the console.
func (vm *VM) Send(text string) error {
	_, err := io.WriteString(vm.console.conn, text)
	return err
}

// Expect waits until what the console has printed since the last match matches
// the regular expression, and returns the match and its groups.
func (vm *VM) Expect(pattern string, within time.Duration) ([]string, error) {
	_, match, err := vm.ExpectAny(within, pattern)
	return match, err
}

// ExpectAny waits for one of several patterns and returns the index of the one
// that matched; when more than one does, the earliest text wins.
func (vm *VM) ExpectAny(within time.Duration, patterns ...string) (int, []string, error) {
	res := make([]*regexp.Regexp, len(patterns))
	for i, p := range patterns {
		re, err := regexp.Compile("(?m)" + p)
		if err != nil {
			return 0, nil, err
		}
		res[i] = re
	}
	deadline := time.After(within)
	c := vm.console
	for {
		c.mu.Lock()
		i, match := c.match(res)
		more, ended := c.more, c.ended
		rest := string(tail(c.text[c.matched:], 2000))
		c.mu.Unlock()
		switch {
		case match != nil:
			return i, match, nil
		case ended:
			return 0, nil, fmt.Errorf("console closed before %s; it ends:\n%s\n%s", strings.Join(patterns, " or "), rest, vm.stderr.String())
		}
		select {
		case <-more:
		case <-deadline:
			return 0, nil, fmt.Errorf("no %s on the console in %v; it ends:\n%s", strings.Join(patterns, " or "), within, rest)
		}
	}
}

// match finds the earliest match behind the last one; c.mu is held.
func (c *console) match(res []*regexp.Regexp) (which int, groups []string) {
	text := c.text[c.matched:]
	first := []int(nil)
	for i, re := range res {
		loc := re.FindSubmatchIndex(text)
		if loc != nil && (first == nil || loc[0] < first[0]) {
			first, which = loc, i
		}
	}
	if first == nil {
		return 0, nil
	}
	for g := 0; g < len(first); g += 2 {
		group := ""
		if first[g] >= 0 {
			group = string(text[first[g]:first[g+1]])
		}
		groups = append(groups, group)
	}
	c.matched += first[1]
	return which, groups
}
