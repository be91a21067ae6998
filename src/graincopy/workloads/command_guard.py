"""The guard of a subsystem (stage 5): a program of its own that quiesces it, and resumes it whatever happens.

It is exec'd, and speaks JSON lines over its standard input and output::

    parent → {"quiesce": [argv, ...], "resume": [argv, ...], "timeout": seconds, "hold": seconds}
    guard  → {"said": "quiesced"}                         every quiesce command ended with 0
    guard  → {"said": "failed", "why": ..., "resume": ""} one did not; what was begun was resumed ("": without trouble)
    parent → resume
    guard  → {"said": "resumed", "cause": "asked", "resume": ""}    cause: asked, parent or deadline

It resumes when asked, when its standard input ends (the parent was killed) and ``hold`` seconds after the quiesce.
Once a quiesce command was started, the resume commands run, however the quiesce ended; one that fails is run again, up
to three times: it must be harmless when nothing is quiesced. Commands are run by argv, without a shell, in a session of
their own, which is killed when the time is over. A resume that fails for good goes to the system log, too.
"""

import json
import os
import select
import signal
import subprocess
import sys
import syslog
import time
from typing import Any

_TAIL = 2000  # bytes of output that are kept for the error sentence
_ATTEMPTS = 3
_PAUSE = 1.0  # seconds between them


def run(argv: list[str], timeout: float) -> tuple[bool, str]:
    """Run one command to its end. Gives whether it was started, and what went wrong ("": nothing)."""
    output = os.memfd_create("output", os.MFD_CLOEXEC)  # a pipe would stay open in daemons that the command starts
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True
        )
    except (OSError, ValueError) as error:
        os.close(output)
        return False, f"{argv[0]} cannot be run: {getattr(error, 'strerror', None) or error}"
    try:
        code = process.wait(timeout)
        trouble = "" if code == 0 else f"{argv[0]} ended with {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        trouble = f"{argv[0]} did not end within {timeout:g} s"
    said = _tail(output)
    os.close(output)
    return True, f"{trouble}: {said}" if trouble and said else trouble


def _tail(output: int) -> str:
    size = os.fstat(output).st_size
    text = os.pread(output, _TAIL, max(0, size - _TAIL)).decode("utf-8", "backslashreplace")
    return " ".join(text.split())


def quiesce(order: dict[str, Any]) -> tuple[bool, str]:
    """Run the quiesce commands in order. Gives whether any was started, and what went wrong ("": nothing)."""
    begun = False
    for argv in order["quiesce"]:
        started, trouble = run(argv, order["timeout"])
        begun = begun or started
        if trouble:
            return begun, trouble
    return begun, ""


def resume(order: dict[str, Any]) -> str:
    """Run every resume command, whatever becomes of the others; what went wrong for good ("": nothing)."""
    troubles = [trouble for argv in order["resume"] if (trouble := _insist(argv, order["timeout"]))]
    if troubles:
        syslog.syslog(syslog.LOG_CRIT, f"graincopy: a subsystem may still stand still: {'; '.join(troubles)}")
    return "; ".join(troubles)


def _insist(argv: list[str], timeout: float) -> str:
    trouble = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        trouble = run(argv, timeout)[1]
        if not trouble:
            return ""
    return trouble


def wait(hold: float) -> str:
    """Why to resume now: the parent asks, the parent is gone, or the time is over."""
    if not select.select([0], [], [], hold)[0]:
        return "deadline"
    return "asked" if os.read(0, 64).strip() == b"resume" else "parent"


def say(**facts: str) -> None:
    """One line to the parent; a parent that is gone does not matter."""
    try:
        os.write(1, json.dumps(facts).encode() + b"\n")
    except OSError:
        return


def order_line() -> bytes:
    """The first line of standard input; nothing behind it has been sent yet."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            return b""
        line += piece
    return line


def main() -> None:
    """From the order to the end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: the commands would inherit that
    line = order_line()
    if not line:
        return
    order = json.loads(line)
    begun, trouble = quiesce(order)
    if trouble:
        say(said="failed", why=trouble, resume=resume(order) if begun else "")
        return
    say(said="quiesced")
    cause = wait(order["hold"])
    say(said="resumed", cause=cause, resume=resume(order))


if __name__ == "__main__":
    main()
    sys.exit(0)
