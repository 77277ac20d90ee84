package repo

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// NewKey makes an ed25519 key in a new file: PEM, PKCS #8, readable by its owner.
func NewKey(path string, random io.Reader) (crypto.Signer, error) {
	_, key, err := ed25519.GenerateKey(random)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return key, nil
}

// LoadKeys reads every *.pem of a folder: ed25519 or ECDSA P-256, PKCS #8.
func LoadKeys(dir string) ([]crypto.Signer, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.pem"))
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("load keys: no *.pem in %s", dir)
	}
	var keys []crypto.Signer
	for _, name := range names {
		s, err := LoadKey(name)
		if err != nil {
			return nil, err
		}
		keys = append(keys, s)
	}
	return keys, nil
}

// LoadKey reads one file of the kind of [LoadKeys].
func LoadKey(name string) (crypto.Signer, error) {
	b, err := readFile(name)
	if err != nil {
		return nil, fmt.Errorf("load keys: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("load keys: %s is not a PEM file of a PKCS #8 key", name)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("load key %s: %w", name, err)
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("load key %s: a %T cannot sign", name, k)
	}
	if _, err := KeyID(s.Public()); err != nil {
		return nil, fmt.Errorf("load key %s: %w", name, err)
	}
	return s, nil
}

// KeyID is the name of a key in metadata, TUF §4.2: the SHA-256 of its canonical form.
func KeyID(public crypto.PublicKey) (string, error) {
	k, err := tufKey(public)
	if err != nil {
		return "", err
	}
	return k.ID()
}

func tufKey(public crypto.PublicKey) (*metadata.Key, error) {
	switch p := public.(type) {
	case ed25519.PublicKey:
	case *ecdsa.PublicKey:
		if p.Curve != elliptic.P256() {
			return nil, fmt.Errorf("ECDSA key on %s; P-256 is known", p.Curve.Params().Name)
		}
	default:
		return nil, fmt.Errorf("a %T does not sign metadata; ed25519 and ECDSA P-256 do", public)
	}
	return metadata.KeyFromPublicKey(public)
}

// addSignatures signs with those of the keys whose id is wanted and missing, and
// drops the signatures of others. Without ids every key is wanted.
func addSignatures[T metadata.Roles](m *metadata.Metadata[T], keys []crypto.Signer, ids []string) error {
	wanted := func(id string) bool { return ids == nil || slices.Contains(ids, id) }
	m.Signatures = slices.DeleteFunc(m.Signatures, func(s metadata.Signature) bool { return !wanted(s.KeyID) })
	payload, err := cjson.EncodeCanonical(m.Signed)
	if err != nil {
		return err
	}
	for _, k := range keys {
		id, err := KeyID(k.Public())
		if err != nil {
			return err
		}
		has := slices.ContainsFunc(m.Signatures, func(s metadata.Signature) bool { return s.KeyID == id })
		if has || !wanted(id) {
			continue
		}
		message, hash := payload, crypto.Hash(0)
		if _, ok := k.Public().(*ecdsa.PublicKey); ok {
			sum := sha256.Sum256(payload)
			message, hash = sum[:], crypto.SHA256
		}
		// ed25519 needs no randomness, and ECDSA without a source of it is that of RFC
		// 6979: the same content, the same signature.
		sig, err := k.Sign(nil, message, hash)
		if err != nil {
			return fmt.Errorf("sign with key %.8s…: %w", id, err)
		}
		m.Signatures = append(m.Signatures, metadata.Signature{KeyID: id, Signature: sig})
	}
	slices.SortFunc(m.Signatures, func(a, b metadata.Signature) int { return strings.Compare(a.KeyID, b.KeyID) })
	return nil
}

// Sign adds the signatures of keys to metadata that waits for them, such as on a
// machine without a network. Read the file before: it is JSON and says all that the
// signature will stand for.
func Sign(waiting []byte, keys []crypto.Signer) ([]byte, error) {
	role, err := roleOf(waiting)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	var out []byte
	switch role {
	case Root:
		out, err = signFile[metadata.RootType](waiting, keys)
	case Targets:
		out, err = signFile[metadata.TargetsType](waiting, keys)
	case Snapshot:
		out, err = signFile[metadata.SnapshotType](waiting, keys)
	default:
		out, err = signFile[metadata.TimestampType](waiting, keys)
	}
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", role, err)
	}
	return out, nil
}

func signFile[T metadata.Roles](b []byte, keys []crypto.Signer) ([]byte, error) {
	m, err := new(metadata.Metadata[T]).FromBytes(b)
	if err != nil {
		return nil, err
	}
	if err := addSignatures(m, keys, nil); err != nil {
		return nil, err
	}
	return m.ToBytes(true)
}

// roleOf reads the type of a file of metadata.
func roleOf(b []byte) (string, error) {
	var f struct {
		Signed struct {
			Type string `json:"_type"`
		} `json:"signed"`
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return "", err
	}
	if !slices.Contains(Roles(), f.Signed.Type) {
		return "", fmt.Errorf("%.40q is not a role", f.Signed.Type)
	}
	return f.Signed.Type, nil
}
