"""The oracle of the volume laws: a disk as plain bytes, kept beside the real one.

An :class:`Operation` happens to both. The semantics of the plain bytes are those of write(2), truncate(2),
fallocate(2), ioctl_ficlonerange(2) and rename(2); ``touched`` collects what a precise change map may name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from graincopy.core.extent import Extents
from graincopy.core.units import KIB, MIB, ceil_div
from graincopy.model.volume import Claim
from graincopy.testing.lab import VolumeLab

LARGEST = 2 * MIB  # bytes; what a disk may grow to in a random walk
LONGEST = 96 * KIB  # bytes of one operation


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that happens to a disk. ``length`` is the new size for truncate, ``source`` an offset for reflinks."""

    verb: str
    offset: int = 0
    length: int = 0
    source: int = 0
    seed: int = 0
    how: str = "buffered"

    @property
    def data(self) -> bytes:
        """What is written: noise, or for odd seeds text-like, compressible bytes."""
        return content(self.seed, self.length)

    def __str__(self) -> str:
        how = f", {self.how}" if self.verb == "write" else ""
        source = f" from {self.source}" if self.verb.startswith("reflink") else ""
        return f"{self.verb}({self.offset}, {self.length}{how}{source})"


def content(seed: int, length: int) -> bytes:
    """``length`` bytes that depend on ``seed``; no 4 KiB of them are zeros."""
    noise = random.Random(seed)
    if seed % 2:
        words = [noise.randbytes(4).hex().encode() for _ in range(8)]
        return b" ".join(noise.choices(words, k=length // 9 + 1))[:length]
    return noise.randbytes(length)


class PlainFile:
    """The bytes that a disk should have."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.touched = Extents.empty()

    def touch(self, start: int, stop: int) -> None:
        self.touched = self.touched | Extents.of((start, stop))

    def put(self, offset: int, data: bytes) -> None:
        before = len(self.data)
        self.data.extend(bytes(max(0, offset - before)))
        self.data[offset : offset + len(data)] = data
        self.touch(min(offset, before), offset + len(data))

    def resize(self, size: int) -> None:
        before = len(self.data)
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.touch(min(before, size), max(before, size))

    def clear(self, offset: int, length: int) -> None:
        stop = max(offset, min(offset + length, len(self.data)))
        self.data[offset:stop] = bytes(stop - offset)
        self.touch(offset, stop)

    def apply(self, operation: Operation, donor: bytes) -> None:
        """``operation`` as plain bytes."""
        at, length = operation.offset, operation.length
        before = len(self.data)
        if operation.verb == "write":
            self.put(at, operation.data)
        elif operation.verb == "truncate":
            self.resize(length)
        elif operation.verb in ("punch", "zero_range"):
            self.clear(at, length)
        elif operation.verb == "collapse":
            del self.data[at : at + length]
            self.touch(at, before)
        elif operation.verb == "insert":
            self.data[at:at] = bytes(length)
            self.touch(at, before + length)
        elif operation.verb == "preallocate":
            if at + length > before:
                self.resize(at + length)
            self.touch(at, at + length)
        elif operation.verb in ("reflink_within", "reflink_from"):
            other = donor if operation.verb == "reflink_from" else bytes(self.data)
            self.put(at, other[operation.source : operation.source + length])
        elif operation.verb == "rename_over":
            self.data[:] = operation.data
            self.touch(0, max(before, length))
        else:
            raise ValueError(operation.verb)


class Disk:
    """A disk of a lab and what it should hold. ``history`` tells what happened to it, for messages."""

    def __init__(self, lab: VolumeLab, size: int, volume: int = 0, compressed: bool = False) -> None:
        self.lab, self.volume = lab, volume
        size = ceil_div(size, lab.unit) * lab.unit
        size = lab.whole(size)
        self.claim = lab.make(size, volume, compressed)
        self.plain = PlainFile(size)
        self.history: list[str] = [f"made({size})"]
        self._donor: tuple[Claim, bytes] | None = None

    @property
    def size(self) -> int:
        return len(self.plain.data)

    @property
    def expected(self) -> bytes:
        return bytes(self.plain.data)

    def do(self, operation: Operation) -> None:
        """Let it happen to the real disk and to the plain bytes. Raises NotTried when the lab cannot."""
        lab, claim, op = self.lab, self.claim, operation
        self.lab.need(op.how if op.verb == "write" else op.verb)
        if lab.fixed_size and appends(op, self.size):
            lab.lack("append")
        donor = self.donor() if op.verb == "reflink_from" else None
        deeds: dict[str, Callable[[], None]] = {
            "write": lambda: lab.write(claim, op.offset, op.data, op.how),
            "truncate": lambda: lab.truncate(claim, op.length),
            "punch": lambda: lab.punch(claim, op.offset, op.length),
            "zero_range": lambda: lab.zero_range(claim, op.offset, op.length),
            "collapse": lambda: lab.collapse(claim, op.offset, op.length),
            "insert": lambda: lab.insert(claim, op.offset, op.length),
            "preallocate": lambda: lab.preallocate(claim, op.offset, op.length),
            "reflink_within": lambda: lab.reflink_within(claim, op.source, op.offset, op.length),
            "reflink_from": lambda: lab.reflink_from(claim, self.donor()[0], op.source, op.offset, op.length),
            "rename_over": lambda: lab.rename_over(claim, op.data),
        }
        deeds[op.verb]()
        self.plain.apply(op, donor[1] if donor else b"")
        if self.size % lab.unit:  # it grew, and the storage rounds up
            self.plain.resize(ceil_div(self.size, lab.unit) * lab.unit)
        self.history.append(str(op))

    def write(self, offset: int, length: int, seed: int, how: str = "buffered") -> None:
        self.do(Operation("write", offset, length, seed=seed, how=how))

    def donor(self) -> tuple[Claim, bytes]:
        """Another disk on the same volume, to reflink from."""
        if self._donor is None:
            data = content(4242, 256 * KIB)
            claim = self.lab.make(len(data), self.volume)
            self.lab.write(claim, 0, data)
            self._donor = claim, data
        return self._donor


def appends(operation: Operation, size: int) -> bool:
    """Whether it writes beyond the end of a disk of ``size`` bytes."""
    return operation.verb == "write" and operation.offset + operation.length > size


def fit(raw: Operation, size: int, block: int) -> Operation | None:
    """``raw``, whose numbers are arbitrary, made possible on a disk of ``size`` bytes; None when it cannot be."""
    length = 1 + raw.length % (LONGEST >> raw.seed // 2 % 8)  # short ones as often as long ones
    whole = size // block * block  # bytes in full blocks
    pieces = max(1, length // block) * block
    if raw.verb in ("truncate", "rename_over"):  # mostly near the old size: on a tiny disk little can go wrong
        near = max(0, size + length - LONGEST // 8)
        return replace(raw, offset=0, length=min(LARGEST, near) if raw.offset % 8 else raw.length % LONGEST)
    if raw.verb == "preallocate" or (raw.verb == "write" and raw.how == "buffered"):
        offset = raw.offset % (size + block)
        return replace(raw, offset=offset, length=length) if offset + length <= LARGEST else None
    if raw.verb == "write" and raw.how == "direct":
        offset = raw.offset % (size + block) // block * block
        return replace(raw, offset=offset, length=pieces) if offset + pieces <= LARGEST else None
    if raw.verb in ("write", "punch", "zero_range"):
        if not size:
            return None
        offset = raw.offset % size
        return replace(raw, offset=offset, length=min(length, size - offset))
    if raw.verb in ("collapse", "insert"):
        offset = raw.offset % (whole + 1) // block * block
        grown = offset < size and size + pieces <= LARGEST
        fits = offset + pieces < size if raw.verb == "collapse" else grown
        return replace(raw, offset=offset, length=pieces) if fits else None
    return _fit_reflink(raw, whole, min(pieces, whole // 2 // block * block), block)


def _fit_reflink(raw: Operation, whole: int, length: int, block: int) -> Operation | None:
    if not length:
        return None
    if raw.verb == "reflink_from":
        length = min(length, 64 * KIB)
        offset = raw.offset % (whole - length + 1) // block * block
        return replace(raw, offset=offset, source=raw.source % (128 * KIB) // block * block, length=length)
    low = raw.offset % (whole - 2 * length + 1) // block * block
    high = low + length + raw.source % (whole - low - 2 * length + 1) // block * block
    offset, source = (low, high) if raw.seed % 2 else (high, low)
    return replace(raw, offset=offset, source=source, length=length)


def random_operation(powers: frozenset[str], chance: random.Random) -> Operation:
    """A raw operation of a kind that ``powers`` allow, for :func:`fit`."""
    verb, how = chance.choice(kinds(powers))
    numbers = [chance.randrange(LARGEST) for _ in range(3)]
    return Operation(verb, numbers[0], numbers[1], numbers[2], chance.randrange(1 << 16), how)


def kinds(powers: frozenset[str]) -> list[tuple[str, str]]:
    """``(verb, how)`` of everything that a lab with ``powers`` can do to a disk, writes weighted."""
    ways = [("write", how) for how in ("buffered", "mmap", "direct") if how in powers]
    verbs = ("truncate", "punch", "zero_range", "collapse", "insert", "preallocate", "rename_over")
    found = [(verb, "buffered") for verb in (*verbs, "reflink_within", "reflink_from") if verb in powers]
    return ways * 2 + found
