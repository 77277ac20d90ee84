// Command guest is the first process of the system in which the bench opens a volume
// by the TPM, with the agent and with systemd-cryptsetup. /dev/vda is the volume, not
// made yet; /signatures.json and /policy.pem are the vendor's, /rounds how often.
//
//	OURS   MAPPED PROCESS COMMANDS    microseconds from the first TPM command to the
//	                                  mapped device, and of the whole process
//	THEIRS PROCESS COMMANDS
package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/agent/dm"
	"github.com/holdfast-os/holdfast/hwtest/guest"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

const (
	disk       = "/dev/vda"
	mapping    = "bench"
	openVerb   = "open"
	cryptsetup = "/usr/lib/systemd/systemd-cryptsetup"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == openVerb {
		if err := ours(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	err := guest.Start()
	if err == nil {
		err = run()
	}
	guest.End(err)
}

func run() error {
	text, err := os.ReadFile("/rounds")
	if err != nil {
		return err
	}
	rounds, err := strconv.Atoi(string(text))
	if err != nil {
		return err
	}
	if err := measureFirmware(); err != nil {
		return err
	}
	if err := countCommands(); err != nil {
		return err
	}
	m, mapped, err := newMachine()
	if err != nil {
		return err
	}
	if err := m.EnterPhase("enter-initrd"); err != nil {
		return err
	}
	if err := m.open(); err != nil {
		return fmt.Errorf("make the volume: %w", err)
	}
	if mapped.IsZero() {
		return errors.New("the volume was not mapped")
	}
	if err := dm.Remove(mapping); err != nil {
		return err
	}
	for range rounds {
		if err := round(); err != nil {
			return err
		}
	}
	return nil
}

// measureFirmware plays a firmware with Secure Boot on, and the stub; the sections are
// those whose PCR 11 the bench has signed.
func measureFirmware() error {
	tpm, err := seal.OpenDevice()
	if err != nil {
		return err
	}
	defer tpm.Close()
	for i := range 8 {
		if err := seal.ExtendPCR(tpm, i, []byte("firmware")); err != nil {
			return err
		}
	}
	for _, text := range []string{".linux\x00", "kernel", ".initrd\x00", "initrd"} {
		if err := seal.ExtendPCR(tpm, 11, []byte(text)); err != nil {
			return err
		}
	}
	return nil
}

const tracing = "/sys/kernel/tracing/"

// countCommands has the kernel count the commands that programs write to the TPM.
func countCommands() error {
	if err := os.WriteFile(tracing+"kprobe_events", []byte("p:bench/tpm tpm_common_write\n"), 0); err != nil {
		return err
	}
	return os.WriteFile(tracing+"events/bench/tpm/enable", []byte("1"), 0)
}

func commands() (int, error) {
	b, err := os.ReadFile(tracing + "kprobe_profile")
	if err != nil {
		return 0, err
	}
	words := strings.Fields(string(b))
	if len(words) != 3 {
		return 0, fmt.Errorf("%skprobe_profile: %q", tracing, b)
	}
	return strconv.Atoi(words[1])
}

// round opens the volume once with each, in processes of their own.
func round() error {
	before, err := commands()
	if err != nil {
		return err
	}
	began := time.Now()
	out, err := exec.Command("/init", openVerb).CombinedOutput()
	took := time.Since(began)
	if err != nil {
		return fmt.Errorf("open the volume: %w: %s", err, out)
	}
	between, err := commands()
	if err != nil {
		return err
	}
	fmt.Println("OURS", strings.TrimSpace(string(out)), took.Microseconds(), between-before)
	if err := dm.Remove(mapping); err != nil {
		return err
	}
	began = time.Now()
	if _, err := guest.Run(cryptsetup, "attach", mapping, disk, "-", "tpm2-device=auto,tpm2-signature=/signatures.json,headless=true"); err != nil {
		return err
	}
	took = time.Since(began)
	after, err := commands()
	if err != nil {
		return err
	}
	fmt.Println("THEIRS", took.Microseconds(), after-between)
	return dm.Remove(mapping)
}

// ours prints the time from the first TPM command until the device is there.
func ours() error {
	m, mapped, err := newMachine()
	if err != nil {
		return err
	}
	if err := m.open(); err != nil {
		return err
	}
	fmt.Println(mapped.Sub(*m.first).Microseconds())
	return nil
}

// machine is the agent's, with one volume.
type machine struct {
	agent.Machine
	boot  image.Boot
	parts []agent.Partition
	first *time.Time // when the first TPM command was sent
}

func (m *machine) open() error {
	var s agent.Status
	return m.OpenVolumes(m.boot, m.parts, &s)
}

func newMachine() (m *machine, mapped *time.Time, err error) {
	dev, err := partition.OpenShared(disk)
	if err != nil {
		return nil, nil, err
	}
	key, err := os.ReadFile("/policy.pem")
	if err != nil {
		return nil, nil, err
	}
	v := image.Volume{Name: "data", Mount: "/data"}
	mapped, first := new(time.Time), new(time.Time)
	m = &machine{first: first, parts: []agent.Partition{{Volume: v, Number: 1, Device: dev}}}
	m.boot = image.Boot{Appliance: image.Appliance{Name: "bench", Version: "1", Volumes: []image.Volume{v},
		Seal: image.SealPolicy{Policy: seal.PolicyStandard, PolicyKeyPEM: string(key)}}}
	m.Machine = agent.Machine{
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Console: silent{}, Root: "/run/root", Slot: "a", Storage: storage{mapped},
		OpenTPM: func() (seal.TPM, error) {
			t, err := seal.OpenDevice()
			return clocked{t, first}, err
		},
		Signatures: func() ([]byte, error) { return os.ReadFile("/signatures.json") },
		SecureBoot: func() (bool, error) { return true, nil },
		EventLog:   func() ([]byte, error) { return nil, os.ErrNotExist },
	}
	return m, mapped, nil
}

// clocked notes when the first command is sent.
type clocked struct {
	seal.TPM
	first *time.Time
}

func (c clocked) Send(command []byte) ([]byte, error) {
	if c.first.IsZero() {
		*c.first = time.Now()
	}
	return c.TPM.Send(command)
}

// storage maps, and leaves file systems to others: systemd-cryptsetup mounts none.
type storage struct{ mapped *time.Time }

func (s storage) Map(_ agent.Partition, h *luks2.Header, key []byte) (string, error) {
	offset, size, sector, cipher := h.Segment()
	device, err := dm.Crypt(mapping, disk, cipher, key, offset, size, sector)
	*s.mapped = time.Now()
	return device, err
}

func (storage) Authenticate(agent.Partition, *luks2.Header, []byte, func(done, all int64)) error {
	return unix.ENOTSUP
}

func (storage) MakeFS(string, string) error { return nil }

func (storage) Mount(_, at string) error { return os.MkdirAll(at, 0o755) }

func (storage) Unmap(agent.Partition) error { return unix.ENOTSUP }

// silent is a console at which nobody types.
type silent struct{}

func (silent) Read([]byte) (int, error)    { return 0, io.EOF }
func (silent) Write(b []byte) (int, error) { return len(b), nil }
