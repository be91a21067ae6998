"""Stages 3 to 9 on an IBM Storage Virtualize array: S is a vdisk, T a thin FlashCopy of it, made and unmade over SSH.

Read in this order: ``wire`` (commands and text), ``connection`` and ``console`` (SSH), ``provision`` and ``teardown``
(what is done, each step re-read and repeatable), ``deferred`` (what is known of every T, and which are doomed),
``host`` and ``attached`` (the LUN on this host), ``driver``. Experimental until ``validate-volume`` has passed on a
real array (docs/drivers/flashcopy.md).
"""
