#!/usr/bin/env bash
# Everything that is checked: lint, format, types, the manual, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs docs/build
# Small models gain nothing from more threads: a process for each core instead.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist worksteal "$@"
