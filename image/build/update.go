package build

import (
	"bytes"
	"errors"
	"fmt"

	"filippo.io/age"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/tree"
)

// Limits of what the update section names; package update reads no larger root.
const (
	maxTUFRootBytes = 512 << 10
	maxCABytes      = 256 << 10
	maxKeyBytes     = 16 << 10
)

// trust is what a release knows of its updates. The zero value takes none.
type trust struct {
	update image.Update
	root   []byte // root.json
	fleet  []byte // age identities; nil is none
}

// readTrust reads what the update section names and checks it, before anything that takes long.
func (b *builder) readTrust() (trust, error) {
	u := b.spec.Update
	if u.Root == "" {
		return trust{}, nil
	}
	root, err := b.small(u.Root, maxTUFRootBytes)
	if err == nil {
		// The type, the form, and a threshold of its own keys: what a device asks of it.
		_, err = trustedmetadata.New(root)
	}
	if err != nil {
		return trust{}, b.at("update.root", fmt.Errorf("%w; it is the root.json that holdfast repo root prints", err))
	}
	t := trust{root: root, update: image.Update{
		URL: u.URL, Channel: u.Channel, CheckSec: u.Check.Seconds(),
		WindowStartMin: u.Window.StartMin, WindowEndMin: u.Window.EndMin,
		Automatic: u.Automatic == nil || *u.Automatic, Stick: u.Stick == nil || *u.Stick,
		WriteBack: u.WriteBack, Epoch: u.Epoch, Hardware: u.Hardware,
	}}
	if u.FleetKey != "" {
		if t.fleet, err = b.small(u.FleetKey, maxKeyBytes); err == nil {
			err = checkFleetKey(u.FleetKey, t.fleet)
		}
		if err != nil {
			return trust{}, b.at("update.fleet_key", err)
		}
	}
	t.update.CAPEM, err = b.certificates("update.ca", u.CA)
	return t, err
}

// checkFleetKey tells the usual mistakes without the key: age quotes what it cannot read.
func checkFleetKey(name string, text []byte) error {
	identities, err := age.ParseIdentities(bytes.NewReader(text))
	switch {
	case bytes.HasPrefix(text, []byte("age1")):
		return errors.New(name + " is a recipient, for holdfast bundle --recipient; the device needs the identity, which begins with AGE-SECRET-KEY")
	case err != nil || len(identities) == 0:
		return errors.New(name + " is no age identity; make one: age-keygen -o fleet.key")
	}
	return nil
}

// addTrust puts root.json and the fleet's key where the device looks for them.
func (b *builder) addTrust(root *tree.Node, t trust) error {
	if t.root == nil {
		return nil
	}
	if err := b.put(root, image.TUFRootPath, 0o644, tree.Bytes(t.root)); err != nil || t.fleet == nil {
		return err
	}
	return b.put(root, image.FleetKeyPath, 0o600, tree.Bytes(t.fleet))
}
