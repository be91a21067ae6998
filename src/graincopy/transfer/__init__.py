"""Stage 8 of 9: grains in motion, from T into packs and from packs onto S."""
