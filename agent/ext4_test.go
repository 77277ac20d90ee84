package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// field reads a number from dumpe2fs -h.
func field(t *testing.T, dump []byte, name string) int {
	t.Helper()
	m := regexp.MustCompile(name + `:\s+(\d+)`).FindSubmatch(dump)
	if m == nil {
		t.Fatalf("dumpe2fs shows no %q:\n%s", name, dump)
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestFormatExt4(t *testing.T) {
	for _, mib := range []int64{16, 17, 33, 64, 100, 127, 128, 129, 200, 384, 500, 620, 683, 700, 777, 1000, 1023, 1024} {
		for _, short := range []int64{0, 4096, 5 * 4096, 1000} {
			t.Run(fmt.Sprintf("%dMiB-%d", mib, short), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "volume")
				f, err := os.Create(path)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				size := mib<<20 - short
				if err := f.Truncate(size); err != nil {
					t.Fatal(err)
				}
				if err := formatExt4(f, size, "data"); err != nil {
					t.Fatal(err)
				}
				if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
					t.Errorf("e2fsck: %v\n%s", err, out)
				}
				dump, err := exec.Command("dumpe2fs", "-h", path).CombinedOutput()
				if err != nil {
					t.Fatalf("dumpe2fs: %v\n%s", err, dump)
				}
				// What Linux computes in ext4_init_inode_table must not exceed the table.
				if n := field(t, dump, "Inodes per group"); n%ext4InodesPerBlock != 0 {
					t.Errorf("%d inodes a group do not fill blocks of %d", n, ext4InodesPerBlock)
				}
			})
		}
	}
}
