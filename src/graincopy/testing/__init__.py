"""Beside the stages: conformance suites, their labs and oracles, faults. Published for driver authors.

lab.py            what a driver gives the volume laws to work on; memory_lab, file_lab, …_lab: labs that exist
file_hands.py     what a lab does to a real file; qemu_machine.py: the machine of a lab
array.py          an array of our own; array_…: its parts, words and rows, its data plane, its SSH server
oracle.py         a disk as plain bytes beside the real one, and the operations that happen to both
laws.py           what a law is; laws_volume, laws_restore, laws_medium: the laws, as plain functions
machines.py       random operations against the soundness law (hypothesis)
volume_suite.py   the laws as a pytest class, to be adopted in ten lines; medium_suite.py likewise
validate.py       the same laws without pytest and hypothesis, for a user's own storage
faults.py         faults on purpose
crash.py          one command line as a real process that is killed or stopped at a named step
"""
