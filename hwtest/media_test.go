package hwtest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf16"

	"filippo.io/age"
	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/holdfast-os/holdfast/agent"
	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/update"
)

// certificateFor makes a vendor's own certificate for a server at this address.
func certificateFor(t *testing.T, ip string) (_ tls.Certificate, pemText []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test vendor"}, IPAddresses: []net.IP{net.ParseIP(ip)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// newRegistry is a container registry that two doors lead to: the vendor's, without
// TLS on this machine, and the fleet's, with the vendor's own certificate.
func newRegistry(t *testing.T) (vendor, fleet, caPath string) {
	t.Helper()
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(t.TempDir())))
	in := httptest.NewServer(h)
	t.Cleanup(in.Close)
	certificate, text := certificateFor(t, guestHost)
	out := httptest.NewUnstartedServer(h)
	out.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	out.Config.ErrorLog = log.New(io.Discard, "", 0)
	out.StartTLS()
	t.Cleanup(out.Close)
	caPath = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caPath, text, 0o644); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(out.URL)
	if err != nil {
		t.Fatal(err)
	}
	const name = "/fleet/probe:stable"
	return "oci://" + strings.TrimPrefix(in.URL, "http://") + name, "oci://" + guestHost + ":" + u.Port() + name, caPath
}

// push publishes the repository as it is in a registry.
func (w *webServer) push(t *testing.T, address string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holdfast(t, "repo", "push", w.repository(t), address)
}

// TestStickPulledOut: in the middle of an installation. The box says so and goes on;
// plugged in again, the stick does what it was brought for, and only once. The release
// that it brought follows a container registry.
func TestStickPulledOut(t *testing.T) {
	t.Parallel()
	vendor, fleet, ca := newRegistry(t)
	followsRegistry := func(s *spec.Spec) { s.Update.URL, s.Update.CA = fleet, ca }
	first := buildRelease(t, t.TempDir(), theProduct(t).keys, "5.0.0", followsRegistry)
	nextRelease(t, "5.1.0", followsRegistry)
	nextRelease(t, "5.2.0", followsRegistry)
	web.push(t, vendor)
	dir := t.TempDir()
	bundle, stick := filepath.Join(dir, "probe.bundle"), filepath.Join(dir, "stick.img")
	web.bundle(t, "5.1.0", bundle)
	tool(t, "truncate", "-s", "256M", stick)
	tool(t, "mkfs.vfat", "-F", "32", stick)
	tool(t, "mcopy", "-i", stick, bundle, "::PROBE.BUNDLE")

	m, _ := aBox(t, true)
	install(t, m.Disk, first, 0)
	m.PowerOn()
	m.Expect(`boot confirmed slot=b version=5.0.0`, bootTime)
	if err := m.VM().PlugSlow(stick, 2<<20); err != nil {
		t.Fatal(err)
	}
	m.Expect(`installing version=5.1.0 percent=\d`, bootTime)
	if err := m.VM().Unplug(); err != nil {
		t.Fatal(err)
	}
	why := m.Expect(`not installed from=medium:\S* why=([^\r\n]*)`, bootTime)[1]
	m.Expect(`warn: medium device=/dev/vdb error=`, bootTime)
	wantRecord(t, m, "first", "kept")
	s := updateStatus(t, m)
	if s.Doing != "" || s.LastError == "" || s.Version != "5.0.0" || len(s.Failed) != 0 {
		t.Errorf("after the stick was pulled out: %+v", s)
	}
	t.Logf("pulled out: %s", why)
	text, err := call(m, http.MethodGet, "/v1/status", "")
	if err != nil {
		t.Fatal(err)
	}
	var status agent.Status
	if err := json.Unmarshal([]byte(text), &status); err != nil || len(status.Slots) == 0 {
		t.Fatalf("%v: %s", err, text)
	}
	for _, e := range status.Slots {
		if e.Slot == "b" && (e.State != "good" || !e.Running) {
			t.Errorf("the slot that runs: %+v", e)
		}
	}

	if err := m.VM().Plug(stick, false); err != nil {
		t.Fatal(err)
	}
	m.Expect(`installed version=5.1.0 slot=a from=medium:`, bootTime)
	m.Expect(`blessed slot=a version=5.1.0`, bootTime)
	m.Expect(`not installed from=medium:.*nothing to install`, bootTime)
	before := jsonText(updateStatus(t, m).Journal)
	time.Sleep(10 * time.Second) // several looks at what is plugged in
	if after := jsonText(updateStatus(t, m).Journal); after != before {
		t.Errorf("the stick was left in, and the journal went from %s to %s", before, after)
	}
	if at := strings.LastIndex(m.Console(), "nothing to install"); strings.Contains(m.Console()[at:], "medium") {
		t.Errorf("the stick was looked at again:\n%s", m.Console()[at:])
	}
	wantRecord(t, m, "first", "kept")

	t.Run("from a registry", func(t *testing.T) { updateFromRegistry(t, m, fleet) })
}

func updateFromRegistry(t *testing.T, m *hwtest.Machine, fleet string) {
	if err := apply(m, "5.2.0"); err != nil {
		t.Fatal(err)
	}
	checkMemory(t, m, "after an installation")
	reboot(t, m)
	m.Expect(`blessed slot=b version=5.2.0`, bootTime)
	wantRecord(t, m, "first", "kept")
	s := updateStatus(t, m)
	n := len(s.Journal)
	if s.URL != fleet || n < 2 || s.Journal[n-1].Result != update.Committed || s.Journal[n-2].Result != update.Applied || s.Journal[n-2].Source != fleet {
		t.Errorf("after the trial: %+v", s)
	}
}

// TestFileSystemBombs plugs in what nobody should, one stick after another. The box
// goes on, is none the poorer, writes to none of them, and takes a good stick then.
func TestFileSystemBombs(t *testing.T) {
	t.Parallel()
	p := nextRelease(t, "6.0.0", func(s *spec.Spec) {
		web := &s.Services[0] // it shows the agent's mounts
		web.Binds = append(web.Binds, spec.Bind{Source: "/proc", Destination: "/hostproc", Options: []string{"ro"}})
		web.Capabilities = append(web.Capabilities, "CAP_SYS_PTRACE")
		s.Update.FleetKey = fleetKey(t)
		s.Update.URL = "" // what other tests publish meanwhile would make the bundle an old one
	})
	bundle := filepath.Join(t.TempDir(), "probe.bundle")
	web.bundle(t, "6.0.0", bundle)
	m, _ := aBox(t, true)
	install(t, m.Disk, p, 0)
	m.PowerOn()
	m.Expect(`boot confirmed slot=b version=6.0.0`, bootTime)
	b := &bombs{t: t, dir: t.TempDir()}
	for _, stick := range []struct {
		name, image string
		last        string // what the box says of it in the end
	}{
		{"noise, partitions in a circle", b.noise(), `medium device=/dev/vdb\d* `},
		{"FAT", b.stick(b.fat()...), `medium device=/dev/vdb9 `},
		{"ext4", b.stick(b.ext4()...), `medium device=/dev/vdb9 `},
		{"exFAT", b.stick(b.exfat()...), `medium device=/dev/vdb9 `},
		{"128 partitions", b.many(), `on the medium device=/dev/vdb99`},
		{"names", b.names(), `not installed from=medium:zz-last.bundle`},
	} {
		before := b.sum(stick.image)
		b.plug(m, stick.image, stick.last)
		if b.sum(stick.image) != before {
			t.Errorf("%s: the stick was written to", stick.name)
		}
		b.wantAlive(m, stick.name)
	}
	// The outcome is written to these two.
	b.plug(m, b.lyingFiles(bundle), `not installed from=medium:long.bundle`)
	b.wantAlive(m, "files that lie")
	good := b.goodExFAT(bundle)
	b.plug(m, good, `not installed from=medium:\S*good\.bundle why=[^\r\n]*nothing to install[^\r\n]*6\.0\.0`)
	b.wantAlive(m, "a good stick")
	tool(t, "fsck.exfat", "-n", good)
	if text, err := os.ReadFile(good); err != nil || !bytes.Contains(text, []byte(`"product": "probe"`)) {
		t.Errorf("no outcome on the good stick: %v", err)
	}
	checkMemory(t, m, "after the sticks")
	if s := updateStatus(t, m); len(s.Journal) > 25 || len(s.LastError) > 2000 || s.Pending != nil || len(s.Failed) != 0 {
		t.Errorf("after the sticks: %+v", s)
	}
	wantRecord(t, m, "first", "kept")
	for _, bad := range []string{"Kernel panic", "BUG:", "Oops", "lockup", "blocked for more than", "general protection"} {
		if strings.Contains(m.Console(), bad) {
			t.Errorf("the console says %q", bad)
		}
	}
}

// fleetKey makes what opens encrypted bundles.
func fleetKey(t *testing.T) (path string) {
	t.Helper()
	k, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "fleet.key")
	if err := os.WriteFile(path, []byte(k.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// bombs makes sticks.
type bombs struct {
	t   *testing.T
	dir string
	n   int
}

func (b *bombs) sum(path string) string {
	b.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		b.t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// plug plugs a stick in, waits for what the box says of it, and pulls it out.
func (b *bombs) plug(m *hwtest.Machine, image, last string) {
	b.t.Helper()
	if err := m.VM().Plug(image, false); err != nil {
		b.t.Fatal(err)
	}
	began := time.Now()
	m.Expect(last, 2*time.Minute)
	time.Sleep(3 * time.Second) // the rest of that look, and another one
	if err := m.VM().Unplug(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Logf("%s: %v", filepath.Base(image), time.Since(began).Round(time.Second))
}

// wantAlive asks the box's service, and whether a medium is still mounted.
func (b *bombs) wantAlive(m *hwtest.Machine, after string) {
	b.t.Helper()
	if _, err := call(m, http.MethodGet, "/health", ""); err != nil {
		b.t.Fatalf("after %s: %v", after, err)
	}
	mounts, err := call(m, http.MethodGet, "/file?path=/hostproc/1/mountinfo", "")
	if err != nil || !strings.Contains(mounts, " /data ") {
		b.t.Fatalf("after %s: the agent's mounts: %v\n%s", after, err, mounts)
	}
	if strings.Contains(mounts, "/run/holdfast/media") {
		b.t.Errorf("after %s: the medium is still mounted:\n%s", after, mounts)
	}
}

// file is a new file of so many bytes, all zero.
func (b *bombs) file(name string, sizeBytes int64) string {
	b.t.Helper()
	b.n++
	path := filepath.Join(b.dir, fmt.Sprintf("%02d-%s", b.n, name))
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Truncate(path, sizeBytes); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// edit changes the bytes at off.
func (b *bombs) edit(path string, off int64, change func(text []byte), sizeBytes int) {
	b.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	text := make([]byte, sizeBytes)
	if _, err := f.ReadAt(text, off); err != nil {
		b.t.Fatal(err)
	}
	change(text)
	if _, err := f.WriteAt(text, off); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bombs) put(path string, off int64, text []byte) {
	b.t.Helper()
	b.edit(path, off, func(at []byte) { copy(at, text) }, len(text))
}

func (b *bombs) put32(path string, off int64, v uint32) {
	b.t.Helper()
	b.put(path, off, binary.LittleEndian.AppendUint32(nil, v))
}

func randomBytes(seed uint64, n int) []byte {
	text := make([]byte, n)
	r := mathrand.New(mathrand.NewPCG(seed, 0))
	for i := range text {
		text[i] = byte(r.Uint32())
	}
	return text
}

// noise has an MBR whose extended partition begins with a table that leads to itself.
func (b *bombs) noise() string {
	path := b.file("noise", 8<<20)
	text := randomBytes(1, 8<<20)
	for sector, entry := range map[int][]byte{
		0: {0, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0xff, 0x3f, 0, 0},
		8: {0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0xff, 0x3f, 0, 0},
	} {
		table := text[sector*512+446 : sector*512+512]
		clear(table)
		copy(table, entry)
		copy(table[64:], "\x55\xaa")
	}
	b.put(path, 0, text)
	return path
}

// stick puts up to eight partitions and then one of noise on a stick.
func (b *bombs) stick(parts ...string) string {
	b.t.Helper()
	if len(parts) != 8 {
		b.t.Fatalf("%d partitions", len(parts))
	}
	marker := b.file("marker", 1<<20)
	b.put(marker, 0, randomBytes(2, 1<<20))
	return b.gpt(append(slices.Clone(parts), marker))
}

// gpt makes a stick with these partitions.
func (b *bombs) gpt(parts []string) string {
	b.t.Helper()
	const sector, align = 512, 2048
	args, at, starts := []string{"-a", "1"}, int64(align), []int64{}
	for i, p := range parts {
		info, err := os.Stat(p)
		if err != nil {
			b.t.Fatal(err)
		}
		sectors := info.Size() / sector
		args = append(args, "-n", fmt.Sprintf("%d:%d:%d", i+1, at, at+sectors-1))
		starts = append(starts, at*sector)
		at += (sectors + align - 1) / align * align
	}
	disk := b.file("stick", (at+align)*sector)
	tool(b.t, "sgdisk", append(args, disk)...)
	for i, p := range parts {
		b.copy(disk, starts[i], p)
	}
	return disk
}

// copy writes a file into another, without its zeros.
func (b *bombs) copy(to string, off int64, from string) {
	b.t.Helper()
	src, err := os.Open(from)
	if err != nil {
		b.t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	defer dst.Close()
	block, zeros := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(src, block)
		if n > 0 && !bytes.Equal(block[:n], zeros[:n]) {
			if _, err := dst.WriteAt(block[:n], off); err != nil {
				b.t.Fatal(err)
			}
		}
		if off += int64(n); err != nil {
			return
		}
	}
}

// Offsets in a FAT's first sector (Microsoft FAT specification, section 3) and where
// mkfs.vfat -R 32 -f 1 puts the table.
const (
	fatTable   = 32 * 512
	fatCluster = 512
)

// fat32 is a FAT32 with one-sector clusters and one table.
func (b *bombs) fat32(name string) string {
	path := b.file(name, 64<<20)
	tool(b.t, "mkfs.vfat", "-F", "32", "-s", "1", "-R", "32", "-f", "1", path)
	return path
}

// cluster is where a cluster's content begins; mkfs.vfat says how long the table is.
func (b *bombs) cluster(path string, n int64) int64 {
	var sectors uint32
	b.edit(path, 36, func(at []byte) { sectors = binary.LittleEndian.Uint32(at) }, 4)
	return fatTable + int64(sectors)*512 + (n-2)*fatCluster
}

// fatFolder fills a cluster with entries of empty files.
func fatFolder(cluster int) []byte {
	var text []byte
	for i := range fatCluster / 32 {
		entry := make([]byte, 32)
		copy(entry, fmt.Sprintf("%-8sTXT", fmt.Sprintf("F%d_%d", cluster, i)))
		text = append(text, entry...)
	}
	return text
}

// fat are file systems that begin as a FAT does.
func (b *bombs) fat() (list []string) {
	absurd := b.file("fat-noise", 4<<20)
	b.put(absurd, 0, randomBytes(3, 4<<20))
	b.put(absurd, 82, []byte("FAT32   "))
	b.put(absurd, 510, []byte("\x55\xaa"))
	for _, change := range []func(bpb []byte){
		func(bpb []byte) { bpb[13] = 0 },                                        // sectors in a cluster
		func(bpb []byte) { copy(bpb[32:], "\xff\xff\xff\xff\xff\xff\xff\x7f") }, // sectors, and of the table
		func(bpb []byte) { copy(bpb[44:], "\xf0\xff\xff\x0f") },                 // the root
		func(bpb []byte) { bpb[11], bpb[12], bpb[16] = 0, 0x80, 255 },           // bytes in a sector, tables
	} {
		path := b.fat32("fat-absurd")
		b.edit(path, 0, change, 90)
		list = append(list, path)
	}
	// The root and the folder that is looked for go in circles, full of names.
	root := b.fat32("fat-root-circle")
	for n, next := range map[int64]uint32{2: 3, 3: 4, 4: 2} {
		b.put32(root, fatTable+4*n, next)
		b.put(root, b.cluster(root, n), fatFolder(int(n)))
	}
	folder := b.fat32("fat-folder-circle")
	tool(b.t, "mmd", "-i", folder, "::HOLDFAST", "::METADATA")
	for n := int64(3); n < 5; n++ {
		b.put32(folder, fatTable+4*n, uint32(n))
		b.put(folder, b.cluster(folder, n), fatFolder(int(n)))
	}
	small := b.file("fat-12", 1<<20)
	tool(b.t, "mkfs.vfat", "-F", "12", small)
	b.edit(small, 0, func(bpb []byte) { copy(bpb[14:], "\xff\xff"); copy(bpb[17:], "\xf0\xff") }, 64)
	return append(list, absurd, root, folder, small)
}

// lyingFiles are a bundle whose clusters go in a circle, and one of 4 EiB.
func (b *bombs) lyingFiles(bundle string) string {
	path := b.fat32("fat-file-circle")
	tool(b.t, "mcopy", "-i", path, bundle, "::PROBE.BUNDLE")
	b.put32(path, fatTable+4*200, 100) // 100 KiB into the bundle it begins again
	long := b.newExFAT("exfat-long", 16<<20)
	long.add("long.bundle", []byte("holdfast-bundle"), 1<<62)
	return b.gpt([]string{path, long.path})
}

// ext4 are file systems whose superblock (at byte 1024) or root lies.
func (b *bombs) ext4() (list []string) {
	volume := func(name string, args ...string) string {
		path := b.file("ext4-"+name, 16<<20)
		tool(b.t, "mkfs.ext4", append([]string{"-q", "-O", "^metadata_csum,^64bit", "-b", "1024", "-I", "256"}, append(args, path)...)...)
		list = append(list, path)
		return path
	}
	const super = 1024
	b.put32(volume("size"), super+4, 0xfffffff0)         // s_blocks_count_lo
	b.put32(volume("block"), super+24, 31)               // s_log_block_size
	b.put(volume("groups"), super+32, make([]byte, 12))  // blocks, clusters and inodes per group
	b.put(volume("inode"), super+88, []byte{0xff, 0xff}) // s_inode_size
	b.put32(volume("checksum", "-O", "metadata_csum"), super+1020, 0x12345678)
	// Its journal waits to be replayed, which would write to the stick.
	replay := volume("journal")
	b.edit(replay, super+96, func(incompat []byte) { incompat[0] |= 4 }, 4)
	// The root's inode, 2, is no folder.
	inode := volume("root")
	b.put(inode, b.ext4Block(inode, "imap <2>"), randomBytes(4, 128))
	// The root's content is noise, and the kernel is to panic when it sees that.
	panics := volume("panic")
	tool(b.t, "tune2fs", "-e", "panic", panics)
	b.put(panics, b.ext4Block(panics, "blocks <2>"), randomBytes(5, 1024))
	return list
}

// ext4Block asks debugfs where something lies: "blocks" prints the block's number,
// "imap" a line with block and offset.
func (b *bombs) ext4Block(path, command string) int64 {
	b.t.Helper()
	out := tool(b.t, "debugfs", "-R", command, path)
	out = out[strings.IndexByte(out, '\n')+1:] // its version
	var block, offset int64
	if i := strings.Index(out, "located at block "); i >= 0 {
		if _, err := fmt.Sscanf(out[i:], "located at block %d, offset 0x%x", &block, &offset); err != nil {
			b.t.Fatalf("debugfs: %v\n%s", err, out)
		}
	} else if _, err := fmt.Sscan(out, &block); err != nil {
		b.t.Fatalf("debugfs: %v\n%s", err, out)
	}
	return block*1024 + offset
}

// names is an ext4 with 20,000 files, things that are no files, and odd names.
func (b *bombs) names() string {
	b.t.Helper()
	dir := b.t.TempDir()
	write := func(name string, text []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	for i := range 20_000 {
		write(fmt.Sprintf("%05d.jpg", i), nil)
	}
	for _, name := range []string{"\x1b[2J\x1b]0;owned\a", "line\nFAILED", "\xff\xfe", "-rf", " ", "\u202ecilbup", "$(reboot)", strings.Repeat("x", 240)} {
		write(name+".bundle", randomBytes(6, 2048))
	}
	write("age.bundle", append([]byte("age-encryption.org/v1\n-> X25519 "), bytes.Repeat([]byte{'a'}, 3<<20)...))
	write("huge.bundle", []byte("holdfast-bundle"))
	write("zz-last.bundle", nil)
	for name, target := range map[string]string{"disk.bundle": "/dev/vda", "zero.bundle": "/dev/zero", "up.bundle": "../../../etc/passwd", "holdfast": "/data", "metadata": "/"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "folder.bundle"), 0o700); err != nil {
		b.t.Fatal(err)
	}
	for name, mode := range map[string]uint32{"fifo.bundle": syscall.S_IFIFO, "char.bundle": syscall.S_IFCHR, "block.bundle": syscall.S_IFBLK} {
		if err := syscall.Mknod(filepath.Join(dir, name), mode|0o600, 1<<8|5); err != nil {
			b.t.Fatalf("mknod: %v; the test needs root", err)
		}
	}
	path := b.file("names", 128<<20)
	tool(b.t, "mkfs.ext4", "-q", "-N", "40000", "-d", dir, path)
	tool(b.t, "debugfs", "-w", "-R", fmt.Sprintf("set_inode_field huge.bundle size %d", int64(1)<<40), path)
	return path
}

// many has as many partitions as a GPT has room for; number 99 is looked at last.
func (b *bombs) many() string {
	small := b.file("small", 1<<20)
	tool(b.t, "mkfs.vfat", "-F", "12", small)
	tool(b.t, "mmd", "-i", small, "::PICTURES")
	var list []string
	for range 128 {
		list = append(list, small)
	}
	return b.gpt(list)
}

// exVolume is an exFAT (Microsoft exFAT specification, revision 1.00) on a file.
type exVolume struct {
	*bombs
	path                             string
	fat, heap, clusterBytes, cluster int64 // cluster is the root's
}

// newExFAT has the tool make one.
func (b *bombs) newExFAT(name string, sizeBytes int64) *exVolume {
	b.t.Helper()
	v := &exVolume{bombs: b, path: b.file(name, sizeBytes)}
	tool(b.t, "mkfs.exfat", v.path)
	b.edit(v.path, 0, func(boot []byte) { // §3.1
		sector := int64(1) << boot[108]
		at := func(i int) int64 { return int64(binary.LittleEndian.Uint32(boot[i:])) }
		v.fat, v.heap, v.clusterBytes, v.cluster = at(80)*sector, at(88)*sector, sector<<boot[109], at(96)
	}, 512)
	return v
}

func (v *exVolume) at(cluster int64) int64 { return v.heap + (cluster-2)*v.clusterBytes }

// entry is where the root's entry of this type is.
func (v *exVolume) entry(kind byte) (off int64) {
	v.t.Helper()
	v.edit(v.path, v.at(v.cluster), func(root []byte) {
		for i := 0; i < len(root); i += 32 {
			if root[i] == kind && off == 0 {
				off = v.at(v.cluster) + int64(i)
			}
		}
	}, int(v.clusterBytes))
	if off == 0 {
		v.t.Fatalf("%s has no entry of type %#x", v.path, kind)
	}
	return off
}

// boot changes the boot sector and makes its checksum right (§3.4).
func (v *exVolume) boot(change func(boot []byte)) {
	v.t.Helper()
	v.edit(v.path, 0, func(region []byte) {
		change(region)
		var sum uint32
		for i, c := range region[:11*512] {
			if i != 106 && i != 107 && i != 112 {
				sum = sum<<31 | sum>>1
				sum += uint32(c)
			}
		}
		for i := 11 * 512; i < len(region); i += 4 {
			binary.LittleEndian.PutUint32(region[i:], sum)
		}
	}, 12*512)
}

// rotate16 is the sum of §6.3.3 and §7.6.3.
func rotate16(sum uint16, c byte) uint16 { return sum<<15 | sum>>1 + uint16(c) }

// add writes a file with a short ASCII name, in clusters that follow one another.
func (v *exVolume) add(name string, content []byte, lengthBytes int64) {
	v.t.Helper()
	var bitmapCluster, bitmapBytes int64
	v.edit(v.path, v.entry(0x81), func(e []byte) {
		bitmapCluster, bitmapBytes = int64(binary.LittleEndian.Uint32(e[20:])), int64(binary.LittleEndian.Uint64(e[24:]))
	}, 32)
	clusters := (int64(len(content)) + v.clusterBytes - 1) / v.clusterBytes
	first := v.cluster + 1 // mkfs.exfat puts the root last
	v.edit(v.path, v.at(bitmapCluster), func(bits []byte) {
		for c := first - 2; c < first-2+clusters; c++ {
			bits[c/8] |= 1 << (c % 8)
		}
	}, int(bitmapBytes))
	v.put(v.path, v.at(first), content)

	text := utf16.Encode([]rune(name))
	set := make([]byte, 3*32)
	set[0], set[1], set[4] = 0x85, 2, 0x20
	for _, at := range []int{8, 12, 16} {
		binary.LittleEndian.PutUint32(set[at:], 46<<25|11<<21|21<<16) // 2026-11-21
	}
	set[32], set[33], set[35] = 0xc0, 3, byte(len(text))
	binary.LittleEndian.PutUint64(set[40:], uint64(lengthBytes))
	binary.LittleEndian.PutUint32(set[52:], uint32(first))
	binary.LittleEndian.PutUint64(set[56:], uint64(lengthBytes))
	set[64] = 0xc1
	var hash, sum uint16
	for i, c := range text {
		binary.LittleEndian.PutUint16(set[66+2*i:], c)
		upper := []byte(strings.ToUpper(string(rune(c))))[0]
		hash = rotate16(rotate16(hash, upper), 0)
	}
	binary.LittleEndian.PutUint16(set[36:], hash)
	for i, c := range set {
		if i != 2 && i != 3 {
			sum = rotate16(sum, c)
		}
	}
	binary.LittleEndian.PutUint16(set[2:], sum)
	v.edit(v.path, v.at(v.cluster), func(root []byte) {
		i := 0
		for root[i] != 0 {
			i += 32
		}
		copy(root[i:], set)
	}, int(v.clusterBytes))
}

// exfat are file systems whose boot sector, bitmap, table or root lies.
func (b *bombs) exfat() (list []string) {
	volume := func(name string) *exVolume {
		v := b.newExFAT("exfat-"+name, 16<<20)
		list = append(list, v.path)
		return v
	}
	volume("sector").boot(func(boot []byte) { boot[108], boot[109] = 200, 200 })
	volume("clusters").boot(func(boot []byte) { copy(boot[92:], "\xff\xff\xff\xff") })
	volume("root").boot(func(boot []byte) { copy(boot[96:], "\xf0\xff\xff\xff") })
	bitmap := volume("bitmap") // beyond the end, and as large as can be said
	b.put(bitmap.path, bitmap.entry(0x81)+20, []byte("\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x7f"))
	table := volume("upcase")
	b.put(table.path, table.entry(0x82)+20, []byte("\x02\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\x7f"))
	// The root goes in a circle, with none of what it has to have.
	circle := volume("circle")
	b.put32(circle.path, circle.fat+4*circle.cluster, uint32(circle.cluster))
	b.put(circle.path, circle.at(circle.cluster), bytes.Repeat(append([]byte{0x05}, make([]byte, 31)...), int(circle.clusterBytes/32)))
	noise := volume("noise")
	b.put(noise.path, noise.at(noise.cluster), randomBytes(7, int(noise.clusterBytes)))
	volume("table").boot(func(boot []byte) { clear(boot[80:88]) })
	return list
}

// goodExFAT has a bundle, as one that was formatted by a large camera's owner has.
func (b *bombs) goodExFAT(bundle string) string {
	b.t.Helper()
	text, err := os.ReadFile(bundle)
	if err != nil {
		b.t.Fatal(err)
	}
	v := b.newExFAT("good", int64(len(text))+32<<20)
	v.add("good.bundle", text, int64(len(text)))
	tool(b.t, "fsck.exfat", "-n", v.path)
	return v.path
}
