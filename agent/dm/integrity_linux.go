package dm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"strconv"
	"unsafe"

	"github.com/anatol/devmapper.go"
	"golang.org/x/sys/unix"
)

// TagsSuffix makes the name of the mapping of the tags, below that of a volume, from its
// name.
const TagsSuffix = "-tags"

const (
	tagBytes = 32 // HMAC-SHA256
	// authenticatedCipher is aes-xts-plain64 with hmac-sha256 in the kernel's notation;
	// the tag is over the sector's number, its IV and its ciphertext.
	authenticatedCipher = "capi:authenc(hmac(sha256),xts(aes))-plain64"
	// superblockBytes at the start of the segment have to be zero for the kernel to
	// make a new one.
	superblockBytes = 4096
	// wipeBytes is how much one write of a wipe has.
	wipeBytes = 1 << 20
	// sectorUnit is what device-mapper counts in, whatever the volume's sectors are.
	sectorUnit = devmapper.SectorSize
)

// AuthenticatedCrypt is [Crypt] for a segment with HMAC-SHA256 tags: dm-integrity
// keeps them, dm-crypt makes and checks them. What does not match its tag reads as
// EILSEQ, and the kernel's log names the sector. key is that of the cipher and behind
// it that of the tags.
func AuthenticatedCrypt(name, device string, key []byte, offsetBytes, sizeBytes int64, sectorBytes int) (string, error) {
	sb, err := readSuperblock(device, offsetBytes)
	if err != nil {
		return "", fmt.Errorf("map %s: %w", name, err)
	}
	if err := sb.check(sizeBytes, sectorBytes); err != nil {
		return "", fmt.Errorf("map %s: dm-integrity superblock of %s: %w", name, device, err)
	}
	return stack(name, device, key, offsetBytes, sb.ProvidedDataSectors, sectorBytes, "J")
}

// FormatAuthenticated makes tags and journal of a new segment and writes every sector
// of it, through the key, as zeros: a sector that was never written has no tag that
// matches, and could not be read. progress is told of bytes of all; it may be nil.
//
// This writes the whole segment once, and destroys what it held.
func FormatAuthenticated(name, device string, key []byte, offsetBytes, sizeBytes int64, sectorBytes int, progress func(done, all int64)) (err error) {
	if err := zeroSuperblock(device, offsetBytes); err != nil {
		return fmt.Errorf("format %s: %w", name, err)
	}
	// The kernel makes a superblock where it finds zeros, and only then is it known
	// how much room is left for data (kernel documentation, dm-integrity).
	if _, err := tags(name, device, offsetBytes, uint64(sectorBytes/sectorUnit), sectorBytes, "D", "fix_padding"); err != nil {
		return fmt.Errorf("format: %w", err)
	}
	if err := Remove(name + TagsSuffix); err != nil {
		return err
	}
	sb, err := readSuperblock(device, offsetBytes)
	if err != nil {
		return fmt.Errorf("format %s: %w", name, err)
	}
	if err := sb.check(sizeBytes, sectorBytes); err != nil {
		return fmt.Errorf("format %s: the superblock that the kernel made on %s: %w", name, device, err)
	}
	// Without the journal, which would write everything twice: a wipe that was cut is
	// made again.
	node, err := stack(name, device, key, offsetBytes, sb.ProvidedDataSectors, sectorBytes, "D")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, Remove(name)) }()
	return wipe(node, int64(sb.ProvidedDataSectors)*sectorUnit, progress)
}

// stack maps the tags, and the volume on them.
func stack(name, device string, key []byte, offsetBytes int64, sectors uint64, sectorBytes int, mode string) (string, error) {
	below, err := tags(name, device, offsetBytes, sectors, sectorBytes, mode)
	if err != nil {
		return "", err
	}
	node, err := create(name, 0, devmapper.CryptTable{
		Length: sectors * sectorUnit, BackendDevice: below, Encryption: authenticatedCipher, Key: key,
		SectorSize: uint64(sectorBytes), Flags: []string{fmt.Sprintf("integrity:%d:aead", tagBytes)},
	})
	if err != nil {
		return "", errors.Join(err, Remove(name+TagsSuffix))
	}
	return node, nil
}

// tags maps dm-integrity without a hash of its own: it keeps what dm-crypt gives it.
// Mode J writes data and tags by way of a journal, so that a power cut does not part
// them; D does not.
func tags(name, device string, offsetBytes int64, sectors uint64, sectorBytes int, mode string, more ...string) (string, error) {
	name += TagsSuffix
	options := append([]string{"block_size:" + strconv.Itoa(sectorBytes)}, more...)
	params := fmt.Sprintf("%s %d %d %s %d", device, offsetBytes/sectorUnit, tagBytes, mode, len(options))
	for _, o := range options {
		params += " " + o
	}
	if err := devmapper.Create(name, "HOLDFAST-"+name); err != nil {
		return "", fmt.Errorf("map %s: %w", name, err)
	}
	err := load(name, "integrity", params, sectors)
	if err == nil {
		err = devmapper.Resume(name)
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("map %s on %s: %w", name, device, err), devmapper.Remove(name))
	}
	return node(name)
}

// load gives a mapping its only target, by DM_TABLE_LOAD; package devmapper knows no
// dm-integrity and takes no tables of others.
func load(name, target, params string, sectors uint64) error {
	const align = 8
	text := unix.SizeofDmIoctl + unix.SizeofDmTargetSpec
	b := make([]byte, (text+len(params)+align)/align*align) // params end with a zero byte
	if len(name) >= unix.DM_NAME_LEN || len(target) >= 16 {
		return fmt.Errorf("device-mapper name %q is too long", name)
	}
	h := (*unix.DmIoctl)(unsafe.Pointer(&b[0]))
	h.Version = [3]uint32{4, 0, 0}
	h.Data_size, h.Data_start, h.Target_count = uint32(len(b)), unix.SizeofDmIoctl, 1
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&h.Name)), len(h.Name)), name)
	s := (*unix.DmTargetSpec)(unsafe.Pointer(&b[unix.SizeofDmIoctl]))
	s.Length, s.Next = sectors, uint32(len(b)-unix.SizeofDmIoctl)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&s.Target_type)), len(s.Target_type)), target)
	copy(b[text:], params)
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.DM_TABLE_LOAD, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return fmt.Errorf("load table %q of %d sectors: %w", target+" "+params, sectors, errno)
	}
	return nil
}

// superblock is dm-integrity's (drivers/md/dm-integrity.c), little-endian. The kernel
// writes it; nothing authenticates it.
type superblock struct {
	Magic                  [8]byte
	Version                uint8
	Log2InterleaveSectors  uint8
	TagBytes               uint16
	JournalSections        uint32
	ProvidedDataSectors    uint64
	Flags                  uint32
	Log2SectorsPerBlock    uint8
	Log2BlocksPerBitmapBit uint8
	_                      [2]byte
	RecalculateSector      uint64
	_                      [8]byte
	Salt                   [16]byte
}

const (
	superblockMagic = "integrt\x00"
	// flagFixedPadding is the only one that a volume without bitmap, without a hash of
	// its own and without a recalculation can have.
	flagFixedPadding = 0x8
)

func decodeSuperblock(b []byte) (superblock, error) {
	var sb superblock
	if _, err := binary.Decode(b, binary.LittleEndian, &sb); err != nil {
		return sb, err
	}
	if string(sb.Magic[:]) != superblockMagic {
		return sb, errors.New("there is none: the volume was not formatted to the end, or was overwritten")
	}
	return sb, nil
}

// check wants what FormatAuthenticated, or cryptsetup, has made on a segment of
// sizeBytes.
func (sb superblock) check(sizeBytes int64, sectorBytes int) error {
	switch data := sb.ProvidedDataSectors; {
	case sb.TagBytes != tagBytes:
		return fmt.Errorf("tags have %d bytes, not %d", sb.TagBytes, tagBytes)
	case int(sb.Log2SectorsPerBlock) != bits.TrailingZeros(uint(sectorBytes/sectorUnit)):
		return fmt.Errorf("a block has 2^%d sectors, and the volume's have %d bytes", sb.Log2SectorsPerBlock, sectorBytes)
	case sb.Flags&^flagFixedPadding != 0:
		return fmt.Errorf("flags are %#x; supported: %#x", sb.Flags, flagFixedPadding)
	case data == 0 || data%uint64(sectorBytes/sectorUnit) != 0 || data > uint64(sizeBytes/sectorUnit):
		return fmt.Errorf("it provides %d sectors of data in a segment of %d", data, sizeBytes/sectorUnit)
	}
	return nil
}

// readSuperblock reads past the page cache: the kernel writes it past that too.
func readSuperblock(device string, offsetBytes int64) (sb superblock, err error) {
	err = direct(device, unix.O_RDONLY, superblockBytes, func(fd int, page []byte) error {
		n, err := unix.Pread(fd, page, offsetBytes)
		if err == nil && n < len(page) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("read dm-integrity superblock of %s at byte %d: %w", device, offsetBytes, err)
		}
		sb, err = decodeSuperblock(page)
		if err != nil {
			return fmt.Errorf("dm-integrity superblock of %s at byte %d: %w", device, offsetBytes, err)
		}
		return nil
	})
	return sb, err
}

func zeroSuperblock(device string, offsetBytes int64) error {
	return direct(device, unix.O_RDWR, superblockBytes, func(fd int, page []byte) error {
		n, err := unix.Pwrite(fd, page, offsetBytes)
		if err == nil && n < len(page) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return fmt.Errorf("write zeros over dm-integrity superblock of %s at byte %d: %w", device, offsetBytes, err)
		}
		return unix.Fsync(fd)
	})
}

// wipe writes zeros over a device of sizeBytes.
func wipe(device string, sizeBytes int64, progress func(done, all int64)) error {
	return direct(device, unix.O_RDWR, wipeBytes, func(fd int, zeros []byte) error {
		for done := int64(0); done < sizeBytes; {
			n, err := unix.Pwrite(fd, zeros[:min(wipeBytes, sizeBytes-done)], done)
			if err == nil && n <= 0 {
				err = io.ErrShortWrite
			}
			if err != nil {
				return fmt.Errorf("write zeros over %s at byte %d of %d: %w", device, done, sizeBytes, err)
			}
			done += int64(n)
			if progress != nil {
				progress(done, sizeBytes)
			}
		}
		return unix.Fsync(fd)
	})
}

// direct opens a device past the page cache and lends use a zeroed buffer of n bytes,
// aligned as that wants it.
func direct(device string, flags, n int, use func(fd int, b []byte) error) (err error) {
	fd, err := unix.Open(device, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", device, err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("map %d bytes: %w", n, err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(b)) }()
	return use(fd, b)
}
