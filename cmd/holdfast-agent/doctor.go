package main

import (
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/seal"
)

// errUnfit is exit code 1 with nothing more to say: the checks have said it.
var errUnfit = errors.New("this box is not fit")

// doctor is the verb of that name. It needs no agent.
func doctor(args []string) error {
	flags := flag.NewFlagSet("doctor", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	asJSON, policy := flags.Bool("json", false, ""), flags.String("policy", "", "")
	if flags.Parse(args) != nil || flags.NArg() > 0 {
		return errUsage
	}
	if *policy != "" {
		if _, err := seal.Literal(*policy, true); err != nil {
			return errUsage
		}
	}
	d := agent.Examine(agent.Gather(*policy))
	var err error
	if *asJSON {
		err = json.NewEncoder(os.Stdout).Encode(d)
	} else {
		_, err = d.WriteTo(os.Stdout)
	}
	if err == nil && !d.Fit {
		err = errUnfit
	}
	return err
}
