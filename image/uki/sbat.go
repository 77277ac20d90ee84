package uki

import (
	"fmt"
	"strconv"
	"strings"
)

// sbatHeader opens every .sbat section (shim, SBAT.md).
const sbatHeader = "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n"

// mergeSBAT adds the vendor's components to those of the stub. A section may
// exist only once, and revocation reads every line of it, so the stub's lines
// stay first and unchanged. A component must not have two generations.
func mergeSBAT(stub, own string) (string, error) {
	if stub == "" && own == "" {
		return "", nil
	}
	merged := stub
	if merged == "" {
		merged = sbatHeader
	}
	if !strings.HasSuffix(merged, "\n") {
		merged += "\n"
	}
	known := map[string]string{}
	for line := range strings.Lines(merged) {
		line = strings.TrimSpace(line)
		component, _, _ := strings.Cut(line, ",")
		known[component] = line
	}
	for line := range strings.Lines(own) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		fields := strings.Split(line, ",")
		if len(fields) != 6 {
			return "", fmt.Errorf("SBAT line %q has %d fields, expected component,generation,vendor,package,version,url", line, len(fields))
		}
		if n, err := strconv.ParseUint(fields[1], 10, 16); err != nil || n == 0 {
			return "", fmt.Errorf("SBAT line %q: generation %q is not a number from 1 to 65535", line, fields[1])
		}
		if fields[0] == "sbat" {
			continue // the version line, which is there already
		}
		if old, ok := known[fields[0]]; ok {
			if old != line {
				return "", fmt.Errorf("SBAT component %s is there twice: %q and %q", fields[0], old, line)
			}
			continue
		}
		known[fields[0]] = line
		merged += line + "\n"
	}
	return merged, nil
}
