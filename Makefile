# Everything a checkout needs: Python 3.11 or newer and make are enough. The first target prints the others.

VENV := .venv
GENERATOR := .venv-proto
SITE := .venv-docs
PEERS := $(addsuffix /.ready,$(addprefix .venv-peers/,agents_sdk a2a_sdk))
BIN := $(VENV)/bin
STUBS := client/src/notecase/v1
PROTOS := $(sort $(wildcard proto/notecase/v1/*.proto))
GO := $(shell command -v go 2>/dev/null)

# Reflection and errors are tested with the tools that callers use; buf is the usual judge of protos. All are built by Go:
# the module, its version, and where the command is in it.
grpcurl := github.com/fullstorydev/grpcurl v1.9.4 /cmd/grpcurl
grpcui := github.com/fullstorydev/grpcui v1.4.3 /cmd/grpcui
evans := github.com/ktr0731/evans v0.10.11
ghz := github.com/bojand/ghz v0.120.0 /cmd/ghz
buf := github.com/bufbuild/buf v1.75.0 /cmd/buf
TOOLS := $(addprefix $(BIN)/,grpcurl grpcui evans ghz)

# What writes the stubs in client/go; Go builds these plugins, too.
protoc-gen-go := google.golang.org/protobuf v1.36.12 /cmd/protoc-gen-go
protoc-gen-go-grpc := google.golang.org/grpc/cmd/protoc-gen-go-grpc v1.6.2
GO_STUBS := client/go/notecase/v1
GO_PLUGINS := $(if $(GO),$(addprefix $(GENERATOR)/bin/,protoc-gen-go protoc-gen-go-grpc))

# What buf breaking compares proto/ with: the last commit, or make proto-breaking AGAINST=v0.1.0
AGAINST := HEAD

.PHONY: help demo serve test test-hard test-kills test-faults test-postgresql test-copy test-rust mutants fuzz lint format types proto proto-check proto-lint proto-breaking dist docs errors picture check bench bench-peers profile soak tools clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.server ## Run a detective's conversation, with a restart of the server
	@$(BIN)/python examples/detective.py $(ARGS)

serve: $(VENV)/.server ## Start the server; ARGS="--store sqlite:notecase.db"
	@$(BIN)/notecase serve $(ARGS)

test: $(VENV)/.ready $(GENERATOR)/.ready $(if $(GO),$(TOOLS)) ## Run the tests in parallel, and print their seed; ARGS="-n0 -k name tests/store"
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-hard: $(VENV)/.ready ## Run tests/e2e with seeds 1 to 5 on a busy machine; ARGS="--seeds 1 2 -- tests/e2e/test_watch.py"
	@$(BIN)/python -m tests.hard $(ARGS)

test-kills: $(VENV)/.ready ## Kill a server after each transaction of a long fork and import; make test does so after some
	@NOTECASE_KILLS=1 $(BIN)/python -m pytest -n auto --dist worksteal --timeout 900 -k ten_thousand tests/e2e/test_copies.py $(ARGS)

test-faults: $(VENV)/.ready ## Make a PostgreSQL store, its owner and its server fail in every way, in ten rounds; ROUNDS=2
	@NOTECASE_STORES=postgresql $(BIN)/python -m pytest -n0 -q $(addprefix tests/e2e/test_,failing_store.py lost_answers.py deletion.py takeover.py) $(ARGS)
	@for round in $$(seq $(or $(ROUNDS),10)); do \
		$(BIN)/python -m pytest -n0 -q tests/e2e/test_store_owner.py tests/e2e/test_postgres_faults.py $(ARGS) || exit 1; done

test-rust: $(VENV)/.ready ## Build and run the Rust program of docs/languages.md; needs Cargo, takes a minute or two the first time
	@NOTECASE_RUST=1 $(BIN)/python -m pytest -n0 --timeout 900 -k rust tests/languages/test_page.py $(ARGS)

test-postgresql: $(VENV)/.ready ## Run the tests of the PostgreSQL store on this system's PostgreSQL and PgBouncer; ARGS=--quick
	@$(BIN)/python -m tests.postgresql $(ARGS)

test-copy: $(VENV)/.ready ## Copy a store of 1 GiB to PostgreSQL and back, and print what it took; or MIB=100. Needs six times that on the disk
	@NOTECASE_COPY_MIB=$(or $(MIB),1024) $(BIN)/python -m pytest -n0 -q -s --timeout 3600 tests/e2e/test_whole_copy.py $(ARGS)

mutants: $(VENV)/.ready ## Break each promise in a copy and check that a test fails; ARGS="rpc/watch" for some promises
	@$(BIN)/python -m tests.mutants $(ARGS)

fuzz: $(VENV)/.ready ## Send random requests, seed by seed; ARGS="--seed 7 --minutes 30 --store memory"
	@$(BIN)/python -m tests.fuzz $(ARGS)

lint: $(VENV)/.ready ## Check the format and the style
	@$(BIN)/ruff format --check --quiet || { $(BIN)/ruff format --diff; exit 1; }
	@$(BIN)/ruff check

format: $(VENV)/.ready ## Format the code
	@$(BIN)/ruff check --select I --fix --quiet
	@$(BIN)/ruff format

types: $(VENV)/.ready ## Check the types, strictly
	@$(BIN)/mypy $(wildcard client/src server/src tests examples benchmarks)

proto: $(GENERATOR)/.ready $(GO_PLUGINS) ## Write the stubs of Python and Go from proto/
	@rm -f $(STUBS)/*_pb2*
	@$(call generate,client/src)
	@if test -n "$(GO)"; then rm -f $(GO_STUBS)/*.pb.go && $(call generate-go,client/go); \
	else echo "Go is not here: the stubs in $(GO_STUBS) stay as they are." >&2; fi

proto-check: $(GENERATOR)/.ready $(GO_PLUGINS) ## Check that the stubs match proto/
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && mkdir "$$out/go" && $(call generate,"$$out") && \
	if test -n "$(GO)"; then $(call generate-go,"$$out/go"); else echo "Go is not here: its stubs are not checked." >&2; fi && \
	if diff -r -q -x __init__.py -x __pycache__ "$$out/notecase/v1" $(STUBS) && \
		{ test -z "$(GO)" || diff -r -q "$$out/go/notecase/v1" $(GO_STUBS); }; then echo "The stubs are what proto/ says."; \
	else echo "The stubs are not what proto/ says: run make proto." >&2; exit 1; fi

proto-lint: $(BIN)/buf ## Check the protos' style with buf; needs Go, takes two minutes the first time
	@$(BIN)/buf lint proto && $(BIN)/buf format --diff --exit-code proto && echo "The protos pass buf."

proto-breaking: $(BIN)/buf ## List breaking changes in proto/ since a commit; AGAINST=v0.1.0, by default the last one
	@then=$$(mktemp -d) && trap 'rm -rf "$$then"' EXIT && git archive $(AGAINST) proto | tar -x -C "$$then" && \
	$(BIN)/buf breaking proto --against "$$then/proto" && echo "Nothing breaks callers of $(AGAINST)."

dist: $(VENV)/.ready ## Build wheels and source distributions into dist/, and check them
	@rm -rf dist
	@for part in client server; do (cd $$part && "$(CURDIR)/$(BIN)/hatchling" build --directory ../dist >/dev/null) || exit 1; done
	@$(BIN)/twine --no-color check --strict dist/*
	@again=$$(mktemp -d) && trap 'rm -rf "$$again"' EXIT && \
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$$again" dist/*.tar.gz && \
	for wheel in dist/*.whl; do cmp "$$wheel" "$$again/$${wheel#dist/}" || exit 1; done && \
	echo "Each source distribution builds the same wheel."

docs: $(SITE)/.ready ## Build the site from README.md and docs/ in build/site, with its links checked; needs no network
	@$(SITE)/bin/sphinx-build --quiet --nitpicky --fail-on-warning --keep-going -c docs -d build/site-cache . build/site && \
	echo "Open build/site/docs/index.html."

errors: $(VENV)/.ready ## Write docs/errors.md from proto/ and the server's catalog of errors
	@$(BIN)/python docs/tools/errors.py

picture: $(VENV)/.ready $(SITE)/.ready ## Draw docs/demo.svg from a run of make demo on the offline model
	@env -u OPENAI_API_KEY -u OPENAI_BASE_URL $(BIN)/python examples/detective.py | $(SITE)/bin/python docs/tools/picture.py docs/demo.svg

check: lint types proto-check test ## Run lint, types, proto-check and test

bench: $(VENV)/.ready ## Measure the server on this machine; ARGS="--write docs/performance.md" updates the page
	@$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(VENV)/.ready $(PEERS) ## Compare the server with the OpenAI Agents SDK and the A2A SDK; ARGS="--rounds 5"
	@$(BIN)/python -m benchmarks.peers $(ARGS)

profile: $(VENV)/.ready ## Profile a turn and a token; ARGS="--write docs/profile.md" updates the page
	@$(BIN)/python -m benchmarks.where $(ARGS)

soak: $(VENV)/.ready ## Check that a server's memory stays flat for half an hour; ARGS="--minutes 5 --svg soak.svg"
	@$(BIN)/python -m benchmarks.soak $(ARGS)

tools: $(TOOLS) $(BIN)/buf ## Build grpcurl, grpcui, evans, ghz and buf into the environment; needs Go

clean: ## Remove the environments and build files
	@rm -rf $(VENV) $(GENERATOR) $(SITE) .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist \
		$(addprefix client/typescript/,node_modules build src/gen) examples/typescript/node_modules examples/typescript/build
	@find $(wildcard client server tests examples benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is whole when its .ready is newer than what it was made from; to run the server, .server is enough. pip
# itself is pinned because the one that a Python brings may not know dependency groups; the build backend is installed first
# so that it, too, is a pinned one.
$(VENV)/.server: client/pyproject.toml server/pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with the server; this takes about half a minute the first time."
	@$(call environment,$(VENV))
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt pip hatchling
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable client --editable "server[postgres]"
	@touch $@

$(VENV)/.ready: $(VENV)/.server pyproject.toml
	@echo "Adding what tests and checks need to $(VENV); this takes about half a minute the first time."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	@touch $@

$(GENERATOR)/.ready: proto/requirements.txt
	@echo "Setting up $(GENERATOR), the stubs' generator."
	@$(call environment,$(GENERATOR))
	@$(GENERATOR)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(SITE)/.ready: docs/requirements.txt
	@echo "Setting up $(SITE), the generator of the site."
	@$(call environment,$(SITE))
	@$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# Each peer has an environment of its own, so that none decides the versions of another, or ours.
$(PEERS): .venv-peers/%/.ready: benchmarks/peers/%.txt
	@echo "Setting up .venv-peers/$*; this takes a minute the first time."
	@$(call environment,.venv-peers/$*)
	@.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# Tests that need a tool are skipped without it, so a failure to build it stops nobody; CI lets no test be skipped.
$(TOOLS): $(BIN)/%: | $(VENV)/.server
	@echo "Building $* for the tests; this takes a minute the first time."
	@$(call gobuild,$($*)) || echo "$* could not be built: the tests that use it will be skipped." >&2

$(GO_PLUGINS): $(GENERATOR)/bin/%: | $(GENERATOR)/.ready
	@$(call gobuild,$($*))

$(BIN)/buf: | $(VENV)/.server
	@echo "Building buf; this takes two minutes the first time."
	@$(call gobuild,$(buf))

# $(call environment,DIR) makes DIR with the first Python that will do, or with the one that PYTHON names.
define environment
test -x $(1)/bin/python && exit; \
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		exec $$python -m venv $(1); \
	fi; \
done; \
echo "notecase needs Python 3.11 or newer with its venv module$(if $(PYTHON),; $(PYTHON) will not do)." >&2; \
echo "Name one with make PYTHON=/path/to/python3." >&2; exit 1
endef

# $(call generate,DIR) writes the stubs below DIR: messages of every proto, services of those that have one.
define generate
mypy="--plugin=protoc-gen-mypy=$(GENERATOR)/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(GENERATOR)/bin/protoc-gen-mypy_grpc"; \
$(GENERATOR)/bin/python -m grpc_tools.protoc -I proto $$mypy --python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS) && \
$(GENERATOR)/bin/python -m grpc_tools.protoc -I proto $$mypy --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) \
	$$(grep -l '^service ' $(PROTOS))
endef

# $(call generate-go,DIR) writes Go's stubs below DIR, as the module notecase.dev/api.
define generate-go
PATH="$(CURDIR)/$(GENERATOR)/bin:$$PATH" $(GENERATOR)/bin/python -m grpc_tools.protoc -I proto \
	--go_out=module=notecase.dev/api:$(1) --go-grpc_out=module=notecase.dev/api:$(1) $(PROTOS)
endef

# $(call gobuild,MODULE VERSION PATH) builds the target and says nothing unless that fails. A module of its own asks for the
# one version; go install MODULE@VERSION asks for the list of all versions as well, which not every proxy has.
define gobuild
( if test -z "$(GO)"; then echo "This needs Go, which is not here." >&2; exit 1; fi; \
work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && cd "$$work" && \
log=$$({ go mod init tool && go mod edit -require=$(word 1,$(1))@$(word 2,$(1)) && \
	go build -mod=mod -o "$(CURDIR)/$@" $(word 1,$(1))$(word 3,$(1)); } 2>&1) || { echo "$$log" >&2; exit 1; } )
endef
