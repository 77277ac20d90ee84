package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// The release and disk here are put together from the packages below image/build,
// small and quick, so that inspect is tested against something that was not made
// by the code that it checks a build with.

const mebi = 1 << 20

// testRelease is what a release of the tests is called.
type testRelease struct {
	product, version string
	epoch            int64
	noiseMiB         int64 // 0 is one
}

// makeRelease writes a release whose kernel is systemd-boot, which is an EFI
// program too, signed with the keys in keyDir.
func makeRelease(keyDir, dir string, r testRelease) error {
	k, err := keys.Load(keyDir)
	if err != nil {
		return err
	}
	stub, err := os.ReadFile(filepath.Join(efiFolder, "linuxx64.efi.stub"))
	if err != nil {
		return fmt.Errorf("%w: apt-get install systemd-boot-efi", err)
	}
	loader, err := os.ReadFile(filepath.Join(efiFolder, "systemd-bootx64.efi"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	m := &image.Manifest{
		Format: 1, Name: r.product, Version: r.version, Architecture: "amd64", Kernel: "6.1.0-test", Epoch: r.epoch,
		Images: []image.Source{{Ref: "registry.example/web:1", Digest: "sha256:" + strings.Repeat("ab", 32)}},
		Disk:   image.Geometry{SizeBytes: diskBytes, ESPBytes: 64 * mebi, SlotBytes: slotBytes},
	}
	var rootImage bytes.Buffer
	if m.Verity, err = writeTestRoot(&rootImage, r); err != nil {
		return err
	}
	if m.Root, err = writeTestFile(dir, image.RootName, rootImage.Bytes()); err != nil {
		return err
	}
	m.Cmdline = "console=ttyS0 " + image.RootHashWord + m.Verity.RootHash
	assembled, err := uki.Assemble(testUKI(k, m, stub, loader))
	if err != nil {
		return err
	}
	for _, s := range assembled.Measured {
		m.Expected.UKISections = append(m.Expected.UKISections, image.Section{Name: s.Name, SHA256: hex.EncodeToString(s.SHA256[:])})
	}
	m.Expected.PCR11 = map[string]string{"": hex.EncodeToString(assembled.PCR11[:])}
	initrd := pcr.Extend(assembled.PCR11, []byte("enter-initrd"))
	left := pcr.Extend(initrd, []byte("leave-initrd"))
	m.Expected.PCR11["enter-initrd"] = hex.EncodeToString(initrd[:])
	m.Expected.PCR11["enter-initrd:leave-initrd"] = hex.EncodeToString(left[:])
	signature, err := seal.SignPCRPolicy(k.PolicyKey, initrd)
	if err != nil {
		return err
	}
	m.Expected.SecureBoot = map[string][]byte{}
	for _, name := range []string{keys.PK, keys.KEK, keys.DB} {
		if m.Expected.SecureBoot[name], err = k.SignatureList(name); err != nil {
			return err
		}
	}
	m.Expected.PolicyKeySHA256 = hex.EncodeToString(signature.KeyFingerprint[:])
	if m.UKI, m.Expected.UKIAuthenticode, err = signTestFile(dir, image.UKIName, assembled, k); err != nil {
		return err
	}
	if m.Loader, m.Expected.LoaderAuthenticode, err = signTestFile(dir, image.LoaderName, tree.Bytes(loader), k); err != nil {
		return err
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, image.ManifestName), text, 0o644)
}

func testUKI(k *keys.Keys, m *image.Manifest, stub, loader []byte) uki.Input {
	return uki.Input{
		Stub: stub, Linux: tree.Bytes(loader), Initrd: tree.Bytes("no initrd at all"), Uname: m.Kernel, Cmdline: m.Cmdline,
		OSRelease: []byte("NAME=ledger\nVERSION_ID=1.2.3\nPRETTY_NAME=\"Ledger 1.2.3\"\n"), SBAT: "ledger,1,Ledger,ledger,1.2.3,\n",
		PCRPublicKey: k.PolicyPublicPEM,
		PCRSig: func(measured []pcr.Measured) ([]byte, error) {
			s, err := seal.SignPCRPolicy(k.PolicyKey, pcr.Extend(pcr.UKI(measured), []byte("enter-initrd")))
			if err != nil {
				return nil, err
			}
			return seal.Signatures{s}.Marshal()
		},
	}
}

func writeTestRoot(to *bytes.Buffer, r testRelease) (image.Verity, error) {
	text, err := json.Marshal(image.Appliance{
		Format: 1, Name: r.product, Version: r.version, Update: image.Update{Channel: "stable", Epoch: r.epoch},
		Services: []image.Container{{Name: "web"}}, Volumes: []image.Volume{{Name: "data", Mount: "/data"}},
	})
	if err != nil {
		return image.Verity{}, err
	}
	top := tree.NewDir(0o755)
	if err := top.Put(image.AppliancePath, &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(text)}); err != nil {
		return image.Verity{}, err
	}
	// Content that all releases share and that does not compress, so that a patch is worth it.
	noise := make([]byte, max(r.noiseMiB, 1)*mebi)
	if _, err := rand.NewChaCha8([32]byte{}).Read(noise); err != nil {
		return image.Verity{}, err
	}
	if err := top.Put("/usr/share/noise", &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(noise)}); err != nil {
		return image.Verity{}, err
	}
	if _, err := erofs.Write(to, top, erofs.Options{Label: "ledger", BuildTimeSec: 1767225600}); err != nil {
		return image.Verity{}, err
	}
	w, err := verity.NewWriter(verity.Options{Salt: []byte("salt of a test")})
	if err != nil {
		return image.Verity{}, err
	}
	if _, err := w.Write(to.Bytes()); err != nil {
		return image.Verity{}, err
	}
	return w.Finish(to)
}

func writeTestFile(dir, name string, content []byte) (image.File, error) {
	sum := sha256.Sum256(content)
	return image.File{Name: name, SizeBytes: int64(len(content)), SHA256: hex.EncodeToString(sum[:])},
		os.WriteFile(filepath.Join(dir, name), content, 0o644)
}

func signTestFile(dir, name string, unsigned uki.Blob, k *keys.Keys) (image.File, string, error) {
	signer, err := k.DB.Signer()
	if err != nil {
		return image.File{}, "", err
	}
	signed, err := uki.Sign(unsigned, signer, k.DB.Cert)
	if err != nil {
		return image.File{}, "", err
	}
	r, err := signed.Open()
	if err != nil {
		return image.File{}, "", err
	}
	defer r.Close()
	var content bytes.Buffer
	if _, err := content.ReadFrom(r); err != nil {
		return image.File{}, "", err
	}
	f, err := uki.Parse(bytes.NewReader(content.Bytes()), int64(content.Len()))
	if err != nil {
		return image.File{}, "", err
	}
	digest, err := f.Authenticode()
	if err != nil {
		return image.File{}, "", err
	}
	file, err := writeTestFile(dir, name, content.Bytes())
	return file, hex.EncodeToString(digest[:]), err
}

// diskBytes holds boot partition, two slots of slotBytes, and two volumes of the least size.
const (
	diskBytes = 160 * mebi
	slotBytes = 4 * mebi
)

// makeDisk writes a disk image, with the release in releaseDir in slot A, that is
// good when there are no tries to count.
func makeDisk(path, releaseDir string, tries int) error {
	return makeDiskOf(path, releaseDir, tries, slotBytes)
}

func makeDiskOf(path, releaseDir string, tries int, slotBytes int64) (err error) {
	layout, err := partition.Plan(partition.Spec{
		Seed: "ledger", SizeBytes: diskBytes + 2*slotBytes - 8*mebi, ESPBytes: 64 * mebi, SlotBytes: slotBytes,
		Volumes: []partition.VolumeSpec{{Name: "log", SizeBytes: 32 * mebi}, {Name: "data"}},
	})
	if err != nil {
		return err
	}
	f, err := partition.CreateFile(path, layout.SizeBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	d, err := partition.Format(f, layout, partition.FormatOptions{Time: time.Unix(1767225600, 0)})
	if err != nil || releaseDir == "" {
		return err
	}
	var parts [3]partition.Bytes
	for i, name := range []string{image.RootName, image.UKIName, image.LoaderName} {
		if parts[i], err = os.ReadFile(filepath.Join(releaseDir, name)); err != nil {
			return err
		}
	}
	return d.WriteSlot(context.Background(), partition.SlotA,
		partition.Contents{Root: parts[0], UKI: parts[1], Loader: parts[2], Title: "ledger 1.2.3", Version: "1.2.3"},
		partition.WriteOptions{Tries: tries}, nil)
}

const volumeBytes = 32 * mebi

// testVolume is a LUKS2 header with its volume key.
type testVolume struct {
	*luks2.Header
	key []byte
}

// cheapKDF costs no time and protects nothing.
func cheapKDF() luks2.KDF { return luks2.KDF{Type: luks2.PBKDF2, Hash: "sha256", Iterations: 1000} }

// newVolume is a volume with a recovery key and its token.
func newVolume() (*testVolume, error) {
	key := make([]byte, luks2.VolumeKeyBytes)
	for i := range key {
		key[i] = byte(i)
	}
	h, err := luks2.Format(luks2.FormatOptions{
		UUID: "6f1c1e08-7a40-4b0f-9a3f-3d5f1a2b3c4d", Label: "data", Subsystem: "holdfast", SizeBytes: volumeBytes,
	}, key)
	if err != nil {
		return nil, err
	}
	v := &testVolume{h, key}
	slot, err := v.AddKeyslot(key, []byte("recovery"), cheapKDF(), nil)
	if err != nil {
		return nil, err
	}
	_, err = v.SetToken(luks2.NextToken, luks2.RecoveryToken(slot))
	return v, err
}

func (v *testVolume) writeTo(dev luks2.Device) error {
	if err := v.WriteNew(dev); err != nil {
		return err
	}
	return v.Publish(dev)
}
