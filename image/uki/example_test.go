package uki_test

import (
	"bytes"
	"fmt"
	"os"

	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

func ExampleAssemble() {
	stub, err := os.ReadFile("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
	if err != nil {
		fmt.Println(err)
		return
	}
	image, err := uki.Assemble(uki.Input{
		Stub:      stub,
		Linux:     tree.Bytes(stub), // any EFI program will do for an example
		Initrd:    tree.Bytes("070701..."),
		OSRelease: []byte("ID=gateway\n"),
		Cmdline:   "console=ttyS0",
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, m := range image.Measured {
		fmt.Println(m.Name)
	}
	unlock := pcr.Extend(image.PCR11, []byte("enter-initrd"))
	fmt.Println(len(unlock), "bytes of PCR 11 to seal to")

	var file bytes.Buffer
	r, err := image.Open()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()
	if _, err := file.ReadFrom(r); err != nil {
		fmt.Println(err)
		return
	}
	parsed, err := uki.Parse(bytes.NewReader(file.Bytes()), int64(file.Len()))
	if err != nil {
		fmt.Println(err)
		return
	}
	_, sbat := parsed.Section(".sbat")
	fmt.Println("SBAT kept:", sbat)
	// Output:
	// .linux
	// .osrel
	// .cmdline
	// .initrd
	// 32 bytes of PCR 11 to seal to
	// SBAT kept: true
}
