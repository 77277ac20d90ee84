package spec

import "slices"

// DefaultDiskSize and DefaultESPSize are what disk.size and disk.esp are when not given.
const (
	DefaultDiskSize Size = 4 << 30
	DefaultESPSize  Size = 1 << 30
)

// DefaultCheck is update.check when not given.
const DefaultCheck Interval = 6 * 60 * 60

// ApplyDefaults fills in what was not given:
//
//	arch              amd64
//	epoch             1980-01-01T00:00:00Z
//	hostname          the name
//	kernel.binary     kernel
//	kernel.tar        kernel.tar
//	disk.size         4 GiB
//	disk.esp          1 GiB
//	disk.data         one volume, {name: data, mount: /data}; [] is none
//	seal.policy       standard
//	seal.repair       automatic
//	recovery.console  text; recovery.threshold 1, when there are holders
//	secureboot.enroll off
//	evidence.every    24h, when there is a url
//	update.channel    stable, and check 6h, automatic true, stick true, when there is an update section
//	files[].mode      0600, folders 0700
//	services[].restart always
//
// disk.slot stays 0, which lets the builder take twice the size of the release.
// A label may still set restart, so call it after [Image.MergeLabel] or leave
// that default to image/runtime, which has the same one.
func (s *Spec) ApplyDefaults() {
	text := func(p *string, value string) {
		if *p == "" {
			*p = value
		}
	}
	size := func(p *Size, value Size) {
		if *p == 0 {
			*p = value
		}
	}
	text(&s.Arch, "amd64")
	text(&s.Hostname, s.Name)
	text(&s.Kernel.Binary, "kernel")
	text(&s.Kernel.Tar, "kernel.tar")
	text(&s.Seal.Policy, "standard")
	text(&s.Seal.Repair, "automatic")
	text(&s.SecureBoot.Enroll, "off")
	size(&s.Disk.Size, DefaultDiskSize)
	size(&s.Disk.ESP, DefaultESPSize)
	if s.Epoch == 0 {
		s.Epoch = DefaultEpoch
	}
	if s.Disk.Data == nil {
		s.Disk.Data = []Data{{Name: "data", Mount: "/data"}}
	}
	s.Recovery.applyDefaults()
	s.Evidence.applyDefaults()
	if u := &s.Update; u.given() {
		yes := func(p **bool) {
			if *p == nil {
				v := true
				*p = &v
			}
		}
		text(&u.Channel, "stable")
		if u.Check == 0 {
			u.Check = DefaultCheck
		}
		yes(&u.Automatic)
		yes(&u.Stick)
	}
	s.Services = slices.Clone(s.Services)
	for i := range s.Services {
		text(&s.Services[i].Restart, "always")
	}
	s.Files = slices.Clone(s.Files)
	for i := range s.Files {
		if f := &s.Files[i]; f.Mode == nil {
			mode := Mode(0o600)
			if f.Directory {
				mode = 0o700
			}
			f.Mode = &mode
		}
	}
}
