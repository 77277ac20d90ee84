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

// QEMU's names of what is plugged in, and of what limits its speed.
const (
	stickName  = "stick"
	stickSpeed = "stickspeed"
)

// Plug plugs a disk image in, as one would a stick. One at a time.
func (vm *VM) Plug(image string, readOnly bool) error {
	return vm.plug(map[string]any{
		"driver": "raw", "node-name": stickName, "read-only": readOnly,
		"file": map[string]any{"driver": "file", "filename": image, "read-only": readOnly},
	})
}

// PlugSlow is Plug of a stick that reads and writes this many bytes a second, so that there is
// time to pull it out in the middle of something.
func (vm *VM) PlugSlow(image string, bytesPerSecond int64) error {
	vm.command("object-del", map[string]any{"id": stickSpeed}) // of the one before, if any
	err := vm.command("object-add", map[string]any{"qom-type": "throttle-group", "id": stickSpeed, "limits": map[string]any{"bps-read": bytesPerSecond, "bps-write": bytesPerSecond}})
	if err != nil {
		return err
	}
	return vm.plug(map[string]any{
		"driver": "throttle", "node-name": stickName, "throttle-group": stickSpeed,
		"file": map[string]any{"driver": "raw", "file": map[string]any{"driver": "file", "filename": image}},
	})
}

func (vm *VM) plug(drive map[string]any) error {
	if err := vm.command("blockdev-add", drive); err != nil {
		return err
	}
	return vm.command("device_add", map[string]any{"driver": "virtio-blk-pci", "id": stickName, "drive": stickName, "bus": stickPort})
}

// unplugTime is how long the guest may take to let go of what is pulled out.
const unplugTime = 30 * time.Second

// Unplug pulls it out, whatever the guest is doing with it. The guest takes some
// seconds to notice, which Unplug waits for; then another can be plugged in.
func (vm *VM) Unplug() error {
	if err := vm.command("device_del", map[string]any{"id": stickName}); err != nil {
		return err
	}
	for deadline := time.Now().Add(unplugTime); ; time.Sleep(100 * time.Millisecond) {
		// It is in use for as long as the guest has it.
		err := vm.command("blockdev-del", map[string]any{"node-name": stickName})
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
