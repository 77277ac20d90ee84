package agent

import (
	"bufio"
	"bytes"
	"io"
	"strings"
	"testing"
)

// spy is a keyboard that remembers where what was typed went.
type spy struct {
	typed   io.Reader
	buffers [][]byte
}

func (s *spy) Read(p []byte) (int, error) {
	n, err := s.typed.Read(p)
	s.buffers = append(s.buffers, p[:n])
	return n, err
}

// TestTypedSecretsDoNotStay looks into the buffer that a secret was read through.
func TestTypedSecretsDoNotStay(t *testing.T) {
	long := strings.Repeat("secret", 40) // more than the buffer holds
	for typed, want := range map[string]string{
		" a secret \r\nnext\n": "a secret",
		"a secret":             "a secret",
		long + "\nnext\n":      "",
		long:                   "",
	} {
		keyboard := &spy{typed: strings.NewReader(typed)}
		line, _ := readLine(bufio.NewReaderSize(keyboard, 64))
		if string(line) != want {
			t.Errorf("%.20q: read %q", typed, line)
		}
		for _, b := range keyboard.buffers {
			if bytes.ContainsAny(b, "secr") && !bytes.Contains(b, []byte("next")) || bytes.Contains(b, []byte("secret")) {
				t.Errorf("%.20q: left in the buffer: %q", typed, b)
			}
		}
	}
}
