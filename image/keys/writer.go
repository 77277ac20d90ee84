package keys

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/sigdb"
)

// outFile is a file of the folder to be.
type outFile struct {
	name    string
	content []byte
	private bool
}

// Create makes a vendor's keys and writes them to the folder dir, which must
// not exist or be empty. It writes all of them or nothing: the folder appears
// under its name when it is complete and on the medium.
//
// Keys come from the system's random source. Go has ignored any other since
// 1.26, so there is none to pass in; a test that needs the same keys twice uses
// testing/cryptotest.
func Create(dir string, cfg Config) (*Keys, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("create keys: %w", err)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("create keys: %w", err)
	}
	if err := checkVacant(dir); err != nil {
		return nil, err
	}
	w, err := OpenWaiting(dir, "new keys", cfg.Now)
	if err != nil {
		return nil, fmt.Errorf("create keys: %w", err)
	}
	k, files, err := generate(dir, cfg, w)
	if err != nil {
		return nil, fmt.Errorf("create keys: %w", w.Settle(err))
	}
	if err := writeFolder(dir, files); err != nil {
		return nil, fmt.Errorf("write keys to %s: %w", dir, err)
	}
	return k, w.Settle(nil)
}

func checkVacant(dir string) error {
	fi, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("create keys: %w", err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("create keys: %s exists and is not a folder", dir)
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("create keys: %w", err)
	}
	if len(list) == 0 {
		return nil
	}
	var names []string
	for _, e := range list[:min(len(list), 20)] {
		names = append(names, e.Name())
	}
	if len(list) > len(names) {
		names = append(names, "…")
	}
	return fmt.Errorf("create keys: folder %s holds %s; keys are never overwritten, as devices depend on them: choose another folder", dir, strings.Join(names, ", "))
}

// generate makes the keys and the files that hold them, for the folder dir. Programs run
// in the one that it is in. Of signatures to be carried, it asks for as many as it can.
func generate(dir string, cfg Config, w *Waiting) (*Keys, []outFile, error) {
	k := &Keys{}
	var files []outFile
	named := cfg.Signers
	cfg.Signers, dir = named.from(dir), filepath.Dir(dir)
	k.KeepDB, k.KeepKEK = cfg.KeepDB, cfg.KeepKEK
	for _, keep := range []struct {
		name string
		list sigdb.Database
	}{{keepDBName, cfg.KeepDB}, {keepKEKName, cfg.KeepKEK}} {
		if len(keep.list) > 0 {
			files = append(files, outFile{keep.name, keep.list.Marshal(), false})
		}
	}
	// The certificates first: what enrols them names their owner by PK's.
	for _, step := range []func(string) ([]outFile, error){
		func(name string) ([]outFile, error) { return k.generatePair(dir, name, &cfg, w) },
		func(name string) ([]outFile, error) { return k.enrol(name, w.Now) },
	} {
		made, err := eachName(pairNames(), step)
		if err != nil {
			return nil, nil, err
		}
		files = append(files, made...)
	}
	if len(named) > 0 {
		text, err := named.marshal()
		if err != nil {
			return nil, nil, err
		}
		files = append(files, outFile{signersName, text, true})
	}
	rest, err := k.generatePolicyAndEscrow(dir, &cfg, w.Now)
	return k, append(files, rest...), err
}

// eachName makes the files of several keys. Signatures that are wanted do not keep it
// from asking for the others.
func eachName(names []string, step func(string) ([]outFile, error)) (files []outFile, err error) {
	for _, name := range names {
		made, failed := step(name)
		if failed != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", name, failed))
			if len(Wanted(failed)) == 0 {
				return nil, err
			}
		}
		files = append(files, made...)
	}
	return files, err
}

// title is for the certificates' common names.
func title(name string) string {
	switch name {
	case PK:
		return "platform key"
	case KEK:
		return "key exchange key"
	}
	return "signature key"
}

// generatePair makes a key and its certificate, or the certificate of a key that is
// elsewhere.
func (k *Keys) generatePair(dir, name string, cfg *Config, w *Waiting) (files []outFile, err error) {
	pair, err := k.pair(name)
	if err != nil {
		return nil, err
	}
	*pair = Pair{name: name}
	given, ok := cfg.Public[name]
	if !ok {
		key, keyPEM, err := w.key(name)
		if err != nil {
			return nil, err
		}
		pair.Key, files = key, append(files, outFile{name + ".key", keyPEM, true})
	} else {
		if pair.Key, err = cfg.Signers.signer(dir, name, given.Key); err != nil {
			return nil, err
		}
		pair.Cert = given.Cert
	}
	if pair.Cert == nil {
		key, err := pair.Signer()
		if err == nil {
			key = For(key, fmt.Sprintf("the certificate of the %s %s, %s", title(name), name, cfg.Organization))
			pair.Cert, err = selfSign(key, cfg.Organization, title(name), w.Now)
		}
		if err != nil {
			return nil, err
		}
	}
	return append(files, outFile{name + ".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Cert.Raw}), false}), nil
}

// enrol signs the .auth file of a key.
func (k *Keys) enrol(name string, now time.Time) ([]outFile, error) {
	content, err := k.content(name)
	if err != nil {
		return nil, err
	}
	variable, appends, signer := k.authOf(name)
	key, err := signer.Signer()
	if err != nil {
		return nil, err
	}
	pair, err := k.pair(name)
	if err != nil {
		return nil, err
	}
	verb := "replace"
	if appends {
		verb = "add to"
	}
	key = For(key, fmt.Sprintf("%s %s: %s", verb, variable, strings.Join(content.Describe(), "; ")))
	pair.Auth, err = sigdb.Sign(variable, content, appends, key, signer.Cert, now)
	return []outFile{{name + ".auth", pair.Auth, false}}, err
}

func (k *Keys) generatePolicyAndEscrow(dir string, cfg *Config, now time.Time) (files []outFile, err error) {
	public := cfg.Public[policyName].Key
	if public == nil {
		key, keyPEM, err := generateRSA()
		if err != nil {
			return nil, err
		}
		k.PolicyKey, public = key, &key.PublicKey
		files = append(files, outFile{"policy.key", keyPEM, true})
	} else if k.policy, err = cfg.Signers.signer(dir, policyName, public); err != nil {
		return nil, err
	}
	if k.PolicyPublicPEM, err = publicPEM(public); err != nil {
		return nil, err
	}
	if k.Escrow, err = age.GenerateX25519Identity(); err != nil {
		return nil, err
	}
	k.EscrowRecipient = k.Escrow.Recipient()
	// The form that age-keygen writes, so that age itself opens escrowed keys.
	identity := fmt.Sprintf("# created: %s\n# public key: %s\n%s\n", now.Format(time.RFC3339), k.EscrowRecipient, k.Escrow)
	return append(files,
		outFile{"policy.pem", k.PolicyPublicPEM, false},
		outFile{escrowName, []byte(identity), true},
		outFile{"escrow.pub", []byte(k.EscrowRecipient.String() + "\n"), false},
	), nil
}

func generateRSA() (*rsa.PrivateKey, []byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, rsaBits)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// selfSign makes the certificate that firmware stores. It is a CA, as what
// "openssl req -x509" makes is, because some firmware looks for an issuer of
// the signing certificate and has to find this one.
func selfSign(key crypto.Signer, organization, title string, now time.Time) (*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	// The serial number is a hash of the key: unique without more randomness,
	// positive and of 16 bytes (RFC 5280 §4.1.2.2).
	sum := sha256.Sum256(spki)
	sum[0] = sum[0]&0x3f | 0x40
	tmpl := &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(sum[:16]),
		Subject:               pkix.Name{Organization: []string{organization}, CommonName: organization + " " + title},
		NotBefore:             now,
		NotAfter:              now.AddDate(validYears, 0, 0),
		BasicConstraintsValid: true,
		IsCA:                  true,
		SignatureAlgorithm:    x509.SHA256WithRSA,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// writeFolder fills a folder beside dir and renames it to dir. Every file is
// synced before the rename makes it reachable, and the rename afterwards.
func writeFolder(dir string, files []outFile) (err error) {
	parent := filepath.Dir(dir)
	temp, err := os.MkdirTemp(parent, "."+filepath.Base(dir)+".new-") // mode 0700
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	slices.SortFunc(files, func(a, b outFile) int { return strings.Compare(a.name, b.name) })
	for _, f := range files {
		if err := writeFile(filepath.Join(temp, f.name), f); err != nil {
			return err
		}
	}
	if err := syncFolder(temp); err != nil {
		return err
	}
	// rename(2) replaces an empty folder and no other; os.Rename refuses both.
	if err := unix.Rename(temp, dir); err != nil {
		return fmt.Errorf("rename %s: %w", temp, err)
	}
	return syncFolder(parent)
}

func writeFile(path string, f outFile) (err error) {
	mode := fs.FileMode(0o644)
	if f.private {
		mode = 0o600
	}
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if _, err := w.Write(f.content); err != nil {
		return err
	}
	return w.Sync()
}

func syncFolder(path string) (err error) {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}
