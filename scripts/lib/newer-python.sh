#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The package on the newest other CPython of this machine, as a user gets it: a wheel, NumPy, no torch. Passes with a word where there is none.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
current="$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
newer='import sys; sys.exit(sys.implementation.name != "cpython" or sys.version_info[:2] <= tuple(map(int, sys.argv[1].split("."))))'

found=""
shopt -s nullglob
for candidate in python3.14 python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.{14,13,12}*/bin/python3; do
  if "$candidate" -c "$newer" "$current" 2>/dev/null && PYTHON="$candidate" && export PYTHON; then
    found="$candidate"
    break
  fi
done
if [[ -z "$found" ]]; then
  echo "skipped: no CPython newer than $current here (looked for python3.12, 3.13, 3.14 on PATH and among pyenv's)"
  exit
fi

# shellcheck source=scripts/lib/setup.sh
source "$root/scripts/lib/setup.sh"
setup "" "test" --wheel
# What needs no torch and what depends on the version of Python.
python -m pytest -n "$((2 * $(nproc)))" --maxschedchunk 1 -m "not slow and not core" --ignore-glob='*torch*' --ignore-glob='*demo*'
