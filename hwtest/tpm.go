package hwtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// manufactureTPM makes a factory-fresh swtpm state in dir.
func manufactureTPM(dir string, kind TPMKind) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if kind == TPM20 {
		return nil // swtpm makes its own state at the first start, all banks active
	}
	out, err := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", dir, "--pcr-banks", "sha1", "--overwrite").CombinedOutput()
	if err != nil {
		return fmt.Errorf("make TPM without SHA-256 bank (Debian package swtpm-tools): %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// startTPM runs swtpm on dir with its control socket at path.
func startTPM(dir, path string) (*exec.Cmd, error) {
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--ctrl", "type=unixio,path="+path,
		"--log", "level=1,file="+filepath.Join(filepath.Dir(dir), "tpm.log"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := start(cmd); err != nil {
		return nil, fmt.Errorf("start swtpm (Debian package swtpm): %w", err)
	}
	for range 1500 {
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return cmd, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	cmd.Process.Kill()
	return nil, errors.Join(errors.New("swtpm did not open its control socket in 30 s"), cmd.Wait())
}

// ClearTPM does what a firmware's "clear TPM" does: the storage hierarchy gets a
// new seed, so nothing sealed before can be loaded again. The box must be off.
func (b *Box) ClearTPM() (err error) {
	dir, err := os.MkdirTemp("", "hf")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "tpm")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+b.tpmDir(),
		"--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	if err := start(cmd); err != nil {
		return fmt.Errorf("start swtpm (Debian package swtpm): %w", err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	for range 1500 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	tpm, err := linuxudstpm.Open(socket)
	if err != nil {
		return fmt.Errorf("open swtpm: %w", err)
	}
	defer func() { err = errors.Join(err, tpm.Close()) }()
	_, err = tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}}.Execute(tpm)
	return err
}
