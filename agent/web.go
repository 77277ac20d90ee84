package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// webClient is for servers of the vendor's that files are sent to. It trusts the
// release's certificates, or the system's, takes the environment's proxy, and follows
// nobody elsewhere: what is sent is for that server.
func webClient(caPEM string) (*http.Client, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if caPEM != "" {
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM([]byte(caPEM)) {
			return nil, errors.New("the release's certificates for the server cannot be read")
		}
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: t, MaxResponseHeaderBytes: maxPosted,
			DialContext: (&net.Dialer{Timeout: 15 * time.Second}).DialContext, TLSHandshakeTimeout: 15 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// posting is a file to send to a server.
type posting struct {
	url, mediaType string
	userAgent      string
	content        []byte
	limit          int64 // of the server's answer
}

// send posts the file. An answer longer than the limit is an error.
func (p posting) send(ctx context.Context, c *http.Client) (status int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url, bytes.NewReader(p.content))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", p.mediaType)
	req.Header.Set("User-Agent", p.userAgent)
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, p.limit+1))
	if err == nil && int64(len(body)) > p.limit {
		err = fmt.Errorf("the server answers with more than %d bytes", p.limit)
	}
	return resp.StatusCode, body, err
}
