#!/bin/sh
# Make a virtual environment with the pinned packages of requirements/NAME.txt, and pockjax itself
# if hatchling, which builds it, is among them.
# Usage: tools/venv.sh FOLDER NAME       (PYTHON=/path/to/python chooses the interpreter)
set -eu
cd "$(dirname "$0")/.."
venv=$1
name=$2

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

if [ ! -x "$venv/bin/python" ] || ! new_enough "$venv/bin/python"; then
  chosen=
  for candidate in ${PYTHON:-python3.12 python3.13 python3 python}; do
    if new_enough "$candidate"; then chosen=$candidate; break; fi
  done
  if [ -z "$chosen" ]; then
    found=$(python3 --version 2>/dev/null || echo "no python3")
    echo "pockjax needs Python 3.12 or newer; found ${PYTHON:-$found}." >&2
    echo "Install it, or name one: make PYTHON=/path/to/python3.12 ..." >&2
    exit 1
  fi
  rm -rf "$venv"
  "$chosen" -m venv "$venv"
fi

echo "setting up $venv from requirements/$name.txt"
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
$pip install --require-hashes -r "requirements/$name.txt"
# pockjax's build needs nothing that is not hashed: hatchling is among the packages of each
# environment that pockjax is meant for. Those of the peers that it is timed beside have none.
if grep -q '^hatchling==' "requirements/$name.txt"; then
  $pip install --no-deps --no-build-isolation --editable .
fi
touch "$venv/.$name"
