package agent

import (
	"fmt"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// processes is the process table of PID 1: every child that ends is reaped
// here, whether the agent started it or it was orphaned. os/exec cannot be used
// beside it: both would wait for the same children.
type processes struct {
	mu sync.Mutex
	// watch holds who wants to know the end of a child. The mutex is held over
	// the start of a child and its entry here, so that no end is missed.
	watch map[int]chan unix.WaitStatus
	// ended keeps the status of containers' processes that end between the
	// runtime's exit and watchPID, bounded by forget.
	ended map[int]unix.WaitStatus
}

// forgetAfter bounds processes.ended: orphans nobody asks for.
const forgetAfter = 1024

func newProcesses() *processes {
	return &processes{watch: map[int]chan unix.WaitStatus{}, ended: map[int]unix.WaitStatus{}}
}

// reap collects ended children until stop is closed.
func (p *processes) reap(stop <-chan struct{}) {
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	defer signal.Stop(child)
	for {
		p.collect()
		select {
		case <-child:
		case <-stop:
			return
		}
	}
}

func (p *processes) collect() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if ch, ok := p.watch[pid]; ok {
			ch <- status
			delete(p.watch, pid)
			continue
		}
		if len(p.ended) >= forgetAfter {
			clear(p.ended)
		}
		p.ended[pid] = status
	}
}

// start runs argv; the channel gives its end.
func (p *processes) start(argv []string, attr *os.ProcAttr) (pid int, end <-chan unix.WaitStatus, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	proc, err := os.StartProcess(argv[0], argv, attr)
	if err != nil {
		return 0, nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	ch := make(chan unix.WaitStatus, 1)
	p.watch[proc.Pid] = ch
	delete(p.ended, proc.Pid) // an earlier process of that number
	pid = proc.Pid
	return pid, ch, proc.Release()
}

// watchPID gives the end of an orphan that became the agent's child. Numbers
// come round: an end that is kept is this process's only if there is none of
// that number now. One that has ended and is not collected yet still counts as
// there, and the mutex keeps it so.
func (p *processes) watchPID(pid int) <-chan unix.WaitStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	ch := make(chan unix.WaitStatus, 1)
	status, ok := p.ended[pid]
	delete(p.ended, pid)
	if ok && unix.Kill(pid, 0) == unix.ESRCH {
		ch <- status
		return ch
	}
	p.watch[pid] = ch
	return ch
}

// run runs argv to its end with output to out and returns an error unless it
// exits 0.
func (p *processes) run(argv []string, out *os.File) error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	_, end, err := p.start(argv, &os.ProcAttr{Env: containerRuntimeEnv, Files: []*os.File{null, out, out}})
	if err != nil {
		return err
	}
	return exitError(<-end)
}

// exitError explains a wait status; nil for exit 0.
func exitError(status unix.WaitStatus) error {
	switch {
	case status.Exited() && status.ExitStatus() == 0:
		return nil
	case status.Exited():
		return fmt.Errorf("exit status %d", status.ExitStatus())
	case status.Signaled():
		return fmt.Errorf("killed by signal %d (%v)", status.Signal(), status.Signal())
	}
	return fmt.Errorf("wait status %#x", uint32(status))
}
