package kmod

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/holdfast-os/holdfast/image/tree"
)

// maxModinfoBytes bounds the .modinfo section; the aliases of a large network
// driver take some 50 KiB.
const maxModinfoBytes = 4 << 20

// modinfo is what the kernel build writes about a module with MODULE_INFO.
// All names are in the kernel's form, with underscores.
type modinfo struct {
	vermagic  string
	depends   []string
	pre, post []string // softdep
	alias     []string
}

// entry is one key=value pair of a .modinfo section.
type entry struct{ key, value string }

// readModinfo finds the .modinfo section of an ELF file. What follows the ELF
// structure, such as an appended signature, is not looked at.
func readModinfo(r io.ReaderAt) (modinfo, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return modinfo{}, fmt.Errorf("kernel module: %w", err)
	}
	s := f.Section(".modinfo")
	if s == nil {
		return modinfo{}, errors.New("kernel module: no .modinfo section")
	}
	if s.Size > maxModinfoBytes {
		return modinfo{}, fmt.Errorf("kernel module: .modinfo of %d bytes, allowed are %d", s.Size, maxModinfoBytes)
	}
	b, err := s.Data()
	if err != nil {
		return modinfo{}, fmt.Errorf("kernel module: read .modinfo: %w", err)
	}
	entries, err := parseModinfo(b)
	if err != nil {
		return modinfo{}, fmt.Errorf("kernel module: %w", err)
	}
	return newModinfo(entries), nil
}

// parseModinfo splits a section of NUL-terminated "key=value" strings; extra
// NULs between them are alignment.
func parseModinfo(b []byte) ([]entry, error) {
	var list []entry
	if len(b) > 0 && b[len(b)-1] != 0 {
		return nil, errors.New(".modinfo does not end with a NUL; it is cut off")
	}
	for line := range bytes.SplitSeq(b, []byte{0}) {
		if len(line) == 0 {
			continue
		}
		key, value, ok := strings.Cut(string(line), "=")
		if !ok || key == "" {
			return nil, fmt.Errorf(".modinfo entry %q is not key=value", line)
		}
		list = append(list, entry{key, value})
	}
	return list, nil
}

func newModinfo(entries []entry) modinfo {
	var m modinfo
	for _, e := range entries {
		switch e.key {
		case "vermagic":
			m.vermagic = e.value
		case "alias":
			m.alias = append(m.alias, normal(e.value))
		case "depends":
			for name := range strings.SplitSeq(e.value, ",") {
				if name != "" {
					m.depends = append(m.depends, normal(name))
				}
			}
		case "softdep":
			m.addSoftdep(e.value)
		}
	}
	return m
}

// addSoftdep reads "pre: a b post: c", modprobe.d(5). Words before the first
// label mean nothing to modprobe, and some modules have them.
func (m *modinfo) addSoftdep(value string) {
	var into *[]string
	for word := range strings.FieldsSeq(value) {
		switch {
		case word == "pre:":
			into = &m.pre
		case word == "post:":
			into = &m.post
		case into != nil:
			*into = append(*into, normal(word))
		}
	}
}

// packed is the uncompressed content of a compressed file, unpacked again at
// every opening so that the modules do not gather in memory.
type packed struct {
	file      tree.Content
	suffix    string
	sizeBytes int64
}

// Size is the uncompressed length in bytes.
func (p packed) Size() int64 { return p.sizeBytes }

// Open unpacks the file.
func (p packed) Open() (io.ReadCloser, error) { return unpack(p.suffix, p.file) }

// uncompressed returns the content of the module at path, and its bytes.
func uncompressed(path string, c tree.Content) (tree.Content, []byte, error) {
	if c.Size() > maxModuleBytes {
		return nil, nil, fmt.Errorf("%d bytes, allowed are %d", c.Size(), maxModuleBytes)
	}
	suffix := path[strings.LastIndex(path, ".ko"):]
	if suffix == ".ko" {
		raw, err := readAll(c, maxModuleBytes)
		return c, raw, err
	}
	r, err := unpack(suffix, c)
	if err != nil {
		return nil, nil, fmt.Errorf("unpack: %w", err)
	}
	raw, err := readLimited(r, maxModuleBytes)
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, nil, fmt.Errorf("unpack: %w", err)
	}
	return packed{c, suffix, int64(len(raw))}, raw, nil
}

// unpacker reads through a decompressor and closes both it and the file.
type unpacker struct {
	io.Reader
	close func() error
}

func (u unpacker) Close() error { return u.close() }

func unpack(suffix string, c tree.Content) (io.ReadCloser, error) {
	f, err := c.Open()
	if err != nil {
		return nil, err
	}
	switch suffix {
	case ".ko.zst":
		z, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return unpacker{z, func() error { z.Close(); return f.Close() }}, nil
	case ".ko.gz":
		z, err := gzip.NewReader(f)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return unpacker{z, func() error { return errors.Join(z.Close(), f.Close()) }}, nil
	case ".ko.xz":
		z, err := xz.NewReader(bufio.NewReader(f)) // it reads byte by byte
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return unpacker{z, f.Close}, nil
	}
	return nil, errors.Join(fmt.Errorf("no way to unpack %s", suffix), f.Close())
}
