"""The locked packages that the guest needs, for *its* Python: printed with their hashes, for pip --require-hashes.

    python requirements.py PYTHON_VERSION LOCK DEV_LOCK

All of LOCK, and of DEV_LOCK what runs tests. Markers are evaluated here, because pip would take this host's Python.
"""

from __future__ import annotations

import re
import sys

from packaging.markers import Marker

TEST_TOOLS = ("hypothesis", "iniconfig", "packaging", "pluggy", "pygments", "pytest", "sortedcontainers")
ARRAY = ("asyncssh", "cryptography", "typing-extensions")  # a workload over several drivers


def blocks(path: str) -> dict[str, list[str]]:
    """Requirement line → itself and its hash lines."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if re.match(r"[A-Za-z0-9]", line):
                current = found[line.rstrip(" \\\n")] = [line]
            elif line.lstrip().startswith("--hash"):
                current.append(line)
    return found


def for_guest(found: dict[str, list[str]], version: str) -> dict[str, list[str]]:
    """Name → lines, of what applies to CPython ``version`` on Linux, without its marker."""
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "sys_platform": "linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    chosen: dict[str, list[str]] = {}
    for requirement, lines in found.items():
        pin, _, marker = requirement.partition(";")
        if not marker or Marker(marker.strip()).evaluate(environment):
            chosen[pin.split("==")[0].strip()] = [f"{pin.strip()} \\\n", *lines[1:]]
    return chosen


def main(version: str, lock: str, dev_lock: str) -> None:
    wanted = for_guest(blocks(lock), version)
    more = for_guest(blocks(dev_lock), version)
    wanted |= {name: lines for name, lines in more.items() if name in (*TEST_TOOLS, *ARRAY)}
    for lines in wanted.values():
        sys.stdout.write("".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:4])
