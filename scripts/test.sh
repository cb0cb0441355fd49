#!/usr/bin/env bash
# All tests: lint, format, pytest. Arguments go to pytest: bash scripts/test.sh tests/clustering
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff check .
ruff format --check --quiet .
# One worker a core beats two threads a test: most of a test is Python, starting processes and small matrices.
exec python -m pytest -n 2 --dist loadfile "$@"
