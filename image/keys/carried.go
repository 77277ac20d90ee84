package keys

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/seal"
)

const (
	requestFormat   = "holdfast signature request 1"
	requestSuffix   = ".request"
	answerSuffix    = ".sig"
	maxRequestBytes = 4 << 10
	maxRequests     = 4096 // a release of the highest epoch has 1026
	maxFor          = 200  // characters
)

// Carried is a key on another machine, to which files are carried: see the package's
// documentation. Its folder holds requests, and what that machine answers.
type Carried struct {
	Name   string
	Folder string
	// For says in requests what the signature is for; see [For].
	For string

	public *rsa.PublicKey
}

// For is the signer with a word on what it is going to sign, which a [Carried] key puts
// into its requests. Other signers have no use for it.
func For(s crypto.Signer, what string) crypto.Signer {
	c, ok := s.(*Carried)
	if !ok {
		return s
	}
	named := *c
	named.For = what
	return &named
}

// WantedError says that a signature has to be made on another machine. There may be
// several in one error; [Wanted] lists them.
type WantedError struct {
	Key     string
	Request string // the file that asks for it
}

func (e *WantedError) Error() string {
	return fmt.Sprintf("a signature by the key %s is wanted; %s asks for it", e.Key, e.Request)
}

// Is has [seal.SignEpochs] ask for all signatures before it gives up.
func (e *WantedError) Is(target error) bool { return target == seal.ErrSignatureWanted }

// Wanted lists the signatures that an error says are wanted, each once.
func Wanted(err error) (list []*WantedError) {
	seen := map[string]bool{}
	var walk func(error)
	walk = func(err error) {
		if w, ok := err.(*WantedError); ok {
			if !seen[w.Request] {
				seen[w.Request], list = true, append(list, w)
			}
			return
		}
		switch e := err.(type) {
		case interface{ Unwrap() error }:
			walk(e.Unwrap())
		case interface{ Unwrap() []error }:
			for _, one := range e.Unwrap() {
				walk(one)
			}
		}
	}
	walk(err)
	return list
}

// ErrBadAnswer says that a file which should hold a signature does not.
var ErrBadAnswer = errors.New("it was cut off or damaged on the way, made with another key or for another digest, or somebody changed it; remove it, and have it made again")

// Request asks for a signature: RSA with PKCS #1 1.5 (RFC 8017 §8.2) over a SHA-256
// digest. It is the content of KEY-DIGEST.request; the answer is the 256 raw bytes of the
// signature in KEY-DIGEST.sig. Key and For are for people, and as true as whoever had
// the file in hand.
type Request struct {
	Format       string `json:"format"`
	Key          string `json:"key"`
	For          string `json:"for,omitempty"`
	DigestSHA256 string `json:"digest_sha256"`
	// PublicKeySHA256 is of the public key in DER (SubjectPublicKeyInfo), and says which
	// key is meant.
	PublicKeySHA256 string `json:"public_key_sha256"`
}

func (r *Request) base() string { return r.Key + "-" + r.DigestSHA256 }

// AnswerName is the name of the file with the signature, beside the request.
func (r *Request) AnswerName() string { return r.base() + answerSuffix }

func (r *Request) marshal() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

func parseRequest(b []byte) (*Request, error) {
	var r Request
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return nil, err
	}
	digest, err := hex.DecodeString(r.DigestSHA256)
	switch {
	case r.Format != requestFormat:
		return nil, fmt.Errorf("format %q, expected %q", r.Format, requestFormat)
	case !knownName(r.Key):
		return nil, noSuchKey(r.Key)
	case err != nil || len(digest) != sha256.Size || strings.ToLower(r.DigestSHA256) != r.DigestSHA256:
		return nil, fmt.Errorf("digest %q is not SHA-256 in lower-case hexadecimal", r.DigestSHA256)
	}
	return &r, nil
}

// fingerprint names a public key in requests.
func fingerprint(public *rsa.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), err
}

// Public is the key's public part.
func (c *Carried) Public() crypto.PublicKey { return c.public }

// Sign returns the signature that was carried back, or writes the request and returns a
// [WantedError]. What is there is verified: whoever had the files in hand may have changed
// them.
func (c *Carried) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := onlyPKCS1(c.Name, digest, opts); err != nil {
		return nil, err
	}
	print, err := fingerprint(c.public)
	if err != nil {
		return nil, err
	}
	r := Request{Format: requestFormat, Key: c.Name, For: c.what(), DigestSHA256: hex.EncodeToString(digest), PublicKeySHA256: print}
	sig, err := readAnswer(c.Folder, r.AnswerName(), c.public, digest)
	if !errors.Is(err, fs.ErrNotExist) {
		return sig, err
	}
	text, err := r.marshal()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(c.Folder, r.base()+requestSuffix)
	if err := os.MkdirAll(c.Folder, 0o755); err != nil {
		return nil, fmt.Errorf("ask for a signature by the key %s: %w", c.Name, err)
	}
	if err := replaceFile(path, text); err != nil {
		return nil, fmt.Errorf("ask for a signature by the key %s: %w", c.Name, err)
	}
	return nil, &WantedError{Key: c.Name, Request: path}
}

// what is For on one line.
func (c *Carried) what() string {
	r := []rune(strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, c.For))
	return string(r[:min(len(r), maxFor)])
}

// readAnswer returns a signature that holds; [fs.ErrNotExist] when there is none.
func readAnswer(folder, name string, public *rsa.PublicKey, digest []byte) ([]byte, error) {
	sig, err := readCarried(folder, name, int64(public.Size()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		err = rsa.VerifyPKCS1v15(public, crypto.SHA256, digest, sig)
	}
	if err != nil {
		return nil, fmt.Errorf("%s with %d bytes is no signature as asked for by %s: %w: %w",
			filepath.Join(folder, name), len(sig), strings.TrimSuffix(name, answerSuffix)+requestSuffix, err, ErrBadAnswer)
	}
	return sig, nil
}

// readCarried reads a file that came from elsewhere: no link is followed, and no pipe
// waited for.
func readCarried(folder, name string, limit int64) (b []byte, err error) {
	f, err := os.OpenFile(filepath.Join(folder, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	b, err = io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, fmt.Errorf("it has more than the %d bytes allowed", limit)
	}
	return b, err
}

// replaceFile writes a file that is there whole or not at all, also after a power cut.
func replaceFile(path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".unfinished-")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = errors.Join(f.Chmod(0o644), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncFolder(filepath.Dir(path))
}

// Answered is a request, and what [Answer] did about it.
type Answered struct {
	Request
	Outcome Outcome
	// With is the key's file here, KEY.key or for a program KEY.pem, whatever the request
	// calls it; "" for NoKey.
	With string
}

// Outcome of a request.
type Outcome string

// What may become of a request.
const (
	Signed  Outcome = "signed"
	Present Outcome = "is there already"
	NoKey   Outcome = "no key here"
)

// Answer signs the requests in folder, in the order of their names, with the private keys
// and programs (signers.json) of the folder dir. That needs only KEY.key, for a program
// KEY.pem; it may be a whole folder of keys. Signatures that are there stay as they are;
// one that does not hold is an [ErrBadAnswer]. After an error the list has those before it.
func Answer(folder, dir string) (list []Answered, err error) {
	signers, err := vault(dir)
	if err != nil {
		return nil, fmt.Errorf("keys in %s: %w", dir, err)
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), requestSuffix) {
			continue
		}
		if len(list) == maxRequests {
			return list, fmt.Errorf("%s holds more than %d requests", folder, maxRequests)
		}
		a, err := answer(folder, e.Name(), signers)
		if err != nil {
			return list, err
		}
		list = append(list, a)
	}
	return list, nil
}

func answer(folder, name string, signers map[string]vaultKey) (a Answered, err error) {
	b, err := readCarried(folder, name, maxRequestBytes)
	var r *Request
	if err == nil {
		r, err = parseRequest(b)
	}
	if err == nil && name != r.base()+requestSuffix {
		err = fmt.Errorf("it asks for %s, so its name should be %s", r.AnswerName(), r.base()+requestSuffix)
	}
	if err != nil {
		return a, fmt.Errorf("%s: %w", filepath.Join(folder, name), err)
	}
	a = Answered{Request: *r, Outcome: NoKey}
	key, ok := signers[r.PublicKeySHA256]
	if !ok {
		if _, err := os.Lstat(filepath.Join(folder, r.AnswerName())); err == nil {
			a.Outcome = Present // for the machine that asks to judge
		}
		return a, nil
	}
	a.With = key.file
	digest, err := hex.DecodeString(r.DigestSHA256)
	if err != nil {
		return a, err
	}
	if _, err := readAnswer(folder, r.AnswerName(), key.public, digest); !errors.Is(err, fs.ErrNotExist) {
		a.Outcome = Present
		return a, err
	}
	sig, err := key.Sign(rand.Reader, digest, crypto.SHA256)
	if err != nil {
		return a, err
	}
	a.Outcome = Signed
	return a, replaceFile(filepath.Join(folder, r.AnswerName()), sig)
}

// vaultKey is a key that is here.
type vaultKey struct {
	crypto.Signer
	public *rsa.PublicKey
	file   string
}

// vault reads the private keys of a folder, by the fingerprints of their public keys. A
// key may have another name here than where the request comes from, before the same
// rotation or after it.
func vault(dir string) (map[string]vaultKey, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if err := checkMode(dir, info, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	all := map[string]vaultKey{}
	add := func(k vaultKey) error {
		print, err := fingerprint(k.public)
		all[print] = k
		return err
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".key") || e.Name() == escrowName {
			continue
		}
		key, err := loadRSA(dir, e.Name())
		if err == nil && key != nil {
			err = add(vaultKey{key, &key.PublicKey, e.Name()})
		}
		if err != nil {
			return nil, err
		}
	}
	programs, err := vaultPrograms(dir)
	if err != nil {
		return nil, err
	}
	for _, k := range programs {
		if err := add(k); err != nil {
			return nil, err
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no private key is there, nor a program that signs")
	}
	return all, nil
}

// vaultPrograms are the programs of signers.json. What is carried on from here, is so by
// hand as well.
func vaultPrograms(dir string) (list []vaultKey, err error) {
	signers, err := loadSigners(dir)
	if err != nil {
		return nil, err
	}
	for name, s := range signers {
		if s.Carried != "" {
			continue
		}
		file := name + ".pem"
		text, err := readFile(dir, file, false)
		if err != nil {
			return nil, err
		}
		p, err := ParsePublic(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		program, err := signers.signer(dir, name, p.Key)
		if err != nil {
			return nil, err
		}
		list = append(list, vaultKey{program, p.Key, file})
	}
	return list, nil
}
