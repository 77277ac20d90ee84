package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update"
)

// release is one version of the product that updates are measured with: Debian with
// nginx, Python and a Go program.
type release struct {
	version string
	debian  string // first or second; "" is a release with next to nothing in its root
	etcd    string // first or second
	modules string // kernel whose modules are in the root, first or second; "" is none
	config  string
	service bool // a program that the others do not have
}

// folder is where the release is built.
func (b *bench) folder(version string) string { return filepath.Join(b.dir, "release-"+version) }

func (b *bench) rootImage(version string) string {
	return filepath.Join(b.folder(version), "release", image.RootName)
}

func (b *bench) manifest(version string) (m image.Manifest, err error) {
	text, err := os.ReadFile(filepath.Join(b.folder(version), "release", image.ManifestName))
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(text, &m)
}

// make builds the release, unless that was done already.
func (b *bench) make(r release) error {
	if _, err := os.Stat(b.folder(r.version)); err == nil {
		return nil
	}
	overlay := filepath.Join(b.dir, "overlay-"+r.version)
	for _, d := range []string{"usr/sbin", "usr/bin", "usr/lib", "etc"} {
		if err := os.MkdirAll(filepath.Join(overlay, d), 0o755); err != nil {
			return err
		}
	}
	layers := "'dir:" + overlay + "'"
	copies := map[string]string{}
	if r.debian != "" {
		layers = fmt.Sprintf("'tar:%s/%s.tar', %s", b.trees, r.debian, layers)
		copies[b.trees+"/etcd-"+r.etcd] = "usr/bin/etcd"
	}
	if r.modules != "" {
		copies[b.trees+"/kernel-"+r.modules+"/lib/modules"] = "usr/lib/modules"
	}
	if r.service {
		copies[filepath.Join(filepath.Dir(b.holdfast), "runc")] = "usr/bin/runc"
	}
	for from, to := range copies {
		if _, err := b.time(exec.Command("cp", "-a", from, filepath.Join(overlay, to))); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(overlay, "etc/etcd.yaml"), []byte(r.config), 0o644); err != nil {
		return err
	}
	spec := fmt.Appendf(nil, "name: bench-update\nversion: %s\nkeys: %s\nkernel: {image: 'deb:%s/linux-image.deb', cmdline: console=ttyS0}\n"+
		"init: [%s]\nhandoff: [/usr/sbin/init]\ndisk: {size: 2GiB, esp: 256MiB, slot: 512MiB}\n", r.version, b.keys, b.inputs, layers)
	file := filepath.Join(b.dir, r.version+".yaml")
	if err := os.WriteFile(file, spec, 0o644); err != nil {
		return err
	}
	_, err := b.time(exec.Command(b.holdfast, "build", file, "-o", b.folder(r.version), "--cache", filepath.Join(b.dir, "cache-releases")))
	return errors.Join(err, os.RemoveAll(overlay))
}

// publish makes a repository of its own and adds the releases to it, in order.
func (b *bench) publish(repo string, versions ...string) error {
	if _, err := b.time(exec.Command(b.holdfast, "repo", "init", repo)); err != nil {
		return err
	}
	for _, v := range versions {
		if _, err := b.time(exec.Command(b.holdfast, "repo", "add", repo, b.folder(v))); err != nil {
			return err
		}
	}
	root, err := exec.Command(b.holdfast, "repo", "root", filepath.Join(b.dir, repo)).Output()
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, repo+".root.json"), root, 0o644)
}

// published reads what a repository says of a release, trusting it.
func published(repo, version string) (*update.Release, error) {
	pattern := filepath.Join(repo, "targets/*/*/*/*."+version+".json")
	found, err := filepath.Glob(pattern)
	if err != nil || len(found) != 1 {
		return nil, fmt.Errorf("%d files for %s instead of one: %w", len(found), pattern, err)
	}
	text, err := os.ReadFile(found[0])
	if err != nil {
		return nil, err
	}
	return update.ParseRelease(text)
}
