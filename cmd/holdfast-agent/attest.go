package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/update"
)

// answerChallenge is the verb attest.
func answerChallenge(ctx context.Context, c *agent.Client, flags *flag.FlagSet, args []string) error {
	path := flags.String("challenge", "", "")
	out := flags.String("o", "", "")
	asJSON := flags.Bool("json", false, "")
	if _, err := parse(flags, args, 0, 0); err != nil {
		return err
	}
	if *path == "" {
		return usageError{"attest needs --challenge FILE"}
	}
	challenge, err := readSmall(*path, attest.MaxChallengeBytes)
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
