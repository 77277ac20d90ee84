package agent

import (
	"cmp"
	"crypto/rsa"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// permission is the vendor's file that lets boxes of epoch 2 go back to a release of epoch 1.
func permission(t *testing.T, version string, key *rsa.PrivateKey) []byte {
	t.Helper()
	stub, err := parseDigest(valuesOf(version).PCR11[""])
	if err != nil {
		t.Fatal(err)
	}
	list, err := seal.SignDowngrade(key, pcr.Extend(stub, []byte(phaseEnterInitrd)), 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	b, err := list.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// onESP puts a file on the ESP as anybody may; nil takes it away.
func (st *station) onESP(file []byte) {
	st.t.Helper()
	esp, err := st.a.esp()
	if err != nil {
		st.t.Fatal(err)
	}
	if file == nil {
		err = esp.Remove(image.AuthorisationPath)
	} else {
		err = esp.WriteFile(image.AuthorisationPath, int64(len(file)), strings.NewReader(string(file)), st.now)
	}
	if err != nil {
		st.t.Fatal(err)
	}
}

// backTo has the loader start the release in the other slot.
func (st *station) backTo(bad partition.Slot) {
	st.t.Helper()
	esp, err := st.a.esp()
	if err != nil {
		st.t.Fatal(err)
	}
	for _, e := range entriesOf(st.a.t, st.a.disk()) {
		if e.Slot == bad {
			stem, _, _ := strings.Cut(strings.TrimSuffix(e.FileName, ".conf"), "+")
			if err := esp.Rename("loader/entries/"+e.FileName, "loader/entries/"+stem+"+0-3.conf"); err != nil {
				st.t.Fatal(err)
			}
		}
	}
}

// TestDowngrade: a box that has come to epoch 2 opens its volumes for a release of epoch
// 1 by the vendor's file for that release, and by nothing else.
func TestDowngrade(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyRollbackProof, Epoch: 1}, true, "2.0.0")
	st.epochs["1.0.0"], st.epochs["2.0.0"] = 1, 2
	st.mustSettle()
	st.apply("2.0.0")
	st.start("", "tpm")
	st.good()
	st.start("", "tpm")
	st.mustSettle()
	st.backTo(partition.SlotB)
	good := permission(t, "1.0.0", vendorKey())
	for name, file := range map[string][]byte{
		"nothing": nil, "for another release": permission(t, "0.9.0", vendorKey()), "by another key": permission(t, "1.0.0", strangerKey()),
		"a plain signature": signaturesOf(t, "1.0.0", 0), "no signatures": []byte("<html>"), "endless": make([]byte, maxAuthorisationBytes+1),
		"another release's under this key's name": relabelled(t, permission(t, "1.0.0", strangerKey()), good),
	} {
		if file != nil {
			st.onESP(file)
		}
		err := st.try("poweroff\n")
		out := st.s.console.out.String()
		why := strings.Contains(out, "security epoch is lower") || strings.Contains(out, "was forged") || strings.Contains(out, "no signature is for the present value")
		if !errors.Is(err, ErrPowerOff) || !why || st.s.tpmLog.done[commandUnseal] > 0 {
			t.Errorf("%s: %v, console %s", name, err, out)
		}
	}
	st.onESP(good)
	st.start("", "tpm")
	if st.version != "1.0.0" {
		t.Fatalf("%s boots", st.version)
	}
	if p := strings.Join(st.s.status.Problems, "\n"); !strings.Contains(p, "release 1.0.0 has security epoch 1, and this box has come to 2") {
		t.Errorf("problems %q", p)
	}
	if r := st.mustSettle(); len(r.Added) > 0 {
		t.Errorf("settled: %+v", r)
	}
	if n := st.s.tpmLog.done[commandUnseal]; n != 1 {
		t.Errorf("%d unseals", n)
	}
	// The epoch stays: the box goes on to 2.0.0 again, and without the file not back.
	if list := tokensOn(t, st.box); len(list) != 1 || list[0].Ref != seal.EpochRef(2) {
		t.Errorf("tokens %+v", list)
	}
	st.start("", "tpm")
	st.mustSettle()
	st.onESP(nil)
	if err := st.try("poweroff\n"); !errors.Is(err, ErrPowerOff) {
		t.Errorf("without the file: %v", err)
	}
}

// relabelled are signatures with the fingerprints of others.
func relabelled(t *testing.T, file, like []byte) []byte {
	t.Helper()
	a, err1 := seal.ParseSignatures(file)
	b, err2 := seal.ParseSignatures(like)
	if err := cmp.Or(err1, err2); err != nil {
		t.Fatal(err)
	}
	for i := range a {
		a[i].KeyFingerprint = b[i].KeyFingerprint
	}
	out, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestInstallLowerEpoch: a release that the TPM would not open for is not installed, but
// with the vendor's word.
func TestInstallLowerEpoch(t *testing.T) {
	st := newStation(t, image.SealPolicy{Policy: seal.PolicyRollbackProof, Epoch: 2}, true)
	st.mustSettle()
	old := image.Manifest{Version: "0.9.0", Epoch: 1, Expected: valuesOf("0.9.0")}
	stub, err := parseDigest(old.Expected.PCR11[""])
	if err != nil {
		t.Fatal(err)
	}
	value := pcr.Extend(stub, []byte(phaseEnterInitrd))
	old.Expected.PCR11["enter-initrd"] = pcrTexts(map[int]pcr.Digest{11: value})[11]
	if err := st.k.Prepare(old, partition.SlotB); err == nil || !strings.Contains(err.Error(), "security epoch 1, and this box has come to 2") {
		t.Errorf("prepared: %v", err)
	}
	key := []byte(st.k.Policy.PolicyKeyPEM)
	for name, file := range map[string][]byte{"by another key": permission(t, "0.9.0", strangerKey()), "plain": signaturesOf(t, "0.9.0", 0), "none": []byte("{}"), "damaged": []byte("{")} {
		if _, err := writeAuthorisation(st.a.disk(), key, file, time.Now()); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if list, err := writeAuthorisation(st.a.disk(), key, permission(t, "0.9.0", vendorKey()), time.Now()); err != nil || len(list) != 1 || list[0].Ref != seal.EpochRef(2) {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := st.k.Prepare(old, partition.SlotB); err != nil {
		t.Error(err)
	}
}
