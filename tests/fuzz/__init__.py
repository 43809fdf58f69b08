"""Random steps of every engine against the paper's transcription: ``python -m tests.fuzz``."""
