package main

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-os/holdfast/update"
)

func scriptRegistry(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 0)
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	ts.Defer(s.Close)
	ts.Setenv("REGISTRY", strings.TrimPrefix(s.URL, "http://"))
}

func scriptImage(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	tag, err := name.NewTag(args[0])
	ts.Check(err)
	ts.Check(remote.Write(tag, empty.Image))
}

// scriptDevice is a device of version 1.0.0 that has only a root.json.
func scriptDevice(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 3)
	src, err := update.NewOCI(args[1], update.HTTPOptions{Attempts: 1})
	ts.Check(err)
	defer src.CloseIdle()
	store, err := os.MkdirTemp(ts.MkAbs(".tmp"), "store")
	ts.Check(err)
	ctx := context.Background()
	client, err := update.New(update.Options{Root: []byte(ts.ReadFile(args[0])), StateDir: store, Source: src, Now: time.Now()})
	ts.Check(err)
	answer, err := client.Check(ctx, update.Device{Product: "ledger", Channel: "stable", Arch: "amd64", Version: "1.0.0", RootHash: strings.Repeat("0", 64)})
	ts.Check(err)
	if answer.Candidate == nil || answer.Candidate.Target.Version != args[2] {
		ts.Fatalf("found %+v, want version %s", answer, args[2])
	}
	for _, b := range answer.Candidate.Release.Blobs {
		ts.Check(answer.Candidate.Save(ctx, b, filepath.Join(store, "blob")))
	}
}

// TestPushNeedsTLS: credentials never go over plain HTTP to another machine.
func TestPushNeedsTLS(t *testing.T) {
	for url, want := range map[string]bool{
		"http://127.0.0.1:5000/v2/": true, "http://localhost:5000/v2/": true, "http://[::1]/v2/": true, "https://registry.example/v2/": true,
		"http://10.0.0.7:5000/v2/": false, "http://registry.example/v2/": false, "http://registry.local/v2/": false,
	} {
		r, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tlsTransport{answers{}}.RoundTrip(r)
		if (err == nil) != want {
			t.Errorf("%s: %v", url, err)
		}
		if err == nil {
			resp.Body.Close()
		}
	}
}

type answers struct{}

func (answers) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{Body: http.NoBody}, nil
}
