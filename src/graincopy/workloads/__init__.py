"""Stage 2 of 9: workload → files. What belongs to a VM, a set or a subsystem, and how to quiesce it."""
