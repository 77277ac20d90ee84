package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/seal"
)

// errUnfit is exit code 1 with nothing more to say: the checks have said it.
var errUnfit = errors.New("this box is not fit")

// doctor is the verb of that name. It needs no agent.
func doctor(_ context.Context, _ *agent.Client, flags *flag.FlagSet, args []string) error {
	asJSON, policy := flags.Bool("json", false, ""), flags.String("policy", "", "")
	if _, err := parse(flags, args, 0, 0); err != nil {
		return err
	}
	if *policy != "" {
		if _, err := seal.Literal(*policy, true); err != nil {
			return usageError{"--policy: " + err.Error()}
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
