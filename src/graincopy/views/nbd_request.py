"""One request of an NBD client, and what can be wrong with it. No socket, no disk, no state."""

from __future__ import annotations

import errno

import msgspec

from graincopy.views import nbd_wire as wire
from graincopy.views.nbd_handshake import REQUEST_LIMIT, Haggling
from graincopy.views.nbd_wire import Cmd

_EVERYWHERE = wire.FUA  # clients set it on commands that do not write; the specification wants it accepted
_COMMAND_FLAGS: dict[int, int] = {
    Cmd.READ: _EVERYWHERE | wire.DF,
    Cmd.WRITE: _EVERYWHERE,
    Cmd.DISC: 0xFFFF,  # whatever it says, it is the last thing that it says
    Cmd.FLUSH: _EVERYWHERE,
    Cmd.TRIM: _EVERYWHERE,
    Cmd.CACHE: _EVERYWHERE,
    Cmd.WRITE_ZEROES: _EVERYWHERE | wire.NO_HOLE,
    Cmd.BLOCK_STATUS: _EVERYWHERE | wire.REQ_ONE,
}
_WRITING = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
_HOLDING = frozenset({Cmd.READ, Cmd.WRITE})  # their bytes are held in memory


class Request(msgspec.Struct):
    """What a client wants. Offsets and lengths in bytes."""

    command: int
    flags: int
    handle: int
    offset: int
    length: int
    payload: bytes = b""


def wrong(request: Request, agreed: Haggling) -> tuple[int, str]:
    """An errno and its reason; 0 when ``request`` is in order: inside the export, known flags, allowed."""
    known = _COMMAND_FLAGS.get(request.command)
    export = agreed.chosen
    assert export is not None, "there are no requests before an export was chosen"
    if known is None:
        return errno.EINVAL, f"command {request.command} is not known"
    if request.flags & ~known or (request.flags & wire.DF and not agreed.structured):
        return errno.EINVAL, f"flags {request.flags:#x} do not go with this command"
    if request.command in _WRITING and not export.writable:
        return errno.EPERM, "the export is read-only"
    if request.command == Cmd.FLUSH:
        return (errno.EINVAL, "a flush has no range") if request.offset or request.length else (0, "")
    if request.command == Cmd.BLOCK_STATUS and not agreed.contexts:
        return errno.EINVAL, "no metadata context was agreed on"
    return _wrong_range(request, export.size)


def _wrong_range(request: Request, size: int) -> tuple[int, str]:
    if not request.length:
        return errno.EINVAL, "the range is empty"
    if request.offset + request.length > size:
        number = errno.ENOSPC if request.command in _WRITING else errno.EINVAL
        return number, "the range goes beyond the end"
    if request.command in _HOLDING and request.length > REQUEST_LIMIT:
        return errno.EINVAL, f"at most {REQUEST_LIMIT} bytes can be asked for at once"
    return 0, ""
