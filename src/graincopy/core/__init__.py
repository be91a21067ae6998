"""Under every stage: units, ids, extents, placements, bitmaps, clock, errors. No I/O, no clock, no chance."""
