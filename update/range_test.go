package update

import (
	"fmt"
	"strconv"
	"testing"
)

// FuzzContentRange: a range, written again, is the same.
func FuzzContentRange(f *testing.F) {
	f.Add("bytes 5-99/100")
	f.Add("bytes 0-0/*")
	f.Add("bytes -1-2/3")
	f.Fuzz(func(t *testing.T, header string) {
		first, total, err := parseContentRange(header)
		if err != nil {
			return
		}
		size := "*"
		if total >= 0 {
			size = strconv.FormatInt(total, 10)
		}
		first2, total2, err := parseContentRange(fmt.Sprintf("bytes %d-%d/%s", first, first, size))
		if err != nil || first2 != first || total2 != total || first < 0 {
			t.Errorf("%q is %d of %d, and written again %d of %d: %v", header, first, total, first2, total2, err)
		}
	})
}
