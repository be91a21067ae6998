#!/usr/bin/env bash
# A Ceph of one node on the loopback interface, with cephx, for the tests of the rbd driver. Needs no root.
#
#   scripts/lab-ceph.sh start DIR [PORT]   DIR/ceph.conf and DIR/keyring are there when it returns (about 10 s)
#   scripts/lab-ceph.sh stop DIR           everything of it is gone, DIR too
#
# Debian: ceph-mon ceph-mgr ceph-osd ceph-common. PORT (default 13300) and the 100 ports after it are used.
set -euo pipefail

verb=${1:?start or stop} dir=${2:?DIR} port=${3:-13300}

stop() {
  local name pid
  for name in osd mgr mon; do
    [ -s "$dir/$name.pid" ] || continue
    pid=$(cat "$dir/$name.pid")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
  rm -rf -- "$dir"
}

if [ "$verb" = stop ]; then
  stop
  exit 0
fi

mkdir -p "$dir"/{mon,mgr,osd,log,run}
dir=$(cd "$dir" && pwd)
fsid=$(cat /proc/sys/kernel/random/uuid)
# Both addresses on loopback: with the public one alone the OSD binds its cluster messenger elsewhere and never comes up.
cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$port,v1:127.0.0.1:$((port + 1))]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = $((port + 2))
ms bind port max = $((port + 100))
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $dir/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = 8589934592
bluestore block create = true
bluestore prefer deferred size hdd = 0
osd memory target = 939524096
osd client watch timeout = 10
osd max object size = 268435456
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon data avail crit = 1
mgr initial modules =
paxos propose interval = 0.05
paxos min wait = 0.01
mon data = $dir/mon
mgr data = $dir/mgr
osd data = $dir/osd
run dir = $dir/run
crash dir = $dir/log
log file = $dir/log/\$name.log
admin socket = $dir/run/\$name.\$pid.asok
[client]
admin socket =
log file =
CONF
export CEPH_CONF=$dir/ceph.conf
trap 'echo "the laboratory did not come up; see the logs:" >&2; tail -n 5 "$dir"/log/*.out >&2 || true; stop' ERR

run() { # NAME COMMAND…: in the background, on its own, its pid noted
  local name=$1
  shift
  setsid "$@" </dev/null >"$dir/log/$name.out" 2>&1 &
  echo $! >"$dir/$name.pid"
}

ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$dir/keyring" --gen-key -n client.admin \
  --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
monmaptool --create --addv a "[v2:127.0.0.1:$port,v1:127.0.0.1:$((port + 1))]" --fsid "$fsid" "$dir/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring" >"$dir/log/mkfs.out" 2>&1
run mon ceph-mon -f -i a
timeout 60 ceph --connect-timeout 60 mon stat >/dev/null

ceph auth get-or-create mgr.a mon 'allow profile mgr' osd 'allow *' -o "$dir/mgr/keyring"
run mgr ceph-mgr -f -i a --keyring "$dir/mgr/keyring"

secret=$(ceph-authtool --gen-print-key)
id=$(echo "{\"cephx_secret\": \"$secret\"}" | ceph osd new "$(cat /proc/sys/kernel/random/uuid)" -i -)
ceph-authtool --create-keyring "$dir/osd/keyring" --name "osd.$id" --add-key "$secret" >/dev/null
uuid=$(ceph osd dump --format json | python3 -c 'import json,sys; print(json.load(sys.stdin)["osds"][0]["uuid"])')
ceph-osd -i "$id" --mkfs --osd-uuid "$uuid" --keyring "$dir/osd/keyring" >"$dir/log/mkfs.out" 2>&1
run osd ceph-osd -f -i "$id" --keyring "$dir/osd/keyring"
for _ in $(seq 200); do
  ceph osd stat | grep -q ' 1 up' && break
  sleep 0.2
done
ceph osd pool create rbd 8 8 >/dev/null 2>&1
ceph osd pool application enable rbd rbd >/dev/null 2>&1
timeout 60 rbd pool init rbd
