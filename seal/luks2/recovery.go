package luks2

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// modhex is the alphabet whose letters lie on the same keys of most keyboard
// layouts; its order gives the value of each letter.
const modhex = "cbdefghijklnrtuv"

const (
	recoveryKeyBytes = 32
	recoveryGroup    = 8 // letters between dashes
)

// RecoveryKey is 256 random bits that a person can write down and type:
// systemd's recovery key, eight groups of eight letters. [GenerateRecoveryKey]
// and [ParseRecoveryKey] make one; the zero value is not a key.
type RecoveryKey struct{ secret [recoveryKeyBytes]byte }

// GenerateRecoveryKey makes a new key from rand, which in a product is crypto/rand's
// Reader and nothing else (F85).
func GenerateRecoveryKey(rand io.Reader) (*RecoveryKey, error) {
	var k RecoveryKey
	if _, err := io.ReadFull(rand, k.secret[:]); err != nil {
		return nil, fmt.Errorf("generate recovery key: %w", err)
	}
	return &k, nil
}

// String returns the secret in its written form. It is for the person who keeps
// the key; do not format a key into messages.
func (k *RecoveryKey) String() string { return string(k.Passphrase()) }

// Bytes returns the secret itself, which [GenerateRecoveryKey] reads back. The caller
// wipes it.
func (k *RecoveryKey) Bytes() []byte { return bytes.Clone(k.secret[:]) }

// Passphrase returns the bytes that open the keyslot: the written form, lower
// case, with dashes and without a newline, as systemd enrols it. The caller
// wipes them.
func (k *RecoveryKey) Passphrase() []byte {
	out := make([]byte, 0, 2*recoveryKeyBytes+2*recoveryKeyBytes/recoveryGroup-1)
	for i, b := range k.secret {
		if i > 0 && 2*i%recoveryGroup == 0 {
			out = append(out, '-')
		}
		out = append(out, modhex[b>>4], modhex[b&15])
	}
	return out
}

// LogValue keeps the key out of structured logs.
func (k *RecoveryKey) LogValue() slog.Value { return slog.StringValue("recovery key") }

// Wipe overwrites the key.
func (k *RecoveryKey) Wipe() { Wipe(k.secret[:]) }

// ParseRecoveryKey reads what a person typed: case, spaces, line breaks and
// dashes do not matter. The error names the first wrong letter by its group and
// its place there, both counted from 1, or says how many letters there are; it
// holds no other letter of the key.
func ParseRecoveryKey(typed []byte) (*RecoveryKey, error) {
	var k RecoveryKey
	n := 0
	for rest := typed; len(rest) > 0; {
		r, size := utf8.DecodeRune(rest)
		rest = rest[size:]
		if r == '-' || unicode.IsSpace(r) || unicode.Is(unicode.Pd, r) {
			continue
		}
		value := strings.IndexRune(modhex, unicode.ToLower(r))
		if value < 0 {
			k.Wipe()
			return nil, fmt.Errorf("recovery key: group %d, letter %d: %q is not one of the letters %s", n/recoveryGroup+1, n%recoveryGroup+1, r, modhex)
		}
		if n < 2*recoveryKeyBytes {
			k.secret[n/2] |= byte(value) << (4 * (1 - n%2))
		}
		n++
	}
	if n != 2*recoveryKeyBytes {
		k.Wipe()
		return nil, fmt.Errorf("recovery key: %d letters, not %d: eight groups of eight are needed, and group %d is where they end", n, 2*recoveryKeyBytes, (n+recoveryGroup-1)/recoveryGroup)
	}
	return &k, nil
}

// RecoveryToken is the token that tells systemd, and its tools, that a keyslot
// opens with a recovery key.
func RecoveryToken(slot int) json.RawMessage {
	return json.RawMessage(`{"type":"systemd-recovery","keyslots":[` + strconv.Quote(strconv.Itoa(slot)) + `]}`)
}
