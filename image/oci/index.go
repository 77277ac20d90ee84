package oci

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/holdfast-os/holdfast/image/tree"
)

// Limits on what a tar may hold. The lengths are Linux's (limits.h), so that
// everything accepted can be written to a file system; the counts bound memory.
const (
	maxEntries    = 4 << 20
	maxIndexBytes = 1 << 30 // names, targets and attributes of one layer
	maxPathBytes  = 4095
	maxNameBytes  = 255
	maxXattrName  = 255
	maxXattrBytes = 64 << 10
	maxMajor      = 1<<12 - 1
	maxMinor      = 1<<20 - 1
	tarBlockBytes = 512
	// maxSparseRun bounds how often opening a sparse file has to read past others.
	maxSparseRun = 4096
	// maxSparseBytes bounds what the holes of one tar expand to.
	maxSparseBytes = defaultMaxLayerBytes
)

// entry is one tar header that matters.
type entry struct {
	path string // cleaned, no leading slash, "" is the root
	link string // target of a hard link, cleaned like path; node is then empty
	node tree.Node
}

// window reads a tar's headers with few system calls and knows its offset.
type window struct {
	r    io.ReadSeeker
	buf  *bufio.Reader
	off  int64
	size int64
}

func newWindow(r io.ReaderAt, sizeBytes int64) *window {
	s := io.NewSectionReader(r, 0, sizeBytes)
	return &window{r: s, buf: bufio.NewReaderSize(s, 8<<10), size: sizeBytes}
}

func (w *window) Read(p []byte) (int, error) {
	n, err := w.buf.Read(p)
	w.off += int64(n)
	return n, err
}

// Seek lets archive/tar pass over contents without reading them.
func (w *window) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return 0, errors.New("seek: only forward")
	}
	if offset <= int64(w.buf.Buffered()) {
		n, err := w.buf.Discard(int(offset))
		w.off += int64(n)
		return w.off, err
	}
	if offset > w.size-w.off {
		return 0, io.ErrUnexpectedEOF
	}
	if _, err := w.r.Seek(w.off+offset, io.SeekStart); err != nil {
		return 0, err
	}
	w.buf.Reset(w.r)
	w.off += offset
	return w.off, nil
}

// index lists a plain tar. Contents stay in r.
func index(r io.ReaderAt, sizeBytes int64) ([]entry, error) {
	w := newWindow(r, sizeBytes)
	tr := tar.NewReader(w)
	var entries []entry
	var held, expanded int64
	// Where a header starts is known unless sparse files came just before it.
	from, headers := int64(0), 0
	for n := 1; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return entries, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read tar header %d before byte %d: %w", n, w.off, err)
		}
		headers++
		e, keep, err := newEntry(h, func() (tree.Content, error) {
			if isSparse(h) {
				return sparse{r, from, sizeBytes, headers, h.Size}, nil
			}
			if h.Size > sizeBytes-w.off {
				return nil, fmt.Errorf("%d bytes at byte %d, the tar ends at %d", h.Size, w.off, sizeBytes)
			}
			return tree.Section{R: r, Off: w.off, SizeBytes: h.Size}, nil
		})
		if err != nil {
			return nil, fmt.Errorf("tar entry %q: %w", h.Name, err)
		}
		if !isSparse(h) {
			from, headers = dataEnd(w.off, h), 0
		} else if expanded += h.Size; headers > maxSparseRun || h.Size > maxSparseBytes || expanded > maxSparseBytes {
			return nil, fmt.Errorf("tar entry %q: more than %d sparse files in a row or %d bytes in sparse files", h.Name, maxSparseRun, int64(maxSparseBytes))
		}
		if !keep {
			continue
		}
		held += e.heldBytes()
		if len(entries) == maxEntries || held > maxIndexBytes {
			return nil, fmt.Errorf("tar has more than %d entries or %d bytes of names and attributes", maxEntries, maxIndexBytes)
		}
		entries = append(entries, e)
	}
}

func (e *entry) heldBytes() int64 {
	n := len(e.path) + len(e.link) + len(e.node.Target)
	for _, x := range e.node.Xattrs {
		n += len(x.Name) + len(x.Value)
	}
	return int64(n)
}

// dataEnd is where the header after h starts, if h's data begins at off.
func dataEnd(off int64, h *tar.Header) int64 {
	if h.Typeflag != tar.TypeReg {
		return off
	}
	return off + (h.Size+tarBlockBytes-1)/tarBlockBytes*tarBlockBytes
}

// isSparse recognizes the old GNU type and the PAX formats 0.0, 0.1 and 1.0.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// newEntry translates a header; keep is false for those that name no file.
func newEntry(h *tar.Header, content func() (tree.Content, error)) (e entry, keep bool, err error) {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return entry{}, false, nil
	}
	if e.path, err = cleanPath(h.Name); err != nil {
		return entry{}, false, err
	}
	if h.Typeflag == tar.TypeLink {
		if e.link, err = cleanPath(h.Linkname); err == nil && (e.link == "" || e.path == "") {
			err = fmt.Errorf("hard link to %q", h.Linkname)
		}
		return e, true, err
	}
	kind, err := fileType(h)
	if err != nil {
		return entry{}, false, err
	}
	if h.Uid < 0 || int64(h.Uid) >= math.MaxUint32 || h.Gid < 0 || int64(h.Gid) >= math.MaxUint32 {
		return entry{}, false, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	e.node = tree.Node{Mode: kind | uint32(h.Mode)&0o7777, UID: uint32(h.Uid), GID: uint32(h.Gid), MTimeSec: max(0, h.ModTime.Unix())}
	if e.node.Xattrs, err = xattrs(h.PAXRecords); err != nil {
		return entry{}, false, err
	}
	switch kind {
	case tree.TypeRegular:
		e.node.Content, err = content()
	case tree.TypeSymlink:
		e.node.Target = h.Linkname
		if len(h.Linkname) == 0 || len(h.Linkname) > maxPathBytes {
			err = fmt.Errorf("symbolic link of %d bytes, 1 to %d are possible", len(h.Linkname), maxPathBytes)
		}
	case tree.TypeChar, tree.TypeBlock:
		e.node.Major, e.node.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		if h.Devmajor < 0 || h.Devmajor > maxMajor || h.Devminor < 0 || h.Devminor > maxMinor {
			err = fmt.Errorf("device %d:%d is out of range", h.Devmajor, h.Devminor)
		}
	}
	if e.path == "" && kind != tree.TypeDir {
		err = errors.New("the root is not a folder")
	}
	return e, true, err
}

func fileType(h *tar.Header) (uint32, error) {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return tree.TypeRegular, nil
	case tar.TypeDir:
		return tree.TypeDir, nil
	case tar.TypeSymlink:
		return tree.TypeSymlink, nil
	case tar.TypeChar:
		return tree.TypeChar, nil
	case tar.TypeBlock:
		return tree.TypeBlock, nil
	case tar.TypeFifo:
		return tree.TypeFIFO, nil
	}
	return 0, fmt.Errorf("type %q is not one a root file system has", h.Typeflag)
}

// cleanPath makes a name relative to the root, which ".." cannot leave.
func cleanPath(name string) (string, error) {
	parts := tree.Split(name)
	for _, p := range parts {
		if len(p) > maxNameBytes {
			return "", fmt.Errorf("name of %d bytes, %d are possible", len(p), maxNameBytes)
		}
	}
	clean := strings.Join(parts, "/")
	if len(clean) > maxPathBytes {
		return "", fmt.Errorf("path of %d bytes, %d are possible", len(clean), maxPathBytes)
	}
	return clean, nil
}

// paxXattr is where star, GNU tar and container tools put extended attributes.
const paxXattr = "SCHILY.xattr."

func xattrs(records map[string]string) ([]tree.Xattr, error) {
	var list []tree.Xattr
	for k, v := range records {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok {
			continue
		}
		if name == "" || len(name) > maxXattrName || len(v) > maxXattrBytes {
			return nil, fmt.Errorf("extended attribute with a name of %d and a value of %d bytes", len(name), len(v))
		}
		list = append(list, tree.Xattr{Name: name, Value: []byte(v)})
	}
	n := tree.Node{Xattrs: list}
	n.SortXattrs()
	return n.Xattrs, nil
}

// sparse is a file with holes. archive/tar knows the formats but not where the
// pieces lie, so opening it reads the tar again from a place before it.
type sparse struct {
	r         io.ReaderAt
	from, end int64
	headers   int // how many headers after from it is
	sizeBytes int64
}

// Size is that with the holes.
func (s sparse) Size() int64 { return s.sizeBytes }

// Open reads the file with zeros for the holes.
func (s sparse) Open() (io.ReadCloser, error) {
	tr := tar.NewReader(newWindow(io.NewSectionReader(s.r, s.from, s.end-s.from), s.end-s.from))
	for range s.headers {
		if _, err := tr.Next(); err != nil {
			return nil, fmt.Errorf("read sparse file in tar at byte %d: %w", s.from, err)
		}
	}
	return io.NopCloser(tr), nil
}
