package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/holdfast-os/holdfast/image/build"
)

// progress shows what a long command does: a line that is rewritten on a
// terminal, a line every few seconds elsewhere.
type progress struct {
	mu       sync.Mutex
	out      io.Writer
	terminal bool
	what     string
	began    time.Time // of this step
	printed  time.Time
	open     bool // a rewritable line is on the screen
}

// intervals between lines.
const (
	terminalInterval = 100 * time.Millisecond
	plainInterval    = 5 * time.Second
)

func newProgress(out io.Writer) *progress {
	f, ok := out.(*os.File)
	return &progress{out: out, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

func (p *progress) step(s build.Step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	interval := plainInterval
	if p.terminal {
		interval = terminalInterval
	}
	if s.What == p.what && now.Sub(p.printed) < interval {
		return
	}
	if s.What != p.what {
		p.finishLine()
		p.what, p.began = s.What, now
	}
	p.printed = now
	text := stepText(s, now.Sub(p.began))
	if !p.terminal {
		fmt.Fprintln(p.out, text)
		return
	}
	fmt.Fprintf(p.out, "\r\x1b[K%s", text)
	p.open = true
}

// stepText is the step with bytes, rate and time left, as far as they are known.
func stepText(s build.Step, took time.Duration) string {
	if s.TotalBytes == 0 || s.DoneBytes == 0 || took < 100*time.Millisecond {
		return s.What
	}
	rate := float64(s.DoneBytes) / took.Seconds()
	left := time.Duration(float64(s.TotalBytes-s.DoneBytes) / rate * float64(time.Second)).Round(time.Second)
	return fmt.Sprintf("%s: %s of %s, %s/s, %v left", s.What, bytesText(s.DoneBytes), bytesText(s.TotalBytes), bytesText(int64(rate)), max(left, 0))
}

func (p *progress) finishLine() {
	if p.open {
		fmt.Fprintln(p.out)
		p.open = false
	}
}

func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.finishLine()
}
