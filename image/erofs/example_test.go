package erofs_test

import (
	"bytes"
	"fmt"
	"io"

	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/verity"
)

// A root is written and hashed in one pass. The output is the same on every
// machine and on every day; if a change of this package changes it, every
// release that is built again changes too.
func Example() {
	root := tree.NewDir(0o755)
	motd := &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes("It holds.\n")}
	if err := root.Put("/etc/motd", motd); err != nil {
		fmt.Println(err)
		return
	}

	var partition bytes.Buffer
	hashes, err := verity.NewWriter(verity.Options{Salt: []byte("from the build")})
	if err != nil {
		fmt.Println(err)
		return
	}
	stats, err := erofs.Write(io.MultiWriter(&partition, hashes), root, erofs.Options{Label: "root"})
	if err != nil {
		fmt.Println(err)
		return
	}
	v, err := hashes.Finish(&partition)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(stats.Bytes, stats.Inodes, v.TotalBytes)
	fmt.Println(v.RootHash)

	f, err := erofs.Open(bytes.NewReader(partition.Bytes()), stats.Bytes)
	if err != nil {
		fmt.Println(err)
		return
	}
	n, err := f.Lookup("/etc/motd")
	if err != nil {
		fmt.Println(err)
		return
	}
	text, err := io.ReadAll(f.Data(n))
	fmt.Printf("%s%v\n", text, err)
	// Output:
	// 12288 3 20480
	// 5f1dd83b5b9a96acd681399127d0bcb7811b10955c8d6b41041ee235243643b1
	// It holds.
	// <nil>
}
