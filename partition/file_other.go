//go:build !linux

package partition

import (
	"errors"
	"os"
)

func blockSize(*os.File, bool) (int64, error) {
	return 0, errors.New("block devices are supported on Linux only; use an image file")
}

func dropCache(*os.File) error { return nil }
