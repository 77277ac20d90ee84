package repo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
)

// processVariable makes this test binary a process that adds a release:
// "DIR KEYS FOLDER HOLD WAIT".
const processVariable = "HOLDFAST_TEST_ADD"

func TestMain(m *testing.M) {
	if text := os.Getenv(processVariable); text != "" {
		if err := addProcess(strings.Split(text, " ")); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("done")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func addProcess(args []string) error {
	dir, keyDir, folder, hold, wait := args[0], args[1], args[2], args[3], args[4] == "wait"
	keys, err := LoadKeys(keyDir)
	if err != nil {
		return err
	}
	r, err := Open(dir, keys, now)
	if err != nil {
		return err
	}
	if wait {
		told := false
		r.Busy = func(e *BusyError) error {
			if !told {
				fmt.Println("waits:", e)
			}
			told = true
			time.Sleep(5 * time.Millisecond)
			return nil
		}
	}
	_, err = r.Add(context.Background(), folder, AddOptions{Channel: "stable", KeepDeltas: 1}, heldPacker{hold})
	return err
}

// heldPacker waits behind the pack, before it has its name, until a file is there.
type heldPacker struct{ until string }

func (h heldPacker) Pack(ctx context.Context, root RootImage, w io.Writer) error {
	err := zstdPacker{}.Pack(ctx, root, w)
	if h.until == "" || err != nil {
		return err
	}
	fmt.Println("held")
	for _, err = os.Stat(h.until); errors.Is(err, os.ErrNotExist); _, err = os.Stat(h.until) {
		time.Sleep(5 * time.Millisecond)
	}
	return err
}

func (heldPacker) Pieces(ctx context.Context, root RootImage, w io.Writer) error {
	return zstdPacker{}.Pieces(ctx, root, w)
}
func (heldPacker) Tree(ctx context.Context, root RootImage, w io.Writer) error {
	return zstdPacker{}.Tree(ctx, root, w)
}
func (heldPacker) Patch(ctx context.Context, from, to RootImage, w io.Writer) error {
	return zstdPacker{}.Patch(ctx, from, to, w)
}
func (heldPacker) Unpack(ctx context.Context, pack, tree io.Reader, v image.Verity, w io.Writer) error {
	return zstdPacker{}.Unpack(ctx, pack, tree, v, w)
}

// process adds a release.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	out *bufio.Reader
}

func startAdd(t *testing.T, dir, keys, folder, hold, wait string) *process {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute) // one that hangs is a failure too
	p := &process{t: t, cmd: exec.CommandContext(ctx, os.Args[0], "-test.run=^$")}
	p.cmd.Env = append(os.Environ(), processVariable+"="+strings.Join([]string{dir, keys, folder, hold, wait}, " "))
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); p.cmd.Wait() })
	return p
}

func (p *process) line() string {
	p.t.Helper()
	text, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("after %q: %v", text, err)
	}
	return strings.TrimSpace(text)
}

func (p *process) want(prefix string) {
	p.t.Helper()
	if got := p.line(); !strings.HasPrefix(got, prefix) {
		p.t.Fatalf("process %d says %q, want %q", p.cmd.Process.Pid, got, prefix)
	}
}

// wantReleases is that a repository verifies, has all that these versions need, and
// nothing that an interrupted process left.
func wantReleases(t *testing.T, dir string, root []byte, versions ...string) {
	t.Helper()
	a, err := check(t, root, t.TempDir(), openDir(t, dir), now, device("0.1"))
	mustFind(t, a, err, versions[len(versions)-1])
	if _, err := Published(dir); err != nil {
		t.Error(err)
	}
	r, err := Open(dir, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.Status()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, rel := range slices.Backward(s.Releases) {
		got = append(got, rel.Version)
	}
	if !slices.Equal(got, versions) {
		t.Errorf("releases %q, want %q", got, versions)
	}
	for _, pattern := range []string{dir + "/blobs/sha256/tmp-*", dir + ".private/tmp-*", dir + ".private/pending*"} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			t.Errorf("left over: %q, %v", left, err)
		}
	}
}

// TestTwoAdds: the second process is refused, or waits and then adds to what the first
// one has published. A killed one is in nobody's way.
func TestTwoAdds(t *testing.T) {
	r, dir, keys := create(t, Options{})
	root := rootJSON(t, r)
	add(t, r, "1.0.0", AddOptions{})
	first, second, third := release(t, "gate", "1.1.0", "amd64"), release(t, "gate", "1.2.0", "amd64"), release(t, "gate", "1.3.0", "amd64")
	hold := filepath.Join(t.TempDir(), "go")
	p := startAdd(t, dir, keys, first, hold, "no")
	p.want("held")

	says := fmt.Sprintf("process %d is changing the repository, since 20", p.cmd.Process.Pid)
	startAdd(t, dir, keys, second, "", "no").want("add release: " + says)
	waits := startAdd(t, dir, keys, second, "", "wait")
	waits.want("waits: " + says)
	signers, err := LoadKeys(keys)
	if err != nil {
		t.Fatal(err)
	}
	if r, err = Open(dir, signers, now); err != nil { // to read, nobody waits
		t.Fatal(err)
	}
	if s, err := r.Status(); err != nil || len(s.Releases) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	for name, do := range map[string]func() error{
		"refresh": r.Refresh, "resume": r.Resume, "renew root": r.RenewRoot,
		"withdraw":  func() error { return r.Withdraw("gate/stable/amd64/1.0.0.json") },
		"rollout":   func() error { return r.Rollout("gate/stable/amd64/1.0.0.json", 10) },
		"promote":   func() error { return r.Promote("gate/stable/amd64/1.0.0.json", "beta", 100) },
		"rotate":    func() error { return r.Rotate(Timestamp, "", nil) },
		"prune":     func() error { _, err := r.Prune(); return err },
		"import":    func() error { return r.Import([]byte(`{"signed":{"_type":"targets"}}`)) },
		"a waiting": func() error { r.Busy = func(e *BusyError) error { return e }; return r.Refresh() },
	} {
		var busy *BusyError
		if err := do(); !errors.As(err, &busy) || busy.PID != p.cmd.Process.Pid || time.Since(busy.Since) > time.Hour {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(hold, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p.want("done")
	waits.want("done")
	wantReleases(t, dir, root, "1.0.0", "1.1.0", "1.2.0")

	killed := startAdd(t, dir, keys, third, filepath.Join(t.TempDir(), "never"), "no")
	killed.want("held")
	if err := killed.cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := killed.cmd.Wait(); err == nil {
		t.Fatal("it was not killed")
	}
	left, err := filepath.Glob(dir + "/blobs/sha256/tmp-*")
	if err != nil || len(left) != 1 {
		t.Fatalf("it was killed in the middle, and left %q, %v", left, err)
	}
	startAdd(t, dir, keys, third, "", "no").want("done")
	wantReleases(t, dir, root, "1.0.0", "1.1.0", "1.2.0", "1.3.0")
	// This one was opened long before, and adds to what is there now.
	r.Busy = nil
	add(t, r, "1.4.0", AddOptions{})
	wantReleases(t, dir, root, "1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0")
}

// TestKilledAdds kills a process at any moment. Whatever it was at, the repository
// verifies, and the next add, of the same release or another, succeeds.
func TestKilledAdds(t *testing.T) {
	r, dir, keys := create(t, Options{})
	root := rootJSON(t, r)
	add(t, r, "1.0.0", AddOptions{})
	folder := release(t, "gate", "1.1.0", "amd64")
	began := time.Now()
	startAdd(t, dir, keys, folder, "", "no").want("done")
	window := time.Since(began) // moves to where about half of them are in time
	versions := []string{"1.0.0", "1.1.0"}
	early, late := 0, 0
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 16 {
		version := fmt.Sprintf("1.%d.0", i+2)
		folder := release(t, "gate", version, "amd64")
		p := startAdd(t, dir, keys, folder, "", "no")
		time.Sleep(window/8 + time.Duration(rng.Int64N(int64(window))))
		_ = p.cmd.Process.Signal(unix.SIGKILL)
		_ = p.cmd.Wait()
		a, err := check(t, root, t.TempDir(), openDir(t, dir), now, device("0.1"))
		if err != nil || a.Candidate == nil {
			t.Fatalf("after the kill: %+v, %v", a, err)
		}
		again := startAdd(t, dir, keys, folder, "", "no")
		switch line := again.line(); {
		case line == "done":
			early++
			window += window / 4
		case strings.Contains(line, "is there already"):
			late++
			window -= window / 4
		default:
			t.Fatalf("round %d: %s", i, line)
		}
		versions = append(versions, version)
		wantReleases(t, dir, root, versions...)
	}
	t.Logf("%d were killed before their release was published, %d after", early, late)
	if early == 0 {
		t.Error("no process was killed in time")
	}
}

// TestAddsAtOnce lets several processes change one repository.
func TestAddsAtOnce(t *testing.T) {
	r, dir, keys := create(t, Options{})
	root := rootJSON(t, r)
	var versions []string
	var all []*process
	for i := range 6 {
		versions = append(versions, fmt.Sprintf("1.%d.0", i))
		all = append(all, startAdd(t, dir, keys, release(t, "gate", versions[i], "amd64"), "", "wait"))
	}
	for _, p := range all {
		line := p.line()
		if strings.HasPrefix(line, "waits: ") {
			line = p.line()
		}
		if line != "done" {
			t.Error(line)
		}
	}
	wantReleases(t, dir, root, versions...)
	if a, err := check(t, root, t.TempDir(), openDir(t, dir), now, device("0.1")); err != nil || a.Timestamp != 7 {
		t.Errorf("%+v, %v", a, err)
	}
}

// TestCreateAtOnce: one of two makes the repository.
func TestCreateAtOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	if err := os.Mkdir(privateFolder(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	release, err := lock(privateFolder(dir))
	if err != nil {
		t.Fatal(err)
	}
	var busy *BusyError
	if _, err := Create(dir, filepath.Join(t.TempDir(), "keys"), now, Options{}); !errors.As(err, &busy) || busy.PID != os.Getpid() {
		t.Error(err)
	}
	release()
	if _, err := Create(dir, filepath.Join(t.TempDir(), "keys"), now, Options{}); err != nil {
		t.Error(err)
	}
	if _, err := Create(dir, filepath.Join(t.TempDir(), "keys"), now, Options{}); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Error(err)
	}
}

// TestLockAndChildren: a child that is started meanwhile has the file open for a moment,
// and does not keep the lock.
func TestLockAndChildren(t *testing.T) {
	dir := t.TempDir()
	stop, done := make(chan struct{}), make(chan struct{})
	for range 2 {
		go func() {
			defer func() { done <- struct{}{} }()
			for {
				select {
				case <-stop:
					return
				default:
					_ = exec.Command("true").Run()
				}
			}
		}()
	}
	for range 3000 {
		release, err := lock(dir)
		if err != nil {
			t.Error(err)
			break
		}
		release()
	}
	close(stop)
	<-done
	<-done
}

// TestLockText is what is said of a lock whose process did not come to say who it is.
func TestLockText(t *testing.T) {
	dir := t.TempDir()
	release, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	for text, want := range map[string]string{
		"": "another process is changing the repository", "12": "another process is changing the repository",
		"12 noon\n": "another process is changing the repository", "x\n": "another process is changing the repository",
		"12 2026-11-21T12:00:00Z\n": "process 12 is changing the repository, since 2026-11-21T12:00:00Z",
	} {
		if err := os.WriteFile(filepath.Join(dir, lockName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := lock(dir); err == nil || err.Error() != want {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := lock(filepath.Join(dir, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
