package partition_test

import (
	"context"
	"fmt"

	"github.com/holdfast-os/holdfast/partition"
)

// Make a disk with a release in slot A, then update it as the appliance does.
func Example() {
	dev := partition.NewMemory(256 << 20) // or CreateFile, OpenFile
	layout, err := partition.Plan(partition.Spec{
		SizeBytes: dev.Size(), ESPBytes: 64 << 20, SlotBytes: 16 << 20,
		Volumes: []partition.VolumeSpec{{Name: "data"}}, Seed: "acme-gate",
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	disk, err := partition.Format(dev, layout, partition.FormatOptions{})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	for _, step := range []struct {
		slot partition.Slot
		text string
		o    partition.WriteOptions
	}{
		{partition.SlotA, "1.0", partition.WriteOptions{}},
		{partition.SlotB, "1.1", partition.WriteOptions{Tries: 3, Running: partition.SlotA}},
	} {
		contents := partition.Contents{
			Root: partition.Bytes("root image " + step.text), UKI: partition.Bytes("kernel " + step.text),
			Loader: partition.Bytes("systemd-boot"), Version: step.text,
		}
		if err := disk.WriteSlot(ctx, step.slot, contents, step.o, nil); err != nil {
			fmt.Println(err)
			return
		}
	}
	show := func() {
		entries, err := disk.Entries()
		if err != nil {
			fmt.Println(err)
		}
		for _, e := range entries {
			fmt.Printf("slot %s: version %s, installation %d, good %v, tries left %d\n", e.Slot, e.Version, e.Sequence, e.Good(), e.TriesLeft)
		}
	}
	show()
	if err := disk.Bless(partition.SlotB); err != nil {
		fmt.Println(err)
	}
	show()
	// Output:
	// slot b: version 1.1, installation 2, good false, tries left 3
	// slot a: version 1.0, installation 1, good true, tries left 0
	// slot b: version 1.1, installation 2, good true, tries left 0
	// slot a: version 1.0, installation 1, good true, tries left 0
}
