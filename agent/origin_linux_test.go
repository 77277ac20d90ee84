package agent

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// board is a fake /sys and /dev.
type board struct {
	t        *testing.T
	sys, dev string
}

func newBoard(t *testing.T) *board {
	dir := t.TempDir()
	b := &board{t, filepath.Join(dir, "sys"), filepath.Join(dir, "dev")}
	for _, d := range []string{filepath.Join(b.sys, "block"), b.dev} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.file("devices/pci0000:00/firmware_node/uid", "0")
	b.file("devices/pci0000:40/firmware_node/uid", "64")
	return b
}

func (b *board) file(path, text string) {
	b.t.Helper()
	path = filepath.Join(b.sys, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text+"\n"), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// plug puts a disk at a place below devices/.
func (b *board) plug(place string) string {
	b.t.Helper()
	at := filepath.Join(b.sys, "devices", place)
	if err := os.MkdirAll(at, 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Symlink(at, filepath.Join(b.sys, "block", filepath.Base(place))); err != nil {
		b.t.Fatal(err)
	}
	return filepath.Base(place)
}

const (
	fresh = iota // as it came from the builder
	owned        // with a volume
	other        // of another product
)

// format makes a disk of what is plugged in.
func (b *board) format(name string, what int) {
	b.t.Helper()
	seed := map[bool]string{true: "something", false: "probe"}[what == other]
	layout, err := partition.Plan(partition.Spec{
		ESPBytes: partition.MinESPBytes, SlotBytes: partition.AlignBytes, Volumes: []partition.VolumeSpec{{Name: "data"}}, Seed: seed,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	dev, err := partition.CreateFile(filepath.Join(b.dev, name), layout.SizeBytes)
	if err != nil {
		b.t.Fatal(err)
	}
	defer dev.Close()
	d, err := partition.Format(dev, layout, partition.FormatOptions{})
	if err != nil {
		b.t.Fatal(err)
	}
	if what == fresh {
		return
	}
	volume, _, err := d.Partition("data")
	if err == nil {
		_, err = volume.WriteAt([]byte("LUKS\xba\xbe"), 0)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// The nodes of device paths, as firmware encodes them.
func acpi(uid uint32) pathNode {
	return pathNode{nodeACPI, binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, hidPCI), uid)}
}
func pci(device, function byte) pathNode { return pathNode{nodePCI, []byte{function, device}} }
func scsi(target, unit byte) pathNode    { return pathNode{nodeSCSI, []byte{target, 0, unit, 0}} }
func sata(port byte) pathNode            { return pathNode{nodeSATA, []byte{port, 0, 0xff, 0xff, 0, 0}} }
func usb(port byte) pathNode             { return pathNode{nodeUSB, []byte{port, 0}} }
func nvme(namespace byte) pathNode {
	return pathNode{nodeNVMe, append([]byte{namespace, 0, 0, 0}, make([]byte, 8)...)}
}

// hardDrive is the ESP of probe's disks.
func hardDrive(t *testing.T) pathNode {
	t.Helper()
	layout, err := partition.Plan(partition.Spec{ESPBytes: partition.MinESPBytes, SlotBytes: partition.AlignBytes, Seed: "probe"})
	if err != nil {
		t.Fatal(err)
	}
	var guid [16]byte
	text := strings.ReplaceAll(layout.Partitions[0].GUID, "-", "")
	for i := range guid {
		n := slices.Index([]int{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15}, i)
		guid[n] = hexByte(text[2*i:])
	}
	data := append(make([]byte, 20), guid[:]...)
	return pathNode{nodeHardDrive, append(data, 2, signatureGUID)}
}

func hexByte(s string) byte {
	const digits = "0123456789abcdef"
	return byte(strings.IndexByte(digits, s[0])<<4 | strings.IndexByte(digits, s[1]))
}

func encodePath(nodes []pathNode) (b []byte) {
	for _, n := range nodes {
		b = binary.BigEndian.AppendUint16(b, n.kind)
		b = binary.LittleEndian.AppendUint16(b, uint16(4+len(n.data)))
		b = append(b, n.data...)
	}
	return b
}

// started is an event log of a boot from the ESP at a place.
func started(t *testing.T, nodes ...pathNode) origin {
	t.Helper()
	event := func(nodes ...pathNode) pcr.Event {
		path := encodePath(append(nodes, pathNode{0x7fff, nil}))
		data := append(binary.LittleEndian.AppendUint64(make([]byte, 24), uint64(len(path))), path...)
		return pcr.Event{PCR: 4, Type: pcr.EventBootServicesApp, Data: data}
	}
	file := pathNode{0x0404, []byte("\\\x00E\x00\x00\x00")}
	return originOf(pcr.Log{Events: []pcr.Event{
		event(acpi(0), pci(31, 7), hardDrive(t), file), // tried in vain
		event(append(slices.Clone(nodes), hardDrive(t), file)...),
		event(pathNode{0x0403, make([]byte, 16)}, file), // the kernel in the UKI's memory
	}})
}

// TestOrigin: the firmware's path of each kind of disk, and the kernel's. The name of the
// file, which some firmware writes in upper case (F19), does not count.
func TestOrigin(t *testing.T) {
	const bus = "pci0000:00/0000:00:"
	b := newBoard(t)
	for name, what := range map[string]int{
		b.plug(bus + "02.0/virtio1/block/vda"):                                            fresh,
		b.plug(bus + "03.0/virtio2/block/vdb"):                                            fresh,
		b.plug("pci0000:40/0000:40:02.0/virtio3/block/vdc"):                               fresh,
		b.plug(bus + "1c.0/0000:01:00.0/nvme/nvme0/nvme0n1"):                              fresh,
		b.plug(bus + "1c.0/0000:01:00.0/nvme/nvme0/nvme0n2"):                              fresh,
		b.plug(bus + "1f.2/ata3/host2/target2:0:0/2:0:0:0/block/sda"):                     fresh,
		b.plug(bus + "1f.2/ata4/host3/target3:0:0/3:0:0:0/block/sdb"):                     fresh,
		b.plug(bus + "04.0/virtio4/host4/target4:0:5/4:0:5:1/block/sdc"):                  fresh,
		b.plug(bus + "05.0/0000:03:00.0/host5/target5:2:0/5:2:0:0/block/sdd"):             fresh,
		b.plug(bus + "14.0/usb2/2-3/2-3:1.0/host6/target6:0:0/6:0:0:0/block/sde"):         fresh,
		b.plug(bus + "14.0/usb1/1-4/1-4.2/1-4.2:1.0/host7/target7:0:0/7:0:0:0/block/sdf"): fresh,
		b.plug(bus + "0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0/nvme/nvme1/nvme1n1"):   fresh,
		b.plug(bus + "06.0/virtio8/block/vdd"):                                            other,
		b.plug("virtual/block/loop0"):                                                     fresh,
		b.plug("virtual/nvme-subsystem/nvme-subsys2/nvme2n1"):                             fresh,
		b.plug(bus + "1a.0/mmc_host/mmc0/mmc0:0001/block/mmcblk0"):                        fresh,
	} {
		b.format(name, what)
	}
	for path, text := range map[string]string{
		"1c.0/0000:01:00.0/nvme/nvme0/nvme0n1/nsid": "1", "1c.0/0000:01:00.0/nvme/nvme0/nvme0n2/nsid": "2",
		"1f.2/ata3/ata_port/ata3/port_no": "1", "1f.2/ata4/ata_port/ata4/port_no": "2",
		"1d.0/0000:05:00.0/nvme/nvme2/model": "x",
	} {
		b.file("devices/"+bus+path, text)
	}
	b.file("devices/virtual/nvme-subsystem/nvme-subsys2/nvme2n1/nsid", "1")
	if err := os.Symlink(filepath.Join(b.sys, "devices", bus+"1d.0/0000:05:00.0/nvme/nvme2"), filepath.Join(b.sys, "devices/virtual/nvme-subsystem/nvme-subsys2/nvme2")); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		path []pathNode
		want string
	}{
		"virtio":                 {[]pathNode{acpi(0), pci(2, 0)}, "vda"},
		"virtio, its neighbour":  {[]pathNode{acpi(0), pci(3, 0)}, "vdb"},
		"other root bridge":      {[]pathNode{acpi(64), pci(2, 0)}, "vdc"},
		"other function":         {[]pathNode{acpi(0), pci(2, 1)}, ""},
		"nothing there":          {[]pathNode{acpi(0), pci(9, 0)}, ""},
		"other product there":    {[]pathNode{acpi(0), pci(6, 0)}, ""},
		"NVMe":                   {[]pathNode{acpi(0), pci(0x1c, 0), pci(0, 0), nvme(1)}, "nvme0n1"},
		"NVMe, second namespace": {[]pathNode{acpi(0), pci(0x1c, 0), pci(0, 0), nvme(2)}, "nvme0n2"},
		"NVMe, no such one":      {[]pathNode{acpi(0), pci(0x1c, 0), pci(0, 0), nvme(3)}, ""},
		"NVMe behind multipath":  {[]pathNode{acpi(0), pci(0x1d, 0), pci(0, 0), nvme(1)}, "nvme2n1"},
		"NVMe behind VMD":        {[]pathNode{acpi(0), pci(0x0e, 0), {0x0104, make([]byte, 20)}, nvme(1)}, "nvme1n1"},
		"SATA":                   {[]pathNode{acpi(0), pci(0x1f, 2), sata(0)}, "sda"},
		"SATA, second port":      {[]pathNode{acpi(0), pci(0x1f, 2), sata(1)}, "sdb"},
		"SATA, third port":       {[]pathNode{acpi(0), pci(0x1f, 2), sata(2)}, ""},
		"virtio-scsi":            {[]pathNode{acpi(0), pci(4, 0), scsi(5, 1)}, "sdc"},
		"RAID that counts alone": {[]pathNode{acpi(0), pci(5, 0), pci(0, 0), scsi(7, 0)}, "sdd"},
		"stick":                  {[]pathNode{acpi(0), pci(0x14, 0), usb(9)}, "sde"},
		"stick in a hub":         {[]pathNode{acpi(0), pci(0x14, 0), usb(1), usb(1)}, "sdf"},
		"stick in another port":  {[]pathNode{acpi(0), pci(0x14, 0), usb(1), usb(2)}, ""},
		"eMMC":                   {[]pathNode{acpi(0), pci(0x1a, 0), {0x031d, []byte{0}}}, "mmcblk0"},
		"of a vendor":            {[]pathNode{{0x0104, make([]byte, 16)}}, ""},
		"torn node":              {[]pathNode{acpi(0), {nodePCI, []byte{0}}}, ""},
	} {
		disks, there := started(t, tt.path...).disks(b.sys, b.dev)
		if got := strings.Join(disks, " "); got != tt.want || there != (tt.want != "" || name == "other product there") {
			t.Errorf("%s: %q, there: %v, want %q", name, got, there, tt.want)
		}
	}
}

// TestInstallMediumLeftIn (F77): which of several disks with the same release is used.
func TestInstallMediumLeftIn(t *testing.T) {
	const early, late = 100 * time.Millisecond, originTime
	place := map[string]string{
		"vda": "pci0000:00/0000:00:02.0/virtio1/block/vda", "vdb": "pci0000:00/0000:00:03.0/virtio2/block/vdb",
		"sda": "pci0000:00/0000:00:14.0/usb2/2-3/2-3:1.0/host6/target6:0:0/6:0:0:0/block/sda",
		"sdb": "pci0000:00/0000:00:14.0/usb2/2-4/2-4:1.0/host7/target7:0:0/7:0:0:0/block/sdb",
	}
	vda, vdb, vdc, sticks := []pathNode{acpi(0), pci(2, 0)}, []pathNode{acpi(0), pci(3, 0)}, []pathNode{acpi(0), pci(4, 0)}, []pathNode{acpi(0), pci(0x14, 0), usb(3)}
	for name, tt := range map[string]struct {
		disks   map[string]int
		found   string // of these, the disks that hold the root
		started []pathNode
		waited  time.Duration
		want    string // a disk, or an error's text
	}{
		"one disk, nothing known":        {map[string]int{"vda": owned}, "vda", nil, early, "vda"},
		"one new disk, nothing known":    {map[string]int{"vda": fresh}, "vda", nil, early, "vda"},
		"medium first":                   {map[string]int{"vda": fresh, "vdb": owned}, "vda vdb", vdb, early, "vdb"},
		"medium last":                    {map[string]int{"vda": owned, "vdb": fresh}, "vda vdb", vda, early, "vda"},
		"started from the medium":        {map[string]int{"vda": fresh, "vdb": owned}, "vda vdb", vda, early, "vda"},
		"copy":                           {map[string]int{"vda": owned, "vdb": owned}, "vda vdb", vdb, early, "vdb"},
		"two new ones":                   {map[string]int{"vda": fresh, "vdb": fresh}, "vda vdb", vdb, early, "vdb"},
		"medium, nothing known":          {map[string]int{"vda": fresh, "vdb": owned}, "vda vdb", nil, early, "vdb"},
		"copy, nothing known":            {map[string]int{"vda": owned, "vdb": owned}, "vda vdb", nil, late, "leave one of them plugged in"},
		"two new ones, nothing known":    {map[string]int{"vda": fresh, "vdb": fresh}, "vda vdb", nil, late, "leave one of them plugged in"},
		"own root is damaged":            {map[string]int{"vda": fresh, "vdb": owned}, "vda", vdb, late, "vdb, whose root is missing or damaged"},
		"older release on the other":     {map[string]int{"vda": owned, "vdb": owned}, "vdb", vdb, early, "vdb"},
		"own disk is slow":               {map[string]int{"vda": fresh}, "vda", vdc, early, "has not appeared"},
		"a place that cannot be found":   {map[string]int{"vda": owned}, "vda", vdc, late, "vda"},
		"started from a rescue medium":   {map[string]int{"vda": owned, "vdb": other}, "vda", vdb, early, "vda"},
		"sticks, and one is provisioned": {map[string]int{"sda": fresh, "sdb": owned}, "sda sdb", sticks, early, "sdb"},
		"sticks that are copies":         {map[string]int{"sda": owned, "sdb": owned}, "sda sdb", sticks, late, "leave one of them plugged in"},
		"stick and disk":                 {map[string]int{"sda": fresh, "vda": owned}, "sda vda", sticks, early, "sda"},
		"nothing at all":                 {nil, "", vda, late, errNoRoot.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBoard(t)
			for disk, what := range tt.disks {
				b.format(b.plug(place[disk]), what)
			}
			var found []rootPartition
			for _, disk := range strings.Fields(tt.found) {
				found = append(found, rootPartition{filepath.Join(b.dev, disk+"2"), filepath.Join(b.dev, disk)})
			}
			f := &rootFinder{log: slog.New(slog.DiscardHandler), volume: "data", sys: b.sys, dev: b.dev}
			if tt.started != nil {
				f.from = started(t, tt.started...)
			}
			got, err := f.choose(found, tt.waited)
			if err != nil && !strings.Contains(err.Error(), tt.want) || err == nil && filepath.Base(got.disk) != tt.want {
				t.Errorf("%v, %v, want %s", got, err, tt.want)
			}
		})
	}
}

// FuzzDevicePath: what is read is the path's beginning, whatever follows.
func FuzzDevicePath(f *testing.F) {
	f.Add(encodePath([]pathNode{acpi(0), pci(2, 0), nvme(1), {0x7fff, nil}}))
	f.Add([]byte{1, 1, 3, 0})
	f.Fuzz(func(t *testing.T, path []byte) {
		if nodes := parsePath(path); !bytes.HasPrefix(path, encodePath(nodes)) {
			t.Errorf("%x reads as %x", path, encodePath(nodes))
		}
		event := append(binary.LittleEndian.AppendUint64(make([]byte, 24), uint64(len(path))), path...)
		o := originOf(pcr.Log{Events: []pcr.Event{{Type: pcr.EventBootServicesApp, Data: event}}})
		if o.known() && len(o.esp) != 36 {
			t.Errorf("%+v", o)
		}
		o.disks(t.TempDir(), t.TempDir())
	})
}
