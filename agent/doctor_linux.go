package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// examiner is where facts come from: this machine, or a test's.
type examiner struct {
	root    string // "/"
	openTPM func() (seal.TPM, error)
	vars    EFIVars
	now     func() time.Time
}

// Gather asks this machine, which need not run Holdfast: an installed system, or any
// Linux started from a stick. It changes nothing, and takes some seconds of the TPM.
// policy is what the data shall be sealed by; "" is that of the release that runs, or
// standard.
func Gather(policy string) Facts {
	return examiner{
		root: "/", vars: efivarfs{efivarsPath}, now: time.Now,
		openTPM: func() (seal.TPM, error) { return seal.OpenDevice() },
	}.gather(policy)
}

func (x examiner) path(p string) string { return filepath.Join(x.root, p) }

func (x examiner) gather(policy string) Facts {
	f := Facts{Policy: policy, Now: x.now(), EFI: exists(x.path("/sys/firmware/efi")), RTC: exists(x.path("/sys/class/rtc/rtc0"))}
	x.release(&f)
	x.tpm(&f)
	raw, err := readEventLog(x.path(eventLogPath))
	if err == nil {
		f.Log, err = pcr.ParseLog(raw)
	}
	if f.LogError = err; errors.Is(err, fs.ErrNotExist) {
		f.LogError = fmt.Errorf("the kernel shows no event log (is securityfs mounted?): %w", err)
	}
	x.firmware(&f)
	groups, err := os.ReadDir(x.path("/sys/kernel/iommu_groups"))
	f.IOMMUGroups = len(groups)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.IOMMUError = err
	}
	x.disk(&f)
	f.VM = x.hypervisor()
	dogs, _ := filepath.Glob(x.path("/sys/class/watchdog/*/identity"))
	for _, d := range dogs {
		f.Watchdogs = append(f.Watchdogs, x.text(d))
	}
	return f
}

// readEventLog reads the firmware's log once and to its end: the file says that it has 0
// bytes, and may have grown at the next reading (F23).
func readEventLog(path string) (b []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if b, err = io.ReadAll(io.LimitReader(f, attest.MaxLogBytes+1)); err != nil {
		return nil, err
	}
	if len(b) > attest.MaxLogBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", path, attest.MaxLogBytes)
	}
	return b, nil
}

// text is the first line of a file, or "".
func (x examiner) text(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(line)
}

// release fills in what a Holdfast system that runs knows.
func (x examiner) release(f *Facts) {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if at, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil {
				f.NotBefore = at
			}
		}
	}
	b, err := os.ReadFile(x.path(image.AppliancePath))
	if err != nil {
		return
	}
	var a image.Appliance
	if json.Unmarshal(b, &a) != nil {
		return
	}
	if f.Policy == "" {
		f.Policy, f.PIN = a.Seal.Policy, a.Seal.PIN
	}
	f.NotBefore = time.Unix(a.BuildTimeSec, 0)
}

func (x examiner) tpm(f *Facts) {
	tpm, err := x.openTPM()
	if err != nil {
		f.TPMError = err
		return
	}
	if c, ok := tpm.(io.Closer); ok {
		defer c.Close()
	}
	if f.Fitness, err = seal.Check(tpm); err != nil {
		f.TPMError = err
		return
	}
	f.SelfTestError = seal.SelfTest(tpm)
	if !f.Fitness.OwnerAuthSet {
		f.OwnerError = seal.TryOwner(tpm)
	}
	f.Space, f.SpaceError = seal.ReadSpace(tpm)
}

// firmware asks for its variables.
func (x examiner) firmware(f *Facts) {
	f.VariableBytes = -1
	if !f.EFI {
		shown, err := os.ReadDir(x.path("/sys/firmware"))
		f.Masked = err == nil && len(shown) == 0
		why := "not started by UEFI"
		if f.Masked {
			why = "/sys/firmware is empty"
		}
		f.SecureBootError = fmt.Errorf("%w: %s", ErrVariables, why)
		f.VariableError = f.SecureBootError
		return
	}
	f.SecureBoot, f.SecureBootError = ReadSecureBoot(x.vars)
	list, err := x.vars.List()
	if err != nil {
		f.VariableError = err
		return
	}
	for _, v := range list {
		if strings.HasPrefix(v.Name, "dump-type") {
			f.CrashDumps++
		}
	}
	f.VariableBytes, f.VariableError = x.vars.FreeBytes()
}

// disk looks for the first Holdfast disk.
func (x examiner) disk(f *Facts) {
	disks, err := os.ReadDir(x.path("/sys/block"))
	if err != nil {
		return
	}
	for _, d := range disks {
		dev, err := partition.OpenReadOnly(x.path("/dev/" + d.Name()))
		if err != nil {
			continue
		}
		disk, err := partition.Open(dev)
		if err != nil {
			dev.Close()
			continue
		}
		f.Disk = d.Name()
		f.ESPBytes, f.LargestBytes, f.DiskError = espRoom(disk)
		dev.Close()
		return
	}
}

// espRoom is what is free on a disk's ESP, and the size of the largest kernel image.
func espRoom(disk *partition.Disk) (free, largest int64, err error) {
	dev, p, err := disk.Partition(partition.ESPName)
	if err != nil {
		return 0, 0, err
	}
	files, err := fat32.Open(dev, p.SizeBytes)
	if err != nil {
		return 0, 0, fmt.Errorf("ESP: %w", err)
	}
	entries, err := disk.Entries()
	if err != nil {
		return 0, 0, err
	}
	for _, e := range entries {
		if f, err := files.Open(strings.TrimPrefix(e.UKI, "/")); err == nil {
			largest = max(largest, f.Size())
		}
	}
	return files.FreeBytes(), largest, nil
}

// hypervisor names what this machine runs on, as far as it shows itself.
func (x examiner) hypervisor() string {
	product := strings.TrimSpace(x.text(x.path("/sys/class/dmi/id/sys_vendor")) + " " + x.text(x.path("/sys/class/dmi/id/product_name")))
	if name := x.text(x.path("/sys/hypervisor/type")); name != "" && name != "none" {
		return name
	}
	cpus, err := os.ReadFile(x.path("/proc/cpuinfo"))
	if err == nil {
		for line := range strings.Lines(string(cpus)) {
			if name, flags, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "flags" && slices.Contains(strings.Fields(flags), "hypervisor") {
				return orText(product, "the processor says so")
			}
		}
	}
	if exists(x.path("/sys/firmware/devicetree/base/hypervisor")) {
		return orText(product, "the device tree says so")
	}
	for _, known := range []string{"QEMU", "KVM", "VMware", "VirtualBox", "Virtual Machine", "Amazon EC2", "Google Compute"} {
		if strings.Contains(product, known) {
			return product
		}
	}
	return ""
}

func orText(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
