package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// hostInBox is this machine as the box sees it, by QEMU's user network.
const hostInBox = "10.0.2.2"

func (d *demo) repository() string { return filepath.Join(d.dir, "repo") }

func (d *demo) out(version string) string { return filepath.Join(d.dir, version) }

// command runs holdfast and shows what a person would type.
func (d *demo) command(ctx context.Context, args ...string) error {
	fmt.Printf("   $ holdfast %s\n", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, d.holdfast, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// openRepository makes a repository and serves its folder, as any web server would.
func (d *demo) openRepository(ctx context.Context) error {
	if err := d.command(ctx, "repo", "init", d.repository()); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go http.Serve(l, http.FileServer(http.Dir(d.repository()))) // until the program ends
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return err
	}
	d.web = "http://" + net.JoinHostPort(hostInBox, port)
	return nil
}

// buildVersion builds a release of the appliance that takes updates from the
// repository; change edits its spec.
func (d *demo) buildVersion(ctx context.Context, version string, change *strings.Replacer) error {
	text, err := os.ReadFile(d.spec)
	if err != nil {
		return err
	}
	root, err := filepath.Abs(filepath.Join(d.repository(), "metadata/1.root.json"))
	if err != nil {
		return err
	}
	spec := strings.Replace(string(text), "version: 1.0.0", "version: "+version, 1)
	if change != nil {
		spec = change.Replace(spec)
	}
	spec += fmt.Sprintf("\nupdate: {root: %q, url: %q, check: 1m}\n", root, d.web)
	// Two folders below the top, as the spec is whose relative paths it has.
	path := filepath.Join(d.dir, version+".yaml")
	if err := os.WriteFile(path, []byte(spec), 0o644); err != nil {
		return err
	}
	return d.command(ctx, "build", path, "-o", d.out(version))
}

func (d *demo) publish(ctx context.Context, version string, options ...string) error {
	return d.command(ctx, append([]string{"repo", "add", d.repository(), d.out(version)}, options...)...)
}

func (d *demo) updateOverHTTP(ctx context.Context) error {
	if err := d.buildVersion(ctx, "2.0.0", nil); err != nil {
		return err
	}
	if err := d.publish(ctx, "2.0.0"); err != nil {
		return err
	}
	fmt.Println("   nobody touches the box; it asks every minute")
	err := d.expect(`installed version=2.0.0[^\r\n]*[\r\n]`, `volume open name=data method=tpm`, `blessed [^\r\n]*version=2.0.0`)
	if err != nil {
		return err
	}
	return d.read(ctx)
}

func (d *demo) updateThatFails(ctx context.Context) error {
	if err := d.buildVersion(ctx, "3.0.0", strings.NewReplacer("--log-level=warn", "--log-level=no-such-level")); err != nil {
		return err
	}
	if err := d.publish(ctx, "3.0.0"); err != nil {
		return err
	}
	err := d.expect(`installed version=3.0.0[^\r\n]*[\r\n]`, `trial of 3.0.0 in slot . failed: [^\r\n]{0,120}`,
		`fell back version=3.0.0`, `ready [^\r\n]*version=2.0.0[^\r\n]*[\r\n]`, `FAILED [^\r\n]{0,120}`)
	if err != nil {
		return err
	}
	return d.read(ctx)
}

func (d *demo) updateFromStick(ctx context.Context) error {
	if err := d.buildVersion(ctx, "4.0.0", nil); err != nil {
		return err
	}
	// Published to nobody: it is to come by hand.
	if err := d.publish(ctx, "4.0.0", "--rollout", "0"); err != nil {
		return err
	}
	bundle, stick := filepath.Join(d.dir, "etcd-box-4.0.0.bundle"), filepath.Join(d.dir, "stick.img")
	if err := d.command(ctx, "bundle", "4.0.0", "--repo", d.repository(), "-o", bundle); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"truncate", "-s", "512M", stick}, {"mkfs.vfat", "-F", "32", stick}, {"mcopy", "-i", stick, bundle, "::"},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", args, err, out)
		}
	}
	fmt.Println("   the stick goes in")
	if err := d.vm.Plug(stick, true); err != nil {
		return err
	}
	err := d.expect(`installed version=4.0.0[^\r\n]*[\r\n]`, `volume open name=data method=tpm`, `blessed [^\r\n]*version=4.0.0`)
	if err != nil {
		return err
	}
	return d.read(ctx)
}
