package runtime

import (
	"bytes"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

// FuzzAccounts: the accounts of an image, written again, are the same.
func FuzzAccounts(f *testing.F) {
	f.Add("passwd", []byte("root:x:0:0:root:/root:/bin/sh\nredis:x:104:106::/var/lib/redis:/usr/sbin/nologin\n"))
	f.Add("group", []byte("audio:x:29:redis,www\r\n# a comment\nbroken:x\n::1:\n"))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		list, err := accounts(name, func() ([]byte, error) { return data, nil })
		if err != nil {
			return
		}
		var again bytes.Buffer
		for _, a := range list {
			fourth := strconv.FormatUint(uint64(a.gid), 10)
			if name == "group" {
				fourth = strings.Join(a.members, ",")
			}
			fmt.Fprintf(&again, "%s:x:%d:%s:\n", a.name, a.id, fourth)
		}
		back, err := accounts(name, func() ([]byte, error) { return again.Bytes(), nil })
		if again.Len() <= maxUserFileBytes && (err != nil || !reflect.DeepEqual(back, list)) {
			t.Errorf("%q has %+v, and written again %+v: %v", data, list, back, err)
		}
	})
}
