package image

import (
	"encoding/hex"
	"fmt"

	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/pcr"
)

// Reference is what a box that runs the release shows in an attestation. Where the
// manifest comes from decides what it is worth: take it from a verified repository or
// bundle, or from one's own build.
func (m *Manifest) Reference() (attest.Reference, error) {
	e := m.Expected
	r := attest.Reference{Product: m.Name, Version: m.Version, RootHash: m.Verity.RootHash, Services: e.Services}
	if e.PCR11[""] == "" || e.LoaderAuthenticode == "" || e.UKIAuthenticode == "" {
		return r, fmt.Errorf("release %s %s: its manifest has no reference values for PCR 4 and 11", m.Name, m.Version)
	}
	for _, f := range []struct {
		name, text string
		into       *pcr.Digest
	}{
		{"loader_authenticode", e.LoaderAuthenticode, &r.Boot.Loader.Authenticode},
		{"uki_authenticode", e.UKIAuthenticode, &r.Boot.UKI.Authenticode},
		{"linux_authenticode", e.LinuxAuthenticode, &r.Boot.Linux},
		{"pcr11", e.PCR11[""], &r.Boot.PCR11},
		{"pcr12", e.PCR12, &r.Boot.PCR12},
		{"db_certificate_sha256", e.DBCertificateSHA256, &r.Boot.UKI.Certificate},
	} {
		if err := digestInto(f.into, f.text); err != nil {
			return r, fmt.Errorf("release %s %s: %s: %w", m.Name, m.Version, f.name, err)
		}
	}
	r.Boot.Loader.Certificate = r.Boot.UKI.Certificate // one signs both
	var err error
	if r.DBX, err = pcr.Signatures(e.SecureBoot["dbx"]); err != nil {
		return r, fmt.Errorf("release %s %s: dbx: %w", m.Name, m.Version, err)
	}
	for _, s := range e.UKISections {
		measured := pcr.Measured{Name: s.Name}
		if err := digestInto(&measured.SHA256, s.SHA256); err != nil {
			return r, fmt.Errorf("release %s %s: section %.40q: %w", m.Name, m.Version, s.Name, err)
		}
		r.Sections = append(r.Sections, measured)
	}
	return r, nil
}

// VendorKeys are the Secure Boot keys of boxes that run one of these releases: PK, KEK
// and db may hold what any of them says, and dbx of every box must have the entries of
// dbx. It is an error when no release tells of keys.
func VendorKeys(dbx []byte, releases ...*Manifest) (*attest.Keys, error) {
	lists, seen := map[string][]byte{}, map[string]bool{}
	for _, m := range releases {
		for _, name := range []string{"PK", "KEK", "db"} {
			list := m.Expected.SecureBoot[name]
			if id := name + string(list); !seen[id] {
				lists[name], seen[id] = append(lists[name], list...), true
			}
		}
	}
	return attest.NewKeys(lists["PK"], lists["KEK"], lists["db"], dbx)
}

// digestInto decodes hex; an empty text leaves zeros.
func digestInto(d *pcr.Digest, text string) error {
	if text == "" {
		return nil
	}
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(d) {
		return fmt.Errorf("%.70q is not a SHA-256 digest in hex", text)
	}
	*d = pcr.Digest(b)
	return nil
}
