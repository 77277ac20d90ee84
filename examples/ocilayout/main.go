// Command ocilayout puts files into a one-layer container image, as an OCI
// layout folder: what `ko` or a Dockerfile does for a product, without either.
//
//	ocilayout -o out/etcd -entrypoint /usr/bin/etcd build/etcd=/usr/bin/etcd
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/tree"
)

func main() {
	out := flag.String("o", "", "OCI layout `folder` to make")
	entrypoint := flag.String("entrypoint", "", "the image's entrypoint")
	folders := flag.String("folders", "", "empty folders to make, separated by commas")
	flag.Parse()
	if err := run(*out, *entrypoint, *folders, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(out, entrypoint, folders string, files []string) error {
	root := tree.NewDir(0o755)
	for dir := range strings.SplitSeq(folders, ",") {
		if _, err := root.MkdirAll(dir, 0); err != nil {
			return err
		}
	}
	for _, f := range files {
		from, to, ok := strings.Cut(f, "=")
		if !ok {
			return fmt.Errorf("%q is not FILE=PATH", f)
		}
		info, err := os.Stat(from)
		if err != nil {
			return err
		}
		n := &tree.Node{Mode: tree.TypeRegular | uint32(info.Mode().Perm()), Content: tree.File{Path: from, SizeBytes: info.Size()}}
		if err := root.Put(to, n); err != nil {
			return err
		}
	}
	digest, err := oci.WriteLayout(out, []*tree.Node{root}, oci.Config{Entrypoint: []string{entrypoint}}, oci.LayoutOptions{})
	if err != nil {
		return err
	}
	fmt.Println(digest)
	return nil
}
