package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// nearlyEmpty, asReleased and updated are what a slot gets. Without modules the root of
// the last two has about 250 MB.
func nearlyEmpty() release { return release{version: "0.9.0"} }

func asReleased() release {
	return release{version: "1.0.0", debian: "first", etcd: "first", config: "snapshot-count: 10000\n"}
}

func updated() release {
	r := asReleased()
	r.version, r.debian = "1.1.0", "second"
	return r
}

// applies compares writing a release into a slot with writing the same bytes and
// hashing them.
func (b *bench) applies() error {
	for _, r := range []release{nearlyEmpty(), asReleased(), updated()} {
		if err := b.make(r); err != nil {
			return err
		}
	}
	if err := b.publish("repo-apply", "1.0.0", "1.1.0"); err != nil {
		return err
	}
	m, err := b.manifest(updated().version)
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"-o", "whole.bundle"}, {"-o", "patch.bundle", "--from", "1.0.0"}} {
		if _, err := b.time(exec.Command(b.holdfast, append([]string{"bundle", "1.1.0", "--repo", "repo-apply"}, args...)...)); err != nil {
			return err
		}
	}
	fmt.Printf("| root of %d MB and UKI of %d MB into slot B | holdfast apply | dd conv=fsync, sha256sum | ratio of rates | peak memory |\n|---|---|---|---|---|\n",
		m.Root.SizeBytes/1e6, m.UKI.SizeBytes/1e6)
	bytes := m.Root.SizeBytes + m.UKI.SizeBytes
	for _, row := range []struct{ what, bundle, onto string }{
		{"all of it from the bundle", "whole.bundle", nearlyEmpty().version},
		{"by the patch from the other slot", "patch.bundle", asReleased().version},
	} {
		var ours, theirs measured
		for i := range b.runs + 1 {
			our, their, err := b.applyOnce(row.bundle, row.onto)
			if err != nil {
				return err
			}
			if i > 0 {
				ours.add(our)
				theirs.add(their)
			}
		}
		fmt.Printf("| %s | %s, %.0f MB/s | %s, %.0f MB/s | %.2f | %d MiB |\n", row.what, ours.text(), rate(bytes, ours.median()),
			theirs.text(), rate(bytes, theirs.median()), theirs.median().Seconds()/ours.median().Seconds(), ours.rss>>20)
	}
	return nil
}

func rate(bytes int64, d time.Duration) float64 { return float64(bytes) / 1e6 / d.Seconds() }

// applyOnce writes to fresh copies of a disk. Both write where nothing is yet, and to
// files whose other content is on the medium.
func (b *bench) applyOnce(bundle, onto string) (ours, theirs measured, err error) {
	fresh := exec.Command("sh", "-c", `rm -f apply.raw && cp --sparse=always "$1" apply.raw && sync`, "sh", filepath.Join(b.folder(onto), "disk.raw"))
	if _, err = b.time(fresh); err != nil {
		return ours, theirs, err
	}
	if ours, err = b.time(exec.Command(b.holdfast, "apply", bundle, "--disk", "apply.raw", "--root", "repo-apply.root.json")); err != nil {
		return ours, theirs, err
	}
	again := exec.Command(fresh.Path, fresh.Args[1:]...)
	if _, err = b.time(again); err != nil {
		return ours, theirs, err
	}
	theirs, err = b.time(exec.Command("sh", "-c", `set -e
dd if="$1"/root.img of=apply.raw bs=1M seek=769 conv=notrunc,fsync status=none
dd if="$1"/uki.efi of=apply.raw bs=1M seek=64 conv=notrunc,fsync status=none
sha256sum "$1"/root.img "$1"/uki.efi`, "sh", filepath.Join(b.folder(updated().version), "release")))
	return ours, theirs, err
}

// adds measures publishing a release: pack, pieces, tree and one patch.
func (b *bench) adds() error {
	for _, r := range []release{asReleased(), updated()} {
		if err := b.make(r); err != nil {
			return err
		}
	}
	if err := b.publish("repo-add", "1.0.0"); err != nil {
		return err
	}
	var all measured
	for i := range b.runs + 1 {
		for _, suffix := range []string{"", ".keys", ".private"} {
			at := filepath.Join(b.dir, "repo-again"+suffix)
			if err := os.RemoveAll(at); err != nil {
				return err
			}
			if _, err := b.time(exec.Command("cp", "-a", "repo-add"+suffix, at)); err != nil {
				return err
			}
		}
		m, err := b.time(exec.Command(b.holdfast, "repo", "add", "repo-again", b.folder(updated().version)))
		if err != nil {
			return err
		}
		if i > 0 {
			all.add(m)
		}
	}
	m, err := b.manifest(updated().version)
	if err != nil {
		return err
	}
	rel, err := published(filepath.Join(b.dir, "repo-again"), updated().version)
	if err != nil {
		return err
	}
	fmt.Printf("| root of %d MB | holdfast repo add | peak memory | made |\n|---|---|---|---|\n| pack, pieces, tree and one patch | %s | %d MiB |",
		m.Root.SizeBytes/1e6, all.text(), all.rss>>20)
	for _, blob := range rel.Blobs {
		fmt.Printf(" %s %.1f MB", blob.Role, float64(blob.SizeBytes)/1e6)
	}
	fmt.Println(" |")
	return nil
}
