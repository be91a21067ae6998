"""The host's end of the LVM lab: boots the guest once, for all tests that were chosen, and knows what each said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import pytest

TIMEOUT = 3600  # seconds for building, booting and all tests


def in_guest() -> bool:
    """This is the guest."""
    return "GRAINCOPY_GUEST_RESULTS" in os.environ


def wanted() -> bool:
    """The lab was asked for."""
    return "lvm" in os.environ.get("GRAINCOPY_LABS", "").split(",")


class Guest:
    """One boot, made when the first result is asked for."""

    def __init__(self, root: str, nodeids: Sequence[str]) -> None:
        self._root, self._nodeids = root, nodeids
        self._results: dict[str, tuple[str, str]] | None = None
        self._folder = ""
        self._said = ""

    def report(self, nodeid: str) -> None:
        """Let the test end as it did in the guest."""
        if self._results is None:
            self._results = self._run()
        outcome, text = self._results.get(nodeid, ("failed", f"the guest never came to it:\n{self._said[-3000:]}"))
        if outcome == "skipped":
            pytest.skip(text.removeprefix("Skipped: "))
        if outcome != "passed":
            pytest.fail(text, pytrace=False)

    def _run(self) -> dict[str, tuple[str, str]]:
        self._folder = tempfile.mkdtemp(prefix="gc-lvm.")
        out = os.environ.get("GRAINCOPY_LAB_OUT") or os.path.join(self._folder, "out")
        environment = {"GRAINCOPY_GUEST_RESULTS": "/results/results.jsonl", "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/h"}
        if os.environ.get("GRAINCOPY_LAB_FULL"):
            environment["GRAINCOPY_LAB_FULL"] = "1"
        words = [f"{name}={value}" for name, value in environment.items()]
        pytest_words = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--basetemp=/run/pytest"]
        command = [f"{self._root}/scripts/lab-lvm.sh", "run", out, "env", *words, *pytest_words, *self._nodeids]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False, errors="replace"
        )
        self._said = done.stdout
        return read_results(os.path.join(out, "results.jsonl"))

    def clean_up(self) -> None:
        """Forget what the guest left."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def read_results(path: str) -> dict[str, tuple[str, str]]:
    """What each test came to; the worst of its phases counts."""
    found: dict[str, tuple[str, str]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except FileNotFoundError:
        return {}
    for nodeid, outcome, text, _ in rows:
        if found.get(nodeid, ("",))[0] != "failed":
            found[nodeid] = (outcome, text)
    return found
