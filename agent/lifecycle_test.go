package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/powercut"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/attest/erasure"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
	"github.com/holdfast-os/holdfast/seal/sealtest"
)

// eraser is for the volumes of a box that runs.
func (b *box) eraser(s *session) *Eraser {
	return &Eraser{
		Log: s.m.Log, Name: "testbox", Version: "1", Volumes: b.parts(), Now: func() time.Time { return today },
		OpenTPM: func() (seal.TPM, error) { return b.tpm, b.noTPM }, Lock: s.sealer().lock,
	}
}

// keyMaterial is the part of the disk that must not survive: sectors of key areas, by
// content. (The headers' text has sectors that are the same in every box, such as the
// vendor's public key.)
func keyMaterial(t *testing.T, b *box) map[[sha256.Size]byte]bool {
	t.Helper()
	old := map[[sha256.Size]byte]bool{}
	for _, p := range b.parts() {
		h, _, err := luks2.Read(p.Device, p.Device.Size())
		if err != nil {
			t.Fatal(err)
		}
		if offset, _, _, _ := h.Segment(); offset != headBytes {
			t.Fatalf("the data begins at byte %d, the keys end at %d", offset, headBytes)
		}
		area := make([]byte, headBytes)
		if _, err := p.Device.ReadAt(area, 0); err != nil {
			t.Fatal(err)
		}
		for at := 32 << 10; at < len(area); at += 512 {
			if sector := area[at : at+512]; !bytes.Equal(sector, make([]byte, 512)) {
				old[sha256.Sum256(sector)] = true
			}
		}
	}
	if len(old) < 3*500*len(b.volumes) {
		t.Fatalf("only %d sectors of keys", len(old))
	}
	return old
}

// survivors counts the sectors of old keys that a disk still has.
func survivors(t *testing.T, disk partition.Device, old map[[sha256.Size]byte]bool) (n int) {
	t.Helper()
	area := make([]byte, disk.Size())
	if _, err := disk.ReadAt(area, 0); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(area); at += 512 {
		if old[sha256.Sum256(area[at:at+512])] {
			n++
		}
	}
	return n
}

// TestFactoryReset: the keys are gone when the command returns, the data area is not
// touched while services write to it, and the next boot makes new volumes.
func TestFactoryReset(t *testing.T) {
	for n := 1; n <= 2; n++ {
		t.Run(fmt.Sprintf("%d volumes", n), func(t *testing.T) {
			b := newBox(t, n)
			s := b.mustBoot("", "provisioned")
			s.write("records")
			key, old := s.recoveryKey(), keyMaterial(t, b)
			proof, err := b.eraser(s).Reset()
			if err != nil {
				t.Fatal(err)
			}
			if left := survivors(t, b.disk, old); left != 0 {
				t.Errorf("%d sectors of keys are left", left)
			}
			s.wantData("records") // the box still runs
			for i := range b.volumes {
				if !b.fresh(i) {
					t.Errorf("volume %d is not marked as new", i)
				}
			}
			if proof.What != "factory reset" || proof.TPM != nil || len(proof.Volumes) != n || proof.Volumes[0].Keyslots != 3 {
				t.Errorf("proof %+v", proof)
			}
			b.powerOn()
			second := b.mustBoot("", "provisioned")
			if second.recoveryKey() == key {
				t.Error("the same recovery key")
			}
			b.powerOn()
			b.mustBoot("", "tpm")
		})
	}
}

// TestPowerCutOverReset cuts the power at every step: the next boot has the old data by
// the TPM, or makes new volumes; nobody stands before a box that does neither.
func TestPowerCutOverReset(t *testing.T) {
	b := newBox(t, 2)
	first := b.mustBoot("", "provisioned")
	first.write("records")
	old := keyMaterial(t, b)
	dev := powercut.New(b.disk.(*partition.Memory))
	b.disk = dev
	if _, err := b.eraser(first).Reset(); err != nil {
		t.Fatal(err)
	}
	if dev.Unsynced() {
		t.Error("reset returned before the last write was synced")
	}
	var kept, made, k int
	for name, disk := range dev.States(1, 2) {
		b.disk = disk
		b.powerOn()
		if b.fresh(0) {
			if made++; made%scratchEvery() != 0 {
				continue
			}
			b.mustBoot("", "provisioned")
			if left := survivors(t, b.disk, old); left != 0 {
				t.Errorf("%s: the next start leaves %d sectors of old keys", name, left)
			}
		} else {
			kept++
			b.mustBoot("", "tpm").wantData("records")
		}
		if k++; t.Failed() {
			t.Fatal(name)
		}
	}
	if kept < 4 || made < 20 {
		t.Errorf("%d states with the old data, %d with none", kept, made)
	}
	t.Logf("%d states with the old data, %d with none, %d started", kept, made, k)
}

// TestDecommission destroys keys, counter and storage key, and proves it.
func TestDecommission(t *testing.T) {
	b := newBox(t, 2)
	b.policy = image.SealPolicy{Policy: seal.PolicyRollbackProof, Epoch: 1}
	b.signatures = signaturesOfEpoch(t, b)
	b.powerOn()
	s := b.mustBoot("", "provisioned")
	s.write("records")
	old := keyMaterial(t, b)
	var uuids []string
	for _, v := range s.status.Volumes {
		uuids = append(uuids, v.UUID)
	}
	if _, err := seal.ReadCounter(b.tpm, seal.CounterIndex); err != nil {
		t.Fatalf("the test is about a counter: %v", err)
	}
	proof, err := b.eraser(s).Decommission()
	if err != nil {
		t.Fatal(err)
	}
	if left := survivors(t, b.disk, old); left != 0 {
		t.Errorf("%d sectors of keys are left", left)
	}
	if _, err := seal.ReadCounter(b.tpm, seal.CounterIndex); !errors.Is(err, seal.ErrNoCounter) {
		t.Errorf("the counter: %v", err)
	}
	if _, err := (tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(0x81000001)}).Execute(b.tpm); !errors.Is(err, tpm2.TPMRCHandle) {
		t.Errorf("the storage key: %v", err)
	}
	if *proof.TPM != (erasure.TPM{Manufacturer: "IBM", Counter: "removed", StorageKey: "removed"}) || len(proof.Problems) != 0 || proof.Completed {
		t.Errorf("TPM %+v, problems %q", *proof.TPM, proof.Problems)
	}
	text := proof.Marshal()
	read, err := erasure.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range b.parts() {
		area := make([]byte, headBytes)
		if _, err := p.Device.ReadAt(area, 0); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(area)
		v := read.Volumes[i]
		if v.Name != p.Name || v.UUID != uuids[i] || v.AreaBytes != headBytes || v.After != hex.EncodeToString(sum[:]) || v.Before == v.After {
			t.Errorf("proof %+v", v)
		}
	}
	b.wantDecommissioned(t, false)
	if strings.Contains(string(text), s.recoveryKey()) {
		t.Error("the proof has the recovery key")
	}
}

// signs has the box's TPM sign the proof over the challenge, if any, as OpenEraser does.
func (b *box) signs(e *Eraser, challenge *attest.Challenge, s *session) {
	e.Sign = func(t seal.TPM, p *erasure.Proof) error {
		in := attest.Input{Challenge: challenge, Time: today, Statement: attest.Statement{Product: e.Name, Release: e.Version, Box: s.status.Volumes[0].UUID}}
		for _, v := range s.status.Volumes {
			in.Statement.Volumes = append(in.Statement.Volumes, attest.Volume{Name: v.Name, UUID: v.UUID, Method: v.Method})
		}
		return p.Sign(t, in)
	}
}

// TestProofIsSigned by the TPM, over the vendor's challenge where there is one, also when
// what the box had in the TPM is gone. A dead TPM keeps nothing from being destroyed.
func TestProofIsSigned(t *testing.T) {
	asked, err := attest.NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	policy := &attest.Policy{Now: today, SoftwareTPM: true}
	for name, tt := range map[string]struct {
		challenge *attest.Challenge
		erase     func(*Eraser) (*erasure.Proof, error)
		noTPM     error
	}{
		"decommissioned":           {nil, (*Eraser).Decommission, nil},
		"decommissioned, asked":    {asked, (*Eraser).Decommission, nil},
		"reset, asked":             {asked, (*Eraser).Reset, nil},
		"decommissioned, no TPM":   {asked, (*Eraser).Decommission, seal.ErrNoTPM},
		"reset, the TPM is silent": {asked, (*Eraser).Reset, errors.New("timeout")},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t, 2)
			s := b.mustBoot("", "provisioned")
			old := keyMaterial(t, b)
			e := b.eraser(s)
			b.signs(e, tt.challenge, s)
			b.noTPM = tt.noTPM
			p, err := tt.erase(e)
			if err != nil {
				t.Fatal(err)
			}
			if left := survivors(t, b.disk, old); left != 0 {
				t.Errorf("%d sectors of keys are left", left)
			}
			if p, err = erasure.Parse(p.Marshal()); err != nil {
				t.Fatal(err)
			}
			v, err := p.Verify(tt.challenge, policy)
			if tt.noTPM != nil {
				if !errors.Is(err, erasure.ErrUnsigned) || !strings.Contains(p.Unsigned, tt.noTPM.Error()) {
					t.Errorf("%v, unsigned because %q", err, p.Unsigned)
				}
				return
			}
			if err != nil || v.Result != attest.Unknown { // this vendor knows nothing of the box
				t.Fatalf("%v, %+v", err, v)
			}
			for _, check := range []string{attest.CheckChallenge, attest.CheckSignature, attest.CheckRegisters, erasure.CheckErasure} {
				if c := v.Of(check); c.Result != attest.Pass {
					t.Errorf("%+v", c)
				}
			}
			if fresh := v.Of(attest.CheckFreshness).Result; (fresh == attest.Pass) != (tt.challenge != nil) {
				t.Errorf("freshness: %s", fresh)
			}
		})
	}
}

// signaturesOfEpoch signs the box's release for epoch 1.
func signaturesOfEpoch(t *testing.T, b *box) []byte {
	t.Helper()
	var measured []pcr.Measured
	for _, s := range b.release.sections() {
		measured = append(measured, pcr.Measured{Name: s[0], SHA256: sha256.Sum256([]byte(s[1]))})
	}
	list, err := seal.SignEpochs(vendorKey(), pcr.Extend(pcr.UKI(measured), []byte(phaseEnterInitrd)), 1)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := list.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// wantDecommissioned boots, with a TPM and without, and wants a message and the end.
func (b *box) wantDecommissioned(t *testing.T, completes bool) {
	t.Helper()
	for _, b.noTPM = range []error{nil, seal.ErrNoTPM} {
		synctest.Test(t, func(t *testing.T) {
			s := b.session("")
			if err := s.open(); !errors.Is(err, ErrPowerOff) {
				t.Errorf("error %v", err)
			}
			out := s.console.out.String()
			if !strings.Contains(out, "was decommissioned") || strings.Contains(out, "area_bytes") != completes || len(s.storage.mapped) != 0 {
				t.Errorf("console %q, mapped %v", out, s.storage.mapped)
			}
		})
		completes = false
	}
	b.noTPM = nil
}

// TestPowerCutOverDecommission: the old data by the TPM, or a box that completes its
// own end at the next start.
func TestPowerCutOverDecommission(t *testing.T) {
	b := newBox(t, 2)
	first := b.mustBoot("", "provisioned")
	first.write("records")
	old := keyMaterial(t, b)
	dev := powercut.New(b.disk.(*partition.Memory))
	b.disk = dev
	e := b.eraser(first)
	e.OpenTPM = func() (seal.TPM, error) { return nil, seal.ErrNoTPM } // the states before it need the TPM as it was
	proof, err := e.Decommission()
	if err != nil || len(proof.Problems) != 1 || dev.Unsynced() {
		t.Fatalf("%v, problems %q, unsynced %v", err, proof.Problems, dev.Unsynced())
	}
	var kept, over, k int
	for name, disk := range dev.States(1, 2) {
		b.disk = disk
		ended, err := marked(b.parts()[0].Device, decommissionedMarker)
		if err != nil {
			t.Fatal(err)
		}
		if k++; ended {
			over++
			if over%(4*scratchEvery()) != 1 {
				continue // reading it all takes its time
			}
			// The TPM stays as it was for the states that still need it.
			b.noTPM = seal.ErrNoTPM
			synctest.Test(t, func(t *testing.T) {
				if err := b.session("").open(); !errors.Is(err, ErrPowerOff) {
					t.Errorf("error %v", err)
				}
			})
			b.noTPM = nil
			if left := survivors(t, b.disk, old); left != 0 {
				t.Errorf("%d sectors of keys are left", left)
			}
		} else {
			kept++
			b.powerOn()
			b.mustBoot("", "tpm").wantData("records")
		}
		if t.Failed() {
			t.Fatal(name)
		}
	}
	if kept < 4 || over < 20 {
		t.Errorf("%d states with the old data, %d without", kept, over)
	}
	t.Logf("%d states with the old data, %d without", kept, over)
}

// TestEraserLeftovers: what a reset or an end finds may be damaged already.
func TestEraserLeftovers(t *testing.T) {
	b := newBox(t, 2)
	s := b.mustBoot("", "provisioned")
	put(t, b.parts()[1].Device, bytes.Repeat([]byte{0xaa}, 32<<10), 0)
	before := b.disk.(*partition.Memory).Clone()

	b.disk = before.Clone()
	e := b.eraser(s)
	e.Lock = func() (func(), error) { return nil, ErrSyncing }
	if _, err := e.Reset(); !errors.Is(err, ErrSyncing) {
		t.Errorf("locked: %v", err)
	}
	wantSame(t, before, b.disk)

	proof, err := b.eraser(s).Reset()
	if err != nil || proof.Volumes[1].UUID != "" || proof.Volumes[0].UUID == "" {
		t.Errorf("a damaged volume: %v, %+v", err, proof.Volumes)
	}
	b.powerOn()
	s = b.mustBoot("", "provisioned")

	// The end of a box that is half reset, and the other way round.
	if _, err := b.eraser(s).Reset(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.eraser(s).Decommission(); err != nil {
		t.Fatal(err)
	}
	b.wantDecommissioned(t, false)
	if _, err := (&Eraser{}).Reset(); !errors.Is(err, ErrNoVolumes) {
		t.Errorf("no volumes: %v", err)
	}
	b.disk = refuseDevice{b.disk}
	if _, err := b.eraser(s).Reset(); err == nil {
		t.Error("a disk that takes no writes is said to be erased")
	}
}

// refuseDevice takes writes and forgets them, as a worn-out card does.
type refuseDevice struct{ partition.Device }

func (refuseDevice) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// TestMainboardReplaced: another TPM, and another firmware. The recovery key opens
// once, the box seals itself to what it finds, and the old board is a stranger then (F2).
func TestMainboardReplaced(t *testing.T) {
	for _, repair := range []string{"", repairManual} {
		st := newStation(t, image.SealPolicy{Policy: seal.PolicyStandard, Repair: repair}, true)
		key := st.s.recoveryKey()
		st.s.write("records")
		st.mustSettle()
		oldBoard, oldFirmware := st.tpm, st.fw

		board := newPlatform(true)
		board.code = "firmware of another board"
		board.variables["KEK"] = signatureList("another maker's")
		st.tpm = sealtest.Start(t)
		st.fw, board.tpm = board, st.tpm

		// Without the key it stays closed: the disk was moved, by whomever.
		if err := st.try(""); err == nil || len(st.s.storage.mapped) != 0 {
			t.Fatalf("error %v, mapped %v", err, st.s.storage.mapped)
		}
		if out := st.s.console.out.String(); !strings.Contains(out, "The data volumes stay closed") {
			t.Errorf("console %q", out)
		}
		// With it, the owner consents.
		st.start(key+"\n", "recovery")
		st.s.wantData("records")
		st.mustSettle()
		if repair == repairManual {
			if _, err := st.k.Reseal(ResealOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		st.start("", "tpm")
		st.s.wantData("records")

		st.tpm, st.fw = oldBoard, oldFirmware
		if err := st.try(""); err == nil || len(st.s.storage.mapped) != 0 {
			t.Errorf("the old board opens the disk too: %v", err)
		}
		st.start(key+"\n", "recovery")
	}
}
