// Command holdfast-agent is the device side of Holdfast: the init of the
// initrd, PID 1 on the root, and the tool that asks the running agent.
//
// Exit codes: 0 done, 1 failed, 2 usage, 3 nothing to install or to change, or not on trial.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent"
)

// version is set by the linker.
var version = "devel"

func main() {
	if stage := stageOfBoot(); stage != nil {
		firstProcess(stage)
	}
	os.Exit(run(os.Args[1:]))
}

// stageOfBoot is what to do as init: in the initrd the kernel calls this program
// /init, on the root the initrd calls it with the word system. Being process 1
// alone says nothing: in a container of its own the tool is that too.
func stageOfBoot() func(console *os.File) error {
	switch {
	case os.Getpid() != 1:
		return nil
	case os.Args[0] == "/init":
		return agent.RunInitrd
	case len(os.Args) == 2 && os.Args[1] == "system":
		return func(console *os.File) error { return agent.RunSystem(console) }
	}
	return nil
}

func firstProcess(stage func(console *os.File) error) {
	console, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		console = os.Stderr
	}
	err = stage(console)
	agent.EndBoot(console, err)
}

func status(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	asJSON := f.Bool("json", false, "")
	if _, err := parse(f, args, 0, 0); err != nil {
		return err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(s)
	}
	_, err = s.WriteTo(os.Stdout)
	return err
}

// power is the verbs poweroff and reboot.
func power(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	if _, err := parse(f, args, 0, 0); err != nil {
		return err
	}
	return c.Power(ctx, f.Name() == "reboot")
}

func printVersion(_ context.Context, _ *agent.Client, f *flag.FlagSet, args []string) error {
	if _, err := parse(f, args, 0, 0); err != nil {
		return err
	}
	_, err := fmt.Println("holdfast-agent", version)
	return err
}

// maxFileBytes is more than the agent takes of any file.
const maxFileBytes = 1 << 20

// reseal is the verb of that name.
func reseal(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) (err error) {
	var o agent.ResealOptions
	asJSON := f.Bool("json", false, "")
	dbx := f.String("predict-dbx", "", "")
	f.IntVar(&o.Suspend, "suspend", 0, "")
	if _, err := parse(f, args, 0, 0); err != nil {
		return err
	}
	if o.Suspend < 0 || o.Suspend > agent.MaxSuspendBoots {
		return usageError{fmt.Sprintf("--suspend %d is not from 1 to %d starts", o.Suspend, agent.MaxSuspendBoots)}
	}
	if *dbx != "" {
		if o.DBX, err = readSmall(*dbx, maxFileBytes); err != nil {
			return err
		}
		if len(o.DBX) == 0 {
			return fmt.Errorf("%s is empty", *dbx)
		}
	}
	r, err := c.Reseal(ctx, o)
	if err != nil {
		return err
	}
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	printStates(r)
	return nil
}

// downgrade is the verb of that name.
func downgrade(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	rest, err := parse(f, args, 1, 1)
	if err != nil {
		return err
	}
	file, err := readSmall(rest[0], maxFileBytes)
	if err != nil {
		return err
	}
	a, err := c.Downgrade(ctx, file)
	if err != nil {
		return err
	}
	fmt.Printf("%s on the ESP: %s\n", a.Path, strings.Join(a.Refs, ", "))
	return nil
}

// setPIN is the verb pin.
func setPIN(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	rest, err := parse(f, args, 1, 1)
	if err != nil {
		return err
	}
	var pin []byte
	switch rest[0] {
	case "set":
		pin, err = agent.ReadPIN(os.Stdin, os.Stderr)
	case "remove":
	default:
		return usageError{fmt.Sprintf("pin wants set or remove, got %q", rest[0])}
	}
	if err != nil {
		return err
	}
	r, err := c.SetPIN(ctx, pin)
	clear(pin)
	if err == nil {
		printStates(r)
	}
	return err
}

func printStates(r agent.SyncReport) {
	for _, list := range []struct {
		what   string
		states []string
	}{{"added", r.Added}, {"kept", r.Kept}, {"dropped", r.Dropped}} {
		for _, s := range list.states {
			fmt.Printf("%-8s state %s\n", list.what, s)
		}
	}
}

// updates is the verb update.
func updates(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) (err error) {
	asJSON := f.Bool("json", false, "")
	var req agent.UpdateRequest
	f.StringVar(&req.Version, "version", "", "")
	f.BoolVar(&req.Reboot, "reboot", false, "")
	rest, err := parse(f, args, 1, 2)
	if err != nil {
		return err
	}
	action := rest[0]
	switch {
	case !slices.Contains([]string{"check", "apply", "status"}, action):
		return usageError{fmt.Sprintf("update wants check, apply or status, got %q", action)}
	case action == "status" && len(rest) > 1:
		return usageError{"update status takes no path"}
	case len(rest) > 1:
		if req.Path, err = filepath.Abs(rest[1]); err != nil {
			return err
		}
	}
	var s *agent.UpdateStatus
	switch _, probe := c.UpdateStatus(ctx); {
	case errors.Is(probe, fs.ErrNotExist): // after a hand-off
		s, err = updatesHere(ctx, action, req)
	case action == "status":
		s, err = c.UpdateStatus(ctx)
	case action == "check":
		s, err = c.CheckUpdate(ctx, req)
	default:
		done := make(chan struct{})
		go showProgress(ctx, c, done)
		s, err = c.ApplyUpdate(ctx, req)
		close(done)
	}
	if err != nil {
		return err
	}
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(s)
	}
	_, err = s.WriteTo(os.Stdout)
	return err
}

// updatesHere does it in this process, where no agent runs.
func updatesHere(ctx context.Context, action string, req agent.UpdateRequest) (*agent.UpdateStatus, error) {
	if req.Reboot {
		return nil, errors.New("--reboot is the agent's; here another init runs, which reboots when it is told to")
	}
	u, err := agent.OpenUpdater(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return nil, err
	}
	if u == nil {
		return nil, errors.New("this release takes no updates: its spec has no update section")
	}
	switch action {
	case "check":
		err = u.CheckFrom(ctx, req.Path, req.Version)
	case "apply":
		_, err = u.ApplyFrom(ctx, req.Path, req.Version)
	}
	s := u.Status()
	return &s, err
}

// showProgress prints a line each time the installation has come a tenth further.
func showProgress(ctx context.Context, c *agent.Client, done <-chan struct{}) {
	last := int64(-1)
	began := time.Now()
	for {
		select {
		case <-done:
			return
		case <-time.After(500 * time.Millisecond):
		}
		s, err := c.UpdateStatus(ctx)
		if err != nil || s.TotalBytes == 0 {
			continue
		}
		if tenth := s.DoneBytes * 10 / s.TotalBytes; tenth > last {
			last = tenth
			rate := float64(s.DoneBytes) / time.Since(began).Seconds()
			left := time.Duration(float64(s.TotalBytes-s.DoneBytes)/max(rate, 1)) * time.Second
			fmt.Fprintf(os.Stderr, "%s: %d of %d MB, %.1f MB/s, %v left\n", s.Doing, s.DoneBytes>>20, s.TotalBytes>>20, rate/1e6, left)
		}
	}
}

// afterHandOff judges the release that runs where the image's own init does that.
func afterHandOff(ctx context.Context, c *agent.Client, judge func(*agent.Status) error) error {
	if _, err := c.UpdateStatus(ctx); !errors.Is(err, fs.ErrNotExist) {
		return errors.New("the agent runs here, and judges by itself")
	}
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	return judge(s)
}

func bless(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	if _, err := parse(f, args, 0, 0); err != nil {
		return err
	}
	return afterHandOff(ctx, c, agent.Bless)
}

func reject(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	rest, err := parse(f, args, 1, 1)
	if err != nil {
		return err
	}
	return afterHandOff(ctx, c, func(s *agent.Status) error { return agent.Reject(s, rest[0]) })
}

// changeKeys is the verb keys.
func changeKeys(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	if _, err := parse(f, args, 0, 0); err != nil {
		return err
	}
	return afterHandOff(ctx, c, showKeyChange)
}

// showKeyChange says what was changed, and what is in the way of more.
func showKeyChange(*agent.Status) error {
	s, err := agent.ChangeKeys(context.Background(), slog.Default())
	if s != nil {
		if err := s.Print(os.Stdout); err != nil {
			return err
		}
	}
	return err
}

func logs(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	rest, err := parse(f, args, 1, 2)
	if err != nil {
		return err
	}
	lines := 50
	if len(rest) == 2 {
		if lines, err = strconv.Atoi(rest[1]); err != nil || lines < 1 {
			return usageError{fmt.Sprintf("%q is not a number of lines", rest[1])}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	text, err := c.Logs(ctx, rest[0], lines)
	for _, l := range text {
		fmt.Println(l)
	}
	return err
}
