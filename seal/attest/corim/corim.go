// Package corim writes the reference values of releases as a CoRIM, a Concise Reference
// Integrity Manifest: draft-ietf-rats-corim-10, in CBOR (RFC 8949 §4.2, deterministic).
// Call [Marshal], and [Sign] to sign it with the vendor's key.
//
// Subset: one CoRIM with one CoMID for each release, whose environment is the
// product and the version, with reference triples. The measurement with integrity
// registers has PCR 11, behind the phase "leave-initrd", and PCR 12; those with the key
// 4 have the programs whose digests are extended into PCR 4.
//
// It is an export only: the draft still moves, and what this project itself believes is
// the manifest. A signed one says who made it and in its header not for how long. The
// Veraison project's library of CoRIM would bring JSON web keys and two dozen modules; it
// judges the tests. Its library of COSE makes the signatures.
package corim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Tags and keys: draft-ietf-rats-corim-10 §12.
const (
	tagCoRIM = 501
	tagCoMID = 506

	corimID   = 0
	corimTags = 1

	comidIdentity = 1
	comidTriples  = 4
	identityID    = 0
	identityNo    = 1
	referenceList = 0

	environmentClass = 0
	classModel       = 2

	measurementKey      = 0
	measurementValue    = 1
	valueVersion        = 0
	valueDigests        = 2
	valueRegisters      = 14
	versionText         = 0
	versionScheme       = 1
	schemeMultipartNum  = 1 // CoSWID version scheme "multipartnumeric"
	namedInfoSHA256     = 1 // IANA Named Information Hash Algorithm Registry
	programsRegister    = 4
	kernelRegister      = 11
	commandLineRegister = 12
)

// phases are those behind which a box answers.
const phases = 2

// Marshal is the CoRIM of these releases, named id. The same releases give the same bytes.
func Marshal(id string, releases []attest.Reference) ([]byte, error) {
	if id == "" || len(releases) == 0 {
		return nil, errors.New("marshal CoRIM: no name or no release")
	}
	var tags []any
	for _, r := range releases {
		comid, err := comidOf(r)
		if err != nil {
			return nil, fmt.Errorf("marshal CoRIM: release %s %s: %w", r.Product, r.Version, err)
		}
		tags = append(tags, tagged{tagCoMID, encode(nil, comid)})
	}
	return encode(nil, tagged{tagCoRIM, fields{corimID: id, corimTags: tags}}), nil
}

// comidOf is a concise-mid-tag.
func comidOf(r attest.Reference) (fields, error) {
	if r.Boot.PCR11 == (pcr.Digest{}) || r.Product == "" || r.Version == "" {
		return nil, errors.New("it has no name, no version or no value of PCR 11")
	}
	kernel := r.Boot.PCR11
	for _, phase := range pcr.Phases()[:phases] {
		kernel = pcr.Extend(kernel, []byte(phase))
	}
	measurements := []any{fields{measurementValue: fields{
		valueVersion:   fields{versionText: r.Version, versionScheme: uint64(schemeMultipartNum)},
		valueRegisters: fields{kernelRegister: digests(kernel), commandLineRegister: digests(r.Boot.PCR12)},
	}}}
	for _, program := range []pcr.Digest{r.Boot.Loader.Authenticode, r.Boot.UKI.Authenticode} {
		if program != (pcr.Digest{}) {
			measurements = append(measurements, fields{measurementKey: uint64(programsRegister), measurementValue: fields{valueDigests: digests(program)}})
		}
	}
	environment := fields{environmentClass: fields{classModel: r.Product + " " + r.Version}}
	return fields{
		comidIdentity: fields{identityID: r.Product + " " + r.Version, identityNo: uint64(0)},
		comidTriples:  fields{referenceList: []any{[]any{environment, measurements}}},
	}, nil
}

func digests(d pcr.Digest) []any { return []any{[]any{uint64(namedInfoSHA256), d[:]}} }

// fields is a map with small unsigned keys.
type fields map[uint64]any

// tagged is a value behind a tag.
type tagged struct {
	tag   uint64
	value any
}

// Major types: RFC 8949 §3.1.
const (
	majorUnsigned = 0
	majorBytes    = 2
	majorText     = 3
	majorArray    = 4
	majorMap      = 5
	majorTag      = 6
)

func encode(b []byte, v any) []byte {
	switch v := v.(type) {
	case uint64:
		return head(b, majorUnsigned, v)
	case []byte:
		return append(head(b, majorBytes, uint64(len(v))), v...)
	case string:
		return append(head(b, majorText, uint64(len(v))), v...)
	case []any:
		b = head(b, majorArray, uint64(len(v)))
		for _, e := range v {
			b = encode(b, e)
		}
		return b
	case fields:
		b = head(b, majorMap, uint64(len(v)))
		for _, key := range sortedKeys(v) {
			b = encode(head(b, majorUnsigned, key), v[key])
		}
		return b
	case tagged:
		return encode(head(b, majorTag, v.tag), v.value)
	}
	panic(fmt.Sprintf("a %T in a CoRIM", v)) // our own values
}

func sortedKeys(f fields) []uint64 {
	return slices.Sorted(maps.Keys(f))
}

// head is the initial byte and the argument, in the shortest form. RFC 8949 §3.
func head(b []byte, major byte, n uint64) []byte {
	major <<= 5
	switch {
	case n < 24:
		return append(b, major|byte(n))
	case n < 1<<8:
		return append(b, major|24, byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(n))
	case n < 1<<32:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), n)
}
