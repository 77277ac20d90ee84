package slotcrypt_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-os/holdfast/agent/slotcrypt"
	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func noise(seed byte, n int64) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func cipherOf(t testing.TB, seed byte) *slotcrypt.Cipher {
	t.Helper()
	c, err := slotcrypt.New(noise(seed, slotcrypt.KeyBytes))
	must(t, err)
	return c
}

// rootOf is a root image of so many blocks of data: half noise, half zeros.
func rootOf(t testing.TB, blocks int64) ([]byte, image.Verity) {
	t.Helper()
	data := noise(1, blocks*verity.BlockSize)
	clear(data[len(data)/2&^4095:])
	copy(data[1024:], "\xe2\xe1\xf5\xe0")
	w, err := verity.NewWriter(verity.Options{Salt: []byte("salt"), UUID: [16]byte{1}})
	must(t, err)
	_, err = w.Write(data)
	must(t, err)
	var tree bytes.Buffer
	v, err := w.Finish(&tree)
	must(t, err)
	return append(data, tree.Bytes()...), v
}

// slotWith is a slot that holds the image in the clear, and behind it what an older one left.
func slotWith(t testing.TB, img []byte) *partition.Memory {
	t.Helper()
	m := partition.NewMemory(int64(len(img)) + 64<<10)
	_, err := m.WriteAt(img, 0)
	must(t, err)
	_, err = m.WriteAt(noise(9, 10000), int64(len(img))+5000)
	must(t, err)
	return m
}

// wantEncrypted wants the slot to hold the image, all of it encrypted, and nothing else.
func wantEncrypted(t testing.TB, c *slotcrypt.Cipher, m partition.Device, img []byte, v image.Verity) {
	t.Helper()
	if slotcrypt.Readable(m) {
		t.Fatal("the slot is readable without a key")
	}
	if state, err := c.Look(m, v); err != nil || state != slotcrypt.Encrypted {
		t.Fatalf("the slot is in state %d, %v", state, err)
	}
	view, err := c.View(m)
	must(t, err)
	got := make([]byte, len(img))
	_, err = view.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, img) {
		t.Fatal("the view shows another image")
	}
	must(t, verity.Verify(view, v))
	raw := make([]byte, m.Size())
	_, err = m.ReadAt(raw, 0)
	must(t, err)
	for at := 0; at < len(img); at += 512 {
		if bytes.Equal(raw[at:at+512], img[at:at+512]) {
			t.Fatalf("the sector at %d is in the clear", at)
		}
	}
	if rest := raw[len(img):]; !bytes.Equal(rest, make([]byte, len(rest))) {
		t.Fatal("what was behind the release is still there")
	}
}

func TestConvert(t *testing.T) {
	c := cipherOf(t, 2)
	for _, blocks := range []int64{1, 2, 127, 128, 129, 300, 128*128 + 1} {
		t.Run(fmt.Sprint(blocks), func(t *testing.T) {
			img, v := rootOf(t, blocks)
			m := slotWith(t, img)
			if state, err := c.Look(m, v); err != nil || state != slotcrypt.Plain {
				t.Fatalf("before: state %d, %v", state, err)
			}
			if clear, err := slotcrypt.InTheClear(m, v); err != nil || !clear {
				t.Fatalf("before: in the clear %v, %v", clear, err)
			}
			if !slotcrypt.Readable(m) {
				t.Fatal("before: the slot is not readable")
			}
			var done, total int64
			must(t, c.Convert(m, v, func(d, all int64) { done, total = d, all }))
			if done != v.TotalBytes || total != v.TotalBytes {
				t.Errorf("progress ended at %d of %d, the root has %d", done, total, v.TotalBytes)
			}
			wantEncrypted(t, c, m, img, v)
			if clear, err := slotcrypt.InTheClear(m, v); err != nil || clear {
				t.Fatalf("after: in the clear %v, %v", clear, err)
			}
			before := powercut.New(m)
			must(t, c.Convert(before, v, nil)) // once more does no harm
			if before.Writes() != 0 {
				t.Errorf("an encrypted slot was written %d times", before.Writes())
			}
		})
	}
}

// TestConvertPowerCuts cuts at every write, between any two sectors, and has a second
// run, which is cut too, and a third complete the work.
func TestConvertPowerCuts(t *testing.T) {
	c := cipherOf(t, 2)
	img, v := rootOf(t, 200)
	start := slotWith(t, img)
	first := powercut.New(start)
	must(t, c.Convert(first, v, nil))
	if first.Unsynced() || first.Writes() < 4 || first.Syncs() != 3 {
		t.Fatalf("%d writes, %d syncs, unsynced %v", first.Writes(), first.Syncs(), first.Unsynced())
	}
	states, encrypted := 0, 0
	for desc, state := range first.States(1, 12) {
		if how, err := c.Look(state, v); err != nil {
			t.Fatalf("%s: %v", desc, err)
		} else if how == slotcrypt.Encrypted {
			wantEncrypted(t, c, state, img, v)
			encrypted++
			continue
		}
		second := powercut.New(state)
		if err := c.Convert(second, v, nil); err != nil {
			t.Fatalf("%s: %v", desc, err)
		}
		wantEncrypted(t, c, second.Now(), img, v)
		n := 0
		for again, after := range second.States(uint64(states), 2) {
			if n++; n%5 != 0 {
				continue
			}
			if err := c.Convert(after, v, nil); err != nil {
				t.Fatalf("%s, then %s: %v", desc, again, err)
			}
			wantEncrypted(t, c, after, img, v)
		}
		states++
	}
	if states < 20 || encrypted == 0 {
		t.Errorf("%d states to go on from and %d that were done", states, encrypted)
	}
}

// TestTornBlock has every mixture of sectors in the clear and encrypted, in each kind of block.
func TestTornBlock(t *testing.T) {
	c := cipherOf(t, 2)
	img, v := rootOf(t, 130)
	done := slotWith(t, img)
	must(t, c.Convert(done, v, nil))
	wantEncrypted(t, c, done, img, v)
	sealed := make([]byte, len(img))
	_, err := done.ReadAt(sealed, 0)
	must(t, err)
	for name, at := range map[string]int{"data": 3 * 4096, "superblock": 130 * 4096, "top of the tree": 131 * 4096, "tree": 132 * 4096} {
		t.Run(name, func(t *testing.T) {
			for mask := range 256 {
				if name != "data" && mask%17 != 3 {
					continue // they all go one way
				}
				m := slotWith(t, img)
				for i := range 8 {
					if mask>>i&1 == 1 {
						_, err := m.WriteAt(sealed[at+i*512:at+(i+1)*512], int64(at+i*512))
						must(t, err)
					}
				}
				if err := c.Convert(m, v, nil); err != nil {
					t.Fatalf("sectors %08b: %v", mask, err)
				}
				got := make([]byte, len(img))
				_, err := m.ReadAt(got, 0)
				must(t, err)
				if !bytes.Equal(got, sealed) {
					t.Fatalf("sectors %08b: the slot is not what it is without a cut", mask)
				}
			}
		})
	}
}

func TestForeign(t *testing.T) {
	c, other := cipherOf(t, 2), cipherOf(t, 3)
	img, v := rootOf(t, 130)
	m := slotWith(t, img)
	must(t, other.Convert(m, v, nil))
	if _, err := c.Look(m, v); !errors.Is(err, slotcrypt.ErrForeign) {
		t.Errorf("a slot of another box: %v", err)
	}
	dev := powercut.New(m)
	if err := c.Convert(dev, v, nil); !errors.Is(err, slotcrypt.ErrForeign) || dev.Writes() != 0 {
		t.Errorf("a slot of another box: %v after %d writes", err, dev.Writes())
	}
	// A block that is damaged in the clear does not become the box's by encryption.
	m = slotWith(t, img)
	_, err := m.WriteAt([]byte("damage"), 7*4096)
	must(t, err)
	if err := c.Convert(m, v, nil); !errors.Is(err, slotcrypt.ErrForeign) {
		t.Errorf("a damaged block: %v", err)
	}
	if state, err := c.Look(m, v); err != nil || state != slotcrypt.Plain {
		t.Errorf("a slot that could not be encrypted: %d, %v", state, err)
	}
	// Repaired by an installation of the same release in the clear, it goes on.
	_, err = m.WriteAt(img, 0)
	must(t, err)
	must(t, c.Convert(m, v, nil))
	wantEncrypted(t, c, m, img, v)
	short := partition.NewMemory(16 * 4096)
	if err := c.Convert(short, v, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a slot that is too small: %v", err)
	}
	if _, err := slotcrypt.New(make([]byte, 32)); err == nil {
		t.Error("a key of 32 bytes was taken")
	}
}

func TestView(t *testing.T) {
	c := cipherOf(t, 2)
	raw := partition.NewMemory(10 * 4096)
	view, err := c.View(raw)
	must(t, err)
	want := noise(4, 10*4096)
	for _, off := range []int64{4096, 0, 8192} {
		n := int64(4096)
		if off == 8192 {
			n = 8 * 4096
		}
		part := bytes.Clone(want[off : off+n])
		_, err := view.WriteAt(part, off)
		must(t, err)
		if !bytes.Equal(part, want[off:off+n]) {
			t.Fatal("the caller's bytes were changed")
		}
	}
	for _, r := range [][2]int64{{0, 40960}, {0, 1}, {4095, 2}, {5000, 9000}, {40959, 1}, {8192, 4096}} {
		got := make([]byte, r[1])
		n, err := view.ReadAt(got, r[0])
		if err != nil || n != len(got) || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
			t.Errorf("read %d at %d: %d, %v", r[1], r[0], n, err)
		}
	}
	got := make([]byte, 100)
	if n, err := view.ReadAt(got, 40950); n != 10 || err != io.EOF || !bytes.Equal(got[:10], want[40950:]) {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if n, err := view.ReadAt(got, 40960); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d, %v", n, err)
	}
	for _, w := range [][2]int64{{1, 4096}, {0, 4095}, {-4096, 4096}, {40960, 4096}} {
		if n, err := view.WriteAt(make([]byte, w[1]), w[0]); err == nil || n != 0 {
			t.Errorf("write %d at %d: %d, %v", w[1], w[0], n, err)
		}
	}
	if _, err := c.View(partition.NewMemory(4097)); err == nil {
		t.Error("a slot of 4097 bytes was taken")
	}
}

func BenchmarkConvert(b *testing.B) {
	c := cipherOf(b, 2)
	img, v := rootOf(b, 16<<10)
	b.SetBytes(v.TotalBytes)
	for b.Loop() {
		b.StopTimer()
		m := slotWith(b, img)
		b.StartTimer()
		must(b, c.Convert(m, v, nil))
	}
}

func BenchmarkRead(b *testing.B) {
	view, err := cipherOf(b, 2).View(partition.NewMemory(16 << 20))
	must(b, err)
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		_, err := view.ReadAt(buf, 4<<20)
		must(b, err)
	}
}
