package hwtest

import (
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// command sends one QEMU Machine Protocol command and waits for its answer;
// events in between are passed over. One connection a command: this protocol
// is used a few times in a machine's life.
func (vm *VM) command(name string) (err error) {
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
	for _, c := range []string{"qmp_capabilities", name} {
		if err := out.Encode(map[string]string{"execute": c}); err != nil {
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
