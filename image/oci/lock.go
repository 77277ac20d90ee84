package oci

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
)

// Lock pins registry tags to digests, so that a build next year takes the same
// images. Its file has lines of a full reference and a digest, sorted:
//
//	# etcd: stay on 3.5 until the data is migrated
//	index.docker.io/bitnami/etcd:3.5 sha256:…
//
// Lines may be edited by hand, references in short form too; comments stay with
// the line below them.
type Lock struct {
	// Update asks the registry for each tag and records the answer, instead of
	// taking only what is pinned.
	Update bool

	mu     sync.Mutex
	header []string // comments at the top, up to an empty line
	footer []string // comments below the last line
	lines  map[string]pin
}

type pin struct {
	comments []string
	digest   digest.Digest
}

// maxLineBytes bounds one line; references are shorter than 400 bytes.
const maxLineBytes = 64 << 10

// ReadLock reads a lock file. A missing file is an empty lock.
func ReadLock(path string) (*Lock, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Lock{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l, line, err := parseLock(f)
	if err != nil {
		return nil, fmt.Errorf("%s:%d: %w", path, line, err)
	}
	return l, nil
}

// parseLock also gives the number of the last line it read.
func parseLock(r io.Reader) (l *Lock, line int, err error) {
	l = &Lock{lines: map[string]pin{}}
	scanner := bufio.NewScanner(r)
	scanner.Buffer(nil, maxLineBytes)
	for scanner.Scan() {
		line++
		if err := l.parseLine(strings.TrimSpace(scanner.Text())); err != nil {
			return nil, line, err
		}
	}
	return l, line, scanner.Err()
}

// parseLine collects comments in the footer until the line they belong to comes.
func (l *Lock) parseLine(line string) error {
	if line == "" {
		if len(l.lines) == 0 {
			l.header, l.footer = append(l.header, l.footer...), nil
		}
		return nil
	}
	if strings.HasPrefix(line, "#") {
		l.footer = append(l.footer, line)
		return nil
	}
	fields := strings.Fields(line)
	if len(fields) != 2 {
		return fmt.Errorf("%q is not REFERENCE DIGEST", line)
	}
	ref, err := name.NewTag(fields[0])
	if err != nil {
		return err
	}
	d := digest.Digest(fields[1])
	if err := checkDigest(d); err != nil {
		return err
	}
	if old, ok := l.lines[ref.Name()]; ok && old.digest != d {
		return fmt.Errorf("%s is pinned twice, to %s and %s; keep one", ref.Name(), old.digest, d)
	}
	l.lines[ref.Name()] = pin{l.footer, d}
	l.footer = nil
	return nil
}

// Write replaces the file at path.
func (l *Lock) Write(path string) (err error) {
	l.mu.Lock()
	text := l.format()
	l.mu.Unlock()
	f, err := os.CreateTemp(filepath.Dir(path), ".lock-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

func (l *Lock) format() string {
	var b strings.Builder
	for _, c := range l.header {
		fmt.Fprintln(&b, c)
	}
	if len(l.header) > 0 {
		fmt.Fprintln(&b)
	}
	for _, ref := range slices.Sorted(maps.Keys(l.lines)) {
		p := l.lines[ref]
		for _, c := range p.comments {
			fmt.Fprintln(&b, c)
		}
		fmt.Fprintf(&b, "%s %s\n", ref, p.digest)
	}
	for _, c := range l.footer {
		fmt.Fprintln(&b, c)
	}
	return b.String()
}

// Resolve asks the registry what r's tag stands for now and records it. It does
// nothing for local images and digests, and, unless Update is set, for tags that
// are pinned already.
func (l *Lock) Resolve(ctx context.Context, r Ref) error {
	if r.transport != transportRegistry || r.digest != "" {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	key := r.remote.Name()
	old, ok := l.lines[key]
	if ok && !l.Update {
		return nil
	}
	d, err := resolveTag(ctx, r.remote)
	if err != nil {
		return err
	}
	if l.lines == nil {
		l.lines = map[string]pin{}
	}
	l.lines[key] = pin{old.comments, d}
	return nil
}

// pinned is the digest to open r at.
func (l *Lock) pinned(ctx context.Context, r Ref) (digest.Digest, error) {
	if l.Update {
		if err := l.Resolve(ctx, r); err != nil {
			return "", err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.lines[r.remote.Name()]
	if !ok {
		return "", fmt.Errorf("the lock does not pin %s; pin it: holdfast lock SPEC", r.remote.Name())
	}
	return p.digest, nil
}
