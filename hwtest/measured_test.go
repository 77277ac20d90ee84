package hwtest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"

	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/hwtest"
	"github.com/holdfast-os/holdfast/image/initrd"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// measuring is a small system whose boots print what they measured.
type measuring struct {
	dir            string
	kernel, module []byte
	init           tree.File
	keys, newKeys  *keys.Keys
}

// bootSet is what a boot starts: a loader and a UKI, signed.
type bootSet struct {
	loader, uki partition.Bytes
	pcr.Release
}

// observed is what a boot printed.
type observed struct {
	pcrs  map[int]pcr.Digest
	files map[string][]byte
	log   pcr.Log
}

func newMeasuring(t *testing.T) *measuring {
	t.Helper()
	s := &measuring{dir: t.TempDir()}
	tool(t, "dpkg-deb", "-x", filepath.Join(inputs(t), "linux-image.deb"), filepath.Join(s.dir, "deb"))
	s.kernel = globbed(t, filepath.Join(s.dir, "deb/boot/vmlinuz-*"))
	s.module = globbed(t, filepath.Join(s.dir, "deb/lib/modules/*/kernel/fs/efivarfs/efivarfs.ko"))
	goBuild(t, filepath.Join(s.dir, "init"), "./testdata/measured")
	s.init = file(t, filepath.Join(s.dir, "init"))
	for name, into := range map[string]**keys.Keys{"keys": &s.keys, "newkeys": &s.newKeys} {
		k, err := keys.Create(filepath.Join(s.dir, name), keys.Config{Organization: "Vendor of " + name, Now: time.Now().Add(-time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		*into = k
	}
	return s
}

func globbed(t *testing.T, pattern string) []byte {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) != 1 {
		t.Fatalf("%s: %d files, %v", pattern, len(names), err)
	}
	b, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// set makes a loader and a UKI that differ from others by name, and let the
// firmware append to its variables.
func (s *measuring) set(t *testing.T, name string, loaderKey, ukiKey keys.Pair, payloads map[string][]byte) bootSet {
	t.Helper()
	root := tree.NewDir(0o755)
	put := func(path string, mode uint32, c tree.Content) {
		if _, err := root.MkdirAll(filepath.Dir(path), 0); err != nil {
			t.Fatal(err)
		}
		if err := root.Put(path, &tree.Node{Mode: 0o100000 | mode, Content: c}); err != nil {
			t.Fatal(err)
		}
	}
	put("/init", 0o755, s.init)
	put("/efivarfs.ko", 0o644, tree.Bytes(s.module))
	for variable, b := range payloads {
		put("/append/"+variable, 0o644, tree.Bytes(b))
	}
	if err := root.Put("/dev", tree.NewDir(0o755)); err != nil {
		t.Fatal(err)
	}
	if err := root.Put("/dev/console", &tree.Node{Mode: 0o020600, Major: 5, Minor: 1}); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := initrd.Write(&archive, root, initrd.Options{Compress: true}); err != nil {
		t.Fatal(err)
	}
	stub, err := os.ReadFile(filepath.Join(efiFolder, "linuxx64.efi.stub"))
	if err != nil {
		t.Fatal(err)
	}
	img, err := uki.Assemble(uki.Input{
		Stub: stub, Linux: tree.Bytes(s.kernel), Initrd: tree.Bytes(archive.Bytes()),
		OSRelease: []byte("NAME=" + name + "\nVERSION_ID=1\n"), Cmdline: "console=ttyS0 quiet loglevel=0 release=" + name, PCRPublicKey: s.keys.PolicyPublicPEM,
	})
	if err != nil {
		t.Fatal(err)
	}
	loader, err := os.ReadFile(filepath.Join(efiFolder, "systemd-bootx64.efi"))
	if err != nil {
		t.Fatal(err)
	}
	loader[0x3b] = name[0] // reserved in the DOS header, and in the digest
	b := bootSet{uki: signed(t, img, ukiKey), loader: signed(t, tree.Bytes(loader), loaderKey)}
	b.Release = pcr.Release{
		Loader: pcr.Program{Authenticode: authenticodeOf(t, b.loader), Certificate: pcr.Digest(sum(loaderKey.Cert.Raw))},
		UKI:    pcr.Program{Authenticode: authenticodeOf(t, b.uki), Certificate: pcr.Digest(sum(ukiKey.Cert.Raw))},
		Linux:  authenticodeOf(t, s.kernel),
		PCR11:  img.PCR11,
	}
	return b
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

func signed(t *testing.T, program uki.Blob, key keys.Pair) partition.Bytes {
	t.Helper()
	blob, err := uki.Sign(program, key.Key, key.Cert)
	if err != nil {
		t.Fatal(err)
	}
	r, err := blob.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func authenticodeOf(t *testing.T, program []byte) pcr.Digest {
	t.Helper()
	f, err := uki.Parse(bytes.NewReader(program), int64(len(program)))
	if err != nil {
		t.Fatal(err)
	}
	d, err := f.Authenticode()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// disk lays the programs on a disk as an appliance has them.
func (b bootSet) disk(t *testing.T, path string) {
	t.Helper()
	layout, err := partition.Plan(partition.Spec{Seed: "measured", Arch: "amd64", SizeBytes: 400 << 20, ESPBytes: 128 << 20, SlotBytes: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	f, err := partition.CreateFile(path, layout.SizeBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, err := partition.Format(f, layout, partition.FormatOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c := partition.Contents{Root: partition.Bytes("no root"), RootHash: strings.Repeat("0", 64), UKI: b.uki, Loader: b.loader, Title: "measured", Version: "1"}
	if err := d.WriteSlot(context.Background(), partition.SlotA, c, partition.WriteOptions{}, nil); err != nil {
		t.Fatal(err)
	}
}

// boot starts the programs in the box and returns what it printed.
func (s *measuring) boot(t *testing.T, box string, b bootSet, o hwtest.Options) observed {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk.raw")
	b.disk(t, disk)
	hw, err := hwtest.NewBox(box, disk, o)
	if err != nil {
		t.Fatal(err)
	}
	m := hw.Copy(t)
	m.PowerOn()
	m.WaitOff(bootTime)
	// Variables and TPM go back to the box for its next boot.
	for _, from := range []string{"firmware.vars", "tpm"} {
		if err := os.RemoveAll(filepath.Join(box, from)); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(m.Dir, from), filepath.Join(box, from)); err != nil {
			t.Fatal(err)
		}
	}
	return parseObserved(t, m.Console())
}

func parseObserved(t *testing.T, console string) observed {
	t.Helper()
	o := observed{pcrs: map[int]pcr.Digest{}, files: map[string][]byte{}}
	ended := false
	for line := range strings.Lines(console) {
		words := strings.Fields(line)
		switch {
		case len(words) == 3 && words[0] == "PCR":
			var i int
			value, err := hex.DecodeString(words[2])
			if _, scan := fmt.Sscan(words[1], &i); scan != nil || err != nil || len(value) != 32 {
				t.Fatalf("odd line %q", line)
			}
			o.pcrs[i] = pcr.Digest(value)
		case len(words) >= 2 && words[0] == "FILE":
			b, err := base64.StdEncoding.DecodeString(strings.Join(words[2:], ""))
			if err != nil {
				t.Fatalf("odd line %q: %v", line, err)
			}
			o.files[words[1]] = append(o.files[words[1]], b...)
		case len(words) == 1 && words[0] == "END":
			ended = true
		}
	}
	if !ended || len(o.pcrs) != pcr.Count || len(o.files["log"]) == 0 {
		t.Fatalf("the boot did not report: %d registers, %d bytes of log; console:\n%s", len(o.pcrs), len(o.files["log"]), console)
	}
	log, err := pcr.ParseLog(o.files["log"])
	if err != nil {
		t.Fatal(err)
	}
	o.log = log
	return o
}

// payload lets the firmware append the signature lists to a variable. efitools sign
// it, which know nothing of us.
func (s *measuring) payload(t *testing.T, variable string, lists []byte) []byte {
	t.Helper()
	signer := "KEK"
	if variable == "KEK" {
		signer = "PK"
	}
	in, out, keys := filepath.Join(t.TempDir(), "esl"), filepath.Join(t.TempDir(), "auth"), filepath.Join(s.dir, "keys")
	if err := os.WriteFile(in, lists, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "sign-efi-sig-list", "-a", "-k", filepath.Join(keys, signer+".key"), "-c", filepath.Join(keys, signer+".pem"), variable, in, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// hashes is a signature list of SHA-256 digests, each of owner and text.
func hashes(signatures ...[2]string) []byte {
	b := []byte{0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28}
	b = binary.LittleEndian.AppendUint32(b, uint32(28+48*len(signatures)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint32(b, 48)
	for _, s := range signatures {
		b = append(append(b, sum([]byte(s[0]))[:16]...), sum([]byte(s[1]))...)
	}
	return b
}

// recorded is one boot as the tests of package pcr read it back.
type recorded struct {
	Log      []byte
	PCRs     map[int]string
	Release  pcr.Release
	Payloads map[string][]byte // appended while it ran
	Before   map[string][]byte // the variables, as the system found them
	After    map[string][]byte // those that were appended to
}

// TestPrediction: what is computed from one boot's log is what the TPM holds in the
// next, with other programs, other contents of the Secure Boot variables and another
// signing key; with Secure Boot on and off. $HOLDFAST_BOOTS is a folder to keep the
// boots in for the tests of package pcr.
func TestPrediction(t *testing.T) {
	t.Parallel()
	s := newMeasuring(t)
	list := func(k *keys.Keys, name string) []byte {
		b, err := k.SignatureList(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	lists := (&product{keys: s.keys}).firmwareKeys(t)
	lists.DBX = hashes([2]string{"owner", "x"}, [2]string{"owner", "z"})
	payloads := map[string][]byte{
		"db":  s.payload(t, "db", list(s.newKeys, keys.DB)),
		"KEK": s.payload(t, "KEK", append(list(s.keys, keys.KEK), list(s.newKeys, keys.KEK)...)),
		// Known, new, new and again, of another owner; a list that is known as a whole;
		// another type.
		"dbx": s.payload(t, "dbx", slices.Concat(
			hashes([2]string{"owner", "x"}, [2]string{"owner", "y"}, [2]string{"owner", "y"}, [2]string{"other", "x"}),
			hashes([2]string{"owner", "z"}), list(s.newKeys, keys.PK))),
	}
	first, second := s.keys.DB, s.newKeys.DB
	t.Run("secure", func(t *testing.T) {
		t.Parallel()
		s.series(t, "secure", hwtest.Options{SecureBoot: lists}, []step{
			{s.set(t, "a", first, first, nil), nil},
			{s.set(t, "b", first, first, payloads), payloads},
			{s.set(t, "c", first, second, nil), nil},
			{s.set(t, "d", second, second, nil), nil},
		})
	})
	t.Run("open", func(t *testing.T) {
		t.Parallel()
		s.series(t, "open", hwtest.Options{}, []step{{s.set(t, "a", first, first, nil), nil}, {s.set(t, "b", first, first, nil), nil}})
	})
}

// step is one boot of a series and what it appends to the variables.
type step struct {
	bootSet
	payloads map[string][]byte
}

func (s *measuring) series(t *testing.T, name string, o hwtest.Options, steps []step) {
	box := t.TempDir()
	var boots []recorded
	var predicted pcr.Prediction
	for i, step := range steps {
		got := s.boot(t, box, step.bootSet, o)
		if i > 0 {
			for _, register := range pcr.Predictable() {
				want := got.pcrs[register]
				if register == 11 {
					want = pcr.Extend(want, []byte("enter-initrd")) // which this system does not do
				}
				if v, ok := predicted.Values[register]; !ok || v != want {
					t.Errorf("boot %d: PCR %d was predicted as %x (%s), it holds %x", i+1, register, v, predicted.Unpredictable[register], want)
				}
			}
		}
		r := recorded{Log: got.files["log"], PCRs: map[int]string{}, Release: step.Release, Payloads: step.payloads,
			Before: got.group("before/"), After: got.group("after/")}
		for i, v := range got.pcrs {
			r.PCRs[i] = hex.EncodeToString(v[:])
		}
		boots = append(boots, r)
		if i+1 < len(steps) {
			variables := r.after(t)
			predicted = pcr.Predict(got.log, got.pcrs, pcr.Change{Running: step.Release, Next: steps[i+1].Release, Variables: variables})
		}
	}
	if dir := os.Getenv("HOLDFAST_BOOTS"); dir != "" {
		b, err := json.Marshal(boots)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name+".json"), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// group are the files below a prefix.
func (o observed) group(prefix string) map[string][]byte {
	m := map[string][]byte{}
	for name, b := range o.files {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			m[rest] = b
		}
	}
	return m
}

// after are the variables at the end of the boot, computed, and compared with what
// the firmware made of them.
func (r recorded) after(t *testing.T) map[string][]byte {
	t.Helper()
	variables := maps.Clone(r.Before)
	if len(variables) != 4 {
		t.Fatalf("the boot showed %d variables, want PK, KEK, db and dbx", len(variables))
	}
	for name, payload := range r.Payloads {
		b, err := pcr.VariableAfter(r.Before[name], payload, true)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, r.After[name]) || bytes.Equal(b, r.Before[name]) {
			t.Errorf("%s was computed as\n%x, the firmware has\n%x", name, b, r.After[name])
		}
		variables[name] = b
	}
	return variables
}
