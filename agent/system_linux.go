package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/dm"
	"github.com/holdfast-os/holdfast/image"
)

// system is the agent as PID 1 on the root.
type system struct {
	app      image.Appliance
	log      *slog.Logger
	console  io.Writer
	procs    *processes
	power    chan bool   // true: reboot
	started  atomic.Bool // every onboot container has succeeded, services are being kept
	failed   atomic.Bool // one has not
	updater  *Updater    // nil in a release that takes no updates
	keeper   *Keeper     // nil without data volumes
	sealed   sealed
	keys     atomic.Pointer[SecureBootStatus] // nil until they were looked at
	loader   atomic.Pointer[LoaderStatus]     // the same
	custody  *Custody                         // nil in an appliance without data volumes
	reporter *Reporter                        // nil in a release whose evidence is sent nowhere

	mu       sync.Mutex
	initrd   Status // what the initrd left
	problems []string
	onboot   []*container
	services []*container
}

// RunSystem is PID 1 on the verified root. It returns only when it could not
// start; the caller then reboots.
func RunSystem(console io.Writer) error {
	s := &system{log: slog.New(newConsoleHandler(console)), console: console, procs: newProcesses(), power: make(chan bool, 1)}
	if err := s.load(); err != nil {
		return err
	}
	go s.procs.reap(nil)
	if err := mountAll(systemMounts); err != nil {
		return err
	}
	s.configureKernel()
	s.watchSignals()
	s.openKeeper()
	s.settleRecovery()
	s.settleUpdates()
	s.reporter = s.newReporter()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	if err := s.serveAPI(ctx); err != nil {
		s.problem(err.Error())
	}
	for _, i := range s.app.Network {
		go configure(ctx, s.log, i)
	}
	go s.feedWatchdog()
	go s.watchIntegrity(ctx)
	go s.judge(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.run(ctx)
	}()
	reboot := <-s.power
	stop()
	<-ended
	s.shutDown(reboot)
	return nil
}

// ErrNoBox says that this machine runs no release of Holdfast.
var ErrNoBox = errors.New("this is no box of Holdfast: no agent runs here, and no initrd of Holdfast left its state")

// noBox is the error of reading what every box has.
func noBox(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (%w)", ErrNoBox, err)
	}
	return err
}

// load reads what the build fixed and what the initrd found.
func (s *system) load() error {
	for path, v := range map[string]any{image.AppliancePath: &s.app, statePath: &s.initrd} {
		b, err := os.ReadFile(path)
		if err != nil {
			return noBox(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
	}
	for _, c := range s.app.OnBoot {
		s.onboot = append(s.onboot, s.newContainer(c))
	}
	for _, c := range s.app.Services {
		s.services = append(s.services, s.newContainer(c))
	}
	return nil
}

func (s *system) newContainer(c image.Container) *container {
	log := &serviceLog{name: c.Name, path: logPath(s.app.Volumes, c.Name), also: s.console}
	return &container{Container: c, procs: s.procs, log: log, slog: s.log, state: Waiting}
}

func (s *system) containers() []*container { return slices.Concat(s.onboot, s.services) }

// configureKernel sets what can fail without making the box useless; failures
// are problems a person sees in status.
func (s *system) configureKernel() {
	name := s.app.Hostname
	if name == "" {
		name = s.app.Name
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		s.problem(fmt.Sprintf("set host name %s: %v", name, err))
	}
	for _, setting := range s.app.Sysctl {
		key, value, _ := strings.Cut(setting, "=")
		path := filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/"))
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			s.problem(fmt.Sprintf("sysctl %s: %v", setting, err))
		}
	}
	if err := os.WriteFile(resolvPath, nil, 0o644); err != nil {
		s.problem(err.Error())
	}
	if err := loopbackUp(); err != nil {
		s.problem(err.Error())
	}
}

func (s *system) problem(text string) {
	s.log.Warn("problem", "text", text)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problems = append(s.problems, text)
}

// watchSignals turns the kernel's and the console's ways to ask for an end into
// one: ctrl-alt-del is SIGINT, as for every init.
func (s *system) watchSignals() {
	unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGUSR2)
	go func() {
		for sig := range signals {
			s.requestPower(sig != unix.SIGUSR2, "signal "+sig.String())
		}
	}()
	watchPowerButton(func() { s.requestPower(false, "power button") })
}

func (s *system) requestPower(reboot bool, why string) {
	select {
	case s.power <- reboot:
		s.log.Info("shutting down", "reboot", reboot, "why", why)
	default: // already on the way
	}
}

// run executes onboot in order and keeps the services until ctx ends. An onboot
// container that fails stops the boot: what it should have prepared is missing,
// and services must not run on that.
func (s *system) run(ctx context.Context) {
	for _, c := range s.onboot {
		if err := c.once(ctx); err != nil {
			if ctx.Err() == nil {
				s.failed.Store(true)
				s.problem(fmt.Sprintf("onboot %s: %v; no service is started", c.Name, err))
			}
			<-ctx.Done()
			return
		}
	}
	var all sync.WaitGroup
	for _, c := range s.services {
		all.Go(func() { c.keep(ctx) })
	}
	s.started.Store(true)
	go s.announce(ctx)
	all.Wait()
}

// announce prints the status once, when every service is up.
func (s *system) announce(ctx context.Context) {
	for !s.ready() {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
	s.log.Info("ready", "name", s.app.Name, "version", s.app.Version, "slot", s.initrd.Slot)
	var b strings.Builder
	s.status().WriteTo(&b)
	for line := range strings.Lines(b.String()) {
		fmt.Fprintf(s.console, "  %s\r\n", strings.TrimRight(line, "\n"))
	}
}

// ready says whether every service runs and those with a health check are healthy.
func (s *system) ready() bool {
	for _, c := range s.services {
		c.mu.Lock()
		state := c.state
		c.mu.Unlock()
		if state != Healthy && !(state == Running && c.Health == nil) && state != Exited {
			return false
		}
	}
	return true
}

// status is the initrd's findings with what has happened since.
func (s *system) status() *Status {
	s.mu.Lock()
	out := s.initrd
	out.Problems = slices.Concat(out.Problems, s.problems)
	s.mu.Unlock()
	out.describeSlots()
	s.describeStates(&out)
	out.Keys = s.keys.Load()
	out.setLoader(s.loader.Load())
	out.ResidentBytes, out.PeakBytes = ownMemory()
	if s.updater != nil {
		u := s.updater.Status()
		out.Update = &u
	}
	if s.custody != nil {
		r := s.custody.Status()
		out.Recovery = &r
	}
	if s.reporter != nil {
		e := s.reporter.Status()
		out.Evidence = &e
	}
	for _, group := range []struct {
		kind string
		list []*container
	}{{"onboot", s.onboot}, {"service", s.services}} {
		for _, c := range group.list {
			c.mu.Lock()
			out.Services = append(out.Services, ServiceStatus{Name: c.Name, Kind: group.kind, State: c.state, PID: c.pid, Restarts: c.restarts, Reason: c.reason})
			c.mu.Unlock()
		}
	}
	return &out
}

// describeSlots lists what is installed.
func (s *Status) describeSlots() {
	disk, err := openSlots(s.Disk, s.Slot)
	if err != nil {
		return
	}
	defer disk.close()
	if s.Slots, err = disk.describe(); err != nil {
		s.Problems = append(s.Problems, err.Error())
	}
}

// ownMemory is what the kernel says of this process (proc(5)); zero when it does not.
func ownMemory() (resident, peak int64) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kib); n == 1 {
			resident = kib << 10
		}
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			peak = kib << 10
		}
	}
	return resident, peak
}

// shutDown runs onshutdown in reverse, closes the data volumes and ends the
// machine. The services have stopped already.
func (s *system) shutDown(reboot bool) {
	for _, c := range slices.Backward(s.app.OnShutdown) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		last := s.newContainer(c)
		if err := last.once(ctx); err != nil {
			s.log.Warn("onshutdown", "name", c.Name, "error", err)
		}
		cancel()
		last.log.close() // an open log keeps its volume busy
	}
	for _, c := range s.containers() {
		c.log.close()
	}
	unix.Sync()
	var mounts []string
	for _, v := range s.app.Volumes {
		mounts = append(mounts, v.Mount)
	}
	busy := unmountBelow(mounts)
	if len(busy) > 0 {
		s.killAll()
	}
	// What this process has in hand on a volume, as new TPM states, comes to its end.
	for end := time.Now().Add(unmountTime); len(busy) > 0 && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		busy = unmountBelow(mounts)
	}
	for _, b := range busy {
		s.log.Warn("still mounted", "path", b)
	}
	for _, v := range s.app.Volumes {
		if err := dm.Remove(volumeMapping(v.Name)); err != nil {
			s.log.Warn("volume not closed", "error", err)
			continue
		}
		s.log.Info("volume closed", "name", v.Name)
	}
	s.log.Info("bye", "reboot", reboot)
	endMachine(reboot)
}

// unmountTime is how long a volume may stay busy at the end.
const unmountTime = 30 * time.Second

// killAll ends what is left of other processes.
func (s *system) killAll() {
	unix.Kill(-1, unix.SIGTERM)
	time.Sleep(time.Second)
	unix.Kill(-1, unix.SIGKILL)
	time.Sleep(200 * time.Millisecond)
}
