package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// consoleHandler prints records for a person at the console:
//
//	holdfast 12.345: volume open name=data method=tpm
//
// with the seconds since the kernel started, the only clock a box can trust.
type consoleHandler struct {
	out   io.Writer
	mu    *sync.Mutex
	attrs string
}

func newConsoleHandler(out io.Writer) *consoleHandler {
	return &consoleHandler{out: out, mu: &sync.Mutex{}}
}

func (h *consoleHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h *consoleHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	fmt.Fprintf(&b, "holdfast %.3f: ", uptime().Seconds())
	if r.Level >= slog.LevelWarn {
		b.WriteString(strings.ToLower(r.Level.String()) + ": ")
	}
	b.WriteString(r.Message)
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(formatAttr(a))
		return true
	})
	b.WriteString("\r\n")
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.out, b.String())
	return err
}

func formatAttr(a slog.Attr) string {
	v := brief(a.Value.String())
	// What comes from a disk or a network must not draw on the console.
	odd := func(r rune) bool { return r == ' ' || r == '"' || !unicode.IsPrint(r) }
	if v == "" || strings.ContainsFunc(v, odd) || !utf8.ValidString(v) {
		v = fmt.Sprintf("%q", v)
	}
	return " " + a.Key + "=" + v
}

func (h *consoleHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	for _, a := range attrs {
		with.attrs += formatAttr(a)
	}
	return &with
}

func (h *consoleHandler) WithGroup(string) slog.Handler { return h }

// uptime is the time since the kernel started.
func uptime() time.Duration {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0
	}
	var seconds float64
	fmt.Sscan(string(b), &seconds)
	return time.Duration(seconds * float64(time.Second))
}

// serviceLogBytes caps one container's log; two files are kept.
const serviceLogBytes = 1 << 20

// serviceLog takes what a container prints: the last lines stay in memory for
// status, everything goes to a capped file on the data volume when there is one.
type serviceLog struct {
	mu    sync.Mutex
	path  string // "" keeps lines in memory only
	file  *os.File
	size  int64
	lines []string
	also  io.Writer // the console, for containers that ask for it
	name  string
}

const keptLines = 200

// consume reads lines until r ends. Lines are cut at 8 KiB.
func (l *serviceLog) consume(r io.Reader) {
	in := bufio.NewReaderSize(r, 8<<10)
	for {
		line, err := in.ReadSlice('\n')
		if len(line) > 0 {
			l.add(strings.TrimRight(string(line), "\r\n"))
		}
		if err != nil && err != bufio.ErrBufferFull {
			return
		}
	}
}

func (l *serviceLog) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	if len(l.lines) > keptLines {
		l.lines = l.lines[len(l.lines)-keptLines:]
	}
	if l.also != nil {
		fmt.Fprintf(l.also, "%s | %s\r\n", l.name, line)
	}
	if l.path == "" {
		return
	}
	if err := l.write(line + "\n"); err != nil {
		l.closeFile() // a full or failed disk must not stop the service; memory goes on
	}
}

func (l *serviceLog) write(text string) error {
	if err := l.openFile(); err != nil {
		return err
	}
	if l.size > 0 && l.size+int64(len(text)) > serviceLogBytes {
		l.file.Close()
		l.file = nil
		if err := os.Rename(l.path, l.path+".1"); err != nil {
			return err
		}
		if err := l.openFile(); err != nil {
			return err
		}
	}
	n, err := l.file.WriteString(text)
	l.size += int64(n)
	return err
}

func (l *serviceLog) openFile() error {
	if l.file != nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(l.path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.file, l.size = f, info.Size()
	return nil
}

// closeFile ends the writing to a file for good: the volume may be about to be
// unmounted, while a container still prints.
func (l *serviceLog) closeFile() {
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.path = nil, ""
}

// tail is the last n lines.
func (l *serviceLog) tail(n int) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.lines[max(0, len(l.lines)-n):]...)
}

func (l *serviceLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closeFile()
}
