#!/usr/bin/env bash
# The main job of graincopy on real input, in about a minute. It sets itself up, and removes everything it made.
#
#   scripts/quickstart.sh           as root: three LUNs with datastores, five disks, snapshots, change maps
#                                   else: the same story on plain files, with the locked driver
#   TMPDIR=/big scripts/quickstart.sh   work there instead of /var/tmp (it takes about 1 GB for a while)
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/set-up.sh"

scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/graincopy-quickstart.XXXXXX")
trap 'rm -rf -- "$scratch"' EXIT # until quickstart.py takes over
trap 'exit 130' INT
trap 'exit 143' TERM HUP

need mkfs.ext4=e2fsprogs debugfs=e2fsprogs
if is_root; then
  need losetup=mount addpart=util-linux mkfs.xfs=xfsprogs sfdisk=fdisk
fi
say "making a virtual environment with graincopy in it"
make_venv "$scratch/venv"
pip_install "$scratch/venv" --require-hashes -r "$root/requirements.lock"
pip_install "$scratch/venv" --no-deps "$root"

exec "$scratch/venv/bin/python" "$root/scripts/quickstart.py" "$scratch" </dev/null
