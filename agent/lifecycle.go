package agent

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest/erasure"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// The end of a box's data. What is destroyed is the headers and the key areas: without
// them the data is noise, whoever has which key, and whatever the TPM says. Flash may
// keep the old cells until it collects them; see package luks2.
//
// Both ends write a marker to the first sector of each volume before anything is
// destroyed, the first volume's last. That sector is the point of no return: before it
// the volumes open as if nothing had been asked for (a volume whose primary header is
// gone has its secondary one), after it the next boot completes the work. A box is
// never left with volumes that neither open nor are made anew.

// decommissionedMarker begins, alone in its first 4096 bytes, each data volume of a box
// whose life is over.
const decommissionedMarker = "HOLDFAST-DECOMMISSIONED\n"

const (
	markerBlockBytes = 4096
	markerSector     = 512
	headBytes        = erasure.HeadBytes
	wipeChunk        = 1 << 20
)

// Eraser ends the life of a box's data. Fill in the fields and call [Eraser.Reset] or
// [Eraser.Decommission]. The volumes may be open meanwhile: their data area is not
// touched, and their keys stay in the kernel until the box restarts.
type Eraser struct {
	Log *slog.Logger
	// Name and Version are those of the release, for the proof; see package erasure.
	Name, Version string
	// Volumes are all data volumes of the box. The first one decides.
	Volumes []Partition
	// OpenTPM is for Decommission, which removes what the box has in its TPM, and for Sign.
	OpenTPM func() (seal.TPM, error)
	Now     func() time.Time
	// Lock, when set, keeps others from changing the headers meanwhile.
	Lock func() (unlock func(), err error)
	// CarrySlotKey and DropSlotKey, when set, are for a box whose slots are encrypted. Reset
	// calls the first before anything is destroyed, Decommission the second: an earlier
	// reset may have left the key where this TPM opens it. See slots.go.
	CarrySlotKey, DropSlotKey func() error
	// Sign has the TPM sign the proof; where it is nil, Unsigned says why.
	Sign     func(seal.TPM, *erasure.Proof) error
	Unsigned string
	// Rand defaults to crypto/rand.
	Rand io.Reader
}

// Reset makes the data volumes what they were when they came from the builder: the
// next boot provisions them. Releases, boot entries and the TPM stay; slots that are
// encrypted stay so, and open.
func (e *Eraser) Reset() (*erasure.Proof, error) {
	return e.erase(erasure.FactoryReset, partition.UnprovisionedMarker)
}

// Decommission ends the box's life: no boot makes volumes again until an image is
// written anew. What is in encrypted slots is noise then. Its TPM gives up the counter
// and the storage key, and signs the proof with a key that it makes again each time.
func (e *Eraser) Decommission() (*erasure.Proof, error) {
	return e.erase(erasure.Decommission, decommissionedMarker)
}

func (e *Eraser) erase(what, marker string) (*erasure.Proof, error) {
	if len(e.Volumes) == 0 {
		return nil, ErrNoVolumes
	}
	if e.Lock != nil {
		unlock, err := e.Lock()
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	p := erasure.New(what, e.Name, e.Version, marker, e.Now())
	var err error
	if p.Completed, err = marked(e.Volumes[0].Device, marker); err != nil {
		return nil, err
	}
	srk, err := e.look(p)
	if err != nil {
		return nil, err
	}
	if e.CarrySlotKey != nil && what == erasure.FactoryReset {
		p.Slots = "encrypted, and their key carried over, which this TPM opens"
		if err := e.CarrySlotKey(); err != nil {
			return nil, err
		}
	}
	if err := e.destroy(p); err != nil {
		return nil, err
	}
	if what == erasure.Decommission {
		e.eraseTPM(p, srk)
	}
	e.sign(p)
	return p, nil
}

// destroy marks the volumes and overwrites what opens them and the slots.
func (e *Eraser) destroy(p *erasure.Proof) (err error) {
	marker := p.Marker
	for i := len(e.Volumes) - 1; i >= 0; i-- {
		if err := mark(e.Volumes[i].Device, marker); err != nil {
			return fmt.Errorf("data volume %s: %w", e.Volumes[i].Name, err)
		}
	}
	// Before the volumes: once all of them are overwritten, no start comes back to this.
	if e.DropSlotKey != nil && p.What == erasure.Decommission {
		p.Slots = "encrypted, and their key destroyed with the volumes"
		if err := e.DropSlotKey(); err != nil {
			p.Slots = "encrypted, and their key destroyed on the volumes"
			p.Problems = append(p.Problems, fmt.Sprintf("the key of the slots that a factory reset may have left on the boot partition: %v", err))
		}
	}
	for i, v := range e.Volumes {
		if err := e.wipe(v.Device); err != nil {
			return fmt.Errorf("data volume %s: %w; the next start goes on", v.Name, err)
		}
		if p.Volumes[i].After, err = wiped(v.Device, marker); err != nil {
			return fmt.Errorf("data volume %s: %w", v.Name, err)
		}
		e.Log.Info("keys of a data volume destroyed", "volume", v.Name, "bytes", p.Volumes[i].AreaBytes)
	}
	return nil
}

// sign comes last. The keys are gone whether or not there is a TPM to say so.
func (e *Eraser) sign(p *erasure.Proof) {
	p.Unsigned = e.Unsigned
	if e.Sign == nil {
		return
	}
	tpm, err := e.OpenTPM()
	if err == nil {
		if c, ok := tpm.(io.Closer); ok {
			defer c.Close()
		}
		err = e.Sign(tpm, p)
	}
	if err != nil {
		p.Unsigned = fmt.Sprintf("TPM: %v", err)
	}
}

// look notes what there is, and makes sure that volumes which are marked first could
// still be opened if the power failed before the first one is. srk is the name of the
// storage key that the volumes' states hang from.
func (e *Eraser) look(p *erasure.Proof) (srk []byte, err error) {
	for _, v := range e.Volumes {
		out := erasure.Volume{Name: v.Name, AreaBytes: min(headBytes, v.Device.Size())}
		sum := sha256.New()
		if err := digestArea(sum, v.Device, 0, out.AreaBytes); err != nil {
			return nil, fmt.Errorf("data volume %s: %w", v.Name, err)
		}
		out.Before = hex.EncodeToString(sum.Sum(nil))
		h, report, err := luks2.Read(v.Device, v.Device.Size())
		if err == nil && !report.Sound() && !p.Completed {
			err = h.Repair(v.Device)
		}
		if err != nil && !p.Completed {
			e.Log.Warn("a volume that cannot be opened is erased", "volume", v.Name, "error", err)
		}
		if err == nil {
			out.UUID, out.Keyslots = h.UUID(), len(h.Keyslots())
			for _, t := range tpmTokens(h) {
				if t.SRK != nil {
					srk = t.SRK.Name
				}
			}
		}
		p.Volumes = append(p.Volumes, out)
	}
	return srk, nil
}

// mark writes the marker's block, its first sector last.
func mark(dev partition.Device, marker string) error {
	block := append([]byte(marker), make([]byte, markerBlockBytes-len(marker))...)
	for _, at := range []struct{ from, to int64 }{{markerSector, markerBlockBytes}, {0, markerSector}} {
		if _, err := dev.WriteAt(block[at.from:at.to], at.from); err != nil {
			return fmt.Errorf("write the marker at byte %d: %w", at.from, err)
		}
		if err := dev.Sync(); err != nil {
			return fmt.Errorf("write the marker at byte %d: %w", at.from, err)
		}
	}
	return nil
}

// marked says whether a volume bears exactly that marker.
func marked(dev io.ReaderAt, marker string) (bool, error) {
	block := make([]byte, markerBlockBytes)
	if _, err := dev.ReadAt(block, 0); err != nil {
		return false, fmt.Errorf("read the first %d bytes: %w", markerBlockBytes, err)
	}
	return bytes.Equal(block, append([]byte(marker), make([]byte, markerBlockBytes-len(marker))...)), nil
}

// wipe overwrites everything behind the marker: with random bytes, so that a drive that
// compresses has to write them, then with zeros.
func (e *Eraser) wipe(dev partition.Device) error {
	random := e.Rand
	if random == nil {
		random = rand.Reader
	}
	end := min(headBytes, dev.Size())
	for _, source := range []io.Reader{random, zeroReader{}} {
		buf := make([]byte, wipeChunk)
		for at := int64(markerBlockBytes); at < end; at += wipeChunk {
			b := buf[:min(wipeChunk, end-at)]
			if _, err := io.ReadFull(source, b); err != nil {
				return fmt.Errorf("read randomness: %w", err)
			}
			if _, err := dev.WriteAt(b, at); err != nil {
				return fmt.Errorf("overwrite %d bytes at byte %d: %w", len(b), at, err)
			}
		}
		if err := dev.Sync(); err != nil {
			return fmt.Errorf("overwrite %d bytes: %w", end-markerBlockBytes, err)
		}
	}
	return nil
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// wiped reads back, and is the digest of the area.
func wiped(dev partition.Device, marker string) (digest string, err error) {
	end := min(headBytes, dev.Size())
	sum := sha256.New()
	if err := digestArea(sum, dev, 0, end); err != nil {
		return "", err
	}
	if digest = hex.EncodeToString(sum.Sum(nil)); digest != erasure.Overwritten(marker, end) {
		return "", errors.New("the disk does not hold what was written over the keys: it is faulty, and must be destroyed")
	}
	return digest, nil
}

func digestArea(sum hash.Hash, dev io.ReaderAt, from, to int64) error {
	if _, err := io.Copy(sum, io.NewSectionReader(dev, from, to-from)); err != nil {
		return fmt.Errorf("read %d bytes: %w", to-from, err)
	}
	return nil
}

// eraseTPM removes what the box has in the TPM. It opens nothing any more, so what fails
// here is a note in the proof.
func (e *Eraser) eraseTPM(p *erasure.Proof, srk []byte) {
	p.TPM = &erasure.TPM{}
	failed := func(err error) { p.Problems = append(p.Problems, fmt.Sprintf("TPM: %v", err)) }
	tpm, err := e.OpenTPM()
	if err != nil {
		failed(err)
		return
	}
	if c, ok := tpm.(io.Closer); ok {
		defer c.Close()
	}
	if f, err := seal.Check(tpm); err == nil {
		p.TPM.Manufacturer = f.Manufacturer
	}
	const removed, none = "removed", "there was none"
	p.TPM.Counter = removed
	if _, err := seal.ReadCounter(tpm, seal.CounterIndex); errors.Is(err, seal.ErrNoCounter) {
		p.TPM.Counter = none
	}
	// One that was made and never incremented has no value, and goes all the same.
	if err := seal.RemoveCounter(tpm, seal.CounterIndex); err != nil {
		p.TPM.Counter = ""
		failed(err)
	}
	p.TPM.StorageKey = none
	switch gone, err := seal.RemoveSRK(tpm, srk); {
	case err != nil:
		failed(err)
	case gone:
		p.TPM.StorageKey = removed
	}
}

// decommissioned ends a boot of a box whose life is over, and completes what a power
// cut interrupted. There is no way on but [ErrPowerOff].
func (m *Machine) decommissioned(a image.Appliance, parts []Partition) error {
	over, err := marked(parts[0].Device, decommissionedMarker)
	if err != nil {
		return fmt.Errorf("data volume %s: %w", parts[0].Name, err)
	}
	if !over {
		return nil
	}
	complete := true
	for _, p := range parts {
		if _, err := wiped(p.Device, decommissionedMarker); err != nil {
			complete = false
		}
	}
	fmt.Fprint(m.Console, "\r\nThis box was decommissioned: the keys of its data are destroyed. To use it again, write an image anew.\r\n")
	if !complete {
		e := &Eraser{Log: m.Log, Name: a.Name, Version: a.Version, Volumes: parts, OpenTPM: m.openTPM, Now: time.Now, Rand: m.Rand,
			Unsigned: "a start completed what had been interrupted, with the volumes closed"}
		if m.Slots != nil {
			e.DropSlotKey = func() error { return dropCarried(m.Slots.Disk) }
		}
		proof, err := e.Decommission()
		if err != nil {
			return err
		}
		if _, err := proof.WriteTo(crlf{m.Console}); err != nil {
			m.Log.Warn("proof not shown", "error", err)
		}
	}
	time.Sleep(decommissionedDelay)
	return fmt.Errorf("this box was decommissioned: %w", ErrPowerOff)
}

// decommissionedDelay leaves the message on the console long enough to be read.
const decommissionedDelay = 30 * time.Second

// crlf is for a console in raw mode.
type crlf struct{ io.Writer }

func (w crlf) Write(p []byte) (int, error) {
	_, err := w.Writer.Write(bytes.ReplaceAll(p, []byte("\n"), []byte("\r\n")))
	return len(p), err
}
