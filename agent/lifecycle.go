package agent

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
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
	// headBytes hold both headers and all key areas (package luks2, "The subset").
	headBytes = 16 << 20
	wipeChunk = 1 << 20
)

// Eraser ends the life of a box's data. Fill in the fields and call [Eraser.Reset] or
// [Eraser.Decommission]. The volumes may be open meanwhile: their data area is not
// touched, and their keys stay in the kernel until the box restarts.
type Eraser struct {
	Log *slog.Logger
	// Name and Version are those of the release, for the proof.
	Name, Version string
	// Volumes are all data volumes of the box. The first one decides.
	Volumes []Partition
	// OpenTPM is for Decommission, which removes what the box has in its TPM.
	OpenTPM func() (seal.TPM, error)
	Now     func() time.Time
	// Lock, when set, keeps others from changing the headers meanwhile.
	Lock func() (unlock func(), err error)
	// CarrySlotKey, when set, is for a box whose slots are encrypted. Reset calls it before
	// anything is destroyed; see slots.go.
	CarrySlotKey func() error
	// Rand defaults to crypto/rand.
	Rand io.Reader
}

// Proof says what was destroyed. It is not signed: it is as good as who carries it.
type Proof struct {
	Format  int       `json:"format"` // 1
	What    string    `json:"what"`   // "factory reset", "decommission"
	Name    string    `json:"name"`
	Version string    `json:"version"`
	Time    time.Time `json:"time"`
	// Completed says that this run completed one that was interrupted.
	Completed bool           `json:"completed_an_interrupted_run,omitempty"`
	Volumes   []ErasedVolume `json:"volumes"`
	TPM       *ErasedTPM     `json:"tpm,omitempty"`
	// Slots is what became of encrypted slots.
	Slots string `json:"slots,omitempty"`
	// Problems are what could not be done; the volumes are erased all the same.
	Problems []string `json:"problems,omitempty"`
}

// ErasedVolume is one data volume.
type ErasedVolume struct {
	Name string `json:"name"`
	// UUID and Keyslots are empty where there was no header any more.
	UUID     string `json:"uuid,omitempty"`
	Keyslots int    `json:"keyslots,omitempty"`
	// AreaBytes from the volume's start were overwritten: both headers and all key areas.
	// Of these bytes, Before and After are the SHA-256, in hex.
	AreaBytes int64  `json:"area_bytes"`
	Before    string `json:"before_sha256"`
	After     string `json:"after_sha256"`
}

// ErasedTPM is what was done in the TPM: "removed", or "there was none".
type ErasedTPM struct {
	Manufacturer string `json:"manufacturer,omitempty"`
	Counter      string `json:"counter,omitempty"`
	StorageKey   string `json:"storage_key,omitempty"`
}

// WriteTo prints the proof as JSON.
func (p Proof) WriteTo(w io.Writer) (int64, error) {
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return 0, err
	}
	n, err := w.Write(append(b, '\n'))
	return int64(n), err
}

// Reset makes the data volumes what they were when they came from the builder: the
// next boot provisions them. Releases, boot entries and the TPM stay; slots that are
// encrypted stay so, and open.
func (e *Eraser) Reset() (Proof, error) {
	return e.erase("factory reset", partition.UnprovisionedMarker)
}

// Decommission ends the box's life: no boot makes volumes again until an image is
// written anew. What is in encrypted slots is noise then. Its TPM gives up the counter and the storage key.
func (e *Eraser) Decommission() (Proof, error) {
	return e.erase("decommission", decommissionedMarker)
}

func (e *Eraser) erase(what, marker string) (p Proof, err error) {
	if len(e.Volumes) == 0 {
		return p, ErrNoVolumes
	}
	if e.Lock != nil {
		unlock, err := e.Lock()
		if err != nil {
			return p, err
		}
		defer unlock()
	}
	p = Proof{Format: 1, What: what, Name: e.Name, Version: e.Version, Time: e.Now().UTC()}
	if p.Completed, err = marked(e.Volumes[0].Device, marker); err != nil {
		return p, err
	}
	srk, err := e.look(&p)
	if err != nil {
		return p, err
	}
	if e.CarrySlotKey != nil {
		p.Slots = "encrypted, and their key destroyed with the volumes"
	}
	if e.CarrySlotKey != nil && marker == partition.UnprovisionedMarker {
		p.Slots = "encrypted, and their key carried over, which this TPM opens"
		if err := e.CarrySlotKey(); err != nil {
			return p, err
		}
	}
	for i := len(e.Volumes) - 1; i >= 0; i-- {
		if err := mark(e.Volumes[i].Device, marker); err != nil {
			return p, fmt.Errorf("data volume %s: %w", e.Volumes[i].Name, err)
		}
	}
	for i, v := range e.Volumes {
		if err := e.wipe(v.Device); err != nil {
			return p, fmt.Errorf("data volume %s: %w; the next start goes on", v.Name, err)
		}
		if p.Volumes[i].After, err = wiped(v.Device, marker); err != nil {
			return p, fmt.Errorf("data volume %s: %w", v.Name, err)
		}
		e.Log.Info("keys of a data volume destroyed", "volume", v.Name, "bytes", p.Volumes[i].AreaBytes)
	}
	if marker == decommissionedMarker {
		e.eraseTPM(&p, srk)
	}
	return p, nil
}

// look notes what there is, and makes sure that volumes which are marked first could
// still be opened if the power failed before the first one is. srk is the name of the
// storage key that the volumes' states hang from.
func (e *Eraser) look(p *Proof) (srk []byte, err error) {
	for _, v := range e.Volumes {
		out := ErasedVolume{Name: v.Name, AreaBytes: min(headBytes, v.Device.Size())}
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
	sum, want := sha256.New(), sha256.New()
	if err := digestArea(sum, dev, 0, end); err != nil {
		return "", err
	}
	want.Write([]byte(marker))
	if _, err := io.CopyN(want, zeroReader{}, end-int64(len(marker))); err != nil {
		return "", err
	}
	if !bytes.Equal(sum.Sum(nil), want.Sum(nil)) {
		return "", errors.New("the disk does not hold what was written over the keys: it is faulty, and must be destroyed")
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func digestArea(sum hash.Hash, dev io.ReaderAt, from, to int64) error {
	if _, err := io.Copy(sum, io.NewSectionReader(dev, from, to-from)); err != nil {
		return fmt.Errorf("read %d bytes: %w", to-from, err)
	}
	return nil
}

// eraseTPM removes what the box has in the TPM. It opens nothing any more, so what fails
// here is a note in the proof.
func (e *Eraser) eraseTPM(p *Proof, srk []byte) {
	p.TPM = &ErasedTPM{}
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
		e := &Eraser{Log: m.Log, Name: a.Name, Version: a.Version, Volumes: parts, OpenTPM: m.openTPM, Now: time.Now, Rand: m.Rand}
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
