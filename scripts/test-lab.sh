#!/usr/bin/env bash
# Tests that need a laboratory: storage that a usual machine does not have. Each lab sets itself up; run it from anywhere.
#
#   scripts/test-lab.sh                all labs
#   scripts/test-lab.sh lvm            one: LVM thin volumes, in a Debian guest under QEMU (root, once, to make the guest)
#   scripts/test-lab.sh rbd            one: Ceph on the loopback interface (root, once, to install it)
#   scripts/test-lab.sh kvm            one: libvirtd of its own, with real guests under emulation (root)
#   scripts/test-lab.sh postgres       one: PostgreSQL servers of its own (root)
#   scripts/test-lab.sh lvm -k story   extra arguments go to pytest
#
# GRAINCOPY_LAB_SUITE=trixie makes the guest of the LVM lab of Debian 13 (LVM 2.03.31, thin-provisioning-tools 1.1).
# GRAINCOPY_LAB_FULL=1 tries every law in every place; without it those that one place proves are not repeated.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/set-up.sh"
cd "$root"
venv=${GRAINCOPY_VENV:-$root/.venv}
labs=(kvm postgres lvm rbd)
[ $# -eq 0 ] || [ ! -d "tests/${1#-}" ] || { labs=("$1") && shift; }

make_venv "$venv"
pip_install "$venv" --require-hashes -r requirements-dev.lock
installed=$("$venv/bin/python" -c 'import graincopy; print(graincopy.__file__)' 2>/dev/null || true)
[ "$installed" = "$root/src/graincopy/__init__.py" ] || pip_install "$venv" --no-deps --editable .

# What each lab needs. PostgreSQL's package would start a server of its own: that is told not to.
set_up() {
  is_root || die "the labs need root"
  case $1 in
    kvm)
      need libvirtd=libvirt-daemon virsh=libvirt-clients qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils \
        qemu-storage-daemon=qemu-system-common busybox=busybox-static cpio=cpio modprobe=kmod gcc=gcc \
        pkg-config=pkg-config swtpm=swtpm swtpm_setup=swtpm-tools mke2fs=e2fsprogs mkfs.xfs=xfsprogs unshare=util-linux nbdcopy=libnbd-bin
      [ -e /usr/share/OVMF/OVMF_CODE_4M.fd ] || install_packages ovmf
      pkg-config --exists libvirt || install_packages libvirt-dev libc6-dev python3-dev
      pip_install "$venv" --require-hashes -r requirements-libvirt.lock
      ;;
    postgres)
      if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        mkdir -p /etc/postgresql-common
        echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
      fi
      need pg_lsclusters=postgresql mkfs.xfs=xfsprogs mkfs.ext4=e2fsprogs
      ;;
    rbd) need ceph-mon=ceph-mon ceph-mgr=ceph-mgr ceph-osd=ceph-osd rbd=ceph-common rbd-fuse=rbd-fuse ;;
  esac
}

failed=()
for lab in "${labs[@]}"; do
  say "== $lab"
  set_up "$lab"
  GRAINCOPY_LABS=$lab "$venv/bin/python" -m pytest -o cache_dir="$venv/cache/pytest" "tests/$lab" "$@" || failed+=("$lab")
done
[ ${#failed[@]} -eq 0 ] || die "FAILED: ${failed[*]}"
say "all labs passed"
