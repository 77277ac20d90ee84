package main

import (
	"strings"
	"testing"
	"testing/iotest"
)

func TestConfirm(t *testing.T) {
	for _, tt := range []struct {
		typed string
		ok    bool
	}{
		{"testbox\n", true}, {" testbox \r\n", true}, {"testbox", true},
		{"", false}, {"\n", false}, {"yes\n", false}, {"Testbox\n", false}, {"testbox2\n", false}, {strings.Repeat(" ", 5000) + "testbox\n", false},
	} {
		var out strings.Builder
		err := confirm(strings.NewReader(tt.typed), &out, "testbox", "ALL DATA goes.")
		if (err == nil) != tt.ok {
			t.Errorf("%.20q: %v", tt.typed, err)
		}
		if !strings.Contains(out.String(), "ALL DATA goes.\nType the box's name, testbox,") {
			t.Errorf("output %q", out.String())
		}
	}
	if err := confirm(iotest.ErrReader(iotest.ErrTimeout), &strings.Builder{}, "", ""); err == nil {
		t.Error("an input that fails confirms")
	}
}

// TestLifecycleUsage: what is mistyped destroys nothing.
func TestLifecycleUsage(t *testing.T) {
	for _, args := range [][]string{
		{"reset"}, {"reset", "--yes"}, {"reset", "factory"}, {"reset", "--factory", "now"}, {"reset", "--Factory"},
		{"decommission", "now"}, {"decommission", "--factory"}, {"decommission", "--proof"},
	} {
		if code := run(args); code != 2 {
			t.Errorf("%q: exit code %d, want 2", args, code)
		}
	}
	for _, args := range [][]string{{"reset", "--factory", "--yes"}, {"decommission", "--yes"}} {
		if code := run(args); code != 1 { // no appliance runs here
			t.Errorf("%q: exit code %d, want 1", args, code)
		}
	}
}
