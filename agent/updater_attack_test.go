package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

// wantRefused wants the error's text, and not a byte of the disk changed.
func (a *appliance) wantRefused(src update.Source, want string) {
	a.t.Helper()
	a.unwritten(func() {
		version, err := a.u.Apply(a.t.Context(), src, "test", "")
		if err == nil || !strings.Contains(err.Error(), want) {
			a.t.Errorf("installed %q: %v, want %q", version, err, want)
		}
	})
	if p := a.u.Status().Pending; p != nil {
		a.t.Errorf("pending %+v", p)
	}
}

// TestESPFull: found before the first write.
func TestESPFull(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	esp, err := a.esp()
	if err != nil {
		t.Fatal(err)
	}
	junk := esp.FreeBytes() - 400<<10
	if err := esp.WriteFile("holiday.mp4", junk, io.LimitReader(zeros{}, junk), today); err != nil {
		t.Fatal(err)
	}
	const want = "remove files that are not ours from it"
	a.wantRefused(v.source(), want)
	a.wantRefused(v.source(), want)
	a.wantEntries("a 1.0.0")
	a.wantMemory("refused 1.0.0>1.1.0;") // once
	if s := a.u.Status(); strings.Count(s.LastError, "\n") > 0 || !strings.Contains(s.LastError, "the ESP of 64 MiB has") {
		t.Errorf("%q", s.LastError)
	}
	if esp, err = a.esp(); err != nil {
		t.Fatal(err)
	}
	if err := esp.Remove("holiday.mp4"); err != nil {
		t.Fatal(err)
	}
	a.update("1.1.0")
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestReleaseTooLarge for the slot, or with a UKI too large for the ESP.
func TestReleaseTooLarge(t *testing.T) {
	for name, o := range map[string]releaseOptions{"root": {ownBytes: 3 << 20}, "UKI": {ukiBytes: 22 << 20}} {
		t.Run(name, func(t *testing.T) {
			v := newVendor(t, "1.0.0")
			v.publish("1.1.0", o)
			a := newAppliance(v, "1.0.0")
			a.wantRefused(v.source(), "the "+name)
			a.wantEntries("a 1.0.0")
			a.wantMemory("refused 1.0.0>1.1.0;")
		})
	}
}

// TestBundlesOfOthers are refused with the reason, and nothing is written.
func TestBundlesOfOthers(t *testing.T) {
	v := newVendor(t, "1.0.0")
	v.publish("3.0.0", releaseOptions{epoch: 3})
	otherArch := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	v.publish("2.0.0", releaseOptions{product: "lamp"})
	v.publish("2.0.0", releaseOptions{arch: otherArch})
	a := newAppliance(v, "1.0.0")
	a.update("3.0.0")
	v.publish("4.0.0", releaseOptions{epoch: 2})
	memory := a.memory()
	for name, tt := range map[string]struct {
		o    repo.BundleOptions
		want string
	}{
		"other product": {repo.BundleOptions{Product: "lamp"}, "version 4.0.0: its security epoch is lower"}, // the newest that is for this box
		"other arch":    {repo.BundleOptions{Product: "gate", Arch: otherArch}, "its security epoch is lower"},
		"lower epoch":   {repo.BundleOptions{Product: "gate", Arch: runtime.GOARCH, Version: "4.0.0"}, "version 4.0.0: its security epoch is lower"},
		"older":         {repo.BundleOptions{Product: "gate", Arch: runtime.GOARCH, Version: "1.0.0"}, "nothing to install"},
		"running":       {repo.BundleOptions{Product: "gate", Arch: runtime.GOARCH, Version: "3.0.0"}, "nothing to install"},
	} {
		t.Run(name, func(t *testing.T) {
			a.t = t // and the vendor's
			src, _ := openBundle(t, v.bundle(tt.o))
			a.wantRefused(src, tt.want)
			a.wantEntries("b 3.0.0", "a 1.0.0")
			a.wantMemory(memory)
		})
	}
	a.t = t
	stranger := newVendor(t, "9.0.0")
	src, _ := openBundle(t, stranger.bundle(repo.BundleOptions{}))
	a.wantRefused(src, "verification failed")
	a.wantRefused(src, "verification failed")
	a.wantMemory(memory + "refused 3.0.0>;")
}

// TestFlippedBundle turns a bit every 64 KiB, and in each part of the metadata.
// Whatever that does, the old slot boots and nothing half-written does.
func TestFlippedBundle(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	base := newAppliance(v, "1.0.0")
	good, dir := v.bundle(repo.BundleOptions{}), readFolder(t, base.dir)
	refused, installed := 0, 0
	var offsets []int
	for at := 700; at < len(good); at += 64 << 10 {
		offsets = append(offsets, at)
	}
	for at := 700; at < 20<<10 && at < len(good); at += 2500 {
		offsets = append(offsets, at)
	}
	for _, at := range offsets {
		bad := bytes.Clone(good)
		bad[at] ^= 4
		a := &appliance{vendor: v, dev: base.dev.(*partition.Memory).Clone(), dir: dir.restore(t), now: today}
		a.mustBoot(partition.SlotA, "1.0.0")
		src, err := update.OpenBundle(bytes.NewReader(bad), int64(len(bad)))
		if err == nil {
			_, err = a.u.Apply(t.Context(), src, "test", "")
		}
		if err == nil {
			installed++ // the bit was in what this box does not need, such as SHA256SUMS
			a.wantEntries("b 1.1.0 3", "a 1.0.0")
			continue
		}
		refused++
		a.wantEntries("a 1.0.0")
		if p := a.u.Status().Pending; p != nil {
			t.Errorf("bit at %d: pending %+v", at, p)
		}
		if t.Failed() {
			t.Fatalf("bit at %d: %v", at, err)
		}
	}
	t.Logf("%d bits turned in %d bytes: %d refused, %d harmless", len(offsets), len(good), refused, installed)
	if refused < 10 || installed == 0 {
		t.Errorf("%d refused, %d installed", refused, installed)
	}
}

// TestTruncatedBundle is found when it is opened, before anything is read of it.
func TestTruncatedBundle(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	b := v.bundle(repo.BundleOptions{})
	path := filepath.Join(t.TempDir(), "x.bundle")
	a := newAppliance(v, "1.0.0")
	a.unwritten(func() {
		for _, n := range []int{0, 1, 511, 512, 4096, len(b) / 2, len(b) - 1024, len(b) - 1} {
			putFile(t, path, b[:n])
			if _, err := a.u.ApplyFrom(t.Context(), path, ""); !errors.Is(err, update.ErrUntrusted) {
				t.Errorf("%d bytes of %d: %v", n, len(b), err)
			}
		}
	})
	a.wantMemory("")
}

// TestSourceDisappears in the middle of the content: the stick was pulled out.
func TestSourceDisappears(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	v.publish("1.2.0", releaseOptions{ownBytes: 2 << 20})
	a.update("1.1.0")
	for _, after := range []int64{100 << 10, 1 << 20, 1<<20 + 200<<10} {
		src, meter := openBundle(t, v.bundle(repo.BundleOptions{}))
		meter.failAfter, meter.err = after, unix.EIO
		if _, err := a.u.Apply(t.Context(), src, "test", ""); !errors.Is(err, unix.EIO) {
			t.Errorf("after %d bytes: %v", after, err)
		}
		if s := a.u.Status(); s.Pending != nil && s.Pending.Version != "1.1.0" || s.Doing != "" || s.LastError == "" || s.DoneBytes != 0 {
			t.Errorf("after %d bytes: %+v", after, s)
		}
	}
	a.wantEntries("b 1.1.0")
	a.mustBoot(partition.SlotB, "1.1.0")
	a.wantMemory("applied 1.0.0>1.1.0;committed >1.1.0;") // a stick pulled out is no news
	a.update("1.2.0")
	a.wantEntries("a 1.2.0", "b 1.1.0")
}

// TestInterrupted: the caller gives up before the slot is touched, and in the middle.
func TestInterrupted(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.mustApply(v.source(), "", "1.1.0")
	v.publish("1.2.0", releaseOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	a.dev = &witness{a.dev, cancel}
	if _, err := a.u.Apply(ctx, v.source(), "test", ""); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	a.wantMemory("applied 1.0.0>1.1.0;")
	a.wantEntries("a 1.0.0")
	a.update("1.2.0")
}

// TestClock: one that starts in 1970, and one that is ahead.
func TestClock(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.now = time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
	memory := "refused 1.0.0>;"
	for range 5 {
		a.wantRefused(v.source(), "metadata has expired")
		a.now = a.now.AddDate(0, 0, 1)
	}
	a.wantMemory(memory) // another date is no other reason
	if s := a.u.Status(); !strings.Contains(s.LastError, "or the clock is wrong") || !strings.HasSuffix(s.Journal[0].Reason, "the clock is wrong") {
		t.Errorf("%+v", s)
	}
	if s, err := update.LoadState(a.dir, a.now); err != nil || !s.LastSeen.IsZero() && s.LastSeen.After(today) {
		t.Errorf("the state is poisoned: %+v, %v", s, err)
	}
	a.now = time.Unix(0, 0)
	a.mustApply(v.source(), "", "1.1.0")
	a.mustBoot(partition.SlotB, "1.1.0")
	a.bless()
	a.wantMemory(memory + "applied 1.0.0>1.1.0;committed >1.1.0;")
	s, err := update.LoadState(a.dir, a.now)
	if err != nil || s.LastSeen != today {
		t.Errorf("last seen %v, %v", s.LastSeen, err)
	}
	// A server is judged strictly: what the box saw keeps an old timestamp from counting in 1970.
	a.now = today.AddDate(0, 0, 13)
	if _, err := a.u.Check(t.Context(), v.source(), ""); !errors.Is(err, ErrNoUpdate) {
		t.Error(err)
	}
	a.u.BuildTime, a.now = today.AddDate(2, 0, 0), time.Unix(0, 0)
	a.wantRefused(v.source(), "metadata has expired")
}

// TestFellBack: the reason is shown, the release is not tried again by itself, but
// when somebody asks for it.
func TestFellBack(t *testing.T) {
	for name, reason := range map[string]string{"with a reason": "not healthy after 10m0s: web is failed (exit status 1); ", "in silence": ""} {
		t.Run(name, func(t *testing.T) {
			v := newVendor(t, "1.0.0", "1.1.0")
			a := newAppliance(v, "1.0.0")
			bundle := v.bundle(repo.BundleOptions{})
			src, _ := openBundle(t, bundle)
			a.mustApply(src, "", "1.1.0")
			for range updateTries {
				if reason == "" {
					if err := a.load(); err != nil {
						t.Fatal(err)
					}
					continue
				}
				a.mustBoot(partition.SlotB, "1.1.0")
				a.u.TrialFailed(errors.New(reason))
			}
			a.mustBoot(partition.SlotA, "1.0.0")
			shown := reason
			if reason == "" {
				shown = silent
			}
			memory := "failed 1.1.0: " + shown + ";applied 1.0.0>1.1.0;fell-back 1.1.0>1.0.0;"
			a.wantMemory(memory)
			a.wantEntries("a 1.0.0", "b 1.1.0 0")
			var text strings.Builder
			s := a.u.Status()
			if _, err := s.WriteTo(&text); err != nil || !strings.Contains(text.String(), "FAILED    release 1.1.0, 2026-11-21T12:00:00Z: "+shown) {
				t.Errorf("%v\n%s", err, text.String())
			}
			a.mustBoot(partition.SlotA, "1.0.0")
			a.wantMemory(memory) // said once
			// The medium was left in, and the repository still has it.
			for _, src := range []update.Source{src, v.source()} {
				a.wantRefused(src, "nothing to install: version 1.1.0: it was tried and failed")
			}
			a.wantMemory(memory)
			a.mustApply(v.source(), "1.1.0", "1.1.0")
			a.wantEntries("b 1.1.0 3", "a 1.0.0")
			a.mustBoot(partition.SlotB, "1.1.0")
			a.bless()
			a.wantEntries("b 1.1.0", "a 1.0.0")
		})
	}
}

// TestDamagedEntry: the ESP lost the UKI of the new release before its first boot.
func TestDamagedEntry(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.mustApply(v.source(), "", "1.1.0")
	esp, err := a.esp()
	if err != nil {
		t.Fatal(err)
	}
	entries, err := a.disk().Entries()
	if err != nil {
		t.Fatal(err)
	}
	if err := esp.Remove(entries[0].UKI); err != nil {
		t.Fatal(err)
	}
	a.mustBoot(partition.SlotA, "1.0.0")
	if m := a.memory(); !strings.HasPrefix(m, "failed 1.1.0: its boot entry is damaged: ") || !strings.HasSuffix(m, ";applied 1.0.0>1.1.0;fell-back 1.1.0>1.0.0;") {
		t.Error(m)
	}
}

// TestBrokenLater: a release that was good and was left because it does not boot any
// more (F74) is noted once, and may be installed again.
func TestBrokenLater(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.update("1.1.0")
	lose := func() {
		t.Helper()
		if err := a.disk().Arm(partition.SlotB, armedTries); err != nil {
			t.Fatal(err)
		}
		for range armedTries {
			if err := a.load(); err != nil {
				t.Fatal(err)
			}
		}
	}
	lose()
	memory := "applied 1.0.0>1.1.0;committed >1.1.0;fell-back 1.1.0>1.0.0;"
	for range 3 {
		a.mustBoot(partition.SlotA, "1.0.0")
		a.wantMemory(memory)
	}
	if e := a.u.Status().Journal[2]; !strings.Contains(e.Reason, "its slot may be damaged") {
		t.Errorf("%+v", e)
	}
	// Other news in between do not bring it back.
	src, _ := openBundle(t, newVendor(t, "9.0.0").bundle(repo.BundleOptions{}))
	a.wantRefused(src, "verification failed")
	a.mustBoot(partition.SlotA, "1.0.0")
	a.wantMemory(memory + "refused 1.0.0>;")
	a.update("1.1.0")
	a.wantEntries("b 1.1.0", "a 1.0.0")
	lose()
	a.mustBoot(partition.SlotA, "1.0.0")
	a.wantMemory(memory + "refused 1.0.0>;applied 1.0.0>1.1.0;committed >1.1.0;fell-back 1.1.0>1.0.0;")
}

// TestRearmedAndWell: a good slot that got its counter back and boots is blessed, and
// is not news; when it fails it is not taken for a new release.
func TestRearmedAndWell(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.update("1.1.0")
	if err := a.disk().Arm(partition.SlotB, armedTries); err != nil {
		t.Fatal(err)
	}
	a.mustBoot(partition.SlotB, "1.1.0")
	a.wantMemory("applied 1.0.0>1.1.0;committed >1.1.0;")
	a.bless()
	a.wantEntries("b 1.1.0", "a 1.0.0")
	a.wantMemory("applied 1.0.0>1.1.0;committed >1.1.0;")
}

// TestWrittenOnABench: no note was made of what runs on trial, and its end is noted
// all the same.
func TestWrittenOnABench(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.mustApply(v.source(), "", "1.1.0")
	if err := os.Remove(filepath.Join(a.dir, "state.json")); err != nil {
		t.Fatal(err)
	}
	for range updateTries {
		a.mustBoot(partition.SlotB, "1.1.0")
		a.u.TrialFailed(errors.New("no network"))
	}
	a.mustBoot(partition.SlotA, "1.0.0")
	a.wantMemory("failed 1.1.0: no network;fell-back 1.1.0>1.0.0;")
}

// TestJournalKeepsWhatMatters: sticks for other boxes, and a server that went stale,
// say so a few times and no more.
func TestJournalKeepsWhatMatters(t *testing.T) {
	var s update.State
	entry := func(r update.Result, to, source, reason string) update.JournalEntry {
		return update.JournalEntry{Time: today, From: "1.0.0", To: to, Source: source, Result: r, Reason: reason}
	}
	s.Log(entry(update.Applied, "1.1.0", "x", ""))
	for i := range 500 {
		for j := range 20 {
			logOnce(&s, entry(update.Refused, "", string(rune('a'+j)), fmt.Sprintf("box %d on day %d", j, i%26)))
		}
		logOnce(&s, entry(update.FellBack, "0.9.0", "", "broken"))
	}
	refused, broken := 0, 0
	for _, e := range s.Journal {
		switch e.Result {
		case update.Refused:
			refused++
		case update.FellBack:
			broken++
		}
	}
	if s.Journal[0].Result != update.Applied || refused != maxRefusals || broken != 1 || len(s.Journal) != 2+maxRefusals {
		t.Errorf("%d entries, %d refused, %d broken, the first %+v", len(s.Journal), refused, broken, s.Journal[0])
	}
}
