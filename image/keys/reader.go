package keys

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// Load reads the keys in the folder dir. All public files must be there; a
// private key may be missing and is then nil. It is an error when others than
// the owner can read a private key or enter the folder, and when files do not
// belong together.
func Load(dir string) (*Keys, error) {
	k, err := load(dir)
	if err != nil {
		return nil, fmt.Errorf("load keys from %s: %w", dir, err)
	}
	return k, nil
}

func load(dir string) (*Keys, error) {
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return nil, errors.New("it is not a folder")
	}
	if err := checkMode(dir, fi, 0o700); err != nil {
		return nil, err
	}
	k := &Keys{}
	signers, err := loadSigners(dir)
	if err != nil {
		return nil, err
	}
	signers = signers.from(dir)
	if err := errors.Join(k.loadKeep(dir), k.loadRetired(dir)); err != nil {
		return nil, err
	}
	for _, name := range pairNames() {
		p, err := k.pair(name)
		if err != nil {
			return nil, err
		}
		err = p.load(dir, name, signers)
		if name == DBNext && errors.Is(err, fs.ErrNotExist) && p.Cert == nil {
			*p = Pair{name: name} // a folder from before there was one
			continue
		}
		if err != nil {
			return nil, err
		}
	}
	for _, name := range pairNames() {
		if err := k.checkAuth(name); err != nil {
			return nil, err
		}
	}
	if err := k.loadPolicy(dir, signers); err != nil {
		return nil, err
	}
	return k, k.loadEscrow(dir)
}

func pairNames() []string { return []string{PK, KEK, DB, DBNext} }

// checkAuth: a mixture of two vendors' files would be found out by a box that takes none.
func (k *Keys) checkAuth(name string) error {
	p, err := k.pair(name)
	if err != nil || p.Cert == nil {
		return err
	}
	a, err := sigdb.ParseAuth(p.Auth)
	if err != nil {
		return fmt.Errorf("%s.auth: %w", name, err)
	}
	want := sigdb.Database{sigdb.Certificate(p.Cert, sigdb.FromUUID(k.Owner()))}.Marshal()
	if !bytes.Contains(a.Content.Marshal(), want) {
		return fmt.Errorf("%s.auth does not enrol %s.pem under the owner that PK.pem stands for; files of two vendors are mixed", name, name)
	}
	variable, appends, signer := k.authOf(name)
	if err := a.VerifiedBy(variable, appends, signer.Cert); err != nil {
		return fmt.Errorf("%s.auth is not signed with %s.pem; files of two vendors are mixed: %w", name, signer.name, err)
	}
	return nil
}

// loadKeep reads the signature lists of others; there need not be any.
func (k *Keys) loadKeep(dir string) error {
	for _, f := range []struct {
		name string
		into *sigdb.Database
	}{{keepDBName, &k.KeepDB}, {keepKEKName, &k.KeepKEK}} {
		b, err := readFile(dir, f.name, false)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			*f.into, err = sigdb.Parse(b)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return nil
}

// loadRetired reads the certificates that rotations left, in the order of their names.
func (k *Keys) loadRetired(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if !strings.HasPrefix(name, retiredPrefix) || !strings.HasSuffix(name, ".pem") {
			continue
		}
		der, err := readPEM(dir, name, "CERTIFICATE")
		if err != nil {
			return err
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		k.Retired = append(k.Retired, cert)
	}
	return nil
}

func (p *Pair) load(dir, name string, signers Signers) error {
	p.name = name
	der, err := readPEM(dir, name+".pem", "CERTIFICATE")
	if err != nil {
		return err
	}
	if p.Cert, err = x509.ParseCertificate(der); err != nil {
		return fmt.Errorf("%s.pem: %w", name, err)
	}
	if p.Auth, err = readFile(dir, name+".auth", false); err != nil {
		return err
	}
	pub, ok := p.Cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("%s.pem holds a %T, expected an RSA key", name, p.Cert.PublicKey)
	}
	key, err := loadRSA(dir, name+".key")
	if err != nil {
		return err
	}
	elsewhere, err := signers.signer(dir, name, pub)
	switch {
	case err != nil:
		return err
	case key != nil && elsewhere != nil:
		return fmt.Errorf("%s.key is there and %s says that it is elsewhere; remove one of them", name, signersName)
	case elsewhere != nil:
		p.Key = elsewhere
	case key == nil:
	case !key.PublicKey.Equal(pub):
		return fmt.Errorf("%s.key does not belong to the certificate in %s.pem", name, name)
	default:
		p.Key = key
	}
	return nil
}

func (k *Keys) loadPolicy(dir string, signers Signers) error {
	der, err := readPEM(dir, "policy.pem", "PUBLIC KEY")
	if err != nil {
		return err
	}
	parsed, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return fmt.Errorf("policy.pem: %w", err)
	}
	pub, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("policy.pem holds a %T, expected an RSA key", parsed)
	}
	// Encoded again: .pcrpkey is measured, and must not depend on line breaks.
	if k.PolicyPublicPEM, err = publicPEM(pub); err != nil {
		return fmt.Errorf("policy.pem: %w", err)
	}
	key, err := loadRSA(dir, "policy.key")
	if err != nil {
		return err
	}
	k.policy, err = signers.signer(dir, policyName, pub)
	if err != nil || key == nil {
		return err
	}
	if k.policy != nil {
		return fmt.Errorf("policy.key is there and %s says that it is elsewhere; remove one of them", signersName)
	}
	if !key.PublicKey.Equal(pub) {
		return errors.New("policy.key does not belong to the public key in policy.pem")
	}
	k.PolicyKey = key
	return nil
}

func (k *Keys) loadEscrow(dir string) error {
	text, err := readFile(dir, "escrow.pub", false)
	if err != nil {
		return err
	}
	if k.EscrowRecipient, err = age.ParseX25519Recipient(strings.TrimSpace(string(text))); err != nil {
		return fmt.Errorf("escrow.pub: %w", err)
	}
	text, err = readFile(dir, escrowName, true)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	ids, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil {
		// Not %w: age quotes the line it could not read, which may be the secret.
		return errors.New("escrow.key is not an age identity file")
	}
	id, ok := ids[0].(*age.X25519Identity)
	if len(ids) != 1 || !ok {
		return errors.New("escrow.key does not hold exactly one X25519 identity")
	}
	if id.Recipient().String() != k.EscrowRecipient.String() {
		return errors.New("escrow.key does not belong to the recipient in escrow.pub")
	}
	k.Escrow = id
	return nil
}

// loadRSA returns nil when there is no such file.
func loadRSA(dir, name string) (*rsa.PrivateKey, error) {
	der, err := readPEM(dir, name, "PRIVATE KEY")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T, expected an RSA key", name, parsed)
	}
	if bits := key.N.BitLen(); bits != rsaBits {
		return nil, fmt.Errorf("%s has %d bits; firmware and TPMs can be relied on for %d only", name, bits, rsaBits)
	}
	return key, nil
}

// readPEM reads a file with exactly one block of that type. Errors never quote
// the content.
func readPEM(dir, name, blockType string) ([]byte, error) {
	b, err := readFile(dir, name, strings.HasSuffix(name, ".key"))
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(b)
	switch {
	case block == nil:
		return nil, fmt.Errorf("%s is not a PEM file", name)
	case block.Type != blockType:
		return nil, fmt.Errorf("%s holds a PEM block %q, expected %q", name, block.Type, blockType)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, fmt.Errorf("%s holds more than one PEM block", name)
	}
	return block.Bytes, nil
}

func readFile(dir, name string, private bool) (b []byte, err error) {
	path := filepath.Join(dir, name)
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	if private {
		if err := checkMode(path, fi, 0o600); err != nil {
			return nil, err
		}
	}
	b, err = io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFileBytes {
		return nil, fmt.Errorf("%s has more than the %d bytes allowed", name, maxFileBytes)
	}
	return b, nil
}

func checkMode(path string, fi fs.FileInfo, want fs.FileMode) error {
	if mode := fi.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("%s has mode %#o, others could read private keys: chmod %#o %s", path, mode, want, path)
	}
	return nil
}

// ParsePublic reads a certificate or a public key in PEM.
func ParsePublic(text []byte) (p Public, err error) {
	block, rest := pem.Decode(text)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return p, errors.New("expected one PEM block, of a certificate or a public key")
	}
	var key any
	switch block.Type {
	case "CERTIFICATE":
		if p.Cert, err = x509.ParseCertificate(block.Bytes); err == nil {
			key = p.Cert.PublicKey
		}
	case "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	default:
		err = fmt.Errorf("PEM block %q, expected a certificate or a public key", block.Type)
	}
	if err != nil {
		return p, err
	}
	var ok bool
	if p.Key, ok = key.(*rsa.PublicKey); !ok {
		return p, fmt.Errorf("a %T, expected an RSA key", key)
	}
	return p, nil
}
