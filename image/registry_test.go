package image

import "testing"

func TestParseRegistry(t *testing.T) {
	for address, want := range map[string]Registry{
		"oci://ghcr.io/acme/gate":                {"ghcr.io", "acme/gate", "latest", false},
		"oci://ghcr.io/acme/gate:stable":         {"ghcr.io", "acme/gate", "stable", false},
		"oci://registry.example:5000/gate:v1.2":  {"registry.example:5000", "gate", "v1.2", false},
		"oci://localhost:5000/gate":              {"localhost:5000", "gate", "latest", true},
		"oci://127.0.0.1/a/b__c/d-e.f:_x":        {"127.0.0.1", "a/b__c/d-e.f", "_x", true},
		"oci://[::1]:5000/gate:t":                {"[::1]:5000", "gate", "t", true},
		"oci://10.0.2.2:5000/gate:t":             {"10.0.2.2:5000", "gate", "t", false},
		"oci://index.docker.io/acme/gate:latest": {"index.docker.io", "acme/gate", "latest", false},
	} {
		got, err := ParseRegistry(address)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", address, got, err, want)
			continue
		}
		if again, err := ParseRegistry(got.String()); err != nil || again != got {
			t.Errorf("%s again: %+v, %v", got, again, err)
		}
	}
	for _, bad := range []string{
		"", "oci://", "oci:///gate", "oci://host", "oci://host/", "oci://host/:tag", "oci://host/gate:", "oci://host/Gate", "oci://host/../gate",
		"oci://host/a//b", "oci://host/gate:a:b", "oci://host/gate@sha256:00", "oci://me:pw@host/gate", "oci://host/gate?q", "oci://host/gate#f",
		"oci://ho st/gate", "https://host/gate", "oci://host:port/gate", "oci://docker.io/gate", "oci://host/gate:t/../x", "oci://-host/gate",
	} {
		if r, err := ParseRegistry(bad); err == nil {
			t.Errorf("%q is %+v", bad, r)
		}
	}
}
