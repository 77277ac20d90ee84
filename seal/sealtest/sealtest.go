// Package sealtest gives tests a TPM: swtpm as a process of its own, with power
// cuts. Call [Start]; the TPM implements go-tpm's transport.TPM.
//
// It tests protocols and policies. It is no model of a chip's timing, and its
// state lies in a folder in clear.
package sealtest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// Options of a TPM; the zero value is a TPM with all banks and no history.
type Options struct {
	// Banks is a list as swtpm_setup takes it ("sha1", "sha256,sha384").
	Banks string
	// Dir holds sockets and state; empty means a new temporary folder. The
	// path must be short: a socket's has at most 107 bytes.
	Dir string
}

// TPM is a simulated TPM that has been started (TPM2_Startup CLEAR).
type TPM struct {
	// Socket is swtpm's data channel; its control channel is Socket + ".ctrl",
	// where tpm2-tss looks for it ("swtpm:path=" + Socket).
	Socket string

	tb    testing.TB
	dir   string
	swaps int
	mu    sync.Mutex
	conn  transport.TPMCloser
	cmd   *exec.Cmd
}

// Start runs a TPM until the test ends.
func Start(tb testing.TB) *TPM { return StartWith(tb, Options{}) }

// StartWith is Start with options.
func StartWith(tb testing.TB, o Options) *TPM {
	tb.Helper()
	dir := o.Dir
	if dir == "" {
		// Not tb.TempDir: its path can be too long for a socket.
		var err error
		if dir, err = os.MkdirTemp("", "swtpm"); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { os.RemoveAll(dir) })
	}
	t := &TPM{Socket: filepath.Join(dir, "sock"), tb: tb, dir: dir}
	if err := os.MkdirAll(t.stateDir(), 0o700); err != nil {
		tb.Fatal(err)
	}
	if o.Banks != "" {
		run(tb, "swtpm_setup", "--tpm2", "--tpmstate", t.stateDir(), "--pcr-banks", o.Banks, "--overwrite")
	}
	t.start()
	tb.Cleanup(t.kill)
	return t
}

func run(tb testing.TB, name string, args ...string) {
	tb.Helper()
	path := need(tb, name)
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		tb.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func need(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		tb.Fatalf("%s not installed: apt-get install swtpm swtpm-tools", name)
	}
	return path
}

func (t *TPM) stateDir() string { return filepath.Join(t.dir, fmt.Sprintf("state%d", t.swaps)) }

func (t *TPM) start() {
	t.tb.Helper()
	path := need(t.tb, "swtpm")
	os.Remove(t.Socket)
	os.Remove(t.Socket + ".ctrl")
	t.cmd = exec.Command(path, "socket", "--tpm2",
		"--server", "type=unixio,path="+t.Socket, "--ctrl", "type=unixio,path="+t.Socket+".ctrl",
		"--flags", "not-need-init,startup-clear", "--tpmstate", "dir="+t.stateDir())
	if err := t.cmd.Start(); err != nil {
		t.tb.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := net.Dial("unix", t.Socket)
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			t.tb.Fatalf("swtpm did not open %s within 20 s: %v", t.Socket, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	var err error
	if t.conn, err = linuxudstpm.Open(t.Socket); err != nil {
		t.tb.Fatal(err)
	}
}

// kill is the power going out.
func (t *TPM) kill() {
	if t.cmd == nil {
		return
	}
	t.cmd.Process.Kill()
	t.cmd.Wait() // reports the kill, nothing else
	t.cmd = nil
}

// Send implements transport.TPM. It may be called from several goroutines.
func (t *TPM) Send(command []byte) ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn == nil {
		return nil, errors.New("the TPM is off")
	}
	return t.conn.Send(command)
}

// Reset cuts the power and starts the TPM again, without TPM2_Shutdown.
// Registers, sessions and transient objects are gone.
func (t *TPM) Reset() {
	t.tb.Helper()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kill()
	t.start()
}

// Reboot is TPM2_Shutdown, as a kernel sends it, and then [TPM.Reset].
func (t *TPM) Reboot() {
	t.tb.Helper()
	if _, err := (tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}).Execute(t); err != nil {
		t.tb.Fatalf("shut the TPM down: %v", err)
	}
	t.Reset()
}

// Swap puts another TPM into the machine, with another seed and no history.
func (t *TPM) Swap() {
	t.tb.Helper()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kill()
	t.swaps++
	if err := os.MkdirAll(t.stateDir(), 0o700); err != nil {
		t.tb.Fatal(err)
	}
	t.start()
}

// Clear is TPM2_Clear by the platform, as the firmware's setup does it: a new
// seed, every key gone.
func (t *TPM) Clear() {
	t.tb.Helper()
	_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}}.Execute(t)
	if err != nil {
		t.tb.Fatalf("clear the TPM: %v", err)
	}
}

// Forgive sets the count of failed authorizations back: TPM2_DictionaryAttackLockReset
// (Part 3 §25.2) with the lockout hierarchy's empty password.
func (t *TPM) Forgive() {
	t.tb.Helper()
	rsp, err := t.Send([]byte{
		0x80, 0x02, 0, 0, 0, 27, 0, 0, 0x01, 0x39, 0x40, 0, 0, 0x0a, // one session, length, code, TPM_RH_LOCKOUT
		0, 0, 0, 9, 0x40, 0, 0, 0x09, 0, 0, 0, 0, 0, // TPM_RS_PW, no nonce, no attributes, no password
	})
	if err != nil || len(rsp) < 10 || !bytes.Equal(rsp[6:10], make([]byte, 4)) {
		t.tb.Fatalf("reset the TPM's lockout: %x, %v", rsp, err)
	}
}

// Extend measures data into a register's SHA-256 bank, for tests that need a
// firmware.
func (t *TPM) Extend(index int, data string) {
	t.tb.Helper()
	_, err := tpm2.PCREvent{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: tpm2.PasswordAuth(nil)},
		EventData: tpm2.TPM2BEvent{Buffer: []byte(data)},
	}.Execute(t)
	if err != nil {
		t.tb.Fatalf("extend PCR %d: %v", index, err)
	}
}

// Handles counts what is in the TPM's memory: transient objects and loaded
// sessions. Code that cleans up after itself leaves it at 0.
func (t *TPM) Handles() int {
	t.tb.Helper()
	n := 0
	for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} { // transient; loaded; saved sessions
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(t)
		if err != nil {
			t.tb.Fatalf("list handles from 0x%x: %v", first, err)
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			t.tb.Fatal(err)
		}
		n += len(list.Handle)
	}
	return n
}
