package luks2

import (
	"errors"
	"fmt"
	"io"
)

// Report says what Read found of the two header copies.
type Report struct {
	Primary, Secondary CopyReport
}

// CopyReport is about one header copy.
type CopyReport struct {
	// Err is nil if the copy is whole and within the subset of this package.
	Err error
	// SeqID is the copy's sequence number, if Err is nil.
	SeqID uint64
	// Stale is set if the copy is good but not the same as the one that was taken.
	Stale bool
}

// Sound says that both copies are good and the same. If they are not,
// [Header.Repair] makes them.
func (r Report) Sound() bool {
	return r.Primary.Err == nil && !r.Primary.Stale && r.Secondary.Err == nil && !r.Secondary.Stale
}

// Read takes the header of the volume on a partition of sizeBytes: the good
// copy with the higher sequence number, the primary one if they are equal. A
// copy is good if its checksum is right and it says nothing that the package
// doc does not list. As long as one copy is good there is no error; if neither
// is, the error names what is wrong with each, and is [ErrNoHeader] if neither
// is a LUKS header at all.
//
// The header is read once and decoded from memory; a device that answers
// differently next time changes nothing.
func Read(dev io.ReaderAt, sizeBytes int64) (*Header, Report, error) {
	best, copies, report, err := readCopies(dev, sizeBytes)
	if err != nil {
		return nil, report, err
	}
	c := copies[best]
	h := &Header{
		seqID: c.bin.SeqID, sizeBytes: sizeBytes, meta: c.meta,
		origin: onDisk, identity: c.identity(), busy: c.meta.areas(), pending: map[int][]byte{},
	}
	h.uuid, _ = cString(c.bin.UUID[:])
	h.label, _ = cString(c.bin.Label[:])
	h.subsystem, _ = cString(c.bin.Subsystem[:])
	for w := range h.salts {
		if copies[w] != nil {
			h.salts[w] = copies[w].bin.Salt
		} else {
			h.salts[w] = otherSalt(c.bin.Salt)
		}
	}
	return h, report, nil
}

// readCopies decodes both copies and says which is the best; bad ones are nil.
func readCopies(dev io.ReaderAt, sizeBytes int64) (best which, copies [2]*headerCopy, report Report, err error) {
	if err := checkSize(sizeBytes); err != nil {
		return 0, copies, report, fmt.Errorf("read LUKS2 header: %w", err)
	}
	var errs [2]error
	for _, w := range []which{primary, secondary} {
		raw := make([]byte, headerBytes)
		if err := readFull(dev, raw, w.offset()); err != nil {
			errs[w] = fmt.Errorf("read at byte %d: %w", w.offset(), err)
			continue
		}
		c, err := decodeCopy(w, raw)
		if err != nil {
			errs[w] = err
			continue
		}
		copies[w] = c
	}
	report = Report{Primary: CopyReport{Err: errs[primary]}, Secondary: CopyReport{Err: errs[secondary]}}
	p, s := copies[primary], copies[secondary]
	switch {
	case p == nil && s == nil:
		return 0, copies, report, noCopy(errs)
	case p == nil || (s != nil && s.bin.SeqID > p.bin.SeqID):
		best = secondary
	}
	for w, r := range []*CopyReport{&report.Primary, &report.Secondary} {
		if c := copies[w]; c != nil {
			r.SeqID = c.bin.SeqID
			r.Stale = c.identity() != copies[best].identity()
		}
	}
	return best, copies, report, nil
}

func noCopy(errs [2]error) error {
	if errors.Is(errs[primary], ErrNoHeader) && errors.Is(errs[secondary], ErrNoHeader) {
		return fmt.Errorf("read LUKS2 header: %w", ErrNoHeader)
	}
	// %v: one copy without a magic does not make this ErrNoHeader.
	return fmt.Errorf("read LUKS2 header: primary: %v; secondary: %v", errs[primary], errs[secondary])
}

// checkSize wants room for the headers, the key areas and some data.
func checkSize(sizeBytes int64) error {
	if sizeBytes < dataOffset+areaAlign {
		return fmt.Errorf("the partition has %d bytes and a volume needs at least %d: it is too small, or was truncated", sizeBytes, dataOffset+areaAlign)
	}
	return nil
}
