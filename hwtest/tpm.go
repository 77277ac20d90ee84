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
	for range 250 {
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return cmd, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	cmd.Process.Kill()
	return nil, errors.Join(errors.New("swtpm did not open its control socket in 5 s"), cmd.Wait())
}
