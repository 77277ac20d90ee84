package deb_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/deb"
)

// names lists a package's files by our reader.
func names(t *testing.T, path string) []string {
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
	r, err := deb.Data(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var list []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, h.Name)
	}
}

// build makes a package with Debian's own tool.
func build(t *testing.T, compression string) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range map[string]string{
		"DEBIAN/control": "Package: probe\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: probe\n",
		"boot/vmlinuz-1": strings.Repeat("kernel", 1000),
	} {
		at := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), "probe.deb")
	if msg, err := exec.Command("dpkg-deb", "--root-owner-group", "-Z"+compression, "--build", root, out).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, msg)
	}
	return out
}

func TestEveryCompression(t *testing.T) {
	for _, compression := range []string{"none", "gzip", "xz", "zstd"} {
		t.Run(compression, func(t *testing.T) {
			got := names(t, build(t, compression))
			if want := []string{"./", "./boot/", "./boot/vmlinuz-1"}; fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("files are %v, want %v", got, want)
			}
		})
	}
}

func TestDamage(t *testing.T) {
	whole, err := os.ReadFile(build(t, "none"))
	if err != nil {
		t.Fatal(err)
	}
	change := func(at int, text string) []byte {
		b := bytes.Clone(whole)
		copy(b[at:], text)
		return b
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"empty":          {nil, "no ar archive"},
		"other file":     {[]byte("MZ something else entirely"), "no ar archive"},
		"no members":     {whole[:8], "no debian-binary"},
		"truncated":      {whole[:len(whole)/2], "the file ends after"},
		"huge member":    {change(8+48, "9999999999"), "the file ends after"},
		"negative size":  {change(8+48, "-1        "), "damaged header at byte 8"},
		"format 3":       {change(8+60, "3.0\n"), `format "3.0"`},
		"other trailer":  {change(8+58, "xx"), "damaged header at byte 8"},
		"wrong 1st name": {change(8, "debian-xxxxxx "), "no debian-binary"},
	} {
		_, err := deb.Data(bytes.NewReader(c.data), int64(len(c.data)))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
	}
}

// FuzzData: whatever the bytes, the stream ends, and reading it twice gives the same.
func FuzzData(f *testing.F) {
	f.Add([]byte("!<arch>\ndebian-binary   0           0     0     100644  4         `\n2.0\ndata.tar        0           0     0     100644  4         `\nabcd"))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := func() ([]byte, string) {
			r, err := deb.Data(bytes.NewReader(b), int64(len(b)))
			if err != nil {
				return nil, err.Error()
			}
			defer r.Close()
			data, err := io.ReadAll(io.LimitReader(r, 1<<20))
			return data, fmt.Sprint(err)
		}
		first, err1 := read()
		second, err2 := read()
		if !bytes.Equal(first, second) || err1 != err2 {
			t.Fatalf("two reads differ: %d bytes, %s; %d bytes, %s", len(first), err1, len(second), err2)
		}
	})
}
