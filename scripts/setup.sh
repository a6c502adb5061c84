# Sourced by scripts/demo, scripts/test and scripts/lint: everything that a fresh checkout needs, once.
# shellcheck shell=bash
#
# `set_up EXTRA` makes .venv with a Python >= 3.11 and installs the project with its tested dependencies. A stamp
# in .venv remembers what was installed, so that it costs nothing until pyproject.toml, constraints.txt or kernels/
# change.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

fail() {
  echo "$*" >&2
  exit 1
}

is_supported() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if is_supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "Swarm needs Python 3.11 or newer; found: $(python3 --version 2>&1 || true)." \
    "Install one from https://www.python.org/downloads/, or name it: PYTHON=/path/to/python3.12 $0"
}

fingerprint() {
  "$VENV/bin/python" - "$ROOT"/{pyproject.toml,constraints.txt} "$ROOT"/kernels/* <<'PYTHON'
import hashlib, pathlib, sys
parts = [sys.version.encode(), sys.prefix.encode(), *(pathlib.Path(name).read_bytes() for name in sys.argv[1:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

is_installed() { # EXTRA HASH; `dev` includes `test`
  local extra
  for extra in "$1" dev; do
    [[ "$(cat "$VENV/.swarm-$extra" 2>/dev/null)" == "$2" ]] && return
  done
  return 1
}

set_up() { # EXTRA
  cd "$ROOT"
  if ! is_supported "$VENV/bin/python"; then
    local python
    python=$(find_python)
    echo "Making .venv with $("$python" --version)" >&2
    "$python" -m venv --clear "$VENV" ||
      fail "This Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
  fi
  local hash
  hash=$(fingerprint)
  if ! is_installed "$1" "$hash"; then
    echo "Installing Swarm and what it needs into .venv (the first time, this takes some minutes)" >&2
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$1]"
    echo "$hash" >"$VENV/.swarm-$1"
  fi
}
