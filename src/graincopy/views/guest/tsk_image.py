"""A file system's bytes as pytsk3 wants them. Runs in the locked-away process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytsk3

BLOCK = 1 << 16
_BLOCKS_KEPT = 256


class Image(pytsk3.Img_Info):  # type: ignore[misc, unused-ignore]
    """The file system's bytes, from whoever has them, with the last small reads kept."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._get = size, read
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def get_size(self) -> int:
        """Bytes."""
        return self._size

    def close(self) -> None:
        """Nothing to release."""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes; beyond the end none."""
        if offset < 0:
            return b""
        size = min(size, self._size - offset)
        if size <= 0:
            return b""
        if size > BLOCK:
            return self._get(offset, size)
        first, last = offset // BLOCK, (offset + size - 1) // BLOCK
        data = self._block(first) if first == last else b"".join(map(self._block, range(first, last + 1)))
        at = offset - first * BLOCK
        return data[at : at + size]

    def _block(self, number: int) -> bytes:
        data = self._kept.get(number)
        if data is None:
            data = self._get(number * BLOCK, min(BLOCK, self._size - number * BLOCK))
            self._kept[number] = data
            if len(self._kept) > _BLOCKS_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(number)
        return data
