package spec_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/spec"
)

const updatable = "name: box\nversion: 1.0.0\nkernel: {image: k}\nhandoff: /sbin/init\n"

func TestUpdate(t *testing.T) {
	s := mustParse(t, "u.yaml", updatable+`update:
  root: root.json
  url: https://updates.example/repo
  channel: beta
  ca: ca.pem
  fleet_key: fleet.key
  check: 30m
  window: "22:30-03:15"
  automatic: false
  stick: false
  write_back: true
  epoch: 3
  hardware: box-2
`)
	no := false
	want := spec.Update{
		Root: "root.json", URL: "https://updates.example/repo", Channel: "beta", CA: "ca.pem", FleetKey: "fleet.key", Check: 1800,
		Window: spec.Window{StartMin: 1350, EndMin: 195}, Automatic: &no, Stick: &no, WriteBack: true, Epoch: 3, Hardware: "box-2",
	}
	if !reflect.DeepEqual(s.Update, want) {
		t.Errorf("got %+v, want %+v", s.Update, want)
	}
	if err := s.Validate(); err != nil || len(s.Warnings) != 0 {
		t.Error(err, s.Warnings)
	}
	text, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if again := mustParse(t, "again.yaml", string(text)); !reflect.DeepEqual(again.Update, want) {
		t.Errorf("written and read back: %+v", again.Update)
	}
	s.ApplyDefaults()
	if !reflect.DeepEqual(s.Update, want) {
		t.Errorf("defaults changed what was given: %+v", s.Update)
	}
}

func TestUpdateDefaults(t *testing.T) {
	s := mustParse(t, "u.yaml", updatable+"update: {root: r.json, check: never}\n")
	s.ApplyDefaults()
	if u := s.Update; u.Channel != "stable" || u.Check != spec.Never || u.Check.Seconds() != 0 || !*u.Automatic || !*u.Stick || u.WriteBack {
		t.Errorf("%+v", u)
	}
	s = mustParse(t, "u.yaml", updatable+"update: {root: r.json}\n")
	if s.ApplyDefaults(); s.Update.Check.Seconds() != 6*3600 {
		t.Errorf("check every %d s", s.Update.Check.Seconds())
	}
	s = mustParse(t, "u.yaml", updatable)
	if s.ApplyDefaults(); s.Update != (spec.Update{}) {
		t.Errorf("defaults without an update section: %+v", s.Update)
	}
}

func TestUpdateErrors(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"{root: r, chanel: beta}", `u.yaml:5:19: update: unknown key "chanel" (did you mean "channel"?)`},
		{"{root: r, url: updates.example}", `u.yaml:5:24: update.url: "updates.example" is not a URL (write https://updates.example/repo)`},
		{"{root: r, url: 'https://me:pw@updates.example'}", "u.yaml:5:24: update.url: a repository's URL has no user"},
		{"{root: r, url: 'oci://docker.io/acme/box'}", `u.yaml:5:24: update.url: "oci://docker.io/acme/box": write index.docker.io`},
		{"{root: r, url: 'oci://registry.example'}", `u.yaml:5:24: update.url: "oci://registry.example" is not oci://HOST/NAME:TAG`},
		{"{root: r, url: 'oci://me:pw@registry.example/box'}", "u.yaml:5:24: update.url: "},
		{"{root: r, url: 'oci://registry.example/box@sha256:00'}", "u.yaml:5:24: update.url: "},
		{"{fleet_key: fleet.key}", "u.yaml:5:9: update.root: updates need the keys that releases are signed with"},
		{"{root: r, channel: Beta}", "u.yaml:5:28: update.channel: "},
		{"{root: r, check: 6}", `u.yaml:5:26: update.check: expected a duration such as "6h", or "never", got a number`},
		{"{root: r, check: 5s}", `u.yaml:5:26: update.check: "5s" is not a whole number of seconds from 1m to 720h`},
		{"{root: r, check: 800h}", "u.yaml:5:26: update.check: "},
		{"{root: r, window: 2-5}", `u.yaml:5:27: update.window: "2-5" is not a time of day from and to (write "02:00-05:00", in UTC)`},
		{"{root: r, window: '24:00-05:00'}", "u.yaml:5:27: update.window: "},
		{"{root: r, window: '05:00-05:00'}", "u.yaml:5:27: update.window: window \"05:00-05:00\" begins when it ends"},
		{"{root: r, automatic: yes}", "u.yaml:5:30: update.automatic: expected true or false"},
		{"{root: r, epoch: -1}", "u.yaml:5:26: update.epoch: -1 is negative"},
		{"{root: r, hardware: 'a b'}", "u.yaml:5:29: update.hardware: "},
		{"{url: 'https://updates.example'}", "u.yaml:5:9: update.root: updates need the keys that releases are signed with"},
	} {
		s, err := spec.Parse("u.yaml", []byte(updatable+"update: "+tt.text+"\n"))
		if err == nil {
			err = s.Validate()
		}
		var list *spec.Errors
		if !errors.As(err, &list) || len(list.List) != 1 || !strings.HasPrefix(list.List[0].String(), tt.want) {
			t.Errorf("%s: got %v, want %s", tt.text, err, tt.want)
		}
	}
	if s := mustParse(t, "u.yaml", updatable+"update: {root: r, url: 'oci://registry.example:5000/acme/box:stable'}\n"); s.Validate() != nil || len(s.Warnings) != 0 {
		t.Errorf("a registry: %v, warnings %v", s.Validate(), s.Warnings)
	}
	if s := mustParse(t, "u.yaml", updatable+"update: {root: r, ca: c.pem}\n"); len(s.Warnings) != 1 || s.Warnings[0].Path != "update.ca" {
		t.Errorf("a CA without a URL: warnings %v", s.Warnings)
	}
}
