"""Configuration, passphrases and names, below the command line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from graincopy.app import host
from graincopy.app.config import Config, explain, load
from graincopy.app.groups import sets_and_subsystems
from graincopy.app.settings import read_passphrase, read_settings
from graincopy.app.wiring import wire
from graincopy.cli.main import run
from graincopy.core.errors import (
    ConfigWrong,
    GraincopyError,
    LastKey,
    OutputExists,
    OutputUnfit,
    PassphraseWrong,
    UsageWrong,
)
from graincopy.repository.repository import Repository


def write(folder: Path, text: str) -> str:
    path = folder / "config.toml"
    path.write_text(text)
    return str(path)


def test_without_a_file_everything_has_a_default(tmp_path: Path) -> None:
    config, path = load(None, {"HOME": str(tmp_path)})
    assert path is None or path.startswith("/etc/")
    assert config == Config() or path is not None


def test_the_users_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "graincopy").mkdir()
    written = write(tmp_path / "graincopy", 'repo = "/backup"\n[backup]\naudit = "5%"\n')
    config, path = load(None, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert (path, config.repo, config.backup.audit) == (written, "/backup", "5%")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[freze]\ndeadline = 3", "did you mean freeze?"),
        ("[freeze]\ndeadlin = 3", "unknown key freeze.deadlin; did you mean deadline?"),
        ("[freeze]\ndeadline = 0", "freeze.deadline must be more than 0"),
        ("[freeze]\ndeadline = 'long'", "Expected `float`"),
        ("[backup]\naudit = 'some'", "backup.audit"),
        ("[backup]\nworkers = 0", "backup.workers must be more than 0"),
        ("[notify]\non = ['always']", "not always"),
        ("[subsystem.a]\ndirectorys = ['/x']", "unknown key subsystem.a.directorys; did you mean directories?"),
        ("[subsystem.a]\ntimeout = 3", "subsystem.a: files or directories must name something"),
        ("[subsystem.a]\nfiles = ['x']", "subsystem.a: x is no absolute path"),
        ("[subsystem.a]\nfiles = ['/x']\nresume = ['x']", "subsystem.a: resume without quiesce"),
        ("[subsystem.a]\nfiles = ['/x']\npauses = true", "subsystem.a: pauses needs a quiesce command"),
        ("[subsystem.a]\nfiles = ['/x']\ntimeout = 0", "subsystem.a: timeout must be more than 0"),
        ("[subsystem.a]\nfiles = ['/x']\nconsistency = 'high'", "Invalid enum value 'high'"),
        ("[subsystem.a]\nkind = 'mysql'", "subsystem.a: kind is one of plain, libvirt, postgresql"),
        ("[set.a]\nmember = ['/x']", "unknown key set.a.member; did you mean members?"),
        ("[set.a]\nmembers = []", "set.a: members is empty"),
        ("[set.a]\nmembers = ['x.raw']", "absolute paths, not x.raw"),
        ("[set.shop]\nmembers = ['set:shap']", "set.shop: there is no set:shap; did you mean set:shop?"),
        ("repo = ", "Invalid value"),
        ("repo = 5", "Expected `str`"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigWrong) as refused:
        load(write(tmp_path, text), {})
    assert says in refused.value.message


def test_sets_and_subsystems_are_read_explained_and_listed(tmp_path: Path) -> None:
    text = (
        "[set.shop]\nmembers = ['vm:web', 'subsystem:mail', '/ds1/a.raw']\n"
        "[subsystem.mail]\ndirectories = ['/etc/mail']\nquiesce = ['stop', 'it']\npauses = true\n"
    )
    path = write(tmp_path, text)
    config, _ = load(path, {})
    assert config.subsystem["mail"].consistency == "application"
    lines = explain(config, path)
    for line in ("[set.shop]", "[subsystem.mail]", 'quiesce = ["stop", "it"]', "pauses = true"):
        assert line in lines
    assert 'members = ["vm:web", "subsystem:mail", "/ds1/a.raw"]' in lines
    listed = {one["workload"]: one["members"] for one in sets_and_subsystems(wire(read_settings(path, None)))}
    assert set(listed) == {"set:shop", "subsystem:libvirt", "subsystem:mail", "subsystem:postgresql"}
    assert listed["subsystem:mail"] == ["/etc/mail"]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigWrong):
        load(str(tmp_path / "config.toml"), {})


def test_the_first_line_of_the_file_is_the_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "pass"
    path.write_bytes(b"sesame \xff\r\nand a note\n")
    assert read_passphrase(str(path)) == b"sesame \xff"
    path.write_bytes(b"\nsecond line\n")
    with pytest.raises(UsageWrong, match="empty"):
        read_passphrase(str(path))


def test_the_repository_is_named_by_option_then_environment_then_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path, 'repo = "/configured"')
    monkeypatch.delenv("GRAINCOPY_REPO", raising=False)
    assert read_settings(config, None).repo_url() == "/configured"
    monkeypatch.setenv("GRAINCOPY_REPO", "/environment")
    assert read_settings(config, None).repo_url() == "/environment"
    assert read_settings(config, "/option").repo_url() == "/option"
    with pytest.raises(UsageWrong, match="s3://"):
        read_settings(config, None).medium("s3://bucket/vms")


def test_another_passphrase_opens_and_the_last_key_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAINCOPY_PASSPHRASE", "first")
    wiring = wire(read_settings(write(tmp_path, f'[paths]\ncache = "{tmp_path}/cache"'), str(tmp_path / "repo")))
    made = wiring.create_repository(65536, True)
    added = wiring.repository().add_key(b"second", "offsite")
    labels = [key.label for key in wiring.repository().keys()]  # noqa: SIM118 (no mapping)
    assert labels == ["first", "offsite"]
    with_passphrase(monkeypatch, tmp_path, "second").remove_key(made.keys()[0].id)
    with pytest.raises(PassphraseWrong):
        with_passphrase(monkeypatch, tmp_path, "first")
    with pytest.raises(LastKey):
        with_passphrase(monkeypatch, tmp_path, "second").remove_key(added.id)


def test_a_generated_passphrase_opens_what_was_made_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pass phrase"
    for name in ("GRAINCOPY_REPO", "GRAINCOPY_PASSPHRASE", "GRAINCOPY_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert run(["key", "generate", "--new-passphrase-file", file.name]) == 0  # no repository is needed for it
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_bytes()
    assert text.decode().strip() not in capsys.readouterr().out
    assert run(["key", "generate", "--new-passphrase-file", str(file)]) == OutputExists.exit_code
    assert file.read_bytes() == text
    assert run(["key", "generate", "--new-passphrase-file", str(tmp_path / "no" / "such")]) == OutputUnfit.exit_code
    assert run(["key", "generate"]) == UsageWrong.exit_code
    monkeypatch.setenv("GRAINCOPY_REPO", str(tmp_path / "repo"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GRAINCOPY_PASSPHRASE_FILE", str(file))
    assert run(["init"]) == 0
    (tmp_path / "human").write_text("a word of mine\n")
    assert run(["key", "add", "--new-passphrase-file", str(tmp_path / "human")]) == 0
    capsys.readouterr()
    assert run(["key", "list", "--json"]) == 0
    assert [key["kdf"] for key in json.loads(capsys.readouterr().out)] == ["blake3", "argon2id"]
    monkeypatch.setenv("GRAINCOPY_PASSPHRASE_FILE", str(tmp_path / "human"))
    assert run(["points"]) == 0
    (tmp_path / "human").write_bytes(text[:-3] + b"aa\n")
    assert run(["points"]) == PassphraseWrong.exit_code


def test_a_passphrase_from_a_pipe_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``GRAINCOPY_PASSPHRASE_FILE=<(...)`` gives it: whoever opens it a second time waits for ever."""
    monkeypatch.setenv("GRAINCOPY_REPO", str(tmp_path / "repo"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GRAINCOPY_PASSPHRASE", "through the pipe")
    assert run(["init"]) == 0
    monkeypatch.delenv("GRAINCOPY_PASSPHRASE")
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    environ = {**os.environ, "GRAINCOPY_PASSPHRASE_FILE": pipe}
    with subprocess.Popen([sys.executable, "-m", "graincopy", "points"], env=environ) as command:
        Path(pipe).write_text("through the pipe\n")
        assert command.wait(60) == 0


def with_passphrase(monkeypatch: pytest.MonkeyPatch, folder: Path, passphrase: str) -> Repository:
    monkeypatch.setenv("GRAINCOPY_PASSPHRASE", passphrase)
    return wire(read_settings(str(folder / "config.toml"), str(folder / "repo"))).repository()


def test_this_process_lives_and_others_do_not() -> None:
    me = host.this_process()
    assert host.alive(me) is True
    changes: list[tuple[dict[str, object], bool | None]] = [
        ({"started": me.started + 1}, False),
        ({"boot": "another"}, False),
        ({"host": "elsewhere"}, None),
        ({"pid": 2**22 + 1}, False),
    ]
    from msgspec.structs import replace

    for change, answer in changes:
        assert host.alive(replace(me, **change)) is answer, change


def test_every_error_says_what_to_do() -> None:
    from graincopy.core.errors import error_classes

    codes = [cls.exit_code for cls in error_classes() if cls is not GraincopyError]
    assert len(codes) == len(set(codes))
    for cls in error_classes():
        assert cls is GraincopyError or cls.hint, cls.__name__
