package hwtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// probeTime is how long OVMF may take under KVM to reach the boot manager; on a
// working KVM it takes about two seconds.
const probeTime = 15 * time.Second

var accelerator = sync.OnceValues(func() (string, error) { return probeAccelerator(context.Background()) })

// Accelerator says how guests run here: "kvm", if one really does, else "tcg".
// That /dev/kvm can be opened proves nothing (nested virtualisation may kill or
// hang the guest), so the firmware is started once under KVM and must reach its
// boot manager. The answer is kept in the user's cache folder until the machine
// is booted again.
func Accelerator(context.Context) (string, error) { return accelerator() }

func probeAccelerator(ctx context.Context) (string, error) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg", nil
	}
	f.Close()
	remembered := probeCache()
	if remembered != "" {
		if b, err := os.ReadFile(remembered); err == nil && (string(b) == "kvm" || string(b) == "tcg") {
			return string(b), nil
		}
	}
	answer := "tcg"
	works, err := kvmReachesBootManager(ctx)
	if err != nil {
		return "", err
	}
	if works {
		answer = "kvm"
	}
	if remembered != "" && os.MkdirAll(filepath.Dir(remembered), 0o755) == nil {
		os.WriteFile(remembered, []byte(answer), 0o644) // only a hint: a lost write costs one more probe
	}
	return answer, nil
}

// probeCache names the file for this boot of this machine, or "".
func probeCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "holdfast", "accelerator-"+strings.TrimSpace(string(boot)))
}

func kvmReachesBootManager(ctx context.Context) (bool, error) {
	fw, err := findFirmware(true)
	if err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp("", "hf")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	vars := filepath.Join(dir, "vars")
	if err := copySparse(vars, fw.vars); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	args := append(acceleratorArguments("kvm"), fw.arguments(vars, false)...)
	args = append(args, "-nodefaults", "-display", "none", "-m", "256", "-smp", "2", "-serial", "stdio")
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := start(cmd); err != nil {
		return false, fmt.Errorf("start QEMU (Debian package qemu-system-x86): %w", err)
	}
	var seen bytes.Buffer
	buf := make([]byte, 1024)
	for {
		n, err := out.Read(buf)
		seen.Write(buf[:n])
		if found := bytes.Contains(seen.Bytes(), []byte("BdsDxe")); found || err != nil || seen.Len() > 1<<20 {
			cancel()
			cmd.Wait()
			return found, nil
		}
	}
}

func acceleratorArguments(accel string) []string {
	if accel == "kvm" {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", "tcg,thread=multi", "-cpu", "max"}
}

// start starts a child that is killed when this process dies. Pdeathsig follows
// the thread that forked, so the calling goroutine's thread must not end early;
// Go ends threads only for goroutines that exit while locked, which none here do.
func start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return cmd.Start()
}

// firmware is a pair of OVMF files.
type firmware struct{ code, vars string }

// findFirmware looks where Debian's package ovmf puts them.
func findFirmware(secureBoot bool) (firmware, error) {
	fw := firmware{code: "/usr/share/OVMF/OVMF_CODE_4M.fd", vars: "/usr/share/OVMF/OVMF_VARS_4M.fd"}
	if secureBoot {
		fw.code = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
	}
	for _, p := range []string{fw.code, fw.vars} {
		if _, err := os.Stat(p); err != nil {
			return firmware{}, fmt.Errorf("UEFI firmware for QEMU (install Debian package ovmf): %w", err)
		}
	}
	return fw, nil
}

// arguments plug the firmware in. The variables are writable only from system
// management mode when the code is the Secure Boot build.
func (fw firmware) arguments(vars string, readOnly bool) []string {
	writable := map[bool]string{true: "readonly=on,", false: ""}[readOnly]
	return []string{
		"-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on",
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=" + fw.code,
		"-drive", "if=pflash,format=raw,unit=1," + writable + "file=" + strings.ReplaceAll(vars, ",", ",,"),
	}
}

// copySparse copies a file, leaving out its holes.
func copySparse(dst, src string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	const seekData, seekHole = 3, 4 // lseek(2)
	for at := int64(0); at < info.Size(); {
		data, err := in.Seek(at, seekData)
		if errors.Is(err, syscall.ENXIO) {
			break // only a hole is left
		}
		if err != nil {
			return err
		}
		hole, err := in.Seek(data, seekHole)
		if err != nil {
			return err
		}
		if _, err := out.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.Copy(out, io.NewSectionReader(in, data, hole-data)); err != nil {
			return err
		}
		at = hole
	}
	return out.Truncate(info.Size())
}
