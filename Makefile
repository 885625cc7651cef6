# One word per chore. `make run` and `make test` install what they need.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# rustup puts cargo here; a shell that was open before does not know it yet.
export PATH := $(HOME)/.cargo/bin:$(PATH)
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

.PHONY: help run demo test test-long bench cuda dashboards pictures fmt golden clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## Build (release) and serve configs/gateway.toml; the first start prints a curl line
	@tools/setup.sh build
	cargo run --locked --release -p glassgate -- serve --config configs/gateway.toml

demo: ## Gateway, Prometheus and minutes of real traffic, every answer checked (DEMO="--minutes 2 --rps 10")
	@tools/setup.sh demo
	cargo build --locked --release -p glassgate
	@tools/demo.sh $(DEMO)

test: ## Everything that CI runs: format, clippy, licences, unit, property and end-to-end tests
	@tools/setup.sh test
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo deny --locked --all-features check bans licenses sources
	GLASSGATE_CLIENTS=$(CARGO_TARGET_DIR)/clients cargo nextest run --locked --workspace --no-fail-fast

test-long: ## What takes long: 1,000 kills instead of 20, the admin API asked by its schema, histories of shared limits, goldens computed anew by transformers, MiniLM beside sentence-transformers
	@tools/setup.sh long
	$(CARGO_TARGET_DIR)/long/bin/python runtime/tests/families/make.py
	GLASSGATE_HISTORIES=100000 cargo nextest run --profile long --locked -p glassgate --lib -E 'test(script_model)'
	GLASSGATE_KILLS=1000 GLASSGATE_CLIENTS=$(CARGO_TARGET_DIR)/clients cargo nextest run --profile long --locked -p glassgate --test e2e -E 'test(kill)'
	GLASSGATE_FUZZ=$(CARGO_TARGET_DIR)/fuzz cargo nextest run --locked -p glassgate --run-ignored only -E 'test(does_not_show_in_time) or test(answered_as_it_says) or test(hundred_thousand)'
	GLASSGATE_LONG=$(CARGO_TARGET_DIR)/long cargo nextest run --locked -p glassgate-runtime --run-ignored only -E 'test(minilm)'

bench: ## Measure speed and cost as ratios, in an hour; writes tests/bench/results (BENCH="engine speed" for a part)
	@tools/setup.sh bench
	cargo build --locked --profile dist -p glassgate --bins --example bare
	cargo run --locked --profile dist -p glassgate --example bench -- $(BENCH)

cuda: ## Build the binary with the CUDA device; needs no GPU (run it on a machine that has one)
	@tools/cuda/build.sh

dashboards: ## Write dashboards/*.json anew from dashboards/make.py
	python3 dashboards/make.py

PROMETHEUS ?= http://127.0.0.1:9090
MINUTES ?= 15
pictures: ## Draw dashboards/*.png from the Prometheus that runs (PROMETHEUS=http://…, MINUTES=15)
	@tools/setup.sh pictures
	node tools/pictures/render.mjs $(PROMETHEUS) $(MINUTES)

fmt: ## Format
	cargo fmt --all

golden: ## Write the golden files anew; read the diff before you commit it
	GLASSGATE_GOLDEN=write cargo nextest run --locked -p glassgate --test e2e -E 'test(golden)'

clean: ## Remove what was built (not your data folder)
	cargo clean
