"""Stages 8 and 9 of 9: chunks, packs, grain maps, restore points. The only layer that knows bytes on the medium."""
