"""Build tables from stored results. Nothing is recomputed, and a missing row is an error."""
