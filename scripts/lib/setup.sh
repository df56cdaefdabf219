# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# The set-up that every script beside this folder begins with. It takes a machine that has only Python >= 3.11 and root or sudo
# (Debian 12+, Ubuntu 24.04+) to a built and installed package, and does nothing where nothing is left to do: each step leaves a
# stamp with a hash of what it was made from.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"
#   setup "doctest-dev" "demo test dev"     # more Debian packages; extras of pyproject.toml
#   setup "" "test" --wheel                 # the package as users get it, instead of an editable one
#
# Afterwards the working directory is the repository's root, and python, cmake, pytest, ... are those of .venv/<version>. Nothing is
# ever installed into the system's Python. Logs are kept in build/setup.
#
#   PYTHON=/path/to/python3.13      the Python to use instead of the first python3 that is new enough
#   DAMO_TORCH_INDEX=https://...    where PyTorch comes from, see install_torch

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
unset PYTHONHOME PYTHONPATH  # another Python's packages are not ours
# Python compiles what it imports. That pip compiles all that it installs takes longer than the rest of what it does.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_COMPILE=0

die() {
  printf '\nerror: %s\n' "$1" >&2
  exit 1
}

# step WHAT COMMAND...: runs the command with its output in a log; shows that it runs, how long it took, and the end of the log if it failed.
step() {
  local what="$1" log started=$SECONDS ticker=""
  shift
  mkdir -p build/setup
  log="build/setup/$(tr -cs 'a-zA-Z0-9\n' '-' <<<"$what").log"
  printf '%s ... ' "$what"
  if [[ -t 1 ]]; then
    while sleep 1 && kill -0 $$; do printf '\r%s ... %d s' "$what" $((SECONDS - started)); done 2>/dev/null &
    ticker=$!
  fi
  local status=0
  "$@" >"$log" 2>&1 </dev/null || status=$?
  if [[ -n "$ticker" ]]; then
    { kill "$ticker" || true; wait "$ticker" || true; } 2>/dev/null
    printf '\r%s ... ' "$what"
  fi
  if ((status != 0)); then
    printf 'failed\n\n'
    tail -n 40 "$log" >&2
    die "\"$what\" failed (exit status $status). The command was: $*
The whole output is in $PWD/$log"
  fi
  printf 'done in %d s\n' $((SECONDS - started))
}

# once STAMP HASH WHAT COMMAND...: a step, unless it was already done with this hash.
once() {
  local stamp="$VENV/stamps/$1" hash="$2"
  shift 2
  [[ -f "$stamp" && "$(<"$stamp")" == "$hash" ]] && return
  step "$@"
  mkdir -p "$VENV/stamps" && printf '%s\n' "$hash" >"$stamp"
}

hash_of() { sha256sum | cut -d ' ' -f 1; }

# Sets PYTHON and VERSION (3.11, say).
pick_python() {
  local candidate
  local supported='import sys; sys.exit(sys.implementation.name != "cpython" or sys.version_info < (3, 11))'
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
    if "$candidate" -c "$supported" 2>/dev/null; then
      PYTHON="$(command -v "$candidate")"
      VERSION="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
      return
    fi
  done
  die "no CPython 3.11 or newer (looked for: ${PYTHON:-python3, python3.11 ... python3.14}). Install one, or name it: PYTHON=/path/to/python3 $0"
}

# What a bare Debian leaves out of its Python: pip for new environments, and the headers.
python_is_complete() {
  "$PYTHON" -c 'import ensurepip, os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

# debian_packages PACKAGE...: installs those that are missing.
debian_packages() {
  local package missing=()
  if ! command -v apt-get >/dev/null; then
    echo "Not Debian or Ubuntu: going on with what is installed (needed: $*)."
    return
  fi
  for package; do
    dpkg-query --show --showformat '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  ((${#missing[@]} > 0)) || return 0

  as_root=()
  if ((EUID != 0)); then
    local by_hand="Let an administrator run this, then run $0 again:
    apt-get install --no-install-recommends ${missing[*]}"
    command -v sudo >/dev/null || die "Debian packages are missing, and installing them needs root or sudo. $by_hand"
    sudo -n true 2>/dev/null || { [[ -t 0 ]] && sudo -v; } || die "Debian packages are missing, and sudo was refused. $by_hand"
    as_root=(sudo)
  fi
  step "Debian packages: ${missing[*]}" apt_install "${missing[@]}"
}

apt_install() {
  local said
  for _ in {1..30}; do  # a fresh machine's own updates may hold the lock for some minutes
    said="$("${as_root[@]}" apt-get update 2>&1)" && break
    [[ "$said" == *"Could not get lock"* ]] || break
    sleep 10
  done
  printf '%s\n' "$said"  # a failed update is no reason to stop: the lists on disk may do
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
}

make_venv() { rm -rf "$VENV" && "$PYTHON" -m venv "$VENV" && "$VENV/bin/python" -m pip install "pip>=25.1"; }

# requirements EXTRA...: what pyproject.toml asks for, one a line; with the tools that build the C++ side.
requirements() {
  python - "$@" <<'PYTHON'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    settings = tomllib.load(file)
lines = ["cmake>=3.25", "ninja"] + settings["build-system"]["requires"] + settings["project"]["dependencies"]
for extra in sys.argv[1:]:
    lines += settings["project"]["optional-dependencies"][extra]
print("\n".join(sorted(set(lines))))
PYTHON
}

# PyPI's torch for Linux brings gigabytes of CUDA that nothing here needs. So: an index named by the user, else a CPU build
# if pip as configured here already sees one, else PyTorch's own index of CPU builds (pip goes on to PyPI if it is out of reach).
install_torch() {
  local requirement="$1" index=()
  if [[ -n "${DAMO_TORCH_INDEX:-}" ]]; then
    index=(--index-url "$DAMO_TORCH_INDEX" --extra-index-url https://pypi.org/simple)
  elif ! python -m pip index versions torch 2>/dev/null | grep -q "${requirement#torch==}+cpu"; then
    index=(--extra-index-url https://download.pytorch.org/whl/cpu)
  fi
  python -m pip install "${index[@]}" "$requirement"
}

# install_package [--editable]: with a build folder that is kept, so that a changed file costs seconds.
install_package() {
  local settings=("-Cbuild-dir=build/python-$VERSION")
  [[ -z "${DAMO_WARNINGS_AS_ERRORS:-}" ]] || settings+=("-Ccmake.define.DAMO_WARNINGS_AS_ERRORS=$DAMO_WARNINGS_AS_ERRORS")
  python -m pip install --no-deps --no-build-isolation "${settings[@]}" "$@" .
}

# What the installed package is made from. An editable one reads the Python files where they are: only their names matter.
sources() {
  printf '%s\n' "$PWD" "$@"
  sha256sum CMakeLists.txt pyproject.toml
  find src -name '*.py' | LC_ALL=C sort
  find src -type f \( -path 'src/core/*' -o -path 'src/bindings/*' ${1:+-o -name '*.py'} \) -exec sha256sum {} + | LC_ALL=C sort
}

# setup "DEBIAN PACKAGES" "EXTRAS" [--wheel]
setup() {
  local packages extras lines torch lock editable=(--editable)
  read -ra packages <<<"$1"
  read -ra extras <<<"$2"
  packages+=(g++ librocksdb-dev libxxhash-dev)

  pick_python
  if ! python_is_complete; then
    [[ "$("$PYTHON" -c 'import sys; print(sys.base_prefix)')" == /usr ]] ||
      die "$PYTHON lacks ensurepip or its C headers (Python.h). Reinstall it with both, or choose another: PYTHON=/usr/bin/python3 $0"
    packages+=("python$VERSION-venv" "python$VERSION-dev")
  fi
  debian_packages "${packages[@]}"
  export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
  if command -v ccache >/dev/null; then
    export CMAKE_CXX_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR="$PWD"
  fi

  mkdir -p .venv
  exec {lock}>.venv/lock
  flock "$lock"  # two scripts at once take turns
  VENV="$PWD/.venv/$VERSION"
  export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
  "$VENV/bin/python" -m pip --version &>/dev/null || step "Python $VERSION environment in .venv/$VERSION" make_venv

  lines="$(requirements "${extras[@]}")"
  torch="$(grep '^torch==' <<<"$lines" || true)"
  if [[ -n "$torch" ]]; then
    once torch "$torch" "PyTorch (${torch/==/ }, the largest download)" install_torch "$torch"
  fi
  mapfile -t lines <<<"$lines"
  once "packages-${extras[*]// /-}" "$(printf '%s\n' "${lines[@]}" | hash_of)" "Python packages" python -m pip install "${lines[@]}"
  [[ "${3:-}" != --wheel ]] || editable=()
  once damo-embedding "$(sources ${3:+"$3"} | hash_of)" "damo-embedding: build and install" install_package "${editable[@]}"
  exec {lock}>&-
}
