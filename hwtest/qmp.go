package hwtest

import (
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// request is one QEMU Machine Protocol command.
type request struct {
	Execute   string         `json:"execute"`
	Arguments map[string]any `json:"arguments,omitempty"`
}

// command sends one command and waits for its answer; events in between are passed
// over. One connection a command: this protocol is used a few times in a machine's life.
func (vm *VM) command(name string, arguments map[string]any) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("QMP %s: %w", name, err)
		}
	}()
	conn, err := net.Dial("unix", vm.qmp)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	var greeting struct{ QMP json.RawMessage }
	if err := in.Decode(&greeting); err != nil {
		return err
	}
	for _, c := range []request{{Execute: "qmp_capabilities"}, {name, arguments}} {
		if err := out.Encode(c); err != nil {
			return err
		}
		for {
			var answer struct {
				Return json.RawMessage
				Error  *struct{ Desc string }
			}
			if err := in.Decode(&answer); err != nil {
				return err
			}
			if answer.Error != nil {
				return fmt.Errorf("%s", answer.Error.Desc)
			}
			if answer.Return != nil {
				break
			}
		}
	}
	return nil
}

// stickName is QEMU's name of what is plugged in.
const stickName = "stick"

// Plug plugs a disk image in, as one would a stick. One at a time.
func (vm *VM) Plug(image string, readOnly bool) error {
	err := vm.command("blockdev-add", map[string]any{
		"driver": "raw", "node-name": stickName, "read-only": readOnly,
		"file": map[string]any{"driver": "file", "filename": image, "read-only": readOnly},
	})
	if err != nil {
		return err
	}
	return vm.command("device_add", map[string]any{"driver": "virtio-blk-pci", "id": stickName, "drive": stickName, "bus": stickPort})
}

// Unplug pulls it out, whatever the guest is doing with it. The guest takes some
// seconds to notice.
func (vm *VM) Unplug() error {
	return vm.command("device_del", map[string]any{"id": stickName})
}
