package qcow2

import "golang.org/x/sys/unix"

const (
	canSeekData = true
	seekData    = unix.SEEK_DATA
	seekHole    = unix.SEEK_HOLE
	errNoData   = unix.ENXIO // no data from here to the end
)
