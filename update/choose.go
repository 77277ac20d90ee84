package update

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"
)

// Device is what a release is chosen for.
type Device struct {
	Product, Channel string
	Arch             string // GOARCH
	Version          string // that runs
	RootHash         string // dm-verity root hash of what runs, hex
	Epoch            int64  // security epoch of what runs
	Hardware         string // model, for releases that are not for all
	// ID is stable and unique to the device. With the version it decides whether a
	// rollout to a part of the fleet includes it; without ID none does.
	ID string
	// Failed are root hashes that were tried and did not work; see [State.FailedHashes].
	Failed []string
	// Want, when set, is the one version a person asked for. Then rollout, failures
	// and the order of versions do not count, the rest does.
	Want string
}

func (d Device) check() error {
	for what, s := range map[string]string{"product": d.Product, "channel": d.Channel, "architecture": d.Arch} {
		if !nameForm.MatchString(s) {
			return fmt.Errorf("device: %.80q is not a name of a %s", s, what)
		}
	}
	if !ValidVersion(d.Version) || d.Want != "" && !ValidVersion(d.Want) {
		return fmt.Errorf("device: version %.80q or wanted version %.80q is not one", d.Version, d.Want)
	}
	if !validHash(d.RootHash) {
		return fmt.Errorf("device: root hash %.80q is not a SHA-256", d.RootHash)
	}
	return nil
}

// Reason is why a release was not taken.
type Reason string

// Reasons, in the order in which they are looked for.
const (
	Unreadable    Reason = "it is described in a way this release does not understand"
	OtherProduct  Reason = "it is for another product"
	OtherChannel  Reason = "it is in another channel"
	OtherArch     Reason = "it is for another architecture"
	OtherHardware Reason = "it is for other hardware"
	Running       Reason = "it is running"
	NotWanted     Reason = "another version was asked for"
	NotNewer      Reason = "it is not newer"
	LowerEpoch    Reason = "its security epoch is lower"
	TooFarApart   Reason = "it needs a newer version to update from"
	HasFailed     Reason = "it was tried and failed"
	NotYet        Reason = "its rollout has not come to this device"
	NotCarried    Reason = "the medium does not have it"
	Superseded    Reason = "a newer one was taken"
)

// Skipped is a release that was not taken.
type Skipped struct {
	Name   string // of the TUF target
	Target Target // empty when Unreadable
	Reason Reason
}

// choose fills in what the verified targets have for the device. Newest first; of
// two that compare equal, the one published later, then the greater name.
func (c *Client) choose(ctx context.Context, d Device, set *trustedmetadata.TrustedMetadata, a *Answer) error {
	type entry struct {
		Skipped
		file *metadata.TargetFiles
	}
	var list []entry
	for name, file := range set.Targets[metadata.TARGETS].Signed.Targets {
		e := entry{Skipped: Skipped{Name: name}, file: file}
		if t, err := readTarget(name, file); err != nil {
			e.Reason = Unreadable
		} else {
			e.Target, e.Reason = t, d.refuses(t, c.o.Source)
			a.Newest = later(a.Newest, t.PublishedSec, a.Expires)
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(x, y entry) int {
		return cmp.Or(compareTargets(y.Target, x.Target), cmp.Compare(y.Name, x.Name))
	})
	for _, e := range list {
		switch {
		case e.Reason != "":
		case a.Candidate != nil:
			e.Reason = Superseded
		default:
			r, err := c.descriptor(ctx, e.Target, e.file)
			if errors.Is(err, errNotCarried) || err == nil && !c.carries(r, d) {
				e.Reason = NotCarried
				break
			}
			if err != nil {
				return err
			}
			a.Candidate = &Candidate{Release: r, Target: e.Target, source: c.o.Source}
			continue
		}
		a.Skipped = append(a.Skipped, e.Skipped)
	}
	return nil
}

func compareTargets(a, b Target) int {
	if a.Format == 0 || b.Format == 0 {
		return cmp.Compare(a.Format, b.Format) // unreadable ones last
	}
	return cmp.Or(CompareVersions(a.Version, b.Version), cmp.Compare(a.PublishedSec, b.PublishedSec))
}

func readTarget(name string, file *metadata.TargetFiles) (Target, error) {
	if file == nil || file.Custom == nil || len(file.Hashes["sha256"]) != sha256.Size || file.Length < 1 || file.Length > maxDescriptorBytes {
		return Target{}, fmt.Errorf("target %.100q has no custom field, no SHA-256 or no sensible length", name)
	}
	return parseTarget(name, *file.Custom)
}

// refuses says why the device does not take the release; "" is that it may.
func (d Device) refuses(t Target, source Source) Reason {
	_, byHand := source.(carried)
	switch {
	case t.Product != d.Product:
		return OtherProduct
	case t.Channel != d.Channel:
		return OtherChannel
	case t.Arch != d.Arch:
		return OtherArch
	case !matchesHardware(t.Hardware, d.Hardware):
		return OtherHardware
	case t.RootHash == d.RootHash:
		return Running
	case d.Want != "" && t.Version != d.Want:
		return NotWanted
	case d.Want == "" && CompareVersions(t.Version, d.Version) <= 0:
		return NotNewer
	case t.Epoch < d.Epoch:
		return LowerEpoch
	case t.MinFrom != "" && CompareVersions(d.Version, t.MinFrom) < 0:
		return TooFarApart
	case d.Want == "" && slices.Contains(d.Failed, t.RootHash):
		return HasFailed
	// Who walks up to a device with a stick means this device.
	case d.Want == "" && !byHand && !InRollout(d.ID, t.Version, t.RolloutPercent):
		return NotYet
	}
	return ""
}

// InRollout says whether a rollout to that share of the fleet includes the device.
// It depends on version as well, so that it is not always the same devices that go
// first, and growing percent never takes a device out again.
func InRollout(id, version string, percent int) bool {
	if percent >= 100 || id == "" {
		return percent >= 100
	}
	sum := sha256.Sum256([]byte(id + "\x00" + version))
	return int(binary.BigEndian.Uint64(sum[:8])%100) < percent
}

var errNotCarried = errors.New("the medium does not have it")

// descriptor fetches and verifies the Release of a target.
func (c *Client) descriptor(ctx context.Context, t Target, file *metadata.TargetFiles) (*Release, error) {
	path := DescriptorPath(t.Name(), fmt.Sprintf("%x", []byte(file.Hashes["sha256"])))
	if m, ok := c.o.Source.(carried); ok && !m.Has(path) {
		return nil, errNotCarried
	}
	w := walk{o: c.o, ctx: ctx}
	b, err := w.fetch(path, file.Length)
	if err != nil {
		return nil, err
	}
	if int64(len(b)) != file.Length || !sameSum(b, file.Hashes["sha256"]) {
		return nil, fmt.Errorf("%s: %w: %d bytes that are not the ones signed for; it was damaged on the way, or somebody changed it",
			path, ErrUntrusted, len(b))
	}
	r, err := ParseRelease(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if got := r.Target(t.Channel, t.RolloutPercent); !sameTarget(got, t) {
		return nil, fmt.Errorf("%s: %w: it describes %s with root %s, the signed list has %s with root %s",
			path, ErrUntrusted, got.Name(), got.RootHash, t.Name(), t.RootHash)
	}
	return r, nil
}

func sameTarget(a, b Target) bool {
	hardware := slices.Equal(a.Hardware, b.Hardware)
	return hardware && a.Name() == b.Name() && a.Epoch == b.Epoch && a.MinFrom == b.MinFrom && a.RootHash == b.RootHash &&
		a.PublishedSec == b.PublishedSec
}

// carries says whether a medium has what it takes to bring the device to r: the
// whole root or the patch for what runs, and every other blob.
func (c *Client) carries(r *Release, d Device) bool {
	m, ok := c.o.Source.(carried)
	if !ok {
		return true
	}
	root := false
	for _, b := range r.Blobs {
		has := m.Has(BlobPath(b.SHA256))
		switch {
		case b.Role == RolePack, b.Role == RolePatch && b.From == d.RootHash:
			root = root || has
		case !has && (b.Role == RoleUKI || b.Role == RoleLoader || b.Role == RoleTree):
			return false
		}
	}
	return root
}
