package main

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
)

// benchLine is a line of go test -bench -benchmem with our own metric.
var benchLine = regexp.MustCompile(`(?m)^Benchmark(\w+)\s+\d+\s+([0-9.]+) ns/op(?:\s+([0-9.]+) B/answer\s+([0-9.]+) cpu-ns/op)?(?:\s+(\d+) B/op)?`)

// attests measures verification and the device's part, by the benchmarks of
// seal/attest on one processor.
func (b *bench) attests() error {
	cmd := exec.Command("go", "test", "-run", "^$", "-bench", "Verify|Attest|FirstContact", "-benchmem", "-benchtime", "2s", "-cpu", "1", "-count", strconv.Itoa(b.runs), "./seal/attest")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
	}
	type result struct{ least, most, answer, memory float64 }
	results := map[string]*result{}
	for _, m := range benchLine.FindAllStringSubmatch(string(out), -1) {
		number := func(text string) float64 { f, _ := strconv.ParseFloat(text, 64); return f } // by the expression
		ns := number(m[2])
		if m[4] != "" {
			ns = number(m[4])
		}
		r := results[m[1]]
		if r == nil {
			r = &result{least: ns, most: ns}
			results[m[1]] = r
		}
		r.least, r.most, r.answer, r.memory = min(r.least, ns), max(r.most, ns), number(m[3]), number(m[5])
	}
	fmt.Println("| attestation | per second of one core | memory each | answer |")
	fmt.Println("|---|---|---|---|")
	for _, row := range []struct{ name, what string }{{"Verify", "verify, the vendor's own keys in the firmware"}, {"VerifyPC", "verify, a PC with Microsoft's keys and revocations"}} {
		r := results[row.name]
		if r == nil {
			return fmt.Errorf("no result of %s in\n%s", row.name, out)
		}
		fmt.Printf("| %s | %.0f to %.0f | %.0f KB | %.1f KB |\n", row.what, 1e9/r.most, 1e9/r.least, r.memory/1000, r.answer/1000)
	}
	fmt.Println("\n| on the device, swtpm | time |")
	fmt.Println("|---|---|")
	for _, row := range []struct{ name, what string }{{"Attest", "answer"}, {"FirstContact", "answer at first contact, RSA endorsement key"}} {
		r := results[row.name]
		if r == nil {
			return fmt.Errorf("no result of %s in\n%s", row.name, out)
		}
		fmt.Printf("| %s | %.3f to %.3f s |\n", row.what, r.least/1e9, r.most/1e9)
	}
	return nil
}
