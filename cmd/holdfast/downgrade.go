package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

func runKeysDowngrade(_ context.Context, c *cli, args []string) error {
	f := c.flags("keys downgrade", "DIR", `Let boxes of the policy rollback-proof that have come to a higher security epoch open
their data volumes for one older release, and for no other. The file is public and needs
no protection: it is signed by the policy key in DIR. A box takes it by

  holdfast-agent downgrade downgrade.json

or from its ESP, as `+image.AuthorisationPath+`. There is no taking it back from boxes that
have it but a release of a yet higher epoch.

example: holdfast keys downgrade keys --to out-1.0.0 --epoch 2 -o downgrade.json`)
	to := f.String("to", "", "the older release: its `folder`, or its UKI")
	epoch := f.Uint64("epoch", 0, "the highest `epoch` that boxes have come to")
	out := f.String("o", "", "output `file`")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *to == "" || *out == "" || *epoch == 0 {
		return usageError{"keys downgrade needs --to RELEASE, --epoch N and -o OUT", "holdfast keys downgrade " + rest[0] + " --to out-1.0.0 --epoch 2 -o downgrade.json"}
	}
	k, err := keys.Load(rest[0])
	if err != nil {
		return err
	}
	value, own, err := approved(k, *to)
	if err != nil {
		return fmt.Errorf("downgrade to %s: %w", *to, err)
	}
	if *epoch <= own {
		return fmt.Errorf("downgrade to %s: it is signed for epoch %d itself, so boxes that have come to %d take it as it is", *to, own, *epoch)
	}
	signer, err := k.PolicySigner()
	if err != nil {
		return err
	}
	list, err := seal.SignDowngrade(keys.For(signer, fmt.Sprintf("let boxes of epoch %d go back to the release with PCR 11 %x, of epoch %d", *epoch, value, own)), value, own, *epoch)
	if err != nil {
		return err
	}
	b, err := list.Marshal()
	if err != nil {
		return err
	}
	if err := writeWhole(*out, b, 0o644); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s: the release with PCR 11 %s, of epoch %d, for boxes of epoch %d to %d\n", *out, hex.EncodeToString(value[:8])+"…", own, own+1, *epoch)
	return nil
}

// approved is the value of PCR 11 in a release's initrd, measured from its UKI, and the
// epoch that the UKI is signed for. A UKI that these keys have not signed is refused: one
// typed wrong would be let in to every box.
func approved(k *keys.Keys, path string) (value pcr.Digest, epoch uint64, err error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, image.UKIName)
	}
	f, err := os.Open(path)
	if err != nil {
		return value, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return value, 0, err
	}
	program, err := uki.Parse(f, info.Size())
	if err != nil {
		return value, 0, fmt.Errorf("neither a release nor a UKI: %w", err)
	}
	measured, err := program.Measured()
	if err != nil {
		return value, 0, err
	}
	value = pcr.Extend(pcr.UKI(measured), []byte("enter-initrd"))
	text, err := sectionText(program, ".pcrsig")
	if err != nil {
		return value, 0, err
	}
	list, err := seal.ParseSignatures([]byte(text))
	if err != nil {
		return value, 0, err
	}
	ok, err := list.Allow(k.PolicyPublicPEM, value, "")
	if err == nil && !ok {
		err = errors.New("its .pcrsig has no signature for its PCR 11 by the policy key: it is of another vendor, or damaged")
	}
	for err == nil && ok {
		if ok, err = list.Allow(k.PolicyPublicPEM, value, seal.EpochRef(epoch+1)); ok {
			epoch++
		}
	}
	return value, epoch, err
}
