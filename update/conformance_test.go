package update

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// The cases of the TUF project's client conformance suite (tuf-conformance), under
// its names, made anew with [vendor], for where the suite itself cannot run. Those
// of its rollback, expiry and download files that are not here are in
// attack_test.go; those of delegations are not ours, as the package doc says.

// rewrite changes metadata below what go-tuf's types can say, and signs it.
func (v *vendor) rewrite(path string, keys []ed25519.PrivateKey, change func(signed map[string]any)) {
	v.t.Helper()
	var m struct {
		Signed     map[string]any   `json:"signed"`
		Signatures []map[string]any `json:"signatures"`
	}
	if err := json.Unmarshal(v.files[path], &m); err != nil {
		v.t.Fatal(err)
	}
	change(m.Signed)
	payload, err := cjson.EncodeCanonical(m.Signed)
	if err != nil {
		v.t.Fatal(err)
	}
	m.Signatures = nil
	for _, k := range keys {
		m.Signatures = append(m.Signatures, map[string]any{"keyid": keyID(v.t, k), "sig": hex.EncodeToString(ed25519.Sign(k, payload))})
	}
	v.put(path, m)
}

// resignatures changes the list of signatures.
func (v *vendor) resignatures(path string, change func([]any) []any) {
	v.t.Helper()
	var m map[string]any
	if err := json.Unmarshal(v.files[path], &m); err != nil {
		v.t.Fatal(err)
	}
	m["signatures"] = change(m["signatures"].([]any))
	v.put(path, m)
}

func (v *vendor) put(path string, m any) {
	v.t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		v.t.Fatal(err)
	}
	v.files[path] = b
}

// give replaces the keys and the threshold of a role; sign are those that sign it.
func (v *vendor) give(role string, keys []byte, threshold int, sign []byte) {
	v.t.Helper()
	v.root.Signed.Roles[role].KeyIDs = nil
	for _, n := range keys {
		v.addKey(role, key(n))
	}
	v.root.Signed.Roles[role].Threshold = threshold
	v.keys[role] = nil
	for _, n := range sign {
		v.keys[role] = append(v.keys[role], key(n))
	}
}

// nextRoot signs the root's next version with the root's keys, and the rest anew.
func (v *vendor) nextRoot() {
	v.t.Helper()
	v.root.Signed.Version++
	v.signRoot(v.keys["root"]...)
	v.next()
}

// snapshotAgain makes the rest fit a snapshot that was changed.
func (v *vendor) snapshotAgain() { v.signTimestamp(v.versions["snapshot"]) }

// part is a part of what is signed.
func part(signed map[string]any, path ...string) map[string]any {
	for _, p := range path {
		signed = signed[p].(map[string]any)
	}
	return signed
}

type rootVersion struct {
	keys      []byte
	threshold int
	sign      []byte
}

func TestConformanceRootRotation(t *testing.T) {
	one := func(keys, sign string, threshold int) rootVersion {
		number := func(s string) (list []byte) {
			for _, c := range []byte(s) {
				list = append(list, 200+c-'0')
			}
			return list
		}
		return rootVersion{number(keys), threshold, number(sign)}
	}
	for name, c := range map[string]struct {
		versions []rootVersion
		refused  bool // the last one
	}{
		"1-of-1-key-rotation":                   {[]rootVersion{one("1", "1", 1), one("2", "21", 1), one("2", "2", 1)}, false},
		"1-of-1-key-rotation-unused-signatures": {[]rootVersion{one("1", "314", 1), one("2", "3214", 1), one("2", "324", 1)}, false},
		"3-of-5-sign-with-different-keycombos": {[]rootVersion{one("01234", "024", 3), one("01234", "041", 3), one("01234", "013", 3),
			one("01234", "013", 3)}, false},
		"3-of-5-one-key-rotated": {[]rootVersion{one("01234", "024", 3), one("01345", "041", 3)}, false},
		"3-of-5-one-key-rotated-with-intermediate-step": {[]rootVersion{one("01234", "024", 3), one("01345", "0245", 3),
			one("01345", "045", 3)}, false},
		"3-of-5-all-keys-rotated-with-intermediate-step": {[]rootVersion{one("01234", "024", 3), one("56789", "024567", 3),
			one("56789", "567", 3)}, false},
		"1-of-3-threshold-increase-to-2-of-3":                             {[]rootVersion{one("123", "1", 1), one("123", "12", 2)}, false},
		"2-of-3-threshold-decrease-to-1-of-3":                             {[]rootVersion{one("123", "12", 2), one("123", "12", 1), one("123", "1", 1)}, false},
		"1-of-2-threshold-increase-to-2-of-2":                             {[]rootVersion{one("1", "1", 1), one("12", "12", 2)}, false},
		"1-of-1-key-rotation-fail-not-signed-with-old-key":                {[]rootVersion{one("1", "1", 1), one("2", "234", 1)}, true},
		"1-of-1-key-rotation-fail-not-signed-with-new-key":                {[]rootVersion{one("1", "1", 1), one("2", "134", 1)}, true},
		"3-of-5-one-key-rotate-fails-not-signed-with-3-new-keys":          {[]rootVersion{one("01234", "024", 3), one("01345", "024", 3)}, true},
		"3-of-5-one-key-rotate-fails-not-signed-with-3-old-keys":          {[]rootVersion{one("01234", "024", 3), one("01345", "045", 3)}, true},
		"1-of-3-threshold-bump-to-2-of-3-fails-new-threshold-not-reached": {[]rootVersion{one("123", "1", 1), one("123", "2", 2)}, true},
		"2-of-3-threshold-decr-to-1-of-3-fails-old-threshold-not-reached": {[]rootVersion{one("123", "12", 2), one("123", "1", 1)}, true},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVendor(t)
			for i, r := range c.versions {
				v.give("root", r.keys, r.threshold, r.sign)
				v.root.Signed.Version = int64(i + 1)
				v.signRoot(v.keys["root"]...)
			}
			u := newUnit(t, v)
			a, err := u.check(v.source("server"))
			if c.refused {
				if !errors.Is(err, ErrUntrusted) {
					t.Errorf("%+v, %v", a, err)
				}
				return
			}
			if err != nil || a.Root != int64(len(c.versions)) || a.Candidate == nil {
				t.Errorf("%+v, %v", a, err)
			}
		})
	}
}

func TestConformanceNonRootRotations(t *testing.T) {
	for name, c := range map[string]struct {
		keys      []byte
		threshold int
		sign      []byte
		refused   bool
	}{
		"1-of-1-key-rotation":                                            {[]byte{202}, 1, []byte{202}, false},
		"1-of-1-key-rotation-unused-signatures":                          {[]byte{201}, 1, []byte{203, 201, 204}, false},
		"1-of-1-key-rotation-fail-not-signed-with-new-key":               {[]byte{202}, 1, []byte{201, 203, 204}, true},
		"3-of-5-one-key-signature-wrong-not-signed-with-3-expected-keys": {[]byte{200, 201, 203, 204, 205}, 3, []byte{200, 202, 204}, true},
		"2-of-5-one-key-signature-missing-threshold-not-reached":         {[]byte{200, 201, 203, 204, 205}, 3, []byte{200, 204}, true},
		"3-of-5-sign-first-combo":                                        {[]byte{200, 201, 202, 203, 204}, 3, []byte{200, 202, 204}, false},
		"3-of-5-sign-second-combo":                                       {[]byte{200, 201, 202, 203, 204}, 3, []byte{200, 204, 201}, false},
		"3-of-5-sign-third-combo":                                        {[]byte{200, 201, 202, 203, 204}, 3, []byte{200, 201, 203}, false},
		"3-of-5-sign-fourth-combo":                                       {[]byte{200, 201, 202, 203, 204}, 3, []byte{201, 202, 203}, false},
		"3-of-5-sign-fifth-combo":                                        {[]byte{200, 201, 202, 203, 204}, 3, []byte{202, 203, 204}, false},
	} {
		for _, role := range []string{"timestamp", "snapshot", "targets"} {
			t.Run(name+"/"+role, func(t *testing.T) {
				v := newVendor(t)
				u := newUnit(t, v)
				u.mustFind(v.source("server"), "2.0.0")
				v.give(role, c.keys, c.threshold, c.sign)
				v.nextRoot()
				a, err := u.check(v.source("server"))
				if c.refused != errors.Is(err, ErrUntrusted) || !c.refused && (err != nil || a.Root != 2 || a.Candidate == nil) {
					t.Errorf("refused should be %v: %+v, %v", c.refused, a, err)
				}
			})
		}
	}
}

// TestConformance has the single cases. The device has seen version 1 of everything.
func TestConformance(t *testing.T) {
	root := func(change func(signed map[string]any)) func(v *vendor) {
		return func(v *vendor) {
			v.nextRoot()
			v.rewrite(RootPath(2), v.keys["root"], change)
		}
	}
	aliases := func(n int) func(signed map[string]any) {
		return func(signed map[string]any) { // one key under n more names
			snapshot := part(signed, "roles", "snapshot")
			ids := snapshot["keyids"].([]any)
			for i := range n {
				alias := strings.Repeat(string(rune('a'+i)), 64)
				part(signed, "keys")[alias] = part(signed, "keys")[ids[0].(string)]
				snapshot["keyids"] = append(snapshot["keyids"].([]any), alias)
			}
			snapshot["threshold"] = n
		}
	}
	unknown := errors.New("only TUF 1 with consistent snapshots is known")
	for name, c := range map[string]struct {
		attack func(v *vendor)
		want   error // nil: taken
		root   int64 // that the device has afterwards
	}{
		"test_basic_init_and_refresh": {func(*vendor) {}, nil, 1},
		"test_custom_fields": {root(func(s map[string]any) {
			s["custom-field"] = "value"
			id := part(s, "roles", "root")["keyids"].([]any)[0].(string)
			part(s, "keys", id)["extra-field"] = map[string]any{"a": 1, "b": 2}
			part(s, "roles", "root")["another-field"] = "value"
		}), nil, 2},
		"custom fields: unicode, escapes and empty names": {root(func(s map[string]any) {
			s["Grüße \u2028 \"\\"] = []any{"日本語", "\x01\t", "é", nil, true, map[string]any{}}
			s[""] = ""
		}), nil, 2},
		"custom fields: of timestamp, snapshot and targets": {func(v *vendor) {
			v.next()
			x := func(s map[string]any) { s["x"] = map[string]any{"ü": "✓"} }
			v.rewrite(TargetsPath(2), v.keys["targets"], x)
			v.signSnapshot(2)
			v.rewrite(SnapshotPath(2), v.keys["snapshot"], x)
			v.signTimestamp(2)
			v.rewrite(TimestampPath, v.keys["timestamp"], x)
		}, nil, 1},
		"custom fields: changed after signing": {func(v *vendor) {
			v.next()
			v.rewrite(TimestampPath, v.keys["timestamp"], func(s map[string]any) { s["x"] = "before" })
			v.files[TimestampPath] = []byte(strings.Replace(string(v.files[TimestampPath]), "before", "behind", 1))
		}, ErrUntrusted, 1},
		"test_deprecated_keyid_hash_algorithms": {root(func(s map[string]any) {
			part(s, "keys", part(s, "roles", "root")["keyids"].([]any)[0].(string))["keyid_hash_algorithms"] = "md5"
		}), nil, 2},
		"test_snapshot_does_not_meet_threshold": {func(v *vendor) {
			v.give("snapshot", []byte{201, 202, 203}, 3, []byte{201, 202})
			v.nextRoot()
		}, ErrUntrusted, 2},
		"test_snapshot_has_too_few_keys": {func(v *vendor) {
			v.give("snapshot", []byte{200, 201, 202, 203, 204}, 6, []byte{200, 201, 202, 203, 204})
			v.nextRoot()
		}, ErrUntrusted, 2},
		"test_duplicate_keys: one key id many times": {func(v *vendor) {
			v.nextRoot()
			v.rewrite(RootPath(2), v.keys["root"], func(s map[string]any) {
				snapshot := part(s, "roles", "snapshot")
				id := snapshot["keyids"].([]any)[0]
				snapshot["keyids"] = []any{id, id, id, id}
				snapshot["threshold"] = 3
			})
			v.resignatures(SnapshotPath(2), func(s []any) []any { return append(s, s[0], s[0], s[0]) })
			v.snapshotAgain()
		}, ErrUntrusted, 2},
		"test_duplicate_keys: one key under many names": {func(v *vendor) {
			v.nextRoot()
			v.rewrite(RootPath(2), v.keys["root"], aliases(3))
			v.resignatures(SnapshotPath(2), func(s []any) []any {
				for _, alias := range "abc" {
					s = append(s, map[string]any{"keyid": strings.Repeat(string(alias), 64), "sig": s[0].(map[string]any)["sig"]})
				}
				return s
			})
			v.snapshotAgain()
		}, ErrUntrusted, 2},
		"test_duplicate_sig_keyids": {func(v *vendor) {
			v.next()
			v.resignatures(SnapshotPath(2), func(s []any) []any { return append(s, s[0]) })
			v.snapshotAgain()
		}, ErrUntrusted, 1},
		"test_invalid_sig_in_valid_metadata: plausible": {func(v *vendor) {
			v.give("timestamp", []byte{5, 201}, 1, []byte{201})
			v.nextRoot()
			v.resignatures(TimestampPath, func(s []any) []any {
				return append(s, map[string]any{"keyid": keyID(v.t, key(5)), "sig": strings.Repeat("ab", 64)})
			})
		}, nil, 2},
		"test_invalid_sig_in_valid_metadata: empty": {func(v *vendor) {
			v.give("timestamp", []byte{5, 201}, 1, []byte{201})
			v.nextRoot()
			v.resignatures(TimestampPath, func(s []any) []any { return append(s, map[string]any{"keyid": keyID(v.t, key(5)), "sig": ""}) })
		}, nil, 2},
		"signature of a key that nobody knows": {func(v *vendor) {
			v.next()
			v.resignatures(TimestampPath, func(s []any) []any {
				return append([]any{map[string]any{"keyid": strings.Repeat("0", 64), "sig": "00"}}, s...)
			})
		}, nil, 1},
		"no signatures": {func(v *vendor) {
			v.next()
			v.resignatures(TimestampPath, func([]any) []any { return []any{} })
		}, ErrUntrusted, 1},
		"test_timestamp_eq_versions_check": {func(v *vendor) {
			v.versions["snapshot"] = 100
			v.signSnapshot(1)
			v.signTimestamp(100) // under the version that was seen
		}, nil, 1},
		"test_new_snapshot_version_mismatch": {func(v *vendor) {
			v.versions["timestamp"]++
			v.versions["snapshot"] = 3
			v.signSnapshot(1)
			v.files[SnapshotPath(2)] = v.files[SnapshotPath(3)]
			ts := metadata.Timestamp(v.expires["timestamp"])
			ts.Signed.Version = 2
			ts.Signed.Meta["snapshot.json"] = v.info(SnapshotPath(2), 2)
			v.files[TimestampPath] = signed(v.t, ts, v.keys["timestamp"])
		}, ErrOlder, 1},
		"test_new_targets_version_mismatch": {func(v *vendor) {
			v.next()
			v.rewrite(TargetsPath(2), v.keys["targets"], func(s map[string]any) { s["version"] = 3 })
			v.signSnapshot(2)
			v.snapshotAgain()
		}, ErrOlder, 1},
		"test_new_targets_hash_mismatch": {func(v *vendor) {
			v.next()
			v.files[TargetsPath(2)] = append(v.files[TargetsPath(2)], '\n')
		}, ErrUntrusted, 1},
		"test_root_expired": {func(v *vendor) {
			v.root.Signed.Expires = noon.AddDate(0, 0, -1)
			v.nextRoot()
		}, ErrExpired, 2},
		"an expired root on the way": {func(v *vendor) {
			good := v.root.Signed.Expires
			v.root.Signed.Expires = noon.AddDate(-1, 0, 0)
			v.nextRoot()
			v.root.Signed.Expires = good
			v.nextRoot()
		}, nil, 3},
		"a gap in the roots": {func(v *vendor) {
			v.nextRoot()
			v.nextRoot()
			delete(v.files, RootPath(2))
		}, nil, 1},
		"a root of the same version":    {root(func(s map[string]any) { s["version"] = 1 }), ErrUntrusted, 1},
		"a root that skips a version":   {root(func(s map[string]any) { s["version"] = 3 }), ErrUntrusted, 1},
		"version 0":                     {root(func(s map[string]any) { s["version"] = 0 }), ErrUntrusted, 1},
		"version that is a text":        {root(func(s map[string]any) { s["version"] = "2" }), ErrUntrusted, 1},
		"no version":                    {root(func(s map[string]any) { delete(s, "version") }), ErrUntrusted, 1},
		"no roles":                      {root(func(s map[string]any) { s["roles"] = map[string]any{} }), ErrUntrusted, 1},
		"one role is missing":           {root(func(s map[string]any) { delete(part(s, "roles"), "snapshot") }), ErrUntrusted, 2},
		"threshold 0 of root":           {root(func(s map[string]any) { part(s, "roles", "root")["threshold"] = 0 }), ErrUntrusted, 1},
		"threshold -1 of root":          {root(func(s map[string]any) { part(s, "roles", "root")["threshold"] = -1 }), ErrUntrusted, 1},
		"threshold 0 of timestamp":      {func(v *vendor) { v.give("timestamp", []byte{5}, 0, nil); v.nextRoot() }, ErrUntrusted, 2},
		"threshold -1 of snapshot":      {func(v *vendor) { v.give("snapshot", []byte{4}, -1, nil); v.nextRoot() }, ErrUntrusted, 2},
		"spec_version of a new minor":   {root(func(s map[string]any) { s["spec_version"] = "1.9.0" }), nil, 2},
		"spec_version of a new major":   {root(func(s map[string]any) { s["spec_version"] = "2.0.0" }), unknown, 2},
		"spec_version that is none":     {root(func(s map[string]any) { s["spec_version"] = "" }), unknown, 2},
		"consistent_snapshot false":     {root(func(s map[string]any) { s["consistent_snapshot"] = false }), unknown, 2},
		"consistent_snapshot is absent": {root(func(s map[string]any) { delete(s, "consistent_snapshot") }), ErrUntrusted, 1},
		"timestamp that calls itself another role": {func(v *vendor) {
			v.next()
			v.rewrite(TimestampPath, v.keys["timestamp"], func(s map[string]any) { s["_type"] = "Timestamp" })
		}, ErrUntrusted, 1},
		"timestamp of a new major": {func(v *vendor) {
			v.next()
			v.rewrite(TimestampPath, v.keys["timestamp"], func(s map[string]any) { s["spec_version"] = "2.0.0" })
		}, nil, 1}, // root's counts, which the same vendor signs; the suite has no such case
		"expires that is no time": {func(v *vendor) {
			v.next()
			v.rewrite(TimestampPath, v.keys["timestamp"], func(s map[string]any) { s["expires"] = "tomorrow" })
		}, ErrUntrusted, 1},
		"no expires": {func(v *vendor) {
			v.next()
			v.rewrite(TimestampPath, v.keys["timestamp"], func(s map[string]any) { delete(s, "expires") })
		}, ErrUntrusted, 1},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVendor(t)
			u := newUnit(t, v)
			u.mustFind(v.source("server"), "2.0.0")
			before := u.stored()
			c.attack(v)
			a, err := u.check(v.source("server"))
			switch {
			case c.want == nil && (err != nil || a.Candidate == nil || a.Root != c.root):
				t.Fatalf("%+v, %v; want it taken with root %d", a, err, c.root)
			case c.want != nil && (err == nil || !errors.Is(err, c.want) && !strings.Contains(err.Error(), c.want.Error())):
				t.Fatalf("%+v, %v; want %v", a, err, c.want)
			}
			kept, _, err := loadTrust(u.store)
			if err != nil {
				t.Fatal(err)
			}
			last, err := metadata.Root().FromBytes(kept.Roots[len(kept.Roots)-1])
			if err != nil || last.Signed.Version != c.root {
				t.Errorf("the device has root %d, %v; want %d", last.Signed.Version, err, c.root)
			}
			if c.want != nil && c.root == 1 && u.stored()["trust.json"] != before["trust.json"] {
				t.Error("the store changed")
			}
		})
	}
}

// TestConformanceInitialRoot: test_invalid_initial_root, test_unsigned_initial_root.
func TestConformanceInitialRoot(t *testing.T) {
	v := newVendor(t)
	for name, change := range map[string]func(v *vendor){
		"no version": func(v *vendor) {
			v.rewrite(RootPath(1), v.keys["root"], func(s map[string]any) { delete(s, "version") })
		},
		"unsigned":        func(v *vendor) { v.resignatures(RootPath(1), func([]any) []any { return []any{} }) },
		"wrong signature": func(v *vendor) { v.signRoot(key(77), key(78)) },
	} {
		good := v.files[RootPath(1)]
		change(v)
		if _, err := New(Options{Root: v.files[RootPath(1)], StateDir: t.TempDir(), Source: v.source("folder"), Now: noon}); err == nil && name != "no version" {
			t.Errorf("%s: taken", name)
		} else if err == nil {
			if a, err := newUnit(t, v).check(v.source("server")); err == nil {
				t.Errorf("%s: %+v", name, a)
			}
		}
		v.files[RootPath(1)] = good
	}
}

// TestConformanceExpiredLocal: test_expired_metadata, where what the device has is
// over and what the repository has is not.
func TestConformanceExpiredLocal(t *testing.T) {
	v := newVendor(t)
	u := newUnit(t, v)
	u.mustFind(v.source("server"), "2.0.0")
	v.expires["timestamp"], v.expires["snapshot"] = noon.AddDate(0, 3, 0), noon.AddDate(0, 3, 0)
	v.next()
	u.now = noon.AddDate(0, 2, 0)
	if a, err := u.check(v.source("server")); err != nil || a.Timestamp != 2 || a.Targets != 2 {
		t.Errorf("%+v, %v", a, err)
	}
}

// TestConformanceKeyTypes: test_keytype_and_scheme, of a key of root that must sign.
func TestConformanceKeyTypes(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]struct {
		key  crypto.Signer
		sign func(payload []byte) ([]byte, error)
	}{
		"rsa/rsassa-pss-sha256": {rsaKey, func(b []byte) ([]byte, error) {
			sum := sha256.Sum256(b)
			return rsa.SignPSS(rand.Reader, rsaKey, crypto.SHA256, sum[:], &rsa.PSSOptions{SaltLength: 32})
		}},
		"ecdsa/ecdsa-sha2-nistp256": {ecKey, func(b []byte) ([]byte, error) {
			sum := sha256.Sum256(b)
			return ecdsa.SignASN1(rand.Reader, ecKey, sum[:])
		}},
		"ed25519/ed25519": {key(9), func(b []byte) ([]byte, error) { return ed25519.Sign(key(9), b), nil }},
	} {
		for _, bad := range []bool{false, true} {
			v := newVendor(t)
			tk, err := metadata.KeyFromPublicKey(k.key.Public())
			if err == nil {
				err = v.root.Signed.AddKey(tk, "root")
			}
			if err != nil {
				t.Fatal(err)
			}
			v.root.Signed.Roles["root"].Threshold = 3
			v.nextRoot()
			v.resignatures(RootPath(2), func(s []any) []any {
				payload, err := cjson.EncodeCanonical(v.root.Signed)
				if err != nil {
					t.Fatal(err)
				}
				sig, err := k.sign(payload)
				if err != nil {
					t.Fatal(err)
				}
				if bad {
					sig[len(sig)-1] ^= 1
				}
				id, err := tk.ID()
				if err != nil {
					t.Fatal(err)
				}
				return slices.Insert(s, 1, any(map[string]any{"keyid": id, "sig": hex.EncodeToString(sig)}))
			})
			a, err := newUnit(t, v).check(v.source("server"))
			if bad != errors.Is(err, ErrUntrusted) || !bad && (err != nil || a.Root != 2) {
				t.Errorf("%s, wrong signature %v: %+v, %v", name, bad, a, err)
			}
		}
	}
}
