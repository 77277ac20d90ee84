package spec_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/spec"
)

func TestRecovery(t *testing.T) {
	s := mustParse(t, "r.yaml", updatable+`recovery:
  console: qr
  confirm: true
  holders:
    - {name: vendor, key: keys/escrow.pub}
    - {name: owner, key: age1xyz}
  threshold: 2
  url: https://escrow.example/boxes?product=box
  ca: ca.pem
  receipt_key: receipt.pub
  require_receipt: true
`)
	want := spec.Recovery{
		Console: "qr", Confirm: true, Holders: []spec.Holder{{Name: "vendor", Key: "keys/escrow.pub"}, {Name: "owner", Key: "age1xyz"}}, Threshold: 2,
		URL: "https://escrow.example/boxes?product=box", CA: "ca.pem", ReceiptKey: "receipt.pub", RequireReceipt: true,
	}
	if !reflect.DeepEqual(s.Recovery, want) {
		t.Errorf("got %+v, want %+v", s.Recovery, want)
	}
	if err := s.Validate(); err != nil || len(s.Warnings) != 0 {
		t.Error(err, s.Warnings)
	}
	text, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if again := mustParse(t, "again.yaml", string(text)); !reflect.DeepEqual(again.Recovery, want) {
		t.Errorf("written and read back: %+v", again.Recovery)
	}
	if s.ApplyDefaults(); !reflect.DeepEqual(s.Recovery, want) {
		t.Errorf("defaults changed what was given: %+v", s.Recovery)
	}
	s = mustParse(t, "r.yaml", updatable)
	if s.ApplyDefaults(); s.Recovery.Console != "text" || s.Recovery.Threshold != 0 || len(s.Recovery.Holders) != 0 || s.Validate() != nil {
		t.Errorf("without the section: %+v, %v", s.Recovery, s.Validate())
	}
	s = mustParse(t, "r.yaml", updatable+"recovery: {holders: [{name: a, key: b}]}\n")
	if s.ApplyDefaults(); s.Recovery.Threshold != 1 {
		t.Errorf("default threshold %d", s.Recovery.Threshold)
	}
}

func TestEncryptSlots(t *testing.T) {
	s := mustParse(t, "e.yaml", updatable+"disk: {encrypt_slots: true}\n")
	if s.ApplyDefaults(); !s.Disk.EncryptSlots || s.Validate() != nil {
		t.Errorf("%+v, %v", s.Disk, s.Validate())
	}
	s = mustParse(t, "e.yaml", updatable+"disk: {encrypt_slots: true, data: []}\n")
	if err := s.Validate(); err == nil || !strings.Contains(err.Error(), "disk.encrypt_slots: the slots' key lies on the data volumes, and there is none") {
		t.Error(err)
	}
	if _, err := spec.Parse("e.yaml", []byte(updatable+"disk: {encrypt_slot: true}\n")); err == nil || !strings.Contains(err.Error(), `did you mean "encrypt_slots"`) {
		t.Error(err)
	}
}

func TestRecoveryMistakes(t *testing.T) {
	const holders = "holders: [{name: a, key: k}]"
	for yaml, want := range map[string]string{
		"{console: qrcode}":                                      `"qrcode" is not known here`,
		"{holder: []}":                                           `did you mean "holders"`,
		"{holders: [{name: a}]}":                                 "needs name and key",
		"{holders: [{name: A person, key: k}]}":                  "is not allowed here",
		"{holders: [{name: a, key: k}, {name: b, key: k}]}":      "already, by name or by key",
		"{holders: [{name: a, key: k}, {name: a, key: l}]}":      "already, by name or by key",
		"{" + holders + ", url: \"ftp://x/\"}":                   "is not the URL of a web server",
		"{" + holders + ", url: \"https://me:secret@x/\"}":       "is not the URL of a web server",
		"{" + holders + ", threshold: -1}":                       "-1 is not the number",
		"{" + holders + ", threshold: 2}":                        "2 holders are needed and there are 1",
		"{" + holders + ", console: none, confirm: true}":        "cannot be typed back",
		"{" + holders + ", require_receipt: true}":               "no receipt can be checked",
		"{" + holders + ", console: none}":                       "never learns that",
		"{console: none}":                                        "nobody would have the recovery key",
		"{threshold: 1}":                                         "without holders there is none",
		"{url: \"https://x/\"}":                                  "without holders there is none",
		"{receipt_key: a.pub}":                                   "without holders there is none",
		"{require_receipt: true, receipt_key: a.pub}":            "without holders there is none",
		"{" + holders + "}\ndisk: {data: []}":                    "no data volume",
		"{holders: [" + strings.Repeat("{name: a}, ", 20) + "]}": "a holder needs",
	} {
		s, err := spec.Parse("r.yaml", []byte(updatable+"recovery: "+yaml+"\n"))
		if err == nil {
			err = s.Validate()
		}
		var list *spec.Errors
		if !errors.As(err, &list) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s:\n%v\nwant %q", yaml, err, want)
		}
	}
}
