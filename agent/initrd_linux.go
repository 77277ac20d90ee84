package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/dm"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

const (
	sysPath, devPath = "/sys", "/dev"

	sysroot = "/sysroot"
	// rootMapping is the dm name of the verified root; volumes have volumeMapping.
	rootMapping = "holdfast-root"
	// slotMapping is that of an encrypted slot, below the verified root.
	slotMapping = "holdfast-slot"
	// beforeRoot is where the volumes are mounted until there is a root.
	beforeRoot = "/volumes"
	// The stub puts the UKI's .pcrsig section here (systemd-stub(7)).
	signaturesPath = "/.extra/tpm2-pcr-signature.json"
	softdog        = "softdog.ko"
	eventLogPath   = "/sys/kernel/security/tpm0/binary_bios_measurements"
)

func volumeMapping(name string) string { return "holdfast-data-" + name }

// initrd is the agent as the first process of a boot.
type initrd struct {
	began   time.Time
	console *os.File
	log     *slog.Logger
	boot    image.Boot
	from    origin
	root    rootPartition
	device  partition.Device // the whole disk
	disk    *partition.Disk
	status  Status
	// signatures are those of this release, and of the vendor's authorisation.
	signatures seal.Signatures
	// enrolled is what went wrong when keys were enrolled, or why they were not.
	enrolled error
}

// RunInitrd is the first process of a boot: it finds and verifies the root,
// opens the data volumes, closes the door behind it (PCR 11) and becomes the
// root's init. It returns only errors: [ErrReboot], [ErrPowerOff], or what made
// this boot impossible.
func RunInitrd(console *os.File) error {
	i := &initrd{began: time.Now(), console: console, log: slog.New(newConsoleHandler(console))}
	if err := mountAll(kernelMounts); err != nil {
		return err
	}
	i.status.Boot.KernelMilliseconds = uptime().Milliseconds()
	for _, step := range []func() error{i.readBoot, i.loadModules, i.findDisk, i.open, i.leave} {
		if err := step(); err != nil {
			if !errors.Is(err, ErrReboot) && !errors.Is(err, ErrPowerOff) {
				i.rearm()
			}
			return err
		}
	}
	return i.becomeInit()
}

// rearm gives the slot of a boot that ends here its counter, if it is one that was
// good: the root was not even found, so [initrd.arm] was not reached. It is a last
// act; what fails here changes nothing. A disk that this boot was not started from is
// left alone, and where that is not known, all are if more than one could be meant.
func (i *initrd) rearm() {
	names, _ := i.from.disks(sysPath, devPath)
	if len(names) == 0 {
		disks, err := os.ReadDir(filepath.Join(sysPath, "block"))
		if err != nil {
			return
		}
		for _, d := range disks {
			names = append(names, d.Name())
		}
	}
	var mine []*partition.Disk
	for _, name := range names {
		dev, err := partition.OpenShared(filepath.Join(devPath, name))
		if err != nil {
			continue
		}
		defer dev.Close()
		if disk, err := partition.Open(dev); err == nil && i.armable(disk) != "" {
			mine = append(mine, disk)
		}
	}
	if len(mine) == 1 {
		i.arm(mine[0])
	}
}

// arm counts the boots of a slot that is good, until this boot has come to the
// services: a slot that breaks later would be booted for ever otherwise (F74). It
// needs another slot that is good.
func (i *initrd) arm(disk *partition.Disk) {
	slot := i.armable(disk)
	if slot == "" {
		return
	}
	if err := disk.Arm(slot, armedTries); err != nil {
		i.log.Warn("boots are not counted", "error", err)
	}
}

// armable is the slot with this boot's release, when it and the other are good.
func (i *initrd) armable(disk *partition.Disk) partition.Slot {
	entries, err := disk.Entries()
	if err != nil {
		i.log.Warn("boot entries", "error", err)
		return ""
	}
	slot, other := partition.Slot(""), false
	for _, e := range entries {
		switch {
		case e.Good() && e.RootHash == i.boot.Root.RootHash && slot == "":
			slot = e.Slot
		case e.Good():
			other = true
		}
	}
	if !other {
		return ""
	}
	return slot
}

// readBoot reads what the build put beside this program, and checks that the
// kernel was given the command line that belongs to it.
func (i *initrd) readBoot() error {
	b, err := os.ReadFile(image.BootPath)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &i.boot); err != nil {
		return fmt.Errorf("read %s: %w", image.BootPath, err)
	}
	a := i.boot.Appliance
	i.status.Name, i.status.Version, i.status.Architecture = a.Name, a.Version, a.Architecture
	i.status.EncryptSlots = a.EncryptSlots
	i.status.RootHash, i.status.Verity = i.boot.Root.RootHash, i.boot.Root
	i.log.Info("starting", "name", a.Name, "version", a.Version)
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	for _, word := range strings.Fields(string(cmdline)) {
		if hash, ok := strings.CutPrefix(word, image.RootHashWord); ok && hash != i.boot.Root.RootHash {
			return fmt.Errorf("the kernel command line names the root %s, this initrd belongs to %s: it was changed", hash, i.boot.Root.RootHash)
		}
	}
	return i.floorClock(a.BuildTimeSec)
}

// floorClock moves a clock that is behind the build forward to it (F89).
func (i *initrd) floorClock(buildSec int64) error {
	if time.Now().Unix() >= buildSec {
		return nil
	}
	i.log.Warn("clock was behind the release's build time", "clock", time.Now().UTC().Format(time.RFC3339))
	return unix.Settimeofday(&unix.Timeval{Sec: buildSec})
}

// loadModules loads the modules in the order the build computed. A module for
// hardware that is not there says ENODEV and is no loss; whatever is really
// missing shows in the step that needs it.
func (i *initrd) loadModules() error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	for _, path := range i.boot.Modules {
		if filepath.Base(path) == softdog && exists(watchdogPath) {
			continue // the hardware's own is better
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), moduleParameters(filepath.Base(path), string(cmdline)), 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			i.log.Warn("module not loaded", "module", filepath.Base(path), "error", err)
		}
	}
	return mountAll(firmwareMounts)
}

// moduleParameters are those that the kernel command line has for a module, as modprobe
// would give them: the kernel itself has them only for what is built in.
func moduleParameters(file, cmdline string) string {
	normal := strings.NewReplacer("-", "_").Replace
	name := normal(strings.TrimSuffix(file, ".ko"))
	var words []string
	for _, word := range strings.Fields(cmdline) {
		if module, parameter, ok := strings.Cut(word, "."); ok && normal(module) == name {
			words = append(words, parameter)
		}
	}
	return strings.Join(words, " ")
}

// findDisk finds the root's partition and opens its disk.
func (i *initrd) findDisk() (err error) {
	if err := i.findRoot(); err != nil {
		return err
	}
	if i.device, err = partition.OpenShared(i.root.disk); err != nil {
		return err
	}
	if i.disk, err = partition.Open(i.device); err != nil {
		return fmt.Errorf("disk %s: %w", i.root.disk, err)
	}
	if i.disk.Recovered() {
		i.status.Problems = append(i.status.Problems, "the partition table was read from its backup")
	}
	i.status.Slot, i.status.Disk = i.slot(), i.root.disk
	if err := i.leaveRefused(); err != nil {
		return err
	}
	i.arm(i.disk)
	return nil
}

// open maps the root and opens the volumes: the root first, so that damage there is met
// before any key is asked for, but where the root's own key is on the volumes.
func (i *initrd) open() error {
	if i.boot.Appliance.EncryptSlots {
		if err := i.enrolKeys(); err != nil {
			return err
		}
		return i.openEncrypted()
	}
	if err := i.mapRoot(i.root.device); err != nil {
		return err
	}
	if err := i.enrolKeys(); err != nil {
		return err
	}
	return i.openVolumes(sysroot, nil)
}

// mapRoot puts dm-verity over the device and reads the files the next stage starts with.
func (i *initrd) mapRoot(device string) error {
	device, err := dm.Verity(rootMapping, device, i.boot.Root)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(sysroot, 0o755); err != nil {
		return err
	}
	if err := mount(device, sysroot, "erofs", unix.MS_RDONLY|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("%w: the root is damaged or was changed", err)
	}
	for _, path := range []string{image.AgentPath, image.AppliancePath} {
		if _, err := os.ReadFile(filepath.Join(sysroot, path)); err != nil {
			return fmt.Errorf("read the verified root: %w", err)
		}
	}
	i.log.Info("root verified", "device", i.root.device, "slot", i.status.Slot)
	return nil
}

// findRoot finds the root's partition.
func (i *initrd) findRoot() (err error) {
	// A firmware without a log leaves the place unknown, and with one disk that is no loss.
	if raw, err := readEventLog(eventLogPath); err == nil {
		if log, err := pcr.ParseLog(raw); err == nil {
			i.from = originOf(log)
		}
	}
	f := &rootFinder{log: i.log, verity: i.boot.Root, encrypted: i.boot.Appliance.EncryptSlots, from: i.from, sys: sysPath, dev: devPath, wait: diskTime}
	if v := i.boot.Appliance.Volumes; len(v) > 0 {
		f.volume = v[0].Name
	}
	var others []string
	if i.root, others, err = f.find(context.Background()); err != nil {
		return err
	}
	for _, disk := range others {
		text := fmt.Sprintf("disk %s holds this release too and is not used, an install medium or a copy: unplug it", disk)
		i.log.Warn("another disk", "why", text)
		i.status.Problems = append(i.status.Problems, text)
	}
	return nil
}

// slot is the slot of the partition the root was found on.
func (i *initrd) slot() string {
	for n, p := range i.disk.Layout().Partitions {
		device, err := partitionDevice(i.root.disk, n+1)
		if err == nil && device == i.root.device {
			if s, ok := strings.CutPrefix(p.Name, "root-"); ok {
				return s
			}
		}
	}
	return ""
}

// openVolumes measures the phase in which keys may be had and opens the volumes below root.
func (i *initrd) openVolumes(root string, slots *Slots) error {
	m := &Machine{
		Log: i.log, Console: i.console, Root: root, Slots: slots, Slot: i.status.Slot, Echo: echoOf(i.console),
		Storage:       &kernelStorage{disk: i.root.disk, root: root},
		OpenTPM:       waitForTPM,
		Signatures:    func() ([]byte, error) { return os.ReadFile(signaturesPath) },
		SecureBoot:    i.secureBoot(),
		OnTrial:       i.onTrial(),
		Mend:          i.mendLoader,
		Authorisation: func() ([]byte, error) { return readAuthorisation(i.disk) },
		EventLog:      func() ([]byte, error) { return readEventLog(eventLogPath) },
	}
	if err := m.EnterPhase(phaseEnterInitrd); err != nil {
		i.log.Warn("boot phase not measured", "error", err) // the unseal will say so too, and end in the prompt
	}
	parts, err := i.dataPartitions()
	if err != nil {
		return err
	}
	if slots != nil {
		slots.Disk = i.disk
	}
	if err := m.OpenVolumes(i.boot, parts, &i.status); err != nil {
		return err
	}
	i.signatures, _ = m.signatures() // for later, and only to save time
	return m.Leave(&i.status)
}

// onTrial says whether this release has yet to prove itself and the other is good.
func (i *initrd) onTrial() bool {
	entries, err := i.disk.Entries()
	if err != nil {
		return false
	}
	own, other := false, false
	for _, e := range entries {
		if string(e.Slot) == i.status.Slot {
			own = own || e.Counted && !wasGood(e)
		} else {
			other = other || e.Good()
		}
	}
	return own && other
}

// dataPartitions finds the volumes' partitions by name on the root's own disk,
// the last one grown to the end of the disk first.
func (i *initrd) dataPartitions() ([]Partition, error) {
	volumes := i.boot.Appliance.Volumes
	if len(volumes) == 0 {
		return nil, nil
	}
	if err := i.growLast(volumes[len(volumes)-1].Name); err != nil {
		return nil, err
	}
	layout := i.disk.Layout()
	parts := make([]Partition, len(volumes))
	for k, v := range volumes {
		for n, p := range layout.Partitions {
			if p.Name == v.Name {
				device, _, err := i.disk.Partition(p.Name)
				if err != nil {
					return nil, err
				}
				parts[k] = Partition{Volume: v, Number: n + 1, Device: device}
			}
		}
		if parts[k].Device == nil {
			return nil, fmt.Errorf("disk %s has no partition for data volume %s", i.root.disk, v.Name)
		}
	}
	return parts, nil
}

// growLast grows the last partition, that of the volume, to the end of the disk.
func (i *initrd) growLast(volume string) error {
	if table, size := i.disk.Layout().SizeBytes, i.device.Size(); table < size {
		if device, _, err := i.disk.Partition(volume); err == nil && fixedSize(device) {
			text := doesNotGrow(volume, table, size)
			i.log.Warn("not grown", "why", text)
			i.status.Problems = append(i.status.Problems, text)
			return nil
		}
	}
	grown, err := partition.Grow(i.device)
	if err != nil {
		return fmt.Errorf("grow the last partition of %s to the end of the disk: %w", i.root.disk, err)
	}
	if !grown {
		return nil
	}
	if i.disk, err = partition.Open(i.device); err != nil {
		return fmt.Errorf("disk %s: %w", i.root.disk, err)
	}
	last := i.disk.Layout().Partitions
	p := last[len(last)-1]
	i.log.Info("data partition grown", "name", p.Name, "bytes", p.SizeBytes)
	return resizePartition(i.root.disk, len(last), p.StartBytes, p.SizeBytes)
}

// leave hands the findings over.
func (i *initrd) leave() error {
	i.status.Boot.InitrdMilliseconds = time.Since(i.began).Milliseconds()
	i.log.Info("initrd done", "ms", i.status.Boot.InitrdMilliseconds, "tpm_ms", i.status.Boot.TPMMilliseconds, "tpm_commands", i.status.Boot.TPMCommands)
	b, err := json.Marshal(i.status)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(statePath), 0o755); err != nil {
		return err
	}
	if signatures, err := i.signatures.Marshal(); err == nil {
		if err := os.WriteFile(signaturesCopy, signatures, 0o600); err != nil {
			return err
		}
	}
	return os.WriteFile(statePath, b, 0o600)
}

// becomeInit switches to the root and executes its agent, or its own init.
func (i *initrd) becomeInit() error {
	argv := []string{image.AgentPath, "system"}
	if len(i.boot.Appliance.Handoff) > 0 {
		argv = i.boot.Appliance.Handoff
		i.log.Info("handing over", "init", argv[0])
	}
	if err := switchRoot(sysroot); err != nil {
		return err
	}
	err := unix.Exec(argv[0], argv, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=linux"})
	return fmt.Errorf("execute %s: %w", argv[0], err)
}

// tpmTime is how long the TPM's driver may take to find its chip.
const tpmTime = 5 * time.Second

func waitForTPM() (seal.TPM, error) {
	deadline := time.Now().Add(tpmTime)
	for {
		tpm, err := seal.OpenDevice()
		if err == nil {
			return tpm, nil
		}
		if !errors.Is(err, seal.ErrNoTPM) || time.Now().After(deadline) {
			return nil, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// secureBoot says whether a seal may rest on Secure Boot. It is read once, before
// anything is sealed, and why it may not is said where somebody would expect that it does.
func (i *initrd) secureBoot() func() (bool, error) {
	want := i.boot.Appliance.SecureBoot
	on, why, err := SecureBootFor(efivarfs{efivarsPath}, want, i.enrolled)
	if i.enrolled != nil && (on || err != nil) { // else why has it
		i.status.Problems = append(i.status.Problems, i.enrolled.Error())
	}
	if why != "" {
		i.log.Warn("Secure Boot", "why", why)
		if on || want.Enroll == "force" {
			i.status.Problems = append(i.status.Problems, why)
		}
	}
	return func() (bool, error) { return on, err }
}
