package agent

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// TestAuthenticatedVolume: one volume with integrity beside one without, made and
// opened again by the TPM, and by a release that asks for something else.
func TestAuthenticatedVolume(t *testing.T) {
	b := newBox(t, 2)
	b.volumes[1].Integrity = luks2.HMACSHA256
	s := b.mustBoot("", "provisioned")
	s.write("records")
	if s.status.Volumes[0].Integrity != "" || s.status.Volumes[1].Integrity != luks2.HMACSHA256 || len(s.status.Problems) != 0 {
		t.Errorf("volumes %+v, problems %q", s.status.Volumes, s.status.Problems)
	}
	if len(b.tags) != 1 {
		t.Errorf("tags were made of %d volumes, want 1", len(b.tags))
	}
	for i, want := range []bool{false, true} {
		if got := fixedSize(b.parts()[i].Device); got != want {
			t.Errorf("volume %d keeps its size: %v, want %v", i, got, want)
		}
	}
	b.powerOn()
	s = b.mustBoot("", "tpm")
	s.wantData("records")
	if len(b.tags) != 1 {
		t.Error("the tags were made again: that wipes the volume")
	}

	b.volumes[0].Integrity, b.volumes[1].Integrity = luks2.HMACSHA256, ""
	b.powerOn()
	s = b.mustBoot("", "tpm")
	s.wantData("records")
	said := strings.Join(s.status.Problems, "\n")
	for _, want := range []string{
		"volume data was made with no integrity and the release asks for integrity hmac-sha256",
		"volume media was made with integrity hmac-sha256 and the release asks for no integrity",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("problems %q, want %q", said, want)
		}
	}
}

// TestAuthenticateFails: no volume is published whose tags were not made.
func TestAuthenticateFails(t *testing.T) {
	b := newBox(t, 1)
	b.volumes[0].Integrity = luks2.HMACSHA256
	if fixedSize(b.parts()[0].Device) {
		t.Error("a volume that was never made keeps its size")
	}
	s := b.session("")
	if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
		t.Fatal(err)
	}
	s.storage.fail = "authenticate data"
	if err := s.open(); err == nil || !strings.Contains(err.Error(), "make data volume data") {
		t.Fatalf("error %v", err)
	}
	if !b.fresh(0) {
		t.Error("the volume counts as provisioned")
	}
	b.powerOn()
	b.mustBoot("", "provisioned")
}

func TestBadSector(t *testing.T) {
	for _, tt := range []struct{ record, device, sector string }{
		{"3,1042,99,-;device-mapper: crypt: dm-2: INTEGRITY AEAD ERROR, sector 4711\n SUBSYSTEM=block\n", "dm-2", "4711"},
		{"3,1042,99,-;device-mapper: integrity: dm-1: Checksum failed at sector 0x1\n", "", ""},
		{"12,1,2,-;a service says crypt: dm-x: INTEGRITY AEAD ERROR, sector 1\n", "", ""},
		{"", "", ""},
	} {
		device, sector, ok := badSectorOf(tt.record)
		if device != tt.device || sector != tt.sector || ok != (tt.device != "") {
			t.Errorf("%q: %q, %q, %v", tt.record, device, sector, ok)
		}
	}
}

func TestProgress(t *testing.T) {
	var out bytes.Buffer
	report := progressOf(slog.New(slog.NewTextHandler(&out, nil)), "data")
	for done := int64(1); done <= 1000; done++ {
		report(done, 1000)
	}
	if n := strings.Count(out.String(), "percent="); n != 9 {
		t.Errorf("%d reports, want 9:\n%s", n, out.String())
	}
	if text := doesNotGrow("data", 1<<30, 2<<30); !strings.Contains(text, "has 2048 MiB and 1024 MiB are in use") {
		t.Error(text)
	}
	if text := integrityChanged(image.Volume{}, &luks2.Header{}); text != "" {
		t.Error(text)
	}
}
