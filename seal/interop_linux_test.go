package seal

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// The judge is systemd's own code: version 252 of the build machine (Debian 12)
// and version 257 of Debian 13 in a folder that HOLDFAST_SYSTEMD_ROOT names.
// Make that folder with
//
//	mmdebstrap --variant=extract --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
//	  --include=systemd-cryptsetup,cryptsetup-bin,libtss2-esys-3.0.2-0t64,libtss2-rc0t64,libtss2-tcti-swtpm0t64,libtss2-tcti-device0t64 \
//	  trixie "$HOLDFAST_SYSTEMD_ROOT"
//
// Its programs run in a chroot, which takes root.

// system is an installation of systemd and cryptsetup.
type system struct {
	root string // "" is this machine's
	dir  string // a folder inside, as this process sees it
}

func host(t *testing.T) system {
	t.Helper()
	dir, err := os.MkdirTemp("", "seal") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return system{dir: dir}
}

func trixie(t *testing.T) system {
	t.Helper()
	root := os.Getenv("HOLDFAST_SYSTEMD_ROOT")
	if root == "" {
		t.Fatal("HOLDFAST_SYSTEMD_ROOT is not set: run make test, or see the comment in interop_linux_test.go")
	}
	for _, d := range []string{"tmp", "run/systemd"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.MkdirTemp(filepath.Join(root, "tmp"), "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return system{root: root, dir: dir}
}

// inside is a file of dir as the system's programs see it.
func (s system) inside(name string) string {
	return strings.TrimPrefix(filepath.Join(s.dir, name), strings.TrimSuffix(s.root, "/"))
}

func (s system) write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// try runs a program and returns its output and whether it exited with 0.
func (s system) try(t *testing.T, limit time.Duration, env []string, name string, args ...string) (string, bool) {
	t.Helper()
	path := name
	if s.root == "" {
		var err error
		if path, err = exec.LookPath(name); err != nil {
			t.Fatalf("%s not installed: apt-get install systemd cryptsetup-bin libtss2-tcti-swtpm0", name)
		}
	}
	// systemd asks on a terminal or by its agent when a PIN was refused, and
	// nobody will answer.
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}, env...)
	if s.root != "" {
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: s.root}
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	t.Logf("%s %v: %v\n%s", name, args, err, stderr.String())
	return stdout.String(), err == nil
}

func (s system) must(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	out, ok := s.try(t, time.Minute, env, name, args...)
	if !ok {
		t.Fatalf("%s %v is not content", name, args)
	}
	return out
}

const volumePassword = "first password"

// volume makes an empty LUKS2 file "disk" with volumePassword in slot 0.
func (s system) volume(t *testing.T) {
	t.Helper()
	s.write(t, "password", []byte(volumePassword))
	s.write(t, "disk", nil)
	if err := os.Truncate(filepath.Join(s.dir, "disk"), 20<<20); err != nil {
		t.Fatal(err)
	}
	s.must(t, nil, cryptsetup(s), "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", s.inside("disk"), s.inside("password"))
}

func cryptsetup(s system) string {
	if s.root != "" {
		return "/usr/sbin/cryptsetup"
	}
	return "cryptsetup"
}

func cryptenroll(s system) string {
	if s.root != "" {
		return "/usr/bin/systemd-cryptenroll"
	}
	return "systemd-cryptenroll"
}

// opens asks cryptsetup whether the secret opens a keyslot.
func (s system) opens(t *testing.T, secret []byte) {
	t.Helper()
	s.write(t, "secret", Passphrase(secret))
	s.must(t, nil, cryptsetup(s), "luksOpen", "--test-passphrase", "--key-file", s.inside("secret"), s.inside("disk"))
}

// enrolments are what systemd-cryptenroll can be asked for and we support.
func enrolments(s system) map[string][]string {
	signedPCR := []string{"--tpm2-public-key=" + s.inside("pub.pem"), "--tpm2-public-key-pcrs=11", "--tpm2-signature=" + s.inside("sig.json")}
	return map[string][]string{
		"PCR 7":               {"--tpm2-pcrs=7"},
		"PCR 0, 2, 7":         {"--tpm2-pcrs=0+2+7"},
		"signed 11":           append([]string{"--tpm2-pcrs="}, signedPCR...),
		"PCR 7 and signed 11": append([]string{"--tpm2-pcrs=7"}, signedPCR...),
		"PCR 7 and PIN":       {"--tpm2-pcrs=7", "--tpm2-with-pin=yes"},
		"everything":          append([]string{"--tpm2-pcrs=7", "--tpm2-with-pin=yes"}, signedPCR...),
	}
}

// systemd enrols, we unseal, cryptsetup accepts what we got.
func testSystemdEnrols(t *testing.T, make func(*testing.T) system, exact bool) {
	const pin = "ΠΙΝ 2468"
	for name, args := range enrolments(system{}) {
		t.Run(name, func(t *testing.T) {
			s := make(t)
			args = enrolments(s)[name]
			tpm := sealtest.StartWith(t, sealtest.Options{Dir: s.dir})
			boot(tpm)
			sigs := signed(t, vendorKey(), "image 0", "image 1")
			b, err := sigs.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			s.write(t, "sig.json", b)
			s.write(t, "pub.pem", keyPEM(t, vendorKey()))
			s.volume(t)
			args = append(args, "--tpm2-device=swtpm:path="+s.inside("sock"), s.inside("disk"))
			s.must(t, []string{"PASSWORD=" + volumePassword, "NEWPIN=" + pin}, cryptenroll(s), args...)
			exported := s.must(t, nil, cryptsetup(s), "token", "export", "--token-id", "0", s.inside("disk"))
			token, err := ParseToken([]byte(exported))
			if err != nil {
				t.Fatalf("%v in %s", err, exported)
			}
			if exact {
				again, err := token.Marshal()
				if err != nil || string(again) != strings.TrimSpace(exported) {
					t.Errorf("we write it as\n%s\nsystemd as\n%s", again, exported)
				}
				if token.SRK == nil || token.SRK.Handle != uint32(srkHandle) {
					t.Errorf("storage key %+v", token.SRK)
				}
			}
			// systemd without a resource manager leaves sessions behind.
			tpm.Reboot()
			boot(tpm)
			given := ""
			if token.PIN {
				given = pin
				mustFail(t, tpm, token, sigs, "wrong", ErrWrongPIN)
			}
			secret, err := Unseal(tpm, token, sigs, []byte(given))
			if err != nil {
				t.Fatal(err)
			}
			s.opens(t, secret)
			tpm.Extend(11, "leave-initrd")
			tpm.Extend(7, "dbx")
			mustFail(t, tpm, token, sigs, given, new(*PolicyError))
		})
	}
}

func TestUnsealWhatSystemd252Enrols(t *testing.T) { testSystemdEnrols(t, host, false) }
func TestUnsealWhatSystemd257Enrols(t *testing.T) { testSystemdEnrols(t, trixie, true) }

// The storage key systemd makes is the one we would make: an evicted or
// otherwise lost handle loses nothing.
func TestSRKEqualsSystemd257(t *testing.T) {
	s := trixie(t)
	tpm := sealtest.StartWith(t, sealtest.Options{Dir: s.dir})
	boot(tpm)
	s.volume(t)
	s.must(t, []string{"PASSWORD=" + volumePassword}, cryptenroll(s), "--tpm2-pcrs=7", "--tpm2-device=swtpm:path="+s.inside("sock"), s.inside("disk"))
	theirs, err := readKey(tpm, srkHandle)
	if err != nil {
		t.Fatal(err)
	}
	if !isSRK(theirs.public) {
		t.Errorf("systemd's storage key is not recognised: %+v", theirs.public)
	}
	ours, err := createPrimary(tpm, srkTemplate())
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close(tpm)
	if !bytes.Equal(ours.Name, theirs.Name) {
		t.Errorf("our template gives %x, systemd's %x", ours.Name, theirs.Name)
	}
}

// We seal, systemd 257 unlocks: it accepts the token as a LUKS2 header's, and
// opens the volume with it in order to add another key.
func TestSystemd257UnlocksOurs(t *testing.T) {
	for name, p := range policies(t) {
		t.Run(name, func(t *testing.T) {
			s := trixie(t)
			tpm := sealtest.StartWith(t, sealtest.Options{Dir: s.dir})
			boot(tpm)
			token, secret := sealed(t, tpm, p, pinFor(p))
			// What systemd does not know must not disturb it: a name, tickets, and the
			// signatures for security epochs.
			sigs := slices.Concat(signed(t, vendorKey(), "image 0"), release(t, "image 1", 2))
			token.For = `slot a "1.0.0" <Π>`
			if err := AddTickets(tpm, &token, sigs); err != nil || len(token.Tickets) != 2*min(1, len(token.SignedPCRs)) {
				t.Fatalf("%d tickets, %v", len(token.Tickets), err)
			}
			b, err := withSlot1(token).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			s.sealedVolume(t, b, secret)
			if dump := s.must(t, nil, cryptsetup(s), "luksDump", s.inside("disk")); !strings.Contains(dump, "systemd-tpm2") || !strings.Contains(dump, "tpm2-hash-pcrs") {
				t.Errorf("cryptsetup's token plugin does not describe the token:\n%s", dump)
			}
			s.signatures(t, sigs)
			unlock := s.unlock()
			key := s.must(t, []string{"PIN=" + pinFor(p)}, cryptenroll(s), unlock...)
			if !regexp.MustCompile(`^[cbdefghijklnrtuv]{8}(-[cbdefghijklnrtuv]{8}){7}\s*$`).MatchString(key) {
				t.Errorf("recovery key %q", key)
			}
			tpm.Reboot()
			boot(tpm)
			tpm.Extend(7, "dbx")
			tpm.Extend(11, "leave-initrd")
			if _, ok := s.try(t, 3*time.Second, []string{"PIN=" + pinFor(p)}, cryptenroll(s), unlock...); ok {
				t.Error("systemd opens the volume in another state too")
			}
		})
	}
}

func withSlot1(token Token) Token {
	token.Keyslots = []string{"1"}
	return token
}

// sealedVolume makes a volume with that token for keyslot 1, which the secret opens.
func (s system) sealedVolume(t *testing.T, token, secret []byte) {
	t.Helper()
	s.volume(t)
	s.write(t, "secret", Passphrase(secret))
	s.must(t, nil, cryptsetup(s), "luksAddKey", "-q", "--key-file", s.inside("password"), "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", s.inside("disk"), s.inside("secret"))
	s.write(t, "token.json", token)
	s.must(t, nil, cryptsetup(s), "token", "import", "--json-file", s.inside("token.json"), s.inside("disk"))
}

// unlock has systemd-cryptenroll open the volume with the TPM, in order to add a key.
func (s system) unlock() []string {
	return []string{"--unlock-tpm2-device=swtpm:path=" + s.inside("sock"), "--recovery-key", s.inside("disk")}
}

// What systemd cannot satisfy it does not open, and does not mistake for what it
// can: tokens with a reference or a counter, whether under their own type or, by
// somebody's hand, under systemd's; and an image that is signed for epochs only.
func TestSystemd257RefusesWhatItDoesNotKnow(t *testing.T) {
	own, theirs := []byte(`"`+OwnTokenType+`"`), []byte(`"`+TokenType+`"`)
	for _, tt := range []struct {
		name   string
		policy func(c Counter) Policy
		typed  []byte
		sigs   func(s Signatures) Signatures
	}{
		{"rollback-proof", func(c Counter) Policy { return rollbackProof(t, 2, c) }, own, nil},
		{"rollback-proof under systemd's type", func(c Counter) Policy { return rollbackProof(t, 2, c) }, theirs, nil},
		{"reference alone, under systemd's type", func(c Counter) Policy { p := standard(t); p.Ref = EpochRef(1); return p }, theirs, nil},
		{"counter alone, under systemd's type", func(c Counter) Policy { p := standard(t); p.Counter = &c; return p }, theirs, nil},
		{"standard, signed for epochs only", func(Counter) Policy { return standard(t) }, theirs, func(s Signatures) Signatures { return s[1:] }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := trixie(t)
			tpm := sealtest.StartWith(t, sealtest.Options{Dir: s.dir})
			boot(tpm)
			token, secret := sealed(t, tpm, tt.policy(counter(t, tpm)), "")
			sigs := release(t, "image 1", 2)
			mustOpen(t, tpm, token, sigs, "", secret) // it is a good one
			b, err := withSlot1(token).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if tt.sigs != nil {
				sigs = tt.sigs(sigs)
			}
			s.sealedVolume(t, bytes.Replace(b, []byte(`"type":"`+token.Type()+`"`), append([]byte(`"type":`), tt.typed...), 1), secret)
			s.signatures(t, sigs)
			if dump := s.must(t, nil, cryptsetup(s), "luksDump", s.inside("disk")); !strings.Contains(dump, strings.Trim(string(tt.typed), `"`)) {
				t.Errorf("cryptsetup does not list the token:\n%s", dump)
			}
			if _, ok := s.try(t, 3*time.Second, nil, cryptenroll(s), s.unlock()...); ok {
				t.Error("systemd opens the volume")
			}
			tpm.Reboot() // systemd without a resource manager leaves sessions behind
			boot(tpm)
			if tt.sigs == nil {
				mustOpen(t, tpm, token, sigs, "", secret)
			}
		})
	}
}

// A header with a token for each state: systemd tries them until one fits, passing
// over ours, as UnsealAny does.
func TestSystemd257FindsTheStateThatFits(t *testing.T) {
	s := trixie(t)
	tpm := sealtest.StartWith(t, sealtest.Options{Dir: s.dir})
	boot(tpm)
	pending, secret := sealed(t, tpm, Standard(keyPEM(t, vendorKey()), map[int]pcr.Digest{7: pcr.Extend(bootedPCR(7), []byte("dbx"))}), "")
	epoch, _ := sealed(t, tpm, rollbackProof(t, 1, counter(t, tpm)), "")
	srk, err := EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	present, err := Seal(tpm, srk, secret, standard(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	var tokens [][]byte
	for _, token := range []Token{pending, epoch, present} {
		b, err := withSlot1(token).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, b)
	}
	sigs := release(t, "image 1", 1)
	s.sealedVolume(t, tokens[0], secret)
	for _, b := range tokens[1:] {
		s.write(t, "token.json", b)
		s.must(t, nil, cryptsetup(s), "token", "import", "--json-file", s.inside("token.json"), s.inside("disk"))
	}
	s.signatures(t, sigs)
	s.must(t, nil, cryptenroll(s), s.unlock()...)
	tpm.Reboot()
	boot(tpm)
	tpm.Extend(7, "dbx")
	s.must(t, nil, cryptenroll(s), s.unlock()...)
	tpm.Reboot()
	boot(tpm)
	tpm.Extend(7, "dbx")
	if got, i, err := UnsealAny(tpm, []Token{pending, epoch, present}, sigs, nil); err != nil || i != 0 || !bytes.Equal(got, secret) {
		t.Errorf("we open token %d, %v", i, err)
	}
}

// signatures puts the file where systemd looks for it outside of an initrd.
func (s system) signatures(t *testing.T, sigs Signatures) {
	t.Helper()
	b, err := sigs.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.root, "run/systemd/tpm2-pcr-signature.json")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
}

// systemd-measure predicts and signs the same PCR 11.
func TestSystemdMeasure(t *testing.T) {
	const measure = "/usr/lib/systemd/systemd-measure"
	if _, err := os.Stat(measure); err != nil {
		t.Fatalf("%s not installed: apt-get install systemd", measure)
	}
	s := host(t)
	tpm := sealtest.StartWith(t, sealtest.Options{Dir: s.dir})
	files := []struct{ section, content string }{
		{".linux", "a kernel"}, {".osrel", "ID=appliance\n"}, {".cmdline", "root=x"}, {".initrd", "an initrd"},
		{".pcrpkey", string(keyPEM(t, vendorKey()))},
	}
	var sections []pcr.Measured
	var args []string
	for _, f := range files {
		s.write(t, f.section, []byte(f.content))
		sections = append(sections, pcr.Measured{Name: f.section, SHA256: sha256.Sum256([]byte(f.content))})
		args = append(args, "--"+f.section[1:]+"="+s.inside(f.section))
	}
	s.write(t, "private.pem", privatePEM(t, vendorKey()))
	pcr11 := pcr.Extend(pcr.UKI(sections), []byte("enter-initrd"))
	args = append(args, "--bank=sha256", "--phase=enter-initrd")
	got := s.must(t, nil, measure, append([]string{"calculate"}, args...)...)
	want := "11:sha256=" + hex.EncodeToString(pcr11[:])
	if !strings.Contains(got, want) {
		t.Errorf("systemd-measure calculates\n%s\nwe %s", got, want)
	}
	got = s.must(t, nil, measure, append([]string{"sign", "--tpm2-device=swtpm:path=" + tpm.Socket, "--json=short",
		"--private-key=" + s.inside("private.pem"), "--public-key=" + s.inside(".pcrpkey")}, args...)...)
	entry, err := SignPCRPolicy(vendorKey(), pcr11)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := Signatures{entry}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if string(ours) != strings.TrimSpace(got) {
		t.Errorf("systemd-measure signs\n%s\nwe\n%s", got, ours)
	}
}

func privatePEM(t *testing.T, k *rsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}
