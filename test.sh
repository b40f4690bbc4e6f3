#!/usr/bin/env bash
# Lint and test. ./test.sh runs the fast tests; arguments go to pytest: ./test.sh -m slow
. "$(dirname "$0")/setup.sh"

case ${1:-} in
-h | --help)
    cat <<'END'
usage: ./test.sh [pytest's arguments]

Checks the code with ruff, its types with mypy, and runs the fast tests. Makes .venv and installs the pinned packages on
first use; PYTHON names the Python for it, 3.10 to 3.14 (default: python3).

  ./test.sh -m slow                  the tests that take minutes
  ./test.sh -m gpu                   those that need a GPU
  ./test.sh tests/steps/test_score.py  one file
  .venv/bin/python -m pytest --help  pytest's own arguments
END
    exit
    ;;
esac

set_up .installed-dev requirements-dev.txt requirements.txt requirements-4bit.txt requirements-heic.txt

.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
# One thread for each of the two workers: more than there are cores wait for each other.
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n 2 "$@"
