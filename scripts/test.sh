#!/usr/bin/env bash
# Every check of the project: lint, format, types, layers, tests. It sets itself up; run it from anywhere.
#
#   scripts/test.sh                    everything (as root also what needs loop devices, mounts and freezing)
#   scripts/test.sh tests/core -x      extra arguments go to pytest; paths count from the project's folder
#   GRAINCOPY_VENV=DIR scripts/test.sh another place for the virtual environment than .venv
#
# Left behind: the virtual environment, with all caches in it. Tests that need root are skipped without it, and listed.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/set-up.sh"
cd "$root"

scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/gc-test.XXXXXX")
chmod 755 "$scratch" # some tests become an ordinary user
venv=${GRAINCOPY_VENV:-$root/.venv}
[ -w "$root" ] || [ -n "${GRAINCOPY_VENV:-}" ] || venv=$scratch/venv

# A test of the array driver that was killed may leave the number of a loop device read-only, for whoever uses it next.
writable_loops() {
  local device
  for device in /dev/loop[0-9]*; do
    losetup "$device" >/dev/null 2>&1 || blockdev --setrw "$device" 2>/dev/null || true
  done
}

# Whatever a test that was killed left mounted or bound below the scratch folder goes before the folder does.
clean_up() {
  local point device
  trap '' INT TERM HUP
  if is_root; then
    for _ in 1 2 3 4; do
      findmnt --raw --noheadings --output TARGET | grep -F -- "$(basename "$scratch")" | tac | while read -r point; do
        fsfreeze --unfreeze "$(printf '%b' "$point")" 2>/dev/null || true
        umount "$(printf '%b' "$point")" || true
      done || true
      losetup --all | grep -F -- "$(basename "$scratch")" | cut -d: -f1 | while read -r device; do
        losetup --detach "$device" || true
      done || true
    done
  fi
  ! is_root || writable_loops
  rm -rf --one-file-system -- "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if is_root; then
  need mkfs.xfs=xfsprogs mkfs.btrfs=btrfs-progs mkfs.ext4=e2fsprogs losetup=mount fsfreeze=util-linux \
    sfdisk=fdisk sgdisk=gdisk parted=parted getfattr=attr \
    nbdcopy=libnbd-bin qemu-img=qemu-utils qemu-storage-daemon=qemu-system-common \
    fusermount3=fuse3 mkntfs=ntfs-3g openssl=openssl strace=strace
else
  say "without root: tests that need loop devices, mounts and freezing are skipped and listed"
fi
make_venv "$venv"
pip_install "$venv" --require-hashes -r requirements-dev.lock
installed=$("$venv/bin/python" -c 'import graincopy; print(graincopy.__file__)' 2>/dev/null || true)
[ "$installed" = "$root/src/graincopy/__init__.py" ] || pip_install "$venv" --no-deps --editable .

caches=$venv/cache
export TMPDIR=$scratch PYTHONPYCACHEPREFIX=$caches/python RUFF_CACHE_DIR=$caches/ruff MYPY_CACHE_DIR=$caches/mypy
export HYPOTHESIS_STORAGE_DIRECTORY=$caches/hypothesis PATH="$venv/bin:$PATH"

failed=()
check() {
  say "== $*"
  "$@" </dev/null || failed+=("$1 ${2:-}")
}
check ruff check
check ruff format --check
check mypy
check mypy --strict scripts/quickstart.py
check lint-imports --no-logo --cache-dir "$caches/import-linter"
check python -m pytest --basetemp "$scratch/pytest" -o cache_dir="$caches/pytest" "$@"

if [ ${#failed[@]} -ne 0 ]; then
  printf -v list "%s, " "${failed[@]}"
  say "FAILED: ${list%, }"
  exit 1
fi
say "all checks passed"
