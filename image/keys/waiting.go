package keys

import (
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

const (
	waitingSuffix = ".waiting"
	waitingName   = "waiting.json"
)

// Waiting is a folder beside something to be made, OUT.waiting, which keeps from a run
// that wants signatures to the one that has them all what else would differ and so want
// other signatures: the time, and private keys that were made meanwhile.
type Waiting struct {
	// Now is the time of the first run.
	Now time.Time

	dir    string
	what   string
	exists bool
	fresh  bool // it has files that the folder lacks
	files  map[string]outFile
}

// waitingFile is waiting.json.
type waitingFile struct {
	For  string    `json:"for"`
	Time time.Time `json:"time"`
}

// OpenWaiting opens what an earlier run kept for out. What has to be the same in both;
// when it is not, the folder is left of something else.
func OpenWaiting(out, what string, now time.Time) (*Waiting, error) {
	w := &Waiting{Now: now.UTC().Truncate(time.Second), dir: out + waitingSuffix, what: what, files: map[string]outFile{}}
	info, err := os.Lstat(w.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return w, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is in the way: it is not a folder", w.dir)
	}
	if err := checkMode(w.dir, info, 0o700); err != nil {
		return nil, err
	}
	if w.files, err = readFolder(w.dir); err != nil {
		return nil, err
	}
	var f waitingFile
	if err := json.Unmarshal(w.files[waitingName].content, &f); err != nil {
		return nil, fmt.Errorf("%s/%s: %w; remove the folder, and begin again", w.dir, waitingName, err)
	}
	if f.For != what {
		return nil, fmt.Errorf("%s is in the way: it waits for signatures for %q, and this is %q; if nobody goes on with that, or it was finished, remove it", w.dir, f.For, what)
	}
	w.Now, w.exists = f.Time, true
	return w, nil
}

// key is a private key that an earlier run made, or a new one.
func (w *Waiting) key(name string) (*rsa.PrivateKey, []byte, error) {
	file := name + ".key"
	if have, ok := w.files[file]; ok {
		key, err := loadRSA(w.dir, file)
		if err == nil && key == nil {
			err = fmt.Errorf("%s: %w", file, fs.ErrNotExist)
		}
		return key, have.content, err
	}
	key, text, err := generateRSA()
	if err == nil {
		w.files[file], w.fresh = outFile{file, text, true}, true
	}
	return key, text, err
}

// Settle takes how the run ended and returns that: with signatures wanted, it keeps what
// the next run needs; when all is done, it keeps nothing.
func (w *Waiting) Settle(err error) error {
	if err == nil {
		if !w.exists {
			return nil
		}
		return os.RemoveAll(w.dir)
	}
	if len(Wanted(err)) == 0 || w.exists && !w.fresh {
		return err
	}
	if failed := w.keep(); failed != nil {
		return fmt.Errorf("keep what waits for signatures in %s: %w", w.dir, failed)
	}
	return err
}

func (w *Waiting) keep() error {
	text, err := json.Marshal(waitingFile{w.what, w.Now})
	if err != nil {
		return err
	}
	w.files[waitingName] = outFile{waitingName, append(text, '\n'), false}
	if w.exists {
		return exchangeFolder(w.dir, w.files)
	}
	list := make([]outFile, 0, len(w.files))
	for _, f := range w.files {
		list = append(list, f)
	}
	return writeFolder(w.dir, list)
}
