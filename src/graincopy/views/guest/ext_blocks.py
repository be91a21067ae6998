"""Where the blocks of a file of ext2 and ext3 lie: 12 numbers in its inode, and blocks of numbers below three more.

pytsk3 walks all of a file's size for them, holes too: minutes for an empty file that says it has 4 TiB.
Documentation/filesystems/ext4/blockmap.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

_DIRECT, _NUMBERS = 12, struct.Struct("<15L")
_AT = 0x28  # i_block in the inode

Read = Callable[[int, int], bytes]  # offset in the file system, length
Numbers = tuple[int, Sequence[int]]  # a logical block, and where it and its successors lie; 0: a hole


class BlockMap:
    """The blocks of the inode ``data``, each of ``block`` bytes."""

    def __init__(self, read: Read, data: bytes, block: int) -> None:
        self._read, self._block, self._each = read, block, block // 4
        self._top = _NUMBERS.unpack_from(data, _AT)

    def runs(self, size: int) -> Iterator[tuple[int, int]]:
        """Bytes ``[start, stop)`` of a file of ``size`` bytes that lie one after the other on the disk, ascending.

        Raises ValueError and OSError as :meth:`read`.
        """
        first = stop = place = 0  # of the run so far, in blocks; ``place``: where its next block would lie
        for start, numbers in self._numbers(-(-size // self._block)):
            for logical, number in enumerate(numbers, start):
                if number and number == place and logical == stop:
                    stop, place = stop + 1, place + 1
                    continue
                if stop > first:
                    yield first * self._block, stop * self._block
                first, stop, place = logical, logical + bool(number), number + 1
        if stop > first:
            yield first * self._block, stop * self._block

    def _numbers(self, count: int) -> Iterator[Numbers]:
        """The numbers of all blocks below ``count``, without what is a hole as a whole."""
        yield 0, self._top[: min(_DIRECT, count)]
        first = _DIRECT
        for level, number in enumerate(self._top[_DIRECT:], 1):
            yield from self._below(number, level, first, count)
            first += self._each**level

    def _below(self, number: int, level: int, first: int, count: int) -> Iterator[Numbers]:
        if not number or first >= count:
            return
        numbers = self._table(number)
        if level == 1:
            yield first, numbers[: count - first]
            return
        span = self._each ** (level - 1)
        for at, inner in enumerate(numbers):
            yield from self._below(inner, level - 1, first + at * span, count)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file inside one run, or inside one block. Raises ValueError for what lies beyond the end."""
        logical, within = divmod(offset, self._block)
        number = self._place(logical)
        return self._whole(number * self._block + within, length) if number else bytes(length)

    def _place(self, logical: int) -> int:
        """Where a block lies; 0: nowhere."""
        if logical < _DIRECT:
            return int(self._top[logical])
        logical -= _DIRECT
        for level, top in enumerate(self._top[_DIRECT:], 1):
            if logical < self._each**level:
                return self._down(int(top), level, logical)
            logical -= self._each**level
        return 0

    def _down(self, number: int, level: int, logical: int) -> int:
        for depth in range(level - 1, -1, -1):
            if not number:
                return 0
            at, logical = divmod(logical, self._each**depth)
            number = self._table(number)[at]
        return number

    def _table(self, number: int) -> Sequence[int]:
        return struct.unpack(f"<{self._each}L", self._whole(number * self._block, self._block))

    def _whole(self, offset: int, length: int) -> bytes:
        data = self._read(offset, length)
        if len(data) < length:
            raise ValueError("a block of it lies beyond the end")
        return data
