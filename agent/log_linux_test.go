package agent

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

func TestConsoleFormat(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(newConsoleHandler(&out))
	log.Debug("not shown")
	log.Info("volume open", "name", "data", "method", "tpm")
	log.Warn("header not mended", "error", errors.New("write 4096 bytes: input/output error"))
	log.Error("bad")
	log.With("interface", "eth0").Info("network", "address", "10.0.2.15/24", "n", 3, "empty", "")
	log.Info("hostile", "name", "a\r\nholdfast 1.000: provisioned", "label", "\x1b[2J", "quote", `say "x"`, "utf8", "größe")
	want := strings.Join([]string{
		`holdfast T: volume open name=data method=tpm`,
		`holdfast T: warn: header not mended error="write 4096 bytes: input/output error"`,
		`holdfast T: error: bad`,
		`holdfast T: network interface=eth0 address=10.0.2.15/24 n=3 empty=""`,
		`holdfast T: hostile name="a\r\nholdfast 1.000: provisioned" label="\x1b[2J" quote="say \"x\"" utf8=größe`,
		``,
	}, "\r\n")
	got := regexp.MustCompile(`(?m)^holdfast \d+\.\d{3}:`).ReplaceAllString(out.String(), "holdfast T:")
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// TestConsoleLinesStayWhole: services and agent print at the same time.
func TestConsoleLinesStayWhole(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(newConsoleHandler(&out))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				log.With("i", i).Info("line", "text", strings.Repeat("x", 100))
			}
		})
	}
	wg.Wait()
	line := regexp.MustCompile(`^holdfast \d+\.\d{3}: line i=\d text=x{100}\r$`)
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if len(lines) != 400 {
		t.Errorf("%d lines", len(lines))
	}
	for _, l := range lines {
		if !line.MatchString(l) {
			t.Fatalf("line %q", l)
		}
	}
}

func TestUptime(t *testing.T) {
	a := uptime()
	if b := uptime(); a <= 0 || b < a {
		t.Errorf("uptime %v, then %v", a, b)
	}
}

// TestServiceLogIsCapped: two files of at most a MiB each and the last lines in memory,
// over restarts too.
func TestServiceLogIsCapped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log", "web.log")
	var console bytes.Buffer
	n := 0
	for range 4 { // lives of the agent
		l := &serviceLog{name: "web", path: path, also: &console}
		var in bytes.Buffer
		for in.Len() < 700<<10 {
			n++
			fmt.Fprintf(&in, "line %d %s\r\n", n, strings.Repeat(".", n%300))
		}
		l.consume(&in)
		if got := l.tail(2); len(got) != 2 || !strings.HasPrefix(got[1], fmt.Sprintf("line %d ", n)) {
			t.Fatalf("tail %q", got)
		}
		if got := l.tail(100000); len(got) != keptLines {
			t.Errorf("%d lines in memory", len(got))
		}
		l.close()
	}
	var all []byte
	for _, name := range []string{path + ".1", path} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > serviceLogBytes {
			t.Errorf("%s has %d bytes", name, len(b))
		}
		all = append(all, b...)
	}
	// What the two files hold is the end of everything, without a gap.
	lines := strings.Split(strings.TrimSuffix(string(all), "\n"), "\n")
	for i, l := range lines {
		if want := fmt.Sprintf("line %d ", n-len(lines)+1+i); !strings.HasPrefix(l, want) {
			t.Fatalf("line %d of the files is %.20q, want %q", i, l, want)
		}
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 2 {
		t.Errorf("%d files, %v", len(entries), err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if !strings.Contains(console.String(), fmt.Sprintf("web | line %d ", n)) {
		t.Error("nothing on the console")
	}
}

func TestServiceLogOddInput(t *testing.T) {
	l := &serviceLog{}
	l.consume(strings.NewReader("a\n\nb\r\n" + strings.Repeat("x", 20<<10) + "\nlast"))
	var lengths []int
	for _, line := range l.tail(100) {
		lengths = append(lengths, len(line))
	}
	if got, want := fmt.Sprint(lengths), "[1 0 1 8192 8192 4096 4]"; got != want {
		t.Errorf("lengths %s, want %s", got, want)
	}
}

// TestServiceLogSurvivesItsDisk: a disk that fails costs the file and not the service.
func TestServiceLogSurvivesItsDisk(t *testing.T) {
	l := &serviceLog{path: "/dev/null/web.log"}
	l.add("one")
	l.add("two")
	if got := l.tail(5); len(got) != 2 || l.path != "" || l.file != nil {
		t.Errorf("%q, path %q", got, l.path)
	}
	// After close nothing may open a file on the volume again: it is about to
	// be unmounted, and a container may still print.
	path := filepath.Join(t.TempDir(), "late.log")
	l = &serviceLog{path: path}
	l.close()
	l.add("too late")
	if exists(path) || len(l.tail(1)) != 1 {
		t.Error("a closed log wrote to its volume")
	}
}
