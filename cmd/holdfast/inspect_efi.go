package main

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Limits on what is read of a program.
const (
	maxTextSection  = 1 << 20
	maxCertificates = 16 // tried per file; each trial hashes all of it
)

// program is a UKI or another EFI program.
type program struct {
	Type      string            `json:"type"` // "uki", "pe"
	SizeBytes int64             `json:"size_bytes"`
	Machine   string            `json:"machine"`
	OSRelease map[string]string `json:"os_release,omitempty"`
	Kernel    string            `json:"kernel,omitempty"`
	Cmdline   string            `json:"cmdline,omitempty"`
	// RootHash is the word image.RootHashWord of the command line.
	RootHash     string      `json:"root_hash,omitempty"`
	SBAT         []string    `json:"sbat,omitempty"`
	Authenticode string      `json:"authenticode"`
	Signatures   []signature `json:"signatures"`
	// PCR11 is by boot phase, as in image.Expected.
	PCR11           map[string]string `json:"pcr11,omitempty"`
	PolicyKeySHA256 string            `json:"policy_key_sha256,omitempty"`
	Policies        []signedPolicy    `json:"signed_policies,omitempty"`
	Sections        []section         `json:"sections"`
	Notes           []string          `json:"notes,omitempty"`
	findings
}

type signature struct {
	Subject   string `json:"subject"`
	NotBefore string `json:"not_before,omitempty"`
	NotAfter  string `json:"not_after,omitempty"`
	// Valid says that the signature covers these bytes and was made with the
	// certificate's key, not that anybody trusts that certificate.
	Valid  bool   `json:"valid"`
	Reason string `json:"reason,omitempty"`
}

// signedPolicy is an entry of .pcrsig.
type signedPolicy struct {
	PCRs      []int  `json:"pcrs"`
	KeySHA256 string `json:"key_sha256"`
	Policy    string `json:"policy"`
	// Phase is the boot phase in which this program satisfies the policy; nil is none that is known.
	Phase *string `json:"phase"`
	// Reference is the security epoch that the signature is for; "" is a plain one.
	Reference string `json:"reference,omitempty"`
}

type section struct {
	Name      string `json:"name"`
	SizeBytes int64  `json:"size_bytes"`
	Address   int64  `json:"address"`
	Measured  bool   `json:"measured"` // into PCR 11
}

// bootPhases are the words that systemd and the agent extend PCR 11 with, one after another.
var bootPhases = [...]string{"enter-initrd", "leave-initrd"}

func inspectEFI(src source) (artefact, error) { return readProgram(src, src.Size()) }

// readProgram looks into the EFI program of sizeBytes in r.
func readProgram(r io.ReaderAt, sizeBytes int64) (*program, error) {
	f, err := uki.Parse(r, sizeBytes)
	if err != nil {
		return nil, err
	}
	p := &program{Type: "pe", SizeBytes: sizeBytes, Machine: machineName(f.Machine)}
	for _, s := range f.Sections {
		p.Sections = append(p.Sections, section{Name: s.Name, SizeBytes: int64(s.VirtualSizeBytes), Address: int64(s.VirtualAddress)})
	}
	if err := p.readTexts(f); err != nil {
		return nil, err
	}
	digest, err := f.Authenticode()
	if err != nil {
		return nil, err
	}
	p.Authenticode = hex.EncodeToString(digest[:])
	if err := p.readSignatures(f); err != nil {
		return nil, err
	}
	if _, ok := f.Section(".linux"); !ok {
		return p, nil
	}
	p.Type = "uki"
	return p, p.readMeasurements(f)
}

func machineName(m uint16) string {
	switch m {
	case uki.MachineAMD64:
		return "x86-64"
	case uki.MachineARM64:
		return "arm64"
	}
	return fmt.Sprintf("machine %#x", m)
}

// sectionText is a small section; "" when it is missing.
func sectionText(f *uki.File, name string) (string, error) {
	s, ok := f.Section(name)
	if !ok {
		return "", nil
	}
	if s.VirtualSizeBytes > maxTextSection {
		return "", fmt.Errorf("section %s has %d bytes, at most %d expected", name, s.VirtualSizeBytes, maxTextSection)
	}
	r, err := f.Open(name)
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(r)
	if err != nil {
		return "", fmt.Errorf("read section %s: %w", name, err)
	}
	return strings.TrimRight(string(text), "\x00\n"), nil
}

func (p *program) readTexts(f *uki.File) error {
	var osRelease, sbat string
	for _, s := range []struct {
		name string
		into *string
	}{{".osrel", &osRelease}, {".uname", &p.Kernel}, {".cmdline", &p.Cmdline}, {".sbat", &sbat}} {
		var err error
		if *s.into, err = sectionText(f, s.name); err != nil {
			return err
		}
	}
	for line := range strings.Lines(osRelease) { // os-release(5)
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(key, "#") {
			if p.OSRelease == nil {
				p.OSRelease = map[string]string{}
			}
			p.OSRelease[key] = strings.Trim(value, `"'`)
		}
	}
	for line := range strings.Lines(sbat) {
		if line = strings.TrimSpace(line); line != "" {
			p.SBAT = append(p.SBAT, line)
		}
	}
	for word := range strings.FieldsSeq(p.Cmdline) {
		if hash, ok := strings.CutPrefix(word, image.RootHashWord); ok {
			p.RootHash = hash
		}
	}
	return nil
}

func (p *program) readSignatures(f *uki.File) error {
	p.Signatures = []signature{}
	list, err := f.Signatures()
	if err != nil {
		p.Notes = append(p.Notes, "signatures that cannot be read: "+err.Error())
		return nil
	}
	tried := 0
	for i, s := range list {
		found := signature{Reason: "it carries no certificate"}
		for _, cert := range s.Certificates {
			if tried++; tried > maxCertificates {
				p.Notes = append(p.Notes, fmt.Sprintf("more than %d certificates; the rest was not looked at", maxCertificates))
				return nil
			}
			err := f.Verify(cert)
			if err == nil || found.Subject == "" {
				found = signature{Subject: cert.Subject.String(), NotBefore: cert.NotBefore.UTC().Format("2006-01-02"), NotAfter: cert.NotAfter.UTC().Format("2006-01-02"), Valid: err == nil}
			}
			if err == nil {
				break
			}
			found.Reason = err.Error()
		}
		p.Signatures = append(p.Signatures, found)
		if !found.Valid {
			p.problem("signature %d by %q does not hold: %s", i+1, found.Subject, found.Reason)
		}
	}
	return nil
}

// readMeasurements predicts PCR 11 and says what the policies in .pcrsig approve.
func (p *program) readMeasurements(f *uki.File) error {
	measured, err := f.Measured()
	if err != nil {
		return err
	}
	for i := range p.Sections {
		for _, m := range measured {
			p.Sections[i].Measured = p.Sections[i].Measured || m.Name == p.Sections[i].Name
		}
	}
	value := pcr.UKI(measured)
	p.PCR11 = map[string]string{"": hex.EncodeToString(value[:])}
	phases := map[pcr.Digest]string{}
	for i := range len(bootPhases) + 1 {
		phase := strings.Join(bootPhases[:i], ":")
		if i > 0 {
			value = pcr.Extend(value, []byte(bootPhases[i-1]))
			p.PCR11[phase] = hex.EncodeToString(value[:])
		}
		policy, err := pcr.Policy([]int{11}, map[int]pcr.Digest{11: value})
		if err != nil {
			return err
		}
		phases[policy] = phase
	}
	return p.readPolicies(f, phases)
}

// readPolicies checks the entries of .pcrsig with the key in .pcrpkey.
func (p *program) readPolicies(f *uki.File, phases map[pcr.Digest]string) error {
	text, err := sectionText(f, ".pcrpkey")
	if err != nil {
		return err
	}
	var key *rsa.PublicKey
	if text != "" {
		if key, err = parsePolicyKey(text); err != nil {
			p.Notes = append(p.Notes, "section .pcrpkey: "+err.Error())
		} else {
			sum := sha256.Sum256(x509.MarshalPKCS1PublicKey(key))
			p.PolicyKeySHA256 = hex.EncodeToString(sum[:])
		}
	}
	if text, err = sectionText(f, ".pcrsig"); err != nil || text == "" {
		return err
	}
	list, err := seal.ParseSignatures([]byte(text))
	if err != nil {
		p.Notes = append(p.Notes, "section .pcrsig: "+err.Error())
		return nil
	}
	for i, s := range list {
		entry := signedPolicy{PCRs: s.PCRs, KeySHA256: hex.EncodeToString(s.KeyFingerprint[:]), Policy: hex.EncodeToString(s.Policy[:]), Reference: s.Ref}
		if phase, ok := phases[s.Policy]; ok {
			entry.Phase = &phase
		}
		if key != nil && entry.KeySHA256 == p.PolicyKeySHA256 {
			digest := sha256.Sum256(append(s.Policy[:], s.Ref...))
			if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], s.Sig); err != nil {
				p.problem("policy %d in .pcrsig is not signed by the key in .pcrpkey: damaged, or forged", i+1)
			}
		}
		p.Policies = append(p.Policies, entry)
	}
	return nil
}

func parsePolicyKey(text string) (*rsa.PublicKey, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("not PEM")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a %T, not RSA", key)
	}
	return public, nil
}

func (p *program) print(s *sheet) {
	what := "EFI program"
	if p.Type == "uki" {
		what = "Unified Kernel Image"
	}
	s.line(fmt.Sprintf("%s, %s, %s", what, bytesText(p.SizeBytes), p.Machine))
	s.fact("system", p.system())
	s.fact("kernel", p.Kernel)
	s.fact("command line", p.Cmdline)
	s.fact("Authenticode", p.Authenticode)
	s.facts("signed by", p.signers()...)
	printPCR11(s, p.PCR11)
	s.fact("policy key", p.PolicyKeySHA256)
	for i, e := range p.Policies {
		s.fact(when(i == 0, "disk opens"), p.policyText(e))
	}
	s.facts("SBAT", p.SBAT...)
	for i, e := range p.Sections {
		s.fact(when(i == 0, "sections"), e.Name, bytesText(e.SizeBytes), when(e.Measured, "measured"))
	}
	s.facts("note", p.Notes...)
}

// printPCR11 shows predicted values in the order of the boot.
func printPCR11(s *sheet, values map[string]string) {
	for i := range len(bootPhases) + 1 {
		phase := strings.Join(bootPhases[:i], ":")
		if value := values[phase]; value != "" {
			s.fact(when(i == 0, "PCR 11"), value, phaseText(phase))
		}
	}
}

func phaseText(phase string) string {
	if phase == "" {
		return "after the stub"
	}
	return "at " + phase
}

// system is what the program calls itself.
func (p *program) system() string {
	if name := p.OSRelease["PRETTY_NAME"]; name != "" {
		return name
	}
	return strings.TrimSpace(p.OSRelease["NAME"] + " " + p.OSRelease["VERSION_ID"])
}

// signers is one line for each signature.
func (p *program) signers() []string {
	if len(p.Signatures) == 0 {
		return []string{"nobody; firmware with Secure Boot on refuses it"}
	}
	var lines []string
	for _, s := range p.Signatures {
		state := "valid for this content"
		if !s.Valid {
			state = "NOT VALID"
		}
		lines = append(lines, fmt.Sprintf("%s (%s to %s): %s", s.Subject, s.NotBefore, s.NotAfter, state))
	}
	return lines
}

func (p *program) policyText(e signedPolicy) string {
	by := "the policy key"
	if e.KeySHA256 != p.PolicyKeySHA256 {
		by = "another key, " + e.KeySHA256
	}
	if e.Phase == nil {
		return "never: " + by + " signed a value that this program does not reach under systemd 252's stub"
	}
	text := phaseText(*e.Phase) + ", signed by " + by
	if e.Reference != "" {
		text += " for " + e.Reference
	}
	return text
}

// when is text if the condition holds.
func when(condition bool, text string) string {
	if condition {
		return text
	}
	return ""
}
