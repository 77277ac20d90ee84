package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
)

const (
	runtimePath  = "/usr/bin/runc"
	runtimeState = "/run/runc"
	bundlesPath  = "/run/holdfast/bundles"
	// stopTime is how long a container may take to end after SIGTERM.
	stopTime = 10 * time.Second
)

var containerRuntimeEnv = []string{"PATH=/usr/bin:/bin:/usr/sbin:/sbin"}

// restartDelay grows from the first value to the second while a service keeps
// dying, and falls back when it has lived for restartReset.
const (
	restartDelayMin = 500 * time.Millisecond
	restartDelayMax = 30 * time.Second
	restartReset    = time.Minute
)

// container is one entry of the spec at run time.
type container struct {
	image.Container
	procs *processes
	log   *serviceLog
	slog  *slog.Logger

	mu       sync.Mutex
	state    State
	pid      int
	restarts int
	reason   string // of the last exit or failed check
}

func (c *container) set(s State, reason string) {
	c.mu.Lock()
	changed := c.state != s
	c.state, c.reason = s, reason
	c.mu.Unlock()
	if !changed {
		return
	}
	args := []any{"service", c.Name, "state", string(s)}
	if reason != "" {
		args = append(args, "reason", reason)
	}
	if s == Failed || s == Unhealthy {
		c.slog.Warn("service", args...)
		return
	}
	c.slog.Info("service", args...)
}

// prepare makes the runtime bundle: config.json from the verified root, and a
// rootfs that is the image's own, read-only or under a tmpfs.
func (c *container) prepare() (bundle string, err error) {
	for _, dir := range c.Mkdir {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
	}
	bundle = filepath.Join(bundlesPath, c.Name)
	rootfs := filepath.Join(bundle, "rootfs")
	if err := os.MkdirAll(rootfs, 0o755); err != nil {
		return "", err
	}
	config, err := os.ReadFile(filepath.Join(c.Bundle, "config.json"))
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), config, 0o600); err != nil {
		return "", err
	}
	lower := filepath.Join(c.Bundle, "rootfs")
	if c.ReadOnly {
		return bundle, mount(lower, rootfs, "", unix.MS_BIND|unix.MS_REC, "")
	}
	tmp := filepath.Join(bundle, "tmp")
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return "", err
	}
	if err := mount("tmpfs", tmp, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700"); err != nil {
		return "", err
	}
	upper, work := filepath.Join(tmp, "upper"), filepath.Join(tmp, "work")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
		return "", err
	}
	return bundle, mount("overlay", rootfs, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work)
}

// clean undoes prepare and what a dead container left with the runtime.
func (c *container) clean() {
	bundle := filepath.Join(bundlesPath, c.Name)
	if exists(filepath.Join(runtimeState, c.Name)) {
		c.runtime("delete", "--force", c.Name)
	}
	for _, at := range []string{"rootfs", "tmp"} {
		for unix.Unmount(filepath.Join(bundle, at), unix.MNT_DETACH) == nil {
		}
	}
	os.RemoveAll(bundle)
}

// runtime runs the OCI runtime with output to the container's log.
func (c *container) runtime(args ...string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		c.log.consume(r)
		r.Close()
		close(done)
	}()
	err = c.procs.run(append([]string{runtimePath, "--root", runtimeState}, args...), w)
	w.Close()
	<-done
	if err != nil {
		return fmt.Errorf("runc %s: %w", args[0], err)
	}
	return nil
}

// launch starts the container detached and returns its process.
func (c *container) launch() (<-chan unix.WaitStatus, error) {
	c.clean()
	bundle, err := c.prepare()
	if err != nil {
		return nil, err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	go func() {
		c.log.consume(out)
		out.Close()
	}()
	defer in.Close()
	pidFile := filepath.Join(bundle, "pid")
	args := []string{runtimePath, "--root", runtimeState, "run", "--detach", "--bundle", bundle, "--pid-file", pidFile, c.Name}
	if err := c.procs.run(args, in); err != nil {
		return nil, fmt.Errorf("runc run: %w; it said: %s", err, strings.Join(c.log.tail(3), " / "))
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", pidFile, err)
	}
	c.mu.Lock()
	c.pid = pid
	c.mu.Unlock()
	return c.procs.watchPID(pid), nil
}

// once runs the container to its end.
func (c *container) once(ctx context.Context) error {
	c.set(Starting, "")
	end, err := c.launch()
	if err != nil {
		c.set(Failed, err.Error())
		return err
	}
	c.set(Running, "")
	defer c.clean()
	select {
	case status := <-end:
		if err := exitError(status); err != nil {
			c.set(Failed, err.Error())
			return err
		}
		c.set(Exited, "")
		return nil
	case <-ctx.Done():
		c.stop(end)
		return ctx.Err()
	}
}

// keep runs a service until ctx ends, restarting it as its policy says.
func (c *container) keep(ctx context.Context) {
	delay := restartDelayMin
	for ctx.Err() == nil {
		began := time.Now()
		err := c.serve(ctx)
		if ctx.Err() != nil {
			c.set(Exited, "stopped")
			return
		}
		reason := "exit status 0"
		if err != nil {
			reason = err.Error()
		}
		if c.Restart == "never" || c.Restart == "on-failure" && err == nil {
			state := Exited
			if err != nil {
				state = Failed
			}
			c.set(state, reason)
			return
		}
		if time.Since(began) > restartReset {
			delay = restartDelayMin
		}
		c.mu.Lock()
		c.restarts++
		c.mu.Unlock()
		c.set(Waiting, reason)
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
		delay = min(2*delay, restartDelayMax)
	}
}

// serve runs the service once, with its health check beside it.
func (c *container) serve(ctx context.Context) error {
	c.set(Starting, "")
	end, err := c.launch()
	if err != nil {
		return err
	}
	defer c.clean()
	c.set(Running, "")
	checks, stopChecks := context.WithCancel(ctx)
	defer stopChecks()
	sick := make(chan error, 1)
	if c.Health != nil {
		go func() { sick <- c.watchHealth(checks) }()
	}
	select {
	case status := <-end:
		return exitError(status)
	case err := <-sick:
		c.stop(end)
		return err
	case <-ctx.Done():
		c.stop(end)
		return nil
	}
}

// stop asks the container to end, then kills it.
func (c *container) stop(end <-chan unix.WaitStatus) {
	c.runtime("kill", c.Name, "TERM")
	select {
	case <-end:
		return
	case <-time.After(stopTime):
	}
	c.runtime("kill", c.Name, "KILL")
	select {
	case <-end:
	case <-time.After(stopTime):
		c.slog.Warn("service does not die", "service", c.Name)
	}
}

// logPath is where a container's output is kept: on the first data volume.
func logPath(volumes []image.Volume, name string) string {
	if len(volumes) == 0 {
		return ""
	}
	return filepath.Join(volumes[0].Mount, stateFolder, "log", name+".log")
}

// exists says whether a path is there; an error that is not "not there" counts
// as there, so that nothing is skipped silently.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
