"""The main job of graincopy, told as a story that proves itself: back up, write, back up again, restore, take back.

Started by quickstart.sh with a scratch folder that holds a virtual environment with graincopy; removes the folder and
everything else it made, whatever happens.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

from quickstart_lab import MIB, Disk, Failed, FolderLab, Lab, LunLab, run

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NEED_BYTES = 1536 * MIB


def say(text: str = "") -> None:
    """A line of the story."""
    print(text, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns under a head."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say("   " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count} B" if count < 1024 else f"{count / 1024:.0f} KiB" if count < MIB else f"{count / MIB:.1f} MiB"


def expect(fact: bool, text: str) -> None:
    """The proof of one thing. Raises Failed."""
    say(f"   {'ok' if fact else 'NOT OK'}: {text}")
    if not fact:
        raise Failed(f"this does not hold: {text}")


class Story:
    """The chapters, over one lab."""

    def __init__(self, scratch: str, lab: Lab) -> None:
        self.scratch, self.lab = scratch, lab
        self.program = os.path.join(scratch, "venv", "bin", "graincopy")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("GRAINCOPY_")}
        self.env |= {
            "GRAINCOPY_REPO": os.path.join(scratch, "backup"),
            "GRAINCOPY_PASSPHRASE": secrets.token_urlsafe(16),
            "XDG_CONFIG_HOME": os.path.join(scratch, "config"),
        }

    def graincopy(self, *arguments: str) -> Any:
        """Run it where the datastores are, and answer its JSON document."""
        say(f"   $ graincopy {' '.join(arguments)}")
        return json.loads(run(self.program, *arguments, "--json", cwd=self.scratch, env=self.env))

    def tell(self) -> None:
        """All chapters."""
        self.prepare()
        first = self.back_up("2. Full backup: what is allocated, at one instant over all volumes")
        before = self.sums(self.lab.disks)
        say("\n3. A working day: ordinary writes inside the virtual disks, and inside the neighbour's")
        for number, disk in enumerate((*self.lab.disks[::2], self.lab.neighbour)):
            say(f"   {self.lab.write(disk, number)}")
        after, neighbour = self.sums(self.lab.disks), self.sums((self.lab.neighbour,))
        expect(before != after, "the disks are no longer what they were")
        self.show_targets()
        second = self.back_up("4. Backup again: only the grains that became dirty")
        self.compare(first, second)
        restore = self.bring_back(before, neighbour)
        self.take_back(restore, after, neighbour)
        self.prove()

    def prepare(self) -> None:
        """Show the storage, make the repository."""
        say(f"\n1. Storage: {self.lab.place}")
        table(("", "", "DISKS"), self.lab.describe())
        say(f"   the neighbour, {self.lab.neighbour.path}, belongs to somebody else: never read, never touched")
        os.makedirs(os.path.join(self.scratch, "config", "graincopy"))
        with open(os.path.join(self.scratch, "config", "graincopy", "config.toml"), "w", encoding="utf-8") as file:
            file.write(f"[paths]\nstate = {json.dumps(self.scratch + '/state')}\n")
            file.write(f"cache = {json.dumps(self.scratch + '/cache')}\n")
        made = self.graincopy("init")
        say(f"   an encrypted repository with {size(made['grain_size'])} grains, in a place of its own")

    def back_up(self, title: str) -> Any:
        """One restore point, as a table."""
        say(f"\n{title}")
        found = self.graincopy("backup", "--name", "shop", *(disk.path for disk in self.lab.disks))
        columns = ("size", "dirty_bytes", "read_bytes", "audit_bytes", "stored_bytes")
        rows = [
            (disk["name"], disk["driver"], *(size(disk[column]) for column in columns), disk["change_map"])
            for disk in found["disks"]
        ]
        table(("DISK", "DRIVER", "SIZE", "DIRTY", "READ", "AUDIT", "STORED", "CHANGE MAP"), rows)
        window = found["freeze_ms"]
        held = "nothing was frozen" if window is None else f"the freeze window took {window:.0f} ms"
        say(f"   restore point {found['restore_point'][:12]} in {found['duration_s']:.1f} s; {held}")
        say(f"   the repository grew by {size(stored(found))}")
        for warning in found["warnings"]:
            say(f"   warning: {warning}")
        self.show_targets()
        return found

    def show_targets(self) -> None:
        """What each T takes on the storage now."""
        targets = self.graincopy("targets")["targets"]
        if not targets:
            say("   no T: this driver takes no snapshots")
        for target in targets:
            taken = f"as large as its source, {size(target['size'])}, and takes {size(target['allocated'])}"
            say(f"   T of {os.path.basename(target['volume'])} ({target['role']}): {taken}")

    def compare(self, first: Any, second: Any) -> None:
        """What the second backup must have spared."""
        by_map = all(disk["driver"] == "reflink" for disk in second["disks"])
        say("   the change map says what to read" if by_map else "   there is no change map: all was read and compared")
        expect(second["base"] == first["restore_point"], "it builds on the first one")
        expect(
            stored(second) * 4 < stored(first), f"{size(stored(second))} stored, the first time {size(stored(first))}"
        )
        if by_map:
            read, dirty = (total(second, key) for key in ("read_bytes", "dirty_bytes"))
            expect(read <= dirty, f"read {size(read)}, dirty {size(dirty)}: no clean grain but the audit's")

    def bring_back(self, before: dict[str, str], neighbour: dict[str, str]) -> str:
        """The older point, in place."""
        say("\n5. Restore the older point in place: write what differs, straight from the medium, merge nothing")
        done = self.graincopy("restore", "latest~1", "--in-place")
        columns = ("differing_bytes", "written_bytes", "read_bytes")
        rows = [(disk["name"], *(size(disk[column]) for column in columns), disk["how"]) for disk in done["disks"]]
        table(("DISK", "DIFFERING", "WRITTEN", "READ", "FOUND BY"), rows)
        expect(self.sums(self.lab.disks) == before, "sha256 of every disk is what it was before the writes")
        for disk in self.lab.disks:
            expect(True, f"{self.lab.check(disk)} {disk.path}: clean")
        expect(
            self.sums((self.lab.neighbour,)) == neighbour, "sha256 of the neighbour is unchanged, its writes are there"
        )
        restore: str = done["restore"]
        return restore

    def take_back(self, restore: str, after: dict[str, str], neighbour: dict[str, str]) -> None:
        """The undo."""
        say("\n6. Take the restore back")
        self.graincopy("undo", restore[:12])
        expect(self.sums(self.lab.disks) == after, "sha256 of every disk is what it was before the restore")
        expect(self.sums((self.lab.neighbour,)) == neighbour, "sha256 of the neighbour is unchanged")

    def prove(self) -> None:
        """The repository, every byte; and nothing on the storage but checkpoints."""
        say("\n7. Prove what is stored")
        expect(self.graincopy("check", "--data")["findings"] == [], "every byte in the repository is as it was written")
        roles = {target["role"] for target in self.graincopy("targets")["targets"]}
        expect(roles <= {"checkpoint"}, "nothing is left on the storage but the checkpoints for the next backup")

    def sums(self, disks: Iterable[Disk]) -> dict[str, str]:
        """Path → sha256."""
        return {disk.path: self.lab.sha256(disk) for disk in disks}


def total(backup: Any, key: str) -> int:
    """Over all disks of a backup."""
    return sum(disk[key] for disk in backup["disks"])


def stored(backup: Any) -> int:
    """What the repository grew by, bytes."""
    return total(backup, "stored_bytes") + int(backup["metadata_bytes"])


def host_state() -> set[str]:
    """Every mount, and every loop device that is bound."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    if os.geteuid() == 0:
        lines += run("losetup", "--all").splitlines()
    return set(lines)


def of_ours(state: set[str], scratch: str) -> list[str]:
    """What of ``state`` has to do with ``scratch``. A loop device on a file of ours names it, as long as it is mounted;
    and a file system with a bound file cannot be unmounted."""
    return sorted(line for line in state if os.path.basename(scratch) in line)


def sweep(scratch: str) -> None:
    """Take down what a signal at a bad moment may have left: normally nothing."""
    for _ in range(4):  # a mount on a loop device on a mount on a loop device
        for line in of_ours(host_state(), scratch):
            if line.startswith("/dev/loop") and line.split(" ")[0].endswith(":"):
                subprocess.run(["losetup", "--detach", line.partition(":")[0]], check=False, timeout=60)
            else:
                subprocess.run(["umount", unescaped(line.split(" ")[1])], check=False, timeout=60)


def unescaped(path: str) -> str:
    """A path as the mount table writes it (``\\040`` for a space), as it is."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)


def leave(number: int, _frame: FrameType | None) -> None:
    """A signal ends the story by an exception, so that everything is taken down."""
    raise SystemExit(128 + number)


def choose_lab(scratch: str) -> Lab:
    """The whole story where it can be told."""
    if os.geteuid() == 0 and os.access("/dev/loop-control", os.R_OK | os.W_OK):
        return LunLab(scratch)
    why = "no root" if os.geteuid() else "no loop devices here"
    say(f"{why}: the same story with the locked driver, which holds writers off instead of taking snapshots")
    return FolderLab(scratch)


def tell(scratch: str) -> None:
    """Storage, story, and the storage taken down again. Raises Failed."""
    free = os.statvfs(scratch)
    if free.f_bavail * free.f_frsize < NEED_BYTES:
        raise Failed(f"{scratch} needs {size(NEED_BYTES)} free; set TMPDIR to a place that has it")
    with choose_lab(scratch) as lab:
        try:
            Story(scratch, lab).tell()
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Tell the story and clean up; 0 when everything held."""
    scratch = os.path.realpath(sys.argv[1])
    started, before = time.monotonic(), host_state()
    for number in SIGNALS:
        signal.signal(number, leave)
    troubles, code = [], 1
    try:
        tell(scratch)
    except Failed as failure:
        troubles.append(str(failure))
    except SystemExit as stop:
        code = int(stop.code or 1)
        troubles.append(f"stopped by signal {code - 128}")
    finally:
        sweep(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
    after = host_state()
    if left := of_ours(after, scratch) + [scratch] * os.path.exists(scratch):
        troubles.append(f"left behind: {', '.join(left)}")
    if troubles:
        print(f"quickstart: {'; '.join(troubles)}", file=sys.stderr)
        return code
    others = "" if after == before else " (others on this machine mounted or bound something meanwhile)"
    say(f"\nEverything held, in {time.monotonic() - started:.0f} s. {scratch} is removed;")
    say(f"mounts and loop devices are as they were before{others}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
