package agent

import (
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// reaper is a process table at work in the test's process, which becomes the
// parent of orphans as PID 1 is. These tests wait for every child there is,
// so they must not run beside others that start programs: no t.Parallel.
func reaper(t *testing.T) *processes {
	t.Helper()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	p, stop, done := newProcesses(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		p.reap(stop)
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0); err != nil {
			t.Error(err)
		}
	})
	return p
}

func shell(t *testing.T, p *processes, script string, out *os.File) (int, <-chan unix.WaitStatus) {
	t.Helper()
	pid, end, err := p.start([]string{"/bin/sh", "-c", script}, &os.ProcAttr{Env: containerRuntimeEnv, Files: []*os.File{nil, out, out}})
	if err != nil {
		t.Fatal(err)
	}
	return pid, end
}

func wantEnd(t *testing.T, end <-chan unix.WaitStatus) unix.WaitStatus {
	t.Helper()
	select {
	case status := <-end:
		return status
	case <-time.After(10 * time.Second):
		t.Fatal("the end was not noticed within 10 s")
		return 0
	}
}

// gone waits until no such process, living or dead, is left.
func gone(t *testing.T, pid int) {
	t.Helper()
	for range 1000 {
		if unix.Kill(pid, 0) == unix.ESRCH {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("process %d is still there", pid)
}

func TestExitStatusAndSignals(t *testing.T) {
	p := reaper(t)
	for script, want := range map[string]string{
		"true":          "",
		"exit 3":        "exit status 3",
		"exit 255":      "exit status 255",
		"kill -KILL $$": "killed by signal 9 (killed)",
		"kill -TERM $$": "killed by signal 15 (terminated)",
		"kill -SEGV $$": "killed by signal 11 (segmentation fault)",
	} {
		_, end := shell(t, p, script, nil)
		got := ""
		if err := exitError(wantEnd(t, end)); err != nil {
			got = err.Error()
		}
		if got != want && got != want+" (core dumped)" {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	if err := exitError(unix.WaitStatus(0x137f)); err == nil || err.Error() != "wait status 0x137f" {
		t.Errorf("stopped: %v", err)
	}
	if _, _, err := p.start([]string{"/does/not/exist"}, &os.ProcAttr{}); err == nil || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Errorf("error %v", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.watch) != 0 {
		t.Errorf("%d entries are left in the table", len(p.watch))
	}
}

// TestRun gives the program's output and its end.
func TestRun(t *testing.T) {
	p := reaper(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	log := &serviceLog{}
	done := make(chan struct{})
	go func() { log.consume(r); close(done) }()
	err = p.run([]string{"/bin/sh", "-c", "echo out; echo err >&2; cat; exit 4"}, w)
	w.Close()
	<-done
	if err == nil || err.Error() != "exit status 4" {
		t.Errorf("error %v", err)
	}
	if got := strings.Join(log.tail(9), ","); got != "out,err" {
		t.Errorf("output %q", got)
	}
}

// TestManyChildrenAtOnce: signals coalesce, ends are not lost.
func TestManyChildrenAtOnce(t *testing.T) {
	p := reaper(t)
	var ends []<-chan unix.WaitStatus
	for range 100 {
		_, end := shell(t, p, "exit 7", nil)
		ends = append(ends, end)
	}
	for i, end := range ends {
		if status := wantEnd(t, end); status.ExitStatus() != 7 {
			t.Fatalf("child %d: %v", i, exitError(status))
		}
	}
}

// TestOrphans: a process whose parent ended is reaped, and its end is given to
// who asks, whether it ends before the question or after.
func TestOrphans(t *testing.T) {
	p := reaper(t)
	orphan := func(script string) int {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		_, end := shell(t, p, "sh -c '"+script+"' >/dev/null 2>&1 & echo $!", w)
		w.Close()
		if err := exitError(wantEnd(t, end)); err != nil {
			t.Fatal(err)
		}
		log := &serviceLog{}
		log.consume(r)
		pid := 0
		for _, c := range log.tail(1)[0] {
			pid = pid*10 + int(c-'0')
		}
		return pid
	}
	early := orphan("sleep 0.2; exit 5") // outlives the shell, which would reap it else
	gone(t, early)
	if status := wantEnd(t, p.watchPID(early)); status.ExitStatus() != 5 {
		t.Errorf("ended before: %v", exitError(status))
	}
	late := orphan("sleep 0.2; exit 6")
	if status := wantEnd(t, p.watchPID(late)); status.ExitStatus() != 6 {
		t.Errorf("ended after: %v", exitError(status))
	}
	unasked := orphan("exit 1")
	gone(t, unasked)

	// PIDs come round. The end of an earlier process of the same number is
	// not the end of this one.
	again := orphan("sleep 0.3; exit 9")
	p.mu.Lock()
	p.ended[again] = 0
	p.mu.Unlock()
	if status := wantEnd(t, p.watchPID(again)); status.ExitStatus() != 9 {
		t.Errorf("the end of an earlier process of this number was taken for this one's: %v", exitError(status))
	}
}

// TestForgottenOrphans: ends that nobody asks for do not add up.
func TestForgottenOrphans(t *testing.T) {
	p := newProcesses()
	for pid := range forgetAfter {
		p.ended[1<<23+pid] = 0
	}
	proc, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		p.collect()
		if _, ok := p.ended[proc.Pid]; ok {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if _, ok := p.ended[proc.Pid]; !ok || len(p.ended) != 1 {
		t.Errorf("%d ends are kept, the last one among them: %v", len(p.ended), ok)
	}
}
