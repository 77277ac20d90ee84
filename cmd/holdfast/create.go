package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/holdfast-os/holdfast/image/spec"
)

func runInit(_ context.Context, c *cli, args []string) error {
	rest, err := parse(c.flags("init", "NAME", "Write a commented starter spec to NAME.yaml.\n\nexample: holdfast init ledger"), args, 1)
	if err != nil {
		return err
	}
	path, starter := rest[0]+".yaml", spec.Starter(filepath.Base(rest[0]))
	if err := checkStarter(path, starter); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return hinted{fmt.Errorf("%s exists already", path), "choose another name"}
	}
	if err != nil {
		return err
	}
	if _, err := f.Write(starter); err != nil {
		return errors.Join(err, f.Close(), os.Remove(path))
	}
	if err := f.Close(); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s\n", path)
	return nil
}

// checkStarter refuses names that the spec would.
func checkStarter(path string, starter []byte) error {
	_, err := spec.Parse(path, starter)
	var list *spec.Errors
	if errors.As(err, &list) {
		first := list.List[0]
		return usageError{"the last element of NAME names the appliance: " + first.Message, first.Hint}
	}
	return err
}
