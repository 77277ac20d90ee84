package agent

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/holdfast-os/holdfast/image"
)

// withDefaults fills in what the spec left out.
func withDefaults(h image.Health) image.Health {
	for _, d := range []struct {
		field *int
		value int
	}{{&h.IntervalSec, 10}, {&h.TimeoutSec, 5}, {&h.Retries, 3}, {&h.StartSec, 60}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return h
}

// watchHealth checks the service until ctx ends or the service has failed
// Retries checks in a row after its start time; then it returns why.
// Until the first success it asks every second, so that "healthy" is not late.
func (c *container) watchHealth(ctx context.Context) error {
	h := withDefaults(*c.Health)
	began := time.Now()
	failures, everHealthy := 0, false
	for {
		wait := time.Duration(h.IntervalSec) * time.Second
		if !everHealthy {
			wait = time.Second
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		err := c.check(ctx, h)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			failures, everHealthy = 0, true
			c.set(Healthy, "")
			continue
		}
		if !everHealthy && time.Since(began) < time.Duration(h.StartSec)*time.Second {
			continue
		}
		failures++
		c.set(Unhealthy, err.Error())
		if failures >= h.Retries {
			return fmt.Errorf("unhealthy %d times in a row: %w", failures, err)
		}
	}
}

// check asks once.
func (c *container) check(ctx context.Context, h image.Health) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(h.TimeoutSec)*time.Second)
	defer cancel()
	switch {
	case h.HTTP != "":
		return checkHTTP(ctx, h.HTTP)
	case h.TCP != "":
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", h.TCP)
		if err != nil {
			return err
		}
		return conn.Close()
	default:
		return c.checkExec(ctx, h.Exec)
	}
}

func checkHTTP(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return nil
}

// checkExec runs a command in the container. The runtime cannot be cancelled
// half-way without leaving its state behind, so a slow command is left to end
// on its own and counts as failed.
func (c *container) checkExec(ctx context.Context, argv []string) error {
	done := make(chan error, 1)
	go func() { done <- c.runtime(append([]string{"exec", c.Name}, argv...)...) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", argv[0], ctx.Err())
	}
}
