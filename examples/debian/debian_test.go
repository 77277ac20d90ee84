package debian_test

import (
	"bufio"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
)

const (
	bootTime  = 4 * time.Minute
	redisPort = 6379
)

// redis sends one inline command and returns the first line of the answer.
func redis(m *hwtest.Machine, command string) (string, error) {
	conn, err := net.DialTimeout("tcp", m.Address(redisPort), 10*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(conn, "%s\r\n", command); err != nil {
		return "", err
	}
	in := bufio.NewReader(conn)
	line, err := in.ReadString('\n')
	if strings.HasPrefix(line, "$") && err == nil { // a bulk string follows its length
		line, err = in.ReadString('\n')
	}
	return strings.TrimSpace(line), err
}

func TestHandOff(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	if msg, err := exec.Command("../../build/bin/holdfast", "build", "appliance.yaml", "-o", out).CombinedOutput(); err != nil {
		t.Fatalf("holdfast build (run make inputs first): %v\n%s", err, msg)
	}
	k, err := keys.Load("../../build/keys")
	if err != nil {
		t.Fatal(err)
	}
	firmware := &hwtest.SecureBootKeys{}
	for name, into := range map[string]*[]byte{keys.PK: &firmware.PK, keys.KEK: &firmware.KEK, keys.DB: &firmware.DB} {
		if *into, err = k.SignatureList(name); err != nil {
			t.Fatal(err)
		}
	}
	m := hwtest.Boot(t, filepath.Join(out, build.RawName), hwtest.Options{SecureBoot: firmware, Forward: []int{redisPort}})
	m.Expect(`handing over init=/sbin/init`, bootTime)
	m.Expect(`"name":"debian-box".*"method":"provisioned"`, bootTime)
	if got, err := redis(m, "SET customer:42 paid"); err != nil || got != "+OK" {
		t.Fatalf("SET: %q, %v", got, err)
	}
	m.PowerButton(bootTime) // logind sees it
	m.PowerOn()
	m.Expect(`volume open name=data method=tpm`, bootTime)
	m.Expect(`"name":"debian-box".*"method":"tpm"`, bootTime)
	if got, err := redis(m, "GET customer:42"); err != nil || got != "paid" {
		t.Errorf("GET after the power-off: %q, %v", got, err)
	}
	m.PowerCut()
	m.PowerOn()
	m.Expect(`"name":"debian-box".*"method":"tpm"`, bootTime)
	if got, err := redis(m, "GET customer:42"); err != nil || got != "paid" {
		t.Errorf("GET after the power cut: %q, %v", got, err)
	}
	for _, attempt := range []string{"\n", "root\n", "\x03", "\n\n"} {
		m.Send(attempt)
	}
	time.Sleep(3 * time.Second)
	for _, bad := range []string{"login:", "Password:", "# ", "sh-5", "emergency mode", "EXT4-fs error"} {
		if strings.Contains(m.Console(), bad) {
			t.Errorf("the console says %q", bad)
		}
	}
}
