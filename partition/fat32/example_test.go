package fat32_test

import (
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/partition/fat32"
)

func Example() {
	dev, err := os.CreateTemp("", "esp") // an *os.File is a Device
	if err != nil {
		log.Fatal(err)
	}
	defer os.Remove(dev.Name())
	defer dev.Close()
	const sizeBytes = 64 << 20
	if err := dev.Truncate(sizeBytes); err != nil {
		log.Fatal(err)
	}
	if err := fat32.Format(dev, sizeBytes, fat32.Options{Label: "ESP"}); err != nil {
		log.Fatal(err)
	}
	esp, err := fat32.Open(dev, sizeBytes)
	if err != nil {
		log.Fatal(err)
	}
	built := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	entry := "title Holdfast\n"
	if err := esp.WriteFile("loader/entries/a+3.conf", int64(len(entry)), strings.NewReader(entry), built); err != nil {
		log.Fatal(err)
	}
	if err := esp.Rename("loader/entries/a+3.conf", "loader/entries/a.conf"); err != nil {
		log.Fatal(err)
	}
	list, err := esp.ReadDir("loader/entries")
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range list {
		fmt.Println(e.Name, e.SizeBytes, e.ModTime)
	}
	f, err := esp.Open("LOADER/ENTRIES/A.CONF")
	if err != nil {
		log.Fatal(err)
	}
	content, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s%d bytes free\n", content, esp.FreeBytes())
	// Output:
	// a.conf 15 2026-11-21 00:00:00 +0000 UTC
	// title Holdfast
	// 66041856 bytes free
}
