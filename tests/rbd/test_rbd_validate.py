"""``validate-volume rbd POOL``: the laws on a user's own cluster, with a user who may no more than the docs ask for."""

from __future__ import annotations

from collections import Counter

from guests import Guest
from story import Cli

from graincopy.core.errors import PathMissing, StorageUnreachable

# of a namespace that was in use
STAYS = {"rbd_directory", "rbd_group_directory", "rbd_info", "rbd_trash", "rbd_children"}
# what only files know
NOT_OF_IMAGES = ("mmap", "collapse", "insert", "reflink", "rename-over", "preallocate", "compressed")


def test_the_laws_hold_and_nothing_is_left(guest: Guest, cli: Cli) -> None:
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\nid = "backup"\nkeyring = "{guest.user("backup", cli.folder)}"\n')
    guest.rbd("namespace", "create", "rbd/validated", check=False)
    laws = cli.ok("validate-volume", "rbd", "rbd/validated")["laws"]
    count = Counter(law["outcome"] for law in laws)
    skipped = [law["law"] for law in laws if law["outcome"] == "skipped"]
    assert (count["failed"], count["ok"], count["skipped"]) == (0, len(laws) - len(skipped), len(skipped))
    assert count["ok"] >= 39 and all(any(word in law for word in NOT_OF_IMAGES) for law in skipped), laws
    left = guest.command("rados", "-p", "rbd", "--namespace", "validated", "ls").split()
    assert {one for one in left if not one.startswith("rbd_data.")} <= STAYS, left  # data the OSD trims in its own time


def test_where_there_is_nothing_to_work_on(guest: Guest, cli: Cli) -> None:
    for place in ("nopool", "rbd/nons"):
        done = cli("validate-volume", "rbd", place)
        assert done.code == PathMissing.exit_code and place in done.err, done
    cli.configure(f'[rbd]\nconf = "{cli.folder}/none"\n')
    done = cli("validate-volume", "rbd", "rbd")
    assert done.code == StorageUnreachable.exit_code and "[rbd] conf says where it is" in done.err, done
