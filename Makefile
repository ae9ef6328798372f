# The two commands of the README, and those that developing needs. Everything that they need is installed by them.

PROFILE ?= dev
CARGO_PROFILE_DIR = $(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
TARGET = $(or $(CARGO_TARGET_DIR),target)
STATIC = x86_64-unknown-linux-gnu
DIST = $(TARGET)/dist/$(CARGO_PROFILE_DIR)
# A VM process pays for every library it loads: what is installed loads none. Development builds are spared the second build.
STATIC_VMM = $(if $(filter release,$(PROFILE)),-p form-vmm --bin form-vmm)
# The guest's program lies in the memory of each VM, and nothing in it has to be fast but what is assembly: its size counts.
SMALLEST = CARGO_PROFILE_RELEASE_OPT_LEVEL=s
# The static programs of a release are small by every means, since each VM process holds one.
SMALL = RUSTFLAGS="-C target-feature=+crt-static" CARGO_PROFILE_RELEASE_LTO=fat CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1
VMM = $(TARGET)/$(if $(STATIC_VMM),$(STATIC)/)$(CARGO_PROFILE_DIR)/form-vmm

.PHONY: demo test test-fast test-system fuzz check build release-vmm packages install docs clean

## demo: build, start a host, deploy examples/hello, show its answer
demo: build
	@DIST=$(DIST) examples/demo

## test: everything, with real guests
test: test-fast test-system

## test-fast: unit tests, properties and golden output, in under two minutes once built
test-fast: packages
	cargo nextest run --workspace --profile fast

## test-system: the built programs, in namespaces and with real guests under KVM
test-system: build
	@DIST=$(abspath $(DIST)) tests/run-system

## fuzz: every fuzz target from its kept corpus (devices 30 seconds, formats 15), and the bugs planted to be found
fuzz: packages
	@tests/run-fuzz

## check: what CI checks before it tests
check:
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	.ci/deny

## build: the programs, laid out as they are installed, below $(DIST)
build: packages
	cargo build --profile $(PROFILE) --workspace --bins
	$(SMALL) $(SMALLEST) cargo build --profile $(PROFILE) -p form-guest --bin form-guest --target $(STATIC)
	$(if $(STATIC_VMM),$(SMALL) cargo build --profile $(PROFILE) $(STATIC_VMM) --target $(STATIC))
	@install -d $(DIST)/bin $(DIST)/lib/formation
	@install -C -m 755 $(TARGET)/$(CARGO_PROFILE_DIR)/form $(TARGET)/$(CARGO_PROFILE_DIR)/form-agent $(DIST)/bin/
	@install -C -m 755 $(VMM) $(DIST)/lib/formation/
	@install -C -m 755 $(TARGET)/$(STATIC)/$(CARGO_PROFILE_DIR)/form-guest $(DIST)/lib/formation/

## release-vmm: the programs of VMs as they are installed, beside a development build; says where
release-vmm:
	@$(SMALL) cargo build --quiet --release -p form-vmm --bin form-vmm --target $(STATIC) >&2
	@install -d $(DIST)/lib/release
	@install -C -m 755 $(TARGET)/$(STATIC)/release/form-vmm $(DIST)/lib/formation/form-guest $(DIST)/lib/release/ >&2
	@echo $(abspath $(DIST)/lib/release)

## packages: install the Debian packages that building, demo and tests need
packages:
	@.ci/packages

## install: put a release build on this machine, with its systemd unit
install:
	$(MAKE) build PROFILE=release
	install -d $(DESTDIR)/usr/local/bin $(DESTDIR)/usr/lib/formation $(DESTDIR)/etc/systemd/system
	install -m 755 $(TARGET)/dist/release/bin/form $(TARGET)/dist/release/bin/form-agent $(DESTDIR)/usr/local/bin/
	install -m 755 $(TARGET)/dist/release/lib/formation/form-vmm $(TARGET)/dist/release/lib/formation/form-guest $(DESTDIR)/usr/lib/formation/
	install -m 644 docs/form-agent.service $(DESTDIR)/etc/systemd/system/

clean:
	cargo clean
