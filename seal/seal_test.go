package seal

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// vendorKey is made once; RSA keys are slow.
var vendorKey = sync.OnceValue(newKey)

func newKey() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
}

func keyPEM(t testing.TB, k *rsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// boot plays firmware and stub: after a power cycle, PCRs 0 to 7 and 11.
func boot(tpm *sealtest.TPM) {
	for i := range 8 {
		tpm.Extend(i, fmt.Sprintf("firmware %d", i))
	}
	tpm.Extend(11, "image 1")
	tpm.Extend(11, "enter-initrd")
}

func bootedPCR(i int) pcr.Digest {
	return pcr.Extend(pcr.Digest{}, []byte(fmt.Sprintf("firmware %d", i)))
}

func image(name string) pcr.Digest {
	return pcr.Extend(pcr.Extend(pcr.Digest{}, []byte(name)), []byte("enter-initrd"))
}

func signed(t testing.TB, k *rsa.PrivateKey, images ...string) Signatures {
	t.Helper()
	var s Signatures
	for _, name := range images {
		entry, err := SignPCRPolicy(k, image(name))
		if err != nil {
			t.Fatal(err)
		}
		s = append(s, entry)
	}
	return s
}

func randomSecret() []byte {
	b := make([]byte, SecretBytes)
	rand.Read(b)
	return b
}

func sealed(t testing.TB, tpm TPM, p Policy, pin string) (Token, []byte) {
	t.Helper()
	srk, err := EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	defer srk.Close(tpm)
	secret := randomSecret()
	token, err := Seal(tpm, srk, secret, p, []byte(pin))
	if err != nil {
		t.Fatal(err)
	}
	// What is used is what a disk would give back.
	b, err := token.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ParseToken(b)
	if err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	return parsed, secret
}

func standard(t testing.TB) Policy {
	return Standard(keyPEM(t, vendorKey()), map[int]pcr.Digest{7: bootedPCR(7)})
}

func mustOpen(t testing.TB, tpm TPM, token Token, s Signatures, pin string, want []byte) {
	t.Helper()
	got, err := Unseal(tpm, token, s, []byte(pin))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("another secret came back")
	}
}

func mustFail(t testing.TB, tpm *sealtest.TPM, token Token, s Signatures, pin string, as any) {
	t.Helper()
	secret, err := Unseal(tpm, token, s, []byte(pin))
	if err == nil || secret != nil {
		t.Fatal("the TPM gave the secret out")
	}
	switch want := as.(type) {
	case error:
		if !errors.Is(err, want) {
			t.Errorf("error is %v, want %v", err, want)
		}
	default:
		if !errors.As(err, as) {
			t.Errorf("error is %v, want a %T", err, as)
		}
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// policies are all combinations of elements that a token can have.
func policies(t testing.TB) map[string]Policy {
	literal := map[int]pcr.Digest{7: bootedPCR(7)}
	pem := keyPEM(t, vendorKey())
	return map[string]Policy{
		"literal":            {Name: PolicyStrict, PCRs: map[int]pcr.Digest{0: bootedPCR(0), 7: bootedPCR(7), 11: image("image 1")}},
		"signed":             {Name: PolicyDiskTheftOnly, SignedPCRs: []int{11}, PolicyKeyPEM: pem},
		"signed and literal": Standard(pem, literal),
		"literal, PIN":       {PCRs: literal, PIN: true},
		"signed, PIN":        {SignedPCRs: []int{11}, PolicyKeyPEM: pem, PIN: true},
		"everything":         {SignedPCRs: []int{11}, PolicyKeyPEM: pem, PCRs: literal, PIN: true},
	}
}

func pinFor(p Policy) string {
	if p.PIN {
		return "2468"
	}
	return ""
}

func TestSealAndUnseal(t *testing.T) {
	tpm := sealtest.Start(t)
	for name, p := range policies(t) {
		t.Run(name, func(t *testing.T) {
			tpm.Reboot()
			boot(tpm)
			token, secret := sealed(t, tpm, p, pinFor(p))
			sigs := signed(t, vendorKey(), "image 0", "image 1")
			mustOpen(t, tpm, token, sigs, pinFor(p), secret)
			tpm.Reboot()
			boot(tpm)
			mustOpen(t, tpm, token, sigs, pinFor(p), secret)
			if n := tpm.Handles(); n != 0 {
				t.Errorf("%d handles are left in the TPM", n)
			}
			public, err := unmarshalPublic(token.Public)
			if err != nil {
				t.Fatal(err)
			}
			if a := public.ObjectAttributes; a.UserWithAuth || a.AdminWithPolicy || a.NoDA == p.PIN {
				t.Errorf("attributes %+v", a)
			}
		})
	}
}

// The digest computed here must be the one the TPM computes, for every policy.
func TestDigestEqualsPolicyGetDigest(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	sigs := signed(t, vendorKey(), "image 1")
	for name, p := range policies(t) {
		t.Run(name, func(t *testing.T) {
			want, err := p.Digest()
			if err != nil {
				t.Fatal(err)
			}
			token, _ := sealed(t, tpm, p, pinFor(p))
			m, err := look(tpm, token, sigs)
			if err != nil {
				t.Fatal(err)
			}
			if len(p.SignedPCRs) > 0 {
				ticket, err := verifyInTPM(tpm, m.key, m.signature)
				if err != nil {
					t.Fatal(err)
				}
				m.ticket = &ticket
			}
			session, done, err := tpm2.PolicySession(tpm, tpm2.TPMAlgSHA256, 16)
			if err != nil {
				t.Fatal(err)
			}
			defer done()
			if err := runPolicy(tpm, session.Handle(), token, m); err != nil {
				t.Fatal(err)
			}
			got, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(tpm)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.PolicyDigest.Buffer, want[:]) {
				t.Errorf("the TPM says %x, Digest says %x", got.PolicyDigest.Buffer, want)
			}
		})
	}
}

// go-tpm's own session loses auth values that have a zero byte in them; a TPM
// drops trailing ones. Both must open.
func TestPINHashesWithZeros(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	srk, err := EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	p := policies(t)["literal, PIN"]
	secret := randomSecret()
	digest, err := p.Digest()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for i := 0; len(seen) < 2 && i < 10000; i++ {
		// Tokens of systemd 252 have no salt; that is quicker to search.
		pin := fmt.Appendf(nil, "%d", i)
		auth, err := pinAuth(pin, nil)
		if err != nil {
			t.Fatal(err)
		}
		kind := ""
		switch {
		case len(auth) < 32 && !seen["trailing"]:
			kind = "trailing"
		case bytes.IndexByte(auth, 0) >= 0 && !seen["inside"]:
			kind = "inside"
		default:
			continue
		}
		seen[kind] = true
		token := Token{PCRs: []int{7}, PolicyHash: digest, PIN: true,
			SRK: &SRKRef{Handle: uint32(srk.handle), Name: srk.Name, Public: tpm2.Marshal(srk.public)}}
		if err := create(tpm, srk, secret, auth, &token); err != nil {
			t.Fatal(err)
		}
		mustOpen(t, tpm, token, nil, string(pin), secret)
	}
	if len(seen) != 2 {
		t.Errorf("only %v were found", seen)
	}
}

// Attacks by name (F46): each changes one thing after sealing, and each must
// close every policy that has the element.
func TestAttacks(t *testing.T) {
	tpm := sealtest.Start(t)
	good := signed(t, vendorKey(), "image 1")
	var policyError *PolicyError
	tests := []struct {
		name   string
		policy string
		attack func()
		sigs   Signatures
		pin    string
		want   any
	}{
		{"PCR 7 changed", "literal", func() { tpm.Extend(7, "dbx") }, nil, "", &policyError},
		{"PCR 7 changed", "signed and literal", func() { tpm.Extend(7, "dbx") }, good, "", &policyError},
		{"PCR 7 changed, right PIN", "everything", func() { tpm.Extend(7, "dbx") }, good, "2468", &policyError},
		{"PCR 11 changed", "literal", func() { tpm.Extend(11, "leave-initrd") }, nil, "", &policyError},
		{"later phase", "signed", func() { tpm.Extend(11, "leave-initrd") }, good, "", &policyError},
		{"later phase", "signed and literal", func() { tpm.Extend(11, "leave-initrd") }, good, "", &policyError},
		{"no signature", "signed", nil, nil, "", &policyError},
		{"signature for another image", "signed", nil, signed(t, vendorKey(), "image 2"), "", &policyError},
		{"signature by another key", "signed", nil, signed(t, newKey(), "image 1"), "", &policyError},
		{"signature by another key under the vendor's fingerprint", "signed", nil, relabelled(signed(t, newKey(), "image 1"), good), "", &policyError},
		{"damaged signature", "signed", nil, damaged(good), "", &policyError},
		{"signature of another policy, relabelled", "signed", nil, relabelledPolicy(signed(t, vendorKey(), "image 2"), good), "", &policyError},
		{"wrong PIN", "everything", nil, good, "1357", ErrWrongPIN},
		{"no PIN", "everything", nil, good, "", ErrPINNeeded},
		{"SRK swapped", "signed and literal", func() { tpm.Swap(); boot(tpm) }, good, "", ErrWrongTPM},
		{"TPM cleared", "signed and literal", func() { tpm.Clear() }, good, "", ErrWrongTPM},
		{"TPM cleared and SRK made anew", "literal", func() { tpm.Clear(); ensure(t, tpm) }, nil, "", ErrWrongTPM},
	}
	for _, tt := range tests {
		t.Run(tt.name+"/"+tt.policy, func(t *testing.T) {
			tpm.Reboot()
			boot(tpm)
			p := policies(t)[tt.policy]
			token, secret := sealed(t, tpm, p, pinFor(p))
			mustOpen(t, tpm, token, good, pinFor(p), secret)
			if tt.attack != nil {
				tt.attack()
			}
			mustFail(t, tpm, token, tt.sigs, tt.pin, tt.want)
		})
	}
}

func ensure(t *testing.T, tpm TPM) {
	t.Helper()
	if _, err := EnsureSRK(tpm); err != nil {
		t.Fatal(err)
	}
}

func relabelled(s, like Signatures) Signatures {
	s[0].KeyFingerprint = like[0].KeyFingerprint
	return s
}

func relabelledPolicy(s, like Signatures) Signatures {
	s[0].Policy = like[0].Policy
	return s
}

func damaged(s Signatures) Signatures {
	d := slices.Clone(s)
	d[0].Sig = slices.Clone(d[0].Sig)
	d[0].Sig[100] ^= 1
	return d
}

// The checks of matchBoot are for the explanation. The TPM must refuse by
// itself when they are bypassed.
func TestTPMEnforcesPolicy(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	p := standard(t)
	token, _ := sealed(t, tpm, p, "")
	good, evil := signed(t, vendorKey(), "image 1")[0], signed(t, newKey(), "image 1")[0]
	key, _ := parsePolicyKey(p.PolicyKeyPEM)
	if _, err := verifyInTPM(tpm, key, evil); !errors.Is(err, tpm2.TPMRCSignature) {
		t.Errorf("the TPM verifies a signature by another key: %v", err)
	}
	parent, err := parentOf(tpm, token)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tpm2.Load{ParentHandle: parent.auth(), InPrivate: tpm2.TPM2BPrivate{Buffer: token.Private},
		InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](token.Public)}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	defer flush(tpm, loaded.ObjectHandle)
	unsealWith := func(session tpm2.Session) error {
		_, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: objectName(token.Public), Auth: session}}.Execute(tpm)
		return err
	}
	// F46: with userWithAuth these two would succeed.
	for name, session := range map[string]tpm2.Session{"password": tpm2.PasswordAuth(nil), "HMAC": tpm2.HMAC(tpm2.TPMAlgSHA256, 16)} {
		if err := unsealWith(session); err == nil {
			t.Errorf("%s: the object opens without its policy", name)
		}
	}
	ticket, err := verifyInTPM(tpm, key, good)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Token){
		"literal PCR left out":   func(t *Token) { t.PCRs = nil },
		"signed PCR left out":    func(t *Token) { t.SignedPCRs = nil },
		"another literal PCR":    func(t *Token) { t.PCRs = []int{4} },
		"one literal PCR more":   func(t *Token) { t.PCRs = []int{4, 7} },
		"everything left out":    func(t *Token) { t.PCRs, t.SignedPCRs = nil, nil },
		"PIN that was not asked": func(t *Token) { t.PIN = true },
	} {
		changed := token
		change(&changed)
		session, done, err := tpm2.PolicySession(tpm, tpm2.TPMAlgSHA256, 16)
		if err != nil {
			t.Fatal(err)
		}
		if err := runPolicy(tpm, session.Handle(), changed, match{key: key, signature: good, ticket: &ticket}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := unsealWith(session); !errors.Is(err, tpm2.TPMRCPolicyFail) {
			t.Errorf("%s: the TPM says %v, want a policy failure", name, err)
		}
		done()
	}
}

func TestSealRefuses(t *testing.T) {
	tpm := sealtest.Start(t)
	srk, err := EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	pem := keyPEM(t, vendorKey())
	ok := map[int]pcr.Digest{7: bootedPCR(7)}
	tests := map[string]struct {
		policy Policy
		secret []byte
		pin    string
	}{
		"nothing bound":         {Policy{}, randomSecret(), ""},
		"only a PIN":            {Policy{PIN: true}, randomSecret(), "1"},
		"PCR 7 un-extended":     {Policy{PCRs: map[int]pcr.Digest{7: {}}}, randomSecret(), ""},
		"PCR 7 all ones":        {Policy{PCRs: map[int]pcr.Digest{7: pcr.Digest(bytes.Repeat([]byte{255}, 32))}}, randomSecret(), ""},
		"signed without key":    {Policy{SignedPCRs: []int{11}}, randomSecret(), ""},
		"key without signed":    {Policy{PolicyKeyPEM: pem, PCRs: ok}, randomSecret(), ""},
		"PCR 24":                {Policy{PCRs: map[int]pcr.Digest{24: bootedPCR(7)}}, randomSecret(), ""},
		"PIN wanted, none":      {Policy{PCRs: ok, PIN: true}, randomSecret(), ""},
		"PIN given, not wanted": {Policy{PCRs: ok}, randomSecret(), "1"},
		"no secret":             {Policy{PCRs: ok}, nil, ""},
		"secret too long":       {Policy{PCRs: ok}, make([]byte, 129), ""},
	}
	for name, tt := range tests {
		if _, err := Seal(tpm, srk, tt.secret, tt.policy, []byte(tt.pin)); err == nil {
			t.Errorf("%s: sealed", name)
		}
	}
	// PCR 12 is zero where nobody edited the command line; that is a value to bind.
	if _, err := Seal(tpm, srk, randomSecret(), Policy{PCRs: map[int]pcr.Digest{12: {}, 4: bootedPCR(4)}}, nil); err != nil {
		t.Error(err)
	}
}

func TestSRK(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	first, err := EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if !first.Persistent || first.Note != "" || first.handle != srkHandle {
		t.Errorf("SRK %+v", first)
	}
	if got := tpm2.Marshal(first.public)[4:8]; !bytes.Equal(got, []byte{0, 3, 4, 0x72}) {
		t.Errorf("SRK attributes %x, want 00030472", got)
	}
	tpm.Reset()
	again, err := EnsureSRK(tpm)
	if err != nil || !bytes.Equal(again.Name, first.Name) {
		t.Errorf("second call: %x, %v; want %x", again.Name, err, first.Name)
	}
	boot(tpm)
	token, secret := sealed(t, tpm, standard(t), "")
	sigs := signed(t, vendorKey(), "image 1")

	// Evicted: the same key comes back from the template.
	evict(t, tpm)
	mustOpen(t, tpm, token, sigs, "", secret)

	// Made by a tool that follows the guidance to the letter, then evicted.
	windows, err := createPrimary(tpm, guidanceTemplate())
	if err != nil {
		t.Fatal(err)
	}
	persist(t, tpm, windows)
	theirs, theirSecret := sealed(t, tpm, standard(t), "")
	if !bytes.Equal(theirs.SRK.Name, windows.Name) {
		t.Error("a storage root key made by another tool is not used")
	}
	evict(t, tpm)
	mustOpen(t, tpm, theirs, sigs, "", theirSecret)

	// Occupied by something that is not a storage root key (EVE's case).
	other, err := createPrimary(tpm, legacyTemplate())
	if err != nil {
		t.Fatal(err)
	}
	persist(t, tpm, other)
	mustOpen(t, tpm, token, sigs, "", secret)
	srk, err := EnsureSRK(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if srk.Persistent || srk.Note == "" || !bytes.Equal(srk.Name, first.Name) {
		t.Errorf("with the handle taken: %+v", srk)
	}
	srk.Close(tpm)
	token, secret = sealed(t, tpm, standard(t), "")
	mustOpen(t, tpm, token, sigs, "", secret)
	tpm.Reset()
	boot(tpm)
	mustOpen(t, tpm, token, sigs, "", secret)
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// full is a TPM whose non-volatile memory others have filled.
type full struct{ TPM }

func (f full) Send(command []byte) ([]byte, error) {
	const evictControl, nvSpace = 0x120, 0x14b // TPM_CC_EvictControl, TPM_RC_NV_SPACE
	if binary.BigEndian.Uint32(command[6:]) == evictControl {
		return append([]byte{0x80, 0x01, 0, 0, 0, 10}, 0, 0, nvSpace>>8, nvSpace&0xff), nil
	}
	return f.TPM.Send(command)
}

// TestNoRoomForSRK: without a place for the storage key the same one is made at each
// boot, and what is sealed opens (F41).
func TestNoRoomForSRK(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	srk, err := EnsureSRK(full{tpm})
	if err != nil {
		t.Fatal(err)
	}
	if srk.Persistent || !strings.Contains(srk.Note, "no room") {
		t.Errorf("storage key %+v", srk)
	}
	secret := randomSecret()
	token, err := Seal(full{tpm}, srk, secret, standard(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	srk.Close(tpm)
	tpm.Reset()
	boot(tpm)
	mustOpen(t, full{tpm}, token, signed(t, vendorKey(), "image 1"), "", secret)
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

func persist(t *testing.T, tpm TPM, k SRK) {
	t.Helper()
	_, err := tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: tpm2.NamedHandle{Handle: k.handle, Name: k.tpmName()}, PersistentHandle: tpm2.TPMIDHPersistent(srkHandle)}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	k.Close(tpm)
}

func evict(t *testing.T, tpm TPM) {
	t.Helper()
	k, err := readKey(tpm, srkHandle)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: tpm2.NamedHandle{Handle: srkHandle, Name: k.tpmName()}, PersistentHandle: tpm2.TPMIDHPersistent(srkHandle)}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
}

// F83: a listener on the bus sees everything but the secret, and somebody who
// changes traffic is noticed.
func TestBus(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	bus := &bus{TPM: tpm}
	token, secret := sealed(t, bus, standard(t), "")
	sigs := signed(t, vendorKey(), "image 1")
	mustOpen(t, bus, token, sigs, "", secret)
	for _, hidden := range [][]byte{secret, secret[:8], Passphrase(secret)} {
		if bytes.Contains(bus.seen, hidden) {
			t.Error("the secret crossed the bus in clear")
		}
	}
	if !bytes.Contains(bus.seen, token.Private) {
		t.Fatal("the listener hears nothing; the test proves nothing")
	}
	bus.flip = true
	if got, err := Unseal(bus, token, sigs, nil); err == nil || got != nil || !strings.Contains(err.Error(), "not authentic") {
		t.Errorf("a changed answer gives %x, %v", got, err)
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

type bus struct {
	TPM
	seen []byte
	flip bool // change a bit of what TPM2_Unseal answers
}

func (b *bus) Send(command []byte) ([]byte, error) {
	response, err := b.TPM.Send(command)
	b.seen = append(append(b.seen, command...), response...)
	if b.flip && bytes.Equal(command[6:10], []byte{0, 0, 1, 0x5e}) && len(response) > 20 {
		response[18] ^= 1
	}
	return response, err
}

// F17: something measures while we unseal. PCR 10 is what IMA extends; PCR 16
// does not count for the TPM's update counter and must not disturb at all.
func TestUnsealWhileExtending(t *testing.T) {
	for _, index := range []int{10, 16} {
		t.Run(fmt.Sprintf("PCR %d", index), func(t *testing.T) {
			tpm := sealtest.Start(t)
			boot(tpm)
			token, secret := sealed(t, tpm, standard(t), "")
			sigs := signed(t, vendorKey(), "image 1")
			stop, done := make(chan struct{}), make(chan error)
			go func() {
				for {
					select {
					case <-stop:
						done <- nil
						return
					default:
					}
					if err := ExtendPCR(tpm, index, []byte("measured file")); err != nil {
						done <- err
						return
					}
					time.Sleep(time.Millisecond)
				}
			}()
			for range 20 {
				mustOpen(t, tpm, token, sigs, "", secret)
			}
			close(stop)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if n := tpm.Handles(); n != 0 {
				t.Errorf("%d handles are left in the TPM", n)
			}
		})
	}
}

// changing spoils each session once, just before Unseal, a given number of times.
type changing struct {
	*sealtest.TPM
	left int
}

func (c *changing) Send(b []byte) ([]byte, error) {
	if c.left > 0 && len(b) > 10 && bytes.Equal(b[6:10], []byte{0, 0, 1, 0x5e}) { // TPM2_Unseal
		c.left--
		c.TPM.Extend(10, "IMA")
	}
	return c.TPM.Send(b)
}

func TestUnsealRetriesPCRChanged(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	token, secret := sealed(t, tpm, standard(t), "")
	sigs := signed(t, vendorKey(), "image 1")
	mustOpen(t, &changing{tpm, 6}, token, sigs, "", secret)
	if testing.Short() {
		return
	}
	if _, err := Unseal(&changing{tpm, 1000}, token, sigs, nil); !errors.Is(err, tpm2.TPMRCPCRChanged) {
		t.Errorf("after the last try: %v", err)
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// busy answers each command first with TPM_RC_RETRY or TPM_RC_YIELDED.
type busy struct {
	TPM
	codes []byte
	n     int
}

func (b *busy) Send(command []byte) ([]byte, error) {
	b.n++
	if b.n%2 == 1 {
		return []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 9, b.codes[b.n/2%len(b.codes)]}, nil
	}
	return b.TPM.Send(command)
}

// F38: a TPM may take its time.
func TestPatience(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	slow := &busy{TPM: tpm, codes: []byte{0x22, 0x08, 0x0a, 0x20}}
	token, secret := sealed(t, slow, standard(t), "")
	mustOpen(t, slow, token, signed(t, vendorKey(), "image 1"), "", secret)
	if _, err := Check(slow); err != nil {
		t.Error(err)
	}
	if slow.n < 40 {
		t.Errorf("only %d commands went through the busy TPM", slow.n)
	}
}

// broken fails the n-th command, by transport or by code.
type broken struct {
	*sealtest.TPM
	at, n int
	rc    uint32
}

func (b *broken) Send(command []byte) ([]byte, error) {
	if b.n++; b.n == b.at {
		if b.rc == 0 {
			return nil, syscall.EIO
		}
		return []byte{0x80, 1, 0, 0, 0, 10, byte(b.rc >> 24), byte(b.rc >> 16), byte(b.rc >> 8), byte(b.rc)}, nil
	}
	return b.TPM.Send(command)
}

// Every command of Unseal fails in turn: never a secret together with an error,
// never a hang, and nothing left behind except what the failing flush itself
// was to remove.
func TestUnsealFailsCleanly(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	p := policies(t)["everything"]
	token, _ := sealed(t, tpm, p, "2468")
	sigs := signed(t, vendorKey(), "image 1")
	for at := 1; ; at++ {
		b := &broken{TPM: tpm, at: at, rc: 0x101} // TPM_RC_FAILURE
		secret, err := Unseal(b, token, sigs, []byte("2468"))
		if b.n < at {
			if at < 10 {
				t.Errorf("Unseal took only %d commands", b.n)
			}
			break
		}
		if err != nil && secret != nil {
			t.Errorf("command %d: a secret and %v", at, err)
		}
		if n := tpm.Handles(); n > 1 || err != nil && n != 0 {
			t.Errorf("command %d: %d handles are left, error %v", at, n, err)
		}
		tpm.Reboot()
		boot(tpm)
	}
}

// 100 unseals without a resource manager: a leaked session would end it after three.
func TestNoSessionLeak(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	token, secret := sealed(t, tpm, standard(t), "")
	sigs := signed(t, vendorKey(), "image 1")
	bad := signed(t, vendorKey(), "image 2")
	for range 50 {
		mustOpen(t, tpm, token, sigs, "", secret)
		mustFail(t, tpm, token, bad, "", new(*PolicyError))
	}
}

// F31, F32: power cuts while keys are in use must not count as attacks.
func TestPowerCutsDoNotLock(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	token, secret := sealed(t, tpm, standard(t), "")
	sigs := signed(t, vendorKey(), "image 1")
	for range 50 {
		tpm.Reset() // no TPM2_Shutdown
		boot(tpm)
		mustOpen(t, tpm, token, sigs, "", secret)
	}
	tpm.Reset()
	f, err := Check(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if f.LockoutCount != 0 || f.InLockout {
		t.Errorf("after 50 power cuts the TPM counts %d failures (lockout %v)", f.LockoutCount, f.InLockout)
	}
}

// The control for the test above: a key with a PIN is a DA object, and pulling
// the plug after using it does count. That is why noDA must be set without one.
func TestPowerCutsCountWithPIN(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	token, secret := sealed(t, tpm, policies(t)["literal, PIN"], "2468")
	for range 2 {
		mustOpen(t, tpm, token, nil, "2468", secret)
		tpm.Reset()
		boot(tpm)
	}
	f, err := Check(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if f.LockoutCount == 0 {
		t.Error("power cuts after using a PIN do not count; then TestPowerCutsDoNotLock proves nothing")
	}
}

// F34, F35: a lockout is an error of its own, which says when it ends; what has no PIN
// opens all the same.
func TestLockout(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	p := policies(t)["everything"]
	token, _ := sealed(t, tpm, p, "2468")
	plain, secret := sealed(t, tpm, standard(t), "")
	sigs := signed(t, vendorKey(), "image 1")
	f, err := Check(tpm)
	if err != nil {
		t.Fatal(err)
	}
	for i := uint32(0); i < f.LockoutMax; i++ {
		mustFail(t, tpm, token, sigs, "wrong", ErrWrongPIN)
	}
	var lockout *LockoutError
	mustFail(t, tpm, token, sigs, "2468", ErrLockout)
	mustFail(t, tpm, token, sigs, "2468", &lockout)
	_, err = Unseal(tpm, token, sigs, []byte("2468"))
	if !errors.As(err, &lockout) || lockout.WaitSec == 0 || lockout.Counter < lockout.Max {
		t.Errorf("lockout %+v in %v", lockout, err)
	}
	if f, _ = Check(tpm); !f.InLockout {
		t.Error("Check does not see the lockout")
	}
	l, err := ReadLockout(tpm)
	if err != nil || !l.In || l.Count < l.Max || l.WaitSec == 0 || l.WaitSec != lockout.WaitSec {
		t.Errorf("lockout %+v, %v", l, err)
	}
	tpm.Forgive()
	if l, err = ReadLockout(tpm); err != nil || l.In || l.Count != 0 || l.WaitSec != 0 || l.ForgiveSec == 0 {
		t.Errorf("lockout, forgiven: %+v, %v", l, err)
	}
	if problems := f.Problems([]int{7}); !slices.ContainsFunc(problems, func(p Problem) bool { return p.Code == "lockout" && !p.Blocks }) {
		t.Errorf("problems %v", problems)
	}
	// A key without a PIN is not concerned.
	mustOpen(t, tpm, plain, sigs, "", secret)
}

// F29: banks and registers are what the TPM says they are.
func TestCheck(t *testing.T) {
	tpm := sealtest.Start(t)
	f, err := Check(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if f.Family != "2.0" || f.Manufacturer != "IBM" || f.LockoutMax == 0 || f.LockoutSec == 0 {
		t.Errorf("%+v", f)
	}
	// F27: a TPM that no firmware measured into.
	if got := f.Unextended(); !slices.Equal(got, checked()) {
		t.Errorf("un-extended: %v", got)
	}
	codes := func(f Fitness, bound ...int) (blocking []string) {
		for _, p := range f.Problems(bound) {
			if p.Blocks {
				blocking = append(blocking, p.Code)
			}
		}
		return blocking
	}
	if got := codes(f, 7, 11); !slices.Equal(got, []string{"pcr-unextended", "pcr-unextended"}) {
		t.Errorf("blocking problems %v", got)
	}
	boot(tpm)
	if f, err = Check(tpm); err != nil || len(f.Unextended()) != 0 || len(f.Problems([]int{0, 7, 11, 12})) != 0 {
		t.Errorf("after a boot: un-extended %v, problems %v, %v", f.Unextended(), f.Problems([]int{7, 11}), err)
	}
	if f.PCRs[7] != bootedPCR(7) || f.PCRs[11] != image("image 1") {
		t.Error("Check reads other registers than were extended")
	}
}

// F28: no SHA-256 bank. Everything says so and nothing is sealed.
func TestSHA1OnlyBank(t *testing.T) {
	tpm := sealtest.StartWith(t, sealtest.Options{Banks: "sha1"})
	f, err := Check(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Banks) != 1 || f.Banks[0].Alg != pcr.SHA1 || len(f.PCRs) != 0 {
		t.Errorf("banks %v, PCRs %v", f.Banks, f.PCRs)
	}
	problems := f.Problems([]int{7})
	if len(problems) == 0 || problems[0].Code != "no-sha256-bank" || !problems[0].Blocks || !strings.Contains(problems[0].String(), "sha1") {
		t.Errorf("problems %v", problems)
	}
	if _, err := ReadPCRs(tpm, []int{7}); !errors.Is(err, ErrNoSHA256) {
		t.Errorf("ReadPCRs: %v", err)
	}
	if err := ExtendPCR(tpm, 11, []byte("enter-initrd")); err != nil {
		t.Errorf("a TPM with only SHA-1 must still boot: %v", err)
	}
	// A key sealed elsewhere is refused with the reason.
	other := sealtest.Start(t)
	boot(other)
	token, _ := sealed(t, other, standard(t), "")
	ensure(t, tpm)
	if _, err := Unseal(tpm, token, signed(t, vendorKey(), "image 1"), nil); err == nil {
		t.Error("unsealed")
	}
}

func TestExtendPCRAllBanks(t *testing.T) {
	tpm := sealtest.StartWith(t, sealtest.Options{Banks: "sha1,sha256,sha384,sha512"})
	if err := ExtendPCR(tpm, 11, []byte("enter-initrd")); err != nil {
		t.Fatal(err)
	}
	got, err := ReadPCRs(tpm, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15})
	if err != nil {
		t.Fatal(err)
	}
	if got[11] != pcr.Extend(pcr.Digest{}, []byte("enter-initrd")) || got[15] != (pcr.Digest{}) || len(got) != 14 {
		t.Errorf("registers %x", got)
	}
	for _, alg := range []tpm2.TPMAlgID{tpm2.TPMAlgSHA1, tpm2.TPMAlgSHA384, tpm2.TPMAlgSHA512} {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: alg, PCRSelect: []byte{0, 8, 0}}}}}.Execute(tpm)
		if err != nil {
			t.Fatal(err)
		}
		if len(rsp.PCRValues.Digests) != 1 || bytes.Count(rsp.PCRValues.Digests[0].Buffer, []byte{0}) == len(rsp.PCRValues.Digests[0].Buffer) {
			t.Errorf("bank 0x%x was not extended", uint16(alg))
		}
	}
	for name, err := range map[string]error{"PCR 24": ExtendPCR(tpm, 24, nil), "too long": ExtendPCR(tpm, 15, make([]byte, 1025))} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// oldTPM answers as a TPM 1.2 answers a 2.0 command.
type oldTPM struct{}

func (oldTPM) Send([]byte) ([]byte, error) { return []byte{0, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x1e}, nil }

// F43: such a chip must not make a box that restarts for ever.
func TestTPM12(t *testing.T) {
	if _, err := Check(oldTPM{}); !errors.Is(err, ErrTPM12) {
		t.Errorf("Check: %v", err)
	}
}

// F42: some TPMs leave out the leading zeros of an EC coordinate. Salting for
// such a key must give the holder of the private half the same secret.
func TestSaltForShortCoordinate(t *testing.T) {
	for {
		private, err := ecdh.P256().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		point := private.PublicKey().Bytes()[1:]
		if point[0] != 0 {
			continue
		}
		public := srkTemplate()
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: bytes.TrimLeft(point[:32], "\x00")},
			Y: tpm2.TPM2BECCParameter{Buffer: bytes.TrimLeft(point[32:], "\x00")},
		})
		key, err := tpm2.ImportEncapsulationKey(&public)
		if err != nil {
			t.Fatal(err)
		}
		salt, encrypted, err := tpm2.CreateEncryptedSalt(rand.Reader, key)
		if err != nil {
			t.Fatal(err)
		}
		ephemeral, err := tpm2.Unmarshal[tpm2.TPMSECCPoint](encrypted)
		if err != nil {
			t.Fatal(err)
		}
		x, y := ephemeral.X.Buffer, ephemeral.Y.Buffer
		theirs, err := ecdh.P256().NewPublicKey(slices.Concat([]byte{4}, x, y))
		if err != nil {
			t.Fatal(err)
		}
		z, err := private.ECDH(theirs)
		if err != nil {
			t.Fatal(err)
		}
		if want := tpm2.KDFe(crypto.SHA256, z, "SECRET", x, point[:32], 256); !bytes.Equal(salt, want) {
			t.Errorf("salt %x, the TPM gets %x", salt, want)
		}
		return
	}
}
