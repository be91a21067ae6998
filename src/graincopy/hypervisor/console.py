"""Below stage V, the trial: what a guest says on its serial port and what it shows on its screen, through libvirt.

Both come through the connection to libvirt, so that nothing is written on its host.
"""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from typing import Any

from graincopy.hypervisor.link import binding

KEPT = 256 * 1024  # bytes of the console that are remembered
_PNG = b"\x89PNG\r\n\x1a\n"


class Console:
    """The first serial port of a running ``domain`` (a virDomain), from now on."""

    def __init__(self, domain: Any) -> None:
        """Raises libvirtError."""
        libvirt = binding()
        self._domain = domain
        self._stream = domain.connect().newStream(libvirt.VIR_STREAM_NONBLOCK)
        domain.openConsole(None, self._stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
        self.said = b""

    def listen(self) -> bytes:
        """Everything that was said so far, as far as it is remembered. Raises libvirtError."""
        self._domain.info()  # without an event loop, data come in while another answer is waited for
        while True:
            more = self._stream.recv(65536)
            if not isinstance(more, bytes) or not more:  # -2: nothing now
                return self.said
            self.said = (self.said + more)[-KEPT:]

    def close(self) -> None:
        """Let it go; may be repeated."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(binding().libvirtError):
                stream.abort()


def take_picture(domain: Any) -> bytes | None:
    """What the first screen of ``domain`` (a virDomain) shows, as PNG; None where QEMU gives nothing readable.

    Raises libvirtError.
    """
    parts: list[bytes] = []
    stream = domain.connect().newStream(0)
    kind = domain.screenshot(stream, 0, 0)
    stream.recvAll(lambda _stream, data, _opaque: parts.append(data), None)
    stream.finish()
    picture = b"".join(parts)
    if picture.startswith(_PNG):
        return picture
    try:
        return png_from_ppm(picture) if "ppm" in kind or "pixmap" in kind else None
    except ValueError:
        return None


def png_from_ppm(data: bytes) -> bytes:
    """A binary pixmap (netpbm's P6, 8 bits) as PNG (RFC 2083), for QEMU before 7.1. Raises ValueError."""
    head: list[bytes] = []
    rest = data
    while len(head) < 4:
        word, rest = _word(rest)
        head += [word]
    if head[0] != b"P6" or head[3] != b"255":
        raise ValueError("it is no pixmap of 8 bits")
    width, height = int(head[1]), int(head[2])
    if width <= 0 or height <= 0 or len(rest) < width * height * 3:
        raise ValueError("the pixmap is cut off")
    lines = b"".join(b"\0" + rest[at : at + width * 3] for at in range(0, width * height * 3, width * 3))
    return b"".join(
        (
            _PNG,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            _chunk(b"IDAT", zlib.compress(lines, 6)),
            _chunk(b"IEND", b""),
        )
    )


def _word(data: bytes) -> tuple[bytes, bytes]:
    """The next word of the head, and what comes after the one white space behind it. Raises ValueError at the end."""
    while data[:1].isspace() or data.startswith(b"#"):
        data = data.partition(b"\n")[2] if data.startswith(b"#") else data[1:]
    word = data[:32].split(maxsplit=1)[:1]
    if not word or len(data) <= len(word[0]):
        raise ValueError("its head is cut off")
    return word[0], data[len(word[0]) + 1 :]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
