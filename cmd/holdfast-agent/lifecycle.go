package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-os/holdfast/agent"
)

// reset is the verb of that name.
func reset(ctx context.Context, c *agent.Client, args []string) error {
	flags := flag.NewFlagSet("reset", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	factory, yes := flags.Bool("factory", false, ""), flags.Bool("yes", false, "")
	if flags.Parse(args) != nil || flags.NArg() > 0 || !*factory {
		return errUsage
	}
	s, e, err := eraser(ctx, c, *yes, "ALL DATA of this box is destroyed, and it is provisioned anew, with another recovery key, when it starts the next time.")
	if err != nil {
		return err
	}
	proof, err := e.Reset()
	if err != nil {
		return err
	}
	if _, err := proof.WriteTo(os.Stdout); err != nil {
		return err
	}
	return powerAfter(ctx, c, true, s)
}

// decommission is the verb of that name.
func decommission(ctx context.Context, c *agent.Client, args []string) error {
	flags := flag.NewFlagSet("decommission", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	yes, path := flags.Bool("yes", false, ""), flags.String("proof", "", "")
	if flags.Parse(args) != nil || flags.NArg() > 0 {
		return errUsage
	}
	// What could not be written afterwards is found out before.
	var file *os.File
	if *path != "" {
		var err error
		if file, err = os.OpenFile(*path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
			return err
		}
		defer file.Close()
	}
	proof, s, err := func() (agent.Proof, *agent.Status, error) {
		s, e, err := eraser(ctx, c, *yes, "ALL DATA of this box is destroyed, and it does not start again until an image is written anew.")
		if err != nil {
			return agent.Proof{}, nil, err
		}
		proof, err := e.Decommission()
		return proof, s, err
	}()
	if err != nil {
		if file != nil {
			os.Remove(file.Name())
		}
		return err
	}
	if err := keepProof(proof, file); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err, "(the proof follows)")
		file = nil
	}
	if file == nil {
		if _, err := proof.WriteTo(os.Stdout); err != nil {
			return err
		}
	}
	for _, p := range proof.Problems {
		fmt.Fprintln(os.Stderr, "warning:", p)
	}
	return powerAfter(ctx, c, false, s)
}

// keepProof writes the proof so that it is on the medium when the power goes.
func keepProof(p agent.Proof, file *os.File) error {
	if file == nil {
		return nil
	}
	if _, err := p.WriteTo(file); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(file.Name()))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// eraser has a person confirm, and opens what is to be erased.
func eraser(ctx context.Context, c *agent.Client, yes bool, warning string) (*agent.Status, *agent.Eraser, error) {
	s, err := c.Status(ctx)
	if err != nil {
		return nil, nil, err
	}
	e, err := agent.OpenEraser(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil || yes {
		return s, e, err
	}
	return s, e, confirm(os.Stdin, os.Stderr, s.Name, warning)
}

// confirm wants the box's name typed.
func confirm(in io.Reader, out io.Writer, name, warning string) error {
	fmt.Fprintf(out, "%s\nType the box's name, %s, to go on: ", warning, name)
	line, err := bufio.NewReader(io.LimitReader(in, 4096)).ReadString('\n')
	if err != nil && err != io.EOF {
		return err
	}
	if strings.TrimSpace(line) != name {
		return errors.New("not confirmed; nothing was changed")
	}
	return nil
}

// powerAfter restarts the box, or switches it off.
func powerAfter(ctx context.Context, c *agent.Client, reboot bool, s *agent.Status) error {
	err := c.Power(ctx, reboot)
	if errors.Is(err, fs.ErrNotExist) { // after a hand-off
		fmt.Fprintf(os.Stderr, "%s: now restart the box or switch it off; its data is gone then\n", s.Name)
		return nil
	}
	return err
}
