package repo

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/update"
)

// lockName is a file in DIR.private. The lock is the kernel's (flock) and ends with the
// process that has it, however that ends; what is in the file is for people. On a
// network file system it is as good as that file system's locks.
const lockName = "lock"

// BusyError says that another process is changing the repository. Nothing was done.
type BusyError struct {
	PID   int       // 0 when it has not said so yet
	Since time.Time // when it began
}

func (e *BusyError) Error() string {
	if e.PID == 0 {
		return "another process is changing the repository"
	}
	return fmt.Sprintf("process %d is changing the repository, since %s", e.PID, e.Since.UTC().Format(time.RFC3339))
}

// lock takes the lock of a repository, or is a [BusyError].
func lock(private string) (release func(), err error) {
	path := filepath.Join(private, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666) // as far as the umask lets a group share it
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		busy := &BusyError{}
		var since string
		if n, _ := fmt.Fscanf(f, "%d %s\n", &busy.PID, &since); n == 2 {
			busy.Since, err = time.Parse(time.RFC3339, since)
		}
		if err != nil || busy.Since.IsZero() {
			busy.PID = 0
		}
		return nil, errors.Join(busy, f.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	// A full disk does not keep anybody from making room.
	_ = f.Truncate(0)
	_, _ = fmt.Fprintf(f, "%d %s\n", os.Getpid(), time.Now().UTC().Format(time.RFC3339))
	return func() {
		_ = f.Truncate(0)
		// Closing alone leaves the lock with a child that is between its fork and its exec.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		f.Close()
	}, nil
}

// claim makes this process the only one that changes the repository, and reads what
// others have changed since it was opened. Every method that writes begins with it.
func (r *Repo) claim() (release func(), err error) {
	unlock, err := lock(r.private)
	for err != nil {
		var busy *BusyError
		if !errors.As(err, &busy) || r.Busy == nil {
			return nil, err
		}
		if err := r.Busy(busy); err != nil {
			return nil, err
		}
		unlock, err = lock(r.private)
	}
	r.alone = true
	release = func() { r.alone = false; unlock() }
	if err := r.read(); err != nil {
		release()
		return nil, err
	}
	r.sweep()
	return release, nil
}

// sweep removes the temporary files of a process that was killed. What cannot be
// removed does no harm: [Published] leaves it out.
func (r *Repo) sweep() {
	for _, dir := range []string{r.private, filepath.Join(r.dir, filepath.Dir(update.BlobPath("x")))} {
		list, _ := os.ReadDir(dir)
		for _, e := range list {
			draft := dir == r.private && e.IsDir() && (strings.HasSuffix(e.Name(), ".new") || strings.HasSuffix(e.Name(), ".done"))
			if draft || strings.HasPrefix(e.Name(), tempPrefix) {
				os.RemoveAll(filepath.Join(dir, e.Name()))
			}
		}
	}
}
