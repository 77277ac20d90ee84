package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/xts"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// vendorKey signs the PCR policies; stranger is somebody else's.
var vendorKey, strangerKey = sync.OnceValue(newRSAKey), sync.OnceValue(newRSAKey)

func newRSAKey() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
}

// release is what a boot measures.
type release struct{ pcr7, initrd, cmdline string }

var release1 = release{pcr7: "vendor's keys", initrd: "initrd 1", cmdline: "roothash=1"}

func (r release) sections() [][2]string {
	return [][2]string{{".linux", "kernel"}, {".cmdline", r.cmdline}, {".initrd", r.initrd}}
}

// sign is the content of the release's .pcrsig section.
func (r release) sign(t testing.TB, k *rsa.PrivateKey) []byte {
	t.Helper()
	var measured []pcr.Measured
	for _, s := range r.sections() {
		measured = append(measured, pcr.Measured{Name: s[0], SHA256: sha256.Sum256([]byte(s[1]))})
	}
	entry, err := seal.SignPCRPolicy(k, pcr.Extend(pcr.UKI(measured), []byte(phaseEnterInitrd)))
	if err != nil {
		t.Fatal(err)
	}
	b, err := seal.Signatures{entry}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const volumeBytes = 17 << 20 // the least that holds a header, and some data

// box is an appliance: a disk, a TPM, firmware.
type box struct {
	t          testing.TB
	tpm        *sealtest.TPM
	disk       partition.Device
	volumes    []image.Volume
	release    release
	signatures []byte
	secureBoot bool
	noTPM      error // what OpenTPM says
	files      string
	tags       map[string]int // see fakeStorage.authenticated
	rand       io.Reader      // nil is crypto/rand
	// Where they are not empty, what the release's spec says and what was booted.
	policy  image.SealPolicy
	version string
	slot    string
	onTrial bool
	log     []byte // the firmware's event log
	// authorisation is what lies on the ESP.
	authorisation func() ([]byte, error)
}

// newBox is a box as it leaves the factory, switched on, with n volumes.
func newBox(t testing.TB, n int) *box {
	t.Helper()
	b := &box{t: t, tpm: sealtest.Start(t), release: release1, secureBoot: true, files: t.TempDir(), tags: map[string]int{}}
	b.signatures = b.release.sign(t, vendorKey())
	disk := partition.NewMemory(int64(n) * volumeBytes)
	for i := range n {
		name := []string{"data", "media", "cache"}[i]
		b.volumes = append(b.volumes, image.Volume{Name: name, Mount: "/" + name})
		dirty(t, disk, int64(i)*volumeBytes)
	}
	b.disk = disk
	b.powerOn()
	return b
}

// dirty fills the places of headers, some key areas and some data of a volume
// with what an earlier life left there, and marks it as unprovisioned.
func dirty(t testing.TB, dev partition.Device, at int64) {
	t.Helper()
	noise := make([]byte, 64<<10)
	mathrand.NewChaCha8([32]byte{byte(at >> 20)}).Read(noise)
	marker := make([]byte, 4096)
	copy(marker, partition.UnprovisionedMarker)
	for _, w := range []struct {
		off int64
		b   []byte
	}{{0, noise}, {300 << 10, noise}, {5 << 20, noise}, {16 << 20, noise}, {0, marker}} {
		if _, err := dev.WriteAt(w.b, at+w.off); err != nil {
			t.Fatal(err)
		}
	}
}

// powerOn plays the firmware and the stub of a boot.
func (b *box) powerOn() {
	b.t.Helper()
	b.tpm.Reset()
	for i := range 8 {
		what := fmt.Sprintf("firmware %d", i)
		if i == 7 {
			what = b.release.pcr7
		}
		b.tpm.Extend(i, what)
	}
	b.measureUKI()
}

func (b *box) measureUKI() {
	b.t.Helper()
	for _, s := range b.release.sections() {
		b.tpm.Extend(11, s[0]+"\x00")
		b.tpm.Extend(11, s[1])
	}
}

func (b *box) description() image.Boot {
	der, err := x509.MarshalPKIXPublicKey(&vendorKey().PublicKey)
	if err != nil {
		b.t.Fatal(err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	policy := b.policy
	policy.PolicyKeyPEM = string(key)
	policy.Policy = cmp.Or(policy.Policy, seal.PolicyStandard)
	return image.Boot{Appliance: image.Appliance{Name: "testbox", Version: cmp.Or(b.version, "1"), Volumes: b.volumes, Seal: policy}}
}

func (b *box) parts() (parts []Partition) {
	for i, v := range b.volumes {
		dev := partition.Section(b.disk, int64(i)*volumeBytes, volumeBytes)
		parts = append(parts, Partition{Volume: v, Number: i + 4, Device: dev})
	}
	return parts
}

func (b *box) fresh(i int) bool {
	b.t.Helper()
	fresh, err := partition.Unprovisioned(b.parts()[i].Device)
	if err != nil {
		b.t.Fatal(err)
	}
	return fresh
}

// session is one run of the agent's initrd.
type session struct {
	*box
	m       *Machine
	status  Status
	console *console
	log     *recordedLog
	storage *fakeStorage
	tpmLog  *commandLog
	opened  int // calls of OpenTPM
}

// session prepares a run, with what a person types at the console.
func (b *box) session(typed string) *session {
	s := &session{
		box: b, console: &console{in: strings.NewReader(typed)}, log: &recordedLog{},
		storage: &fakeStorage{files: b.files, mapped: map[string]*mapping{}, authenticated: b.tags}, tpmLog: &commandLog{TPM: b.tpm},
	}
	s.m = &Machine{
		Log: slog.New(s.log.handler()), Console: s.console, Storage: s.storage, Root: b.t.TempDir(), Rand: b.rand,
		// Some tests make a hundred volumes and boxes; package luks2 tests the real figure.
		RecoveryMemoryKiB: 1024,
		OpenTPM: func() (seal.TPM, error) {
			s.opened++
			return s.tpmLog, b.noTPM
		},
		Signatures: func() ([]byte, error) {
			if b.signatures == nil {
				return nil, &fs.PathError{Op: "open", Path: "/.extra/tpm2-pcr-signature.json", Err: fs.ErrNotExist}
			}
			return b.signatures, nil
		},
		SecureBoot: func() (bool, error) { return b.secureBoot, nil },
		EventLog: func() ([]byte, error) {
			if b.log == nil {
				return nil, fs.ErrNotExist
			}
			return b.log, nil
		},
		Slot: b.slot, OnTrial: b.onTrial, Authorisation: b.authorisation,
	}
	return s
}

// open opens the volumes without measuring a phase.
func (s *session) open() error {
	return s.m.OpenVolumes(s.description(), s.parts(), &s.status)
}

// boot is the agent's part of a boot after powerOn: phase, volumes, phase.
func (b *box) boot(typed string) (*session, error) {
	b.t.Helper()
	s := b.session(typed)
	if err := s.m.EnterPhase(phaseEnterInitrd); err != nil {
		b.t.Fatal(err)
	}
	if err := s.open(); err != nil {
		return s, err
	}
	return s, s.m.Leave(&s.status)
}

// mustBoot wants every volume open by the given method.
func (b *box) mustBoot(typed, method string) *session {
	b.t.Helper()
	s, err := b.boot(typed)
	if err != nil {
		b.t.Fatalf("%v\nconsole: %s", err, s.console.out.String())
	}
	s.wantOpen(method)
	return s
}

func (s *session) wantOpen(method string) {
	s.t.Helper()
	if len(s.status.Volumes) != len(s.volumes) {
		s.t.Fatalf("%d volumes in the status, want %d", len(s.status.Volumes), len(s.volumes))
	}
	for i, v := range s.status.Volumes {
		if v.Method != method {
			s.t.Errorf("volume %s opened by %s, want %s; console: %s", v.Name, v.Method, method, s.console.out.String())
		}
		if s.fresh(i) {
			s.t.Errorf("volume %s is open and still marked as unprovisioned", v.Name)
		}
		if !s.storage.isMounted(filepath.Join(s.m.Root, v.Mount)) {
			s.t.Errorf("volume %s is not mounted", v.Name)
		}
	}
	for _, k := range s.storage.keys {
		if !bytes.Equal(k, make([]byte, len(k))) {
			s.t.Error("a volume key was not wiped")
		}
	}
}

var recoveryKeyPattern = regexp.MustCompile(`[cbdefghijklnrtuv]{8}(-[cbdefghijklnrtuv]{8}){7}`)

// recoveryKey is the one that the console showed.
func (s *session) recoveryKey() string {
	s.t.Helper()
	keys := recoveryKeyPattern.FindAllString(s.console.out.String(), -1)
	if len(keys) != 1 {
		s.t.Fatalf("the console shows %d recovery keys, want 1", len(keys))
	}
	return keys[0]
}

const customerBlock = 4096 // where the customer's data lies in a mapping

// write puts a customer's data on every volume; wantData wants it back.
func (s *session) write(text string) {
	s.t.Helper()
	for _, v := range s.status.Volumes {
		block := make([]byte, blockBytes)
		copy(block, text+" on "+v.Name)
		m := s.storage.mapped[v.Device]
		if err := errors.Join(m.write(block, customerBlock), m.dev.Sync()); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *session) wantData(text string) {
	s.t.Helper()
	for _, v := range s.status.Volumes {
		block, err := s.storage.mapped[v.Device].read(customerBlock)
		if err != nil {
			s.t.Fatal(err)
		}
		if got, want := string(bytes.TrimRight(block, "\x00")), text+" on "+v.Name; got != want {
			s.t.Errorf("volume %s holds %.40q, want %q", v.Name, got, want)
		}
	}
}

// console is what a person sees and types.
type console struct {
	in  io.Reader
	out bytes.Buffer
	// saw is told of each thing printed.
	saw func(text string)
}

func (c *console) Read(p []byte) (int, error) { return c.in.Read(p) }

func (c *console) Write(p []byte) (int, error) {
	if c.saw != nil {
		c.saw(string(p))
	}
	return c.out.Write(p)
}

// recordedLog keeps everything logged at any level, twice: as text and as JSON,
// because the two format values differently.
type recordedLog struct {
	text, json bytes.Buffer
	saw        func(message string)
}

func (l *recordedLog) handler() slog.Handler {
	o := &slog.HandlerOptions{Level: slog.LevelDebug}
	return &teeHandler{l, slog.NewTextHandler(&l.text, o), slog.NewJSONHandler(&l.json, o)}
}

type teeHandler struct {
	l          *recordedLog
	text, json slog.Handler
}

func (h *teeHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *teeHandler) Handle(ctx context.Context, r slog.Record) error {
	if h.l.saw != nil {
		h.l.saw(r.Message)
	}
	return errors.Join(h.text.Handle(ctx, r), h.json.Handle(ctx, r))
}

func (h *teeHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return &teeHandler{h.l, h.text.WithAttrs(a), h.json.WithAttrs(a)}
}

func (h *teeHandler) WithGroup(name string) slog.Handler {
	return &teeHandler{h.l, h.text.WithGroup(name), h.json.WithGroup(name)}
}

// commandLog counts the TPM's commands by code, and those that succeeded.
type commandLog struct {
	seal.TPM
	sent, done map[uint32]int
	broken     bool // from now on nothing comes back
}

const commandUnseal = 0x15e // TPM_CC_Unseal, Part 2 §6.5.2

func (c *commandLog) Send(command []byte) ([]byte, error) {
	if c.sent == nil {
		c.sent, c.done = map[uint32]int{}, map[uint32]int{}
	}
	code := binary.BigEndian.Uint32(command[6:])
	c.sent[code]++
	if c.broken {
		return nil, errors.New("the bus is dead")
	}
	rsp, err := c.TPM.Send(command)
	if err == nil && binary.BigEndian.Uint32(rsp[6:]) == 0 {
		c.done[code]++
	}
	return rsp, err
}

const blockBytes = 4096

// fakeStorage is a kernel: it decrypts by XTS of its own, its file system is a
// checked block that names a folder with the files.
type fakeStorage struct {
	files  string
	mapped map[string]*mapping
	mounts []string
	keys   [][]byte // the callers' slices
	fail   string   // the operation that fails
	// authenticated are the keys of volumes whose tags were made, on this box.
	authenticated map[string]int
}

type mapping struct {
	dev          partition.Device
	offset, size int64
	cipher       *xts.Cipher
	volumeKey    []byte
}

var errStorage = errors.New("the kernel said no")

func (s *fakeStorage) Map(v Partition, h *luks2.Header, key []byte) (string, error) {
	if s.fail == "map "+v.Name {
		return "", errStorage
	}
	offset, size, sector, cipher := h.Segment()
	if cipher != "aes-xts-plain64" || sector != blockBytes || len(key) != luks2.KeyBytes(h.Integrity()) || offset+size > v.Device.Size() {
		return "", fmt.Errorf("dm-crypt does not take %s, sectors of %d, key of %d, %d+%d", cipher, sector, len(key), offset, size)
	}
	device := "/dev/mapper/" + v.Name
	if s.mapped[device] != nil {
		return "", errors.New("device or resource busy")
	}
	if h.Integrity() != "" && s.authenticated[string(key)] == 0 {
		return "", errors.New("dm-integrity: the device is not initialized")
	}
	x, err := xts.NewCipher(aes.NewCipher, key[:luks2.VolumeKeyBytes])
	if err != nil {
		return "", err
	}
	s.keys = append(s.keys, key)
	s.mapped[device] = &mapping{dev: v.Device, offset: offset, size: size, cipher: x, volumeKey: bytes.Clone(key)}
	return device, nil
}

// Authenticate notes the key: tags are the kernel's, and are not played here.
func (s *fakeStorage) Authenticate(v Partition, h *luks2.Header, key []byte, progress func(done, all int64)) error {
	if s.fail == "authenticate "+v.Name {
		return errStorage
	}
	_, size, _, _ := h.Segment()
	for done := size / 4; done <= size; done += size / 4 {
		progress(done, size)
	}
	s.authenticated[string(key)]++
	return nil
}

func (m *mapping) read(off int64) ([]byte, error) {
	b := make([]byte, blockBytes)
	_, err := m.dev.ReadAt(b, m.offset+off)
	m.cipher.Decrypt(b, b, uint64(off/512))
	return b, err
}

func (m *mapping) write(b []byte, off int64) error {
	sealed := make([]byte, blockBytes)
	m.cipher.Encrypt(sealed, b, uint64(off/512))
	_, err := m.dev.WriteAt(sealed, m.offset+off)
	return err
}

// fileSystem is the first block; its checksum stands for fsck.
type fileSystem struct {
	ID    [16]byte
	Label [48]byte
}

func (s *fakeStorage) MakeFS(device, label string) error {
	if s.fail == "mkfs "+label {
		return errStorage
	}
	var f fileSystem
	rand.Read(f.ID[:])
	copy(f.Label[:], label)
	b, err := binary.Append(nil, binary.LittleEndian, f)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	block := append(append(b, sum[:]...), make([]byte, blockBytes-len(b)-len(sum))...)
	m := s.mapped[device]
	return errors.Join(m.write(block, 0), m.dev.Sync())
}

func (m *mapping) fileSystem() (f fileSystem, err error) {
	b, err := m.read(0)
	if err != nil {
		return f, err
	}
	n, err := binary.Decode(b, binary.LittleEndian, &f)
	if err != nil {
		return f, err
	}
	if sum := sha256.Sum256(b[:n]); !bytes.Equal(sum[:], b[n:n+len(sum)]) {
		return f, errors.New("wrong fs type, bad superblock")
	}
	return f, nil
}

func (s *fakeStorage) Mount(device, at string) error {
	if s.fail == "mount "+filepath.Base(at) {
		return errStorage
	}
	f, err := s.mapped[device].fileSystem()
	if err != nil {
		return err
	}
	dir := filepath.Join(s.files, hex.EncodeToString(f.ID[:]))
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.MkdirAll(filepath.Dir(at), 0o700)); err != nil {
		return err
	}
	s.mounts = append(s.mounts, at)
	return os.Symlink(dir, at)
}

func (s *fakeStorage) isMounted(at string) bool {
	for _, m := range s.mounts {
		if m == at {
			return true
		}
	}
	return false
}

func (s *fakeStorage) Unmap(v Partition) error {
	delete(s.mapped, "/dev/mapper/"+v.Name)
	return nil
}
