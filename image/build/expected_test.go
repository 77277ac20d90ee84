package build_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// TestExpected: what the manifest promises of a boot is what the released files
// give. That the firmware measures just that is hwtest's TestPrediction.
func TestExpected(t *testing.T) {
	w := newWorkshop(t, newKeys(t), newCache(t))
	out := filepath.Join(w.dir, "out")
	if _, err := build.Build(context.Background(), parse(t, boxSpec), w.in, out); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(out, build.ReleaseName, image.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	var m image.Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{image.LoaderName: m.Expected.LoaderAuthenticode, image.UKIName: m.Expected.UKIAuthenticode} {
		path := filepath.Join(out, build.ReleaseName, name)
		program := open(t, path)
		checkSignature(t, w, path, m.Expected.DBCertificateSHA256)
		own := name == image.UKIName // the loader is as its makers have it
		checkSBAT(t, program, path, map[string]bool{"sbat": true, "systemd": true, "box": own})
		signatures, err := program.Signatures()
		if err != nil || len(signatures) == 0 {
			t.Fatalf("%s: %d signatures, %v", name, len(signatures), err)
		}
		if got := hex.EncodeToString(signatures[0].Digest[:]); got != want {
			t.Errorf("%s: what was signed has the digest %s, the manifest says %s", name, got, want)
		}
	}
	loaded := open(t, filepath.Join(out, build.ReleaseName, image.UKIName))
	linux, ok := loaded.Section(".linux")
	if !ok {
		t.Fatal("the UKI has no kernel")
	}
	kernel, err := loaded.Open(linux.Name)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := uki.Parse(kernel, kernel.Size())
	if err != nil {
		t.Fatal(err)
	}
	digest, err := inner.Authenticode()
	if got := hex.EncodeToString(digest[:]); err != nil || got != m.Expected.LinuxAuthenticode {
		t.Errorf("the kernel inside the UKI has the digest %s (%v), the manifest says %s", got, err, m.Expected.LinuxAuthenticode)
	}
	measured, err := loaded.Measured()
	if err != nil {
		t.Fatal(err)
	}
	reference, err := m.Reference()
	if err != nil || !slices.Equal(reference.Sections, measured) {
		t.Errorf("the manifest has sections %v (%v), the UKI %v", reference.Sections, err, measured)
	}
	if reference.Boot.PCR11 != pcr.UKI(measured) || reference.RootHash != m.Verity.RootHash || reference.Version != m.Version {
		t.Errorf("reference values %+v", reference)
	}
	if len(reference.Services) == 0 {
		t.Error("no service is among the reference values")
	}
	for name, digest := range reference.Services {
		if !slices.ContainsFunc(m.Images, func(s image.Source) bool { return s.Digest == digest }) {
			t.Errorf("service %s has the digest %q, which is no image's", name, digest)
		}
	}
	value := pcr.UKI(measured)
	for _, phase := range []struct{ before, name string }{{"", ""}, {"enter-initrd", "enter-initrd"}, {"leave-initrd", "enter-initrd:leave-initrd"}} {
		if phase.before != "" {
			value = pcr.Extend(value, []byte(phase.before))
		}
		if got := hex.EncodeToString(value[:]); got != m.Expected.PCR11[phase.name] {
			t.Errorf("PCR 11 in phase %q: %s, the manifest says %s", phase.name, got, m.Expected.PCR11[phase.name])
		}
	}
	if want := hex.EncodeToString(make([]byte, 32)); m.Expected.PCR12 != want {
		t.Errorf("PCR 12 is expected as %q, want %s", m.Expected.PCR12, want)
	}
}

// checkSBAT reads the revocation section as shim does (SBAT.md): lines of
// component,generation,vendor,package,version,url, and objcopy finds the same text.
func checkSBAT(t *testing.T, program *uki.File, path string, want map[string]bool) {
	t.Helper()
	r, err := program.Open(".sbat")
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	// shim reads up to the section's virtual size or a NUL, and takes ASCII alone.
	text = bytes.TrimRight(text, "\x00")
	if i := bytes.IndexFunc(text, func(c rune) bool { return c != '\n' && (c < ' ' || c > '~') }); i >= 0 {
		t.Errorf("%s: byte %d of .sbat is %q", path, i, text[i])
	}
	lines := csv.NewReader(bytes.NewReader(text))
	lines.FieldsPerRecord = 6
	rows, err := lines.ReadAll()
	if err != nil || len(rows) == 0 {
		t.Fatalf("%s: .sbat has %d lines, %v", path, len(rows), err)
	}
	if rows[0][0] != "sbat" || rows[0][1] != "1" {
		t.Errorf("%s: .sbat begins with %q", path, rows[0])
	}
	seen := map[string]bool{}
	for _, row := range rows {
		if n, err := strconv.ParseUint(row[1], 10, 16); err != nil || n == 0 {
			t.Errorf("%s: generation %q of %s", path, row[1], row[0])
		}
		if seen[row[0]] || slices.Contains(row[:5], "") {
			t.Errorf("%s: line %q is there twice or has an empty field", path, row)
		}
		seen[row[0]] = true
	}
	for component, there := range want {
		if seen[component] != there {
			t.Errorf("%s: component %s in .sbat: %v", path, component, seen[component])
		}
	}
	section := filepath.Join(t.TempDir(), "sbat")
	if msg, err := exec.Command("objcopy", "-O", "binary", "--only-section=.sbat", path, section).CombinedOutput(); err != nil {
		t.Fatalf("objcopy (Debian package binutils): %v: %s", err, msg)
	}
	if judged, err := os.ReadFile(section); err != nil || !bytes.Equal(bytes.TrimRight(judged, "\x00"), text) {
		t.Errorf("%s: objcopy finds %q in .sbat (%v), we %q", path, judged, err, text)
	}
}

func open(t *testing.T, path string) *uki.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	program, err := uki.Parse(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	return program
}

// checkSignature: the certificate that the manifest names verifies the program.
func checkSignature(t *testing.T, w *workshop, path, want string) {
	t.Helper()
	certificate := filepath.Join(t.TempDir(), "db.pem")
	named := 0
	for _, cert := range []*x509.Certificate{w.in.Keys.PK.Cert, w.in.Keys.KEK.Cert, w.in.Keys.DB.Cert} {
		if sum := sha256.Sum256(cert.Raw); hex.EncodeToString(sum[:]) == want {
			named++
			if err := os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if named != 1 {
		t.Fatalf("the manifest's certificate %q is that of %d of the vendor's keys", want, named)
	}
	if msg, err := exec.Command("sbverify", "--cert", certificate, path).CombinedOutput(); err != nil {
		t.Errorf("sbverify (Debian package sbsigntool): %v: %s", err, msg)
	}
}
