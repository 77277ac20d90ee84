package attest

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Roots are the TPM manufacturers' certificates that EK certificates are judged by.
// They remember the chains that they have verified, so that a fleet's certificates cost
// next to nothing from the second time on. They may be used by several goroutines.
type Roots struct {
	roots, intermediates *x509.CertPool
	count                int

	mu     sync.Mutex
	chains map[[sha256.Size]byte]endorsement
}

// maxChains bounds what Roots remember, at about 1 KB each.
const maxChains = 1 << 16

// endorsement is what a verified EK certificate says.
type endorsement struct {
	publics             [][]byte // TPMT_PUBLIC of the EK, by each template
	other               error    // why there is no such thing: another kind of key
	facts               tpmFacts
	root                string
	notBefore, notAfter time.Time // of the whole chain
}

// tpmFacts are the attributes in an EK certificate's alternative name. EK Credential
// Profile 2.5 §3.1.2.
type tpmFacts struct{ Manufacturer, Model, Version string }

// NewRoots takes files of certificates, each one DER or any number in PEM. Those that
// issued themselves are roots, the others help to find a way to one. What cannot be
// parsed (some makers' certificates are not what X.509 wants) is left out and told in
// skipped. The error is that no root is left.
func NewRoots(files ...[]byte) (r *Roots, skipped []error, err error) {
	r = &Roots{roots: x509.NewCertPool(), intermediates: x509.NewCertPool(), chains: map[[sha256.Size]byte]endorsement{}}
	for i, file := range files {
		for j, der := range certificatesIn(file) {
			c, err := x509.ParseCertificate(trimDER(der))
			if err != nil {
				skipped = append(skipped, fmt.Errorf("certificate %d of file %d: %w", j+1, i+1, err))
				continue
			}
			if !bytes.Equal(c.RawIssuer, c.RawSubject) {
				r.intermediates.AddCert(c)
				continue
			}
			r.roots.AddCert(c)
			r.count++
		}
	}
	if r.count == 0 {
		return nil, skipped, errors.New("there is no root certificate of a TPM manufacturer")
	}
	return r, skipped, nil
}

// certificatesIn splits a file.
func certificatesIn(file []byte) (list [][]byte) {
	for rest := file; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			list = append(list, block.Bytes)
		}
	}
	if len(list) == 0 && len(file) > 0 {
		list = append(list, file)
	}
	return list
}

// errNotParsed means that a certificate is of a form that is not understood.
var errNotParsed = errors.New("it cannot be parsed")

// verify finds a chain from the first certificate to a root.
func (r *Roots) verify(certificates [][]byte, now time.Time) (endorsement, error) {
	h := sha256.New()
	for _, c := range certificates {
		h.Write(c) // DER tells its own length
	}
	id := [sha256.Size]byte(h.Sum(nil))
	r.mu.Lock()
	e, ok := r.chains[id]
	r.mu.Unlock()
	if ok && !now.Before(e.notBefore) && !now.After(e.notAfter) {
		return e, nil
	}
	e, err := r.search(certificates, now)
	if err != nil {
		return e, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.chains) >= maxChains {
		clear(r.chains)
	}
	r.chains[id] = e
	return e, nil
}

func (r *Roots) search(certificates [][]byte, now time.Time) (e endorsement, err error) {
	leaf, err := x509.ParseCertificate(certificates[0])
	if err != nil {
		return e, fmt.Errorf("%w: %w", errNotParsed, err)
	}
	if e.facts, err = factsIn(leaf); err != nil {
		return e, fmt.Errorf("%w: %w", errNotParsed, err)
	}
	if leaf.IsCA {
		return e, errors.New("it is the certificate of an authority, not of a TPM")
	}
	// A critical alternative name that is a directory name is what the profile wants
	// and what crypto/x509 does not read; factsIn has read it.
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(leaf.UnhandledCriticalExtensions, oidAltName.Equal)
	if len(leaf.UnknownExtKeyUsage)+len(leaf.ExtKeyUsage) > 0 && !slices.ContainsFunc(leaf.UnknownExtKeyUsage, oidEKUsage.Equal) {
		return e, errors.New("it is a certificate for something else than an endorsement key")
	}
	intermediates := r.intermediates.Clone()
	for _, der := range certificates[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			intermediates.AddCert(c)
		}
	}
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: r.roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return e, err
	}
	chain := chains[0]
	e.publics, e.other = eksOf(leaf.PublicKey)
	e.root, e.notBefore, e.notAfter = chain[len(chain)-1].Subject.String(), leaf.NotBefore, leaf.NotAfter
	for _, c := range chain {
		if c.NotBefore.After(e.notBefore) {
			e.notBefore = c.NotBefore
		}
		if c.NotAfter.Before(e.notAfter) {
			e.notAfter = c.NotAfter
		}
	}
	return e, nil
}

// Object identifiers: RFC 5280 §4.2.1.6; EK Credential Profile 2.5 §3.1, §3.2.14.
var (
	oidAltName      = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidEKUsage      = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidManufacturer = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel        = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidVersion      = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
)

// factsIn reads the alternative name: GeneralNames with a directoryName [4]. Some
// makers put all three attributes into one set.
func factsIn(c *x509.Certificate) (f tpmFacts, err error) {
	for _, extension := range c.Extensions {
		if !extension.Id.Equal(oidAltName) {
			continue
		}
		var names asn1.RawValue
		if _, err := asn1.Unmarshal(extension.Value, &names); err != nil {
			return f, err
		}
		for rest := names.Bytes; len(rest) > 0; {
			var name asn1.RawValue
			if rest, err = asn1.Unmarshal(rest, &name); err != nil {
				return f, err
			}
			if name.Class != asn1.ClassContextSpecific || name.Tag != 4 {
				continue
			}
			if err := f.read(name.Bytes); err != nil {
				return f, err
			}
		}
	}
	return f, nil
}

// read takes the attributes of a directory name: a sequence of sets of (type, value).
func (f *tpmFacts) read(directoryName []byte) error {
	type attribute struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	var sets []asn1.RawValue
	if _, err := asn1.Unmarshal(directoryName, &sets); err != nil {
		return err
	}
	for _, set := range sets {
		for rest := set.Bytes; len(rest) > 0; {
			var a attribute
			var err error
			if rest, err = asn1.Unmarshal(rest, &a); err != nil {
				return err
			}
			text := string(a.Value.Bytes)
			if checkText(text) != nil {
				continue
			}
			switch {
			case a.Type.Equal(oidManufacturer):
				f.Manufacturer = text
			case a.Type.Equal(oidModel):
				f.Model = text
			case a.Type.Equal(oidVersion):
				f.Version = text
			}
		}
	}
	return nil
}

// vendorID is the manufacturer as the TPM itself tells it: "id:49465800" is "IFX". It is
// empty where the number is not letters: swtpm's tools write id:00001014.
func (f tpmFacts) vendorID() string {
	hexID, ok := strings.CutPrefix(f.Manufacturer, "id:")
	var b [4]byte
	if _, err := fmt.Sscanf(hexID, "%02X%02X%02X%02X", &b[0], &b[1], &b[2], &b[3]); !ok || err != nil || len(hexID) != 8 {
		return ""
	}
	id := strings.TrimSpace(strings.TrimRight(string(b[:]), "\x00"))
	if checkText(id) != nil {
		return ""
	}
	return id
}

// kindOf says whether a manufacturer makes TPMs in hardware: TCG TPM Vendor ID Registry
// 1.06. Of some it is not known, since they make virtual ones too.
func kindOf(vendorID string) Result {
	switch vendorID {
	case "AMD", "ATML", "BRCM", "CSCO", "FLYS", "ROCC", "HISI", "HPE", "HPI", "IFX", "INTC", "LEN", "NSM", "NTZ", "NSG", "NTC", "QCOM", "SMSN", "SNS", "SMSC", "STM", "TXN", "WEC", "SEAL":
		return Pass
	case "IBM", "SW", "xCG", "VMW", "QEMU", "AMZN":
		return Fail // swtpm and the reference implementation; hypervisors
	}
	return Unknown
}
