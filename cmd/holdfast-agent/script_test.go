package main

import (
	"errors"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"holdfast-agent": main})
}

// TestScripts runs the program as a person does, where no agent runs. Beside testscript's
// own, the scripts have these commands:
//
//	code N ARGUMENTS   run holdfast-agent; it must exit with N
//	atmost N           the last standard output has at most N lines
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": func(ts *testscript.TestScript, neg bool, args []string) {
				got := 0
				err := ts.Exec("holdfast-agent", args[1:]...)
				if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
					got = exit.ExitCode()
				} else {
					ts.Check(err)
				}
				if neg || strconv.Itoa(got) != args[0] {
					ts.Fatalf("exit code %d, want %s", got, args[0])
				}
			},
			"atmost": func(ts *testscript.TestScript, _ bool, args []string) {
				most, err := strconv.Atoi(args[0])
				ts.Check(err)
				if n := strings.Count(ts.ReadFile("stdout"), "\n"); n > most {
					ts.Fatalf("%d lines on standard output, want at most %d", n, most)
				}
			},
		},
	})
}
