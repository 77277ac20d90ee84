package escrow

import (
	"encoding/hex"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/holdfast-os/holdfast/seal/luks2"
)

const (
	shareWord   = "holdfast-share-1"
	secretBytes = 32 + checksumBytes
)

// Share is one holder's part, decrypted. [Escrow.Open] and [ParseShare] make one. To
// carry it to another holder, encrypt [Share.Text] to him: who has Threshold of
// them and the escrow has the key.
type Share struct {
	ID        string // of the escrow
	Threshold int
	X         int // the holder's place, from 1

	value []byte
}

// Text is the share on one line:
//
//	holdfast-share-1 ESCROW-ID THRESHOLD X VALUE-IN-HEX
//
// The caller wipes it.
func (s *Share) Text() []byte {
	b := fmt.Appendf(nil, "%s %s %d %d ", shareWord, s.ID, s.Threshold, s.X)
	return append(hex.AppendEncode(b, s.value), '\n')
}

// LogValue keeps the share out of structured logs.
func (s *Share) LogValue() slog.Value { return slog.StringValue("share of a recovery key") }

// String keeps it out of messages.
func (s *Share) String() string { return "share of a recovery key" }

// Wipe overwrites the share.
func (s *Share) Wipe() { luks2.Wipe(s.value) }

// ParseShare reads what Text writes, and nothing else. No error quotes it.
func ParseShare(text []byte) (*Share, error) {
	line, ended := strings.CutSuffix(string(text), "\n")
	f := strings.Split(line, " ")
	if !ended || len(f) != 5 || f[0] != shareWord || !matches(idForm, f[1]) {
		return nil, fmt.Errorf("this is no share: one is a line of %s, an id, two numbers and %d hex digits", shareWord, 2*secretBytes)
	}
	threshold, err1 := strconv.Atoi(f[2])
	x, err2 := strconv.Atoi(f[3])
	if err1 != nil || err2 != nil || strconv.Itoa(threshold) != f[2] || strconv.Itoa(x) != f[3] ||
		threshold < 1 || threshold > MaxHolders || x < 1 || x > MaxHolders {
		return nil, fmt.Errorf("the share's numbers are not from 1 to %d", MaxHolders)
	}
	value, err := hex.DecodeString(f[4])
	if err != nil || len(value) != secretBytes || strings.ToLower(f[4]) != f[4] {
		luks2.Wipe(value)
		return nil, fmt.Errorf("the share's value is not %d hex digits in lower case", 2*secretBytes)
	}
	return &Share{ID: f[1], Threshold: threshold, X: x, value: value}, nil
}
