"""The face: parse → operation → render. Help, JSON, progress, completion; what is asked of any well-behaved command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from graincopy.app.operations import OPERATIONS
from graincopy.cli.main import run
from graincopy.cli.parser import make_parser
from graincopy.core.errors import error_classes

NAMES = [operation.name for operation in OPERATIONS.operations]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the developer's own configuration."""
    for name in ("GRAINCOPY_REPO", "GRAINCOPY_PASSPHRASE", "GRAINCOPY_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_operation_has_an_action_that_is_there() -> None:
    import importlib

    for operation in OPERATIONS.operations:
        module, _, name = operation.action.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), operation.name


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_options_examples_and_every_exit_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run([name, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: graincopy {name}" in text
    assert "EXAMPLES" in text
    codes = {cls.exit_code for cls in error_classes()} - {1, 2}
    status = text.partition("EXIT STATUS")[2]
    assert codes <= {int(line.split()[0]) for line in status.splitlines() if line.strip() and line.split()[0].isdigit()}


def test_the_examples_of_the_help_can_be_parsed() -> None:
    import shlex

    for operation in OPERATIONS.operations:
        for example in operation.examples:
            words = shlex.split(example.partition(" > ")[0])
            assert words[0] == "graincopy"
            assert make_parser(words[1:]).parse_args(words[1:]).operation == operation.name, example


def test_help_needs_nothing_heavy() -> None:
    script = (
        "import sys, graincopy.cli.main as m\n"
        "try: m.run(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'blake3', 'cryptography', 'zstandard', 'apprise', 'rich', 'pyroaring'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "argv", [[], ["nothing"], ["backup"], ["backup", "x", "--nope"], ["key", "lose"], ["expire", "--keep-last", "-1"]]
)
def test_usage_errors_are_one_sentence_and_a_hint(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 2
    assert "usage:" not in shown.err


def test_common_options_stand_before_or_after_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", "--no-encryption", "--repo", str(tmp_path / "repo")]) == 0
    capsys.readouterr()
    for argv in (
        ["--json", "--repo", str(tmp_path / "repo"), "points"],
        ["points", "--repo", str(tmp_path / "repo"), "--json"],
    ):
        assert run(argv) == 0
        assert json.loads(capsys.readouterr().out) == []


def test_progress_as_lines_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "a.raw"
    disk.write_bytes(bytes(range(256)) * 4096)
    common = ["--repo", str(tmp_path / "repo")]
    assert run(["init", "--no-encryption", *common]) == 0
    capsys.readouterr()
    config = tmp_path / "config.toml"
    config.write_text(f'[paths]\nstate = "{tmp_path}/state"\n')
    assert run(["--config", str(config), "backup", str(disk), *common, "--progress", "json", "--json"]) == 0
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.err.splitlines()]
    assert lines[-1]["what"] == "a.raw"
    assert lines[-1]["done"] == lines[-1]["total"] == 1 << 20
    assert {"rate", "eta_s"} <= lines[-1].keys()
    json.loads(shown.out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in NAMES)


def test_config_check_explains_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[freeze]\ndeadline = 3\n")
    assert run(["--config", str(config), "config", "check"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"# from {config}")
    assert "deadline = 3.0" in text
    assert "[collect]" in text


def test_doctor_answers_without_a_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"reflink", "locked"} <= set(document["drivers"])
    assert all(check["there"] or check["remedy"] for check in document["checks"])


def test_volumes_says_why_a_path_is_not_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volumes", str(tmp_path), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document[0]["driver"] is None
    reasons = {refusal["driver"]: refusal["reason"] for refusal in document[0]["refusals"]}
    assert all("a directory" in reasons[driver] for driver in ("reflink", "btrfs", "locked"))
    assert all(reasons.values())
