package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/update"
)

// answerChallenge is the verb attest.
func answerChallenge(ctx context.Context, c *agent.Client, args []string) error {
	flags := flag.NewFlagSet("attest", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	path := flags.String("challenge", "", "")
	out := flags.String("o", "", "")
	asJSON := flags.Bool("json", false, "")
	if flags.Parse(args) != nil || flags.NArg() > 0 || *path == "" {
		return errUsage
	}
	challenge, err := readChallenge(*path)
	if err != nil {
		return err
	}
	answer, err := c.Attest(ctx, challenge)
	if err != nil {
		return err
	}
	a, err := attest.ParseAnswer(answer.Answer)
	if err != nil {
		return err
	}
	if *out == "" {
		parsed, err := attest.ParseChallenge(challenge)
		if err != nil {
			return err
		}
		*out = a.FileName(parsed)
	}
	if err := update.WriteFile(*out, answer.Answer, 0o644); err != nil {
		return err
	}
	report := attested{File: *out, Device: a.Device(), Bytes: len(answer.Answer), Milliseconds: answer.Milliseconds}
	for _, f := range a.Attachments {
		report.Files = append(report.Files, f.Name)
	}
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(report)
	}
	_, err = fmt.Println(report.File)
	return err
}

// attested is what attest --json tells.
type attested struct {
	File         string   `json:"file"`
	Device       string   `json:"device"`
	Bytes        int      `json:"bytes"`
	Milliseconds int64    `json:"ms"`              // the box took
	Files        []string `json:"files,omitempty"` // that go along
}

// readChallenge reads what may come from anywhere.
func readChallenge(path string) (b []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err = io.ReadAll(io.LimitReader(f, attest.MaxChallengeBytes+1))
	if err == nil && len(b) > attest.MaxChallengeBytes {
		err = fmt.Errorf("%s has more than the %d bytes of a challenge", path, attest.MaxChallengeBytes)
	}
	return b, err
}
