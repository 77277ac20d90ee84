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
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/attest/erasure"
)

// reset is the verb of that name.
func reset(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	factory := f.Bool("factory", false, "")
	o, err := parseErasure(f, args)
	if err != nil {
		return err
	}
	if !*factory {
		return usageError{"reset destroys all data, and wants --factory"}
	}
	return o.run(ctx, c, true, "ALL DATA of this box is destroyed, and it is provisioned anew, with another recovery key, when it starts the next time.", (*agent.Eraser).Reset)
}

// decommission is the verb of that name.
func decommission(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error {
	o, err := parseErasure(f, args)
	if err != nil {
		return err
	}
	return o.run(ctx, c, false, "ALL DATA of this box is destroyed, and it does not start again until an image is written anew.", (*agent.Eraser).Decommission)
}

// erasureOptions are those of both verbs.
type erasureOptions struct {
	yes              bool
	proof, challenge string
}

func parseErasure(flags *flag.FlagSet, args []string) (o erasureOptions, err error) {
	flags.BoolVar(&o.yes, "yes", false, "")
	flags.StringVar(&o.proof, "proof", "", "")
	flags.StringVar(&o.challenge, "challenge", "", "")
	if _, err := parse(flags, args, 0, 0); err != nil {
		return o, err
	}
	if o.challenge != "" && o.proof == "" {
		return o, usageError{"--challenge is for a proof, and wants --proof FILE"}
	}
	return o, nil
}

// run erases. What could not be read or written afterwards is found out before.
func (o erasureOptions) run(ctx context.Context, c *agent.Client, reboot bool, warning string, erase func(*agent.Eraser) (*erasure.Proof, error)) error {
	var challenge *attest.Challenge
	if o.challenge != "" {
		b, err := readSmall(o.challenge, attest.MaxChallengeBytes)
		if err != nil {
			return err
		}
		if challenge, err = attest.ParseChallenge(b); err != nil {
			return err
		}
	}
	var file *os.File
	if o.proof != "" && o.proof != "-" {
		var err error
		if file, err = os.OpenFile(o.proof, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
			return err
		}
		defer file.Close()
	}
	s, e, err := eraser(ctx, c, o.yes, challenge, warning)
	var proof *erasure.Proof
	if err == nil {
		if o.proof == "" { // a signed one is long, and would be lost on a console
			e.Sign, e.Unsigned = nil, "nobody asked for it: no --proof"
		}
		proof, err = erase(e)
	}
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
	if o.proof != "" && proof.Unsigned != "" {
		fmt.Fprintln(os.Stderr, "warning: the proof is not signed:", proof.Unsigned)
	}
	return powerAfter(ctx, c, reboot, s)
}

// keepProof writes the proof so that it is on the medium when the power goes.
func keepProof(p *erasure.Proof, file *os.File) error {
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
func eraser(ctx context.Context, c *agent.Client, yes bool, challenge *attest.Challenge, warning string) (*agent.Status, *agent.Eraser, error) {
	s, err := c.Status(ctx)
	if err != nil {
		return nil, nil, err
	}
	e, err := agent.OpenEraser(slog.New(slog.NewTextHandler(os.Stderr, nil)), challenge)
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
