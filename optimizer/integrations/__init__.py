"""Deprecated paths, kept for code that imports them: the modules are in ``optimizer.wrappers``."""
