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
PACKAGES := qemu-system-x86 qemu-utils ovmf swtpm swtpm-tools systemd-boot-efi \
	cryptsetup-bin tpm2-tools sbsigntool mtools dosfstools gdisk erofs-utils \
	e2fsprogs mmdebstrap efitools cpio zstd kmod binutils openssl gcc libc6-dev \
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

inputs: $(INPUTS)/linux-image.deb $(INPUTS)/etcd $(BUILD)/keys all

$(BUILD)/keys: | $(BIN)/holdfast
	$(BIN)/holdfast keys new $@

FORCE:
