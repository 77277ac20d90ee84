package agent

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/seal"
	"github.com/holdfast-os/holdfast/seal/attest"
	"github.com/holdfast-os/holdfast/seal/escrow"
	"github.com/holdfast-os/holdfast/seal/luks2"
	"github.com/holdfast-os/holdfast/update"
)

// The account of the recovery key, in a folder of stateFolder on the first volume.
const (
	custodyFolder = "recovery"
	custodyState  = "state.json"
	deviceKeyFile = "device.key" // signs the escrows of this box
	// maxCustodyBytes is far above what the state has.
	maxCustodyBytes = 16 << 10
)

// Custody is the life of the recovery key on the box: the escrow that was made of it,
// who was given that, the receipt that came back, and its replacement. The recovery key
// itself is nowhere in it. Fill in the exported fields; all methods may be called from
// any goroutine.
type Custody struct {
	Log    *slog.Logger
	Config image.Recovery
	// Product and Release are what escrows say of their origin.
	Product, Release string
	// Dir is the folder of the account.
	Dir string
	// Root is where the volumes are mounted below.
	Root string
	// Open opens all the volumes that the recovery key opens, the first one first.
	// Only [Custody.Settle] and a replacement need it.
	Open func() (volumes []Partition, closer io.Closer, err error)
	Now  func() time.Time
	// Rand defaults to crypto/rand.
	Rand io.Reader
	// OpenTPM opens the TPM that signs escrows; what can be closed is. Without it, and
	// where it fails, they are signed by the box's key alone.
	OpenTPM func() (seal.TPM, error)

	mu sync.Mutex // held over every use of the folder
	// news is sent to after each change, for who delivers the escrow.
	news chan struct{}
	// changed, if not nil, is called after each change of the folder; power-cut tests use it.
	changed func()
	web     http.RoundTripper // of tests
}

// newCustody is the custody of an appliance with data volumes.
func newCustody(log *slog.Logger, a image.Appliance, root string) *Custody {
	return &Custody{
		Log: log, Config: a.Recovery, Product: a.Name, Release: a.Version, Root: root, Now: time.Now,
		Dir: filepath.Join(root, a.Volumes[0].Mount, stateFolder, custodyFolder), news: make(chan struct{}, 1),
	}
}

// account is what the folder says of the key in force.
type account struct {
	// Serial is the recovery key's, from 1; Last is the highest that was ever made.
	Serial int       `json:"serial"`
	Last   int       `json:"last"`
	Handed *handOver `json:"handed_out,omitempty"`
	// Next is a key that is to take its place.
	Next *successor `json:"next,omitempty"`
	// Dropping says that keyslots of earlier keys may be left.
	Dropping bool `json:"dropping,omitempty"`
}

// handOver is who was given the escrow last.
type handOver struct {
	Time time.Time `json:"time"`
	To   string    `json:"to"`
}

// successor is a recovery key on its way to being the one.
type successor struct {
	Serial int `json:"serial"`
	// Ready says that it opens every volume.
	Ready bool `json:"ready,omitempty"`
	// ByEscrow says that nobody was shown it: it takes over when its escrow has
	// arrived. The others take over when a person says so, and are void after a restart.
	ByEscrow bool      `json:"by_escrow,omitempty"`
	Handed   *handOver `json:"handed_out,omitempty"`
}

// errCustody marks an account that cannot be read.
var errCustody = errors.New("the account of the recovery key is damaged; make another key: holdfast-agent recovery replace")

// load reads the account; of a box that never wrote one it is that of key 1.
func (c *Custody) load() (account, error) {
	b, err := readLimited(filepath.Join(c.Dir, custodyState), maxCustodyBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return account{Serial: 1, Last: 1}, nil
	}
	if err != nil {
		return account{}, err
	}
	var a account
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil || a.Serial < 1 || a.Last < a.Serial || a.Next != nil && (a.Next.Serial <= a.Serial || a.Next.Serial > a.Last) {
		return account{}, errCustody
	}
	return a, nil
}

func (c *Custody) save(a account) error {
	b, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	return c.keep(filepath.Join(c.Dir, custodyState), append(b, '\n'))
}

// keep writes a file of the account, whole or not at all.
func (c *Custody) keep(path string, content []byte) error {
	err := update.WriteFile(path, content, 0o600)
	select {
	case c.news <- struct{}{}:
	default: // somebody is on the way already
	}
	if c.changed != nil {
		c.changed()
	}
	return err
}

// remove removes one, if it is there.
func (c *Custody) remove(path string) error {
	err := os.Remove(path)
	if c.changed != nil {
		c.changed()
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// readLimited reads a plain file of at most limit bytes.
func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s has more than the %d bytes of one", path, limit)
	}
	return b, err
}

func (c *Custody) escrowPath(serial int) string {
	return filepath.Join(c.Dir, fmt.Sprintf("escrow-%d.json", serial))
}

func (c *Custody) receiptPath(serial int) string {
	return filepath.Join(c.Dir, fmt.Sprintf("receipt-%d.json", serial))
}

// create escrows the first recovery key of a box that is being provisioned.
func (c *Custody) create(key *luks2.RecoveryKey, uuids []string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.makeEscrow(key, 1, uuids); err != nil {
		return err
	}
	return c.save(account{Serial: 1, Last: 1})
}

// makeEscrow encrypts a key to the holders and keeps the file.
func (c *Custody) makeEscrow(key *luks2.RecoveryKey, serial int, uuids []string) error {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	signer, err := c.deviceKey()
	if err != nil {
		return err
	}
	private, err := escrow.ParsePrivateKey(signer)
	luks2.Wipe(signer)
	if err != nil {
		return fmt.Errorf("the box's key: %w", err)
	}
	defer luks2.Wipe(private)
	p := escrow.Policy{Threshold: max(c.Config.Threshold, 1)}
	for _, h := range c.Config.Holders {
		p.Holders = append(p.Holders, escrow.Holder(h))
	}
	subject := escrow.Subject{Box: uuids[0], Volumes: uuids, Product: c.Product, Release: c.Release, Serial: serial, Time: c.Now()}
	e, err := escrow.New(key, subject, p, private, c.random(), c.endorse)
	if err != nil {
		return err
	}
	if err := c.remove(c.receiptPath(serial)); err != nil {
		return err
	}
	return c.keep(c.escrowPath(serial), e.Marshal())
}

// endorse has the TPM sign. An escrow without that is better than none.
func (c *Custody) endorse(document []byte) (*attest.Endorsement, error) {
	if c.OpenTPM == nil {
		return nil, nil
	}
	tpm, err := c.OpenTPM()
	if err == nil {
		if c, ok := tpm.(io.Closer); ok {
			defer c.Close()
		}
		var e *attest.Endorsement
		if e, err = attest.Endorse(tpm, document); err == nil {
			return e, nil
		}
	}
	c.Log.Warn("the escrow is not signed by the TPM", "error", err)
	return nil, nil
}

func (c *Custody) random() io.Reader {
	if c.Rand != nil {
		return c.Rand
	}
	return rand.Reader
}

// deviceKey is the box's key in PEM, made when there is none.
func (c *Custody) deviceKey() ([]byte, error) {
	path := filepath.Join(c.Dir, deviceKeyFile)
	private, err := readLimited(path, maxCustodyBytes)
	if !errors.Is(err, fs.ErrNotExist) {
		return private, err
	}
	if private, _, err = escrow.GenerateKey(); err != nil {
		return nil, err
	}
	return private, c.keep(path, private)
}

// ErrNoEscrow says that the recovery key in force was not escrowed.
var ErrNoEscrow = errors.New("there is no escrow of the recovery key")

// readEscrow reads that of a key.
func (c *Custody) readEscrow(serial int) (*escrow.Escrow, error) {
	b, err := readLimited(c.escrowPath(serial), escrow.MaxBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoEscrow
	}
	if err != nil {
		return nil, err
	}
	return escrow.Parse(b)
}

// current is the escrow to hand out: the successor's when that waits for its arrival.
func (c *Custody) current() (account, *escrow.Escrow, error) {
	a, err := c.load()
	if err != nil {
		return a, nil, err
	}
	serial := a.Serial
	if a.Next != nil && a.Next.ByEscrow && a.Next.Ready {
		serial = a.Next.Serial
	}
	e, err := c.readEscrow(serial)
	return a, e, err
}

// Escrow is the escrow to hand out, or [ErrNoEscrow].
func (c *Custody) Escrow() (*escrow.Escrow, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, e, err := c.current()
	return e, err
}

// arrived says whether somebody is known to have the escrow that was handed over: one who
// answers at the spec's URL. A stick may be lost on its way.
func (c *Custody) arrived(h *handOver) bool {
	return c.Config.URL != "" && h != nil && h.To == printable(c.Config.URL)
}

// HandedOut notes that an escrow has left the box.
func (c *Custody) HandedOut(e *escrow.Escrow, to string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.load()
	if err != nil {
		return err
	}
	given := &handOver{Time: c.Now().UTC().Truncate(time.Second), To: printable(to)}
	switch {
	case e.Serial == a.Serial:
		a.Handed = given
	case a.Next != nil && e.Serial == a.Next.Serial:
		a.Next.Handed = given
	default:
		return nil // of a key that is gone by now
	}
	if err := c.save(a); err != nil {
		return err
	}
	c.Log.Info("escrow handed out", "serial", e.Serial, "to", given.To)
	return c.succeedWhenArrived(a)
}

// TakeReceipt verifies a receipt, and remembers it when it is for an escrow of this box
// that counts. It is no error to bring one twice.
func (c *Custody) TakeReceipt(b []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Config.ReceiptKeyPEM == "" {
		return errors.New("this release names no key that receipts are signed with")
	}
	key, err := escrow.ParsePublicKey([]byte(c.Config.ReceiptKeyPEM))
	if err != nil {
		return fmt.Errorf("the release's key for receipts: %w", err)
	}
	r, err := escrow.ParseReceipt(b, key)
	if err != nil {
		return err
	}
	a, err := c.load()
	if err != nil {
		return err
	}
	serials := []int{a.Serial}
	if a.Next != nil {
		serials = append(serials, a.Next.Serial)
	}
	var refused error
	for _, serial := range serials {
		e, err := c.readEscrow(serial)
		if err == nil {
			err = r.Covers(e)
		}
		if err != nil {
			refused = errors.Join(refused, err)
			continue
		}
		if err := c.keep(c.receiptPath(serial), r.Marshal()); err != nil {
			return err
		}
		c.Log.Info("escrow acknowledged", "serial", serial, "receipt_time", r.Time.Format(time.RFC3339))
		return c.succeedWhenArrived(a)
	}
	return refused
}

// receipt is that of an escrow; nil when there is none that counts by the key of the
// release that runs.
func (c *Custody) receipt(e *escrow.Escrow) *escrow.Receipt {
	key, err := escrow.ParsePublicKey([]byte(c.Config.ReceiptKeyPEM))
	if err != nil {
		return nil
	}
	b, err := readLimited(c.receiptPath(e.Serial), escrow.MaxReceiptBytes)
	if err != nil {
		return nil
	}
	r, err := escrow.ParseReceipt(b, key)
	if err != nil || r.Covers(e) != nil {
		return nil
	}
	return r
}

// Hold says why no update may be made yet: the spec wants the escrow acknowledged
// first (F51).
func (c *Custody) Hold() error {
	if !c.Config.RequireReceipt {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.load()
	if err != nil {
		return err
	}
	e, err := c.readEscrow(a.Serial)
	switch {
	case errors.Is(err, ErrNoEscrow):
		return errors.New("the release wants the recovery key escrowed before an update, and the key of this box was not: " +
			"make another key: holdfast-agent recovery replace")
	case err != nil:
		return err
	case c.receipt(e) != nil:
		return nil
	}
	return fmt.Errorf("the release wants the escrow of the recovery key acknowledged before an update, and no receipt has come: "+
		"bring %s to who keeps the escrows (a stick with a file named %s fetches it), and the receipt back", e.FileName(), escrowRequest)
}

// RecoveryStatus is what `holdfast-agent recovery status --json` prints.
type RecoveryStatus struct {
	// Escrow is how far it has come: "none", "made", "handed out" or "receipted".
	Escrow string `json:"escrow"`
	// Serial counts the box's recovery keys from 1.
	Serial int `json:"serial"`
	// SHA256 is of the escrow's file.
	SHA256    string    `json:"escrow_sha256,omitempty"`
	Holders   []string  `json:"holders,omitempty"`
	Threshold int       `json:"threshold,omitempty"`
	Made      time.Time `json:"made,omitzero"`
	HandedOut time.Time `json:"handed_out,omitzero"`
	HandedTo  string    `json:"handed_to,omitempty"`
	Receipted time.Time `json:"receipted,omitzero"` // as the receipt says
	// Replacing says what another key waits for that is to take its place.
	Replacing string `json:"replacing,omitempty"`
	// UpdatesHeld says that updates wait for the receipt.
	UpdatesHeld bool     `json:"updates_held,omitempty"`
	Problems    []string `json:"problems,omitempty"`
}

// The values of RecoveryStatus.Escrow.
const (
	EscrowNone      = "none"
	EscrowMade      = "made"
	EscrowHandedOut = "handed out"
	EscrowReceipted = "receipted"
)

// Status tells how the recovery key is kept.
func (c *Custody) Status() RecoveryStatus {
	held := c.Hold() != nil
	c.mu.Lock()
	defer c.mu.Unlock()
	s := RecoveryStatus{Escrow: EscrowNone, UpdatesHeld: held}
	a, err := c.load()
	if err != nil {
		s.Problems = append(s.Problems, err.Error())
		return s
	}
	s.Serial = a.Serial
	if n := a.Next; n != nil {
		s.Replacing = fmt.Sprintf("recovery key %d is being made", n.Serial)
		if n.Ready && n.ByEscrow {
			s.Replacing = fmt.Sprintf("recovery key %d takes over when its escrow has arrived", n.Serial)
		} else if n.Ready {
			s.Replacing = fmt.Sprintf("recovery key %d waits for somebody to say that he has it", n.Serial)
		}
	}
	e, err := c.readEscrow(a.Serial)
	switch {
	case errors.Is(err, ErrNoEscrow) && len(c.Config.Holders) > 0:
		s.Problems = append(s.Problems, "the recovery key is in no escrow, although the release names holders: holdfast-agent recovery replace makes another that is")
	case errors.Is(err, ErrNoEscrow):
	case err != nil:
		s.Problems = append(s.Problems, err.Error())
	default:
		c.describe(&s, a, e)
	}
	return s
}

func (c *Custody) describe(s *RecoveryStatus, a account, e *escrow.Escrow) {
	sum := e.Digest()
	s.Escrow, s.Made, s.Threshold, s.SHA256 = EscrowMade, e.Time, e.Threshold, hex.EncodeToString(sum[:])
	var now, then []string
	for _, h := range c.Config.Holders {
		now = append(now, h.Name+" "+h.Recipient)
	}
	for _, share := range e.Shares {
		s.Holders = append(s.Holders, share.Name)
		then = append(then, share.Name+" "+share.Recipient)
	}
	if len(now) > 0 && (!slices.Equal(now, then) || e.Threshold != max(c.Config.Threshold, 1)) {
		s.Problems = append(s.Problems, "the escrow is for other holders than this release names: holdfast-agent recovery replace makes one for these")
	}
	if a.Handed != nil {
		s.Escrow, s.HandedOut, s.HandedTo = EscrowHandedOut, a.Handed.Time, a.Handed.To
	}
	if r := c.receipt(e); r != nil {
		s.Escrow, s.Receipted = EscrowReceipted, r.Time
	}
}

// lines prints what a person wants to know at a glance.
func (s *RecoveryStatus) lines(b *strings.Builder) {
	fmt.Fprintf(b, "recovery  key %d, escrow: %s", s.Serial, s.Escrow)
	switch s.Escrow {
	case EscrowMade:
		fmt.Fprintf(b, " %s, handed out to nobody yet", s.Made.Format(time.RFC3339))
	case EscrowHandedOut:
		fmt.Fprintf(b, " %s, to %s", s.HandedOut.Format(time.RFC3339), s.HandedTo)
	case EscrowReceipted:
		fmt.Fprintf(b, " %s", s.Receipted.Format(time.RFC3339))
	}
	if len(s.Holders) > 0 {
		fmt.Fprintf(b, "; readable by any %d of %s", s.Threshold, strings.Join(s.Holders, ", "))
	}
	fmt.Fprintln(b)
	if s.Replacing != "" {
		fmt.Fprintf(b, "recovery  %s\n", s.Replacing)
	}
	if s.UpdatesHeld {
		fmt.Fprintln(b, "recovery  updates wait for the receipt of the escrow")
	}
	for _, p := range s.Problems {
		fmt.Fprintf(b, "PROBLEM   %s\n", p)
	}
}

// WriteTo prints the status for a person.
func (s *RecoveryStatus) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	s.lines(&b)
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}
