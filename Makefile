PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clusters check docs screenshots simulate kill bench clean

demo: $(VENV)/project
	$(BIN)/outbox demo

test: $(VENV)/dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal -m 'not rig'
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report || $(BIN)/coverage report --fail-under=$$($(BIN)/python tests/coverage_goal.py)

# Poolers, standbys and clusters under load, at most 15 minutes. CI runs them with fewer events.
clusters: $(VENV)/dev
	OUTBOX_RIGS_FULL=yes $(BIN)/python -m pytest -q -rsP tests/rigs

check: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The site, in build/docs/index.html. Nothing is fetched for it, and its pages fetch nothing.
docs: $(VENV)/docs
	$(BIN)/sphinx-build -q -E -W --keep-going -b html docs build/docs

# The pictures of the console in its documentation. They need Debian's package chromium.
screenshots: $(VENV)/dev
	$(BIN)/python docs/screenshots.py

# Longer runs than the tests make. A failing world is shown with its seed and its shortest trace.
simulate: $(VENV)/dev
	$(BIN)/python -m tests.simulation $(or $(SEEDS),10000)

kill: $(VENV)/dev
	OUTBOX_KILL_EVERY_STEP=yes $(BIN)/python -m pytest -q tests/promises/test_kills.py
	$(BIN)/python -m tests.kill 1000

# Minutes. Prints tables, and keeps them in benchmarks/results.json, docs/performance.svg and docs/performance.md;
# TOPICS names some of them.
bench: $(VENV)/bench
	$(BIN)/python -m benchmarks $(TOPICS)
	$(BIN)/python docs/performance.py

clean:
	rm -rf $(VENV) .venv-ci build dist .coverage .coverage.*

# pip 25.1 is the first that knows --group.
$(VENV)/project: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/dev: $(VENV)/project
	$(BIN)/python -m pip install --quiet --group dev
	if command -v mariadb_config >/dev/null; then $(BIN)/python -m pip install --quiet --group compiled-drivers; fi
	touch $@

$(VENV)/docs: $(VENV)/project
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

$(VENV)/bench: $(VENV)/project
	$(BIN)/python -m pip install --quiet --group bench
	touch $@
