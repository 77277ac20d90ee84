package spec

import (
	"fmt"
	"math"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// scalar is a value with a spelling of its own. set reads what was written;
// plain gives what Marshal writes; expected names it in an error.
type scalar interface {
	set(n *yaml.Node) error
	plain() any
	expected() string
}

// Size is a length in bytes, written with a unit ("4GiB", "512MB") or as a
// whole number of bytes.
type Size int64

func (s *Size) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" && n.ShortTag() != "!!int" {
		return wrongType(s.expected(), n)
	}
	v, err := ParseSize(n.Value)
	*s = v
	return err
}
func (s *Size) plain() any       { return int64(*s) }
func (s *Size) expected() string { return `a size such as "4GiB"` }

// ParseSize reads a size: a whole number and B, kB, MB, GB, TB (powers of 1000)
// or KiB, MiB, GiB, TiB (powers of 1024). Without a unit it is bytes.
func ParseSize(text string) (Size, error) {
	digits := strings.TrimRight(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
	unit := strings.TrimSpace(text[len(digits):])
	units := []struct {
		name  string
		bytes int64
	}{{"", 1}, {"B", 1}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
		{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 {
		return 0, hint(`write a whole number and a unit: "512MiB"`, "%q is not a size", text)
	}
	for _, u := range units {
		if unit != u.name {
			continue
		}
		if n > math.MaxInt64/u.bytes {
			return 0, fmt.Errorf("size %q is over 2^63 bytes", text)
		}
		return Size(n * u.bytes), nil
	}
	names := []string{"KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"}
	remedy := didYouMean(unit, names)
	if len(unit) == 1 && strings.ContainsAny(unit, "kKmMgGtT") {
		up := strings.ToUpper(unit)
		remedy = fmt.Sprintf("%siB is a power of 1024, %sB a power of 1000", up, up)
	}
	return 0, hint(remedy, "size %q has the unknown unit %q", text, unit)
}

// Duration is a length of time in whole seconds, written as "10s" or "2m".
type Duration time.Duration

func (d *Duration) set(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!int" {
		return hint(fmt.Sprintf("write %ss for seconds", n.Value), "a duration needs its unit")
	}
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return wrongType(d.expected(), n)
	}
	v, err := time.ParseDuration(n.Value)
	if err != nil {
		return hint(`write "10s", "2m" or "1h"`, "%q is not a duration", n.Value)
	}
	if v <= 0 || v > 24*time.Hour || v%time.Second != 0 {
		return fmt.Errorf("%q is not a whole number of seconds from 1s to 24h", n.Value)
	}
	*d = Duration(v)
	return nil
}
func (d *Duration) plain() any       { return time.Duration(*d).String() }
func (d *Duration) expected() string { return `a duration such as "10s"` }

// Seconds is the duration in seconds.
func (d Duration) Seconds() int { return int(time.Duration(d) / time.Second) }

// Interval is the time from one event to the next in seconds, written as "6h" or
// "never", which is [Never].
type Interval int64

// Never is an interval that does not end. Zero is one that was not given.
const Never Interval = -1

const (
	minInterval = Interval(time.Minute / time.Second)
	maxInterval = Interval(30 * 24 * time.Hour / time.Second)
)

func (i *Interval) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return wrongType(i.expected(), n)
	}
	if n.Value == "never" {
		*i = Never
		return nil
	}
	v, err := time.ParseDuration(n.Value)
	if err != nil {
		return hint(`write "6h", "30m" or "never"`, "%q is not a duration", n.Value)
	}
	s := Interval(v / time.Second)
	if v%time.Second != 0 || s < minInterval || s > maxInterval {
		return fmt.Errorf("%q is not a whole number of seconds from 1m to 720h", n.Value)
	}
	*i = s
	return nil
}
func (i *Interval) plain() any {
	if *i == Never {
		return "never"
	}
	return (time.Duration(*i) * time.Second).String()
}
func (i *Interval) expected() string { return `a duration such as "6h", or "never"` }

// Seconds is the interval in seconds; 0 is never.
func (i Interval) Seconds() int64 { return max(int64(i), 0) }

// Window is a time of day in UTC, written as "02:00-05:00": minutes after midnight,
// the end not included. It may span midnight. The zero value is not given.
type Window struct{ StartMin, EndMin int }

func (w *Window) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return wrongType(w.expected(), n)
	}
	from, to, ok := strings.Cut(n.Value, "-")
	start, err1 := time.Parse("15:04", strings.TrimSpace(from))
	end, err2 := time.Parse("15:04", strings.TrimSpace(to))
	if !ok || err1 != nil || err2 != nil {
		return hint(`write "02:00-05:00", in UTC`, "%q is not a time of day from and to", n.Value)
	}
	v := Window{start.Hour()*60 + start.Minute(), end.Hour()*60 + end.Minute()}
	if v.StartMin == v.EndMin {
		return hint("leave it out for any time", "window %q begins when it ends", n.Value)
	}
	*w = v
	return nil
}
func (w *Window) plain() any {
	return fmt.Sprintf("%02d:%02d-%02d:%02d", w.StartMin/60, w.StartMin%60, w.EndMin/60, w.EndMin%60)
}
func (w *Window) expected() string { return `a time of day such as "02:00-05:00"` }

// Epoch is a moment in seconds since 1970, written as an RFC 3339 time, a date
// or a whole number of seconds (as in SOURCE_DATE_EPOCH). It is between 1980
// and 2107, which is what FAT can record.
type Epoch int64

// DefaultEpoch is the time put into an image that names none: 1980-01-01.
const DefaultEpoch Epoch = 315532800

const lastEpoch Epoch = 4354819199 // 2107-12-31T23:59:59Z

func (e *Epoch) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || !slices.Contains([]string{"!!str", "!!int", "!!timestamp"}, n.ShortTag()) {
		return wrongType(e.expected(), n)
	}
	v, err := strconv.ParseInt(n.Value, 10, 64)
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if err == nil {
			break
		}
		var t time.Time
		if t, err = time.Parse(layout, n.Value); err == nil {
			v = t.Unix()
		}
	}
	if err != nil {
		return hint("write 2026-01-31T00:00:00Z", "%q is not a time", n.Value)
	}
	if Epoch(v) < DefaultEpoch || Epoch(v) > lastEpoch {
		return fmt.Errorf("%s is not between 1980 and 2107, which is what the boot partition can record", n.Value)
	}
	*e = Epoch(v)
	return nil
}
func (e *Epoch) plain() any       { return time.Unix(int64(*e), 0).UTC().Format(time.RFC3339) }
func (e *Epoch) expected() string { return "a time such as 2026-01-31T00:00:00Z" }

// Mode is permission bits, written in octal as text: "0644".
type Mode uint32

func (m *Mode) set(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!int" {
		return hint(fmt.Sprintf("quote it: %q", n.Value), "expected %s, got a number", m.expected())
	}
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return wrongType(m.expected(), n)
	}
	v, err := strconv.ParseUint(n.Value, 8, 16)
	if err != nil || v > 0o7777 {
		return fmt.Errorf("%q is not an octal mode up to 7777", n.Value)
	}
	*m = Mode(v)
	return nil
}
func (m *Mode) plain() any       { return fmt.Sprintf("%04o", uint32(*m)) }
func (m *Mode) expected() string { return `an octal mode as text, such as "0644"` }

// ID is a user or group: a number, or a name that is looked up in the
// /etc/passwd or /etc/group of the image it applies to.
type ID struct {
	Name   string // empty when Number holds
	Number uint32
}

func (id *ID) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" && n.ShortTag() != "!!int" {
		return wrongType(id.expected(), n)
	}
	if n.ShortTag() == "!!int" {
		if err := n.Decode(&id.Number); err != nil {
			return fmt.Errorf("%s is not between 0 and %d", n.Value, uint32(math.MaxUint32))
		}
		return nil
	}
	v, err := ParseID(n.Value)
	*id = v
	return err
}
func (id *ID) plain() any {
	if id.Name != "" {
		return id.Name
	}
	return id.Number
}
func (id *ID) expected() string { return "a number or a name" }

// ParseID reads a number or a name. "root" is 0 without a lookup.
func ParseID(text string) (ID, error) {
	if v, err := strconv.ParseUint(text, 10, 32); err == nil {
		return ID{Number: uint32(v)}, nil
	}
	switch {
	case text == "root":
		return ID{}, nil
	case text == "" || strings.ContainsAny(text, ": \t\n/,"):
		return ID{}, fmt.Errorf("%q is neither a number nor a name", text)
	}
	return ID{Name: text}, nil
}

// Argv is a command line: a list of strings, or one string that is the program alone.
type Argv []string

func (a *Argv) set(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!str" {
		if strings.ContainsAny(n.Value, " \t\n") {
			return hint(`write a list: ["/sbin/init", "--option"]`, "a command with arguments is a list of strings")
		}
		*a = Argv{n.Value}
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		return wrongType(a.expected(), n)
	}
	argv := make(Argv, 0, len(n.Content))
	for _, item := range n.Content {
		if item.Kind != yaml.ScalarNode || item.ShortTag() != "!!str" {
			return wrongType(a.expected(), n)
		}
		argv = append(argv, item.Value)
	}
	*a = argv
	return nil
}
func (a *Argv) plain() any       { return plain(reflect.ValueOf([]string(*a))) }
func (a *Argv) expected() string { return "a list of strings" }

// Bind is "source:destination[:options]". Source is an absolute path on the
// device or the name of a volume of the spec; Options are mount options, none
// meaning the default of image/runtime.
type Bind struct {
	Source, Destination string
	Options             []string
}

func (b *Bind) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return wrongType(b.expected(), n)
	}
	parts := strings.Split(n.Value, ":")
	if len(parts) < 2 || len(parts) > 3 {
		return hint("write source:destination or source:destination:options", "bind %q has %d parts", n.Value, len(parts))
	}
	bind := Bind{Source: parts[0], Destination: parts[1]}
	if len(parts) == 3 {
		bind.Options = strings.Split(parts[2], ",")
	}
	if bind.Source == "" || strings.Contains(bind.Source, "/") && !path.IsAbs(bind.Source) {
		return fmt.Errorf("source of bind %q is neither an absolute path nor the name of a volume", n.Value)
	}
	if !path.IsAbs(bind.Destination) {
		return fmt.Errorf("destination of bind %q is not an absolute path", n.Value)
	}
	*b = bind
	return nil
}
func (b *Bind) plain() any       { return b.String() }
func (b *Bind) expected() string { return `a bind such as "/data:/data"` }

// String is the bind as it is written.
func (b Bind) String() string {
	text := b.Source + ":" + b.Destination
	if b.Options != nil {
		text += ":" + strings.Join(b.Options, ",")
	}
	return text
}

// IsVolume says whether Source is the name of a volume.
func (b Bind) IsVolume() bool { return !path.IsAbs(b.Source) }

// Tmpfs is "destination[:options]".
type Tmpfs struct {
	Destination string
	Options     []string
}

func (t *Tmpfs) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return wrongType(t.expected(), n)
	}
	destination, options, found := strings.Cut(n.Value, ":")
	if !path.IsAbs(destination) || strings.Contains(options, ":") {
		return hint("write /destination or /destination:options", "%q is not a tmpfs", n.Value)
	}
	*t = Tmpfs{Destination: destination}
	if found {
		t.Options = strings.Split(options, ",")
	}
	return nil
}
func (t *Tmpfs) plain() any {
	if t.Options == nil {
		return t.Destination
	}
	return t.Destination + ":" + strings.Join(t.Options, ",")
}
func (t *Tmpfs) expected() string { return `a tmpfs such as "/tmp:size=64M"` }

// Rlimit is "name,soft,hard", where a limit is a number or "unlimited".
type Rlimit struct {
	Type       string // "RLIMIT_NOFILE"
	Soft, Hard uint64 // math.MaxUint64 is unlimited
}

func (r *Rlimit) set(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return wrongType(r.expected(), n)
	}
	parts := strings.Split(n.Value, ",")
	if len(parts) != 3 {
		return hint(`write "nofile,1024,4096"`, "rlimit %q has %d parts, not name, soft and hard limit", n.Value, len(parts))
	}
	known := []string{"RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS",
		"RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_RSS",
		"RLIMIT_RTPRIO", "RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_STACK"}
	name := "RLIMIT_" + strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(parts[0])), "RLIMIT_")
	if !slices.Contains(known, name) {
		return hint(didYouMean(name, known), "unknown rlimit %q", strings.TrimSpace(parts[0]))
	}
	var limits [2]uint64
	for i, text := range parts[1:] {
		text = strings.ToLower(strings.TrimSpace(text))
		v, err := strconv.ParseUint(text, 10, 64)
		if err != nil && text != "unlimited" {
			return fmt.Errorf("limit %q of rlimit %q is neither a number nor unlimited", text, n.Value)
		}
		if text == "unlimited" {
			v = math.MaxUint64
		}
		limits[i] = v
	}
	if limits[0] > limits[1] {
		return fmt.Errorf("soft limit of rlimit %q is above its hard limit", n.Value)
	}
	*r = Rlimit{name, limits[0], limits[1]}
	return nil
}
func (r *Rlimit) plain() any {
	show := func(v uint64) string {
		if v == math.MaxUint64 {
			return "unlimited"
		}
		return strconv.FormatUint(v, 10)
	}
	return r.Type + "," + show(r.Soft) + "," + show(r.Hard)
}
func (r *Rlimit) expected() string { return `an rlimit such as "nofile,1024,4096"` }
