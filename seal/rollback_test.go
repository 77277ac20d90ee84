package seal

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// release is what an image of that name and security epoch carries.
func release(t testing.TB, name string, epoch uint64) Signatures {
	t.Helper()
	s, err := SignEpochs(vendorKey(), image(name), epoch)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// bootImage is a boot of another image than "image 1".
func bootImage(tpm *sealtest.TPM, name string) {
	for i := range 8 {
		tpm.Extend(i, fmt.Sprintf("firmware %d", i))
	}
	tpm.Extend(11, name)
	tpm.Extend(11, "enter-initrd")
}

func counter(t testing.TB, tpm TPM) Counter {
	t.Helper()
	c, err := EnsureCounter(tpm, CounterIndex)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func rollbackProof(t testing.TB, epoch uint64, c Counter) Policy {
	t.Helper()
	return RollbackProof(keyPEM(t, vendorKey()), epoch, c, map[int]pcr.Digest{7: bootedPCR(7)})
}

func raise(t testing.TB, tpm TPM) {
	t.Helper()
	if _, err := IncrementCounter(tpm, CounterIndex); err != nil {
		t.Fatal(err)
	}
}

func wantReason(t testing.TB, tpm *sealtest.TPM, token Token, s Signatures, text string) {
	t.Helper()
	secret, err := Unseal(tpm, token, s, nil)
	var refused *PolicyError
	if secret != nil || !errors.As(err, &refused) || !strings.Contains(err.Error(), text) {
		t.Errorf("got %d bytes, %v; want a *PolicyError about %q", len(secret), err, text)
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// The life of a device: each release opens what it should, in each epoch, and
// a power cut at any point of the change leaves a header that opens.
func TestEpochs(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	c := counter(t, tpm)
	first, secret := sealed(t, tpm, rollbackProof(t, 1, c), "")
	if first.Type() != OwnTokenType {
		t.Errorf("token of type %s", first.Type())
	}
	old, fixed := release(t, "image 1", 1), release(t, "image 1", 2)
	mustOpen(t, tpm, first, old, "", secret)
	mustOpen(t, tpm, first, fixed, "", secret) // a newer release serves an older device

	// The release of epoch 2 is there to stay: seal, then increment.
	c.Max++
	second, newSecret := sealed(t, tpm, rollbackProof(t, 2, c), "")
	for range 2 { // the second time after a power cut between the two steps
		mustOpen(t, tpm, first, fixed, "", secret)
		mustOpen(t, tpm, second, fixed, "", newSecret)
		tpm.Reset()
		boot(tpm)
	}
	raise(t, tpm)
	mustOpen(t, tpm, second, fixed, "", newSecret)
	// Both are in the header until the old one is dropped.
	for _, tokens := range [][]Token{{first, second}, {second, first}} {
		got, i, err := UnsealAny(tpm, tokens, fixed, nil)
		if err != nil || !bytes.Equal(got, newSecret) || tokens[i].Ref != EpochRef(2) {
			t.Errorf("token %d, %v", i, err)
		}
	}
	wantReason(t, tpm, second, old, "security epoch is lower")
	tpm.Reset()
	boot(tpm)
	mustOpen(t, tpm, second, fixed, "", newSecret)

	// The other order, increment first, is what must not happen. Then the recovery key is needed.
	raise(t, tpm)
	wantReason(t, tpm, second, fixed, "has passed")
}

// rollbackAttack changes something; then the old or the present token is tried.
type rollbackAttack struct {
	name   string
	attack func(t *testing.T, tpm *sealtest.TPM, old, present *Token)
	sigs   func(t *testing.T) Signatures
	token  string // "old" or "present"
	want   string
}

func rollbackAttacks() []rollbackAttack {
	return []rollbackAttack{
		{"old header and old release put back", nil, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "has passed"},
		{"old header under the new release", nil, func(t *testing.T) Signatures { return release(t, "image 1", 2) }, "old", "has passed"},
		{"old release under the new header", nil, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "present", "security epoch is lower"},
		{"signature of the old epoch relabelled", nil, func(t *testing.T) Signatures {
			s := release(t, "image 1", 1)
			s[1].Ref = EpochRef(2)
			return s
		}, "present", "not valid"},
		{"plain signature relabelled", nil, func(t *testing.T) Signatures {
			s := release(t, "image 1", 0)
			s[0].Ref = EpochRef(2)
			return s
		}, "present", "not valid"},
		{"counter removed", func(t *testing.T, tpm *sealtest.TPM, _, _ *Token) { undefine(t, tpm) },
			func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "is gone"},
		{"counter removed and made anew", func(t *testing.T, tpm *sealtest.TPM, _, _ *Token) {
			before, err := ReadCounter(tpm, CounterIndex)
			if err != nil {
				t.Fatal(err)
			}
			undefine(t, tpm)
			if c := counter(t, tpm); c.Max <= before {
				t.Errorf("the new counter starts at %d, the old one stood at %d", c.Max, before)
			}
		}, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "has passed"},
		{"counter removed and made anew across a power cut", func(t *testing.T, tpm *sealtest.TPM, _, _ *Token) {
			undefine(t, tpm)
			tpm.Reset()
			boot(tpm)
			counter(t, tpm)
		}, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "has passed"},
		{"counter made anew and never incremented", func(t *testing.T, tpm *sealtest.TPM, _, _ *Token) {
			undefine(t, tpm)
			if err := (Counter{Index: CounterIndex}).define(tpm); err != nil {
				t.Fatal(err)
			}
		}, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "is gone"},
		{"ordinary index with a low value in its place", func(t *testing.T, tpm *sealtest.TPM, _, _ *Token) {
			undefine(t, tpm)
			ordinaryIndex(t, tpm, 0)
		}, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "the TPM says so"},
		{"higher bound written into the old token", func(_ *testing.T, _ *sealtest.TPM, old, _ *Token) {
			old.Counter = &Counter{old.Counter.Index, 1 << 60}
		}, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "differs from the time of sealing"},
		{"counter taken out of the old token", func(_ *testing.T, _ *sealtest.TPM, old, _ *Token) { old.Counter = nil },
			func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "old", "differs from the time of sealing"},
		{"lower epoch written into the present token", func(_ *testing.T, _ *sealtest.TPM, _, present *Token) { present.Ref = EpochRef(1) },
			func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "present", "differs from the time of sealing"},
		{"ticket for the old epoch in the present token", func(t *testing.T, tpm *sealtest.TPM, old, present *Token) {
			if err := AddTickets(tpm, old, release(t, "image 1", 1)); err != nil || len(old.Tickets) != 1 {
				t.Fatalf("%d tickets, %v", len(old.Tickets), err)
			}
			present.Tickets = old.Tickets
		}, func(t *testing.T) Signatures { return release(t, "image 1", 1) }, "present", "security epoch is lower"},
		{"another vendor's signature for the epoch", nil, func(t *testing.T) Signatures {
			s, err := SignEpochs(newKey(), image("image 1"), 2)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}, "present", "another key"},
	}
}

// Attacks on rollback protection, by name. Each begins with a device that was
// sealed for epoch 1, has gone on to epoch 2, and whose old header the attacker kept.
func TestRollbackAttacks(t *testing.T) {
	for _, tt := range rollbackAttacks() {
		t.Run(tt.name, func(t *testing.T) {
			tpm := sealtest.Start(t)
			boot(tpm)
			c := counter(t, tpm)
			old, _ := sealed(t, tpm, rollbackProof(t, 1, c), "")
			mustOpen2(t, tpm, old, release(t, "image 1", 1))
			c.Max++
			present, _ := sealed(t, tpm, rollbackProof(t, 2, c), "")
			raise(t, tpm)
			mustOpen2(t, tpm, present, release(t, "image 1", 2))
			if tt.attack != nil {
				tt.attack(t, tpm, &old, &present)
			}
			token := old
			if tt.token == "present" {
				token = present
			}
			wantReason(t, tpm, token, tt.sigs(t), tt.want)
		})
	}
}

func mustOpen2(t *testing.T, tpm TPM, token Token, s Signatures) {
	t.Helper()
	if _, err := Unseal(tpm, token, s, nil); err != nil {
		t.Fatal(err)
	}
}

func undefine(t *testing.T, tpm TPM) {
	t.Helper()
	if err := RemoveCounter(tpm, CounterIndex); err != nil {
		t.Fatal(err)
	}
}

// ordinaryIndex puts memory that anyone may write at the counter's handle.
func ordinaryIndex(t *testing.T, tpm TPM, value uint64) {
	t.Helper()
	public := Counter{Index: CounterIndex}.public(false)
	public.Attributes.NT = tpm2.TPMNTOrdinary
	_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, PublicInfo: tpm2.New2B(public)}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	name, err := tpm2.NVName(&public)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.NVWrite{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(CounterIndex), Name: *name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(CounterIndex), Name: *name},
		Data:       tpm2.TPM2BMaxNVBuffer{Buffer: binary.BigEndian.AppendUint64(nil, value)},
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
}

// The comparisons above are made by this package first. The TPM must refuse by
// itself when they are bypassed.
func TestTPMEnforcesEpoch(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	c := counter(t, tpm)
	c.Max++
	token, _ := sealed(t, tpm, rollbackProof(t, 2, c), "")
	old, err := SignPCRPolicyRef(vendorKey(), image("image 1"), EpochRef(1))
	if err != nil {
		t.Fatal(err)
	}
	key, _ := parsePolicyKey(token.PolicyKeyPEM)
	parent, object, err := load(tpm, token)
	if err != nil {
		t.Fatal(err)
	}
	defer flush(tpm, object.Handle)
	ticket, err := verifyInTPM(tpm, key, old)
	if err != nil {
		t.Fatal(err)
	}
	m := match{key: key, signature: old, ticket: &ticket}
	// The ticket of the old epoch's signature does not approve the new epoch's.
	if _, err := unsealOnce(tpm, parent, object, token, m, nil); !errors.Is(err, tpm2.TPMRCPCRChanged) {
		t.Errorf("signature of epoch 1 for epoch 2: %v", err)
	}
	for name, change := range map[string]func(*Token){
		"epoch 1 instead":    func(t *Token) { t.Ref = EpochRef(1) },
		"counter left out":   func(t *Token) { t.Counter, t.Ref = nil, EpochRef(1) },
		"higher bound":       func(t *Token) { t.Counter, t.Ref = &Counter{CounterIndex, 1 << 40}, EpochRef(1) },
		"PCR 7 left out":     func(t *Token) { t.PCRs, t.Ref = nil, EpochRef(1) },
		"signature left out": func(t *Token) { t.SignedPCRs = nil },
	} {
		changed := token
		change(&changed)
		if _, err := unsealOnce(tpm, parent, object, changed, m, nil); !errors.Is(err, tpm2.TPMRCPolicyFail) {
			t.Errorf("%s: %v, want the TPM's refusal", name, err)
		}
	}
}

// A vendor may let one old release go on: his signature for its registers under the
// present epoch, carried as a file, and no other old release profits.
func TestDowngradeAuthorised(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	c := counter(t, tpm)
	c.Max++
	token, secret := sealed(t, tpm, rollbackProof(t, 2, c), "")
	raise(t, tpm)
	allowed, err := SignPCRPolicyRef(vendorKey(), image("image 0"), EpochRef(2))
	if err != nil {
		t.Fatal(err)
	}
	file, err := Signatures{allowed}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	more, err := ParseSignatures(file)
	if err != nil {
		t.Fatal(err)
	}
	tpm.Reboot()
	bootImage(tpm, "image 0")
	mustOpen(t, tpm, token, slices.Concat(release(t, "image 0", 1), more), "", secret)
	wantReason(t, tpm, token, release(t, "image 0", 1), "security epoch is lower")
	tpm.Reboot()
	bootImage(tpm, "image -1")
	wantReason(t, tpm, token, slices.Concat(release(t, "image -1", 1), more), "no signature is for the present value")
}

func TestCounter(t *testing.T) {
	tpm := sealtest.Start(t)
	if _, err := ReadCounter(tpm, CounterIndex); !errors.Is(err, ErrNoCounter) {
		t.Errorf("read, none there: %v", err)
	}
	if _, err := IncrementCounter(tpm, CounterIndex); !errors.Is(err, ErrNoCounter) {
		t.Errorf("increment, none there: %v", err)
	}
	if err := RemoveCounter(tpm, CounterIndex); err != nil {
		t.Errorf("remove, none there: %v", err)
	}
	for _, index := range []uint32{0, 0x017fffff, 0x01c00002, 0x81000001} {
		if _, err := EnsureCounter(tpm, index); err == nil {
			t.Errorf("made 0x%08x, which is not the owner's", index)
		}
	}
	// A power cut between definition and first increment.
	if err := (Counter{Index: CounterIndex}).define(tpm); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadCounter(tpm, CounterIndex); !errors.Is(err, ErrNoCounter) {
		t.Errorf("read, never incremented: %v", err)
	}
	first := counter(t, tpm)
	if again := counter(t, tpm); again != first {
		t.Errorf("the second call gives %+v, the first %+v", again, first)
	}
	next, err := IncrementCounter(tpm, CounterIndex)
	if err != nil || next.Max != first.Max+1 || next.Index != first.Index {
		t.Errorf("incremented %+v to %+v, %v", first, next, err)
	}
	tpm.Reset() // no TPM2_Shutdown: the count must have been written
	if v, err := ReadCounter(tpm, CounterIndex); err != nil || v != next.Max {
		t.Errorf("after a power cut: %d, %v; want %d", v, err, next.Max)
	}
	// A second counter of this TPM starts no lower than the first stands.
	other, err := EnsureCounter(tpm, CounterIndex+1)
	if err != nil {
		t.Fatal(err)
	}
	undefine(t, tpm)
	if anew := counter(t, tpm); anew.Max <= next.Max {
		t.Errorf("made anew at %d; it stood at %d (the other one at %d)", anew.Max, next.Max, other.Max)
	}
	undefine(t, tpm)
	ordinaryIndex(t, tpm, 7)
	for name, err := range map[string]error{
		"EnsureCounter":    second(EnsureCounter(tpm, CounterIndex)),
		"ReadCounter":      second(ReadCounter(tpm, CounterIndex)),
		"IncrementCounter": second(IncrementCounter(tpm, CounterIndex)),
		"RemoveCounter":    RemoveCounter(tpm, CounterIndex),
	} {
		if err == nil || !strings.Contains(err.Error(), "taken by something") {
			t.Errorf("%s on somebody else's index: %v", name, err)
		}
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

func second[T any](_ T, err error) error { return err }

// tpm2-tools are the judges of the counter's public area and of the digest.
func TestCounterByTPM2Tools(t *testing.T) {
	tpm := sealtest.Start(t)
	c := counter(t, tpm)
	c.Max = 0x0102030405060708
	dir := filepath.Dir(tpm.Socket)
	tool := func(name string, args ...string) string {
		t.Helper()
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s not installed: apt-get install tpm2-tools", name)
		}
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+tpm.Socket)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	index := fmt.Sprintf("0x%08x", c.Index)
	handle, err := c.handle()
	if err != nil {
		t.Fatal(err)
	}
	public := tool("tpm2_nvreadpublic", index)
	for _, want := range []string{hex.EncodeToString(handle.Name.Buffer), "ownerwrite|authwrite|nt=0x1|ownerread|authread|no_da|written", "size: 8"} {
		if !strings.Contains(public, want) {
			t.Errorf("tpm2_nvreadpublic does not say %q:\n%s", want, public)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "operand"), c.operand(), 0o600); err != nil {
		t.Fatal(err)
	}
	tool("tpm2_startauthsession", "-S", "session")
	tool("tpm2_policynv", "-S", "session", "-L", "digest", "-i", "operand", index, "ule")
	tool("tpm2_flushcontext", "session")
	want, err := os.ReadFile(filepath.Join(dir, "digest"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.appendPolicy(pcr.Digest{}); err != nil || !bytes.Equal(got[:], want) {
		t.Errorf("our digest is %x, %v; tpm2_policynv's %x", got, err, want)
	}
}
