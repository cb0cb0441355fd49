#!/usr/bin/env bash
# All tests: lint, format, pytest. Arguments go to pytest: bash scripts/test.sh tests/clustering
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff check .
ruff format --check --quiet .
exec python -m pytest "$@"
