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
	for _, name := range []string{PK, KEK, DB} {
		p, err := k.pair(name)
		if err != nil {
			return nil, err
		}
		if err := p.load(dir, name); err != nil {
			return nil, err
		}
	}
	for _, p := range []*Pair{&k.PK, &k.KEK, &k.DB} {
		if !bytes.HasSuffix(p.Auth, signatureList(p.Cert, k.Owner())) {
			return nil, fmt.Errorf("%s.auth does not enrol %s.pem under the owner that PK.pem stands for; files of two vendors are mixed", p.name, p.name)
		}
	}
	if err := k.loadPolicy(dir); err != nil {
		return nil, err
	}
	return k, k.loadEscrow(dir)
}

func (p *Pair) load(dir, name string) error {
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
	if err != nil || key == nil {
		return err
	}
	if !key.PublicKey.Equal(pub) {
		return fmt.Errorf("%s.key does not belong to the certificate in %s.pem", name, name)
	}
	p.Key = key
	return nil
}

func (k *Keys) loadPolicy(dir string) error {
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
	if err != nil || key == nil {
		return err
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
	text, err = readFile(dir, "escrow.key", true)
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
