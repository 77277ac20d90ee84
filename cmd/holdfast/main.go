// Command holdfast builds, runs and explains sealed appliances.
//
// Data goes to standard output, "error:" and "hint:" lines to standard error.
// Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed, 4 waits for signatures,
// 5 unsigned: what a box's TPM should have signed, and did not.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/seal/attest/erasure"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

// version is set by the linker.
var version = "devel"

// The exit codes; the package doc and the usage text list them too.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
	exitVerify = 3
	exitWaits  = 4
	exitBare   = 5 // nothing is wrong with it, but no TPM signed it
)

const usage = `usage: holdfast VERB [OPTIONS] ARGUMENTS

  init NAME              write a commented starter spec to NAME.yaml
  keys new DIR           make the vendor's keys: Secure Boot, PCR policy, recovery escrow
  keys VERB DIR          rotate; sign; dbx, downgrade: revoke releases, or let boxes go back to one
  lock SPEC              pin the images a spec names by tag to digests
  build SPEC -o OUT      make the release and the disk
  run OUT                boot it in QEMU with a TPM and firmware that remember
  inspect FILE           explain a disk, release, UKI or LUKS volume  [--json]
  repo VERB DIR          a signed update repository: init, add, rollout, status, ...
  bundle RELEASE -o FILE one release with all its signatures, to carry by hand
  verify BUNDLE          check a bundle as a device would, and explain it  [--json]
  apply BUNDLE --disk D  write it into the free slot of a disk on the bench
  escrow VERB FILE       a box's escrowed recovery key: inspect, receipt, newkey
  recover ESCROW --key K the recovery key in it
  attest VERB            challenge boxes, verify their answers, and proofs of erasure
  version

example:
  holdfast init ledger && holdfast keys new keys
  holdfast build ledger.yaml -o out && holdfast run out

'holdfast VERB -h' tells a verb's options.
exit codes: 0 done, 1 failed, 2 usage, 3 verification failed, 4 waits for signatures, 5 unsigned
`

// verb is one subcommand. run gets the arguments behind the verb's name.
type verb struct {
	name string
	run  func(ctx context.Context, c *cli, args []string) error
}

func verbs() []verb {
	return []verb{
		{"init", runInit}, {"keys", runKeys}, {"lock", runLock}, {"build", runBuild},
		{"run", runRun}, {"inspect", runInspect}, {"repo", runRepo}, {"bundle", runBundle},
		{"verify", runVerify}, {"apply", runApply},
		{"escrow", runEscrow}, {"recover", runRecover}, {"attest", runAttest}, {"version", runVersion},
	}
}

// cli is where a command talks.
type cli struct {
	in       io.Reader
	out, err io.Writer
}

func main() { os.Exit(execute()) }

// execute is the command with this process's arguments. The first Ctrl-C or SIGTERM
// ends its context, so that it leaves things in order; the second one ends the process.
func execute() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	return mainWith(ctx, &cli{os.Stdin, os.Stdout, os.Stderr}, os.Args[1:])
}

func mainWith(ctx context.Context, c *cli, args []string) int {
	if len(args) == 0 {
		fmt.Fprint(c.err, usage)
		return exitUsage
	}
	if isHelp(args[0]) {
		fmt.Fprint(c.out, usage)
		return exitDone
	}
	for _, v := range verbs() {
		if v.name == args[0] {
			return c.report(v.run(ctx, c, args[1:]))
		}
	}
	return c.report(usageError{fmt.Sprintf("no verb %q%s", args[0], didYouMean(args[0])), "holdfast help"})
}

// didYouMean names the verb with the same letters in another order, or with the
// same beginning; "" when there is none.
func didYouMean(typed string) string {
	letters := func(s string) string {
		b := []byte(s)
		slices.Sort(b)
		return string(b)
	}
	for _, v := range verbs() {
		if letters(typed) == letters(v.name) || len(typed) > 2 && strings.HasPrefix(v.name, typed[:3]) {
			return "; did you mean " + v.name + "?"
		}
	}
	return ""
}

// usageError is a mistake in how the command was called.
type usageError struct{ text, hint string }

func (e usageError) Error() string { return e.text }

// hinted adds what to do about an error.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// errVerification marks what exits with exitVerify.
var errVerification = errors.New("verification failed")

// errNoKey marks requests that keys elsewhere have to answer.
var errNoKey = errors.New("they wait for those")

// report prints the error and returns the exit code.
func (c *cli) report(err error) int {
	var (
		misuse usageError
		hint   hinted
		list   *spec.Errors
	)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return exitDone
	case errors.As(err, &misuse):
		fmt.Fprintf(c.err, "error: %s\nhint: %s\n", misuse.text, misuse.hint)
		return exitUsage
	case errors.As(err, &list):
		for _, p := range list.List {
			c.problem("error", p)
		}
	default:
		for i, line := range strings.Split(err.Error(), "\n") { // joined errors
			if i == 0 {
				line = "error: " + line
			}
			fmt.Fprintln(c.err, plain(line)) // it may quote a stranger's file
		}
	}
	if errors.As(err, &hint) {
		fmt.Fprintln(c.err, "hint:", hint.hint)
	}
	return exitCode(err)
}

// exitCode tells scripts apart what they may want to act on.
func exitCode(err error) int {
	var waits *repo.PendingError
	if errors.As(err, &waits) || len(keys.Wanted(err)) > 0 || errors.Is(err, errNoKey) {
		return exitWaits
	}
	if errors.Is(err, erasure.ErrUnsigned) || errors.Is(err, escrow.ErrUnsigned) {
		return exitBare
	}
	for _, untrusted := range []error{errVerification, update.ErrUntrusted, update.ErrExpired, update.ErrOlder, escrow.ErrSignature, keys.ErrBadAnswer} {
		if errors.Is(err, untrusted) {
			return exitVerify
		}
	}
	return exitFailed
}

// problem prints one finding in a spec.
func (c *cli) problem(kind string, p spec.Problem) {
	hint := p.Hint
	p.Hint = "" // on a line of its own
	fmt.Fprintf(c.err, "%s: %v\n", kind, p)
	if hint != "" {
		fmt.Fprintln(c.err, "hint:", hint)
	}
}

// flags makes a verb's flag set; parse checks it and the number of arguments.
func (c *cli) flags(name, arguments, about string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.Usage = func() {
		fmt.Fprintln(c.out, strings.TrimRight("usage: holdfast "+name+" [OPTIONS] "+arguments, " ")+"\n\n"+about)
		printOptions(c.out, f)
	}
	return f
}

// printOptions has each option on one line, so that a verb's help is one screen.
func printOptions(w io.Writer, f *flag.FlagSet) {
	var heads, texts []string
	width := 0
	f.VisitAll(func(o *flag.Flag) {
		value, text := flag.UnquoteUsage(o)
		head := "--" + o.Name
		if len(o.Name) == 1 {
			head = "-" + o.Name
		}
		if value != "" {
			if value == strings.ToLower(value) {
				value = strings.ToUpper(value)
			}
			head += " " + value
		}
		switch o.DefValue {
		case "", "0", "-1", "false":
		default:
			text += " (default " + o.DefValue + ")"
		}
		heads, texts = append(heads, head), append(texts, text)
		width = max(width, len(head))
	})
	for i, head := range heads {
		if i == 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "  %-*s  %s\n", width, head, texts[i])
	}
}

// noun is a verb that takes a verb of its own.
func noun(ctx context.Context, c *cli, name, usage string, verbs []verb, args []string) error {
	got := "nothing"
	if len(args) > 0 {
		if isHelp(args[0]) {
			_, err := io.WriteString(c.out, usage)
			return err
		}
		got = strconv.Quote(args[0])
	}
	var names []string
	for _, v := range verbs {
		if len(args) > 0 && args[0] == v.name {
			return v.run(ctx, c, args[1:])
		}
		names = append(names, v.name)
	}
	return usageError{fmt.Sprintf("%s wants one of %s, got %s", name, strings.Join(names, ", "), got), "holdfast " + name + " -h"}
}

func isHelp(word string) bool { return word == "help" || word == "-h" || word == "--help" }

// parse takes options before and behind the arguments, and wants n of the latter,
// which is 0 to 3. Who asks for it gets the help, and nobody else: a mistake has nothing
// on standard output, where a script looks for data.
func parse(f *flag.FlagSet, args []string, n int) ([]string, error) {
	help := f.Usage
	f.Usage = func() {}
	var rest []string
	for {
		if err := f.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				help()
				return nil, err
			}
			return nil, usageError{err.Error(), "holdfast " + f.Name() + " -h"}
		}
		if f.NArg() == 0 {
			break
		}
		rest, args = append(rest, f.Arg(0)), f.Args()[1:]
	}
	if len(rest) != n {
		got := "none"
		if len(rest) > 0 {
			got = fmt.Sprintf("%d: %s", len(rest), strings.Join(rest, " "))
		}
		wants := [...]string{"no argument", "1 argument", "2 arguments", "3 arguments"}[n]
		return nil, usageError{fmt.Sprintf("%s takes %s, got %s", f.Name(), wants, got), "holdfast " + f.Name() + " -h"}
	}
	return rest, nil
}

func runVersion(_ context.Context, c *cli, args []string) error {
	if _, err := parse(c.flags("version", "", "Print the version.\n\nexample: holdfast version"), args, 0); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.out, "holdfast", version)
	return err
}
