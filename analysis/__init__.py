"""From stored results to tables: load-only, and a missing row is an error, never a zero."""
