# make bench: set up, build the images, run every target that this machine can run, print the table
# make test:  set up, run all tests
# make venv:  .venv with everything from Python's side
# make check: lint, types, the rules of the house
# make peers: what the benchmarks compare with, into .peers
# make peers-load: load generators that Debian does not have, by Go and by Rust, into .peers/bin

PYTHON ?= python3
BIN := .venv/bin
# Packages are installed without asking only in CI, for root without a terminal, or with YES=1.
MAY := [ "$$CI" = true ] || [ "$(YES)" = 1 ] || { [ "$$(id -u)" = 0 ] && ! [ -t 0 ]; }

.PHONY: bench test check venv setup images peers peers-load
.DEFAULT_GOAL := bench

bench: images
	$(BIN)/isolatency sandbox -- $(CURDIR)/$(BIN)/isolatency run --quick

test: images
	$(BIN)/pytest tests/unit tests/e2e
	$(BIN)/isolatency sandbox -- $(BIN)/pytest tests/contract

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

images: setup
	$(BIN)/isolatency images build

setup: venv
	@if $(MAY); then $(BIN)/isolatency setup --yes; else $(BIN)/isolatency setup; fi

venv: .venv/.ready

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make venv needs the Debian package python3-venv"; \
	  if $(MAY); then apt-get update -q && apt-get install -y --no-install-recommends --no-upgrade python3-venv; \
	  else echo "install it: apt-get install --no-install-recommends python3-venv   (or: make YES=1 as root)"; exit 1; fi; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "isolatency needs Python 3.11 or later, found $$($(PYTHON) --version); give another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

peers: .peers/.ready

.peers/.ready: tests/bench/peers.txt
	$(PYTHON) -m venv .peers
	.peers/bin/pip install --quiet --requirement tests/bench/peers.txt
	@touch $@

peers-load:
	@for tool in go cargo; do command -v $$tool >/dev/null || { \
	  echo "make peers-load wants Go (1.22 or later) and Rust (1.88 or later), found no $$tool"; exit 1; }; done
	GOBIN=$(CURDIR)/.peers/bin go install github.com/tsenart/vegeta/v12@v12.13.0
	cargo install --quiet --locked --root .peers oha@1.16.0
