package attest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Input is what an answer is made of beside what the TPM says.
type Input struct {
	Challenge *Challenge
	// Statement is what the box says about itself; see there.
	Statement Statement
	// EventLog is binary_bios_measurements, read once and to its end (F23). Empty, or
	// longer than MaxLogBytes, it is left out: the vendor then cannot judge most of it.
	EventLog    []byte
	Attachments []Attachment
	Time        time.Time // the box's clock
	// RSA makes the AK an RSA key even where the TPM has ECC.
	RSA bool
}

// quoteTries is how often a quote is made anew because something was measured between
// reading the registers and signing them (F17).
const quoteTries = 5

// Attest answers a challenge. It sends about twenty TPM commands, leaves nothing in the
// TPM, and takes 0.1 s on a swtpm; a chip takes a second or two, and more at first
// contact, when it has to make its RSA endorsement key again. It changes no register.
//
// A box without an EK certificate, or whose credential is not for it, still answers:
// judging is the vendor's. Errors are those of the TPM, and documents that would not be
// read at the other end.
func Attest(t seal.TPM, in Input) (*Answer, error) {
	if in.Challenge == nil {
		return nil, errors.New("attest: no challenge")
	}
	if err := in.Challenge.check(); err != nil {
		return nil, fmt.Errorf("attest: challenge: %w", err)
	}
	t = seal.Patient(t)
	fit, err := seal.Check(t)
	if err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	ak, err := makeAK(t, in.RSA)
	if err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	defer ak.flush(t)
	a := &Answer{AKPublic: ak.public, Attachments: in.Attachments}
	if len(in.EventLog) <= MaxLogBytes {
		a.EventLog = in.EventLog
	}
	said := in.Statement
	said.Type, said.Format, said.Time = statementType, 1, in.Time.UTC().Truncate(time.Second)
	said.TPM = TPM{fit.Manufacturer, fit.Model, fit.Firmware}
	said.Activation, said.Attachments = nil, nil
	for _, f := range in.Attachments {
		said.Attachments = append(said.Attachments, f.digest())
	}
	credential := in.Challenge.credentialFor(ak.name)
	a.Certificates, a.EKPublic = readCertificates(t)
	if len(a.EKPublic) == 0 || credential != nil {
		if said.Activation, err = a.endorse(t, ak, credential); err != nil {
			return nil, fmt.Errorf("attest: %w", err)
		}
	}
	a.Statement = &said
	if err := said.check(); err != nil {
		return nil, fmt.Errorf("attest: statement: %w", err)
	}
	if err := a.quote(t, ak, in.Challenge.qualifyingData(said.marshal())); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	_, err = ParseAnswer(a.Marshal()) // what the other end would say
	return a, err
}

// key is a transient key in the TPM.
type key struct {
	handle tpm2.TPMHandle
	name   []byte
	public []byte // TPMT_PUBLIC
	// persistent keys stay.
	persistent bool
}

func (k key) flush(t seal.TPM) {
	if !k.persistent {
		_, _ = tpm2.FlushContext{FlushHandle: k.handle}.Execute(t) // what is left goes when the device is closed
	}
}

func (k key) auth(session tpm2.Session) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.handle, Name: tpm2.TPM2BName{Buffer: k.name}, Auth: session}
}

// makeAK makes the attestation key, in the endorsement hierarchy: there TPM2_Clear does
// not change it, and the quote tells the firmware's version and the count of resets as
// they are (Part 1 §36.7).
func makeAK(t seal.TPM, rsa bool) (key, error) {
	if !rsa {
		k, err := makePrimary(t, akTemplate(tpm2.TPMAlgECC))
		if !lacksECC(err) {
			return k, wrapAK(err)
		}
	}
	k, err := makePrimary(t, akTemplate(tpm2.TPMAlgRSA))
	return k, wrapAK(err)
}

func wrapAK(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, tpm2.TPMRCBadAuth), errors.Is(err, tpm2.TPMRCAuthFail):
		return fmt.Errorf("make the attestation key: the TPM's endorsement hierarchy has a password; clear the TPM in the firmware setup: %w", err)
	}
	return fmt.Errorf("make the attestation key: %w", err)
}

// lacksECC says whether the TPM refused the template and not the command.
func lacksECC(err error) bool {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCCurve, tpm2.TPMRCType, tpm2.TPMRCScheme, tpm2.TPMRCAsymmetric, tpm2.TPMRCValue, tpm2.TPMRCHash} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// makePrimary is TPM2_CreatePrimary in the endorsement hierarchy. The same template
// gives the same key, for the TPM's life.
func makePrimary(t seal.TPM, template tpm2.TPMTPublic) (key, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(t)
	if err != nil {
		return key{}, err
	}
	public := rsp.OutPublic.Bytes()
	return key{handle: rsp.ObjectHandle, name: rsp.Name.Buffer, public: public}, nil
}

// endorse finds or makes the endorsement key and opens the credential with it. A
// credential that is for another TPM is passed over: the vendor will see that.
func (a *Answer) endorse(t seal.TPM, ak key, c *Credential) (secret []byte, err error) {
	ek, err := findEK(t, a.EKPublic)
	if err != nil {
		return nil, err
	}
	defer ek.flush(t)
	if len(a.EKPublic) == 0 {
		a.EKPublic = ek.public
	}
	if sum := sha256.Sum256(ek.public); c == nil || !bytes.Equal(sum[:], c.EK) {
		return nil, nil
	}
	secret, err = activate(t, ak, ek, c)
	if errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCValue) || errors.Is(err, tpm2.TPMRCSize) {
		return nil, nil
	}
	return secret, err
}

// findEK is the key with the public area want, or, where that is empty, the first one
// that the TPM can make. One that is kept in the TPM spares the making of an RSA key,
// which takes a chip up to half a minute.
func findEK(t seal.TPM, want []byte) (key, error) {
	templates := ekTemplates()
	if len(want) > 0 {
		public, err := parseEK(want)
		if err != nil {
			return key{}, fmt.Errorf("endorsement key: %w", err)
		}
		templates = slices.DeleteFunc(templates, func(t ekTemplate) bool {
			area, ok := t.of(public)
			return !ok || !bytes.Equal(area, want)
		})
		for _, template := range templates {
			rsp, err := tpm2.ReadPublic{ObjectHandle: template.persistent}.Execute(t)
			if err == nil && bytes.Equal(rsp.OutPublic.Bytes(), want) {
				return key{handle: template.persistent, name: rsp.Name.Buffer, public: want, persistent: true}, nil
			}
		}
	}
	var refused error
	for _, template := range templates {
		k, err := makePrimary(t, template.area)
		if err != nil {
			refused = err
			continue
		}
		if len(want) == 0 || bytes.Equal(k.public, want) {
			return k, nil
		}
		k.flush(t)
		refused = errors.New("the TPM's endorsement key is not the one in its certificate")
	}
	return key{}, fmt.Errorf("make the endorsement key: %w", refused)
}

// activate is TPM2_ActivateCredential. An EK of the low range wants the endorsement
// hierarchy's authorization, by policy; one of the high range takes its password.
// TCG EK Credential Profile 2.5 §B.3, §B.4.
func activate(t seal.TPM, ak, ek key, c *Credential) ([]byte, error) {
	public, err := parsePublic(ek.public)
	if err != nil {
		return nil, fmt.Errorf("open the credential: endorsement key: %w", err)
	}
	policy := func(t seal.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{
			AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			PolicySession: session, NonceTPM: nonce,
		}.Execute(t)
		return err
	}
	session := tpm2.Policy(tpm2.TPMAlgSHA256, 16, policy)
	if public.Attributes&attributePassword != 0 {
		session = tpm2.PasswordAuth(nil)
	}
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: ak.auth(tpm2.PasswordAuth(nil)),
		KeyHandle:      ek.auth(session),
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Blob},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: c.Seed},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("open the credential: %w", err)
	}
	if len(rsp.CertInfo.Buffer) != nonceBytes {
		return nil, nil // not a credential of ours
	}
	return rsp.CertInfo.Buffer, nil
}

// quote reads the registers and has them signed, both of the same moment.
func (a *Answer) quote(t seal.TPM, ak key, data pcr.Digest) error {
	var bitmap [pcr.Count / 8]byte
	for _, p := range Selection() {
		bitmap[p/8] |= 1 << (p % 8)
	}
	for range quoteTries {
		values, err := seal.ReadPCRs(t, Selection())
		if err != nil {
			return err
		}
		a.Registers = nil
		for _, p := range Selection() {
			v := values[p]
			a.Registers = append(a.Registers, v[:]...)
		}
		rsp, err := tpm2.Quote{
			SignHandle:     ak.auth(tpm2.PasswordAuth(nil)),
			QualifyingData: tpm2.TPM2BData{Buffer: data[:]},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap[:]}}},
		}.Execute(t)
		if err != nil {
			return fmt.Errorf("quote: %w", err)
		}
		a.Quote, a.Signature = rsp.Quoted.Bytes(), tpm2.Marshal(rsp.Signature)
		q, err := parseQuote(a.Quote)
		if err != nil {
			return fmt.Errorf("quote: %w", err)
		}
		if sum := sha256.Sum256(a.Registers); bytes.Equal(q.Digest, sum[:]) {
			return nil
		}
	}
	return fmt.Errorf("quote: something measures into PCR %v all the time; %d quotes did not match the registers read before", Selection(), quoteTries)
}

// firstIssuerIndex and the indices behind it hold the certificates of issuers, where
// the TPM has them (Intel's on-die CA): EK Credential Profile 2.5 §2.2.1.5.2.
const firstIssuerIndex tpm2.TPMHandle = 0x01c00100

// readCertificates gets the EK's certificate, those of its issuers, and the public area
// that goes with it. What cannot be read is left out.
func readCertificates(t seal.TPM) (certificates [][]byte, ek []byte) {
	for _, template := range ekTemplates() {
		der, err := readNV(t, template.certificate)
		if err != nil || len(der) == 0 {
			continue
		}
		der = trimDER(der)
		if len(der) > maxCertificateBytes {
			continue
		}
		if key, err := certificateKey(der); err == nil {
			ek, _ = template.of(key) // of another template: the EK is made, and its own
		}
		certificates = append(certificates, der)
		break
	}
	if len(certificates) == 0 {
		return nil, nil
	}
	for index := firstIssuerIndex; len(certificates) < maxCertificates; index++ {
		chain, err := readNV(t, index)
		if err != nil {
			break
		}
		for len(chain) > 0 && len(certificates) < maxCertificates {
			der := trimDER(chain)
			if len(der) < 64 || len(der) > maxCertificateBytes {
				break
			}
			certificates = append(certificates, slices.Clone(der))
			chain = chain[len(der):]
		}
	}
	return certificates, ek
}

// readNV reads a whole NV index that anybody may read with its empty password.
func readNV(t seal.TPM, index tpm2.TPMHandle) ([]byte, error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("read the public area of NV index 0x%08x: %w", uint32(index), err)
	}
	public, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("read the public area of NV index 0x%08x: %w", uint32(index), err)
	}
	self := tpm2.AuthHandle{Handle: index, Name: rsp.NVName, Auth: tpm2.PasswordAuth(nil)}
	if !public.Attributes.AuthRead && public.Attributes.OwnerRead {
		self = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	}
	const most = 512 // what every TPM gives at once: PC Client Profile, TPM_PT_NV_BUFFER_MAX
	var data []byte
	for len(data) < int(public.DataSize) {
		part, err := tpm2.NVRead{
			AuthHandle: self, NVIndex: tpm2.NamedHandle{Handle: index, Name: rsp.NVName},
			Size: uint16(min(most, int(public.DataSize)-len(data))), Offset: uint16(len(data)),
		}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("read NV index 0x%08x at %d: %w", uint32(index), len(data), err)
		}
		if len(part.Data.Buffer) == 0 {
			return nil, fmt.Errorf("read NV index 0x%08x at %d: the TPM gave nothing", uint32(index), len(data))
		}
		data = append(data, part.Data.Buffer...)
	}
	return data, nil
}
