package update

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// UnfinishedSuffix ends the name of a file that [WriteFile] has not finished.
const UnfinishedSuffix = ".new"

// WriteFile replaces the file at path, or makes it, so that a power cut leaves the
// old content or the new one: temporary file, sync, rename, sync of the folder.
// A temporary file that an earlier cut left behind is overwritten. Two writers of
// one path at once are not supported.
func WriteFile(path string, content []byte, perm fs.FileMode) (err error) {
	temp := path + UnfinishedSuffix
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(temp)) // a full volume gets its bytes back
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

var errTooLong = errors.New("too long")

// readAll reads what may have at most limit bytes.
func readAll(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: more than the %d bytes allowed", errTooLong, limit)
	}
	return b, nil
}

func readFile(path string, limit int64) (b []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return readAll(f, limit)
}
