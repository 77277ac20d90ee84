// Package deb reads Debian binary packages, deb(5), format 2.0: the files a
// package would install, without installing it.
//
// [Data] gives the package's file tree as a tar stream; image/oci indexes and
// caches it like a layer. The control archive is not read, so no maintainer
// script is ever run, and dependencies are the author's to name.
//
// A package file carries no signature of its own; trust comes from where it was
// fetched and from the digest the build records.
package deb

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

const (
	arMagic      = "!<arch>\n"
	headerBytes  = 60
	trailer      = "`\n"
	maxMembers   = 16 // debian-binary, control, data, and what later versions may add with a leading _
	versionBytes = 16
)

// member is one file of the ar archive (ar(5)), as far as deb(5) uses it.
type member struct {
	name        string
	offset, len int64
}

// Data opens the package's data archive and decompresses it: xz, zstd, gzip or
// none. The stream ends with the archive; damage shows as an error of its Read.
func Data(r io.ReaderAt, sizeBytes int64) (io.ReadCloser, error) {
	members, err := list(r, sizeBytes)
	if err != nil {
		return nil, err
	}
	if err := checkVersion(r, members); err != nil {
		return nil, err
	}
	for _, m := range members {
		if suffix, ok := strings.CutPrefix(m.name, "data.tar"); ok {
			return decompress(io.NewSectionReader(r, m.offset, m.len), suffix)
		}
	}
	return nil, errors.New("debian package: no data.tar in it")
}

// list reads the headers of the archive.
func list(r io.ReaderAt, sizeBytes int64) ([]member, error) {
	magic := make([]byte, len(arMagic))
	if _, err := r.ReadAt(magic, 0); err != nil || string(magic) != arMagic {
		return nil, errors.New("not a Debian package: no ar archive")
	}
	var members []member
	for at := int64(len(arMagic)); at+headerBytes <= sizeBytes; {
		if len(members) == maxMembers {
			return nil, fmt.Errorf("debian package: more than %d members", maxMembers)
		}
		header := make([]byte, headerBytes)
		if _, err := r.ReadAt(header, at); err != nil {
			return nil, fmt.Errorf("debian package: read header at byte %d: %w", at, err)
		}
		n, err := strconv.ParseInt(strings.TrimRight(string(header[48:58]), " "), 10, 64)
		if string(header[58:]) != trailer || err != nil || n < 0 {
			return nil, fmt.Errorf("debian package: damaged header at byte %d", at)
		}
		if n > sizeBytes-at-headerBytes {
			return nil, fmt.Errorf("debian package: member at byte %d has %d bytes, the file ends after %d", at, n, sizeBytes-at-headerBytes)
		}
		name := strings.TrimSuffix(strings.TrimRight(string(header[:16]), " "), "/")
		members = append(members, member{name, at + headerBytes, n})
		at += headerBytes + n + n%2 // members are padded to even offsets
	}
	return members, nil
}

// checkVersion looks for debian-binary in front, version 2.x.
func checkVersion(r io.ReaderAt, members []member) error {
	if len(members) == 0 || members[0].name != "debian-binary" || members[0].len > versionBytes {
		return errors.New("not a Debian package: no debian-binary in front")
	}
	version := make([]byte, members[0].len)
	if _, err := r.ReadAt(version, members[0].offset); err != nil {
		return fmt.Errorf("debian package: read version: %w", err)
	}
	if !bytes.HasPrefix(version, []byte("2.")) {
		return fmt.Errorf("debian package of format %q; this reads 2.x", strings.TrimSpace(string(version)))
	}
	return nil
}

func decompress(r io.Reader, suffix string) (io.ReadCloser, error) {
	switch suffix {
	case "":
		return io.NopCloser(r), nil
	case ".gz":
		return gzip.NewReader(r)
	case ".zst":
		d, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case ".xz":
		d, err := xz.NewReader(bufio.NewReaderSize(r, 64<<10)) // it reads byte by byte
		if err != nil {
			return nil, fmt.Errorf("debian package: %w", err)
		}
		return io.NopCloser(d), nil
	}
	return nil, fmt.Errorf("debian package: data.tar%s is compressed in a way this does not read; repack it with xz or zstd", suffix)
}
