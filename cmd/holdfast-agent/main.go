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
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent"
)

const usage = `usage: holdfast-agent VERB

  status [--json]        release, slot, volumes and how each was opened, policy, services
  logs NAME [LINES]      the last lines a container printed
  poweroff, reboot       stop the services, close the volumes, end
  bless                  after a hand-off: this release is healthy, keep booting it
  reject REASON          after a hand-off: it is not; done when it is on trial: reboot then
  keys                   after a hand-off: make the next change of the firmware's Secure
                         Boot keys that this release brings, to be in force after a
                         reboot; 3 is none
  reseal [--predict-dbx FILE] [--suspend N] [--json]
                         seal the data volumes' key to the present state of this box, and
                         to that of its next start: the firmware's keys have changed, or
                         FILE is about to be added to dbx; or, for N starts, to any state
                         of the firmware, before its update
  pin set|remove         the TPM wants this PIN too, at every start from now on; or none, where
                         the release does without; the old one opens nothing any more
  downgrade FILE         policy rollback-proof: let one older release open the data volumes, by
                         the vendor's FILE (holdfast keys downgrade)
  update check|apply [PATH] [--version V] [--reboot] [--json]
                         from the spec's repository, or a bundle or repository at PATH
  update status [--json] what waits, what failed and why, the last 50 updates
  recovery [status]      who has the recovery key, in which escrow  [--json]
  recovery replace       another recovery key; the old one holds until that is typed back
  recovery escrow FILE   the escrow, for who keeps it;  recovery receipt FILE brings his receipt
  attest --challenge FILE [-o FILE] [--json]
                         answer the vendor's challenge: what the TPM signs of this box's state,
                         and the files that the release lets go along
  doctor [--policy NAME] [--json]
                         is this box fit to keep data? 0 it is, 1 it is not; needs no
                         agent: from any Linux, before an installation
  reset --factory [--proof FILE [--challenge FILE]] [--yes]
                         destroy all data and its keys; the next start makes new volumes
  decommission [--proof FILE [--challenge FILE]] [--yes]
                         destroy them for good, and switch off; the proof in FILE is signed by
                         the TPM, also over the vendor's challenge (holdfast attest erasure)
  version

exit codes: 0 done, 1 failed, 2 usage, 3 nothing to install or to change, not on trial
example: holdfast-agent status --json
`

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

func run(args []string) int {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		fmt.Print(usage)
		return 0
	}
	ctx := context.Background()
	c := agent.NewClient()
	var err error
	switch {
	case args[0] == "status" && len(args) <= 2:
		err = status(ctx, c, args[1:])
	case args[0] == "logs" && (len(args) == 2 || len(args) == 3):
		err = logs(ctx, c, args[1:])
	case (args[0] == "poweroff" || args[0] == "reboot") && len(args) == 1:
		err = c.Power(ctx, args[0] == "reboot")
	case args[0] == "bless" && len(args) == 1:
		err = afterHandOff(ctx, c, agent.Bless)
	case args[0] == "reject" && len(args) == 2:
		err = afterHandOff(ctx, c, func(s *agent.Status) error { return agent.Reject(s, args[1]) })
	case args[0] == "keys" && len(args) == 1:
		err = afterHandOff(ctx, c, changeKeys)
	case args[0] == "reseal":
		err = reseal(ctx, c, args[1:])
	case args[0] == "pin" && len(args) == 2:
		err = setPIN(ctx, c, args[1])
	case args[0] == "downgrade" && len(args) == 2:
		err = downgrade(ctx, c, args[1])
	case args[0] == "update" && len(args) > 1:
		err = updates(ctx, c, args[1], args[2:])
	case args[0] == "recovery":
		err = recovery(ctx, args[1:])
	case args[0] == "attest":
		err = answerChallenge(ctx, c, args[1:])
	case args[0] == "doctor":
		err = doctor(args[1:])
	case args[0] == "reset":
		err = reset(ctx, c, args[1:])
	case args[0] == "decommission":
		err = decommission(ctx, c, args[1:])
	case args[0] == "version" && len(args) == 1:
		fmt.Println("holdfast-agent", version)
	default:
		err = errUsage
	}
	if errors.Is(err, errUsage) {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	if errors.Is(err, agent.ErrNoUpdate) || errors.Is(err, agent.ErrNotOnTrial) || errors.Is(err, agent.ErrNoKeyChange) {
		fmt.Println(err)
		return 3
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		return 1
	}
	return 0
}

var errUsage = errors.New("usage")

func status(ctx context.Context, c *agent.Client, args []string) error {
	if len(args) == 1 && args[0] != "--json" {
		return errUsage
	}
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if len(args) == 1 {
		return json.NewEncoder(os.Stdout).Encode(s)
	}
	_, err = s.WriteTo(os.Stdout)
	return err
}

// reseal is the verb of that name.
func reseal(ctx context.Context, c *agent.Client, args []string) (err error) {
	flags := flag.NewFlagSet("reseal", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	var o agent.ResealOptions
	asJSON := flags.Bool("json", false, "")
	dbx := flags.String("predict-dbx", "", "")
	flags.IntVar(&o.Suspend, "suspend", 0, "")
	if flags.Parse(args) != nil || flags.NArg() > 0 || o.Suspend < 0 || o.Suspend > agent.MaxSuspendBoots {
		return errUsage
	}
	if *dbx != "" {
		if o.DBX, err = os.ReadFile(*dbx); err != nil {
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
func downgrade(ctx context.Context, c *agent.Client, path string) error {
	file, err := os.ReadFile(path)
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
func setPIN(ctx context.Context, c *agent.Client, action string) error {
	var pin []byte
	var err error
	switch action {
	case "set":
		pin, err = agent.ReadPIN(os.Stdin, os.Stderr)
	case "remove":
	default:
		return errUsage
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
func updates(ctx context.Context, c *agent.Client, action string, args []string) (err error) {
	flags := flag.NewFlagSet("update", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	asJSON := flags.Bool("json", false, "")
	var req agent.UpdateRequest
	flags.StringVar(&req.Version, "version", "", "")
	flags.BoolVar(&req.Reboot, "reboot", false, "")
	var paths []string
	for len(args) > 0 { // flags may stand behind the path
		if err := flags.Parse(args); err != nil {
			return errUsage
		}
		if args = flags.Args(); len(args) > 0 {
			paths, args = append(paths, args[0]), args[1:]
		}
	}
	if len(paths) > 1 {
		return errUsage
	}
	if len(paths) == 1 {
		if req.Path, err = filepath.Abs(paths[0]); err != nil {
			return err
		}
	}
	var s *agent.UpdateStatus
	switch _, probe := c.UpdateStatus(ctx); {
	case action != "check" && action != "apply" && (action != "status" || len(paths) > 0):
		return errUsage
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

// changeKeys says what was changed, and what is in the way of more.
func changeKeys(*agent.Status) error {
	s, err := agent.ChangeKeys(context.Background(), slog.Default())
	if s != nil {
		if err := s.Print(os.Stdout); err != nil {
			return err
		}
	}
	return err
}

func logs(ctx context.Context, c *agent.Client, args []string) error {
	lines := 50
	if len(args) == 2 {
		var err error
		if lines, err = strconv.Atoi(args[1]); err != nil {
			return errUsage
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	text, err := c.Logs(ctx, args[0], lines)
	for _, l := range text {
		fmt.Println(l)
	}
	return err
}
