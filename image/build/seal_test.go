package build_test

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// TestRollbackProofRelease is signed once plainly and once for each epoch up to its own,
// and tells the device so.
func TestRollbackProofRelease(t *testing.T) {
	k := newKeys(t)
	w := newWorkshop(t, k, newCache(t))
	w.write(t, "root.json", tufRoot(t))
	text := boxSpec + "seal: {policy: rollback-proof, pin: true, repair: manual}\nupdate: {root: root.json, epoch: 3}\n"
	s := parse(t, text)
	s.Disk.EncryptSlots = true
	m, err := build.Build(context.Background(), s, w.in, filepath.Join(w.dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	release := filepath.Join(w.dir, "out", build.ReleaseName)
	signatures, pcr11 := signaturesOf(t, filepath.Join(release, image.UKIName))
	block, _ := pem.Decode(k.PolicyPublicPEM)
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	policy, err := pcr.Policy([]int{11}, map[int]pcr.Digest{11: pcr11})
	if err != nil {
		t.Fatal(err)
	}
	if len(signatures) != 4 {
		t.Fatalf("%d signatures", len(signatures))
	}
	for n, s := range signatures {
		ref := ""
		if n > 0 {
			ref = fmt.Sprintf("holdfast-epoch-%d", n)
		}
		digest := sha256.Sum256(append(policy[:], ref...))
		if s.Ref != ref || s.Policy != policy || rsa.VerifyPKCS1v15(public.(*rsa.PublicKey), crypto.SHA256, digest[:], s.Sig) != nil {
			t.Errorf("signature %d is for %q and policy %x, want %q and %x", n, s.Ref, s.Policy, ref, policy)
		}
	}
	want := image.SealPolicy{Policy: "rollback-proof", PolicyKeyPEM: string(k.PolicyPublicPEM), PIN: true, Repair: "manual", Epoch: 3}
	app := applianceOf(t, filepath.Join(release, image.RootName), m.Root.SizeBytes)
	if app.Seal != want {
		t.Errorf("the appliance has %+v, want %+v", app.Seal, want)
	}
	if !app.EncryptSlots || !m.Disk.EncryptSlots {
		t.Errorf("slots are to be encrypted: the appliance says %v, the manifest %v", app.EncryptSlots, m.Disk.EncryptSlots)
	}
}

// signaturesOf reads .pcrsig, and PCR 11 as it is when the disk is opened.
func signaturesOf(t *testing.T, path string) (seal.Signatures, pcr.Digest) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	im, err := uki.Parse(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	section, err := im.Open(".pcrsig")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(section)
	if err != nil {
		t.Fatal(err)
	}
	signatures, err := seal.ParseSignatures(b)
	if err != nil {
		t.Fatal(err)
	}
	measured, err := im.Measured()
	if err != nil {
		t.Fatal(err)
	}
	return signatures, pcr.Extend(pcr.UKI(measured), []byte("enter-initrd"))
}

func applianceOf(t *testing.T, path string, sizeBytes int64) image.Appliance {
	t.Helper()
	img, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	root, err := erofs.Open(img, sizeBytes)
	if err != nil {
		t.Fatal(err)
	}
	n, err := root.Lookup(image.AppliancePath)
	if err != nil {
		t.Fatal(err)
	}
	var app image.Appliance
	if err := json.NewDecoder(root.Data(n)).Decode(&app); err != nil {
		t.Fatal(err)
	}
	return app
}
