"""Measurements of speed and memory: interleaved, with medians and spread, written to ``benchmarks/results``."""
