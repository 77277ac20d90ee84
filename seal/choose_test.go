package seal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// recorder notes the command codes that pass.
type recorder struct {
	TPM
	codes []tpm2.TPMCC
}

func (r *recorder) Send(command []byte) ([]byte, error) {
	r.codes = append(r.codes, tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])))
	return r.TPM.Send(command)
}

func (r *recorder) count(code tpm2.TPMCC) int {
	n := 0
	for _, c := range r.codes {
		if c == code {
			n++
		}
	}
	return n
}

// named seals and says for which state.
func named(t *testing.T, tpm TPM, p Policy, state string) (Token, []byte) {
	t.Helper()
	token, secret := sealed(t, tpm, p, pinFor(p))
	token.For = state
	return token, secret
}

// A header with a token for each state: now, after the firmware update that is
// pending, and the other slot.
func TestChoose(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	pem := keyPEM(t, vendorKey())
	now := bootedPCR(7)
	later := pcr.Extend(now, []byte("dbx"))
	slotB := Strict(map[int]pcr.Digest{0: bootedPCR(0), 2: bootedPCR(2), 4: bootedPCR(4), 7: now, 11: image("image 2")})
	pending, laterSecret := named(t, tpm, Standard(pem, map[int]pcr.Digest{7: later}), "dbx pending")
	other, otherSecret := named(t, tpm, slotB, "slot b")
	present, presentSecret := named(t, tpm, Standard(pem, map[int]pcr.Digest{7: now}), "slot a")
	tokens := []Token{pending, other, present}
	sigs := signed(t, vendorKey(), "image 1")
	secrets := [][]byte{laterSecret, otherSecret, presentSecret}

	expect := func(want int) {
		t.Helper()
		watch := &recorder{TPM: tpm}
		i, registers, err := Choose(watch, tokens, sigs)
		if err != nil || i != want || len(registers) != 5 || len(watch.codes) != 1 {
			t.Errorf("chose %d with %d registers, %v in %d commands; want %d with 5 in one", i, len(registers), err, len(watch.codes), want)
		}
		watch.codes = nil
		secret, i, err := UnsealAny(watch, tokens, sigs, nil)
		if err != nil || i != want || !bytes.Equal(secret, secrets[want]) {
			t.Errorf("UnsealAny opens %d, %v; want %d", i, err, want)
		}
		for _, code := range []tpm2.TPMCC{tpm2.TPMCCPCRRead, tpm2.TPMCCLoad, tpm2.TPMCCUnseal} {
			if n := watch.count(code); n != 1 {
				t.Errorf("%d commands %v, want one", n, code)
			}
		}
	}
	expect(2)
	tpm.Extend(7, "dbx")
	expect(0)
	tpm.Reboot()
	bootImage(tpm, "image 2")
	expect(1)

	// No token: the error is about the one that came closest, which here lacks only a signature.
	tpm.Reboot()
	bootImage(tpm, "image 3")
	i, registers, err := Choose(tpm, tokens, sigs)
	var refused *PolicyError
	if !errors.As(err, &refused) || i != 2 || refused.For != "slot a" || len(registers) != 5 || len(refused.Now) != 2 {
		t.Errorf("chose %d, %d registers, %v", i, len(registers), err)
	}
	if !strings.Contains(err.Error(), `for "slot a"`) {
		t.Errorf("the error does not say which state it is about: %v", err)
	}
	if secret, i, err := UnsealAny(tpm, tokens, sigs, nil); secret != nil || i != 2 || !errors.As(err, &refused) {
		t.Errorf("UnsealAny: %d, %v", i, err)
	}
	if _, i, err := UnsealAny(tpm, nil, sigs, nil); err == nil || i != -1 {
		t.Errorf("no tokens: %d, %v", i, err)
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// F37: the TPM was replaced and the box re-sealed; the old TPM's tokens are still
// in the header, first, and fit this boot's registers too.
func TestChoosePassesOverAnotherTPM(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	sigs := signed(t, vendorKey(), "image 1")
	old, _ := named(t, tpm, standard(t), "old board")
	tpm.Swap()
	boot(tpm)
	present, secret := named(t, tpm, standard(t), "new board")
	watch := &recorder{TPM: tpm}
	got, i, err := UnsealAny(watch, []Token{old, present}, sigs, nil)
	if err != nil || i != 1 || !bytes.Equal(got, secret) {
		t.Fatalf("token %d, %v", i, err)
	}
	if n := watch.count(tpm2.TPMCCLoad); n != 1 {
		t.Errorf("%d loads: the other TPM's token was tried", n)
	}
	// Two old TPMs' tokens and none of this one.
	tpm.Swap()
	boot(tpm)
	ensure(t, tpm)
	if secret, _, err := UnsealAny(tpm, []Token{old, present}, sigs, nil); secret != nil || !errors.Is(err, ErrWrongTPM) {
		t.Errorf("no token is of this TPM: %v", err)
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// A damaged token, or one that needs a PIN, does not stand before a good one.
func TestUnsealAnyGoesOn(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	sigs := signed(t, vendorKey(), "image 1")
	good, secret := named(t, tpm, standard(t), "good")
	withPIN, pinSecret := named(t, tpm, policies(t)["everything"], "PIN")
	damaged := good
	damaged.Private = slices.Clone(good.Private)
	damaged.Private[len(damaged.Private)-1] ^= 1
	foreign := good
	foreign.Public = []byte{1}
	tokens := []Token{withPIN, damaged, foreign, good}
	got, i, err := UnsealAny(tpm, tokens, sigs, nil)
	if err != nil || i != 3 || !bytes.Equal(got, secret) {
		t.Errorf("without a PIN: token %d, %v", i, err)
	}
	got, i, err = UnsealAny(tpm, tokens, sigs, []byte("2468"))
	if err != nil || i != 0 || !bytes.Equal(got, pinSecret) {
		t.Errorf("with the PIN: token %d, %v", i, err)
	}
	// A wrong PIN is one count, and the last attempt.
	watch := &recorder{TPM: tpm}
	if secret, i, err := UnsealAny(watch, []Token{withPIN, withPIN, good}, sigs, []byte("1357")); secret != nil || i != 0 || !errors.Is(err, ErrWrongPIN) {
		t.Errorf("wrong PIN: token %d, %v", i, err)
	}
	if n := watch.count(tpm2.TPMCCUnseal); n != 1 {
		t.Errorf("a wrong PIN was given to the TPM %d times", n)
	}
	if _, i, err := UnsealAny(tpm, []Token{withPIN}, sigs, nil); i != 0 || !errors.Is(err, ErrPINNeeded) {
		t.Errorf("no PIN: token %d, %v", i, err)
	}
	if f, err := Check(tpm); err != nil || f.LockoutCount != 1 {
		t.Errorf("the TPM counts %d failures, %v; want 1", f.LockoutCount, err)
	}
	if n := tpm.Handles(); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// Tickets spare a verification, are taken by this TPM only, survive power cuts,
// and are never needed.
func TestTickets(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	sigs := slices.Concat(signed(t, vendorKey(), "image 1", "image 2"), signed(t, newKey(), "image 1"), release(t, "image 1", 1)[1:])
	token, secret := sealed(t, tpm, standard(t), "")
	if err := AddTickets(tpm, &token, sigs); err != nil || len(token.Tickets) != 2 {
		t.Fatalf("%d tickets, %v; want those for images 1 and 2", len(token.Tickets), err)
	}
	opens := func(name string, token Token, verifications int) {
		t.Helper()
		watch := &recorder{TPM: tpm}
		mustOpen(t, watch, token, sigs, "", secret)
		if n := watch.count(tpm2.TPMCCVerifySignature); n != verifications {
			t.Errorf("%s: %d verifications, want %d", name, n, verifications)
		}
		if n := tpm.Handles(); n != 0 {
			t.Errorf("%s: %d handles are left in the TPM", name, n)
		}
	}
	opens("same boot", token, 0)
	tpm.Reset()
	boot(tpm)
	opens("after a power cut", token, 0)
	tpm.Reboot()
	bootImage(tpm, "image 2")
	opens("the next image", token, 0)

	broken := token
	broken.Tickets = []Ticket{{token.Tickets[0].Policy, make([]byte, 32)}, {token.Tickets[1].Policy, []byte("short")}}
	opens("damaged tickets", broken, 1)
	swapped := token
	swapped.Tickets = []Ticket{{token.Tickets[0].Policy, token.Tickets[1].MAC}, {token.Tickets[1].Policy, token.Tickets[0].MAC}}
	opens("tickets of each other", swapped, 1)
	foreign := sealtest.Start(t)
	if err := AddTickets(foreign, &broken, sigs); err != nil {
		t.Fatal(err)
	}
	opens("another TPM's tickets", broken, 1)

	if err := AddTickets(tpm, &token, sigs[:1]); err != nil || len(token.Tickets) != 1 {
		t.Errorf("%d tickets, %v; want one", len(token.Tickets), err)
	}
	opens("the other image's ticket", token, 1)
	var many Signatures
	for n := range maxTickets + 2 {
		many = append(many, signed(t, vendorKey(), fmt.Sprint("image ", n))...)
	}
	if err := AddTickets(tpm, &token, many); err != nil || len(token.Tickets) != maxTickets {
		t.Errorf("%d tickets, %v; want %d", len(token.Tickets), err, maxTickets)
	}
	literal, _ := sealed(t, tpm, Strict(map[int]pcr.Digest{7: bootedPCR(7)}), "")
	if err := AddTickets(tpm, &literal, sigs); err != nil || literal.Tickets != nil {
		t.Errorf("a policy without signatures has tickets %v, %v", literal.Tickets, err)
	}
}

// fourPolicies are those a vendor can choose from, with what each needs.
func fourPolicies(t testing.TB, tpm TPM) map[string]Policy {
	seven := map[int]pcr.Digest{7: bootedPCR(7)}
	pem := keyPEM(t, vendorKey())
	strict := map[int]pcr.Digest{11: image("image 1")}
	for _, i := range []int{0, 2, 4, 7} {
		strict[i] = bootedPCR(i)
	}
	chosen := []Policy{Standard(pem, seven), Strict(strict), RollbackProof(pem, 1, counter(t, tpm), seven), DiskTheftOnly(pem)}
	all := map[string]Policy{}
	for _, p := range chosen {
		all[p.Name] = p
		p.PIN = true
		all[p.Name+", PIN"] = p
	}
	return all
}

// maxCommands is what a later boot may take of the TPM's time, everything
// included: two phases (agent), one identity for each volume, and the unseal.
// With a PIN a person is what takes time, and one command more is allowed (F39).
const maxCommands = 12

func TestCommandCount(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	sigs := release(t, "image 1", 2)
	all := fourPolicies(t, tpm)
	table := []string{fmt.Sprintf("%-22s %10s %10s %22s", "policy", "no ticket", "ticket", "boot with a log")}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		p := all[name]
		token, secret := sealed(t, tpm, p, pinFor(p))
		count := func() int {
			watch := &recorder{TPM: tpm}
			mustOpen(t, watch, token, sigs, pinFor(p), secret)
			return len(watch.codes)
		}
		without := count()
		if err := AddTickets(tpm, &token, sigs); err != nil {
			t.Fatal(err)
		}
		with := count()
		watch := &recorder{TPM: tpm}
		now, err := ReadPCRs(tpm, p.Bound())
		if err != nil {
			t.Fatal(err)
		}
		back, _, err := UnsealWith(watch, []Token{token}, now, sigs, []byte(pinFor(p)))
		if err != nil || !bytes.Equal(back, secret) {
			t.Fatalf("%s: %v", name, err)
		}
		for _, index := range []int{16, 16, 16} { // stands for 11, 11 and 15
			if err := ExtendPCR(watch, index, []byte("phase")); err != nil {
				t.Fatal(err)
			}
		}
		table = append(table, fmt.Sprintf("%-22s %10d %10d %22d", name, without, with, len(watch.codes)))
		if len(watch.codes) > maxCommands {
			t.Errorf("%s: a boot takes %d commands, more than %d: %v", name, len(watch.codes), maxCommands, watch.codes)
		}
		if n := tpm.Handles(); n != 0 {
			t.Errorf("%s: %d handles are left in the TPM", name, n)
		}
	}
	t.Log("TPM commands\n" + strings.Join(table, "\n"))
}

// Registers that the caller says there are choose a token, and no more: where they are
// not those of the boot, the TPM refuses, and a boot that does not fit costs nothing.
func TestUnsealWithWrongRegisters(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	sigs := release(t, "image 1", 1)
	for name, p := range fourPolicies(t, tpm) {
		token, secret := sealed(t, tpm, p, pinFor(p))
		now, err := ReadPCRs(tpm, p.Bound())
		if err != nil {
			t.Fatal(err)
		}
		if back, _, err := UnsealWith(tpm, []Token{token}, now, sigs, []byte(pinFor(p))); err != nil || !bytes.Equal(back, secret) {
			t.Errorf("%s: %v", name, err)
		}
		var refused *PolicyError
		other := maps.Clone(now)
		other[11] = pcr.Extend(other[11], []byte("another phase"))
		watch := &recorder{TPM: tpm}
		if _, _, err := UnsealWith(watch, []Token{token}, other, sigs, []byte(pinFor(p))); !errors.As(err, &refused) || len(watch.codes) > 0 {
			t.Errorf("%s, registers that do not fit: %v, %d commands", name, err, len(watch.codes))
		}
	}
	// Forged: they fit, and are not what the TPM holds.
	for name, p := range fourPolicies(t, tpm) {
		token, _ := sealed(t, tpm, p, pinFor(p))
		now, err := ReadPCRs(tpm, p.Bound())
		if err != nil {
			t.Fatal(err)
		}
		tpm.Extend(11, "another phase")
		var refused *PolicyError
		if _, _, err := UnsealWith(tpm, []Token{token}, now, sigs, []byte(pinFor(p))); !errors.As(err, &refused) {
			t.Errorf("%s, forged registers: %v", name, err)
		}
		tpm.Reboot()
		boot(tpm)
		if f, err := Check(tpm); err != nil || f.LockoutCount != 0 || tpm.Handles() != 0 {
			t.Errorf("%s: %d failures counted, %d handles, %v", name, f.LockoutCount, tpm.Handles(), err)
		}
	}
}

// Each policy with a PIN: the right one opens, a wrong one counts, also right
// after a power cut, and the lockout says for how long.
func TestPINForEachPolicy(t *testing.T) {
	for _, policy := range []string{PolicyStandard, PolicyStrict, PolicyRollbackProof, PolicyDiskTheftOnly} {
		t.Run(policy, func(t *testing.T) {
			tpm := sealtest.Start(t)
			boot(tpm)
			p := fourPolicies(t, tpm)[policy+", PIN"]
			token, secret := sealed(t, tpm, p, "2468")
			sigs := release(t, "image 1", 1)
			mustFail(t, tpm, token, sigs, "", ErrPINNeeded)
			mustFail(t, tpm, token, sigs, "1357", ErrWrongPIN)
			f, err := Check(tpm)
			if err != nil || f.LockoutCount != 1 {
				t.Errorf("after a wrong PIN the TPM counts %d, %v", f.LockoutCount, err)
			}
			mustOpen(t, tpm, token, sigs, "2468", secret)
			for i := f.LockoutCount; i < f.LockoutMax; i++ {
				mustFail(t, tpm, token, sigs, "1357", ErrWrongPIN)
			}
			var lockout *LockoutError
			mustFail(t, tpm, token, sigs, "2468", &lockout)
			if _, err := Unseal(tpm, token, sigs, []byte("2468")); !errors.As(err, &lockout) || lockout.WaitSec == 0 || !strings.Contains(err.Error(), "leave the machine on for up to") {
				t.Errorf("lockout says %v", err)
			}
		})
	}
}

// cut takes the power away instead of executing the n-th command.
type cut struct {
	*sealtest.TPM
	at, n int
}

var errPower = errors.New("power cut")

func (c *cut) Send(command []byte) ([]byte, error) {
	if c.n++; c.n == c.at {
		c.TPM.Reset()
	}
	if c.n >= c.at {
		return nil, errPower
	}
	return c.TPM.Send(command)
}

// F31: 50 kills in the middle of unseals, at each command in turn and for each
// policy without a PIN, are not taken for attacks.
func TestPowerCutsInTheMiddleDoNotLock(t *testing.T) {
	tpm := sealtest.Start(t)
	boot(tpm)
	sigs := release(t, "image 1", 1)
	var tokens []Token
	var secrets [][]byte
	for _, p := range fourPolicies(t, tpm) {
		if !p.PIN {
			token, secret := sealed(t, tpm, p, "")
			tokens, secrets = append(tokens, token), append(secrets, secret)
		}
	}
	cuts := 0
	for at := 1; cuts < 50; at = at%13 + 1 {
		i := cuts % len(tokens)
		secret, err := Unseal(&cut{TPM: tpm, at: at}, tokens[i], sigs, nil)
		if err == nil {
			if !bytes.Equal(secret, secrets[i]) {
				t.Error("another secret came back")
			}
			tpm.Reset() // fewer commands than at, or only the last flush was lost
		}
		boot(tpm)
		cuts++
	}
	for i, token := range tokens {
		mustOpen(t, tpm, token, sigs, "", secrets[i])
	}
	if f, err := Check(tpm); err != nil || f.LockoutCount != 0 || f.InLockout {
		t.Errorf("after %d power cuts the TPM counts %d failures (lockout %v), %v", cuts, f.LockoutCount, f.InLockout, err)
	}
}

func TestPolicies(t *testing.T) {
	tpm := sealtest.Start(t)
	all := fourPolicies(t, tpm)
	for name, want := range map[string]string{
		PolicyStandard:      "vendor (key",
		PolicyStrict:        "PCR 4: boot loader",
		PolicyRollbackProof: `for "holdfast-epoch-1"`,
		PolicyDiskTheftOnly: "degraded: ",
	} {
		lines := strings.Join(all[name].Describe(), "\n")
		if !strings.Contains(lines, want) || strings.Contains(lines, "degraded") != (name == PolicyDiskTheftOnly) {
			t.Errorf("%s is described as\n%s", name, lines)
		}
		if _, err := all[name].Digest(); err != nil {
			t.Error(err)
		}
	}
	if lines := strings.Join(all[PolicyRollbackProof].Describe(), "\n"); !strings.Contains(lines, "counter 0x01af0001: at most 1") {
		t.Errorf("the counter is not described in\n%s", lines)
	}
	for _, tt := range []struct {
		name       string
		secureBoot bool
		want       []int
	}{
		{PolicyStandard, true, []int{7}}, {PolicyStandard, false, []int{4, 7, 12}},
		{PolicyRollbackProof, true, []int{7}}, {PolicyRollbackProof, false, []int{4, 7, 12}},
		{PolicyStrict, true, []int{0, 2, 4, 7, 11}}, {PolicyStrict, false, []int{0, 2, 4, 7, 11, 12}},
		{PolicyDiskTheftOnly, true, nil}, {PolicyDiskTheftOnly, false, nil},
	} {
		if got, err := Literal(tt.name, tt.secureBoot); err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%s, Secure Boot %v: %v, %v; want %v", tt.name, tt.secureBoot, got, err, tt.want)
		}
	}
	if _, err := Literal("standart", true); err == nil {
		t.Error("an unknown policy is known")
	}
	signedBy := Standard(keyPEM(t, vendorKey()), map[int]pcr.Digest{7: bootedPCR(7)})
	for name, change := range map[string]func(*Policy){
		"rollback-proof without a reference": func(p *Policy) { p.Name, p.Counter = PolicyRollbackProof, &Counter{Index: CounterIndex} },
		"rollback-proof without a counter":   func(p *Policy) { p.Name, p.Ref = PolicyRollbackProof, EpochRef(1) },
		"reference without signed PCR":       func(p *Policy) { p.SignedPCRs, p.PolicyKeyPEM, p.Ref = nil, nil, EpochRef(1) },
		"reference too long":                 func(p *Policy) { p.Ref = strings.Repeat("x", maxRefBytes+1) },
		"reference with a space":             func(p *Policy) { p.Ref = "a b" },
		"counter out of range":               func(p *Policy) { p.Counter = &Counter{Index: 0x01c00002} },
	} {
		p := signedBy
		change(&p)
		if _, err := p.Digest(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
