"""Adapters for other libraries that compute the same quantities; they serve only as cross-checks."""
