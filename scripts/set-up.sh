# What quickstart.sh and test.sh share: Debian packages, a Python that is new enough, a virtual environment. Sourced.
#
# Nothing is assumed but python3 (3.11 or newer), and the usual package registries.

export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C.UTF-8 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTHONHOME

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$(basename "$0"): $1"
  exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }

# need TOOL=PACKAGE...: the tools, or with root the packages that bring them.
need() {
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
}

install_packages() {
  is_root || die "missing: $*. Run once as root: apt-get install $*"
  command -v apt-get >/dev/null || die "missing: $*. Install them with this system's package manager"
  say "installing $*"
  # A mirror that is down for a part of the lists does no harm as long as the packages can be had.
  [ -n "${updated:-}" ] || quietly apt-get update || say "apt-get update failed; trying with the lists that are there"
  updated=yes
  DEBIAN_FRONTEND=noninteractive quietly apt-get install -y --no-install-recommends "$@"
}

# quietly COMMAND...: what it prints is shown only when it fails.
quietly() {
  local said
  if said=$("$@" </dev/null 2>&1); then return; fi
  say "$said"
  return 1
}

# The first python3 that is new enough; $PYTHON before all others.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed. Debian 12 has it: apt-get install python3"
}

# make_venv DIRECTORY: a virtual environment there, or the one that is there already and works.
make_venv() {
  local python
  "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null || install_packages python3-venv
  "$python" -m venv --clear "$1"
}

# pip_install DIRECTORY ARGUMENT...: quietly, into the virtual environment in DIRECTORY.
pip_install() {
  local venv=$1
  shift
  "$venv/bin/python" -m pip install -qq --no-input "$@" </dev/null >&2
}
