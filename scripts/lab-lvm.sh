#!/usr/bin/env bash
# The LVM lab: tests in a Debian guest with a kernel that has device-mapper, under QEMU. Needs root only to build.
#
#   scripts/lab-lvm.sh build                make the guest, or find it as it was made before (prints its folder)
#   scripts/lab-lvm.sh run OUT COMMAND...   boot it, run COMMAND in the project's folder there; what it leaves in
#                                           /results comes back in the folder OUT, the console in OUT/console.log
#
# The guest has no network. It is kept in the virtual environment's cache under a hash of everything it is made from.
# GRAINCOPY_LAB_ACCEL=kvm runs it faster where KVM works; GRAINCOPY_LAB_MIRROR names another Debian mirror.
# GRAINCOPY_LAB_SUITE=trixie makes it of Debian 13: LVM 2.03.31 and thin-provisioning-tools 1.1 instead of 0.9.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/set-up.sh"
lab=$root/tests/labs/lvm
venv=${GRAINCOPY_VENV:-$root/.venv}
suite=${GRAINCOPY_LAB_SUITE:-bookworm} python=3.11 # Debian 12 and its Python
[ "$suite" = bookworm ] || python=3.13
mirror=${GRAINCOPY_LAB_MIRROR:-http://deb.debian.org/debian}
packages=lvm2,thin-provisioning-tools,dmsetup,xfsprogs,e2fsprogs,btrfs-progs,kmod,udev,busybox-static,util-linux,mount
packages+=,procps,python3
modules="virtio_pci virtio_blk virtio_rng ext4 xfs btrfs dm-thin-pool dm-snapshot loop"

requirements=$("$venv/bin/python" "$lab/requirements.py" "$python" "$root/requirements.lock" "$root/requirements-dev.lock")
inputs=$({ sed '/^run() {/,$d' "${BASH_SOURCE[0]}" && cat "$lab"/guest-init "$lab"/initramfs-init; } | sha256sum)
inputs=$(printf '%s\n' "$requirements" "$inputs" | sha256sum)
home=$venv/cache/lab-lvm/$suite/${inputs:0:16}

build() {
  [ ! -e "$home/made" ] || return 0
  is_root || die "the guest has to be made once as root"
  need debootstrap=debootstrap qemu-system-x86_64=qemu-system-x86 cpio=cpio depmod=kmod mkfs.ext4=e2fsprogs gzip=gzip xz=xz-utils
  rm -rf --one-file-system -- "$venv/cache/lab-lvm/$suite" # older ones, too
  mkdir -p "$home"
  local tree
  tree=$(mktemp -d /var/tmp/gc-lab-tree.XXXXXX) # debootstrap cannot do with spaces in its path
  # shellcheck disable=SC2064 # this tree, whatever the name means by then
  trap "rm -rf --one-file-system -- '$tree'" EXIT
  chmod 755 "$tree"
  say "making the guest of the LVM lab (a few minutes, once)"
  quietly debootstrap --variant=minbase --include="$packages" "$suite" "$tree" "$mirror"
  add_kernel "$tree"
  add_python "$tree"
  install -m 755 "$lab/guest-init" "$tree/sbin/guest-init"
  mkdir -p "$tree/project" "$tree/results"
  echo graincopy-lab > "$tree/etc/machine-id"
  # dmeventd would only cost time: nothing here is to grow by itself
  printf 'activation {\n  monitoring = 0\n}\n' > "$tree/etc/lvm/lvmlocal.conf"
  rm -rf "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/usr/share/{doc,man,locale}
  add_initramfs "$tree"
  truncate -s 2G "$home/root.img"
  quietly mkfs.ext4 -q -F -O ^has_journal -d "$tree" "$home/root.img"
  rm -rf --one-file-system -- "$tree"
  : > "$home/made"
}

# Debian's own kernel: only the modules that are needed, so that the image stays small.
add_kernel() {
  local tree=$1 name version module
  cp /etc/resolv.conf "$tree/etc/resolv.conf"
  quietly chroot "$tree" apt-get update
  name=$(chroot "$tree" apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
  (cd "$home" && quietly chroot "$tree" sh -c "cd /tmp && apt-get download $name")
  dpkg-deb -x "$tree"/tmp/linux-image-*.deb "$home/kernel"
  rm -f "$tree"/tmp/*.deb
  [ -e "$home/kernel/lib" ] || mv "$home/kernel/usr/lib" "$home/kernel/lib" # Debian 13 has it there
  version=$(ls "$home/kernel/lib/modules")
  depmod -b "$home/kernel" "$version"
  for module in $modules; do
    modprobe -d "$home/kernel" -S "$version" --show-depends "$module" | sed -n 's/^insmod \(.*[^ ]\) *$/\1/p'
  done | awk '!seen[$0]++' > "$home/modules"
  while read -r module; do
    install -D -m 644 "$module" "$tree/usr${module#"$home/kernel"}"
  done < "$home/modules"
  cp "$home/kernel/lib/modules/$version"/modules.{builtin,builtin.modinfo,order} "$tree/usr/lib/modules/$version/"
  chroot "$tree" depmod "$version"
  cp "$home/kernel/boot/vmlinuz-$version" "$home/vmlinuz"
}

# The locked packages, for the guest's Python, whatever this host's is.
add_python() {
  local tree=$1
  printf '%s\n' "$requirements" > "$home/requirements.txt"
  pip_install "$venv" --require-hashes --no-deps --only-binary=:all: --python-version "$python" \
    --ignore-requires-python --implementation cp --abi "cp${python/./}" --abi abi3 --abi none \
    --platform manylinux_2_36_x86_64 --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 --platform any \
    --target "$tree/opt/site" -r "$home/requirements.txt"
  quietly chroot "$tree" python3 -m compileall -q /opt/site /usr/lib/python3
}

add_initramfs() {
  local tree=$1 ram=$home/ram module name
  mkdir -p "$ram"/{bin,dev,proc,mnt,modules.d}
  cp "$tree/bin/busybox" "$ram/bin/busybox"
  ln -s busybox "$ram/bin/sh"
  grep -E '/(virtio|ext4|jbd2|mbcache|crc|libcrc|crypto)[^/]*|/virtio/|/crypto/' "$home/modules" |
    grep -v -E '/(xfs|btrfs|md|loop)|/(xor|blake2b)' | while read -r module; do
    name=$(basename "${module%.xz}")
    if [ "$module" = "${module%.xz}" ]; then cat; else xz -dc; fi < "$module" > "$ram/modules.d/$name"
    printf '/modules.d/%s\n' "$name" >> "$ram/modules"
  done
  install -m 755 "$lab/initramfs-init" "$ram/init"
  (cd "$ram" && find . | cpio -o -H newc --quiet | gzip -1) > "$home/initramfs.gz"
  rm -rf "$ram" "$home/kernel"
}

run() {
  local out=$1 code accel=${GRAINCOPY_LAB_ACCEL:-tcg} cpu=Westmere
  shift
  [ "$accel" = tcg ] || cpu=host
  build
  mkdir -p "$out"
  scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/gc-lab.XXXXXX")
  trap 'rm -rf -- "$scratch"' EXIT
  printf '%q ' "$@" > "$scratch/run-in-guest"
  tar -cf "$scratch/project.tar" --exclude=__pycache__ -C "$root" pyproject.toml src tests -C "$scratch" run-in-guest
  truncate -s 64M "$scratch/results.tar"
  truncate -s 4G "$scratch/one.img" "$scratch/two.img"
  timeout "${GRAINCOPY_LAB_TIMEOUT:-3000}" qemu-system-x86_64 -accel "$accel" -cpu "$cpu" -M q35 -m 1536 -smp 1 \
    -nodefaults -no-reboot -nographic -serial stdio \
    -kernel "$home/vmlinuz" -initrd "$home/initramfs.gz" -append "console=ttyS0 panic=-1 quiet loglevel=3" \
    -drive "file=$home/root.img,if=virtio,format=raw,snapshot=on" \
    -drive "file=$scratch/project.tar,if=virtio,format=raw,readonly=on" \
    -drive "file=$scratch/results.tar,if=virtio,format=raw" \
    -drive "file=$scratch/one.img,if=virtio,format=raw,cache=unsafe,discard=unmap" \
    -drive "file=$scratch/two.img,if=virtio,format=raw,cache=unsafe,discard=unmap" \
    </dev/null 2>&1 | tee "$out/console.log" | { [ -n "${GRAINCOPY_LAB_QUIET:-}" ] && cat >/dev/null || cat; } || true
  tar -xf "$scratch/results.tar" -C "$out" 2>/dev/null || die "the guest left no results; see $out/console.log"
  code=$(sed -n 's/^GUEST-CODE \([0-9]*\).*/\1/p' "$out/console.log" | tail -1)
  [ -n "$code" ] || die "the guest did not come to its end; see $out/console.log"
  return "$code"
}

case ${1:-} in
  build)
    build
    printf '%s\n' "$home"
    ;;
  run)
    shift
    run "$@"
    ;;
  *) die "usage: lab-lvm.sh build | run OUT COMMAND..." ;;
esac
