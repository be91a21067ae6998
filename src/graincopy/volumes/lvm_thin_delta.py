"""What ``thin_delta`` says, as extents (stage 6): which blocks of two thin devices are the same, and which are not.

Output of thin-provisioning-tools 0.9 (C++) and 1.x (Rust), which differ in the attributes of ``superblock`` alone:

    <superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">
      <diff left="1" right="2">
        <same begin="0" length="5"/> <different …/> <left_only …/> <right_only …/>

``begin`` and ``length`` are in blocks of the pool, ``data_block_size`` in sectors; what is mapped in neither device is
not mentioned. Format: thin_delta(8); base/… thin_delta.cc (0.9), src/thin/delta_visitor.rs (1.x).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import IO
from xml.parsers import expat

import msgspec
import numpy as np

from graincopy.core.extent import Extents

SECTOR = 512
_KINDS = ("same", "different", "left_only", "right_only")
_LINES = tuple(f'    <{kind} begin="" length=""/>\n'.encode() for kind in _KINDS)
_DIGITS_ALONE = bytes(at if chr(at) in "0123456789" else ord(" ") for at in range(256))
_PIECE = 1 << 20  # bytes
_FARTHEST = 1 << 60  # bytes
_FIXED = (1, 0, 6)  # the first of the 1.x that does not take neighbouring blocks for neighbours in the pool, too


class Garbled(ValueError):
    """The output cannot be what thin_delta means to say. Its text is one clause."""


class Delta(msgspec.Struct, frozen=True):
    """Two thin devices compared, in bytes of the volume; the four sets are disjoint."""

    left: int  # thin device ids
    right: int
    block: int  # bytes
    same: Extents
    different: Extents
    left_only: Extents
    right_only: Extents

    @property
    def changed(self) -> Extents:
        """What may read otherwise on the right than on the left."""
        return self.different | self.left_only | self.right_only

    @property
    def mapped_left(self) -> Extents:
        """What the left device has blocks for; the rest reads as zeros unless it has an external origin."""
        return self.same | self.different | self.left_only

    @property
    def mapped_right(self) -> Extents:
        """As :attr:`mapped_left`, of the right device."""
        return self.same | self.different | self.right_only


class _Reader:
    """Handlers of expat, which sees to it that the document is well-formed and complete."""

    def __init__(self) -> None:
        self.runs = {kind: array("q") for kind in _KINDS}
        self.depth = 0
        self.block = self.left = self.right = -1

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        run = self.runs.get(name)
        if run is not None and self.depth == 3:
            run.append(int(attributes["begin"]))
            run.append(int(attributes["length"]))
        elif name == "diff" and self.depth == 2 and self.left < 0:
            self.left, self.right = int(attributes["left"]), int(attributes["right"])
        elif name == "superblock" and self.depth == 1:
            self.block = int(attributes["data_block_size"]) * SECTOR
        else:
            raise Garbled(f"there is an unexpected element {name}")

    def end(self, _name: str) -> None:
        self.depth -= 1

    def take(self, lines: bytes) -> bool:
        """Take in many ranges at once, if ``lines`` are nothing else, in the words of both dialects.

        Without its digits, such a line is one of four. That holds for all of them when the four make up the whole
        length; then the digits are two numbers for each. A document without these lines is as well-formed as with.
        """
        bare = lines.translate(None, b"0123456789")
        count = {line: bare.count(line) for line in _LINES}
        if sum(len(line) * times for line, times in count.items()) != len(bare):
            return False
        numbers = np.fromstring(lines.translate(_DIGITS_ALONE), np.int64, sep=" ")
        if len(numbers) != 2 * sum(count.values()):
            return False
        text = np.frombuffer(lines, np.uint8)
        initials = text[np.flatnonzero(text == ord("<")) + 1]
        for kind in _KINDS:
            self.runs[kind].frombytes(numbers.reshape(-1, 2)[initials == ord(kind[0])].tobytes())
        return True


def parse_delta(stream: IO[bytes]) -> Delta:
    """Read one whole answer of thin_delta, as it comes. Raises Garbled for anything else, and for half of one."""
    reader, parser = _Reader(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    try:
        for lines in _whole_lines(stream):
            if reader.depth != 2 or not reader.take(lines):
                parser.Parse(lines)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise Garbled(f"it is no whole XML document: {error}") from error
    except Garbled:
        raise
    except (KeyError, OverflowError, ValueError) as error:
        raise Garbled(f"an attribute is missing or no number: {error}") from error
    if reader.left < 0 or reader.block <= 0:
        raise Garbled("it compares nothing")
    found = {kind: _extents(run, reader.block) for kind, run in reader.runs.items()}
    delta = Delta(reader.left, reader.right, reader.block, **found)
    apart = sum(one.total for one in found.values())
    if (delta.changed | delta.same).total != apart:
        raise Garbled("its ranges overlap")
    return delta


def _whole_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The stream in pieces that end with a line, but for the last."""
    rest = b""
    while piece := stream.read(_PIECE):
        lines, newline, rest = (rest + piece).rpartition(b"\n")
        yield lines + newline
    yield rest


def _extents(run: array[int], block: int) -> Extents:
    """Pairs of (begin, length) in blocks as extents in bytes."""
    pairs = np.frombuffer(run, np.int64).reshape(-1, 2) if run else np.empty((0, 2), np.int64)
    starts, lengths = pairs[:, 0], pairs[:, 1]
    if len(pairs) and (int(starts.min()) < 0 or int(lengths.min()) <= 0):
        raise Garbled("a range is empty or begins before the volume")
    if len(pairs) and max(int(starts.max()), int(lengths.max())) > _FARTHEST // block:
        raise Garbled("a range lies beyond any volume")
    extents = Extents.from_arrays(starts, starts + lengths)
    if extents.total != int(lengths.sum()):
        raise Garbled("its ranges overlap")
    return extents.to_bytes(block)


def distrusted(version: str) -> str | None:
    """Why a thin_delta of this ``version`` (what ``thin_delta -V`` prints) is not believed; None when it is.

    1.0 to 1.0.5 join blocks that are neighbours in the volume although they are none in the pool, and so call changed
    blocks the same ("Fix range mappings preprocessing in thin_delta", CHANGES of 1.0.6). Before 0.9 it has missed
    blocks in several ways, too.
    """
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if found is None:
        return f"its version cannot be told ({version.strip() or 'it says nothing'})"
    number = (int(found[1]), int(found[2]), int(found[3] or 0))
    if number < (0, 9, 0) or (1, 0, 0) <= number < _FIXED:
        return f"version {found[0]} calls changed blocks unchanged; 0.9 and 1.0.6 or newer do not"
    return None
