package build

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/seal/escrow"
)

// readRecovery reads the keys that the recovery section names and checks them: a key
// that nobody has would be found out when the data is to be recovered.
func (b *builder) readRecovery() (image.Recovery, error) {
	s := b.spec.Recovery
	r := image.Recovery{
		Console: s.Console, Confirm: s.Confirm, Threshold: s.Threshold, URL: s.URL, RequireReceipt: s.RequireReceipt,
	}
	for i, h := range s.Holders {
		recipient, err := b.recipient(h)
		if err != nil {
			return r, b.at(fmt.Sprintf("recovery.holders[%d].key", i), err)
		}
		r.Holders = append(r.Holders, image.Holder{Name: h.Name, Recipient: recipient})
	}
	if len(r.Holders) > 0 {
		p := escrow.Policy{Threshold: max(r.Threshold, 1)}
		for _, h := range r.Holders {
			p.Holders = append(p.Holders, escrow.Holder(h))
		}
		if err := p.Validate(); err != nil {
			return r, b.at("recovery.holders", err)
		}
	}
	if s.ReceiptKey != "" {
		text, err := b.small(s.ReceiptKey, maxKeyBytes)
		if err == nil {
			_, err = escrow.ParsePublicKey(text)
		}
		if err != nil {
			return r, b.at("recovery.receipt_key", err)
		}
		r.ReceiptKeyPEM = string(text)
	}
	var err error
	r.CAPEM, err = b.certificates("recovery.ca", s.CA)
	return r, err
}

// certificates reads a server's, which the spec names under that key; no file is none.
func (b *builder) certificates(key, file string) (string, error) {
	if file == "" {
		return "", nil
	}
	text, err := b.small(file, maxCABytes)
	if err == nil && !x509.NewCertPool().AppendCertsFromPEM(text) {
		err = errors.New(file + " holds no certificate in PEM")
	}
	if err != nil {
		return "", b.at(key, err)
	}
	return string(text), nil
}

// readEvidence is what the evidence section says.
func (b *builder) readEvidence() (image.Evidence, error) {
	s := b.spec.Evidence
	e := image.Evidence{Stick: s.Stick, URL: s.URL, Include: s.Include}
	if s.URL == "" {
		return e, nil
	}
	e.EverySec = s.Every.Seconds()
	var err error
	e.CAPEM, err = b.certificates("evidence.ca", s.CA)
	return e, err
}

// recipient is the holder's key, or the one line of the file that it names.
func (b *builder) recipient(h spec.Holder) (string, error) {
	if strings.HasPrefix(h.Key, "age1") {
		return h.Key, nil
	}
	text, err := b.small(h.Key, maxKeyBytes)
	if err != nil {
		return "", err
	}
	if strings.Contains(string(text), "AGE-SECRET-KEY") {
		return "", errors.New(h.Key + " holds a secret key, which would be in every release; name the public one")
	}
	return strings.TrimSpace(string(text)), nil
}
