// Command holdfast-agent is the device side of Holdfast: the init of the
// initrd, PID 1 on the root, and the tool that asks the running agent.
//
// Exit codes: 0 done, 1 failed, 2 usage.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent"
)

const usage = `usage: holdfast-agent VERB

  status [--json]        release, slot, volumes and how each was opened, policy, services
  logs NAME [LINES]      the last lines a container printed
  poweroff, reboot       stop the services, close the volumes, end
  bless                  after a hand-off: this release is healthy, keep booting it
  version

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
		err = bless(ctx, c)
	case args[0] == "version" && len(args) == 1:
		fmt.Println("holdfast-agent", version)
	default:
		err = errUsage
	}
	if errors.Is(err, errUsage) {
		fmt.Fprint(os.Stderr, usage)
		return 2
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

func bless(ctx context.Context, c *agent.Client) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	return agent.Bless(s)
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
