package build

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
)

// maxAuthBytes is what firmware takes: EDK2's PcdMaxAuthVariableSize has 32 to 64 KiB.
const maxAuthBytes = 64 << 10

// secureBoot is what a release does to the firmware's keys.
type secureBoot struct {
	image.SecureBoot
	files [][]byte // of Updates
	// db and dbx are what a box has afterwards that had the vendor's keys before.
	db, dbx sigdb.Database
}

// readSecureBoot reads the updates that the section names and checks that boxes with
// these keys will take them.
func (b *builder) readSecureBoot() (s secureBoot, err error) {
	k := b.in.Keys
	s.Keys = map[string]string{}
	for name, p := range map[string]*keys.Pair{keys.PK: &k.PK, keys.KEK: &k.KEK, keys.DB: &k.DB} {
		sum := sha256.Sum256(p.Cert.Raw)
		s.Keys[name] = hex.EncodeToString(sum[:])
	}
	if e := b.spec.SecureBoot.Enroll; e != "off" {
		s.Enroll = e
	}
	enrolled, err := k.SignatureList(keys.DB)
	if err != nil {
		return s, err
	}
	if s.db, err = sigdb.Parse(enrolled); err != nil {
		return s, err
	}
	// db before dbx: what is trusted anew comes before what is not any more.
	for _, u := range []struct{ variable, file string }{{sigdb.DB, b.spec.SecureBoot.DB}, {sigdb.DBX, b.spec.SecureBoot.DBX}} {
		if u.file == "" {
			continue
		}
		if err := b.readVariable(&s, u.variable, u.file); err != nil {
			return s, b.at("secureboot."+u.variable, err)
		}
	}
	return s, nil
}

func (b *builder) readVariable(s *secureBoot, variable, file string) error {
	text, err := b.small(file, maxAuthBytes)
	if err != nil {
		return err
	}
	a, err := sigdb.ParseAuth(text)
	if err != nil {
		return fmt.Errorf("%s: %w; the keys' folder has such files for db, and holdfast keys dbx makes one for dbx", file, err)
	}
	sum := sha256.Sum256(text)
	u := image.VariableUpdate{
		Variable: variable, Append: true, File: path.Join(image.SecureBootFolder, variable+".auth"), SHA256: hex.EncodeToString(sum[:]),
	}
	kek := b.in.Keys.KEK.Cert
	if err := a.VerifiedBy(variable, true, kek); err != nil {
		if a.VerifiedBy(variable, false, kek) != nil {
			return fmt.Errorf("%s: boxes would refuse it: %w", file, err)
		}
		u.Append = false
	}
	switch {
	case variable == sigdb.DBX && !u.Append:
		return fmt.Errorf("%s replaces dbx, which would drop what others have revoked; make an addition with holdfast keys dbx", file)
	case variable == sigdb.DBX:
		s.dbx = a.Content
	case u.Append:
		s.db = append(s.db, a.Content...)
	default:
		s.db = a.Content
	}
	s.Updates, s.files = append(s.Updates, u), append(s.files, text)
	return nil
}

// addSecureBoot puts the updates where the device looks for them.
func (b *builder) addSecureBoot(root *tree.Node, s secureBoot) error {
	for i, u := range s.Updates {
		if err := b.put(root, u.File, 0o644, tree.Bytes(s.files[i])); err != nil {
			return err
		}
	}
	b.manifest.SecureBoot = s.Updates
	return b.expectSecureBoot(s)
}

// expectSecureBoot notes what a verifier finds in the variables: in db also what the
// release adds that is not among the vendor's keys.
func (b *builder) expectSecureBoot(s secureBoot) error {
	lists := map[string][]byte{}
	for _, name := range []string{keys.PK, keys.KEK, keys.DB} {
		var err error
		if lists[name], err = b.in.Keys.Trusted(name); err != nil {
			return err
		}
	}
	own, err := sigdb.Parse(lists[keys.DB])
	if err != nil {
		return err
	}
	for _, l := range s.db {
		if added := (sigdb.Database{l}); !own.Covers(added) {
			lists[keys.DB] = append(lists[keys.DB], added.Marshal()...)
		}
	}
	if len(s.dbx) > 0 {
		lists[sigdb.DBX] = s.dbx.Marshal()
	}
	b.manifest.Expected.SecureBoot = lists
	return nil
}

// checkSecureBoot refuses a release that, once applied, keeps itself from booting.
func (b *builder) checkSecureBoot(s secureBoot) error {
	for _, name := range []string{image.LoaderName, image.UKIName} {
		if err := b.checkAllowed(name, s); err != nil {
			err = fmt.Errorf("%s: boxes that have applied this release's changes would not start it: %w", name, err)
			if errors.Is(err, uki.ErrForbidden) {
				return b.at("secureboot.dbx", err)
			}
			return b.at("secureboot.db", err)
		}
	}
	return nil
}

func (b *builder) checkAllowed(name string, s secureBoot) (err error) {
	f, err := os.Open(filepath.Join(b.dir, name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	program, err := uki.Parse(f, info.Size())
	if err != nil {
		return err
	}
	return program.Allowed(s.db, s.dbx)
}

// enrolment puts the keys on the ESP, for a firmware's set-up or systemd-boot's menu to
// enrol them (loader.conf(5), secure-boot-enroll). systemd-boot could do so by itself, but
// begins again at every start for ever where a firmware does not keep keys (F4); the
// agent, which has them in the initrd, gives up.
func (b *builder) enrolment(o *partition.FormatOptions) {
	if !b.enrolls("manual", "force") {
		return
	}
	o.SecureBootEnroll = "manual"
	for name, auth := range b.enrolmentFiles() {
		o.Files = append(o.Files, partition.ESPFile{Path: "loader/keys/auto/" + name, Data: bytes.Clone(auth)})
	}
	slices.SortFunc(o.Files, func(x, y partition.ESPFile) int { return strings.Compare(x.Path, y.Path) })
}

func (b *builder) enrolls(modes ...string) bool {
	return slices.Contains(modes, b.spec.SecureBoot.Enroll)
}

// enrolmentFiles are the .auth files by name.
func (b *builder) enrolmentFiles() map[string][]byte {
	k := b.in.Keys
	return map[string][]byte{keys.DB + ".auth": k.DB.Auth, keys.KEK + ".auth": k.KEK.Auth, keys.PK + ".auth": k.PK.Auth}
}

// addEnrolment puts the keys into the initrd, where they are measured, for the agent.
func (b *builder) addEnrolment(root *tree.Node) error {
	if !b.enrolls("force") {
		return nil
	}
	for name, auth := range b.enrolmentFiles() {
		if err := b.put(root, path.Join(image.EnrolmentPath, name), 0o644, tree.Bytes(auth)); err != nil {
			return err
		}
	}
	return nil
}
