package agent

import (
	"bytes"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// secrets are made on the device, once, and leave it only as the recovery key
// on the console.
type secrets struct {
	sealed     []byte // opens the TPM keyslot of every volume
	management []byte
	recovery   *luks2.RecoveryKey
	pin        []byte // nil without one
}

func (s *secrets) wipe() {
	luks2.Wipe(s.sealed)
	luks2.Wipe(s.management)
	luks2.Wipe(s.pin)
	s.recovery.Wipe()
}

// provision makes the data volumes of a new box. Everything is written and
// synced behind the markers of the unprovisioned volumes; the recovery key is
// shown; then each volume is published by the write of one sector. A power cut
// before the first of these starts from the beginning at the next boot (the key
// that was shown is then void, and another is), a cut after it loses nothing.
func (m *Machine) provision(b image.Boot, vols []*volume) error {
	m.Log.Info("first boot: provisioning the data volumes", "volumes", len(vols))
	policy, err := m.checkedPolicy(b)
	if err != nil {
		return err
	}
	keys, err := m.makeSecrets()
	if err != nil {
		return err
	}
	defer keys.wipe()
	if policy.PIN {
		if keys.pin, err = m.choosePIN(); err != nil {
			return err
		}
	}
	token, record, err := m.seal(b, policy, keys)
	if err != nil {
		return err
	}
	list, err := nameVolumes(vols, m.Rand)
	if err != nil {
		return err
	}
	for i, v := range vols {
		if err := m.makeVolume(v, list, i, keys, token, record); err != nil {
			return fmt.Errorf("make data volume %s: %w", v.Name, err)
		}
	}
	if err := m.handOver(b, vols, keys.recovery); err != nil {
		return err
	}
	for _, v := range vols {
		if err := v.header.Publish(v.Device); err != nil {
			return fmt.Errorf("publish data volume %s: %w", v.Name, err)
		}
	}
	m.Log.Info("provisioned")
	return nil
}

// checkedPolicy refuses to seal where a seal would protect nothing (F27, F28).
func (m *Machine) checkedPolicy(b image.Boot) (policy seal.Policy, err error) {
	tpm, err := m.openTPM()
	if err != nil {
		return policy, unfit(err)
	}
	fitness, err := seal.Check(tpm)
	if err != nil {
		return policy, unfit(err)
	}
	secureBoot, err := m.SecureBoot()
	if err != nil {
		m.Log.Warn("Secure Boot state unknown, taken as off", "error", err)
	}
	a := b.Appliance
	literal, err := seal.Literal(a.Seal.Policy, secureBoot)
	if err != nil {
		return policy, unfit(err)
	}
	var problems []error
	for _, p := range fitness.Problems(literal) {
		if !p.Blocks {
			m.Log.Warn("TPM", "problem", p.String())
			continue
		}
		problems = append(problems, errors.New(p.String()))
	}
	if len(problems) > 0 {
		return policy, unfit(errors.Join(problems...))
	}
	if m.now, err = seal.ReadPCRs(tpm, boundPCRs); err != nil {
		return policy, err
	}
	if !secureBoot {
		m.Log.Warn("degraded", "reason", degradedWithoutSecureBoot)
	}
	var bound bond
	if a.Seal.Policy == seal.PolicyRollbackProof {
		if bound, err = newBond(tpm, a.Seal.Epoch); err != nil {
			return policy, unfit(err)
		}
	}
	if policy, err = policyOf(a.Seal, secureBoot, bound, m.now); err != nil {
		return policy, err
	}
	return policy, policy.Validate()
}

func unfit(err error) error {
	return fmt.Errorf("this box cannot seal its data volumes, so none is made: %w", err)
}

func (m *Machine) makeSecrets() (*secrets, error) {
	recovery, err := luks2.GenerateRecoveryKey(m.Rand)
	if err != nil {
		return nil, err
	}
	s := &secrets{sealed: make([]byte, secretBytes), management: make([]byte, secretBytes), recovery: recovery}
	for _, b := range [][]byte{s.sealed, s.management} {
		if _, err := io.ReadFull(m.Rand, b); err != nil {
			return nil, fmt.Errorf("read randomness: %w", err)
		}
	}
	return s, nil
}

// seal puts the secret under the policy and tries at once whether it comes back:
// a seal that this very boot cannot open would be found out only at the next.
func (m *Machine) seal(b image.Boot, policy seal.Policy, keys *secrets) (token seal.Token, record seal.Record, err error) {
	srk, err := seal.EnsureSRK(m.tpm)
	if err != nil {
		return token, record, err
	}
	defer srk.Close(m.tpm)
	if srk.Note != "" {
		m.Log.Warn("TPM", "storage key", srk.Note)
	}
	if token, err = seal.Seal(m.tpm, srk, keys.sealed, policy, keys.pin); err != nil {
		return token, record, err
	}
	token.For = slotName(partition.Slot(m.Slot), b.Appliance.Version)
	signatures, err := m.signatures()
	if err != nil {
		return token, record, err
	}
	if err := seal.AddTickets(m.tpm, &token, signatures); err != nil {
		return token, record, err
	}
	back, err := seal.Unseal(m.tpm, token, signatures, keys.pin)
	if err != nil {
		return token, record, fmt.Errorf("a trial unseal is refused, so the next boot would be too: %w", err)
	}
	same := subtle.ConstantTimeCompare(back, keys.sealed) == 1
	luks2.Wipe(back)
	if !same {
		return token, record, errors.New("a trial unseal gives another secret than the one that was sealed: the TPM or the bus to it is faulty")
	}
	now, err := seal.ReadPCRs(m.tpm, recordedPCRs)
	if err != nil {
		return token, record, err
	}
	m.opened, m.secret = &token, bytes.Clone(keys.sealed)
	return token, seal.Record{Policy: policy.Name, PCRs: now, SRKName: srk.Name, Release: b.Appliance.Name + " " + b.Appliance.Version}, nil
}

// makeVolume writes all of a volume but its first sector, with a file system
// and the management key inside.
func (m *Machine) makeVolume(v *volume, all []boxVolume, i int, keys *secrets, token seal.Token, record seal.Record) (err error) {
	v.method = "provisioned"
	v.key = make([]byte, luks2.KeyBytes(v.Volume.Integrity))
	if _, err := io.ReadFull(m.Rand, v.key); err != nil {
		return fmt.Errorf("read randomness: %w", err)
	}
	if v.header, err = m.newHeader(v, all, i, keys, token, record); err != nil {
		return err
	}
	if err := v.header.WriteNew(v.Device); err != nil {
		return err
	}
	if v.header.Integrity() != "" {
		if err := m.Storage.Authenticate(v.Partition, v.header, v.key, progressOf(m.Log, v.Name)); err != nil {
			return err
		}
	}
	if v.device, err = m.Storage.Map(v.Partition, v.header, v.key); err != nil {
		return err
	}
	if err := m.Storage.MakeFS(v.device, v.Name); err != nil {
		return err
	}
	if err := m.mount(v); err != nil {
		return err
	}
	passphrase := managementPassphrase(keys.management)
	defer luks2.Wipe(passphrase)
	if err := m.keepSecret(v, managementKeyFile, passphrase); err != nil || keys.pin == nil {
		return err
	}
	return m.keepSecret(v, pinFile, keys.pin)
}

func (m *Machine) newHeader(v *volume, all []boxVolume, i int, keys *secrets, token seal.Token, record seal.Record) (*luks2.Header, error) {
	h, err := luks2.Format(luks2.FormatOptions{
		UUID: all[i].UUID, Label: v.Name, Subsystem: "holdfast", SizeBytes: v.Device.Size(), Rand: m.Rand, Integrity: v.Volume.Integrity,
	}, v.key)
	if err != nil {
		return nil, err
	}
	recovery := keys.recovery.Passphrase()
	sealed := seal.Passphrase(keys.sealed)
	management := managementPassphrase(keys.management)
	defer func() {
		for _, b := range [][]byte{recovery, sealed, management} {
			luks2.Wipe(b)
		}
	}()
	slot, err := h.AddKeyslot(v.key, recovery, luks2.RecoveryKDF(m.RecoveryMemoryKiB), m.Rand)
	if err != nil {
		return nil, err
	}
	if _, err := h.SetToken(luks2.NextToken, luks2.RecoveryToken(slot)); err != nil {
		return nil, err
	}
	if slot, err = h.AddKeyslot(v.key, sealed, luks2.HighEntropyKDF(), m.Rand); err != nil {
		return nil, err
	}
	token.Keyslots, token.VolumeMAC = []string{strconv.Itoa(slot)}, volumeMAC(keys.sealed, v.key)
	raw, err := token.Marshal()
	if err != nil {
		return nil, err
	}
	if _, err := h.SetToken(luks2.NextToken, raw); err != nil {
		return nil, err
	}
	if raw, err = record.Marshal(); err != nil {
		return nil, err
	}
	if _, err := h.SetToken(luks2.NextToken, raw); err != nil {
		return nil, err
	}
	if raw, err = boxNote(v.key, all[i], all); err != nil {
		return nil, err
	}
	if _, err := h.SetToken(luks2.NextToken, raw); err != nil {
		return nil, err
	}
	_, err = h.AddKeyslot(v.key, management, luks2.HighEntropyKDF(), m.Rand)
	return h, err
}

func managementPassphrase(key []byte) []byte {
	return base64.StdEncoding.AppendEncode(nil, key)
}

// keepSecret puts a secret on the volume itself and syncs.
func (m *Machine) keepSecret(v *volume, name string, secret []byte) (err error) {
	dir := filepath.Join(m.Root, v.Volume.Mount, stateFolder)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(secret); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return errors.Join(syncFolder(dir), syncFolder(filepath.Dir(dir)))
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func randomUUID(r io.Reader) (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", fmt.Errorf("read randomness: %w", err)
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // RFC 9562 version 4
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}
