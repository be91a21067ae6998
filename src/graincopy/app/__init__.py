"""Stage 1 of 9: operations, configuration, and the wiring that alone names concrete drivers."""
