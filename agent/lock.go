package agent

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The locks after a hand-off, where every command is a process of its own.
const (
	// workLock is held over a check or an installation.
	workLock = "update-work.lock"
	// stateLock is held while the state is read, changed and written.
	stateLock = "update-state.lock"
	// diskLock is held while the slots' boot entries or a slot are written.
	diskLock = "update-disk.lock"

	// settlingTime is how long a command waits for the lock of another one: settling,
	// which the shortest of them does, takes less.
	settlingTime = 2 * time.Second
)

// fileLock is a lock that the kernel takes back when this process ends, however it
// ends. What is in the file is for people, and not the lock.
type fileLock struct{ *os.File }

// Close gives the lock back at once. Closing alone does not, while a child between its
// fork and its exec has the file open, too.
func (l fileLock) Close() error {
	return errors.Join(unix.Flock(int(l.Fd()), unix.LOCK_UN), l.File.Close())
}

func lockFile(path string, how int) (*fileLock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return &fileLock{f}, nil
}

// claimFile takes the lock at path for this process, or is [ErrUpdating] and says who
// has it, when that does not change within patience.
func claimFile(path string, patience time.Duration) (release func(), err error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		f, err := lockFile(path, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			// A full file system does not keep the box from its update.
			_ = f.Truncate(0)
			_, _ = fmt.Fprintf(f, "%d %s\n", os.Getpid(), time.Now().UTC().Format(time.RFC3339))
			return func() { _ = f.Truncate(0); f.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, err
		case !time.Now().Before(deadline):
			return nil, fmt.Errorf("%w: %s", ErrUpdating, holder(path))
		}
	}
}

// holder says who has the lock at path.
func holder(path string) string {
	var pid int
	var since string
	text, err := os.ReadFile(path)
	if err == nil {
		_, err = fmt.Sscanf(string(text), "%d %s\n", &pid, &since)
	}
	if err != nil {
		return "a process that did not say which" // between its lock and its name
	}
	return fmt.Sprintf("process %d, since %s", pid, since)
}
