#!/usr/bin/env bash
# Lint and test. ./test.sh runs the fast tests; arguments go to pytest: ./test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")"

if [ ! -f .venv/.installed-dev ] || [ requirements-dev.txt -nt .venv/.installed-dev ] || [ requirements.txt -nt .venv/.installed-dev ] || [ requirements-4bit.txt -nt .venv/.installed-dev ]; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --upgrade -r requirements-dev.txt
    touch .venv/.installed .venv/.installed-dev
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
# One thread for each of the two workers: more than there are cores wait for each other.
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n 2 "$@"
