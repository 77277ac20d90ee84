package update

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ustarBlock is the unit of a tar file in bytes.
const ustarBlock = 512

// encodeHeader is the header of a regular file, POSIX.1-2017 pax §ustar: mode
// 0644, owner 0, time 0, no names. There is no other header in a bundle.
func encodeHeader(name string, size int64) ([]byte, error) {
	prefix, base := "", name
	if len(name) > 100 {
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return nil, fmt.Errorf("name %q does not fit a ustar header", name)
		}
		prefix, base = name[:i], name[i+1:]
	}
	if base == "" || len(base) > 100 || len(prefix) > 155 || strings.IndexByte(name, 0) >= 0 {
		return nil, fmt.Errorf("name %q does not fit a ustar header", name)
	}
	if size < 0 || size > MaxBlobBytes {
		return nil, fmt.Errorf("%d bytes do not fit a ustar header", size)
	}
	h := make([]byte, ustarBlock)
	copy(h[0:], base)
	copy(h[100:], "0000644\x00")
	copy(h[108:], "0000000\x00")
	copy(h[116:], "0000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00", size))
	copy(h[136:], "00000000000\x00")
	copy(h[148:], "        ") // the checksum counts as blanks in its own sum
	h[156] = '0'
	copy(h[257:], "ustar\x0000")
	copy(h[345:], prefix)
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h, nil
}

// decodeHeader accepts what encodeHeader makes and nothing else: no links, devices,
// long names or extended headers.
func decodeHeader(h []byte) (name string, size int64, err error) {
	name = text(h[:100])
	if prefix := text(h[345:500]); prefix != "" {
		name = prefix + "/" + name
	}
	if size, err = strconv.ParseInt(text(h[124:136]), 8, 64); err != nil {
		return "", 0, errors.New("no size in octal digits; this is not a plain ustar header")
	}
	want, err := encodeHeader(name, size)
	if err != nil {
		return "", 0, err
	}
	if !bytes.Equal(h, want) {
		return "", 0, fmt.Errorf("entry %.100q of type %q is not the plain file of a bundle", name, h[156])
	}
	return name, size, nil
}

func text(field []byte) string {
	s, _, _ := strings.Cut(string(field), "\x00")
	return s
}

// padding is how many zeros follow size bytes of content.
func padding(size int64) int64 { return -size & (ustarBlock - 1) }
