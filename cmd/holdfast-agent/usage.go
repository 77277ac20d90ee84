package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/holdfast-os/holdfast/agent"
)

const usage = `usage: holdfast-agent VERB [OPTIONS] ARGUMENTS

  status                 release, slot, volumes and how each was opened, policy, services
  logs NAME [LINES]      the last lines a container printed
  poweroff, reboot       stop the services, close the volumes, end
  update check|apply|status
                         what there is, install it, what became of it
  reseal                 seal the data to the present state of this box and its next start
  pin set|remove         the TPM wants a PIN at every start, or none
  downgrade FILE         let one older release open the data, by the vendor's FILE
  recovery [status|replace|escrow|receipt]
                         the recovery key, and who has it
  attest --challenge FILE
                         answer the vendor's challenge
  doctor                 is this box fit to keep data? From any Linux, before an installation
  reset --factory        destroy all data and its keys; the next start makes new volumes
  decommission           destroy them for good, with a proof, and switch off
  bless, reject, keys    after a hand-off to another init: judge the release that runs
  version

'holdfast-agent VERB -h' tells more. Most take --json.
exit codes: 0 done, 1 failed, 2 usage, 3 nothing to install or to change, not on trial
example: holdfast-agent status --json
`

// verb is one subcommand. run defines its options and takes the arguments behind its name.
type verb struct {
	name, arguments, about string
	run                    func(ctx context.Context, c *agent.Client, f *flag.FlagSet, args []string) error
}

func verbs() []verb {
	return []verb{
		{"status", "[--json]", "Show release, slot, volumes and how each was opened, policy and services.", status},
		{"logs", "NAME [LINES]", "Print the last LINES (50) that the container NAME printed.\n\nexample: holdfast-agent logs web 100", logs},
		{"poweroff", "", "Stop the services, close the volumes, and switch off.", power},
		{"reboot", "", "Stop the services, close the volumes, and start again.", power},
		{"update", "check|apply|status [PATH] [--version V] [--reboot] [--json]", updateAbout, updates},
		{"reseal", "[--predict-dbx FILE] [--suspend N] [--json]", resealAbout, reseal},
		{"pin", "set|remove", `set: the TPM wants this PIN at every start from now on; the old one opens nothing any more.
remove: it wants none, where the release does without.`, setPIN},
		{"downgrade", "FILE", `Policy rollback-proof: let one older release open the data volumes, by the vendor's FILE,
which holdfast keys downgrade makes.`, downgrade},
		{"recovery", "[status] [--json] | replace [--yes] | escrow FILE | receipt FILE", recoveryAbout, recovery},
		{"attest", "--challenge FILE [-o FILE] [--json]", `Answer the vendor's challenge: what the TPM signs of this box's state, and the files that
the release lets go along. The answer's name is printed.

example: holdfast-agent attest --challenge holdfast-challenge-5f3a9c01.json`, answerChallenge},
		{"doctor", "[--policy NAME] [--json]", `Is this box fit to keep data under a seal policy? 0 it is, 1 it is not. No agent is needed:
it works from any Linux, before an installation.`, doctor},
		{"reset", "--factory [--proof FILE [--challenge FILE]] [--yes]", "Destroy all data and its keys; the next start makes new volumes.\n\n" + proofAbout, reset},
		{"decommission", "[--proof FILE [--challenge FILE]] [--yes]", "Destroy all data and its keys for good, and switch off.\n\n" + proofAbout, decommission},
		{"bless", "", "After a hand-off: this release is healthy, keep booting it.", bless},
		{"reject", "REASON", "After a hand-off: this release is not healthy. 0 when it is on trial: reboot then.", reject},
		{"keys", "", `After a hand-off: make the next change of the firmware's Secure Boot keys that this release
brings, to be in force after a reboot; 3 is none.`, changeKeys},
		{"version", "", "Print the version.", printVersion},
	}
}

const (
	updateAbout = `check   what there is to install; 3 is nothing
apply   install it
status  what waits, what failed and why, the last 50 updates

From the spec's repository, or from a bundle or repository at PATH. --version takes that
one, older or newer. --reboot restarts afterwards, when the spec's window allows it.

example: holdfast-agent update apply /media/stick/ledger-1.2.3.bundle`

	resealAbout = `Seal the data volumes' key to the present state of this box, and to that of its next start,
since the firmware's keys have changed.

--predict-dbx FILE  FILE is about to be added to dbx
--suspend N         for N starts, seal to any state of the firmware, before its update`

	recoveryAbout = `status   who has the recovery key, in which escrow
replace  another recovery key; the old one holds until that is typed back, or --yes
escrow   write the escrow to FILE, for who keeps it
receipt  bring his receipt`

	proofAbout = `The proof in FILE (- is standard output) is signed by the TPM, also over the vendor's
challenge; holdfast attest erasure judges it. --yes asks nothing.`
)

// usageError is a mistake in how the command was called.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func run(args []string) int {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		fmt.Print(usage)
		return 0
	}
	for _, v := range verbs() {
		if v.name != args[0] {
			continue
		}
		f := flag.NewFlagSet(v.name, flag.ContinueOnError)
		f.SetOutput(io.Discard)
		f.Usage = func() {}
		err := v.run(context.Background(), agent.NewClient(), f, args[1:])
		if errors.Is(err, flag.ErrHelp) {
			fmt.Println(strings.TrimRight("usage: holdfast-agent "+v.name+" "+v.arguments, " ") + "\n\n" + v.about)
			return 0
		}
		return report(err, "holdfast-agent "+v.name+" -h")
	}
	return report(usageError{fmt.Sprintf("no verb %q", args[0])}, "holdfast-agent help")
}

// report prints the error and returns the exit code.
func report(err error, help string) int {
	var misuse usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &misuse):
		fmt.Fprintf(os.Stderr, "error: %s\nhint: %s\n", misuse.text, help)
		return 2
	case errors.Is(err, agent.ErrNoUpdate) || errors.Is(err, agent.ErrNotOnTrial) || errors.Is(err, agent.ErrNoKeyChange):
		fmt.Println(err)
		return 3
	}
	fmt.Fprintln(os.Stderr, "error:", err)
	if errors.Is(err, agent.ErrNoBox) {
		fmt.Fprintln(os.Stderr, "hint: run it on a box; whether this machine could be one says: holdfast-agent doctor")
	}
	return 1
}

// parse takes options before and behind the arguments, of which it wants least to most.
func parse(f *flag.FlagSet, args []string, least, most int) (rest []string, err error) {
	for {
		if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
			return nil, err
		} else if err != nil {
			return nil, usageError{err.Error()}
		}
		if f.NArg() == 0 {
			break
		}
		rest, args = append(rest, f.Arg(0)), f.Args()[1:]
	}
	switch {
	case len(rest) < least:
		return nil, usageError{fmt.Sprintf("%s: an argument is missing", f.Name())}
	case len(rest) > most:
		return nil, usageError{fmt.Sprintf("%s: one argument too many: %q", f.Name(), rest[most])}
	}
	return rest, nil
}

// readSmall reads a file of at most limit bytes, which may come from anywhere.
func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s has more than %d bytes, which none has", path, limit)
	}
	return b, err
}
