package seal

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// policySession is a salted policy session whose responses are encrypted, for
// TPM2_Unseal. It implements tpm2.Session.
//
// go-tpm 0.9.8 has such sessions too, but shortens an auth value at its first
// zero byte instead of dropping trailing zeros only (Part 1 §19.6.5), so every
// eighth PIN hash would be refused as wrong and count for lockout.
type policySession struct {
	handle      tpm2.TPMHandle
	key         []byte // sessionKey
	auth        []byte // auth value of the object, no trailing zeros; nil without PolicyAuthValue
	nonceCaller []byte
	nonceTPM    []byte
}

const (
	nonceBytes = 16
	aesBits    = 128
)

// sessionAttributes: encrypt, and not continueSession: the TPM forgets the
// session with the command that succeeds, which spares a command. Part 2 §8.4.
const sessionAttributes = 1 << 6

// startPolicySession opens a session. Part 3 §11.1, Part 1 §19.6.8. The caller
// calls wipe, and flushes the handle unless the session was used up.
func startPolicySession(t TPM, parent SRK, auth []byte) (*policySession, error) {
	encapsulate, err := tpm2.ImportEncapsulationKey(&parent.public)
	if err != nil {
		return nil, fmt.Errorf("salt a session: %w", err)
	}
	salt, encryptedSalt, err := tpm2.CreateEncryptedSalt(rand.Reader, encapsulate)
	if err != nil {
		return nil, fmt.Errorf("salt a session: %w", err)
	}
	defer clear(salt)
	s := &policySession{auth: auth, nonceCaller: make([]byte, nonceBytes)}
	rand.Read(s.nonceCaller) // never fails: crypto/rand
	rsp, err := tpm2.StartAuthSession{
		TPMKey:        parent.handle,
		Bind:          tpm2.TPMRHNull,
		NonceCaller:   tpm2.TPM2BNonce{Buffer: s.nonceCaller},
		EncryptedSalt: tpm2.TPM2BEncryptedSecret{Buffer: encryptedSalt},
		SessionType:   tpm2.TPMSEPolicy,
		Symmetric: tpm2.TPMTSymDef{
			Algorithm: tpm2.TPMAlgAES,
			KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(aesBits)),
			Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		},
		AuthHash: tpm2.TPMAlgSHA256,
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("start the policy session: %w", err)
	}
	s.handle = tpm2.TPMHandle(rsp.SessionHandle.HandleValue())
	s.nonceTPM = rsp.NonceTPM.Buffer
	s.key = tpm2.KDFa(crypto.SHA256, salt, "ATH", s.nonceTPM, s.nonceCaller, 8*sha256.Size)
	return s, nil
}

func (s *policySession) wipe() { clear(s.key) }

// secret is sessionKey || authValue, the key of HMACs and of parameter
// encryption. Part 1 §19.6.5, §21.2.
func (s *policySession) secret() []byte { return bytes.Join([][]byte{s.key, s.auth}, nil) }

func (s *policySession) mac(parts ...[]byte) []byte {
	key := s.secret()
	defer clear(key)
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	h.Write([]byte{sessionAttributes})
	return h.Sum(nil)
}

// The methods of tpm2.Session follow.

// Init does nothing; the session exists.
func (s *policySession) Init(TPM) error { return nil }

// CleanupFailure does nothing; the owner flushes the session.
func (s *policySession) CleanupFailure(TPM) error { return nil }

// NonceTPM is the last one.
func (s *policySession) NonceTPM() tpm2.TPM2BNonce { return tpm2.TPM2BNonce{Buffer: s.nonceTPM} }

// NewNonceCaller makes one.
func (s *policySession) NewNonceCaller() error {
	_, err := rand.Read(s.nonceCaller)
	return err
}

// Authorize signs a command: HMAC(cpHash || nonceCaller || nonceTPM || attributes).
func (s *policySession) Authorize(cc tpm2.TPMCC, parms, addNonces []byte, names []tpm2.TPM2BName, _ int) (*tpm2.TPMSAuthCommand, error) {
	cp := sha256.New()
	cp.Write(binary.BigEndian.AppendUint32(nil, uint32(cc)))
	for _, n := range names {
		cp.Write(n.Buffer)
	}
	cp.Write(parms)
	return &tpm2.TPMSAuthCommand{
		Handle:        s.handle,
		Nonce:         tpm2.TPM2BNonce{Buffer: s.nonceCaller},
		Attributes:    tpm2.TPMASession{Encrypt: true},
		Authorization: tpm2.TPM2BData{Buffer: s.mac(cp.Sum(nil), s.nonceCaller, s.nonceTPM, addNonces)},
	}, nil
}

// Validate checks that a response comes from the TPM that has the salt.
func (s *policySession) Validate(rc tpm2.TPMRC, cc tpm2.TPMCC, parms []byte, _ []tpm2.TPM2BName, _ int, auth *tpm2.TPMSAuthResponse) error {
	if a := auth.Attributes; a.ContinueSession || !a.Encrypt {
		return fmt.Errorf("the TPM answered with session attributes %+v", a)
	}
	s.nonceTPM = auth.Nonce.Buffer
	rp := binary.BigEndian.AppendUint32(nil, uint32(rc))
	rp = binary.BigEndian.AppendUint32(rp, uint32(cc))
	digest := sha256.Sum256(append(rp, parms...))
	if !hmac.Equal(s.mac(digest[:], s.nonceTPM, s.nonceCaller), auth.Authorization.Buffer) {
		return errors.New("the TPM's answer is not authentic: a fault on its bus, or somebody there who changes traffic")
	}
	return nil
}

// IsEncryption: responses are encrypted.
func (s *policySession) IsEncryption() bool { return true }

// IsDecryption: commands are not; TPM2_Unseal has no parameter.
func (s *policySession) IsDecryption() bool { return false }

// Encrypt leaves a command's parameter as it is.
func (s *policySession) Encrypt([]byte) error { return nil }

// Decrypt decrypts a response's first parameter in place. Part 1 §21.3.
func (s *policySession) Decrypt(parameter []byte) error {
	secret := s.secret()
	defer clear(secret)
	keyIV := tpm2.KDFa(crypto.SHA256, secret, "CFB", s.nonceTPM, s.nonceCaller, aesBits+8*aes.BlockSize)
	defer clear(keyIV)
	block, err := aes.NewCipher(keyIV[:aesBits/8])
	if err != nil {
		return fmt.Errorf("decrypt the TPM's answer: %w", err)
	}
	//lint:ignore SA1019 CFB is what a TPM has; the HMAC over the ciphertext authenticates it.
	cipher.NewCFBDecrypter(block, keyIV[aesBits/8:]).XORKeyStream(parameter, parameter)
	return nil
}

// Handle is the TPM's handle.
func (s *policySession) Handle() tpm2.TPMHandle { return s.handle }
