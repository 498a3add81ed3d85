# The commands of this project; CONTRIBUTING.md explains them.

.PHONY: demo test check clients regress bench bench-gateway bench-memory bench-verify fuzz golden chaos matrix run

# Shows it all at work on sample servers of its own, and cleans up. DEMO_SECONDS (default 60) bounds the load.
demo:
	scripts/setup.sh
	cargo build --release -p gateway --bin peergate
	target/release/peergate demo

# Everything: unit, golden and integration tests, on real servers that they start themselves on free ports.
test: export TMPDIR := $(shell scripts/tmpdir.sh)
test:
	scripts/setup.sh tests
	cargo build -p gateway --bin peergate
	cargo test --workspace

# What needs no server: formatting, lints, unit tests, documentation.
check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test --workspace --lib --bins
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

# Benchmarks, each a ratio to a named alternative in the same run. BENCH_SCALE (default 1) makes the load larger or smaller.
bench: bench-gateway
	cargo bench -p pg --bench decode
	cargo bench -p mirror --bench catch_up

# The gateway only, against pgbouncer and no proxy at all; its header says which variables make it shorter.
bench-gateway:
	scripts/setup.sh bench
	cargo bench -p gateway --bench relay

# VERIFY MIRROR on a table of VERIFY_ROWS (default 10,000,000) rows that changes meanwhile.
bench-verify:
	scripts/setup.sh
	cargo bench -p mirror --bench verify

# What the gateway and pgbouncer need in memory for 5,000 idle sessions, and for 10 GB to a slow reader. Needs 12 GB for the server.
bench-memory:
	scripts/setup.sh bench
	ulimit -n "$$(ulimit -Hn)" && cargo bench -p gateway --bench memory

# Searches for input that breaks what gateway/tests/properties.rs says must hold; SECONDS (default 60) for each target. What is found
# stays in fuzz/corpus, what breaks in fuzz/artifacts. Needs no nightly compiler: Rust itself looks for what a sanitizer would.
fuzz: SECONDS ?= 60
fuzz:
	command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
	for target in frames text; do \
		mkdir -p fuzz/corpus/$$target && \
		cargo fuzz run --sanitizer none $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-dict=fuzz/words.dict -max_len=2048 -max_total_time=$(SECONDS) -print_final_stats=1 || exit 1; \
	done

# The golden cases by real psql. CASE=name runs one, UPDATE=1 rewrites what they expect.
golden: export TMPDIR := $(shell scripts/tmpdir.sh)
golden:
	scripts/setup.sh
	cargo test -p sql-tests --test main golden

# The clients of docs/clients.md. CLIENT=name runs those whose name contains that.
clients:
	scripts/setup.sh tests
	cargo test -p sql-tests --test main clients -- --nocapture

# All of PostgreSQL's own tests, directly and through the gateway: relayed only, and in the catalog. `make test` runs a part.
regress:
	scripts/setup.sh tests
	REGRESS=all cargo test -p sql-tests --test main regress -- --nocapture

# A random schema and load while engines, servers and networks die and come back, for MINUTES (default 10); CHAOS_SEED repeats a run's choices.
chaos: MINUTES ?= 10
chaos: export TMPDIR := $(shell scripts/tmpdir.sh)
chaos:
	scripts/setup.sh
	CHAOS_SECONDS=$$(($(MINUTES) * 60)) cargo test -p gateway --test chaos -- --nocapture

# The engine's tests with sources and targets of PostgreSQL 13 to 18, whose servers it fetches; writes docs/compatibility.md.
# PAIRS="13:18 17:15" runs these (source:target) only.
matrix: export TMPDIR := $(shell scripts/tmpdir.sh)
matrix:
	scripts/setup.sh
	scripts/matrix.sh

# A server for trying things out, with its data in target/run.
run:
	scripts/setup.sh
	cargo run -p gateway --bin peergate -- serve --data-dir target/run
