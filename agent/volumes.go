package agent

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// stateFolder is the agent's own folder at the top of the first data volume.
const stateFolder = ".holdfast"

// managementKeyFile holds, on an unlocked volume, the passphrase of the
// management keyslot: whoever has the volume open may re-seal it (F48).
const managementKeyFile = "management.key"

// secretBytes is the length of the sealed secret and of the management key.
const secretBytes = 32

// Storage is what the kernel does with a volume once its key is known.
type Storage interface {
	// Map shows the decrypted segment of a volume as a block device.
	Map(v Partition, header *luks2.Header, key []byte) (device string, err error)
	// Authenticate makes a volume with integrity readable for the first time: its tags,
	// and zeros in every sector. progress is told of bytes of all.
	Authenticate(v Partition, header *luks2.Header, key []byte, progress func(done, all int64)) error
	// MakeFS makes an empty file system that fills the device.
	MakeFS(device, label string) error
	// Mount mounts the file system and grows it to the device when that is larger.
	Mount(device, at string) error
	// Unmap unmounts and closes what Map and Mount opened.
	Unmap(v Partition) error
}

// Partition is a data volume's place on the disk.
type Partition struct {
	image.Volume
	// Number is the partition's, counted from 1.
	Number int
	Device partition.Device
}

// Machine is everything the agent needs from the box to open its volumes.
// Tests put a memory disk and a software TPM behind it.
type Machine struct {
	Log     *slog.Logger
	Console io.ReadWriter // where the recovery key is shown and typed
	Storage Storage
	// OpenTPM is called until it succeeds, and then not again. A TPM that was not
	// there at first and appears later must still be closed by [Machine.Leave].
	OpenTPM func() (seal.TPM, error)
	// Signatures is the content of the UKI's .pcrsig section.
	Signatures func() ([]byte, error)
	// Authorisation is the content of the file at [image.AuthorisationPath], if there is one;
	// nil is none.
	Authorisation func() ([]byte, error)
	// SecureBoot says whether the firmware enforces the vendor's keys.
	SecureBoot func() (bool, error)
	// EventLog is the firmware's, for explanations only.
	EventLog func() ([]byte, error)
	// OnTrial says that this release has yet to prove itself and another one is good.
	// Then a TPM that refuses ends the boot, instead of a wait for somebody with the
	// recovery key: the other release may open the volumes, and asks if it cannot.
	OnTrial bool
	// Mend, when set, is called when the TPM refuses. It puts right what on the boot
	// partition made this boot another one than is sealed for, and says whether it did: a
	// restart is then tried before anybody is asked.
	Mend func() bool
	// Slot is the one that was booted, "a" or "b"; it names the states that are sealed for it.
	Slot string
	// Echo, when set, turns on and off that the console shows what is typed.
	Echo func(on bool)
	// Root is where the release's root is mounted, or will be; volumes go below it.
	Root string
	// Slots, when set, is for a release whose slots are encrypted.
	Slots *Slots
	// Rand defaults to crypto/rand.
	Rand io.Reader
	// RecoveryMemoryKiB is what it takes to try a recovery key of a volume that is made;
	// 0 means [luks2.RecoveryKDF]'s 64 MiB.
	RecoveryMemoryKiB uint32

	tpm     *meteredTPM
	typed   *bufio.Reader // of the console, once
	changes []string      // which PCRs differ, once the TPM has refused
	opened  *seal.Token   // the state that the TPM opened
	damaged *seal.Token   // the state that it opened in vain
	secret  []byte        // that the TPM gave for it
	now     map[int]pcr.Digest
	phases  []string // measured in this boot
	// measured is what was extended, in order.
	measured []attest.Measurement
}

// recordedPCRs are kept beside the seal to explain a refusal later; boundPCRs are
// those that some policy binds, as many as one command reads.
var (
	recordedPCRs = []int{0, 1, 2, 3, 4, 5, 6, 7, 11, 12}
	boundPCRs    = []int{0, 2, 4, 7, 11, 12}
)

const degradedWithoutSecureBoot = "Secure Boot is off: the volumes are bound to this exact loader and kernel (PCR 4) instead; " +
	"enrol the vendor's keys in the firmware"

// volume is a data volume on its way to being open.
type volume struct {
	Partition
	header *luks2.Header
	key    []byte
	device string
	method string
}

// OpenVolumes opens and mounts every data volume, making them first on a disk
// that was never provisioned. It fills in the parts of the status it knows.
// Errors are final for this boot; a refused TPM is not one, it ends in the
// recovery prompt.
func (m *Machine) OpenVolumes(b image.Boot, parts []Partition, s *Status) (err error) {
	if len(parts) == 0 {
		return nil
	}
	if m.Rand == nil {
		m.Rand = rand.Reader
	}
	if err := m.decommissioned(b.Appliance, parts); err != nil {
		return err
	}
	vols := make([]*volume, len(parts))
	for i, p := range parts {
		vols[i] = &volume{Partition: p}
	}
	defer func() {
		for _, v := range vols {
			luks2.Wipe(v.key)
		}
		luks2.Wipe(m.secret)
		m.countTPM(s)
	}()
	fresh, err := unprovisioned(vols)
	if err != nil {
		return err
	}
	if fresh && m.Slots != nil {
		if m.Slots.key, err = m.carriedSlotKey(); err != nil {
			return err
		}
	}
	if fresh {
		err = m.provision(b, vols)
	} else {
		err = m.unlock(b, vols)
	}
	if err == nil && m.Slots != nil {
		err = m.settleSlotKey(vols)
	}
	if err != nil {
		return err
	}
	m.describe(b, vols, s)
	return m.seenIdentity(vols)
}

// countTPM notes what the TPM has been asked so far in this boot.
func (m *Machine) countTPM(s *Status) {
	if m.tpm != nil {
		s.Boot.TPMMilliseconds, s.Boot.TPMCommands = m.tpm.spent.Milliseconds(), m.tpm.commands
	}
}

// unprovisioned says whether the disk is as it came from the builder. The first
// volume decides: it is published first, and from then on the box has a
// recovery key somebody may have written down. Later volumes that still carry
// the marker are finished by unlock. A volume without the marker is never made,
// so a marker on the first volume alone, which no boot leaves behind, is an error.
func unprovisioned(vols []*volume) (bool, error) {
	for i, v := range vols {
		fresh, err := partition.Unprovisioned(v.Device)
		if err != nil {
			return false, fmt.Errorf("data volume %s: %w", v.Name, err)
		}
		if !fresh && i == 0 {
			return false, nil
		}
		if !fresh {
			return false, fmt.Errorf("data volume %s is marked as new and %s is not, so none is made: "+
				"restore the first 4096 bytes of %[1]s, or write the image again if the data may be lost", vols[0].Name, v.Name)
		}
	}
	return true, nil
}

// openTPM opens the TPM once and counts what it is asked.
func (m *Machine) openTPM() (seal.TPM, error) {
	if m.tpm != nil {
		return m.tpm, nil
	}
	t, err := m.OpenTPM()
	if err != nil {
		return nil, err
	}
	m.tpm = &meteredTPM{TPM: t}
	return m.tpm, nil
}

// meteredTPM counts commands and the time they take.
type meteredTPM struct {
	seal.TPM
	commands int
	spent    time.Duration
}

func (t *meteredTPM) Send(command []byte) ([]byte, error) {
	began := time.Now()
	defer func() { t.commands++; t.spent += time.Since(began) }()
	return t.TPM.Send(command)
}

// unlock opens volumes that exist: by one unseal for all of them, else by the
// recovery key.
func (m *Machine) unlock(b image.Boot, vols []*volume) error {
	for _, v := range vols {
		if err := m.readHeader(v); err != nil {
			return err
		}
	}
	passphrase, slot, err := m.unseal(vols[0])
	if err == nil {
		if err = openWith(vols, passphrase, slot, "tpm"); err != nil {
			m.damaged, err = m.opened, &keyslotError{err}
		}
		luks2.Wipe(passphrase)
	}
	if errors.Is(err, ErrReboot) || errors.Is(err, ErrPowerOff) {
		return err
	}
	if err != nil {
		m.Log.Warn("the TPM does not open the data volumes", "reason", err)
		if m.Mend != nil && !errors.Is(err, errRecoveryWanted) && m.Mend() {
			return ErrReboot
		}
		if m.OnTrial && !errors.Is(err, errRecoveryWanted) {
			return fmt.Errorf("a release on trial whose data volumes stay closed is left: %w", err)
		}
		if err := m.recover(vols, err); err != nil {
			return err
		}
	} else if err := checkBox(vols); err != nil {
		return err
	}
	if err := m.finishPublishing(vols); err != nil {
		return err
	}
	for _, v := range vols {
		if err := m.mount(v); err != nil {
			return err
		}
	}
	return nil
}

// readHeader takes the header into memory, whitelisted (F81), and mends a torn copy.
func (m *Machine) readHeader(v *volume) error {
	h, report, err := luks2.Read(v.Device, v.Device.Size())
	if err != nil {
		return fmt.Errorf("data volume %s: %w; it was provisioned before, so it is not made anew: "+
			"restore its header from a backup, or write the image again if the data may be lost", v.Name, err)
	}
	v.header = h
	fresh, err := partition.Unprovisioned(v.Device)
	if err != nil {
		return err
	}
	// A volume that is not published has a marker where its primary header will
	// be; finishPublishing sees to that, after it has opened.
	if !fresh && (damaged(report.Primary) || damaged(report.Secondary)) {
		m.Log.Warn("mending a copy of the LUKS header", "volume", v.Name)
		if err := h.Repair(v.Device); err != nil {
			m.Log.Warn("header not mended", "volume", v.Name, "error", err) // one good copy is enough to go on
		}
	}
	return nil
}

func damaged(c luks2.CopyReport) bool { return c.Err != nil || c.Stale }

// unseal asks the TPM for the secret all volumes share.
func (m *Machine) unseal(v *volume) (passphrase []byte, slot int, err error) {
	var tokens []seal.Token
	for _, t := range tpmTokens(v.header) {
		tokens = append(tokens, t.Token)
	}
	if len(tokens) == 0 {
		return nil, 0, fmt.Errorf("data volume %s: no TPM keyslot", v.Name)
	}
	tpm, err := m.openTPM()
	if err != nil {
		return nil, 0, err
	}
	signatures, err := m.signatures()
	if err != nil {
		return nil, 0, err
	}
	secret, i, err := m.ask(tpm, tokens, signatures)
	if err != nil {
		m.changes = m.explain(v.header, tpm)
		return nil, 0, err
	}
	m.opened, m.secret = &tokens[i], secret
	slot, err = strconv.Atoi(tokens[i].Keyslots[0]) // ParseToken has seen to one
	return seal.Passphrase(secret), slot, err
}

// openedHash is the policy hash of the state that opened; zero when none did.
func (m *Machine) openedHash() (d pcr.Digest) {
	if m.opened != nil {
		d = m.opened.PolicyHash
	}
	return d
}

// ask asks the TPM for the secret of the state that this boot fulfils, and a person for
// the PIN if there has to be one. The registers are known from the firmware's event log,
// as far as the log is right: the TPM is asked for them only where it refuses, or where
// they fit no state.
func (m *Machine) ask(tpm seal.TPM, tokens []seal.Token, signatures seal.Signatures) (secret []byte, i int, err error) {
	bound := slices.Clone(boundPCRs)
	for _, t := range tokens {
		bound = merge(bound, t.Policy("").Bound())
	}
	logged := m.logged(bound)
	if logged != nil {
		if secret, i, err = m.askWith(tpm, tokens, logged, signatures); err == nil {
			m.keepNow(logged, tokens[i])
			return secret, i, nil
		}
		var refused *seal.PolicyError
		if !errors.As(err, &refused) {
			return nil, i, err
		}
	}
	now, err2 := seal.ReadPCRs(tpm, bound)
	if err2 != nil {
		return nil, -1, errors.Join(err2, err)
	}
	if logged != nil && maps.Equal(logged, now) {
		return nil, i, err // there is nothing else to try
	}
	if secret, i, err = m.askWith(tpm, tokens, now, signatures); err == nil {
		m.now = now
	}
	return secret, i, err
}

func (m *Machine) askWith(tpm seal.TPM, tokens []seal.Token, now map[int]pcr.Digest, signatures seal.Signatures) (secret []byte, i int, err error) {
	secret, i, err = seal.UnsealWith(tpm, tokens, now, signatures, nil)
	if errors.Is(err, seal.ErrPINNeeded) {
		return m.askPIN(tpm, tokens, now, signatures)
	}
	return secret, i, err
}

// logged are the registers as the event log has them, with the phases of this boot; nil
// where it does not lead to all of them.
func (m *Machine) logged(bound []int) map[int]pcr.Digest {
	raw, err := m.EventLog()
	if err != nil {
		return nil
	}
	log, err := pcr.ParseLog(raw)
	if err != nil {
		return nil
	}
	replayed, values := log.Replay(), map[int]pcr.Digest{}
	for _, index := range bound {
		v, ok := replayed[index]
		if !ok && len(log.Of(index)) > 0 || !ok && index != 12 {
			return nil // 12 is zero as long as nothing is measured into it
		}
		values[index] = v
	}
	for _, phase := range m.phases {
		values[phasePCR] = pcr.Extend(values[phasePCR], []byte(phase))
	}
	return values
}

// keepNow takes for true of the log's registers what the TPM has opened by.
func (m *Machine) keepNow(logged map[int]pcr.Digest, opened seal.Token) {
	m.now = map[int]pcr.Digest{}
	for _, index := range opened.Policy("").Bound() {
		m.now[index] = logged[index]
	}
}

func (m *Machine) signatures() (seal.Signatures, error) {
	b, err := m.Signatures()
	if err != nil {
		return nil, fmt.Errorf("read the vendor's PCR signatures: %w", err)
	}
	list, err := seal.ParseSignatures(b)
	if err != nil {
		return nil, err
	}
	return append(list, m.authorised()...), nil
}

// recordType is the token type of [seal.Record].
const recordType = "holdfast-state"

func tokenType(raw json.RawMessage) string {
	var t struct{ Type string }
	if json.Unmarshal(raw, &t) != nil {
		return ""
	}
	return t.Type
}

// recordOf finds what was noted when the volume was sealed; nil when nothing was.
func recordOf(h *luks2.Header) *seal.Record {
	for _, raw := range h.Tokens() {
		if tokenType(raw) == recordType {
			if r, err := seal.ParseRecord(raw); err == nil {
				return &r
			}
		}
	}
	return nil
}

// keyslotError says that the TPM did its part and a volume does not open all the same.
type keyslotError struct{ err error }

func (e *keyslotError) Error() string {
	return fmt.Sprintf("the TPM gave its key, and the keyslot for it does not open: %v", e.err)
}

func (e *keyslotError) Unwrap() error { return e.err }

// openWith unlocks every volume with one passphrase. slot is the first volume's; after a
// power cut while states were changed another volume may have it elsewhere, and finds its
// own.
func openWith(vols []*volume, passphrase []byte, slot int, method string) error {
	for _, v := range vols {
		key, err := v.header.UnlockSlot(v.Device, slot, passphrase)
		if err != nil && v != vols[0] {
			key, _, err = v.header.Unlock(v.Device, passphrase)
		}
		if err != nil {
			return fmt.Errorf("data volume %s: %w", v.Name, err)
		}
		v.open(key, method)
	}
	return nil
}

// open keeps the key of a volume that opened.
func (v *volume) open(key []byte, method string) {
	luks2.Wipe(v.key) // of an earlier try that opened only some of the volumes
	v.key, v.method = key, method
}

// finishPublishing completes a provisioning that lost power between its first
// volume and the others. They were whole before the first was published; that
// they opened with the same secret shows that they belong to it. All that is
// missing is the first sector, and the secondary header has what goes there.
func (m *Machine) finishPublishing(vols []*volume) error {
	for _, v := range vols {
		fresh, err := partition.Unprovisioned(v.Device)
		if err != nil {
			return err
		}
		if !fresh {
			continue
		}
		if err := v.header.Repair(v.Device); err != nil {
			return fmt.Errorf("data volume %s: %w", v.Name, err)
		}
		m.Log.Info("finished the provisioning of a volume", "volume", v.Name)
	}
	return nil
}

func (m *Machine) mount(v *volume) (err error) {
	if v.device == "" {
		if v.device, err = m.Storage.Map(v.Partition, v.header, v.key); err != nil {
			return err
		}
	}
	if err := m.Storage.Mount(v.device, filepath.Join(m.Root, v.Volume.Mount)); err != nil {
		return err
	}
	m.Log.Info("volume open", "name", v.Name, "method", v.method, "mount", v.Volume.Mount)
	return nil
}

// describe fills in the status; it reads the tokens, so that what it shows is
// what is in force and not what was meant.
func (m *Machine) describe(b image.Boot, vols []*volume, s *Status) {
	for _, v := range vols {
		s.Volumes = append(s.Volumes, VolumeStatus{Name: v.Name, Mount: v.Volume.Mount, Device: v.device, UUID: v.header.UUID(), Method: v.method, Integrity: v.header.Integrity()})
		if changed := integrityChanged(v.Volume, v.header); changed != "" {
			s.Problems = append(s.Problems, changed)
		}
	}
	var err error
	if s.SecureBoot, err = m.SecureBoot(); err != nil {
		m.Log.Warn("Secure Boot state unknown, taken as off", "error", err)
	}
	s.Policy = b.Appliance.Seal.Policy
	s.PCRs = pcrTexts(m.now)
	var tokens []seal.Token
	for _, t := range tpmTokens(vols[0].header) {
		tokens = append(tokens, t.Token)
	}
	known := []map[int]pcr.Digest{m.now}
	if record := recordOf(vols[0].header); record != nil {
		known = append(known, record.PCRs)
	}
	damaged := ""
	if m.damaged != nil {
		damaged = sealedID(*m.damaged)
	}
	s.setStates(tokens, m.openedHash(), damaged, known)
	if m.opened != nil {
		own := uint64(max(b.Appliance.Seal.Epoch, 0))
		if box := epochOf(m.opened.Ref); box > own {
			s.Problems = append(s.Problems, fmt.Sprintf("a downgrade that the vendor has authorised: release %s has security epoch %d, and this box has come to %d", b.Appliance.Version, own, box))
		}
	}
	if vols[0].method == "recovery" {
		why := "opened with the recovery key, because the TPM refused"
		if m.damaged != nil {
			why = "opened with the recovery key, because the keyslot for the TPM's key is damaged on a data volume"
		}
		s.Problems = append(s.Problems, why)
		s.Problems = append(s.Problems, m.changes...)
	}
}

// identityPCR takes what volumes are open (UAPI.7: 15, volume keys).
const identityPCR = 15

// phasePCR takes the boot phases; after leaveInitrd no key can be had.
const phasePCR = 11

// The phases of a boot, as systemd names them.
const (
	phaseEnterInitrd = "enter-initrd"
	phaseLeaveInitrd = "leave-initrd"
)

// seenIdentity measures which volumes this boot opened, all at once: a MAC for each,
// under the volume key, so it cannot be made without the keys.
func (m *Machine) seenIdentity(vols []*volume) error {
	if m.tpm == nil {
		return nil // no TPM: nobody can be told
	}
	var macs []byte
	for _, v := range vols {
		mac := hmac.New(sha256.New, v.key)
		fmt.Fprintf(mac, "holdfast:%s:%s", v.Name, v.header.UUID())
		if v.method == "recovery" {
			// Whoever knows a key of the disk typed it; no TPM vouches for the volume.
			fmt.Fprint(mac, ":recovery")
		}
		macs = mac.Sum(macs)
	}
	if err := seal.ExtendPCR(m.tpm, identityPCR, macs); err != nil {
		m.Log.Warn("identity of the volumes not measured", "error", err)
		return nil
	}
	m.measured = append(m.measured, attest.MeasuredBytes(identityPCR, macs, "data volumes"))
	return nil
}

// EnterPhase measures a boot phase. On a box without a TPM there is nothing to
// protect and nothing to measure into.
func (m *Machine) EnterPhase(phase string) error {
	tpm, err := m.openTPM()
	if errors.Is(err, seal.ErrNoTPM) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := seal.ExtendPCR(tpm, phasePCR, []byte(phase)); err != nil {
		return err
	}
	m.phases = append(m.phases, phase)
	m.measured = append(m.measured, attest.MeasuredText(phasePCR, phase))
	return nil
}

// Leave measures the end of the initrd: from then on no key can be had in this
// boot. It must not be skipped, or a root that is taken over could unseal the
// disk key at leisure; an error ends the boot.
//
// A broken TPM must not keep the data from a person with the recovery key,
// though. Where that key opened every volume, an error is a problem in the
// status: this TPM gave no key, and whoever takes the root over has the volume
// keys in the kernel's memory before him anyway.
func (m *Machine) Leave(s *Status) error {
	err := m.EnterPhase(phaseLeaveInitrd)
	m.countTPM(s)
	s.Measured = m.measured
	if err == nil {
		return nil
	}
	err = fmt.Errorf("close the TPM behind the initrd: %w", err)
	for _, v := range s.Volumes {
		if v.Method != "recovery" {
			return err
		}
	}
	m.Log.Warn("the TPM stays open", "error", err)
	s.Problems = append(s.Problems, err.Error())
	return nil
}

// explain says which PCRs differ from those at the time of sealing.
func (m *Machine) explain(h *luks2.Header, tpm seal.TPM) []string {
	record := recordOf(h)
	if record == nil {
		record = &seal.Record{}
	}
	now, err := seal.ReadPCRs(tpm, recordedPCRs)
	m.now = now
	if err != nil {
		return []string{fmt.Sprintf("PCRs cannot be read: %v", err)}
	}
	if len(record.PCRs) == 0 {
		return nil
	}
	var log pcr.Log
	if raw, err := m.EventLog(); err == nil {
		log, _ = pcr.ParseLog(raw) // a bad log explains less, and nothing depends on it
	}
	return seal.Explain(record.PCRs, now, log)
}
