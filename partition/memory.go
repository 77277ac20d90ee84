package partition

import (
	"fmt"
	"io"
	"sync"
)

// pageBytes is the unit in which [Memory] allocates and [Memory.Clone] shares.
const pageBytes = 64 << 10

// Memory is a [Device] in memory. Pages never written cost nothing and read as
// zeros, so a disk of many gigabytes that holds little is cheap. Like a disk, it may
// be read and written at once: a slot is written while another one is read.
type Memory struct {
	mu        sync.RWMutex // over all of the below, and the pages' bytes
	sizeBytes int64
	pages     map[int64]*page
	owner     *owner // pages with another owner are shared and copied before a write
}

type page struct {
	data  [pageBytes]byte
	owner *owner
}

// owner is compared by address, so it must not be of size zero.
type owner struct{ _ byte }

// NewMemory returns a device of sizeBytes zeros.
func NewMemory(sizeBytes int64) *Memory {
	return &Memory{sizeBytes: sizeBytes, pages: map[int64]*page{}, owner: new(owner)}
}

// Clone returns an independent device with the same content. Pages are shared
// until one side writes them.
func (m *Memory) Clone() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Memory{sizeBytes: m.sizeBytes, pages: make(map[int64]*page, len(m.pages)), owner: new(owner)}
	for i, p := range m.pages {
		c.pages[i] = p
	}
	m.owner = new(owner) // what both now hold belongs to neither
	return c
}

// Size is the length in bytes.
func (m *Memory) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.sizeBytes
}

// Sync does nothing: memory keeps no write back.
func (m *Memory) Sync() error { return nil }

// Resize makes the device longer or shorter, as a hypervisor or a larger disk
// does. It breaks the promise of [Device.Size] and is for tests and builders
// that hold no view of it.
func (m *Memory) Resize(sizeBytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, p := range m.pages {
		start := i * pageBytes
		switch {
		case start >= sizeBytes:
			delete(m.pages, i)
		case start+pageBytes > sizeBytes:
			q := m.writable(i, p)
			clear(q.data[sizeBytes-start:])
		}
	}
	m.sizeBytes = sizeBytes
}

// ReadAt implements [io.ReaderAt].
func (m *Memory) ReadAt(b []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off < 0 {
		return 0, fmt.Errorf("read memory device at %d: negative offset", off)
	}
	if off >= m.sizeBytes {
		return 0, io.EOF
	}
	var err error
	if rest := m.sizeBytes - off; int64(len(b)) > rest {
		b, err = b[:rest], io.EOF
	}
	for n := 0; n < len(b); {
		i, from := (off+int64(n))/pageBytes, (off+int64(n))%pageBytes
		part := b[n:min(len(b), n+int(pageBytes-from))]
		if p := m.pages[i]; p != nil {
			copy(part, p.data[from:])
		} else {
			clear(part)
		}
		n += len(part)
	}
	return len(b), err
}

// WriteAt implements [io.WriterAt]. A write that would cross the end changes nothing.
func (m *Memory) WriteAt(b []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < 0 || int64(len(b)) > m.sizeBytes-off {
		return 0, fmt.Errorf("write %d bytes at %d of a memory device of %d bytes: out of range", len(b), off, m.sizeBytes)
	}
	for n := 0; n < len(b); {
		i, from := (off+int64(n))/pageBytes, (off+int64(n))%pageBytes
		n += copy(m.writable(i, m.pages[i]).data[from:], b[n:])
	}
	return len(b), nil
}

// writable is page i, present and not shared.
func (m *Memory) writable(i int64, p *page) *page {
	if p != nil && p.owner == m.owner {
		return p
	}
	q := &page{owner: m.owner}
	if p != nil {
		q.data = p.data
	}
	m.pages[i] = q
	return q
}
