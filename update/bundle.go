package update

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
)

// The first and the last member of a bundle.
const (
	bundleMarker  = "holdfast-bundle"
	bundleFormat  = "1\n"
	bundleSums    = "SHA256SUMS"
	maxMembers    = 1024
	maxSumsBytes  = 256 << 10
	ageMagic      = "age-encryption.org/v1\n"
	maxSizeLength = 64 // of a bundle's marker
)

type member struct {
	name           string
	offset, length int64
	class          class
}

// Bundle is a repository with one release in one tar file, which any tar can
// unpack to a repository for [OpenDir] and sha256sum can check. The form is strict,
// so that there is one file of bytes for one content: plain ustar, regular files
// only, every header as [BundleWriter] makes it, members in this order:
//
//	holdfast-bundle              "1\n", the format
//	metadata/N.root.json         consecutive versions
//	metadata/timestamp.json, metadata/N.snapshot.json, metadata/N.targets.json
//	targets/…                    Releases
//	blobs/sha256/HEX             in the order of their hashes
//	SHA256SUMS                   of all before, against damage; trust comes from the metadata
//
// A Bundle is a [Source]. Its methods may be called from several goroutines when
// those of its io.ReaderAt may.
type Bundle struct {
	r       io.ReaderAt
	members []member
	byName  map[string]int
}

// OpenBundle reads the index of a bundle of size bytes. It reads headers only, of
// at most 1024 members, and checks no content; call [Bundle.Verify] for that. An
// encrypted bundle (age) needs one of its identities.
func OpenBundle(r io.ReaderAt, size int64, identities ...age.Identity) (*Bundle, error) {
	magic := make([]byte, len(ageMagic))
	if _, err := r.ReadAt(magic, 0); err == nil && string(magic) == ageMagic {
		if len(identities) == 0 {
			return nil, fmt.Errorf("open bundle: %w", ErrEncrypted)
		}
		if err := checkAgeHeader(r, size); err != nil {
			return nil, fmt.Errorf("open encrypted bundle: %w: %w", ErrUntrusted, err)
		}
		plain, n, err := age.DecryptReaderAt(r, size, identities...)
		if err != nil {
			return nil, fmt.Errorf("open encrypted bundle: %w: %w", ErrUntrusted, err)
		}
		r, size = plain, n
	}
	b := &Bundle{r: r, byName: map[string]int{}}
	if err := b.index(size); err != nil {
		return nil, fmt.Errorf("open bundle: %w: %w", ErrUntrusted, err)
	}
	return b, nil
}

// maxAgeHeader is room for hundreds of recipients.
const maxAgeHeader = 64 << 10

// checkAgeHeader finds the end of an encrypted file's header, a line that begins with
// three hyphens (age-encryption.org/v1). Package age takes 2 MiB of it, any of which it
// would have in its errors.
func checkAgeHeader(r io.ReaderAt, size int64) error {
	head := make([]byte, min(size, maxAgeHeader))
	if n, err := r.ReadAt(head, 0); err != nil && err != io.EOF {
		return fmt.Errorf("read %d bytes of the header: %w", len(head), err)
	} else if !bytes.Contains(head[:n], []byte("\n---")) {
		return fmt.Errorf("its header does not end within %d bytes", len(head))
	}
	return nil
}

func (b *Bundle) index(size int64) error {
	at := int64(0)
	block := make([]byte, ustarBlock)
	for {
		if _, err := b.r.ReadAt(block, at); err != nil {
			return fmt.Errorf("read header at byte %d of %d: %w", at, size, noEOF(err))
		}
		if bytes.Equal(block, make([]byte, ustarBlock)) {
			return b.checkEnd(at, size)
		}
		name, length, err := decodeHeader(block)
		if err != nil {
			return fmt.Errorf("header at byte %d: %w", at, err)
		}
		m := member{name: name, offset: at + ustarBlock, length: length}
		if err := b.add(m); err != nil {
			return err
		}
		end := m.offset + length
		at = end + padding(length)
		if at > size-2*ustarBlock {
			return fmt.Errorf("member %.100q of %d bytes goes beyond the end; the file is cut off", name, length)
		}
		pad := block[:padding(length)]
		if _, err := b.r.ReadAt(pad, end); err != nil {
			return fmt.Errorf("read padding at byte %d: %w", end, noEOF(err))
		}
		if strings.Trim(string(pad), "\x00") != "" {
			return fmt.Errorf("padding at byte %d is not zero", end)
		}
		block = block[:ustarBlock]
	}
}

// add checks a member's name and place.
func (b *Bundle) add(m member) error {
	if len(b.members) == maxMembers {
		return fmt.Errorf("more than %d members", maxMembers)
	}
	limit := int64(0)
	var err error
	switch {
	case m.name == bundleMarker:
		m.class, limit = classMarker, maxSizeLength
	case m.name == bundleSums:
		m.class, limit = classSums, maxSumsBytes
	default:
		m.class, limit, err = classify(m.name)
	}
	if err != nil {
		return err
	}
	if m.length > limit {
		return fmt.Errorf("member %q has %d bytes, at most %d are allowed", m.name, m.length, limit)
	}
	if len(b.members) == 0 {
		if m.class != classMarker {
			return fmt.Errorf("it begins with %q and not with %q; this is not a bundle", m.name, bundleMarker)
		}
	} else if prev := b.members[len(b.members)-1]; !follows(prev, m) {
		return fmt.Errorf("member %q is out of place behind %q", m.name, prev.name)
	}
	b.byName[m.name] = len(b.members)
	b.members = append(b.members, m)
	return nil
}

// follows says whether m may come right behind prev.
func follows(prev, m member) bool {
	if m.class != prev.class {
		// Exactly one member of each kind but descriptors and blobs is needed.
		next := prev.class + 1
		for next < m.class && (next == classDescriptor || next == classBlob) {
			next++
		}
		return next == m.class
	}
	switch m.class {
	case classRoot:
		var before, now int64
		fmt.Sscanf(prev.name, "metadata/%d.", &before)
		fmt.Sscanf(m.name, "metadata/%d.", &now)
		return now == before+1
	case classDescriptor, classBlob:
		return prev.name < m.name
	}
	return false
}

func (b *Bundle) checkEnd(at, size int64) error {
	end := make([]byte, 2*ustarBlock)
	if size != at+int64(len(end)) {
		return fmt.Errorf("its last member ends at byte %d and the file at %d, expected at %d", at, size, at+int64(len(end)))
	}
	if _, err := b.r.ReadAt(end, at); err != nil && err != io.EOF {
		return fmt.Errorf("read the end: %w", err)
	}
	if strings.Trim(string(end), "\x00") != "" {
		return fmt.Errorf("the two blocks from byte %d that end it are not zero", at)
	}
	if n := len(b.members); n == 0 || b.members[n-1].class != classSums {
		return fmt.Errorf("%s is missing; the file is cut off", bundleSums)
	}
	marker, err := readAll(io.NewSectionReader(b.r, b.members[0].offset, b.members[0].length), maxSizeLength)
	if err != nil {
		return err
	}
	if string(marker) != bundleFormat {
		return fmt.Errorf("format %q; this version knows format %q", marker, bundleFormat)
	}
	return nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Has says whether the file is in the bundle.
func (b *Bundle) Has(path string) bool {
	_, ok := b.byName[path]
	return ok
}

// Paths lists the files of the repository that the bundle holds, in its order. What
// their names say is not verified.
func (b *Bundle) Paths() []string {
	var list []string
	for _, m := range b.members {
		if m.class != classMarker && m.class != classSums {
			list = append(list, m.name)
		}
	}
	return list
}

// Fetch implements [Source].
func (b *Bundle) Fetch(_ context.Context, path string, offset, length int64) (io.ReadCloser, int64, error) {
	if _, _, err := classify(path); err != nil {
		return nil, 0, err
	}
	i, ok := b.byName[path]
	if !ok {
		return nil, 0, fmt.Errorf("%s: %w", path, ErrNotFound)
	}
	m := b.members[i]
	r, err := section(io.NewSectionReader(b.r, m.offset, m.length), m.length, path, offset, length)
	if err != nil {
		return nil, 0, err
	}
	return io.NopCloser(r), m.length, nil
}

// Verify reads all of the bundle and finds damage: every member against SHA256SUMS
// and every blob and Release against the hash in its name. It says nothing of who
// made the bundle; [Client.Check] does.
func (b *Bundle) Verify(ctx context.Context) error {
	var sums strings.Builder
	for _, m := range b.members[:len(b.members)-1] {
		if err := ctx.Err(); err != nil {
			return err
		}
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(b.r, m.offset, m.length)); err != nil {
			return fmt.Errorf("read %s: %w", m.name, err)
		}
		sum := fmt.Sprintf("%x", h.Sum(nil))
		if !nameFits(m, sum) {
			return fmt.Errorf("verify bundle: %w: %s has the SHA-256 %s; the file was damaged, or somebody changed it", ErrUntrusted, m.name, sum)
		}
		sums.WriteString(sumLine(sum, m.name))
	}
	last := b.members[len(b.members)-1]
	listed := bufio.NewReader(io.NewSectionReader(b.r, last.offset, last.length))
	for want := range strings.Lines(sums.String()) {
		if got, err := listed.ReadString('\n'); err != nil || got != want {
			return fmt.Errorf("verify bundle: %w: %s has %.200q where the content makes %q; the file was damaged, or somebody changed it",
				ErrUntrusted, bundleSums, got, want)
		}
	}
	if _, err := listed.ReadByte(); err != io.EOF {
		return fmt.Errorf("verify bundle: %w: %s lists more than there is", ErrUntrusted, bundleSums)
	}
	return nil
}

// nameFits checks the hash in a name that has one.
func nameFits(m member, sum string) bool {
	switch m.class {
	case classBlob:
		return m.name == BlobPath(sum)
	case classDescriptor:
		return targetForm.FindStringSubmatch(m.name)[4] == sum
	}
	return true
}

func sumLine(sum, name string) string { return sum + "  " + name + "\n" }

// BundleWriter writes a [Bundle]. The same members give the same bytes.
type BundleWriter struct {
	w    io.Writer
	last member
	sums strings.Builder
	n    int
}

// NewBundleWriter begins a bundle.
func NewBundleWriter(w io.Writer) (*BundleWriter, error) {
	b := &BundleWriter{w: w}
	return b, b.write(member{name: bundleMarker, length: int64(len(bundleFormat)), class: classMarker}, strings.NewReader(bundleFormat))
}

// Add writes the file at path, of size bytes. Files come in the order of [Bundle].
func (b *BundleWriter) Add(path string, size int64, content io.Reader) error {
	c, limit, err := classify(path)
	if err != nil {
		return fmt.Errorf("add to bundle: %w", err)
	}
	m := member{name: path, length: size, class: c}
	switch {
	case size < 0 || size > limit:
		return fmt.Errorf("add %s to bundle: %d bytes, at most %d are allowed", path, size, limit)
	case !follows(b.last, m):
		return fmt.Errorf("add %s to bundle: out of place behind %s", path, b.last.name)
	case b.n == maxMembers-1:
		return fmt.Errorf("add %s to bundle: more than %d members", path, maxMembers)
	}
	return b.write(m, content)
}

func (b *BundleWriter) write(m member, content io.Reader) error {
	header, err := encodeHeader(m.name, m.length)
	if err != nil {
		return fmt.Errorf("add to bundle: %w", err)
	}
	if _, err := b.w.Write(header); err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(b.w, h), io.LimitReader(content, m.length+1))
	if err != nil {
		return fmt.Errorf("add %s to bundle: %w", m.name, err)
	}
	if n != m.length {
		return fmt.Errorf("add %s to bundle: it does not have the %d bytes announced", m.name, m.length)
	}
	if _, err := b.w.Write(make([]byte, padding(n))); err != nil {
		return err
	}
	sum := fmt.Sprintf("%x", h.Sum(nil))
	if !nameFits(m, sum) {
		return fmt.Errorf("add %s to bundle: its SHA-256 is %s; the repository is damaged", m.name, sum)
	}
	b.sums.WriteString(sumLine(sum, m.name))
	b.last = m
	b.n++
	return nil
}

// Close writes the end; it does not close the writer below.
func (b *BundleWriter) Close() error {
	sums := b.sums.String()
	m := member{name: bundleSums, length: int64(len(sums)), class: classSums}
	if !follows(b.last, m) {
		return fmt.Errorf("end bundle: the metadata is not complete, the last file is %s", b.last.name)
	}
	if err := b.write(m, strings.NewReader(sums)); err != nil {
		return err
	}
	_, err := b.w.Write(make([]byte, 2*ustarBlock))
	return err
}
