"""Benchmarks of speed and memory. Calls are interleaved, and ``benchmarks/results`` has medians and quartiles."""
