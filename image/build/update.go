package build

import (
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/tree"
)

// Limits of what the update section names; package update reads no larger root.
const (
	maxTUFRootBytes = 512 << 10
	maxCABytes      = 256 << 10
)

// addUpdate puts whom the device trusts into the root, and the rest of the update
// section into its description.
func (b *builder) addUpdate(root *tree.Node, app *image.Appliance) error {
	u := b.spec.Update
	if u.Root == "" {
		return nil
	}
	trusted, err := b.small(u.Root, maxTUFRootBytes)
	if err == nil {
		// The type, the form, and a threshold of its own keys: what a device asks of it.
		_, err = trustedmetadata.New(trusted)
	}
	if err != nil {
		return b.at("update.root", fmt.Errorf("%w; it is the root.json that holdfast repo root prints", err))
	}
	app.Update = image.Update{
		URL: u.URL, Channel: u.Channel, CheckSec: u.Check.Seconds(),
		WindowStartMin: u.Window.StartMin, WindowEndMin: u.Window.EndMin,
		Automatic: u.Automatic == nil || *u.Automatic, Stick: u.Stick == nil || *u.Stick,
		WriteBack: u.WriteBack, Epoch: u.Epoch, Hardware: u.Hardware,
	}
	if u.CA != "" {
		certificates, err := b.small(u.CA, maxCABytes)
		if err == nil && !x509.NewCertPool().AppendCertsFromPEM(certificates) {
			err = errors.New(u.CA + " holds no certificate in PEM")
		}
		if err != nil {
			return b.at("update.ca", err)
		}
		app.Update.CAPEM = string(certificates)
	}
	return b.put(root, image.TUFRootPath, 0o644, tree.Bytes(trusted))
}
