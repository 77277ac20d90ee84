package seal

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// RecordType is the LUKS2 token type of a [Record].
const RecordType = "holdfast-state"

const (
	recordFormat   = 1 // F55: from the start
	maxRecordBytes = 16 << 10
)

// Record is what was true when a volume's keys were sealed: it opens nothing
// and is there to explain, later, why they do not open. It is not secret and
// not authenticated; never take a decision on it alone.
type Record struct {
	Policy  string             // [Policy.Name]
	PCRs    map[int]pcr.Digest // all that were read, bound or not
	SRKName []byte
	Release string // version of the release that sealed
}

type recordJSON struct {
	Type     string            `json:"type"`
	Keyslots []string          `json:"keyslots"`
	Format   int               `json:"format"`
	Policy   string            `json:"policy"`
	PCRs     map[string]string `json:"pcrs"`
	SRKName  string            `json:"srk_name"`
	Release  string            `json:"release"`
}

// Marshal is the record as a LUKS2 token that belongs to no keyslot.
func (r Record) Marshal() ([]byte, error) {
	j := recordJSON{
		Type: RecordType, Keyslots: []string{}, Format: recordFormat,
		Policy: r.Policy, PCRs: map[string]string{}, SRKName: hex.EncodeToString(r.SRKName), Release: r.Release,
	}
	for i, v := range r.PCRs {
		j.PCRs[strconv.Itoa(i)] = hex.EncodeToString(v[:])
	}
	return json.Marshal(j)
}

// ParseRecord reads a "holdfast-state" token.
func ParseRecord(b []byte) (Record, error) {
	if len(b) > maxRecordBytes {
		return Record{}, fmt.Errorf("state token: %d bytes, at most %d expected", len(b), maxRecordBytes)
	}
	var j recordJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return Record{}, fmt.Errorf("state token: %w", err)
	}
	if j.Type != RecordType || j.Format != recordFormat {
		return Record{}, fmt.Errorf("state token: type %q, format %d; want %q, %d", j.Type, j.Format, RecordType, recordFormat)
	}
	r := Record{Policy: j.Policy, PCRs: map[int]pcr.Digest{}, Release: j.Release}
	var err error
	if r.SRKName, err = hex.DecodeString(j.SRKName); err != nil {
		return Record{}, fmt.Errorf("state token: srk_name: %w", err)
	}
	for name, text := range j.PCRs {
		i, err := strconv.Atoi(name)
		if err != nil || i < 0 || i >= pcr.Count || strconv.Itoa(i) != name {
			return Record{}, fmt.Errorf("state token: PCR %q", name)
		}
		var v pcr.Digest
		if err := decodeHex(v[:], text); err != nil {
			return Record{}, fmt.Errorf("state token: PCR %d: %w", i, err)
		}
		r.PCRs[i] = v
	}
	return r, nil
}
