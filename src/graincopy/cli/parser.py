"""The operations table as an argument parser. Errors are one sentence, never a help page."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any, NoReturn

from graincopy import __version__
from graincopy.app.operations import OPERATIONS, Input, Operation
from graincopy.core.errors import UsageWrong, error_classes


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving; what stands below the help is made when asked."""

    operation: Operation | None = None

    def format_help(self) -> str:
        examples = _examples(self.operation) if self.operation else ""
        self.epilog = examples + _exit_status(self.operation)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageWrong(what=message)


def make_parser(words: Collection[str] | None = None) -> Parser:
    """The command line; with ``words``, those that are going to be parsed, without the inputs of other operations."""
    parser = Parser(
        prog="graincopy",
        description="Backup and restore of virtual machines: snapshot coarse, copy fine, never merge.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"graincopy {__version__}")
    _add_common(parser)
    commands = parser.add_subparsers(dest="operation", metavar="COMMAND", required=True, parser_class=Parser)
    for operation in OPERATIONS.operations:
        added = _add_operation(commands, operation)
        if words is None or operation.name in words:  # to make them all takes milliseconds, at every start
            _add_inputs(added, operation)
    return parser


def _add_operation(commands: argparse._SubParsersAction[Parser], operation: Operation) -> Parser:
    parser = commands.add_parser(
        operation.name,
        help=operation.summary,
        description=". ".join(filter(None, (operation.summary.capitalize(), operation.about))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.operation = operation
    return parser


def _add_inputs(parser: Parser, operation: Operation) -> None:
    for one in operation.inputs:
        _add_input(parser, one)
    if operation.changes:
        parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    _add_common(parser)


def _add_input(parser: argparse.ArgumentParser, one: Input) -> None:
    if one.kind == "flag":
        parser.add_argument(one.name, action="store_true", help=one.help)
        return
    if one.kind == "repeated":
        parser.add_argument(one.name, action="append", help=one.help, metavar=one.metavar or None)
        return
    extras: dict[str, Any] = {"metavar": one.metavar or None, "choices": one.choices or None}
    if one.kind in ("many", "any", "optional"):
        extras["nargs"] = {"many": "+", "any": "*", "optional": "?"}[one.kind]
    if one.choices and not one.metavar:
        del extras["metavar"]
    parser.add_argument(
        one.name, help=one.help, default=one.default, type=_count if one.kind == "number" else str, **extras
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Options that may stand before or after the command."""
    common = parser.add_argument_group("everywhere")
    keep = argparse.SUPPRESS
    common.add_argument("--repo", metavar="URL", default=keep, help="the repository; default: GRAINCOPY_REPO")
    common.add_argument("--config", metavar="FILE", default=keep, help="another configuration file")
    common.add_argument("--json", action="store_true", default=keep, help="one JSON document on stdout")
    common.add_argument(
        "--progress", choices=("auto", "bar", "json", "none"), default=keep, help="how to show progress"
    )


def _examples(operation: Operation) -> str:
    lines = "".join(f"  {example}\n" for example in operation.examples)
    return f"EXAMPLES\n{lines}\n" if lines else ""


def _exit_status(operation: Operation | None = None) -> str:
    """EXIT STATUS: the results, then every error class."""
    special = dict(operation.results) if operation else {3: "done, with warnings"}
    results = {0: "done", 1: "failed", 2: "usage", **special}
    rows = [f"  {code:3}  {meaning}" for code, meaning in sorted(results.items())]
    rows += [f"  {cls.exit_code:3}  {_words(cls.__name__)}" for cls in error_classes() if cls.exit_code >= 10]
    return "EXIT STATUS\n" + "\n".join(rows)


def _words(name: str) -> str:
    """``FreezeRefused`` → ``freeze refused``."""
    return "".join(f" {char.lower()}" if char.isupper() else char for char in name).strip()
