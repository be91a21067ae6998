"""A thin_delta of a million extents, parsed and intersected with a million file extents: seconds, median of five.

No LVM is needed: the answer is made up. Beside it, in the same run: an XML parser that only looks at the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from xml.parsers import expat

import numpy as np

from graincopy.core.placement import Placement
from graincopy.volumes.lvm_thin_delta import parse_delta

BLOCK = 65536


def answer(count: int) -> bytes:
    """What thin_delta would print of ``count`` changed blocks, every second one of the volume."""
    lines = "\n".join(f'    <different begin="{2 * at}" length="1"/>' for at in range(count))
    head = '<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">'
    return f'{head}\n  <diff left="1" right="2">\n{lines}\n  </diff>\n</superblock>\n'.encode()


def scattered(count: int) -> Placement:
    """A file of ``count`` extents of one block, in random order on the volume."""
    starts = np.arange(count, dtype=np.int64) * BLOCK
    volume = np.random.default_rng(1).permutation(2 * count)[:count].astype(np.int64) * BLOCK
    return Placement(count * BLOCK, starts, starts + BLOCK, volume, np.ones(count, np.uint8))


def timed(work: Callable[[], object], times: int) -> float:
    """Median seconds of CPU: nothing here waits."""
    found = []
    for _ in range(times):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return round(statistics.median(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    text, placement = answer(options.count), scattered(options.count)
    changed = parse_delta(io.BytesIO(text)).changed
    figures = {
        "extents": options.count,
        "bytes": len(text),
        "bare_parser_s": timed(lambda: expat.ParserCreate().ParseFile(io.BytesIO(text)), options.times),
        "parse_s": timed(lambda: parse_delta(io.BytesIO(text)), options.times),
        "intersect_s": timed(lambda: placement.to_file(changed), options.times),
        "both_s": timed(lambda: placement.to_file(parse_delta(io.BytesIO(text)).changed), options.times),
    }
    json.dump(figures, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
