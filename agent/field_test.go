package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/seal"
)

// What breaks sealed disks in the field is numbered in the comments of this
// repository: F1 to F58 are the TPM, its registers and the states it opens in, F59 to
// F79 boot loader and updates, F80 to F90 attacks and time. Those of the first and the
// last group each have a test whose comment or case carries the number, or a reason
// here why not.
var untestedFailures = map[int]string{
	16: "there are no add-ons to a kernel image: the loader is given none and the stub of a locked-down image takes none",
	45: "an interposer that resets the TPM is not detected: the kernels in use lack the TPM bus encryption that it takes",
	84: "a software TPM on the disk is not offered: without a TPM nothing is sealed",
	87: "the time of a check is one value that the caller passes; package update asks no clock",
	88: "lifetimes of metadata are the vendor's choice; package update/repo documents its defaults",
}

func TestFieldFailuresHaveTests(t *testing.T) {
	number := regexp.MustCompile(`\bF([1-9][0-9]?)\b`)
	span := regexp.MustCompile(`\bF[1-9][0-9]? to F[1-9][0-9]?\b`) // says of none that it is tested
	seen := map[int]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text := string(b)
		if strings.HasSuffix(path, "agent/field_test.go") {
			_, text, _ = strings.Cut(text, "// ---") // what is above only talks of them
		}
		for _, m := range number.FindAllStringSubmatch(span.ReplaceAllString(text, ""), -1) {
			seen[atoi(t, m[1])] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, group := range [][2]int{{1, 58}, {80, 90}} {
		for n := group[0]; n <= group[1]; n++ {
			if !seen[n] && untestedFailures[n] == "" {
				t.Errorf("F%d is in no test, and nothing says why", n)
			}
		}
	}
}

func atoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// --- the entries below have no better place

// TestOtherProgramsOfTheFirmware: another boot order, a management agent that the
// firmware starts, another card (F11, F12, F13) are in registers that the standard
// policy does not bind while Secure Boot is on. Without it PCR 4 is bound, the box asks,
// and the recovery key opens.
func TestOtherProgramsOfTheFirmware(t *testing.T) {
	for _, secureBoot := range []bool{true, false} {
		t.Run(fmt.Sprintf("Secure Boot %v", secureBoot), func(t *testing.T) {
			b := newBox(t, 1)
			b.secureBoot = secureBoot
			first := b.mustBoot("", "provisioned")
			first.write("records")
			b.powerOn()
			for pcr, what := range map[int]string{0: "firmware 2", 1: "Boot0003,Boot0001", 2: "another card", 3: "its settings", 4: "management agent", 5: "another table"} {
				b.tpm.Extend(pcr, what)
			}
			if secureBoot {
				b.mustBoot("", "tpm").wantData("records")
				return
			}
			s := b.refused()
			if out := s.console.out.String(); !strings.Contains(out, "  PCR 4: ") || strings.Contains(out, "  PCR 7: ") {
				t.Errorf("the console does not say which register it is: %s", out)
			}
			s = b.session(first.recoveryKey() + "\n")
			if err := s.open(); err != nil {
				t.Fatal(err)
			}
			s.wantData("records")
		})
	}
}

// refusing is a TPM that does not measure into a register.
type refusing struct {
	seal.TPM
	pcr     uint32
	refused int
}

func (r *refusing) Send(command []byte) ([]byte, error) {
	const extend, event, failure = 0x182, 0x13c, 0x101 // TPM_CC_PCR_Extend, TPM_CC_PCR_Event, TPM_RC_FAILURE
	if code := binary.BigEndian.Uint32(command[6:]); (code == extend || code == event) && binary.BigEndian.Uint32(command[10:]) == r.pcr {
		r.refused++
		return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, failure), nil
	}
	return r.TPM.Send(command)
}

// TestOptionalMeasurementFails: what a boot can do without must not end it (F40).
func TestOptionalMeasurementFails(t *testing.T) {
	b := newBox(t, 1)
	b.mustBoot("", "provisioned").write("records")
	b.powerOn()
	s := b.session("")
	r := &refusing{TPM: s.tpmLog.TPM, pcr: identityPCR}
	s.tpmLog.TPM = r
	if err := errors.Join(s.m.EnterPhase(phaseEnterInitrd), s.open(), s.m.Leave(&s.status)); err != nil {
		t.Fatal(err)
	}
	s.wantOpen("tpm")
	s.wantData("records")
	if r.refused == 0 || !strings.Contains(s.log.text.String(), "identity of the volumes not measured") {
		t.Errorf("%d measurements refused; log: %s", r.refused, s.log.text.String())
	}
}

// TestTrialWithoutTPM: a release on trial whose kernel does not drive the TPM any more
// is left for the good one, and asks nobody for a key (F44).
func TestTrialWithoutTPM(t *testing.T) {
	b := newBox(t, 1)
	b.mustBoot("", "provisioned").write("records")
	b.powerOn()
	b.onTrial, b.noTPM = true, seal.ErrNoTPM
	s, err := b.boot("")
	if err == nil || !errors.Is(err, seal.ErrNoTPM) || !strings.Contains(err.Error(), "on trial") {
		t.Errorf("error %v", err)
	}
	if strings.Contains(s.console.out.String(), "recovery key") || len(s.storage.mapped) != 0 {
		t.Errorf("console %q, mapped %v", s.console.out.String(), s.storage.mapped)
	}
	b.onTrial, b.noTPM = false, nil // the good release
	b.mustBoot("", "tpm").wantData("records")
}

// TestNoSearchPaths: a policy is what the caller gave. Package seal opens no file but
// the TPM's, so that no key that lies about somewhere changes what is bound (F6).
func TestNoSearchPaths(t *testing.T) {
	for pkg, imports := range readTree(t).imports {
		if layer(pkg) != "seal" || pkg == "seal/sealtest" {
			continue
		}
		for _, name := range []string{"os", "io/ioutil", "os/exec"} {
			for _, file := range imports[name] {
				if file != "seal/device_linux.go" {
					t.Errorf("%s imports %s", file, name)
				}
			}
		}
	}
}

// TestNoWeakRandomness: nothing that goes into a product draws on a generator that
// somebody could wind back (F85).
func TestNoWeakRandomness(t *testing.T) {
	jitter := []string{"agent/escrow.go", "agent/update_linux.go", "seal/sealing.go", "update/http.go"} // when to try again
	for pkg, imports := range readTree(t).imports {
		if !slices.Contains([]string{"seal", "agent", "image", "update", "partition"}, layer(pkg)) || pkg == "seal/sealtest" || pkg == "partition/powercut" {
			continue
		}
		for _, name := range []string{"math/rand", "math/rand/v2"} {
			for _, file := range imports[name] {
				if !slices.Contains(jitter, file) {
					t.Errorf("%s imports %s", file, name)
				}
			}
		}
	}
}
