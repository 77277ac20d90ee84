package partition

import "io"

// Device is the storage a disk lives on: a block device on the box or on the
// technician's bench, an image file in the builder, memory in a test.
//
// Writes may reach the medium in any order until Sync returns; everything
// written before a Sync survives a power cut after it. Code that needs one
// write to be on the medium before another puts a Sync between them.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Size is the usable length in bytes; it does not change while the device is open.
	Size() int64
	// Sync returns when every write before it survives a power cut.
	Sync() error
}
