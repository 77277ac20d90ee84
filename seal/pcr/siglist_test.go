package pcr

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

// TestAppendByFirmware: OVMF made of its variables what VariableAfter computes.
func TestAppendByFirmware(t *testing.T) {
	b := boots(t, "secure")[1]
	if len(b.Payloads) != 3 {
		t.Fatalf("%d variables were appended to, want KEK, db and dbx", len(b.Payloads))
	}
	for name, payload := range b.Payloads {
		got, err := VariableAfter(b.Before[name], payload, true)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(got, b.After[name]) {
			t.Errorf("%s is computed as\n%x, the firmware has\n%x", name, got, b.After[name])
		}
		again, err := VariableAfter(got, payload, true)
		if err != nil || !bytes.Equal(again, got) {
			t.Errorf("%s: once more, and it has %d bytes instead of %d (%v)", name, len(again), len(got), err)
		}
	}
	// One of four in the first list was there, the second list's all were.
	grown := len(b.After["dbx"]) - len(b.Before["dbx"])
	if first := 28 + 3*48; grown <= first || !bytes.Equal(b.After["dbx"][:len(b.Before["dbx"])], b.Before["dbx"]) {
		t.Errorf("dbx grew by %d bytes; the series does not show what it should", grown)
	}
}

func TestAppendSignatures(t *testing.T) {
	header := signatureList{Type: [16]byte{1}, Header: []byte("head"), SignatureBytes: 17, Signatures: [][]byte{[]byte("0123456789abcdefX"), []byte("0123456789abcdefY")}}
	without := header
	without.Signatures = header.Signatures[1:]
	otherType := header
	otherType.Type = [16]byte{2}
	tests := []struct{ name, current, addition, want string }{
		{"to nothing", "", string(hashList("a", "x", "x")), string(hashList("a", "x", "x"))},
		{"nothing", string(hashList("a", "x")), "", string(hashList("a", "x"))},
		{"known", string(hashList("a", "x", "y")), string(hashList("a", "y")), string(hashList("a", "x", "y"))},
		{"of another owner", string(hashList("a", "x")), string(hashList("b", "x")), string(append(hashList("a", "x"), hashList("b", "x")...))},
		{"twice in the addition", string(hashList("a", "x")), string(hashList("a", "x", "y", "y")), string(append(hashList("a", "x"), hashList("a", "y", "y")...))},
		{"header kept", string(appendSignatureList(nil, signatureList{Type: header.Type, SignatureBytes: 17, Signatures: header.Signatures[:1]})), string(appendSignatureList(nil, header)),
			string(appendSignatureList(appendSignatureList(nil, signatureList{Type: header.Type, SignatureBytes: 17, Signatures: header.Signatures[:1]}), without))},
		{"of another type", string(appendSignatureList(nil, header)), string(appendSignatureList(nil, otherType)), string(appendSignatureList(appendSignatureList(nil, header), otherType))},
		{"an empty list", string(hashList("a", "x")), string(hashList("a")), string(hashList("a", "x"))},
	}
	for _, tt := range tests {
		got, err := AppendSignatures([]byte(tt.current), []byte(tt.addition))
		if err != nil || string(got) != tt.want {
			t.Errorf("%s: %x (%v), want %x", tt.name, got, err, tt.want)
		}
	}
}

// lists of damaged sizes; each differs from a good one in the number named.
func damagedLists() map[string]struct {
	list   []byte
	reason string
} {
	with := func(offset int, value uint32) []byte {
		b := hashList("a", "x", "y")
		binary.LittleEndian.PutUint32(b[offset:], value)
		return b
	}
	type damage = struct {
		list   []byte
		reason string
	}
	return map[string]damage{
		"cut in the header":         {hashList("a")[:27], "27 bytes are left"},
		"cut in a signature":        {hashList("a", "x")[:75], "claims 76 bytes"},
		"garbage behind":            {append(hashList("a", "x"), 1, 2, 3), "list at offset 76: 3 bytes are left"},
		"list of no bytes":          {with(16, 0), "claims 0 bytes"},
		"list of 4 GiB":             {with(16, 0xffffffff), "claims 4294967295 bytes"},
		"header of 4 GiB":           {with(20, 0xffffffff), "a header of 4294967295 more"},
		"header longer than list":   {with(20, 97), "a header of 97 more"},
		"signatures of no bytes":    {with(24, 0), "signatures of 0 each"},
		"signatures of owner alone": {with(24, 16), "signatures of 16 each"},
		"signatures of 4 GiB":       {with(24, 0xffffffff), "signatures of 4294967295 each"},
		"half a signature":          {with(24, 64), "96 bytes of signatures of 64 each"},
		"more than a mebibyte":      {make([]byte, maxVariableBytes+1), "1048576 are the most"},
	}
}

func TestSignatureListsRefused(t *testing.T) {
	for name, d := range damagedLists() {
		if _, err := AppendSignatures(d.list, nil); err == nil || !strings.Contains(err.Error(), "present content") || !strings.Contains(err.Error(), d.reason) {
			t.Errorf("%s, there: %v, want %q", name, err, d.reason)
		}
		if _, err := AppendSignatures(nil, d.list); err == nil || !strings.Contains(err.Error(), "addition") || !strings.Contains(err.Error(), d.reason) {
			t.Errorf("%s, added: %v, want %q", name, err, d.reason)
		}
	}
	big := appendSignatureList(nil, signatureList{SignatureBytes: maxVariableBytes / 2, Signatures: [][]byte{make([]byte, maxVariableBytes/2)}})
	other := slices.Clone(big)
	other[len(other)-1] = 1
	if _, err := AppendSignatures(big, other); err == nil || !strings.Contains(err.Error(), "would have") {
		t.Errorf("two halves and their headers: %v", err)
	}
}

func TestVariableAfter(t *testing.T) {
	b := boots(t, "secure")[1]
	payload := b.Payloads["db"]
	content, err := authenticatedContent(payload)
	if err != nil {
		t.Fatal(err)
	}
	replaced, err := VariableAfter(b.Before["db"], payload, false)
	if err != nil || !bytes.Equal(replaced, content) {
		t.Errorf("replaced: %x (%v), want %x", replaced, err, content)
	}
	deleted, err := VariableAfter(b.Before["db"], payload[:len(payload)-len(content)], false)
	if err != nil || deleted == nil || len(deleted) != 0 {
		t.Errorf("deleted: %x (%v), want nothing, and not nil", deleted, err)
	}
	edit := func(offset int, value byte) []byte {
		p := slices.Clone(payload)
		p[offset] = value
		return p
	}
	for _, tt := range []struct {
		name    string
		payload []byte
		reason  string
	}{
		{"nothing", nil, "0 bytes; its header alone has 40"},
		{"cut in its header", payload[:39], "39 bytes; its header alone has 40"},
		{"a list and no signature", content, "is it a signature list without one?"},
		{"another revision", edit(20, 1), "does not begin with a PKCS #7 signature"},
		{"another type", edit(22, 0), "does not begin with a PKCS #7 signature"},
		{"another kind of signature", edit(24, 0), "does not begin with a PKCS #7 signature"},
		{"signature shorter than its header", slices.Concat(payload[:16], []byte{23, 0, 0, 0}, payload[20:]), "claims 23 bytes"},
		{"signature of 4 GiB", edit(19, 0xff), "are left"},
		{"content cut off", payload[:len(payload)-1], "signature list at offset 0"},
	} {
		for _, appendWrite := range []bool{true, false} {
			if got, err := VariableAfter(nil, tt.payload, appendWrite); err == nil || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("%s: %d bytes and %v, want %q", tt.name, len(got), err, tt.reason)
			}
		}
	}
}

// TestRevokes: by the ways a dbx names things, and not by others.
func TestRevokes(t *testing.T) {
	body, err := asn1.Marshal(struct{ A int }{7})
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := asn1.Marshal(struct{ Body, Rest asn1.RawValue }{asn1.RawValue{FullBytes: body}, asn1.RawValue{FullBytes: body}})
	if err != nil {
		t.Fatal(err)
	}
	p := Program{Authenticode: digestOf("program"), Certificate: sha256.Sum256(certificate)}
	list := func(kind [16]byte, data []byte) []byte {
		return appendSignatureList(nil, signatureList{Type: kind, SignatureBytes: uint32(16 + len(data)), Signatures: [][]byte{append(make([]byte, 16), data...)}})
	}
	bodySum, time := sha256.Sum256(body), make([]byte, 16)
	for _, tt := range []struct {
		name string
		dbx  []byte
		p    Program
		want bool
	}{
		{"nothing", nil, p, false},
		{"the program", hashList("a", "other", "program"), p, true},
		{"another program", hashList("a", "other"), p, false},
		{"a program that is not known", list(typeSHA256, make([]byte, 32)), Program{}, false},
		{"the certificate", list(typeX509, certificate), p, true},
		{"the certificate by its body", list(typeX509SHA256, append(bodySum[:], time...)), p, true},
		{"another certificate by its body", list(typeX509SHA256, append(mustSum(nil), time...)), p, false},
		{"the certificate's digest as a program", list(typeSHA256, p.Certificate[:]), p, false},
		{"no certificate by its body", list(typeX509SHA256, make([]byte, 48)), Program{Authenticode: p.Authenticode}, false},
	} {
		dbx, err := parseSignatureLists(tt.dbx)
		if err != nil {
			t.Fatal(err)
		}
		db, err := parseSignatureLists(list(typeX509, certificate))
		if err != nil {
			t.Fatal(err)
		}
		if got := revokes(dbx, db, tt.p); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	for _, odd := range []string{"", "0", "\x30\x00", "\x30\x80"} {
		if d := certificateBody([]byte(odd)); d != (Digest{}) {
			t.Errorf("%q has the body %x", odd, d)
		}
	}
}

func FuzzAppendSignatures(f *testing.F) {
	b := boots(f, "secure")[1]
	for _, name := range secureBootVariables() {
		f.Add(b.Before[name], b.After[name])
	}
	f.Add(hashList("a", "x", "y"), hashList("a", "y", "z", "z"))
	f.Fuzz(func(t *testing.T, current, addition []byte) {
		lists, err := parseSignatureLists(current)
		if err == nil {
			var again []byte
			for _, l := range lists {
				again = appendSignatureList(again, l)
			}
			if !bytes.Equal(again, current) {
				t.Fatal("encode(decode(current)) != current")
			}
		}
		after, err := AppendSignatures(current, addition)
		if err != nil {
			return
		}
		if !bytes.HasPrefix(after, current) {
			t.Fatal("what was there is not there")
		}
		if len(after) > len(current)+len(addition) {
			t.Fatal("more was appended than was given")
		}
		again, err := AppendSignatures(after, addition)
		if err != nil || !bytes.Equal(again, after) {
			t.Fatalf("once more, and it changes (%v)", err)
		}
		whole, _ := parseSignatureLists(after)
		added, _ := parseSignatureLists(addition)
		for _, l := range added {
			for _, s := range l.Signatures {
				if !slices.ContainsFunc(whole, func(w signatureList) bool { return w.Type == l.Type && w.has(s) }) {
					t.Fatal("an added signature is missing")
				}
			}
		}
	})
}

func FuzzVariableAfter(f *testing.F) {
	b := boots(f, "secure")[1]
	for _, payload := range b.Payloads {
		f.Add(payload)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		content, err := VariableAfter(nil, payload, false)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(payload, content) {
			t.Fatal("the content is not the payload's")
		}
		appended, err := VariableAfter(content, payload, true)
		if err != nil || !bytes.Equal(appended, content) {
			t.Fatalf("appending what is there changes it (%v)", err)
		}
	})
}
