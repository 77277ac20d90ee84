// Command corim has Veraison's library read a CoRIM on standard input, and prints what
// it finds.
//
// The library, 1.1.2, has tags in the form before draft-ietf-rats-corim-10: a byte
// string with the tag inside instead of outside, and no tag 501. So the outermost two
// layers are taken off here. With a public key in PEM as its argument, the CoRIM is a
// signed one: the library of COSE verifies it, that of CoRIM reads who signed.
package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/corim/comid"
	"github.com/veraison/corim/corim"
	"github.com/veraison/go-cose"
)

func main() {
	if err := judge(); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func judge() error {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	if len(os.Args) > 1 {
		if in, err = opened(in, os.Args[1]); err != nil {
			return err
		}
	}
	var outer cbor.RawTag
	if err := cbor.Unmarshal(in, &outer); err != nil {
		return err
	}
	var whole struct {
		ID   string        `cbor:"0,keyasint"`
		Tags []cbor.RawTag `cbor:"1,keyasint"`
	}
	if err := cbor.Unmarshal(outer.Content, &whole); err != nil {
		return err
	}
	if outer.Number != 501 {
		return errors.New("not tag 501")
	}
	theirs := corim.NewUnsignedCorim().SetID(whole.ID)
	fmt.Printf("corim %s: %d tags\n", whole.ID, len(whole.Tags))
	for _, tag := range whole.Tags {
		var content []byte
		if err := cbor.Unmarshal(tag.Content, &content); err != nil {
			return err
		}
		if tag.Number != 506 {
			return errors.New("not tag 506")
		}
		var c comid.Comid
		if err := c.FromCBOR(content); err != nil {
			return err
		}
		if err := c.Valid(); err != nil {
			return err
		}
		if theirs.AddComid(c) == nil {
			return errors.New("the CoMID cannot be added to a CoRIM")
		}
		if err := show(c); err != nil {
			return err
		}
	}
	return theirs.Valid()
}

// opened verifies a COSE_Sign1 and is its payload.
func opened(in []byte, file string) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("no public key in " + file)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	m := cose.NewSign1Message()
	if err := m.UnmarshalCBOR(in); err != nil {
		return nil, err
	}
	algorithm, err := m.Headers.Protected.Algorithm()
	if err != nil {
		return nil, err
	}
	verifier, err := cose.NewVerifier(algorithm, key)
	if err != nil {
		return nil, err
	}
	if err := m.Verify(corim.NoExternalData, verifier); err != nil {
		return nil, err
	}
	header, ok := m.Headers.Protected[corim.HeaderLabelCorimMeta].([]byte)
	if !ok || m.Headers.Protected[cose.HeaderLabelContentType] != corim.ContentType {
		return nil, errors.New("its header is not that of a CoRIM")
	}
	var meta corim.Meta
	if err := meta.FromCBOR(header); err != nil {
		return nil, err
	}
	if err := meta.Valid(); err != nil {
		return nil, err
	}
	fmt.Printf("signed by %s, %v, key %x\n", meta.Signer.Name, algorithm, m.Headers.Protected[cose.HeaderLabelKeyID])
	return m.Payload, nil
}

func show(c comid.Comid) error {
	for _, v := range *c.Triples.ReferenceValues {
		fmt.Printf("%s: model %s\n", c.TagIdentity.TagID.String(), *v.Environment.Class.Model)
		for _, m := range v.Measurements {
			if m.Key != nil {
				key, err := m.Key.GetKeyUint()
				if err != nil {
					return err
				}
				for _, d := range *m.Val.Digests {
					fmt.Printf("key %d: sha-256 %x\n", key, d.HashValue)
				}
			}
			if m.Val.IntegrityRegisters == nil {
				continue
			}
			text, err := json.Marshal(m.Val.IntegrityRegisters)
			if err != nil {
				return err
			}
			fmt.Printf("%s\n", text)
		}
	}
	return nil
}
