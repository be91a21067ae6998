"""The command line: parse → operation → render. No decisions.

``main`` is the process; :func:`run` is the same for callers that bring their own crash points.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from graincopy.app.operations import OPERATIONS
from graincopy.cli.parser import make_parser
from graincopy.core.errors import GraincopyError, Interrupted, Terminated, printable

if TYPE_CHECKING:
    from graincopy.app.answer import Answer
    from graincopy.app.wiring import Wiring

BROKEN_PIPE = 141  # 128 + SIGPIPE, as if the signal had not been ignored by Python


def main() -> None:
    """The console script."""
    code = run(sys.argv[1:])
    gc.freeze()  # the process ends: what a last collection could find goes with it, and looking takes longer
    sys.exit(code)


def run(arguments: Sequence[str], step: Callable[[str], None] | None = None) -> int:
    """Run one command line and answer its exit code. ``step`` is called at each named crash point."""
    _listen_to_signals()
    as_json = "--json" in arguments
    try:
        values = vars(make_parser(arguments).parse_args(arguments))
        answer = _operate(values, step)
        _render(answer, as_json)
        return answer.exit_code
    except GraincopyError as failure:
        return _complain(failure)
    except KeyboardInterrupt:
        return _complain(Interrupted())
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, MemoryError) as failure:
        return _complain(GraincopyError(what=f"{type(failure).__name__}: {failure}"))


def _operate(values: dict[str, Any], step: Callable[[str], None] | None) -> Answer:
    operation = OPERATIONS.find(values["operation"])
    module, _, name = operation.action.partition(":")
    if module == __name__:
        return completion(None, values)
    from graincopy.app.settings import read_settings, unlock_ahead

    settings = read_settings(values.get("config"), values.get("repo"))
    extras: dict[str, Any] = {"step": step} if step else {}
    if operation.opens:
        extras["master_of"] = unlock_ahead(settings)
    with contextlib.ExitStack() as ending:
        if operation.looks_inside:
            from graincopy.views.guest.process import Spare

            extras["spare"] = ending.enter_context(Spare())
        gc.disable()  # while modules are made, of which none is garbage
        action: Callable[[Wiring, dict[str, Any]], Answer] = getattr(importlib.import_module(module), name)
        from graincopy.app.wiring import wire
        from graincopy.cli import progress

        gc.enable()
        shown = progress.make(values.get("progress", "auto"))
        if shown is not None:
            extras["progress"] = shown
            ending.callback(shown.close)
        return action(wire(settings, **extras), values)


def _listen_to_signals() -> None:
    """SIGTERM ends a run as Ctrl-C does: by an exception, so that everything is thawed and T removed."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def _render(answer: Answer, as_json: bool) -> None:
    if as_json and answer.document is None:
        pass  # it was printed when the operation became ready
    elif as_json:
        from graincopy.app.answer import decodable

        sys.stdout.write(json.dumps(decodable(answer.document), ensure_ascii=False) + "\n")
    else:
        sys.stdout.writelines(f"{printable(line)}\n" for line in answer.lines)
    for warning in answer.warnings:
        sys.stderr.write(f"warning: {printable(warning)}\n")
    sys.stdout.flush()


def _complain(failure: GraincopyError) -> int:
    """At most three lines on stderr: what is wrong, what to do."""
    sys.stderr.write(f"graincopy: {printable(failure)}\n")
    if failure.next_move:
        sys.stderr.write(f"{failure.next_move}\n")
    return failure.exit_code


def completion(_wiring: None, values: dict[str, Any]) -> Answer:
    """A completion script for the shell."""
    import shtab

    from graincopy.app.answer import Answer

    script = shtab.complete(make_parser(), values["shell"])
    return Answer({"script": script}, tuple(script.splitlines()))


if __name__ == "__main__":
    main()
