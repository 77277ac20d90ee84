//go:build !linux

package qcow2

import "io"

// Other systems number these differently or have no holes; everything is read.
const (
	canSeekData = false
	seekData    = io.SeekStart
	seekHole    = io.SeekStart
)

// errNoData never occurs.
var errNoData = io.ErrUnexpectedEOF
