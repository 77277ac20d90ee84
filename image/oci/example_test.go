package oci_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/tree"
)

// A layer put into an image, and the image read back.
func ExampleOpen() {
	dir, err := os.MkdirTemp("", "layout")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	root := tree.NewDir(0o755)
	program := &tree.Node{Mode: tree.TypeRegular | 0o755, Content: tree.Bytes("#!/bin/sh\n")}
	if err := root.Put("/usr/bin/app", program); err != nil {
		log.Fatal(err)
	}
	config := oci.Config{Entrypoint: []string{"/usr/bin/app"}}
	if _, err := oci.WriteLayout(dir, []*tree.Node{root}, config, oci.LayoutOptions{Ref: "v1"}); err != nil {
		log.Fatal(err)
	}

	ref, err := oci.ParseRef("oci:" + dir + ":v1")
	if err != nil {
		log.Fatal(err)
	}
	im, err := oci.Open(context.Background(), ref, oci.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	files, err := im.Tree(oci.TreeOptions{EpochSec: 1_700_000_000})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(im.Config.Entrypoint, files.Lookup("/usr/bin/app").Content.Size())
	fmt.Println(im.Digest)
	// Output:
	// [/usr/bin/app] 10
	// sha256:18a6443b65b54f5391784c7a180f347cffd49c7827d40a8f03cc3eaa8781f32a
}
