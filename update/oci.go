package update

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/holdfast-os/holdfast/image"
)

// What a publication in a registry is marked with. The vendor's side pushes it.
const (
	// OCIArtifactType is that of the image manifest under the tag.
	OCIArtifactType = "application/vnd.holdfast.repository.v1"
	// OCIFileType is the media type of the manifest's layers, each a file of the repository.
	OCIFileType = "application/vnd.holdfast.repository.file.v1"
	// OCITitle is the annotation of a layer that has the file's path.
	OCITitle = "org.opencontainers.image.title"

	ociManifestType = "application/vnd.oci.image.manifest.v1+json"
)

// Limits on what a registry says.
const (
	maxManifestBytes = 4 << 20 // distribution-spec 1.1: what registries should take
	maxManifestFiles = 16384
	maxTokenBytes    = 64 << 10 // of the answer and of the token in it
)

// OCI is a repository in a container registry, by the OCI distribution specification
// 1.1. A tag names one image manifest, whose layers are the files: content goes by its
// hash in the registry as it does here, so that blobs/sha256/HEX is asked for without
// looking, and of the other files the manifest says the hash. A check sees one
// manifest, whoever moves the tag meanwhile.
//
// The registry is trusted with nothing, no more than a web server: not even that a
// blob has the digest by which it was asked for. What it gives, [Client] verifies.
// It has to give it to everybody: a device has no password, and gets, where the
// registry wants one (Docker's token protocol), a token that everybody gets.
//
// All is as with [HTTP] otherwise: limits, proxies, pauses, and going on with what broke off.
type OCI struct {
	h      *HTTP
	at     image.Registry
	tokens *tokens

	mu sync.Mutex
	// view has the digests of what is not named by its hash, under the tag as it was
	// when it was read; nil before.
	view map[string]string
	// spent says that the view's timestamp was read, so that a new check has begun
	// when a root or a timestamp is asked for.
	spent bool
}

// NewOCI is the repository at oci://HOST/NAME:TAG. It connects to nothing yet. TLS is
// needed except to this machine, where it is used only when o.CAs is set.
func NewOCI(address string, o HTTPOptions) (*OCI, error) {
	at, err := image.ParseRegistry(address)
	if err != nil {
		return nil, fmt.Errorf("repository address: %w", err)
	}
	base := &url.URL{Scheme: "https", Host: at.Host, Path: "/v2/" + at.Name}
	if at.Loopback && o.CAs == nil {
		base.Scheme = "http"
	}
	h := newHTTP(base, o)
	h.client.CheckRedirect = func(r *http.Request, via []*http.Request) error {
		if err := checkRedirect(r, via); err != nil {
			return err
		}
		return tlsOrLoopback(r.URL)
	}
	return &OCI{h: h, at: at, tokens: &tokens{scope: "repository:" + at.Name + ":pull"}}, nil
}

// tlsOrLoopback: without TLS to this machine only.
func tlsOrLoopback(u *url.URL) error {
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "https" || u.Scheme == "http" && (u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()) {
		return nil
	}
	return permanent{fmt.Errorf("%.200q is neither https nor this machine", u.Redacted())}
}

// CloseIdle gives up connections kept for reuse.
func (o *OCI) CloseIdle() { o.h.CloseIdle() }

// Fetch implements [Source].
func (o *OCI) Fetch(ctx context.Context, path string, offset, length int64) (io.ReadCloser, int64, error) {
	c, _, err := classify(path)
	if err != nil {
		return nil, 0, err
	}
	hash := strings.TrimPrefix(path, blobPrefix)
	if c != classBlob {
		if hash, err = o.find(ctx, path, c); err != nil {
			return nil, 0, fmt.Errorf("fetch %s: %w", path, err)
		}
	}
	return o.h.open(ctx, resource{path: path, url: o.h.base.JoinPath("blobs", "sha256:"+hash), registry: o.tokens, hashed: true}, offset, length)
}

// find says by which hash a file of the repository goes.
func (o *OCI) find(ctx context.Context, path string, c class) (string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.view == nil || o.spent && (c == classRoot || c == classTimestamp) {
		view, err := o.readManifest(ctx)
		if err != nil {
			return "", fmt.Errorf("%v: %w", o.at, err)
		}
		o.view, o.spent = view, false
	}
	o.spent = o.spent || c == classTimestamp
	hash, ok := o.view[path]
	if !ok {
		return "", ErrNotFound
	}
	return hash, nil
}

func (o *OCI) readManifest(ctx context.Context) (_ map[string]string, err error) {
	what := resource{path: "manifest", url: o.h.base.JoinPath("manifests", o.at.Tag), accept: ociManifestType, registry: o.tokens}
	r, size, err := o.h.open(ctx, what, 0, -1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if size > maxManifestBytes {
		return nil, fmt.Errorf("%w: a manifest of %d bytes, at most %d are allowed", ErrUntrusted, size, maxManifestBytes)
	}
	text, err := readAll(r, maxManifestBytes)
	if errors.Is(err, errTooLong) {
		return nil, fmt.Errorf("%w: manifest: %w", ErrUntrusted, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	view, err := parseManifest(text)
	if err != nil {
		return nil, fmt.Errorf("%w: manifest: %w; the tag holds something else, or somebody changed it", ErrUntrusted, err)
	}
	return view, nil
}

// parseManifest maps the paths of a manifest's layers to their hashes, but for blobs.
// Layers are taken one by one, as many small ones would be large in memory.
func parseManifest(text []byte) (map[string]string, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	view, artifact, n := map[string]string{}, "", 0
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	for d.More() {
		key, err := d.Token()
		switch {
		case err != nil:
		case key == "artifactType":
			err = d.Decode(&artifact)
		case key == "layers":
			err = parseLayers(d, view, &n)
		default:
			err = d.Decode(new(json.RawMessage))
		}
		if err != nil {
			return nil, err
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, noEOF(err)
	}
	if artifact != OCIArtifactType {
		return nil, fmt.Errorf("its artifactType is %.100q and not %s", artifact, OCIArtifactType)
	}
	return view, nil
}

func parseLayers(d *json.Decoder, view map[string]string, n *int) error {
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return errors.New("layers is not a list")
	}
	for d.More() {
		var layer struct {
			Digest      string `json:"digest"`
			Annotations struct {
				Title string `json:"org.opencontainers.image.title"`
			} `json:"annotations"`
		}
		if err := d.Decode(&layer); err != nil {
			return err
		}
		if *n++; *n > maxManifestFiles {
			return fmt.Errorf("more than %d layers", maxManifestFiles)
		}
		title := layer.Annotations.Title
		c, _, err := classify(title)
		if err != nil || c == classBlob {
			continue // blobs need no looking up, and another version may add files
		}
		hash, ok := strings.CutPrefix(layer.Digest, "sha256:")
		if !ok || !validHash(hash) {
			return fmt.Errorf("%s has the digest %.100q", title, layer.Digest)
		}
		if _, twice := view[title]; twice {
			return fmt.Errorf("%s is there twice", title)
		}
		view[title] = hash
	}
	_, err := d.Token()
	return err
}

// tokens are the anonymous bearer tokens of a registry, by Docker's token protocol:
// distribution.github.io/distribution/spec/auth/token. One is good for minutes.
type tokens struct {
	scope string
	mu    sync.Mutex
	token string
}

func (t *tokens) current() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.token
}

// renew gets a token where the registry says that it is to be had.
func (t *tokens) renew(ctx context.Context, h *HTTP, challenges []string) (string, error) {
	u, err := t.endpoint(h.base, challenges)
	if err != nil {
		return "", permanent{err}
	}
	req, err := h.newRequest(ctx, u)
	if err != nil {
		return "", err
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask for a token: %w", err)
	}
	token, err := readToken(resp)
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return "", fmt.Errorf("token from %.200q: %w", u.Host, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.token = token
	return token, nil
}

func readToken(resp *http.Response) (string, error) {
	switch {
	case resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusRequestTimeout:
		return "", errors.New(resp.Status)
	case resp.StatusCode != http.StatusOK:
		return "", permanent{fmt.Errorf("%s; a device has no account there: make the repository public", resp.Status)}
	}
	text, err := readAll(resp.Body, maxTokenBytes)
	if errors.Is(err, errTooLong) {
		return "", permanent{err}
	}
	if err != nil {
		return "", err
	}
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"` // the same, as OAuth 2.0 has it
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return "", permanent{fmt.Errorf("answer: %w", err)}
	}
	token := answer.Token
	if token == "" {
		token = answer.AccessToken
	}
	if token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "", permanent{errors.New("the answer has no token")}
	}
	return token, nil
}

// endpoint is the address of a token. It gets no secret, but a registry must not make
// a device ask its own services, so that it has to be https where the registry is.
func (t *tokens) endpoint(base *url.URL, challenges []string) (*url.URL, error) {
	var params map[string]string
	for _, c := range challenges {
		if params = parseBearer(c); params != nil {
			break
		}
	}
	if params == nil {
		return nil, errors.New("the registry wants a password, and a device has none: make the repository public")
	}
	u, err := url.Parse(params["realm"])
	if err != nil || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("the registry sends for a token to %.200q, which is no address", params["realm"])
	}
	if err := tlsOrLoopback(u); err != nil || base.Scheme == "https" && u.Scheme != "https" {
		return nil, fmt.Errorf("the registry sends for a token to %.200q, which is not https", u.Redacted())
	}
	q := u.Query()
	if params["service"] != "" {
		q.Set("service", params["service"])
	}
	scope := params["scope"]
	if scope == "" {
		scope = t.scope
	}
	q.Set("scope", scope)
	u.RawQuery, u.Fragment = q.Encode(), ""
	return u, nil
}

// parseBearer reads the parameters of a Bearer challenge, RFC 9110 §11.2 and RFC 6750
// §3; nil is no such challenge.
func parseBearer(challenge string) map[string]string {
	scheme, rest, _ := strings.Cut(strings.TrimSpace(challenge), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return nil
	}
	params := map[string]string{}
	for {
		key, after, ok := strings.Cut(strings.TrimLeft(rest, " \t,"), "=")
		if !ok {
			return params
		}
		var value strings.Builder
		quoted := strings.HasPrefix(after, `"`)
		i := 0
		if quoted {
			i = 1
		}
		for ; i < len(after); i++ {
			if quoted && after[i] == '"' || !quoted && after[i] == ',' {
				i++
				break
			}
			if quoted && after[i] == '\\' && i+1 < len(after) {
				i++
			}
			value.WriteByte(after[i])
		}
		params[strings.ToLower(strings.TrimSpace(key))] = value.String()
		rest = after[i:]
	}
}
