"""Stage 8 of 9, far end: named objects on a backup medium. Knows bytes and names, nothing of their meaning."""
