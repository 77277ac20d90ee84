package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
)

// processVariable makes this test binary one of the box's commands after a hand-off.
const processVariable = "HOLDFAST_TEST_UPDATE"

func TestMain(m *testing.M) {
	if text := os.Getenv(processVariable); text != "" {
		os.Exit(updateProcess(text))
	}
	os.Exit(m.Run())
}

// command is what such a process is told to do.
type command struct {
	Verb, Want string // apply, status or bless
	// Hold is a file that it waits for in the middle of its first large write; "" is not to wait.
	Hold string

	Dir, Locks, Disk, Repo string
	Trust                  []byte
	Version                string
	Root                   image.Verity
	Now                    time.Time
}

// updateProcess prints "held" when it holds, and in the end "done" or why not.
func updateProcess(text string) int {
	var c command
	err := json.Unmarshal([]byte(text), &c)
	if err == nil {
		err = c.run()
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("done")
	return 0
}

func (c *command) run() error {
	if c.Verb == "bless" {
		s, err := openSlots(c.Disk, "a")
		if err != nil {
			return err
		}
		defer s.close()
		return s.bless(c.Locks)
	}
	u := &Updater{
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Config: image.Update{Channel: "stable"}, Trust: c.Trust, BuildTime: c.Now,
		Device: update.Device{Product: "gate", Channel: "stable", Arch: runtime.GOARCH, Version: c.Version, RootHash: c.Root.RootHash, ID: "box 1"},
		Dir:    c.Dir, Slot: partition.SlotA, Root: c.Root, Now: func() time.Time { return c.Now },
		OpenDisk: func() (*partition.Disk, io.Closer, error) {
			f, err := partition.OpenShared(c.Disk)
			if err != nil {
				return nil, nil, err
			}
			d, err := partition.Open(&held{Device: f, until: c.Hold})
			return d, f, err
		},
	}
	if err := u.share(c.Locks); err != nil {
		return err
	}
	if c.Verb == "status" {
		fmt.Println(u.Status().Doing)
		return nil
	}
	src, err := update.OpenDir(c.Repo)
	if err != nil {
		return err
	}
	defer src.Close()
	_, err = u.Apply(context.Background(), src, "test", c.Want)
	return err
}

// held waits in its first large write, which is of the root.
type held struct {
	partition.Device
	until string
	begun atomic.Bool
}

func (h *held) WriteAt(p []byte, off int64) (int, error) {
	if h.until != "" && len(p) > 256<<10 && h.begun.CompareAndSwap(false, true) {
		fmt.Println("held")
		for _, err := os.Stat(h.until); errors.Is(err, os.ErrNotExist); _, err = os.Stat(h.until) {
			time.Sleep(5 * time.Millisecond)
		}
	}
	return h.Device.WriteAt(p, off)
}

// handedOff is a box whose commands are processes of their own.
type handedOff struct {
	*appliance
	c command
}

func newHandedOff(t *testing.T) *handedOff {
	v := newVendor(t, "1.0.0", "1.1.0", "1.2.0")
	a := newAppliance(v, "1.0.0")
	b := &handedOff{a, command{
		Dir: a.dir, Locks: t.TempDir(), Disk: filepath.Join(t.TempDir(), "disk"), Repo: v.dir, Trust: a.u.Trust,
		Version: "1.0.0", Root: a.u.Root, Now: today,
	}}
	f, err := partition.CreateFile(b.c.Disk, a.dev.Size())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	zeros, buf := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < f.Size(); off += int64(len(buf)) {
		if _, err := a.dev.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buf, zeros) {
			put(t, f, buf, off)
		}
	}
	a.dev = f
	return b
}

// process is one that was started.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	out *bufio.Reader
}

func (b *handedOff) start(verb, want, hold string) *process {
	b.t.Helper()
	c := b.c
	c.Verb, c.Want, c.Hold = verb, want, hold
	text, err := json.Marshal(c)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute) // one that hangs is a failure too
	p := &process{t: b.t, cmd: exec.CommandContext(ctx, os.Args[0], "-test.run=^$")}
	p.cmd.Env = append(os.Environ(), processVariable+"="+string(text))
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { cancel(); p.cmd.Wait() })
	return p
}

// line is what it prints next.
func (p *process) line() string {
	p.t.Helper()
	text, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("after %q: %v", text, err)
	}
	return strings.TrimSpace(text)
}

func (p *process) want(line string) {
	p.t.Helper()
	if got := p.line(); got != line {
		p.t.Fatalf("process %d says %q, want %q", p.cmd.Process.Pid, got, line)
	}
}

// state is what two processes must not both write: the disk and the account.
func (b *handedOff) state() string {
	b.t.Helper()
	account, err := os.ReadFile(filepath.Join(b.dir, "state.json"))
	if err != nil {
		b.t.Fatal(err)
	}
	sum, err := exec.Command("sha256sum", b.c.Disk).Output()
	if err != nil {
		b.t.Fatal(err)
	}
	return string(account) + string(sum)
}

var underWay = regexp.MustCompile(`^another update is under way: process (\d+), since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$`)

// wantUnderWay is that a process was refused because p is at work.
func (p *process) wantUnderWay(line string) {
	p.t.Helper()
	if m := underWay.FindStringSubmatch(line); m == nil || m[1] != strconv.Itoa(p.cmd.Process.Pid) {
		p.t.Errorf("%q does not name process %d", line, p.cmd.Process.Pid)
	}
}

// TestUpdateProcesses: a command and a timer at the same time. The second one is
// refused, says why, and has changed nothing; a process that was killed is in nobody's way.
func TestUpdateProcesses(t *testing.T) {
	b := newHandedOff(t)
	hold := filepath.Join(t.TempDir(), "go")
	first := b.start("apply", "1.1.0", hold)
	first.want("held")
	before := b.state()
	first.wantUnderWay(b.start("apply", "1.2.0", "").line())
	status := b.start("status", "", "")
	first.wantUnderWay(status.line())
	status.want("done")
	b.start("bless", "", "").want("done") // this slot is good: nothing to wait for
	if b.state() != before {
		t.Error("the disk or the account has changed")
	}
	putFile(t, hold, nil)
	first.want("done")
	b.wantEntries("b 1.1.0 3", "a 1.0.0")
	b.wantMemory("pending 1.1.0 in b;applied 1.0.0>1.1.0;")

	killed := b.start("apply", "1.2.0", filepath.Join(t.TempDir(), "never"))
	killed.want("held")
	if err := killed.cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := killed.cmd.Wait(); err == nil {
		t.Fatal("it was not killed")
	}
	b.wantEntries("a 1.0.0")
	b.start("apply", "1.2.0", "").want("done")
	b.wantEntries("b 1.2.0 3", "a 1.0.0")
	b.mustBoot(partition.SlotB, "1.2.0")
}

// TestUpdateProcessesAtOnce lets several begin in one moment, as often as it takes to
// meet in different places. One installs; the others find that it does, or has.
func TestUpdateProcessesAtOnce(t *testing.T) {
	b := newHandedOff(t)
	for round, want := range []string{"1.1.0", "1.2.0", "1.1.0"} {
		var all []*process
		for range 4 {
			all = append(all, b.start("apply", want, ""))
		}
		done := 0
		for _, p := range all {
			line := p.line()
			if line == "done" {
				done++
			} else if !underWay.MatchString(line) {
				t.Errorf("round %d: %s", round, line)
			}
		}
		if done == 0 {
			t.Errorf("round %d: nobody installed it", round)
		}
		b.wantEntries("b "+want+" 3", "a 1.0.0")
	}
	b.wantMemory("pending 1.1.0 in b;applied 1.0.0>1.1.0;applied 1.0.0>1.2.0;applied 1.0.0>1.1.0;")
	b.mustBoot(partition.SlotB, "1.1.0")
}

// TestBlessWaits for a process that is about to write the other slot, which then gives
// way: what runs is not known to be good.
func TestBlessWaits(t *testing.T) {
	b := newHandedOff(t)
	if err := b.disk().Arm(partition.SlotA, 3); err != nil {
		t.Fatal(err)
	}
	lock, err := lockFile(filepath.Join(b.c.Locks, diskLock), unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	p := b.start("bless", "", "")
	said := make(chan string)
	go func() {
		text, _ := p.out.ReadString('\n')
		said <- strings.TrimSpace(text)
	}()
	select {
	case text := <-said:
		t.Errorf("it did not wait: %s", text)
	case <-time.After(300 * time.Millisecond):
	}
	b.wantEntries("a 1.0.0 3")
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if text := <-said; text != "done" {
		t.Error(text)
	}
	b.wantEntries("a 1.0.0")
}

// TestHolder is what is said of a lock whose process did not come to say who it is.
func TestHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	for _, text := range []string{"", "12", "x y\n"} {
		putFile(t, path, []byte(text))
		if got := holder(path); got != "a process that did not say which" {
			t.Errorf("%q: %s", text, got)
		}
	}
	if _, err := claimFile(filepath.Join(path, "in a file"), 0); err == nil || errors.Is(err, ErrUpdating) {
		t.Error(err)
	}
}
