"""The error tree: what EXIT STATUS, scripts and people rely on."""

import re
import string

import pytest

from graincopy.core.errors import (
    GraincopyError,
    Interrupted,
    PathMissing,
    Terminated,
    UsageWrong,
    VolumeUnsupported,
    error_classes,
    printable,
)

COMMANDS = {
    "init", "backup", "points", "show", "diff", "restore", "undo", "serve-nbd", "mount", "files", "extract", "expire",
    "collect", "check", "key", "volumes", "targets", "validate-volume", "validate-medium", "doctor", "config",
    "workloads", "verify",
}  # fmt: skip
SUBCOMMANDS = {"key": {"add", "list", "remove", "rotate"}, "config": {"check"}}
PROSE = {"as", "that", "left"}  # "graincopy left", "the graincopy that made it"
OURS = [cls for cls in error_classes() if cls.__module__.startswith("graincopy.core.errors.")]


def fields(cls: type[GraincopyError]) -> set[str]:
    parse = string.Formatter().parse
    return {name for text in (cls.sentence, cls.hint) for _, name, _, _ in parse(text) if name}


def filled(cls: type[GraincopyError]) -> GraincopyError:
    return cls(**{name: f"<{name}>" for name in fields(cls)})


def test_no_two_classes_share_an_exit_code() -> None:
    codes = [cls.exit_code for cls in OURS]
    assert len(codes) == len(set(codes))
    assert codes == sorted(codes)


def test_codes_below_ten_are_results_and_usage_only() -> None:
    assert {cls for cls in OURS if cls.exit_code < 10} == {GraincopyError, UsageWrong}
    assert (Interrupted.exit_code, Terminated.exit_code) == (130, 143)
    assert all(cls.exit_code < 126 for cls in OURS if cls not in (Interrupted, Terminated))


@pytest.mark.parametrize("cls", OURS)
def test_every_class_fills_its_sentence_and_its_hint(cls: type[GraincopyError]) -> None:
    error = filled(cls)
    assert str(error) == error.message != ""
    for name in fields(cls):
        assert f"<{name}>" in error.message + error.next_move
    assert "{" not in error.message + error.next_move


@pytest.mark.parametrize("cls", OURS)
def test_one_sentence_says_what_is_wrong_and_the_hint_what_to_do(cls: type[GraincopyError]) -> None:
    assert "\n" not in cls.sentence + cls.hint
    assert not re.search(r"[.!?](\s|$)", cls.sentence)
    assert cls is GraincopyError or re.search(r"[.}]$", cls.hint)
    assert len(re.findall(r"[.](?:\s|$)", cls.hint)) <= 2


@pytest.mark.parametrize("cls", OURS)
def test_hints_name_commands_that_exist(cls: type[GraincopyError]) -> None:
    for command, following in re.findall(r"graincopy ([a-z]+(?:-[a-z]+)*)(?: ([a-z]+))?", cls.hint):
        assert command in COMMANDS | PROSE
        if command in SUBCOMMANDS:
            assert following in SUBCOMMANDS[command]


@pytest.mark.parametrize("cls", OURS)
def test_every_class_says_in_its_name_or_docstring_what_happened(cls: type[GraincopyError]) -> None:
    assert not cls.__name__.endswith(("Error", "Exception")) or cls is GraincopyError


def test_a_fact_that_is_missing_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(KeyError, match="path"):
        PathMissing(file="/a")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain /path with spaces", "plain /path with spaces"),
        ("two\nlines", r"two\x0alines"),
        ("tab\tbell\a", r"tab\x09bell\x07"),
        ("\x1b[31mred", r"\x1b[31mred"),
        (b"caf\xe9 \xff".decode("utf-8", "surrogateescape"), r"caf\xe9 \xff"),
        ("café", "café"),
        (17, "17"),
        ("\x7f", r"\x7f"),
    ],
)
def test_printable_is_one_line_whatever_a_path_holds(value: object, shown: str) -> None:
    assert printable(value) == shown
    printable(value).encode()


def test_braces_in_a_path_are_only_characters() -> None:
    error = VolumeUnsupported(path="/a/{reason}\n{0}", reason="{path}")
    assert error.message.startswith(r"/a/{reason}\x0a{0} lies on no volume")
    assert error.next_move == r"graincopy volumes /a/{reason}\x0a{0} explains what would make it possible."
