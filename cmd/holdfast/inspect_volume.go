package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// States of a data volume.
const (
	stateUnprovisioned = "unprovisioned"
	stateLUKS2         = "luks2"
	stateDamaged       = "damaged"
)

// volume is a data volume, whole or not made yet.
type volume struct {
	Type       string    `json:"type"` // "luks2", "volume"
	State      string    `json:"state"`
	Damage     string    `json:"damage,omitempty"`
	SizeBytes  int64     `json:"size_bytes"`
	Label      string    `json:"label,omitempty"`
	UUID       string    `json:"uuid,omitempty"`
	Cipher     string    `json:"cipher,omitempty"`
	Integrity  string    `json:"integrity,omitempty"`
	SectorSize int       `json:"sector_size,omitempty"`
	DataOffset int64     `json:"data_offset,omitempty"`
	DataBytes  int64     `json:"data_bytes,omitempty"`
	Sequence   uint64    `json:"sequence,omitempty"`
	Flags      []string  `json:"flags,omitempty"`
	Keyslots   []keyslot `json:"keyslots,omitempty"`
	Tokens     []token   `json:"tokens,omitempty"`
	Notes      []string  `json:"notes,omitempty"`
}

func (v *volume) wrong() []string { return nil }

type keyslot struct {
	ID       int    `json:"id"`
	Priority int    `json:"priority"`
	KDF      string `json:"kdf"`
	// OpensWith says, by the tokens, what the slot's passphrase is.
	OpensWith string `json:"opens_with"`
}

type token struct {
	ID       int      `json:"id"`
	Type     string   `json:"type"`
	Keyslots []string `json:"keyslots"`
	Meaning  []string `json:"meaning"`
}

func inspectVolume(src source) (artefact, error) {
	v, err := readVolume(src, src.Size())
	if err != nil {
		return nil, err
	}
	return v, nil
}

// readVolume looks at a data volume of sizeBytes. The marker comes first: until
// it goes, a LUKS2 header behind it counts for nothing.
func readVolume(r io.ReaderAt, sizeBytes int64) (*volume, error) {
	fresh, err := partition.Unprovisioned(r)
	if err != nil {
		return nil, err
	}
	if fresh {
		return &volume{Type: "volume", State: stateUnprovisioned, SizeBytes: sizeBytes}, nil
	}
	h, report, err := luks2.Read(r, sizeBytes)
	if err != nil {
		return nil, err
	}
	v := &volume{
		Type: "luks2", State: stateLUKS2, SizeBytes: sizeBytes,
		Label: h.Label(), UUID: h.UUID(), Sequence: h.SeqID(), Flags: h.Flags(),
	}
	v.DataOffset, v.DataBytes, v.SectorSize, v.Cipher = h.Segment()
	v.Integrity = h.Integrity()
	for _, c := range []struct {
		name string
		luks2.CopyReport
	}{{"primary", report.Primary}, {"secondary", report.Secondary}} {
		switch {
		case c.Err != nil:
			v.Notes = append(v.Notes, fmt.Sprintf("%s header copy is damaged, the other one is used: %v", c.name, c.Err))
		case c.Stale:
			v.Notes = append(v.Notes, fmt.Sprintf("%s header copy is older (sequence %d); an interrupted change, repaired at the next start", c.name, c.SeqID))
		}
	}
	v.readTokens(h.Tokens())
	for _, k := range h.Keyslots() {
		v.Keyslots = append(v.Keyslots, keyslot{ID: k.ID, Priority: k.Priority, KDF: kdfText(k.KDF), OpensWith: v.opensWith(k.ID)})
	}
	return v, nil
}

func kdfText(k luks2.KDF) string {
	if k.Type == luks2.Argon2id {
		return fmt.Sprintf("argon2id, %s, passes %d, lanes %d", bytesText(int64(k.MemoryKiB)<<10), k.Time, k.Parallel)
	}
	return fmt.Sprintf("%s-%s, %d iterations", k.Type, k.Hash, k.Iterations)
}

// Token types that need no parsing. systemd-recovery is systemd's.
const recoveryType = "systemd-recovery"

func (v *volume) readTokens(raw map[int]json.RawMessage) {
	var record *seal.Record
	for _, id := range slices.Sorted(maps.Keys(raw)) {
		if r, err := seal.ParseRecord(raw[id]); err == nil {
			record = &r
		}
	}
	for _, id := range slices.Sorted(maps.Keys(raw)) {
		t := token{ID: id, Keyslots: []string{}}
		var head struct {
			Type     string   `json:"type"`
			Keyslots []string `json:"keyslots"`
		}
		if err := json.Unmarshal(raw[id], &head); err != nil {
			t.Meaning = []string{"cannot be read: " + err.Error()}
		} else {
			t.Type, t.Keyslots = head.Type, append(t.Keyslots, head.Keyslots...)
			t.Meaning = tokenMeaning(head.Type, raw[id], record)
		}
		v.Tokens = append(v.Tokens, t)
	}
}

// tokenMeaning explains a token in sentences.
func tokenMeaning(kind string, raw []byte, record *seal.Record) []string {
	switch kind {
	case recoveryType:
		return []string{"a recovery key, shown or escrowed when it was made"}
	case seal.TokenType, seal.OwnTokenType:
		t, err := seal.ParseToken(raw)
		if err != nil {
			return []string{"sealed to a TPM in a way that this program does not open: " + err.Error()}
		}
		text := "sealed to this machine's TPM; opens only with:"
		if t.For != "" {
			text = fmt.Sprintf("sealed to this machine's TPM for %q; opens only with:", t.For)
		}
		return append([]string{text}, boundTo(t, record)...)
	case boxType:
		return boxMeaning(raw)
	case seal.RecordType:
		r, err := seal.ParseRecord(raw)
		if err != nil {
			return []string{"cannot be read: " + err.Error()}
		}
		lines := []string{fmt.Sprintf("state when sealed, for explanations only: policy %s, release %s", r.Policy, r.Release)}
		for _, i := range slices.Sorted(maps.Keys(r.PCRs)) {
			value := r.PCRs[i]
			lines = append(lines, fmt.Sprintf("PCR %s: was %s", pcr.Label(i), hex.EncodeToString(value[:])))
		}
		return lines
	}
	return []string{"of a type that this program does not know; left alone"}
}

// boundTo lists what a sealed token is bound to. A token holds no PCR values, only
// the digest of a policy; the record's values are shown when they give that digest.
func boundTo(t seal.Token, record *seal.Record) (lines []string) {
	if record == nil {
		_, lines = t.Describe("")
	} else {
		_, lines = t.Describe(record.Policy, record.PCRs)
	}
	return lines
}

// boxType is the agent's note of which volumes belong together.
const boxType = "holdfast-box"

func boxMeaning(raw []byte) []string {
	var note struct {
		Volumes []struct{ Name, UUID string }
	}
	if err := json.Unmarshal(raw, &note); err != nil {
		return []string{"cannot be read: " + err.Error()}
	}
	lines := []string{"the volumes of the box, which were made together, with a MAC under this volume's key:"}
	for _, v := range note.Volumes {
		lines = append(lines, fmt.Sprintf("%q, UUID %q", v.Name, v.UUID))
	}
	return lines
}

func (v *volume) opensWith(id int) string {
	for _, t := range v.Tokens {
		if !slices.Contains(t.Keyslots, strconv.Itoa(id)) {
			continue
		}
		switch t.Type {
		case recoveryType:
			return "the recovery key"
		case seal.TokenType, seal.OwnTokenType:
			return "the TPM"
		}
		return "token " + strconv.Itoa(t.ID)
	}
	return "a passphrase or management key"
}

// summary is the state in a few words.
func (v *volume) summary() string {
	switch v.State {
	case stateUnprovisioned:
		return "not made yet; the first boot makes and seals it"
	case stateDamaged:
		return "DAMAGED: " + v.Damage
	}
	return fmt.Sprintf("LUKS2 %s, %d keyslots, %d tokens", v.UUID, len(v.Keyslots), len(v.Tokens))
}

func (v *volume) print(s *sheet) {
	if v.State != stateLUKS2 {
		s.line(fmt.Sprintf("data volume, %s: %s", bytesText(v.SizeBytes), v.summary()))
		return
	}
	s.line(fmt.Sprintf("LUKS2 volume, %s", bytesText(v.SizeBytes)))
	s.fact("label", v.Label)
	s.fact("UUID", v.UUID)
	s.fact("cipher", fmt.Sprintf("%s, %d-bit key, sectors of %d bytes", v.Cipher, 8*luks2.KeyBytes(v.Integrity), v.SectorSize))
	s.fact("integrity", v.Integrity)
	s.fact("data"+when(v.Integrity != "", ", tags and journal"), fmt.Sprintf("%s from byte %d", bytesText(v.DataBytes), v.DataOffset))
	s.fact("flags", strings.Join(v.Flags, " "))
	for i, k := range v.Keyslots {
		s.fact(when(i == 0, "keyslots"), strconv.Itoa(k.ID)+": "+k.OpensWith, k.KDF)
	}
	for i, t := range v.Tokens {
		for j, line := range t.Meaning {
			if j == 0 {
				line = fmt.Sprintf("%d: %s: %s", t.ID, t.Type, line)
			} else {
				line = "   " + line
			}
			s.fact(when(i == 0 && j == 0, "tokens"), line)
		}
	}
	s.facts("note", v.Notes...)
}

// damagedVolume is a data volume that is neither made nor unmade.
func damagedVolume(sizeBytes int64, err error) *volume {
	text := err.Error()
	if errors.Is(err, luks2.ErrNoHeader) {
		text = "neither the mark of a volume to be made nor a LUKS2 header"
	}
	return &volume{Type: "volume", State: stateDamaged, Damage: text, SizeBytes: sizeBytes}
}
