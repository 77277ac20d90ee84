package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// recovery is the verb recovery.
func recovery(ctx context.Context, _ *agent.Client, f *flag.FlagSet, args []string) error {
	asJSON := f.Bool("json", false, "")
	yes := f.Bool("yes", false, "")
	rest, err := parse(f, args, 0, 2)
	if err != nil {
		return err
	}
	action, files := "status", rest
	if len(rest) > 0 {
		action, files = rest[0], rest[1:]
	}
	wants := map[string]int{"status": 0, "escrow": 1, "receipt": 1, "replace": 0}
	switch n, ok := wants[action]; {
	case !ok:
		return usageError{fmt.Sprintf("recovery wants status, replace, escrow or receipt, got %q", action)}
	case len(files) != n:
		return usageError{fmt.Sprintf("recovery %s takes %d files, got %d", action, n, len(files))}
	case *yes && action != "replace":
		return usageError{"--yes is for recovery replace"}
	}
	c, err := agent.RecoveryClient(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	var s *agent.RecoveryStatus
	switch action {
	case "status":
		s, err = c.RecoveryStatus(ctx)
	case "escrow":
		s, err = writeEscrow(ctx, c, files[0])
	case "receipt":
		s, err = bringReceipt(ctx, c, files[0])
	case "replace":
		s, err = replaceKey(ctx, c, *yes)
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

func writeEscrow(ctx context.Context, c *agent.Client, path string) (*agent.RecoveryStatus, error) {
	e, err := c.Escrow(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(path, e.Marshal(), 0o644); err != nil {
		return nil, err
	}
	return c.HandedOut(ctx, e, "file "+path)
}

func bringReceipt(ctx context.Context, c *agent.Client, path string) (*agent.RecoveryStatus, error) {
	b, err := readSmall(path, escrow.MaxReceiptBytes)
	if err != nil {
		return nil, err
	}
	return c.TakeReceipt(ctx, b)
}

// replaceKey shows another recovery key and puts it in force when the person has it. An
// end of the input, or of this program, leaves the old one in force.
func replaceKey(ctx context.Context, c *agent.Client, yes bool) (*agent.RecoveryStatus, error) {
	r, err := c.ReplaceKey(ctx)
	if err != nil {
		return nil, err
	}
	if r.Key == "" { // the spec shows nobody one
		return c.RecoveryStatus(ctx)
	}
	if err := r.Show(os.Stdout); err != nil {
		return nil, err
	}
	if !yes {
		if err := typeBack(r); err != nil {
			_, dropped := c.AbandonKey(ctx)
			return nil, errors.Join(fmt.Errorf("%w: the old recovery key stays in force", err), dropped)
		}
	}
	return c.CommitKey(ctx, r.Serial)
}

func typeBack(r *agent.Replacement) error {
	in := bufio.NewReaderSize(os.Stdin, 4096)
	for {
		fmt.Fprint(os.Stderr, "type the recovery key back (or: cancel): ")
		typed, err := in.ReadSlice('\n')
		if err != nil {
			return fmt.Errorf("not confirmed: %w", err)
		}
		line := bytes.TrimSpace(typed)
		if len(line) == 0 {
			continue
		}
		if string(line) == "cancel" {
			return errors.New("cancelled")
		}
		err = r.Matches(line)
		luks2.Wipe(typed)
		if err == nil {
			return nil
		}
		fmt.Fprintln(os.Stderr, "not the same:", err)
	}
}
