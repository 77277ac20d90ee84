package agent

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/holdfast-os/holdfast/seal/luks2"
)

// The volumes of a box are bound to each other and to their names (F80), by a note in
// each header with a MAC under that volume's own key. It is verified when the volume
// has opened and before its file system is looked at. Who knows no volume key can
// neither make such a note nor move a volume of ours to another place. Who makes a
// volume of his own makes a note for it as well: against him stand the secret that
// the TPM gives (see checkReleased), and PCR 15.

// boxTokenType is the LUKS2 token type of the note.
const boxTokenType = "holdfast-box"

const (
	boxFormat       = 1
	boxMACLabel     = "holdfast box 1"
	volumeMACLabel  = "holdfast volume 1"
	maxBoxNoteBytes = 8 << 10
)

// boxVolume is one volume of a box. The first one's UUID is the box's.
type boxVolume struct {
	Name string `json:"name"`
	UUID string `json:"uuid"`
}

// boxToken is the note: all volumes of the box, as they were provisioned together.
type boxToken struct {
	Type     string      `json:"type"`
	Keyslots []string    `json:"keyslots"`
	Format   int         `json:"format"`
	Volumes  []boxVolume `json:"volumes"`
	MAC      []byte      `json:"mac"`
}

// nameVolumes chooses the UUIDs of volumes that are made together.
func nameVolumes(vols []*volume, random io.Reader) ([]boxVolume, error) {
	list := make([]boxVolume, len(vols))
	for i, v := range vols {
		uuid, err := randomUUID(random)
		if err != nil {
			return nil, err
		}
		list[i] = boxVolume{v.Name, uuid}
	}
	return list, nil
}

// boxNote is the token for one volume's header.
func boxNote(volumeKey []byte, own boxVolume, all []boxVolume) (json.RawMessage, error) {
	return json.Marshal(boxToken{
		Type: boxTokenType, Keyslots: []string{}, Format: boxFormat, Volumes: all, MAC: boxMAC(volumeKey, own, all),
	})
}

// boxMAC is HMAC-SHA256 under the volume key over the label, the volume's name and
// UUID, and those of all volumes, each text behind its length in 32 bits, big-endian.
func boxMAC(volumeKey []byte, own boxVolume, all []boxVolume) []byte {
	mac := hmac.New(sha256.New, volumeKey)
	text := func(s string) {
		mac.Write(binary.BigEndian.AppendUint32(nil, uint32(len(s))))
		mac.Write([]byte(s))
	}
	text(boxMACLabel)
	for _, v := range append([]boxVolume{own}, all...) {
		text(v.Name)
		text(v.UUID)
	}
	return mac.Sum(nil)
}

// checkBox wants the open volumes to be those that were provisioned together, each in
// its place. A release may use fewer of them than there are.
func checkBox(vols []*volume) error {
	var first []boxVolume
	for _, v := range vols {
		note, err := v.boxNote()
		if err == nil && first != nil && !slices.Equal(note.Volumes, first) {
			err = fmt.Errorf("it was made together with others than data volume %s", vols[0].Name)
		}
		if err != nil {
			return fmt.Errorf("data volume %s is not used: %w. Innocent: the disk was put together from the backups of several boxes, or partitions were moved. "+
				"Hostile: somebody put another volume in its place", v.Name, err)
		}
		first = note.Volumes
	}
	return nil
}

// boxNote is the volume's note, verified.
func (v *volume) boxNote() (note boxToken, err error) {
	if label := v.header.Label(); label != v.Name {
		return note, fmt.Errorf("in its place is a volume that was made as %q", label)
	}
	found := 0
	for _, raw := range v.header.Tokens() {
		if tokenType(raw) != boxTokenType {
			continue
		}
		if found++; len(raw) > maxBoxNoteBytes {
			return note, fmt.Errorf("the note of the box's volumes has %d bytes, more than %d", len(raw), maxBoxNoteBytes)
		}
		if err := json.Unmarshal(raw, &note); err != nil {
			return note, fmt.Errorf("the note of the box's volumes: %w", err)
		}
	}
	own := boxVolume{v.Name, v.header.UUID()}
	switch {
	case found != 1:
		return note, fmt.Errorf("its header has %d notes of which volumes belong together, not 1", found)
	case note.Format != boxFormat:
		return note, fmt.Errorf("the note of the box's volumes has format %d, and this release knows %d", note.Format, boxFormat)
	case !hmac.Equal(note.MAC, boxMAC(v.key, own, note.Volumes)):
		return note, errors.New("the note of the box's volumes was not made with this volume's key, or is of another volume")
	case !slices.Contains(note.Volumes, own):
		return note, errors.New("it is not on the box's list of volumes")
	}
	return note, nil
}

// volumeMAC ties the TPM's secret to the key of a volume that it opens.
func volumeMAC(secret, volumeKey []byte) []byte {
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(volumeMACLabel))
	mac.Write(volumeKey)
	return mac.Sum(nil)
}

// checkReleased is for a volume that the recovery key opened although the TPM had given
// its secret. Where the TPM's keyslot is damaged, the MAC beside it shows that the
// secret is this volume's all the same. Who puts a volume of his own under our tokens
// does not know the secret, so he cannot make the MAC, and his key opens nothing here.
func (m *Machine) checkReleased(v *volume) error {
	if m.opened == nil {
		return nil
	}
	want := volumeMAC(m.secret, v.key)
	defer luks2.Wipe(want)
	for _, t := range tpmTokens(v.header) {
		if sameBlob(t.Token, *m.opened) && hmac.Equal(t.VolumeMAC, want) {
			return nil
		}
	}
	return fmt.Errorf("data volume %s is not used: the TPM gave its key, and that is the key of another volume than this one. "+
		"Innocent: its header was restored from the backup of another box. Hostile: somebody put another volume in its place", v.Name)
}
