package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-os/holdfast/image"
)

func TestHealthDefaults(t *testing.T) {
	want := image.Health{IntervalSec: 10, TimeoutSec: 5, Retries: 3, StartSec: 60}
	if got := withDefaults(image.Health{}); got.IntervalSec != want.IntervalSec || got.TimeoutSec != want.TimeoutSec || got.Retries != want.Retries || got.StartSec != want.StartSec {
		t.Errorf("%+v", got)
	}
	given := image.Health{IntervalSec: 1, TimeoutSec: 2, Retries: 4, StartSec: 8}
	if got := withDefaults(given); got.IntervalSec != 1 || got.TimeoutSec != 2 || got.Retries != 4 || got.StartSec != 8 {
		t.Errorf("%+v", got)
	}
}

func TestHealthChecks(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/sick":
			w.WriteHeader(http.StatusServiceUnavailable)
		case "/slow":
			<-r.Context().Done()
		case "/endless":
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}
	}))
	defer server.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for _, tt := range []struct {
		health image.Health
		want   string
	}{
		{image.Health{HTTP: server.URL}, ""},
		{image.Health{HTTP: server.URL + "/endless"}, ""},
		{image.Health{HTTP: server.URL + "/sick"}, "503"},
		{image.Health{HTTP: server.URL + "/slow"}, "deadline"},
		{image.Health{HTTP: "http://" + closed.Addr().String()}, "refused"},
		{image.Health{HTTP: ":"}, "parse"},
		{image.Health{TCP: server.Listener.Addr().String()}, ""},
		{image.Health{TCP: closed.Addr().String()}, "refused"},
	} {
		tt.health.TimeoutSec = 1
		err := (&container{}).check(t.Context(), tt.health)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%+v: %v, want %q", tt.health, err, tt.want)
		}
	}
}

// TestWatchHealth lets a service sicken at given seconds of its life.
func TestWatchHealth(t *testing.T) {
	var sick atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if sick.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer server.Close()
	watch := func(t *testing.T, script func(c *container, sleep func(sec int))) (ended time.Duration, log string, err error) {
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			c := &container{
				Container: image.Container{Name: "web", Health: &image.Health{HTTP: server.URL, IntervalSec: 10, TimeoutSec: 5, Retries: 3, StartSec: 60}},
				slog:      slog.New(newConsoleHandler(&out)), state: Running,
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			began, done := time.Now(), make(chan struct{})
			go func() {
				defer close(done)
				err = c.watchHealth(ctx)
				ended = time.Since(began)
			}()
			time.Sleep(500 * time.Millisecond) // between the checks
			script(c, func(sec int) { time.Sleep(time.Duration(sec) * time.Second) })
			<-done
			log = out.String()
		})
		return ended, log, err
	}

	sick.Store(true)
	ended, _, err := watch(t, func(c *container, sleep func(int)) {
		sleep(59)
		if got := c.now(); got != Running {
			t.Errorf("state %s in the time to start", got)
		}
	})
	if err == nil || !strings.Contains(err.Error(), "unhealthy 3 times in a row") || ended < 60*time.Second || ended > 65*time.Second {
		t.Errorf("never healthy: %v after %v", err, ended)
	}

	ended, log, err := watch(t, func(c *container, sleep func(int)) {
		sleep(20)
		sick.Store(false)
		sleep(2)
		if got := c.now(); got != Healthy {
			t.Errorf("state %s a second after it got well", got)
		}
		sick.Store(true)
		sleep(21) // two failures
		if got := c.now(); got != Unhealthy {
			t.Errorf("state %s after two failures", got)
		}
		sick.Store(false)
		sleep(11)
		if got := c.now(); got != Healthy {
			t.Errorf("state %s after it got well again", got)
		}
		sick.Store(true)
	})
	if err == nil || ended < 80*time.Second || ended > 100*time.Second {
		t.Errorf("%v after %v", err, ended)
	}
	if n := strings.Count(log, "warn: service service=web state=unhealthy"); n != 2 {
		t.Errorf("%d transitions to unhealthy are logged, want 2: %s", n, log)
	}

	sick.Store(false)
	ended, _, err = watch(t, func(*container, func(int)) {})
	if !errors.Is(err, context.DeadlineExceeded) || ended != 10*time.Minute {
		t.Errorf("healthy until the end: %v after %v", err, ended)
	}
}

func (c *container) now() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// TestLogsAPI: who asks for too much, for nothing, or for another name, is told so.
func TestLogsAPI(t *testing.T) {
	web := &container{Container: image.Container{Name: "web"}, log: &serviceLog{}}
	for _, line := range []string{"one", "two", "three"} {
		web.log.add(line)
	}
	s := &system{services: []*container{web}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/logs/{name}", s.answerLogs)
	for path, want := range map[string]string{
		"/v1/logs/web":        `200 ["one","two","three"]`,
		"/v1/logs/web?n=2":    `200 ["two","three"]`,
		"/v1/logs/web?n=0":    "400 n is a number from 1 to 200",
		"/v1/logs/web?n=201":  "400 n is a number from 1 to 200",
		"/v1/logs/web?n=x":    "400 n is a number from 1 to 200",
		"/v1/logs/other":      "404 no container other",
		"/v1/logs/..%2Fother": "404 no container ../other",
	} {
		rec := httptest.NewRecorder()
		mux.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		if got := fmt.Sprintf("%d %s", rec.Code, strings.TrimSpace(rec.Body.String())); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

// TestPowerIsAskedForOnce: a second request while the first is under way changes nothing.
func TestPowerIsAskedForOnce(t *testing.T) {
	var out bytes.Buffer
	s := &system{log: slog.New(newConsoleHandler(&out)), power: make(chan bool, 1)}
	s.requestPower(true, "test")
	s.requestPower(false, "again")
	if reboot := <-s.power; !reboot || strings.Count(out.String(), "shutting down") != 1 {
		t.Errorf("reboot %v: %s", reboot, out.String())
	}
}

func TestLogPath(t *testing.T) {
	if got := logPath([]image.Volume{{Mount: "/data"}, {Mount: "/media"}}, "web"); got != "/data/.holdfast/log/web.log" {
		t.Error(got)
	}
	if got := logPath(nil, "web"); got != "" {
		t.Error(got)
	}
}
