package spec

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// maxProblems bounds the list a hostile or hopeless file can produce.
const maxProblems = 100

// Position is a place in a file a person wrote. Line and Column count from 1;
// 0 is unknown.
type Position struct {
	File         string
	Line, Column int
}

// String is "file:line:column", without what is unknown.
func (p Position) String() string {
	switch {
	case p.Line == 0:
		return p.File
	case p.Column == 0:
		return fmt.Sprintf("%s:%d", p.File, p.Line)
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// Problem is one thing that is wrong with a spec, or worth a warning.
type Problem struct {
	Position
	// Path is where in the spec: "services[0].health.interval". Empty is the file itself.
	Path    string
	Message string
	// Hint is what to do about it, when that is known.
	Hint string
}

// String is "file:line:column: path: message (hint)".
func (p Problem) String() string {
	var b strings.Builder
	if at := p.Position.String(); at != "" {
		b.WriteString(at + ": ")
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Message)
	if p.Hint != "" {
		b.WriteString(" (" + p.Hint + ")")
	}
	return b.String()
}

// Errors is everything that is wrong with a spec, in the order of the file.
type Errors struct {
	List []Problem
}

// Error has one line for each problem.
func (e *Errors) Error() string {
	lines := make([]string, len(e.List))
	for i, p := range e.List {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// positions maps a path in the spec to where it was written.
type positions map[string]Position

// at finds the path or the nearest thing around it that was written.
func (ps positions) at(path string) Position {
	for {
		if p, ok := ps[path]; ok || path == "" {
			return p
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
}

func (ps positions) has(path string) bool { _, ok := ps[path]; return ok }

// keyed is a value with its key, for checks that go over several keys in a fixed order.
type keyed[T any] struct {
	key   string
	value T
}

// report collects problems while a spec is read and checked.
type report struct {
	pos         positions
	errs, warns []Problem
}

// errorf reports what is wrong with the value at path. A value has one error:
// the first says why, and what follows from it would only distract.
func (r *report) errorf(path, hint, format string, args ...any) {
	if r.reported(path) {
		return
	}
	r.errorAt(r.pos.at(path), path, hint, fmt.Sprintf(format, args...))
}

func (r *report) errorAt(at Position, path, hint, message string) {
	if len(r.errs) < maxProblems {
		r.errs = append(r.errs, Problem{at, path, clip(message), clip(hint)})
	}
}

// reported says whether the value at path is wrong already, so that it is not called missing as well.
func (r *report) reported(path string) bool {
	return slices.ContainsFunc(r.errs, func(p Problem) bool { return p.Path == path })
}

// clip keeps a message short that quotes what was written.
func clip(text string) string {
	const longest = 300
	if len(text) <= longest {
		return text
	}
	return strings.ToValidUTF8(text[:longest], "") + "..."
}

func (r *report) warnf(path, hint, format string, args ...any) {
	if len(r.warns) < maxProblems {
		r.warns = append(r.warns, Problem{r.pos.at(path), path, clip(fmt.Sprintf(format, args...)), clip(hint)})
	}
}

// wrong reports an error that may carry a hint of its own.
func (r *report) wrong(path string, err error) {
	var h *hinted
	if errors.As(err, &h) {
		r.errorf(path, h.hint, "%s", h.message)
		return
	}
	r.errorf(path, "", "%s", err)
}

func (r *report) err() error {
	if len(r.errs) == 0 {
		return nil
	}
	sortProblems(r.errs)
	return &Errors{List: r.errs}
}

func sortProblems(list []Problem) {
	slices.SortStableFunc(list, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// hinted is an error with the remedy apart, so that both can be shown in their place.
type hinted struct{ message, hint string }

func (h *hinted) Error() string {
	if h.hint == "" {
		return h.message
	}
	return h.message + " (" + h.hint + ")"
}

func hint(remedy, format string, args ...any) error {
	return &hinted{fmt.Sprintf(format, args...), remedy}
}

// didYouMean is a hint naming the candidate nearest to what was written, or "".
func didYouMean(written string, candidates []string) string {
	best, bestDistance := "", len(written)/3+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(written), strings.ToLower(c)); d < bestDistance || d == bestDistance && best == "" {
			best, bestDistance = c, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %q?", best)
}

// distance counts the insertions, deletions, substitutions and swaps of
// neighbours that make a into b (optimal string alignment).
func distance(a, b string) int {
	const longest = 64 // a key; longer ones are no typing mistakes
	if len(a) > longest || len(b) > longest {
		return longest
	}
	before, row := []int(nil), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next[j] = min(row[j]+1, next[j-1]+1, row[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
