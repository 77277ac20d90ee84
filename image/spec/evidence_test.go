package spec_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/spec"
)

const withService = "name: box\nversion: 1.0.0\nkernel: {image: k}\nservices: [{name: web, image: w}]\n"

func TestEvidence(t *testing.T) {
	s := mustParse(t, "e.yaml", withService+"recovery: {holders: [{name: vendor, key: k}]}\nevidence:\n  stick: true\n  url: https://attest.example/boxes\n  ca: ca.pem\n  every: 12h\n  include: [journal, status, logs, escrow]\n")
	want := spec.Evidence{Stick: true, URL: "https://attest.example/boxes", CA: "ca.pem", Every: 12 * 3600, Include: []string{"journal", "status", "logs", "escrow"}}
	if !reflect.DeepEqual(s.Evidence, want) {
		t.Errorf("got %+v, want %+v", s.Evidence, want)
	}
	if err := s.Validate(); err != nil || len(s.Warnings) != 0 {
		t.Error(err, s.Warnings)
	}
	text, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if again := mustParse(t, "again.yaml", string(text)); !reflect.DeepEqual(again.Evidence, want) {
		t.Errorf("written and read back: %+v", again.Evidence)
	}
	s = mustParse(t, "e.yaml", withService)
	if s.ApplyDefaults(); !reflect.DeepEqual(s.Evidence, spec.Evidence{}) {
		t.Errorf("without the section something leaves the box: %+v", s.Evidence)
	}
	s = mustParse(t, "e.yaml", withService+"evidence: {url: https://attest.example}\n")
	if s.ApplyDefaults(); s.Evidence.Every != spec.DefaultEvery || s.Evidence.Stick {
		t.Errorf("the address alone: %+v", s.Evidence)
	}
	s = mustParse(t, "e.yaml", withService+"evidence: {every: 1h, ca: ca.pem}\n")
	if err := s.Validate(); err != nil || len(s.Warnings) != 2 {
		t.Errorf("without the address: %v, warnings %v", err, s.Warnings)
	}
}

func TestEvidenceMistakes(t *testing.T) {
	for yaml, want := range map[string]string{
		withService + "evidence: {stik: true}":                          `did you mean "stick"`,
		withService + "evidence: {stick: yes}":                          "evidence.stick",
		withService + "evidence: {include: [journals]}":                 `"journals" is not known here`,
		withService + "evidence: {include: [logs, logs]}":               "there already",
		withService + "evidence: {include: ['']}":                       "is empty",
		withService + "evidence: {include: [escrow]}":                   "without holders there is no escrow",
		updatable + "evidence: {stick: true}":                           "after a hand-off",
		withService + "evidence: {url: 'http://attest.example/box'}":    "is not an https address",
		withService + "evidence: {url: 'https://u:p@attest.example'}":   "is not an https address",
		withService + "evidence: {url: 'https://a.example', every: 5s}": "720h",
		updatable + "evidence: {url: 'https://attest.example'}":         "after a hand-off",
	} {
		s, err := spec.Parse("e.yaml", []byte(yaml))
		if err == nil {
			err = s.Validate()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n%v, want %q", yaml, err, want)
		}
	}
}
