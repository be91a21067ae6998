"""Files inside stored disks: partitions, a reader that is locked away, and a writer that never leaves its directory.

What lies on a guest's disk is hostile input. The process that looks into file systems (``child``) has no access to the
repository, no privileges, and a bound on memory and time; it asks for bytes and answers entries and data (``wire``).
"""
