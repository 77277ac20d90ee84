package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

const escrowUsage = `usage: holdfast escrow VERB [OPTIONS] FILE

  inspect ESCROW         whose it is, who can read it, whether the box signed it  [--json]
  receipt ESCROW --key K acknowledge it; the box takes the receipt by stick or network
  newkey NAME            make NAME.key and NAME.pub, which receipts are signed with

'holdfast recover' gets the recovery key out of one.

example: holdfast escrow inspect holdfast-escrow-ledger-0b7d9f0e-1.json
'holdfast escrow VERB -h' tells a verb's options.
`

func runEscrow(ctx context.Context, c *cli, args []string) error {
	return noun(ctx, c, "escrow", escrowUsage, []verb{{"inspect", escrowInspect}, {"receipt", escrowReceipt}, {"newkey", escrowNewKey}}, args)
}

// readEscrow reads and verifies a file; earlier, if not "", is one of the same box.
func readEscrow(path, earlier string) (*escrow.Escrow, error) {
	text, err := readSmall(path, escrow.MaxBytes)
	if err != nil {
		return nil, err
	}
	e, err := escrow.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if earlier == "" {
		return e, nil
	}
	old, err := readEscrow(earlier, "")
	if err != nil {
		return nil, err
	}
	if err := e.SameBox(old); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}

// recordsFlag is for who knows his boxes.
func recordsFlag(f *flag.FlagSet) *string {
	return f.String("records", "", "`folder` with what attest verify recorded of the boxes: the TPM recorded must have signed")
}

// recordedTPM wants that; records may be "".
func recordedTPM(path string, e *escrow.Escrow, records string) error {
	if records == "" {
		return nil
	}
	if e.TPM == nil {
		return fmt.Errorf("%s: %w", path, escrow.ErrUnsigned)
	}
	r, _, err := recordsIn(records).Find(&attest.Answer{AKPublic: e.TPM.AKPublic, Statement: &attest.Statement{Box: e.Box}})
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", records, err)
	case r == nil:
		return hinted{fmt.Errorf("%w: %s: nothing is recorded of box %s", errVerification, path, e.Box),
			"first contact: holdfast attest challenge, and attest verify with --record"}
	}
	if err := e.By(r); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// escrowFacts is what inspect tells.
type escrowFacts struct {
	Type      string    `json:"type"` // "escrow"
	ID        string    `json:"id"`
	Box       string    `json:"box"`
	Volumes   []string  `json:"volumes"`
	Product   string    `json:"product"`
	Release   string    `json:"release"`
	Serial    int       `json:"serial"`
	Time      time.Time `json:"time"`
	Threshold int       `json:"threshold"`
	Holders   []string  `json:"holders"`
	// Recipients are the holders' public keys, in the same order.
	Recipients []string `json:"recipients"`
	SHA256     string   `json:"sha256"`
	// BoxKey is the SHA-256 of the key that the box signs with.
	BoxKey string `json:"box_key_sha256"`
	// TPM is the name of the TPM's key that signed, too; empty where none did.
	TPM string `json:"ak_name,omitempty"`
	// Recorded says that this is the key recorded of the box.
	Recorded bool `json:"recorded"`
}

func (f *escrowFacts) wrong() []string { return nil }

func factsOf(e *escrow.Escrow) *escrowFacts {
	sum, key := e.Digest(), sha256.Sum256(e.Signature.PublicKey)
	f := &escrowFacts{
		Type: "escrow", ID: e.ID, Box: e.Box, Volumes: e.Volumes, Product: e.Product, Release: e.Release, Serial: e.Serial,
		Time: e.Time, Threshold: e.Threshold, SHA256: hex.EncodeToString(sum[:]), BoxKey: hex.EncodeToString(key[:]),
	}
	for _, s := range e.Shares {
		f.Holders, f.Recipients = append(f.Holders, s.Name), append(f.Recipients, s.Recipient)
	}
	if e.TPM != nil {
		f.TPM = e.TPM.Key()
	}
	return f
}

func (f *escrowFacts) print(s *sheet) {
	s.line(fmt.Sprintf("escrow of recovery key %d of box %s, %s", f.Serial, f.Box, f.Product))
	s.fact("made", f.Time.Format(time.RFC3339)+" by release "+f.Release)
	s.facts("opens volume", f.Volumes...)
	s.fact("readable by", fmt.Sprintf("any %d of these %d", f.Threshold, len(f.Holders)))
	for i, name := range f.Holders {
		key := f.Recipients[i]
		if len(key) > 80 { // the post-quantum kind
			key = key[:76] + "…"
		}
		s.fact("", name, key)
	}
	s.fact("sha256", f.SHA256)
	s.fact("signed by", "box key "+f.BoxKey)
	switch {
	case f.TPM == "":
		s.fact("", "no TPM")
	case f.Recorded:
		s.fact("", "TPM key "+f.TPM+", which is recorded of the box")
	default:
		s.fact("", "TPM key "+f.TPM+", of a box that says it is this one")
	}
}

func escrowInspect(_ context.Context, c *cli, args []string) error {
	f := c.flags("escrow inspect", "ESCROW", `Say whose recovery key is in ESCROW and who can read it, and check the box's
signatures. No key is needed. They show that nothing was changed since; that it is the
same box as ever, only --previous does, and which box it is, --records: the TPM that is
recorded of it signed. Exit code 3: it is not. 5: no TPM signed, and --records is given.

example: holdfast escrow inspect holdfast-escrow-ledger-0b7d9f0e-1.json`)
	previous := f.String("previous", "", "`file` with an earlier escrow, which must be of the same box")
	records := recordsFlag(f)
	asJSON := f.Bool("json", false, "one JSON object instead of text")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	e, err := readEscrow(rest[0], *previous)
	if err == nil {
		err = recordedTPM(rest[0], e, *records)
	}
	if err != nil {
		return err
	}
	facts := factsOf(e)
	facts.Recorded = *records != ""
	return show(c, facts, *asJSON)
}

func escrowReceipt(_ context.Context, c *cli, args []string) error {
	f := c.flags("escrow receipt", "ESCROW", `Acknowledge ESCROW: sign that you keep it. Bring the file that is written to the box
on a stick, or answer the box's POST with it; a box with recovery.require_receipt
takes no update before. Keep the escrow first, in more than one place.

example: holdfast escrow receipt holdfast-escrow-ledger-0b7d9f0e-1.json --key receipt.key --opens keys/escrow.key`)
	key := f.String("key", "", "`file` with the Ed25519 key of recovery.receipt_key, from holdfast escrow newkey")
	previous := f.String("previous", "", "`file` with an earlier escrow, which must be of the same box")
	records := recordsFlag(f)
	opens := f.String("opens", "", "`file` with an age key: acknowledge only what it opens its share of")
	out := f.String("o", "", "`file` to write; - is standard output (default the name that the box looks for)")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *key == "" {
		return usageError{"escrow receipt needs --key receipt.key", "make one: holdfast escrow newkey receipt"}
	}
	text, err := readSmall(*key, 64<<10)
	if err != nil {
		return err
	}
	signer, err := escrow.ParsePrivateKey(text)
	luks2.Wipe(text)
	if err != nil {
		return fmt.Errorf("%s: %w", *key, err)
	}
	e, err := readEscrow(rest[0], *previous)
	if err == nil {
		err = recordedTPM(rest[0], e, *records)
	}
	if err != nil {
		return err
	}
	if *opens != "" {
		shares, err := openShares(c, e, []string{*opens})
		if err != nil {
			return err
		}
		for _, s := range shares {
			s.Wipe()
		}
	}
	r, err := escrow.NewReceipt(e, signer, time.Now())
	if err != nil {
		return err
	}
	switch *out {
	case "-":
		_, err = c.out.Write(r.Marshal())
		return err
	case "":
		*out = r.FileName()
	}
	if err := writeWhole(*out, r.Marshal(), 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.out, *out)
	return err
}

func escrowNewKey(_ context.Context, c *cli, args []string) error {
	rest, err := parse(c.flags("escrow newkey", "NAME", `Make an Ed25519 key for receipts: NAME.key, which signs them and stays where the
escrows are kept, and NAME.pub, for recovery.receipt_key in the spec.

example: holdfast escrow newkey receipt`), args, 1)
	if err != nil {
		return err
	}
	private, public, err := escrow.GenerateKey()
	if err != nil {
		return err
	}
	defer luks2.Wipe(private)
	for _, ending := range []string{".key", ".pub"} {
		if _, err := os.Lstat(rest[0] + ending); err == nil {
			return hinted{fmt.Errorf("%s exists already", rest[0]+ending), "choose another name; boxes depend on the key"}
		}
	}
	if err := writeWhole(rest[0]+".key", private, 0o600); err != nil {
		return err
	}
	if err := writeWhole(rest[0]+".pub", public, 0o644); err != nil {
		return errors.Join(err, os.Remove(rest[0]+".key"))
	}
	_, err = fmt.Fprintf(c.out, "%[1]s.key\n%[1]s.pub\n", rest[0])
	return err
}

// writeWhole makes a small file appear only when it is whole, and never over another
// one, which may be somebody's key.
func writeWhole(path string, content []byte, perm os.FileMode) (err error) {
	if err := mustBeFree(path); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".holdfast-") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = errors.Join(f.Chmod(perm), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

func mustBeFree(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return hinted{fmt.Errorf("%s exists already", path), "remove it or choose another name"}
	}
	return nil
}

func runRecover(_ context.Context, c *cli, args []string) error {
	f := c.flags("recover", "ESCROW", `Print the recovery key in ESCROW, which opens the box's data volumes: at the box's
prompt, or with cryptsetup open on a disk that was taken out.

Where several holders are needed, give all their keys, or have each write his share
and give those. Shares are as secret as keys: enough of them and the escrow give the
recovery key. Encrypt one that travels: age -r RECIPIENT. Exit codes with --records: 3
when another TPM signed than is recorded of the box, 5 when none did.

example: holdfast recover holdfast-escrow-ledger-0b7d9f0e-1.json --key keys/escrow.key`)
	var keys, shares texts
	f.Var(&keys, "key", "`file` with an age key of a holder; - is standard input; may be given again")
	f.Var(&shares, "share", "`file` with another holder's share; may be given again")
	out := f.String("share-out", "", "write this holder's share to `file`, and no recovery key")
	records := recordsFlag(f)
	asJSON := f.Bool("json", false, "one JSON object instead of the key alone")
	rest, err := parse(f, args, 1)
	switch {
	case err != nil:
		return err
	case len(keys) == 0 && (len(shares) == 0 || *out != ""):
		return usageError{"recover needs --key, a holder's age key", "holdfast recover " + rest[0] + " --key keys/escrow.key"}
	case *out != "" && (len(shares) > 0 || *asJSON):
		return usageError{"--share-out writes a share and nothing else", "holdfast recover -h"}
	}
	e, err := readEscrow(rest[0], "")
	if err == nil {
		err = recordedTPM(rest[0], e, *records)
	}
	if err != nil {
		return err
	}
	var have []*escrow.Share
	defer func() {
		for _, s := range have {
			s.Wipe()
		}
	}()
	if len(keys) > 0 {
		if have, err = openShares(c, e, keys); err != nil {
			return err
		}
	}
	if *out != "" {
		return writeShare(c, e, have, *out)
	}
	for _, path := range shares {
		s, err := readShare(path)
		if err != nil {
			return err
		}
		have = append(have, s)
	}
	key, err := e.Recover(have...)
	var few *escrow.NotEnoughError
	if errors.As(err, &few) {
		return hinted{err, "each of them: holdfast recover ESCROW --key KEY --share-out SHARE; then give --share SHARE here"}
	}
	if err != nil {
		return err
	}
	defer key.Wipe()
	return printKey(c, e, key, *asJSON)
}

// openShares decrypts what the holders' keys open.
func openShares(c *cli, e *escrow.Escrow, paths []string) ([]*escrow.Share, error) {
	var identities []age.Identity
	for _, path := range paths {
		text, err := readIdentity(c, path)
		if err != nil {
			return nil, err
		}
		encrypted := bytes.HasPrefix(text, []byte("age-encryption.org/"))
		list, err := age.ParseIdentities(bytes.NewReader(text))
		luks2.Wipe(text)
		switch {
		case encrypted:
			return nil, hinted{fmt.Errorf("%s is encrypted itself", path), "age -d " + path + " | holdfast recover ESCROW --key -"}
		case err != nil: // age would quote it
			return nil, hinted{fmt.Errorf("%s is no age identity", path), "give the file that begins with AGE-SECRET-KEY-1, such as escrow.key of holdfast keys new"}
		}
		identities = append(identities, list...)
	}
	shares, err := e.Open(identities...)
	if err != nil {
		return nil, hinted{err, "holdfast escrow inspect shows the holders' public keys; age-keygen -y KEY shows that of a key"}
	}
	return shares, nil
}

func readIdentity(c *cli, path string) ([]byte, error) {
	const limit = 64 << 10
	if path == "-" {
		return io.ReadAll(io.LimitReader(c.in, limit))
	}
	return readSmall(path, limit)
}

func readShare(path string) (*escrow.Share, error) {
	text, err := readSmall(path, 4<<10)
	if err != nil {
		return nil, err
	}
	defer luks2.Wipe(text)
	s, err := escrow.ParseShare(text)
	if err != nil && bytes.HasPrefix(text, []byte("age-encryption.org/")) {
		return nil, hinted{fmt.Errorf("%s is encrypted", path), "age -d -i KEY -o SHARE " + path}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func writeShare(c *cli, e *escrow.Escrow, have []*escrow.Share, out string) error {
	switch {
	case e.Threshold == 1:
		return hinted{errors.New("this escrow has no shares: each holder can read it alone"), "leave out --share-out, and the recovery key is printed"}
	case len(have) != 1:
		return fmt.Errorf("the keys open %d shares, and a file holds one: give one holder's key", len(have))
	}
	text := have[0].Text()
	defer luks2.Wipe(text)
	if err := writeWhole(out, text, 0o600); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.out, "%s: the share of %s; %d are needed\n", out, e.Shares[have[0].X-1].Name, e.Threshold)
	return err
}

// printKey has the key alone on standard output, and what it is of beside it.
func printKey(c *cli, e *escrow.Escrow, key *luks2.RecoveryKey, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(c.out).Encode(struct {
			Type    string   `json:"type"` // "recovery-key"
			Box     string   `json:"box"`
			Volumes []string `json:"volumes"`
			Product string   `json:"product"`
			Serial  int      `json:"serial"`
			Key     string   `json:"key"`
		}{"recovery-key", e.Box, e.Volumes, e.Product, e.Serial, key.String()})
	}
	fmt.Fprintf(c.err, "recovery key %d of box %s, %s, made %s:\n", e.Serial, e.Box, e.Product, e.Time.Format(time.RFC3339))
	_, err := fmt.Fprintln(c.out, key.String())
	return err
}
