package seal

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2/transport"
)

type nopTPM struct{ transport.TPM }

func (nopTPM) Close() error { return nil }

func TestOpenDevice(t *testing.T) {
	tests := []struct {
		name    string
		version string
		answers map[string]error
		want    error
		opened  string
	}{
		{"resource manager", "2\n", map[string]error{"tpmrm0": nil, "tpm0": nil}, nil, "tpmrm0"},
		{"old kernel", "2\n", map[string]error{"tpmrm0": fs.ErrNotExist, "tpm0": nil}, nil, "tpm0"},
		{"no TPM", "", map[string]error{"tpmrm0": fs.ErrNotExist, "tpm0": fs.ErrNotExist}, ErrNoTPM, ""},
		{"TPM 1.2", "1\n", map[string]error{"tpmrm0": fs.ErrNotExist, "tpm0": nil}, ErrTPM12, ""},
		{"busy", "2\n", map[string]error{"tpmrm0": fs.ErrNotExist, "tpm0": &fs.PathError{Op: "open", Err: syscall.EBUSY}}, ErrBusy, ""},
		{"no permission", "2\n", map[string]error{"tpmrm0": fs.ErrPermission}, fs.ErrPermission, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			if tt.version != "" {
				dir := filepath.Join(root, "sys/class/tpm/tpm0")
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, "tpm_version_major"), []byte(tt.version), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			opened := ""
			_, err := openDevice(root, func(path string) (transport.TPMCloser, error) {
				opened = filepath.Base(path)
				return nopTPM{}, tt.answers[opened]
			})
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if tt.want == nil && opened != tt.opened {
				t.Errorf("opened %s, want %s", opened, tt.opened)
			}
		})
	}
}
