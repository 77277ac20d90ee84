// Package update is how a release travels to a device: what a repository holds,
// how a device verifies it, which release it chooses, and how its content is read.
// The vendor's side, which makes and signs repositories and bundles, is update/repo.
//
// # Parties and keys
//
// The vendor signs with four roles of TUF (The Update Framework, specification
// 1.0.31), each with its own keys and threshold. root says which keys there are.
// targets says which releases there are, by hash. Both can stay on a machine
// without a network. snapshot says which targets file is current, timestamp says
// which snapshot is; they are renewed often and live on the machine that publishes.
// The device has a root.json in its verified root file system and trusts nothing
// else: not the web server, not the stick, not the person who carries it.
//
// # Files
//
// A repository is a folder that any web server, object store or stick can hold:
//
//	metadata/N.root.json                        every version of root, from 1
//	metadata/timestamp.json                     the only file that is replaced
//	metadata/N.snapshot.json, N.targets.json    consistent snapshots, TUF §6.2
//	targets/PRODUCT/CHANNEL/ARCH/SHA256.VERSION.json   a [Release]: the TUF target
//	blobs/sha256/HEX                            what a Release names, by its hash
//
// The custom field of a target repeats what a device needs to choose ([Target]), so
// that choosing needs no other file. A bundle is the same files, of one release, in
// one tar file; see [OpenBundle]. A container registry can hold them too; see [OCI].
// A [Source] is any of these.
//
// # What a device does
//
// [New] and [Client.Check] walk the chain as TUF §5.3 has it: newer roots one by
// one, timestamp, snapshot, targets; all against one reference time that the caller
// computes once with [ReferenceTime], as clocks in the field cannot be trusted
// (F87, F89). What was verified is kept in the metadata store, synced to the medium,
// and a repository is never older than that again. Then the newest release is chosen
// that is meant for this device, its Release is read, and a [Candidate] gives its
// content through readers that verify what they hand out.
//
// Rotation: a root signed by its predecessor's threshold and its own replaces any
// key. When a key of timestamp or snapshot was replaced, what the store holds of
// both no longer counts, which ends a fast-forward attack with the stolen key.
//
// # What is not protected
//
// Who holds a threshold of targets keys, and may be heard, can install anything
// that is not of a lower security epoch. Who is between device and repository can
// keep the device from hearing of updates until the timestamp expires. A bundle
// with a lenient [Expiry] has no such end: an old one is refused only when the
// device has seen newer metadata. Content is not secret. An encrypted bundle keeps it
// from who carries the bundle, and from nobody who can read a release that has the
// fleet's key in it ([image.FleetKeyPath]). Delegated targets roles are not followed.
// Who can write to the data volume can take back what the store remembers, though not
// the keys in the release.
package update

import (
	"errors"
	"time"
)

// Errors that callers branch on.
var (
	// ErrNotFound is what a Source answers when it has no such file.
	ErrNotFound = errors.New("not found in the source")
	// ErrUntrusted marks everything that failed verification: it was damaged on
	// the way, or somebody changed it.
	ErrUntrusted = errors.New("verification failed")
	// ErrExpired marks metadata that is over at the reference time. Either nobody
	// renewed the repository, or somebody withholds its news, or the clock is wrong.
	ErrExpired = errors.New("metadata has expired")
	// ErrOlder marks metadata that is older than what the device has seen: an old
	// stick, or somebody who brings back old releases.
	ErrOlder = errors.New("older than what this device has seen")
	// ErrEncrypted marks a bundle that is encrypted, and no key was given.
	ErrEncrypted = errors.New("it is encrypted and there is no key to open it with")
	// ErrSlow marks a server that sends less than the least rate.
	ErrSlow = errors.New("too slow")
)

// Limits on what comes from outside, in bytes.
const (
	maxRootBytes       = 512 << 10
	maxTimestampBytes  = 16 << 10
	maxSnapshotBytes   = 2 << 20
	maxTargetsBytes    = 5 << 20
	maxDescriptorBytes = 1 << 20
	// MaxBlobBytes is the largest file that a ustar header can describe.
	MaxBlobBytes = 1<<33 - 1

	maxRootRotations = 256
	maxBlobs         = 256
)

// ReferenceTime is the time that expiry is judged by: the latest of the real-time
// clock, the build time of the running release, the newest verified metadata's
// ([State.NewestVerified]) and the last time a check was good at ([State.LastSeen]).
// An appliance with an empty clock battery still knows that it is not 1970 (F89).
//
// Nothing bounds it from above: a clock at 2099 makes everything expire, and an
// update fails until the clock is right again. State remembers no such time.
func ReferenceTime(rtc, build, newestVerified, lastSeen time.Time) time.Time {
	latest := rtc
	for _, t := range []time.Time{build, newestVerified, lastSeen} {
		if t.After(latest) {
			latest = t
		}
	}
	return latest.UTC()
}
