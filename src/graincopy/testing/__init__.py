"""Beside the stages: conformance suites, memory drivers' partners, faults. Published for driver authors."""
