package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/image/uki"
)

const keysUsage = `usage: holdfast keys VERB DIR [OPTIONS]

  new DIR                make the vendor's keys: Secure Boot, PCR policy, recovery escrow
  rotate DIR             make db-next the key that signs, and a new db-next
  dbx DIR -o FILE        what no firmware is to start any more, signed for a release to carry
  downgrade DIR -o FILE  let boxes of a higher security epoch go back to one older release
  sign FOLDER            sign, on the machine with the keys, what another asks for

Keep the .key files off line; whoever has them can sign for you. What waits for keys on
another machine ends with exit code 4 and says what to do.

example: holdfast keys new keys
'holdfast keys VERB -h' tells a verb's options.
`

func runKeys(ctx context.Context, c *cli, args []string) error {
	return c.carried(noun(ctx, c, "keys", keysUsage, []verb{{"new", runKeysNew}, {"rotate", runKeysRotate}, {"dbx", runKeysDBX}, {"downgrade", runKeysDowngrade}, {"sign", runKeysSign}}, args))
}

// keyOptions are the flags that new and rotate share.
type keyOptions struct {
	organization, signers *string
	public                []string
}

func (o *keyOptions) flags(f *flag.FlagSet) {
	o.organization = f.String("organization", "Holdfast vendor", "name in the certificates")
	o.signers = f.String("signers", "", "JSON `file`: {\"db\": {\"command\": [\"./sign-pkcs11\", \"01\"]}, \"KEK\": {\"carried\": \"../to-sign\"}}")
	f.Func("public", "use a key that lies elsewhere: `NAME=FILE.pem`, its certificate or public key; repeat", into(&o.public))
}

func (o *keyOptions) config() (cfg keys.Config, err error) {
	cfg = keys.Config{Organization: *o.organization, Now: time.Now(), Public: map[string]keys.Public{}}
	if *o.signers != "" {
		text, err := readKeyFile(*o.signers)
		if err == nil {
			cfg.Signers, err = keys.ParseSigners(text)
		}
		if err != nil {
			return cfg, fmt.Errorf("--signers %s: %w", *o.signers, err)
		}
	}
	for _, p := range o.public {
		name, file, ok := strings.Cut(p, "=")
		if !ok || name == "" || file == "" {
			return cfg, usageError{fmt.Sprintf("--public %q is not NAME=FILE", p), "holdfast keys new DIR --public db=db.pem --signers signers.json"}
		}
		text, err := readKeyFile(file)
		if err == nil {
			cfg.Public[name], err = keys.ParsePublic(text)
		}
		if err != nil {
			return cfg, fmt.Errorf("--public %s: %w", p, err)
		}
	}
	return cfg, nil
}

func runKeysNew(_ context.Context, c *cli, args []string) error {
	f := c.flags("keys new", "DIR", `Make the vendor's keys in a new folder: Secure Boot PK, KEK and db with .auth files, a
second db key for later, the PCR policy key and the recovery escrow key. Keep the .key
files off line; whoever has them can sign for you.

example: holdfast keys new keys --keep-db microsoft-uefi-ca-2023.pem --keep-kek microsoft-kek-2023.pem`)
	var o keyOptions
	o.flags(f)
	var keepDB, keepKEK []string
	f.Func("keep-db", "enrol this `file` in db as well, a certificate or signature list of somebody else; repeat", into(&keepDB))
	f.Func("keep-kek", "enrol this `file` in KEK as well; its owner can change db and dbx, and so PCR 7; repeat", into(&keepKEK))
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	cfg, err := o.config()
	if err != nil {
		return err
	}
	if cfg.KeepDB, err = readDatabases(keepDB); err != nil {
		return err
	}
	if cfg.KeepKEK, err = readDatabases(keepKEK); err != nil {
		return err
	}
	if _, err := keys.Create(rest[0], cfg); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s\n", rest[0])
	return nil
}

func runKeysRotate(_ context.Context, c *cli, args []string) error {
	f := c.flags("keys rotate", "DIR", `Make db-next the key that signs, and a new db-next. Boxes have to trust it before: they
do when they keep a release whose spec has

  secureboot: {db: DIR/db-next.auth}

Afterwards, once both slots of the boxes hold releases signed by the new key, one with

  secureboot: {db: DIR/db.auth}

takes the old certificate out of their db. A box that still needs it waits.
In a folder without a db-next, this makes one and changes nothing else.

example: holdfast keys rotate keys`)
	var o keyOptions
	o.flags(f)
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	cfg, err := o.config()
	if err != nil {
		return err
	}
	before, err := keys.Load(rest[0])
	if err != nil {
		return err
	}
	after, err := keys.Rotate(rest[0], cfg)
	if err != nil {
		return err
	}
	what := "db-next was made; rotate again once boxes have taken db-next.auth"
	if !before.DB.Cert.Equal(after.DB.Cert) {
		what = "db is what was db-next; db-next is new"
	}
	fmt.Fprintf(c.out, "%s: %s\n", rest[0], what)
	return nil
}

func runKeysDBX(_ context.Context, c *cli, args []string) error {
	f := c.flags("keys dbx", "DIR", `Write a signed addition to dbx, the list of what a firmware does not start any more, for
a release to carry:  secureboot: {dbx: dbx.auth}

It should hold all that earlier ones held, for boxes that have missed them: --with.

example: holdfast keys dbx keys --revoke out-1.0.0/release --with dbx-1.auth -o dbx-2.auth`)
	var revoke, with []string
	f.Func("revoke", "an EFI program, a release `folder` (its UKI), or a certificate in PEM; repeat", into(&revoke))
	f.Func("with", "an earlier `file` of this kind, or a signature list, to be included; repeat", into(&with))
	out := f.String("o", "", "output `file`")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *out == "" || len(revoke) == 0 {
		return usageError{"keys dbx needs --revoke FILE and -o OUT", "holdfast keys dbx " + rest[0] + " --revoke old/uki.efi -o dbx.auth"}
	}
	k, err := keys.Load(rest[0])
	if err != nil {
		return err
	}
	var r keys.Revocation
	for _, path := range revoke {
		if err := addRevoked(&r, path); err != nil {
			return fmt.Errorf("revoke %s: %w", path, err)
		}
	}
	if r.Earlier, err = readDatabases(with); err != nil {
		return err
	}
	if err := mustBeFree(*out); err != nil {
		return err
	}
	w, err := keys.OpenWaiting(*out, "keys dbx", time.Now())
	if err != nil {
		return err
	}
	b, err := k.Revoke(r, w.Now)
	if err != nil {
		return w.Settle(err)
	}
	a, err := sigdb.ParseAuth(b)
	if err != nil {
		return err
	}
	if err := writeWhole(*out, b, 0o644); err != nil {
		return err
	}
	if err := w.Settle(nil); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s: %s\n", *out, strings.Join(a.Content.Describe(), "; "))
	return nil
}

// into collects the values of an option that may be repeated.
func into(list *[]string) func(string) error {
	return func(s string) error {
		*list = append(*list, s)
		return nil
	}
}

// addRevoked takes up what a path stands for.
func addRevoked(r *keys.Revocation, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.IsDir() {
		path = filepath.Join(path, image.UKIName)
	} else if text, err := readKeyFile(path); err == nil && bytes.HasPrefix(text, []byte("-----BEGIN")) {
		p, err := keys.ParsePublic(text)
		if err == nil && p.Cert == nil {
			err = errors.New("a public key; dbx holds certificates")
		}
		if err != nil {
			return err
		}
		r.Certificates = append(r.Certificates, p.Cert)
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return err
	}
	program, err := uki.Parse(f, info.Size())
	if err != nil {
		return fmt.Errorf("neither an EFI program, nor a release, nor a certificate in PEM: %w", err)
	}
	digest, err := program.Authenticode()
	if err != nil {
		return err
	}
	r.Digests = append(r.Digests, digest)
	return nil
}

func readDatabases(paths []string) (all sigdb.Database, err error) {
	for _, path := range paths {
		d, err := readDatabase(path)
		if err != nil {
			return nil, err
		}
		all = append(all, d...)
	}
	return all, nil
}

// readDatabase reads a certificate (PEM or DER), a signature list, or a signed update.
func readDatabase(path string) (sigdb.Database, error) {
	b, err := readKeyFile(path)
	if err != nil {
		return nil, err
	}
	der := b
	if block, _ := pem.Decode(b); block != nil {
		der = block.Bytes
	}
	if cert, err := x509.ParseCertificate(der); err == nil {
		return sigdb.Database{sigdb.Certificate(cert, sigdb.GUID{})}, nil
	}
	if a, err := sigdb.ParseAuth(b); err == nil {
		return a.Content, nil
	}
	d, err := sigdb.Parse(b)
	if err == nil && len(d) == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		return nil, fmt.Errorf("%s is neither a certificate, nor a signature list, nor a signed update: %w", path, err)
	}
	return d, nil
}

// readKeyFile reads a file of at most [sigdb.MaxBytes].
func readKeyFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, sigdb.MaxBytes+1))
	if err == nil && len(b) > sigdb.MaxBytes {
		err = fmt.Errorf("%s has more than %d bytes", path, sigdb.MaxBytes)
	}
	return b, err
}
