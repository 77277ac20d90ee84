package keys

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
	"unicode/utf8"
)

const (
	signersName = "signers.json"
	keepDBName  = "db-keep.esl"
	keepKEKName = "KEK-keep.esl"
	policyName  = "policy"
	escrowName  = "escrow.key"
)

// Limits on what a signing program says.
const (
	signTimeout       = time.Minute
	maxSignTimeoutSec = 3600
	maxSignatureBytes = 4096
	maxComplaint      = 2048
)

// Signers are the signers of signers.json, by the keys' names ([PK], [KEK], [DB],
// [DBNext], "policy"): programs, or the folder whose files are carried to the key.
//
//	{"db": {"command": ["./sign-pkcs11", "01"], "timeout_sec": 60}, "KEK": {"carried": "../to-sign"}}
type Signers map[string]SignerConfig

// SignerConfig is how one key signs.
type SignerConfig struct {
	// Command is run in the keys' folder; while that is being made, in the one it is in.
	Command []string `json:"command,omitempty"`
	// TimeoutSec is 60 when it is 0.
	TimeoutSec int `json:"timeout_sec,omitempty"`
	// Carried is a folder, from the keys' one if it is not absolute; not within that,
	// which is replaced as a whole when keys are rotated.
	Carried string `json:"carried,omitempty"`
}

func (c *SignerConfig) check() error {
	switch {
	case c.Carried != "" && (len(c.Command) > 0 || c.TimeoutSec != 0):
		return errors.New("both a command and a folder that is carried; choose one")
	case c.Carried != "" && filepath.IsLocal(c.Carried):
		return fmt.Errorf("the folder that is carried, %q, would be in the one of the keys; name one beside it: %q", c.Carried, "../"+filepath.Base(c.Carried))
	case c.Carried != "":
		return nil
	case len(c.Command) == 0 || c.Command[0] == "":
		return errors.New("no command")
	case c.TimeoutSec < 0 || c.TimeoutSec > maxSignTimeoutSec:
		return fmt.Errorf("timeout of %d s, allowed are 0 to %d", c.TimeoutSec, maxSignTimeoutSec)
	}
	return nil
}

func knownName(name string) bool { return name == policyName || slices.Contains(pairNames(), name) }

func noSuchKey(name string) error {
	return fmt.Errorf("no key %q; there are %s, %s, %s, %s and %s", name, PK, KEK, DB, DBNext, policyName)
}

// ParseSigners reads signers.json.
func ParseSigners(b []byte) (Signers, error) {
	var s Signers
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the JSON object")
	}
	for name, signer := range s {
		if !knownName(name) {
			return nil, noSuchKey(name)
		}
		if err := signer.check(); err != nil {
			return nil, fmt.Errorf("key %s: %w", name, err)
		}
	}
	return s, nil
}

// loadSigners reads the file, which need not be there. It names programs to run, so
// nobody else may have written it: the folder is its owner's alone.
func loadSigners(dir string) (Signers, error) {
	b, err := readFile(dir, signersName, true)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s, err := ParseSigners(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", signersName, err)
	}
	return s, nil
}

func (s Signers) marshal() ([]byte, error) {
	b, err := json.MarshalIndent(s, "", "  ")
	return append(b, '\n'), err
}

// from has the folders that are carried resolved: they are from the keys' folder, dir.
func (s Signers) from(dir string) Signers {
	s = maps.Clone(s)
	for name, signer := range s {
		if signer.Carried != "" && !filepath.IsAbs(signer.Carried) {
			signer.Carried = filepath.Join(dir, signer.Carried)
			s[name] = signer
		}
	}
	return s
}

// signer is nil when none is named for that key. Programs run in dir.
func (s Signers) signer(dir, name string, public *rsa.PublicKey) (crypto.Signer, error) {
	signer, ok := s[name]
	if !ok {
		return nil, nil
	}
	if bits := public.N.BitLen(); bits != rsaBits {
		return nil, fmt.Errorf("key %s has %d bits; firmware and TPMs can be relied on for %d only", name, bits, rsaBits)
	}
	if signer.Carried != "" {
		return &Carried{Name: name, Folder: signer.Carried, public: public}, nil
	}
	p := &Program{Name: name, Command: signer.Command, Dir: dir, Timeout: signTimeout, public: public}
	if signer.TimeoutSec > 0 {
		p.Timeout = time.Duration(signer.TimeoutSec) * time.Second
	}
	return p, nil
}

// Program is a key that lies elsewhere, in an HSM or with a signing service, and is
// used through a program. It gets the SHA-256 digest to sign on standard input, 32
// raw bytes, and writes the RSA signature (PKCS #1 1.5, RFC 8017 §8.2) on standard
// output, 256 raw bytes. Which key is meant is in its arguments, which stay with the
// key when it is rotated. Whatever it writes is verified with the public key before it
// is used.
type Program struct {
	Name    string
	Command []string
	Dir     string // where it runs
	Timeout time.Duration

	public *rsa.PublicKey
}

// Public is the key's public part.
func (p *Program) Public() crypto.PublicKey { return p.public }

// Sign runs the program.
func (p *Program) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := onlyPKCS1(p.Name, digest, opts); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Command[0], p.Command[1:]...)
	out, complaint := &capped{max: maxSignatureBytes}, &capped{max: maxComplaint, drop: true}
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = p.Dir, bytes.NewReader(digest), out, complaint
	cmd.WaitDelay = 2 * time.Second // for what it started and left holding the pipes
	err := cmd.Run()
	switch {
	case out.over:
		err = fmt.Errorf("it wrote more than %d bytes", out.max)
	case ctx.Err() != nil:
		err = fmt.Errorf("it did not end within %v", p.Timeout)
	case err == nil:
		if err = rsa.VerifyPKCS1v15(p.public, crypto.SHA256, digest, out.kept.Bytes()); err == nil {
			return out.kept.Bytes(), nil
		}
		err = fmt.Errorf("the %d bytes it wrote are no signature by this key: %w; it should write 256 raw bytes, by PKCS #1 1.5 over the digest it reads", out.kept.Len(), err)
	}
	if text := bytes.TrimSpace(complaint.kept.Bytes()); len(text) > 0 && utf8.Valid(text) {
		err = fmt.Errorf("%w; it says: %s", err, text)
	}
	return nil, fmt.Errorf("sign with key %s by %s: %w", p.Name, p.Command[0], err)
}

// onlyPKCS1 refuses what firmware and TPMs have no use for.
func onlyPKCS1(name string, digest []byte, opts crypto.SignerOpts) error {
	if _, pss := opts.(*rsa.PSSOptions); pss || opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return fmt.Errorf("key %s signs SHA-256 digests by PKCS #1 1.5, nothing else", name)
	}
	return nil
}

// capped keeps at most max bytes; more are an error, or dropped. The buffer is not
// embedded: io.Copy would find its ReadFrom and pass the cap by.
type capped struct {
	kept bytes.Buffer
	max  int
	drop bool
	over bool // more came
}

func (c *capped) Write(b []byte) (int, error) {
	room := c.max - c.kept.Len()
	if len(b) <= room {
		return c.kept.Write(b)
	}
	c.over = true
	if !c.drop {
		return 0, fmt.Errorf("more than %d bytes", c.max)
	}
	c.kept.Write(b[:max(room, 0)])
	return len(b), nil
}
