package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

// repository is how a repository stands.
type repository struct {
	Type     string          `json:"type"` // "repository"
	Roles    []roleState     `json:"roles"`
	Releases []update.Target `json:"releases"`
	// Pending are roles whose metadata waits for signatures.
	Pending []string `json:"pending"`
	// BundleUntil is how long a bundle made now is taken, BundleUntilLenient by
	// devices that take carried ones late.
	BundleUntil        *time.Time `json:"bundle_until,omitempty"`
	BundleUntilLenient *time.Time `json:"bundle_until_lenient,omitempty"`
	Warnings           []string   `json:"warnings"`
}

type roleState struct {
	Role      string    `json:"role"`
	Version   int64     `json:"version"`
	Expires   time.Time `json:"expires"`
	Threshold int       `json:"threshold"`
	KeyIDs    []string  `json:"key_ids"`
	// KeysHere is how many of the keys are at hand; of a bundle nobody asks.
	KeysHere *int `json:"keys_here,omitempty"`
}

func (r *repository) wrong() []string { return nil }

func repoStatus(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo status", "DIR", `What is published, which keys are at hand, what waits for signatures, and what runs out when.

example: holdfast repo status repo`)
	keys := keysFlag(f)
	asJSON := f.Bool("json", false, "one JSON object instead of text")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	r, err := c.openRepo(ctx, rest[0], *keys)
	if err != nil {
		return err
	}
	status, err := r.Status()
	if err != nil {
		return err
	}
	return show(c, describeRepo(status), *asJSON)
}

func describeRepo(s *repo.Status) *repository {
	r := &repository{
		Type: "repository", Roles: []roleState{}, Releases: append([]update.Target{}, s.Releases...),
		Pending: append([]string{}, s.Pending...), Warnings: append([]string{}, s.Warnings...),
	}
	for _, st := range s.Roles {
		r.Roles = append(r.Roles, roleState{st.Role, st.Version, st.Expires, st.Threshold, st.KeyIDs, &st.KeysHere})
	}
	if len(s.Roles) > 0 {
		r.BundleUntil, r.BundleUntilLenient = &s.BundleUntil, &s.BundleUntilLenient
	}
	return r
}

// dayText is a moment as far as it matters to people.
func dayText(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

func (r roleState) cells() []string {
	keys := fmt.Sprintf("%d of %d keys sign", r.Threshold, len(r.KeyIDs))
	here := ""
	if r.KeysHere != nil {
		here = fmt.Sprintf("%d here", *r.KeysHere)
	}
	return []string{fmt.Sprintf("version %d", r.Version), "until " + dayText(r.Expires), keys, here}
}

func (r *repository) print(s *sheet) {
	s.line(fmt.Sprintf("repository, %d releases", len(r.Releases)))
	for _, role := range r.Roles {
		s.fact(role.Role, role.cells()...)
	}
	if r.BundleUntil != nil {
		s.fact("bundles made now", "are taken until "+dayText(*r.BundleUntil))
		s.fact("", "by lenient devices until "+dayText(*r.BundleUntilLenient))
	}
	s.fact("waits for signatures", strings.Join(r.Pending, ", "))
	s.facts("WARNING", r.Warnings...)
	for i, t := range r.Releases {
		if i == 0 {
			s.line("releases")
		}
		s.fact(t.Name(), fmt.Sprintf("%d %%", t.RolloutPercent), "root "+short(t.RootHash), targetTerms(t))
	}
}

// targetTerms are what a release asks of a device.
func targetTerms(t update.Target) string {
	var terms []string
	if t.Epoch > 0 {
		terms = append(terms, fmt.Sprintf("epoch %d", t.Epoch))
	}
	if t.MinFrom != "" {
		terms = append(terms, "from "+t.MinFrom)
	}
	if len(t.Hardware) > 0 {
		terms = append(terms, "for "+strings.Join(t.Hardware, " "))
	}
	return strings.Join(terms, ", ")
}
