package update

import (
	"cmp"
	"regexp"
	"strings"
)

// A bundle's file names leave room for 30 characters.
const maxVersionChars = 30

var versionForm = regexp.MustCompile(`^\d+(\.\d+){0,3}(-[0-9A-Za-z.-]+)?$`)

// ValidVersion says whether s is a version as a spec has it: one to four numbers
// with dots, then perhaps a hyphen and a pre-release; at most 30 characters.
func ValidVersion(s string) bool {
	return len(s) <= maxVersionChars && versionForm.MatchString(s)
}

// CompareVersions orders two valid versions by precedence as Semantic Versioning
// 2.0.0 §11 has it, where a missing number is 0: 1.2 and 1.2.0 compare equal, and
// 1.2.0-rc1 comes before both. The result is -1, 0 or 1.
func CompareVersions(a, b string) int {
	an, ap, aPre := strings.Cut(a, "-")
	bn, bp, bPre := strings.Cut(b, "-")
	as, bs := strings.Split(an, "."), strings.Split(bn, ".")
	for i := range max(len(as), len(bs)) {
		if c := compareNumbers(at(as, i), at(bs, i)); c != 0 {
			return c
		}
	}
	switch {
	case aPre && !bPre:
		return -1
	case !aPre && bPre:
		return 1
	case !aPre:
		return 0
	}
	return comparePre(strings.Split(ap, "."), strings.Split(bp, "."))
}

func at(list []string, i int) string {
	if i < len(list) {
		return list[i]
	}
	return "0"
}

// compareNumbers compares decimal digits of any length.
func compareNumbers(a, b string) int {
	a, b = strings.TrimLeft(a, "0"), strings.TrimLeft(b, "0")
	if c := cmp.Compare(len(a), len(b)); c != 0 {
		return c
	}
	return strings.Compare(a, b)
}

func comparePre(as, bs []string) int {
	for i := range min(len(as), len(bs)) {
		a, b := as[i], bs[i]
		aNum, bNum := isNumber(a), isNumber(b)
		c := 0
		switch {
		case aNum && bNum:
			c = compareNumbers(a, b)
		case aNum:
			c = -1 // numbers come before words
		case bNum:
			c = 1
		default:
			c = strings.Compare(a, b)
		}
		if c != 0 {
			return c
		}
	}
	return cmp.Compare(len(as), len(bs))
}

func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
