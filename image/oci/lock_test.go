package oci

import (
	"errors"
	"net/http"
	"strings"
	"testing"
)

// FuzzLock: what is read, written and read again is written the same.
func FuzzLock(f *testing.F) {
	sum := " sha256:" + strings.Repeat("a", 64)
	f.Add("# top\n\n# c\nalpine:3" + sum + "\nzoo" + sum + "\n# end")
	f.Add("localhost:5000/a/b:c" + sum + "\r\n\n\n# x\n\n# y\n")
	f.Fuzz(func(t *testing.T, text string) {
		l, _, err := parseLock(strings.NewReader(text))
		if err != nil {
			return
		}
		once := l.format()
		again, _, err := parseLock(strings.NewReader(once))
		if err != nil {
			t.Fatalf("%v in\n%s", err, once)
		}
		if twice := again.format(); twice != once {
			t.Fatalf("once\n%s\ntwice\n%s", once, twice)
		}
	})
}

type refusing struct{}

func (refusing) RoundTrip(*http.Request) (*http.Response, error) { return nil, errors.New("sent") }

// The library would fall back to plain HTTP on private networks.
func TestPlainHTTPOnlyToLoopback(t *testing.T) {
	for url, want := range map[string]string{
		"http://localhost:5000/v2/": "sent", "http://127.0.0.1:5000/v2/": "sent", "http://[::1]:5000/v2/": "sent", "https://example.org/v2/": "sent",
		"http://192.168.1.2:5000/v2/": "plain HTTP", "http://registry.local/v2/": "plain HTTP", "http://localhost.example.org/v2/": "plain HTTP",
	} {
		r, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (guardedTransport{refusing{}}).RoundTrip(r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", url, err, want)
		}
	}
}
