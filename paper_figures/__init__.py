"""Build figures, tables and pages from stored results, without recomputing any."""
