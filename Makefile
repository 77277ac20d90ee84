# Holdfast. Two commands matter: `make demo` shows an appliance from spec to
# recovery, `make test` runs every test. Both install what they need (as root, by
# apt; elsewhere they say what is missing).

VERSION ?= 0.1.0
BUILD   := build
BIN     := $(BUILD)/bin
INPUTS  := $(BUILD)/inputs
GO      ?= go
LDFLAGS := -s -w -X main.version=$(VERSION)

# What building, running and judging needs of Debian 12.
PACKAGES := age zbar-tools qemu-system-x86 qemu-utils ovmf swtpm swtpm-tools systemd-boot-efi \
	cryptsetup-bin tpm2-tools sbsigntool systemd libtss2-tcti-swtpm0 mtools dosfstools gdisk erofs-utils \
	e2fsprogs exfatprogs mmdebstrap efitools cpio zstd kmod binutils openssl gcc libc6-dev opensc softhsm2 \
	ca-certificates curl jq

export HOLDFAST_INPUTS := $(CURDIR)/$(INPUTS)
export HOLDFAST_KERNEL_DEB := $(CURDIR)/$(INPUTS)/linux-image.deb

.PHONY: all tools inputs demo test lint e2e campaign bench clean
all: $(BIN)/holdfast $(BIN)/holdfast-agent $(BIN)/runc

# --- tools and inputs -------------------------------------------------------

$(BUILD)/tools.stamp: Makefile
	@mkdir -p $(BUILD)
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		if [ $$(id -u) != 0 ]; then echo "error: missing Debian packages; install them with: sudo apt-get install" $$missing >&2; exit 1; fi; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
	fi
	@touch $@

tools: $(BUILD)/tools.stamp

$(BIN)/holdfast $(BIN)/holdfast-agent: $(BIN)/%: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/$*

$(BIN)/runc: examples/components/go.sum | $(BUILD)/tools.stamp
	cd examples/components && CGO_ENABLED=1 $(GO) build -trimpath -tags 'netgo osusergo' \
		-ldflags '-s -w -extldflags -static' -o $(CURDIR)/$@ github.com/opencontainers/runc

$(BUILD)/etcd: examples/components/go.sum
	cd examples/components && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ go.etcd.io/etcd/server/v3

$(INPUTS)/etcd: $(BUILD)/etcd
	@mkdir -p $(INPUTS) && rm -rf $@
	$(GO) run ./examples/ocilayout -o $@ -entrypoint /usr/bin/etcd -folders /var/lib/etcd,/tmp $<=/usr/bin/etcd

# The kernel comes as a package and is never installed.
$(INPUTS)/linux-image.deb: | $(BUILD)/tools.stamp
	@mkdir -p $(BUILD)/download && rm -f $(BUILD)/download/*.deb
	cd $(BUILD)/download && apt-get download -q \
		$$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-[0-9]/{print $$2; exit}')
	@mkdir -p $(INPUTS) && mv $(BUILD)/download/linux-image-*.deb $@

# A root from Debian packages: the same packages give the same bytes.
$(INPUTS)/debian-root.tar: | $(BUILD)/tools.stamp
	@mkdir -p $(INPUTS)
	SOURCE_DATE_EPOCH=1793491200 mmdebstrap --quiet --variant=essential --include=systemd-sysv,udev,dbus,redis-server \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--customize-hook='rm -rf "$$1"/var/lib/apt/lists/* "$$1"/var/cache/* "$$1"/var/log/* && : > "$$1"/etc/machine-id' \
		bookworm $(INPUTS)/debian-root.part.tar
	mv $(INPUTS)/debian-root.part.tar $@

inputs: $(INPUTS)/debian-root.tar $(INPUTS)/linux-image.deb $(INPUTS)/etcd $(BUILD)/keys all

$(BUILD)/keys: | $(BIN)/holdfast
	$(BIN)/holdfast keys new $@

# systemd 257 of Debian 13, unpacked beside the system: it reads our LUKS2 token,
# Debian 12's does not know the field for a persistent storage key.
SYSTEMD_ROOT := /var/tmp/holdfast-systemd-root
export HOLDFAST_SYSTEMD_ROOT := $(SYSTEMD_ROOT)
$(SYSTEMD_ROOT)/.complete: | $(BUILD)/tools.stamp
	rm -rf $(SYSTEMD_ROOT)
	mmdebstrap --variant=extract --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --quiet \
		--include=systemd-cryptsetup,cryptsetup-bin,libtss2-esys-3.0.2-0t64,libtss2-rc0t64,libtss2-tcti-swtpm0t64,libtss2-tcti-device0t64 \
		trixie $(SYSTEMD_ROOT)
	touch $@

# --- demo, tests, measurements ----------------------------------------------

demo: inputs
	$(GO) run ./examples/demo

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
lint:
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$unformatted" ] || { echo "error: not gofmt'ed:" $$unformatted >&2; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

# Packages whose tests boot boxes get the two processors for themselves.
BOOTING := ./hwtest/... ./examples/...
test: inputs $(SYSTEMD_ROOT)/.complete lint
	$(GO) test -race -timeout 30m $$($(GO) list ./... | grep -vE '/(hwtest|examples)(/|$$)')
	$(GO) test -count=1 -timeout 50m -p 1 -parallel 2 $(BOOTING)

# The long ones: power cuts of real boots, every state of simulated ones, fuzzing.
CUTS ?= 30
FUZZTIME ?= 60s
campaign: inputs $(SYSTEMD_ROOT)/.complete
	HOLDFAST_CAMPAIGN=1 $(GO) test -timeout 2h ./agent/... ./partition/... ./seal/... ./update/...
	HOLDFAST_CAMPAIGN=1 HOLDFAST_CUTS=$(CUTS) $(GO) test -timeout 3h -parallel 2 -v -run 'TestPowerCuts|TestBoards|TestEncryptedSlots' ./hwtest
	HOLDFAST_CAMPAIGN=1 $(GO) test -timeout 1h -run 'TestHandOff' ./examples/debian
	set -e; for p in $$($(GO) list ./...); do for f in $$($(GO) test -list '^Fuzz' $$p | grep ^Fuzz || true); do \
		$(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$p; done; done

# The tools that updates are compared with are needed for nothing else.
BENCH_PACKAGES := casync rauc squashfs-tools
BENCH := $(BUILD)/bench
bench: inputs $(SYSTEMD_ROOT)/.complete $(BENCH)/tools.stamp $(BENCH)/first.tar $(BENCH)/second.tar $(BENCH)/kernels.stamp $(BENCH)/etcd-first $(BENCH)/etcd-second
	$(GO) run ./examples/bench

$(BENCH)/tools.stamp: | $(BUILD)/tools.stamp
	@mkdir -p $(BENCH)
	@missing=$$(for p in $(BENCH_PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		if [ $$(id -u) != 0 ]; then echo "error: missing Debian packages; install them with: sudo apt-get install" $$missing >&2; exit 1; fi; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
	fi
	@touch $@

# Two roots, made once: Debian as it was released, and with the security updates of
# five source packages.
BENCH_UPDATED := src:openssl src:python3.11 src:nginx src:expat src:perl
DEBIAN   := deb http://deb.debian.org/debian bookworm main
SECURITY := deb http://deb.debian.org/debian-security bookworm-security main
$(BENCH)/first.tar: SOURCES = '$(DEBIAN)'
$(BENCH)/second.tar: SOURCES = '$(DEBIAN)' '$(SECURITY)'
$(BENCH)/first.tar $(BENCH)/second.tar: | $(BENCH)/tools.stamp
	SOURCE_DATE_EPOCH=1793491200 mmdebstrap --quiet --variant=essential \
		--include=systemd-sysv,udev,dbus,nginx,python3,openssl,openssh-server,curl,ca-certificates,iproute2,nftables,chrony,perl,sqlite3,jq,rsync \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--setup-hook='printf "%s\n" "Package: *" "Pin: release l=Debian-Security" "Pin-Priority: 100" "" \
			"Package: $(BENCH_UPDATED)" "Pin: release l=Debian-Security" "Pin-Priority: 990" > "$$1"/etc/apt/preferences.d/bench' \
		--customize-hook='rm -rf "$$1"/etc/apt/preferences.d/bench "$$1"/etc/apt/sources.list* "$$1"/var/lib/apt/lists/* "$$1"/var/cache/* "$$1"/var/log/* && : > "$$1"/etc/machine-id' \
		bookworm $@.part.tar $(SOURCES)
	mv $@.part.tar $@

# The two newest kernels that there are.
$(BENCH)/kernels.stamp: | $(BENCH)/tools.stamp
	rm -rf $(BENCH)/kernel-first $(BENCH)/kernel-second $(BENCH)/debs && mkdir -p $(BENCH)/debs
	cd $(BENCH)/debs && set -- $$(apt-cache pkgnames linux-image-6.1.0- | grep -E '^linux-image-6\.1\.0-[0-9]+-cloud-amd64$$' | sort -V | tail -n 2) && \
		apt-get download -q "$$1" "$$2" && dpkg-deb -x "$$1"_*.deb ../kernel-first && dpkg-deb -x "$$2"_*.deb ../kernel-second
	touch $@

# One program, and with another string in it.
$(BENCH)/etcd-second: STRING := -X go.etcd.io/etcd/api/v3/version.GitSHA=8f1c5d2
$(BENCH)/etcd-first $(BENCH)/etcd-second: examples/components/go.sum
	@mkdir -p $(BENCH)
	cd examples/components && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w $(STRING)' -o $(CURDIR)/$@ go.etcd.io/etcd/server/v3

clean:
	rm -rf $(BUILD)

FORCE:
