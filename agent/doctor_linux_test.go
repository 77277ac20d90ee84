package agent

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// TestEventLogWithoutSize: the kernel's file says that it has 0 bytes, hands out its
// content in pieces, and a second reading need not be like the first (F23). A pipe does
// the same, and has its content only once.
func TestEventLogWithoutSize(t *testing.T) {
	want := sealtest.Firmware{SecureBoot: true, Variables: map[string][]byte{"dbx": make([]byte, 100<<10)}}.Log() // more than a pipe holds
	root := t.TempDir()
	path := filepath.Join(root, eventLogPath)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), unix.Mkfifo(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	write := func(b []byte) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
		}
		for len(b) > 0 && err == nil {
			n := min(len(b), 1000)
			_, err = f.Write(b[:n])
			b = b[n:]
		}
		f.Close() // what was not read is missed below
	}
	if info, err := os.Stat(path); err != nil || info.Size() != 0 {
		t.Fatal(info.Size(), err)
	}
	go write(want)
	f := examiner{root: root, vars: noVariables{}, now: func() time.Time { return today }, openTPM: func() (seal.TPM, error) { return nil, fs.ErrNotExist }}.gather("")
	if len(want) < 100<<10 || f.LogError != nil || !bytes.Equal(f.Log.Marshal(), want) {
		t.Errorf("%d records, %v", len(f.Log.Events), f.LogError)
	}
	go write(make([]byte, attest.MaxLogBytes+1))
	if b, err := readEventLog(path); err == nil {
		t.Errorf("%d bytes without end are a log", len(b))
	}
}

// noVariables is a firmware whose store cannot be read (F67).
type noVariables struct{}

func (noVariables) Read(EFIVar) (uint32, []byte, error) { return 0, nil, unix.EIO }
func (noVariables) Write(EFIVar, uint32, []byte) error  { return unix.EIO }
func (noVariables) Append(EFIVar, uint32, []byte) error { return unix.EIO }
func (noVariables) List() ([]EFIVar, error)             { return nil, unix.EIO }
func (noVariables) FreeBytes() (int64, error)           { return -1, unix.EIO }

// TestGather asks a software TPM and a made-up machine, before anything is installed.
// Nothing is left in the TPM.
func TestGather(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"sys/firmware/efi/fw_platform_size": "64\n", "sys/class/rtc/rtc0/name": "rtc_cmos\n",
		"sys/class/dmi/id/sys_vendor": "QEMU\n", "sys/class/dmi/id/product_name": "Standard PC\n",
		"sys/class/watchdog/watchdog0/identity": "i6300ESB timer\n", "sys/kernel/iommu_groups/0/type": "DMA\n",
		"proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu hypervisor sse\n",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	tpm := sealtest.Start(t)
	for i := range 8 {
		tpm.Extend(i, "firmware")
	}
	x := examiner{root: root, vars: noVariables{}, now: func() time.Time { return today }, openTPM: func() (seal.TPM, error) { return keepOpen{tpm}, nil }}
	f := x.gather("")
	if !f.EFI || !f.RTC || f.IOMMUGroups != 1 || f.VM != "QEMU Standard PC" || len(f.Watchdogs) != 1 || f.Disk != "" {
		t.Errorf("facts %+v", f)
	}
	if f.TPMError != nil || f.SelfTestError != nil || f.OwnerError != nil || f.SpaceError != nil || f.Fitness.Family != "2.0" {
		t.Errorf("TPM: %v, %v, %v, %v", f.TPMError, f.SelfTestError, f.OwnerError, f.SpaceError)
	}
	if !errors.Is(f.LogError, fs.ErrNotExist) || !errors.Is(f.SecureBootError, ErrVariables) || f.VariableError == nil {
		t.Errorf("log %v, Secure Boot %v, variables %v", f.LogError, f.SecureBootError, f.VariableError)
	}
	if d := Examine(f); d.Policy != seal.PolicyStandard {
		t.Errorf("policy %q", d.Policy)
	}
	if s, err := seal.ReadSpace(tpm); err != nil || s.StorageKey || s.Counter || tpm.Handles() != 0 {
		t.Errorf("left behind: %+v, %v, %d handles", s, err, tpm.Handles())
	}

	x = examiner{root: t.TempDir(), vars: noVariables{}, now: time.Now, openTPM: func() (seal.TPM, error) { return nil, seal.ErrNoTPM }}
	f = x.gather(seal.PolicyStrict)
	if d := Examine(f); d.Fit || f.VM != "" || f.EFI {
		t.Errorf("an empty machine: %+v", d)
	}
	if err := os.MkdirAll(filepath.Join(x.root, "sys/firmware"), 0o755); err != nil { // as a container masks it
		t.Fatal(err)
	}
	if f := x.gather(seal.PolicyStrict); !f.Masked || f.EFI || strings.Contains(f.SecureBootError.Error(), "not started") {
		t.Errorf("where the firmware is masked: %+v", f)
	}
}

// keepOpen hides that a TPM can be closed.
type keepOpen struct{ seal.TPM }
