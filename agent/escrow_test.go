package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"filippo.io/age"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// keepers are who keeps escrows: holders with their age keys, and a key for receipts.
type keepers struct {
	config     image.Recovery
	identities []age.Identity
	signer     ed25519.PrivateKey
}

func newKeepers(t testing.TB, threshold, n int) *keepers {
	t.Helper()
	private, public, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	k := &keepers{config: image.Recovery{Threshold: threshold, ReceiptKeyPEM: string(public)}}
	if k.signer, err = escrow.ParsePrivateKey(private); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			t.Fatal(err)
		}
		k.identities = append(k.identities, id)
		k.config.Holders = append(k.config.Holders, image.Holder{Name: fmt.Sprintf("holder-%d", i+1), Recipient: id.Recipient().String()})
	}
	return k
}

// recover is what the vendor does with a file.
func (k *keepers) recover(t testing.TB, file []byte) string {
	t.Helper()
	e, err := escrow.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	shares, err := e.Open(k.identities...)
	if err != nil {
		t.Fatal(err)
	}
	key, err := e.Recover(shares...)
	if err != nil {
		t.Fatal(err)
	}
	return key.String()
}

func (k *keepers) receipt(t testing.TB, e *escrow.Escrow) []byte {
	t.Helper()
	r, err := escrow.NewReceipt(e, k.signer, today)
	if err != nil {
		t.Fatal(err)
	}
	return r.Marshal()
}

// provisionWith is the first boot of a box whose release says this about recovery.
func (b *box) provisionWith(typed string, r image.Recovery) (*session, error) {
	b.t.Helper()
	b.powerOn()
	s := b.session(typed)
	boot := b.description()
	boot.Appliance.Recovery = r
	err := s.m.EnterPhase(phaseEnterInitrd)
	if err == nil {
		err = s.m.OpenVolumes(boot, b.parts(), &s.status)
	}
	return s, err
}

// custody is the account of the running system.
func (s *session) custody(r image.Recovery) *Custody {
	app := s.description().Appliance
	app.Recovery = r
	c := newCustody(s.m.Log, app, s.m.Root)
	c.Now = func() time.Time { return today }
	c.Open = func() ([]Partition, io.Closer, error) { return s.parts(), io.NopCloser(nil), nil }
	return c
}

// mustProvision provisions with these and returns what a person saw, and the account.
func (b *box) mustProvision(r image.Recovery) (*session, *Custody) {
	b.t.Helper()
	s, err := b.provisionWith("", r)
	if err != nil {
		b.t.Fatalf("%v\nconsole: %s", err, s.console.out.String())
	}
	s.wantOpen("provisioned")
	return s, s.custody(r)
}

func (c *Custody) wantEscrow(t testing.TB, want string) {
	t.Helper()
	if s := c.Status(); s.Escrow != want {
		t.Errorf("escrow %q, want %q: %+v", s.Escrow, want, s)
	}
}

// TestEscrowIsSignedByTheTPM at the first boot and when the key is replaced, with the key
// that answers challenges. Without the TPM there is an escrow all the same.
func TestEscrowIsSignedByTheTPM(t *testing.T) {
	b, k := newBox(t, 1), newKeepers(t, 1, 1)
	s, c := b.mustProvision(k.config)
	first, err := c.Escrow()
	if err != nil || first.TPM == nil {
		t.Fatalf("%v, %+v", err, first)
	}
	asked, err := attest.NewChallenge(today)
	if err != nil {
		t.Fatal(err)
	}
	a, err := attest.Attest(b.tpm, attest.Input{Challenge: asked, Time: today})
	if err != nil {
		t.Fatal(err)
	}
	ak := sha256.Sum256(a.AKPublic)
	record := &attest.Record{Box: s.status.Volumes[0].UUID, AK: "000b" + hex.EncodeToString(ak[:])}
	if err := first.By(record); err != nil {
		t.Error(err)
	}
	for _, fault := range []error{nil, seal.ErrNoTPM} {
		c.OpenTPM = func() (seal.TPM, error) { return b.tpm, fault }
		r, err := c.Replace()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Commit(r.Serial); err != nil {
			t.Fatal(err)
		}
		e, err := c.Escrow()
		if err != nil || e.Serial != r.Serial {
			t.Fatalf("%v, %+v", err, e)
		}
		if err := e.SameBox(first); err != nil {
			t.Error(err)
		}
		if err := e.By(record); (fault == nil) != (err == nil) || fault != nil && !errors.Is(err, escrow.ErrUnsigned) {
			t.Errorf("with %v: %v", fault, err)
		}
	}
}

// TestEscrowAtProvisioning: the escrow is there before the box is, and has the key that
// was shown; nothing else has.
func TestEscrowAtProvisioning(t *testing.T) {
	for _, tt := range [][2]int{{1, 1}, {2, 3}} {
		t.Run(fmt.Sprintf("%d of %d", tt[0], tt[1]), func(t *testing.T) {
			b, k := newBox(t, 2), newKeepers(t, tt[0], tt[1])
			s, c := b.mustProvision(k.config)
			key := s.recoveryKey()
			e, err := c.Escrow()
			if err != nil {
				t.Fatal(err)
			}
			if got := k.recover(t, e.Marshal()); got != key {
				t.Error("the escrow has another key than the console")
			}
			for i, p := range b.parts() {
				h, _, err := luks2.Read(p.Device, p.Device.Size())
				if err != nil || e.Volumes[i] != h.UUID() || !hasKey(h, 1) {
					t.Errorf("volume %d is %s in the escrow: %v", i, e.Volumes[i], err)
				}
			}
			if e.Box != s.status.Volumes[0].UUID || e.Product != "testbox" || e.Release != "1" || e.Serial != 1 {
				t.Errorf("%+v", e)
			}
			c.wantEscrow(t, EscrowMade)
			s.wantNoSecret(key)
			// It opens the disk without its TPM.
			b.powerOn()
			b.noTPM = seal.ErrNoTPM
			b.mustBoot(k.recover(t, e.Marshal())+"\n", "recovery")
		})
	}
	t.Run("none", func(t *testing.T) {
		b := newBox(t, 1)
		s, c := b.mustProvision(image.Recovery{})
		if _, err := c.Escrow(); !errors.Is(err, ErrNoEscrow) {
			t.Error(err)
		}
		c.wantEscrow(t, EscrowNone)
		if _, err := os.Stat(c.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("an account that nobody needs: %v", err)
		}
		s.recoveryKey()
	})
	t.Run("holders nobody can encrypt to", func(t *testing.T) {
		b, k := newBox(t, 1), newKeepers(t, 1, 1)
		k.config.Holders[0].Recipient = "age1xyz"
		s, err := b.provisionWith("", k.config)
		if err == nil || !strings.Contains(err.Error(), "escrow of the recovery key") {
			t.Errorf("error %v", err)
		}
		if !b.fresh(0) || recoveryKeyPattern.MatchString(s.console.out.String()) {
			t.Error("a box came about without the escrow that its release wants")
		}
	})
}

// wantNoSecret looks for the key in the log and in the files of the account.
func (s *session) wantNoSecret(key string) {
	s.t.Helper()
	k, err := luks2.ParseRecoveryKey([]byte(key))
	if err != nil {
		s.t.Fatal(err)
	}
	texts := map[string]string{"log": s.log.text.String(), "JSON log": s.log.json.String()}
	filepath.Walk(filepath.Join(s.m.Root, "data")+"/"+stateFolder, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				s.t.Error(err)
			}
			texts[path] = string(b)
		}
		return nil
	})
	if len(texts) < 4 {
		s.t.Errorf("only %d texts were looked at", len(texts))
	}
	words := append(strings.Split(key, "-"), strings.ReplaceAll(key, "-", ""), string(k.Bytes()), hex.EncodeToString(k.Bytes()), fmt.Sprint(k.Bytes()))
	for name, text := range texts {
		for _, w := range words {
			if strings.Contains(strings.ToLower(text), strings.ToLower(w)) {
				s.t.Errorf("%s holds the recovery key, or a part of it", name)
			}
		}
	}
}

// TestConsole: how the key is shown.
func TestConsole(t *testing.T) {
	b, k := newBox(t, 1), newKeepers(t, 1, 1)
	t.Run("none", func(t *testing.T) {
		r := k.config
		r.Console = image.ConsoleNone
		s, _ := b.mustProvision(r)
		out := s.console.out.String()
		if recoveryKeyPattern.MatchString(out) || !strings.Contains(out, "not shown. It is in the escrow for holder-1") {
			t.Errorf("console %q", out)
		}
	})
	t.Run("qr", func(t *testing.T) {
		b := newBox(t, 1)
		s, _ := b.mustProvision(image.Recovery{Console: image.ConsoleQR})
		out := s.console.out.String()
		lines := strings.Split(strings.TrimSuffix(out, "\r\n"), "\r\n")
		if len(lines) > 24 {
			t.Errorf("%d lines leave no room for the cursor on a screen of 25", len(lines))
		}
		for _, l := range lines {
			if n := utf8.RuneCountInString(l); n > 80 {
				t.Errorf("a line of %d characters: %q", n, l)
			}
		}
		if got := scan(t, lines); got != s.recoveryKey() {
			t.Errorf("the QR code says %q, the text %q", got, s.recoveryKey())
		}
	})
}

// scan reads the QR code in lines of half blocks as a telephone would.
func scan(t *testing.T, lines []string) string {
	t.Helper()
	if _, err := exec.LookPath("zbarimg"); err != nil {
		t.Fatal("zbarimg is not installed: apt-get install zbar-tools")
	}
	const scale = 4
	var rows [][]byte
	for _, l := range lines {
		if !strings.ContainsAny(l, "█▀▄") {
			continue
		}
		var upper, lower []byte
		for _, r := range l {
			u, d := byte(0), byte(0)
			if r == '█' || r == '▀' {
				u = 255
			}
			if r == '█' || r == '▄' {
				d = 255
			}
			upper, lower = append(upper, bytes.Repeat([]byte{u}, scale)...), append(lower, bytes.Repeat([]byte{d}, scale)...)
		}
		for range scale {
			rows = append(rows, upper)
		}
		for range scale {
			rows = append(rows, lower)
		}
	}
	if len(rows) == 0 {
		t.Fatal("there is no QR code")
	}
	picture := fmt.Appendf(nil, "P5 %d %d 255\n%s", len(rows[0]), len(rows), bytes.Join(rows, nil))
	path := filepath.Join(t.TempDir(), "screen.pgm")
	if err := os.WriteFile(path, picture, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("zbarimg", "--quiet", "--raw", path).Output() // it complains about a missing D-Bus
	if err != nil {
		t.Fatalf("zbarimg: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// answering is a person at the console who answers each prompt from what was shown.
type answering struct {
	console *console
	answers []func(key string) string
	line    strings.Reader
}

func (a *answering) Read(p []byte) (int, error) {
	if a.line.Len() == 0 {
		if len(a.answers) == 0 {
			return 0, io.EOF
		}
		key := recoveryKeyPattern.FindString(a.console.out.String())
		a.line = *strings.NewReader(a.answers[0](key) + "\r\n")
		a.answers = a.answers[1:]
	}
	return a.line.Read(p)
}

// TestConfirm: the first boot waits until the key was typed back, before the box is one.
func TestConfirm(t *testing.T) {
	word := func(w string) func(string) string { return func(string) string { return w } }
	wrong := func(key string) string {
		if key[20] == 'c' {
			return key[:20] + "d" + key[21:]
		}
		return key[:20] + "c" + key[21:]
	}
	for name, tt := range map[string]struct {
		answers []func(string) string
		want    error
	}{
		"at once":            {[]func(string) string{strings.ToUpper}, nil},
		"at the third go":    {[]func(string) string{word(""), wrong, word("qqqq"), word("show"), func(k string) string { return k }}, nil},
		"reboot":             {[]func(string) string{word("reboot")}, ErrReboot},
		"poweroff":           {[]func(string) string{wrong, word("PowerOff")}, ErrPowerOff},
		"nobody is there":    {nil, io.EOF},
		"not even a console": {[]func(string) string{}, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t, 1)
			s := b.session("")
			s.console.in = &answering{console: s.console, answers: tt.answers}
			boot := b.description()
			boot.Appliance.Recovery.Confirm = true
			err := errors.Join(s.m.EnterPhase(phaseEnterInitrd), s.m.OpenVolumes(boot, b.parts(), &s.status))
			if !errors.Is(err, tt.want) {
				t.Fatalf("error %v, want %v; console %s", err, tt.want, s.console.out.String())
			}
			if b.fresh(0) != (tt.want != nil) {
				t.Errorf("unprovisioned is %v", b.fresh(0))
			}
			if len(tt.answers) == 5 && !strings.Contains(s.console.out.String(), "group 3 is another") {
				t.Errorf("console %q", s.console.out.String())
			}
			s.wantNoSecretInLog(recoveryKeyPattern.FindString(s.console.out.String()))
		})
	}
}

func (s *session) wantNoSecretInLog(key string) {
	s.t.Helper()
	for _, w := range strings.Split(key, "-") {
		if w == "" || strings.Contains(s.log.text.String()+s.log.json.String(), w) {
			s.t.Errorf("the log holds the recovery key %q", w)
		}
	}
}

// TestReceipts: what is believed, and what it changes.
func TestReceipts(t *testing.T) {
	b, k := newBox(t, 1), newKeepers(t, 1, 1)
	k.config.RequireReceipt = true
	s, c := b.mustProvision(k.config)
	e, err := c.Escrow()
	if err != nil {
		t.Fatal(err)
	}
	held := func(want string) {
		t.Helper()
		err := c.Hold()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("updates are held for %v, want %q", err, want)
		}
		if c.Status().UpdatesHeld != (want != "") {
			t.Error("status says otherwise")
		}
	}
	held(e.FileName())
	stranger, other := newKeepers(t, 1, 1), newBox(t, 1)
	_, elsewhere := other.mustProvision(k.config)
	e2, err := elsewhere.Escrow()
	if err != nil {
		t.Fatal(err)
	}
	for name, receipt := range map[string][]byte{
		"by somebody else":      stranger.receipt(t, e),
		"for another box":       k.receipt(t, e2),
		"damaged":               bytes.Replace(k.receipt(t, e), []byte(`"serial": 1`), []byte(`"serial": 2`), 1),
		"the escrow itself":     e.Marshal(),
		"empty":                 nil,
		"followed by something": append(k.receipt(t, e), 'x'),
	} {
		if err := c.TakeReceipt(receipt); err == nil {
			t.Errorf("a receipt %s is taken", name)
		}
		held(e.FileName())
	}
	c.wantEscrow(t, EscrowMade)
	if err := c.HandedOut(e, "medium\x1b[2J /dev/sda1"); err != nil {
		t.Fatal(err)
	}
	c.wantEscrow(t, EscrowHandedOut)
	if st := c.Status(); strings.Contains(st.HandedTo, "\x1b") || !st.HandedOut.Equal(today.Truncate(time.Second)) {
		t.Errorf("%+v", st)
	}
	held(e.FileName())
	for range 2 {
		if err := c.TakeReceipt(k.receipt(t, e)); err != nil {
			t.Fatal(err)
		}
	}
	c.wantEscrow(t, EscrowReceipted)
	held("")
	// A new process, and a release with another key for receipts, or other holders.
	c = s.custody(k.config)
	c.wantEscrow(t, EscrowReceipted)
	moved := k.config
	moved.ReceiptKeyPEM = stranger.config.ReceiptKeyPEM
	c = s.custody(moved)
	c.wantEscrow(t, EscrowHandedOut)
	held(e.FileName())
	moved = k.config
	moved.Holders = stranger.config.Holders
	c = s.custody(moved)
	if st := c.Status(); len(st.Problems) != 1 || !strings.Contains(st.Problems[0], "other holders") {
		t.Errorf("%+v", st)
	}
	// What lies in the folder is verified, not believed.
	c = s.custody(k.config)
	if err := os.WriteFile(c.receiptPath(1), k.receipt(t, e2), 0o600); err != nil {
		t.Fatal(err)
	}
	held(e.FileName())
	if err := os.WriteFile(filepath.Join(c.Dir, custodyState), []byte(`{"serial":0}`), 0o600); err != nil {
		t.Fatal(err)
	}
	held("account of the recovery key is damaged")
	// A box that was provisioned before there were holders.
	b = newBox(t, 1)
	s, _ = b.mustProvision(image.Recovery{})
	c = s.custody(k.config)
	held("recovery replace")
	if st := c.Status(); st.Escrow != EscrowNone || len(st.Problems) != 1 {
		t.Errorf("%+v", st)
	}
	var text strings.Builder
	st := c.Status()
	st.WriteTo(&text)
	for _, want := range []string{"recovery  key 1, escrow: none\n", "updates wait for the receipt", "PROBLEM   the recovery key is in no escrow"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q does not say %q", text.String(), want)
		}
	}
	c.Config.RequireReceipt = false
	held("")
}

// TestHoldStopsUpdates: an installation is refused for what Hold says, before a write; as
// long as the escrow has no receipt, that is (F51).
func TestHoldStopsUpdates(t *testing.T) {
	v := newVendor(t, "1.0.0", "1.1.0")
	a := newAppliance(v, "1.0.0")
	a.u.Hold = func() error { return errors.New("no receipt has come") }
	a.unwritten(func() {
		if _, err := a.u.Apply(t.Context(), v.source(), "web", ""); !errors.Is(err, errUnfit) || !strings.Contains(err.Error(), "no receipt has come") {
			t.Errorf("error %v", err)
		}
	})
	if j := a.u.Status().Journal; len(j) != 1 || !strings.Contains(j[0].Reason, "no receipt has come") {
		t.Errorf("journal %+v", j)
	}
	a.u.Hold = func() error { return nil }
	if version, err := a.u.Apply(t.Context(), v.source(), "web", ""); version != "1.1.0" || err != nil {
		t.Errorf("%q, %v", version, err)
	}
}

// TestMediumWithReceipts: receipts of a stick, among everything else that can lie there.
func TestMediumWithReceipts(t *testing.T) {
	b, k := newBox(t, 1), newKeepers(t, 1, 1)
	_, c := b.mustProvision(k.config)
	dir := t.TempDir()
	look := func() (bool, error) { t.Helper(); return c.fromFolder(dir) }
	if asks, err := look(); asks || err != nil {
		t.Errorf("an empty stick: %v, %v", asks, err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, escrowRequest)); err != nil {
		t.Fatal(err)
	}
	if asks, err := look(); asks || err != nil {
		t.Errorf("a link: %v, %v", asks, err)
	}
	if err := os.Remove(filepath.Join(dir, escrowRequest)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, escrowRequest), 0o700); err != nil {
		t.Fatal(err)
	}
	if asks, err := look(); asks || err != nil {
		t.Errorf("a folder: %v, %v", asks, err)
	}
	putFile(t, filepath.Join(dir, "Escrow-Request.TXT"), nil)
	if asks, err := look(); !asks || err != nil {
		t.Errorf("a request: %v, %v", asks, err)
	}
	path, err := c.ToFolder(dir, "medium")
	if err != nil {
		t.Fatal(err)
	}
	c.wantEscrow(t, EscrowHandedOut)
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	e, err := escrow.Parse(file)
	if err != nil || filepath.Base(path) != e.FileName() {
		t.Fatalf("%s: %v", path, err)
	}
	for n := range 70 { // of other boxes, and nonsense
		putFile(t, filepath.Join(dir, fmt.Sprintf("%sz%d.json", escrow.ReceiptPrefix, n)), bytes.Repeat([]byte("{"), n*100))
	}
	if _, err := look(); err == nil {
		t.Error("nonsense is taken")
	}
	for n := range 70 {
		if err := os.Remove(filepath.Join(dir, fmt.Sprintf("%sz%d.json", escrow.ReceiptPrefix, n))); err != nil {
			t.Fatal(err)
		}
	}
	putFile(t, filepath.Join(dir, escrow.ReceiptPrefix+"other.json"), []byte("{}"))
	r, err := escrow.NewReceipt(e, k.signer, today)
	if err != nil {
		t.Fatal(err)
	}
	putFile(t, filepath.Join(dir, r.FileName()), r.Marshal())
	if asks, err := look(); !asks || err != nil {
		t.Errorf("%v, %v", asks, err)
	}
	c.wantEscrow(t, EscrowReceipted)
}

// TestPost: whom the box believes that the escrow has arrived.
func TestPost(t *testing.T) {
	k := newKeepers(t, 1, 1)
	var answer func(w http.ResponseWriter, r *http.Request, e *escrow.Escrow)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		e, err := escrow.Parse(body)
		if err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %v", r.Method, err)
			return
		}
		answer(w, r, e)
	}))
	defer server.Close()
	k.config.URL = server.URL
	_, c := newBox(t, 1).mustProvision(k.config)
	e, err := c.Escrow()
	if err != nil {
		t.Fatal(err)
	}
	sum := func(e *escrow.Escrow) string { d := e.Digest(); return hex.EncodeToString(d[:]) }
	for name, tt := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request, e *escrow.Escrow)
		want   string
	}{
		"a login page": {func(w http.ResponseWriter, _ *http.Request, _ *escrow.Escrow) { io.WriteString(w, "<html>Welcome") }, "SHA-256"},
		"nothing":      {func(w http.ResponseWriter, _ *http.Request, _ *escrow.Escrow) { w.WriteHeader(204) }, "SHA-256"},
		"an error": {func(w http.ResponseWriter, _ *http.Request, e *escrow.Escrow) {
			w.WriteHeader(500)
			io.WriteString(w, sum(e))
		}, "500"},
		"elsewhere": {func(w http.ResponseWriter, r *http.Request, _ *escrow.Escrow) {
			http.Redirect(w, r, "/other", http.StatusTemporaryRedirect)
		}, "307"},
		"without end": {func(w http.ResponseWriter, _ *http.Request, _ *escrow.Escrow) {
			for range 100 {
				w.Write(make([]byte, 4096))
			}
		}, "more than 65536 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			answer = tt.answer
			if err := c.Post(t.Context(), e); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			c.wantEscrow(t, EscrowMade)
		})
	}
	answer = func(w http.ResponseWriter, _ *http.Request, e *escrow.Escrow) { fmt.Fprintln(w, "kept", sum(e)) }
	if err := c.Post(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	c.wantEscrow(t, EscrowHandedOut)
	if c.undelivered() == nil {
		t.Error("the box does not ask for the receipt any more")
	}
	stranger := newKeepers(t, 1, 1)
	answer = func(w http.ResponseWriter, _ *http.Request, e *escrow.Escrow) { w.Write(stranger.receipt(t, e)) }
	if err := c.Post(t.Context(), e); err == nil || !strings.Contains(err.Error(), "not signed by the key") {
		t.Errorf("a stranger's receipt: %v", err)
	}
	c.wantEscrow(t, EscrowHandedOut)
	answer = func(w http.ResponseWriter, _ *http.Request, e *escrow.Escrow) { w.Write(k.receipt(t, e)) }
	if err := c.Post(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	c.wantEscrow(t, EscrowReceipted)
	if c.undelivered() != nil {
		t.Error("the box sends what was acknowledged")
	}
	server.Close()
	if err := c.Post(t.Context(), e); err == nil {
		t.Error("nobody is there, and it arrives")
	}
}

// fakeWeb answers without a network, as synctest wants it.
type fakeWeb func(r *http.Request) (*http.Response, error)

func (f fakeWeb) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestDeliver: the escrow is sent again until its receipt is there, not too often, and
// not any more after it.
func TestDeliver(t *testing.T) {
	k := newKeepers(t, 1, 1)
	k.config.URL = "http://escrow.example/"
	s, c := newBox(t, 1).mustProvision(k.config)
	synctest.Test(t, func(t *testing.T) {
		c.Now, c.news = time.Now, make(chan struct{}, 1) // a channel of the bubble
		var tries atomic.Int32
		var mode atomic.Value
		mode.Store("down")
		c.web = fakeWeb(func(r *http.Request) (*http.Response, error) {
			tries.Add(1)
			sent, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			e, err := escrow.Parse(sent)
			if err != nil {
				t.Error(err)
			}
			body := k.receipt(t, e)
			switch mode.Load() {
			case "down":
				return nil, errors.New("connection refused")
			case "slow": // to acknowledge
				d := e.Digest()
				body = []byte(hex.EncodeToString(d[:]))
			}
			return &http.Response{StatusCode: 200, Body: io.NopCloser(bytes.NewReader(body)), Header: http.Header{}, Request: r}, nil
		})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); c.deliver(ctx) }()
		span := func(server string, d time.Duration, least, most int32) {
			t.Helper()
			mode.Store(server)
			tries.Store(0)
			time.Sleep(d)
			synctest.Wait()
			if n := tries.Load(); n < least || n > most {
				t.Errorf("%d tries in %v while the server is %s, want %d to %d", n, d, server, least, most)
			}
		}
		span("down", 24*time.Hour, 12, 40)
		span("slow", 24*time.Hour, 3, 6)
		span("up", 24*time.Hour, 1, 1)
		span("up", 72*time.Hour, 0, 0)
		// Another escrow is sent at once.
		r, err := c.Replace()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Commit(r.Serial); err != nil {
			t.Fatal(err)
		}
		span("up", time.Minute, 1, 1)
		stop()
		<-done
	})
	c.wantEscrow(t, EscrowReceipted)
	if !strings.Contains(s.log.text.String(), "escrow acknowledged") || strings.Count(s.log.text.String(), "escrow handed out") > 10 {
		t.Errorf("log %s", s.log.text.String())
	}
}
