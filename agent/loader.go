package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
)

// LoaderStatus is about the two copies of the boot loader on the ESP.
type LoaderStatus struct {
	// Started is the path of the copy that this boot came from, where it said so.
	Started string       `json:"started,omitempty"`
	Copies  []LoaderCopy `json:"copies"`
	// Repaired says which copy was put back in this boot, and why; or what was put right
	// before the volumes opened, and took a restart.
	Repaired string `json:"repaired,omitempty"`
	// RepairedPath is that copy's.
	RepairedPath string `json:"repaired_path,omitempty"`
	// Entry is the firmware's boot entry for the second copy, "Boot0004", and
	// ReleaseEntries are those for the kernel images of the good releases. NoEntry says why
	// there are not all of them: then a program that the firmware refuses can end in a box
	// that does not start.
	Entry          string   `json:"entry,omitempty"`
	ReleaseEntries []string `json:"release_entries,omitempty"`
	NoEntry        string   `json:"no_entry,omitempty"`
	// Problem says why a copy was left as it is.
	Problem string `json:"problem,omitempty"`
}

// LoaderCopy is one of them.
type LoaderCopy struct {
	Path  string `json:"path"`            // on the ESP
	Wrong string `json:"wrong,omitempty"` // what is; empty for one that is right
}

// setLoader adds what was found; nil is nothing yet.
func (s *Status) setLoader(l *LoaderStatus) {
	s.BootLoader = l
	if l != nil && l.Problem != "" {
		s.Problems = append(s.Problems, l.Problem)
	}
}

// retried says whether this boot came from the second copy because of what the first one
// was, which it is no more.
func (l *LoaderStatus) retried() bool {
	return l != nil && l.RepairedPath != "" && len(l.Copies) > 1 && l.RepairedPath == l.Copies[0].Path && strings.EqualFold(l.Started, l.Copies[1].Path)
}

func (l *LoaderStatus) lines(b *strings.Builder) {
	if l.Repaired != "" {
		fmt.Fprintf(b, "repaired  %s\n", l.Repaired)
	}
	text := "two copies"
	if l.Started != "" {
		text += ", started from " + l.Started
	}
	if l.Entry != "" {
		text += ", the firmware's entry for the second is " + l.Entry
	}
	if len(l.ReleaseEntries) > 0 {
		text += ", for the releases without it " + strings.Join(l.ReleaseEntries, " and ")
	}
	if l.NoEntry != "" {
		text += ", and the firmware does not have all entries: " + l.NoEntry
	}
	fmt.Fprintf(b, "loader    %s\n", printable(text))
}

// LoaderKeeper has both copies of the boot loader be whole, so that the box starts from
// either. Call [LoaderKeeper.Keep] in a boot that is good.
type LoaderKeeper struct {
	Log  *slog.Logger
	Vars EFIVars
	Disk *partition.Disk
	Now  func() time.Time
}

// Keep compares the copies and puts back the one that is not right, once, from the one
// that is. Right is the copy that the firmware would start; where it would start both,
// or does not care, it is the one that started this boot. Where neither says which is
// right, nothing is written.
func (k *LoaderKeeper) Keep() *LoaderStatus {
	s := &LoaderStatus{Started: k.started()}
	copies, err := k.Disk.Loaders()
	if err != nil {
		s.Problem = fmt.Sprintf("the boot loaders cannot be looked at: %v", err)
		return s
	}
	why := make([]error, len(copies))
	rank := make([]int, len(copies))
	judge := k.judge()
	for i, c := range copies {
		why[i] = c.Damage
		if why[i] == nil {
			why[i] = judge(bytes.NewReader(c.Content), int64(len(c.Content)))
		}
		if why[i] == nil {
			rank[i] = 2
		}
		if strings.EqualFold(c.Path, s.Started) && c.Damage == nil {
			rank[i]++
		}
	}
	best := 0
	for i := range copies {
		if rank[i] > rank[best] {
			best = i
		}
	}
	k.mend(s, copies, why, rank, best)
	return s
}

// mend makes the copies the same as the best of them.
func (k *LoaderKeeper) mend(s *LoaderStatus, copies []partition.Loader, why []error, rank []int, best int) {
	good := copies[best]
	s.Copies = make([]LoaderCopy, len(copies))
	for i, c := range copies {
		s.Copies[i].Path = c.Path
		same := c.Damage == nil && bytes.Equal(c.Content, good.Content)
		switch {
		case rank[best] < 2:
			s.Copies[i].Wrong = printable(why[i].Error())
			s.Problem = "neither copy of the boot loader is one that the firmware starts, as far as can be told, so neither was put back: install a release, which brings its own"
			continue
		case same:
			continue
		case rank[i] == rank[best]:
			s.Copies[i].Wrong = fmt.Sprintf("another boot loader than %s", good.Path)
			s.Problem = "the two copies of the boot loader differ, and the boot loader did not say which of them started; both are left"
			continue
		}
		text := "it was another one than the one that started"
		if why[i] != nil {
			text = printable(why[i].Error())
		}
		if errors.Is(why[i], fs.ErrNotExist) {
			text = "it was missing"
		}
		if err := k.Disk.RestoreLoader(c.Path, partition.Bytes(good.Content), k.Now()); err != nil {
			s.Copies[i].Wrong = text
			s.Problem = fmt.Sprintf("the boot loader %s is not right (%s) and could not be put back from %s: %v", c.Path, text, good.Path, err)
			continue
		}
		s.RepairedPath = c.Path
		s.Repaired = fmt.Sprintf("the boot loader %s was put back from %s: %s", c.Path, good.Path, text)
		k.Log.Warn("boot loader repaired", "copy", c.Path, "from", good.Path, "why", text)
	}
	if s.Problem != "" {
		k.Log.Warn("boot loader", "problem", s.Problem)
	}
}

// judge says what makes the firmware refuse a program. Where it does not enforce Secure
// Boot, a signature still tells whether the content is what was signed.
func (k *LoaderKeeper) judge() func(content io.ReaderAt, size int64) error {
	state, err := ReadSecureBoot(k.Vars)
	enforced := err == nil && state.Enforced()
	return func(content io.ReaderAt, size int64) error {
		p, err := uki.Parse(content, size)
		if err != nil {
			return err
		}
		if enforced {
			return p.Allowed(state.Databases[sigdb.DB], state.Databases[sigdb.DBX])
		}
		digest, err := p.Authenticode()
		if err != nil {
			return err
		}
		signatures, err := p.Signatures()
		if err != nil {
			return err
		}
		if len(signatures) > 0 && !slices.ContainsFunc(signatures, func(s uki.Signature) bool { return s.Digest == digest }) {
			return errors.New("it is not what was signed")
		}
		return nil
	}
}

// Refused says why the firmware does not start the kernel image of a boot entry; nil where
// nothing speaks against it.
func (k *LoaderKeeper) Refused(e partition.Entry) error {
	files, err := espOf(k.Disk)
	if err != nil {
		return err
	}
	f, err := files.Open(e.UKI)
	if err != nil {
		return err
	}
	return k.judge()(f, f.Size())
}

// armedTries is how often a slot that was good may fail to boot in a row. It is
// more than a trial has, which tells the two apart.
const armedTries = 5

// giveUpRefused gives up the release that the boot loader has chosen in this start of the
// box, where it is that of the slot that does not run: the firmware refused its kernel
// image, and came to the one that runs by an entry of its own. The boot loader would choose
// it at each boot. ok is false where there is none.
func giveUpRefused(disk *partition.Disk, vars EFIVars, running partition.Slot) (e partition.Entry, ok bool, err error) {
	entries, err := disk.Entries()
	if err != nil || len(entries) == 0 {
		return e, false, err
	}
	e = entries[0] // the boot loader's next choice
	if e.Slot != running.Other() || e.Bad() || !e.Named(loaderSays(vars, "LoaderEntrySelected")) {
		return e, false, nil
	}
	boots := armedTries // of one that was good, see wasGood
	if e.Counted {
		boots = e.TriesLeft + e.TriesDone
	}
	if err := disk.GiveUp(e.Slot, boots); err != nil {
		return e, true, err
	}
	// A worn disk takes what it does not keep, and who restarts by that does so for ever.
	if entries, err = disk.Entries(); err == nil && slices.ContainsFunc(entries, func(o partition.Entry) bool { return o.FileName == e.FileName }) {
		err = fmt.Errorf("the disk does not keep what is written: boot entry %s is still there", e.FileName)
	}
	return e, true, err
}

// started is the path that systemd-boot says it was started from (LoaderImageIdentifier);
// empty where that is not known.
func (k *LoaderKeeper) started() string {
	return printable(espPath(loaderSays(k.Vars, "LoaderImageIdentifier")))
}

// loaderSays reads what systemd-boot has said about this start of the box (systemd's Boot
// Loader Interface); empty where it has not.
func loaderSays(vars EFIVars, name string) string {
	vendor := sigdb.FromUUID(uuid.MustParse("4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"))
	_, value, err := vars.Read(EFIVar{name, vendor})
	if err != nil {
		return ""
	}
	text, _, _ := cutUTF16Z(value)
	return text
}
