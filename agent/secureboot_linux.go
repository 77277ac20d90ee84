package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// loaderPaths are where a firmware may take the boot loader from.
func loaderPaths() []string {
	return []string{"EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/BOOTAA64.EFI", "EFI/systemd/systemd-bootx64.efi", "EFI/systemd/systemd-bootaa64.efi"}
}

// bootPrograms are those on a disk that may have to start: the boot loader, the kernel
// image of the slot that runs, and that of the other as long as it may boot. Of a slot
// that is bad or damaged, nothing starts anyway.
func bootPrograms(disk *partition.Disk, running partition.Slot) ([]BootProgram, error) {
	device, esp, err := disk.Partition(partition.ESPName)
	if err != nil {
		return nil, err
	}
	files, err := fat32.Open(device, esp.SizeBytes)
	if err != nil {
		return nil, fmt.Errorf("ESP: %w", err)
	}
	var list []BootProgram
	for _, path := range loaderPaths() {
		p, err := openProgram(files, path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, BootProgram{Name: "the boot loader " + path, File: p})
	}
	if len(list) == 0 {
		return nil, errors.New("there is no boot loader on the ESP")
	}
	entries, err := disk.Entries()
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Slot != running && (e.Damage != nil || e.Bad()) {
			continue
		}
		p, err := openProgram(files, strings.TrimPrefix(e.UKI, "/"))
		if err != nil {
			return nil, fmt.Errorf("slot %s: %w", e.Slot, err)
		}
		list = append(list, BootProgram{Name: fmt.Sprintf("release %s in slot %s", e.Version, e.Slot), File: p})
	}
	return list, nil
}

// runningPrograms are what the boot loaders on a disk and the kernel image of the slot
// that runs are measured as. It reads all of them; a loader that cannot be read has not
// started.
func runningPrograms(disk *partition.Disk, running partition.Slot) (kernel pcr.Release, loaders []pcr.Digest, err error) {
	entries, err := disk.Entries()
	if err != nil {
		return kernel, nil, err
	}
	own := slices.IndexFunc(entries, func(e partition.Entry) bool { return e.Slot == running })
	if own < 0 {
		return kernel, nil, fmt.Errorf("no boot entry for slot %s", running)
	}
	device, esp, err := disk.Partition(partition.ESPName)
	if err != nil {
		return kernel, nil, err
	}
	files, err := fat32.Open(device, esp.SizeBytes)
	if err != nil {
		return kernel, nil, fmt.Errorf("ESP: %w", err)
	}
	for _, path := range loaderPaths() {
		p, err := openProgram(files, path)
		if err != nil {
			continue
		}
		digest, err := p.Authenticode()
		if err != nil {
			continue
		}
		if !slices.Contains(loaders, digest) {
			loaders = append(loaders, digest)
		}
	}
	path := strings.TrimPrefix(entries[own].UKI, "/")
	p, err := openProgram(files, path)
	if err != nil {
		return kernel, nil, err
	}
	if kernel, err = releaseIn(p); err != nil {
		return kernel, nil, fmt.Errorf("%s on the ESP: %w", path, err)
	}
	return kernel, loaders, nil
}

// releaseIn is what a kernel image is measured as: itself, the kernel inside where the
// stub has the firmware start that, and its sections.
func releaseIn(p *uki.File) (r pcr.Release, err error) {
	if r.UKI.Authenticode, err = p.Authenticode(); err != nil {
		return r, err
	}
	measured, err := p.Measured()
	if err != nil {
		return r, err
	}
	r.PCR11 = pcr.UKI(measured)
	section, err := p.Open(".linux")
	if err != nil {
		return r, err
	}
	linux, err := uki.Parse(section, section.Size())
	if err == nil {
		r.Linux, err = linux.Authenticode()
	}
	if err != nil {
		return r, fmt.Errorf("the kernel inside: %w", err)
	}
	return r, nil
}

func openProgram(files *fat32.FS, path string) (*uki.File, error) {
	f, err := files.Open(path)
	if err != nil {
		return nil, err
	}
	p, err := uki.Parse(f, f.Size())
	if err != nil {
		return nil, fmt.Errorf("%s on the ESP: %w", path, err)
	}
	return p, nil
}

// keysKeeper brings db and dbx to what the release says.
func (s *system) keysKeeper() *SecureBootKeeper {
	return &SecureBootKeeper{
		Log: s.log, Vars: efivarfs{efivarsPath}, Wanted: s.app.SecureBoot, Load: os.ReadFile,
		Programs: func() ([]BootProgram, io.Closer, error) {
			d, err := openSlots(s.initrd.Disk, s.initrd.Slot)
			if err != nil {
				return nil, nil, err
			}
			list, err := bootPrograms(d.disk, d.slot)
			if err != nil {
				return nil, nil, errors.Join(err, d.dev.Close())
			}
			return list, d.dev, nil
		},
		Seal: func(c VariableChange) error {
			if s.keeper == nil {
				return nil
			}
			return s.keeper.SealChange(c.Variables, c.Now, c.Next)
		},
	}
}

// keysRetry is how long an installation that goes on is waited for, each time.
const keysRetry = 30 * time.Second

// keepKeys makes the next change of the firmware's keys that the release brings, in a
// boot that is good, and restarts in the window for it to be in force. Whatever goes
// wrong is a problem in status, and no more (F65, F67). After a boot by the recovery key
// the states are seen to first, and the keys at the next start.
func (s *system) keepKeys(ctx context.Context) {
	for !s.started.Load() || !s.ready() {
		if !sleep(ctx, time.Second) {
			return
		}
	}
	var change *VariableChange
	for {
		err := s.changeKeys(ctx, &change)
		if err == nil {
			break
		}
		if !errors.Is(err, ErrUpdating) {
			s.problem(err.Error())
			return
		}
		if !sleep(ctx, keysRetry) {
			return
		}
	}
	if change == nil {
		return
	}
	restart := func() { s.requestPower(true, "for the change of "+change.Variable+" to be in force") }
	switch {
	case s.updater == nil:
		restart()
	case s.app.Update.Automatic:
		s.updater.rebootInWindow(ctx, restart)
	}
}

// changeKeys makes one change, with installations kept out; change is what it made. No
// change is made while a release waits for its boot or its trial: a box that comes back
// from that has to find the keys it had.
func (s *system) changeKeys(ctx context.Context, change **VariableChange) error {
	if s.updater != nil {
		end, err := s.updater.begin(0)
		if err != nil {
			return err
		}
		defer end()
	}
	k := s.keysKeeper()
	plan, err := k.Plan()
	status := k.Status(plan, err)
	defer func() { s.keys.Store(status) }()
	for _, note := range plan.Blocked {
		s.log.Warn("Secure Boot", "blocked", note)
	}
	switch {
	case err != nil:
		s.log.Warn("Secure Boot", "error", err) // in status; not worth a problem of the box
		return nil
	case plan.Change == nil:
		return nil
	case s.updater != nil && s.updater.state(nil).Pending != nil:
		status.Pending += " waits until the release that was installed has been tried"
		return nil
	case s.keeper != nil && s.keeper.Method == "recovery":
		status.Pending += " waits for a start that the TPM opens"
		return nil
	}
	if err := k.Apply(ctx, *plan.Change); err != nil {
		status.Problems = append(status.Problems, err.Error())
		return err
	}
	status.Pending = "the change of " + plan.Change.Variable + ", in force from the next start on,"
	*change = plan.Change
	return nil
}

// ErrNoKeyChange says that the firmware's keys are as the release wants them, or cannot
// be changed now.
var ErrNoKeyChange = errors.New("no change of the firmware's keys to make")

// ChangeKeys makes the next change of the firmware's keys after a hand-off, where no
// agent runs; the caller then reboots when it likes. The error is [ErrNoKeyChange] when
// there is none, or it has to wait; the status says why.
func ChangeKeys(ctx context.Context, log *slog.Logger) (*SecureBootStatus, error) {
	s := &system{log: log}
	if err := s.load(); err != nil {
		return nil, err
	}
	disk, err := openSlots(s.initrd.Disk, s.initrd.Slot)
	if err != nil {
		return nil, err
	}
	entry, err := disk.running()
	disk.close()
	if err != nil {
		return nil, err
	}
	if entry.Counted {
		return nil, fmt.Errorf("%w: the release that runs has to prove itself first (holdfast-agent bless)", ErrNoKeyChange)
	}
	if s.updater, err = OpenUpdater(log); err != nil {
		return nil, err
	}
	if s.keeper, err = s.newKeeper(); err != nil {
		return nil, err
	}
	var change *VariableChange
	err = s.changeKeys(ctx, &change)
	if err == nil && change == nil {
		err = ErrNoKeyChange
	}
	return s.keys.Load(), err
}

// prepare refuses a release that the firmware would not start, before anything of it is
// written, and has the data volumes open in its first boot. Firmware that says nothing
// keeps no release away (F67).
func (s *system) prepare(m image.Manifest, slot partition.Slot) error {
	if state, err := ReadSecureBoot(efivarfs{efivarsPath}); err == nil {
		if err := state.Starts(m.Expected); err != nil {
			return fmt.Errorf("release %s: %w", m.Version, err)
		}
	}
	if s.keeper == nil {
		return nil
	}
	return s.keeper.Prepare(m, slot)
}

const (
	// enrolmentNote lies on the ESP: it is about the board, and needed before the volumes.
	enrolmentNote     = "loader/holdfast-enrolment.json"
	maxEnrolmentBytes = 4 << 10
)

// enrolKeys gives a firmware in setup mode the vendor's keys, where the release says so,
// before anything is sealed. What goes wrong is said, and the boot goes on.
func (i *initrd) enrolKeys() error {
	if i.boot.Appliance.SecureBoot.Enroll != "force" {
		return nil
	}
	e, err := i.enrolment()
	restart := false
	if err == nil {
		restart, err = e.Run()
	}
	if err != nil {
		i.log.Warn("Secure Boot keys", "error", err)
	}
	i.enrolled = err
	if restart {
		return ErrReboot
	}
	return nil
}

func (i *initrd) enrolment() (*Enrolment, error) {
	device, esp, err := i.disk.Partition(partition.ESPName)
	if err != nil {
		return nil, err
	}
	files, err := fat32.Open(device, esp.SizeBytes)
	if err != nil {
		return nil, fmt.Errorf("ESP: %w", err)
	}
	e := &Enrolment{Log: i.log, Vars: efivarfs{efivarsPath}, Board: boardID(), Auths: map[string][]byte{}, Fresh: true}
	e.Load = func() ([]byte, error) {
		f, err := files.Open(enrolmentNote)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(io.NewSectionReader(f, 0, min(f.Size(), maxEnrolmentBytes)))
	}
	e.Save = func(b []byte) error {
		return files.WriteFile(enrolmentNote, int64(len(b)), bytes.NewReader(b), time.Now())
	}
	for _, name := range []string{sigdb.PK, sigdb.KEK, sigdb.DB} {
		if e.Auths[name], err = os.ReadFile(filepath.Join(image.EnrolmentPath, name+".auth")); err != nil {
			return nil, err
		}
	}
	if v := i.boot.Appliance.Volumes; len(v) > 0 {
		data, _, err := i.disk.Partition(v[0].Name)
		if err != nil {
			return nil, err
		}
		if e.Fresh, err = partition.Unprovisioned(data); err != nil {
			return nil, err
		}
	}
	return e, nil
}
