package keys

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// Rotate makes the key db-next the key db, and a new db-next: see the package's
// documentation for when. In a folder from before there was a db-next it makes one
// and changes nothing else, since no box knows it yet. The old key stays in the folder as db-retired-….key and
// .pem. Organization, Now and, for keys that lie elsewhere, Public and Signers of cfg
// count, the latter for the new db-next. What is signed is stamped with Now, or later
// than all that was signed before. The folder is exchanged as a whole, or stays as it was.
func Rotate(dir string, cfg Config) (*Keys, error) {
	k, err := rotate(dir, cfg)
	if err != nil {
		return nil, fmt.Errorf("rotate keys in %s: %w", dir, err)
	}
	return k, nil
}

func rotate(dir string, cfg Config) (*Keys, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	old, err := Load(dir)
	if err != nil {
		return nil, err
	}
	w, err := OpenWaiting(dir, old.rotationName(), cfg.Now)
	if err != nil {
		return nil, err
	}
	stamp, err := old.laterThanSigned(w.Now)
	if err != nil {
		return nil, err
	}
	files, err := readFolder(dir)
	if err != nil {
		return nil, err
	}
	if cfg.Signers, err = old.moveFiles(files, cfg.Signers); err != nil {
		return nil, err
	}
	cfg.Signers = cfg.Signers.from(dir)
	k := *old
	enrol := []string{DBNext}
	if old.DBNext.Cert != nil {
		k.DB, enrol = old.DBNext, []string{DB, DBNext}
		k.Retired = append(slices.Clone(old.Retired), old.DB.Cert)
		k.DB.name = DB
		switch s := k.DB.Key.(type) {
		case *Program:
			s.Name = DB
		case *Carried:
			s.Name = DB
		}
	}
	made, err := k.nextAndEnrolments(dir, enrol, &cfg, w, stamp)
	if err != nil {
		return nil, w.Settle(err)
	}
	for _, f := range made {
		files[f.name] = f
	}
	if err := exchangeFolder(dir, files); err != nil {
		return nil, err
	}
	return &k, w.Settle(nil)
}

// nextAndEnrolments makes a new db-next, and signs what enrols it and db.
func (k *Keys) nextAndEnrolments(dir string, enrol []string, cfg *Config, w *Waiting, stamp time.Time) ([]outFile, error) {
	made, wanted := k.generatePair(dir, DBNext, cfg, w)
	if wanted != nil {
		if len(Wanted(wanted)) == 0 {
			return nil, wanted
		}
		// What enrols db does not depend on it.
		enrol = slices.DeleteFunc(enrol, func(name string) bool { return name == DBNext })
	}
	auths, err := eachName(enrol, func(name string) ([]outFile, error) { return k.enrol(name, stamp) })
	return append(made, auths...), errors.Join(wanted, err)
}

// rotationName tells one rotation from the next.
func (k *Keys) rotationName() string {
	sum := sha256.New()
	for _, p := range []Pair{k.DB, k.DBNext} {
		if p.Cert != nil {
			sum.Write(p.Cert.Raw)
		}
	}
	return fmt.Sprintf("rotation from %x", sum.Sum(nil)[:8])
}

// retiredPrefix begins the names of the files of keys that were db once.
const retiredPrefix = "db-retired-"

// laterThanSigned is now, or a second after what was signed for db last, if that is not
// before now: a rotation in the same second, or a clock that was ahead then. Firmware
// takes a replacement of db only with a time later than that of the last change, whole
// seconds compared, and never compares it with its clock (UEFI 2.10 §8.2.2). The last
// change may have been the appending of db-next.
func (k *Keys) laterThanSigned(now time.Time) (time.Time, error) {
	for _, p := range []Pair{k.DB, k.DBNext} {
		if p.Cert == nil {
			continue
		}
		last, err := sigdb.ParseAuth(p.Auth)
		if err != nil {
			return now, fmt.Errorf("%s.auth: %w", p.name, err)
		}
		if !now.After(last.Time) {
			now = last.Time.Add(time.Second)
		}
	}
	return now, nil
}

// moveFiles renames db to db-retired-… and db-next to db, in the folder to be and in
// its signers.json; next may name a signer for the new db-next.
func (k *Keys) moveFiles(files map[string]outFile, next Signers) (Signers, error) {
	sum := sha256.Sum256(k.DB.Cert.Raw)
	retired := fmt.Sprintf("%s%x", retiredPrefix, sum[:4])
	move := func(from, to string) {
		for _, ext := range []string{".key", ".pem"} {
			if f, ok := files[from+ext]; ok {
				f.name = to + ext
				files[f.name] = f
				delete(files, from+ext)
			}
		}
	}
	rotates := k.DBNext.Cert != nil
	if rotates {
		move(DB, retired)
		move(DBNext, DB)
	}
	signers := Signers{}
	if f, ok := files[signersName]; ok {
		var err error
		if signers, err = ParseSigners(f.content); err != nil {
			return nil, fmt.Errorf("%s: %w", signersName, err)
		}
	}
	if rotates {
		delete(signers, DB)
		if s, ok := signers[DBNext]; ok {
			signers[DB] = s
			delete(signers, DBNext)
		}
	}
	if s, ok := next[DBNext]; ok {
		signers[DBNext] = s
	}
	delete(files, signersName)
	if len(signers) > 0 {
		text, err := signers.marshal()
		if err != nil {
			return nil, err
		}
		files[signersName] = outFile{signersName, text, true}
	}
	return signers, nil
}

// readFolder reads every file of a folder.
func readFolder(dir string) (map[string]outFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := map[string]outFile{}
	for _, e := range entries {
		b, err := readFile(dir, e.Name(), false)
		if err != nil {
			return nil, fmt.Errorf("%w; a keys folder that is rotated holds small files only", err)
		}
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		files[e.Name()] = outFile{e.Name(), b, info.Mode().Perm()&0o077 == 0}
	}
	return files, nil
}

// exchangeFolder puts a folder with these files in the place of dir, by one rename.
func exchangeFolder(dir string, files map[string]outFile) error {
	list := make([]outFile, 0, len(files))
	for _, f := range files {
		list = append(list, f)
	}
	temp := dir + ".new"
	if _, err := os.Lstat(temp); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is in the way, left by an attempt that was cut off: compare it with %s and remove it (%w)", temp, dir, errors.Join(err, fs.ErrExist))
	}
	if err := writeFolder(temp, list); err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE); err != nil {
		return errors.Join(fmt.Errorf("exchange %s and %s: %w", temp, dir, err), os.RemoveAll(temp))
	}
	// temp is the old folder now. What it held is in the new one.
	return errors.Join(syncFolder(filepath.Dir(dir)), os.RemoveAll(temp))
}
