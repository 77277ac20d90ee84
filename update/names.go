package update

import (
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// The files of a repository.
const (
	TimestampPath = "metadata/timestamp.json"
	blobPrefix    = "blobs/sha256/"
	targetsPrefix = "targets/"
)

// RootPath is the path of a version of root.
func RootPath(version int64) string { return versioned(version, "root") }

// SnapshotPath is the path of a version of snapshot.
func SnapshotPath(version int64) string { return versioned(version, "snapshot") }

// TargetsPath is the path of a version of targets.
func TargetsPath(version int64) string { return versioned(version, "targets") }

func versioned(version int64, role string) string {
	return "metadata/" + strconv.FormatInt(version, 10) + "." + role + ".json"
}

// BlobPath is the path of the content with that SHA-256, in hex.
func BlobPath(sha256Hex string) string { return blobPrefix + sha256Hex }

// DescriptorPath is the path of the Release that the TUF target name stands for:
// its file name is prefixed with the hash, TUF §6.2.
func DescriptorPath(target, sha256Hex string) string {
	dir, file := "", target
	if i := strings.LastIndexByte(target, '/'); i >= 0 {
		dir, file = target[:i+1], target[i+1:]
	}
	return targetsPrefix + dir + sha256Hex + "." + file
}

var (
	nameForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	metadataForm = regexp.MustCompile(`^metadata/([1-9][0-9]{0,17})\.(root|snapshot|targets)\.json$`)
	targetForm   = regexp.MustCompile(`^targets/([^/]+)/([^/]+)/([^/]+)/([0-9a-f]{64})\.([^/]+)\.json$`)
)

// class is what kind of file a path of a repository is, in the order of a bundle.
type class int

const (
	classMarker class = iota
	classRoot
	classTimestamp
	classSnapshot
	classTargets
	classDescriptor
	classBlob
	classSums
)

// classify says what a path is and how large it may be. It is the whole list of
// what a repository may be asked for, so no path can lead out of one.
func classify(path string) (class, int64, error) {
	if path == TimestampPath {
		return classTimestamp, maxTimestampBytes, nil
	}
	if m := metadataForm.FindStringSubmatch(path); m != nil {
		switch m[2] {
		case "root":
			return classRoot, maxRootBytes, nil
		case "snapshot":
			return classSnapshot, maxSnapshotBytes, nil
		}
		return classTargets, maxTargetsBytes, nil
	}
	if h, ok := strings.CutPrefix(path, blobPrefix); ok && validHash(h) {
		return classBlob, MaxBlobBytes, nil
	}
	if m := targetForm.FindStringSubmatch(path); m != nil && nameForm.MatchString(m[1]) && nameForm.MatchString(m[2]) &&
		nameForm.MatchString(m[3]) && ValidVersion(m[5]) {
		return classDescriptor, maxDescriptorBytes, nil
	}
	return 0, 0, fmt.Errorf("%.100q is not a path of a repository", path)
}

// ValidPath says whether a repository can have a file of that path.
func ValidPath(path string) bool {
	_, _, err := classify(path)
	return err == nil
}

// validHash accepts the one spelling of a SHA-256: 64 lower-case hex digits.
func validHash(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 32 && strings.ToLower(s) == s
}
