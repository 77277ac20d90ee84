package spec

import (
	"slices"
	"strings"
)

// Validate says whether a build has all it needs, and needs nothing that
// Holdfast does not do. The error is [*Errors]. Call it on what [Parse] or
// [Merge] returned; it needs no defaults applied and changes nothing.
func (s *Spec) Validate() error {
	r := report{pos: s.pos}
	r.checkSpec(s) // a Spec made or changed by a program is not checked yet
	for _, c := range []struct{ key, value, remedy string }{
		{"name", s.Name, "write name: my-appliance"},
		{"version", s.Version, "write version: 1.0.0"},
		{"kernel.image", s.Kernel.Image, "write kernel: {image: ...}"},
	} {
		if c.value == "" {
			r.errorf(c.key, c.remedy, "a build needs it")
		}
	}
	if s.Arch == "arm64" {
		r.errorf("arch", "use amd64", "building for arm64 is not in this version")
	}
	if len(s.Handoff) > 0 {
		for _, key := range []string{"services", "onshutdown"} {
			if key == "services" && len(s.Services) > 0 || key == "onshutdown" && len(s.OnShutdown) > 0 {
				r.errorf(key, "let that init start them, or leave handoff out", "handoff makes the image's own init PID 1, which does not run them")
			}
		}
	}
	if len(s.Handoff) == 0 && len(s.Services) == 0 && len(s.OnBoot) == 0 {
		r.errorf("services", "write services or handoff", "the appliance would run nothing")
	}
	if s.Update.given() && s.Update.Root == "" {
		r.errorf("update.root", "write root: root.json, as holdfast repo root prints it", "updates need the keys that releases are signed with")
	}
	if s.Disk.EncryptSlots && s.Disk.Data != nil && len(s.Disk.Data) == 0 {
		r.errorf("disk.encrypt_slots", "give the appliance a data volume", "the slots' key lies on the data volumes, and there is none")
	}
	r.validateRecovery(s)
	r.validateEvidence(s)
	r.validateEpoch(s)
	r.validateImages(s)
	return r.err()
}

const (
	rollbackProof = "rollback-proof"
	// maxSealEpoch bounds the signatures in an image: there is one for each epoch.
	maxSealEpoch = 64
)

// validateEpoch: a rollback-proof release is signed for the epochs from 1 to its own.
func (r *report) validateEpoch(s *Spec) {
	epoch := s.Update.Epoch
	if s.Seal.Policy != rollbackProof || epoch >= 1 && epoch <= maxSealEpoch {
		return
	}
	r.errorf("update.epoch", "write update: {epoch: 1}, and one more when older releases shall no longer open the volumes",
		"with seal.policy %s the security epoch is 1 to %d, not %d", rollbackProof, maxSealEpoch, epoch)
}

// validateImages looks at what images need from the rest of the spec, which
// may be in another file than they are.
func (r *report) validateImages(s *Spec) {
	image := func(at, name string) {
		if strings.HasPrefix(name, "@") {
			r.errorf(at, "build the image and give its name", "LinuxKit's package template %q is not in this version", name)
		}
	}
	image("kernel.image", s.Kernel.Image)
	for i, name := range s.Init {
		image(index("init", i), name)
	}
	for i, v := range s.Volumes {
		image(index("volumes", i)+".image", v.Image)
		if v.Format == "oci" {
			r.errorf(index("volumes", i)+".format", "use filesystem", "a volume that is an OCI layout is not in this version")
		}
	}
	s.sections(func(at string, _ kind, im *Image) {
		image(join(at, "image"), im.Image)
		for _, u := range im.Unsupported() {
			r.errorf(join(at, u[0]), u[1], "not in this version")
		}
		for _, binds := range []keyed[[]Bind]{{"binds", im.Binds}, {"binds.add", im.BindsAdd}} {
			for i, b := range binds.value {
				if b.IsVolume() && b.Source != "" {
					r.volume(s, index(join(at, binds.key), i), b.Source, b.Options)
				}
			}
		}
		for i, m := range im.Mounts {
			if m.IsVolume() {
				r.volume(s, index(join(at, "mounts"), i), m.Source, m.Options)
			}
		}
	})
}

// volume checks the use of one that the spec has to have.
func (r *report) volume(s *Spec, at, name string, options []string) {
	i := slices.IndexFunc(s.Volumes, func(v Volume) bool { return v.Name == name })
	if i < 0 {
		names := make([]string, len(s.Volumes))
		for j, v := range s.Volumes {
			names[j] = v.Name
		}
		r.errorf(at, didYouMean(name, names), "there is no volume %q", name)
		return
	}
	if v := s.Volumes[i]; (v.ReadOnly || v.Image != "") && slices.Contains(options, "rw") {
		r.errorf(at, "drop rw", "volume %q is read-only", name)
	}
}
