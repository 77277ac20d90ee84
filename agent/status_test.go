package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

var fullStatus = Status{
	Name: "edge", Version: "2026.11", Architecture: "amd64", Slot: "b", RootHash: strings.Repeat("0123456789abcdef", 4),
	Policy: "standard", Rules: []string{"PCR 11 as signed", "PCR 7 unchanged"},
	Degraded: []string{"Secure Boot is off"}, Problems: []string{"the partition table was read from its backup"},
	Volumes: []VolumeStatus{
		{Name: "data", Mount: "/data", Device: "/dev/dm-1", UUID: "1b4e28ba-2fa1-41d2-883f-0016d3cca427", Method: "tpm"},
		{Name: "media", Mount: "/srv/media", Device: "/dev/dm-2", UUID: "1b4e28ba-2fa1-41d2-883f-0016d3cca428", Method: "tpm"},
	},
	Services: []ServiceStatus{
		{Name: "migrate", Kind: "onboot", State: Exited},
		{Name: "web", Kind: "service", State: Unhealthy, PID: 321, Restarts: 2, Reason: "GET http://localhost: 503"},
	},
	Boot: BootTimes{InitrdMilliseconds: 812, TPMMilliseconds: 95, TPMCommands: 16, KernelMilliseconds: 1500},
}

const fullText = `edge 2026.11 on amd64
slot      b (root hash 0123456789abcdef…)
policy    standard
            PCR 11 as signed
            PCR 7 unchanged
DEGRADED  Secure Boot is off
PROBLEM   the partition table was read from its backup
boot      initrd 812 ms, of it TPM 95 ms in 16 commands
volume   data     /data       opened by tpm  1b4e28ba-2fa1-41d2-883f-0016d3cca427
volume   media    /srv/media  opened by tpm  1b4e28ba-2fa1-41d2-883f-0016d3cca428
onboot   migrate  exited      0 restarts
service  web      unhealthy   2 restarts  GET http://localhost: 503
`

func TestStatusForAPerson(t *testing.T) {
	for name, tt := range map[string]struct {
		s    Status
		want string
	}{
		"full": {fullStatus, fullText},
		"bare": {Status{Name: "edge", Version: "1", Architecture: "arm64"}, `edge 1 on arm64
slot      none (root hash none)
policy    none
boot      initrd 0 ms, of it TPM 0 ms in 0 commands
`},
	} {
		var b bytes.Buffer
		n, err := tt.s.WriteTo(&b)
		if err != nil || n != int64(b.Len()) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
		if b.String() != tt.want {
			t.Errorf("%s: got:\n%s\nwant:\n%s", name, b.String(), tt.want)
		}
	}
	if _, err := fullStatus.WriteTo(full{}); !errors.Is(err, errFull) {
		t.Errorf("error %v", err)
	}
}

var errFull = errors.New("no space left")

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errFull }

// TestStatusFieldsStay holds the promise that JSON fields are added and never renamed.
func TestStatusFieldsStay(t *testing.T) {
	b, err := json.Marshal(fullStatus)
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{
		"name", "version", "architecture", "slot", "root_hash", "policy", "rules", "degraded", "problems", "volumes", "services", "boot",
		"mount", "device", "uuid", "method", "kind", "state", "pid", "restarts", "reason", "initrd_ms", "tpm_ms", "tpm_commands", "kernel_ms",
	} {
		if !bytes.Contains(b, []byte(`"`+field+`":`)) {
			t.Errorf("no field %s in %s", field, b)
		}
	}
	var back Status
	if err := json.Unmarshal(b, &back); err != nil || !reflect.DeepEqual(back, fullStatus) {
		t.Errorf("%v, %+v", err, back)
	}
}
