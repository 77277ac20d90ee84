package attest

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Result is the outcome of a check.
type Result string

// The outcomes. What is not Pass is not good.
const (
	Pass    Result = "pass"
	Fail    Result = "fail"
	Unknown Result = "unknown" // it could not be judged
)

// The checks, in the order in which a verdict has them. Each verdict has all of them,
// but for CheckAnswer, which stands alone where the answer could not be read.
const (
	CheckAnswer     = "answer"     // the document can be read
	CheckChallenge  = "challenge"  // it answers this challenge, and the statement is what was signed
	CheckFreshness  = "freshness"  // the challenge is not too old
	CheckEK         = "ek"         // a TPM manufacturer certified the endorsement key
	CheckHardware   = "hardware"   // the TPM is a chip, and the one it says it is
	CheckAK         = "ak"         // the attestation key is bound to the EK
	CheckSignature  = "signature"  // the AK signed the quote
	CheckSelection  = "selection"  // the quote is over all the registers
	CheckRegisters  = "registers"  // the values are those that were quoted
	CheckLog        = "log"        // the event log leads to the values
	CheckKernel     = "kernel"     // PCR 11 is an approved release's
	CheckLoader     = "loader"     // PCR 4 has an approved release's programs and no others
	CheckSecureBoot = "secureboot" // PCR 7: Secure Boot is on, and no debugger
	CheckKeys       = "keys"       // PCR 7: the keys are the vendor's
	CheckDBX        = "dbx"        // PCR 7: the revocations are there
	CheckExtras     = "extras"     // PCR 8, 12, 13, 14: nothing was added from outside
	CheckFirmware   = "firmware"   // PCR 0, 2: the firmware is the recorded one
	CheckVolumes    = "volumes"    // PCR 15: the data volumes are the recorded ones
	CheckClock      = "clock"      // the TPM's counters went forwards
	CheckIdentity   = "identity"   // what the box says agrees with what was measured and recorded
)

// Checks are the names of all checks that a verdict has, in order.
func Checks() []string {
	return []string{CheckChallenge, CheckFreshness, CheckEK, CheckHardware, CheckAK, CheckSignature, CheckSelection, CheckRegisters,
		CheckLog, CheckKernel, CheckLoader, CheckSecureBoot, CheckKeys, CheckDBX, CheckExtras, CheckFirmware, CheckVolumes, CheckClock, CheckIdentity}
}

// Check is one judgement.
type Check struct {
	Name   string `json:"name"`
	Result Result `json:"result"`
	// Text says what was found.
	Text string `json:"text"`
	// Event is the record, section or field that differs, where there is one.
	Event string `json:"event,omitempty"`
	// Meaning says what it may mean, innocent and hostile.
	Meaning string `json:"meaning,omitempty"`
}

// Verdict is all that was judged of an answer.
type Verdict struct {
	// Result is Fail when a check failed, Unknown when one is unknown and not accepted,
	// else Pass.
	Result Result `json:"result"`
	// Device is what the box calls itself; see [CheckIdentity].
	Device string `json:"device"`
	// Release is the approved one whose PCR 11 the box shows; empty where it shows none.
	Release  string   `json:"release,omitempty"`
	Checks   []Check  `json:"checks"`
	Accepted []string `json:"accepted,omitempty"` // unknown, and taken all the same
}

// Good says that every check passed, or was unknown and accepted.
func (v Verdict) Good() bool { return v.Result == Pass }

// Of is the check with the name; an unknown one where there is none.
func (v Verdict) Of(name string) Check {
	for _, c := range v.Checks {
		if c.Name == name {
			return c
		}
	}
	return Check{Name: name, Result: Unknown, Text: "not judged"}
}

// Verify judges an answer to the challenge, which must be the one that was sent and not
// one that came back. It needs no TPM, sends nothing, and takes no document's word for
// anything. All checks are made, also behind one that failed; but where the quote
// itself or its key is no good, what rests on it is unknown.
func Verify(a *Answer, c *Challenge, p *Policy) (v Verdict) {
	defer func() {
		// A bug of ours must end in no, and not in a service that is down.
		if r := recover(); r != nil {
			v = refused(fmt.Sprintf("this program made a mistake: %v", r), "Report it with the answer. Nothing was verified.")
		}
	}()
	w := &verification{a: a, c: c, p: p}
	w.verdict.Device = a.Device()
	w.fresh()
	w.endorsement()
	w.attestationKey()
	w.quoted()
	w.readLog()
	w.kernel()
	w.loader()
	w.secureBoot()
	w.extras()
	w.firmware()
	w.volumes()
	w.clock()
	w.identity()
	w.conclude()
	return w.verdict
}

// refused is the verdict on what could not be read.
func refused(text, meaning string) Verdict {
	return Verdict{Result: Fail, Checks: []Check{{Name: CheckAnswer, Result: Fail, Text: text, Meaning: meaning}}}
}

// Item is one answer of many.
type Item struct {
	Answer    []byte // as [ParseAnswer] takes it
	Challenge *Challenge
	Known     *Record // in the place of the policy's
}

// VerifyAll judges many answers at once, on all processors, and returns the verdicts in
// the items' order. What cannot be read is a verdict too.
func VerifyAll(items []Item, p *Policy) []Verdict {
	verdicts := make([]Verdict, len(items))
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(items)) {
		wg.Go(func() {
			for i := range next {
				verdicts[i] = items[i].verify(p)
			}
		})
	}
	for i := range items {
		next <- i
	}
	close(next)
	wg.Wait()
	return verdicts
}

func (i Item) verify(p *Policy) Verdict {
	a, err := ParseAnswer(i.Answer)
	if err != nil {
		return refused(err.Error(), "The file is damaged, or made by another program. Fetch it again.")
	}
	own := *p
	own.Known = i.Known
	return Verify(a, i.Challenge, &own)
}

// verification is one call of [Verify].
type verification struct {
	a *Answer
	c *Challenge
	p *Policy

	akKey  crypto.PublicKey
	quote  *quote
	values map[int]pcr.Digest // nil where they are not the quoted ones
	log    pcr.Log
	// explained are the registers whose value the log leads to.
	explained map[int]bool
	// reference is the release that runs, or that should; nil where it is not known.
	// matched says that PCR 11 is its.
	reference *Reference
	matched   bool

	verdict Verdict
}

func (w *verification) add(c Check) { w.verdict.Checks = append(w.verdict.Checks, c) }

func (w *verification) pass(name, format string, args ...any) {
	w.add(Check{Name: name, Result: Pass, Text: fmt.Sprintf(format, args...)})
}

func (w *verification) unknown(name, format string, args ...any) {
	w.add(Check{Name: name, Result: Unknown, Text: fmt.Sprintf(format, args...)})
}

func (w *verification) fail(name, text, event, meaning string) {
	w.add(Check{name, Fail, text, event, meaning})
}

// result is that of a check made before.
func (w *verification) result(name string) Result { return w.verdict.Of(name).Result }

// fresh judges whether this is an answer to the challenge, and a recent one.
func (w *verification) fresh() {
	q, err := parseQuote(w.a.Quote)
	if err == nil {
		w.quote = q
	}
	switch {
	case w.c == nil:
		w.unknown(CheckChallenge, "no challenge is given to compare with")
	case err != nil:
		w.fail(CheckChallenge, "the quote cannot be read: "+err.Error(), "quote", "The answer was damaged or made up.")
	case w.a.Answers(w.c):
		w.pass(CheckChallenge, "it answers this challenge")
	default:
		w.fail(CheckChallenge, "the quote is not over this challenge and this statement", "qualifying data of the quote",
			"Innocent: it answers another challenge. Hostile: an old answer is replayed, or what the box says was changed on the way.")
	}
	maxAge := w.p.MaxAge
	if maxAge == 0 {
		maxAge = defaultMaxAge
	}
	switch {
	case w.c == nil || w.p.Now.IsZero():
		w.unknown(CheckFreshness, "without a challenge and the time there is no age")
	case w.p.Unasked:
		w.unknown(CheckFreshness, "nobody asked; the box's clock said %s", w.c.Time.Format(timeForm))
	case w.c.Time.After(w.p.Now.Add(maxClockSkew)):
		w.fail(CheckFreshness, fmt.Sprintf("the challenge is of %s, which is still to come", w.c.Time.Format(timeForm)), "time of the challenge", "This computer's clock is wrong, or that of the one which made the challenge.")
	case w.p.Now.Sub(w.c.Time) > maxAge:
		w.fail(CheckFreshness, fmt.Sprintf("the challenge is of %s, more than %v ago", w.c.Time.Format(timeForm), maxAge), "time of the challenge", "The answer tells what was then. Send a new challenge.")
	default:
		w.pass(CheckFreshness, "the challenge is of %s", w.c.Time.Format(timeForm))
	}
}

const (
	timeForm     = "2006-01-02 15:04 UTC"
	maxClockSkew = 300 * 1e9 // five minutes between the vendor's computers
)

// endorsement judges the EK and whether its TPM is a chip.
func (w *verification) endorsement() {
	var e endorsement
	var err error
	sum := sha256.Sum256(w.a.EKPublic)
	known := w.p.Known != nil && w.p.Known.EK == hex.EncodeToString(sum[:])
	switch {
	case len(w.a.EKPublic) == 0:
		w.unknown(CheckEK, "the box shows no endorsement key")
	case w.p.Known != nil && !known:
		w.fail(CheckEK, "the endorsement key is not the recorded one", "endorsement key", "Innocent: the main board or its TPM was replaced. Hostile: another computer answers for the box.")
	case len(w.a.Certificates) == 0 && known:
		w.pass(CheckEK, "the endorsement key of first contact, %s; it has no certificate", w.p.Known.First.Format(timeForm))
	case len(w.a.Certificates) == 0:
		w.unknown(CheckEK, "the TPM has no certificate of its endorsement key: whether it is a TPM's, nobody says")
	case w.p.Roots == nil && known:
		w.pass(CheckEK, "the endorsement key of first contact, %s; no manufacturer's root is given", w.p.Known.First.Format(timeForm))
	case w.p.Roots == nil:
		w.unknown(CheckEK, "no TPM manufacturer's root certificate is given")
	default:
		if e, err = w.p.Roots.verify(w.a.Certificates, w.p.Now); err == nil {
			err = e.of(w.a.EKPublic)
		}
		w.judgeChain(e, err)
	}
	w.hardware(e, e.root != "" && err == nil)
}

// of returns nil when the certificate is for the key with this public area.
func (e endorsement) of(public []byte) error {
	if e.other != nil {
		return fmt.Errorf("%w: %w", errNotParsed, e.other)
	}
	if !slices.ContainsFunc(e.publics, func(p []byte) bool { return bytes.Equal(p, public) }) {
		return errors.New("the certificate is for another endorsement key than the box shows")
	}
	return nil
}

func (w *verification) judgeChain(e endorsement, err error) {
	switch {
	case err == nil:
		w.pass(CheckEK, "certified by %s", e.root)
	case errors.Is(err, errNotParsed):
		w.unknown(CheckEK, "the certificate of the endorsement key: %v", err)
	default:
		w.fail(CheckEK, "the certificate of the endorsement key: "+err.Error(), "certificate of the endorsement key",
			"Innocent: a root or intermediate certificate of this TPM's manufacturer is not among those given. Hostile: a program plays the TPM and made its own certificate.")
	}
}

// hardware compares the certificate with what the TPM says, and says what it is.
func (w *verification) hardware(e endorsement, certified bool) {
	said := TPM{}
	if w.a.Statement != nil {
		said = w.a.Statement.TPM
	}
	id := e.facts.vendorID()
	switch {
	case certified && said.Manufacturer != "" && id != "" && !strings.EqualFold(id, said.Manufacturer):
		w.fail(CheckHardware, fmt.Sprintf("the certificate is for a TPM of %s, and the TPM says it is of %s", id, said.Manufacturer), "manufacturer",
			"A certificate was taken from another TPM, or a program plays the TPM.")
	case w.firmwareDiffers(said):
		w.fail(CheckHardware, fmt.Sprintf("the TPM says it has firmware %s, and the quote is of firmware %s", said.Firmware, firmwareText(w.quote.FirmwareVersion)), "firmware version in the quote",
			"What the box says of its TPM is not true of the TPM that signed.")
	case w.p.SoftwareTPM:
		w.pass(CheckHardware, "programs are taken too")
	case kindOf(said.Manufacturer) == Fail || certified && kindOf(id) == Fail || certified && strings.HasPrefix(e.facts.Manufacturer, "id:0000"):
		w.fail(CheckHardware, "the TPM is a program: manufacturer "+said.Manufacturer+" "+e.facts.Manufacturer, "manufacturer", "Whoever runs the computer that it runs on has its keys.")
	case !certified:
		w.unknown(CheckHardware, "without a certificate nobody says what the TPM is")
	case kindOf(id) != Pass:
		w.unknown(CheckHardware, "%q is not the name of a manufacturer of chips only", e.facts.Manufacturer)
	default:
		w.pass(CheckHardware, "a chip of %s %s", id, e.facts.Model)
	}
}

func (w *verification) firmwareDiffers(said TPM) bool {
	return w.quote != nil && said.Firmware != "" && said.Firmware != firmwareText(w.quote.FirmwareVersion)
}

// firmwareText is a version as seal.Fitness has it.
func firmwareText(v uint64) string {
	return fmt.Sprintf("%d.%d.%d.%d", v>>48, v>>32&0xffff, v>>16&0xffff, v&0xffff)
}

// attestationKey judges what kind of key the AK is and whether it is in the EK's TPM.
func (w *verification) attestationKey() {
	ak, err := parsePublic(w.a.AKPublic)
	if err == nil {
		err = checkAK(ak)
	}
	if err == nil {
		w.akKey, err = ak.key()
	}
	if err != nil {
		w.fail(CheckAK, "the attestation key: "+err.Error(), "attestation key", "A program made the key and signs what it likes with it.")
		return
	}
	name, ek := nameOf(w.a.AKPublic), sha256.Sum256(w.a.EKPublic)
	known := w.p.Known
	recorded := known != nil && known.AK == hex.EncodeToString(name)
	var credential *Credential
	if w.c != nil {
		credential = w.c.credentialFor(name)
	}
	switch {
	case credential != nil && credential.opened(w.a):
		w.pass(CheckAK, "in the same TPM as the endorsement key: it opened the credential")
	case recorded && known.EK == hex.EncodeToString(ek[:]):
		w.pass(CheckAK, "the attestation key of first contact, %s", known.First.Format(timeForm))
	case credential != nil:
		w.fail(CheckAK, "the credential was not opened", "attestation key", "The attestation key and the endorsement key are not in one TPM. Hostile: a program uses another box's certificate.")
	case known != nil:
		w.fail(CheckAK, "the attestation key is not the recorded one", "attestation key",
			"Innocent: the TPM was given a new endorsement seed. Hostile: another TPM, or a program, signs for the box. Send a credential to find out.")
	default:
		w.unknown(CheckAK, "not yet bound to the endorsement key: send a challenge with a credential for it")
	}
}

// quoted judges the quote itself.
func (w *verification) quoted() {
	switch {
	case w.akKey == nil:
		w.unknown(CheckSignature, "there is no attestation key to verify it with")
	default:
		if err := verifySignature(w.akKey, w.a.Signature, w.a.Quote); err != nil {
			w.fail(CheckSignature, err.Error(), "signature", "The quote was damaged or made up.")
		} else {
			w.pass(CheckSignature, "the attestation key signed the quote")
		}
	}
	if w.quote == nil {
		w.unknown(CheckSelection, "there is no quote")
		w.unknown(CheckRegisters, "there is no quote")
		return
	}
	if w.quote.selects(w.a.selection()) {
		w.pass(CheckSelection, "PCR %v of SHA-256", w.a.selection())
	} else {
		w.fail(CheckSelection, fmt.Sprintf("the quote is over%s and not over %v of SHA-256", w.quote.selected(), Selection()), "selection in the quote",
			"What is left out could hold anything. Another program made the quote, or somebody hides a register.")
	}
	values := w.a.values()
	sum := sha256.Sum256(w.a.Registers)
	switch {
	case !w.quote.selects(w.a.selection()):
		w.unknown(CheckRegisters, "the quote is not over these registers")
	case values == nil:
		w.fail(CheckRegisters, fmt.Sprintf("there are %d bytes of registers", len(w.a.Registers)), "registers", "The answer was damaged or made up.")
	case !bytes.Equal(sum[:], w.quote.Digest):
		w.fail(CheckRegisters, "the values are not those that were quoted", "registers", "Somebody changed them, or the quote is from another moment.")
	default:
		w.values = values
		w.pass(CheckRegisters, "the values are those that were quoted")
	}
}

// foundation are the checks without which a register's value is nobody's.
func foundation() []string {
	return []string{CheckChallenge, CheckEK, CheckHardware, CheckAK, CheckSignature, CheckSelection, CheckRegisters}
}

// conclude takes back what rests on a foundation that failed, and sums up.
func (w *verification) conclude() {
	v := &w.verdict
	var broken []string
	for _, name := range foundation() {
		if w.result(name) == Fail {
			broken = append(broken, name)
		}
	}
	for i := range v.Checks {
		c := &v.Checks[i]
		if len(broken) > 0 && c.Result == Pass && c.Name != CheckFreshness && !slices.Contains(foundation(), c.Name) {
			c.Result, c.Text = Unknown, fmt.Sprintf("not judged, because of %s (it would be: %s)", strings.Join(broken, ", "), c.Text)
		}
	}
	v.Result = Pass
	for _, c := range v.Checks {
		switch {
		case c.Result == Fail:
			v.Result = Fail
		case c.Result == Pass:
		case slices.Contains(w.p.Accept, c.Name) && len(broken) == 0:
			v.Accepted = append(v.Accepted, c.Name)
		case v.Result == Pass:
			v.Result = Unknown
		}
	}
	if len(broken) > 0 {
		v.Release = ""
	}
}
