package agent

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// All disks of a product have the same GUIDs and labels, the install medium and a copy
// for the shelf too. What tells them apart is where they are plugged in, which the
// firmware notes in its event log with each program that it starts.

// origin is the place from which the firmware says it started this boot. The zero value
// is one that is not known. It decides which of several equal disks is meant, and
// nothing about trust: what is on the disk is verified wherever it lies.
type origin struct {
	nodes []pathNode // from the root bridge to the disk
	esp   string     // GUID of the partition
}

// pathNode is a node of a device path (UEFI 2.10 §10.3).
type pathNode struct {
	kind uint16 // type and subtype
	data []byte
}

const (
	nodePCI       = 0x0101 // §10.3.2.1: function, device
	nodeACPI      = 0x0201 // §10.3.3: _HID, _UID
	nodeSCSI      = 0x0302 // §10.3.4.2: target, unit
	nodeUSB       = 0x0305 // §10.3.4.5: port, interface
	nodeSATA      = 0x0312 // §10.3.4.6: port, multiplier, unit
	nodeNVMe      = 0x0317 // §10.3.4.20: namespace, EUI-64
	nodeHardDrive = 0x0401 // §10.3.5.1: number, start, size, signature, format, kind of signature
	signatureGUID = 2

	hidPCI, hidPCIe = 0x0a0341d0, 0x0a0841d0 // PNP0A03, PNP0A08
)

// originOf is the place of the last program that came from a partition: before it are
// the disks that the firmware tried in vain.
func originOf(log pcr.Log) (o origin) {
	for _, e := range slices.Backward(log.Events) {
		if e.Type != pcr.EventBootServicesApp {
			continue
		}
		nodes := imageNodes(e.Data)
		n := slices.IndexFunc(nodes, func(n pathNode) bool { return n.kind == nodeHardDrive })
		if n < 0 || len(nodes[n].data) != 38 || nodes[n].data[37] != signatureGUID {
			continue
		}
		return origin{nodes: nodes[:n], esp: guidText(nodes[n].data[20:36])}
	}
	return origin{}
}

// imageNodes is the device path of a UEFI_IMAGE_LOAD_EVENT (PFP §10.2.3).
func imageNodes(event []byte) []pathNode {
	const fixed = 8 + 8 + 8 + 8 // location, length, link time, length of path
	if len(event) < fixed {
		return nil
	}
	path := event[fixed:]
	if n := binary.LittleEndian.Uint64(event[24:]); n < uint64(len(path)) {
		path = path[:n]
	}
	return parsePath(path)
}

// parsePath cuts a device path into its nodes, as far as it can be read.
func parsePath(path []byte) (nodes []pathNode) {
	for len(path) >= 4 {
		size := int(binary.LittleEndian.Uint16(path[2:]))
		if size < 4 || size > len(path) {
			break
		}
		nodes = append(nodes, pathNode{binary.BigEndian.Uint16(path), path[4:size]})
		path = path[size:]
	}
	return nodes
}

// guidText writes a GUID of 16 bytes as partition tables are shown.
func guidText(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

// known says whether the kernel's disks can be compared with the place.
func (o origin) known() bool {
	return len(o.nodes) > 1 && o.nodes[0].kind == nodeACPI && len(o.nodes[0].data) == 8 &&
		slices.Contains([]uint32{hidPCI, hidPCIe}, binary.LittleEndian.Uint32(o.nodes[0].data)) && o.nodes[1].kind == nodePCI
}

// disks are the disks at this place; more than one where the kernel does not say at
// which connector of a controller a disk is. there says that the place is not empty.
func (o origin) disks(sys, dev string) (disks []string, there bool) {
	if !o.known() {
		return nil, false
	}
	entries, err := os.ReadDir(filepath.Join(sys, "block"))
	if err != nil {
		return nil, false
	}
	var near []string // on the controller
	for _, e := range entries {
		switch o.compare(sys, e.Name()) {
		case exactly:
			disks = append(disks, e.Name())
		case perhaps:
			near = append(near, e.Name())
		}
	}
	if len(disks) == 0 {
		disks = near
	}
	there = len(disks) > 0
	disks = slices.DeleteFunc(disks, func(name string) bool { return !o.hasESP(filepath.Join(dev, name)) })
	return disks, there
}

// hasESP says whether the disk has the partition that the program came from.
func (o origin) hasESP(device string) bool {
	f, err := partition.OpenReadOnly(device)
	if err != nil {
		return false
	}
	defer f.Close()
	d, err := partition.Open(f)
	return err == nil && slices.ContainsFunc(d.Layout().Partitions, func(p partition.Partition) bool { return strings.EqualFold(p.GUID, o.esp) })
}

// agreement is how well a disk's place and the firmware's path agree.
type agreement int

const (
	not     agreement = iota
	perhaps           // the controller is right, and more cannot be said
	exactly
)

// compare compares the place with where the kernel has the disk.
func (o origin) compare(sys, disk string) (best agreement) {
	for _, path := range kernelPaths(sys, disk) {
		best = max(best, o.compareOne(sys, disk, path))
	}
	return best
}

// kernelPaths are the folders of a disk in /sys. A disk behind NVMe multipath is a
// virtual one with links to its controllers.
func kernelPaths(sys, disk string) []string {
	at, err := filepath.EvalSymlinks(filepath.Join(sys, "block", disk))
	if err != nil {
		return nil // went away
	}
	paths := []string{at}
	if parent := filepath.Dir(at); strings.HasPrefix(filepath.Base(parent), "nvme-subsys") {
		controllers, _ := filepath.Glob(filepath.Join(parent, "nvme*"))
		for _, c := range controllers {
			if real, err := filepath.EvalSymlinks(c); err == nil {
				paths = append(paths, real)
			}
		}
	}
	return paths
}

var (
	rootBridge = regexp.MustCompile(`^pci[0-9a-f]{4,}:[0-9a-f]{2}$`)
	pciAddress = regexp.MustCompile(`^[0-9a-f]{4,}:[0-9a-f]{2}:([0-9a-f]{2})\.([0-7])$`)
	ataPort    = regexp.MustCompile(`^ata[0-9]+$`)
	scsiUnit   = regexp.MustCompile(`^[0-9]+:[0-9]+:([0-9]+):([0-9]+)$`)
	usbPorts   = regexp.MustCompile(`^[0-9]+-([0-9.]+)$`)
)

func (o origin) compareOne(sys, disk, path string) agreement {
	parts := strings.Split(path, "/")
	bridge := slices.IndexFunc(parts, rootBridge.MatchString)
	if bridge < 0 {
		return not
	}
	uid, err := readNumber(filepath.Join(strings.Join(parts[:bridge+1], "/"), "firmware_node/uid"))
	if err == nil && uint32(uid) != binary.LittleEndian.Uint32(o.nodes[0].data[4:]) {
		return not
	}
	rest := o.nodes[1:]
	at := bridge + 1
	for ; len(rest) > 0 && rest[0].kind == nodePCI; rest, at = rest[1:], at+1 {
		if len(rest[0].data) != 2 || at >= len(parts) {
			return not
		}
		m := pciAddress.FindStringSubmatch(parts[at])
		if m == nil || m[1]+"."+m[2] != fmt.Sprintf("%02x.%x", rest[0].data[1], rest[0].data[0]) {
			return not
		}
	}
	if len(rest) == 0 {
		return exactly // the controller is the disk, as with virtio
	}
	return compareConnector(rest, sys, disk, parts, at)
}

// compareConnector compares the part of the path behind the controller. Numbers that
// firmware and kernel are known to count in the same way decide; others only prefer.
func compareConnector(nodes []pathNode, sys, disk string, parts []string, at int) agreement {
	le, data := binary.LittleEndian, nodes[0].data
	switch kind := nodes[0].kind; {
	case kind == nodeNVMe && len(data) == 12:
		if id, err := readNumber(filepath.Join(sys, "block", disk, "nsid")); err == nil {
			return exactlyIf(uint32(id) == le.Uint32(data))
		}
	case kind == nodeSATA && len(data) == 6:
		if n := indexFrom(parts, at, ataPort); n >= 0 {
			port, err := readNumber(filepath.Join(strings.Join(parts[:n+1], "/"), "ata_port", parts[n], "port_no"))
			if err == nil {
				return exactlyIf(port == int64(le.Uint16(data))+1)
			}
		}
	case kind == nodeSCSI && len(data) == 4:
		if n := indexFrom(parts, at, scsiUnit); n >= 0 {
			if m := scsiUnit.FindStringSubmatch(parts[n]); m[1] == fmt.Sprint(le.Uint16(data)) && m[2] == fmt.Sprint(le.Uint16(data[2:])) {
				return exactly
			}
		}
	case kind == nodeUSB:
		return compareUSB(nodes, parts[at:])
	}
	return perhaps
}

// compareUSB compares the ports of the hubs. The root hub's are left out: the kernel
// makes two hubs of an xHCI's one, and counts in each from 1.
func compareUSB(nodes []pathNode, parts []string) agreement {
	var want, got []string
	for _, n := range nodes {
		if n.kind == nodeUSB && len(n.data) == 2 {
			want = append(want, strconv.Itoa(int(n.data[0])+1))
		}
	}
	for _, p := range parts {
		if m := usbPorts.FindStringSubmatch(p); m != nil {
			got = strings.Split(m[1], ".")
		}
	}
	if len(want) != len(got) || !slices.Equal(want[1:], got[1:]) {
		return not
	}
	return perhaps
}

func exactlyIf(same bool) agreement {
	if same {
		return exactly
	}
	return not
}

func indexFrom(parts []string, from int, pattern *regexp.Regexp) int {
	for n := from; n < len(parts); n++ {
		if pattern.MatchString(parts[n]) {
			return n
		}
	}
	return -1
}

// readNumber reads a file of /sys that holds one.
func readNumber(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 0, 64)
}
