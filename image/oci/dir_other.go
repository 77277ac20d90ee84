//go:build !linux

package oci

import "errors"

// dir needs Linux's lstat for owners, devices and extended attributes.
func (op *opener) dir(string) error {
	return errors.New("dir: images are read on Linux only; use a tar")
}
