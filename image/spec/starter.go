package spec

import (
	_ "embed"
	"strings"
)

//go:embed starter.yaml
var starter string

// Starter is a commented spec to begin with, for an appliance of that name
// ([a-z0-9-]). It parses and validates as it is.
func Starter(name string) []byte {
	return []byte(strings.ReplaceAll(starter, "NAME", name))
}
