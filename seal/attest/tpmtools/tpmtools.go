// Package tpmtools reads and writes attestations as go-tpm-tools has them: the
// protobuf message attest.Attestation, which `gotpm attest` writes and its server
// package verifies. Call [Marshal] to have a box's answer judged by them, or [Parse] to
// have [attest.Verify] judge what their client made.
//
// Subset: the AK's public area, one quote over the SHA-256 bank with its values, and the
// event log. The message has no place for a statement, an EK or attachments, so these
// are lost; and the nonce that go-tpm-tools has to be told is that of the quote, [Nonce].
// What else the message may have (AK certificates, GCE's instance, other logs, TEEs) is
// passed over by Parse: nothing here rests on it.
//
// What it does not protect: it verifies nothing.
package tpmtools

import (
	"crypto/sha256"
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// MaxBytes is the longest message that [Parse] reads.
const MaxBytes = 8 << 20

// Numbers of fields: proto/attest.proto and proto/tpm.proto of go-tpm-tools 0.4.9.
const (
	fieldAKPub    = 1 // Attestation
	fieldQuotes   = 2
	fieldEventLog = 3

	fieldQuote  = 1 // Quote
	fieldRawSig = 2
	fieldPCRs   = 3

	fieldHash   = 1 // PCRs
	fieldValues = 2

	fieldKey   = 1 // an entry of a map
	fieldValue = 2

	maxQuotes = 8
)

// Marshal writes an answer. Go-tpm-tools wants the log to lead to every quoted register
// that it has records of, so what the box says it measured itself is put behind the
// firmware's records.
func Marshal(a *attest.Answer) ([]byte, error) {
	selection := registersOf(a)
	if selection == nil {
		return nil, fmt.Errorf("marshal attestation: %d bytes of registers", len(a.Registers))
	}
	values := protowire.AppendVarint(protowire.AppendTag(nil, fieldHash, protowire.VarintType), uint64(pcr.SHA256))
	for i, index := range selection {
		entry := protowire.AppendVarint(protowire.AppendTag(nil, fieldKey, protowire.VarintType), uint64(index))
		entry = appendBytes(entry, fieldValue, a.Registers[i*sha256.Size:(i+1)*sha256.Size])
		values = appendBytes(values, fieldValues, entry)
	}
	quote := appendBytes(appendBytes(appendBytes(nil, fieldQuote, a.Quote), fieldRawSig, a.Signature), fieldPCRs, values)
	log, err := wholeLog(a)
	if err != nil {
		return nil, fmt.Errorf("marshal attestation: %w", err)
	}
	b := appendBytes(appendBytes(nil, fieldAKPub, a.AKPublic), fieldQuotes, quote)
	if len(log) > 0 {
		b = appendBytes(b, fieldEventLog, log)
	}
	return b, nil
}

func appendBytes(b []byte, field protowire.Number, content []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), content)
}

// registersOf are the registers that the answer has values of.
func registersOf(a *attest.Answer) []int {
	if len(a.Registers) == pcr.Count*sha256.Size {
		return attest.AllRegisters()
	}
	if len(a.Registers) == len(attest.Selection())*sha256.Size {
		return attest.Selection()
	}
	return nil
}

// wholeLog is the firmware's log with the box's own measurements behind it.
func wholeLog(a *attest.Answer) ([]byte, error) {
	if a.Statement == nil || len(a.Statement.Measurements) == 0 {
		return a.EventLog, nil
	}
	log, err := pcr.ParseLog(a.EventLog)
	if err != nil || log.Class != pcr.CryptoAgile {
		return a.EventLog, err
	}
	for _, m := range a.Statement.Measurements {
		d, err := m.Digest()
		if err != nil {
			return nil, err
		}
		text := m.Text
		if text == "" {
			text = m.Note
		}
		log.Events = append(log.Events, pcr.Event{PCR: uint32(m.PCR), Type: pcr.EventIPL, Data: []byte(text), Digests: digestsLike(log, d)})
	}
	return log.Marshal(), nil
}

// digestsLike has a digest for every bank of the log, as the format wants it; those of
// the other banks, which are not quoted, are zero.
func digestsLike(log pcr.Log, d pcr.Digest) (list []pcr.TaggedDigest) {
	if len(log.Events) == 0 {
		return []pcr.TaggedDigest{{Alg: pcr.SHA256, Digest: d[:]}}
	}
	for _, tagged := range log.Events[0].Digests {
		digest := make([]byte, len(tagged.Digest))
		if tagged.Alg == pcr.SHA256 {
			digest = d[:]
		}
		list = append(list, pcr.TaggedDigest{Alg: tagged.Alg, Digest: digest})
	}
	return list
}

// Nonce is what the quote was made over, and what go-tpm-tools' verifier must be given:
// for a box's answer the digest that covers challenge and statement.
func Nonce(a *attest.Answer) ([]byte, error) { return a.QualifyingData() }

// Parse reads an attestation. Of several quotes it takes the one over the SHA-256 bank.
// The answer has no statement, EK or attachments. The error is [attest.ErrMalformed].
func Parse(b []byte) (*attest.Answer, error) {
	a, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("attestation of go-tpm-tools: %w: %w", attest.ErrMalformed, err)
	}
	return a, nil
}

func parse(b []byte) (*attest.Answer, error) {
	if len(b) > MaxBytes {
		return nil, fmt.Errorf("it has %d bytes, more than %d", len(b), MaxBytes)
	}
	a, quotes := &attest.Answer{}, 0
	err := each(b, func(field protowire.Number, content []byte) error {
		switch field {
		case fieldAKPub:
			a.AKPublic = content
		case fieldEventLog:
			a.EventLog = content
		case fieldQuotes:
			if quotes++; quotes > maxQuotes {
				return fmt.Errorf("it has more than %d quotes", maxQuotes)
			}
			return readQuote(a, content)
		}
		return nil
	}, nil)
	switch {
	case err != nil:
		return nil, err
	case len(a.Registers) == 0:
		return nil, errors.New("it has no quote over the SHA-256 bank")
	case len(a.EventLog) > attest.MaxLogBytes:
		return nil, fmt.Errorf("its event log has %d bytes, more than %d", len(a.EventLog), attest.MaxLogBytes)
	}
	return a, nil
}

// each calls with each field of a message: bytes for those that have some, and number
// for varints. Other kinds are passed over.
func each(b []byte, bytes func(protowire.Number, []byte) error, number func(protowire.Number, uint64) error) error {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var err error
		switch kind {
		case protowire.BytesType:
			var content []byte
			if content, n = protowire.ConsumeBytes(b); n >= 0 && bytes != nil {
				err = bytes(field, content)
			}
		case protowire.VarintType:
			var value uint64
			if value, n = protowire.ConsumeVarint(b); n >= 0 && number != nil {
				err = number(field, value)
			}
		default:
			n = protowire.ConsumeFieldValue(field, kind, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func readQuote(a *attest.Answer, b []byte) error {
	var quote, signature, pcrs []byte
	err := each(b, func(field protowire.Number, content []byte) error {
		switch field {
		case fieldQuote:
			quote = content
		case fieldRawSig:
			signature = content
		case fieldPCRs:
			pcrs = content
		}
		return nil
	}, nil)
	if err != nil {
		return err
	}
	hash, values, err := readPCRs(pcrs)
	if err != nil || pcr.Hash(hash) != pcr.SHA256 {
		return err
	}
	if len(a.Registers) > 0 {
		return errors.New("it has two quotes over the SHA-256 bank")
	}
	selection := attest.Selection()
	if len(values) == pcr.Count {
		selection = attest.AllRegisters()
	}
	for _, index := range selection {
		v, ok := values[uint64(index)]
		if !ok || len(values) != len(selection) {
			return fmt.Errorf("its quote has values of %d registers; they should be %v, or all", len(values), selection)
		}
		a.Registers = append(a.Registers, v[:]...)
	}
	a.Quote, a.Signature = quote, signature
	return nil
}

func readPCRs(b []byte) (hash uint64, values map[uint64]pcr.Digest, err error) {
	values = map[uint64]pcr.Digest{}
	var odd error // of another bank it does not matter
	err = each(b, func(field protowire.Number, entry []byte) error {
		if field != fieldValues {
			return nil
		}
		var key uint64
		var value []byte
		err := each(entry, func(field protowire.Number, content []byte) error {
			if field == fieldValue {
				value = content
			}
			return nil
		}, func(field protowire.Number, n uint64) error {
			if field == fieldKey {
				key = n
			}
			return nil
		})
		if len(value) != sha256.Size || key >= pcr.Count {
			odd = fmt.Errorf("it has %d bytes for PCR %d", len(value), key)
			return err
		}
		values[key] = pcr.Digest(value)
		return err
	}, func(field protowire.Number, n uint64) error {
		if field == fieldHash {
			hash = n
		}
		return nil
	})
	if err == nil && pcr.Hash(hash) == pcr.SHA256 {
		err = odd
	}
	return hash, values, err
}
