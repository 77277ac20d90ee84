package build

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/initrd"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// initrdFolders are the mount points the agent needs before there is a root.
var initrdFolders = []string{"/dev", "/proc", "/run", "/sys", "/sysroot"}

// panicTimeoutSec is how long a panic stays on the screen before the box boots
// again and the boot counter may choose the other slot.
const panicTimeoutSec = 20

// initrdTree is the agent, its description and the modules, nothing else.
func (b *builder) initrdTree(k *kernel, app *image.Appliance) (*tree.Node, error) {
	root := tree.NewDir(0o755)
	epoch := b.epochSec()
	root.MTimeSec = epoch
	for _, dir := range initrdFolders {
		if _, err := root.MkdirAll(dir, epoch); err != nil {
			return nil, err
		}
	}
	description := image.Boot{Appliance: *app, Root: b.manifest.Verity}
	for _, m := range k.modules {
		at := path.Join("/modules", path.Base(m.Path))
		if err := b.put(root, at, 0o644, m.Content); err != nil {
			return nil, err
		}
		description.Modules = append(description.Modules, at)
	}
	text, err := json.Marshal(description)
	if err != nil {
		return nil, err
	}
	if err := b.put(root, image.BootPath, 0o644, tree.Bytes(text)); err != nil {
		return nil, err
	}
	if err := b.addEnrolment(root); err != nil {
		return nil, err
	}
	return root, b.put(root, "/init", 0o755, b.in.Agent)
}

// pstoreOff keeps a kernel's panics out of the firmware's variables, where a few of them
// fill the room that an update of dbx needs, and on some boards all there is (F65).
const pstoreOff = "efi_pstore.pstore_disable="

// cmdline is what is measured: the spec's words, and ours. A spec that says something
// about pstore itself is left alone.
func (b *builder) cmdline(k *kernel) string {
	words := strings.Fields(b.spec.Kernel.Cmdline)
	said := func(w string) bool { return strings.HasPrefix(strings.ReplaceAll(w, "-", "_"), pstoreOff) }
	if k.pstore && !slices.ContainsFunc(words, said) {
		words = append(words, pstoreOff+"1")
	}
	return strings.Join(append(words, fmt.Sprintf("panic=%d", panicTimeoutSec), image.RootHashWord+b.manifest.Verity.RootHash), " ")
}

// writeUKI assembles and signs the kernel image and notes what it will measure.
func (b *builder) writeUKI(k *kernel, app *image.Appliance) error {
	root, err := b.initrdTree(k, app)
	if err != nil {
		return err
	}
	var archive bytes.Buffer // modules and agent, compressed: some megabytes
	if err := initrd.Write(&archive, root, initrd.Options{Compress: true}); err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	b.manifest.Cmdline = b.cmdline(k)
	img, err := uki.Assemble(uki.Input{
		Stub: b.in.Stub, Linux: k.image, Initrd: tree.Bytes(archive.Bytes()), Uname: k.version,
		OSRelease: b.osRelease(), Cmdline: b.manifest.Cmdline,
		SBAT:         fmt.Sprintf("%s,1,%s,%s,%s,\n", b.spec.Name, b.spec.Name, b.spec.Name, b.spec.Version),
		PCRPublicKey: b.in.Keys.PolicyPublicPEM,
		PCRSig:       b.signPolicy,
	})
	if err != nil {
		return fmt.Errorf("assemble UKI: %w", err)
	}
	if err := b.expectPCR11(img.PCR11); err != nil {
		return err
	}
	for _, s := range img.Measured {
		b.manifest.Expected.UKISections = append(b.manifest.Expected.UKISections, image.Section{Name: s.Name, SHA256: hex.EncodeToString(s.SHA256[:])})
	}
	signed, err := b.sign(img, "kernel image")
	if err != nil {
		return fmt.Errorf("sign UKI: %w", err)
	}
	if b.manifest.UKI, err = b.create(image.UKIName, signed.Size(), copyBlob(signed)); err != nil {
		return err
	}
	if b.manifest.Expected.UKIAuthenticode, err = authenticode(signed); err != nil {
		return err
	}
	if b.manifest.Expected.LinuxAuthenticode, err = authenticode(k.image); err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	return nil
}

// phases of a boot in which PCR 11 has a value worth knowing, as systemd names them.
var phases = []string{"enter-initrd", "leave-initrd"}

// signPolicy approves the value PCR 11 has in the initrd and no other, so that a
// key can be had there and nowhere later.
func (b *builder) signPolicy(measured []pcr.Measured) ([]byte, error) {
	value := pcr.Extend(pcr.UKI(measured), []byte(phases[0]))
	signer, err := b.in.Keys.PolicySigner()
	if err != nil {
		return nil, err
	}
	signatures, err := seal.SignEpochs(keys.For(signer, b.whatIsSigned("PCR 11 policy")), value, uint64(b.sealEpoch()))
	if err != nil {
		return nil, fmt.Errorf("sign PCR 11 policy: %w", err)
	}
	return signatures.Marshal()
}

// sealEpoch is the security epoch up to which the release is signed; 0 where
// the policy has none.
func (b *builder) sealEpoch() int64 {
	if b.spec.Seal.Policy != seal.PolicyRollbackProof {
		return 0
	}
	return b.spec.Update.Epoch
}

// whatIsSigned is for requests that are carried to a key.
func (b *builder) whatIsSigned(part string) string {
	return fmt.Sprintf("%s of %s %s for %s", part, b.spec.Name, b.spec.Version, b.spec.Arch)
}

// sign signs an EFI program for Secure Boot with the vendor's db key.
func (b *builder) sign(program uki.Blob, part string) (uki.Blob, error) {
	signer, err := b.in.Keys.DB.Signer()
	if err != nil {
		return nil, err
	}
	return uki.Sign(program, keys.For(signer, b.whatIsSigned(part)), b.in.Keys.DB.Cert)
}

func (b *builder) expectPCR11(stub pcr.Digest) error {
	expected := map[string]string{"": hex.EncodeToString(stub[:])}
	value := stub
	for i, phase := range phases {
		value = pcr.Extend(value, []byte(phase))
		expected[strings.Join(phases[:i+1], ":")] = hex.EncodeToString(value[:])
	}
	b.manifest.Expected.PCR11 = expected
	b.manifest.Expected.PCR12 = hex.EncodeToString(make([]byte, sha256.Size))
	public, err := policyKey(b.in.Keys.PolicyPublicPEM)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(x509.MarshalPKCS1PublicKey(public))
	b.manifest.Expected.PolicyKeySHA256 = hex.EncodeToString(sum[:])
	return nil
}

// policyKey reads the public key of PCR 11 policies.
func policyKey(text []byte) (*rsa.PublicKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("policy key: not PEM")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("policy key: %w", err)
	}
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("policy key is %T, not RSA", key)
	}
	return public, nil
}

// writeLoader signs systemd-boot.
func (b *builder) writeLoader() error {
	signed, err := b.sign(b.in.Loader, "boot loader")
	if err != nil {
		return fmt.Errorf("sign boot loader: %w", err)
	}
	if b.manifest.Loader, err = b.create(image.LoaderName, signed.Size(), copyBlob(signed)); err != nil {
		return err
	}
	certificate := sha256.Sum256(b.in.Keys.DB.Cert.Raw)
	b.manifest.Expected.DBCertificateSHA256 = hex.EncodeToString(certificate[:])
	b.manifest.Expected.LoaderAuthenticode, err = authenticode(signed)
	return err
}

func copyBlob(blob uki.Blob) func(io.Writer) error {
	return func(w io.Writer) error {
		r, err := blob.Open()
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(w, r)
		return err
	}
}

// authenticode is the digest the firmware extends into PCR 4 when it starts the
// program. EFI programs are small enough for memory (a UKI has tens of megabytes).
func authenticode(blob uki.Blob) (string, error) {
	data, err := readProgram(blob)
	if err != nil {
		return "", err
	}
	f, err := uki.Parse(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return "", err
	}
	digest, err := f.Authenticode()
	return hex.EncodeToString(digest[:]), err
}
