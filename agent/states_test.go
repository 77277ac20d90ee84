package agent

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"os"
	"strings"
	"testing"

	imagetree "github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// TestRunningOf finds the programs in the logs of a real firmware (see hwtest's
// TestPrediction), with the other releases' loaders offered too, and with a program of
// somebody else behind.
func TestRunningOf(t *testing.T) {
	for _, name := range []string{"secure", "open"} {
		f, err := os.Open("../seal/pcr/testdata/" + name + ".json.gz")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		var boots []struct {
			Log     []byte
			Release pcr.Release
		}
		if err := json.NewDecoder(z).Decode(&boots); err != nil || len(boots) < 2 {
			t.Fatalf("%d boots, %v", len(boots), err)
		}
		var loaders []pcr.Digest
		for _, b := range boots {
			loaders = append(loaders, b.Release.Loader.Authenticode)
		}
		for i, b := range boots {
			log, err := pcr.ParseLog(b.Log)
			if err != nil {
				t.Fatal(err)
			}
			for _, behind := range []bool{false, true} {
				if behind {
					e := pcr.Event{PCR: 4, Type: pcr.EventBootServicesApp, Digests: []pcr.TaggedDigest{{Alg: pcr.SHA256, Digest: make([]byte, 32)}}}
					log.Events = append(log.Events, e)
				}
				onDisk := pcr.Release{UKI: pcr.Program{Authenticode: b.Release.UKI.Authenticode}, Linux: b.Release.Linux, PCR11: b.Release.PCR11}
				got, err := runningOf(log, loaders, []pcr.Release{onDisk})
				want := b.Release
				if name == "open" { // nothing is verified
					want.Loader.Certificate, want.UKI.Certificate = pcr.Digest{}, pcr.Digest{}
				}
				if err != nil || got != want {
					t.Errorf("%s, boot %d: %+v, %v, want %+v", name, i+1, got, err, want)
				}
				other := boots[(i+1)%len(boots)].Release
				if _, err := runningOf(log, loaders, []pcr.Release{other}); err == nil {
					t.Errorf("%s, boot %d is taken for another release", name, i+1)
				}
			}
		}
	}
}

// TestRunningPrograms: what the builder's reference values say is what a device reads on
// its ESP.
func TestRunningPrograms(t *testing.T) {
	const stubPath = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	stub, err := os.ReadFile(stubPath)
	if err != nil {
		t.Fatalf("%s not installed: apt-get install systemd-boot-efi", stubPath)
	}
	ours, _ := vendors(t)
	loader, loaderDigest := signedProgram(t, "loader", ours.DB)
	linux, linuxDigest := signedProgram(t, "stands for a kernel")
	image, err := uki.Assemble(uki.Input{Stub: stub, Linux: imagetree.Bytes(linux), Cmdline: "console=ttyS0", OSRelease: []byte("NAME=a\n"), Initrd: imagetree.Bytes("initrd")})
	if err != nil {
		t.Fatal(err)
	}
	signed, err := uki.Sign(image, ours.DB.Key, ours.DB.Cert)
	if err != nil {
		t.Fatal(err)
	}
	r, err := signed.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	kernel, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	v := newVendor(t, "1.0.0")
	disk, err := partition.Open(v.newDisk("1.0.0"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := runningPrograms(disk, partition.SlotA); err == nil {
		t.Error("programs that are none were read")
	}
	if _, _, err := runningPrograms(disk, partition.SlotB); err == nil || !strings.Contains(err.Error(), "no boot entry for slot b") {
		t.Errorf("an empty slot: %v", err)
	}
	made := makeRelease(t, "1.1.0", releaseOptions{})
	c := partition.Contents{
		Root: partition.Bytes(made.root), UKI: partition.Bytes(kernel), Loader: partition.Bytes(loader),
		RootHash: made.Verity.RootHash, Version: "1.1.0", Title: "1.1.0", ReleaseID: made.UKI.SHA256,
	}
	if err := disk.WriteSlot(context.Background(), partition.SlotB, c, partition.WriteOptions{Running: partition.SlotA, Time: today}, nil); err != nil {
		t.Fatal(err)
	}
	got, loaders, err := runningPrograms(disk, partition.SlotB)
	if err != nil || len(loaders) != 1 || loaders[0] != loaderDigest {
		t.Fatalf("loaders %x, %v, want %x", loaders, err, loaderDigest)
	}
	if got.PCR11 != image.PCR11 || got.Linux != linuxDigest || got.UKI.Authenticode == (pcr.Digest{}) || got.UKI.Authenticode == linuxDigest {
		t.Errorf("kernel %+v, want PCR 11 %x and a kernel inside with %x", got, image.PCR11, linuxDigest)
	}
}
