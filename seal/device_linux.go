package seal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
)

// OpenDevice opens the machine's TPM: /dev/tpmrm0, where the kernel swaps
// sessions and cleans up after us, else /dev/tpm0. The errors are [ErrNoTPM],
// [ErrTPM12] and [ErrBusy] with their causes.
func OpenDevice() (transport.TPMCloser, error) {
	return openDevice("/", linuxtpm.Open)
}

func openDevice(root string, open func(string) (transport.TPMCloser, error)) (transport.TPMCloser, error) {
	// A 1.2 TPM must never be sent a 2.0 command: F43.
	version, err := os.ReadFile(filepath.Join(root, "sys/class/tpm/tpm0/tpm_version_major"))
	if err == nil && strings.TrimSpace(string(version)) == "1" {
		return nil, ErrTPM12
	}
	var last error
	for _, name := range []string{"dev/tpmrm0", "dev/tpm0"} {
		path := filepath.Join(root, name)
		t, err := open(path)
		if err == nil {
			return t, nil
		}
		if errors.Is(err, syscall.EBUSY) {
			return nil, fmt.Errorf("open %s: %w", path, ErrBusy)
		}
		last = err
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
	}
	return nil, fmt.Errorf("%w: %w; is the TPM enabled in the firmware setup and its driver loaded?", ErrNoTPM, last)
}
