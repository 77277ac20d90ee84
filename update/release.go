package update

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-os/holdfast/image"
)

// Roles of blobs. A release has one blob of each but for patches, of which it has
// at most one from each older root.
const (
	RolePack   = "root-pack"   // the whole root, compressed
	RoleTree   = "root-tree"   // its dm-verity tree
	RolePieces = "root-pieces" // the root again, in small pieces; may be left out
	RoleUKI    = "uki"
	RoleLoader = "loader"
	RolePatch  = "patch" // from the root with hash From to this one
)

// Blob is a piece of content that a release names.
type Blob struct {
	Role string `json:"role"`
	// From is the dm-verity root hash of the release that a patch applies to.
	From      string `json:"from,omitempty"`
	SizeBytes int64  `json:"size_bytes"`
	SHA256    string `json:"sha256"` // hex
}

// Release is the file that a TUF target is: what a release consists of and what it
// asks of a device.
type Release struct {
	Format   int            `json:"format"` // 1
	Manifest image.Manifest `json:"manifest"`
	// Epoch is the security epoch; a device never goes to a lower one.
	Epoch int64 `json:"epoch"`
	// MinFrom is the oldest version that can update to this one; empty is any.
	MinFrom string `json:"min_from,omitempty"`
	// Hardware lists the models it is for; a final * stands for any ending. Empty is any model.
	Hardware     []string `json:"hardware,omitempty"`
	Notes        string   `json:"notes,omitempty"`
	PublishedSec int64    `json:"published_sec"` // Unix seconds
	Blobs        []Blob   `json:"blobs"`
}

// Target is the custom field of a TUF target: what choosing a release needs.
type Target struct {
	Format  int    `json:"format"` // 1
	Product string `json:"product"`
	Channel string `json:"channel"`
	Arch    string `json:"arch"` // GOARCH
	Version string `json:"version"`
	// RolloutPercent is how much of the fleet gets it, 0 to 100. It is here and not
	// in the Release, because it changes while the release does not.
	RolloutPercent int      `json:"rollout_percent"`
	Epoch          int64    `json:"epoch"`
	MinFrom        string   `json:"min_from,omitempty"`
	Hardware       []string `json:"hardware,omitempty"`
	RootHash       string   `json:"root_hash"`
	PublishedSec   int64    `json:"published_sec"`
}

// Name is the name of the TUF target.
func (t Target) Name() string {
	return t.Product + "/" + t.Channel + "/" + t.Arch + "/" + t.Version + ".json"
}

// Target is how the release is listed in a channel.
func (r *Release) Target(channel string, rolloutPercent int) Target {
	return Target{
		Format: 1, Product: r.Manifest.Name, Channel: channel, Arch: r.Manifest.Architecture, Version: r.Manifest.Version,
		RolloutPercent: rolloutPercent, Epoch: r.Epoch, MinFrom: r.MinFrom, Hardware: r.Hardware,
		RootHash: r.Manifest.Verity.RootHash, PublishedSec: r.PublishedSec,
	}
}

// Blob finds the blob of a role; from is the root hash that a patch applies to and
// empty for other roles.
func (r *Release) Blob(role, from string) (Blob, bool) {
	for _, b := range r.Blobs {
		if b.Role == role && b.From == from {
			return b, true
		}
	}
	return Blob{}, false
}

// ParseRelease reads a Release and checks it. Unknown fields are passed over, so
// that an older device understands a newer vendor.
func ParseRelease(text []byte) (*Release, error) {
	if len(text) > maxDescriptorBytes {
		return nil, fmt.Errorf("parse release: %d bytes, at most %d are allowed", len(text), maxDescriptorBytes)
	}
	var r Release
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("parse release: %w", err)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("parse release: %w", err)
	}
	return &r, nil
}

// Encode is the file of a Release.
func (r *Release) Encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("encode release: %w", err)
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		return nil, fmt.Errorf("encode release: %w", err)
	}
	if text.Len() > maxDescriptorBytes {
		return nil, fmt.Errorf("encode release: %d bytes, at most %d are allowed", text.Len(), maxDescriptorBytes)
	}
	return text.Bytes(), nil
}

func (r *Release) check() error {
	if r.Format != 1 {
		return fmt.Errorf("format %d; this version knows format 1", r.Format)
	}
	if err := r.Target("any", 100).Check(); err != nil {
		return err
	}
	if len(r.Blobs) == 0 || len(r.Blobs) > maxBlobs {
		return fmt.Errorf("%d blobs, from 1 to %d are allowed", len(r.Blobs), maxBlobs)
	}
	seen := map[[2]string]bool{}
	for _, b := range r.Blobs {
		if err := b.check(); err != nil {
			return fmt.Errorf("blob %.40q: %w", b.Role, err)
		}
		key := [2]string{b.Role, b.From}
		if seen[key] {
			return fmt.Errorf("blob %q is listed twice", b.Role)
		}
		seen[key] = true
	}
	// The manifest says what the files are; two truths would be one too many.
	for role, want := range map[string]image.File{RoleUKI: r.Manifest.UKI, RoleLoader: r.Manifest.Loader} {
		if b, ok := r.Blob(role, ""); ok && (b.SHA256 != want.SHA256 || b.SizeBytes != want.SizeBytes) {
			return fmt.Errorf("blob %q is not the file that the manifest names", role)
		}
	}
	return nil
}

func (b Blob) check() error {
	switch {
	case !nameForm.MatchString(b.Role):
		return errors.New("not a role")
	case b.From != "" && !validHash(b.From):
		return fmt.Errorf("from %.80q is not a root hash", b.From)
	case (b.From != "") != (b.Role == RolePatch):
		return errors.New("patches, and only they, say what they apply to")
	case b.SizeBytes < 0 || b.SizeBytes > MaxBlobBytes:
		return fmt.Errorf("%d bytes, at most %d are allowed", b.SizeBytes, int64(MaxBlobBytes))
	case !validHash(b.SHA256):
		return fmt.Errorf("%.80q is not a SHA-256", b.SHA256)
	}
	return nil
}

// Check says what is wrong with an entry; nothing is when a device would look at it.
func (t Target) Check() error {
	switch {
	case t.Format != 1:
		return fmt.Errorf("format %d; this version knows format 1", t.Format)
	case !nameForm.MatchString(t.Product):
		return fmt.Errorf("%.80q is not a product name", t.Product)
	case !nameForm.MatchString(t.Channel):
		return fmt.Errorf("%.80q is not a channel name", t.Channel)
	case !nameForm.MatchString(t.Arch):
		return fmt.Errorf("%.80q is not an architecture", t.Arch)
	case !ValidVersion(t.Version):
		return fmt.Errorf("%.80q is not a version of at most %d characters", t.Version, maxVersionChars)
	case t.MinFrom != "" && !ValidVersion(t.MinFrom):
		return fmt.Errorf("min_from %.80q is not a version", t.MinFrom)
	case t.RolloutPercent < 0 || t.RolloutPercent > 100:
		return fmt.Errorf("rollout of %d percent", t.RolloutPercent)
	case t.Epoch < 0:
		return fmt.Errorf("epoch %d is negative", t.Epoch)
	case !validHash(t.RootHash):
		return fmt.Errorf("root hash %.80q is not a SHA-256", t.RootHash)
	}
	return nil
}

// parseTarget reads the custom field of the target with that name.
func parseTarget(name string, custom []byte) (Target, error) {
	var t Target
	if err := json.Unmarshal(custom, &t); err != nil {
		return t, fmt.Errorf("custom field of target %.100q: %w", name, err)
	}
	if err := t.Check(); err != nil {
		return t, fmt.Errorf("custom field of target %.100q: %w", name, err)
	}
	if t.Name() != name {
		return t, fmt.Errorf("custom field of target %.100q describes %s", name, t.Name())
	}
	return t, nil
}

// matchesHardware says whether a model is among the patterns; none stands for all.
func matchesHardware(patterns []string, model string) bool {
	for _, p := range patterns {
		if prefix, open := strings.CutSuffix(p, "*"); p == model || open && strings.HasPrefix(model, prefix) {
			return true
		}
	}
	return len(patterns) == 0
}
