// Command measured is the first process of the system that [TestPrediction]
// boots. It prints on the console what the box has measured, lets the firmware
// append to its Secure Boot variables what lies in /append, and switches off.
//
//	PCR  NUMBER HEX     each register of the SHA-256 bank
//	FILE NAME BASE64    a file, in pieces; first the event log, named log
//	END                 nothing more follows
package main

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	efivars = "/sys/firmware/efi/efivars"
	// Non-volatile, boot and runtime access, time-based authenticated write and
	// append: UEFI 2.10 §8.2.
	appendAttributes = 0x01 | 0x02 | 0x04 | 0x20 | 0x40
	pieceBytes       = 57
)

var files = map[string]string{
	"PK":  "PK-8be4df61-93ca-11d2-aa0d-00e098032b8c",
	"KEK": "KEK-8be4df61-93ca-11d2-aa0d-00e098032b8c",
	"db":  "db-d719b2cb-3d3a-4596-a3bc-dad00e67656f",
	"dbx": "dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f",
}

func main() {
	if err := report(); err != nil {
		log.Print(err)
	}
	fmt.Println("END")
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func report() error {
	for _, m := range []struct{ kind, at string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"securityfs", "/sys/kernel/security"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	// A message of the kernel's in the middle of a line would be taken for its end.
	if err := os.WriteFile("/proc/sys/kernel/printk", []byte("1"), 0); err != nil {
		return err
	}
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	os.Stdout = console
	log.SetOutput(console)
	for i := range 24 {
		value, err := os.ReadFile(fmt.Sprintf("/sys/class/tpm/tpm0/pcr-sha256/%d", i))
		if err != nil {
			return err
		}
		fmt.Printf("PCR %d %s\n", i, strings.ToLower(strings.TrimSpace(string(value))))
	}
	if err := show("log", "/sys/kernel/security/tpm0/binary_bios_measurements", 0); err != nil {
		return err
	}
	return variables()
}

// show prints a file without its first skip bytes.
func show(name, path string, skip int) error {
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		b, err = make([]byte, skip), nil
	}
	if err != nil {
		return err
	}
	for b = b[skip:]; ; b = b[pieceBytes:] {
		piece := b[:min(len(b), pieceBytes)]
		fmt.Println("FILE", name, base64.StdEncoding.EncodeToString(piece))
		if len(piece) < pieceBytes {
			return nil
		}
	}
}

func variables() error {
	module, err := os.Open("/efivarfs.ko")
	if err != nil {
		return err
	}
	defer module.Close()
	if err := unix.FinitModule(int(module.Fd()), "", 0); err != nil {
		return fmt.Errorf("load efivarfs: %w", err)
	}
	if err := unix.Mount("efivarfs", efivars, "efivarfs", 0, ""); err != nil {
		return err
	}
	for name, file := range files {
		path := filepath.Join(efivars, file)
		if err := show("before/"+name, path, 4); err != nil {
			return err
		}
		payload, err := os.ReadFile("/append/" + name)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return err
		}
		if err := write(path, append(binary.LittleEndian.AppendUint32(nil, appendAttributes), payload...)); err != nil {
			return err
		}
		if err := show("after/"+name, path, 4); err != nil {
			return err
		}
	}
	return nil
}

// write makes the file writable, which the kernel keeps it from being, and writes
// it in one call, as efivarfs wants.
func write(path string, content []byte) error {
	if f, err := os.Open(path); err == nil {
		err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("make %s writable: %w", path, err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		return fmt.Errorf("append to %s: %w", path, err)
	}
	return nil
}
