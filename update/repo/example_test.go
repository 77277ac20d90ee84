package repo_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-os/holdfast/update/repo"
)

func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	published, keys := filepath.Join(dir, "repo"), filepath.Join(dir, "keys")
	start := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	if _, err := repo.Create(published, keys, start, repo.Options{}); err != nil {
		log.Fatal(err)
	}

	// Eleven days later, on the machine that publishes.
	signers, err := repo.LoadKeys(keys)
	if err != nil {
		log.Fatal(err)
	}
	r, err := repo.Open(published, signers, start.AddDate(0, 0, 11))
	if err != nil {
		log.Fatal(err)
	}
	s, err := r.Status()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(s.Warnings)
	if err := r.Refresh(); err != nil {
		log.Fatal(err)
	}
	if s, err = r.Status(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("a bundle made now is taken until", s.BundleUntil.Format(time.DateOnly), "or, leniently,", s.BundleUntilLenient.Format(time.DateOnly))
	// Output:
	// [timestamp ends on 2026-12-05, in 3 days: renew it]
	// a bundle made now is taken until 2026-12-16 or, leniently, 2027-11-21
}
