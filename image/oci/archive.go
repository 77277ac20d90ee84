package oci

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// dockerImage is an entry of manifest.json in what `docker save` writes
// (github.com/moby/moby image/spec/v1.2.md).
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// dockerArchive opens a `docker save` archive. It names its layers without
// digests; the config's diffIDs verify them, and the config's own name is
// usually its digest.
func (op *opener) dockerArchive(file, tag string) error {
	root, err := op.archive(file)
	if err != nil {
		return err
	}
	s := archiveStore{root}
	var images []dockerImage
	if err := readJSONFile(s.file, "manifest.json", &images); err != nil {
		return fmt.Errorf("not a docker archive: %w", err)
	}
	im, err := chooseDocker(images, tag)
	if err != nil {
		return err
	}
	b, err := s.file(im.Config)
	if err != nil {
		return err
	}
	text, err := b.readAll(maxManifestBytes)
	if err != nil {
		return fmt.Errorf("config %s: %w", im.Config, err)
	}
	sum := digest.FromBytes(text)
	if err := verified("config", nameDigest(im.Config), sum, nil); err != nil {
		return err
	}
	op.im.Digest = sum.String()
	diffIDs, err := op.config(text)
	if err != nil {
		return err
	}
	if len(diffIDs) != len(im.Layers) || len(diffIDs) > maxLayers {
		return fmt.Errorf("manifest.json lists %d layers, the config %d, at most %d are read", len(im.Layers), len(diffIDs), maxLayers)
	}
	var wanted []wantedLayer
	for i, name := range im.Layers {
		b, err := s.file(name)
		if err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(im.Layers), err)
		}
		wanted = append(wanted, wantedLayer{blob: b, diffID: diffIDs[i]})
	}
	return op.readLayers(wanted)
}

// nameDigest is the digest that a config's name promises: HEX.json,
// blobs/sha256/HEX or, from go-containerregistry, sha256:HEX; "" for others.
func nameDigest(name string) digest.Digest {
	hex := strings.TrimPrefix(strings.TrimSuffix(path.Base(name), ".json"), "sha256:")
	d := digest.Digest("sha256:" + hex)
	if d.Validate() != nil {
		return ""
	}
	return d
}

func chooseDocker(images []dockerImage, tag string) (dockerImage, error) {
	if len(images) == 0 {
		return dockerImage{}, errors.New("the docker archive is empty")
	}
	if tag == "" && len(images) == 1 {
		return images[0], nil
	}
	var tags []string
	for _, im := range images {
		if tag != "" && slices.Contains(im.RepoTags, tag) {
			return im, nil
		}
		tags = append(tags, im.RepoTags...)
	}
	if tag == "" {
		return dockerImage{}, fmt.Errorf("the docker archive holds %d images, say which with docker-archive:PATH:TAG: %s", len(images), strings.Join(tags, ", "))
	}
	return dockerImage{}, fmt.Errorf("the docker archive has no image %q; it has %s", tag, strings.Join(tags, ", "))
}
