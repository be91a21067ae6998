"""Stage 1 of 9, the face: parse → operation → render. No decisions."""
