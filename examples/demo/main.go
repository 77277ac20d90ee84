// Command demo shows an appliance from its spec through its updates to the recovery
// of its data: it builds examples/etcd, boots it in a box with a TPM and the vendor's
// Secure Boot keys, and says at each step what was proven. `make demo` runs it.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/keys"
)

// bootTime is for a boot under software emulation on a busy machine.
const bootTime = 5 * time.Minute

const etcdPort = 2379

func main() {
	holdfast := flag.String("holdfast", "build/bin/holdfast", "the builder")
	spec := flag.String("spec", "examples/etcd/appliance.yaml", "the appliance")
	keyDir := flag.String("keys", "build/keys", "the vendor's keys")
	dir := flag.String("dir", "build/demo", "folder for the results; emptied first")
	verbose := flag.Bool("v", false, "show the console")
	flag.Parse()
	d := &demo{holdfast: *holdfast, spec: *spec, keys: *keyDir, dir: *dir, verbose: *verbose}
	if err := d.run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

type demo struct {
	holdfast, spec, keys, dir string
	verbose                   bool
	box                       *hwtest.Box
	vm                        *hwtest.VM
	recovery                  string
	web                       string // address of the repository, as the box sees it
}

func (d *demo) run(ctx context.Context) error {
	steps := []struct {
		title, proves string
		do            func(context.Context) error
	}{
		{"Build the appliance", "one spec becomes a signed, verifiable disk, without root or containers", d.build},
		{"First boot", "the box checks its TPM, makes its encrypted volume, seals the key and shows a recovery key once", d.firstBoot},
		{"Write a record through the appliance's own service", "the service runs on the sealed volume", d.write},
		{"Pull the plug and boot again", "the TPM opens the disk for the signed release, and what was written is there", d.again},
		{"Publish version 2.0.0", "the box finds a signed release on a web server, installs it beside the old one and keeps it once it is healthy", d.updateOverHTTP},
		{"Publish version 3.0.0, which does not start", "a release that does not get well is left by itself, and the box says why", d.updateThatFails},
		{"Plug in a stick with version 4.0.0", "the same signatures, carried by hand to a box without a network", d.updateFromStick},
		{"Move the disk to another box", "without this box's TPM the disk stays shut, and the prompt is no shell", d.swapTPM},
		{"Type the recovery key", "recovery never needs the TPM, and the data is intact", d.recover},
	}
	defer func() {
		if d.vm != nil {
			d.vm.PowerCut()
		}
	}()
	began := time.Now()
	for i, s := range steps {
		fmt.Printf("\n== %d/%d  %s\n", i+1, len(steps), s.title)
		start := time.Now()
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.title, err)
		}
		fmt.Printf("   proven: %s (%.0f s)\n", s.proves, time.Since(start).Seconds())
	}
	fmt.Printf("\nAll of it in %.0f s. Look around with: %s inspect %s\n", time.Since(began).Seconds(), d.holdfast, d.out("1.0.0"))
	return nil
}

func (d *demo) build(ctx context.Context) error {
	if err := os.RemoveAll(d.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return err
	}
	if err := d.openRepository(ctx); err != nil {
		return err
	}
	if err := d.buildVersion(ctx, "1.0.0", nil); err != nil {
		return err
	}
	out := d.out("1.0.0")
	firmware, err := factoryKeys(d.keys)
	if err != nil {
		return err
	}
	o := hwtest.Options{SecureBoot: firmware, Forward: []int{etcdPort}}
	if d.verbose {
		o.Log = os.Stdout
	}
	d.box, err = hwtest.NewBox(filepath.Join(d.dir, "box"), filepath.Join(out, build.RawName), o)
	return err
}

// factoryKeys are the vendor's keys as signature lists for the firmware.
func factoryKeys(dir string) (*hwtest.SecureBootKeys, error) {
	k, err := keys.Load(dir)
	if err != nil {
		return nil, err
	}
	pk, err1 := k.SignatureList(keys.PK)
	kek, err2 := k.SignatureList(keys.KEK)
	db, err3 := k.SignatureList(keys.DB)
	return &hwtest.SecureBootKeys{PK: pk, KEK: kek, DB: db}, errors.Join(err1, err2, err3)
}

// powerOn starts the box and waits for the console to say pattern.
func (d *demo) powerOn(ctx context.Context, pattern string) (match []string, err error) {
	fmt.Println("   power on")
	if d.vm, err = d.box.PowerOn(ctx); err != nil {
		return nil, err
	}
	return d.vm.Expect(pattern, bootTime)
}

func (d *demo) firstBoot(ctx context.Context) error {
	match, err := d.powerOn(ctx, `([cbdefghijklnrtuv]{8}(?:-[cbdefghijklnrtuv]{8}){7})`)
	if err != nil {
		return err
	}
	d.recovery = match[1]
	fmt.Printf("   the console shows the recovery key: %s\n", d.recovery)
	return d.expect(`holdfast [\d.]+: provisioned`, `holdfast [\d.]+: ready [^\r\n]*[\r\n]`)
}

// expect waits for the patterns in turn and shows what matched.
func (d *demo) expect(patterns ...string) error {
	for _, p := range patterns {
		match, err := d.vm.Expect(p, bootTime)
		if err != nil {
			return err
		}
		fmt.Printf("   console: %s\n", strings.TrimSpace(match[0]))
	}
	return nil
}

const (
	recordKey   = "customer/42"
	recordValue = "paid"
)

func (d *demo) write(ctx context.Context) error {
	var answer struct{ Header json.RawMessage }
	if err := d.etcd(ctx, "put", map[string]string{"key": b64(recordKey), "value": b64(recordValue)}, &answer); err != nil {
		return err
	}
	fmt.Printf("   etcd stored %s = %s\n", recordKey, recordValue)
	return nil
}

func (d *demo) read(ctx context.Context) error {
	var answer struct {
		Kvs []struct{ Value []byte }
	}
	if err := d.etcd(ctx, "range", map[string]string{"key": b64(recordKey)}, &answer); err != nil {
		return err
	}
	if len(answer.Kvs) != 1 || string(answer.Kvs[0].Value) != recordValue {
		return fmt.Errorf("record %s is gone: etcd answers %+v", recordKey, answer)
	}
	fmt.Printf("   etcd still has %s = %s\n", recordKey, answer.Kvs[0].Value)
	return nil
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// etcd calls the JSON gateway of etcd's v3 API.
func (d *demo) etcd(ctx context.Context, call string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+d.vm.Address(etcdPort)+"/v3/kv/"+call, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Timeout: time.Minute}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("etcd: %s: %s", resp.Status, text)
	}
	return json.Unmarshal(text, answer)
}

func (d *demo) again(ctx context.Context) error {
	d.vm.PowerCut()
	if _, err := d.powerOn(ctx, `volume open name=data method=tpm`); err != nil {
		return err
	}
	if err := d.expect(`holdfast [\d.]+: ready [^\r\n]*[\r\n]`); err != nil {
		return err
	}
	return d.read(ctx)
}

func (d *demo) swapTPM(ctx context.Context) error {
	d.vm.PowerCut()
	if err := d.box.ReplaceTPM(hwtest.TPM20); err != nil {
		return err
	}
	if _, err := d.powerOn(ctx, `The data volumes stay closed[^\r\n]*[\r\n]`); err != nil {
		return err
	}
	if err := d.expect(`reason: [^\r\n]*[\r\n]`, `recovery key \(or: reboot, poweroff\):`); err != nil {
		return err
	}
	if err := d.vm.Send("sh\n"); err != nil {
		return err
	}
	return d.expect(`not opened: [^\r\n]*[\r\n]`, `recovery key \(or: reboot, poweroff\):`)
}

func (d *demo) recover(ctx context.Context) error {
	if err := d.vm.Send(d.recovery + "\n"); err != nil {
		return err
	}
	if err := d.expect(`opened with the recovery key`, `holdfast [\d.]+: ready [^\r\n]*[\r\n]`); err != nil {
		return err
	}
	return d.read(ctx)
}
