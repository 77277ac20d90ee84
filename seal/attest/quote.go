package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"github.com/holdfast-os/holdfast/seal/pcr"
)

// quote is a TPMS_ATTEST of a TPM2_Quote. TPM 2.0 Part 2 §10.12.12. It is read here and
// not by go-tpm, whose reader takes what a TPM would never write.
type quote struct {
	Signer          []byte // qualified name
	ExtraData       []byte
	ClockMs         uint64
	ResetCount      uint32
	RestartCount    uint32
	Safe            bool
	FirmwareVersion uint64
	Selections      []selection
	Digest          []byte
}

// selection is a TPMS_PCR_SELECTION.
type selection struct {
	Hash   uint16
	Bitmap []byte
}

const (
	generated   = 0xff544347 // TPM_GENERATED_VALUE
	attestQuote = 0x8018     // TPM_ST_ATTEST_QUOTE
	maxBanks    = 16
)

// marshal is the inverse of parseQuote.
func (q *quote) marshal() []byte {
	two := func(b, x []byte) []byte { return append(binary.BigEndian.AppendUint16(b, uint16(len(x))), x...) }
	b := binary.BigEndian.AppendUint32(nil, generated)
	b = binary.BigEndian.AppendUint16(b, attestQuote)
	b = two(two(b, q.Signer), q.ExtraData)
	b = binary.BigEndian.AppendUint64(b, q.ClockMs)
	b = binary.BigEndian.AppendUint32(b, q.ResetCount)
	b = binary.BigEndian.AppendUint32(b, q.RestartCount)
	safe := byte(0)
	if q.Safe {
		safe = 1
	}
	b = binary.BigEndian.AppendUint64(append(b, safe), q.FirmwareVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(len(q.Selections)))
	for _, s := range q.Selections {
		b = binary.BigEndian.AppendUint16(b, s.Hash)
		b = append(append(b, byte(len(s.Bitmap))), s.Bitmap...)
	}
	return two(b, q.Digest)
}

func parseQuote(b []byte) (*quote, error) {
	r := &cutter{rest: b}
	magic, kind := r.number32(), r.number16()
	q := &quote{Signer: r.sized(), ExtraData: r.sized(), ClockMs: binary.BigEndian.Uint64(r.bytes(8)),
		ResetCount: r.number32(), RestartCount: r.number32()}
	safe := r.bytes(1)[0]
	q.Safe, q.FirmwareVersion = safe == 1, binary.BigEndian.Uint64(r.bytes(8))
	n := r.number32()
	if n > maxBanks {
		return nil, fmt.Errorf("it selects registers of %d banks", n)
	}
	for range n {
		s := selection{Hash: r.number16()}
		s.Bitmap = r.bytes(int(r.bytes(1)[0]))
		q.Selections = append(q.Selections, s)
	}
	q.Digest = r.sized()
	switch {
	case r.short:
		return nil, fmt.Errorf("it ends too early, with %d bytes", len(b))
	case len(r.rest) != 0:
		return nil, fmt.Errorf("%d bytes follow its end", len(r.rest))
	case magic != generated:
		return nil, fmt.Errorf("it begins with 0x%08x: no TPM made it", magic)
	case kind != attestQuote:
		return nil, fmt.Errorf("it is an attestation of type 0x%04x, not a quote", kind)
	case safe > 1:
		return nil, fmt.Errorf("its flag \"safe\" is %d", safe)
	}
	return q, nil
}

// cutter cuts bytes off; past the end it gives zeros.
type cutter struct {
	rest  []byte
	short bool
}

func (r *cutter) bytes(n int) []byte {
	if n > len(r.rest) {
		r.short, r.rest = true, nil
		return make([]byte, n) // at most 65535
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

func (r *cutter) number16() uint16 { return binary.BigEndian.Uint16(r.bytes(2)) }

func (r *cutter) number32() uint32 { return binary.BigEndian.Uint32(r.bytes(4)) }

// sized is a TPM2B: a size of 16 bits and that many bytes.
func (r *cutter) sized() []byte { return r.bytes(int(r.number16())) }

// selects says whether the quote is over exactly these registers of the SHA-256 bank.
func (q *quote) selects(registers []int) bool {
	var want [pcr.Count / 8]byte
	for _, p := range registers {
		want[p/8] |= 1 << (p % 8)
	}
	return len(q.Selections) == 1 && q.Selections[0].Hash == uint16(tpm2.TPMAlgSHA256) &&
		bytes.Equal(bytes.TrimRight(q.Selections[0].Bitmap, "\x00"), bytes.TrimRight(want[:], "\x00"))
}

// selected lists what the quote is over.
func (q *quote) selected() string {
	text := ""
	for _, s := range q.Selections {
		var pcrs []int
		for i := range 8 * len(s.Bitmap) {
			if s.Bitmap[i/8]&(1<<(i%8)) != 0 {
				pcrs = append(pcrs, i)
			}
		}
		text += fmt.Sprintf(" %v of %v", pcrs, pcr.Hash(s.Hash))
	}
	if text == "" {
		return " nothing"
	}
	return text
}

// nameOf is the TPM's name of a public area with SHA-256. Part 1 §16.
func nameOf(public []byte) []byte {
	sum := sha256.Sum256(public)
	return append([]byte{0, byte(tpm2.TPMAlgSHA256)}, sum[:]...)
}

// verifySignature checks a TPMT_SIGNATURE over a message: Part 2 §11.3.4. RSASSA,
// RSAPSS and ECDSA with SHA-256 are known.
func verifySignature(key crypto.PublicKey, signature, message []byte) error {
	if len(signature) > maxStructureBytes {
		return fmt.Errorf("a signature of %d bytes", len(signature))
	}
	r := &cutter{rest: signature}
	alg, hash := tpm2.TPMAlgID(r.number16()), tpm2.TPMAlgID(r.number16())
	first, second := r.sized(), []byte(nil)
	if alg == tpm2.TPMAlgECDSA {
		second = r.sized()
	}
	if r.short || len(r.rest) != 0 || hash != tpm2.TPMAlgSHA256 {
		return errors.New("it is not a TPM's signature with SHA-256")
	}
	digest := sha256.Sum256(message)
	good := false
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		if alg != tpm2.TPMAlgECDSA || len(first) > 32 || len(second) > 32 {
			return errors.New("the signature is not ECDSA with SHA-256 and P-256")
		}
		good = ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(first), new(big.Int).SetBytes(second))
	case *rsa.PublicKey:
		switch alg {
		case tpm2.TPMAlgRSASSA:
			good = rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], first) == nil
		case tpm2.TPMAlgRSAPSS:
			good = rsa.VerifyPSS(key, crypto.SHA256, digest[:], first, nil) == nil
		default:
			return errors.New("the signature is neither RSASSA nor RSAPSS with SHA-256")
		}
	}
	if !good {
		return errors.New("the signature was not made with this key over this quote")
	}
	return nil
}
