package spec_test

import (
	"fmt"

	"github.com/holdfast-os/holdfast/image/spec"
)

func ExampleParse() {
	s, err := spec.Parse("appliance.yaml", []byte(`
name: ledger
version: 1.0.0
kernel: {image: deb:linux-image.deb}
services:
  - name: web
    image: registry.example/web:1
    health: {http: "http://127.0.0.1:8080/", interval: 10s}
disk: {size: 8GiB}
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(s.Name, s.Services[0].Health.Interval.Seconds(), int64(s.Disk.Size))
	fmt.Println(s.Validate(), s.Pos("services[0].image"))
	// Output:
	// ledger 10 8589934592
	// <nil> appliance.yaml:7:12
}

func ExampleParse_errors() {
	_, err := spec.Parse("appliance.yaml", []byte(`
name: ledger
kernal: {image: deb:linux-image.deb}
services:
  - name: web
    image: registry.example/web:1
    restart: on_failure
`))
	fmt.Println(err)
	// Output:
	// appliance.yaml:3:1: unknown key "kernal" (did you mean "kernel"?)
	// appliance.yaml:7:14: services[0].restart: "on_failure" is not known here (did you mean "on-failure"?)
}

func ExampleMerge() {
	base, err := spec.Parse("base.yaml", []byte("kernel: {image: k, cmdline: quiet}\nvolumes: [{name: cache}]"))
	if err != nil {
		fmt.Println(err)
		return
	}
	more, err := spec.Parse("more.yaml", []byte("kernel: {cmdline: debug}\nservices: [{name: web, image: x, binds: ['cache:/cache']}]"))
	if err != nil {
		fmt.Println(err)
		return
	}
	s, err := spec.Merge(base, more)
	fmt.Println(s.Kernel.Image, s.Kernel.Cmdline, s.Volumes[0].Name, s.Services[0].Binds[0], err)
	// Output:
	// k debug cache cache:/cache <nil>
}
