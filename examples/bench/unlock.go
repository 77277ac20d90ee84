package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// phases is how many commands a boot has besides: the initrd's begin and its end.
const phases = 2

// unlocks opens one volume by the TPM, with the agent and with systemd-cryptsetup, in
// one virtual machine under one software TPM: the same header, the same token.
func (b *bench) unlocks() error {
	out, err := b.unlockGuest()
	if err != nil {
		return err
	}
	mapped, process, ours := b.column(out, `(?m)^OURS (\d+) (\d+) (\d+)`, 1), b.column(out, `(?m)^OURS (\d+) (\d+) (\d+)`, 2), b.column(out, `(?m)^OURS (\d+) (\d+) (\d+)`, 3)
	their, theirs := b.column(out, `(?m)^THEIRS (\d+) (\d+)`, 1), b.column(out, `(?m)^THEIRS (\d+) (\d+)`, 2)
	if len(mapped) != b.runs || len(their) != b.runs {
		return fmt.Errorf("the system opened the volume %d and %d times, not %d; its console ends:\n%s", len(mapped), len(their), b.runs, out[max(0, len(out)-2000):])
	}
	accel, err := hwtest.Accelerator(context.Background())
	if err != nil {
		return err
	}
	fmt.Printf("| one volume opened by the TPM; in a virtual machine (%s) with swtpm | first TPM command to data mapped | whole process | TPM commands |\n", accel)
	fmt.Println("|---|---|---|---|")
	fmt.Printf("| holdfast-agent, of a boot with %d more commands for its phases | %s | %s | %d |\n", phases, millis(mapped), millis(process), slices.Max(ours))
	fmt.Printf("| systemd-cryptsetup 257 | – | %s | %d |\n", millis(their), slices.Max(theirs))
	if most := slices.Max(ours) + phases; most > 12 {
		return fmt.Errorf("a boot takes %d TPM commands, more than 12", most)
	}
	return nil
}

// millis is the median with minimum and maximum of microseconds.
func millis(us []int) string {
	s := slices.Sorted(slices.Values(us))
	ms := func(us int) float64 { return float64(us) / 1000 }
	return fmt.Sprintf("%.0f ms (%.0f to %.0f)", ms(s[len(s)/2]), ms(s[0]), ms(s[len(s)-1]))
}

// column takes a number of each line that matches, the first round left out.
func (b *bench) column(out, line string, group int) (numbers []int) {
	for _, m := range regexp.MustCompile(line).FindAllStringSubmatch(out, -1) {
		n, err := strconv.Atoi(m[group])
		if err != nil {
			return nil
		}
		numbers = append(numbers, n)
	}
	if len(numbers) == 0 {
		return nil
	}
	return numbers[1:]
}

// unlockGuest boots the system and returns its console.
func (b *bench) unlockGuest() (string, error) {
	if b.systemd == "" {
		return "", errors.New("systemd of Debian 13 is needed: run make bench, or name its folder with -systemd")
	}
	guest := filepath.Join(b.dir, "guest")
	build := exec.Command("go", "build", "-trimpath", "-o", guest, "./examples/bench/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w: %s", build.Args, err, out)
	}
	files, err := vendorFiles()
	if err != nil {
		return "", err
	}
	files["/rounds"] = []byte(strconv.Itoa(b.runs + 1))
	bare, err := hwtest.BareSystem{
		Kernel: filepath.Join(b.inputs, "linux-image.deb"), Root: b.systemd, Init: guest, Files: files,
		Modules: []string{"virtio_pci", "virtio_blk", "dm_mod", "dm_crypt", "xts", "aesni_intel", "tpm_crb"},
	}.Make(b.dir)
	if err != nil {
		return "", err
	}
	volume := filepath.Join(b.dir, "volume")
	if err := os.WriteFile(volume, []byte(partition.UnprovisionedMarker), 0o600); err != nil {
		return "", err
	}
	if err := os.Truncate(volume, 64<<20); err != nil {
		return "", err
	}
	box, err := hwtest.NewBox(filepath.Join(b.dir, "box"), "", hwtest.Options{Bare: bare, Drives: []hwtest.Drive{{Image: volume}}})
	if err != nil {
		return "", err
	}
	vm, err := box.PowerOn(context.Background())
	if err != nil {
		return "", err
	}
	defer vm.PowerCut()
	if err := vm.Wait(10 * time.Minute); err != nil {
		return "", err
	}
	return vm.Console(), nil
}

// vendorFiles sign the PCR 11 that the guest measures.
func vendorFiles() (map[string][]byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	measured := []pcr.Measured{{Name: ".linux", SHA256: sha256.Sum256([]byte("kernel"))}, {Name: ".initrd", SHA256: sha256.Sum256([]byte("initrd"))}}
	entry, err := seal.SignPCRPolicy(key, pcr.Extend(pcr.UKI(measured), []byte("enter-initrd")))
	if err != nil {
		return nil, err
	}
	signatures, err := seal.Signatures{entry}.Marshal()
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	return map[string][]byte{"/signatures.json": signatures, "/policy.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}, nil
}
