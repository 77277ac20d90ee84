package build_test

import (
	"context"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/seal/escrow"
)

// TestRecoverySection: the holders' keys are in the verified root.
func TestRecoverySection(t *testing.T) {
	k := newKeys(t)
	w := newWorkshop(t, k, newCache(t))
	_, owner := newFleetKey(t)
	_, receipt, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, "escrow.pub", []byte(k.EscrowRecipient.String()+"\n"))
	w.write(t, "receipt.pub", receipt)
	section := "recovery: {console: none, holders: [{name: vendor, key: escrow.pub}, {name: owner, key: " + owner.Recipient().String() + "}], " +
		"threshold: 2, url: 'https://escrow.example/', receipt_key: receipt.pub, require_receipt: true}\n"
	m, err := build.Build(context.Background(), parse(t, boxSpec+section), w.in, filepath.Join(w.dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	app := builtAppliance(t, filepath.Join(w.dir, "out"), m)
	want := image.Recovery{
		Console: "none", Threshold: 2, URL: "https://escrow.example/", ReceiptKeyPEM: string(receipt), RequireReceipt: true,
		Holders: []image.Holder{{Name: "vendor", Recipient: k.EscrowRecipient.String()}, {Name: "owner", Recipient: owner.Recipient().String()}},
	}
	if !reflect.DeepEqual(app.Recovery, want) {
		t.Errorf("the appliance has %+v, want %+v", app.Recovery, want)
	}
}

// TestRecoverySectionRefused: keys that nobody could recover with are found by the build.
func TestRecoverySectionRefused(t *testing.T) {
	k, cache := newKeys(t), newCache(t)
	fleetKey, secret := newFleetKey(t)
	public := k.EscrowRecipient.String()
	mistyped := public[:len(public)-1] + "q"
	if mistyped == public {
		mistyped = public[:len(public)-1] + "p"
	}
	for name, c := range map[string]struct{ section, key, want string }{
		"no file":           {"holders: [{name: a, key: missing}]", "", "recovery.holders[0].key: "},
		"the secret key":    {"holders: [{name: a, key: k}]", fleetKey, "holds a secret key"},
		"no key":            {"holders: [{name: a, key: k}]", "hello", "is not the public key of an age identity"},
		"two keys":          {"holders: [{name: a, key: k}]", public + "\n" + secret.Recipient().String(), "is not the public key of an age identity"},
		"a typing mistake":  {"holders: [{name: a, key: " + mistyped + "}]", "", "is not the public key of an age identity"},
		"one as two":        {"holders: [{name: a, key: k}, {name: b, key: " + public + "}]", public, "twice"},
		"no receipt key":    {"holders: [{name: a, key: " + public + "}], receipt_key: k", "hello", "recovery.receipt_key: not an Ed25519 public key"},
		"an RSA key":        {"holders: [{name: a, key: " + public + "}], receipt_key: k", string(k.PolicyPublicPEM), "not an Ed25519 public key"},
		"no certificate":    {"holders: [{name: a, key: " + public + "}], url: 'https://x/', ca: k", "hello", "recovery.ca: k holds no certificate"},
		"a large file":      {"holders: [{name: a, key: k}]", strings.Repeat("#\n", 9000), "16384 is the most"},
		"a receipt key too": {"holders: [{name: a, key: " + public + "}], receipt_key: k", strings.Repeat("#\n", 9000), "16384 is the most"},
	} {
		w := newWorkshop(t, k, cache)
		if c.key != "" {
			w.write(t, "k", []byte(c.key))
		}
		_, err := build.Build(context.Background(), parse(t, boxSpec+"recovery: {"+c.section+"}\n"), w.in, filepath.Join(w.dir, "out"))
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "box.yaml:11:") {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), secret.String()[20:40]) {
			t.Errorf("%s: the error tells the key: %v", name, err)
		}
	}
}
