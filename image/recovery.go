package image

// Recovery says what becomes of the recovery key of the data volumes.
type Recovery struct {
	// Console is how the key is shown when it is made: "text" (the default), "qr" (text
	// and a QR code) or "none", which leaves it to the holders.
	Console string `json:"console,omitempty"`
	// Confirm has the first boot wait until somebody has typed the key back.
	Confirm bool `json:"confirm,omitempty"`
	// Holders can read the key, any Threshold of them together; none is no escrow.
	Holders   []Holder `json:"holders,omitempty"`
	Threshold int      `json:"threshold,omitempty"`
	// URL takes the escrow by POST; "" is none. CAPEM is as in [Update].
	URL   string `json:"url,omitempty"`
	CAPEM string `json:"ca_pem,omitempty"`
	// ReceiptKeyPEM is the Ed25519 key of who acknowledges escrows.
	ReceiptKeyPEM string `json:"receipt_key_pem,omitempty"`
	// RequireReceipt refuses updates until the escrow is acknowledged.
	RequireReceipt bool `json:"require_receipt,omitempty"`
}

// The values of Recovery.Console.
const (
	ConsoleText = "text"
	ConsoleQR   = "qr"
	ConsoleNone = "none"
)

// Holder is one who can open a share of an escrow.
type Holder struct {
	Name      string `json:"name"`
	Recipient string `json:"recipient"` // age1...
}
