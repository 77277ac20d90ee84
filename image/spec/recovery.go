package spec

import (
	"net/url"

	"github.com/holdfast-os/holdfast/image"
)

// Recovery says what becomes of the recovery key, which opens the data volumes when
// the TPM does not. Without it the key is shown on the console at the first boot, as
// text, and is nowhere else.
type Recovery struct {
	// Console is how the key is shown: "text", the default, "qr" (text and a QR code of
	// it), or "none", which takes holders.
	Console string `yaml:"console"`
	// Confirm has the first boot wait until somebody has typed the key back.
	Confirm bool `yaml:"confirm"`
	// Holders get the key in an escrow, a file encrypted to them; any Threshold (default
	// 1) of them together can read it.
	Holders   []Holder `yaml:"holders"`
	Threshold int      `yaml:"threshold"`
	// URL takes the escrow by POST, and may answer with the receipt. Without it the
	// escrow is fetched with a medium that carries a file named escrow-request.
	URL string `yaml:"url"`
	CA  string `yaml:"ca"` // PEM file on the build machine
	// ReceiptKey is a file on the build machine with the public Ed25519 key of who
	// acknowledges escrows, as holdfast escrow newkey makes it.
	ReceiptKey string `yaml:"receipt_key"`
	// RequireReceipt refuses updates until the escrow is acknowledged.
	RequireReceipt bool `yaml:"require_receipt"`
}

// Holder is one who keeps a share of the escrow.
type Holder struct {
	Name string `yaml:"name"`
	// Key is an age recipient (age1...), or a file on the build machine that holds one.
	Key string `yaml:"key"`
}

func (s *Recovery) applyDefaults() {
	if s.Console == "" {
		s.Console = image.ConsoleText
	}
	if s.Threshold == 0 && len(s.Holders) > 0 {
		s.Threshold = 1
	}
}

func (r *report) checkRecovery(s *Recovery) {
	r.oneOf("recovery.console", s.Console, image.ConsoleText, image.ConsoleQR, image.ConsoleNone)
	seen := map[string]bool{}
	for i, h := range s.Holders {
		at := index("recovery.holders", i)
		if h.Name == "" && !r.reported(at+".name") || h.Key == "" && !r.reported(at+".key") {
			r.errorf(at, "write {name: vendor, key: keys/escrow.pub}", "a holder needs name and key")
		}
		r.pattern(at+".name", h.Name, `^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`, "1 to 32 letters a-z, digits and hyphens")
		if h.Name != "" && seen[h.Name] || h.Key != "" && seen[h.Key] {
			r.errorf(at, "", "holder %q is there already, by name or by key", h.Name)
		}
		seen[h.Name], seen[h.Key] = true, true
	}
	if s.Threshold < 0 {
		r.errorf("recovery.threshold", "", "%d is not the number of holders it takes", s.Threshold)
	}
	if s.URL != "" {
		parsed, err := url.Parse(s.URL)
		// Without TLS too: the escrow is encrypted and the receipt signed.
		if err != nil || parsed.Scheme != "https" && parsed.Scheme != "http" || parsed.Host == "" || parsed.User != nil || parsed.Fragment != "" {
			r.errorf("recovery.url", "write https://escrow.example/boxes", "%q is not the URL of a web server", s.URL)
		}
	}
}

// validateRecovery looks at what belongs together and may come from several files.
func (r *report) validateRecovery(s *Spec) {
	v := &s.Recovery
	if len(v.Holders) == 0 {
		if v.Console == image.ConsoleNone {
			r.errorf("recovery.console", "write holders: [{name: vendor, key: keys/escrow.pub}], or console: text", "nobody would have the recovery key")
		}
		for _, c := range []struct {
			key   string
			given bool
		}{{"threshold", v.Threshold != 0}, {"url", v.URL != ""}, {"receipt_key", v.ReceiptKey != ""}, {"require_receipt", v.RequireReceipt}} {
			if c.given {
				r.errorf("recovery."+c.key, "write holders: [{name: vendor, key: keys/escrow.pub}]", "is about an escrow, and without holders there is none")
			}
		}
	}
	if v.Threshold > len(v.Holders) && len(v.Holders) > 0 {
		r.errorf("recovery.threshold", "", "%d holders are needed and there are %d", v.Threshold, len(v.Holders))
	}
	if len(v.Holders) > 16 {
		r.errorf("recovery.holders", "", "%d are more than the 16 an escrow can have", len(v.Holders))
	}
	if v.Console == image.ConsoleNone && len(v.Holders) > 0 && v.ReceiptKey == "" && v.URL == "" {
		r.errorf("recovery.console", "write receipt_key: receipt.pub, as holdfast escrow newkey makes it, or url, or console: text",
			"a key that nobody is shown is in force when its escrow has arrived, and without receipts or a server the box never learns that")
	}
	if v.Console == image.ConsoleNone && v.Confirm {
		r.errorf("recovery.confirm", "", "a key that is not shown cannot be typed back")
	}
	if v.RequireReceipt && v.ReceiptKey == "" {
		r.errorf("recovery.require_receipt", "write receipt_key: receipt.pub, as holdfast escrow newkey makes it", "no receipt can be checked without the key it is signed with")
	}
	if v.CA != "" && v.URL == "" {
		r.warnf("recovery.ca", "", "has no effect without url")
	}
	if v.given() && s.Disk.Data != nil && len(s.Disk.Data) == 0 {
		r.errorf("recovery", "", "the appliance has no data volume, and so no recovery key")
	}
}

// given says whether the spec has the section.
func (s *Recovery) given() bool {
	return s.Console != "" && s.Console != image.ConsoleText || s.Confirm || len(s.Holders) > 0 || s.RequireReceipt
}
